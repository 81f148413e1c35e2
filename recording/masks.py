"""Masks of the animal: cleaning, and what geometry needs to know of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HALF = 127  # of full scale: what is brighter is animal, since mask videos are lossy
BLOCK = 32  # rows looked through together for something bright
HOLE_FRACTION = 0.05  # holes up to this share of the mask are faults; larger ones are real (a curled tail's inside)
# Parts thinner than twice this, over the square root of the mask's area, are left out: of the body whose length is
# measured (tail, whiskers), and of the trunk whose centre of mass is taken (also legs, ears and snout). Chosen on
# synthetic mice, whose true length and centre are known.
TAIL_RADIUS = 0.08
LIMB_RADIUS = 0.18
MEASURED_AREA = 2_500  # pixels: larger masks are measured at a whole fraction of their resolution


@dataclass(frozen=True)
class Trunk:
    """A mask without its thin parts, at 1 / step of the photograph's resolution, its pixels packed eight to a byte.

    bits: [n] uint8, row after row; its upper left corner is the photograph's pixel (x, y).
    """

    bits: np.ndarray
    x: int
    y: int
    width: int
    height: int
    step: int


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
    trunk: Trunk


@dataclass(frozen=True)
class Silhouette:
    """A cleaned mask without the empty rest of its photograph. window: [h, w] bool; its corner is pixel (x, y).

    size: (width, height) of the photograph. An empty mask has a window of 0 x 0.
    """

    window: np.ndarray
    x: int
    y: int
    size: tuple[int, int]

    def full(self) -> np.ndarray:
        """[height, width] bool, as large as the photograph."""
        mask = np.zeros(self.size[::-1], dtype=bool)
        mask[self.y : self.y + self.window.shape[0], self.x : self.x + self.window.shape[1]] = self.window
        return mask

    @staticmethod
    def of(mask: np.ndarray) -> Silhouette:
        """Of a cleaned mask [height, width] bool."""
        import cv2

        x, y, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
        return Silhouette(mask[y : y + height, x : x + width], x, y, mask.shape[1::-1])


def clean_mask(picture: np.ndarray, half: int = HALF) -> Silhouette:
    """One channel [h, w] uint8 of a mask video -> its animal: thresholded, largest component, small holes filled.

    Thin tails stay, since nothing is eroded. Where nothing is brighter than `half` the result is empty.
    """
    import cv2

    size = (picture.shape[1], picture.shape[0])
    x, y, width, height = bright_box(picture, half)
    if width == 0:
        return Silhouette(np.zeros((0, 0), bool), 0, 0, size)
    window = cv2.threshold(picture[y : y + height, x : x + width], half, 1, cv2.THRESH_BINARY)[1]
    # Borders say at once whether there is more than one part, or a hole: mostly there is not.
    borders, tree = cv2.findContours(window, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if len(borders) > 1:
        part = _plainly_largest(borders, tree[0, :, 3])
        window, left, top = _largest_part(window) if part is None else part
        x, y = x + left, y + top
    return Silhouette(window.astype(bool), x, y, size)


def bright_box(picture: np.ndarray, half: int) -> tuple[int, int, int, int]:
    """x, y, width, height of the box around all that is brighter in [h, w] uint8; all 0 where nothing is.

    Blocks of rows are looked through first: of a whole photograph, several times faster than one pixel at a time.
    """
    whole = len(picture) - len(picture) % BLOCK
    bright = picture[:whole].reshape(-1, BLOCK, picture.shape[1]).max(axis=1) > half
    if whole < len(picture):
        bright = np.vstack([bright, picture[whole:].max(axis=0) > half])
    columns, blocks = np.flatnonzero(bright.any(axis=0)), np.flatnonzero(bright.any(axis=1))
    if not len(columns):
        return 0, 0, 0, 0
    left, right = int(columns[0]), int(columns[-1]) + 1
    first, last = (
        start + np.flatnonzero((picture[start : start + BLOCK, left:right] > half).any(axis=1))
        for start in BLOCK * blocks[[0, -1]]
    )
    return left, int(first[0]), right - left, int(last[-1] + 1 - first[0])


def _plainly_largest(borders: Sequence[np.ndarray], parents: np.ndarray) -> tuple[np.ndarray, int, int] | None:
    """As `_largest_part`, from the borders alone; None where they leave in doubt what is largest, or a hole's size.

    parents: the border around each hole's border, -1 for those of parts. A border runs through the centres of its
    part's pixels, so a hole is smaller than its border's inside, and a part larger.
    """
    import cv2

    areas = np.array([cv2.contourArea(border) for border in borders])
    main = int(np.where(parents < 0, areas, -1.0).argmax())
    holes = areas[parents == main]
    area = areas[main] - holes.sum()
    if len(holes) and holes.max() > HOLE_FRACTION * area:
        return None
    for part, border in enumerate(borders):
        if parents[part] < 0 and part != main and math.prod(cv2.boundingRect(border)[2:]) >= area:
            return None
    left, top, width, height = cv2.boundingRect(borders[main])
    filled = np.zeros((height, width), np.uint8)
    return cv2.drawContours(filled, borders, main, 1, cv2.FILLED, offset=(-left, -top)), left, top


def _largest_part(binary: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The largest component of [h, w] uint8 with its small holes filled, cut out, and its corner."""
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats(binary, connectivity=8)
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    left, top, width, height = (int(value) for value in stats[largest, : cv2.CC_STAT_AREA])
    part = (labels[top : top + height, left : left + width] == largest).astype(np.uint8)
    padded = cv2.copyMakeBorder(1 - part, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    _, labels, holes, _ = cv2.connectedComponentsWithStats(padded, connectivity=4)
    small = holes[:, cv2.CC_STAT_AREA] <= HOLE_FRACTION * stats[largest, cv2.CC_STAT_AREA]
    small[[0, labels[0, 0]]] = False  # the animal, and what lies around it
    return part | small[labels[1:-1, 1:-1]], left, top


def without_thin_parts(mask: np.ndarray, radius: float) -> np.ndarray:
    """The mask [h, w] bool opened with a disc whose radius is `radius` times the square root of the mask's area."""
    return openings(mask, radius)[0]


def openings(mask: np.ndarray, *radii: float) -> list[np.ndarray]:
    """`without_thin_parts` for several radii, which share half the work."""
    import cv2

    scale = math.sqrt(np.count_nonzero(mask))
    padded = cv2.copyMakeBorder(mask.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_5)
    # Opening by two distance transforms (true to 2 %): its cost does not grow with the radius.
    opened = []
    for radius_px in (radius * scale for radius in radii):
        shell = (depth <= radius_px).view(np.uint8)
        if radius_px < 1.0 or shell.all():
            opened.append(mask)
            continue
        near = cv2.distanceTransform(shell, cv2.DIST_L2, cv2.DIST_MASK_5) <= radius_px
        opened.append(near[1:-1, 1:-1] & mask)
    return opened


def measure_mask(mask: Silhouette | np.ndarray) -> MaskStatistics | None:
    """Statistics of a cleaned mask, or of one as large as its photograph [h, w] bool; None when it is empty."""
    import cv2

    mask = mask if isinstance(mask, Silhouette) else Silhouette.of(mask)
    if mask.window.size == 0:
        return None
    area = int(np.count_nonzero(mask.window))
    # Lengths and centres of mass need no full resolution: reduced to some thousand pixels, they cost little.
    step = max(1, int(math.sqrt(area / MEASURED_AREA)))
    small = _reduced(mask.window, step)
    body, trunk = openings(small, TAIL_RADIUS, LIMB_RADIUS)
    rows, columns = np.nonzero(body)
    moments = cv2.moments(body.view(np.uint8), binaryImage=True)
    angle = 0.5 * math.atan2(2.0 * moments["mu11"], moments["mu20"] - moments["mu02"])  # of the longest axis
    along = columns * math.cos(angle) + rows * math.sin(angle)
    middle = cv2.moments(trunk.view(np.uint8), binaryImage=True)
    outline, _ = cv2.findContours(mask.window.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = cv2.convexHull(np.concatenate(outline))[:, 0].astype(np.float64)
    # Hull of pixel squares, not of their centres: all four corners of each hull pixel.
    corners = (hull[:, None] + np.array([[0, 0], [1, 0], [0, 1], [1, 1]])).reshape(-1, 2)
    corners = cv2.convexHull(corners.astype(np.float32))[:, 0].astype(np.float64) + [mask.x, mask.y]
    height, width = mask.window.shape
    return MaskStatistics(
        area=float(area),
        body_area=float(len(rows) * step * step),
        centre=np.array([middle["m10"] / middle["m00"] + 0.5, middle["m01"] / middle["m00"] + 0.5]) * step
        + [mask.x, mask.y],
        axis_length=float(along.max() - along.min() + 1.0) * step,
        hull=corners,
        touches_border=mask.x == 0 or mask.y == 0 or mask.x + width == mask.size[0] or mask.y + height == mask.size[1],
        trunk=Trunk(np.packbits(trunk), mask.x, mask.y, *trunk.shape[::-1], step),
    )


def _reduced(mask: np.ndarray, step: int) -> np.ndarray:
    """The mask [h, w] at 1 / step of its resolution, by majority; what is left over at its end counts as empty."""
    import cv2

    if step == 1:
        return mask
    height, width = (-(-side // step) for side in mask.shape)
    padded = np.zeros((height * step, width * step), np.uint8)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    padded *= 255
    return cv2.resize(padded, (width, height), interpolation=cv2.INTER_AREA) >= 128
