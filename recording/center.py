"""The animal's place in every frame: its center, its smoothing over time, the world's up, its heading.

The center is that of the trunk and head, tail and legs not counted: where the origin of synthetic animals is. Rays
through the masks' centers of mass meet 2 to 3 mm from it, since each camera sees another side of the body; the center
of the visual hull of masks without tail and legs is about 1 mm off (docs/benchmarks.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numba
import numpy as np
import torch

from multiview.cameras import Cameras
from multiview.hull import VisualHull, carve
from recording.calibration.model import Calibration
from recording.masks import MaskStatistics, Silhouette, openings
from recording.rectify import rectify

TRUNK_POINTS = 24  # along each side of the cube in which the trunk's hull is looked for
TRUNK_REACH = 0.6  # body lengths: half that side
OUTVOTED = 0.2  # body lengths: a mask whose ray misses the others' meeting point by more shows something else
LENS_STEP = 0.02  # of a normalized image: about the animal's size, over which the lens is taken as straight
HULL_PIXELS = 112  # of the small masks that are carved
HULL_VOXELS = 44  # along the hull
HULL_REACH = 0.9  # body lengths: half the side of the cube that is searched
# Parts thinner than twice this, over the square root of a mask's area (tail, most of the legs) and over the cube root
# of the hull's volume, are left out. Chosen on synthetic mice, whose centers are known.
HULL_LIMB_RADIUS = 0.16
HULL_CORE_RADIUS = 0.20
MIN_SPREAD = 0.2  # of the body's length: less walking about does not show where the floor's plane lies
MIN_SPEED = 0.5  # body lengths per second: slower motion says nothing about where the nose is


def robust_weights(residuals: np.ndarray, least: np.ndarray | float) -> np.ndarray:
    """Geman-McClure's weights over the last axis: they vanish where a residual is far above twice the median."""
    scale = np.maximum(2.0 * np.median(residuals, axis=-1, keepdims=True), least)
    return (1.0 / (1.0 + (residuals / scale) ** 2)) ** 2


def triangulate(origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the points [..., 3] nearest to rays [..., v, 3] (unit) from origins [v, 3], and their distances [..., v].

    Few wrong rays are outvoted: iteratively reweighted least squares on the perpendicular distances, weighted by
    1 / distance to the camera (what a pixel is worth) and by robust weights.
    """
    projectors = np.eye(3) - directions[..., :, None] * directions[..., None, :]
    pulled = np.einsum("...vij,vj->...vi", projectors, origins)
    weights = np.ones(directions.shape[:-1])
    for _ in range(30):
        total = np.einsum("...v,...vij->...ij", weights, projectors)
        right = np.einsum("...v,...vi->...i", weights, pulled)
        point = np.linalg.solve(total, right[..., None])[..., 0]
        offset = point[..., None, :] - origins
        distances = np.linalg.norm(offset, axis=-1)
        residuals = np.linalg.norm(offset - (offset * directions).sum(-1, keepdims=True) * directions, axis=-1)
        far = distances.mean(axis=-1, keepdims=True)
        weights = robust_weights(residuals, 1e-3 * far) * (far / distances) ** 2
    return point, residuals


def locate(calibration: Calibration, masks: list[list[MaskStatistics]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the animal's centers [t, 3] from the masks' centers of mass, each ray's distance from them [t, v], lengths.

    masks: [t][v]. A length [t] is that of the view that shows the body longest: it belongs to the pose of its frame.
    """
    seen = np.array([[mask.centre for mask in row] for row in masks])
    directions = np.stack([calibration.rays(k, seen[:, k]) for k in range(len(calibration))], axis=1)
    centers, residuals = triangulate(calibration.centres, directions)
    distance = np.linalg.norm(calibration.centres - centers[:, None], axis=-1)
    focal = np.sqrt(calibration.K[:, 0, 0] * calibration.K[:, 1, 1])
    lengths = np.array([[mask.axis_length for mask in row] for row in masks]) * distance / focal
    return centers, residuals, lengths.max(axis=1)


# ---- the trunk's hull -----------------------------------------------------------------------------------------------


def trunk_centers(
    calibration: Calibration,
    masks: list[list[MaskStatistics]],
    rough: np.ndarray,
    residuals: np.ndarray,
    body_length: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the centers of mass [t, 3] of the visual hulls of masks without tail and legs; whether there is a hull [t].

    masks: [t][v]. rough: [t, 3] from `locate`, which also says how far each mask's ray misses it (residuals [t, v]): a
    mask whose ray misses by much shows something else and is left out. Without a hull the rough center is returned.
    Points of a cube about the rough center are projected into the masks; the lens is taken as straight around it.
    """
    trunks = [[mask.trunk for mask in row] for row in masks]
    shapes = np.array([[(t.height, t.width) for t in row] for row in trunks])
    lengths = np.array([len(t.bits) for row in trunks for t in row])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).reshape(shapes.shape[:2])
    corners = np.array([[(t.x, t.y, t.step) for t in row] for row in trunks], dtype=np.float64)
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
        straight[:, :2, 2] -= corners[:, camera, :2]
        straight[:, :2] /= corners[:, camera, 2, None, None]
        straight[:, 2, 2] = 1.0
        projections[:, camera] = straight @ w2c[:3]
    bits = np.concatenate([t.bits for row in trunks for t in row])
    used = residuals <= OUTVOTED * body_length
    return _carve(projections, used, bits, starts, shapes, rough, TRUNK_REACH * body_length)


@numba.njit(cache=True)  # of 14,000 points most are outside the first mask: NumPy would test all in all
def _carve(projections, used, bits, starts, shapes, middles, half):
    """Center of mass of what all masks show, per frame [t, 3], and whether it is anything [t].

    Looked for at TRUNK_POINTS^3 places of the cube middles [t, 3] +- half; the middle where there is nothing.
    projections: [t, v, 3, 4] world -> pixels of the masks, homogeneous. used: [t, v] whether a mask counts. bits:
    packed pixels of all masks, mask (t, v) from byte starts[t, v] on, rows x columns shapes[t, v].
    """
    frames, views = used.shape
    points = TRUNK_POINTS
    centers, found = middles.copy(), np.zeros(frames, np.bool_)
    step = 2.0 * half / points
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
                height, width = shapes[frame, view]
                if depth <= 0 or column < 0 or row < 0 or column >= width or row >= height:
                    inside = False
                    break
                pixel = int(row) * width + int(column)
                if not bits[starts[frame, view] + (pixel >> 3)] >> (7 - (pixel & 7)) & 1:
                    inside = False
                    break
            if inside:
                sums += np.array([x, y, z])
                count += 1
        if count and used[frame].sum() >= 2:
            centers[frame] = sums / count
            found[frame] = True
    return centers, found


# ---- the whole animal's hull, for its heading -----------------------------------------------------------------------


@dataclass(frozen=True)
class HullPlace:
    """The visual hull of one frame. centre: [3], of trunk and head. axis: [3] unit, the body's long axis.

    reach: how far tail, legs and all stretch from the center along +axis and along -axis.
    """

    centre: np.ndarray
    axis: np.ndarray
    reach: tuple[float, float]


def hull_place(
    calibration: Calibration, masks: list[Silhouette], rough: np.ndarray, body_length: float
) -> HullPlace | None:
    """Carves the animal about a rough center [3]; None where the masks have no common volume.

    Tail and legs are removed twice: from each mask, then from the solid, by opening with a disc and with a ball.
    """
    from scipy.ndimage import distance_transform_edt

    half = HULL_REACH * body_length
    # Cameras turned to look at the animal, whose small images show `half` around it.
    focal = np.linalg.norm(calibration.centres - rough, axis=1) / (2 * half)
    unit = torch.from_numpy(np.stack([focal, focal, 0 * focal + 0.5, 0 * focal + 0.5], axis=-1))
    cameras = Cameras.look_at(torch.from_numpy(calibration.centres), torch.from_numpy(rough), unit, 1, 1)
    cameras = cameras.resize(HULL_PIXELS, HULL_PIXELS)
    rotations = cameras.w2c[:, :3, :3].numpy()
    box = torch.from_numpy(rough - half).float(), torch.from_numpy(rough + half).float()

    def carved(silhouettes: list[Silhouette]) -> VisualHull:
        small = [
            rectify(
                calibration, k, np.zeros((*mask.window.shape, 3), np.uint8), mask, rotation=rotations[k],
                focal_px=float(focal[k]) * HULL_PIXELS, size=HULL_PIXELS,
            )[None, ..., 3]
            for k, mask in enumerate(silhouettes)
        ]  # fmt: skip
        alpha = torch.from_numpy(np.stack(small)).float() / 255
        return carve(alpha, cameras.to(torch.float32), resolution=HULL_VOXELS, bounds=box)

    whole = carved(masks)
    trunk = carved([replace(mask, window=openings(mask.window, HULL_LIMB_RADIUS)[0]) for mask in masks])
    if not len(trunk.index) or not len(whole.index):
        return None
    solid = np.zeros(len(trunk.grid), dtype=bool)
    solid[trunk.index.numpy()] = True
    solid = np.pad(solid.reshape(trunk.grid.shape), 1)
    radius = HULL_CORE_RADIUS * trunk.volume ** (1 / 3) / trunk.grid.voxel
    core = distance_transform_edt(solid) > radius
    if core.any():
        solid &= distance_transform_edt(~core) <= radius
    points = trunk.grid.lower.double().numpy() + (np.argwhere(solid) - 0.5) * trunk.grid.voxel  # padded by 1
    center = points.mean(axis=0)
    axis = np.linalg.eigh(np.cov((points - center).T))[1][:, -1]
    along = (whole.points.double().numpy() - center) @ axis
    return HullPlace(center, axis, (float(along.max()), float(-along.min())))


# ---- over time ------------------------------------------------------------------------------------------------------


def segments(frames: list[int], jumps: tuple[int, ...]) -> list[slice]:
    """The runs of kept frames between the recording's jumps in time (each jump: the first frame after it)."""
    cuts = [int(np.searchsorted(frames, jump)) for jump in sorted(jumps)]
    edges = [0, *cuts, len(frames)]
    return [slice(a, b) for a, b in zip(edges, edges[1:]) if b > a]


def smooth(centers: np.ndarray, frames: list[int], num_frames: int, jumps: tuple[int, ...]) -> np.ndarray:
    """Averages centers [t, 3] over num_frames frames of the video, weighted by a triangle; never across a jump."""
    result = centers.copy()
    for part in segments(frames, jumps) if num_frames >= 2 else []:
        times = np.array(frames[part], dtype=np.float64)
        for index, time in enumerate(times):
            # A window of the frames near enough: the weights elsewhere are 0.
            low, high = np.searchsorted(times, [time - num_frames / 2, time + num_frames / 2], side="left")
            weight = 1.0 - np.abs(times[low:high] - time) / (num_frames / 2 + 0.5)
            result[part][index] = weight @ centers[part][low:high] / weight.sum()
    return result


def floor_up(centers: np.ndarray, guess: np.ndarray, body_length: float, source: str) -> np.ndarray:
    """[3] unit normal of the floor an animal walks on: of the plane its centers [t, 3] lie in, on the guess's side.

    Frames in which it rears or jumps are outvoted.
    """
    weights = np.ones(len(centers))
    for _ in range(20):
        offset = centers - weights @ centers / weights.sum()
        values, vectors = np.linalg.eigh((offset * weights[:, None]).T @ offset / weights.sum())
        weights = robust_weights(np.abs(offset @ vectors[:, 0]), 1e-6 * body_length)
    walked = math.sqrt(max(values[1], 0.0))
    if len(centers) < 3 or walked < MIN_SPREAD * body_length:
        raise ValueError(
            f"{source}: --up floor needs an animal that walks about; its centers spread by {walked:.3g} across the "
            f"direction it moves in most, {MIN_SPREAD * body_length:.3g} are needed; give --up rig or an axis"
        )
    return vectors[:, 0] * (1.0 if vectors[:, 0] @ guess > 0 else -1.0)


def rig_up(calibration: Calibration) -> np.ndarray:
    """[3] unit: the mean of the cameras' own up directions, which is the room's when they stand around the animal."""
    mean = -calibration.w2c[:, 1, :3].mean(axis=0)
    length = float(np.linalg.norm(mean))
    if length < 0.3:
        raise ValueError(
            f"{calibration.source}: the cameras do not agree on what is up (mean of their up directions {length:.2f} "
            "long); give --up an axis, or --up floor"
        )
    return mean / length


def turn_to_z(up: np.ndarray) -> np.ndarray:
    """[3, 3] the smallest rotation that turns unit vector `up` to +z."""
    from scipy.spatial.transform import Rotation

    return Rotation.align_vectors([0.0, 0.0, 1.0], up)[0].as_matrix()


def headings_deg(
    places: list[HullPlace], centers: np.ndarray, frames: list[int], *, rule: str, rate: float, body_length: float,
    jumps: tuple[int, ...] = (),
) -> np.ndarray:  # fmt: skip
    """[t] azimuth of the nose, degrees as in multiview/rig.py, from the body's long axes and a rule for their ends.

    rule `pca`: the tail reaches farther from the center than the nose. `motion`: a mouse that walks goes forward. Both
    count as evidence for every frame; which way round each axis is follows for a whole run of frames together, since an
    animal does not turn about between two of them (the best path over two states, Viterbi 1967).
    """
    axes = np.stack([place.axis for place in places])
    angles = np.degrees(np.arctan2(-axes[:, 0], -axes[:, 1]))
    result = np.empty(len(places))
    for part in segments(frames, jumps):
        if rule == "pca":
            evidence = np.array([(place.reach[1] - place.reach[0]) / body_length for place in places[part]])
        elif len(frames[part]) < 2:
            evidence = np.zeros(len(frames[part]))
        else:
            times = np.array(frames[part], dtype=np.float64) / (rate or 1.0)
            speed = (np.gradient(centers[part], times, axis=0) * axes[part]).sum(axis=1)
            evidence = np.where(np.abs(speed) > MIN_SPEED * body_length, speed / body_length, 0.0)
        result[part] = angles[part] + 180.0 * _best_flips(angles[part], evidence)
    return result % 360.0


def _best_flips(angles: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """[t] bool: which axes to turn round. evidence: positive where +axis is the nose."""
    turning = np.abs((np.diff(angles) + 180.0) % 360.0 - 180.0) / 90.0 - 1.0  # -1 same way .. 1 opposite
    cost = np.array([0.0, 0.0])
    choices = np.zeros((len(angles), 2), dtype=int)
    for index, value in enumerate(evidence):
        if index:
            step = 0.5 * turning[index - 1]
            moved = cost[:, None] + np.array([[step, -step], [-step, step]])
            choices[index] = moved.argmin(axis=0)
            cost = moved.min(axis=0)
        cost = cost + np.array([-value, value])
    state = int(cost.argmin())
    flips = np.zeros(len(angles), dtype=bool)
    for index in range(len(angles) - 1, -1, -1):
        flips[index] = bool(state)
        state = choices[index, state]
    return flips
