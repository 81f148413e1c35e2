"""The currency of the synthetic mouse: a cloud of shaded surface splats, and the one normalisation rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

# The normalisation rule for synthetic and real animals alike: the origin is the body's centre (tail not counted),
# z is up, and one scale per class of animals makes the nominal body (stretched, nose to tail base) this long, which
# fills about half of a picture taken from distance 2.7 with a 50-degree lens.
BODY_LENGTH = 1.2

# DANNCE's 22 names, in its order.
KEYPOINT_NAMES = (
    "EarL EarR Snout SpineF SpineM TailBase TailMid TailEnd ForepawL WristL ElbowL ShoulderL "
    "ForepawR WristR ElbowR ShoulderR HindpawL AnkleL KneeL HindpawR AnkleR KneeR"
).split()


@dataclass(frozen=True)
class SplatCloud:
    """Flat Gaussian splats on an animal's surface, shading baked in. World z up, float32 arrays.

    means: [n, 3] world. log_scales: [n, 3] natural log of the standard deviations, world units.
    quats: [n, 4] wxyz, unit. opacity: [n] 0..1. rgb: [n, 3] 0..1 (sRGB, shaded).
    centre: [3] the body's centre (tail not counted). keypoints: [22, 3] in the order of KEYPOINT_NAMES.
    body_length: nose to tail base along the stretched spine, world units. floor: z of the floor.
    meta: what was drawn (pose, coat, ...), JSON-able.
    """

    means: np.ndarray
    log_scales: np.ndarray
    quats: np.ndarray
    opacity: np.ndarray
    rgb: np.ndarray
    centre: np.ndarray
    keypoints: np.ndarray
    body_length: float
    floor: float = 0.0
    meta: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.means)

    def transformed(
        self, *, scale: float = 1.0, rotate_z_deg: float = 0.0, offset: tuple | np.ndarray = (0.0, 0.0, 0.0)
    ) -> SplatCloud:
        """x -> scale * Rz(rotate_z_deg) x + offset (counter-clockwise seen from above)."""
        a = math.radians(rotate_z_deg)
        rotation = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
        offset = np.asarray(offset, dtype=np.float64)

        def move(points: np.ndarray) -> np.ndarray:
            return (scale * points @ rotation.T + offset).astype(np.float32)

        c, s = math.cos(a / 2), math.sin(a / 2)
        w, x, y, z = self.quats.T
        quats = np.stack([c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w], axis=1)
        return replace(
            self,
            means=move(self.means),
            log_scales=(self.log_scales + math.log(scale)).astype(np.float32),
            quats=quats.astype(np.float32),
            centre=move(self.centre),
            keypoints=move(self.keypoints),
            body_length=self.body_length * scale,
            floor=float(scale * self.floor + offset[2]),
        )

    def centred(self) -> SplatCloud:
        """The same cloud with the body's centre at the origin."""
        return self.transformed(offset=-self.centre)


def quats_from_frames(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
    """Unit quaternions [n, 4] wxyz of the rotations whose columns are the orthonormal right-handed axes [n, 3]."""
    m00, m10, m20 = first.T
    m01, m11, m21 = second.T
    m02, m12, m22 = third.T
    # Each component's magnitude from the diagonal; the largest one decides the signs, so nothing divides by zero.
    squares = np.stack(
        [1 + m00 + m11 + m22, 1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22], axis=1
    )
    best = squares.argmax(axis=1)
    table = np.stack(
        [
            np.stack([squares[:, 0], m21 - m12, m02 - m20, m10 - m01], axis=1),
            np.stack([m21 - m12, squares[:, 1], m01 + m10, m02 + m20], axis=1),
            np.stack([m02 - m20, m01 + m10, squares[:, 2], m12 + m21], axis=1),
            np.stack([m10 - m01, m02 + m20, m12 + m21, squares[:, 3]], axis=1),
        ],
        axis=1,
    )
    quats = table[np.arange(len(best)), best]
    return (quats / np.linalg.norm(quats, axis=1, keepdims=True)).astype(np.float32)


def orient_splats(
    normals: np.ndarray, flow: np.ndarray, along: np.ndarray, across: np.ndarray, thickness: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Flat splats lying in the surface, long axis along `flow`. Returns (log_scales [n, 3], quats [n, 4]).

    normals: [n, 3] unit. flow: [n, 3], need not be tangent nor unit. along, across, thickness: [n] deviations.
    """
    tangent = flow - (flow * normals).sum(1, keepdims=True) * normals
    length = np.linalg.norm(tangent, axis=1, keepdims=True)
    spare = np.where(np.abs(normals[:, :1]) < 0.8, [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])
    spare = np.cross(normals, spare)
    spare = spare / np.linalg.norm(spare, axis=1, keepdims=True)
    tangent = np.where(length > 1e-4, tangent / np.maximum(length, 1e-8), spare)
    side = np.cross(normals, tangent)
    log_scales = np.log(np.stack([along, across, thickness], axis=1)).astype(np.float32)
    return log_scales, quats_from_frames(tangent, side, normals)
