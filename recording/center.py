"""The animal's place in every frame: its center, its smoothing over time, the world's up, its heading.

The center is that of the trunk and head, tail and legs not counted: where the origin of synthetic animals is. Rays
through the masks' centers of mass meet 2 to 3 mm from it, since each camera sees another side of the body; the center
of the visual hull of masks without tail and legs is about 1 mm off (docs/benchmarks.md).
"""

from __future__ import annotations

import math

import numba
import numpy as np

from recording.calibration.model import Calibration
from recording.masks import MaskTrack
from recording.settings import ImportSettings

TRUNK_POINTS = 24  # along each side of the cube in which the trunk's hull is looked for
TRUNK_REACH = 0.6  # body lengths: half that side
OUTVOTED = 0.2  # body lengths: a mask whose ray misses the others' meeting point by more shows something else
LENS_STEP = 0.02  # of a normalized image: about the animal's size, over which the lens is taken as straight
MIN_SPREAD = 0.2  # of the body's length: less walking about does not show where the floor's plane lies
MIN_SPEED = 0.5  # body lengths per second: slower motion says nothing about where the nose is


def robust_weights(residuals: np.ndarray, least: np.ndarray | float) -> np.ndarray:
    """Geman-McClure's weights over the last axis: they vanish where a residual is far above twice the median."""
    scale = np.maximum(2.0 * np.median(residuals, axis=-1, keepdims=True), least)
    return (1.0 / (1.0 + (residuals / scale) ** 2)) ** 2


def locate(
    calibration: Calibration, tracks: list[MaskTrack], places: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the animal's centers [t, 3] from the masks' centers of mass, each ray's distance from them [t, v], and
    lengths [t] in the view that shows the body longest; places: [t] of the masks in their tracks.

    Few wrong rays are outvoted: iteratively reweighted least squares on the perpendicular distances, weighted by
    1 / distance to the camera (what a pixel is worth) and by robust weights.
    """
    directions = np.stack([calibration.rays(k, track.centre[places]) for k, track in enumerate(tracks)], axis=1)
    projectors = np.eye(3) - directions[..., :, None] * directions[..., None, :]
    pulled = np.einsum("...vij,vj->...vi", projectors, calibration.centres)
    weights = np.ones(directions.shape[:-1])
    for _ in range(30):
        total = np.einsum("...v,...vij->...ij", weights, projectors)
        right = np.einsum("...v,...vi->...i", weights, pulled)
        centers = np.linalg.solve(total, right[..., None])[..., 0]
        offset = centers[:, None] - calibration.centres
        distances = np.linalg.norm(offset, axis=-1)
        residuals = np.linalg.norm(offset - (offset * directions).sum(-1, keepdims=True) * directions, axis=-1)
        far = distances.mean(axis=-1, keepdims=True)
        weights = robust_weights(residuals, 1e-3 * far) * (far / distances) ** 2
    focal = np.sqrt(calibration.K[:, 0, 0] * calibration.K[:, 1, 1])
    lengths = np.stack([track.axis_length[places] for track in tracks], axis=1) * distances / focal
    return centers, residuals, lengths.max(axis=1)


def trunk_hulls(
    calibration: Calibration, tracks: list[MaskTrack], places: list[int], rough: np.ndarray, residuals: np.ndarray,
    body_length: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Centers of mass [t, 3] and long axes [t, 3] (unit) of the visual hulls of masks without tail and legs.

    rough: [t, 3] from `locate`, as residuals [t, v]: a mask whose ray misses the rough center by much shows something
    else and is left out. Without a hull: the rough center, axis 0. Points of a cube about the rough center are
    projected into the masks; the lens is taken as straight around it.
    """
    shapes = np.stack([track.trunk_shape[places] for track in tracks], axis=1)  # [t, v] rows, columns, step
    offsets = np.cumsum([0, *(len(track.trunks) for track in tracks)])[:-1]
    starts = np.stack([track.trunks_starts[places] for track in tracks], axis=1) + offsets
    projections = np.empty((*shapes.shape[:2], 3, 4))
    near = LENS_STEP * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    for camera, w2c in enumerate(calibration.w2c):
        seen = rough @ w2c[:3, :3].T + w2c[:3, 3]
        middle = seen[:, :2] / seen[:, 2:]
        pixels = calibration.to_pixels(camera, middle[:, None] + near)  # [t, 5, 2]
        straight = np.zeros((len(rough), 3, 3))
        straight[:, :2, 0] = (pixels[:, 1] - pixels[:, 2]) / (2 * LENS_STEP)
        straight[:, :2, 1] = (pixels[:, 3] - pixels[:, 4]) / (2 * LENS_STEP)
        straight[:, :2, 2] = pixels[:, 0] - (straight[:, :2, :2] @ middle[:, :, None])[..., 0]
        straight[:, :2, 2] -= tracks[camera].boxes[places, :2]
        straight[:, :2] /= shapes[:, camera, 2, None, None]
        straight[:, 2, 2] = 1.0
        projections[:, camera] = straight @ w2c[:3]
    used = residuals <= OUTVOTED * body_length
    bits = np.concatenate([track.trunks for track in tracks])
    centers, spreads = _carve(projections, used, bits, starts, shapes, rough, TRUNK_REACH * body_length)
    return centers, np.linalg.eigh(spreads)[1][..., -1] * spreads.any(axis=(1, 2))[:, None]


@numba.njit(cache=True)  # of 14,000 points most are outside the first mask: NumPy would test all in all
def _carve(projections, used, bits, starts, shapes, middles, half):
    """Center of mass [t, 3] and covariance [t, 3, 3] (0: nothing) of what all used masks show of cubes middles +- half.

    projections: [t, v, 3, 4] world -> pixels of the masks, homogeneous. used: [t, v]. bits: packed pixels of all masks,
    mask (t, v) from byte starts[t, v] on, with shapes[t, v] rows and columns.
    """
    (frames, views), points = used.shape, TRUNK_POINTS
    centers, spreads = middles.copy(), np.zeros((frames, 3, 3))
    step, inner = 2.0 * half / points, np.empty((points**3, 3))
    for frame in range(frames):
        sums, count = np.zeros(3), 0
        lower = middles[frame] - half + 0.5 * step
        for index in range(points**3):
            x = lower[0] + step * (index // (points * points))
            y = lower[1] + step * (index // points % points)
            z = lower[2] + step * (index % points)
            inside = True
            for view in range(views):
                if not used[frame, view]:
                    continue
                p = projections[frame, view]
                depth = p[2, 0] * x + p[2, 1] * y + p[2, 2] * z + p[2, 3]
                column = (p[0, 0] * x + p[0, 1] * y + p[0, 2] * z + p[0, 3]) / depth
                row = (p[1, 0] * x + p[1, 1] * y + p[1, 2] * z + p[1, 3]) / depth
                height, width = shapes[frame, view, 0], shapes[frame, view, 1]
                inside = depth > 0 and column >= 0 and row >= 0 and column < width and row < height
                if inside:
                    pixel = int(row) * width + int(column)
                    inside = bits[starts[frame, view] + (pixel >> 3)] >> (7 - (pixel & 7)) & 1 == 1
                if not inside:
                    break
            if inside:
                inner[count] = (x, y, z)
                sums += inner[count]
                count += 1
        if count and used[frame].sum() >= 2:
            centers[frame] = sums / count
            off = inner[:count] - centers[frame]
            # A grid's own spread, so that even a single point has one.
            spreads[frame] = off.T @ off / count + step**2 / 12.0 * np.eye(3)
    return centers, spreads


def tail_sides(
    calibration: Calibration, tracks: list[MaskTrack], places: list[int], centers: np.ndarray, axes: np.ndarray,
    body_length: float,
) -> np.ndarray:  # fmt: skip
    """[t] body lengths by which the masks reach farther from the centers along -axis than along +axis.

    Mean over the views, of lengths in the image along the axis as it is seen.
    """
    tails, middles = np.zeros((len(tracks), len(places))), calibration.project(centers)
    along = calibration.project(centers + 0.1 * body_length * axes) - middles  # [v, t, 2] pixels
    along /= 10.0 * (along**2).sum(axis=-1, keepdims=True)
    for view, index in np.ndindex(tails.shape):
        reach = (tracks[view].hull(places[index]) - middles[view, index]) @ along[view, index]
        tails[view, index] = -reach.max() - reach.min()
    return tails.mean(axis=0)


def segments(frames: list[int], jumps: tuple[int, ...]) -> list[slice]:
    """The runs of kept frames between the recording's jumps in time (each jump: the first frame after it)."""
    edges = [0, *np.searchsorted(frames, sorted(jumps)).tolist(), len(frames)]
    return [slice(a, b) for a, b in zip(edges, edges[1:]) if b > a]


def smooth(centers: np.ndarray, frames: list[int], num_frames: int, jumps: tuple[int, ...]) -> np.ndarray:
    """Averages centers [t, 3] over num_frames frames of the video, weighted by a triangle; never across a jump."""
    result, half = centers.copy(), num_frames / 2
    for part in segments(frames, jumps) if num_frames >= 2 else []:
        times = np.array(frames[part], dtype=np.float64)
        for index, time in enumerate(times):
            # A window of the frames near enough: the weights elsewhere are 0.
            low, high = np.searchsorted(times, [time - half, time + half], side="left")
            weight = 1.0 - np.abs(times[low:high] - time) / (half + 0.5)
            result[part][index] = weight @ centers[part][low:high] / weight.sum()
    return result


def find_up(calibration: Calibration, centers: np.ndarray, rule: str, body_length: float) -> np.ndarray:
    """[3] unit: what is up in the calibration's world. Raises ValueError where the rule cannot tell.

    rule `rig`: the mean of the cameras' own up directions, which is the room's when they stand around the animal.
    `floor`: the normal, on that side, of the plane the animal's centers [t, 3] lie in; frames in which it rears or
    jumps are outvoted.
    """
    mean = -calibration.w2c[:, 1, :3].mean(axis=0)
    length = float(np.linalg.norm(mean))
    if length < 0.3:
        found = f"the cameras do not agree on what is up (mean of their up directions {length:.2f} long)"
        raise ValueError(f"{calibration.source}: {found}; give --up an axis")
    if rule == "rig":
        return mean / length
    weights = np.ones(len(centers))
    for _ in range(20):
        offset = centers - weights @ centers / weights.sum()
        values, vectors = np.linalg.eigh((offset * weights[:, None]).T @ offset / weights.sum())
        weights = robust_weights(np.abs(offset @ vectors[:, 0]), 1e-6 * body_length)
    walked, needed = math.sqrt(max(values[1], 0.0)), MIN_SPREAD * body_length
    if len(centers) < 3 or walked < needed:
        spread = f"its centers spread by {walked:.3g} across the direction it moves in most, {needed:.3g} are needed"
        wanted = f"{calibration.source}: --up floor needs an animal that walks about"
        raise ValueError(f"{wanted}; {spread}; give --up rig or axis")
    return vectors[:, 0] * (1.0 if vectors[:, 0] @ mean > 0 else -1.0)


def headings_deg(
    axes: np.ndarray, tails: np.ndarray, centers: np.ndarray, frames: list[int], settings: ImportSettings, *,
    rate: float, body_length: float,
) -> np.ndarray:  # fmt: skip
    """[t] azimuth of the nose, degrees as in multiview/rig.py, from axes [t, 3] and `tail_sides` [t] by a rule.

    `pca`: the tail reaches farther from the center than the nose. `motion`: a mouse that walks goes forward. Both
    count as evidence for every frame; which way round each axis is follows for a whole run of frames together, since an
    animal does not turn about between two of them (the best path over two states, Viterbi 1967).
    """
    angles = np.degrees(np.arctan2(-axes[:, 0], -axes[:, 1]))
    for part in segments(frames, settings.time_jumps):
        evidence = tails[part]  # positive where +axis is the nose
        if settings.heading == "motion":
            times = np.array(frames[part], dtype=np.float64) / (rate or 1.0)
            velocity = np.gradient(centers[part], times, axis=0) if len(times) > 1 else np.zeros_like(centers[part])
            speed = (velocity * axes[part]).sum(axis=1) / body_length
            evidence = np.where(np.abs(speed) > MIN_SPEED, speed, 0.0)
        turning = np.abs((np.diff(angles[part]) + 180.0) % 360.0 - 180.0) / 90.0 - 1.0  # -1 same way .. 1 opposite
        cost, choices = np.zeros(2), np.zeros((len(evidence), 2), dtype=int)
        for index, value in enumerate(evidence):
            if index:
                step = 0.5 * turning[index - 1]
                moved = cost[:, None] + np.array([[step, -step], [-step, step]])
                choices[index], cost = moved.argmin(axis=0), moved.min(axis=0)
            cost = cost + np.array([-value, value])
        state = int(cost.argmin())
        for index in range(len(evidence) - 1, -1, -1):
            angles[part][index] += 180.0 * state
            state = choices[index, state]
    return angles % 360.0
