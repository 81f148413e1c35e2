"""Checkpoints: written whole with a digest, loaded strictly, rotated; the rig beside weights; adapters and averages."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from multiview.files import DAMAGE, atomic_folder, atomic_write, full_disk_explained, read_json, write_json
from multiview.rig import ViewRig

log = logging.getLogger(__name__)

RIG_FILE = "rig.json"
DIGEST = "sha256"  # key of a sidecar: of one file its digest, of a folder {relative path: digest}
SKIP_DIGEST = "MOUSE_FACELIFT_SKIP_DIGEST"  # environment variable, for speed
ADAPTER = "default"  # peft's name of the one adapter
COMPILED = (r"(^|\.)_orig_mod\.", r"\1")  # what torch.compile puts into the names of its weights
# torch allows these calls in weights_only files; a few bytes then make gigabytes. No file of torch.save has them.
UNFOLDING = (b"builtins\nbytearray\n", b"__builtin__\nbytearray\n", b"torch.storage\nUntypedStorage\n")


def save_checkpoint(path: Path | str, state: dict, sidecar: dict) -> None:
    """Writes `<path>.json` (sidecar: config, rig, step, git hash, and the digest), then the weights, atomically. The
    weights come last, so a weights file that exists is complete. A full disk is a ValueError and leaves no trace."""
    path = Path(path)
    with full_disk_explained(path, sum(getattr(leaf, "nbytes", 0) for leaf in tree_leaves(state))):
        try:
            with atomic_write(path) as temporary:
                with open(temporary, "wb") as handle:  # a handle: see full_disk_explained
                    torch.save(state, handle)
                write_json(sidecar_path(path), {**sidecar, DIGEST: digest_of(temporary)})
        except BaseException:
            if not path.exists():
                sidecar_path(path).unlink(missing_ok=True)
            raise


def digest_of(path: Path | str) -> str:
    """Returns the SHA-256 of a file's bytes, hexadecimal; computed once for a file that stays as it is."""
    status = os.stat(path)
    return _digest(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(64)
def _digest(path: str, size: int, changed_ns: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_digest(path: Path, expected: str | None) -> None:
    """Raises ValueError if a file's bytes are not those that were written. expected: None for older files."""
    if expected and not os.environ.get(SKIP_DIGEST) and digest_of(path) != expected:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is not the one written beside it when it was saved; copy it again or use "
            "the checkpoint before it (MOUSE_FACELIFT_SKIP_DIGEST=1 loads it unchecked)"
        )


def sidecar_path(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".json")


def read_sidecar(path: Path | str) -> dict | None:
    """Returns the JSON beside a checkpoint, None if there is none (public weights)."""
    side = sidecar_path(Path(path))
    return read_json(side) if side.is_file() else None


def load_checkpoint(path: Path | str, kind: type = dict):
    """Loads on the CPU with weights_only; what is missing, cut, altered, foreign or not of `kind` is an error that
    names it. The sidecar's digest is compared, or else the checksums of torch's zip files."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    digest = (read_sidecar(path) or {}).get(DIGEST)
    check_digest(path, digest)
    try:
        zipped = zipfile.is_zipfile(path)
        _check_content(path, zipped, checksums=digest is None and not os.environ.get(SKIP_DIGEST))
        with torch.serialization.safe_globals([argparse.Namespace]):  # what trainings keep their arguments in
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except DAMAGE as error:
        told = str(error) or repr(error)
        if foreign := re.search(r"GLOBAL (\S+) was not an allowed global", told):
            told = (
                f"it holds a {foreign[1]} besides tensors. If you trust its author, convert it where it was written: "
                f"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 python -c \"import torch; p = '{path}'; "
                "torch.save(torch.load(p)['model'], p)\", with the key of its weights or .state_dict()"
            )
        elif not told.startswith("it "):  # not one of our own refusals: torch tells a page
            told = f"cut off, or no file of torch.save ({told.strip().splitlines()[0][:160]})"
        raise ValueError(f"checkpoint {path} cannot be read: {told}") from error
    if not isinstance(content, kind):
        raise ValueError(f"checkpoint {path} must hold a {kind.__name__}, got {type(content).__name__}")
    return content


def _check_content(path: Path, zipped: bool, checksums: bool) -> None:
    """Refuses what would take far more memory than the file's size, and files whose checksums tell of damage."""
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(entry.filename.endswith("/constants.pkl") for entry in archive.infolist()):
                raise ValueError(f"it is TorchScript; save torch.jit.load('{path}').state_dict() instead")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it has compressed parts, which torch.save never does; write it with torch.save")
            damaged = archive.testzip() if checksums else None
            if damaged:
                raise ValueError(f"it has a part {damaged} that differs from its checksum: altered or damaged")
            parts = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    else:
        with open(path, "rb") as handle:
            parts = [handle.read(16 << 20)]
    if any(call in part for call in UNFOLDING for part in parts):
        raise ValueError("it asks for memory by a number instead of holding tensors; torch.save writes no such file")


def step_of(path: Path) -> int:
    """Returns the step number a checkpoint's name ends with (ckpt_0000000000001000.pt, checkpoint-1000), -1 if none."""
    match = re.search(r"(\d+)$", path.name.removesuffix(".pt"))
    return int(match[1]) if match else -1


def newest_checkpoint(folder: Path | str, pattern: str = "ckpt_*.pt") -> Path | None:
    """The newest whole checkpoint file of a folder, found by reading; None if there is none."""
    for path in sorted(Path(folder).glob(pattern), key=step_of, reverse=True):
        if step_of(path) >= 0:  # ckpt_best.pt and the like: nobody knows whether it is newer
            try:
                load_checkpoint(path)
                return path
            except ValueError as error:
                log.warning("%s; looking at the one before it", error)
    return None


def rotate_checkpoints(folder: Path | str, pattern: str, keep: int) -> None:
    """Deletes all but the newest `keep` (>= 1) files or folders matching pattern, oldest first."""
    numbered = [path for path in Path(folder).glob(pattern) if step_of(path) >= 0]  # ckpt_best.pt is the user's own
    for path in sorted(numbered, key=step_of)[:-keep]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
            sidecar_path(path).unlink(missing_ok=True)


def load_strict(
    module: torch.nn.Module, state_dict: Mapping[str, Tensor], source: Path | str,
    renames: Sequence[tuple[str, str]] = (),
) -> None:  # fmt: skip
    """Loads every tensor or raises ValueError with the names. renames: (regular expression, its replacement)."""
    renamed = {}
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not hasattr(tensor, "shape"):
            raise ValueError(f"checkpoint {source} must map names to tensors, got {name!r}: {type(tensor).__name__}")
        for pattern, replacement in (COMPILED, *renames):
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    own = module.state_dict()  # torch's own strict loading speaks of one kind of problem at a time
    groups = {"missing": sorted(set(own) - set(renamed)), "unexpected": sorted(set(renamed) - set(own))}
    differing = [name for name in sorted(set(own) & set(renamed)) if own[name].shape != renamed[name].shape]
    shapes = [f"{name} {list(renamed[name].shape)} instead of {list(own[name].shape)}" for name in differing]
    problems = [
        f"{title}: {', '.join(names[:5])}" + f" and {len(names) - 5} more" * (len(names) > 5)
        for title, names in {**groups, "wrong shape": shapes}.items()
        if names
    ]
    if problems:
        raise ValueError(
            f"checkpoint {source} does not fit {type(module).__name__}: {'; '.join(problems)}. "
            "Name the configuration it was trained with, or the checkpoint of this configuration"
        )
    module.load_state_dict(renamed, strict=True)


def stamp_rig(folder: Path | str, rig: ViewRig) -> None:
    """Writes `rig.json` into a folder of weights."""
    write_json(Path(folder) / RIG_FILE, rig.to_dict())


def read_rig(folder: Path | str) -> ViewRig | None:
    """Returns the rig stamped into a folder of weights, None if there is none (public weights)."""
    path = Path(folder) / RIG_FILE
    return ViewRig.from_dict(read_json(path), str(path)) if path.is_file() else None


def add_adapters(model: torch.nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Puts low-rank adapters (LoRA, arXiv 2106.09685; peft's) into the layers whose names are or end with `targets`, in
    place. A layer W becomes W + alpha / rank * B A; B is 0 at first, so the output does not change. A's first values
    come from torch's global generator: seed it before."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [f".{name}" for name, _ in model.named_modules()]
    missing = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    if missing:
        raise ValueError(f"lora_targets: no layer of {type(model).__name__} is called {missing}")
    targets = sorted(targets)
    options = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=targets)
    inject_adapter_in_model(options, model, adapter_name=ADAPTER)
    model.train(model.training)  # peft's new modules would be in training mode, dropout active, in any case


def is_adapter_weight(name: str) -> bool:
    return ".lora_" in name


@torch.no_grad()
def merged_weights(model: torch.nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns the model's tensors under its own names, adapters folded into copies: what any reader of such a model
    loads. values: tensors to take instead of the module's, by the module's names (an average of what trains)."""
    state = {**model.state_dict(), **(values or {})}
    merged = {name.replace(".base_layer.", "."): t for name, t in state.items() if not is_adapter_weight(name)}
    for prefix, layer in model.named_modules():
        if not hasattr(layer, "lora_A") or ADAPTER not in layer.lora_A:
            continue
        down, up = (state[f"{prefix}.{name}.{ADAPTER}.weight"].float() for name in ("lora_A", "lora_B"))
        # A convolution's B is 1x1, so its product with A is one over channels.
        change = up @ down if down.ndim == 2 else torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
        weight = merged[f"{prefix}.weight"]
        merged[f"{prefix}.weight"] = (weight.float() + layer.scaling[ADAPTER] * change).to(weight.dtype)
    return merged


def save_adapters(
    model: torch.nn.Module, folder: Path, rig: ViewRig, source: str | None, values: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the adapters alone in peft's layout (`PeftModel.from_pretrained(model, folder)` puts them on), atomically.
    source: the weights they belong to, for `adapter_config.json`. values: as in `merged_weights`."""
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.detach().cpu().contiguous()
        for name, tensor in {**model.state_dict(), **(values or {})}.items()
        if is_adapter_weight(name)
    }
    settings = model.peft_config[ADAPTER]
    settings.base_model_name_or_path = source
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        settings.save_pretrained(str(temporary))
        stamp_rig(temporary, rig)


class Ema:
    """Exponential moving average of named tensors, in float32: decay min(n / (9 + n), decay) at the n-th of them."""

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = {name: tensor.detach().float().clone() for name, tensor in tensors.items()}

    def update(self, tensors: Mapping[str, Tensor], number: int) -> None:
        """number: of these weights among the averaged ones, from 1; the first replace what was there."""
        decay = min(number / (9 + number), self.decay) if number > 1 else 0.0
        for name, average in self.weights.items():
            average.lerp_(tensors[name].detach().to(average), 1 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, average in self.weights.items():
            average.copy_(tensors[name])
