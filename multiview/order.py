"""The order in which training visits its samples, of one data set or of several mixed by ratio.

A position is the place of an item in the endless row of all global batches. What stands there depends on (seed,
position) only: a run continues after a kill exactly where it was, and any number of processes see the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from math import gcd

import torch
from torch.utils.data import Sampler

from multiview.run import make_generator

HUNDREDTHS = 100


class StepSampler(Sampler):
    """Batches of (epoch, index), one process's share: a DataLoader's batch_sampler, or asked by `batch(number)`.

    lengths: samples of each data set; indices run through the first, then the second, and so on.
    percents: of 100 items how many come from each. The proportions are exact in every window of positions, the shortest
        in which they are whole numbers (10 for 70 and 30); within a window the order is random. Every data set has
        epochs of its own, each a permutation of it.
    start, stop: the first batch, and the one before which iterating ends (None: it does not end).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        percents: Sequence[int] = (HUNDREDTHS,),
        start: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(percents) != len(lengths) or min(percents) < 1 or sum(percents) != HUNDREDTHS:
            raise ValueError(
                f"percents must be one whole number above 0 for each of {len(lengths)} data sets, of sum 100; "
                f"got {list(percents)}"
            )
        self.lengths, self.starts = list(lengths), [0, *accumulate(lengths)]
        self.batch_size, self.seed = batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self.counts = [percent // gcd(*percents) for percent in percents]  # of a window's items
        self.window = sum(self.counts)
        self._window_order, self._epoch_order = lru_cache(8)(self._draw_window), lru_cache(8)(self._draw_epoch)

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("this sampler does not end: it has no stop")
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number = self.start
        while self.stop is None or number < self.stop:
            yield self.batch(number)
            number += 1

    def batch(self, number: int) -> list[tuple[int, int]]:
        """The keys (epoch of its data set, index) of this process's share of global batch `number`."""
        first = (number * self.world_size + self.rank) * self.batch_size
        return [self.key(position) for position in range(first, first + self.batch_size)]

    def key(self, position: int) -> tuple[int, int]:
        """The key of the item at a position."""
        window, place = divmod(position, self.window)
        part, rank = self._window_order(window)[place]
        epoch, turn = divmod(window * self.counts[part] + rank, self.lengths[part])
        return epoch, self.starts[part] + self._epoch_order(part, epoch)[turn]

    def _draw_window(self, window: int) -> list[tuple[int, int]]:
        """For each place of a window: its data set, and which of that data set's items in the window it is."""
        owners = [part for part, count in enumerate(self.counts) for _ in range(count)]
        order = torch.randperm(self.window, generator=make_generator("mix", self.seed, window)).tolist()
        seen, places = [0] * len(self.counts), []
        for part in (owners[place] for place in order):
            places.append((part, seen[part]))
            seen[part] += 1
        return places

    def _draw_epoch(self, part: int, epoch: int) -> list[int]:
        """The order in which an epoch visits a data set."""
        return torch.randperm(self.lengths[part], generator=make_generator("order", self.seed, part, epoch)).tolist()


def hundredths(ratios: Sequence[float]) -> list[int]:
    """Shares of sum 1 as whole percents of sum 100; the largest remainders round up. Raises ValueError."""
    if min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise ValueError(f"mix: one positive ratio per data set is needed, of sum 1; got {list(ratios)}")
    percents = [int(ratio * HUNDREDTHS + 1e-6) for ratio in ratios]
    remainders = sorted(range(len(ratios)), key=lambda k: percents[k] - ratios[k] * HUNDREDTHS)
    for k in remainders[: HUNDREDTHS - sum(percents)]:
        percents[k] += 1
    if min(percents) == 0:
        raise ValueError(f"mix: a ratio below 0.01 is never drawn, got {list(ratios)}; leave that data set out")
    return percents
