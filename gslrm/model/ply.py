"""Gaussians as files: PLY in the INRIA layout; for viewers `.splat` and SuperSplat's compressed PLY by gsplat, `.spz`
by gsply, `.glb`."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gslrm.model.gaussians import C0, MAX_SH_DEGREE, Gaussians
from multiview.files import atomic_write

REST_COUNTS = [3 * ((degree + 1) ** 2 - 1) for degree in range(MAX_SH_DEGREE + 1)]  # f_rest columns by SH degree

# The axis that points up in a file -> cosine and sine of its turn about x from the world. The front, at azimuth 0 and
# world -y, faces who looks along +z where y points down (3D Gaussian splatting), along -z where y points up (glTF).
UP = {"z": (1, 0), "y": (0, -1), "-y": (0, 1)}
COMMENT = "comment up {}; Mouse-FaceLift"
# Format -> file suffix; bytes per Gaussian at degree 0: 32, about 16, 20 before gzip, 60.
FORMATS = {"splat": ".splat", "ply_compressed": ".compressed.ply", "spz": ".spz", "glb": ".glb"}
VIEWER_UP = {"splat": "-y", "ply_compressed": "-y", "spz": "y", "glb": "y"}  # what each format's viewers expect
GLTF_SPLATS = "KHR_gaussian_splatting"
COMPRESSED_MIN_OPACITY = 1 / 255  # gsplat leaves fainter Gaussians out of a compressed PLY
LOGITS = (-30.0, 30.0)  # opacity 1 to float32's last bit: gsplat leaves infinite logits out unsaid


def save_ply(path: Path | str, gaussians: Gaussians, up: str = "z") -> None:
    """Writes one scene (b = 1): binary little-endian, one element `vertex`, all properties float32 and raw (opacity is
    a logit, scale a logarithm, f_rest channel-major, normals 0), atomically. up: of `UP`, the file's axis; a comment
    says it, and `load_ply` turns back. Raises ValueError for more than one scene, an empty one, and values that are not
    finite."""
    gaussians = turned(writable(path, gaussians), up)
    rest = gaussians.features[0, :, 1:].transpose(1, 2).flatten(1)  # [n, k-1, 3] -> channel-major [n, 3 (k-1)]
    names = ["x", "y", "z", "nx", "ny", "nz", *numbered("f_dc", 3), *numbered("f_rest", rest.shape[1]), "opacity"]
    properties = [f"property float {name}" for name in (*names, *numbered("scale", 3), *numbered("rot", 4))]
    header = ["ply", "format binary_little_endian 1.0", COMMENT.format(up), f"element vertex {gaussians.num_gaussians}"]
    xyz, shapes = gaussians.xyz[0], (gaussians.opacity[0], gaussians.scaling[0], gaussians.rotation[0])
    columns = (xyz, torch.zeros_like(xyz), gaussians.features[0, :, 0], rest, *shapes)
    table = torch.cat(columns, dim=1).numpy().astype("<f4")
    with atomic_write(Path(path)) as temporary:
        temporary.write_bytes("\n".join([*header, *properties, "end_header\n"]).encode() + table.tobytes())


def turned(gaussians: Gaussians, up: str, *, back: bool = False) -> Gaussians:
    """Returns Gaussians of the world, where z points up, with axis `up` (of `UP`) upward instead; back: the reverse."""
    if up == "z":
        return gaussians
    (cosine, sine), matrix = UP[up], torch.eye(4, dtype=torch.float64)
    matrix[1:3, 1:3] = torch.tensor([[cosine, -sine], [sine, cosine]])
    return gaussians.moved(matrix.T if back else matrix)


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
    """Reads one scene (b = 1, float32): the INRIA layout of SH degree 0 to 3, or FaceLift's (59 floats and a color). A
    file of ours whose comment names another axis as up is turned back to the world: cameras always match. Raises
    ValueError for a file that is missing, cut off, not of this layout, or holds values that are not finite."""
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
    told = re.search(COMMENT.removeprefix("comment ").format("([-xyz]+)"), "\n".join(content.comments))
    if told and told[1] not in UP:
        raise ValueError(f"PLY {path} must have one of {', '.join(UP)} up, its comment says {told[1]}; export it again")
    return turned(gaussians, told[1] if told else "z", back=True)


def export(path: Path | str, gaussians: Gaussians, format: str) -> None:
    """Writes one scene (b = 1) atomically, turned so that the format's viewers show it upright (`VIEWER_UP`).

    format: "splat", 32 bytes per Gaussian, without spherical harmonics above degree 0; "ply_compressed", SuperSplat's,
    without opacity up to 1/255; both ordered along a Morton curve. "spz": Niantic's, gzipped. "glb": glTF with
    KHR_gaussian_splatting, exact. Raises ValueError for an unknown format, more than one scene, values that are not
    finite, and nothing to write."""
    if format not in FORMATS:
        raise ValueError(f"export format must be one of {', '.join(FORMATS)}, got {format!r}")
    gaussians = turned(writable(path, gaussians), VIEWER_UP[format])
    seen = gaussians.get_opacity > (COMPRESSED_MIN_OPACITY if format == "ply_compressed" else 0)
    if not seen.any():
        raise ValueError(f"{path}: none of {gaussians.num_gaussians} Gaussians can be seen, so {format} has nothing")
    gaussians = replace(gaussians, rotation=gaussians.get_rotation, opacity=gaussians.opacity.clamp(*LOGITS))
    xyz, scaling, rotation = gaussians.xyz[0], gaussians.scaling[0], gaussians.rotation[0]
    opacity, dc, rest = gaussians.opacity[0, :, 0], gaussians.features[0, :, :1], gaussians.features[0, :, 1:]
    with atomic_write(Path(path)) as temporary:
        if format == "spz":
            from gsply import GSData, create_ply_format, write_spz

            parts = [part.numpy() for part in (xyz, scaling, rotation, opacity, dc[:, 0], rest)]
            write_spz(temporary, GSData(*parts, _format=create_ply_format(gaussians.sh_degree)))
        elif format == "glb":
            temporary.write_bytes(glb_bytes(gaussians))
        else:
            from gsplat.exporter import export_splats

            content = export_splats(xyz, scaling, rotation, opacity, dc, rest, format=format)
            if format == "ply_compressed" and gaussians.sh_degree == 0:
                # gsplat 1.5.3 announces an element `sh` without properties, which viewers of this format refuse.
                content = content.replace(f"element sh {int(seen.sum())}\n".encode(), b"", 1)
            temporary.write_bytes(content)


def glb_bytes(gaussians: Gaussians) -> bytes:
    """Returns a binary glTF of one scene whose y points up, by the ratified text of KHR_gaussian_splatting: scales are
    linear, opacity is 0..1, rotation x y z w; viewers without the extension show its points in COLOR_0."""
    # The real harmonics of 3D Gaussian splatting have the extension's order and signs.
    places = [f"SH_DEGREE_{d}_COEF_{number}" for d in range(gaussians.sh_degree + 1) for number in range(2 * d + 1)]
    xyz, opacity = gaussians.xyz[0], gaussians.get_opacity[0]
    color = torch.cat([C0 * gaussians.features[0, :, 0] + 0.5, opacity], dim=-1).clamp(0, 1)
    splats = {"ROTATION": gaussians.rotation[0].roll(-1, dims=-1), "SCALE": gaussians.get_scaling[0]}
    splats |= {"OPACITY": opacity[:, 0], **dict(zip(places, gaussians.features[0].unbind(1)))}
    attributes = {"POSITION": xyz, **{f"{GLTF_SPLATS}:{name}": values for name, values in splats.items()}}
    attributes["COLOR_0"] = (color * 255).round().to(torch.uint8)
    accessors, views, parts = [], [], []
    for values in attributes.values():
        array = values.contiguous().numpy()
        kind, component = f"VEC{array.shape[1]}" if array.ndim == 2 else "SCALAR", 5126 if array.itemsize == 4 else 5121
        accessors.append({"bufferView": len(views), "componentType": component, "count": len(array), "type": kind})
        views.append({"buffer": 0, "byteOffset": sum(map(len, parts)), "byteLength": array.nbytes, "target": 34962})
        parts.append(array.tobytes())  # a multiple of 4 bytes each, as accessors must be aligned
    accessors[0] |= {"min": xyz.amin(0).tolist(), "max": xyz.amax(0).tolist()}
    accessors[-1]["normalized"] = True
    body, told = b"".join(parts), {GLTF_SPLATS: {"kernel": "ellipse", "colorSpace": "srgb_rec709_display"}}
    primitive = {"attributes": dict(zip(attributes, range(len(views)))), "mode": 0, "extensions": told}
    text = json.dumps({
        "asset": {"version": "2.0", "generator": "Mouse-FaceLift"}, "extensionsUsed": [GLTF_SPLATS], "scene": 0,
        "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}], "meshes": [{"primitives": [primitive]}],
        "buffers": [{"byteLength": len(body)}], "bufferViews": views, "accessors": accessors,
    }).encode()  # fmt: skip
    text += b" " * (-len(text) % 4)
    header = struct.pack("<4sIII4s", b"glTF", 2, 28 + len(text) + len(body), len(text), b"JSON")
    return header + text + struct.pack("<I4s", len(body), b"BIN\0") + body
