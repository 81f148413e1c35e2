"""DANNCE's label3d_dannce.mat: params{c} with K transposed and row vectors, [X 1] [r; t] K.

So OpenCV's K = K^T, R = r^T, T = t^T; RDistort holds k1 k2 (k3), TDistort p1 p2; mm. The principal point is taken as
pixel centers counted from 0, as DANNCE's and MAMMAL's own code does (MATLAB's calibrator, where K came from, nominally
counts from 1: a whole pixel, the same in all views, which neither of them subtracts). camnames are the cameras' names
in the order of params, and the names of their video folders.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from recording.calibration.fields import (
    MOST_BYTES,
    PIXEL_CENTRE,
    Fields,
    check_count,
    read_bytes,
    rigid,
    shifted,
)
from recording.calibration.model import Calibration, assemble

FILE_NAME = "label3d_dannce.mat"
UNIT = "mm"
FIELDS = ("K", "r", "t", "RDistort", "TDistort")
# Numbers of MATLAB's file format: types of elements, classes of arrays, levels of cells within cells.
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
INT8, UINT16, MATRIX, COMPRESSED, UTF16 = 1, 4, 14, 15, 17
CELL, STRUCT, CHAR, NUMERIC, COMPLEX, DEEPEST = 1, 2, 4, range(6, 16), 0x800, 16


def read_dannce_mat(path: Path | str) -> Calibration:
    cells = _load(path, "params")
    if not isinstance(cells, list):
        raise ValueError(f"{path}: the variable 'params' (cell array of K, r, t, RDistort, TDistort) is missing")
    check_count(len(cells), f"{path}: params")
    names = _load(path, "camnames")
    names = [] if names is None or not np.size(names) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{path}: camnames must be a cell array of names, {{'Camera1', 'Camera2', ...}}, or left out")
    if names and (len(names) != len(cells) or len(set(names)) != len(names)):
        raise ValueError(
            f"{path}: camnames ({', '.join(names)}) must be {len(cells)} different names, one per camera of params, in "
            "its order: they say which video folder belongs to which camera"
        )
    rows = []
    for index, cell in enumerate(cells):
        params = Fields(_struct(cell), f"{path}: params{{{index + 1}}}", required=FIELDS)
        params.refuse_unread(FIELDS)
        K = shifted(params.matrix("K", 3, 3).T, PIXEL_CENTRE)
        w2c = rigid(params.matrix("r", 3, 3).T, params.values["t"], params.where)
        k1, k2, *k3 = params.vector("RDistort", 2 if np.size(params.values["RDistort"]) == 2 else 3)
        rows.append((K, w2c, [k1, k2, *params.vector("TDistort", 2), *k3], None, names[index] if names else ""))
    return assemble(rows, path, unit=UNIT)


def read_dannce_labels(path: Path | str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns labelData as points [n, p, 3] in mm and pixels [v, n, p, 2] (outer-corner origin), nan where unlabelled.

    None where the file holds no labelled frames.
    """
    points, pixels = [], []
    cells = _load(path, "labelData")
    for cell in cells if isinstance(cells, list) else []:
        labels = _struct(cell) or {}
        if not np.size(labels.get("data_3d", [])) or "data_2d" not in labels:
            return None
        for key, width, rows in (("data_3d", 3, points), ("data_2d", 2, pixels)):
            array = np.asarray(labels[key])
            if array.ndim != 2 or array.shape[1] % width or array.dtype.kind not in "iuf":
                raise ValueError(f"{path}: labelData.{key} must be numbers [frames, {width} x points]")
            rows.append(array.astype(np.float64).reshape(len(array), -1, width))
    shapes = {array.shape[:2] for array in (*points, *pixels)}
    if len(shapes) > 1:
        raise ValueError(f"{path}: labelData has different numbers of frames or points per camera: {sorted(shapes)}")
    return (points[0], np.stack(pixels) + PIXEL_CENTRE) if points else None


def _struct(cell: object) -> object:
    """Returns the fields of a cell that holds one struct."""
    return cell[0] if isinstance(cell, list) and len(cell) == 1 else cell if isinstance(cell, dict) else None


def write_dannce_mat(
    path: Path | str, calibration: Calibration, labels: tuple[np.ndarray, np.ndarray] | None = None
) -> None:
    """params and camnames; with labels (points [n, p, 3], pixels [v, n, p, 2], outer-corner) labelData too."""
    from scipy.io import savemat

    calibration.require(path, rational=False)
    params, names, data = (np.empty((len(calibration), 1), dtype=object) for _ in range(3))
    for index, (K, w2c) in enumerate(zip(shifted(calibration.K, -PIXEL_CENTRE), calibration.w2c, strict=True)):
        k1, k2, p1, p2, k3 = calibration.distortion[index]
        params[index, 0] = {
            "K": K.T, "r": w2c[:3, :3].T, "t": w2c[:3, 3][None],
            "RDistort": np.array([[k1, k2, k3]]), "TDistort": np.array([[p1, p2]]),
        }  # fmt: skip
        names[index, 0] = calibration.name(index, "Camera{1}")
        if labels is not None:
            points, pixels = labels
            frames = np.arange(len(points), dtype=np.float64)[:, None]
            data[index, 0] = {
                "data_2d": (pixels[index] - PIXEL_CENTRE).reshape(len(points), -1),
                "data_3d": points.reshape(len(points), -1), "data_frame": frames, "data_sampleID": 10 * frames + 1,
            }  # fmt: skip
    savemat(path, {"params": params, "camnames": names, **({} if labels is None else {"labelData": data})})


# ---- MATLAB files (version 5 to 7.2) --------------------------------------------------------------------------------


def _load(path: Path | str, name: str) -> object:
    """Returns variable `name`: numbers as arrays, text as str, cells as lists, structs as lists of dicts; None without.

    Nothing of scipy's: its C code makes room for whatever a file claims, and crashes on damaged ones.
    """
    data = read_bytes(path)
    if data.startswith((b"MATLAB 7.3", b"\x89HDF")):
        raise ValueError(
            f"{path} is a MATLAB 7.3 file (HDF5), which is not read; save it in MATLAB as version 7: "
            f"s = load('{Path(path).name}'); save('{Path(path).name}', '-struct', 's', '-v7')"
        )
    try:
        if data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
            raise ValueError("its header does not say version 5")
        order = "<" if data[126:128] == b"IM" else ">"
        for kind, content in _elements(data[128:], order):
            if kind == COMPRESSED:
                head = zlib.decompressobj().decompress(content, 8)  # tells how much more there is
                size = 8 + struct.unpack(f"{order}II", head)[1]
                if size > MOST_BYTES:
                    raise ValueError(
                        f"a variable unfolds to {size / 1e6:.0f} MB, {MOST_BYTES / 1e6:.0f} at most are read"
                    )
                kind, content = next(_elements(zlib.decompressobj().decompress(content, size), order), (0, b""))
            if kind == MATRIX and content:
                found, value = _matrix(content, order, 0, name)
                if found == name:
                    return value
    except (ValueError, KeyError, TypeError, OverflowError, struct.error, zlib.error) as error:
        raise ValueError(f"{path}: not a MATLAB file this reader understands (version 5 to 7.2): {error}") from error
    return None


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yields type and content of each element of a MAT-file, or of a matrix in it."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:  # the content stands in the second half of the tag
            kind, size, start = kind & 0xFFFF, min(kind >> 16, 4), at + 4
        if start + size > len(data):
            raise ValueError("it is truncated or damaged")
        yield kind, data[start : start + size]
        at = start + size + (0 if kind == COMPRESSED else -(start + size - at) % 8)


def _matrix(content: bytes, order: str, depth: int, wanted: str = "") -> tuple[str, object]:
    """Returns name and value of one matrix; wanted: the value of another name is not asked for."""
    if not content or depth > DEEPEST:
        return "", np.zeros((0, 0))
    parts = _elements(content, order)
    flags, shape, raw_name = (next(parts, (0, b""))[1] for _ in range(3))
    bits, name = struct.unpack_from(f"{order}I", flags)[0], raw_name.decode(errors="replace")
    shape = np.frombuffer(shape, f"{order}i4").tolist()
    count = math.prod(shape)
    if wanted not in ("", name) or bits & 255 not in (CELL, STRUCT, CHAR, *NUMERIC) or bits & COMPLEX:
        return name, None
    if not 0 <= count <= len(content):
        raise ValueError(f"an array of {count} entries in {len(content)} bytes")
    if bits & 255 in (CELL, STRUCT):
        fields = [""]
        if bits & 255 == STRUCT:
            (length,) = struct.unpack_from(f"{order}i", next(parts, (0, b""))[1])
            names = next(parts, (0, b""))[1]
            starts = range(0, len(names), max(length, 1))
            fields = [names[at : at + length].split(b"\0")[0].decode(errors="replace") for at in starts]
        values = [_matrix(part, order, depth + 1)[1] for _, part in islice(parts, count * len(fields))]
        if len(values) != count * len(fields):
            raise ValueError(f"{name or 'a cell'} is truncated")
        rows = [values[at : at + len(fields)] for at in range(0, len(values), len(fields))] if fields else []
        return name, values if bits & 255 == CELL else [dict(zip(fields, row)) for row in rows]
    kind, raw = next(parts, (INT8, b""))
    if bits & 255 == CHAR:
        utf16 = "utf-16-le" if order == "<" else "utf-16-be"
        return name, raw.decode(utf16 if kind in (UINT16, UTF16) else "utf-8")
    return name, np.frombuffer(raw, order + TYPES[kind]).reshape(shape, order="F")
