"""The small components this project makes itself: same classes, files and folders as SD 2.1 unCLIP, other sizes.

Tokenizer: byte-pair vocabulary of the rigs' own prompts. Text encoder: random weights, frozen, as prompts only have to
be distinguishable. Vision encoder and autoencoder: trained on the samples (mvdiffusion/demo_training.py).
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multiview.rig import PROMPT_STYLES, available_rigs, load_rig
from multiview.run import seed_everything

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

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
    temperature: float = 0.1


@dataclass
class VaeConfig:
    block_out_channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    layers_per_block: int = 1
    latent_channels: int = 8
    norm_groups: int = 8
    steps: int = 2000
    batch: int = 16  # pictures (full) or, four times as many, crops
    lr: float = 1e-3
    warmup_steps: int = 100
    crop_share: float = 0.7  # share of steps on crops centred on the animal
    crop_size: int = 64  # pixels
    foreground_weight: float = 5.0
    gradient_weight: float = 1.0  # of the L1 between picture gradients
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


# ---- tokenizer and text encoder -------------------------------------------------------------------------------------


def prompt_corpus() -> list[str]:
    """Every prompt of every rig that ships, in every style, with and without the numbers."""
    return sorted(
        {
            prompt
            for rig in map(load_rig, available_rigs())
            for style in PROMPT_STYLES
            for angles in (False, True)
            for prompt in rig.prompts(style, angles=angles)
        }
    )


def byte_pair_vocabulary(
    words: Counter[tuple[str, ...]], alphabet: list[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair encoding until every word is one token. words: symbol sequences with counts.

    Ties are broken by the alphabet, so the vocabulary depends on the words only.
    """
    pieces, merges = dict(words), []
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in pieces.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        if "".join(best) not in tokens:
            tokens.append("".join(best))
        merged: Counter[tuple[str, ...]] = Counter()
        for word, count in pieces.items():
            merged[_merge(word, best)] += count
        pieces = dict(merged)
    return {token: index for index, token in enumerate([*tokens, BOS, EOS])}, merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result, index = [], 0
    while index < len(word):
        if word[index : index + 2] == pair:
            result.append("".join(pair))
            index += 2
        else:
            result.append(word[index])
            index += 1
    return tuple(result)


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose words are those of the rigs' prompts; any other text falls back to its bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    # An untrained tokenizer of the same class splits text into words exactly as the finished one will.
    bare = CLIPTokenizer(vocab=byte_pair_vocabulary(Counter(), alphabet)[0], merges=[])
    words: Counter[tuple[str, ...]] = Counter()
    backend = bare.backend_tokenizer
    for prompt in prompt_corpus():
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(prompt)):
            words[(*word[:-1], word[-1] + "</w>")] += 1
    vocabulary, merges = byte_pair_vocabulary(words, alphabet)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def make_text_encoder(config: TextConfig, tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    """A small CLIP text encoder with random weights, checked to tell the views of every rig apart."""
    from transformers import CLIPTextConfig, CLIPTextModel

    seed_everything("demo text encoder", seed)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=77,
            projection_dim=config.hidden_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    with torch.no_grad():
        # CLIP's initialisation (0.02, 0.01) lets the layers pass little between tokens. Weights this large attend
        # sharply, so that the one token that names the view reaches every later one.
        for name, weight in model.named_parameters():
            if "embedding" in name:
                weight.normal_(0, 1.0)
            elif weight.ndim == 2:
                gain = 3.0 if ".q_proj." in name or ".k_proj." in name else 2.0
                weight.normal_(0, gain * weight.shape[1] ** -0.5)
    return model


def prompt_difference(embeddings: Tensor) -> float:
    """Smallest mean squared difference between two views' rows [n, 77, d], over the embeddings' variance."""
    flat = embeddings.flatten(1).float()
    distances = torch.cdist(flat, flat).square() / flat.shape[1] / embeddings.float().var()
    return float(distances[~torch.eye(len(flat), dtype=torch.bool)].min())


def check_prompts_differ(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> dict[str, float]:
    """Raises ValueError where two views of a rig would be told nearly the same thing."""
    from mvdiffusion.prompts import encode_prompts

    found = {}
    for name in available_rigs():
        found[name] = prompt_difference(encode_prompts(load_rig(name).prompts(), tokenizer, text_encoder))
        if found[name] < MIN_PROMPT_DIFFERENCE:
            raise ValueError(
                f"the text encoder hardly tells the views of rig {name} apart: {found[name]:.3g}; another seed"
            )
    return found


# ---- the rest -------------------------------------------------------------------------------------------------------


def make_vision_encoder(config: VisionConfig, seed: int) -> CLIPVisionModelWithProjection:
    """An untrained small CLIP vision encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    seed_everything("demo vision encoder", seed)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            projection_dim=config.projection,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
        )
    )


def make_feature_extractor(size: int) -> CLIPImageProcessorPil:
    """CLIP's image processor for a vision encoder of pictures of `size` px."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


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


def write_small_parts(folder: Path, config: DemoComponentsConfig) -> None:
    """Tokenizer, text encoder, feature extractor and the two schedulers: everything that needs no training."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(config.text, tokenizer, config.seed)
    found = check_prompts_differ(tokenizer, text_encoder)
    log.info(
        "least difference between two views' prompts: %s", {name: round(value, 2) for name, value in found.items()}
    )
    for part in ("tokenizer", "text_encoder"):
        shutil.rmtree(folder / part, ignore_errors=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder.half().save_pretrained(folder / "text_encoder")
    make_feature_extractor(config.vision.image_size).save_pretrained(folder / "feature_extractor")
    scheduler, noising = make_schedulers()
    scheduler.save_pretrained(folder / "scheduler")
    noising.save_pretrained(folder / "image_noising_scheduler")
