"""Model folders as other programs write them: JSON configurations and weights, every error naming the file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from multiview.checkpoint import DIGEST, check_digest, load_checkpoint
from multiview.files import DAMAGE, read_json, take

SIDECAR = "checkpoint.json"  # of a training checkpoint; holds the digests of its files
LARGEST = 2**20  # of any number in a configuration: widths, vocabularies and time steps are far smaller
# What diffusers, transformers and torch raise for a configuration or a file they cannot use.
LIBRARY_ERRORS = (*DAMAGE, ImportError, SafetensorError, StrictDataclassError)


@contextmanager
def failure_told(what: str) -> Iterator[None]:
    """Turns a library's exception into a ValueError of one line: `what`, then its first line."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(f"{what}: {line[:300]}; copy it again") from error


def read_config(path: Path, fields: Mapping[str, type | tuple], required: tuple = (), largest: int = LARGEST) -> dict:
    """Returns a component's JSON configuration, its sizes and the named fields (each with its type, whole numbers are
    positive, or its allowed values) checked before anything is allocated. Raises ValueError naming file and key."""
    content = read_json(path)
    check_sizes(content, str(path), largest)
    for name, allowed in fields.items():
        kind, default = str if isinstance(allowed, tuple) else allowed, ... if name in required else None
        value = take(content, name, kind, str(path), default=default, least=1 if kind is int else -1e30)
        if isinstance(allowed, tuple) and value not in (None, *allowed):
            raise ValueError(f"{path}: {name} must be one of {', '.join(allowed)}, got {value!r:.60}")
    return content


def check_sizes(content: dict | list, source: str, largest: int = LARGEST, depth: int = 0) -> None:
    """Refuses numbers that are not finite or larger than any model's, and deep nesting: libraries would try them."""
    if depth > 8:
        raise ValueError(f"{source} is nested more than 8 levels deep, which no model's configuration is")
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        limit = 256 if "layers" in str(key) else largest  # of a list so named, also inside
        if isinstance(value, dict | list):
            check_sizes(value, f"{source}: {key}", limit, depth + 1)
        elif isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= limit):
            raise ValueError(f"{source}: {key} must be a finite number of at most {limit}, got {value!r:.40}")


def read_weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """Returns all tensors of `<stem>.safetensors`, else of its shards, its half-precision variant or torch's .bin,
    without the prefixes of torch.compile and DataParallel. Raises ValueError for missing, cut, non-finite weights."""
    named = re.compile(rf"{stem}(\.fp16)?(?:-\d+-of-(\d+))?(\.fp16)?\.(safetensors|bin)")
    groups: dict[tuple[bool, bool, int], list[Path]] = {}
    for path in sorted(folder.glob(f"{stem}*")):
        if match := named.fullmatch(path.name):
            key = (match[4] == "bin", bool(match[1] or match[3]), int(match[2] or 0))
            groups.setdefault(key, []).append(path)
    if not groups:
        expected = f"expected {stem}.safetensors (whole, in shards or .fp16) or .bin"
        raise ValueError(f"{folder} holds no weights: {expected}; {what_is_there(folder)}")
    first = min(groups)  # safetensors before .bin, full precision before half, whole before shards
    if first[2] and len(groups[first]) != first[2]:
        raise ValueError(f"{folder} holds {len(groups[first])} of the {first[2]} shards of {stem}; copy all of them")
    state: dict[str, Tensor] = {}
    for path in groups[first]:
        with failure_told(f"{path} is damaged or incomplete"):
            part = load_checkpoint(path) if path.suffix == ".bin" else load_file(path)
        if not all(isinstance(tensor, Tensor) for tensor in part.values()):
            raise ValueError(f"{path} must hold named tensors, got something else")
        require_finite(part, path)
        state.update({re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor for name, tensor in part.items()})
    return state


def check_weights(folder: Path, part: str = "") -> None:
    """Raises ValueError if a weights file of a checkpoint is gone, cut off or changed. part: a folder of it."""
    digests = read_json(folder / SIDECAR).get(DIGEST, {}) if (folder / SIDECAR).is_file() else {}
    for path, digest in ((folder / name, digest) for name, digest in digests.items() if name.startswith(part)):
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        check_digest(path, digest)
    for path in (folder / part).rglob("*.safetensors"):  # public folders hold no digests, but the files their lengths
        with failure_told(f"{path} is damaged"), safe_open(path, framework="pt"):
            pass


def require_finite(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuses weights with NaN or infinity: what they compute looks like an empty image, not like an error."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        told = (
            f"values that are not finite (NaN or infinity) in {len(bad)} of {len(tensors)} tensors, first in {bad[0]}"
        )
        remedy = "the file is damaged or its training diverged; copy it again, or use an earlier checkpoint"
        raise ValueError(f"weights {source} hold {told}: {remedy}")


def what_is_there(folder: Path) -> str:
    """Returns a clause for messages about a folder that lacks something."""
    if not folder.exists():
        return "the folder does not exist"
    return f"it holds {sorted(item.name for item in folder.iterdir())[:8]}" if folder.is_dir() else "it is not a folder"
