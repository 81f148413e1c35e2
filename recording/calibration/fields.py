"""The door through which numbers of calibration files come in: one check of types, shapes and ranges for all."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

PIXEL_CENTRE = 0.5  # pixel-index coordinates (first pixel's center is 0) -> outer-corner coordinates
ROTATION_TOLERANCE = 1e-3  # files rounded to four digits pass; what passes is made exactly orthonormal
LARGEST = 1e12  # no length, focal length or coefficient comes near it
MOST_CAMERAS, MOST_PIXELS, MOST_BYTES = 256, 100_000, 512 * 2**20  # beyond these a file is damaged or malicious
COEFFICIENTS = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")  # OpenCV's order
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # y up, z backward <-> OpenCV's y down, z forward; its own inverse
# Names that say where a camera sees a point, in any format: one that a reader does not use must say nothing.
LENS_FIELD = re.compile(
    r"[kps]\d+|tau_?[xy]|xi|skew|d|dist|.*(distort|dist_?coef|fish_?eye|f_?theta|lat_?long|equirect|panoram|omni|"
    r"rolling|prism|fov|from_na|mts_args|matrix_(start|end)|crop_to_border|binning|roi).*|shift_[xy]|offset_[xy]",
    re.IGNORECASE,
)
MODEL_FIELD = re.compile(r"(camera|lens|projection|distortion)_?(model|type|mode)|projection", re.IGNORECASE)
PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE", "PERSP")


class Fields:
    """One object of a calibration file, read field by field; every error names file, place and field."""

    def __init__(self, values: object, where: str, required: tuple[str, ...] = ()) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{where} must be an object of named fields, got {reprlib.repr(values)}")
        missing = [key for key in required if key not in values]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def number(self, key: str, default: float | None = None) -> float:
        """Returns one finite number; with a default the field may be missing, but not of another type."""
        value = self.values.get(key, default)
        return float(matrix(value, (), f"{self.where}: {key}"))

    def matrix(self, key: str, *shape: int) -> np.ndarray:
        return matrix(self.values.get(key), shape, f"{self.where}: {key}")

    def vector(self, key: str, length: int) -> np.ndarray:
        return vector(self.values.get(key), length, f"{self.where}: {key}")

    def text(self, key: str, default: str | None = None) -> str | None:
        """Returns a string; the default where the field is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.where}: {key} must be text, got {reprlib.repr(value)}")
        return default if value is None else value

    def size(self, width: str = "w", height: str = "h") -> tuple[int, int]:
        return image_size(self.number(width), self.number(height), self.where)

    def refuse_unread(self, used: Iterable[str]) -> None:
        """Raises ValueError for a field that says how the camera sees, is not in `used` and not at its default."""
        for key in set(map(str, self.values)) - set(used):
            value = self.values.get(key)
            says_model, says_lens = (bool(field.fullmatch(key)) for field in (MODEL_FIELD, LENS_FIELD))
            if _says_nothing(value) or not (says_model or says_lens) or str(value).upper() in PINHOLES:
                continue
            expected = f"expected one of {', '.join(PINHOLES)}" if says_model else "it says how the camera sees"
            raise ValueError(
                f"{self.where}: {key} = {reprlib.repr(value)} cannot be used here ({expected}); undistort the images "
                "and write the pinhole camera that they have then"
            )


def _says_nothing(value: object) -> bool:
    if isinstance(value, str):
        return value.lower() in ("", "none", "false", "no", "off")
    try:
        return not np.any(np.asarray(value))
    except ValueError:  # rows of different lengths
        return False


def matrix(values: object, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Returns `values` as finite float64 of exactly this shape; `what` names file, camera and field in the error."""
    array = _numbers(values)
    if array is None or array.shape != shape:
        wanted = f"{' x '.join(map(str, shape))} numbers" if shape else "a number"
        got = reprlib.repr(values) if array is None else f"shape {array.shape}"
        raise ValueError(f"{what} must be {wanted}, got {got}")
    if not (np.abs(array) < LARGEST).all():
        raise ValueError(f"{what} must be finite numbers below {LARGEST:g}, got {reprlib.repr(array.tolist())}")
    return array


def vector(values: object, length: int, what: str) -> np.ndarray:
    """Returns `length` finite numbers in any orientation: (n,), (n, 1) or (1, n)."""
    array = _numbers(values)
    if array is None or array.size != length or array.ndim > 2 or max(array.shape, default=1) != length:
        got = reprlib.repr(values) if array is None else f"shape {array.shape}"
        raise ValueError(f"{what} must hold {length} numbers, got {got}")
    return matrix(array.ravel(), (length,), what)


def _numbers(values: object) -> np.ndarray | None:
    try:
        array = np.array(values)
    except (ValueError, TypeError, OverflowError):  # rows of different lengths
        return None
    return array.astype(np.float64) if array.dtype.kind in "iuf" else None  # null, text and bool are no numbers


def image_size(width: float, height: float, what: str) -> tuple[int, int]:
    if any(not 1 <= side <= MOST_PIXELS or side != int(side) for side in (width, height)):
        raise ValueError(
            f"{what}: the picture size must be whole numbers from 1 to {MOST_PIXELS}, got {width:g} x {height:g}"
        )
    return int(width), int(height)


def check_count(count: int, source: Path | str) -> None:
    if not 1 <= count <= MOST_CAMERAS:
        raise ValueError(f"{source}: 1 to {MOST_CAMERAS} cameras are expected, one per video, got {count}")


def read_bytes(path: Path | str) -> bytes:
    path = Path(path)
    if path.stat().st_size > MOST_BYTES:
        most = MOST_BYTES / 1e6
        raise ValueError(f"{path} has {path.stat().st_size / 1e6:.0f} MB; calibrations have {most:.0f} MB at most")
    return path.read_bytes()


def rigid(rotation: object, translation: object, what: str) -> np.ndarray:
    """Returns [4, 4] world to camera from R [3, 3] and T (3 numbers in any orientation), X_cam = R X + T.

    R must be orthonormal within ROTATION_TOLERANCE and right-handed; the nearest exact rotation is taken.
    """
    R = matrix(rotation, (3, 3), f"{what}: R")
    error = float(np.abs(R.T @ R - np.eye(3)).max())
    if error > ROTATION_TOLERANCE:
        raise ValueError(f"{what}: R must be orthonormal to {ROTATION_TOLERANCE}, R^T R is off by {error:.2g}")
    if np.linalg.det(R) < 0:
        raise ValueError(f"{what}: R mirrors (determinant -1, left-handed axes); a rotation has determinant +1")
    u, _, v = np.linalg.svd(R)
    w2c = np.eye(4)
    w2c[:3, :3], w2c[:3, 3] = u @ v, vector(translation, 3, f"{what}: T")
    return w2c


def last_row_checked(values: np.ndarray, what: str) -> np.ndarray:
    """Returns a rigid matrix [4, 4] whose last row is 0 0 0 1."""
    if np.abs(values[3] - [0.0, 0.0, 0.0, 1.0]).max() > 1e-6:
        raise ValueError(f"{what} must end in the row 0 0 0 1, got {values[3].tolist()}; is it transposed?")
    return values


def intrinsics(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def shifted(K: np.ndarray, by: float) -> np.ndarray:
    """Returns K [..., 3, 3] with its principal point moved by `by` pixels in x and y."""
    K = np.array(K, dtype=np.float64)
    K[..., :2, 2] += by
    return K


def natural_key(name: str) -> list:
    """Sorts cam2 before cam10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
