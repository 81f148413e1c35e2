"""Gaussians to render: the two kinds of scene that the rasterizer's reference figures were measured on."""

from __future__ import annotations

import torch

from gslrm.model.gaussians import Gaussians


def trained_like(count: int, device: torch.device | str = "cpu") -> Gaussians:
    """One scene: an ellipsoid shell of mostly opaque splats of about one point spacing."""
    g = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(1, count, 3, generator=g), dim=-1)
    return Gaussians(
        xyz=direction * torch.tensor([0.3, 0.6, 0.3]) + 0.005 * torch.randn(1, count, 3, generator=g),
        features=torch.randn(1, count, 1, 3, generator=g),
        scaling=torch.full((1, count, 3), (1.8 / count) ** 0.5).log() + 0.4 * torch.randn(1, count, 3, generator=g),
        rotation=torch.randn(1, count, 4, generator=g),
        opacity=1.5 + 1.5 * torch.randn(1, count, 1, generator=g),
    ).to(device)


def untrained(count: int, device: torch.device | str = "cpu") -> Gaussians:
    """One scene: uniform in +-0.6, scale 0.1, opacity 0.12, as a network predicts before training."""
    g = torch.Generator().manual_seed(0)
    return Gaussians(
        xyz=torch.rand(1, count, 3, generator=g) * 1.2 - 0.6,
        features=torch.randn(1, count, 1, 3, generator=g),
        scaling=torch.full((1, count, 3), 0.1).log(),
        rotation=torch.randn(1, count, 4, generator=g),
        opacity=torch.full((1, count, 1), -2.0),
    ).to(device)


SCENES = {"trained-like": trained_like, "untrained": untrained}
