"""Which Gaussians to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gslrm.model.gaussians import Gaussians


@dataclass(frozen=True)
class FilterSettings:
    """Steps in this order, lengths in world units; None leaves a step out. The defaults are for an animal."""

    min_opacity: float = 0.04  # keeps opacity > min_opacity
    max_scaling: float | None = None  # keeps the largest standard deviation < max_scaling
    spare_upper_half: bool = False  # z > 0 passes max_scaling (FaceLift: hair on an upright head; limbs have no up)
    floater: float | None = None  # removes |x| > floater and |y| > floater and z < -floater, the lower corners
    # Lowest and highest x, y, z, inclusive: the body is about 1.2 units long and a stretched tail as long again.
    crop_box: tuple[float, float, float, float, float, float] | None = (-1.5, 1.5, -1.5, 1.5, -1.0, 1.0)


@torch.no_grad()
def filter_gaussians(gaussians: Gaussians, settings: FilterSettings | None = None) -> Gaussians:
    """Returns the Gaussians of one scene (b = 1) that pass, in their order; possibly none.

    Raises ValueError for more than one scene and, with their number, for values that are not finite: every comparison
    with NaN fails, so that a broken network would look like one that sees nothing.
    """
    settings = settings or FilterSettings()
    gaussians.check_finite("Stage 2")
    xyz = gaussians.xyz[0].float()
    keep = gaussians.get_opacity[0, :, 0].float() > settings.min_opacity
    if settings.max_scaling is not None:
        small = gaussians.get_scaling[0].float().amax(dim=-1) < settings.max_scaling
        keep &= small | (xyz[:, 2] > 0) if settings.spare_upper_half else small
    if settings.floater is not None:
        keep &= ~((xyz[:, :2].abs() > settings.floater).all(dim=-1) & (xyz[:, 2] < -settings.floater))
    if settings.crop_box is not None:
        lowest, highest = xyz.new_tensor(settings.crop_box).view(3, 2).unbind(-1)
        keep &= ((xyz >= lowest) & (xyz <= highest)).all(dim=-1)
    return gaussians.select(keep)
