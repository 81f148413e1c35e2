"""DANNCE's label3d_dannce.mat: params{c} with K transposed and row vectors, [X 1] [r; t] K.

So OpenCV's K = K^T, R = r^T, T = t^T; RDistort holds k1 k2 (k3), TDistort p1 p2; mm. The principal point is taken as
pixel centres counted from 0, as DANNCE's and MAMMAL's own code does (MATLAB's calibrator, where K came from, nominally
counts from 1: a whole pixel, the same in all views, which neither of them subtracts).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recording.calibration.fields import PIXEL_CENTRE, lens_table, matrix, rigid, shifted, vector
from recording.calibration.model import Calibration

FILE_NAME = "label3d_dannce.mat"
UNIT = "mm"
FIELDS = ("K", "r", "t", "RDistort", "TDistort")


def read_dannce_mat(path: Path | str) -> Calibration:
    content = _load(path, ["params", "camnames"])
    if "params" not in content:
        raise ValueError(f"{path}: the variable 'params' (cell array of K, r, t, RDistort, TDistort) is missing")
    K, w2c, distortion = [], [], []
    for index, cell in enumerate(np.asarray(content["params"], dtype=object).ravel()):
        params, what = _struct(cell), f"{path}: camera {index}"
        missing = [key for key in FIELDS if not hasattr(params, key)]
        if missing:
            raise ValueError(f"{path}: params{{{index + 1}}} lacks {', '.join(missing)}")
        K.append(shifted(matrix(params.K, (3, 3), f"{what}: K").T, PIXEL_CENTRE))
        w2c.append(rigid(matrix(params.r, (3, 3), f"{what}: r").T, params.t, what))
        radial = np.asarray(params.RDistort).ravel()
        k1, k2, k3 = vector(radial, 3, f"{what}: RDistort") if len(radial) != 2 else (*radial, 0.0)
        p1, p2 = vector(params.TDistort, 2, f"{what}: TDistort")
        distortion.append([k1, k2, p1, p2, k3])
    if not K:
        raise ValueError(f"{path}: params holds no cameras")
    names = tuple(str(np.ravel(name)[0]) for name in np.ravel(content.get("camnames", [])) if np.size(name))
    return Calibration(
        np.array(K), np.array(w2c), lens_table(distortion, str(path)), (None,) * len(K), str(path), unit=UNIT,
        names=names if len(names) == len(K) else (),
    )  # fmt: skip


def read_dannce_labels(path: Path | str) -> tuple[np.ndarray, np.ndarray] | None:
    """labelData as points [n, p, 3] in mm and pixels [v, n, p, 2] (outer-corner origin), nan where unlabelled.

    None where the file holds no labelled frames.
    """
    content = _load(path, ["labelData"])
    points, pixels = [], []
    for cell in np.ravel(content.get("labelData", [])):
        labels = _struct(cell)
        if not hasattr(labels, "data_3d") or not hasattr(labels, "data_2d") or not np.size(labels.data_3d):
            return None
        points.append(_triples(labels.data_3d, 3, f"{path}: labelData.data_3d"))
        pixels.append(_triples(labels.data_2d, 2, f"{path}: labelData.data_2d") + PIXEL_CENTRE)
    if not points:
        return None
    shapes = {array.shape[:2] for array in (*points, *pixels)}
    if len(shapes) != 1:
        raise ValueError(f"{path}: labelData has different numbers of frames or points per camera: {sorted(shapes)}")
    return points[0], np.stack(pixels)


def write_dannce_mat(
    path: Path | str, calibration: Calibration, labels: tuple[np.ndarray, np.ndarray] | None = None
) -> None:
    """params and camnames; with labels (points [n, p, 3], pixels [v, n, p, 2], outer-corner) labelData too."""
    from scipy.io import savemat

    calibration.require(path, rational=False)
    count = len(calibration)
    params, names, data = (np.empty((count, 1), dtype=object) for _ in range(3))
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


def _load(path: Path | str, names: list[str]) -> dict:
    import zlib

    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    # A damaged file can fail anywhere in scipy's parser, or in zlib below it.
    damaged = (MatReadError, NotImplementedError, ValueError, OSError, TypeError, IndexError, KeyError, zlib.error)
    try:
        return loadmat(path, squeeze_me=False, struct_as_record=False, variable_names=names)
    except damaged as error:
        raise ValueError(f"{path}: not a MATLAB file this reader understands (version 5 to 7.2): {error}") from error


def _struct(cell):
    inner = np.asarray(cell, dtype=object).ravel()
    return inner[0] if len(inner) else None


def _triples(values, width: int, what: str) -> np.ndarray:
    """[n, p * width] -> [n, p, width]."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] % width:
        raise ValueError(f"{what} must be [frames, {width} x points], got shape {array.shape}")
    return array.reshape(len(array), -1, width)
