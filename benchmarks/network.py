"""Times, memory and operations of the GS-LRM network: against plain torch modules, in training, with fewer tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.cases import Case, NetworkCase, NetworkSize, variants
from benchmarks.memory import peak_memory
from benchmarks.report import Table
from benchmarks.timing import Timing, matrix_dtype, matrix_rate, ratio, time_in_turn

COVERAGES = (0.05, 0.15, 0.30, 0.60, 1.0)
TOO_LARGE = "out of memory"


def measure_gslrm(
    size: NetworkSize, device: torch.device, repeats: int, *, compile: bool = False, memory: bool = True
) -> Table:
    """Forward and forward + backward beside the same network written with plain torch modules."""
    rate = matrix_rate(device, repeats)
    records = []
    for passes in ("forward", "forward + backward"):
        for own in variants(NetworkCase(size, passes=passes), compile):
            records.append(_beside_peer(own, replace(own, network="plain"), device, repeats, rate, memory))
    return Table(f"Network: {size}", records, [rate_note(device, rate), MEMORY_NOTE])


def _beside_peer(own: NetworkCase, peer: NetworkCase, device, repeats: int, rate: float, memory: bool) -> dict:
    times = try_to_time([own, peer], device, repeats)
    return {
        "pass": own.passes + (", compiled" if own.compile else ""),
        "ms": times[0],
        "plain torch modules, ms": times[1],
        "times faster": times_faster(times[1], times[0]),
        **work_columns(own, times[0], rate),
        "peak memory, MiB": mebibytes(own, device) if memory else None,
        "peak memory of plain modules, MiB": mebibytes(peer, device) if memory else None,
    }


def measure_training(
    size: NetworkSize, device: torch.device, repeats: int, *, compile: bool = False, memory: bool = True
) -> Table:
    """A training step with all activations kept, and with every block recomputed in the backward pass."""
    rate = matrix_rate(device, repeats)
    records = []
    for every in (0, 1):
        for case in variants(NetworkCase(size, passes="training step", grad_checkpoint_every=every), compile):
            timing = try_to_time([case], device, repeats)[0]
            work = work_columns(case, timing, rate)
            share = work["share of the matrix rate"]
            # With recomputation four forward passes' worth is executed, of which three are useful.
            executed = None if share is None else share * (4 / 3 if every else 1.0)
            records.append({
                "step": "gradient checkpointing" if every else "all activations kept",
                "compiled": "yes" if case.compile else "no",
                "ms": timing,
                **work,
                "share, recomputation counted too": executed,
                "peak memory, MiB": mebibytes(case, device) if memory else None,
            })  # fmt: skip
    notes = [
        "One scene: forward, rendering of the input views, L2, backward, gradient clipping, AdamW; no VGG losses. "
        "Operations: three forward passes of matrix products, whatever is recomputed or rendered.",
        rate_note(device, rate), MEMORY_NOTE,
    ]  # fmt: skip
    return Table(f"Training step: {size}", records, notes)


def measure_tokens(
    size: NetworkSize, device: torch.device, repeats: int, *, coverages=COVERAGES, memory: bool = True
) -> Table:
    """Dense against pruned, the masks discs that cover a share of each view; timed in turn."""
    records = []
    dense_memory = {passes: mebibytes(NetworkCase(size, passes=passes), device) if memory else None for passes in TIMED}
    dense_tokens, free = NetworkCase(size).num_tokens(), size.config().gaussians.n_gaussians
    for coverage in coverages:
        tokens = NetworkCase(size, coverage=coverage).num_tokens()
        record: dict = {
            "coverage, %": 100 * coverage, "patches kept, %": 100 * (tokens - free) / (dense_tokens - free),
            "tokens": tokens, "of": dense_tokens,
            "operations, times fewer": NetworkCase(size).flops() / NetworkCase(size, coverage=coverage).flops(),
        }  # fmt: skip
        for passes in TIMED:
            pruned = NetworkCase(size, passes=passes, coverage=coverage)
            times = try_to_time([NetworkCase(size, passes=passes), pruned], device, repeats)
            record |= {
                f"{passes}: dense, ms": times[0], f"{passes}: pruned, ms": times[1],
                f"{passes}: times faster": times_faster(*times),
                f"{passes}: dense, MiB": dense_memory[passes],
                f"{passes}: pruned, MiB": mebibytes(pruned, device) if memory else None,
            }  # fmt: skip
        records.append(record)
    note = "Masks: a disc in the middle of every view. Patches are kept that a disc grown by the margin touches."
    return Table(f"Foreground tokens: {size}", records, [note, MEMORY_NOTE])


TIMED = ("forward", "forward + backward")
MEMORY_NOTE = "Peak memory: what a run needs beside weights and inputs."


def try_to_time(cases: list[Case], device: torch.device, repeats: int, timer=time_in_turn) -> list[Timing | str]:
    """Times of the cases run in turn; one by one where a GPU does not hold all of them, TOO_LARGE where not one."""
    try:
        return timer([case.build(device) for case in cases], device, repeats)
    except torch.OutOfMemoryError:
        pass  # what the failed runs held is free only outside this block
    torch.cuda.empty_cache()
    if len(cases) == 1:
        return [TOO_LARGE]
    return [try_to_time([case], device, repeats, timer)[0] for case in cases]


def times_faster(slow: Timing | str, fast: Timing | str) -> float | None:
    return None if TOO_LARGE in (slow, fast) else ratio(slow, fast)


def work_columns(case: Case, timing: Timing | str, rate: float) -> dict:
    """Useful operations, the rate they were done at and which share of the machine's matrix rate that is."""
    flops = case.flops()
    reached = None if timing == TOO_LARGE else flops / timing.median
    return {
        "operations, TFLOP": flops / 1e12,
        "TFLOP/s": None if reached is None else reached / 1e12,
        "share of the matrix rate": None if reached is None else reached / rate,
    }


def mebibytes(case: Case, device: torch.device) -> float | str | None:
    try:
        peak = peak_memory(case, device)
    except torch.OutOfMemoryError:
        peak = TOO_LARGE
    if peak == TOO_LARGE:
        torch.cuda.empty_cache()
    return peak / 2**20 if isinstance(peak, float) else peak


def rate_note(device: torch.device, rate: float) -> str:
    name = str(matrix_dtype(device)).removeprefix("torch.")
    return f"Matrix rate, measured in this run by a large square product in {name}: {rate / 1e12:.3g} TFLOP/s."
