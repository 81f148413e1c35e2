"""The exact warp of a photograph to a camera at the same place that looks elsewhere, and the images cut out by it.

Turning a camera about its own center moves every pixel by a homography, whatever the depth of what it shows, so nothing
is approximated: x_photo ~ K_photo R_photo R_true^T K_true^-1 x_image. With lens distortion the same map goes through
the lens model. Images and masks are warped together, premultiplied, so that no background bleeds into the animal.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numba
import numpy as np
from isal import isal_zlib

from recording.calibration.model import Calibration, valid_radius
from recording.masks import Silhouette, read_track
from recording.video import Video, VideoReader

MAX_OVERSAMPLING = 4
TAP_STEP = 1.5
RIM = 6  # image pixels around the mask: the filter's reach, and that of the color carried over the rim
BORDER = np.array([(x, y) for x in np.linspace(0, 1, 5) for y in np.linspace(0, 1, 5) if x in (0, 1) or y in (0, 1)])
SOURCE_RIM = 4  # photograph pixels around the mask that the filter may read
MAP_STEP = 8  # fine pixels between the points at which the lens model is evaluated; between them the map is straight
TRANSPARENT_WHITE = np.array([255, 255, 255, 0], np.uint8).view(np.uint32)[0]  # a pixel at once
PNG_LEVEL = 1  # of ISA-L's 0..3; 0 makes larger files, 2 the same ones, 3 takes three times as long


def cut_camera(
    calibration: Calibration, videos: list[Video], cuts: dict[int, dict], masks: Path, folder: Path, size: int,
    camera: int,
) -> Iterator[None]:  # fmt: skip
    """Writes one camera's image of every sample, yielding after each.

    cuts: of each camera, one entry per sample in the order of the video: frame (number in the video), mask (index in
    the track), path (of the image in `folder`), rotation [3, 3], focal_px. size: of the images.
    """
    cut, track = cuts[camera], read_track(masks, camera)
    with VideoReader(videos[camera]) as reader:
        for frame, place, path, rotation, focal_px in zip(*cut.values(), strict=True):
            mask = track.silhouette(place)
            colors = reader.read_part(frame, mask.x, mask.y, *mask.window.shape[::-1])
            image = rectify(calibration, camera, colors, mask, rotation=rotation, focal_px=float(focal_px), size=size)
            path = f"{folder}/{path}"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as handle:  # buffered: a raw write to a full disk stops half way without an error
                handle.write(png_bytes(image))
            yield


def png_bytes(rgba: np.ndarray) -> bytes:
    """Encodes [h, w, 4] uint8 as PNG, ten times as fast as OpenCV: most of the image is empty.

    Each row is stored as its difference to the row above (W3C PNG specification 3, section 9), so that what is empty is
    zeros, which ISA-L's deflate runs through. The same image makes the same file.
    """
    height, width = rgba.shape[:2]
    flat = rgba.reshape(height, 4 * width)
    rows = np.full((height, 1 + 4 * width), 2, np.uint8)  # filter 2: up
    rows[0, 0], rows[0, 1:] = 0, flat[0]  # filter 0: none
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", isal_zlib.compress(rows, PNG_LEVEL)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
        for kind, content in chunks
    )


def rectify(
    calibration: Calibration, camera: int, colors: np.ndarray, mask: Silhouette, *, rotation: np.ndarray,
    focal_px: float, size: int,
) -> np.ndarray:  # fmt: skip
    """Warps the photograph's colors in its mask's window to a square image of the animal, [size, size, 4], straight.

    colors: [h, w, 3] uint8 BGR; the image is RGBA. rotation: [3, 3] world to the new camera's axes. focal_px: its
    focal length; its principal point is the center. Only the part around the mask is computed. Raises ValueError for
    colors of another size than the window.
    """
    if colors.shape != (*mask.window.shape, 3):
        raise ValueError(f"colors must be the mask's window, {[*mask.window.shape, 3]}, got {list(colors.shape)}")
    # Photograph pixels per image pixel: so many samples per pixel and direction, averaged, that they lie at most
    # TAP_STEP apart, avoid aliasing. They are read by straight interpolation, which reaches two pixels far: a cubic
    # filter rings at the mask's rim, and costs 1 dB and twice the time.
    over = min(max(math.ceil(float(calibration.K[camera, 0, 0]) / focal_px / TAP_STEP), 1), MAX_OVERSAMPLING)
    result = np.full((size, size), TRANSPARENT_WHITE, np.uint32).view(np.uint8).reshape(size, size, 4)
    # What the mask can reach: along the border of its box, not its corners alone, since a lens bends straight lines.
    points = calibration.rays(camera, [mask.x, mask.y] + BORDER * mask.window.shape[::-1]) @ rotation.T
    left, top, right, bottom = 0, 0, size, size
    if (points[:, 2] > 0).all():  # before the camera
        seen = points[:, :2] / points[:, 2:] * focal_px + size / 2
        left, top = np.clip(np.floor(seen.min(axis=0)).astype(int) - RIM, 0, size).tolist()
        right, bottom = np.clip(np.ceil(seen.max(axis=0)).astype(int) + RIM, 0, size).tolist()
    width, height = right - left, bottom - top
    if width <= 0 or height <= 0 or not mask.window.size:
        return result
    cut_out = cv2.cvtColor(np.ascontiguousarray(colors), cv2.COLOR_BGR2RGBA)
    cut_out = cv2.bitwise_and(cut_out, cut_out, mask=mask.window.view(np.uint8))
    cut_out = cv2.copyMakeBorder(cut_out, *[SOURCE_RIM] * 4, cv2.BORDER_CONSTANT, value=0)
    corner = mask.x - SOURCE_RIM, mask.y - SOURCE_RIM
    # Homogeneous: fine pixel (outer-corner origin) of the image, then of the box -> normalized photograph.
    fine, focal, middle = (width * over, height * over), focal_px * over, size * over
    shift = -0.5 * middle / focal
    to_ray = np.array([[1.0 / focal, 0.0, shift], [0.0, 1.0 / focal, shift], [0.0, 0.0, 1.0]])
    to_photo = calibration.w2c[camera, :3, :3] @ rotation.T @ to_ray
    to_photo = to_photo @ np.array([[1.0, 0.0, left * over], [0.0, 1.0, top * over], [0.0, 0.0, 1.0]])
    if np.any(calibration.distortion[camera]):
        columns, rows = lens_maps(calibration, camera, to_photo, *fine)
        columns, rows = columns - np.float32(corner[0]), rows - np.float32(corner[1])
        warped = cv2.remap(cut_out, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    else:
        K = calibration.K[camera].copy()
        K[:2, 2] -= [corner[0] + 0.5, corner[1] + 0.5]  # OpenCV's warps count pixel centers from 0
        to_photo = K @ to_photo @ np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        warped = cv2.warpPerspective(cut_out, to_photo, fine, flags=flags, borderMode=cv2.BORDER_CONSTANT)
    if over > 1:
        warped = cv2.resize(warped, (width, height), interpolation=cv2.INTER_AREA)
    blurred = cv2.blur(warped, (9, 9), borderType=cv2.BORDER_CONSTANT)
    _straighten(warped, blurred, result[top:bottom, left:right])
    return result


def lens_maps(calibration: Calibration, camera: int, pixel_to_photo: np.ndarray, width: int, height: int):
    """cv2.remap tables [height, width] through the lens model, exact every MAP_STEP pixels and straight between."""
    cells = (-(-width // MAP_STEP) + 2, -(-height // MAP_STEP) + 2)
    # Cell centers, one cell before the image and one after it, as cv2.resize interpolates.
    u, v = np.meshgrid(*((np.arange(count) - 0.5) * MAP_STEP for count in cells))
    points = np.stack([u, v, np.ones_like(u)], axis=-1) @ pixel_to_photo.T
    normalized = points[..., :2] / points[..., 2:]
    pixels = calibration.to_pixels(camera, normalized)
    outside = points[..., 2] <= 0
    outside |= np.linalg.norm(normalized, axis=-1) > valid_radius(calibration.distortion[camera])
    pixels[outside] = -1e4
    fine_size = cells[0] * MAP_STEP, cells[1] * MAP_STEP
    fine = cv2.resize(pixels.astype(np.float32) - 0.5, fine_size, interpolation=cv2.INTER_LINEAR)
    fine = fine[MAP_STEP : MAP_STEP + height, MAP_STEP : MAP_STEP + width]
    return np.ascontiguousarray(fine[..., 0]), np.ascontiguousarray(fine[..., 1])


@numba.njit(cache=True)  # with NumPy this took four times as long as all the rest of an image
def _straighten(premultiplied, blurred, out):
    """Premultiplied RGBA [h, w, 4] uint8 -> straight, into `out`, which is white.

    Where alpha is 0 the color is that of `blurred`, the same image's mean around each pixel, so that a later resize
    mixes in no dark rim; white where that is empty too.
    """
    full = np.float32(255.0)
    for row in range(premultiplied.shape[0]):
        for column in range(premultiplied.shape[1]):
            alpha = premultiplied[row, column, 3]
            source = premultiplied if alpha else blurred
            weight = source[row, column, 3]
            out[row, column, 3] = alpha
            if weight:
                scale = full / np.float32(weight)
                for channel in range(3):
                    value = np.rint(np.float32(source[row, column, channel]) * scale)
                    out[row, column, channel] = np.uint8(min(value, full))
