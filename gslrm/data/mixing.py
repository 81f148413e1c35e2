"""Several datasets as one."""

from __future__ import annotations

import bisect
import logging
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gslrm.data.mouse_dataset import MouseViewDataset
from multiview.rig import RigMismatchError, check_alignment

log = logging.getLogger(__name__)


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
        self.lengths, self.percents = [len(dataset) for dataset in datasets], percents
        self.ends = list(accumulate(self.lengths))
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
