"""Gaussians that several test files draw."""

import torch

from gslrm.model.gaussians import Gaussians


def trained_like(count):
    """One scene: an ellipsoid shell of mostly opaque splats of about one point spacing."""
    g = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(1, count, 3, generator=g), dim=-1)
    return Gaussians(
        xyz=direction * torch.tensor([0.3, 0.6, 0.3]) + 0.005 * torch.randn(1, count, 3, generator=g),
        features=torch.randn(1, count, 1, 3, generator=g),
        scaling=torch.full((1, count, 3), (1.8 / count) ** 0.5).log() + 0.4 * torch.randn(1, count, 3, generator=g),
        rotation=torch.randn(1, count, 4, generator=g),
        opacity=1.5 + 1.5 * torch.randn(1, count, 1, generator=g),
    )


def concatenate(*parts):
    """The Gaussians of all parts (same number of scenes, same SH degree) in one, in order."""
    return Gaussians(**{name: torch.cat([vars(part)[name] for part in parts], dim=1) for name in vars(parts[0])})
