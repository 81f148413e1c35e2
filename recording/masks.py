"""Masks of the animal: cleaning, what geometry needs to know of them, and how they are kept.

An import finds the animal first and cuts it out then. Both need the same masks, and decoding or segmenting them twice
would cost more than everything else, so each camera's are kept on disk between the two: pixels packed, eight to a byte,
and mapped, not read, so that memory stays flat.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from multiview.files import atomic_write

HOLE_FRACTION = 0.05  # holes up to this fraction of the mask are faults; larger ones are real (a curled tail's inside)
# Parts thinner than twice this, over the square root of the mask's area, are left out: of the body whose length is
# measured (tail, whiskers), and of the trunk whose center of mass is taken (also legs, ears and snout). Chosen on
# synthetic mice, whose true length and center are known.
TAIL_RADIUS, LIMB_RADIUS = 0.08, 0.18
MEASURED_AREA = 2_500  # pixels: larger masks are measured at a whole fraction of their resolution


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


def clean_mask(image: np.ndarray, level: int = 127) -> Silhouette:
    """Finds the animal in a mask [h, w] uint8: what is brighter than `level`, largest component, small holes filled.

    Thin tails stay, since nothing is eroded. Where nothing is brighter the result is empty.
    """
    size = (image.shape[1], image.shape[0])
    binary = cv2.threshold(image, level, 1, cv2.THRESH_BINARY)[1]
    x, y, width, height = cv2.boundingRect(binary)
    window = binary[y : y + height, x : x + width]
    if width == 0:
        return Silhouette(np.zeros((0, 0), bool), 0, 0, size)
    # Borders say at once whether there is more than one part, or a hole: mostly there is not.
    borders, tree = cv2.findContours(window, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if len(borders) > 1:
        # Pick's theorem: a polygon through pixel centers of area A and n steps holds A - n/2 + 1 pixels inside it and n
        # on it. A hole's border runs through the pixels around it.
        parents = tree[0, :, 3]
        areas = np.array([cv2.contourArea(border) for border in borders]) + 1
        steps = np.array([len(border) for border in borders]) / 2
        pixels = np.where(parents < 0, areas + steps, areas - steps)
        parts = pixels.copy()
        np.subtract.at(parts, parents[parents >= 0], pixels[parents >= 0])
        main = int(np.where(parents < 0, parts, -1.0).argmax())
        left, top, width, height = cv2.boundingRect(borders[main])
        window, offset = np.zeros((height, width), np.uint8), (-left, -top)
        cv2.drawContours(window, borders, main, 1, cv2.FILLED, offset=offset)
        for hole in np.flatnonzero((parents == main) & (pixels > HOLE_FRACTION * parts[main])):
            cv2.drawContours(window, borders, hole, 0, cv2.FILLED, offset=offset)
            cv2.drawContours(window, borders, hole, 1, 1, offset=offset)  # these pixels are the animal's
        x, y = x + left, y + top
    return Silhouette(window.astype(bool), x, y, size)


def measure_mask(mask: Silhouette) -> dict:
    """What `MaskTrack` keeps of one cleaned mask, by its names there; of an empty mask only its area, 0."""
    area = int(np.count_nonzero(mask.window))
    if area == 0:
        return NOTHING
    # Lengths and centers of mass need no full resolution: reduced to some thousand pixels, they cost little.
    step = max(1, int(math.sqrt(area / MEASURED_AREA)))
    height, width = mask.window.shape
    small = mask.window
    if step > 1:  # by majority; what is left over at the end counts as empty
        padded = np.zeros((-(-height // step) * step, -(-width // step) * step), np.uint8)
        padded[:height, :width] = mask.window
        small = cv2.resize(padded * np.uint8(255), None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA) >= 128
    padded = cv2.copyMakeBorder(small.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_5)
    # Opening with discs by two distance transforms (true to 2 %): its cost does not grow with the radius.
    opened = []
    for radius_px in (radius * math.sqrt(np.count_nonzero(small)) for radius in (TAIL_RADIUS, LIMB_RADIUS)):
        shell = (depth <= radius_px).view(np.uint8)
        if radius_px < 1.0 or shell.all():
            opened.append(small)
            continue
        near = cv2.distanceTransform(shell, cv2.DIST_L2, cv2.DIST_MASK_5) <= radius_px
        opened.append(near[1:-1, 1:-1] & small)
    body, trunk = opened
    rows, columns = np.nonzero(body)
    moments = cv2.moments(body.view(np.uint8), binaryImage=True)
    angle = 0.5 * math.atan2(2.0 * moments["mu11"], moments["mu20"] - moments["mu02"])  # of the longest axis
    along = columns * math.cos(angle) + rows * math.sin(angle)
    middle = cv2.moments(trunk.view(np.uint8), binaryImage=True)
    center = np.array([middle["m10"] / middle["m00"] + 0.5, middle["m01"] / middle["m00"] + 0.5])
    outline, _ = cv2.findContours(mask.window.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = cv2.convexHull(np.concatenate(outline))[:, 0].astype(np.float64)
    # Hull of pixel squares, not of their centers: all four corners of each hull pixel.
    corners = (hull[:, None] + np.array([[0, 0], [1, 0], [0, 1], [1, 1]])).reshape(-1, 2)
    return {
        "area": area, "centre": center * step + [mask.x, mask.y],
        "axis_length": float(along.max() - along.min() + 1.0) * step,
        "touches_border": not (0 < mask.x < mask.size[0] - width and 0 < mask.y < mask.size[1] - height),
        "trunk_shape": (*trunk.shape, step), "trunks": np.packbits(trunk),
        "hulls": cv2.convexHull(corners.astype(np.float32))[:, 0].astype(np.float64) + [mask.x, mask.y],
    }  # fmt: skip


NOTHING = {
    "area": 0, "centre": np.zeros(2), "axis_length": 0.0, "touches_border": False, "trunk_shape": (0, 0, 1),
    "trunks": np.zeros(0, np.uint8), "hulls": np.zeros((0, 2)),
}  # fmt: skip


@dataclass(frozen=True)
class MaskTrack:
    """One camera's t masks and what was measured on them, in pixels with outer-corner origin.

    size: (width, height) of the photographs. boxes: [t, 4] x, y, width, height. area: [t], 0 for an empty mask. centre:
    [t, 2] center of mass of the trunk. axis_length: [t] of the body along its longest axis. touches_border: [t], at the
    image's edge. trunk_shape: [t, 3] rows, columns, step of the trunk: the mask without its thin parts, at 1 / step of
    the photograph's resolution.
    hulls: [n, 2] convex hulls of the whole masks, trunks and bits: packed pixels of trunks and masks, all after each
    other; mask t's from ..._starts[t] on.
    """

    size: np.ndarray
    boxes: np.ndarray
    area: np.ndarray
    centre: np.ndarray
    axis_length: np.ndarray
    touches_border: np.ndarray
    trunk_shape: np.ndarray
    hulls: np.ndarray
    hulls_starts: np.ndarray
    trunks: np.ndarray
    trunks_starts: np.ndarray
    bits: np.ndarray
    bits_starts: np.ndarray

    def silhouette(self, index: int) -> Silhouette:
        """The mask of the index-th frame kept here."""
        x, y, width, height = self.boxes[index].tolist()
        packed = self.bits[self.bits_starts[index] : self.bits_starts[index + 1]]
        window = np.unpackbits(packed, count=width * height).reshape(height, width).view(bool)
        return Silhouette(window, x, y, tuple(self.size.tolist()))

    def hull(self, index: int) -> np.ndarray:
        return self.hulls[self.hulls_starts[index] : self.hulls_starts[index + 1]]


def record_track(folder: Path, camera: int, key: dict, masks: Iterable[Silhouette]) -> Iterator[None]:
    """Writes a track: <camera>.bits, then <camera>.npz; yields after every mask, and once more when both are complete.

    key: JSON values that say what the masks were made from; see `read_track`.
    """
    rows, lengths, size = [], [], (0, 0)
    with atomic_write(folder / f"{camera}.bits") as temporary, open(temporary, "wb") as handle:
        for mask in masks:
            lengths.append(handle.write(np.packbits(mask.window).tobytes()))
            box, size = (mask.x, mask.y, mask.window.shape[1], mask.window.shape[0]), mask.size
            rows.append({"boxes": box, **measure_mask(mask)})
            yield
    content = {name: [row[name] for row in rows] for name in ("boxes", *NOTHING)}
    starts = {"bits_starts": np.cumsum([0, *lengths])}
    for name in ("hulls", "trunks"):
        starts[f"{name}_starts"] = np.cumsum([0, *map(len, content[name])])
        content[name] = np.concatenate(content[name])
    with atomic_write(folder / f"{camera}.npz") as temporary, open(temporary, "wb") as handle:
        np.savez(handle, key=json.dumps(key, sort_keys=True), size=size, **content, **starts)
    yield


def read_track(folder: Path, camera: int, key: dict | None = None) -> MaskTrack | None:
    """Opens a complete track, made from `key` if one is given, its pixels mapped; None if there is none."""
    bits, path = folder / f"{camera}.bits", folder / f"{camera}.npz"
    if not (path.is_file() and bits.is_file()):
        return None
    with np.load(path) as file:
        content = dict(file)
    if str(content.pop("key")) != json.dumps(key, sort_keys=True) and key is not None:
        return None
    pixels = np.memmap(bits, dtype=np.uint8, mode="r") if bits.stat().st_size else np.zeros(0, np.uint8)
    return MaskTrack(**content, bits=pixels)
