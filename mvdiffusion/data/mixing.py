"""Several data sets as one."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset


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
