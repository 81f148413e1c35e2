"""Files that appear whole or not at all, strict loading, rotation, and the rig stamped into a folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from multiview.rig import ViewRig

log = logging.getLogger(__name__)

RIG_FILE = "rig.json"
OS_ERROR = re.compile(r"\(os error (\d+)\)")
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk full, quota reached, file larger than allowed


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renamed over it on success, removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, renamed to it on success. An existing `path` is replaced last.

    Who may read the folder may read its files: safetensors keeps those it writes for their owner alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        _permit_as(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _permit_as(folder: Path) -> None:
    """Gives every file in `folder` the folder's own permissions to read and write."""
    allowed = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and mode | allowed != mode:
            path.chmod(mode | allowed)


@contextmanager
def full_disk_explained(path: Path | str, needed_bytes: int = 0) -> Iterator[None]:
    """Turns a full disk (or quota) while writing `path` into a ValueError that says what is missing and what to do."""
    try:
        yield
    except _write_errors() as error:
        reason = _no_space(error)
        if reason is None:
            raise
        path = Path(path).absolute()
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
        needed = f"needs {needed_bytes / 1e6:.1f} MB, " if needed_bytes else ""
        raise ValueError(
            f"cannot write {path}: {reason} ({needed}{free / 1e6:.1f} MB free on that disk). Files written "
            "before are whole and untouched. Make room or choose another folder, then repeat the command: a training "
            "run resumes from its newest checkpoint"
        ) from error


def _write_errors() -> tuple[type[BaseException], ...]:
    """What torch, safetensors and the system raise when they cannot write; asked for only once something was raised."""
    from safetensors import SafetensorError

    return OSError, RuntimeError, SafetensorError


def _no_space(error: BaseException | None) -> str | None:
    """What the system said if it had no room for a file, else None."""
    while error is not None:
        told = OS_ERROR.search(str(error))  # safetensors gives the number in its text
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number in NO_SPACE:
            return os.strerror(number)
        error = error.__context__  # torch.save reports an error of its own over the system's
    return None


def write_json(path: Path | str, content: object) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


# ---- single-file checkpoints ------------------------------------------------------------------------------------


def save_checkpoint(path: Path | str, state: dict, sidecar: dict) -> None:
    """Writes `<path>.json` (JSON values: config, rig, step, git hash), then the weights, each atomically.

    The weights come last, so a weights file that exists is complete and has its sidecar. A full disk is a ValueError
    that says so and leaves no trace.
    """
    import torch

    path = Path(path)
    with full_disk_explained(path, tensor_bytes(state)):
        try:
            write_json(sidecar_path(path), sidecar)
            with atomic_write(path) as temporary, open(temporary, "wb") as handle:  # a handle: see full_disk_explained
                torch.save(state, handle)
        except BaseException:
            if not path.exists():
                sidecar_path(path).unlink(missing_ok=True)
            raise


def tensor_bytes(state: object) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(state, Mapping):
        return sum(tensor_bytes(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return sum(tensor_bytes(value) for value in state)
    return getattr(state, "nbytes", 0)


def sidecar_path(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".json")


def read_sidecar(path: Path | str) -> dict | None:
    """The JSON beside a checkpoint, None if there is none (public weights)."""
    side = sidecar_path(Path(path))
    return json.loads(side.read_text()) if side.is_file() else None


def load_checkpoint(path: Path | str) -> dict:
    """torch.load on the CPU with weights_only; a missing, cut or foreign file is an error that names it."""
    import torch

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be read (cut off, or not a plain tensor file): {first}") from error


def step_of(path: Path) -> int:
    """The step number a checkpoint's name ends with (ckpt_0000000000001000.pt, checkpoint-1000)."""
    match = re.search(r"(\d+)$", path.name.removesuffix(".pt"))
    if match is None:
        raise ValueError(f"checkpoint {path} has no step number at the end of its name")
    return int(match.group(1))


def newest_checkpoint(folder: Path | str, pattern: str = "ckpt_*.pt") -> Path | None:
    """The newest complete checkpoint file of a folder, found by reading it; None if there is none."""
    for path in sorted(Path(folder).glob(pattern), key=step_of, reverse=True):
        try:
            load_checkpoint(path)
        except ValueError as error:
            log.warning("%s; looking at the one before it", error)
            continue
        return path
    return None


def rotate_checkpoints(folder: Path | str, pattern: str, keep: int) -> None:
    """Deletes all but the newest `keep` (>= 1) files or folders matching pattern, oldest first."""
    if keep < 1:
        raise ValueError(f"checkpoints_total_limit must be at least 1, got {keep}")
    for path in sorted(Path(folder).glob(pattern), key=step_of)[:-keep]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
            sidecar_path(path).unlink(missing_ok=True)


# ---- strict loading ---------------------------------------------------------------------------------------------


def load_strict(
    module: torch.nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    source: Path | str,
    renames: Sequence[tuple[str, str]] = (),
) -> None:
    """Loads every tensor or refuses. `renames`: (regular expression, replacement) pairs for known foreign names.

    Raises ValueError listing missing, unexpected and wrongly shaped entries by name.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    own = module.state_dict()
    problems = []
    missing, unexpected = sorted(set(own) - set(renamed)), sorted(set(renamed) - set(own))
    shapes = [
        f"{name} {list(renamed[name].shape)} instead of {list(own[name].shape)}"
        for name in sorted(set(own) & set(renamed))
        if own[name].shape != renamed[name].shape
    ]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{title}: {', '.join(names[:5])}{more}")
    if problems:
        raise ValueError(
            f"checkpoint {source} does not fit {type(module).__name__}: {'; '.join(problems)}. "
            "Name the configuration it was trained with, or the checkpoint of this configuration"
        )
    module.load_state_dict(renamed, strict=True)


# ---- the rig beside weights -------------------------------------------------------------------------------------


def stamp_rig(folder: Path | str, rig: ViewRig) -> None:
    """Writes `rig.json` into a folder of weights."""
    write_json(Path(folder) / RIG_FILE, rig.to_dict())


def read_rig(folder: Path | str) -> ViewRig | None:
    """The rig stamped into a folder of weights, None if there is none (public weights)."""
    from multiview.rig import ViewRig

    path = Path(folder) / RIG_FILE
    return ViewRig.from_dict(json.loads(path.read_text()), str(path)) if path.is_file() else None
