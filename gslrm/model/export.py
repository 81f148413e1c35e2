"""Gaussians as files for viewers: `.splat` and SuperSplat's compressed PLY, both written by gsplat."""

from __future__ import annotations

from pathlib import Path

from gslrm.model.gaussians import Gaussians
from gslrm.model.ply import writable
from multiview.files import atomic_write

# Format -> file suffix. Bytes per Gaussian at degree 0: 32, about 16.
FORMATS = {"splat": ".splat", "ply_compressed": ".compressed.ply"}
COMPRESSED_MIN_OPACITY = 1 / 255  # gsplat leaves fainter Gaussians out of a compressed PLY
MAX_LOGIT = 30.0  # opacity 1 to float32's last bit: gsplat leaves infinite logits out unsaid


def export(path: Path | str, gaussians: Gaussians, format: str) -> None:
    """Writes one scene (b = 1) atomically, ordered along a Morton curve.

    format: "splat": 32 bytes per Gaussian (position and scale float32, color and opacity 8 bit, rotation 8 bit);
            spherical harmonics above degree 0 are left out.
        "ply_compressed": chunks of 256 (position and log scale 11-10-11 bit between the chunk's bounds, rotation
            2-10-10-10, color and opacity 8 bit, spherical harmonics 8 bit in -4..4), without opacity up to 1/255.
    Raises ValueError for an unknown format, more than one scene, values that are not finite, and nothing to write.
    """
    from gsplat.exporter import export_splats

    if format not in FORMATS:
        raise ValueError(f"export format must be one of {', '.join(FORMATS)}, got {format!r}")
    gaussians = writable(path, gaussians)
    seen = gaussians.get_opacity > (COMPRESSED_MIN_OPACITY if format == "ply_compressed" else 0)
    if not seen.any():
        raise ValueError(f"{path}: none of {gaussians.num_gaussians} Gaussians can be seen, so {format} has nothing")
    content = export_splats(
        gaussians.xyz[0], gaussians.scaling[0], gaussians.get_rotation[0],
        gaussians.opacity[0, :, 0].clamp(-MAX_LOGIT, MAX_LOGIT), gaussians.features[0, :, :1],
        gaussians.features[0, :, 1:], format=format,
    )  # fmt: skip
    if format == "ply_compressed" and gaussians.sh_degree == 0:
        # gsplat 1.5.3 announces an element `sh` without properties, which viewers of this format refuse.
        content = content.replace(f"element sh {int(seen.sum())}\n".encode(), b"", 1)
    with atomic_write(Path(path)) as temporary:
        temporary.write_bytes(content)
