"""What is drawn for a sample as a whole: its background, its colours, and how wrong its cameras are said to be."""

from __future__ import annotations

import torch
from torch import Tensor

from gslrm.config import AugmentationConfig
from multiview.image import BACKGROUNDS, adjust_colours


def choose_background(name: str, generator: torch.Generator) -> Tensor:
    """[3] colour 0..1; `random` is white, gray or black with equal chance."""
    if name == "random":
        name = list(BACKGROUNDS)[int(torch.randint(len(BACKGROUNDS), (), generator=generator))]
    return torch.full((3,), BACKGROUNDS[name])


def jitter(rgba: Tensor, augmentation: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue of the animal, one draw for all views [v, 4, h, w]."""
    draw = torch.rand(4, generator=generator)
    return adjust_colours(
        rgba,
        brightness=between(augmentation.brightness_range, draw[0]),
        contrast=between(augmentation.contrast_range, draw[1]),
        saturation=between(augmentation.saturation_range, draw[2]),
        hue_deg=between(augmentation.hue_range_deg, draw[3]),
    )


def between(limits: list[float], share: Tensor) -> float:
    low, high = limits
    return low + (high - low) * share.item()
