"""Masks of the animal: read or found, cleaned, what geometry needs to know of them, and how they are kept.

An import finds the animal first and cuts it out then. Both need the same masks, and decoding or segmenting them twice
would cost more than everything else, so each camera's are kept on disk between the two: pixels packed, eight to a byte,
and mapped, not read, so that memory stays flat.

Where there is no mask video, the animal is what differs from the background that stays. `median`: the background is
every pixel's median over frames spread over the recording, what stands out of its noise is animal. `mog2`: OpenCV's
mixture of Gaussians per pixel (Zivkovic 2004), learnt on the same frames, then held fixed, so that a frame's mask does
not depend on the frames before it. `rembg`: a network for single images, where installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from multiview.files import atomic_write
from recording.video import Video, VideoReader

HOLE_FRACTION = 0.05  # holes up to this fraction of the mask are faults; larger ones are real (a curled tail's inside)
# Parts thinner than twice this, over the square root of the mask's area, are left out: of the body whose length is
# measured (tail, whiskers), and of the trunk whose center of mass is taken (also legs, ears and snout). Chosen on
# synthetic mice, whose true length and center are known.
TAIL_RADIUS, LIMB_RADIUS = 0.08, 0.18
MEASURED_AREA = 2_500  # pixels: larger masks are measured at a whole fraction of their resolution
LOOKED_AT = 8  # frames of a mask video that are asked which brightness means animal, at the most
MOST_COVERED = 0.9  # of a photograph: an animal never covers more
BACKGROUND_FRAMES = 41  # over the whole recording; odd, so that the median is one of the values seen
NOISE_FACTOR = 6.0  # how many standard deviations of the background's own noise count as animal
LEAST_DIFFERENCE = 12.0  # of 255: what video compression and flicker do
CORE_FACTOR = 2.0  # what is so much clearer still is certainly animal; fainter parts count where they touch it
CLOSING = 0.004  # of the image's width: gaps of this width between parts are closed
MOG2_THRESHOLD = 36.0  # squared Mahalanobis distance: as NOISE_FACTOR
MOG2_BACKGROUND = 0.6  # of all frames
BLUR = 5  # pixels, side of the smoothing that takes the noise of single pixels away


@dataclass(frozen=True)
class Silhouette:
    """A cleaned mask without the empty rest of its photograph; an empty mask has a window of 0 x 0."""

    window: np.ndarray  # [h, w] bool
    x: int  # pixel of the photograph in the window's corner
    y: int
    size: tuple[int, int]  # (width, height) of the photograph


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

    Hulls, trunks and bits lie after each other, mask t's from ..._starts[t] on. A trunk is a mask without its thin
    parts, at 1 / step of the photograph's resolution.
    """

    size: np.ndarray  # (width, height) of the photographs
    boxes: np.ndarray  # [t, 4] x, y, width, height
    area: np.ndarray  # [t], 0 for an empty mask
    centre: np.ndarray  # [t, 2] center of mass of the trunk
    axis_length: np.ndarray  # [t] of the body along its longest axis
    touches_border: np.ndarray  # [t], at the image's edge
    trunk_shape: np.ndarray  # [t, 3] rows, columns, step
    hulls: np.ndarray  # [n, 2] convex hulls of the whole masks
    hulls_starts: np.ndarray
    trunks: np.ndarray  # packed pixels
    trunks_starts: np.ndarray
    bits: np.ndarray  # packed pixels of the masks
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


def record_camera(
    videos: list[Video], frames: list[int], method: str, folder: Path, keys: dict[int, dict], camera: int
) -> Iterator[None]:
    """Writes one camera's track of cleaned masks. videos: of masks where method is `none`, else to be segmented."""
    video = videos[camera]
    masks = read_masks(video, frames) if method == "none" else segment(video, frames, method)
    return record_track(folder, camera, keys[camera], masks)


def read_masks(video: Video, frames: list[int]) -> Iterator[Silhouette]:
    """Yields the cleaned mask of each of the frames (rising) of one camera's mask video.

    Masks are white on black, lossy, and cut at half. Masks of 0 and 1, or of one dark color of a palette, are cut at
    half of what they have. Raises ValueError for masks of several levels, and where nearly everything is bright.
    """
    dim, half, is_dim = -1, 127, True
    with VideoReader(video) as reader:
        for frame in frames[:LOOKED_AT]:
            image, (black, white) = reader.read_mask(frame)
            half, top, what = (black + white) // 2, int(image.max()), f"{video.name}: the mask of frame {frame}"
            if top <= black:
                continue
            level = half if top > half else (black + top) // 2
            if np.count_nonzero(image > level) > MOST_COVERED * image.size:
                remedy = "invert the masks (ffmpeg -i 0.mp4 -vf negate -crf 0 inverted.mp4)"
                raise ValueError(f"{what} covers nearly the whole image; the animal must be white on black: {remedy}")
            low, high = (np.count_nonzero(image > black + part * (top - black)) for part in (0.25, 0.75))
            if low - high > high:
                levels = f"has several levels or colors (brightest {top} of {white})"
                raise ValueError(f"{what} {levels}; write the animal white and everything else black")
            if top > half:  # as it should be; a dim frame may show nothing but noise, so others are asked
                is_dim = False
                break
            dim = max(dim, level)
    is_dim &= dim >= 0
    level = dim if is_dim else half
    with VideoReader(video) as reader:
        for frame in frames:
            image, (black, white) = reader.read_mask(frame)
            if is_dim and image.max() > (black + white) // 2:
                found = f"frame {frame} is white where the animal is, the first frames are at most {level}"
                raise ValueError(f"{video.name}: {found}; write all masks white on black (255 on 0)")
            yield clean_mask(image, level)


def segment(video: Video, frames: list[int], method: str) -> Iterator[Silhouette]:
    """Yields the cleaned mask of each of the frames (rising) of one camera's video, found by `method`."""
    with VideoReader(video) as reader:
        if method == "rembg":
            import rembg

            session = rembg.new_session()
            for frame in frames:
                image = np.ascontiguousarray(reader.read_bgr(frame)[..., ::-1])
                yield clean_mask(np.asarray(rembg.remove(image, session=session, only_mask=True)))
            return
        chosen = np.linspace(0, video.num_frames - 1, min(BACKGROUND_FRAMES, video.num_frames))
        with VideoReader(video) as first:
            samples = np.stack([first.read_bgr(int(index)) for index in np.unique(np.round(chosen))])
        find = background_model(samples, method)
        del samples  # gigabytes, of a large video
        for frame in frames:
            yield clean_mask(find(reader.read_bgr(frame)))


def background_model(samples: np.ndarray, method: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from a frame to a mask [h, w] uint8, 0 or 255. samples: frames [n, h, w, 3] uint8 BGR."""
    # Block by block of rows: the median of everything at once would need many times the frames' memory.
    blocks = np.array_split(np.arange(samples.shape[1]), max(1, samples.shape[1] // 64))
    background = smoothed(np.concatenate([np.median(samples[:, rows], axis=0) for rows in blocks]))
    bright = background[::8, ::8] > 16

    def matched(frame: np.ndarray) -> np.ndarray:
        """The smoothed frame as bright as the background: lamps flicker, cameras adjust their gain."""
        frame = smoothed(frame)
        if not bright.any():
            return frame
        # The median ratio, which the animal, on a small part of the image, does not sway.
        return frame * np.float32(np.median(background[::8, ::8][bright] / np.maximum(frame[::8, ::8][bright], 1.0)))

    def finished(mask: np.ndarray, off: np.ndarray) -> np.ndarray:
        """Gaps closed, and no rim that smoothing added: the border lies where `off` is half of that beside it."""
        side = 2 * max(1, round(CLOSING * mask.shape[1])) + 1
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
        box = np.ones((BLUR, BLUR), np.uint8)
        rim = (mask > 0) & (cv2.erode(mask, box, borderValue=255) == 0)
        return np.where(rim & (off < 0.5 * cv2.dilate(off, box)), 0, mask).astype(np.uint8)

    def by_median(frame: np.ndarray) -> np.ndarray:
        off = np.abs(matched(frame) - background).max(axis=-1)
        # Parts of the faint mask that hold something sure.
        _, labels = cv2.connectedComponents((off > threshold).astype(np.uint8), connectivity=8)
        kept = np.zeros(int(labels.max()) + 1, dtype=bool)
        kept[np.unique(labels[off > CORE_FACTOR * threshold])] = True
        kept[0] = False
        return finished(kept[labels].astype(np.uint8) * 255, off)

    def by_mixture(frame: np.ndarray) -> np.ndarray:
        # Single pixels that noise makes stand out go first; a closing would join them to the animal.
        frame = matched(frame)
        mask = cv2.medianBlur(model.apply(rounded(frame), learningRate=0.0), 3)
        return finished(mask, np.abs(frame - background).max(axis=-1))

    if method == "median":
        few = samples[:: max(1, len(samples) // 9)]
        noise = np.median([np.median(np.abs(matched(frame) - background).max(axis=-1)) for frame in few])
        threshold = max(LEAST_DIFFERENCE, NOISE_FACTOR * 1.4826 * float(noise))
        return by_median
    model = cv2.createBackgroundSubtractorMOG2(history=len(samples), varThreshold=MOG2_THRESHOLD, detectShadows=False)
    # What is there in most frames is background, also where it needs several Gaussians.
    model.setBackgroundRatio(MOG2_BACKGROUND)
    model.setVarMin(LEAST_DIFFERENCE**2 / MOG2_THRESHOLD)
    # First the background, whatever the first frame shows.
    model.apply(rounded(background), learningRate=1.0)
    for sample in samples:
        model.apply(rounded(matched(sample)), learningRate=1.0 / len(samples))
    return by_mixture


def smoothed(frame: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(frame.astype(np.float32), (BLUR, BLUR), 0)


def rounded(frame: np.ndarray) -> np.ndarray:
    return frame.clip(0, 255).round().astype(np.uint8)
