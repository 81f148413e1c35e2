"""Checkpoint files: written whole, loaded strictly, rotated; and the rig stamped beside weights."""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from multiview.files import DAMAGE, atomic_write, full_disk_explained, read_json, write_json

if TYPE_CHECKING:
    import torch

    from multiview.rig import ViewRig

log = logging.getLogger(__name__)

RIG_FILE = "rig.json"
COMPILED = (r"(^|\.)_orig_mod\.", r"\1")  # what torch.compile puts into the names of its weights
# torch allows these calls in weights_only files; a few bytes then make gigabytes. No file of torch.save has them.
UNFOLDING = (b"builtins\nbytearray\n", b"__builtin__\nbytearray\n", b"torch.storage\nUntypedStorage\n")


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
            write_json(sidecar_path(path), sidecar)  # first: weights without it could not be told what they are
            with atomic_write(path) as temporary, open(temporary, "wb") as handle:  # a handle: see full_disk_explained
                torch.save(state, handle)
        except BaseException:
            if not path.exists():
                sidecar_path(path).unlink(missing_ok=True)
            raise


def tensor_bytes(state: object) -> int:
    """Returns the bytes of all tensors in nested dictionaries and lists."""
    if isinstance(state, Mapping):
        return sum(tensor_bytes(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return sum(tensor_bytes(value) for value in state)
    return getattr(state, "nbytes", 0)


def sidecar_path(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".json")


def read_sidecar(path: Path | str) -> dict | None:
    """Returns the JSON beside a checkpoint, None if there is none (public weights)."""
    side = sidecar_path(Path(path))
    return read_json(side) if side.is_file() else None


def load_checkpoint(path: Path | str, kind: type = dict):
    """Loads on the CPU with weights_only; a missing, cut, altered or foreign file is an error that names it.

    kind: of the content, a dictionary unless the file holds one tensor. torch's zip files carry a checksum per tensor,
    which is compared: a flipped bit in the weights is not taken for a weight.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        zipped = zipfile.is_zipfile(path)
        _check_unfolding(path, zipped)
        with torch.serialization.safe_globals([argparse.Namespace]):  # what trainings keep their arguments in
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except DAMAGE as error:
        raise ValueError(f"checkpoint {path} cannot be read: {_reason(str(error) or repr(error), path)}") from error
    if not isinstance(content, kind):
        raise ValueError(f"checkpoint {path} must hold a {kind.__name__}, got {type(content).__name__}")
    return content


def _check_unfolding(path: Path, zipped: bool) -> None:
    """Refuses what would take far more memory than the file's size, and files whose checksums tell of damage."""
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(entry.filename.endswith("/constants.pkl") for entry in archive.infolist()):
                raise ValueError(f"it is TorchScript; save torch.jit.load('{path}').state_dict() instead")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its parts are compressed, which torch.save never does; write it with torch.save")
            damaged = archive.testzip()
            if damaged:
                raise ValueError(f"its part {damaged} differs from its checksum: the file was altered or damaged")
            parts = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    else:
        with open(path, "rb") as handle:
            parts = [handle.read(16 << 20)]
    if any(call in part for call in UNFOLDING for part in parts):
        raise ValueError("it asks for memory by a number instead of holding tensors; torch.save writes no such file")


def _reason(told: str, path: Path) -> str:
    """Returns one sentence instead of torch's own page of text: what is in the way, and the step that converts it."""
    foreign = re.search(r"GLOBAL (\S+) was not an allowed global", told)
    if foreign:
        convert = f"import torch; c = torch.load('{path}'); torch.save(c['model'], '{path}')"
        return (
            f"it holds a {foreign[1]} besides tensors. If you trust its author, convert it where it was written: "
            f'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 python -c "{convert}", with the key of its weights, or c.state_dict() '
            "for a whole module"
        )
    if told.startswith("it"):  # one of the refusals above
        return told
    return f"cut off, or no file of torch.save ({told.strip().splitlines()[0][:160]})"


def step_of(path: Path) -> int:
    """Returns the step number a checkpoint's name ends with (ckpt_0000000000001000.pt, checkpoint-1000), -1 if none."""
    match = re.search(r"(\d+)$", path.name.removesuffix(".pt"))
    return int(match[1]) if match else -1


def newest_checkpoint(folder: Path | str, pattern: str = "ckpt_*.pt") -> Path | None:
    """Returns the newest complete checkpoint file of a folder, found by reading it; None if there is none."""
    for path in sorted(Path(folder).glob(pattern), key=step_of, reverse=True):
        if step_of(path) < 0:  # ckpt_best.pt and the like: nobody knows whether it is newer
            continue
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
    numbered = [path for path in Path(folder).glob(pattern) if step_of(path) >= 0]  # ckpt_best.pt is the user's own
    for path in sorted(numbered, key=step_of)[:-keep]:
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
        if not isinstance(name, str) or not hasattr(tensor, "shape"):
            raise ValueError(f"checkpoint {source} must map names to tensors, got {name!r}: {type(tensor).__name__}")
        for pattern, replacement in (COMPILED, *renames):
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    own = module.state_dict()  # torch's own strict loading speaks of one kind of problem at a time
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
    """Returns the rig stamped into a folder of weights, None if there is none (public weights)."""
    from multiview.rig import ViewRig

    path = Path(folder) / RIG_FILE
    return ViewRig.from_dict(read_json(path), str(path)) if path.is_file() else None
