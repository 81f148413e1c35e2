"""A photograph into the image both stages were trained on: cut out, centered on the body, at the usual size."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

LEAST_SIDE = 16  # pixels of a photograph
MASK_MOST = 0.8  # of the image's area: what covers more is no animal's mask
# How the body (tail taken off) stands in the training images: share of the image's area, and how far the center of
# mass strays from the image's center. Measured on the synthetic mice (docs/data_format.md, "framing").
BODY_AREA = 0.08
BODY_AREA_RANGE = (0.05, 0.14)
CENTER_OFFSET_LIMIT = 0.06  # of the image's width
MARGIN = 0.02  # free border kept around the whole mask, of the image's width


@dataclass(frozen=True)
class PhotoReport:
    """What `prepare_photo` did; goes into run.json."""

    segmented: bool  # the file had no alpha, the animal was cut out here
    cropped: bool  # the image was moved and scaled
    scale: float  # output pixels per input pixel
    body_area: float  # of the result
    centre_offset: float  # of the result, in image widths


def prepare_photo(rgba: Tensor, size: int, *, crop: str = "auto", source: str = "image") -> tuple[Tensor, PhotoReport]:
    """[4, h, w] 0..1 -> [4, size, size] RGBA framed like the training data, and a report of what was done.

    A photograph is segmented where its alpha is no animal's mask: opaque, or covering nearly the whole image. crop:
    `auto` keeps a square image whose animal already stands as in the training data and crops any other; `always`,
    `never` (the image must then be square). Raises ValueError when no animal can be told from the background.
    """
    if crop not in ("auto", "always", "never"):
        raise ValueError(f"crop must be auto, always or never, got {crop!r}")
    array = rgba.permute(1, 2, 0).numpy()
    height, width = array.shape[:2]
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"{source}: has {width} x {height} pixels, at least {LEAST_SIDE} each way are expected")
    shown = array[..., 3] > 0.5
    segmented = bool(shown.mean() > MASK_MOST)
    if segmented:
        color = array[..., :3]
        if not shown.all():  # hidden pixels hold any color: the border's must not be told from theirs
            color = np.where(shown[..., None], color, np.median(color[shown], axis=0)).astype(np.float32)
        if array[..., 3].min() < 0.99:
            log.warning("%s: its alpha covers %.0f%% and is no animal's mask: segmented", source, 100 * shown.mean())
        array = np.concatenate([color, (segment(color, source) * shown)[..., None]], axis=-1)
    mask = array[..., 3] > 0.5
    if mask.sum() < 64:
        raise ValueError(f"{source}: the alpha channel shows no animal (only {int(mask.sum())} opaque pixels)")
    area, offset, (x, y) = body_placement(mask)
    framed = height == width and BODY_AREA_RANGE[0] <= area <= BODY_AREA_RANGE[1] and offset <= CENTER_OFFSET_LIMIT
    if crop == "never" and height != width:
        raise ValueError(f"{source}: must be square to be used uncropped, got {width} x {height}")
    cropped, side = crop == "always" or (crop == "auto" and not framed), height
    if cropped:
        # The usual body size; larger where the tail would be cut off.
        ys, xs = np.nonzero(mask)
        reach = max(xs.max() + 1 - x, x - xs.min(), ys.max() + 1 - y, y - ys.min())
        side = int(np.ceil(max(float(np.sqrt(area * mask.size / BODY_AREA)), 2 * reach / (1 - 2 * MARGIN))))
        left, top = round(x - side / 2), round(y - side / 2)
        # Padded by one side all around, so that any square lies inside.
        padded = np.pad(array, ((side, side), (side, side), (0, 0)))
        array = padded[top + side : top + 2 * side, left + side : left + 2 * side]
    array = _resize_premultiplied(array, size)
    area, offset, _ = body_placement(array[..., 3] > 0.5)
    result = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).float().clamp(0, 1)
    return result, PhotoReport(segmented, cropped, size / side, round(area, 4), round(offset, 4))


def body_placement(mask: np.ndarray) -> tuple[float, float, tuple[float, float]]:
    """Returns of a mask [h, w]: body area / image area, center offset / width, center (x, y) in pixels. The tail, which
    would pull the center, goes by opening the mask with a disc of a tenth of its own size."""
    import cv2

    radius = max(1, round(0.10 * float(np.sqrt(mask.sum()))))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    padded = np.pad(mask.astype(np.uint8), radius + 1)
    body = cv2.morphologyEx(padded, cv2.MORPH_OPEN, disc)[radius + 1 : -radius - 1, radius + 1 : -radius - 1] > 0
    ys, xs = np.nonzero(body if body.any() else mask)
    center = (float(xs.mean()) + 0.5, float(ys.mean()) + 0.5)
    height, width = mask.shape
    offset = float(np.hypot(center[0] - width / 2, center[1] - height / 2)) / width
    return len(xs) / mask.size, offset, center


def segment(rgb: np.ndarray, source: str = "image") -> np.ndarray:
    """[h, w, 3] 0..1 -> soft mask [h, w]: color distance from the border's color, refined by GrabCut, else
    ValueError."""
    import cv2

    height, width = rgb.shape[:2]
    scale = min(1.0, 512 / max(height, width))
    small = cv2.resize(rgb, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
    edge = max(2, round(0.03 * min(small.shape[:2])))
    edges = (small[:edge], small[-edge:], small[:, :edge], small[:, -edge:])
    border = np.concatenate([part.reshape(-1, 3) for part in edges])
    distance = np.abs(small - np.median(border, axis=0)).max(axis=-1)
    spread = float(np.percentile(np.abs(border - np.median(border, axis=0)).max(axis=-1), 90))
    seed = distance > max(0.10, 2.0 * spread)
    labels = np.where(seed, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[:edge], labels[-edge:], labels[:, :edge], labels[:, -edge:] = (cv2.GC_BGD,) * 4
    if 0.003 < seed.mean() < MASK_MOST:
        cv2.setRNGSeed(0)
        pixels, models = (small * 255).round().astype(np.uint8), (np.zeros((1, 65)), np.zeros((1, 65)))
        cv2.grabCut(pixels, labels, None, *models, 5, cv2.GC_INIT_WITH_MASK)
    mask = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count > 2:  # the largest piece is the animal
        mask = parts == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    if not 0.003 < mask.mean() < MASK_MOST:
        told = f"{source}: no animal could be told from the background (mask covers {mask.mean():.1%})"
        raise ValueError(f"{told}; pass an RGBA image whose alpha is the animal's mask")
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.7)
    return np.clip(cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR), 0, 1)


def _resize_premultiplied(array: np.ndarray, size: int) -> np.ndarray:
    """Resize without bleeding the colors of transparent pixels into the outline."""
    import cv2

    if array.shape[:2] == (size, size):
        return array
    how = cv2.INTER_AREA if size < array.shape[0] else cv2.INTER_CUBIC
    alpha = array[..., 3:]
    resized = cv2.resize(np.concatenate([array[..., :3] * alpha, alpha], axis=-1), (size, size), interpolation=how)
    alpha = resized[..., 3:].clip(0, 1)
    return np.concatenate([(resized[..., :3] / np.maximum(alpha, 1e-4)).clip(0, 1), alpha], axis=-1)
