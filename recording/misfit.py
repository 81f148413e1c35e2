"""What only the pictures tell about a calibration: whether they are its pictures, and if not, what is the matter.

A calibration can be flawless in itself and still not belong to the videos: mirrored pictures, videos numbered in
another order, extrinsics meant otherwise in a world where both readings make sense. One and the same point seen by all
cameras, or one animal's silhouettes, decide between them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from multiview.cameras import Cameras
from recording.calibration import Calibration
from recording.calibration.checks import READINGS

CONVINCING = 0.3  # an explanation leaves at most this share of the misfit ...
NOISE = 0.004  # centres of mass of clean masks miss by less: nothing to explain
FITS = 0.02  # ... and rays that miss by at most this much of the camera distance
MOST_ORDERS = 720  # permutations of six cameras
MIRROR_GAIN = 0.5  # mirroring must take away this share of what silhouettes lack to consistency ...
MIRROR_FITS = 0.9  # ... and leave them this consistent: unmirrored ones of a clean mask reach 0.99


def ray_misfit(calibration: Calibration, pixels: np.ndarray) -> float:
    """How far rays through pixels [t, v, 2] of one point per instant miss each other, over the camera distance.

    Rms over the cameras, median over the instants; infinite where the rays meet behind a camera.
    """
    rays = [calibration.rays(camera, pixels[:, camera]) for camera in range(len(calibration))]
    return float(np.median(_misfit(calibration.centres, np.stack(rays, axis=1))))


def check_belongs(calibration: Calibration, pixels: np.ndarray) -> None:
    """Raises ValueError where rays through pixels [t, v, 2] of a point miss and `explain_misfit` knows why.

    Masks' centres of mass will do: they are not quite one point, but far nearer to it than any mistake is.
    """
    explanations = explain_misfit(calibration, pixels)
    if explanations:
        raise ValueError(
            f"{calibration.source}: rays to the animal miss by {100 * ray_misfit(calibration, pixels):.1f} % of the "
            f"camera distance, and meet if {', or if '.join(explanations[:2])}"
        )


def explain_misfit(calibration: Calibration, pixels: np.ndarray) -> list[str]:
    """What would make the rays through pixels [t, v, 2] of one point per instant meet, best first; [] if nothing does.

    Tried: every reading of the extrinsics (`checks.READINGS`), all pictures mirrored or one camera's, and (six cameras
    at most) the videos in another order. nan: a camera does not see the point then; such instants are left out.
    """
    pixels = pixels[np.isfinite(pixels).all(axis=(1, 2))]
    if not len(pixels) or len(calibration) < 3:
        return []
    written = ray_misfit(calibration, pixels)
    if written <= NOISE:
        return []
    found = {}
    for name, read in READINGS.items():
        found[f"the calibration is read as {name}"] = ray_misfit(
            replace(calibration, w2c=read(calibration.w2c)), pixels
        )
    if None not in calibration.sizes:
        width = np.array([size[0] for size in calibration.sizes], dtype=np.float64)
        flipped = pixels * [-1.0, 1.0] + np.stack([width, 0 * width], axis=-1)
        found["the pictures are mirrored (flip every video left to right)"] = ray_misfit(calibration, flipped)
        for camera in range(len(calibration)):
            one = pixels.copy()
            one[:, camera] = flipped[:, camera]
            found[f"the pictures of camera {camera} are mirrored (flip its video)"] = ray_misfit(calibration, one)
    found |= _other_orders(calibration, pixels)
    limit = min(FITS, CONVINCING * written)
    return [name for name, misfit in sorted(found.items(), key=lambda item: item[1]) if misfit <= limit]


def _other_orders(calibration: Calibration, pixels: np.ndarray) -> dict[str, float]:
    count = len(calibration)
    orders = list(permutations(range(count))) if count <= 6 else []
    if not 1 < len(orders) <= MOST_ORDERS:
        return {}
    few = pixels[np.linspace(0, len(pixels) - 1, min(len(pixels), 8)).astype(int)]
    # rays[camera, t, video]: along what the video's pixel would be seen, had this camera filmed it
    rays = np.stack([calibration.rays(k, few.reshape(-1, 2)).reshape(*few.shape[:2], 3) for k in range(count)])
    misfit = [
        np.median(_misfit(calibration.centres, np.stack([rays[k, :, video] for k, video in enumerate(order)], axis=1)))
        for order in orders
    ]
    best = int(np.argmin(misfit))
    if orders[best] == tuple(range(count)):
        return {}
    return {f"camera k filmed video {list(orders[best])}[k] (rename the videos)": float(misfit[best])}


def _misfit(centres: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """centres [v, 3], directions [t, v, 3] (unit) -> [t] rms distance of the rays from the point nearest to them.

    Over the mean camera distance; infinite where that point is behind a camera.
    """
    projectors = np.eye(3) - directions[..., :, None] * directions[..., None, :]
    total = projectors.sum(axis=1) + 1e-12 * np.eye(3)  # parallel rays meet far away
    points = np.linalg.solve(total, np.einsum("tvij,vj->ti", projectors, centres)[..., None])[..., 0]
    offset = points[:, None] - centres
    along = np.einsum("tvi,tvi->tv", offset, directions)
    miss = np.linalg.norm(offset - along[..., None] * directions, axis=-1)
    result = np.sqrt((miss**2).mean(axis=1)) / np.linalg.norm(offset, axis=-1).mean(axis=1)
    result[(along <= 0).any(axis=1)] = np.inf
    return result


# ---- silhouettes ------------------------------------------------------------------------------------------------


def check_silhouettes(calibration: Calibration, instants: list[np.ndarray]) -> None:
    """Raises ValueError where the masks [v, h, w] bool of every instant say that the same pictures are mirrored.

    Lens distortion and skew are left out: they are far smaller than what mirroring does. Says nothing about fewer than
    three cameras or cameras of different picture sizes.
    """
    if len(calibration) < 3 or len(set(calibration.sizes)) != 1 or calibration.sizes[0] is None:
        return
    width, height = calibration.sizes[0]
    values = np.stack([calibration.K[:, row, column] for row, column in ((0, 0), (1, 1), (0, 2), (1, 2))], axis=-1)
    w2c, fxfycxcy = (torch.from_numpy(array.astype(np.float32)) for array in (calibration.w2c, values))
    cameras = Cameras.from_w2c(w2c, fxfycxcy, height, width)
    found = set()
    for masks in instants:
        found.add(suspect_mirrored(torch.from_numpy(masks).float()[:, None], cameras))
        if found != {next(iter(found))} or () in found:
            return
    which = ", ".join(map(str, next(iter(found))))
    raise ValueError(
        f"{calibration.source}: the pictures of camera {which} are mirrored: the animal's silhouettes fit together "
        "only when these are flipped left to right; flip these videos and their masks"
    )


def suspect_mirrored(masks: Tensor, cameras: Cameras) -> tuple[int, ...]:
    """The cameras whose pictures are mirrored left to right, judged by silhouettes; () where nothing speaks for it.

    masks: [v, 1, h, w] 0..1 of one instant, cameras: [v], v >= 3, undistorted. Silhouettes of one solid fill the hull
    of the others (`consistency.view_consistency`); mirrored ones carve it away, and mirroring them back restores it.
    Tried: all cameras, and any single one. An animal in the middle of the picture that looks the same mirrored says
    nothing; ask several instants.
    """
    everyone = tuple(range(len(cameras)))
    written = _silhouette_fit(masks, cameras, ())
    if written >= MIRROR_FITS:
        return ()
    fits = {chosen: _silhouette_fit(masks, cameras, chosen) for chosen in (everyone, *((k,) for k in everyone))}
    best = max(fits, key=fits.get)
    convincing = fits[best] >= MIRROR_FITS and 1.0 - fits[best] <= (1.0 - MIRROR_GAIN) * (1.0 - written)
    return best if convincing and fits[best] > written + 0.02 else ()


def _silhouette_fit(masks: Tensor, cameras: Cameras, mirrored: tuple[int, ...]) -> float:
    from multiview.metrics import view_consistency

    masks = masks.clone()
    masks[list(mirrored)] = masks[list(mirrored)].flip(-1)
    return float(view_consistency(masks.expand(-1, 3, -1, -1), masks, cameras)["mask"])
