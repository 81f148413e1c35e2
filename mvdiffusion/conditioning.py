"""What the UNet is told about the input picture: class labels (CLIP embedding, noised) and image latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mvdiffusion.components import Components

NOISE_LEVEL = 0  # of 1000: FaceLift's, for training and inference


def clip_pixels_exact(components: Components, pictures: Tensor) -> Tensor:
    """[b, 3, h, w] 0..1 -> CLIP's input, through the PIL image processor (inference; FaceLift's numbers exactly)."""
    from PIL import Image

    arrays = (pictures.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
    pixels = components.feature_extractor(images=images, return_tensors="np")["pixel_values"]
    return torch.from_numpy(np.asarray(pixels)).to(pictures.device)


def clip_pixels_fast(components: Components, pictures: Tensor) -> Tensor:
    """The same in tensors (training): antialiased bicubic resize, then CLIP's mean and deviation."""
    extractor = components.feature_extractor
    size = (extractor.crop_size["height"], extractor.crop_size["width"])
    pixels = F.interpolate(pictures, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (
        torch.tensor(values).to(pixels).view(1, 3, 1, 1) for values in (extractor.image_mean, extractor.image_std)
    )
    return (pixels - mean) / std


def image_embeddings(components: Components, pixels: Tensor) -> Tensor:
    """CLIP's input [b, 3, s, s] -> projected embeddings [b, d]."""
    return components.image_encoder(pixels.to(components.image_encoder.dtype)).image_embeds


def class_labels(components: Components, embeddings: Tensor, noise: Tensor, level: int = NOISE_LEVEL) -> Tensor:
    """Embeddings [b, d] and noise [b, d] -> class labels [b, 2d]: [noised embedding, embedding of the noise level]."""
    from diffusers.models.embeddings import get_timestep_embedding

    levels = torch.full((len(embeddings),), level, device=embeddings.device, dtype=torch.long)
    normalised = components.image_normalizer.scale(embeddings)
    noised = components.image_noising_scheduler.add_noise(normalised, noise.to(normalised), levels)
    noised = components.image_normalizer.unscale(noised)
    level_embedding = get_timestep_embedding(levels, noised.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([noised, level_embedding.to(noised)], dim=-1)


def condition_latents(components: Components, pictures: Tensor) -> Tensor:
    """Pictures [b, 3, h, w] 0..1 -> the mode of their latents, scaled [b, c, h/f, w/f]."""
    vae = components.vae
    return vae.encode(pictures.to(vae.dtype) * 2 - 1).latent_dist.mode() * vae.config.scaling_factor


def decode_latents(components: Components, latents: Tensor) -> Tensor:
    """Scaled latents [b, c, h, w] -> pictures [b, 3, h*f, w*f], 0..1, float32."""
    vae = components.vae
    pictures = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return (pictures.float() / 2 + 0.5).clamp(0, 1)
