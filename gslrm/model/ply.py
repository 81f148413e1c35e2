"""Gaussians as PLY files in the INRIA 3D-Gaussian-splatting layout, which viewers read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyElement, PlyParseError
from torch import Tensor

from multiview.checkpoint import sidecar_path
from multiview.files import atomic_write, write_json

from .gaussians import MAX_SH_DEGREE, Gaussians

_REST_COUNTS = {3 * ((degree + 1) ** 2 - 1): degree for degree in range(MAX_SH_DEGREE + 1)}


def save_ply(path: Path | str, gaussians: Gaussians, metadata: dict | None = None) -> None:
    """Writes one scene (b = 1): binary little-endian, one element `vertex`, all properties float32, atomically.

    x y z, nx ny nz (zeros), f_dc_0..2, f_rest_* (channel-major, only above degree 0), opacity (logit), scale_0..2
    (log), rot_0..3 (w x y z): raw values, so that what is read back is what was saved. metadata (JSON values) goes to
    `<path>.json`; nothing but Gaussians goes into the PLY.
    Raises ValueError for more than one scene and for values that are not finite.
    """
    path = Path(path)
    if gaussians.num_scenes != 1:
        raise ValueError(f"{path}: a PLY holds one scene, got {gaussians.num_scenes}; use gaussians.scene(i)")
    gaussians = gaussians.detach().float().to("cpu")
    rest = gaussians.features[0, :, 1:].transpose(1, 2).flatten(1)  # [n, k-1, 3] -> channel-major [n, 3 (k-1)]
    groups = [
        (["x", "y", "z"], gaussians.xyz[0]),
        (["nx", "ny", "nz"], torch.zeros_like(gaussians.xyz[0])),
        ([f"f_dc_{i}" for i in range(3)], gaussians.features[0, :, 0]),
        ([f"f_rest_{i}" for i in range(rest.shape[1])], rest),
        (["opacity"], gaussians.opacity[0]),
        ([f"scale_{i}" for i in range(3)], gaussians.scaling[0]),
        ([f"rot_{i}" for i in range(4)], gaussians.rotation[0]),
    ]
    table = np.empty(gaussians.num_gaussians, dtype=[(name, "<f4") for names, _ in groups for name in names])
    for names, values in groups:
        if not torch.isfinite(values).all():
            raise ValueError(f"{path}: {', '.join(names)} of the Gaussians must be finite, got NaN or infinity")
        for column, name in enumerate(names):
            table[name] = values[:, column].numpy()
    if metadata is not None:
        write_json(sidecar_path(path), metadata)
    with atomic_write(path) as temporary:
        PlyData([PlyElement.describe(table, "vertex")], byte_order="<").write(str(temporary))


def load_ply(path: Path | str) -> Gaussians:
    """Reads one scene (b = 1, float32): the INRIA layout of SH degree 0 to 3, or FaceLift's (59 floats and a colour).

    f_rest that is zero everywhere reads as degree 0.
    Raises ValueError for a file that is missing, cut off, not of this layout, or holds values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"PLY {path} does not exist")
    try:
        content = PlyData.read(str(path), mmap=False)
    except (PlyParseError, ValueError, EOFError) as error:
        raise ValueError(f"PLY {path} cannot be read (cut off, or not a PLY): {error}") from error
    if "vertex" not in content:
        raise ValueError(f"PLY {path} must have an element 'vertex', got {[e.name for e in content.elements]}")
    table = content["vertex"].data
    names = table.dtype.names or ()

    def columns(wanted: list[str]) -> Tensor:
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"PLY {path} lacks {', '.join(missing)}: it does not hold 3D Gaussians, got {list(names)}")
        values = np.stack([table[name].astype(np.float32) for name in wanted], axis=-1)
        if not np.isfinite(values).all():
            raise ValueError(f"PLY {path}: {', '.join(wanted)} must be finite, got NaN or infinity")
        return torch.from_numpy(values)[None]

    dc = columns([f"f_dc_{i}" for i in range(3)])[:, :, None]
    num_rest = sum(name.startswith("f_rest_") for name in names)
    if num_rest not in _REST_COUNTS:
        raise ValueError(f"PLY {path} must have {sorted(_REST_COUNTS)} f_rest properties, got {num_rest}")
    features = dc
    if num_rest:
        rest = _unpack_rest(columns([f"f_rest_{i}" for i in range(num_rest)]), is_facelift="red" in names)
        features = torch.cat([dc, rest], dim=2)
    return Gaussians(
        xyz=columns(["x", "y", "z"]),
        features=features,
        scaling=columns([f"scale_{i}" for i in range(3)]),
        rotation=columns([f"rot_{i}" for i in range(4)]),
        opacity=columns(["opacity"]),
    )


def _unpack_rest(rest: Tensor, is_facelift: bool) -> Tensor:
    """f_rest [1, n, 3 (k-1)], channel-major -> [1, n, k-1, 3]; k = 1 if all zero."""
    if not rest.any():
        return rest.new_zeros(1, rest.shape[1], 0, 3)
    if is_facelift:
        # FaceLift always writes 45 columns, those of a lower degree packed at the front and padded with zeros.
        used = next(count for count in sorted(_REST_COUNTS) if count and not rest[..., count:].any())
        rest = rest[..., :used]
    return rest.unflatten(2, (3, -1)).transpose(2, 3).contiguous()
