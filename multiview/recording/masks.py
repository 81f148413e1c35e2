"""Masks of the animal: cleaning, and what geometry needs to know of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

THRESHOLD = 0.5  # of full scale: mask videos are lossy
HOLE_FRACTION = 0.05  # holes up to this share of the mask are faults; larger ones are real (a curled tail's inside)
# Parts thinner than twice this, over the square root of the mask's area, are left out: of the body whose length is
# measured (tail, whiskers), and of the trunk whose centre of mass is taken (also legs, ears and snout). Chosen on
# synthetic mice, whose true length and centre are known.
TAIL_RADIUS = 0.08
LIMB_RADIUS = 0.18


@dataclass(frozen=True)
class MaskStatistics:
    """One cleaned mask, in pixels with outer-corner origin.

    area, body_area: pixels, with and without the tail. centre: [2] centre of mass of the trunk. axis_length: length of
    the body along its longest axis. hull: [n, 2] convex hull of the whole mask. touches_border: at the picture's edge.
    """

    area: float
    body_area: float
    centre: np.ndarray
    axis_length: float
    hull: np.ndarray
    touches_border: bool


def clean_mask(picture: np.ndarray) -> np.ndarray:
    """A mask-video frame [h, w, 3] uint8 -> bool [h, w]: thresholded, largest component, small holes filled.

    Where nothing reaches the threshold the result is all False.
    """
    import cv2

    binary = (picture[..., 0] >= 255 * THRESHOLD).astype(np.uint8)
    box = cv2.boundingRect(binary)
    if box[2] == 0:
        return binary.astype(bool)
    x, y, width, height = box
    window = binary[y : y + height, x : x + width]
    _, labels, stats, _ = cv2.connectedComponentsWithStats(window, connectivity=8)
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    component = (labels == largest).astype(np.uint8)
    limit = HOLE_FRACTION * stats[largest, cv2.CC_STAT_AREA]
    padded = np.pad(1 - component, 1, constant_values=1)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(padded, connectivity=4)
    outside = labels[0, 0]
    holes = (stats[:, cv2.CC_STAT_AREA] <= limit) & (np.arange(len(stats)) != outside) & (np.arange(len(stats)) > 0)
    filled = component.astype(bool) | holes[labels[1:-1, 1:-1]]
    result = np.zeros(binary.shape, dtype=bool)
    result[y : y + height, x : x + width] = filled
    return result


def without_thin_parts(mask: np.ndarray, radius: float) -> np.ndarray:
    """The mask [h, w] opened with a disc whose radius is `radius` times the square root of the mask's area."""
    import cv2

    area = int(mask.sum())
    radius_px = radius * math.sqrt(area)
    if radius_px < 1.0:
        return mask
    # Opening by two distance transforms: its cost does not grow with the radius.
    padded = np.pad(mask, 1).astype(np.uint8)
    core = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) > radius_px
    if not core.any():
        return mask
    near = cv2.distanceTransform((~core).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= radius_px
    return near[1:-1, 1:-1] & mask


def measure_mask(mask: np.ndarray) -> MaskStatistics | None:
    """Statistics of a cleaned mask [h, w]; None when it is empty."""
    import cv2

    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    if width == 0:
        return None
    window = mask[y : y + height, x : x + width]
    points = _pixel_centres(without_thin_parts(window, TAIL_RADIUS))
    _, vectors = np.linalg.eigh(np.cov(points.T) if len(points) > 1 else np.eye(2))
    along = points @ vectors[:, -1]
    outline, _ = cv2.findContours(window.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = cv2.convexHull(np.concatenate(outline))[:, 0].astype(np.float64)
    # Hull of pixel squares, not of their centres: all four corners of each hull pixel.
    corners = (hull[:, None] + np.array([[0, 0], [1, 0], [0, 1], [1, 1]])).reshape(-1, 2)
    corners = cv2.convexHull(corners.astype(np.float32))[:, 0].astype(np.float64) + [x, y]
    return MaskStatistics(
        area=float(window.sum()),
        body_area=float(len(points)),
        centre=_pixel_centres(without_thin_parts(window, LIMB_RADIUS)).mean(axis=0) + [x, y],
        axis_length=float(along.max() - along.min() + 1.0),
        hull=corners,
        touches_border=bool(mask[[0, -1]].any() or mask[:, [0, -1]].any()),
    )


def _pixel_centres(mask: np.ndarray) -> np.ndarray:
    """[n, 2] x, y of the pixels of a mask, outer-corner origin."""
    rows, columns = np.nonzero(mask)
    return np.stack([columns + 0.5, rows + 0.5], axis=-1)
