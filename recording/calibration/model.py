"""One recording's cameras and lenses, whatever file they came from, and the one door for the numbers of such files.

OpenCV axes; pixel coordinates whose origin is the outer corner of the first pixel (docs/conventions.md). Every reader
turns its file's axes and adds half a pixel where the file counts from the first pixel's center.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from multiview.files import take

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
# Such words under a name that may as well be the product's ("model": "acA2040") say what lens it is.
FOREIGN_LENS = re.compile(r"fish_?eye|theta|ortho|pano|equirect|omni|spher|lat_?long", re.IGNORECASE)
DEFAULTS = (*PINHOLES, "", "NONE", "FALSE", "NO", "OFF")
FOCAL_RANGE = (0.2, 20.0)  # over the image's width: 136 to 3 degrees
UP_ROTATIONS = {  # rotation that turns the named axis of the calibration's world into +z
    "z": ((1, 0, 0), (0, 1, 0), (0, 0, 1)), "-z": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "y": ((1, 0, 0), (0, 0, -1), (0, 1, 0)), "-y": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "x": ((0, 0, -1), (0, 1, 0), (1, 0, 0)), "-x": ((0, 0, 1), (0, 1, 0), (-1, 0, 0)),
}  # fmt: skip


def known_fields(values: object, where: str, required=(), optional=()) -> dict:
    """Returns one object of a calibration file, whose fields `take` and `numbers` then read.

    A field that says how the camera sees, is neither required nor optional and not at its default, is refused.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object of named fields, got {reprlib.repr(values)}")
    missing = [key for key in required if key not in values]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    for key in set(map(str, values)) - {*required, *optional}:
        value, model = values.get(key), MODEL_FIELD.fullmatch(key)
        named = key.lower() in ("model", "type", "lens") and isinstance(value, str) and FOREIGN_LENS.search(value)
        if not (model or named or LENS_FIELD.fullmatch(key)):
            continue
        try:
            told = value.upper() not in DEFAULTS if isinstance(value, str) else np.any(np.asarray(value))
        except ValueError:  # rows of different lengths
            told = True
        if told:
            why = f"expected one of {', '.join(PINHOLES)}" if model else "it says how the camera sees"
            got = f"{key} = {reprlib.repr(value)} cannot be used here ({why})"
            raise ValueError(f"{where}: {got}; undistort the images and write the pinhole camera they then have")
    return values


def each_camera(entries: dict, source: object, required: dict, optional: dict | None = None) -> Iterator[tuple]:
    """Yields every camera's fields and where they stand. entries: {its place in the file: its object}.

    required, optional: {field: shape} of its numbers, which are given out as arrays.
    """
    check_count(len(entries), source)
    shapes = {**required, **(optional or {})}
    for place, values in entries.items():
        fields, where = known_fields(values, f"{source}: {place}", required, shapes), f"{source}: {place}"
        read = {key: numbers(fields[key], shapes[key], f"{where}: {key}") for key in shapes if key in fields}
        yield {**fields, **read}, where


def unit_of(content: dict, path: Path) -> str | None:
    """Returns the unit that a JSON file states beside its cameras, whose other fields are held against LENS_FIELD."""
    return take(known_fields(content, str(path)), "unit", str, str(path), default=None)


def numbers(values: object, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Returns `values` as finite float64 of this shape ((-1,): any length); a vector may stand as a row or column."""
    try:
        array = np.array(values)
        array = array.astype(np.float64) if array.dtype.kind in "iuf" else None  # null, text and bool are no numbers
    except (ValueError, TypeError, OverflowError):  # rows of different lengths
        array = None
    if array is not None and len(shape) == 1 and array.ndim <= 2 and max(array.shape, default=1) == array.size:
        array = array.ravel()
    if array is None or (array.shape != shape and (shape != (-1,) or array.ndim != 1)):
        wanted = f"{' x '.join(map(str, shape))} numbers".replace("-1 ", "") if shape else "a number"
        got = reprlib.repr(values) if array is None else f"shape {array.shape}"
        raise ValueError(f"{what} must be {wanted}, got {got}")
    if not (np.abs(array) < LARGEST).all():
        raise ValueError(f"{what} must be finite numbers below {LARGEST:g}, got {reprlib.repr(array.tolist())}")
    return array


def size_of(width: float, height: float, what: str) -> tuple[int, int]:
    if any(not 1 <= side <= MOST_PIXELS or side != int(side) for side in (width, height)):
        expected = f"the picture size must be whole numbers from 1 to {MOST_PIXELS}"
        raise ValueError(f"{what}: {expected}, got {width:g} x {height:g}")
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
    R, w2c = numbers(rotation, (3, 3), f"{what}: R"), np.eye(4)
    error = float(np.abs(R.T @ R - np.eye(3)).max())
    if error > ROTATION_TOLERANCE:
        raise ValueError(f"{what}: R must be orthonormal to {ROTATION_TOLERANCE}, R^T R is off by {error:.2g}")
    if np.linalg.det(R) < 0:
        raise ValueError(f"{what}: R mirrors (determinant -1, left-handed axes); a rotation has determinant +1")
    u, _, v = np.linalg.svd(R)
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


@dataclass(frozen=True)
class Calibration:
    """The cameras of one recording, float64; camera k films video k.

    K: [v, 3, 3] pixels, outer-corner origin (skew allowed). w2c: [v, 4, 4] OpenCV axes, the file's length unit.
    distortion: [v, 5] OpenCV's k1, k2, p1, p2, k3, or [v, 8] with k4, k5, k6 (the rational model's denominator).
    sizes: (width, height) per camera, None where the file does not say. unit: "mm", "cm" or "m" where the file or its
    format says so. names: the cameras' names in the file, or (). relative: K is in fractions, fx, fy and cx of the
    image's width, cy of its height, because the file states angles of view only; `with_sizes` makes it pixels.
    """

    K: np.ndarray
    w2c: np.ndarray
    distortion: np.ndarray
    sizes: tuple[tuple[int, int] | None, ...]
    source: str
    unit: str | None = None
    names: tuple[str, ...] = ()
    relative: bool = False

    def __len__(self) -> int:
        return len(self.K)

    @property
    def centres(self) -> np.ndarray:
        return centers_of(self.w2c)

    def rows(self) -> Iterable[tuple]:
        """Returns (K, w2c, lens coefficients, size or None, name or "") of every camera, as `assemble` takes them."""
        return zip(self.K, self.w2c, self.distortion, self.sizes, self.names or [""] * len(self), strict=True)

    def with_up(self, up: str) -> Calibration:
        """Returns the same cameras in a world turned so that the axis `up` points along +z."""
        if up not in UP_ROTATIONS:
            raise ValueError(f"up axis must be one of {', '.join(UP_ROTATIONS)}, got {up!r}")
        turn = np.eye(4)
        turn[:3, :3] = np.array(UP_ROTATIONS[up], dtype=np.float64)
        return replace(self, w2c=self.w2c @ turn.T)

    def with_sizes(self, sizes: list[tuple[int, int]]) -> Calibration:
        """Takes image sizes from the videos, refused where the file states another or its K cannot belong to them."""
        for index, (said, real) in enumerate(zip(self.sizes, sizes, strict=True)):
            if said is not None and tuple(said) != tuple(real):
                what = f"{said[0]} x {said[1]} pictures, its video has {real[0]} x {real[1]}"
                remedy = "the calibration must belong to the videos as they are"
                raise ValueError(f"{self.source}: camera {index} is calibrated for {what}; {remedy}")
        K = self.K
        if self.relative:
            K = K * np.array([[[w, w, w], [w, w, h], [1, 1, 1]] for w, h in sizes], dtype=np.float64)
        sized = replace(self, K=K, sizes=tuple((int(w), int(h)) for w, h in sizes), relative=False)
        sized.check_intrinsics()
        return sized

    def check_intrinsics(self) -> None:
        """Raises ValueError unless K is upper triangular, fx and fy alike and sane, and the principal point inside."""
        low, high = FOCAL_RANGE
        for index, K in enumerate(self.K):
            fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
            width, height = (1, 1) if self.relative else self.sizes[index] or (None, None)
            rules = (
                (np.abs(K[[1, 2, 2], [0, 0, 1]]).max() > 1e-6 or abs(K[2, 2] - 1.0) > 1e-6,
                 f"K must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]], got {K.round(3).tolist()}; is it transposed?"),
                (fx < 0 < fy, f"fx is negative ({fx:.1f}), so its image is mirrored; mirror the video back"),
                (fx <= 0 or fy <= 0, f"fx and fy must be positive, got {fx:.1f} and {fy:.1f}"),
                (not 0.8 <= fx / (fy or 1.0) <= 1.25, f"fx and fy must be alike (within 1.25), got {fx:.1f}, {fy:.1f}"),
                (width is not None and not low <= fx / width <= high,
                 f"fx {fx:.4g} is {fx / (width or 1):.3g} image widths ({width} px); {low} to {high:.0f} are expected: "
                 "fx in pixels, of the image as filmed"),
                (width is not None and not (0 < cx < width and 0 < cy < height),
                 f"the principal point ({cx:.1f}, {cy:.1f}) lies outside the {width} x {height} image; was the video "
                 "resized or cropped after the calibration?"),
            )  # fmt: skip
            for wrong, what in rules:
                if wrong:
                    raise ValueError(f"{self.source}: camera {index}: {what}")

    def close_to(self, other: Calibration, tolerance: float = 1e-9) -> bool:
        """Whether both describe the same cameras, relative to the size of the numbers."""
        mine, theirs = (
            (c.K, c.w2c[:, :3, :3], c.w2c[:, :3, 3], np.pad(c.distortion, ((0, 0), (0, 8 - c.distortion.shape[1]))))
            for c in (self, other)
        )
        return len(self) == len(other) and all(
            np.abs(a - b).max() <= tolerance * max(np.abs(a).max(), 1e-12) for a, b in zip(mine, theirs)
        )

    def project(self, xyz: np.ndarray) -> np.ndarray:
        """Projects world points [n, 3] to pixels [v, n, 2], distortion and skew included."""
        camera = np.einsum("vij,nj->vni", self.w2c[:, :3, :3], xyz) + self.w2c[:, None, :3, 3]
        normalised = camera[..., :2] / camera[..., 2:]
        return np.stack([self.to_pixels(index, points) for index, points in enumerate(normalised)])

    def to_pixels(self, index: int, normalised: np.ndarray) -> np.ndarray:
        """Maps undistorted normalised coordinates [..., 2] of camera `index` to pixels [..., 2]."""
        x, y = np.moveaxis(distort(normalised, self.distortion[index]), -1, 0)
        (fx, skew, cx), (_, fy, cy) = self._in_pixels(index)
        return np.stack([fx * x + skew * y + cx, fy * y + cy], axis=-1)

    def to_normalised(self, index: int, pixels: np.ndarray) -> np.ndarray:
        """Maps pixels [..., 2] of camera `index` to undistorted normalised coordinates [..., 2]."""
        (fx, skew, cx), (_, fy, cy) = self._in_pixels(index)
        y = (pixels[..., 1] - cy) / fy
        undone = undistort(np.stack([(pixels[..., 0] - cx - skew * y) / fx, y], axis=-1), self.distortion[index])
        if undone is None:
            lens = f"the lens distortion {self.distortion[index].tolist()} of camera {index}"
            raise ValueError(f"{self.source}: {lens} cannot be undone over the picture; check its coefficients")
        return undone

    def _in_pixels(self, index: int) -> np.ndarray:
        """Returns the two rows of K that hold numbers."""
        if self.relative:
            raise ValueError(f"{self.source} states angles of view only; give the picture sizes with with_sizes")
        return self.K[index, :2]

    def rays(self, index: int, pixels: np.ndarray) -> np.ndarray:
        """Maps pixels [n, 2] of camera `index` to unit directions in the world [n, 3]."""
        normalised = self.to_normalised(index, pixels)
        directions = np.concatenate([normalised, np.ones_like(normalised[..., :1])], axis=-1)
        directions = directions @ self.w2c[index, :3, :3]
        return directions / np.linalg.norm(directions, axis=-1, keepdims=True)


def centers_of(w2c: np.ndarray) -> np.ndarray:
    """Returns the camera centers [..., 3] of world-to-camera matrices [..., 4, 4]."""
    return -np.einsum("...ji,...j->...i", w2c[..., :3, :3], w2c[..., :3, 3])


def assemble(
    rows: Iterable[tuple], source: Path | str, *, unit: str | None = None, relative=False, first_pixel: float = 0.0
) -> Calibration:
    """Returns the Calibration of rows (K [3, 3], w2c [4, 4], lens coefficients, size or None, name), one per camera.

    first_pixel: added to every principal point; PIXEL_CENTRE where the file counts from the first pixel's center.
    """
    K, w2c, lenses, sizes, names = zip(*rows, strict=True)
    table = np.zeros((len(lenses), max(len(COEFFICIENTS), *map(len, lenses))))
    for index, lens in enumerate(lenses):
        table[index, : len(lens)] = numbers(lens, (len(lens),), f"{source}: distortion of camera {index}")
    if np.any(table[:, len(COEFFICIENTS) :]):
        known = ", ".join(COEFFICIENTS)
        raise ValueError(f"{source}: a camera has more distortion coefficients than {known}: undistort the videos")
    table, K = table[:, : 8 if np.any(table[:, 5:]) else 5], np.array(K)
    K[:, :2, 2] += first_pixel
    return Calibration(K, np.array(w2c), table, sizes, str(source), unit, names if all(names) else (), relative)


def distort(normalised: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Maps ideal normalised coordinates [..., 2] to those the lens makes of them. coefficients: as `Calibration`.

    OpenCV's model: (1 + k1 r^2 + k2 r^4 + k3 r^6) / (1 + k4 r^2 + k5 r^4 + k6 r^6) radially, p1 and p2 tangentially.
    """
    if not np.any(coefficients):
        return normalised
    x, y, (p1, p2) = normalised[..., 0], normalised[..., 1], coefficients[2:4]
    r2 = x * x + y * y
    above, below = _radial(r2, coefficients)
    radial = above / below
    shifted_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    return np.stack([shifted_x, y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y], axis=-1)


def undistort(distorted: np.ndarray, coefficients: np.ndarray) -> np.ndarray | None:
    """Inverts `distort` by Newton's method; None where it does not converge within the lens model's own range."""
    if not np.any(coefficients):
        return distorted
    guess, step = distorted.copy(), 1e-6
    for _ in range(30):
        missing = distorted - distort(guess, coefficients)
        dx, dy = (
            (distort(guess + shift, coefficients) - distort(guess - shift, coefficients)) / (2 * step)
            for shift in (np.array([step, 0.0]), np.array([0.0, step]))
        )
        determinant = dx[..., 0] * dy[..., 1] - dx[..., 1] * dy[..., 0]
        if (determinant <= 1e-3).any():  # the model folds back here
            return None
        move_x = dy[..., 1] * missing[..., 0] - dy[..., 0] * missing[..., 1]
        move_y = dx[..., 0] * missing[..., 1] - dx[..., 1] * missing[..., 0]
        guess = guess + np.stack([move_x, move_y], axis=-1) / determinant[..., None]
        if np.abs(missing).max(initial=0.0) < 1e-12:
            inside = np.linalg.norm(guess, axis=-1).max(initial=0.0) <= valid_radius(coefficients)
            return guess if inside else None
    return None


def valid_radius(coefficients: np.ndarray) -> float:
    """Returns the normalised radius up to which the radial model grows; beyond it the model folds back inwards."""
    squares = np.linspace(0.0, 4.0, 4001)
    above, below = _radial(squares, coefficients)
    broken = np.flatnonzero((np.diff(np.sqrt(squares) * above / below) <= 0) | (below[1:] <= 0))
    return float(np.sqrt(squares[broken[0]])) if len(broken) else np.inf


def _radial(r2: np.ndarray, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns numerator and denominator of the radial factor."""
    k1, k2, _, _, k3, k4, k5, k6 = np.append(coefficients, (0.0, 0.0, 0.0))[:8]
    return 1 + r2 * (k1 + r2 * (k2 + r2 * k3)), 1 + r2 * (k4 + r2 * (k5 + r2 * k6))
