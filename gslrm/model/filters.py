"""Which Gaussians to keep: pure functions that return a new Gaussians."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussians import Gaussians


@dataclass(frozen=True)
class FilterSettings:
    """Applied in this order; None leaves a step out.

    min_opacity: keep opacity > min_opacity.
    max_scaling: keep the largest standard deviation < max_scaling (world units).
    spare_upper_half: Gaussians with z > 0 pass the max_scaling step (FaceLift: hair on an upright head).
    floater: remove |x| > floater and |y| > floater and z < -floater, the lower corners (world units).
    crop_box: (x lowest, x highest, y lowest, y highest, z lowest, z highest), inclusive, world units.
    near_far: (low, high) fractions 0..1: with camera origins, keep Gaussians whose distance from every camera lies
        between these two quantiles of the distances of what the steps before left.
    """

    min_opacity: float = 0.05
    max_scaling: float | None = None
    spare_upper_half: bool = True
    floater: float | None = None
    crop_box: tuple[float, float, float, float, float, float] | None = (-1.0, 1.0, -1.0, 1.0, -1.0, 1.0)
    near_far: tuple[float, float] = (0.005, 1.0)


_HEAD_BOX = (-0.91, 0.91, -0.91, 0.91, -1.0, 1.0)

PRESETS: dict[str, FilterSettings] = {
    # The body is about 1.2 units long and a stretched tail as long again; nothing says which way is up for a limb.
    "animal": FilterSettings(min_opacity=0.04, spare_upper_half=False, crop_box=(-1.5, 1.5, -1.5, 1.5, -1.0, 1.0)),
    # FaceLift's own, for its heads: command line, web demo, training and evaluation, and its method's defaults.
    "facelift_cli": FilterSettings(min_opacity=0.04, max_scaling=0.1, floater=0.6, crop_box=_HEAD_BOX),
    "facelift_gradio": FilterSettings(min_opacity=0.04, max_scaling=0.2, floater=0.75, crop_box=_HEAD_BOX),
    "facelift_training": FilterSettings(min_opacity=0.02, crop_box=(-0.91, 0.91, -0.91, 0.91, -0.91, 0.91)),
    "facelift_defaults": FilterSettings(),
}


def filter_gaussians(
    gaussians: Gaussians, settings: FilterSettings | str = "animal", camera_origins: Tensor | None = None
) -> Gaussians:
    """The Gaussians of one scene (b = 1) that pass, in their order. See keep_mask."""
    return gaussians.select(keep_mask(gaussians, settings, camera_origins))


@torch.no_grad()
def keep_mask(
    gaussians: Gaussians, settings: FilterSettings | str = "animal", camera_origins: Tensor | None = None
) -> Tensor:
    """Bool [n]: the Gaussians of one scene (b = 1) that pass.

    settings: FilterSettings or a name in PRESETS. camera_origins: [v, 3] world; only they switch the near_far step on.
    Raises ValueError for an unknown name, more than one scene, or camera_origins of another shape.
    """
    if isinstance(settings, str):
        if settings not in PRESETS:
            raise ValueError(f"filter settings must be one of {', '.join(PRESETS)}, got {settings!r}")
        settings = PRESETS[settings]
    if gaussians.num_scenes != 1:
        raise ValueError(f"filters take one scene, got {gaussians.num_scenes}; use gaussians.scene(i)")
    xyz = gaussians.xyz[0].float()
    keep = gaussians.get_opacity[0, :, 0].float() > settings.min_opacity
    if settings.max_scaling is not None:
        small = gaussians.get_scaling[0].float().amax(dim=-1) < settings.max_scaling
        keep &= small | (xyz[:, 2] > 0) if settings.spare_upper_half else small
    if settings.floater is not None:
        f = settings.floater
        keep &= ~((xyz[:, 0].abs() > f) & (xyz[:, 1].abs() > f) & (xyz[:, 2] < -f))
    if settings.crop_box is not None:
        lowest, highest = xyz.new_tensor(settings.crop_box).view(3, 2).unbind(-1)
        keep &= ((xyz >= lowest) & (xyz <= highest)).all(dim=-1)
    if camera_origins is not None and keep.any():
        keep &= _within_quantiles(xyz, keep, camera_origins.to(xyz), settings.near_far)
    return keep


def _within_quantiles(xyz: Tensor, keep: Tensor, origins: Tensor, near_far: tuple[float, float]) -> Tensor:
    if origins.ndim != 2 or origins.shape[1] != 3:
        raise ValueError(f"camera_origins must have shape [v, 3], got {list(origins.shape)}")
    distance = torch.linalg.vector_norm(xyz[None] - origins[:, None], dim=-1)  # [v, n]
    near, far = torch.quantile(distance[:, keep], distance.new_tensor(near_far), dim=1, keepdim=True)
    return ((distance >= near) & (distance <= far)).all(dim=0)
