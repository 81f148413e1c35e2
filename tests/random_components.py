"""Stage 1's frozen parts with random weights, in any size: what the benchmark measures."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from multiview.files import read_json
from multiview.run import REPOSITORY
from mvdiffusion.components import DEMO_FOLDER, Components, make_feature_extractor, make_schedulers

# Stable Diffusion 2.1 unCLIP as FaceLift fine-tunes it: 8 input channels, 64 x 64 latents; CLIP is ViT-H/14. What is
# not named has this size by the classes' own defaults.
SD21_UNCLIP: dict[str, dict] = {
    "unet": {
        "sample_size": 64, "in_channels": 8, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
        "use_linear_projection": True, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 768,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "vision": {
        "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1024, "num_hidden_layers": 32,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    },
}  # fmt: skip


def demo_shape(unet: dict) -> dict[str, dict]:
    """Returns the sizes of the components that ship with the project, around a UNet of the given arguments."""
    root = REPOSITORY / DEMO_FOLDER
    vae, vision = (read_json(root / name / "config.json") for name in ("vae", "image_encoder"))
    return {"unet": unet, "vae": vae, "vision": vision}


def random_components(shape: dict[str, dict], *, device: torch.device | str, dtype: torch.dtype) -> Components:
    """Returns frozen parts with random weights, as `load_components` would; shape: see SD21_UNCLIP."""
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL.from_config(shape["vae"])
        image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(shape["vision"]))
        normalizer = StableUnCLIPImageNormalizer(shape["vision"]["projection_dim"])
    scheduler, noising = make_schedulers()
    # In this order: the image normalizer's own `to` makes new parameters.
    vae, image_encoder, normalizer = (
        (part if dtype == torch.float32 else part.to(dtype)).eval().requires_grad_(False)
        for part in (vae, image_encoder, normalizer)
    )
    return Components(
        vae=vae, image_encoder=image_encoder, image_normalizer=normalizer,
        feature_extractor=make_feature_extractor(shape["vision"]["image_size"]), image_noising_scheduler=noising,
        scheduler=scheduler, unet=None, unet_folder=None, folder=Path("random weights"), device=torch.device(device),
    )  # fmt: skip
