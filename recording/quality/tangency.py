"""Do silhouettes of several cameras belong to one solid? Measured to parts of a pixel, at epipolar tangencies.

A plane through two camera centres that touches the animal touches its silhouette in both pictures (Rieger 1986;
Cipolla, Astrom and Giblin 1995). So for every pair of views the planes through their baseline must cover the same range
of angles: two equations per pair, from the masks' convex hulls alone, without correspondences, texture or carving. They
hold for any animal in any pose; what breaks them is a wrong camera, a wrong mask or a wrong pairing of the two
(Sinha and Pollefeys 2010 calibrate cameras that way).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

DIRECTIONS = 72  # support points per outline
FINE = 256  # outlines are taken from masks enlarged to at least this many pixels, so that soft rims count
WIDEST_DEG = 120.0  # a pair whose baseline runs nearly through the animal says nothing
CAP = 0.05  # of the width: a larger disagreement counts as this much


@dataclass(frozen=True)
class Views:
    """Outlines and cameras of t samples of v views, float64.

    points: [t, v, DIRECTIONS, 2] support points over the picture's width, x right, y down, corner origin; nan where a
    view has no usable mask. intrinsics: [t, v, 4] fx, fy, cx, cy over the width. w2c: [t, v, 4, 4], OpenCV axes.
    """

    points: np.ndarray
    intrinsics: np.ndarray
    w2c: np.ndarray

    @property
    def count(self) -> int:
        return self.points.shape[1]


def outline(alpha: np.ndarray) -> np.ndarray | None:
    """Mask [h, w] 0..1 -> support points [DIRECTIONS, 2] of its convex hull, over the width; None for an empty one."""
    import cv2

    height, width = alpha.shape
    factor = max(1, -(-FINE // max(height, width)))
    fine = cv2.resize(alpha.astype(np.float32), None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    found, _ = cv2.findContours((fine > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not found:
        return None
    hull = cv2.convexHull(np.concatenate(found))[:, 0].astype(np.float64)
    angle = np.arange(DIRECTIONS) / DIRECTIONS * 2 * np.pi
    way = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    reached = hull[(way @ hull.T).argmax(axis=1)] + 0.5  # centre of the outermost pixel
    return (reached + 0.5 * way) / (factor * width)  # its outer side


def disagreement(views: Views) -> np.ndarray:
    """[t, pairs, 2] signed distances between the two tangents of each pair of views, over the width.

    nan where a pair has none: an empty mask, or a baseline that runs through the animal. Pairs as in `pairs`.
    """
    fx, fy, cx, cy = (views.intrinsics[..., None, k] for k in range(4))
    x, y = (views.points[..., 0] - cx) / fx, (views.points[..., 1] - cy) / fy
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ views.w2c[..., :3, :3]  # rows: R^T d
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    origins = -np.einsum("tvji,tvj->tvi", views.w2c[..., :3, :3], views.w2c[..., :3, 3])
    first, second = (np.array(side) for side in zip(*pairs(views.count), strict=True))
    baseline = origins[:, second] - origins[:, first]
    length = np.linalg.norm(baseline, axis=-1, keepdims=True)
    baseline = baseline / np.maximum(length, 1e-9)
    middle = rays.mean(axis=2)
    towards = middle[:, first] + middle[:, second]
    across = towards - (towards * baseline).sum(-1, keepdims=True) * baseline
    across /= np.maximum(np.linalg.norm(across, axis=-1, keepdims=True), 1e-9)
    normal = np.cross(baseline, across)
    ends, reaches = [], []
    for side in (first, second):
        u = np.einsum("tpni,tpi->tpn", rays[:, side], across)
        w = np.einsum("tpni,tpi->tpn", rays[:, side], normal)
        angle, reach = np.arctan2(w, u), np.hypot(u, w)
        extreme = np.stack([angle.argmin(-1), angle.argmax(-1)], axis=-1)
        ends.append(np.take_along_axis(angle, extreme, -1))
        reaches.append(np.take_along_axis(reach, extreme, -1) * views.intrinsics[:, side, :1])
    spread = np.stack([side[..., 1] - side[..., 0] for side in ends])
    gap = (ends[0] - ends[1]) * 0.5 * (reaches[0] + reaches[1])
    useless = ((spread > np.radians(WIDEST_DEG)) | ~np.isfinite(spread)).any(axis=0) | (length[..., 0] < 1e-6)
    return np.where(useless[..., None], np.nan, gap)


def pairs(count: int) -> list[tuple[int, int]]:
    return list(combinations(range(count), 2))


def rms(gaps: np.ndarray) -> float:
    """Root mean square of disagreements, each capped; CAP where there are none to measure."""
    known = gaps[np.isfinite(gaps)]
    return float(np.sqrt(np.mean(np.minimum(np.abs(known), CAP) ** 2))) if len(known) else CAP


def rms_per_view(gaps: np.ndarray, count: int) -> list[float]:
    """[v] the disagreement over the pairs each view is part of."""
    return [rms(gaps[:, [view in pair for pair in pairs(count)]]) for view in range(count)]
