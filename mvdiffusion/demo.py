"""The small components this project makes itself: same classes, files and folders as SD 2.1 unCLIP, other sizes.

Tokenizer: byte-pair vocabulary of the rigs' own prompts. Text encoder: random weights, frozen, as prompts only have to
be distinguishable. Vision encoder and autoencoder: trained on the samples (demo_training.py). `random_components` makes
the same parts at any size with random weights, for measuring.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from multiview.files import read_json
from multiview.rig import PROMPT_STYLES, available_rigs, load_rig
from multiview.run import seed_everything
from mvdiffusion.components import DEMO_FOLDER, Components
from mvdiffusion.prompts import alike_views, encode_prompts, view_similarity


@dataclass
class VisionConfig:
    image_size: int = 64  # pixels
    patch_size: int = 16
    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    projection: int = 64  # width of the image embedding; class labels are twice as wide
    steps: int = 400
    batch: int = 48  # animals; two views of each
    lr: float = 1e-3
    warmup_steps: int = 50
    temperature: float = 0.1


@dataclass
class VaeConfig:
    block_out_channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    layers_per_block: int = 1
    latent_channels: int = 8
    norm_groups: int = 8
    steps: int = 2000
    batch: int = 16  # images (full) or, four times as many, crops
    lr: float = 1e-3
    warmup_steps: int = 100
    crop_share: float = 0.7  # fraction of steps on crops centered on the animal
    crop_size: int = 64  # pixels
    foreground_weight: float = 5.0
    gradient_weight: float = 1.0  # of the L1 between image gradients
    kl_weight: float = 3e-4  # of the KL per latent value: noise the decoder learns to bear, as it will meet Stage 1's
    bf16: bool = True


@dataclass
class DemoComponentsConfig:
    data: str = "data_mouse/data_mouse_train.txt"  # split list
    output_dir: str = "checkpoints/demo/mvdiffusion"
    image_size: int = 128  # pixels
    max_samples: int = 2000  # held in memory: 64 KiB per view
    holdout_samples: int = 16  # the last of the list, for the reported figures
    save_minutes: float = 2.0  # how often the training state is written
    seed: int = 0
    text_width: int = 64  # of the prompt embeddings
    vision: VisionConfig = field(default_factory=VisionConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose words are those of the shipped rigs' prompts; any other text falls back to its bytes."""
    asked = product(map(load_rig, available_rigs()), PROMPT_STYLES, (False, True))
    prompts = {prompt for rig, style, angles in asked for prompt in rig.prompts(style, angles=angles)}
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]

    def tokenizer(tokens: list[str], merges: list[tuple[str, str]]) -> CLIPTokenizer:
        vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)

    # An untrained tokenizer of the same class splits text into words exactly as the finished one will. Naming all
    # symbols beforehand gives them fixed numbers, by which the trainer breaks ties: else each run gives another order.
    # The vocabulary is then made of all symbols and merges, so that any other text has its bytes too.
    trained = tokenizer(symbols, []).train_new_from_iterator(
        sorted(prompts), vocab_size=10000, new_special_tokens=symbols, show_progress=False
    )
    merges = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    return tokenizer(list(dict.fromkeys([*symbols, *map("".join, merges)])), merges)


def make_schedulers() -> tuple[DDIMScheduler, DDPMScheduler]:
    """The sampler's noise schedule and that of the image embedding, with Stable Diffusion 2.1 unCLIP's own values."""
    # But for the spacing: `trailing` begins at the last step trained, where all is noise, however few there are
    # (https://arxiv.org/abs/2305.08891). `leading` begins 5 steps at 801, whose noise the UNet never saw alone.
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    return scheduler, DDPMScheduler(beta_schedule="squaredcos_cap_v2")


def make_feature_extractor(size: int) -> CLIPImageProcessorPil:
    """CLIP's image processor for a vision encoder of images of `size` px."""
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def write_untrained_parts(folder: Path, config: DemoComponentsConfig) -> None:
    """Writes tokenizer, text encoder, image processor and schedulers; refuses a text encoder that blurs two views."""
    transformers_logging.disable_progress_bar()
    tokenizer, width = make_tokenizer(), config.text_width
    seed_everything("demo text encoder", config.seed)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=3, num_attention_heads=width // 16, max_position_embeddings=77, **ids,
    )  # fmt: skip
    text_encoder = CLIPTextModel(sizes).eval()
    with torch.no_grad():
        # CLIP's initialization (0.02, 0.01) lets the layers pass little between tokens. Weights this large attend
        # sharply, so that the one token that names the view reaches every later one.
        for name, weight in text_encoder.named_parameters():
            if "embedding" in name:
                weight.normal_(0, 1.0)
            elif weight.ndim == 2:
                gain = 3.0 if ".q_proj." in name or ".k_proj." in name else 2.0
                weight.normal_(0, gain * weight.shape[1] ** -0.5)
    for rig in map(load_rig, available_rigs()):
        similarity = view_similarity(encode_prompts(rig.prompts(), tokenizer, text_encoder))
        if alike := alike_views(similarity, rig.view_names, 0.99):
            raise ValueError(f"the text encoder hardly tells views of rig {rig.name} apart: {alike[0]}; another seed")
    scheduler, noising = make_schedulers()
    for part, name in (
        (tokenizer, "tokenizer"), (text_encoder.half(), "text_encoder"),
        (make_feature_extractor(config.vision.image_size), "feature_extractor"), (scheduler, "scheduler"),
        (noising, "image_noising_scheduler"),
    ):  # fmt: skip
        shutil.rmtree(folder / name, ignore_errors=True)  # files of another library version would stay and be read
        part.save_pretrained(folder / name)


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
    root = Path(__file__).resolve().parent.parent / DEMO_FOLDER
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
