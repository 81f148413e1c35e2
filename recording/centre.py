"""The animal's place in every frame: its centre, its smoothing over time, the world's up, its heading.

The centre is that of the trunk and head, tail and legs not counted: where the origin of synthetic animals is. Rays
through the masks' centres of mass meet 2 to 3 mm from it, since each camera sees another side of the body; the centre
of the visual hull of masks without tail and legs is about 1 mm off (docs/benchmarks.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from multiview.cameras import Cameras
from multiview.hull import VisualHull, carve
from recording.calibration import Calibration
from recording.masks import MaskStatistics, Silhouette, without_thin_parts
from recording.rectify import photo_from_picture

CENTRES = ("hull", "triangulate")
HEADINGS = ("none", "motion", "pca")
TRUNK_POINTS = 24  # along each side of the cube in which the trunk's hull is looked for
TRUNK_REACH = 0.6  # body lengths: half that side
OUTVOTED = 0.2  # body lengths: a mask whose ray misses the others' meeting point by more shows something else
LENS_STEP = 0.02  # of a normalised picture: about the animal's size, over which the lens is taken as straight
HULL_PIXELS = 112  # of the small masks that are carved
HULL_VOXELS = 44  # along the hull
HULL_REACH = 0.9  # body lengths: half the side of the cube that is searched
# Parts thinner than twice this, over the square root of a mask's area (tail, most of the legs) and over the cube root
# of the hull's volume, are left out. Chosen on synthetic mice, whose centres are known.
HULL_LIMB_RADIUS = 0.16
HULL_CORE_RADIUS = 0.20
MIN_SPREAD = 0.2  # of the body's length: less walking about does not show where the floor's plane lies
MIN_SPEED = 0.5  # body lengths per second: slower motion says nothing about where the nose is


def triangulate(origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points nearest to rays [..., v, 3] (unit directions) from origins [v, 3], and their distances to each.

    Few wrong rays are outvoted: iteratively reweighted least squares on the perpendicular distances, weighted by
    1 / distance to the camera (what a pixel is worth) and by Geman-McClure's weight, which vanishes for rays that miss
    by far more than the median. Returns [..., 3] and [..., v].
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
        spread = np.maximum(2.0 * np.median(residuals, axis=-1, keepdims=True), 1e-3 * far)
        weights = (1.0 / (1.0 + (residuals / spread) ** 2)) ** 2 * (far / distances) ** 2
    return point, residuals


def locate(calibration: Calibration, masks: list[list[MaskStatistics]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The animal's centres [t, 3] from the masks' centres of mass, each ray's distance from them [t, v], lengths [t].

    masks: [t][v]. A length is that of the view that shows the body longest, so it belongs to the pose of its frame.
    """
    seen = np.array([[mask.centre for mask in row] for row in masks])
    directions = np.stack([calibration.rays(k, seen[:, k]) for k in range(len(calibration))], axis=1)
    centres, residuals = triangulate(calibration.centres, directions)
    distance = np.linalg.norm(calibration.centres - centres[:, None], axis=-1)
    focal = np.sqrt(calibration.K[:, 0, 0] * calibration.K[:, 1, 1])
    lengths = np.array([[mask.axis_length for mask in row] for row in masks]) * distance / focal
    return centres, residuals, lengths.max(axis=1)


# ---- the trunk's hull -----------------------------------------------------------------------------------------------


def trunk_centres(
    calibration: Calibration,
    masks: list[list[MaskStatistics]],
    rough: np.ndarray,
    residuals: np.ndarray,
    body_length: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Centres of mass [t, 3] of the visual hulls of the masks without tail and legs, and whether there is a hull [t].

    masks: [t][v]. rough: [t, 3] from `locate`, which also says how far each mask's ray misses it (residuals [t, v]): a
    mask whose ray misses by much shows something else and is left out. Without a hull the rough centre is returned.
    Points of a cube about the rough centre are projected into the masks; the lens is taken as straight around it.
    """
    from recording.kernels import carve_centres

    trunks = [[mask.trunk for mask in row] for row in masks]
    shapes = np.array([[(t.height, t.width) for t in row] for row in trunks])
    lengths = np.array([len(t.bits) for row in trunks for t in row])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).reshape(shapes.shape[:2])
    corners = np.array([[(t.x, t.y, t.step) for t in row] for row in trunks], dtype=np.float64)
    return carve_centres(
        _local_projections(calibration, rough, corners),
        residuals <= OUTVOTED * body_length,
        np.concatenate([t.bits for row in trunks for t in row]),
        starts,
        shapes,
        rough,
        TRUNK_REACH * body_length,
        TRUNK_POINTS,
    )


def _local_projections(calibration: Calibration, points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """[t, v, 3, 4] world -> pixels of reduced masks, homogeneous; exact at the points [t, 3] and straight around them.

    corners: [t, v, 3] x, y and step of the masks.
    """
    result = np.empty((*corners.shape[:2], 3, 4))
    near = LENS_STEP * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    for camera in range(len(calibration)):
        w2c = calibration.w2c[camera]
        seen = points @ w2c[:3, :3].T + w2c[:3, 3]
        middle = seen[:, :2] / seen[:, 2:]
        pixels = calibration.to_pixels(camera, middle[:, None] + near)  # [t, 5, 2]
        straight = np.zeros((len(points), 3, 3))
        straight[:, :2, 0] = (pixels[:, 1] - pixels[:, 2]) / (2 * LENS_STEP)
        straight[:, :2, 1] = (pixels[:, 3] - pixels[:, 4]) / (2 * LENS_STEP)
        straight[:, :2, 2] = pixels[:, 0] - (straight[:, :2, :2] @ middle[:, :, None])[..., 0]
        straight[:, :2, 2] -= corners[:, camera, :2]
        straight[:, :2] /= corners[:, camera, 2, None, None]
        straight[:, 2, 2] = 1.0
        result[:, camera] = straight @ w2c[:3]
    return result


# ---- visual hull ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HullPlace:
    """What the visual hull of one frame says. centre: [3], of trunk and head. axis: [3] unit, the body's long axis.

    reach: how far tail, legs and all stretch from the centre along +axis and along -axis.
    """

    centre: np.ndarray
    axis: np.ndarray
    reach: tuple[float, float]


def hull_place(
    calibration: Calibration, masks: list[Silhouette], rough: np.ndarray, body_length: float
) -> HullPlace | None:
    """Carves the animal about a rough centre [3]; None where the masks have no common volume.

    Tail and legs are removed twice: from each mask, then from the solid, by opening with a disc and with a ball.
    """
    half = HULL_REACH * body_length
    cameras, warps = _small_cameras(calibration, rough, half)
    box = torch.from_numpy(rough - half).float(), torch.from_numpy(rough + half).float()

    def carved(silhouettes: list[Silhouette]) -> VisualHull:
        small = np.stack([warp(mask) for warp, mask in zip(warps, silhouettes, strict=True)])
        return carve(torch.from_numpy(small)[:, None], cameras, resolution=HULL_VOXELS, bounds=box)

    whole = carved(masks)
    thick = [Silhouette(without_thin_parts(m.window, HULL_LIMB_RADIUS), m.x, m.y, m.size) for m in masks]
    trunk = carved(thick)
    if not len(trunk.index) or not len(whole.index):
        return None
    points = _opened(trunk)
    centre = points.mean(axis=0)
    axis = np.linalg.eigh(np.cov((points - centre).T))[1][:, -1]
    along = (whole.points.double().numpy() - centre) @ axis
    return HullPlace(centre, axis, (float(along.max()), float(-along.min())))


def _small_cameras(calibration: Calibration, rough: np.ndarray, half: float) -> tuple[Cameras, list]:
    """Cameras [v] turned to look at `rough`, whose small pictures show `half` around it, and the warps into them."""
    eyes = torch.from_numpy(calibration.centres)
    focal = np.linalg.norm(calibration.centres - rough, axis=1) / (2 * half)
    unit = torch.from_numpy(np.stack([focal, focal, 0 * focal + 0.5, 0 * focal + 0.5], axis=-1))
    cameras = Cameras.look_at(eyes, torch.from_numpy(rough), unit, 1, 1).resize(HULL_PIXELS, HULL_PIXELS)

    def warp_of(camera: int):
        rotation, focal_px = cameras.w2c[camera, :3, :3].numpy(), float(focal[camera]) * HULL_PIXELS
        return lambda mask: _small_mask(calibration, camera, mask, rotation, focal_px)

    return cameras.to(torch.float32), [warp_of(camera) for camera in range(len(calibration))]


def _small_mask(
    calibration: Calibration, camera: int, mask: Silhouette, rotation: np.ndarray, focal_px: float
) -> np.ndarray:
    """[HULL_PIXELS, HULL_PIXELS] float32 0..1, as `rectify` would show the mask; its rim need not be fine."""
    import cv2

    from recording.rectify import lens_maps

    # Reduced in place first, so that the warp reads every pixel.
    step = max(1, round(float(calibration.K[camera, 0, 0]) / focal_px))
    height, width = (-(-side // step) for side in mask.window.shape)
    padded = np.zeros((height * step, width * step), np.float32)
    padded[: mask.window.shape[0], : mask.window.shape[1]] = mask.window
    small = cv2.resize(padded, (width, height), interpolation=cv2.INTER_AREA)
    columns, rows = lens_maps(
        calibration, camera, photo_from_picture(calibration, camera, rotation, focal_px, HULL_PIXELS),
        HULL_PIXELS, HULL_PIXELS,
    )  # fmt: skip
    columns, rows = ((columns + 0.5 - mask.x) / step - 0.5, (rows + 0.5 - mask.y) / step - 0.5)
    return cv2.remap(small, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


def _opened(hull: VisualHull) -> np.ndarray:
    """[n, 3] float64 points of the hull's core: opened with a ball, so that what is thin is gone; all if all is."""
    from scipy.ndimage import distance_transform_edt

    solid = np.zeros(len(hull.grid), dtype=bool)
    solid[hull.index.numpy()] = True
    solid = np.pad(solid.reshape(hull.grid.shape), 1)
    radius = HULL_CORE_RADIUS * hull.volume ** (1 / 3) / hull.grid.voxel
    core = distance_transform_edt(solid) > radius
    if core.any():
        solid &= distance_transform_edt(~core) <= radius
    index = np.argwhere(solid) - 1
    return hull.grid.lower.double().numpy() + (index + 0.5) * hull.grid.voxel


# ---- over time ------------------------------------------------------------------------------------------------------


def segments(frames: list[int], jumps: tuple[int, ...]) -> list[slice]:
    """The runs of kept frames between the recording's jumps in time (each jump: the first frame after it)."""
    cuts = [int(np.searchsorted(frames, jump)) for jump in sorted(jumps)]
    edges = [0, *cuts, len(frames)]
    return [slice(a, b) for a, b in zip(edges, edges[1:]) if b > a]


def smooth(centres: np.ndarray, frames: list[int], num_frames: int, jumps: tuple[int, ...]) -> np.ndarray:
    """Centres [t, 3] averaged over num_frames frames of the video, weighted by a triangle; never across a jump."""
    result = centres.copy()
    if num_frames < 2:
        return result
    for part in segments(frames, jumps):
        times = np.array(frames[part], dtype=np.float64)
        for index, time in enumerate(times):
            # A window of the frames near enough: the weights elsewhere are 0.
            low, high = np.searchsorted(times, [time - num_frames / 2, time + num_frames / 2], side="left")
            weight = 1.0 - np.abs(times[low:high] - time) / (num_frames / 2 + 0.5)
            result[part][index] = weight @ centres[part][low:high] / weight.sum()
    return result


def floor_up(centres: np.ndarray, guess: np.ndarray, body_length: float, source: str) -> np.ndarray:
    """[3] unit normal of the floor an animal walks on: of the plane its centres [t, 3] lie in, on the guess's side.

    Frames in which it rears or jumps are outvoted (Geman-McClure's weights).
    """
    weights = np.ones(len(centres))
    for _ in range(20):
        middle = weights @ centres / weights.sum()
        offset = centres - middle
        values, vectors = np.linalg.eigh((offset * weights[:, None]).T @ offset / weights.sum())
        height = offset @ vectors[:, 0]
        spread = max(2.0 * float(np.median(np.abs(height))), 1e-6 * body_length)
        weights = (1.0 / (1.0 + (height / spread) ** 2)) ** 2
    walked = math.sqrt(max(values[1], 0.0))
    if len(centres) < 3 or walked < MIN_SPREAD * body_length:
        raise ValueError(
            f"{source}: --up floor needs an animal that walks about; its centres spread by {walked:.3g} across the "
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
    axis = np.cross(up, [0.0, 0.0, 1.0])
    sine, cosine = float(np.linalg.norm(axis)), float(up[2])
    if sine < 1e-9:
        return np.eye(3) if cosine > 0 else np.diag([1.0, -1.0, -1.0])
    x, y, z = axis / sine
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + sine * cross + (1 - cosine) * cross @ cross


def headings_deg(
    places: list[HullPlace], centres: np.ndarray, frames: list[int], *, rule: str, rate: float, body_length: float,
    jumps: tuple[int, ...] = (),
) -> np.ndarray:  # fmt: skip
    """[t] azimuth of the nose, degrees as in multiview/rig.py, from the body's long axes and a rule for their ends.

    rule `pca`: the tail reaches farther from the centre than the nose. `motion`: a mouse that walks goes forward. Both
    count as evidence for every frame; which way round each axis is follows for a whole run of frames together, since an
    animal does not turn about between two of them (the best path over two states, Viterbi 1967).
    """
    angles = np.array([math.degrees(math.atan2(-place.axis[0], -place.axis[1])) for place in places])
    evidence = np.array([(place.reach[1] - place.reach[0]) / body_length for place in places])
    result = np.empty(len(places))
    for part in segments(frames, jumps):
        own = evidence[part]
        if rule == "motion":
            own = _motion_evidence(np.stack([p.axis for p in places[part]]), centres[part], frames[part], rate)
            own = np.where(np.abs(own) > MIN_SPEED * body_length, own / body_length, 0.0)
        flipped = _best_flips(angles[part], own)
        result[part] = angles[part] + 180.0 * flipped
    return result % 360.0


def _motion_evidence(axes: np.ndarray, centres: np.ndarray, frames: list[int], rate: float) -> np.ndarray:
    """[t] speed along each axis, units per second."""
    if len(frames) < 2:
        return np.zeros(len(frames))
    velocity = np.gradient(centres, np.array(frames, dtype=np.float64) / (rate or 1.0), axis=0)
    return (velocity * axes).sum(axis=1)


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
