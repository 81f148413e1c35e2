"""One camera simulator: what lenses, sensors, light and segmentations add to clean renderings.

Samples become cut-out photographs (`photograph`): exposure, gamma and white balance are one per animal and belong to
its colors (`Camera.toned`), so that views which nobody photographed agree with those that were; the rest comes per
view, in the order in which it happens. Raw recordings (`recording_cameras`) see the whole image, with the true mask.
Everything is a function of the seed, the frame and the camera.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

from multiview.cameras import Cameras
from multiview.sample import Sample
from recording.calibration.model import Calibration
from synthetic.scene import KEYPOINT_NAMES, SplatCloud

PIVOT = 0.3  # the sRGB value that a camera's gamma leaves alone
MASK_SHIFT = (-1.0, 1.5)  # how far the outline may move outwards, at most
TAIL_LOSS_PROBABILITY, HOLE_RADIUS = 0.08, (0.8, 2.0)
LENS_OVERSAMPLING = 2  # pixels of the straight rendering per pixel of the photograph and direction


class Camera(SimpleNamespace):
    """What one sample's cameras have in common.

    gain: [3] and gamma of the colors; coarse: share of the sensor's pixels along a side; noise: deviation at opaque
    white, grain: its sigma, pixels; edge_width: of the mask's ramp; background: [3] gray behind the animal.
    """

    @staticmethod
    def draw(rng: np.random.Generator) -> "Camera":
        # Deviations of the logarithms; the exposure's is cut so that white fur keeps its shading.
        exposure = math.exp(0.13 * float(np.clip(rng.normal(), -2, 1)))
        warm, green = np.clip(rng.normal(size=2), -2, 2) * (0.045, 0.012)  # red against blue, green against both
        camera = Camera(gain=(exposure * np.exp([warm - green, green, -warm - green])).astype(np.float32))
        camera.gamma = float(rng.uniform(0.85, 1.4))
        camera.coarse = float(rng.uniform(0.55, 0.95)) if rng.random() < 0.3 else 1.0
        black = rng.random() < 0.3  # cut-outs often lie over black; else over a gray that bleeds into the rim
        background = np.zeros(3) if black else rng.uniform(0.05, 0.95) * np.exp(rng.normal(0, 0.05, 3))
        camera.background = np.clip(background, 0, 1).astype(np.float32)
        for name, limits in {"noise": (0.004, 0.022), "grain": (0.3, 0.8), "edge_width": (0.3, 1.8)}.items():
            setattr(camera, name, float(rng.uniform(*limits)))
        return camera

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
    """Returns the deviation of the noise at sRGB values 0..1; read_share of the variance does not grow with light."""
    return np.float32(at_white) * np.sqrt(read_share + (1 - read_share) * np.clip(value, 0, 1))


def photograph(sample: Sample, num_views: int, camera: Camera, rng: np.random.Generator) -> Sample:
    """Photographs the first num_views images of a sample of `toned` colors; `extra["photograph"]` tells what it did."""
    point = torch.tensor(sample.extra["keypoints"][KEYPOINT_NAMES.index("TailEnd")], dtype=torch.float32)
    tails = sample.cameras.project(point.expand(len(sample.cameras), 1, 3))[0][:, 0].numpy()
    rgba, views = sample.rgba.clone(), []
    for view, stream in enumerate(rng.spawn(num_views)):
        clean = np.ascontiguousarray(rgba[view].permute(1, 2, 0).numpy(), dtype=np.float32)
        image, done = photograph_view(clean, camera, stream, tails[view])
        rgba[view] = torch.from_numpy(image).permute(2, 0, 1)
        views.append(done)
    shared = {name: np.round(getattr(camera, name).astype(float), 4).tolist() for name in ("gain", "background")}
    shared |= {name: round(getattr(camera, name), 4) for name in ("gamma", "coarse", "noise", "grain", "edge_width")}
    return replace(sample, rgba=rgba, extra={**sample.extra, "photograph": {**shared, "views": views}})


def photograph_view(
    rgba: np.ndarray, camera: Camera, rng: np.random.Generator, tail_end: np.ndarray
) -> tuple[np.ndarray, dict]:
    """Image [h, w, 4] 0..1, straight alpha, float32 -> the photographed one and what was done. tail_end: [2] pixels."""
    unit = max(rgba.shape[:2]) / 128  # all lengths are given for an image of 128 pixels and grow with it
    image = np.zeros_like(rgba)
    rows, columns = np.nonzero(rgba[..., 3].max(1) > 0)[0], np.nonzero(rgba[..., 3].max(0) > 0)[0]
    if len(rows) == 0:
        return image, {}
    margin = math.ceil(6 * unit)  # only the animal's surroundings are worked on
    top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    window = (slice(top, rows[-1] + 1 + margin), slice(left, columns[-1] + 1 + margin))
    # Sigmas of the defocus and, in some views, of a stronger blur along the motion.
    gain, across = 1 + rng.uniform(-0.05, 0.05), rng.uniform(0.0, 0.9)
    along = across if rng.random() >= 0.3 else max(across, rng.uniform(0.4, 1.3))
    angle, reach = rng.uniform(0, math.pi), math.ceil(2.5 * along * unit)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    # A sigma of zero leaves the image alone: the kernel narrows to one pixel.
    kernel = np.exp(-0.5 * ((u / max(along * unit, 0.05)) ** 2 + (v / max(across * unit, 0.05)) ** 2))
    color, alpha = blurred(rgba[window], (kernel / kernel.sum()).astype(np.float32), camera.coarse)
    color, veil = np.clip(color * np.float32(gain), 0, 1), 0.0
    if rng.random() < 0.35:  # a pane of glass before one side of a nearly level line reflects light
        (height, width), veil, gray = alpha.shape, rng.uniform(0.04, 0.22), rng.uniform(0.5, 0.85)
        line, slope, side = rng.uniform(-0.1, 1.1) * height, rng.normal(0, 0.12), rng.choice([-1.0, 1.0])
        y = np.arange(height, dtype=np.float32)[:, None] - line - slope * np.arange(width, dtype=np.float32)
        share = np.float32(veil) * np.clip(0.5 + np.float32(side) * y / np.float32(1.5 * unit), 0, 1)[..., None]
        color = color * (1 - share) + np.float32(gray) * share
    mask, done = segmented(alpha, camera.edge_width, rng, unit, tail_end - [left, top])
    # Where the mask reaches over the outline, the background fills it up.
    behind, seen = np.clip(mask - alpha, 0, 1)[..., None], np.minimum(alpha, mask)[..., None]
    color = (color * seen + camera.background * behind) / np.maximum(seen + behind, 1e-6)
    color = color + mask[..., None] * camera.noise_on(color, rng)
    image[window] = np.concatenate([np.clip(color, 0, 1), mask[..., None]], axis=2)
    lens = {"gain": round(gain, 4), "blur": [round(along, 3), round(across, 3)], "veil": round(veil, 3)}
    return image, lens | done


def blurred(rgba: np.ndarray, kernel: np.ndarray, coarse: float) -> tuple[np.ndarray, np.ndarray]:
    """Straight rgba [h, w, 4] -> straight colors [h, w, 3] and alpha [h, w] behind a lens and a coarse sensor."""
    premultiplied = rgba.copy()  # filtered so, an animal of one color keeps it up to its rim
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
    alpha: np.ndarray, edge_width: float, rng: np.random.Generator, unit: float, tail_end: np.ndarray
) -> tuple[np.ndarray, dict]:
    """Returns a segmentation's mask for the true alpha [h, w], and its faults. unit: pixels per reference pixel."""
    # The outline moves outwards by a mean and bumps about it, whose nodes are 9 reference pixels apart.
    mean, bumps = rng.uniform(-0.35, 0.6), rng.uniform(0.2, 0.9)
    (height, width), length = alpha.shape, 9.0 * unit
    nodes = rng.standard_normal((math.ceil(height / length) + 3, math.ceil(width / length) + 3), np.float32)
    fine, first = [round(count * length) for count in nodes.shape[::-1]], round(length)  # the spline's rim is left out
    field = cv2.resize(nodes, fine, interpolation=cv2.INTER_CUBIC)[first : first + height, first : first + width]
    inside = (alpha >= 0.5).astype(np.uint8)
    out, into = (cv2.distanceTransform(part, cv2.DIST_L2, cv2.DIST_MASK_5) for part in (1 - inside, inside))
    distance = np.where(inside > 0, into - 0.5, 0.5 - out)
    # Within one pixel of the outline its place is known to a part of a pixel, from the alpha.
    distance = np.where(np.abs(distance) <= 0.51, alpha - 0.5, distance)
    shift = np.clip(mean + bumps * field, *MASK_SHIFT)
    mask = np.clip(0.5 + (distance + unit * shift) / max(edge_width * unit, 0.3), 0, 1).astype(np.float32)
    done = {"mask_shift": round(float(mean), 3), "mask_bumps": round(float(bumps), 3)}
    if rng.random() < TAIL_LOSS_PROBABILITY:
        # About the tail's end, parts thinner than twice 3 reference pixels vanish.
        radius, reach = rng.uniform(6.0, 22.0), max(round(3.0 * unit), 1)
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        body = cv2.dilate(cv2.morphologyEx((alpha > 0.5).astype(np.uint8), cv2.MORPH_OPEN, disc), disc)
        mask = mask * (1 - (body == 0) * _disc(alpha.shape, tail_end, radius * unit))
        done["tail_lost"] = round(float(radius), 2)
    if rng.random() < 0.04:
        places, radius = np.argwhere(alpha > 0.9), rng.uniform(*HOLE_RADIUS)
        if len(places):
            mask = mask * (1 - _disc(alpha.shape, places[rng.integers(len(places))][::-1] + 0.5, radius * unit))
            done["hole"] = round(float(radius), 2)
    return mask, done


def _disc(shape: tuple[int, int], center: np.ndarray, radius: float) -> np.ndarray:
    """[h, w] 1 inside a disc about center (x, y), pixels, with a ramp of one pixel."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.clip(radius + 0.5 - np.hypot(x + 0.5 - center[0], y + 0.5 - center[1]), 0, 1).astype(np.float32)


def recording_cameras(
    calibration: Calibration, render: Callable, *,
    background: float = 0.8, noise: float = 0.0, uneven_light: bool = False, seed: int = 0,
) -> Callable[[SplatCloud, int], tuple[Tensor, Tensor]]:  # fmt: skip
    """Returns what photographs whole scenes as a calibration's cameras do.

    render: (cloud, cameras [v]) -> (rgb [v, 3, h, w] over black, alpha [v, 1, h, w], anything else). The result takes
    a cloud and its frame's number and gives images [v, 3, h, w] 0..1 and masks [v, 1, h, w] 0 or 1.
    background: gray behind the animal, 0..1. noise: standard deviation of a white pixel, in levels of 255.
    uneven_light: a smooth gain and an exposure per camera, dark corners, a textured wall instead of plain gray.
    """
    size = calibration.sizes[0]
    if len(set(calibration.sizes)) != 1 or size is None:
        raise ValueError(f"{calibration.source}: the cameras must share one known image size, got {calibration.sizes}")
    if has_lens(calibration):
        cameras, lenses = _lens_maps(calibration)
    else:
        cameras, lenses = calibration.cameras().to(torch.float32), []
    walls, gains = background, None
    if uneven_light:
        rooms = [_room(size, background, seed, camera) for camera in range(len(calibration))]
        walls, gains = (torch.stack(parts) for parts in zip(*rooms))

    def photograph(cloud: SplatCloud, frame: int) -> tuple[Tensor, Tensor]:
        rgb, alpha = render(cloud, cameras)[:2]
        if lenses:
            bent = []
            for image, table in zip(torch.cat([rgb, alpha], dim=1), lenses, strict=True):
                image = image.permute(1, 2, 0).contiguous().numpy()
                fine = cv2.remap(image, table[..., 0], table[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT)
                bent.append(torch.from_numpy(cv2.resize(fine, size, interpolation=cv2.INTER_AREA)))
            rgb, alpha = torch.stack(bent).permute(0, 3, 1, 2).clamp(0, 1).split([3, 1], dim=1)
        images = rgb + walls * (1.0 - alpha)
        if gains is not None:
            images = (images * gains).clamp(0, 1)
        if noise:  # photon noise, whose variance grows with the light, and the sensor's own
            for camera, image in enumerate(images):
                rng = np.random.default_rng(np.random.SeedSequence([seed, 5, frame, camera]))
                level = noise_level(image.numpy(), noise / 255.0, 0.25)
                drawn = level * rng.standard_normal(image.shape, np.float32)
                images[camera] = (image + torch.from_numpy(drawn)).clamp(0, 1)
        return images, (alpha >= 0.5).float()

    return photograph


def has_lens(calibration: Calibration) -> bool:
    """Whether the cameras are more than plain pinholes: lens distortion or skew."""
    return bool(np.any(calibration.distortion) or np.any(calibration.K[:, 0, 1]))


def _lens_maps(calibration: Calibration) -> tuple[Cameras, list[np.ndarray]]:
    """Returns finer pinholes [v] to render with and, for cv2.remap, where each photograph's points lie in them."""
    over, (width, height) = LENS_OVERSAMPLING, calibration.sizes[0]
    # Inverted every 8 pixels and interpolated by cubic splines: exact to 1e-6 px.
    columns, rows = (np.linspace(0, side, max(side // 8, 8)) for side in (width, height))
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


def _room(size: tuple[int, int], background: float, seed: int, camera: int) -> tuple[Tensor, Tensor]:
    """Returns a camera's wall [3, h, w] (blotches of several sizes, a tint) and gain [1, h, w]; both stand still."""

    def smooth(rng: np.random.Generator, cells: int) -> np.ndarray:
        return np.clip(cv2.resize(rng.uniform(-1, 1, (cells, cells)), size, interpolation=cv2.INTER_CUBIC), -1.2, 1.2)

    walls, lights = (np.random.default_rng(np.random.SeedSequence([seed, k, camera])) for k in (6, 7))
    blotches = sum(smooth(walls, cells) * share for cells, share in ((4, 0.5), (12, 0.3), (60, 0.2)))
    tint = 1 + walls.uniform(-0.03, 0.03, (3, 1, 1))
    wall = np.clip(background * (1 + 0.12 * blotches) * tint, 0, 1)
    y, x = np.mgrid[: size[1], : size[0]] + 0.5
    radius = np.hypot(x - size[0] / 2, y - size[1] / 2) / np.hypot(size[0] / 2, size[1] / 2)
    gain = (1 + 0.15 * smooth(lights, 3)) * (1 + lights.uniform(-0.08, 0.08)) * (1 - 0.25 * radius**2)
    return torch.from_numpy(wall).float(), torch.from_numpy(gain).float()[None]
