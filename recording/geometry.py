"""How large the animal becomes, which camera is which view, and where the cameras of a sample stand.

Two cameras stand behind every processed view. The *true* camera sits where the real one does, turned to look at the
animal's center; its image is an exact warp of the photograph. The *label* camera is what is written down. With
`framing` exact or fill and `poses` exact they are one. Otherwise (framing facelift: distance and focal length of the
released weights; poses nearest: the rig's directions) they differ, the image is zoomed so that both agree to first
order at the animal, and the rest is measured and reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

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


def circular_mean_deg(angles: np.ndarray, axis: int = 0) -> np.ndarray:
    radians = np.radians(angles)
    return np.degrees(np.arctan2(np.sin(radians).mean(axis), np.cos(radians).mean(axis))) % 360.0


def rig_angles(rig: ViewRig) -> tuple[np.ndarray, np.ndarray]:
    """Azimuths and elevations [v] of a rig's views, degrees."""
    return np.array([view.azimuth_deg for view in rig.views]), np.array([view.elevation_deg for view in rig.views])


def assign_views(
    azimuth: np.ndarray, elevation: np.ndarray, rig: ViewRig, reference_camera: int | None
) -> tuple[list[int], np.ndarray]:
    """Finds which camera is which view of the rig, by measured mean direction: never by camera number.

    azimuth, elevation: [v] degrees. reference_camera: the camera of the rig's reference view; None tries each and takes
    the one with which the others fit best. Returns the camera of each view and the angle each is off, degrees.
    """
    reference = rig.reference_view
    rig_azimuth, rig_elevation = rig_angles(rig)
    best: tuple[float, list[int], np.ndarray] | None = None
    for camera in range(len(azimuth)) if reference_camera is None else [reference_camera]:
        turned = azimuth - azimuth[camera] + rig_azimuth[reference]
        off = angular_distance(rig_azimuth[:, None], rig_elevation[:, None], turned[None], elevation[None])
        cost = off**2
        cost[reference, np.arange(len(azimuth)) != camera] = 1e9
        rows, columns = linear_sum_assignment(cost)
        total = float(cost[rows, columns].sum())
        if best is None or total < best[0] - 1e-9:
            best = (total, columns.tolist(), off[rows, columns])
    return best[1], best[2]


def assign_by_heading(
    azimuth: np.ndarray, elevation: np.ndarray, headings_deg: np.ndarray, rig: ViewRig
) -> tuple[np.ndarray, np.ndarray]:
    """The same for azimuths counted from the animal's front: per frame the camera of each view [t, v], degrees off."""
    rig_azimuth, rig_elevation = rig_angles(rig)
    orders, off = [], []
    for around, up, heading in zip(azimuth, elevation, headings_deg, strict=True):
        angle = angular_distance(rig_azimuth[:, None], rig_elevation[:, None], (around - heading)[None], up[None])
        rows, columns = linear_sum_assignment(angle**2)
        orders.append(columns)
        off.append(angle[rows, columns])
    return np.stack(orders), np.stack(off)


@dataclass(frozen=True)
class Plan:
    """Everything that is one for the whole dataset.

    rig: what the dataset's views amount to (label cameras, mean over the frames). requested: the rig the views are
    named after, None for `calibrated`. order: camera of each view, of the first frame where it follows the animal's
    heading (see `Placement.order`). scale: world units per unit of the calibration, of all samples, or on average where
    `scaling` is sample. mean_distance: of the cameras from the animal, in the calibration's unit.
    focal: label focal length over width; label_distance: [v] per view, None where the true distance is the label.
    body_length: in the calibration's unit. zoom: at most 1, see `make_plan`. view_off_deg: [v] how far each view's mean
    direction is from the requested rig's. extents: [t, v] from `mask_extents`, once the frames are placed.
    """

    rig: ViewRig
    requested: ViewRig | None
    order: list[int]
    scale: float
    focal: float
    label_distance: np.ndarray | None
    framing: str
    poses: str
    body_length: float
    zoom: float
    view_off_deg: np.ndarray
    mean_distance: float
    scaling: str = "dataset"
    by_heading: bool = False
    extents: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def reference_camera(self) -> int:
        return self.order[self.rig.reference_view]


@dataclass(frozen=True)
class Placement:
    """One frame's cameras in view order. order: [v] camera of each view. scale: world units per calibration unit.

    true_rotation: [v, 3, 3] world (of the calibration) to the true cameras' axes. true_focal: [v] over width.
    label: Cameras [v] float64 (unit image, width 1) in the sample's world. to_sample: [4, 4] similarity, calibration's
    world -> sample's world. deviation_deg: [v] of this frame's directions from the dataset's.
    """

    order: list[int]
    scale: float
    centre: np.ndarray
    true_rotation: np.ndarray
    true_focal: np.ndarray
    label: Cameras
    to_sample: np.ndarray
    deviation_deg: np.ndarray

    def label_cameras(self, size: int) -> Cameras:
        """The cameras to write down, for square images of `size` pixels, float32."""
        return self.label.resize(size, size).to(torch.float32)


def make_plan(
    calibration: Calibration,
    centers: np.ndarray,
    settings: ImportSettings,
    *,
    rig: ViewRig | None,
    body_length: float,
    zoom: float = 1.0,
    headings_deg: np.ndarray | None = None,
) -> Plan:
    """Decides the dataset's one scale, focal length and naming of the views, from the animal's centers [t, 3].

    rig: the rig asked for, None for `calibrated`. body_length: of the animal, in the calibration's unit. zoom: at most
    1, how much smaller than the standard the animal is made so that nothing is clipped. headings_deg: [t] azimuth of
    the animal's nose, for rigs that count from there. settings: framing, poses, scale (`sample` gives each sample the
    scale at which its own mean camera distance is the dataset's), reference_camera.
    """
    framing, poses = settings.framing, settings.poses
    azimuth, elevation, distance = directions_from(centers, calibration.centres)
    named = _named_rig(calibration, rig, azimuth, elevation, settings.reference_camera, headings_deg is not None)
    if headings_deg is None:
        mean_azimuth = circular_mean_deg(azimuth - azimuth[:, [0]])
        order, off = assign_views(mean_azimuth, elevation.mean(0), named, settings.reference_camera)
        orders = np.tile(order, (len(centers), 1))
        turn = named.views[named.reference_view].azimuth_deg - azimuth[:, order[named.reference_view]]
    else:
        orders, frame_off = assign_by_heading(azimuth, elevation, headings_deg, named)
        order, off, turn = orders[0].tolist(), frame_off.mean(axis=0), -headings_deg
    mean_distance = float(distance.mean())
    label_distance, focal = None, named.focal
    if framing == "exact":
        scale = named.distance / mean_distance
        if poses == "exact":
            focal = focal * zoom
        else:
            scale = scale * zoom
    else:
        scale = zoom * STANDARD_BODY_LENGTH / body_length
        if framing == "fill" and poses == "exact":
            focal = named.focal / named.distance * mean_distance * scale
    if poses == "nearest" and framing == "fill":
        named = named.with_framing("fill")
        focal = named.focal
    if poses == "nearest" or framing == "facelift":
        label_distance = np.array([named.view_distance(view) for view in named.views])
    seen = [np.take_along_axis(values, orders, axis=1) for values in (azimuth, elevation, distance * scale)]
    seen[0] = seen[0] + turn[:, None]
    dataset_rig = replace(named, framing=framing)
    if poses == "exact":
        measured = _mean_rig(named, seen, label_distance, focal, framing, fixed=headings_deg is None)
        dataset_rig = dataset_rig if rig is not None and not measured.differences(dataset_rig) else measured
    return Plan(
        rig=dataset_rig, requested=rig, order=order, scale=scale, focal=focal, label_distance=label_distance,
        framing=framing, poses=poses, body_length=body_length, zoom=zoom, view_off_deg=off, mean_distance=mean_distance,
        scaling=settings.scale, by_heading=headings_deg is not None,
    )  # fmt: skip


def _named_rig(
    calibration: Calibration,
    rig: ViewRig | None,
    azimuth: np.ndarray,
    elevation: np.ndarray,
    reference_camera: int | None,
    by_heading: bool,
) -> ViewRig:
    """Returns the rig whose names the views take; refused where the recording cannot have them."""
    if elevation.mean() < -5.0:
        raise ValueError(
            f"{calibration.source}: the cameras stand {-elevation.mean():.0f} degrees below the animal on average, so "
            "the world's +z does not point up; name the axis that does with --up"
        )
    if reference_camera is not None and not 0 <= reference_camera < len(calibration):
        raise ValueError(f"--reference_camera must be 0..{len(calibration) - 1}, got {reference_camera}")
    if rig is None:  # views in order of azimuth from the reference camera, named by it
        first = reference_camera or 0
        mean_azimuth = circular_mean_deg(azimuth - azimuth[:, [first]])
        mean_azimuth[first] = 0.0
        views = tuple(
            View(f"azimuth_{mean_azimuth[k]:.1f}", float(mean_azimuth[k]), float(elevation[:, k].mean()))
            for k in np.argsort(mean_azimuth)
        )
        rig = ViewRig(name=CALIBRATED, views=views, distance=FACELIFT_DISTANCE, focal=FACELIFT_FOCAL)
    if rig.num_views != len(calibration):
        raise ValueError(
            f"the recording has {len(calibration)} cameras, rig {rig.name} has {rig.num_views} views; choose a rig "
            f"of {len(calibration)} views, or --rig {CALIBRATED} to name the views by their measured directions"
        )
    if rig.azimuth_zero == "heading" and not by_heading:
        raise ValueError(
            f"rig {rig.name} counts azimuth from the animal's own front (azimuth_zero: heading); find the front with "
            f"--heading motion or pca, or choose a rig that counts from the reference view, e.g. mouse6, or --rig "
            f"{CALIBRATED}"
        )
    if by_heading and rig.azimuth_zero != "heading":
        raise ValueError(
            f"--heading turns every sample so that the animal faces azimuth 0, rig {rig.name} counts azimuth from the "
            "reference view; choose a rig that counts from the animal's front, e.g. --rig facelift6, or --heading none"
        )
    return rig


def _mean_rig(named, seen, label_distance, focal, framing, fixed: bool) -> ViewRig:
    """Returns the rig that the dataset's views amount to: directions averaged over the frames.

    seen: azimuth (the rig's), elevation, distance (world units), each [t, v]. fixed: the reference view's azimuth is
    the rig's in every frame.
    """
    azimuth, elevation, distance = seen
    mean_azimuth = circular_mean_deg(azimuth)
    if fixed:
        mean_azimuth[named.reference_view] = named.views[named.reference_view].azimuth_deg
    distances = distance.mean(0) if label_distance is None else label_distance
    views = tuple(
        View(view.name, float(angle), float(up), float(far))
        for view, angle, up, far in zip(named.views, mean_azimuth, elevation.mean(0), distances, strict=True)
    )
    name = named.name if named.name == CALIBRATED else f"{named.name}-measured"
    return replace(named, name=name, views=views, distance=float(distances.mean()), focal=focal, framing=framing)


def place(plan: Plan, calibration: Calibration, center: np.ndarray, heading_deg: float | None = None) -> Placement:
    """Places true and label cameras of one frame, for the animal's center [3] in the calibration's world.

    heading_deg: azimuth of its nose there, for a plan that was made by heading.
    """
    azimuth, elevation, distance = directions_from(center[None], calibration.centres)
    scale = plan.scale
    if plan.scaling == "sample":
        scale = scale * plan.mean_distance / float(distance.mean())
    if plan.by_heading:
        orders, _ = assign_by_heading(azimuth, elevation, np.array([heading_deg]), plan.requested)
        order, turn = orders[0].tolist(), -heading_deg
    else:
        order, reference = plan.order, plan.rig.reference_view
        turn = plan.rig.views[reference].azimuth_deg - azimuth[0, order[reference]]
    azimuth, elevation, distance = azimuth[0, order] + turn, elevation[0, order], distance[0, order]
    rig_azimuth, rig_elevation = rig_angles(plan.rig)
    label_angles = (rig_azimuth, rig_elevation) if plan.poses == "nearest" else (azimuth, elevation)
    label_distance = distance * scale if plan.label_distance is None else plan.label_distance
    unit = torch.tensor([plan.focal, plan.focal, 0.5, 0.5], dtype=torch.float64)
    eyes = direction(*map(torch.from_numpy, label_angles)) * torch.from_numpy(label_distance)[:, None]
    true = Cameras.look_at(torch.from_numpy(calibration.centres[order]), torch.from_numpy(center), unit, 1, 1)
    to_sample = np.eye(4)
    angle = math.radians(-turn)  # azimuth runs clockwise
    to_sample[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    to_sample[:3, :3] *= scale
    to_sample[:3, 3] = -to_sample[:3, :3] @ center
    return Placement(
        order=order, scale=scale, centre=center, true_rotation=true.w2c[:, :3, :3].numpy(),
        true_focal=plan.focal * distance * scale / label_distance,
        label=Cameras.look_at(eyes, torch.zeros(3, dtype=torch.float64), unit, 1, 1), to_sample=to_sample,
        deviation_deg=angular_distance(azimuth, elevation, rig_azimuth, rig_elevation),
    )  # fmt: skip


def label_error(plan: Plan, calibration: Calibration, placement: Placement) -> tuple[float, float]:
    """How far the label cameras' projections of the animal's ends are from the images, as fractions of its half length.

    Root mean square and maximum over the views and over points on a sphere of the body's length around its center; 0
    where the labels are exact.
    """
    count = 64
    height = np.linspace(-1 + 1 / count, 1 - 1 / count, count)
    angle = np.arange(count) * math.pi * (3 - math.sqrt(5))
    ring = np.sqrt(1 - height**2)
    points = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=-1) * plan.body_length / 2
    world = points + placement.centre
    offset = world[None] - calibration.centres[placement.order][:, None]
    true = np.einsum("vij,vnj->vni", placement.true_rotation, offset)
    true = true[..., :2] / true[..., 2:] * placement.true_focal[:, None, None] + 0.5
    sample = world @ placement.to_sample[:3, :3].T + placement.to_sample[:3, 3]
    label, _ = placement.label.project(torch.from_numpy(sample).expand(len(placement.order), -1, -1))
    error = np.linalg.norm(true - label.numpy(), axis=-1)
    half = plan.focal * placement.scale * plan.body_length / 2 / float(placement.label.distance.mean())
    return float(np.sqrt((error**2).mean()) / half), float(error.max() / half)


def mask_extents(calibration: Calibration, placements: list[Placement], hulls: list[list[np.ndarray]]) -> np.ndarray:
    """[t, v] how far each view's mask reaches from the image's center, over half its width: above 1 it is clipped.

    hulls: [t][v] per camera (calibration's order), [n, 2] pixels of the photograph. Infinite behind a camera.
    """
    extents = np.empty((len(placements), len(calibration)))
    slots = np.argsort([placement.order for placement in placements], axis=1)  # [t, v] the view of each camera
    for camera in range(len(calibration)):
        lengths = [len(row[camera]) for row in hulls]
        rays = calibration.rays(camera, np.concatenate([row[camera] for row in hulls]))
        rotation = np.stack([one.true_rotation[slot] for one, slot in zip(placements, slots[:, camera], strict=True)])
        focal = np.array([one.true_focal[slot] for one, slot in zip(placements, slots[:, camera], strict=True)])
        points = np.einsum("nij,nj->ni", rotation[np.repeat(np.arange(len(hulls)), lengths)], rays)
        before = points[:, 2] > 0
        reach = np.full(len(points), np.inf)
        reach[before] = np.abs(points[before, :2] / points[before, 2:]).max(axis=1)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        extents[np.arange(len(hulls)), slots[:, camera]] = np.maximum.reduceat(reach, starts) * focal / 0.5
    return extents
