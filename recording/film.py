"""What a real camera adds to a rendering: lens, uneven light, a room behind the animal, sensor noise. And the truth.

Everything is a function of the frame, the camera and the seed, so that a recording does not depend on how it was made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.files import atomic_write, write_json
from recording.calibration import Calibration

LENS_OVERSAMPLING = 2  # pixels of the straight rendering per pixel of the photograph and direction
LENS_NODES_PX = 8  # the lens is inverted on a grid this fine and interpolated by cubic splines: exact to 1e-6 px
SURFACE_POINTS = 1000  # of each frame's surface kept as truth
READ_SHARE = 0.25  # of the noise's variance at white that a black pixel has
VIGNETTING, EXPOSURE_SPREAD, GAIN_SPREAD, TEXTURE = 0.25, 0.08, 0.15, 0.12
TRUTH_FILE, TRUTH_ARRAYS = "truth.json", "truth.npz"


@dataclass(frozen=True)
class FilmConditions:
    """background: grey behind the animal, 0..1. noise: standard deviation of a white pixel, in levels of 255.

    uneven_light: a smooth gain and an exposure per camera, dark corners, a textured wall instead of plain grey.
    """

    background: float = 0.8
    noise: float = 0.0
    uneven_light: bool = False
    seed: int = 0


class Film:
    """film(cloud, frame) -> pictures [v, 3, h, w] 0..1 and masks [v, 1, h, w] 0 or 1, as the calibration's cameras see.

    render: (cloud, cameras [v]) -> (rgb [v, 3, h, w] over black, alpha [v, 1, h, w], anything else).
    """

    def __init__(self, calibration: Calibration, render: Callable, conditions: FilmConditions) -> None:
        if len(set(calibration.sizes)) != 1 or calibration.sizes[0] is None:
            raise ValueError(
                f"{calibration.source}: the cameras must share one known picture size, got {calibration.sizes}"
            )
        self._render, self._conditions = render, conditions
        self.size = calibration.sizes[0]
        self._lens = Lens(calibration) if has_lens(calibration) else None
        self._cameras = self._lens.cameras if self._lens else calibration.cameras().to(torch.float32)
        self._walls, self._gains = None, None
        if conditions.uneven_light:
            number = range(len(calibration))
            self._walls = torch.stack([_wall(self.size, conditions, camera) for camera in number])
            self._gains = torch.stack([_gain(self.size, conditions.seed, camera) for camera in number])

    def __call__(self, cloud, frame: int) -> tuple[Tensor, Tensor]:
        rgb, alpha = self._render(cloud, self._cameras)[:2]
        if self._lens:
            rgb, alpha = self._lens.bend(rgb, alpha)
        wall = self._conditions.background if self._walls is None else self._walls
        pictures = rgb + wall * (1.0 - alpha)
        if self._gains is not None:
            pictures = (pictures * self._gains).clamp(0, 1)
        if self._conditions.noise:
            pictures = torch.stack([self._noisy(picture, frame, k) for k, picture in enumerate(pictures)])
        return pictures, (alpha >= 0.5).float()

    def _noisy(self, picture: Tensor, frame: int, camera: int) -> Tensor:
        """Photon noise, whose variance grows with the light, and the sensor's own."""
        rng = np.random.default_rng(np.random.SeedSequence([self._conditions.seed, 5, frame, camera]))
        deviation = self._conditions.noise / 255.0 * (READ_SHARE + (1 - READ_SHARE) * picture).sqrt()
        return (picture + deviation * torch.from_numpy(rng.standard_normal(picture.shape, np.float32))).clamp(0, 1)


# ---- lens -------------------------------------------------------------------------------------------------------


def has_lens(calibration: Calibration) -> bool:
    """Whether the cameras are more than plain pinholes: lens distortion or skew."""
    return bool(np.any(calibration.distortion) or np.any(calibration.K[:, 0, 1]))


class Lens:
    """Bends straight renderings into what the calibration's cameras photograph.

    cameras: the pinholes [v] to render with, at the same places, larger and finer than the photographs. Each
    photograph's pixel is the mean of LENS_OVERSAMPLING^2 points, looked up through the inverse of the lens model.
    """

    def __init__(self, calibration: Calibration) -> None:
        over = LENS_OVERSAMPLING
        width, height = calibration.sizes[0]
        fields = [_normalised_grid(calibration, camera, width, height) for camera in range(len(calibration))]
        focal = over * calibration.K[:, [0, 1], [0, 1]]  # [v, 2]
        lower = np.stack([field.min(axis=(0, 1)) for field in fields]) * focal - 4.0
        upper = np.stack([field.max(axis=(0, 1)) for field in fields]) * focal + 4.0
        wide, high = (int(side) for side in np.ceil((upper - lower).max(axis=0)))
        values = torch.from_numpy(np.concatenate([focal, -lower], axis=1))
        self.cameras = Cameras.from_w2c(torch.from_numpy(calibration.w2c), values, high, wide).to(torch.float32)
        self._size = (width, height)
        self._maps = [
            ((field * focal[camera] - lower[camera]) - 0.5).astype(np.float32) for camera, field in enumerate(fields)
        ]

    def bend(self, rgb: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Renderings of `cameras` (premultiplied rgb, alpha) -> photographs [v, 3, h, w], [v, 1, h, w]."""
        import cv2

        bent = []
        for picture, table in zip(torch.cat([rgb, alpha], dim=1), self._maps, strict=True):
            fine = cv2.remap(
                picture.permute(1, 2, 0).contiguous().numpy(), table[..., 0], table[..., 1], cv2.INTER_CUBIC,
                borderMode=cv2.BORDER_CONSTANT,
            )  # fmt: skip
            small = cv2.resize(fine, self._size, interpolation=cv2.INTER_AREA)
            bent.append(torch.from_numpy(small).permute(2, 0, 1))
        bent = torch.stack(bent).clamp(0, 1)
        return bent[:, :3], bent[:, 3:]


def _normalised_grid(calibration: Calibration, camera: int, width: int, height: int) -> np.ndarray:
    """[over h, over w, 2] undistorted normalised coordinates of the photograph's fine pixel centres."""
    from scipy.interpolate import RectBivariateSpline

    columns = np.linspace(0, width, max(width // LENS_NODES_PX, 8))
    rows = np.linspace(0, height, max(height // LENS_NODES_PX, 8))
    nodes = np.stack(np.meshgrid(columns, rows), axis=-1)
    known = calibration.to_normalised(camera, nodes.reshape(-1, 2)).reshape(nodes.shape)
    over = LENS_OVERSAMPLING
    fine_rows, fine_columns = (np.arange(over * height) + 0.5) / over, (np.arange(over * width) + 0.5) / over
    return np.stack(
        [RectBivariateSpline(rows, columns, known[..., axis])(fine_rows, fine_columns) for axis in range(2)], axis=-1
    )


# ---- light ------------------------------------------------------------------------------------------------------


def _smooth(rng: np.random.Generator, cells: int, size: tuple[int, int]) -> np.ndarray:
    """[h, w] smooth random field, about -1..1, with `cells` bumps along a side."""
    import cv2

    return np.clip(cv2.resize(rng.uniform(-1, 1, (cells, cells)), size, interpolation=cv2.INTER_CUBIC), -1.2, 1.2)


def _wall(size: tuple[int, int], conditions: FilmConditions, camera: int) -> Tensor:
    """[3, h, w] what stands still behind the animal: blotches of several sizes, a tint per camera."""
    rng = np.random.default_rng(np.random.SeedSequence([conditions.seed, 6, camera]))
    blotches = sum(_smooth(rng, cells, size) * share for cells, share in ((4, 0.5), (12, 0.3), (60, 0.2)))
    tint = 1 + rng.uniform(-0.03, 0.03, (3, 1, 1))
    return torch.from_numpy(np.clip(conditions.background * (1 + TEXTURE * blotches) * tint, 0, 1)).float()


def _gain(size: tuple[int, int], seed: int, camera: int) -> Tensor:
    """[1, h, w] light that reaches each pixel, over the mean camera's."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 7, camera]))
    width, height = size
    y, x = np.mgrid[:height, :width] + 0.5
    radius = np.hypot(x - width / 2, y - height / 2) / np.hypot(width / 2, height / 2)
    field = 1 + GAIN_SPREAD * _smooth(rng, 3, size)
    exposure = 1 + rng.uniform(-EXPOSURE_SPREAD, EXPOSURE_SPREAD)
    return torch.from_numpy(field * exposure * (1 - VIGNETTING * radius**2)).float()[None]


# ---- truth ------------------------------------------------------------------------------------------------------


class Truth:
    """What was really there, frame by frame, in the calibration's world and unit.

    truth.json: unit, keypoint_names, frames of {centre [3], keypoints [n, 3], body_length, pose}. truth.npz: centre
    [t, 3], keypoints [t, n, 3], surface [t, SURFACE_POINTS, 3] (points of the animal's surface, drawn once per frame).
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._frames, self._surfaces = seed, [], []

    def add(self, cloud) -> None:
        rng = np.random.default_rng(np.random.SeedSequence([self._seed, 8, len(self._frames)]))
        self._surfaces.append(cloud.means[rng.choice(len(cloud.means), SURFACE_POINTS)].astype(np.float32))
        self._frames.append(
            {
                "centre": cloud.centre.tolist(),
                "keypoints": cloud.keypoints.tolist(),
                "body_length": float(cloud.body_length),
                "pose": cloud.meta,
            }
        )

    def write(self, folder: Path, unit: str) -> None:
        from synthetic.cloud import KEYPOINT_NAMES

        write_json(
            folder / TRUTH_FILE, {"unit": unit, "keypoint_names": list(KEYPOINT_NAMES), "frames": self._frames}
        )
        arrays = {name: np.array([frame[name] for frame in self._frames]) for name in ("centre", "keypoints")}
        with atomic_write(folder / TRUTH_ARRAYS) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, surface=np.stack(self._surfaces), **arrays)
