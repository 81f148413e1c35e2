"""A photograph into the picture both stages were trained on: cut out, centred on the body, at the usual size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# How the body (tail taken off) stands in the training pictures: share of the picture's area, and how far the centre of
# mass strays from the picture's centre. Measured on the synthetic mice (docs/data_format.md, "framing").
BODY_AREA = 0.08
BODY_AREA_RANGE = (0.05, 0.14)
CENTRE_OFFSET_LIMIT = 0.06  # of the picture's width
MARGIN = 0.02  # free border kept around the whole mask, of the picture's width


@dataclass(frozen=True)
class PhotoReport:
    """What `prepare_photo` did; goes into run.json."""

    segmented: bool  # the file had no alpha, the animal was cut out here
    cropped: bool  # the picture was moved and scaled
    scale: float  # output pixels per input pixel
    body_area: float  # of the result
    centre_offset: float  # of the result, in picture widths


def prepare_photo(
    rgba: Tensor, size: int, *, crop: str = "auto", source: str = "picture"
) -> tuple[Tensor, PhotoReport]:
    """[4, h, w] 0..1 -> [4, size, size] RGBA framed like the training data, and what was done.

    A picture without transparency is segmented. crop: `auto` keeps a square picture whose animal already stands as in
    the training data and crops any other; `always`, `never` (the picture must then be square).
    Raises ValueError when no animal can be told from the background.
    """
    if crop not in ("auto", "always", "never"):
        raise ValueError(f"crop must be auto, always or never, got {crop!r}")
    array = rgba.permute(1, 2, 0).numpy()
    segmented = bool((array[..., 3] > 0.99).all())
    if segmented:
        array = np.concatenate([array[..., :3], segment(array[..., :3], source)[..., None]], axis=-1)
    mask = array[..., 3] > 0.5
    if mask.sum() < 64:
        raise ValueError(f"{source}: the alpha channel shows no animal (only {int(mask.sum())} opaque pixels)")
    area, offset, centre = body_placement(mask)
    square = array.shape[0] == array.shape[1]
    framed = square and BODY_AREA_RANGE[0] <= area <= BODY_AREA_RANGE[1] and offset <= CENTRE_OFFSET_LIMIT
    if crop == "never" and not square:
        raise ValueError(f"{source}: must be square to be used uncropped, got {array.shape[1]} x {array.shape[0]}")
    cropped = crop == "always" or (crop == "auto" and not framed)
    side = _crop_side(mask, area, centre) if cropped else array.shape[0]
    if cropped:
        array = _crop_square(array, centre, side)
    array = _resize_premultiplied(array, size)
    area, offset, _ = body_placement(array[..., 3] > 0.5)
    result = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).float().clamp(0, 1)
    return result, PhotoReport(segmented, cropped, size / side, round(area, 4), round(offset, 4))


def body_placement(mask: np.ndarray) -> tuple[float, float, tuple[float, float]]:
    """Of a mask [h, w]: body area / picture area, centre offset / width, centre (x, y) in pixels; tail taken off.

    The centre is the centre of mass, not of the bounding box: a tail would pull that by its whole length.
    """
    body = body_without_tail(mask)
    ys, xs = np.nonzero(body)
    centre = (float(xs.mean()) + 0.5, float(ys.mean()) + 0.5)
    height, width = mask.shape
    offset = float(np.hypot(centre[0] - width / 2, centre[1] - height / 2)) / width
    return float(body.sum()) / mask.size, offset, centre


def body_without_tail(mask: np.ndarray) -> np.ndarray:
    """The mask opened by a disc of a tenth of its own size: legs and tail go, the body stays."""
    import cv2

    radius = max(1, round(0.10 * float(np.sqrt(mask.sum()))))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    padded = np.pad(mask.astype(np.uint8), radius + 1)
    opened = cv2.morphologyEx(padded, cv2.MORPH_OPEN, disc)[radius + 1 : -radius - 1, radius + 1 : -radius - 1] > 0
    return opened if opened.any() else mask


def segment(rgb: np.ndarray, source: str = "picture") -> np.ndarray:
    """[h, w, 3] 0..1 -> soft mask [h, w]: colour distance from the border's colour, refined by GrabCut.

    Meant for an animal on a fairly even background. Raises ValueError where that fails: a cut-out
    RGBA picture made with any segmentation tool is then the way.
    """
    import cv2

    height, width = rgb.shape[:2]
    scale = min(1.0, 512 / max(height, width))
    small = cv2.resize(rgb, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    edge = max(2, round(0.03 * min(small.shape[:2])))
    border = np.concatenate(
        [part.reshape(-1, 3) for part in (small[:edge], small[-edge:], small[:, :edge], small[:, -edge:])]
    )
    distance = np.abs(small - np.median(border, axis=0)).max(axis=-1)
    spread = float(np.percentile(np.abs(border - np.median(border, axis=0)).max(axis=-1), 90))
    seed = distance > max(0.10, 2.0 * spread)
    labels = np.where(seed, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[:edge], labels[-edge:], labels[:, :edge], labels[:, -edge:] = (cv2.GC_BGD,) * 4
    if 0.003 < seed.mean() < 0.8:
        cv2.setRNGSeed(0)
        picture = (small * 255).round().astype(np.uint8)
        cv2.grabCut(picture, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_MASK)
    mask = _largest_component((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD))
    if not 0.003 < mask.mean() < 0.8:
        raise ValueError(
            f"{source}: no animal could be told from the background (mask covers {mask.mean():.1%}); pass an RGBA "
            "picture whose alpha is the animal's mask"
        )
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.7)
    return np.clip(cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR), 0, 1)


def _largest_component(mask: np.ndarray) -> np.ndarray:
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count < 2:
        return mask
    return labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))


def _crop_side(mask: np.ndarray, area: float, centre: tuple[float, float]) -> int:
    """Side of the square crop: the usual body size, larger where the tail would be cut off."""
    side = float(np.sqrt(area * mask.size / BODY_AREA))
    ys, xs = np.nonzero(mask)
    reach = max(xs.max() + 1 - centre[0], centre[0] - xs.min(), ys.max() + 1 - centre[1], centre[1] - ys.min())
    return int(np.ceil(max(side, 2 * reach / (1 - 2 * MARGIN))))


def _crop_square(array: np.ndarray, centre: tuple[float, float], side: int) -> np.ndarray:
    left, top = round(centre[0] - side / 2), round(centre[1] - side / 2)
    result = np.zeros((side, side, 4), dtype=array.dtype)
    height, width = array.shape[:2]
    x0, x1, y0, y1 = max(left, 0), min(left + side, width), max(top, 0), min(top + side, height)
    result[y0 - top : y1 - top, x0 - left : x1 - left] = array[y0:y1, x0:x1]
    return result


def _resize_premultiplied(array: np.ndarray, size: int) -> np.ndarray:
    """Resize without bleeding the colours of transparent pixels into the outline."""
    import cv2

    if array.shape[:2] == (size, size):
        return array
    how = cv2.INTER_AREA if size < array.shape[0] else cv2.INTER_CUBIC
    alpha = array[..., 3:]
    resized = cv2.resize(np.concatenate([array[..., :3] * alpha, alpha], axis=-1), (size, size), interpolation=how)
    alpha = resized[..., 3:].clip(0, 1)
    return np.concatenate([(resized[..., :3] / np.maximum(alpha, 1e-4)).clip(0, 1), alpha], axis=-1)
