"""Seconds and peak memory of one piece of work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_HIGH_WATER = "5"


@contextmanager
def measure_cost(device: torch.device) -> Iterator[dict[str, float]]:
    """Fills the dict it yields with `seconds` and, where it can be told, `peak_memory_mib`.

    CUDA: the most that torch held on the card, weights included. CPU: the most that the process held, libraries and
    weights included (Linux alone: the kernel's high-water mark is reset first).
    """
    cost: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.is_file():
        CLEAR.write_text(RESET_HIGH_WATER)
    started = time.perf_counter()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cost["seconds"] = time.perf_counter() - started
    if device.type == "cuda":
        cost["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    elif STATUS.is_file():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        cost["peak_memory_mib"] = int(line.split()[1]) / 1024


def memory_is_of(device: torch.device) -> str:
    """What `peak_memory_mib` counts, in words."""
    if device.type == "cuda":
        return "the most that torch held on the GPU, weights included"
    if STATUS.is_file():
        return "the most that the whole process held, libraries and weights included"
    return "not measured: this system has no /proc"
