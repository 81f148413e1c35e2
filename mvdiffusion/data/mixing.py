"""Several data sets as one, by ratio, and the order in which training visits their samples."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from multiview.run import make_generator
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset

BLOCK = 100  # samples among which the ratios hold exactly (to the nearest hundredth)


class MixedDataset(Dataset):
    """Data sets of one rig end to end: sample numbers run through the first, then the second, and so on."""

    def __init__(self, parts: Sequence[MouseMVDiffusionDataset]) -> None:
        self.parts, self.rig = list(parts), parts[0].rig
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def part(self, index: int) -> tuple[MouseMVDiffusionDataset, int]:
        """The data set that holds sample `index`, and the sample's number in it."""
        number = bisect.bisect_right(self.ends, index)
        return self.parts[number], index - (self.ends[number - 1] if number else 0)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        part, local = self.part(index)
        return {**part[epoch, local], "index": torch.tensor(index)}


class StepSampler(Sampler):
    """Batches of (epoch, index) from a given batch on, so that a resumed run sees what it would have seen.

    Batch k of all processes together takes the next batch_size * world_size positions, and each process its own slice
    of them. Which sample stands at a position depends on (seed, position) only. With one data set every epoch is a
    permutation of it, and an epoch's tail runs on into the next. With several, each block of BLOCK positions holds them
    in their ratios, in random order, and each data set has epochs of its own.

    length: samples, or one number per data set. ratios: the data sets' shares, of sum 1.
    """

    def __init__(
        self,
        length: int | Sequence[int],
        batch_size: int,
        *,
        seed: int,
        ratios: Sequence[float] | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = [length] if isinstance(length, int) else list(length)
        self.starts = [0, *accumulate(self.lengths)]
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.rank, self.world_size = rank, world_size
        self.counts = _counts(ratios or [1.0], len(self.lengths))
        self._block, self._order = lru_cache(8)(self._block_uncached), lru_cache(8)(self._order_uncached)

    def batch(self, number: int) -> list[tuple[int, int]]:
        """The (epoch, index) keys of this process's batch `number`."""
        first = (number * self.world_size + self.rank) * self.batch_size
        return [self._key(position) for position in range(first, first + self.batch_size)]

    def _key(self, position: int) -> tuple[int, int]:
        part, turn = 0, position
        if len(self.lengths) > 1:
            block, offset = divmod(position, BLOCK)
            parts = self._block(block)
            part = parts[offset]
            turn = block * self.counts[part] + parts[:offset].count(part)
        epoch, offset = divmod(turn, self.lengths[part])
        return epoch, self.starts[part] + self._order(part, epoch)[offset]

    def _block_uncached(self, block: int) -> list[int]:
        """Which data set each position of a block takes."""
        parts = torch.repeat_interleave(torch.tensor(self.counts))
        generator = make_generator("mvdiffusion mix", self.seed, block)
        return parts[torch.randperm(BLOCK, generator=generator)].tolist()

    def _order_uncached(self, part: int, epoch: int) -> list[int]:
        """The order in which an epoch visits a data set."""
        generator = make_generator("mvdiffusion order", self.seed, epoch, *([part] if part else []))
        return torch.randperm(self.lengths[part], generator=generator).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number = self.start
        while True:
            yield self.batch(number)
            number += 1


def _counts(ratios: Sequence[float], parts: int) -> list[int]:
    """How many of a block's positions each data set gets: the largest remainders round up."""
    if len(ratios) != parts or min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise ValueError(f"mix: one positive ratio per data set is needed, of sum 1; got {list(ratios)}")
    counts = [int(ratio * BLOCK + 1e-6) for ratio in ratios]
    remainders = sorted(range(parts), key=lambda k: counts[k] - ratios[k] * BLOCK)
    for k in remainders[: BLOCK - sum(counts)]:
        counts[k] += 1
    if min(counts) == 0:
        raise ValueError(f"mix: a ratio below 1/{BLOCK} is never drawn, got {list(ratios)}; leave that data set out")
    return counts
