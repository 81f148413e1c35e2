"""The door through which numbers of calibration files come in: one check of types, shapes and ranges for all."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator
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
    """One object of a calibration file, read field by field; every error names file, place and field.

    A field that says how the camera sees, is neither required nor optional and not at its default, is refused.
    """

    def __init__(self, values: object, where: str, required: Iterable[str] = (), optional: Iterable[str] = ()) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{where} must be an object of named fields, got {reprlib.repr(values)}")
        missing = [key for key in required if key not in values]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        self.values, self.where = values, where
        for key in set(map(str, values)) - {*required, *optional}:
            value, model, lens = values.get(key), MODEL_FIELD.fullmatch(key), LENS_FIELD.fullmatch(key)
            if (model or lens) and not says_nothing(value) and str(value).upper() not in PINHOLES:
                why = f"expected one of {', '.join(PINHOLES)}" if model else "it says how the camera sees"
                got = f"{key} = {reprlib.repr(value)} cannot be used here ({why})"
                raise ValueError(f"{where}: {got}; undistort the images and write the pinhole camera they then have")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def number(self, key: str, default: float | None = None) -> float:
        """Returns one finite number; with a default the field may be missing, but not of another type."""
        return float(numbers(self.values.get(key, default), (), f"{self.where}: {key}"))

    def array(self, key: str, *shape: int) -> np.ndarray:
        return numbers(self.values.get(key), shape, f"{self.where}: {key}")

    def text(self, key: str, default: str | None = None) -> str | None:
        """Returns a string; the default where the field is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.where}: {key} must be text, got {reprlib.repr(value)}")
        return default if value is None else value


def each_camera(entries: dict[str, object], source: object, required=(), optional=()) -> Iterator[Fields]:
    """Yields the fields of every camera, {its place in the file: its object}."""
    check_count(len(entries), source)
    for place, values in entries.items():
        yield Fields(values, f"{source}: {place}", required, optional)


def says_nothing(value: object) -> bool:
    if isinstance(value, str):
        return value.lower() in ("", "none", "false", "no", "off")
    try:
        return not np.any(np.asarray(value))
    except ValueError:  # rows of different lengths
        return False


def numbers(values: object, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Returns `values` as finite float64 of this shape; a vector may also stand as a row or a column."""
    try:
        array = np.array(values)
        array = array.astype(np.float64) if array.dtype.kind in "iuf" else None  # null, text and bool are no numbers
    except (ValueError, TypeError, OverflowError):  # rows of different lengths
        array = None
    if array is not None and len(shape) == 1 and array.ndim <= 2 and max(array.shape, default=1) == array.size:
        array = array.ravel()
    if array is None or array.shape != shape:
        wanted = f"{' x '.join(map(str, shape))} numbers" if shape else "a number"
        got = reprlib.repr(values) if array is None else f"shape {array.shape}"
        raise ValueError(f"{what} must be {wanted}, got {got}")
    if not (np.abs(array) < LARGEST).all():
        raise ValueError(f"{what} must be finite numbers below {LARGEST:g}, got {reprlib.repr(array.tolist())}")
    return array


def size_of(width: float, height: float, what: str) -> tuple[int, int]:
    if any(not 1 <= side <= MOST_PIXELS or side != int(side) for side in (width, height)):
        got = f"got {width:g} x {height:g}"
        raise ValueError(f"{what}: the picture size must be whole numbers from 1 to {MOST_PIXELS}, {got}")
    return int(width), int(height)


def check_count(count: int, source: object) -> None:
    if not 1 <= count <= MOST_CAMERAS:
        raise ValueError(f"{source}: 1 to {MOST_CAMERAS} cameras are expected, one per video, got {count}")


def read_bytes(path: Path | str) -> bytes:
    size = Path(path).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size / 1e6:.0f} MB; calibrations have {MOST_BYTES / 1e6:.0f} MB at most")
    return Path(path).read_bytes()


def rigid(rotation: object, translation: object, what: str) -> np.ndarray:
    """Returns [4, 4] world to camera from R [3, 3] and T (3 numbers in any orientation), X_cam = R X + T.

    R must be orthonormal within ROTATION_TOLERANCE and right-handed; the nearest exact rotation is taken.
    """
    R = numbers(rotation, (3, 3), f"{what}: R")
    error = float(np.abs(R.T @ R - np.eye(3)).max())
    if error > ROTATION_TOLERANCE:
        raise ValueError(f"{what}: R must be orthonormal to {ROTATION_TOLERANCE}, R^T R is off by {error:.2g}")
    if np.linalg.det(R) < 0:
        raise ValueError(f"{what}: R mirrors (determinant -1, left-handed axes); a rotation has determinant +1")
    u, _, v = np.linalg.svd(R)
    w2c = np.eye(4)
    w2c[:3, :3], w2c[:3, 3] = u @ v, numbers(translation, (3,), f"{what}: T")
    return w2c


def posed(values: object, what: str) -> np.ndarray:
    """Returns [4, 4] of a rigid matrix that must end in the row 0 0 0 1."""
    matrix = numbers(values, (4, 4), what)
    if np.abs(matrix[3] - [0.0, 0.0, 0.0, 1.0]).max() > 1e-6:
        raise ValueError(f"{what} must end in the row 0 0 0 1, got {matrix[3].tolist()}; is it transposed?")
    return rigid(matrix[:3, :3], matrix[:3, 3], what)


def pinhole(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def natural_key(name: str) -> list:
    """Sorts cam2 before cam10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
