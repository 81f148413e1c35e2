"""Wall times and the machine's matrix rate.

What is compared runs in turn (a, b, a, b, ...), so that other work on a shared machine slows both alike, and a ratio is
the median of the ratios of neighbours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MATRIX_SIDE = {"cpu": 1536, "cuda": 8192}  # large enough to reach the rate, small enough for a second


@dataclass(frozen=True)
class Timing:
    """Seconds of the runs that were not there to warm up, on the wall and of the process (all its threads).

    On a machine busy with other work the process's seconds say more.
    """

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def busy_median(self, device: torch.device) -> float:
        """For rates: seconds of the process on the CPU, which other work on the machine leaves alone; wall on a GPU."""
        return self.median if device.type == "cuda" else statistics.median(self.cpu_seconds)

    def to_dict(self) -> dict:
        """Milliseconds, for JSON."""
        low, high = quartiles(self.seconds)
        return {
            "median_ms": 1e3 * self.median, "quartile_ms": [1e3 * low, 1e3 * high],
            "lowest_ms": 1e3 * min(self.seconds), "repeats": len(self.seconds),
            "median_cpu_ms": 1e3 * statistics.median(self.cpu_seconds) if self.cpu_seconds else None,
        }  # fmt: skip


def quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    """First and third quartile; of a single value that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def time_in_turn(runs: list[Callable[[], object]], device: torch.device, repeats: int) -> list[Timing]:
    """Times of all `runs`, one after the other in each of `repeats` rounds.

    Each runs twice in a row and the second counts: the first pays for what its neighbour left in caches and heap
    (0.1 s was seen beside a large autograd graph).
    """
    rounds: list[list[tuple[float, float]]] = [[] for _ in runs]
    for _ in range(repeats):
        for number, run in enumerate(runs):
            run()
            synchronize(device)
            started = time.perf_counter(), time.process_time()
            run()
            synchronize(device)
            rounds[number].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return [Timing(*zip(*values)) for values in rounds]


def ratio(slow: Timing, fast: Timing) -> float:
    """Median over the rounds of slow / fast: how many times faster `fast` is."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_dtype(device: torch.device) -> torch.dtype:
    """What the networks compute in here: bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def matrix_rate(device: torch.device, repeats: int, side: int | None = None) -> float:
    """Operations per second of a large square matrix product in `matrix_dtype`; a multiply-add counts 2."""
    side = side or MATRIX_SIDE[device.type]
    return 2 * side**3 / time_matrix_product(side, matrix_dtype(device), device, repeats).median


def time_matrix_product(side: int, dtype: torch.dtype, device: torch.device, repeats: int) -> Timing:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    with torch.no_grad():
        return time_in_turn([lambda: a @ b], device, repeats)[0]
