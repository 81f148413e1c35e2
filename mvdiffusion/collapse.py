"""Whether the painted views are views of their own: a UNet that has learnt to copy its input paints them all alike."""

from __future__ import annotations

import torch
from torch import Tensor


def difference_ratio(pictures: Tensor, targets: Tensor, masks: Tensor, reference_view: int) -> Tensor:
    """How much the painted views differ from the input picture, over how much the true ones do: [b].

    pictures, targets: [b, n, 3, s, s] 0..1 on one background; masks: [b, n, 1, s, s]. Per object, mean absolute
    difference to the input picture over the pixels where the animal truly stands in the view or in the input, summed
    over the unseen views. 1: as different as the truth. 0: copies of the input.
    """
    others = [view for view in range(targets.shape[1]) if view != reference_view]
    region = (torch.maximum(masks[:, others], masks[:, reference_view, None]) > 0.5).to(targets.dtype)
    given = targets[:, reference_view, None]

    def difference(views: Tensor) -> Tensor:
        return ((views[:, others] - given).abs().mean(2, keepdim=True) * region).sum(dim=(1, 2, 3, 4))

    return difference(pictures) / difference(targets).clamp_min(1e-6)
