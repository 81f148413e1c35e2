"""Stage 2 training made to go wrong on purpose: wild gradients, losses that are not finite, a full disk.

  PYTHONPATH=. python tests/gslrm_rough.py --steps 1000

repeats the training command, as a user would, until all passes are done, then spoils every pass until the run gives up,
and prints what happened as JSON. test_gslrm_robustness.py does the same with few steps.
"""

import argparse
import errno
import itertools
import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from gslrm_toys import config_of, write_toys

from gslrm import training
from gslrm.checkpoints import load_gslrm
from multiview.checkpoint import load_checkpoint, newest_checkpoint
from multiview.training import TrainingDivergedError

# Share of the passes that go wrong; every fourth loss or so is lost.
MISHAPS = {"wild": 0.12, "nan": 0.08, "inf": 0.04, "nan_gradient": 0.03}
FULL_DISK = 0.3  # share of the checkpoints that do not fit
RUN = {"training.checkpointing.checkpoint_every": 10, "validation.enabled": "false", "training.logging.vis_every": 500}


def spoiled(kind: str | None, loss: torch.Tensor, xyz: torch.Tensor) -> torch.Tensor:
    if kind == "wild":
        return loss * 1e6
    if kind in ("nan", "inf"):
        return loss * math.nan if kind == "nan" else loss + math.inf
    if kind == "nan_gradient":
        return loss + (0.0 * xyz).abs().sum().sqrt()  # 0, and its derivative NaN
    return loss


@contextmanager
def rough_weather(mishap: Callable[[int], str | None], full_disk: Callable[[], bool]) -> Iterator[Counter]:
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


def at_random(seed: int) -> tuple[Callable[[int], str | None], Callable[[], bool]]:
    draw = random.Random(seed)

    def mishap(_: int) -> str | None:
        return draw.choices([*MISHAPS, None], [*MISHAPS.values(), 1 - sum(MISHAPS.values())])[0]

    return mishap, lambda: draw.random() < FULL_DISK


def rough_run(data: Path, folder: Path, steps: int, seed: int = 0) -> dict:
    """Trains `steps` passes through it all; every stop must be a full disk's, and what was saved before must load."""
    began, stops = time.perf_counter(), []
    config = config_of(data, folder, **RUN, **{"training.schedule.max_fwdbwd_passes": steps})
    with rough_weather(*at_random(seed)) as happened:
        while True:
            try:
                training.train(config)
                break
            except ValueError as error:
                stops.append(str(error))
                if "No space left" not in stops[-1]:
                    raise
            for path in folder.glob("ckpt_*.pt"):
                load_checkpoint(path)
    content = load_checkpoint(newest_checkpoint(folder))
    model, _, _ = load_gslrm(folder)
    return {
        "passes": content["fwdbwd_pass_step"], "updates": content["param_update_step"], "counts": content["counts"],
        "happened": dict(happened), "stops": len(stops), "message": stops[0] if stops else None,
        "finite": all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()),
        "litter": [path.name for path in folder.rglob(".*")], "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def hopeless_run(data: Path, folder: Path, steps: int) -> dict:
    """Goes on with every pass spoiled: must give up with advice and leave the last checkpoint loadable."""
    config = config_of(data, folder, **RUN, **{"training.schedule.max_fwdbwd_passes": steps})
    before = load_checkpoint(newest_checkpoint(folder))["fwdbwd_pass_step"]
    with rough_weather(lambda _: "wild", lambda: False) as happened:
        try:
            training.train(config)
        except TrainingDivergedError as error:
            load_gslrm(folder)
            return {"before": before, "happened": dict(happened), "message": str(error)}
    raise AssertionError("training went on through nothing but exploding gradients")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        data = write_toys(Path(name) / "data")
        result = rough_run(data, Path(name) / "run", arguments.steps, arguments.seed)
        result["hopeless"] = hopeless_run(data, Path(name) / "run", arguments.steps + 400)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
