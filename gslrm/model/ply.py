"""Gaussians as PLY files in the INRIA 3D-Gaussian-splatting layout, which viewers read."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gslrm.model.gaussians import MAX_SH_DEGREE, Gaussians
from multiview.files import atomic_write

REST_COUNTS = [3 * ((degree + 1) ** 2 - 1) for degree in range(MAX_SH_DEGREE + 1)]  # f_rest columns by SH degree
DTYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
BYTE_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}
HEADER_LINES, HEADER_LINE = 1000, 1000  # lines, and characters of one, at the most


def save_ply(path: Path | str, gaussians: Gaussians) -> None:
    """Writes one scene (b = 1): binary little-endian, one element `vertex`, all properties float32, atomically.

    x y z, nx ny nz (zeros), f_dc_0..2, f_rest_* (channel-major, only above degree 0), opacity (logit), scale_0..2
    (log), rot_0..3 (w x y z): raw values, so that what is read back is what was saved.
    Raises ValueError for more than one scene, an empty one, and values that are not finite.
    """
    path = Path(path)
    check_one_scene(path, gaussians)
    gaussians = gaussians.map(lambda tensor: tensor.detach().float().cpu())
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
    properties = [f"property float {name}" for names, _ in groups for name in names]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {gaussians.num_gaussians}", *properties]
    table = torch.cat([values for _, values in groups], dim=1).numpy().astype("<f4")
    with atomic_write(path) as temporary, open(temporary, "wb") as handle:
        handle.write("\n".join([*header, "end_header\n"]).encode())
        handle.write(table.tobytes())


def check_one_scene(path: Path, gaussians: Gaussians) -> None:
    """Raises ValueError naming `path` where there is not exactly one scene, with finite Gaussians, at least one."""
    if gaussians.num_scenes != 1:
        raise ValueError(f"{path}: a file holds one scene, got {gaussians.num_scenes}; use gaussians.scene(i)")
    if gaussians.num_gaussians == 0:
        raise ValueError(
            f"{path}: there is not one Gaussian to write. The reconstruction is empty, or the filter removed all of it "
            "(--no_filter keeps everything): look at the views, and at how well the cameras fit them"
        )
    gaussians.check_finite(path)


def load_ply(path: Path | str) -> Gaussians:
    """Reads one scene (b = 1, float32): the INRIA layout of SH degree 0 to 3, or FaceLift's (59 floats and a color).

    f_rest that is zero everywhere reads as degree 0.
    Raises ValueError for a file that is missing, cut off, not of this layout, or holds values that are not finite;
    from the header alone, before its numbers are believed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"PLY {path} does not exist")
    with open(path, "rb") as handle:
        table = _read_vertices(path, handle)
    names = table.dtype.names or ()

    def columns(wanted: list[str]) -> Tensor:
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"PLY {path} lacks {', '.join(missing)}: it does not hold 3D Gaussians, got {list(names)}")
        with np.errstate(over="ignore"):  # a double too large for a float is refused below, as infinity
            return torch.from_numpy(np.stack([table[name].astype(np.float32) for name in wanted], axis=-1))[None]

    features = columns([f"f_dc_{i}" for i in range(3)])[:, :, None]
    num_rest = sum(name.startswith("f_rest_") for name in names)
    if num_rest not in REST_COUNTS:
        raise ValueError(f"PLY {path} must have {REST_COUNTS} f_rest properties, got {num_rest}")
    if num_rest:
        rest = columns([f"f_rest_{i}" for i in range(num_rest)])
        if not rest.any():
            rest = rest[..., :0]
        elif "red" in names:
            # FaceLift always writes 45 columns, those of a lower degree packed at the front and padded with zeros.
            rest = rest[..., : next(count for count in REST_COUNTS[1:] if not rest[..., count:].any())]
        features = torch.cat([features, rest.unflatten(2, (3, -1)).transpose(2, 3)], dim=2)
    gaussians = Gaussians(
        xyz=columns(["x", "y", "z"]),
        features=features,
        scaling=columns([f"scale_{i}" for i in range(3)]),
        rotation=columns([f"rot_{i}" for i in range(4)]),
        opacity=columns(["opacity"]),
    )
    gaussians.check_finite(f"PLY {path}")
    return gaussians


def _read_vertices(path: Path, handle: BinaryIO) -> np.ndarray:
    """Returns the element `vertex` as a table with one field per property.

    What the header announces is held against the file's size before anything is read.
    """
    order, elements = _read_header(path, handle)
    if "packed_position" in elements.get("vertex", (0, {}))[1]:
        raise ValueError(
            f"PLY {path} is a compressed one, for viewers: its values are rounded. Give the gaussians.ply it was made "
            "from, or export it as a plain PLY from SuperSplat"
        )
    if "vertex" not in elements:
        raise ValueError(f"PLY {path} must have an element 'vertex', got {list(elements)}")
    left = path.stat().st_size - handle.tell()
    for name, (count, properties) in elements.items():
        if None in properties.values():
            raise ValueError(f"PLY {path}: element '{name}' has a list as a property; Gaussians have numbers alone")
        row = np.dtype([(key, order + kind) for key, kind in properties.items()])
        needed = count * (row.itemsize if order else 2 * len(properties))  # as text, two characters at the least
        if needed > left:
            raise ValueError(
                f"PLY {path} cannot be read: it is cut off, or its header is wrong ({count} of '{name}' take {needed} "
                f"bytes, {left} are left)"
            )
        if name == "vertex":
            break
        left -= needed
        if order:
            handle.seek(needed, 1)
        else:
            [handle.readline() for _ in range(count)]
    if order:
        return np.fromfile(handle, row, count)
    try:
        return np.loadtxt(handle, row, max_rows=count, ndmin=1)
    except ValueError as error:
        raise ValueError(f"PLY {path} cannot be read: {error}") from error


def _read_header(path: Path, handle: BinaryIO) -> tuple[str, dict[str, tuple[int, dict[str, str | None]]]]:
    """Returns the byte order (empty: text) and per element its count and its properties' types, None for a list."""
    lines = [handle.readline(HEADER_LINE).decode("latin-1").split() for _ in range(2)]
    order = BYTE_ORDERS.get(lines[1][1]) if len(lines[1]) == 3 and lines[1][0] == "format" else None
    if lines[0] != ["ply"] or order is None:
        raise ValueError(f"PLY {path} cannot be read: it does not begin as a PLY does")
    elements: dict[str, tuple[int, dict[str, str | None]]] = {}
    for _ in range(HEADER_LINES):
        text = handle.readline(HEADER_LINE).decode("latin-1")
        match text.split():
            case ["end_header"]:
                return order, elements
            case ["comment" | "obj_info", *_]:
                continue
            case ["element", name, count] if count.isascii() and count.isdigit() and name not in elements:
                properties: dict[str, str | None] = {}
                elements[name] = (int(count), properties)
                continue
            case ["property", "list", _, _, name] if elements and name not in properties:
                properties[name] = None
                continue
            case ["property", kind, name] if elements and kind in DTYPES and name not in properties:
                properties[name] = DTYPES[kind]
                continue
        raise ValueError(f"PLY {path} cannot be read: its header has the line {text.strip()!r}")
    raise ValueError(f"PLY {path} cannot be read: its header has over {HEADER_LINES} lines")
