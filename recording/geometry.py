"""How large the animal becomes, which camera is which view, and where the cameras of a sample stand.

Two cameras stand behind every processed view. The *true* camera sits where the real one does, turned to look at the
animal's center; its image is an exact warp of the photograph. The *label* camera is what is written down. With
`framing` exact or fill and `poses` exact they are one. Otherwise (framing facelift: distance and focal length of the
released weights; poses nearest: the rig's directions) they differ, the image is zoomed so that both agree to first
order at the animal, and the rest is measured and reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from multiview.cameras import Cameras, direction
from multiview.rig import FACELIFT_DISTANCE, FACELIFT_FOCAL, View, ViewRig
from recording.calibration.model import Calibration
from recording.settings import ImportSettings

STANDARD_BODY_LENGTH = 1.2  # world units, nose to tail base, where the framing fills the image
CALIBRATED = "calibrated"  # the rig name that means: whatever the cameras are


def directions_from(centers: np.ndarray, camera_centers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Azimuth, elevation (degrees) and distance, each [t, v], of the cameras [v, 3] seen from centers [t, 3]."""
    offset = camera_centers[None] - centers[:, None]
    distance = np.linalg.norm(offset, axis=-1)
    azimuth = np.degrees(np.arctan2(-offset[..., 0], -offset[..., 1])) % 360.0
    return azimuth, np.degrees(np.arcsin(offset[..., 2] / distance)), distance


def angular_distance(azimuth_a, elevation_a, azimuth_b, elevation_b) -> np.ndarray:
    """Angle between directions, degrees; arguments broadcast."""
    azimuth = np.radians(np.asarray(azimuth_a) - azimuth_b)
    a, b = np.radians(elevation_a), np.radians(elevation_b)
    return np.degrees(np.arccos(np.clip(np.sin(a) * np.sin(b) + np.cos(a) * np.cos(b) * np.cos(azimuth), -1.0, 1.0)))


def circular_mean_deg(angles: np.ndarray) -> np.ndarray:
    """Mean direction over the first axis, degrees."""
    radians = np.radians(angles)
    return np.degrees(np.arctan2(np.sin(radians).mean(0), np.cos(radians).mean(0))) % 360.0


def assign_views(
    azimuth: np.ndarray, elevation: np.ndarray, rig: ViewRig, references: Sequence[int] | None
) -> tuple[list[int], np.ndarray]:
    """Finds which camera is which view of the rig, by measured direction: never by camera number.

    azimuth, elevation: [v] degrees. references: cameras that may be the rig's reference view, from which azimuths then
    count (the one with which the others fit best is taken); None: azimuths count from the animal's front, as the rig's.
    Returns the camera of each view and the angle each is off, degrees.
    """
    best, wanted, reference = (math.inf, [], np.zeros(0)), rig_angles(rig)[..., None], rig.reference_view
    for camera in [None] if references is None else references:
        turned = azimuth if camera is None else azimuth - azimuth[camera] + wanted[0, reference]
        off = angular_distance(*wanted, turned[None], elevation[None])
        cost = off**2
        if camera is not None:
            cost[reference, np.arange(len(azimuth)) != camera] = 1e9
        rows, columns = linear_sum_assignment(cost)
        total = float(cost[rows, columns].sum())
        if total < best[0] - 1e-9:
            best = (total, columns.tolist(), off[rows, columns])
    return best[1], best[2]


def rig_angles(rig: ViewRig) -> np.ndarray:
    """Azimuths and elevations [2, v] of a rig's views, degrees."""
    return np.array([(view.azimuth_deg, view.elevation_deg) for view in rig.views]).T


@dataclass(frozen=True)
class Plan:
    """The framing of a whole dataset, and the cameras of its t frames, in view order."""

    rig: ViewRig  # what the dataset's views amount to: label cameras, mean over the frames
    requested: ViewRig | None  # the rig the views are named after, None for `calibrated`
    scale: float  # world units per unit of the calibration, on average
    focal: float  # label focal length over width
    body_length: float  # in the calibration's unit
    zoom: float  # at most 1, see `make_plan`
    view_off_deg: np.ndarray  # [v] how far each view's mean direction is from the requested rig's
    orders: np.ndarray  # [t, v] camera of each view
    true_rotation: np.ndarray  # [t, v, 3, 3] world (of the calibration) to the true cameras' axes
    true_focal: np.ndarray  # [t, v] over width
    label: Cameras  # [t, v] float64 (unit image, width 1) in the sample's world
    to_sample: np.ndarray  # [t, 4, 4] similarity, calibration's world -> sample's world
    deviation_deg: np.ndarray  # [t, v] of each frame's directions from the dataset's
    extents: np.ndarray | None = None  # [t, v] from `mask_extents`, where there are masks


def make_plan(
    calibration: Calibration, centers: np.ndarray, settings: ImportSettings, *, rig: ViewRig | None, body_length: float,
    zoom: float = 1.0, headings_deg: np.ndarray | None = None,
) -> Plan:  # fmt: skip
    """Decides the dataset's scale, focal length, names of the views and cameras, from the animal's centers [t, 3].

    rig: the rig asked for, None for `calibrated`. body_length: of the animal, in the calibration's unit. zoom: at most
    1, how much smaller than the standard the animal is made so that nothing is clipped. headings_deg: [t] azimuth of
    the animal's nose, for rigs that count from there.
    """
    seen = directions_from(centers, calibration.centres)  # azimuth, elevation, distance, each [t, camera]
    named, orders, turn, off = _named_views(calibration, rig, seen, settings.reference_camera, headings_deg)
    mean_distance, exact_poses = float(seen[2].mean()), settings.poses == "exact"
    scale, focal = zoom * STANDARD_BODY_LENGTH / body_length, named.focal
    if settings.framing == "exact":
        scale = named.distance / mean_distance * (1.0 if exact_poses else zoom)
        focal = focal * (zoom if exact_poses else 1.0)
    elif settings.framing == "fill" and exact_poses:
        focal = named.focal / named.distance * mean_distance * scale
    elif settings.framing == "fill":
        named = named.with_framing("fill")
        focal = named.focal
    named, label_distance = replace(named, framing=settings.framing), None  # None: the true distances
    if settings.framing == "facelift" or not exact_poses:
        label_distance = np.array([named.view_distance(view) for view in named.views])
    scales = np.full((len(centers), 1), scale)
    if settings.scale == "sample":
        scales = scale * mean_distance / seen[2].mean(axis=1, keepdims=True)
    azimuth, elevation, distance = (np.take_along_axis(one, orders, axis=1) for one in seen)  # [t, view]
    azimuth, dataset_rig = azimuth + turn[:, None], named
    if exact_poses:
        means, far = circular_mean_deg(azimuth), label_distance
        if headings_deg is None:  # the reference view's azimuth is the rig's in every frame
            means[named.reference_view] = named.views[named.reference_view].azimuth_deg
        if far is None:
            far = (distance * scale).mean(0)
        columns = zip(named.view_names, means.tolist(), elevation.mean(0).tolist(), far.tolist(), strict=True)
        name, views = f"{named.name}-measured", tuple(View(*view) for view in columns)
        name = CALIBRATED if named.name == CALIBRATED else name
        measured = replace(named, name=name, views=views, distance=float(far.mean()), focal=focal)
        dataset_rig = named if rig is not None and not measured.differences(named) else measured
    angles, far = rig_angles(dataset_rig), distance * scales if label_distance is None else label_distance
    stand = (azimuth, elevation) if exact_poses else angles
    eyes = direction(*map(torch.from_numpy, stand)) * torch.from_numpy(far)[..., None]
    unit, origin = torch.tensor([focal, focal, 0.5, 0.5], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    looked_at = torch.from_numpy(centers)[:, None]
    true = Cameras.look_at(torch.from_numpy(calibration.centres[orders]), looked_at, unit, 1, 1)
    to_sample = np.tile(np.eye(4), (len(centers), 1, 1))
    for matrix, center, angle, own in zip(to_sample, centers, np.radians(-turn), scales, strict=True):
        cos, sin = math.cos(angle), math.sin(angle)  # azimuth runs clockwise
        matrix[:3, :3] = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]) * own
        matrix[:3, 3] = -matrix[:3, :3] @ center
    return Plan(
        dataset_rig, rig, scale, focal, body_length, zoom, off, orders, true.w2c[..., :3, :3].numpy(),
        focal * distance * scales / far, Cameras.look_at(eyes.expand(*orders.shape, 3), origin, unit, 1, 1), to_sample,
        angular_distance(azimuth, elevation, *angles),
    )  # fmt: skip


def _named_views(
    calibration: Calibration, rig: ViewRig | None, seen: tuple[np.ndarray, ...], reference_camera: int | None,
    headings_deg: np.ndarray | None,
) -> tuple[ViewRig, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The rig whose names the views take, the camera of each view [t, v], how far azimuths are turned to be the rig's
    [t], degrees the views are off [v]. Raises ValueError for a rig that the recording cannot have.
    """
    (azimuth, elevation, _), by_heading = seen, headings_deg is not None
    if elevation.mean() < -5.0:
        stand = f"{calibration.source}: the cameras stand {-elevation.mean():.0f} degrees below the animal on average"
        raise ValueError(f"{stand}, so the world's +z does not point up; name the axis that does with --up")
    if reference_camera is not None and not 0 <= reference_camera < len(calibration):
        raise ValueError(f"--reference_camera must be 0..{len(calibration) - 1}, got {reference_camera}")
    if rig is None:  # views in order of azimuth from the reference camera, named by it
        first = reference_camera or 0
        angles = circular_mean_deg(azimuth - azimuth[:, [first]])
        angles[first] = 0.0
        pairs = [(float(angles[k]), float(elevation[:, k].mean())) for k in angles.argsort()]
        views = tuple(View(f"azimuth_{angle:.1f}", angle, up) for angle, up in pairs)
        rig = ViewRig(name=CALIBRATED, views=views, distance=FACELIFT_DISTANCE, focal=FACELIFT_FOCAL)
    if rig.num_views != len(calibration):
        raise ValueError(
            f"the recording has {len(calibration)} cameras, rig {rig.name} has {rig.num_views} views; choose a rig "
            f"of {len(calibration)} views, or --rig {CALIBRATED} to name the views by their measured directions"
        )
    if (rig.azimuth_zero == "heading") != by_heading:
        counts = "the reference view" if by_heading else "the animal's own front"
        raise ValueError(
            f"rig {rig.name} counts azimuth from {counts}: "
            "rigs that count from the front (--rig facelift6) need --heading motion or pca, rigs that count from the "
            "reference view (--rig mouse6) need --heading none"
        )
    if by_heading:
        each = [assign_views(a - h, e, rig, None) for a, e, h in zip(azimuth, elevation, headings_deg, strict=True)]
        return rig, np.array([order for order, _ in each]), -headings_deg, np.mean([off for _, off in each], axis=0)
    cameras = range(len(calibration)) if reference_camera is None else [reference_camera]
    mean_azimuth = circular_mean_deg(azimuth - azimuth[:, [0]])
    order, off = assign_views(mean_azimuth, elevation.mean(0), rig, cameras)
    turn = rig.views[rig.reference_view].azimuth_deg - azimuth[:, order[rig.reference_view]]
    return rig, np.tile(order, (len(azimuth), 1)), turn, off


def label_error(plan: Plan, calibration: Calibration, index: int) -> tuple[float, float]:
    """How far frame `index`'s label cameras project the animal's ends from the images, over its half length.

    Root mean square and maximum over the views and over points on a sphere of the body's length around its center; 0
    where the labels are exact.
    """
    count, to_sample = 64, plan.to_sample[index]
    height = np.linspace(-1 + 1 / count, 1 - 1 / count, count)
    angle = np.arange(count) * math.pi * (3 - math.sqrt(5))
    ring = np.sqrt(1 - height**2)
    points = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=-1) * plan.body_length / 2
    world = points + np.linalg.solve(to_sample[:3, :3], -to_sample[:3, 3])
    offset = world[None] - calibration.centres[plan.orders[index]][:, None]
    true = np.einsum("vij,vnj->vni", plan.true_rotation[index], offset)
    true = true[..., :2] / true[..., 2:] * plan.true_focal[index][:, None, None] + 0.5
    sample = torch.from_numpy(world @ to_sample[:3, :3].T + to_sample[:3, 3])
    label, _ = plan.label[index].project(sample.expand(len(offset), -1, -1))
    error = np.linalg.norm(true - label.numpy(), axis=-1)
    scale = float(np.linalg.norm(to_sample[0, :3]))
    half = plan.focal * scale * plan.body_length / 2 / float(plan.label[index].distance.mean())
    return float(np.sqrt((error**2).mean()) / half), float(error.max() / half)


def mask_extents(calibration: Calibration, plan: Plan, hulls: list[list[np.ndarray]]) -> np.ndarray:
    """[t, v] how far each view's mask reaches from the image's center, over half its width: above 1 it is clipped.

    hulls: [camera][t], [n, 2] pixels of the photograph. Infinite behind a camera.
    """
    extents = np.empty(plan.orders.shape)
    frames, slots = np.arange(len(extents)), plan.orders.argsort(axis=1)  # [t, camera] its view
    for camera, own in enumerate(hulls):
        lengths = [len(hull) for hull in own]
        rays, at = calibration.rays(camera, np.concatenate(own)), (frames, slots[:, camera])
        points = np.einsum("nij,nj->ni", np.repeat(plan.true_rotation[at], lengths, axis=0), rays)
        before = points[:, 2] > 0
        reach = np.full(len(points), np.inf)
        reach[before] = np.abs(points[before, :2] / points[before, 2:]).max(axis=1)
        extents[at] = np.maximum.reduceat(reach, np.cumsum([0, *lengths[:-1]])) * plan.true_focal[at] / 0.5
    return extents
