"""The small components this project makes itself: same classes, files and folders as SD 2.1 unCLIP, other sizes.

Tokenizer: byte-pair vocabulary of the rigs' own prompts. Text encoder: random weights, frozen, as prompts only have to
be distinguishable. Vision encoder and autoencoder: trained on the samples (demo_training.py). `random_components` makes
the same parts at any size with random weights, for measuring.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from multiview.rig import PROMPT_STYLES, available_rigs, load_rig
from multiview.run import seed_everything
from mvdiffusion.components import Components
from mvdiffusion.prompts import encode_prompts

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

log = logging.getLogger(__name__)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Rows of two prompts' embeddings must differ by this much (mean square over tokens, in units of their variance).
MIN_PROMPT_DIFFERENCE = 0.02


@dataclass
class TextConfig:
    hidden_size: int = 64  # width of the prompt embeddings
    layers: int = 3
    heads: int = 4


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
    """What scripts/make_demo_components.py makes."""

    data: str = "data_mouse/data_mouse_train.txt"  # split list
    output_dir: str = "checkpoints/demo/mvdiffusion"
    image_size: int = 128  # pixels
    max_samples: int = 2000  # held in memory: 64 KiB per view
    holdout_samples: int = 16  # the last of the list, for the reported figures
    save_minutes: float = 2.0  # how often the training state is written
    seed: int = 0
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)


# ---- tokenizer, text encoder, schedulers ----------------------------------------------------------------------------


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose words are those of the shipped rigs' prompts; any other text falls back to its bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    rigs = [load_rig(name) for name in available_rigs()]
    prompts = {
        prompt
        for rig in rigs
        for style in PROMPT_STYLES
        for angles in (False, True)
        for prompt in rig.prompts(style, angles=angles)
    }
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]

    def tokenizer(tokens: list[str], merges: list[tuple[str, str]]) -> CLIPTokenizer:
        vocabulary = {token: index for index, token in enumerate([*tokens, BOS, EOS])}
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)

    # An untrained tokenizer of the same class splits text into words exactly as the finished one will. Naming all
    # symbols beforehand gives them fixed numbers, by which the trainer breaks ties: else each run gives another order.
    # The vocabulary is then made of all symbols and merges, so that any other text has its bytes too.
    trained = tokenizer(symbols, []).train_new_from_iterator(
        sorted(prompts), vocab_size=10000, new_special_tokens=symbols, show_progress=False
    )
    merges = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    return tokenizer(list(dict.fromkeys([*symbols, *map("".join, merges)])), merges)


def make_text_encoder(config: TextConfig, tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    """A small CLIP text encoder with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    seed_everything("demo text encoder", seed)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=config.hidden_size, intermediate_size=4 * config.hidden_size,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, max_position_embeddings=77,
            projection_dim=config.hidden_size, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        # CLIP's initialization (0.02, 0.01) lets the layers pass little between tokens. Weights this large attend
        # sharply, so that the one token that names the view reaches every later one.
        for name, weight in model.named_parameters():
            if "embedding" in name:
                weight.normal_(0, 1.0)
            elif weight.ndim == 2:
                gain = 3.0 if ".q_proj." in name or ".k_proj." in name else 2.0
                weight.normal_(0, gain * weight.shape[1] ** -0.5)
    return model


def check_prompts_differ(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> dict[str, float]:
    """Returns each rig's smallest mean squared difference between two views' rows, over the embeddings' variance.

    Raises ValueError where two views of a rig would be told nearly the same thing.
    """
    differences = {}
    for name in available_rigs():
        embeddings = encode_prompts(load_rig(name).prompts(), tokenizer, text_encoder)
        flat = embeddings.flatten(1)
        distances = torch.cdist(flat, flat).square() / flat.shape[1] / embeddings.var()
        differences[name] = float(distances[~torch.eye(len(flat), dtype=torch.bool)].min())
        if differences[name] < MIN_PROMPT_DIFFERENCE:
            raise ValueError(
                f"the text encoder hardly tells the views of rig {name} apart: {differences[name]:.3g}; another seed"
            )
    return differences


def make_schedulers() -> tuple[DDIMScheduler, DDPMScheduler]:
    """The sampler's noise schedule and that of the image embedding, with Stable Diffusion 2.1 unCLIP's own values.

    But for the spacing of the time steps: `trailing` begins at the last one trained, where all is noise, however few
    there are (https://arxiv.org/abs/2305.08891). `leading` begins 5 steps at 801, whose noise the UNet never saw alone.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    return scheduler, DDPMScheduler(beta_schedule="squaredcos_cap_v2")


def make_feature_extractor(size: int) -> Any:
    """CLIP's image processor for a vision encoder of images of `size` px."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def write_untrained_parts(folder: Path, config: DemoComponentsConfig) -> None:
    """Tokenizer, text encoder, feature extractor and the two schedulers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(config.text, tokenizer, config.seed)
    differences = check_prompts_differ(tokenizer, text_encoder)
    log.info("least difference between two views' prompts: %s", {k: round(v, 2) for k, v in differences.items()})
    scheduler, noising = make_schedulers()
    for part, name in (
        (tokenizer, "tokenizer"), (text_encoder.half(), "text_encoder"),
        (make_feature_extractor(config.vision.image_size), "feature_extractor"), (scheduler, "scheduler"),
        (noising, "image_noising_scheduler"),
    ):  # fmt: skip
        shutil.rmtree(folder / name, ignore_errors=True)  # files of another library version would stay and be read
        part.save_pretrained(folder / name)


def make_vision_encoder(config: VisionConfig, seed: int) -> CLIPVisionModelWithProjection:
    """An untrained small CLIP vision encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    seed_everything("demo vision encoder", seed)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.hidden_size, intermediate_size=4 * config.hidden_size, projection_dim=config.projection,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, image_size=config.image_size,
            patch_size=config.patch_size,
        )
    )  # fmt: skip


def create_vae(config: VaeConfig, image_size: int, seed: int) -> AutoencoderKL:
    """An untrained autoencoder."""
    from diffusers import AutoencoderKL

    seed_everything("demo vae", seed)
    blocks = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=list(config.block_out_channels), layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels, norm_num_groups=config.norm_groups, sample_size=image_size,
        mid_block_add_attention=False,
    )  # fmt: skip


# ---- the same parts at any size, random weights ---------------------------------------------------------------------


class Stage1Shape(NamedTuple):
    """unet, vae, vision: constructor arguments of UNet2DConditionModel, AutoencoderKL and CLIPVisionConfig."""

    unet: dict
    vae: dict
    vision: dict


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
    shape: Stage1Shape, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Components:
    """The frozen parts (no UNet) with random weights, made on `device`, as `load_components` would give them."""
    from diffusers import AutoencoderKL
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL(**shape.vae)
        image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape.vision))
        normalizer = StableUnCLIPImageNormalizer(shape.vision["projection_dim"])
    scheduler, noising = make_schedulers()
    # In this order: the image normalizer's own `to` makes new parameters.
    vae, image_encoder, normalizer = (
        (part if dtype == torch.float32 else part.to(dtype)).eval().requires_grad_(False)
        for part in (vae, image_encoder, normalizer)
    )
    return Components(
        vae=vae, image_encoder=image_encoder, image_normalizer=normalizer,
        feature_extractor=make_feature_extractor(shape.vision["image_size"]), image_noising_scheduler=noising,
        scheduler=scheduler, unet=None, unet_folder=None, folder=Path("random weights"), device=torch.device(device),
    )  # fmt: skip
