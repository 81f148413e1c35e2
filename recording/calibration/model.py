"""One recording's cameras, whatever file they came from.

OpenCV axes; pixel coordinates whose origin is the outer corner of the first pixel (docs/conventions.md). Every reader
turns its file's axes and adds half a pixel where the file counts from the first pixel's centre.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recording.calibration.checks import check_intrinsics, validate
from recording.calibration.fields import COEFFICIENTS

if TYPE_CHECKING:
    from multiview.cameras import Cameras

UP_ROTATIONS = {  # rotation that turns the named axis of the calibration's world into +z
    "z": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "-z": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "y": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "-y": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "x": ((0, 0, -1), (0, 1, 0), (1, 0, 0)),
    "-x": ((0, 0, 1), (0, 1, 0), (-1, 0, 0)),
}


@dataclass(frozen=True)
class Calibration:
    """The cameras of one recording, float64; camera k films video k.

    K: [v, 3, 3] pixels, outer-corner origin (skew allowed). w2c: [v, 4, 4] OpenCV axes, the file's length unit.
    distortion: [v, 5] OpenCV's k1, k2, p1, p2, k3, or [v, 8] with k4, k5, k6 (the rational model's denominator).
    sizes: (width, height) per camera, None where the file does not say. unit: "mm", "cm" or "m" where the file or its
    format says so. names: the cameras' names in the file, or (). relative: K is in fractions, fx, fy and cx of the
    picture's width, cy of its height, because the file states angles of view only; `with_sizes` makes it pixels.
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
        """[v, 3] camera centres in the calibration's world."""
        return -np.einsum("vji,vj->vi", self.w2c[:, :3, :3], self.w2c[:, :3, 3])

    def name(self, index: int, template: str) -> str:
        """The camera's name, or the template filled with its number (from 0) and its count (from 1)."""
        return self.names[index] if self.names else template.format(index, index + 1)

    def with_up(self, up: str) -> Calibration:
        """The same cameras in a world turned so that the axis `up` points along +z."""
        if up not in UP_ROTATIONS:
            raise ValueError(f"up axis must be one of {', '.join(UP_ROTATIONS)}, got {up!r}")
        turn = np.eye(4)
        turn[:3, :3] = np.array(UP_ROTATIONS[up], dtype=np.float64)
        return replace(self, w2c=self.w2c @ turn.T)

    def with_sizes(self, sizes: list[tuple[int, int]]) -> Calibration:
        """Takes picture sizes from the videos, refused where the file states another or its K cannot belong to them."""
        for index, (said, real) in enumerate(zip(self.sizes, sizes, strict=True)):
            if said is not None and tuple(said) != tuple(real):
                raise ValueError(
                    f"{self.source}: camera {index} is calibrated for {said[0]} x {said[1]} pictures, its video has "
                    f"{real[0]} x {real[1]}; the calibration must belong to the videos as they are"
                )
        K = self.K.copy()
        if self.relative:
            scale = np.array([[[w, w, w], [w, w, h], [1, 1, 1]] for w, h in sizes], dtype=np.float64)
            K = self.K * scale
        sized = replace(self, K=K, sizes=tuple((int(w), int(h)) for w, h in sizes), relative=False)
        check_intrinsics(sized)
        return sized

    def validate(self) -> Calibration:
        """Itself, checked: sane intrinsics, cameras around a common volume, units (`checks`). Raises ValueError."""
        validate(self)
        return self

    def require(
        self,
        target: Path | str,
        *,
        distortion: bool = True,
        rational: bool = True,
        skew: bool = True,
        sizes: bool = False,
    ) -> None:
        """Raises ValueError where a file format cannot hold this calibration. False: the format cannot hold it.

        sizes: whether the format needs the picture sizes.
        """  # fmt: skip
        lacks = []
        if self.relative or (sizes and None in self.sizes):
            lacks.append("needs the picture sizes (with_sizes)")
        if not distortion and np.any(self.distortion):
            lacks.append("cannot hold lens distortion")
        if not rational and np.any(self.distortion[:, 5:]):
            lacks.append("cannot hold the distortion coefficients k4, k5, k6")
        if not skew and np.any(self.K[:, 0, 1]):
            lacks.append("cannot hold skew")
        if lacks:
            raise ValueError(f"{Path(target).name}: this format {' and '.join(lacks)}; choose one that can (anipose)")

    def close_to(self, other: Calibration, tolerance: float = 1e-9) -> bool:
        """Whether both describe the same cameras, relative to the size of the numbers."""
        pairs = [(self.K, other.K), (self.w2c[:, :3, :3], other.w2c[:, :3, :3])]
        pairs.append((self.w2c[:, :3, 3], other.w2c[:, :3, 3]))
        lenses = [np.pad(c.distortion, ((0, 0), (0, 8 - c.distortion.shape[1]))) for c in (self, other)]
        return len(self) == len(other) and all(
            np.abs(a - b).max() <= tolerance * max(np.abs(a).max(), 1e-12) for a, b in (*pairs, tuple(lenses))
        )

    def cameras(self) -> Cameras:
        """As one Cameras [v] (float64); needs one picture size, no skew and no distortion."""
        import torch

        from multiview.cameras import Cameras

        if len(set(self.sizes)) != 1 or self.sizes[0] is None:
            raise ValueError(f"{self.source}: the cameras must share one known picture size, got {self.sizes}")
        if np.abs(self.K[:, 0, 1]).max() > 0 or np.abs(self.distortion).max() > 0:
            raise ValueError(f"{self.source}: cameras with skew or lens distortion are no plain pinhole cameras")
        width, height = self.sizes[0]
        values = np.stack([self.K[:, 0, 0], self.K[:, 1, 1], self.K[:, 0, 2], self.K[:, 1, 2]], axis=-1)
        return Cameras.from_w2c(torch.from_numpy(self.w2c), torch.from_numpy(values), height, width)

    def project(self, xyz: np.ndarray) -> np.ndarray:
        """World points [n, 3] -> pixels [v, n, 2], distortion and skew included."""
        camera = np.einsum("vij,nj->vni", self.w2c[:, :3, :3], xyz) + self.w2c[:, None, :3, 3]
        normalised = camera[..., :2] / camera[..., 2:]
        return np.stack([self.to_pixels(index, points) for index, points in enumerate(normalised)])

    def to_pixels(self, index: int, normalised: np.ndarray) -> np.ndarray:
        """Undistorted normalised coordinates [..., 2] of camera `index` -> pixels [..., 2]."""
        x, y = np.moveaxis(distort(normalised, self.distortion[index]), -1, 0)
        K = self._pixel_matrix(index)
        return np.stack([K[0, 0] * x + K[0, 1] * y + K[0, 2], K[1, 1] * y + K[1, 2]], axis=-1)

    def to_normalised(self, index: int, pixels: np.ndarray) -> np.ndarray:
        """Pixels [..., 2] of camera `index` -> undistorted normalised coordinates [..., 2]."""
        K = self._pixel_matrix(index)
        y = (pixels[..., 1] - K[1, 2]) / K[1, 1]
        x = (pixels[..., 0] - K[0, 2] - K[0, 1] * y) / K[0, 0]
        undone = undistort(np.stack([x, y], axis=-1), self.distortion[index])
        if undone is None:
            raise ValueError(
                f"{self.source}: the lens distortion {self.distortion[index].tolist()} of camera {index} cannot be "
                f"undone over the picture; check its coefficients ({', '.join(COEFFICIENTS)})"
            )
        return undone

    def _pixel_matrix(self, index: int) -> np.ndarray:
        if self.relative:
            raise ValueError(f"{self.source} states angles of view only; give the picture sizes with with_sizes")
        return self.K[index]

    def rays(self, index: int, pixels: np.ndarray) -> np.ndarray:
        """Pixels [n, 2] of camera `index` -> unit directions in the world [n, 3]."""
        normalised = self.to_normalised(index, pixels)
        directions = np.concatenate([normalised, np.ones_like(normalised[..., :1])], axis=-1)
        directions = directions @ self.w2c[index, :3, :3]
        return directions / np.linalg.norm(directions, axis=-1, keepdims=True)


# ---- the lens ---------------------------------------------------------------------------------------------------


def distort(normalised: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Ideal normalised coordinates [..., 2] -> those the lens makes of them. coefficients: 5 or 8, as `Calibration`.

    OpenCV's model: (1 + k1 r^2 + k2 r^4 + k3 r^6) / (1 + k4 r^2 + k5 r^4 + k6 r^6) radially, p1 and p2 tangentially.
    """
    if not np.any(coefficients):
        return normalised
    x, y = normalised[..., 0], normalised[..., 1]
    p1, p2 = coefficients[2:4]
    r2 = x * x + y * y
    above, below = _radial(r2, coefficients)
    radial = above / below
    return np.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        ],
        axis=-1,
    )


def undistort(distorted: np.ndarray, coefficients: np.ndarray) -> np.ndarray | None:
    """Inverse of `distort` by Newton's method; None where it does not converge within the lens model's own range."""
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
        move = np.stack(
            [
                dy[..., 1] * missing[..., 0] - dy[..., 0] * missing[..., 1],
                dx[..., 0] * missing[..., 1] - dx[..., 1] * missing[..., 0],
            ],
            axis=-1,
        )
        guess = guess + move / determinant[..., None]
        if np.abs(missing).max(initial=0.0) < 1e-12:
            inside = np.linalg.norm(guess, axis=-1).max(initial=0.0) <= valid_radius(coefficients)
            return guess if inside else None
    return None


def valid_radius(coefficients: np.ndarray) -> float:
    """The normalised radius up to which the radial lens model grows; beyond it the model folds back inwards."""
    squares = np.linspace(0.0, 4.0, 4001)
    above, below = _radial(squares, coefficients)
    broken = np.flatnonzero((np.diff(np.sqrt(squares) * above / below) <= 0) | (below[1:] <= 0))
    return float(np.sqrt(squares[broken[0]])) if len(broken) else np.inf


def _radial(r2: np.ndarray, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and denominator of the radial factor."""
    k1, k2, _, _, k3, *rational = coefficients
    k4, k5, k6 = rational or (0.0, 0.0, 0.0)
    return 1 + r2 * (k1 + r2 * (k2 + r2 * k3)), 1 + r2 * (k4 + r2 * (k5 + r2 * k6))
