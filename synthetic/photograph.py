"""Turns clean renderings into what a laboratory's cameras and its segmentation would give.

Exposure, gamma and white balance are one per animal and belong to its colours (`toned`), so that views which nobody
photographed agree with those that were. Then per view, in the order in which it happens: lens and motion blur and a
coarse sensor (on premultiplied colours, so that nothing leaks over the outline), the view's gain, a veil (the arena's
glass), the mask's errors (rims of background, fur cut off, lost tails, holes), sensor noise. Lengths are in pixels of a
picture of REFERENCE_SIZE and grow with the picture. Ranges are uniform, (low, high), unless said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from multiview.sample import Sample
from synthetic.cloud import KEYPOINT_NAMES

REFERENCE_SIZE = 128  # pixels: where the lengths below are measured

# per sample, the same in all views; the first four also in those that are not photographed
# Deviation of the logarithm of the sRGB values' gain, cut at -2 and 1 deviations: white fur keeps its shading.
EXPOSURE_SPREAD = 0.13
GAMMA = (0.85, 1.4)  # sRGB values are raised to this power about PIVOT, which it leaves alone
PIVOT = 0.3
WHITE_BALANCE_SPREAD = (0.045, 0.012)  # deviations of the logarithm: red against blue, green against both
COARSE_SENSOR = (0.55, 0.95)  # share of the pixels along a side that the sensor had
COARSE_SENSOR_PROBABILITY = 0.3
NOISE = (0.004, 0.022)  # standard deviation of an opaque white pixel, 1 = white
NOISE_GRAIN = (0.3, 0.8)  # sigma of the noise's grain, pixels of the picture itself
EDGE_WIDTH = (0.3, 1.8)  # of the mask's ramp from 0 to 1
BACKGROUND = (0.05, 0.95)  # grey behind the animal, as it bleeds into the rim
BLACK_BACKGROUND_PROBABILITY = 0.3  # cut-outs are often stored over black

# per view
VIEW_GAIN = 0.05  # the views' gains lie within 1 +- this
BLUR = (0.0, 0.9)  # sigma of the defocus
MOTION_BLUR = (0.4, 1.3)  # sigma along the motion, instead of the defocus' own where that is smaller
MOTION_BLUR_PROBABILITY = 0.3
VEIL = (0.04, 0.22)  # share of light from the glass in front of a part of the picture
VEIL_GREY = (0.5, 0.85)
VEIL_PROBABILITY = 0.35
MASK_SHIFT = (-1.0, 1.5)  # how far the outline may move outwards, at most
MASK_SHIFT_MEAN = (-0.35, 0.6)  # mean over a view's outline; bumps about it, cut at MASK_SHIFT
MASK_BUMPS = (0.2, 0.9)  # amplitude of the bumps
BUMP_LENGTH = 9.0  # distance between their nodes
TAIL_LOSS_PROBABILITY = 0.08
TAIL_LOSS_RADIUS = (6.0, 22.0)  # about the tail's end: thin parts within it vanish from the mask
HOLE_PROBABILITY = 0.04
HOLE_RADIUS = (0.8, 2.0)
THIN = 3.0  # parts narrower than twice this are thin


@dataclass(frozen=True)
class Camera:
    """What one sample's cameras have in common. gain: [3]; background: [3] behind the animal; grain: pixels."""

    gain: np.ndarray
    gamma: float
    coarse: float
    noise: float
    grain: float
    edge_width: float
    background: np.ndarray


def draw_camera(rng: np.random.Generator) -> Camera:
    exposure = math.exp(EXPOSURE_SPREAD * float(np.clip(rng.normal(), -2, 1)))
    warm, green = np.clip(rng.normal(size=2), -2, 2) * WHITE_BALANCE_SPREAD
    gain = exposure * np.exp([warm - green, green, -warm - green])
    gamma = float(rng.uniform(*GAMMA))
    coarse = float(rng.uniform(*COARSE_SENSOR)) if rng.random() < COARSE_SENSOR_PROBABILITY else 1.0
    black = rng.random() < BLACK_BACKGROUND_PROBABILITY
    background = np.zeros(3) if black else rng.uniform(*BACKGROUND) * np.exp(rng.normal(0, 0.05, 3))
    return Camera(
        gain=gain.astype(np.float32),
        gamma=gamma,
        coarse=coarse,
        noise=float(rng.uniform(*NOISE)),
        grain=float(rng.uniform(*NOISE_GRAIN)),
        edge_width=float(rng.uniform(*EDGE_WIDTH)),
        background=np.clip(background, 0, 1).astype(np.float32),
    )


def toned(colour: np.ndarray, camera: Camera) -> np.ndarray:
    """sRGB colours [..., 3] 0..1 as the camera records them: its gamma about PIVOT, its gains."""
    return np.clip(PIVOT * (colour / PIVOT) ** camera.gamma * camera.gain, 0, 1).astype(np.float32)


def photograph(sample: Sample, num_views: int, camera: Camera, rng: np.random.Generator) -> Sample:
    """The sample with its first num_views pictures photographed; later views, cameras and depth stay as they are.

    The animal's colours are expected to be `toned` already; rng decides everything else.
    `extra["photograph"]` says what was done: shared settings and one entry per view.
    """
    tails = _tail_ends(sample, num_views)
    rgba, views = sample.rgba.clone(), []
    for view, stream in enumerate(rng.spawn(num_views)):
        clean = np.ascontiguousarray(rgba[view].permute(1, 2, 0).numpy(), dtype=np.float32)
        picture, done = photograph_view(clean, camera, stream, tails[view] if tails is not None else None)
        rgba[view] = torch.from_numpy(picture).permute(2, 0, 1)
        views.append(done)
    settings = {
        "gain": np.round(camera.gain.astype(float), 4).tolist(),
        "background": np.round(camera.background.astype(float), 4).tolist(),
        **{name: round(getattr(camera, name), 4) for name in ("gamma", "coarse", "noise", "grain", "edge_width")},
    }
    return replace(sample, rgba=rgba, extra={**sample.extra, "photograph": {**settings, "views": views}})


def _tail_ends(sample: Sample, num_views: int) -> np.ndarray | None:
    """[num_views, 2] the tail's end in pixels, None for an animal without keypoints."""
    if "keypoints" not in sample.extra:
        return None
    point = torch.tensor(sample.extra["keypoints"][KEYPOINT_NAMES.index("TailEnd")], dtype=torch.float32)
    uv, _ = sample.cameras.project(point.expand(len(sample.cameras), 1, 3))
    return uv[:num_views, 0].numpy()


def photograph_view(
    rgba: np.ndarray, camera: Camera, rng: np.random.Generator, tail_end: np.ndarray | None
) -> tuple[np.ndarray, dict]:
    """One picture [h, w, 4] 0..1 straight alpha, float32 -> the photographed one and what was done (JSON-able).

    tail_end: [2] pixels. Whatever is drawn lies around the animal, so only its surroundings are worked on.
    """
    unit = max(rgba.shape[:2]) / REFERENCE_SIZE
    picture = np.zeros_like(rgba)
    rows, columns = np.nonzero(rgba[..., 3].max(1) > 0)[0], np.nonzero(rgba[..., 3].max(0) > 0)[0]
    if len(rows) == 0:
        return picture, {}
    margin = math.ceil(6 * unit)
    top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    window = (slice(top, rows[-1] + 1 + margin), slice(left, columns[-1] + 1 + margin))
    gain = 1 + rng.uniform(-VIEW_GAIN, VIEW_GAIN)
    kernel, sigmas = draw_blur(rng, unit)
    colour, alpha = blurred(rgba[window], kernel, camera.coarse)
    colour = np.clip(colour * np.float32(gain), 0, 1)
    colour, veil = veiled(colour, rng, unit)
    place = None if tail_end is None else tail_end - [left, top]
    mask, done = segmented(alpha, camera.edge_width, rng, unit, place)
    # Where the mask reaches over the outline, what lies behind the animal fills it up.
    behind = np.clip(mask - alpha, 0, 1)[..., None]
    seen = np.minimum(alpha, mask)[..., None]
    colour = (colour * seen + camera.background * behind) / np.maximum(seen + behind, 1e-6)
    colour = colour + mask[..., None] * noise_of(colour, camera, rng)
    picture[window] = np.concatenate([np.clip(colour, 0, 1), mask[..., None]], axis=2)
    return picture, {"gain": round(float(gain), 4), "blur": sigmas, "veil": veil, **done}


def draw_blur(rng: np.random.Generator, unit: float) -> tuple[np.ndarray, list[float]]:
    """An anisotropic Gaussian kernel [k, k] of sum 1, and its two sigmas in reference pixels."""
    across = rng.uniform(*BLUR)
    along = across if rng.random() >= MOTION_BLUR_PROBABILITY else max(across, rng.uniform(*MOTION_BLUR))
    angle = rng.uniform(0, math.pi)
    reach = math.ceil(2.5 * along * unit)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    # A sigma of zero leaves the picture alone: the kernel narrows to one pixel.
    kernel = np.exp(-0.5 * ((u / max(along * unit, 0.05)) ** 2 + (v / max(across * unit, 0.05)) ** 2))
    return (kernel / kernel.sum()).astype(np.float32), [round(float(along), 3), round(float(across), 3)]


def blurred(rgba: np.ndarray, kernel: np.ndarray, coarse: float) -> tuple[np.ndarray, np.ndarray]:
    """Straight rgba [h, w, 4] -> straight colours [h, w, 3] and alpha [h, w] behind a lens and a coarse sensor.

    Filters premultiplied colours and divides by the filtered alpha: an animal of one colour keeps it up to its rim.
    """
    import cv2

    premultiplied = rgba.copy()
    premultiplied[..., :3] *= rgba[..., 3:]
    if kernel.size > 1:
        premultiplied = cv2.filter2D(premultiplied, -1, kernel, borderType=cv2.BORDER_REPLICATE)
    if coarse < 1.0:
        height, width = rgba.shape[:2]
        small = (max(round(width * coarse), 1), max(round(height * coarse), 1))
        premultiplied = cv2.resize(premultiplied, small, interpolation=cv2.INTER_AREA)
        premultiplied = cv2.resize(premultiplied, (width, height), interpolation=cv2.INTER_LINEAR)
    alpha = np.clip(premultiplied[..., 3], 0, 1)
    colour = premultiplied[..., :3] / np.maximum(alpha, 1e-4)[..., None]
    return np.clip(colour, 0, 1), alpha


def veiled(colour: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, float]:
    """Light from a pane of glass in front of one side of a nearly level line through the picture, or none."""
    if rng.random() >= VEIL_PROBABILITY:
        return colour, 0.0
    strength, grey = rng.uniform(*VEIL), rng.uniform(*VEIL_GREY)
    height, width = colour.shape[:2]
    line, slope, side = rng.uniform(-0.1, 1.1) * height, rng.normal(0, 0.12), rng.choice([-1.0, 1.0])
    y = np.arange(height, dtype=np.float32)[:, None] - line - slope * np.arange(width, dtype=np.float32)
    share = np.float32(strength) * np.clip(0.5 + np.float32(side) * y / np.float32(1.5 * unit), 0, 1)[..., None]
    return colour * (1 - share) + np.float32(grey) * share, round(float(strength), 3)


def segmented(
    alpha: np.ndarray, edge_width: float, rng: np.random.Generator, unit: float, tail_end: np.ndarray | None
) -> tuple[np.ndarray, dict]:
    """A segmentation's idea of alpha [h, w], and what is wrong with it."""
    mean, bumps = rng.uniform(*MASK_SHIFT_MEAN), rng.uniform(*MASK_BUMPS)
    shift = np.clip(mean + bumps * smooth_field(rng, alpha.shape, BUMP_LENGTH * unit), *MASK_SHIFT)
    distance = signed_distance(alpha)
    mask = np.clip(0.5 + (distance + unit * shift) / max(edge_width * unit, 0.3), 0, 1).astype(np.float32)
    done = {"mask_shift": round(float(mean), 3), "mask_bumps": round(float(bumps), 3)}
    if rng.random() < TAIL_LOSS_PROBABILITY and tail_end is not None:
        radius = rng.uniform(*TAIL_LOSS_RADIUS)
        mask = mask * (1 - _thin(alpha, unit) * _disc(alpha.shape, tail_end, radius * unit))
        done["tail_lost"] = round(float(radius), 2)
    if rng.random() < HOLE_PROBABILITY:
        inside = np.argwhere(alpha > 0.9)
        radius = rng.uniform(*HOLE_RADIUS)
        if len(inside):
            mask = mask * (1 - _disc(alpha.shape, inside[rng.integers(len(inside))][::-1] + 0.5, radius * unit))
            done["hole"] = round(float(radius), 2)
    return mask, done


def signed_distance(alpha: np.ndarray) -> np.ndarray:
    """[h, w] pixels to the outline (alpha 0.5), positive inside; in the outline's own pixels from their alpha."""
    import cv2

    inside = (alpha >= 0.5).astype(np.uint8)
    out = cv2.distanceTransform(1 - inside, cv2.DIST_L2, cv2.DIST_MASK_5)
    into = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_5)
    distance = np.where(inside > 0, into - 0.5, 0.5 - out)
    # Within one pixel of the outline its place is known to a part of a pixel.
    return np.where(np.abs(distance) <= 0.51, alpha - 0.5, distance)


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], length: float) -> np.ndarray:
    """[h, w] smooth noise of about unit deviation whose nodes are `length` pixels apart."""
    import cv2

    height, width = shape
    nodes = rng.standard_normal((math.ceil(height / length) + 3, math.ceil(width / length) + 3), np.float32)
    fine = cv2.resize(
        nodes, (round(nodes.shape[1] * length), round(nodes.shape[0] * length)), interpolation=cv2.INTER_CUBIC
    )
    first = round(length)
    return fine[first : first + height, first : first + width]


def noise_of(colour: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """[h, w, 3] a sensor's and a codec's noise: deviation noise_level(value), mostly common to the channels."""
    import cv2

    height, width = colour.shape[:2]
    noise = rng.standard_normal((height + 8, width + 8, 4), np.float32)
    reach = np.arange(-2, 3)
    kernel = np.exp(-0.5 * (reach / camera.grain) ** 2)
    kernel /= np.sqrt((kernel**2).sum())  # keeps the deviation
    noise = cv2.sepFilter2D(noise, -1, kernel, kernel)[4:-4, 4:-4]
    noise = 0.8 * noise[..., 3:] + 0.6 * noise[..., :3]
    return noise * noise_level(colour, camera.noise)


def noise_level(value: np.ndarray, at_white: float) -> np.ndarray:
    """Standard deviation of the noise at sRGB values 0..1: a fixed part and one that grows with the light."""
    return np.float32(at_white) * np.sqrt(0.3 + 0.7 * np.clip(value, 0, 1))


def _disc(shape: tuple[int, int], centre: np.ndarray, radius: float) -> np.ndarray:
    """[h, w] 1 inside a disc about centre (x, y), pixels, with a ramp of one pixel."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    distance = np.hypot(x + 0.5 - centre[0], y + 0.5 - centre[1])
    return np.clip(radius + 0.5 - distance, 0, 1).astype(np.float32)


def _thin(alpha: np.ndarray, unit: float) -> np.ndarray:
    """[h, w] 1 on parts narrower than 2 THIN reference pixels and around the animal, 0 on its body."""
    import cv2

    radius = max(round(THIN * unit), 1)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    body = cv2.morphologyEx((alpha > 0.5).astype(np.uint8), cv2.MORPH_OPEN, disc)
    return (cv2.dilate(body, disc) == 0).astype(np.float32)
