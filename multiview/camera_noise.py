"""Calibration errors on purpose: cameras moved at random around the true ones.

Used to train robustness (Stage 2's augmentation) and to measure sensitivity (scripts/evaluate.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from multiview.cameras import Cameras, axis_rotation


def perturb(
    cameras: Cameras, *, rotation_deg: float, translation: float, pixels: float, generator: torch.Generator
) -> Cameras:
    """Gaussian noise on every camera [...], drawn independently.

    rotation_deg: standard deviation of the angle turned about a uniformly random axis through the camera centre.
    translation: standard deviation of the camera centre along each world axis, world units.
    pixels: standard deviation of the principal point along x and along y, pixels of the cameras' picture size.
    generator: gives the same unit draws whatever the three sizes are, so noise of twice the size is the same noise
        twice as far: a sweep over sizes compares like with like.
    Computed in float64. Zero sizes return the very same values. Raises ValueError for a negative or infinite size.
    """
    for name, value in (("rotation_deg", rotation_deg), ("translation", translation), ("pixels", pixels)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"camera noise: {name} is a standard deviation and must be 0 or more, got {value}")
    draws = torch.randn((*cameras.shape, 9), generator=generator, dtype=torch.float64, device=generator.device)
    axis, angle, shift, offset = draws.to(cameras.c2w.device).split([3, 1, 3, 2], dim=-1)
    rotation = axis_rotation(axis, math.radians(rotation_deg) * angle[..., 0])
    c2w = cameras.c2w.double().clone()
    c2w[..., :3, :3] = c2w[..., :3, :3] @ rotation
    c2w[..., :3, 3] += translation * shift
    fxfycxcy = cameras.fxfycxcy.double().clone()
    fxfycxcy[..., 2:] += pixels * offset
    return replace(cameras, c2w=c2w.to(cameras.c2w), fxfycxcy=fxfycxcy.to(cameras.fxfycxcy))
