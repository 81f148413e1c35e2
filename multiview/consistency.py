"""Do posed pictures show one and the same solid? Measured without ground truth, from silhouettes and colours.

Masks of one solid are exactly the silhouettes of their visual hull; masks that disagree carve it away, so that it no
longer fills them (silhouette coherence: Hernandez, Schmitt and Cipolla 2007). On the hull's surface the views that see
a point must agree on its colour (photo-consistency: Kutulakos and Seitz 2000). The whole set turned about the world's
axis stays consistent, as it should: the score says nothing about *which* animal is shown.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multiview.cameras import Cameras
from multiview.hull import VisualHull, carve_leave_one_out, observe, silhouettes, surface

RESOLUTION = 64  # voxels along the hull; finer changes the figures in the third decimal
SIZE = 128  # larger pictures are reduced to this: figures compare between sizes, and cost the same
SEEN = 0.05  # a point counts for a view that sees it with at least this weight, and the others together too


def view_consistency(
    rgb: Tensor, masks: Tensor, cameras: Cameras, *, resolution: int = RESOLUTION
) -> dict[str, float | list[float]]:
    """rgb: [v, 3, h, w] 0..1, masks: [v, 1, h, w] 0..1, cameras: [v], v >= 3. All figures 0..1, larger is better.

    mask: share of a view's mask that the hull of the others fills, mean over views; 1 for silhouettes of one solid.
    colour: 1 - mean absolute difference between what a view shows of a point and what the others show of it, over the
        points that it and another one see; mean over views. 0 where no view has such a point.
    score: mask * colour.
    mask_iou: a view's mask against the silhouette of the hull of the others. Below 1 even for the truth, since a hull
        of fewer views is larger than the animal: compare it with the truth's own, measured with the same cameras.
    mask_per_view, colour_per_view (nan where a view has no such point), mask_iou_per_view: lists [v].
    """
    _check(rgb, masks, cameras)
    rgb, masks, cameras = _reduced(rgb.float(), masks.float(), cameras)
    whole, others = carve_leave_one_out(masks, cameras, resolution=resolution)
    filled, overlap = _mask_terms(masks > 0.5, others, cameras)
    colour = _colour_terms(whole, rgb, masks, cameras)
    known = colour[~colour.isnan()]
    mask, mean_colour = float(filled.mean()), float(known.mean()) if len(known) else 0.0
    return {
        "mask": mask, "colour": mean_colour, "score": mask * mean_colour, "mask_iou": float(overlap.mean()),
        "mask_per_view": filled.tolist(), "colour_per_view": colour.tolist(), "mask_iou_per_view": overlap.tolist(),
    }  # fmt: skip


def _check(rgb: Tensor, masks: Tensor, cameras: Cameras) -> None:
    views, size = len(cameras), [cameras.height, cameras.width]
    for name, tensor, channels in (("rgb", rgb, 3), ("masks", masks, 1)):
        if list(tensor.shape) != [views, channels, *size]:
            raise ValueError(
                f"{name} must be {[views, channels, *size]} to go with its cameras, got {list(tensor.shape)}"
            )


def _reduced(rgb: Tensor, masks: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor, Cameras]:
    longest = max(cameras.height, cameras.width)
    if longest <= SIZE:
        return rgb, masks, cameras
    size = [max(1, round(side * SIZE / longest)) for side in (cameras.height, cameras.width)]
    pictures = F.interpolate(torch.cat([rgb, masks], dim=1), size=size, mode="area")
    return pictures[:, :3], pictures[:, 3:], cameras.resize(*size)


def _mask_terms(masks: Tensor, others: list[VisualHull], cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Per view [v], [v]: share of its mask [v, 1, h, w] in the silhouette of the hull of the others, and their IoU."""
    shown = torch.cat([silhouettes(surface(hull), cameras[[view]]) for view, hull in enumerate(others)])
    both, either = (masks & shown).flatten(1).sum(1), (masks | shown).flatten(1).sum(1)
    return both / masks.flatten(1).sum(1).clamp_min(1), both / either.clamp_min(1)


def _colour_terms(hull: VisualHull, rgb: Tensor, masks: Tensor, cameras: Cameras) -> Tensor:
    """Per view [v]: agreement with the others on the colours of the hull's surface; nan where nothing is shared."""
    colours, weights = observe(surface(hull), rgb, masks, cameras)
    rest = weights.sum(0) - weights
    weighted = colours * weights[..., None]
    others = (weighted.sum(0) - weighted) / rest.clamp_min(1e-6)[..., None]
    shared = torch.where((weights > SEEN) & (rest > SEEN), weights * rest, 0)
    difference = (colours - others).abs().mean(-1)
    return 1 - (difference * shared).sum(1) / shared.sum(1)
