"""What is drawn for a sample as a whole: its background, its colours, and how wrong its cameras are said to be."""

from __future__ import annotations

import torch
from torch import Tensor

from gslrm.config import AugmentationConfig
from multiview.image import BACKGROUNDS

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def choose_background(name: str, generator: torch.Generator) -> Tensor:
    """[3] colour 0..1; `random` is white, gray or black with equal chance."""
    if name == "random":
        name = list(BACKGROUNDS)[int(torch.randint(len(BACKGROUNDS), (), generator=generator))]
    return torch.full((3,), BACKGROUNDS[name])


def jitter(rgba: Tensor, augmentation: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and colour cast of the animal, one draw for all views [v, 4, h, w].

    Contrast turns about the animal's own mean, saturation about each pixel's luminance; the cast is a factor per
    channel. Alpha stays, and so does the background, which is composited afterwards.
    """
    draw = torch.rand(6, generator=generator)
    brightness = between(augmentation.brightness_range, draw[0])
    contrast = between(augmentation.contrast_range, draw[1])
    saturation = between(augmentation.saturation_range, draw[2])
    cast = between(augmentation.cast_range, draw[3:])[:, None, None]
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    mean = (rgb * alpha).sum() / (3 * alpha.sum()).clamp_min(1.0)
    rgb = ((rgb - mean) * contrast + mean) * brightness
    grey = (rgb * torch.tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True)
    rgb = ((rgb - grey) * saturation + grey) * cast
    return torch.cat([rgb.clamp(0.0, 1.0), alpha], dim=1)


def between(limits: list[float], share: Tensor) -> Tensor:
    low, high = limits
    return low + (high - low) * share
