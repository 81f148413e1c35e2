"""What a run shows while it trains: metrics, pictures, trackers and a bar. The only module that knows the trackers."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from multiview.files import atomic_write, write_json
from multiview.image import to_uint8, write_image
from multiview.rig import ViewRig
from multiview.run import LoopOptions, WandbOptions, git_hash

log = logging.getLogger(__name__)

METRICS = ("fg_psnr", "psnr", "foreground_psnr", "unseen_foreground_psnr", "iou")  # the bar shows the first there is


class RunFolder:
    """`config.json`, `metrics.jsonl` and pictures of one run; only the main process writes. after: the resumed step;
    metrics beyond it are dropped, since the run will write them again. tracker: "tensorboard" writes its event files
    into tensorboard/, "wandb" goes online; wandb.mode alone does, too."""

    def __init__(
        self, path: Path | str, config: dict, rig: ViewRig, after: int = 0, wandb: WandbOptions | None = None,
        tracker: str = "none", *, is_main: bool = True,
    ) -> None:  # fmt: skip
        self.path, self.is_main, self._wandb, self._board = Path(path), is_main, None, None
        if not is_main:
            return
        write_json(self.path / "config.json", {"config": config, "rig": rig.to_dict(), "git": git_hash()})
        metrics, kept = self.path / "metrics.jsonl", []
        if metrics.is_file():
            for line in metrics.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # the last line of a killed run may be cut
                    kept += [line + "\n"] if json.loads(line)["step"] <= after else []
            with atomic_write(metrics) as temporary:
                temporary.write_text("".join(kept))
        if tracker == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                told = "tracker is 'tensorboard' but tensorboard is not installed"
                raise ValueError(f"{told}: pip install -r requirements.txt, or tracker=none") from error
            # What a killed run wrote beyond its checkpoint is purged when the events are read.
            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=after + 1, flush_secs=10)
        mode = "disabled" if wandb is None else wandb.mode
        mode = "online" if tracker == "wandb" and mode == "disabled" else mode
        if mode == "disabled":
            return
        try:
            from wandb import init
        except ImportError as error:
            told = f"wandb.mode is {mode!r} but wandb is not installed"
            raise ValueError(f"{told}: pip install -r requirements-extra.txt, or wandb.mode=disabled") from error
        named = {"project": wandb.project, "group": wandb.group or None, "name": wandb.name or None, "mode": mode}
        self._wandb = init(**named, dir=str(path), config=config, resume="allow")

    def log(self, step: int, values: dict[str, float], split: str = "train") -> None:
        """Appends one line to metrics.jsonl: {"step", "split", "time", name: value ...}."""
        if not self.is_main:
            return
        line = {"step": step, "split": split, "time": round(time.time(), 3), **{k: float(v) for k, v in values.items()}}
        with open(self.path / "metrics.jsonl", "a") as handle:
            handle.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", float(value), step)
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def image(self, name: str, step: int, image: Tensor | None) -> None:
        """Writes [3, h, w], if there is one, to pictures/<name>_<step>.png."""
        if not self.is_main or image is None:
            return
        write_image(self.path / "pictures" / f"{name}_{step:08d}.png", image)
        if self._board is not None:
            self._board.add_image(name, to_uint8(image), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(to_uint8(image))}, step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class Progress:
    """A bar on a terminal, from the resumed step on; elsewhere lines, the first of them after the first step."""

    def __init__(self, options: LoopOptions, resumed: int, processes: int, *, is_main: bool) -> None:
        self.options, self.is_main, self.resumed, self.metric = options, is_main, resumed, ""
        self.samples = options.batch_size * processes * (options.accumulate if options.unit == "step" else 1)
        self.bar = tqdm(
            total=options.steps, initial=resumed, desc=Path(options.folder).name, unit=options.unit,
            disable=None if is_main else True, dynamic_ncols=True,
        )  # fmt: skip

    def advance(self, loss: Tensor) -> None:
        """One step more; loss: [], of its last pass."""
        if not self.bar.disable:
            told = self.bar.format_dict
            rate = (told["n"] + 1 - self.resumed) * self.samples / max(told["elapsed"], 1e-3)
            self.bar.set_postfix_str(f"loss {float(loss):.4g}, {self.metric}{rate:.3g} samples/s", refresh=False)
            self.bar.update()

    def show(self, step: int, numbers: dict[str, float], validated: dict[str, float], shown: Sequence[str]) -> None:
        """numbers: of the steps since the last call. validated: the latest figures of validation, for the bar."""
        by_name = {name.split("/")[-1]: value for name, value in {**validated, **numbers}.items()}
        self.metric = next((f"{name} {by_name[name]:.2f}, " for name in METRICS if name in by_name), "")
        is_due = step % self.options.print_every == 0 or step in (self.resumed + 1, self.options.steps)
        if is_due and self.is_main and self.bar.disable:
            log.info("%s %d/%d  %s", self.options.unit, step, self.options.steps, as_text(numbers, shown))


def as_text(values: dict[str, float], shown: Sequence[str]) -> str:
    """One line of the values whose names end with one of `shown` (none: of all)."""
    chosen = {name: value for name, value in values.items() if not shown or name.split("/")[-1] in shown}
    return "  ".join(f"{name} {value:.4g}" for name, value in chosen.items())
