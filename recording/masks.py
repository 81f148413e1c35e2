"""Masks of the animal: cleaning, what geometry needs to know of them, and how they are kept.

An import finds the animal first and cuts it out then. Both need the same masks, and decoding or segmenting them twice
would cost more than everything else, so each camera's are kept on disk between the two: pixels packed, eight to a byte,
and mapped, not read, so that memory stays flat.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multiview.files import atomic_write

HOLE_FRACTION = 0.05  # holes up to this fraction of the mask are faults; larger ones are real (a curled tail's inside)
# Parts thinner than twice this, over the square root of the mask's area, are left out: of the body whose length is
# measured (tail, whiskers), and of the trunk whose center of mass is taken (also legs, ears and snout). Chosen on
# synthetic mice, whose true length and center are known.
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

    area: pixels. centre: [2] center of mass of the trunk. axis_length: length of
    the body along its longest axis. hull: [n, 2] convex hull of the whole mask. touches_border: at the image's edge.
    """

    area: float
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


# ---- cleaning -------------------------------------------------------------------------------------------------------


def clean_mask(image: np.ndarray, level: int = 127) -> Silhouette:
    """Finds the animal in a mask [h, w] uint8: what is brighter than `level`, largest component, small holes filled.

    Thin tails stay, since nothing is eroded. Where nothing is brighter the result is empty.
    """
    import cv2

    size = (image.shape[1], image.shape[0])
    binary = cv2.threshold(image, level, 1, cv2.THRESH_BINARY)[1]
    x, y, width, height = cv2.boundingRect(binary)
    window = binary[y : y + height, x : x + width]
    if width == 0:
        return Silhouette(np.zeros((0, 0), bool), 0, 0, size)
    # Borders say at once whether there is more than one part, or a hole: mostly there is not.
    borders, tree = cv2.findContours(window, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if len(borders) > 1:
        window, left, top = _plainly_largest(borders, tree[0, :, 3]) or _largest_part(window)
        x, y = x + left, y + top
    return Silhouette(window.astype(bool), x, y, size)


def _plainly_largest(borders: Sequence[np.ndarray], parents: np.ndarray) -> tuple[np.ndarray, int, int] | None:
    """As `_largest_part`, from the borders alone; None where they leave in doubt what is largest, or a hole's size.

    parents: the border around each hole's border, -1 for those of parts. A border runs through the centers of its
    part's pixels, so a hole is smaller than its border's inside, and a part larger.
    """
    import cv2

    areas = np.array([cv2.contourArea(border) for border in borders])
    main = int(np.where(parents < 0, areas, -1.0).argmax())
    holes = areas[parents == main]
    area = areas[main] - holes.sum()
    others = [math.prod(cv2.boundingRect(borders[k])[2:]) for k in np.flatnonzero(parents < 0) if k != main]
    if holes.max(initial=0.0) > HOLE_FRACTION * area or max(others, default=0) >= area:
        return None
    left, top, width, height = cv2.boundingRect(borders[main])
    filled = np.zeros((height, width), np.uint8)
    return cv2.drawContours(filled, borders, main, 1, cv2.FILLED, offset=(-left, -top)), left, top


def _largest_part(binary: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Returns the largest component of [h, w] uint8 with its small holes filled, cut out, and its corner."""
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


# ---- measuring ------------------------------------------------------------------------------------------------------


def openings(mask: np.ndarray, *radii: float) -> list[np.ndarray]:
    """Opens a mask [h, w] bool with discs whose radii are `radii` times the square root of the mask's area."""
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


def measure_mask(mask: Silhouette) -> MaskStatistics | None:
    """Measures a cleaned mask; None when it is empty."""
    import cv2

    if mask.window.size == 0:
        return None
    area = int(np.count_nonzero(mask.window))
    # Lengths and centers of mass need no full resolution: reduced to some thousand pixels, they cost little.
    step = max(1, int(math.sqrt(area / MEASURED_AREA)))
    height, width = mask.window.shape
    small = mask.window
    if step > 1:  # by majority; what is left over at the end counts as empty
        padded = np.zeros((-(-height // step) * step, -(-width // step) * step), np.uint8)
        padded[:height, :width] = mask.window
        small = cv2.resize(padded * np.uint8(255), None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA) >= 128
    body, trunk = openings(small, TAIL_RADIUS, LIMB_RADIUS)
    rows, columns = np.nonzero(body)
    moments = cv2.moments(body.view(np.uint8), binaryImage=True)
    angle = 0.5 * math.atan2(2.0 * moments["mu11"], moments["mu20"] - moments["mu02"])  # of the longest axis
    along = columns * math.cos(angle) + rows * math.sin(angle)
    middle = cv2.moments(trunk.view(np.uint8), binaryImage=True)
    outline, _ = cv2.findContours(mask.window.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = cv2.convexHull(np.concatenate(outline))[:, 0].astype(np.float64)
    # Hull of pixel squares, not of their centers: all four corners of each hull pixel.
    corners = (hull[:, None] + np.array([[0, 0], [1, 0], [0, 1], [1, 1]])).reshape(-1, 2)
    corners = cv2.convexHull(corners.astype(np.float32))[:, 0].astype(np.float64) + [mask.x, mask.y]
    return MaskStatistics(
        area=float(area),
        centre=np.array([middle["m10"] / middle["m00"] + 0.5, middle["m01"] / middle["m00"] + 0.5]) * step
        + [mask.x, mask.y],
        axis_length=float(along.max() - along.min() + 1.0) * step,
        hull=corners,
        touches_border=mask.x == 0 or mask.y == 0 or mask.x + width == mask.size[0] or mask.y + height == mask.size[1],
        trunk=Trunk(np.packbits(trunk), mask.x, mask.y, *trunk.shape[::-1], step),
    )


# ---- one camera's masks on disk -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskTrack:
    """One camera's masks. boxes: [t, 4] x, y, width, height. bits: packed pixels, of mask t from byte starts[t] on."""

    boxes: np.ndarray
    starts: np.ndarray
    bits: np.ndarray
    size: tuple[int, int]

    def silhouette(self, index: int) -> Silhouette:
        """Returns the mask of the index-th frame kept here."""
        x, y, width, height = self.boxes[index].tolist()
        packed = self.bits[self.starts[index] : self.starts[index + 1]]
        window = np.unpackbits(packed, count=width * height).reshape(height, width).view(bool)
        return Silhouette(window, x, y, self.size)


def track_paths(folder: Path, camera: int) -> tuple[Path, Path]:
    """Returns the files of packed pixels and of what was measured; the second is written last."""
    return folder / f"{camera}.bits", folder / f"{camera}.npz"


def record_track(folder: Path, camera: int, key: dict, masks: Iterable[Silhouette]) -> Iterator[None]:
    """Writes a track, yielding after every mask and once more when its files are complete.

    key: JSON values that say what the masks were made from; see `is_recorded`.
    """
    bits_path, path = track_paths(folder, camera)
    boxes, lengths, statistics, size = [], [0], [], (0, 0)
    with atomic_write(bits_path) as temporary:
        with open(temporary, "wb") as handle:
            for mask in masks:
                packed = np.packbits(mask.window)
                handle.write(packed.tobytes())
                boxes.append((mask.x, mask.y, mask.window.shape[1], mask.window.shape[0]))
                lengths.append(len(packed))
                statistics.append(measure_mask(mask))
                size = mask.size
                yield
    nothing = MaskStatistics(0, np.zeros(2), 0, np.zeros((0, 2)), False, Trunk(np.zeros(0, np.uint8), 0, 0, 0, 0, 1))
    measured = [one or nothing for one in statistics]
    trunks = [one.trunk for one in measured]
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as handle:
            np.savez(
                handle,
                key=json.dumps(key, sort_keys=True),
                size=size,
                boxes=np.array(boxes, dtype=np.int64).reshape(-1, 4),
                starts=np.cumsum(lengths),
                scalars=np.array([(m.area, *m.centre, m.axis_length, m.touches_border) for m in measured], np.float64),
                hulls=np.concatenate([one.hull for one in measured]),
                hull_lengths=[len(one.hull) for one in measured],
                trunks=np.array([(t.x, t.y, t.width, t.height, t.step) for t in trunks], np.int64),
                trunk_bits=np.concatenate([one.bits for one in trunks]),
                trunk_lengths=[len(one.bits) for one in trunks],
            )
    yield


def is_recorded(folder: Path, camera: int, key: dict) -> bool:
    """Says whether a complete track made from the same things is there."""
    bits_path, path = track_paths(folder, camera)
    if not (path.is_file() and bits_path.is_file()):
        return False
    with np.load(path) as content:
        return str(content["key"]) == json.dumps(key, sort_keys=True)


def read_track(folder: Path, camera: int) -> MaskTrack:
    """Opens the masks of a complete track; pixels are mapped."""
    bits_path, path = track_paths(folder, camera)
    with np.load(path) as content:
        boxes, starts = content["boxes"], content["starts"]
        size = tuple(int(value) for value in content["size"])
    empty = bits_path.stat().st_size == 0
    bits = np.zeros(0, np.uint8) if empty else np.memmap(bits_path, dtype=np.uint8, mode="r")
    return MaskTrack(boxes, starts, bits, size)


def read_statistics(folder: Path, camera: int) -> list[MaskStatistics | None]:
    """Reads what was measured on a complete track, per frame, None where the mask is empty."""
    with np.load(track_paths(folder, camera)[1]) as content:
        hulls = np.split(content["hulls"], np.cumsum(content["hull_lengths"])[:-1])
        bits = np.split(content["trunk_bits"], np.cumsum(content["trunk_lengths"])[:-1])
        trunks = [Trunk(one, *map(int, where)) for one, where in zip(bits, content["trunks"], strict=True)]
        return [
            MaskStatistics(row[0], row[1:3], row[3], hull, bool(row[4]), trunk) if row[0] else None
            for row, hull, trunk in zip(content["scalars"], hulls, trunks, strict=True)
        ]
