"""The exact warp of a photograph to a camera at the same place that looks elsewhere.

Turning a camera about its own centre moves every pixel by a homography, whatever the depth of what it shows, so nothing
is approximated: x_photo ~ K_photo R_photo R_true^T K_true^-1 x_picture. With lens distortion the same map goes through
the lens model. Pictures and masks are warped together, premultiplied, so that no background bleeds into the animal.
"""

from __future__ import annotations

import math

import numpy as np

from multiview.recording.calibration import Calibration

MAX_OVERSAMPLING = 4


def rectify(
    calibration: Calibration,
    camera: int,
    picture: np.ndarray,
    mask: np.ndarray,
    *,
    rotation: np.ndarray,
    focal_px: float,
    size: int,
) -> np.ndarray:
    """Photograph [h, w, 3] uint8 and mask [h, w] bool of one camera -> RGBA [4, size, size] float32, 0..1, straight.

    rotation: [3, 3] world to the new camera's axes. focal_px: its focal length; its principal point is the centre.
    """
    import cv2

    # Photograph pixels per picture pixel: so many samples per pixel and direction, averaged, avoid aliasing.
    step = float(calibration.K[camera, 0, 0]) / focal_px
    over = min(max(math.ceil(step), 1), MAX_OVERSAMPLING) if step > 1.0 else 1
    fine, focal = size * over, focal_px * over
    window = _window(mask)
    premultiplied = np.empty((window[3] - window[1], window[2] - window[0], 4), dtype=np.float32)
    opaque = mask[window[1] : window[3], window[0] : window[2]].astype(np.float32)
    premultiplied[..., :3] = picture[window[1] : window[3], window[0] : window[2]]
    premultiplied[..., :3] *= opaque[..., None]
    premultiplied[..., 3] = 255.0 * opaque
    pixel_to_photo = photo_from_picture(calibration, camera, rotation, focal, fine)
    if np.any(calibration.distortion[camera]):
        maps = _maps(calibration, camera, pixel_to_photo, fine)
        warped = cv2.remap(
            premultiplied, maps[0] - window[0], maps[1] - window[1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT
        )
    else:
        K = calibration.K[camera].copy()
        K[:2, 2] -= [window[0] + 0.5, window[1] + 0.5]  # OpenCV's warps count pixel centres from 0
        to_centre = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
        warped = cv2.warpPerspective(
            premultiplied, K @ pixel_to_photo @ to_centre, (fine, fine), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
        )  # fmt: skip
    if over > 1:
        warped = cv2.resize(warped, (size, size), interpolation=cv2.INTER_AREA)
    return _straight(warped)


def photo_from_picture(
    calibration: Calibration, camera: int, rotation: np.ndarray, focal_px: float, size: int
) -> np.ndarray:
    """[3, 3] homogeneous: picture pixel (outer-corner origin) -> normalised coordinates of the photograph's camera."""
    inverse_K = np.array(
        [[1.0 / focal_px, 0.0, -0.5 * size / focal_px], [0.0, 1.0 / focal_px, -0.5 * size / focal_px], [0.0, 0.0, 1.0]]
    )
    return calibration.w2c[camera, :3, :3] @ rotation.T @ inverse_K


def _maps(calibration: Calibration, camera: int, pixel_to_photo: np.ndarray, size: int):
    """cv2.remap tables through the lens model."""
    centres = np.arange(size) + 0.5
    v, u = np.meshgrid(centres, centres, indexing="ij")
    points = np.stack([u, v, np.ones_like(u)], axis=-1) @ pixel_to_photo.T
    normalised = points[..., :2] / points[..., 2:]
    pixels = calibration.to_pixels(camera, normalised)
    outside = points[..., 2] <= 0
    outside |= np.linalg.norm(normalised, axis=-1) > valid_radius(calibration.distortion[camera])
    pixels[outside] = -1e4
    return (pixels[..., 0] - 0.5).astype(np.float32), (pixels[..., 1] - 0.5).astype(np.float32)


def valid_radius(distortion: np.ndarray) -> float:
    """The normalised radius up to which the radial lens model grows; beyond it the model folds back inwards."""
    k1, k2, _, _, k3 = distortion
    squares = np.linspace(0.0, 4.0, 4001)
    slope = 1 + squares * (3 * k1 + squares * (5 * k2 + squares * 7 * k3))  # derivative of r (1 + k1 r^2 + ...)
    falling = np.flatnonzero(slope <= 0)
    return float(np.sqrt(squares[falling[0]])) if len(falling) else np.inf


def _window(mask: np.ndarray, margin: int = 4) -> tuple[int, int, int, int]:
    """left, top, right, bottom of the mask with a margin: nothing outside it can reach the picture."""
    import cv2

    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return (
        max(x - margin, 0),
        max(y - margin, 0),
        min(x + width + margin, mask.shape[1]),
        min(y + height + margin, mask.shape[0]),
    )


def _straight(premultiplied: np.ndarray) -> np.ndarray:
    """Premultiplied RGBA [h, w, 4] 0..255 -> straight [4, h, w] 0..1.

    Where alpha is 0 the colour is the nearest animal's, then white, so that a later resize mixes in no dark rim.
    """
    import cv2

    alpha = np.clip(premultiplied[..., 3:] / 255.0, 0.0, 1.0)
    alpha[alpha < 1 / 510] = 0.0  # rounds to 0 in 8 bits
    rgb = np.clip(premultiplied[..., :3] / 255.0, 0.0, alpha)
    wide_alpha = cv2.blur(alpha[..., 0], (9, 9))[..., None]
    around = np.where(wide_alpha > 1e-3, cv2.blur(rgb, (9, 9)) / np.maximum(wide_alpha, 1e-3), 1.0)
    rgb = np.where(alpha > 0, rgb / np.maximum(alpha, 1e-6), around)
    return np.concatenate([np.clip(rgb, 0.0, 1.0), alpha], axis=-1).transpose(2, 0, 1).astype(np.float32)
