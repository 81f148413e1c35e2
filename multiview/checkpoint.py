"""Checkpoint files: written whole, loaded strictly, rotated; and the rig stamped beside weights."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from multiview.files import atomic_write, full_disk_explained, write_json

if TYPE_CHECKING:
    import torch

    from multiview.rig import ViewRig

log = logging.getLogger(__name__)

RIG_FILE = "rig.json"

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
        # argparse's Namespace is what many trainers store beside the weights; before 1.6 torch wrote no zip files.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
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
