"""DANNCE's label3d_dannce.mat: params{c} with K transposed and row vectors, [X 1] [r; t] K.

So OpenCV's K = K^T, R = r^T, T = t^T; RDistort holds k1 k2 (k3), TDistort p1 p2; mm. The principal point is taken as
pixel centers counted from 0, as DANNCE's and MAMMAL's own code does (MATLAB's calibrator, where K came from, nominally
counts from 1: a whole pixel, the same in all views, which neither of them subtracts). camnames are the cameras' names
in the order of params, and the names of their video folders.
"""

from __future__ import annotations

import io
import struct
import zlib
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
COMPRESSED, MATRIX = 15, 14  # types of elements in a MAT-file
SPARSE, LAST_PLAIN_CLASS, DEEPEST = 5, 15, 16  # classes of arrays; levels of cells within cells


def read_dannce_mat(path: Path | str) -> Calibration:
    content = _load(path, ["params", "camnames"])
    if "params" not in content:
        raise ValueError(f"{path}: the variable 'params' (cell array of K, r, t, RDistort, TDistort) is missing")
    cells = np.asarray(content["params"], dtype=object).ravel()
    check_count(len(cells), f"{path}: params")
    names = [str(np.ravel(name)[0]) for name in np.ravel(content.get("camnames", [])) if np.size(name)]
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
    for cell in np.ravel(_load(path, ["labelData"]).get("labelData", [])):
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


def _struct(cell: object) -> dict | None:
    """Returns the fields of a cell that holds one struct; None for anything else."""
    inner = np.asarray(cell, dtype=object).ravel()
    names = getattr(inner[0], "_fieldnames", None) if len(inner) else None
    return None if names is None else {name: getattr(inner[0], name) for name in names}


def _load(path: Path | str, names: list[str]) -> dict:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    data = read_bytes(path)
    if data.startswith(b"MATLAB 7.3") or data.startswith(b"\x89HDF"):
        raise ValueError(
            f"{path} is a MATLAB 7.3 file (HDF5), which is not read; save it in MATLAB as version 7: "
            f"s = load('{Path(path).name}'); save('{Path(path).name}', '-struct', 's', '-v7')"
        )
    # A damaged file can fail anywhere in scipy's parser, or in zlib below it.
    damaged = (MatReadError, NotImplementedError, ValueError, OSError, TypeError, IndexError, KeyError, AttributeError,
               OverflowError, MemoryError, struct.error, zlib.error)  # fmt: skip
    try:
        if data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
            raise ValueError("its header does not say version 5")
        _check_elements(data, 128, "<" if data[126:128] == b"IM" else ">")
        return loadmat(io.BytesIO(data), squeeze_me=False, struct_as_record=False, variable_names=names)
    except damaged as error:
        raise ValueError(f"{path}: not a MATLAB file this reader understands (version 5 to 7.2): {error}") from error


def _check_elements(data: bytes, at: int, order: str, depth: int = 0) -> None:
    """Raises ValueError for arrays that say they are larger than their bytes: scipy would make room for them."""
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        at += 8
        if kind >> 16:  # the content stands in the second half of the tag
            continue
        if kind == COMPRESSED:
            unfolded = zlib.decompressobj().decompress(data[at : at + size], MOST_BYTES + 1)
            if len(unfolded) > MOST_BYTES:
                raise ValueError(f"a variable unfolds to more than {MOST_BYTES / 1e6:.0f} MB")
            _check_elements(unfolded, 0, order, depth)
        elif kind == MATRIX and size:
            inner = data[at : at + size]
            array_class = struct.unpack_from(f"{order}I", inner, 8)[0] & 255
            (length,) = struct.unpack_from(f"{order}I", inner, 20)
            if array_class <= LAST_PLAIN_CLASS:  # others have no sizes here
                count = float(np.prod(np.frombuffer(inner, f"{order}i4", length // 4, 24), dtype=np.float64))
                if depth > DEEPEST or not 0 <= count <= (np.inf if array_class == SPARSE else size):
                    raise ValueError(f"it holds an array of {count:.0f} entries in {size} bytes, {depth} levels deep")
                _check_elements(inner, 0, order, depth + 1)
        at += size if kind == COMPRESSED else size + -size % 8
