"""Everything that is measured on one sample: masks, light, sharpness, cameras, silhouettes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multiview.metrics import view_consistency
from multiview.sample import Sample
from recording.quality.tangency import DIRECTIONS, outline

RIM_ALPHA = 0.02  # more of the animal than this in the outermost row or column: it is clipped
OPAQUE_SHARE = 0.999  # a "mask" that covers so much of the picture is none
EMPTY_SHARE = 1e-5
DARK, BRIGHT = 0.02, 0.98  # luminance beyond which a pixel holds no detail
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Measured:
    """One sample's figures. views: one dict of numbers per view. points, intrinsics, w2c: as `tangency.Views`, [v]."""

    id: str
    folder: Path | None
    size: tuple[int, int]
    views: list[dict]
    points: np.ndarray
    intrinsics: np.ndarray
    w2c: np.ndarray
    view_names: list[str | None]


def measure_sample(sample: Sample, *, hulls: bool = True) -> Measured:
    """rgba [v, 4, h, w], cameras [v] -> figures; a view without a usable mask has None where it has no figure.

    hulls: whether to carve the hulls that predict each mask from the others, nearly all of the time.
    """
    alpha = sample.rgba[:, 3]
    width = sample.cameras.width
    views = [
        {**_camera_figures(sample, view), **_mask_figures(alpha[view]), **_light_figures(sample.rgba[view])}
        for view in range(len(alpha))
    ]
    _add_silhouettes(sample, views, hulls)
    points = np.full((len(alpha), DIRECTIONS, 2), np.nan)
    for view, figures in enumerate(views):
        # A clipped mask's hull ends at the border, where the animal does not.
        if figures["usable"] and not figures["clipped"]:
            points[view] = outline(alpha[view].numpy())
    return Measured(
        id=sample.id,
        folder=sample.folder,
        size=(width, sample.cameras.height),
        views=views,
        points=points,
        intrinsics=sample.cameras.fxfycxcy.double().numpy() / width,
        w2c=sample.cameras.w2c.double().numpy(),
        view_names=list(sample.view_names),
    )


def _camera_figures(sample: Sample, view: int) -> dict:
    """Where the camera stands and whether it looks at the origin; angles in degrees, lengths over the width."""
    camera = sample.cameras[[view]]
    fx, fy, cx, cy = camera.fxfycxcy[0].double().tolist()
    forward = camera.c2w[0, :3, 2]
    towards = torch.nn.functional.normalize(-camera.origins[0], dim=-1)
    return {
        "azimuth_deg": float(camera.azimuth_deg[0]),
        "elevation_deg": float(camera.elevation_deg[0]),
        "distance": float(camera.distance[0]),
        "focal": fx / camera.width,
        "focal_ratio": fy / fx,
        "cx": cx / camera.width,
        "cy": cy / camera.height,
        "look_off_deg": float(torch.rad2deg(torch.acos((forward @ towards).clamp(-1, 1)))),
    }


def _mask_figures(alpha: Tensor) -> dict:
    """alpha: [h, w]. area: share of the picture. centre: the body's centre from the picture's, over the width."""
    import cv2

    height, width = alpha.shape
    rim = torch.cat([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    area = float(alpha.mean())
    binary = (alpha > 0.5).numpy()
    usable = bool(binary.any()) and EMPTY_SHARE < area < OPAQUE_SHARE
    if usable:
        # Weighted by the squared distance from the outline, so that tail and legs hardly count.
        depth = cv2.distanceTransform(np.pad(binary, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1] ** 2
        x = (depth.sum(0) @ np.arange(width)) / depth.sum() + 0.5 - width / 2
        y = (depth.sum(1) @ np.arange(height)) / depth.sum() + 0.5 - height / 2
    return {
        "usable": usable,
        "no_mask": area >= OPAQUE_SHARE,
        "area": area,
        "clipped": bool((rim > RIM_ALPHA).any()),
        "centre_x": float(x) / width if usable else None,
        "centre_y": float(y) / width if usable else None,
    }


def _light_figures(rgba: Tensor) -> dict:
    """rgba: [4, h, w]. Mean colour and luminance of the animal, lost shares, and how sharp it is.

    sharpness: variance of the Laplacian over the variance of the luminance, inside the mask: scale-free, larger is
    sharper; comparable between views and samples of one dataset, not between datasets.
    """
    import cv2

    # Nothing outside the mask counts: only the part around it is looked at.
    left, top, width, height = cv2.boundingRect((rgba[3] > 0).numpy().astype(np.uint8))
    rgba = rgba[:, max(top - 2, 0) : top + height + 2, max(left - 2, 0) : left + width + 2]
    rgb, alpha = rgba[:3], rgba[3]
    weight = alpha.double()
    total = float(weight.sum())
    if total < 1:
        return {"brightness": None, "colour": None, "dark_share": None, "bright_share": None, "sharpness": None}
    luma = sum(share * channel for share, channel in zip(LUMA, rgb, strict=True))
    inside = cv2.erode((alpha > 0.9).numpy().astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=0).astype(bool)
    sharpness = None
    if inside.sum() >= 25:
        laplacian = cv2.Laplacian(np.ascontiguousarray(luma.numpy()), cv2.CV_32F)
        sharpness = float(laplacian[inside].var() / max(float(luma.numpy()[inside].var()), 1e-6))
    return {
        "brightness": float((luma * weight).sum() / total),
        "colour": [float((channel * weight).sum() / total) for channel in rgb],
        "dark_share": float(((luma < DARK) * weight).sum() / total),
        "bright_share": float(((luma > BRIGHT) * weight).sum() / total),
        "sharpness": sharpness,
    }


def _add_silhouettes(sample: Sample, views: list[dict], hulls: bool) -> None:
    """Adds per view how well the hull of the other views predicts its mask: IoU, and share of the mask it fills."""
    usable = hulls and len(views) >= 3 and all(view["usable"] for view in views)
    iou, filled = [None] * len(views), [None] * len(views)
    if usable and not any(view["look_off_deg"] > 60 for view in views):
        rgb = sample.rgba[:, :3]
        found = view_consistency(rgb, sample.rgba[:, 3:], sample.cameras)
        iou, filled = found["mask_iou_per_view"], found["mask_per_view"]
    for view, overlap, share in zip(views, iou, filled, strict=True):
        view["silhouette_iou"], view["silhouette_filled"] = overlap, share
