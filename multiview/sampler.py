"""The order in which training visits its samples, of one data set or of several mixed by share, and the loader.

An index is the place of an item in the endless row of all global batches; what stands there depends on (seed, index)
only: a killed run continues exactly where it was, and any number of processes see the same batches.
"""

from __future__ import annotations

import bisect
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, count
from math import gcd
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from multiview.rig import RigMismatchError, check_alignment
from multiview.run import STOP_SIGNALS, make_generator


class StepSampler(Sampler):
    """Batches of (epoch, sample), one process's share: a DataLoader's batch_sampler, or asked by `batch(number)`.

    lengths: samples of each data set, numbered one after the other. percents: of 100 items how many come from each,
    exact in every shortest window of items in which they are whole numbers (10 for 70 and 30), in random order. Every
    data set has epochs of its own, each a permutation. start, stop: the first batch, and the one before the end.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, seed: int, percents: Sequence[int] = (100,), start: int = 0,
        stop: int | None = None, rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        self.lengths, self.starts = list(lengths), [0, *accumulate(lengths)]
        self.batch_size, self.seed = batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self.counts = [percent // gcd(*percents) for percent in percents]  # of a window's items
        self.window = sum(self.counts)
        self._window_order, self._epoch_order = lru_cache(8)(self._draw_window), lru_cache(8)(self._draw_epoch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.batch, count(self.start) if self.stop is None else range(self.start, self.stop))

    def batch(self, number: int) -> list[tuple[int, int]]:
        """Returns the keys (epoch of its data set, sample) of this process's share of global batch `number`."""
        first, keys = (number * self.world_size + self.rank) * self.batch_size, []
        for index in range(first, first + self.batch_size):
            window, place = divmod(index, self.window)
            part, rank = self._window_order(window)[place]
            epoch, turn = divmod(window * self.counts[part] + rank, self.lengths[part])
            keys.append((epoch, self.starts[part] + self._epoch_order(part, epoch)[turn]))
        return keys

    def _draw_window(self, window: int) -> list[tuple[int, int]]:
        """Returns for each place of a window its data set and which of that data set's items in the window it is."""
        owners = [part for part, number in enumerate(self.counts) for _ in range(number)]
        order = torch.randperm(self.window, generator=make_generator("mix", self.seed, window)).tolist()
        seen = [count() for _ in self.counts]
        return [(owners[place], next(seen[owners[place]])) for place in order]

    def _draw_epoch(self, part: int, epoch: int) -> list[int]:
        return torch.randperm(self.lengths[part], generator=make_generator("order", self.seed, part, epoch)).tolist()


def mixed_lists(main: str, others: Sequence[tuple[str, float]]) -> tuple[list[str], list[int]]:
    """Returns the split lists that are trained on and how many of 100 items come from each. others: further lists and
    their shares, which become whole hundredths (the largest remainders round up); `main` gives what they leave of 1."""
    lists, shares = [name for name, _ in others], [share for _, share in others]
    left = 1.0 - sum(shares)
    if any(share <= 0 for share in shares) or left < -1e-6:
        raise ValueError(f"mix: ratios must be above 0 and add up to at most 1 ({main} gives the rest), got {shares}")
    if left > 1e-6:
        lists, shares = [main, *lists], [left, *shares]
    percents = [int(share * 100 + 1e-6) for share in shares]
    remainders = sorted(range(len(shares)), key=lambda k: percents[k] - shares[k] * 100)
    for k in remainders[: 100 - sum(percents)]:
        percents[k] += 1
    if min(percents) == 0:
        raise ValueError(f"mix: a ratio below 0.01 is never drawn, got {shares} of {lists}; leave that data set out")
    return lists, percents


class MixedDataset(Dataset):
    """Data sets of one rig end to end: sample numbers run through the first, then the second, and so on. percents: of
    100 items in training how many come from each. Raises RigMismatchError naming two lists of different rigs."""

    def __init__(self, parts: Sequence[Dataset], percents: Sequence[int] = (100,)) -> None:
        self.parts, self.percents, self.rig = list(parts), list(percents), parts[0].rig
        self.lengths = [len(part) for part in parts]
        self.ends = list(accumulate(self.lengths))
        for part in parts[1:]:
            try:
                check_alignment(self.rig, dataset=part.rig)
            except RigMismatchError as error:
                told = f"{part.list_file} (mix) does not go with {parts[0].list_file}"
                raise RigMismatchError(f"{told}: {error}") from None

    def __len__(self) -> int:
        return self.ends[-1]

    def part(self, index: int) -> tuple[Dataset, int]:
        """Returns the data set that holds sample `index`, and the sample's number in it."""
        number = bisect.bisect_right(self.ends, index)
        return self.parts[number], index - self.ends[number] + self.lengths[number]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        part, local = self.part(index)
        return part[epoch, local]


class _Guarded(Dataset):
    """Hands a sample's ValueError on as a value: the loader would wrap a raised one in the worker's traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor] | ValueError:
        try:
            return self.dataset[key]
        except ValueError as error:
            return error


def _collate(items: list) -> dict[str, Tensor] | ValueError:
    return next((item for item in items if isinstance(item, ValueError)), None) or default_collate(items)


def _start_worker(_: int) -> None:
    # A scheduler's signal reaches every process of the job; the main one alone decides when the workers end.
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def load_batches(
    dataset: Dataset, sampler: StepSampler, workers: int, device: torch.device, prefetch: int = 2
) -> Iterator[dict[str, Tensor]]:
    """Yields the sampler's batches, read by `workers` processes (0: in this one). Raises a sample's own ValueError."""
    loader = DataLoader(
        _Guarded(dataset), batch_sampler=sampler, num_workers=workers, pin_memory=device.type == "cuda",
        prefetch_factor=prefetch if workers else None, collate_fn=_collate, worker_init_fn=_start_worker,
    )  # fmt: skip
    try:
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    except (RuntimeError, OSError) as error:
        told, shm = " ".join(str(error).split()), Path("/dev/shm")
        if not workers or not re.search(r"shared memory|Bus error|No space left|unable to (write|open|resize)", told):
            raise
        size = f" ({shutil.disk_usage(shm).total / 1e6:.0f} MB)" if shm.is_dir() else ""
        raise ValueError(
            f"{workers} loader workers cannot hand their batches over: shared memory /dev/shm{size} is too small or "
            f"closed ({told[:120]}). Give the container more (docker run --shm-size=8g), or use 0 workers"
        ) from error
