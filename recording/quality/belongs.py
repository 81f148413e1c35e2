"""Does a calibration belong to its videos? Asked before an import.

A calibration can be flawless in itself and still not belong to the videos: mirrored images, videos numbered in another
order, extrinsics meant otherwise in a world where both readings make sense. One and the same point seen by all cameras,
or one animal's silhouettes, decide between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations

import numpy as np

from recording.calibration.checks import READINGS, nearest
from recording.calibration.model import Calibration
from recording.quality.silhouettes import AGREED, DIRECTIONS, EXPLAINED, Views, disagreement, outline, rms

NOISE, MEETING = 0.004, 0.02  # of the camera distance: rays of clean masks' centers miss less; explained ones at most
CONVINCING = 0.3  # share of the rays' misses that an explanation may leave
MOST_REORDERED = 6  # cameras whose 720 orders are tried


def ray_misfit(centers: np.ndarray, directions: np.ndarray) -> float:
    """Returns how far rays [t, v, 3] (unit) from centers [v, 3] miss each other, over the mean camera distance.

    Rms over the cameras, median over the instants; infinite where the rays meet behind a camera.
    """
    points = nearest(np.broadcast_to(centers, directions.shape), directions)
    offset = points[:, None] - centers
    along = np.einsum("tvi,tvi->tv", offset, directions)
    miss = np.linalg.norm(offset - along[..., None] * directions, axis=-1)
    result = np.sqrt((miss**2).mean(axis=1)) / np.linalg.norm(offset, axis=-1).mean(axis=1)
    return float(np.median(np.where((along <= 0).any(axis=1), np.inf, result)))


def rays_of(calibration: Calibration, pixels: np.ndarray) -> np.ndarray:
    """Returns unit directions [t, v, 3] in the world through pixels [t, v, 2]."""
    return np.stack([calibration.rays(camera, pixels[:, camera]) for camera in range(len(calibration))], axis=1)


def explain_misfit(calibration: Calibration, pixels: np.ndarray) -> list[str]:
    """Returns what would make the rays through pixels [t, v, 2] of one point per instant meet, best first; or [].

    Tried: every reading of the extrinsics (`checks.READINGS`), all images mirrored or one camera's, and (six cameras
    at most) the videos in another order. nan: a camera does not see the point then; such instants are left out.
    """
    pixels = pixels[np.isfinite(pixels).all(axis=(1, 2))]
    count = len(calibration)
    if not len(pixels) or count < 3:
        return []
    rays = rays_of(calibration, pixels)
    written = ray_misfit(calibration.centres, rays)
    if written <= NOISE:
        return []
    left = {}
    for name, read in READINGS.items():
        other = replace(calibration, w2c=read(calibration.w2c))
        left[f"the calibration is read as {name}"] = ray_misfit(other.centres, rays_of(other, pixels))
    if None not in calibration.sizes:
        flipped = rays_of(calibration, np.stack([[size[0], 0.0] for size in calibration.sizes]) + pixels * [-1.0, 1.0])
        left["the pictures are mirrored (flip every video left to right)"] = ray_misfit(calibration.centres, flipped)
        for camera in range(count):
            one = rays.copy()
            one[:, camera] = flipped[:, camera]
            name = f"the pictures of camera {camera} are mirrored (flip its video)"
            left[name] = ray_misfit(calibration.centres, one)
    if count <= MOST_REORDERED:
        few = pixels[np.linspace(0, len(pixels) - 1, min(len(pixels), 8)).astype(int)]
        # [camera, t, video, 3]: along what the video's pixel would be seen, had this camera filmed it
        seen = np.stack([calibration.rays(k, few.reshape(-1, 2)).reshape(*few.shape[:2], 3) for k in range(count)])
        for order in permutations(range(count)):
            if order != tuple(range(count)):
                name = f"camera k filmed video {list(order)}[k] (rename the videos)"
                left[name] = ray_misfit(calibration.centres, np.stack([seen[k, :, v] for k, v in enumerate(order)], 1))
    limit = min(MEETING, CONVINCING * written)
    return [name for name, misfit in sorted(left.items(), key=lambda item: item[1]) if misfit <= limit]


def check_belongs(calibration: Calibration, pixels: np.ndarray) -> None:
    """Raises ValueError where rays through pixels [t, v, 2] of a point miss and `explain_misfit` knows why.

    Masks' centers of mass will do: they are not quite one point, but far nearer to it than any mistake is.
    """
    explanations = explain_misfit(calibration, pixels)
    if explanations:
        known = pixels[np.isfinite(pixels).all(axis=(1, 2))]
        miss = ray_misfit(calibration.centres, rays_of(calibration, known))
        raise ValueError(
            f"{calibration.source}: rays to the animal miss by {100 * miss:.1f} % of the camera distance, and meet if "
            f"{', or if '.join(explanations[:2])}"
        )


def check_silhouettes(calibration: Calibration, instants: Iterable[np.ndarray]) -> None:
    """Raises ValueError where the masks [v, h, w] bool (or one array per camera) of all instants say that images are
    mirrored left to right: all of them, or one camera's. Fewer than three cameras say nothing.
    """
    count = len(calibration)
    if count < 3:
        return
    instants = list(instants)
    outlines = {side: [[outline(mask[:, ::side]) for mask in masks] for masks in instants] for side in (1, -1)}

    def disagreement_of(flipped: tuple[int, ...]) -> float:
        points = np.full((len(instants), count, DIRECTIONS, 2), np.nan)
        for instant in range(len(instants)):
            for k in range(count):
                found = outlines[-1 if k in flipped else 1][instant][k]
                if found is not None:
                    pixels = found * instants[instant][k].shape[1]
                    points[instant, k] = calibration.to_normalised(k, pixels) * focal[k]
        intrinsics = np.stack([focal, focal, 0 * focal, 0 * focal], axis=-1)
        cameras = (np.broadcast_to(one, (len(instants), *one.shape)) for one in (intrinsics, calibration.w2c))
        return rms(disagreement(Views(points, *cameras)))

    focal = calibration.K[:, 0, 0] / np.array([mask.shape[1] for mask in instants[0]])
    written = disagreement_of(())
    if written <= AGREED:
        return
    left = {chosen: disagreement_of(chosen) for chosen in (tuple(range(count)), *((k,) for k in range(count)))}
    best = min(left, key=left.get)
    if left[best] <= min(2 * AGREED, EXPLAINED * written):
        raise ValueError(
            f"{calibration.source}: the pictures of camera {', '.join(map(str, best))} are mirrored: the animal's "
            "silhouettes fit together only when these are flipped left to right; flip these videos and their masks"
        )
