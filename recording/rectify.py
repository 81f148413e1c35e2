"""The exact warp of a photograph to a camera at the same place that looks elsewhere.

Turning a camera about its own centre moves every pixel by a homography, whatever the depth of what it shows, so nothing
is approximated: x_photo ~ K_photo R_photo R_true^T K_true^-1 x_picture. With lens distortion the same map goes through
the lens model. Pictures and masks are warped together, premultiplied, so that no background bleeds into the animal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from recording.calibration import Calibration, valid_radius
from recording.masks import Silhouette

MAX_OVERSAMPLING = 4
TAP_STEP = 1.5
RIM = 6  # picture pixels around the mask: the filter's reach, and that of the colour carried over the rim
SOURCE_RIM = 4  # photograph pixels around the mask that the filter may read
MAP_STEP = 8  # fine pixels between the points at which the lens model is evaluated; between them the map is straight
TRANSPARENT_WHITE = np.array([255, 255, 255, 0], np.uint8).view(np.uint32)[0]  # a pixel at once


@dataclass(frozen=True)
class Cutout:
    """What of a square picture is not white and transparent. rgba: [h, w, 4] uint8 straight; its corner is (x, y)."""

    rgba: np.ndarray
    x: int
    y: int
    size: int

    def full(self) -> np.ndarray:
        """[size, size, 4] uint8."""
        picture = np.full((self.size, self.size, 4), 255, np.uint8)
        picture[..., 3] = 0
        picture[self.y : self.y + self.rgba.shape[0], self.x : self.x + self.rgba.shape[1]] = self.rgba
        return picture


def rectify(
    calibration: Calibration,
    camera: int,
    colours: np.ndarray,
    mask: Silhouette,
    *,
    rotation: np.ndarray,
    focal_px: float,
    size: int,
    bgr: bool = False,
    box: np.ndarray | None = None,
) -> Cutout:
    """The photograph's colours in its mask's window -> the animal in a square picture, straight alpha.

    colours: [h, w, 3] uint8, RGB, or BGR with `bgr`. rotation: [3, 3] world to the new camera's axes. focal_px: its
    focal length; its principal point is the centre. Only the part around the mask is computed: box [4], one of
    `picture_boxes`, found here if left out. Raises ValueError for colours of another size than the window.
    """
    import cv2

    if colours.shape != (*mask.window.shape, 3):
        raise ValueError(f"colours must be the mask's window, {[*mask.window.shape, 3]}, got {list(colours.shape)}")
    # Photograph pixels per picture pixel: so many samples per pixel and direction, averaged, that they lie at most
    # TAP_STEP apart, avoid aliasing. They are read by straight interpolation, which reaches two pixels far: a cubic
    # filter rings at the mask's rim, and costs 1 dB and twice the time.
    step = float(calibration.K[camera, 0, 0]) / focal_px
    over = min(max(math.ceil(step / TAP_STEP), 1), MAX_OVERSAMPLING)
    if box is None:
        window = np.array([[mask.x, mask.y, *mask.window.shape[::-1]]])
        box = picture_boxes(calibration, camera, window, rotation[None], np.array([focal_px]), size)[0]
    left, top, width, height = (int(value) for value in box)
    if width == 0:
        return Cutout(np.zeros((0, 0, 4), np.uint8), 0, 0, size)
    premultiplied, corner = _premultiplied(colours, mask, bgr)
    fine = (width * over, height * over)
    to_photo = photo_from_picture(calibration, camera, rotation, focal_px * over, size * over)
    to_photo = to_photo @ np.array([[1.0, 0.0, left * over], [0.0, 1.0, top * over], [0.0, 0.0, 1.0]])
    if np.any(calibration.distortion[camera]):
        columns, rows = lens_maps(calibration, camera, to_photo, *fine)
        columns -= corner[0]
        rows -= corner[1]
        warped = cv2.remap(premultiplied, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    else:
        K = calibration.K[camera].copy()
        K[:2, 2] -= [corner[0] + 0.5, corner[1] + 0.5]  # OpenCV's warps count pixel centres from 0
        to_centre = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
        warped = cv2.warpPerspective(
            premultiplied, K @ to_photo @ to_centre, fine, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
        )  # fmt: skip
    if over > 1:
        warped = cv2.resize(warped, (width, height), interpolation=cv2.INTER_AREA)
    return Cutout(_straight(warped), left, top, size)


def picture_boxes(
    calibration: Calibration, camera: int, windows: np.ndarray, rotations: np.ndarray, focal_px: np.ndarray, size: int
) -> np.ndarray:
    """[t, 4] left, top, width, height of the parts of the pictures that masks can reach; width 0 if they reach none.

    windows: [t, 4] x, y, width, height of the masks in the photographs. rotations, focal_px: as for `rectify`, [t].
    """
    # Along the border of the mask's box, not its corners alone: a lens bends straight lines.
    share = np.linspace(0.0, 1.0, 5)
    none, all_ = 0 * share, 0 * share + 1
    around = np.concatenate(
        [np.stack(pair, -1) for pair in ((share, none), (share, all_), (none, share), (all_, share))]
    )
    border = windows[:, None, :2] + around * windows[:, None, 2:]
    points = np.einsum(
        "tij,tnj->tni", rotations, calibration.rays(camera, border.reshape(-1, 2)).reshape(*border.shape[:2], 3)
    )
    behind = (points[..., 2] <= 0).any(axis=1)
    points[behind] = [0.0, 0.0, 1.0]
    seen = points[..., :2] / points[..., 2:] * focal_px[:, None, None] + size / 2
    low = np.clip(np.floor(seen.min(axis=1)).astype(int) - RIM, 0, size)
    high = np.clip(np.ceil(seen.max(axis=1)).astype(int) + RIM, 0, size)
    low[behind], high[behind] = 0, size
    sides = (high - low) * (high > low).all(axis=1, keepdims=True)
    return np.concatenate([low, sides], axis=1)


def _premultiplied(colours: np.ndarray, mask: Silhouette, bgr: bool) -> tuple[np.ndarray, tuple[int, int]]:
    """The photograph's animal, [h, w, 4] uint8, RGB times alpha, and the pixel of its corner."""
    from recording.kernels import cut

    height, width = mask.window.shape
    x, y = max(mask.x - SOURCE_RIM, 0), max(mask.y - SOURCE_RIM, 0)
    right = min(mask.x + width + SOURCE_RIM, mask.size[0])
    bottom = min(mask.y + height + SOURCE_RIM, mask.size[1])
    result = np.zeros((bottom - y, right - x, 4), np.uint8)
    cut(colours, mask.window, bgr, result, mask.x - x, mask.y - y)
    return result, (x, y)


def photo_from_picture(
    calibration: Calibration, camera: int, rotation: np.ndarray, focal_px: float, size: int
) -> np.ndarray:
    """[3, 3] homogeneous: picture pixel (outer-corner origin) -> normalised coordinates of the photograph's camera."""
    inverse_K = np.array(
        [[1.0 / focal_px, 0.0, -0.5 * size / focal_px], [0.0, 1.0 / focal_px, -0.5 * size / focal_px], [0.0, 0.0, 1.0]]
    )
    return calibration.w2c[camera, :3, :3] @ rotation.T @ inverse_K


def lens_maps(calibration: Calibration, camera: int, pixel_to_photo: np.ndarray, width: int, height: int):
    """cv2.remap tables [height, width] through the lens model, exact every MAP_STEP pixels and straight between."""
    import cv2

    cells = (-(-width // MAP_STEP) + 2, -(-height // MAP_STEP) + 2)
    # Cell centres, one cell before the picture and one after it, as cv2.resize interpolates.
    across, down = ((np.arange(count) - 0.5) * MAP_STEP for count in cells)
    u, v = np.meshgrid(across, down)
    points = np.stack([u, v, np.ones_like(u)], axis=-1) @ pixel_to_photo.T
    normalised = points[..., :2] / points[..., 2:]
    pixels = calibration.to_pixels(camera, normalised)
    outside = points[..., 2] <= 0
    outside |= np.linalg.norm(normalised, axis=-1) > valid_radius(calibration.distortion[camera])
    pixels[outside] = -1e4
    fine = cv2.resize(
        pixels.astype(np.float32) - 0.5, (cells[0] * MAP_STEP, cells[1] * MAP_STEP), interpolation=cv2.INTER_LINEAR
    )
    fine = fine[MAP_STEP : MAP_STEP + height, MAP_STEP : MAP_STEP + width]
    return np.ascontiguousarray(fine[..., 0]), np.ascontiguousarray(fine[..., 1])


def _straight(premultiplied: np.ndarray) -> np.ndarray:
    """Premultiplied RGBA [h, w, 4] uint8 -> straight uint8.

    Where alpha is 0 the colour is the nearest animal's, then white, so that a later resize mixes in no dark rim.
    """
    import cv2

    from recording.kernels import straighten

    result = np.empty_like(premultiplied)
    straighten(premultiplied, cv2.blur(premultiplied, (9, 9), borderType=cv2.BORDER_CONSTANT), result)
    return result
