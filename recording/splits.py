"""Which samples train and which validate. Neighbouring frames are nearly one picture, so they never part company."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SPLITS = ("blocks", "random")
VALIDATION_SHARE = 0.2
MIN_FOR_TWO_BLOCKS = 20
GAP_SECONDS = 0.5  # between a training and a validation frame: what lies closer together is left out of both lists
GAP_SHARE = 0.02  # of the samples, at most, is given up at each border


def split_blocks(folders: list[Path], *, seconds: list[float] | None = None) -> tuple[list[Path], list[Path]]:
    """80/20 by blocks of time: validation takes one block from the middle of a short recording, two of a longer one.

    seconds: when each sample was taken. Training samples nearer than GAP_SECONDS to a validation block are left out,
    but no more than GAP_SHARE of all at each border (and none of fewer than MIN_FOR_TWO_BLOCKS).
    """
    count = len(folders)
    held_out = np.zeros(count, dtype=bool)
    for start, length in _blocks(count):
        held_out[start : start + length] = True
    dropped = np.zeros(count, dtype=bool)
    if seconds is not None and count >= MIN_FOR_TWO_BLOCKS:
        allowed = max(1, round(GAP_SHARE * count))
        for start, length in _blocks(count):
            for edge, side in ((start, -1), (start + length - 1, 1)):
                for step in range(1, allowed + 1):
                    index = edge + side * step
                    if 0 <= index < count and abs(seconds[index] - seconds[edge]) < GAP_SECONDS:
                        dropped[index] = True
    train = [folder for index, folder in enumerate(folders) if not (held_out[index] or dropped[index])]
    return train, [folder for index, folder in enumerate(folders) if held_out[index]]


def split_random(folders: list[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """80/20 at random, the same for the same seed and number: for frames far apart, or to repeat others' splits."""
    count = len(folders)
    number = _number(count)
    chosen = set(np.random.default_rng(np.random.SeedSequence([seed, count])).permutation(count)[:number].tolist())
    train = [folder for index, folder in enumerate(folders) if index not in chosen]
    return train, [folder for index, folder in enumerate(folders) if index in chosen]


def _number(count: int) -> int:
    return max(1, round(VALIDATION_SHARE * count)) if count > 1 else 0


def _blocks(count: int) -> list[tuple[int, int]]:
    """(start, length) of the validation blocks."""
    number = _number(count)
    if number == 0:
        return []
    if count < MIN_FOR_TWO_BLOCKS:
        return [((count - number) // 2, number)]
    first, second = number - number // 2, number // 2
    return [(count // 4 - first // 2, first), (3 * count // 4 - second // 2, second)]
