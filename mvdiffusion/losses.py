"""The diffusion loss of Stage 1. Pure functions; `alphas_cumprod` is the noise schedule, [1000], float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvdiffusion.components import Components
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.latents import EncodedBatch, class_labels
from mvdiffusion.models.unet import run_unet
from mvdiffusion.prompts import PromptEmbeds


def noise_and_target(
    clean: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Noisy latents and what the UNet has to predict, each shaped like clean [b, ...]; timesteps: [b]. kind:
    `v_prediction` (v = sqrt(a) noise - sqrt(1 - a) clean) or `epsilon`."""
    alpha = alphas_cumprod.to(clean.device)[timesteps].view(-1, *[1] * (clean.ndim - 1))
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    return noisy, alpha.sqrt() * noise - (1 - alpha).sqrt() * clean if kind == "v_prediction" else noise


def snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float | None, kind: str, form: str) -> Tensor:
    """Min-SNR loss weights [b] (Hang et al. 2023), snr = a / (1 - a); gamma None: ones. form `prediction`: min(snr,
    gamma) / snr for epsilon, / (snr + 1) for v (one weight on the clean latents, whatever is predicted); `upstream`:
    FaceLift's, the epsilon form always."""
    alpha = alphas_cumprod.to(timesteps.device)[timesteps].double()
    if gamma is None:
        return torch.ones_like(alpha).float()
    snr = alpha / (1 - alpha)
    divisor = snr + 1 if kind == "v_prediction" and form == "prediction" else snr
    return (snr.clamp(max=gamma) / divisor).float()


def diffusion_loss(prediction: Tensor, target: Tensor, weights: Tensor, foreground: Tensor | None = None) -> Tensor:
    """Mean of squared errors [b, c, h, w] by weights [b] and, normalized per sample, foreground [b, 1, h, w]."""
    error = (prediction.float() - target.float()).square()
    if foreground is not None:
        error = error * foreground / foreground.mean(dim=(1, 2, 3), keepdim=True)
    return (error.flatten(1).mean(1) * weights).mean()


def draw_timesteps(count: int, generator: torch.Generator, high_share: float, high_range: list[int]) -> Tensor:
    """Time steps [count] in 0..999: uniform, a share of them from high_range (inclusive)."""
    uniform = torch.randint(1000, (count,), generator=generator)
    high = torch.randint(high_range[0], high_range[1] + 1, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < high_share, high, uniform)


def training_loss(
    model: nn.Module, components: Components, embeds: PromptEmbeds, batch: EncodedBatch, config: MVDiffusionConfig,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """The loss [] of an encoded batch; all randomness comes from `generator` (CPU), in a fixed order."""
    device, (objects, views) = batch.mean.device, batch.mean.shape[:2]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    clip_noise = normal(*batch.embedding.shape)
    posterior_noise, noise = normal(*batch.mean.shape), normal(*batch.mean.shape)
    # One time step per object: its views must be equally far along to agree with each other.
    steps = draw_timesteps(objects, generator, config.high_noise_share, config.high_noise_range)
    # Which objects lose their class labels, and which their image latents: both in the overlap.
    uniform, rate = torch.rand(objects, generator=generator), config.condition_drop_rate
    no_labels, no_latents = uniform < 2 * rate, (uniform >= rate) & (uniform < 3 * rate)

    labels = class_labels(components, batch.embedding, clip_noise).masked_fill(no_labels.to(device)[:, None], 0)
    condition = batch.mean[:, embeds.rig.reference_view].masked_fill(no_latents.to(device)[:, None, None, None], 0)
    labels, condition, steps = (x.repeat_interleave(views, dim=0) for x in (labels, condition, steps.to(device)))
    clean = (batch.mean + batch.std * posterior_noise).flatten(0, 1)
    kind, alphas = components.scheduler.config.prediction_type, components.scheduler.alphas_cumprod
    noisy, target = noise_and_target(clean, noise.flatten(0, 1), alphas, steps, kind)
    prediction = run_unet(
        model, torch.cat([noisy, condition], dim=1), steps, prompts=embeds.tensor.to(device)[batch.prompts.flatten()],
        labels=labels, cameras=batch.cameras, reference_view=embeds.rig.reference_view,
    )  # fmt: skip
    weights = snr_weights(alphas, steps, config.snr_gamma, kind, config.snr_weighting)
    foreground = 1 + (config.foreground_weight - 1) * batch.mask.flatten(0, 1)
    return diffusion_loss(prediction, target, weights, foreground if config.foreground_weight != 1 else None)
