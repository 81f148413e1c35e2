"""Does a calibration belong to its videos? Asked before an import.

A calibration can be flawless in itself and still not belong to the videos: mirrored images, videos numbered in another
order, extrinsics meant otherwise in a world where both readings make sense. One and the same point seen by all cameras,
or one animal's silhouettes, decide between them. Fewer than three cameras say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import permutations

import numpy as np

from recording.calibration.checks import READINGS, nearest
from recording.calibration.model import Calibration
from recording.quality.silhouettes import AGREED, DIRECTIONS, EXPLAINED, Views, disagreement, evenly, outline, rms

NOISE, MEETING = 0.004, 0.02  # of the camera distance: rays of clean masks' centers miss less; explained ones at most
CONVINCING = 0.3  # share of the rays' misses that an explanation may leave
MOST_REORDERED = 6  # cameras whose 720 orders are tried


def mirrorings(calibration: Calibration, pixels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields pixels [t, v, ..., 2] of mirrored images, all or one camera's, and what that is; none without sizes."""
    if None not in calibration.sizes:
        widths = np.array([width for width, _ in calibration.sizes], dtype=np.float64)
        flipped = pixels.copy()
        flipped[..., 0] = widths.reshape(-1, *[1] * (pixels.ndim - 3)) - pixels[..., 0]
        yield "the pictures are mirrored (flip every video and its masks left to right)", flipped
        for camera in range(len(calibration)):
            one = pixels.copy()
            one[:, camera] = flipped[:, camera]
            yield f"the pictures of camera {camera} are mirrored (flip its video and masks)", one


def check_belongs(calibration: Calibration, pixels: np.ndarray) -> None:
    """Raises ValueError where rays through pixels [t, v, 2] of a point miss each other and a usual mistake explains it.

    Tried: every reading of the extrinsics (`checks.READINGS`), mirrored images, and (six cameras at most) the videos in
    another order. nan: a camera does not see the point then; such instants are left out. Masks' centers of mass will
    do: they are not quite one point, but far nearer to it than any mistake is.
    """

    def miss(one: Calibration, pixels: np.ndarray) -> float:
        return ray_miss(one.centres, np.stack([one.rays(k, pixels[:, k]) for k in range(count)], axis=1))

    count, pixels = len(calibration), pixels[np.isfinite(pixels).all(axis=(1, 2))]
    if not len(pixels) or count < 3 or (written := miss(calibration, pixels)) <= NOISE:
        return
    left = {
        f"the calibration is read as {name}": miss(replace(calibration, w2c=read(calibration.w2c)), pixels)
        for name, read in READINGS.items()
    }
    left |= {name: miss(calibration, flipped) for name, flipped in mirrorings(calibration, pixels)}
    if count <= MOST_REORDERED:
        few = pixels[evenly(len(pixels), 8)]
        # [camera, t, video, 3]: along what the video's pixel would be seen, had this camera filmed it
        seen = np.stack([calibration.rays(k, few.reshape(-1, 2)).reshape(*few.shape[:2], 3) for k in range(count)])
        for order in permutations(range(count)):
            if order != tuple(range(count)):
                name = f"camera k filmed video {list(order)}[k] (rename the videos)"
                left[name] = ray_miss(calibration.centres, np.stack([seen[k, :, v] for k, v in enumerate(order)], 1))
    limit = min(MEETING, CONVINCING * written)
    explanations = [name for name in sorted(left, key=left.get) if left[name] <= limit]
    if explanations:
        meet = f"and meet if {', or if '.join(explanations[:2])}"
        far = f"rays to the animal miss by {100 * written:.1f} % of the camera distance"
        raise ValueError(f"{calibration.source}: {far}, {meet}")


def ray_miss(centers: np.ndarray, directions: np.ndarray) -> float:
    """Returns how far rays [t, v, 3] (unit) from centers [v, 3] miss each other, over the mean camera distance.

    Rms over the cameras, median over the instants; infinite where the rays meet behind a camera.
    """
    offset = nearest(np.broadcast_to(centers, directions.shape), directions)[:, None] - centers
    along = np.einsum("tvi,tvi->tv", offset, directions)
    off = np.linalg.norm(offset - along[..., None] * directions, axis=-1)
    result = np.sqrt((off**2).mean(axis=1)) / np.linalg.norm(offset, axis=-1).mean(axis=1)
    return float(np.median(np.where((along <= 0).any(axis=1), np.inf, result)))


def check_silhouettes(calibration: Calibration, instants: Iterable[np.ndarray]) -> None:
    """Raises ValueError where masks [v, h, w] bool, or one array per camera, fit together only with images mirrored."""
    if len(calibration) < 3:
        return
    focal = calibration.K[:, 0, 0] / [width for width, _ in calibration.sizes]
    intrinsics = np.stack([focal, focal, 0 * focal, 0 * focal], axis=-1)
    unseen = np.full((DIRECTIONS, 2), np.nan)
    found = [[(outline(mask), mask.shape[1]) for mask in masks] for masks in instants]
    pixels = np.array([[unseen if points is None else points * width for points, width in row] for row in found])
    seen = np.isfinite(pixels).all(axis=(2, 3))

    def left(pixels: np.ndarray) -> float:
        points = np.full_like(pixels, np.nan)
        for k in range(len(calibration)):
            points[seen[:, k], k] = calibration.to_normalised(k, pixels[seen[:, k], k]) * focal[k]
        cameras = (np.broadcast_to(one, (len(pixels), *one.shape)) for one in (intrinsics, calibration.w2c))
        return rms(disagreement(Views(points, *cameras)))

    if (written := left(pixels)) <= AGREED:
        return
    least, explanation = min((left(flipped), name) for name, flipped in mirrorings(calibration, pixels))
    if least <= min(2 * AGREED, EXPLAINED * written):
        raise ValueError(f"{calibration.source}: the animal's silhouettes fit together only if {explanation}")
