"""Gaussians as files for viewers: the INRIA PLY, `.splat` and SuperSplat's compressed PLY."""

from __future__ import annotations

from pathlib import Path

import torch

from multiview.files import atomic_write

from .gaussians import Gaussians
from .ply import save_ply

# Format -> file suffix. Bytes per Gaussian at degree 0: 68, 32, about 16.
FORMATS = {"ply": ".ply", "splat": ".splat", "ply_compressed": ".compressed.ply"}
COMPRESSED_MIN_OPACITY = 1 / 255  # gsplat leaves fainter Gaussians out of a compressed PLY


def export(path: Path | str, gaussians: Gaussians, format: str) -> None:
    """Writes one scene (b = 1) atomically.

    format: "ply": raw float32 in the INRIA layout, exact (see save_ply).
        "splat": 32 bytes per Gaussian (position and scale float32, colour and opacity 8 bit, rotation 8 bit); spherical
            harmonics above degree 0 are left out.
        "ply_compressed": chunks of 256 (position and log scale 11-10-11 bit between the chunk's bounds, rotation
            2-10-10-10, colour and opacity 8 bit, spherical harmonics 8 bit in -4..4); Gaussians of opacity 1/255 or
            less are left out.
        The last two are written by gsplat, which orders the Gaussians along a Morton curve.
    Raises ValueError for an unknown format, more than one scene, values that are not finite, and a scene with nothing
    to write in the last two formats.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"export format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "ply":
        return save_ply(path, gaussians)
    content = _encode(path, gaussians.detach().float().to("cpu"), format)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def _encode(path: Path, gaussians: Gaussians, format: str) -> bytes:
    from gsplat.exporter import export_splats

    if gaussians.num_scenes != 1:
        raise ValueError(f"{path}: a file holds one scene, got {gaussians.num_scenes}; use gaussians.scene(i)")
    for name in ("xyz", "features", "scaling", "rotation", "opacity"):  # gsplat would leave such Gaussians out unsaid
        if not torch.isfinite(getattr(gaussians, name)).all():
            raise ValueError(f"{path}: {name} of the Gaussians must be finite, got NaN or infinity")
    seen = gaussians.get_opacity > (COMPRESSED_MIN_OPACITY if format == "ply_compressed" else 0)
    if not seen.any():
        raise ValueError(f"{path}: none of {gaussians.num_gaussians} Gaussians can be seen, so {format} has nothing")
    content = export_splats(
        means=gaussians.xyz[0],
        scales=gaussians.scaling[0],
        quats=gaussians.get_rotation[0],
        opacities=gaussians.opacity[0, :, 0],
        sh0=gaussians.features[0, :, :1],
        shN=gaussians.features[0, :, 1:],
        format=format,
    )
    if format == "ply_compressed" and gaussians.sh_degree == 0:
        # gsplat 1.5.3 announces an element `sh` without properties, which viewers of this format refuse.
        content = content.replace(f"element sh {int(seen.sum())}\n".encode(), b"", 1)
    return content
