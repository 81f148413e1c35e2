"""Whether an import gives back what was filmed: samples against the synthetic animal that the recording shows.

Needs only what a sample holds (`calibration_to_sample`) and the cloud of its frame in the recording's world.
"""

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.hull import carve
from multiview.image import composite
from multiview.sample import Sample
from recording.calibration.model import Calibration
from synthetic.photograph import LENS_OVERSAMPLING, has_lens

MARKER_MM = 0.8  # standard deviation of a marker
LIT = 0.15  # a marker's pixels are brighter than this
SAME, OTHER, RIM = 8.0, 5.0, 3.0  # deviations a marker must be from others of its colour, of any, from the mask's rim


def to_sample(sample: Sample) -> np.ndarray:
    """[4, 4] similarity, recording's world -> sample's world."""
    return np.array(sample.extra["calibration_to_sample"])


def moved_to_sample(sample: Sample, points: np.ndarray) -> Tensor:
    """Points [n, 3] of the recording's world -> [n, 3] float32 of the sample's."""
    matrix = to_sample(sample)
    return torch.from_numpy(points.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]).float()


def recording_cameras(sample: Sample) -> Cameras:
    """A sample's cameras [v], moved back into the recording's world."""
    matrix, c2w = torch.from_numpy(to_sample(sample)), sample.cameras.c2w.double()
    scale = matrix[:3, 0].norm()
    c2w[:, :3, :3] = (matrix[:3, :3] / scale).T @ c2w[:, :3, :3]
    c2w[:, :3, 3] = (c2w[:, :3, 3] - matrix[:3, 3]) @ matrix[:3, :3] / scale**2
    return replace(sample.cameras, c2w=c2w.float())


def direct_rendering(cloud, sample: Sample, render: Callable, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """What the sample's cameras see of the cloud: rgb [v, 3, h, w] over black, alpha [v, 1, h, w].

    Drawn as finely as the photographs were and averaged, since the renderer blurs every splat by a part of its pixel.
    """
    size = sample.cameras.width
    fine = size * float(calibration.K[:, 0, 0].mean()) / float(sample.cameras.fxfycxcy[:, 0].mean())
    fine = round(fine * (LENS_OVERSAMPLING if has_lens(calibration) else 1))
    rgb, alpha = render(cloud, recording_cameras(sample).resize(fine, fine))[:2]
    images = torch.cat([rgb, alpha], dim=1).permute(0, 2, 3, 1).numpy()
    shrunk = np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images])
    return torch.from_numpy(shrunk).permute(0, 3, 1, 2).split([3, 1], dim=1)  # each pixel the mean over its area


def marked(cloud):
    """Small opaque balls at the cloud's keypoints, in the three pure colours by turns; nothing else of it."""
    count = len(cloud.keypoints)
    return replace(
        cloud, means=cloud.keypoints.astype(np.float32), opacity=np.full(count, 0.99, np.float32),
        log_scales=np.full((count, 3), np.log(MARKER_MM), np.float32),
        quats=np.tile(np.float32([1, 0, 0, 0]), (count, 1)), rgb=np.eye(3, dtype=np.float32)[np.arange(count) % 3],
    )  # fmt: skip


def marker_errors(sample: Sample, keypoints: np.ndarray) -> np.ndarray:
    """[n, 2] where the markers of `marked` are seen, minus where the sample's cameras project them; pixels.

    keypoints: [k, 3] in the recording's world. Only markers that stand clear of others of their colour and of the
    mask's rim count; every bright spot is found in the picture first, and then given to the nearest projection.
    """
    points = moved_to_sample(sample, keypoints)
    expected, depth = (part.numpy() for part in sample.cameras.project(points.expand(len(sample.rgba), -1, -1)))
    spread = MARKER_MM * np.linalg.norm(to_sample(sample)[:3, 0]) * float(sample.cameras.fxfycxcy[0, 0]) / depth.mean()
    pictures, errors = composite(sample.rgba, 0.0).numpy(), []
    for view, channel in np.ndindex(len(pictures), 3):
        light, places = pictures[view, channel], expected[view]
        own = np.arange(len(places)) % 3 == channel
        count, labels = cv2.connectedComponents((light > LIT).astype(np.uint8))
        for label in range(1, count):
            rows, columns = np.nonzero(labels == label)
            weight = light[rows, columns] - LIT
            found = np.array([(columns + 0.5) @ weight, (rows + 0.5) @ weight]) / weight.sum()
            nearest = int(np.where(own, np.linalg.norm(places - found, axis=1), np.inf).argmin())
            apart = np.linalg.norm(places - places[nearest], axis=1)
            apart[nearest] = np.inf
            left, top = np.maximum((places[nearest] - RIM * spread).astype(int), 0)
            right, bottom = (places[nearest] + RIM * spread).astype(int) + 1
            is_clear = sample.rgba[view, 3, top:bottom, left:right].min() > 0.99
            if apart[own].min() > SAME * spread and apart.min() > OTHER * spread and is_clear:
                errors.append(found - places[nearest])
    return np.array(errors).reshape(-1, 2)


def share_in_hull(sample: Sample, points: np.ndarray, resolution: int = 128) -> float:
    """Share of points [n, 3] of the recording's world that the visual hull of the sample's masks holds.

    A point on the hull's own surface may lie in a voxel whose centre is outside, so one voxel more is allowed.
    """
    hull = carve(sample.rgba[:, 3:], sample.cameras, resolution=resolution)
    filled = torch.zeros(hull.shape)
    filled.view(-1)[hull.index] = 1
    near = torch.nn.functional.max_pool3d(filled[None, None], 3, 1, 1)[0, 0] > 0
    cell = ((moved_to_sample(sample, points) - hull.lower) / hull.voxel).floor().long()
    within = ((cell >= 0) & (cell < torch.tensor(hull.shape))).all(dim=1)
    return float(near[tuple(cell[within].T)].sum()) / len(points)
