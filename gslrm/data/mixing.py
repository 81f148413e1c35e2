"""Several datasets as one, by ratio: exact in every window of positions, not only on average.

A position is the place of an item in the endless row of all global batches, so what stands there depends on (seed,
position) only: a run continues after a kill exactly where it was, with any number of processes.
"""

from __future__ import annotations

import bisect
import logging
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import gcd

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gslrm.data.mouse_dataset import MouseViewDataset, StepSampler, epoch_order
from multiview.rig import RigMismatchError, check_alignment
from multiview.run import make_generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture: its seed, its number of samples, and how many of 100 items come from it."""

    seed: int
    length: int
    percent: int


class MixedDataset(Dataset):
    """Datasets of one rig, end to end: the scenes of the second are numbered after those of the first.

    percents: of 100 items in training how many come from each dataset; whole numbers that add up to 100.
    Raises RigMismatchError, naming both list files, for a dataset of another rig than the first one's.
    """

    def __init__(self, datasets: list[MouseViewDataset], percents: list[int]) -> None:
        self.datasets, self.rig = datasets, datasets[0].rig
        for dataset in datasets[1:]:
            try:
                check_alignment(self.rig, dataset=dataset.rig)
            except RigMismatchError as error:
                raise RigMismatchError(
                    f"{dataset.list_file} (training.dataset.mix) does not go with {datasets[0].list_file}: {error}"
                ) from None
        self.ends = list(accumulate(len(dataset) for dataset in datasets))
        self.parts = tuple(Part(data.seed, len(data), percent) for data, percent in zip(datasets, percents))
        shares = (f"{percent} % {d.list_file} ({len(d)} samples)" for d, percent in zip(datasets, percents))
        log.info("mixing %s", ", ".join(shares))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """As MouseViewDataset's items; scene_idx in `index` is the sample's number in the whole mixture."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        number = bisect.bisect_right(self.ends, index)
        start = self.ends[number] - len(self.datasets[number])
        item = self.datasets[number][epoch, index - start]
        return {**item, "index": item["index"] + torch.tensor([0, start])}


class MixedStepSampler(StepSampler):
    """StepSampler over the parts of a MixedDataset. An epoch is counted for each part by itself."""

    def __init__(self, seed: int, parts: tuple[Part, ...], **options: int) -> None:
        super().__init__(seed, sum(part.length for part in parts), **options)
        self.parts = parts

    def global_keys(self, step: int) -> list[tuple[int, int]]:
        size = self.batch_size * self.world_size
        return [mixed_key(self.seed, self.parts, position) for position in range(step * size, (step + 1) * size)]


def mixed_key(seed: int, parts: tuple[Part, ...], position: int) -> tuple[int, int]:
    """The key (epoch of its dataset, index in the mixture) of the item at a position."""
    percents = tuple(part.percent for part in parts)
    window, place = divmod(position, window_length(percents))
    number, rank = window_order(seed, percents, window)[place]
    part = parts[number]
    epoch, turn = divmod(window * window_counts(percents)[number] + rank, part.length)
    return epoch, sum(p.length for p in parts[:number]) + epoch_order(part.seed, epoch, part.length)[turn]


def window_length(percents: tuple[int, ...]) -> int:
    """The shortest window in which all shares are whole numbers: 10 for 70 and 30."""
    return 100 // gcd(*percents)


def window_counts(percents: tuple[int, ...]) -> list[int]:
    return [percent // gcd(*percents) for percent in percents]


@lru_cache(maxsize=16)
def window_order(seed: int, percents: tuple[int, ...], window: int) -> list[tuple[int, int]]:
    """For each place of a window: the number of its dataset, and which of that dataset's items in the window it is."""
    owners = [number for number, count in enumerate(window_counts(percents)) for _ in range(count)]
    order = torch.randperm(len(owners), generator=make_generator("gslrm-mix", seed, window)).tolist()
    seen, places = [0] * len(percents), []
    for owner in (owners[place] for place in order):
        places.append((owner, seen[owner]))
        seen[owner] += 1
    return places
