"""Times, memory and operations of Stage 1: sampling and training updates.

The workloads come from outside (mvdiffusion.workloads, through scripts/benchmark.py); here they are varied and timed.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.cases import Case
from benchmarks.network import MEMORY_NOTE, TOO_LARGE, mebibytes, times_faster, try_to_time
from benchmarks.report import Table
from benchmarks.timing import MATRIX_SIDE, Timing, ratio, time_in_turn, time_matrix_product

HELD_NOTE = "Held: weights and what else stays between runs; peak memory comes on top."
FEW_STEPS = 2  # for the peak memory, which more steps do not raise


def measure_sampling(
    workload: Case, device: torch.device, repeats: int, *, compile: bool = False, memory: bool = True
) -> Table:
    """Pictures to views with sparse and with full attention, on request compiled too; all run in turn."""
    rate = busy_matrix_rate(workload.dtype(device), device, repeats)
    cases = [
        replace(workload, attention=attention, compile=compiled)
        for compiled in ((False, True) if compile else (False,))
        for attention in ("sparse", "full")
    ]
    found = try_to_time(cases, device, repeats, time_whole_and_steps)
    records = []
    for case, times in zip(cases, found):
        whole, step = (TOO_LARGE, TOO_LARGE) if times == TOO_LARGE else times
        flops, step_flops = case.flops(), case.step_flops()
        records.append({
            "attention": case.attention + (", compiled" if case.compile else ""),
            "whole, ms": whole, "one step of the UNet, ms": step,
            "times the first row's": _times(whole, found[0]),
            "operations, TFLOP": flops / 1e12, "of a step, TFLOP": step_flops / 1e12,
            "step, TFLOP/s": _rate(step_flops, step, device, 1e12),
            "step, share of the matrix rate": _rate(step_flops, step, device, rate),
            "whole, share of the matrix rate": _rate(flops, whole, device, rate),
            "held, MiB": case.held_bytes(device) / 2**20,
            "peak memory, MiB": mebibytes(replace(case, num_steps=FEW_STEPS), device) if memory else None,
        })  # fmt: skip
    notes = [
        "Whole: CLIP and VAE of the picture, all steps, VAE decoding of all views. A step: the UNet on both guidance "
        "halves, and the sampler.",
        "Operations: matrix products, convolutions and attention between views, counted on shapes.",
        rate_note(workload.dtype(device), device, rate), f"{MEMORY_NOTE} {HELD_NOTE}",
    ]  # fmt: skip
    return Table(f"Sampling: {workload}", records, notes)


def measure_diffusion_training(workload: Case, device: torch.device, repeats: int, *, memory: bool = True) -> Table:
    """An update with the latent cache and without, run in turn; with all activations kept and with checkpointing."""
    rate = busy_matrix_rate(workload.dtype(device), device, repeats)
    records = []
    for checkpointing in (False, True):
        cases = [replace(workload, gradient_checkpointing=checkpointing, cached=cached) for cached in (True, False)]
        times = try_to_time(cases, device, repeats)
        for case, timing in zip(cases, times):
            flops = case.flops()
            records.append({
                "update": "gradient checkpointing" if checkpointing else "all activations kept",
                "latents": "from the cache" if case.cached else "encoded",
                "ms": timing,
                "samples per second": None if timing == TOO_LARGE else case.samples_per_update() / timing.median,
                "times faster with the cache": times_faster(times[1], times[0]) if case.cached else None,
                "operations, TFLOP": flops / 1e12,
                "TFLOP/s": _rate(flops, timing, device, 1e12),
                "share of the matrix rate": _rate(flops, timing, device, rate),
                "held, MiB": case.held_bytes(device) / 2**20,
                "peak memory, MiB": mebibytes(case, device) if memory else None,
            })  # fmt: skip
    notes = [
        "An update of train_diffusion.py: batch from disk, the UNet's forward and backward pass, clipping, AdamW, "
        "average. Encoded: pictures are read, and VAE (all views) and CLIP run; from the cache: neither.",
        "Operations: of what is useful; what checkpointing computes again does not count.",
        rate_note(workload.dtype(device), device, rate), f"{MEMORY_NOTE} {HELD_NOTE}",
    ]  # fmt: skip
    return Table(f"Training of Stage 1: {workload}", records, notes)


def time_whole_and_steps(runs: list, device: torch.device, repeats: int) -> list[tuple[Timing, Timing]]:
    """`time_in_turn`, and of the same runs the time of one step as they took it themselves (`step_seconds`)."""
    whole = time_in_turn(runs, device, repeats)
    # Every second run counted.
    return [(timing, Timing(*zip(*run.step_seconds[1::2]))) for timing, run in zip(whole, runs)]


def busy_matrix_rate(dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    """Operations per second of a large square product in `dtype`; per second of the process on the CPU."""
    side = MATRIX_SIDE[device.type]
    return 2 * side**3 / time_matrix_product(side, dtype, device, repeats).busy_median(device)


def rate_note(dtype: torch.dtype, device: torch.device, rate: float) -> str:
    seconds = "" if device.type == "cuda" else " Rates and shares: by seconds of the process, which other work spares."
    name = str(dtype).removeprefix("torch.")
    return f"Matrix rate, measured in this run by a large square product in {name}: {rate / 1e12:.3g} TFLOP/s.{seconds}"


def _times(timing: Timing | str, first: tuple[Timing, Timing] | str) -> float | None:
    return None if TOO_LARGE in (timing, first) else ratio(timing, first[0])


def _rate(flops: float, timing: Timing | str, device: torch.device, unit: float) -> float | None:
    """Operations per second over `unit`; None where nothing was timed."""
    return None if timing == TOO_LARGE else flops / timing.busy_median(device) / unit
