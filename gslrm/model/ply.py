"""Gaussians as files: PLY in the INRIA layout; for viewers `.splat` and SuperSplat's compressed PLY, by gsplat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gslrm.model.gaussians import MAX_SH_DEGREE, Gaussians
from multiview.files import atomic_write

REST_COUNTS = [3 * ((degree + 1) ** 2 - 1) for degree in range(MAX_SH_DEGREE + 1)]  # f_rest columns by SH degree

# Format -> file suffix. Bytes per Gaussian at degree 0: 32, about 16.
FORMATS = {"splat": ".splat", "ply_compressed": ".compressed.ply"}
COMPRESSED_MIN_OPACITY = 1 / 255  # gsplat leaves fainter Gaussians out of a compressed PLY
MAX_LOGIT = 30.0  # opacity 1 to float32's last bit: gsplat leaves infinite logits out unsaid


def save_ply(path: Path | str, gaussians: Gaussians) -> None:
    """Writes one scene (b = 1): binary little-endian, one element `vertex`, all properties float32 and raw (opacity is
    a logit, scale a logarithm, f_rest channel-major, normals 0), atomically. Raises ValueError for more than one scene,
    an empty one, and values that are not finite."""
    gaussians = writable(path, gaussians)
    rest = gaussians.features[0, :, 1:].transpose(1, 2).flatten(1)  # [n, k-1, 3] -> channel-major [n, 3 (k-1)]
    names = ["x", "y", "z", "nx", "ny", "nz", *numbered("f_dc", 3), *numbered("f_rest", rest.shape[1]), "opacity"]
    properties = [f"property float {name}" for name in (*names, *numbered("scale", 3), *numbered("rot", 4))]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {gaussians.num_gaussians}", *properties]
    xyz, shapes = gaussians.xyz[0], (gaussians.opacity[0], gaussians.scaling[0], gaussians.rotation[0])
    columns = (xyz, torch.zeros_like(xyz), gaussians.features[0, :, 0], rest, *shapes)
    table = torch.cat(columns, dim=1).numpy().astype("<f4")
    with atomic_write(Path(path)) as temporary:
        temporary.write_bytes("\n".join([*header, "end_header\n"]).encode() + table.tobytes())


def numbered(name: str, count: int) -> list[str]:
    return [f"{name}_{i}" for i in range(count)]


def writable(path: Path | str, gaussians: Gaussians) -> Gaussians:
    """Returns the Gaussians in float32 on the CPU; ValueError naming `path` unless they are one finite scene."""
    if gaussians.num_scenes != 1:
        raise ValueError(f"{path}: a file holds one scene, got {gaussians.num_scenes}")
    if gaussians.num_gaussians == 0:
        remedy = "(--no_filter keeps everything): look at the views, and at how well the cameras fit them"
        told = "there is not one Gaussian to write. The reconstruction is empty, or the filter removed all of it"
        raise ValueError(f"{path}: {told} {remedy}")
    gaussians.check_finite(path)
    return gaussians.map(lambda tensor: tensor.detach().float().cpu())


def load_ply(path: Path | str) -> Gaussians:
    """Reads one scene (b = 1, float32): the INRIA layout of SH degree 0 to 3, or FaceLift's (59 floats and a color).
    Raises ValueError for a file that is missing, cut off, not of this layout, or holds values that are not finite."""
    from plyfile import PlyData, PlyParseError

    if not Path(path).is_file():
        raise ValueError(f"PLY {path} does not exist")
    try:
        # Mapped, not read: a header that announces more than the file holds is refused before memory is taken for it.
        content = PlyData.read(str(path))
    except (PlyParseError, ValueError, MemoryError, OverflowError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"PLY {path} cannot be read: it is cut off, or its header is wrong ({reason})") from error
    table = next((element.data for element in content.elements if element.name == "vertex"), np.empty(0, []))
    names = table.dtype.names or ()
    if "packed_position" in names:
        remedy = "give the gaussians.ply it was made from, or export it as a plain PLY from SuperSplat"
        raise ValueError(f"PLY {path} is a compressed one, for viewers: its values are rounded; {remedy}")

    def columns(*wanted: str) -> Tensor:
        missing = [name for name in wanted if name not in names or table.dtype[name].kind == "O"]  # O: a list
        if missing:
            raise ValueError(
                f"PLY {path} lacks {', '.join(missing)} as numbers of an element 'vertex': it does not hold 3D "
                f"Gaussians, got {', '.join(names) or [element.name for element in content.elements]}"
            )
        with np.errstate(over="ignore"):  # a double too large for a float is refused below, as infinity
            return torch.from_numpy(np.stack([table[name].astype(np.float32) for name in wanted], axis=-1))[None]

    features = columns(*numbered("f_dc", 3))[:, :, None]
    num_rest = sum(name.startswith("f_rest_") for name in names)
    if num_rest not in REST_COUNTS:
        raise ValueError(f"PLY {path} must have {REST_COUNTS} f_rest properties, got {num_rest}")
    if num_rest:
        rest = columns(*numbered("f_rest", num_rest))
        if not rest.any():  # degree 0
            rest = rest[..., :0]
        elif "red" in names:
            # FaceLift always writes 45 columns, those of a lower degree packed at the front and padded with zeros.
            rest = rest[..., : next(count for count in REST_COUNTS[1:] if not rest[..., count:].any())]
        features = torch.cat([features, rest.unflatten(2, (3, -1)).transpose(2, 3)], dim=2)
    xyz, scaling, rotation = columns(*"xyz"), columns(*numbered("scale", 3)), columns(*numbered("rot", 4))
    gaussians = Gaussians(xyz, features, scaling, rotation, columns("opacity"))
    gaussians.check_finite(f"PLY {path}")
    return gaussians


def export(path: Path | str, gaussians: Gaussians, format: str) -> None:
    """Writes one scene (b = 1) atomically, ordered along a Morton curve. format: "splat", 32 bytes per Gaussian,
    without spherical harmonics above degree 0; "ply_compressed", SuperSplat's, without opacity up to 1/255. Raises
    ValueError for an unknown format, more than one scene, values that are not finite, and nothing to write."""
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
