"""The diffusion loss of Stage 1. Pure functions; `alphas_cumprod` is the noise schedule, [1000], float32."""

from __future__ import annotations

import torch
from torch import Tensor


def noise_and_target(
    clean: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Noisy latents and what the UNet has to predict, each shaped like clean [b, ...]; timesteps: [b].

    kind: `v_prediction` (v = sqrt(a) noise - sqrt(1 - a) clean) or `epsilon`.
    """
    alpha = alphas_cumprod.to(clean.device)[timesteps].view(-1, *[1] * (clean.ndim - 1))
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    if kind == "v_prediction":
        return noisy, alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    if kind == "epsilon":
        return noisy, noise
    raise ValueError(f"the scheduler's prediction_type must be v_prediction or epsilon, got {kind!r}")


def snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float | None, kind: str, form: str) -> Tensor:
    """Min-SNR loss weights [b] (Hang et al. 2023). snr = a / (1 - a).

    form `prediction`: min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v (one effective weight on the
    clean latents, whatever is predicted). form `upstream`: FaceLift's, the epsilon form always. gamma None: ones.
    """
    alpha = alphas_cumprod.to(timesteps.device)[timesteps].double()
    if gamma is None:
        return torch.ones_like(alpha).float()
    snr = alpha / (1 - alpha)
    divisor = snr + 1 if kind == "v_prediction" and form == "prediction" else snr
    return (snr.clamp(max=gamma) / divisor).float()


def diffusion_loss(prediction: Tensor, target: Tensor, weights: Tensor, foreground: Tensor | None = None) -> Tensor:
    """Mean squared error per sample [b, c, h, w] in float32, times weights [b], averaged.

    foreground: [b, 1, h, w] weights of the latent cells, normalised per sample here; None: all equal.
    """
    error = (prediction.float() - target.float()).square()
    if foreground is not None:
        error = error * foreground / foreground.mean(dim=(1, 2, 3), keepdim=True)
    return (error.flatten(1).mean(1) * weights).mean()


def drop_masks(uniform: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Which objects lose their class labels, and which their image latents: two masks [b], True = dropped.

    uniform: [b] in 0..1. Below 2 rate the labels go, in rate .. 3 rate the latents: both in the overlap.
    """
    return uniform < 2 * rate, (uniform >= rate) & (uniform < 3 * rate)


def draw_timesteps(
    count: int, generator: torch.Generator, high_noise_share: float, high_noise_range: list[int]
) -> Tensor:
    """Time steps [count] in 0..999: uniform, a share of them from high_noise_range (inclusive)."""
    uniform = torch.randint(1000, (count,), generator=generator)
    high = torch.randint(high_noise_range[0], high_noise_range[1] + 1, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < high_noise_share, high, uniform)
