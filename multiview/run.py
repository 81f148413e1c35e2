"""One run: seeds, device, processes, its folder and what it logs. The only module that knows wandb."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from multiview.files import write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from multiview.rig import ViewRig

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parent.parent
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # what clusters and closed terminals send
STOPPED = 143  # exit code of a run that such a signal ended between two items

Item = TypeVar("Item")


# ---- randomness and devices -------------------------------------------------------------------------------------


def seed_from(*keys: int | str) -> int:
    """A 63-bit seed from the keys: equal keys, equal seed, in every process and on every machine."""
    digest = hashlib.sha256(json.dumps(keys).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*keys: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator keyed on e.g. (seed, epoch, index) or (seed, rank, step)."""
    import torch

    return torch.Generator(device=device).manual_seed(seed_from(*keys))


def seed_everything(*keys: int | str) -> None:
    """Seeds the global generators (weight initialisation, dropout); data and noise use `make_generator`."""
    import random

    import numpy as np
    import torch

    seed = seed_from(*keys)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where it works, else the CPU; an explicit `cuda` without a GPU is an error."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no working GPU; use --device cpu or auto")
    return resolved


def reset_peak() -> bool:
    """Lets `peak_bytes` begin anew; False where this system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the high-water mark
    except OSError:
        return False
    return True


def peak_bytes() -> float:
    """Returns the most that the process held since `reset_peak`, libraries and all (psutil knows the present only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


# ---- processes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distributed:
    """The processes of one training run (torchrun's environment; one process without it)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @staticmethod
    def start(device: torch.device) -> Distributed:
        """Joins torchrun's process group (nccl on CUDA, gloo on the CPU); without torchrun nothing is started."""
        import torch

        if "RANK" not in os.environ:
            return Distributed()
        info = Distributed(
            int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
        )
        if device.type == "cuda":
            torch.cuda.set_device(info.local_rank)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return info

    def mean(self, values: Tensor) -> Tensor:
        """Average of a tensor over the processes."""
        import torch

        if self.world_size == 1:
            return values
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values / self.world_size

    def barrier(self) -> None:
        import torch

        if self.world_size > 1:
            torch.distributed.barrier()

    def stop(self) -> None:
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# ---- the run folder ---------------------------------------------------------------------------------------------


def git_hash() -> str:
    """Commit of the code, with '+' if the work tree differs; 'unknown' outside a git checkout."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=REPOSITORY, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


@dataclass
class WandbOptions:
    """mode: disabled (default), offline or online."""

    mode: str = "disabled"
    project: str = "mouse_facelift"
    group: str = ""
    name: str = ""


class RunFolder:
    """`config.json`, `metrics.jsonl` and pictures of one run; only the main process writes."""

    def __init__(
        self,
        path: Path | str,
        config: dict,
        rig: ViewRig | None,
        *,
        wandb: WandbOptions | None = None,
        is_main: bool = True,
    ) -> None:
        self.path, self.is_main, self._wandb = Path(path), is_main, None
        if not is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"config": config, "rig": rig.to_dict() if rig else None, "git": git_hash()}
        write_json(self.path / "config.json", content)
        if wandb is not None and wandb.mode != "disabled":
            self._wandb = _start_wandb(self.path, config, wandb)

    def log(self, step: int, values: dict[str, float], split: str = "train") -> None:
        """Appends one line to metrics.jsonl: {"step", "split", "time", name: value ...}."""
        if not self.is_main:
            return
        line = {"step": step, "split": split, "time": round(time.time(), 3), **{k: float(v) for k, v in values.items()}}
        with open(self.path / "metrics.jsonl", "a") as handle:
            handle.write(json.dumps(line) + "\n")
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def image(self, name: str, step: int, picture: Tensor) -> None:
        """Writes [3, h, w] to pictures/<name>_<step>.png."""
        if not self.is_main:
            return
        from multiview.image import to_uint8, write_image

        write_image(self.path / "pictures" / f"{name}_{step:08d}.png", picture)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(to_uint8(picture))}, step=step)

    def forget_after(self, step: int) -> None:
        """Drops metrics of steps beyond `step`: a run that resumes there will write them again."""
        path = self.path / "metrics.jsonl"
        if not self.is_main or not path.is_file():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run may be cut
        from multiview.files import atomic_write

        with atomic_write(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(path: Path, config: dict, options: WandbOptions):
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"wandb.mode is {options.mode!r} but wandb is not installed: pip install -r requirements-extra.txt, "
            "or wandb.mode=disabled"
        ) from error
    return wandb.init(
        project=options.project, group=options.group or None, name=options.name or None,
        mode=options.mode, dir=str(path), config=config, resume="allow",
    )  # fmt: skip


# ---- the installation -------------------------------------------------------------------------------------------


def shipped(path: Path | str) -> Path:
    """Returns a relative path as it leads beside the code, where something is there, else as it stands.

    So that the demo models, their embeddings and components are found from any working directory.
    """
    path = Path(path)
    beside = REPOSITORY / path
    return beside if beside.exists() and Path.cwd() != REPOSITORY else path


def choose_numba_cache() -> None:
    """Lets numba keep its machine code in the temporary folder where neither installation nor home can be written.

    Numba says so only when it compiles, which may be after hours of work. Runs before numba is imported.
    """
    if "NUMBA_CACHE_DIR" in os.environ or any(map(_can_write, (REPOSITORY, Path.home() / ".cache" / "numba"))):
        return
    folder = Path(tempfile.gettempdir()) / f"mouse_facelift_numba_{os.getuid()}"
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    log.warning("neither %s nor %s can be written: compiled code is kept in %s", REPOSITORY, Path.home(), folder)


def _can_write(folder: Path) -> bool:
    """Says whether a folder, or the nearest one above it that exists, can be written; permissions alone may lie."""
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_output_folder(folder: Path | str) -> None:
    """Raises ValueError where results could not be written into a folder: before the work rather than after it."""
    folder = Path(folder)
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not above.is_dir():
        raise ValueError(f"{folder} cannot be a folder: {above} is a file; name another --output_dir")
    if not _can_write(above):
        raise ValueError(f"{folder} cannot be written (read-only, full or not yours); name another --output_dir")


# ---- entry scripts ----------------------------------------------------------------------------------------------


def stoppable(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items; a stop signal lets the one in work be finished, then ends the run with exit code 143."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in STOP_SIGNALS}
    try:
        for item in items:
            if received:
                name = signal.Signals(received[0]).name
                print(f"stopped by {name}: finished items are whole; repeat the command for the rest", file=sys.stderr)
                sys.exit(STOPPED)
            yield item
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main_guard(main: Callable[[], None]) -> None:
    """Runs an entry script: a user's mistake ends with one message and exit code 1, without a traceback.

    argparse keeps exit code 2 for bad arguments. Programming errors keep their traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    choose_numba_cache()
    try:
        main()
    except (ValueError, OSError) as error:  # OSError: a full or read-only disk, a file where a folder should be
        if os.environ.get("MOUSE_FACELIFT_TRACEBACK"):
            raise
        told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {told}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
