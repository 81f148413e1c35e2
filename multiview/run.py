"""One run: seeds, device, processes, signals, what its loop is asked for, and how an entry script ends."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multiview.files import DAMAGE, refusal

if TYPE_CHECKING:  # scripts answer --help without torch
    import torch
    from accelerate import Accelerator

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parent.parent
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # what clusters and closed terminals send
STOPPED, INTERRUPTED = 143, 130  # exit codes of a run that such a signal ended, and Ctrl-C
PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of a network's matrix products
REMEDIES = {  # of what the system refuses
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "name a place that you may write, or read, or allow it"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, or name a place on another disk"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder is expected: name another path"),
    errno.EISDIR: "a folder stands where a file is expected: name another path",
}
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun and accelerate set all of them


def seed_from(*keys: int | str) -> int:
    """Returns a 63-bit seed: equal keys, equal seed, in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(keys).encode()).digest()[:8], "big") >> 1


def make_generator(*keys: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Returns a generator keyed on e.g. (seed, epoch, index) or (seed, rank, step)."""
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
    """Returns CUDA for `auto` where it works, else the CPU. Raises ValueError for a device that is not there."""
    import torch

    works = torch.cuda.is_available()
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    resolved = torch.device(device if device != "auto" else "cuda" if works else "cpu")
    if (resolved.index or 0) >= (there := torch.cuda.device_count()) > 0:
        raise ValueError(f"device {device!r} was asked for, but there are {there} GPUs, counted from cuda:0")
    if resolved.type == "cuda" and not works:
        raise ValueError("device 'cuda' was asked for, but torch finds no working GPU; use --device cpu or auto")
    return resolved


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in `precision` inside; a wrapper of functions too."""
    import torch

    return torch.autocast(device.type, dtype=getattr(torch, PRECISIONS[precision]), enabled=precision != "no")


def reset_peak() -> bool:
    """Lets `peak_bytes` begin anew; False where this system does not allow it."""
    with suppress(OSError):
        return bool(Path("/proc/self/clear_refs").write_text("5"))  # proc(5): the high-water mark
    return False


def peak_bytes() -> float:
    """Returns the most that the process held since `reset_peak`, libraries and all (psutil knows the present only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def check_size(parameters: float, trained: float, batch_bytes: float, device: torch.device, keys: str) -> None:
    """Refuses a run that cannot fit, before anything is built: numbers of parameters, all lower bounds."""
    import psutil
    import torch

    on_gpu = device.type == "cuda"
    there = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    needed = 4.0 * parameters + 12.0 * trained + batch_bytes  # with a gradient and two moments each
    if needed > there:
        raise ValueError(
            f"this configuration needs at least {needed / 1e9:.3g} GB ({parameters / 1e6:.3g} M parameters, a batch of "
            f"{batch_bytes / 1e9:.3g} GB), {device} has {there / 1e9:.3g} GB; lower {keys}"
        )


class Stop:
    """Notes a stop signal, and when `budget_s` seconds are over, so that work can end at a place of its own choice.
    interrupt: the first Ctrl-C counts as one too; the second ends at once."""

    def __init__(self, budget_s: float | None = None, *, interrupt: bool = False) -> None:
        self.numbers, self.code = (*STOP_SIGNALS, *[signal.SIGINT] * interrupt), STOPPED
        self.deadline = math.inf if budget_s is None else time.monotonic() + budget_s
        self.signal: signal.Signals | None = None
        self.in_loop = False

    def __enter__(self) -> Stop:
        self.old = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.old = {number: signal.signal(number, self._receive) for number in self.numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if number == signal.SIGINT == self.signal:
            raise KeyboardInterrupt
        self.signal, self.code = signal.Signals(number), INTERRUPTED if number == signal.SIGINT else STOPPED
        if not self.in_loop:  # nothing was done yet
            print(f"{self.signal.name}: stopped before the first step", flush=True)
            raise SystemExit(self.code)
        if number == signal.SIGINT:
            print("Ctrl-C: the step ends and a checkpoint is saved; again, and all ends at once", file=sys.stderr)

    def is_due(self) -> bool:
        return self.signal is not None or time.monotonic() >= self.deadline

    def end(self, place: str | None) -> None:
        """Says how to continue a run that stopped at `place`. Raises SystemExit, 130 for Ctrl-C, 143 for other signals,
        if one did it."""
        if place and os.environ.get("RANK", "0") == "0":
            reason = "as budget_s is over" if self.signal is None else f"by {self.signal.name}"
            # The interpreter as it was called: that of a virtual environment need not be the first in PATH.
            here, total = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
            launcher = ["torchrun", "--nproc_per_node", here] if here else [sys.orig_argv[0]]
            command = shlex.join([*launcher, *sys.argv]) + "  (with your --nnodes ... on every node)" * (here != total)
            print(f"stopped {reason} at {place}, a checkpoint is saved; to continue:\n  {command}", flush=True)
        if self.signal is not None:
            raise SystemExit(self.code)


def stoppable(items: Iterable[Any]) -> Iterator[Any]:
    """Yields the items; a stop signal lets the one in work be finished, then ends the run with exit code 143."""
    with Stop() as stop:
        stop.in_loop = True
        for item in items:
            if stop.signal is not None:
                told = "what was finished is whole; repeat the command"
                print(f"stopped by {stop.signal.name}: {told}", file=sys.stderr)
                raise SystemExit(STOPPED)
            yield item


def start_processes(device: str) -> Accelerator:
    """Joins the processes that torchrun or `accelerate launch` started; without them this process is alone. Raises
    ValueError for an environment that is half set, and where the processes cannot meet."""
    missing = [name for name in LAUNCHED if name not in os.environ]
    set_here = [name for name in LAUNCHED[:3] if name in os.environ]
    if missing and set_here and os.environ.get("WORLD_SIZE") != "1":
        raise ValueError(
            f"the environment has {', '.join(set_here)} but not {', '.join(missing)}: start several processes with "
            "torchrun --nproc_per_node N train_....py ..., or a single one after: unset RANK WORLD_SIZE LOCAL_RANK"
        )
    is_cpu = resolve_device(device).type == "cpu"
    # ACCELERATE_* variables do not count: the configuration says what is trained and how.
    ignored = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("ACCELERATE_")}
    try:
        from accelerate import Accelerator

        return Accelerator(mixed_precision="no", gradient_accumulation_steps=1, cpu=is_cpu)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the processes of this run cannot meet at {where} ({first}); if the port is in use choose another: "
            "torchrun --master_port 29501 --nproc_per_node N train_....py ..."
        ) from error
    finally:
        os.environ.update(ignored)


def process_share(device: str) -> tuple[tuple[int, int], str]:
    """Returns this process's number and how many share the work under torchrun, (0, 1) alone, and its own device."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return (0, 1), device
    import torch

    if device in ("auto", "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), device


def git_hash() -> str:
    """Returns the commit of the code, with '+' if the work tree differs; 'unknown' outside a git checkout."""
    # Without the lock that a stopped command, or a full disk, would leave behind in the user's own checkout.
    command = ["git", "--no-optional-locks", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass
class WandbOptions:
    mode: str = "disabled"  # or offline, online
    project: str = "mouse_facelift"
    group: str = ""
    name: str = ""


@dataclass(frozen=True)
class LoopOptions:
    """What the loop takes from a stage's configuration."""

    folder: str  # checkpoints, metrics.jsonl and images of this run, of nobody else
    title: str  # what is trained, on which data
    device: str  # auto, cpu, cuda
    seed: int
    steps: int  # train up to this step
    accumulate: int  # passes per update
    batch_size: int  # samples per pass and process
    lr: float
    max_norm: float  # of the whole gradient, by scaling
    save_every: int  # steps, as are the others
    validate_every: int
    keep: int  # newest checkpoints
    unit: str = "step"  # a step is an update, or with "pass" a pass
    schedule: str = "cosine"  # of the learning rate, see `rate_factor`
    warmup: int = 0  # updates
    step_rules: str = "1"
    skip_factor: float = math.inf  # an update whose gradient norm exceeds max_norm times this is skipped
    precision: str = "no"  # of the network's matrix products: no (float32), fp16, bf16
    ema_decay: float = 0.0  # 0: weights are not averaged
    log_every: int = 1  # line of metrics.jsonl
    print_every: int = 1
    image_every: int = 1
    budget_s: float | None = None  # seconds after which the run saves itself and stops
    skip_digest: bool = False  # resume without comparing files with their digests
    tracker: str = "none"  # tensorboard, wandb
    wandb: WandbOptions | None = None


def shipped(path: Path | str) -> Path:
    """Returns a relative path as it leads beside the code, where something is there, else as it stands."""
    beside = REPOSITORY / path
    return beside if beside.exists() and Path.cwd() != REPOSITORY else Path(path)


def choose_numba_cache() -> None:
    """Lets numba keep its machine code in the temporary folder where neither installation nor home can be written.
    Runs before numba is imported, which complains only when it compiles, maybe after hours of work."""
    if "NUMBA_CACHE_DIR" in os.environ or any(map(_can_write, (REPOSITORY, Path.home() / ".cache" / "numba"))):
        return
    folder = Path(tempfile.gettempdir()) / f"mouse_facelift_numba_{os.getuid()}"
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    log.warning("neither %s nor %s can be written: compiled code is kept in %s", REPOSITORY, Path.home(), folder)


def _can_write(folder: Path) -> bool:
    """Says whether a folder, or the nearest one above it that exists, can be written; permissions alone may lie."""
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            return True
    except OSError:
        return False


def check_output_folder(folder: Path | str) -> None:
    """Raises ValueError where results could not be written into a folder: before the work rather than after it."""
    folder = Path(folder)
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not above.is_dir():
        raise ValueError(f"{folder} cannot be a folder: {above} is a file; name another folder")
    if not _can_write(above):
        raise ValueError(f"{folder} cannot be written (read-only, full or not yours); name another folder")


def main_guard(main: Callable[[], None]) -> None:
    """Runs an entry script: a user's mistake ends with one message and exit code 1 (argparse: 2), no traceback."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    choose_numba_cache()
    try:
        main()
    except DAMAGE as error:
        number = error.errno if isinstance(error, OSError) else refusal(error)
        no_memory = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))
        expected = isinstance(error, ValueError | OSError) or number or no_memory
        if os.environ.get("MOUSE_FACELIFT_TRACEBACK") or not expected:
            raise
        told = str(error)
        if number:
            place, remedy = getattr(error, "filename", None), REMEDIES.get(number)
            told = getattr(error, "strerror", None) or os.strerror(number)
            told = f"{place}: " * bool(place) + told + f"; {remedy}" * bool(remedy)
        elif no_memory:
            told = f"not enough memory ({told.splitlines()[0][:200]}); lower the sizes or numbers that were asked for"
        print(f"error: {told}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def leave() -> None:
    """Ends a command that is done: taking the imported modules apart would take more than a second."""
    with suppress(AttributeError, OSError):  # closed, or on a full disk: the results are written
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)
