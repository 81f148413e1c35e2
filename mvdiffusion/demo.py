"""The small components this project makes itself: same classes, files and folders as SD 2.1 unCLIP, other sizes. The
text encoder has random weights, as prompts only have to be distinguishable; vision encoder and autoencoder are trained
on the samples, resumable in pieces."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from multiview.checkpoint import load_checkpoint, load_strict, save_checkpoint
from multiview.files import atomic_folder
from multiview.image import composite
from multiview.metrics import foreground_psnr, psnr
from multiview.rig import PROMPT_STYLES, available_rigs, load_rig
from multiview.run import make_generator, seed_everything
from multiview.sample import read_sample, read_split
from multiview.training import rate_factor
from mvdiffusion.components import make_feature_extractor, make_schedulers
from mvdiffusion.latents import image_embeddings
from mvdiffusion.prompts import alike_views, encode_prompts, view_similarity

log = logging.getLogger(__name__)


@dataclass
class VisionConfig:
    image_size: int = 64  # pixels
    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    projection: int = 64  # width of the image embedding; class labels are twice as wide
    steps: int = 400
    batch: int = 48  # animals; two views of each
    lr: float = 1e-3
    warmup_steps: int = 50


@dataclass
class VaeConfig:
    block_out_channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    latent_channels: int = 8
    norm_groups: int = 8
    steps: int = 2000
    batch: int = 16  # images (full) or, four times as many, crops
    lr: float = 1e-3
    warmup_steps: int = 100
    crop_size: int = 64  # pixels
    bf16: bool = True


@dataclass
class DemoComponentsConfig:
    data: str = "data_mouse/data_mouse_train.txt"  # split list
    output_dir: str = "checkpoints/mvdiffusion/demo_components"
    image_size: int = 128  # pixels
    max_samples: int = 2000  # held in memory: 64 KiB per view
    holdout_samples: int = 16  # the last of the list, for the reported figures
    save_minutes: float = 2.0  # how often the training state is written
    seed: int = 0
    start_from: str | None = None  # a components folder: its vision encoder is kept, its autoencoder trained on
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
    # The vocabulary is then all symbols and merges, so that any other text has its bytes too.
    trained = tokenizer(symbols, []).train_new_from_iterator(
        sorted(prompts), vocab_size=10000, new_special_tokens=symbols, show_progress=False
    )
    merges = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    return tokenizer(list(dict.fromkeys([*symbols, *map("".join, merges)])), merges)


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
        (tokenizer, "tokenizer"), (text_encoder.half(), "text_encoder"), (scheduler, "scheduler"),
        (make_feature_extractor(config.vision.image_size), "feature_extractor"), (noising, "image_noising_scheduler"),
    ):  # fmt: skip
        shutil.rmtree(folder / name, ignore_errors=True)  # files of another library version would stay and be read
        part.save_pretrained(folder / name)


def make_demo_components(config: DemoComponentsConfig, max_minutes: float | None = None) -> dict | None:
    """Creates the components folder, or continues with it. Returns measured figures, None when the time ran out."""
    end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
    output, work = Path(config.output_dir), Path(config.output_dir + "_training")
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    (work / ".gitignore").write_text("*\n")  # training state, never to be committed with the weights beside it
    write_untrained_parts(output, config)
    folders = read_split(config.data)[: config.max_samples]
    if len(folders) <= config.holdout_samples + 2:
        told = f"{config.data} lists {len(folders)} samples, more than {config.holdout_samples + 2} are needed"
        command = "python scripts/make_synthetic_mouse.py --output_dir <folder> --num_samples 2000"
        raise ValueError(f"{told}; make data first: {command}")
    samples = [(read_sample(path, image_size=config.image_size).rgba * 255).round().byte() for path in folders]
    views = min(len(sample) for sample in samples)
    rgba = torch.stack([sample[:views] for sample in samples])  # [samples, views, 4, s, s]
    train, held_out = rgba[: -config.holdout_samples], rgba[-config.holdout_samples :]
    log.info("%d training animals, %d held out, %d views each", len(train), len(held_out), views)
    if config.start_from:
        for name in ("image_encoder", "image_normalizer"):
            shutil.copytree(Path(config.start_from) / name, output / name, dirs_exist_ok=True)
    elif not train_vision(config, train, end):
        return None
    return train_vae(config, train, held_out, end)


def fit(
    part: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[int], Tensor],
    config: DemoComponentsConfig, end: float, max_norm: float = math.inf,
) -> tuple[dict[str, Tensor], bool]:  # fmt: skip
    """Trains a model by `loss_of(step)`, from the state on disk if there is one; returns the averaged weights and
    whether all steps are done. part: `vision` or `vae`, the section of the config. end: time.monotonic() to stop at."""
    options, start, saved = getattr(config, part), 0, time.monotonic()
    path = Path(config.output_dir + "_training") / part / "training_state.pt"
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if path.is_file():
        state = load_checkpoint(path)
        load_strict(model, state["model"], path)  # another configuration than the last call's is refused here, by name
        optimizer.load_state_dict(state["optimizer"])
        average, start = {name: tensor.clone() for name, tensor in state["average"].items()}, state["step"]
        log.info("%s: continuing at step %d of %d", part, start, options.steps)
    for step in range(start, max(start, options.steps) + 1):  # the last round only saves
        now = time.monotonic()
        is_over = step >= options.steps or now >= end
        if step > start and (is_over or now - saved >= 60 * config.save_minutes):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
            save_checkpoint(path, state, {"step": step})
            saved = now
        if is_over:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate_factor("cosine", step, options.warmup_steps, options.steps)
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 1 - min(0.998, (1 + step) / (10 + step)))
        if (step + 1) % 100 == 0:
            log.info("%s step %d of %d: loss %.4f", part, step + 1, options.steps, loss.item())
    if step < options.steps:
        log.info("%s: time is up at step %d of %d; repeat the command to continue", part, step, options.steps)
    return average, step >= options.steps


def train_vision(config: DemoComponentsConfig, train: Tensor, end: float) -> bool:
    """Trains the vision encoder on uint8 [n, v, 4, h, w]; writes it and the normalizer. False: time up. Two views of
    one animal are pulled together, other animals pushed away (InfoNCE): the embedding comes to hold coat, build and
    pose, whatever the direction."""
    options, output = config.vision, Path(config.output_dir)
    seed_everything("demo vision encoder", config.seed)
    sizes = CLIPVisionConfig(
        hidden_size=options.hidden_size, intermediate_size=4 * options.hidden_size, projection_dim=options.projection,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, image_size=options.image_size,
        patch_size=16,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(sizes)
    parts = SimpleNamespace(feature_extractor=make_feature_extractor(options.image_size), image_encoder=model)

    def embed(rgba: Tensor) -> Tensor:  # of uint8 [n, 4, h, w], on white as at inference
        return image_embeddings(parts, composite(rgba.float() / 255, 1.0), exact=False)

    def loss_of(step: int) -> Tensor:
        generator = make_generator("demo vision", config.seed, step)
        rows = train[torch.randperm(len(train), generator=generator)[: options.batch]]
        target = torch.arange(len(rows))
        drawn = [torch.randint(rows.shape[1], (len(rows),), generator=generator) for _ in range(2)]
        # Standardized over the batch: without that all embeddings start out nearly parallel (images are mostly
        # background) and training stays there.
        pair = (embed(rows[target, view]) for view in drawn)
        a, b = (F.normalize((x - x.mean(0)) / x.std(0).clamp_min(1e-4), dim=-1) for x in pair)
        logits = a @ b.T / 0.1  # the temperature
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    _, done = fit("vision", model, optimizer, loss_of, config, end)
    if not done:
        return False
    with torch.no_grad():
        model.eval()
        embeddings = torch.cat([embed(batch) for batch in train[:500].flatten(0, 1).split(64)])
        normalizer = StableUnCLIPImageNormalizer(options.projection)
        normalizer.mean.copy_(embeddings.mean(0, keepdim=True))
        normalizer.std.copy_(embeddings.std(0, keepdim=True).clamp_min(1e-3))
    for part, name in ((normalizer, "image_normalizer"), (model.half(), "image_encoder")):
        with atomic_folder(output / name) as temporary:
            part.save_pretrained(temporary)
    return True


def train_vae(config: DemoComponentsConfig, train: Tensor, held_out: Tensor, end: float) -> dict | None:
    """Trains and writes the autoencoder. Returns measured figures, None when the time ran out."""
    options, flat = config.vae, train.flatten(0, 1)
    seed_everything("demo vae", config.seed)
    blocks = len(options.block_out_channels)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=list(options.block_out_channels), layers_per_block=1,
        latent_channels=options.latent_channels, norm_num_groups=options.norm_groups, sample_size=config.image_size,
        mid_block_add_attention=False,
    )  # fmt: skip
    if config.start_from:
        trained = AutoencoderKL.from_pretrained(Path(config.start_from) / "vae", torch_dtype=torch.float32)
        load_strict(vae, trained.state_dict(), Path(config.start_from) / "vae")
    backgrounds = torch.tensor([1.0, 1.0, 0.5, 0.0])  # white half of the time: what inference shows

    def loss_of(step: int) -> Tensor:
        generator = make_generator("demo vae", config.seed, step)
        crops = float(torch.rand((), generator=generator)) < 0.7  # of the animal
        count = options.batch * (config.image_size // options.crop_size) ** 2 // 2 if crops else options.batch // 2
        rgba = flat[torch.randint(len(flat), (count,), generator=generator)]
        rgba = (animal_crops(rgba, options.crop_size, generator) if crops else rgba).float() / 255
        chosen = torch.randint(len(backgrounds), (len(rgba),), generator=generator)
        image, mask = composite(rgba, backgrounds[chosen].view(-1, 1, 1, 1)), rgba[:, 3:]
        if float(torch.rand((), generator=generator)) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)  # an autoencoder knows no left and right
        image = image * 2 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            posterior = vae.encode(image).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode((posterior.mean + posterior.std * noise).to(image.dtype)).sample
        weight, error = 1 + 4 * mask, decoded.float() - image
        l1 = (weight * error.abs()).sum() / (weight.sum() * 3)
        across = (weight[..., 1:] * error.diff(dim=-1).abs()).sum() / (weight[..., 1:].sum() * 3)
        down = (weight[..., 1:, :] * error.diff(dim=-2).abs()).sum() / (weight[..., 1:, :].sum() * 3)
        # The KL is little: as much noise as makes the decoder bear what it will meet of Stage 1's.
        return l1 + 0.5 * (across + down) + 3e-4 * posterior.kl().sum() / posterior.mean.numel()

    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01)
    average, done = fit("vae", vae, optimizer, loss_of, config, end, max_norm=1.0)
    vae.load_state_dict(average)
    standardize_latents(vae.eval(), held_out)
    rgba = held_out.flatten(0, 1).float() / 255
    rgba = rgba[rgba[:, 3].sum((1, 2)) > 0]
    images, latents = latents_on_white(vae, rgba)
    with torch.no_grad():
        rebuilt = torch.cat([(vae.decode(batch).sample / 2 + 0.5).clamp(0, 1) for batch in latents.split(16)])
    foreground = foreground_psnr(rebuilt, images, rgba[:, 3:])
    values = {"psnr": psnr(rebuilt, images).mean(), "foreground_psnr": foreground.mean(), "latent_std": latents.std()}
    figures = {name: float(value) for name, value in values.items()}
    vae.register_to_config(scaling_factor=1.0)
    with atomic_folder(Path(config.output_dir) / "vae") as temporary:
        vae.half().save_pretrained(temporary)
    log.info("autoencoder on held-out animals: %s", {name: round(value, 3) for name, value in figures.items()})
    return figures if done else None


def animal_crops(rgba: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[n, 4, h, w] -> [n, 4, size, size] crops centered near each image's animal."""
    mass = rgba[:, 3].float()
    total, shift = mass.sum((1, 2)).clamp_min(1e-6), torch.rand(2, len(rgba), generator=generator) - 0.5
    corners = []
    for along, length, move in zip((mass.sum(2), mass.sum(1)), rgba.shape[-2:], shift):
        center = (along * torch.arange(length)).sum(1) / total
        corners.append((center + move * size * 0.75 - size / 2).round().long().clamp(0, length - size).tolist())
    return torch.stack([image[:, y : y + size, x : x + size] for image, y, x in zip(rgba, *corners)])


@torch.no_grad()
def latents_on_white(vae: AutoencoderKL, rgba: Tensor) -> tuple[Tensor, Tensor]:
    """Images [n, 3, h, w] on white of [n, 4, h, w], 0..1, and the modes of their latents, in batches of 16."""
    images = composite(rgba, 1.0)
    return images, torch.cat([vae.encode(batch * 2 - 1).latent_dist.mode() for batch in images.split(16)])


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, rgba: Tensor) -> None:
    """Gives every latent channel mean 0 and deviation 1 on images uint8 [n, v, 4, h, w] on white; changes no image."""
    # The map is folded into the 1x1 convolutions around the latents. One scaling factor cannot do it: channels whose
    # mean is far from 0 (a constant background sees to that) would drown the rest.
    _, latents = latents_on_white(vae, rgba.flatten(0, 1).float() / 255)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inwards, outwards, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    # quant_conv gives means, then log variances: z' = (z - mean) / std.
    inwards.weight[:channels] /= std.view(-1, 1, 1, 1)
    inwards.bias[:channels] = (inwards.bias[:channels] - mean) / std
    inwards.bias[channels:] -= 2 * std.log()
    # post_quant_conv takes z = z' std + mean.
    outwards.bias += outwards.weight[:, :, 0, 0] @ mean
    outwards.weight *= std.view(1, -1, 1, 1)
