"""Augmentation of a sample as a whole: one draw of background, colour, crop and mirroring for all its views."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.image import BACKGROUNDS, adjust_colours, composite, resize_rgba


@dataclass(frozen=True)
class Augmentation:
    """What may be drawn for a sample; the defaults leave it as it is, on white.

    backgrounds: names out of multiview.image.BACKGROUNDS. brightness, contrast, saturation: factors 1 +- value.
    hue_deg: +- angle in the chroma plane. crop_ratio: the smallest share of the picture's side that a crop keeps.
    mirror: probability.
    """

    backgrounds: tuple[str, ...] = ("white",)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue_deg: float = 0.0
    crop_ratio: float = 1.0
    mirror: float = 0.0


@dataclass(frozen=True)
class Draw:
    """One draw: factors, hue in degrees, and the crop as (left, top, side) in shares of the picture's width."""

    background: str = "white"
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue_deg: float = 0.0
    crop: tuple[float, float, float] = (0.0, 0.0, 1.0)
    mirrored: bool = False

    def to_dict(self) -> dict:
        return asdict(self)


def draw_augmentation(options: Augmentation, generator: torch.Generator) -> Draw:
    """A draw; the same numbers are taken from the generator whatever the options are."""
    u = torch.rand(9, generator=generator, dtype=torch.float64).tolist()
    side = 1.0 - (1.0 - options.crop_ratio) * u[5]
    return Draw(
        background=options.backgrounds[int(u[0] * len(options.backgrounds))],
        brightness=1.0 + options.brightness * (2 * u[1] - 1),
        contrast=1.0 + options.contrast * (2 * u[2] - 1),
        saturation=1.0 + options.saturation * (2 * u[3] - 1),
        hue_deg=0.0 + options.hue_deg * (2 * u[4] - 1),  # not -0.0: equal draws have equal names in the cache
        crop=((1.0 - side) * u[6], (1.0 - side) * u[7], side),
        mirrored=u[8] < options.mirror,
    )


def apply_draw(rgba: Tensor, cameras: Cameras, draw: Draw, size: int) -> tuple[Tensor, Tensor, Cameras]:
    """Square RGBA views [n, 4, s, s] and their cameras [n] -> pictures on the drawn background, masks, cameras.

    Returns [n, 3, size, size] and [n, 1, size, size], 0..1, and the cameras of just these pixels, in the stored order.
    """
    rgba, cameras = _cropped(rgba, cameras, draw.crop)
    rgba, cameras = torch.stack([resize_rgba(view, size) for view in rgba]), cameras.resize(size, size)
    if draw.mirrored:
        rgba, cameras = rgba.flip(-1), cameras.mirrored()
    rgba = adjust_colours(
        rgba, brightness=draw.brightness, contrast=draw.contrast, saturation=draw.saturation, hue_deg=draw.hue_deg
    )
    return composite(rgba, BACKGROUNDS[draw.background]), rgba[:, 3:], cameras


def _cropped(rgba: Tensor, cameras: Cameras, crop: tuple[float, float, float]) -> tuple[Tensor, Cameras]:
    """The crop's pixels, to the nearest whole ones, and the cameras of just these."""
    if crop[2] == 1.0:
        return rgba, cameras
    width = rgba.shape[-1]
    side = max(1, round(crop[2] * width))
    left, top = (min(round(share * width), width - side) for share in crop[:2])
    return rgba[..., top : top + side, left : left + side], cameras.crop(left, top, side, side)
