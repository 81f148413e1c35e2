"""One camera simulator: what lenses, sensors, light and segmentations add to clean renderings.

Samples become cut-out photographs (`photograph`): exposure, gamma and white balance are one per animal and belong to
its colors (`Camera.toned`), so that views which nobody photographed agree with those that were; then per view, in the
order in which it happens: lens and motion blur and a coarse sensor (on premultiplied colors, so that nothing leaks over
the outline), the view's gain, a veil (the arena's glass), the mask's errors (rims of background, fur cut off, lost
tails, holes), sensor noise. Raw recordings (`RecordingCameras`) see the whole image: exact lens models, uneven light, a
room behind the animal, sensor noise, the true mask.

Lengths of photographs are in pixels of an image of REFERENCE_SIZE and grow with the image. Ranges are uniform, (low,
high), unless said. Everything is a function of the seed, the frame and the camera.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.sample import Sample
from recording.calibration.model import Calibration
from synthetic.scene import KEYPOINT_NAMES, SplatCloud

REFERENCE_SIZE = 128  # pixels: where the lengths below are measured

# Per sample, the same in all views; the first four also in those that are not photographed.
# Deviation of the logarithm of the sRGB values' gain, cut at -2 and 1 deviations: white fur keeps its shading.
EXPOSURE_SPREAD = 0.13
GAMMA, PIVOT = (0.85, 1.4), 0.3  # sRGB values are raised to this power about PIVOT, which it leaves alone
WHITE_BALANCE_SPREAD = (0.045, 0.012)  # deviations of the logarithm: red against blue, green against both
COARSE_SENSOR, COARSE_SENSOR_PROBABILITY = (0.55, 0.95), 0.3  # share of the pixels along a side that the sensor had
NOISE = (0.004, 0.022)  # standard deviation of an opaque white pixel, 1 = white
NOISE_GRAIN = (0.3, 0.8)  # sigma of the noise's grain, pixels of the image itself
EDGE_WIDTH = (0.3, 1.8)  # of the mask's ramp from 0 to 1
BACKGROUND, BLACK_PROBABILITY = (0.05, 0.95), 0.3  # gray that bleeds into the rim; cut-outs often lie over black

# Per view.
VIEW_GAIN = 0.05  # the views' gains lie within 1 +- this
BLUR = (0.0, 0.9)  # sigma of the defocus
MOTION_BLUR, MOTION_BLUR_PROBABILITY = (0.4, 1.3), 0.3  # sigma along the motion, where the defocus' own is smaller
VEIL, VEIL_GRAY, VEIL_PROBABILITY = (0.04, 0.22), (0.5, 0.85), 0.35  # share and gray of light from a pane of glass
MASK_SHIFT = (-1.0, 1.5)  # how far the outline may move outwards, at most
MASK_SHIFT_MEAN = (-0.35, 0.6)  # mean over a view's outline; bumps about it, cut at MASK_SHIFT
MASK_BUMPS, BUMP_LENGTH = (0.2, 0.9), 9.0  # amplitude of the bumps, distance between their nodes
TAIL_LOSS_RADIUS, TAIL_LOSS_PROBABILITY = (6.0, 22.0), 0.08  # about the tail's end: thin parts vanish from the mask
HOLE_RADIUS, HOLE_PROBABILITY = (0.8, 2.0), 0.04
THIN = 3.0  # parts narrower than twice this are thin

# Recordings.
LENS_OVERSAMPLING = 2  # pixels of the straight rendering per pixel of the photograph and direction
LENS_NODES_PX = 8  # the lens is inverted on a grid this fine and interpolated by cubic splines: exact to 1e-6 px
READ_SHARE = 0.25  # of the noise's variance at white that a black pixel has
VIGNETTING, CAMERA_EXPOSURE, GAIN_SPREAD, TEXTURE = 0.25, 0.08, 0.15, 0.12


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

    @staticmethod
    def draw(rng: np.random.Generator) -> Camera:
        exposure = math.exp(EXPOSURE_SPREAD * float(np.clip(rng.normal(), -2, 1)))
        warm, green = np.clip(rng.normal(size=2), -2, 2) * WHITE_BALANCE_SPREAD
        gamma = float(rng.uniform(*GAMMA))
        coarse = float(rng.uniform(*COARSE_SENSOR)) if rng.random() < COARSE_SENSOR_PROBABILITY else 1.0
        black = rng.random() < BLACK_PROBABILITY
        background = np.zeros(3) if black else rng.uniform(*BACKGROUND) * np.exp(rng.normal(0, 0.05, 3))
        noise, grain, edge_width = (float(rng.uniform(*limits)) for limits in (NOISE, NOISE_GRAIN, EDGE_WIDTH))
        gain = (exposure * np.exp([warm - green, green, -warm - green])).astype(np.float32)
        return Camera(gain, gamma, coarse, noise, grain, edge_width, np.clip(background, 0, 1).astype(np.float32))

    def toned(self, color: np.ndarray) -> np.ndarray:
        """Returns sRGB colors [..., 3] 0..1 as the camera records them: its gamma about PIVOT, its gains."""
        return np.clip(PIVOT * (color / PIVOT) ** self.gamma * self.gain, 0, 1).astype(np.float32)

    def noise_on(self, color: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns a sensor's and a codec's noise [h, w, 3]: deviation noise_level(value), mostly common to channels."""
        height, width = color.shape[:2]
        noise = rng.standard_normal((height + 8, width + 8, 4), np.float32)
        kernel = np.exp(-0.5 * (np.arange(-2, 3) / self.grain) ** 2)
        kernel /= np.sqrt((kernel**2).sum())  # keeps the deviation
        noise = cv2.sepFilter2D(noise, -1, kernel, kernel)[4:-4, 4:-4]
        return (0.8 * noise[..., 3:] + 0.6 * noise[..., :3]) * noise_level(color, self.noise)


def noise_level(value: np.ndarray, at_white: float, read_share: float = 0.3) -> np.ndarray:
    """Returns the deviation of the noise at sRGB values 0..1: a fixed part and one that grows with the light."""
    return np.float32(at_white) * np.sqrt(read_share + (1 - read_share) * np.clip(value, 0, 1))


# ---- cut-out photographs --------------------------------------------------------------------------------------------


def photograph(sample: Sample, num_views: int, camera: Camera, rng: np.random.Generator) -> Sample:
    """The sample with its first num_views images photographed; later views, cameras and depth stay as they are.

    The animal's colors are expected to be `toned` already; rng decides everything else.
    `extra["photograph"]` tells shared settings and one entry per view.
    """
    tails = [None] * num_views
    if "keypoints" in sample.extra:
        point = torch.tensor(sample.extra["keypoints"][KEYPOINT_NAMES.index("TailEnd")], dtype=torch.float32)
        tails = sample.cameras.project(point.expand(len(sample.cameras), 1, 3))[0][:num_views, 0].numpy()
    rgba, views = sample.rgba.clone(), []
    for view, stream in enumerate(rng.spawn(num_views)):
        clean = np.ascontiguousarray(rgba[view].permute(1, 2, 0).numpy(), dtype=np.float32)
        image, done = photograph_view(clean, camera, stream, tails[view])
        rgba[view] = torch.from_numpy(image).permute(2, 0, 1)
        views.append(done)
    settings = {name: np.round(getattr(camera, name).astype(float), 4).tolist() for name in ("gain", "background")}
    settings |= {name: round(getattr(camera, name), 4) for name in ("gamma", "coarse", "noise", "grain", "edge_width")}
    return replace(sample, rgba=rgba, extra={**sample.extra, "photograph": {**settings, "views": views}})


def photograph_view(
    rgba: np.ndarray, camera: Camera, rng: np.random.Generator, tail_end: np.ndarray | None
) -> tuple[np.ndarray, dict]:
    """One image [h, w, 4] 0..1 straight alpha, float32 -> the photographed one and what was done (JSON-able).

    tail_end: [2] pixels. All that is drawn lies around the animal, so only its surroundings are worked on.
    """
    unit = max(rgba.shape[:2]) / REFERENCE_SIZE
    image = np.zeros_like(rgba)
    rows, columns = np.nonzero(rgba[..., 3].max(1) > 0)[0], np.nonzero(rgba[..., 3].max(0) > 0)[0]
    if len(rows) == 0:
        return image, {}
    margin = math.ceil(6 * unit)
    top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    window = (slice(top, rows[-1] + 1 + margin), slice(left, columns[-1] + 1 + margin))
    gain = 1 + rng.uniform(-VIEW_GAIN, VIEW_GAIN)
    kernel, sigmas = draw_blur(rng, unit)
    color, alpha = blurred(rgba[window], kernel, camera.coarse)
    color = np.clip(color * np.float32(gain), 0, 1)
    veil = 0.0
    if rng.random() < VEIL_PROBABILITY:  # a pane of glass before one side of a nearly level line reflects light
        (height, width), veil, gray = alpha.shape, rng.uniform(*VEIL), rng.uniform(*VEIL_GRAY)
        line, slope, side = rng.uniform(-0.1, 1.1) * height, rng.normal(0, 0.12), rng.choice([-1.0, 1.0])
        y = np.arange(height, dtype=np.float32)[:, None] - line - slope * np.arange(width, dtype=np.float32)
        share = np.float32(veil) * np.clip(0.5 + np.float32(side) * y / np.float32(1.5 * unit), 0, 1)[..., None]
        color = color * (1 - share) + np.float32(gray) * share
    mask, done = segmented(alpha, camera.edge_width, rng, unit, None if tail_end is None else tail_end - [left, top])
    # Where the mask reaches over the outline, the background fills it up.
    behind, seen = np.clip(mask - alpha, 0, 1)[..., None], np.minimum(alpha, mask)[..., None]
    color = (color * seen + camera.background * behind) / np.maximum(seen + behind, 1e-6)
    color = color + mask[..., None] * camera.noise_on(color, rng)
    image[window] = np.concatenate([np.clip(color, 0, 1), mask[..., None]], axis=2)
    return image, {"gain": round(float(gain), 4), "blur": sigmas, "veil": round(float(veil), 3), **done}


def draw_blur(rng: np.random.Generator, unit: float) -> tuple[np.ndarray, list[float]]:
    """Returns an anisotropic Gaussian kernel [k, k] of sum 1, and its two sigmas in reference pixels."""
    across = rng.uniform(*BLUR)
    along = across if rng.random() >= MOTION_BLUR_PROBABILITY else max(across, rng.uniform(*MOTION_BLUR))
    angle = rng.uniform(0, math.pi)
    reach = math.ceil(2.5 * along * unit)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    # A sigma of zero leaves the image alone: the kernel narrows to one pixel.
    kernel = np.exp(-0.5 * ((u / max(along * unit, 0.05)) ** 2 + (v / max(across * unit, 0.05)) ** 2))
    return (kernel / kernel.sum()).astype(np.float32), [round(float(along), 3), round(float(across), 3)]


def blurred(rgba: np.ndarray, kernel: np.ndarray, coarse: float) -> tuple[np.ndarray, np.ndarray]:
    """Straight rgba [h, w, 4] -> straight colors [h, w, 3] and alpha [h, w] behind a lens and a coarse sensor.

    Filters premultiplied colors and divides by the filtered alpha: an animal of one color keeps it up to its rim.
    """
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
    return np.clip(premultiplied[..., :3] / np.maximum(alpha, 1e-4)[..., None], 0, 1), alpha


def segmented(
    alpha: np.ndarray, edge_width: float, rng: np.random.Generator, unit: float, tail_end: np.ndarray | None
) -> tuple[np.ndarray, dict]:
    """Returns a segmentation's mask for the true alpha [h, w], and its faults."""
    mean, bumps = rng.uniform(*MASK_SHIFT_MEAN), rng.uniform(*MASK_BUMPS)
    (height, width), length = alpha.shape, BUMP_LENGTH * unit
    nodes = rng.standard_normal((math.ceil(height / length) + 3, math.ceil(width / length) + 3), np.float32)
    fine = (round(nodes.shape[1] * length), round(nodes.shape[0] * length))
    first = round(length)  # the spline's rim is left out
    field = cv2.resize(nodes, fine, interpolation=cv2.INTER_CUBIC)[first : first + height, first : first + width]
    inside = (alpha >= 0.5).astype(np.uint8)
    out = cv2.distanceTransform(1 - inside, cv2.DIST_L2, cv2.DIST_MASK_5)
    into = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_5)
    distance = np.where(inside > 0, into - 0.5, 0.5 - out)
    # Within one pixel of the outline its place is known to a part of a pixel, from the alpha.
    distance = np.where(np.abs(distance) <= 0.51, alpha - 0.5, distance)
    shift = np.clip(mean + bumps * field, *MASK_SHIFT)
    mask = np.clip(0.5 + (distance + unit * shift) / max(edge_width * unit, 0.3), 0, 1).astype(np.float32)
    done = {"mask_shift": round(float(mean), 3), "mask_bumps": round(float(bumps), 3)}
    if rng.random() < TAIL_LOSS_PROBABILITY and tail_end is not None:
        radius, reach = rng.uniform(*TAIL_LOSS_RADIUS), max(round(THIN * unit), 1)
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        body = cv2.dilate(cv2.morphologyEx((alpha > 0.5).astype(np.uint8), cv2.MORPH_OPEN, disc), disc)
        mask = mask * (1 - (body == 0) * _disc(alpha.shape, tail_end, radius * unit))
        done["tail_lost"] = round(float(radius), 2)
    if rng.random() < HOLE_PROBABILITY:
        places = np.argwhere(alpha > 0.9)
        radius = rng.uniform(*HOLE_RADIUS)
        if len(places):
            mask = mask * (1 - _disc(alpha.shape, places[rng.integers(len(places))][::-1] + 0.5, radius * unit))
            done["hole"] = round(float(radius), 2)
    return mask, done


def _disc(shape: tuple[int, int], center: np.ndarray, radius: float) -> np.ndarray:
    """[h, w] 1 inside a disc about center (x, y), pixels, with a ramp of one pixel."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.clip(radius + 0.5 - np.hypot(x + 0.5 - center[0], y + 0.5 - center[1]), 0, 1).astype(np.float32)


# ---- recordings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordingConditions:
    """background: gray behind the animal, 0..1. noise: standard deviation of a white pixel, in levels of 255.

    uneven_light: a smooth gain and an exposure per camera, dark corners, a textured wall instead of plain gray.
    """

    background: float = 0.8
    noise: float = 0.0
    uneven_light: bool = False
    seed: int = 0


class RecordingCameras:
    """Photographs of whole scenes, as a calibration's cameras take them.

    render: (cloud, cameras [v]) -> (rgb [v, 3, h, w] over black, alpha [v, 1, h, w], anything else).
    """

    def __init__(self, calibration: Calibration, render: Callable, conditions: RecordingConditions) -> None:
        if len(set(calibration.sizes)) != 1 or calibration.sizes[0] is None:
            raise ValueError(
                f"{calibration.source}: the cameras must share one known image size, got {calibration.sizes}"
            )
        self._render, self._conditions = render, conditions
        self.size = calibration.sizes[0]  # (w, h) of the photographs
        if has_lens(calibration):
            self._cameras, self._lenses = _lens_maps(calibration)
        else:
            self._cameras, self._lenses = calibration.cameras().to(torch.float32), []
        self._walls, self._gains = conditions.background, None
        if conditions.uneven_light:
            walls, gains = zip(*(_room(self.size, conditions, camera) for camera in range(len(calibration))))
            self._walls, self._gains = torch.stack(walls), torch.stack(gains)

    def photograph(self, cloud: SplatCloud, frame: int) -> tuple[Tensor, Tensor]:
        """Returns images [v, 3, h, w] 0..1 and masks [v, 1, h, w] 0 or 1."""
        rgb, alpha = self._render(cloud, self._cameras)[:2]
        if self._lenses:
            bent = []
            for image, table in zip(torch.cat([rgb, alpha], dim=1), self._lenses, strict=True):
                image = image.permute(1, 2, 0).contiguous().numpy()
                fine = cv2.remap(image, table[..., 0], table[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT)
                bent.append(torch.from_numpy(cv2.resize(fine, self.size, interpolation=cv2.INTER_AREA)))
            rgb, alpha = torch.stack(bent).permute(0, 3, 1, 2).clamp(0, 1).split([3, 1], dim=1)
        images = rgb + self._walls * (1.0 - alpha)
        if self._gains is not None:
            images = (images * self._gains).clamp(0, 1)
        if self._conditions.noise:  # photon noise, whose variance grows with the light, and the sensor's own
            for camera, image in enumerate(images):
                rng = np.random.default_rng(np.random.SeedSequence([self._conditions.seed, 5, frame, camera]))
                level = noise_level(image.numpy(), self._conditions.noise / 255.0, READ_SHARE)
                noise = level * rng.standard_normal(image.shape, np.float32)
                images[camera] = (image + torch.from_numpy(noise)).clamp(0, 1)
        return images, (alpha >= 0.5).float()


def has_lens(calibration: Calibration) -> bool:
    """Whether the cameras are more than plain pinholes: lens distortion or skew."""
    return bool(np.any(calibration.distortion) or np.any(calibration.K[:, 0, 1]))


def _lens_maps(calibration: Calibration) -> tuple[Cameras, list[np.ndarray]]:
    """Returns pinholes [v] to render with, larger and finer than the photographs, and per camera what bends them.

    Each photograph's pixel is the mean of LENS_OVERSAMPLING^2 points, looked up through the inverse of the lens model:
    tables [over h, over w, 2] of places in the pinholes' images, for cv2.remap.
    """
    from scipy.interpolate import RectBivariateSpline

    over, (width, height) = LENS_OVERSAMPLING, calibration.sizes[0]
    columns, rows = (np.linspace(0, side, max(side // LENS_NODES_PX, 8)) for side in (width, height))
    fine_rows, fine_columns = ((np.arange(over * side) + 0.5) / over for side in (height, width))
    nodes = np.stack(np.meshgrid(columns, rows), axis=-1)
    fields = []
    for camera in range(len(calibration)):
        known = calibration.to_normalised(camera, nodes.reshape(-1, 2)).reshape(nodes.shape)
        splines = (RectBivariateSpline(rows, columns, known[..., axis]) for axis in range(2))
        fields.append(np.stack([spline(fine_rows, fine_columns) for spline in splines], axis=-1))
    focal = over * calibration.K[:, [0, 1], [0, 1]]  # [v, 2]
    lower = np.stack([field.min(axis=(0, 1)) for field in fields]) * focal - 4.0  # a margin for the cubic filter
    upper = np.stack([field.max(axis=(0, 1)) for field in fields]) * focal + 4.0
    wide, high = (int(side) for side in np.ceil((upper - lower).max(axis=0)))
    values = torch.from_numpy(np.concatenate([focal, -lower], axis=1))
    cameras = Cameras.from_w2c(torch.from_numpy(calibration.w2c), values, high, wide).to(torch.float32)
    return cameras, [(field * f - low - 0.5).astype(np.float32) for field, f, low in zip(fields, focal, lower)]


def _room(size: tuple[int, int], conditions: RecordingConditions, camera: int) -> tuple[Tensor, Tensor]:
    """Returns a camera's wall [3, h, w] (blotches of several sizes, a tint) and gain [1, h, w]; both stand still."""

    def smooth(rng: np.random.Generator, cells: int) -> np.ndarray:
        return np.clip(cv2.resize(rng.uniform(-1, 1, (cells, cells)), size, interpolation=cv2.INTER_CUBIC), -1.2, 1.2)

    walls, lights = (np.random.default_rng(np.random.SeedSequence([conditions.seed, k, camera])) for k in (6, 7))
    blotches = sum(smooth(walls, cells) * share for cells, share in ((4, 0.5), (12, 0.3), (60, 0.2)))
    tint = 1 + walls.uniform(-0.03, 0.03, (3, 1, 1))
    wall = np.clip(conditions.background * (1 + TEXTURE * blotches) * tint, 0, 1)
    y, x = np.mgrid[: size[1], : size[0]] + 0.5
    radius = np.hypot(x - size[0] / 2, y - size[1] / 2) / np.hypot(size[0] / 2, size[1] / 2)
    gain = 1 + GAIN_SPREAD * smooth(lights, 3)
    gain = gain * (1 + lights.uniform(-CAMERA_EXPOSURE, CAMERA_EXPOSURE)) * (1 - VIGNETTING * radius**2)
    return torch.from_numpy(wall).float(), torch.from_numpy(gain).float()[None]
