"""Stage 1's parts with random weights at any size, made where they will run: nothing is read or downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mvdiffusion.components import Components
from mvdiffusion.demo_components import (
    DemoComponentsConfig,
    make_feature_extractor,
    make_schedulers,
    make_vision_encoder,
)
from mvdiffusion.demo_training import create_vae


@dataclass(frozen=True)
class Stage1Shape:
    """unet, vae, vision: constructor arguments of UNet2DConditionModel, AutoencoderKL and CLIPVisionConfig."""

    unet: dict
    vae: dict
    vision: dict

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def vae_factor(self) -> int:
        """Picture pixels per latent cell."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def image_size(self) -> int:
        """Side of the pictures, pixels."""
        return self.unet["sample_size"] * self.vae_factor


# Stable Diffusion 2.1 unCLIP as FaceLift fine-tunes it: 8 input channels, 64 x 64 latents; CLIP is ViT-H/14.
SD21_UNCLIP = Stage1Shape(
    unet={
        "sample_size": 64, "in_channels": 8, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2, "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3], "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024, "use_linear_projection": True, "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
    },
    vae={
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
        "norm_num_groups": 32, "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 768, "scaling_factor": 0.18215,
    },
    vision={
        "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1024, "num_hidden_layers": 32,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    },
)  # fmt: skip


def demo_shape(unet: dict) -> Stage1Shape:
    """The shape of the components that ship with the project around a UNet of the given arguments."""
    config = DemoComponentsConfig()
    vae = create_vae(config.vae, config.image_size, config.seed).config
    vision = make_vision_encoder(config.vision, config.seed).config.to_dict()
    return Stage1Shape(unet, {key: value for key, value in vae.items() if not key.startswith("_")}, vision)


def random_components(
    shape: Stage1Shape, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Components:
    """The frozen parts (no UNet) with random weights, as `load_components` would give them."""
    from diffusers import AutoencoderKL
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    with torch.device(device):
        vae = AutoencoderKL(**shape.vae)
        image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape.vision))
        normalizer = StableUnCLIPImageNormalizer(shape.vision["projection_dim"])
    scheduler, noising = make_schedulers()
    parts = [vae, image_encoder, normalizer]
    if dtype != torch.float32:
        parts = [part.to(dtype) for part in parts]
    # In this order: the image normalizer's own `to` makes new parameters.
    frozen = [part.eval().requires_grad_(False) for part in parts]
    return Components(
        vae=frozen[0], image_encoder=frozen[1], image_normalizer=frozen[2],
        feature_extractor=make_feature_extractor(shape.vision["image_size"]),
        image_noising_scheduler=noising, scheduler=scheduler,
        unet=None, unet_folder=None, folder=Path("random weights"), device=torch.device(device),
    )  # fmt: skip
