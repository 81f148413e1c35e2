"""Seconds and peak memory of one piece of work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from multiview.run import peak_bytes, reset_peak


@contextmanager
def measure_cost(device: torch.device) -> Iterator[dict[str, float]]:
    """Fills the dict it yields with `seconds` and, where it can be told, `peak_memory_mib`.

    CUDA: the most that torch held on the card, weights included. CPU: the most that the process held, libraries and
    weights included, where the kernel lets its high-water mark be reset.
    """
    cost: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    told = device.type != "cuda" and reset_peak()
    started = time.perf_counter()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cost["seconds"] = time.perf_counter() - started
    if device.type == "cuda":
        cost["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    elif told:
        cost["peak_memory_mib"] = peak_bytes() / 2**20


def memory_is_of(device: torch.device) -> str:
    """What `peak_memory_mib` counts, in words."""
    if device.type == "cuda":
        return "the most that torch held on the GPU, weights included"
    return "the most that the whole process held, libraries and weights included; left out where that cannot be told"
