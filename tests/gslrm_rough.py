"""Stage 2 training made to go wrong on purpose: wild gradients, losses that are not finite, a full disk."""

import errno
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gslrm import training


def spoiled(kind: str | None, loss: torch.Tensor, xyz: torch.Tensor) -> torch.Tensor:
    if kind == "wild":
        return loss * 1e6
    if kind in ("nan", "inf"):
        return loss * math.nan if kind == "nan" else loss + math.inf
    if kind == "nan_gradient":
        return loss + (0.0 * xyz).abs().sum().sqrt()  # 0, and its derivative NaN
    return loss


@contextmanager
def rough_weather(
    mishap: Callable[[int], str | None], full_disk: Callable[[], bool] = lambda: False
) -> Iterator[Counter]:
    """Training inside meets mishap(n) in its n-th pass, and a full disk at a checkpoint. Yields what has happened."""
    happened, total_loss, save = Counter(), training.total_loss, torch.save
    calls = itertools.count()

    def rough_loss(weights, losses, output, *arguments, **options):
        loss, parts = total_loss(weights, losses, output, *arguments, **options)
        kind = mishap(next(calls))
        happened[kind or "fine"] += 1
        return spoiled(kind, loss, output.gaussians.xyz), parts

    def rough_save(content, handle):
        if full_disk():
            happened["full_disk"] += 1
            handle.write(b"the first part of a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, handle)

    training.total_loss, torch.save = rough_loss, rough_save
    try:
        yield happened
    finally:
        training.total_loss, torch.save = total_loss, save
