"""Numbers out of calibration files, checked where they are read so that an error names file and camera."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

PIXEL_CENTRE = 0.5  # pixel-index coordinates (first pixel's centre is 0) -> outer-corner coordinates
ROTATION_TOLERANCE = 1e-3  # files rounded to four digits pass; what passes is made exactly orthonormal
COEFFICIENTS = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")  # OpenCV's order
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # y up, z backward <-> OpenCV's y down, z forward; its own inverse


def matrix(values, shape: tuple[int, ...], what: str) -> np.ndarray:
    """`values` as finite float64 of exactly this shape; `what` names file, camera and field in the error."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be {' x '.join(map(str, shape))} numbers: {error}") from error
    if array.shape != shape:
        raise ValueError(f"{what} must have shape {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite numbers, got {array.round(4).tolist()}")
    return array


def number(value, what: str) -> float:
    """One finite number; a one-element array counts."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a number: {error}") from error
    if array.size != 1 or not np.isfinite(array).all():
        raise ValueError(f"{what} must be one finite number, got {value!r}")
    return float(array.reshape(()))


def vector(values, length: int, what: str) -> np.ndarray:
    """`length` finite numbers in any orientation: (n,), (n, 1) or (1, n)."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must hold {length} numbers: {error}") from error
    if array.size != length or array.ndim > 2 or max(array.shape, default=1) != length:
        raise ValueError(f"{what} must hold {length} numbers, got shape {array.shape}")
    return matrix(array.ravel(), (length,), what)


def picture_size(width, height, what: str) -> tuple[int, int]:
    size = (number(width, f"{what}: width"), number(height, f"{what}: height"))
    if any(side < 1 or side != int(side) for side in size):
        raise ValueError(f"{what}: the picture size must be positive whole numbers, got {width!r} x {height!r}")
    return int(size[0]), int(size[1])


def rotation(values, what: str) -> np.ndarray:
    """[3, 3] rotation: orthonormal within ROTATION_TOLERANCE, right-handed; the nearest exact one is returned."""
    R = matrix(values, (3, 3), what)
    error = float(np.abs(R.T @ R - np.eye(3)).max())
    if error > ROTATION_TOLERANCE:
        raise ValueError(f"{what} must be orthonormal to {ROTATION_TOLERANCE}, R^T R is off by {error:.2g}")
    if np.linalg.det(R) < 0:
        raise ValueError(f"{what} mirrors (determinant -1, left-handed axes); a rotation has determinant +1")
    u, _, v = np.linalg.svd(R)
    return u @ v


def rigid(rotation_values, translation, what: str) -> np.ndarray:
    """[4, 4] world to camera from R [3, 3] and T (3 numbers in any orientation), X_cam = R X + T."""
    w2c = np.eye(4)
    w2c[:3, :3] = rotation(rotation_values, f"{what}: R")
    w2c[:3, 3] = vector(translation, 3, f"{what}: T")
    return w2c


def from_c2w(values, what: str, *, opengl: bool) -> np.ndarray:
    """[4, 4] world to camera, OpenCV axes, from a camera-to-world matrix [4, 4] (or [3, 4])."""
    rows = np.shape(values)[:1] if not isinstance(values, (str, dict)) and values is not None else ()
    c2w = matrix(values, (3, 4) if rows == (3,) else (4, 4), what)
    if rows != (3,) and np.abs(c2w[3] - [0.0, 0.0, 0.0, 1.0]).max() > 1e-6:
        raise ValueError(f"{what} must end in the row 0 0 0 1, got {c2w[3].tolist()}; is it transposed?")
    R = rotation(c2w[:3, :3], f"{what}: its rotation").T
    w2c = np.eye(4)
    w2c[:3, :3], w2c[:3, 3] = R, -R @ c2w[:3, 3]
    return OPENGL @ w2c if opengl else w2c


def to_c2w(w2c: np.ndarray, *, opengl: bool) -> np.ndarray:
    """[4, 4] camera to world of a world-to-camera matrix with OpenCV axes."""
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = w2c[:3, :3].T, -w2c[:3, :3].T @ w2c[:3, 3]
    return c2w @ OPENGL if opengl else c2w


def intrinsics(fx: float, fy: float, cx: float, cy: float, skew: float = 0.0) -> np.ndarray:
    return np.array([[fx, skew, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def shifted(K: np.ndarray, by: float) -> np.ndarray:
    """K [..., 3, 3] with its principal point moved by `by` pixels in x and y."""
    K = np.array(K, dtype=np.float64)
    K[..., :2, 2] += by
    return K


def lens_table(rows: list, what: str) -> np.ndarray:
    """Coefficient rows of up to 8 (COEFFICIENTS) -> [v, 5], or [v, 8] where a camera has k4, k5 or k6."""
    table = np.zeros((len(rows), len(COEFFICIENTS)))
    for index, row in enumerate(rows):
        row = np.ravel(np.array(row, dtype=np.float64))
        if len(row) > len(COEFFICIENTS):
            if np.any(row[len(COEFFICIENTS) :]):
                raise ValueError(
                    f"{what}: camera {index} has {len(row)} distortion coefficients; thin-prism and tilt terms (beyond "
                    f"{', '.join(COEFFICIENTS)}) are not supported"
                )
            row = row[: len(COEFFICIENTS)]
        table[index, : len(row)] = matrix(row, row.shape, f"{what}: distortion of camera {index}")
    return table if np.any(table[:, 5:]) else table[:, :5]


def natural_key(name: str) -> list:
    """Sorts cam2 before cam10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def read_json(path: Path | str) -> dict:
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"calibration {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"calibration {path} must hold an object, got {type(content).__name__}")
    return content
