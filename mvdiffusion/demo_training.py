"""Training of the two demo components that are learned: the autoencoder and the vision encoder. Resumable in pieces."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from multiview.checkpoint import load_checkpoint, load_strict, save_checkpoint
from multiview.files import atomic_folder
from multiview.image import composite
from multiview.metrics import foreground_psnr, psnr
from multiview.run import make_generator
from multiview.sample import read_sample, read_split
from mvdiffusion.demo import DemoComponentsConfig, create_vae, make_vision_encoder, write_untrained_parts

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

log = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
BACKGROUND_VALUES = (1.0, 1.0, 0.5, 0.0)  # white half of the time: what inference shows


def make_demo_components(config: DemoComponentsConfig, max_minutes: float | None = None) -> dict | None:
    """Creates the components folder, or continues with it.

    Repeating the call resumes. Returns the measured figures when everything is trained, None when the time ran out.
    """
    end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
    output, work = Path(config.output_dir), Path(config.output_dir + "_training")
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    (work / ".gitignore").write_text("*\n")  # training state, never to be committed with the weights beside it
    write_untrained_parts(output, config)
    folders = read_split(config.data)[: config.max_samples]
    if len(folders) <= config.holdout_samples + 2:
        raise ValueError(
            f"{config.data} lists {len(folders)} samples, more than {config.holdout_samples + 2} are needed; make data "
            "first: python scripts/make_synthetic_mouse.py --output_dir <folder> --num_samples 2000"
        )
    samples = [(read_sample(path, image_size=config.image_size).rgba * 255).round().byte() for path in folders]
    views = min(len(sample) for sample in samples)
    rgba = torch.stack([sample[:views] for sample in samples])  # [samples, views, 4, s, s]
    train, held_out = rgba[: -config.holdout_samples], rgba[-config.holdout_samples :]
    log.info("%d training animals, %d held out, %d views each", len(train), len(held_out), views)
    if not train_vision(config, train, held_out, end):
        return None
    return train_vae(config, train, held_out, end)


def fit(
    part: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    config: DemoComponentsConfig,
    end: float,
    max_norm: float = math.inf,
) -> tuple[dict[str, Tensor], bool]:
    """Trains a model by `loss_of(step)` and keeps its state on disk; continues with the state that is there.

    part: `vision` or `vae`, whose section of the config says steps, lr and warmup_steps. end: time.monotonic() at which
    to stop. Returns the averaged weights and whether all steps are done.
    """
    options = getattr(config, part)
    path = Path(config.output_dir + "_training") / part / STATE_FILE
    average, start = {name: tensor.clone() for name, tensor in model.state_dict().items()}, 0
    if path.is_file():
        state = load_checkpoint(path)
        load_strict(model, state["model"], path)  # another configuration than the last call's is refused here, by name
        optimizer.load_state_dict(state["optimizer"])
        average, start = {name: tensor.clone() for name, tensor in state["average"].items()}, state["step"]
        log.info("%s: continuing at step %d of %d", part, start, options.steps)

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
        save_checkpoint(path, state, {"step": step})

    saved = time.monotonic()
    for step in range(start, options.steps):
        if time.monotonic() >= end:
            save(step)
            log.info("%s: time is up at step %d of %d; repeat the command to continue", part, step, options.steps)
            return average, False
        for group in optimizer.param_groups:
            group["lr"] = options.lr * schedule(step, options.steps, options.warmup_steps)
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
        if time.monotonic() - saved >= 60 * config.save_minutes:
            save(step + 1)
            saved = time.monotonic()
    if start < options.steps:
        save(options.steps)
    return average, True


def schedule(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ---- vision encoder -------------------------------------------------------------------------------------------------


def train_vision(config: DemoComponentsConfig, train: Tensor, held_out: Tensor, end: float) -> bool:
    """Trains the vision encoder to know an animal again in another view; writes it and the normalizer. False: time up.

    Two views of one animal are pulled together, other animals pushed away (InfoNCE): the embedding comes to hold coat,
    build and pose, whatever the direction. train, held_out: uint8 [n, v, 4, h, w].
    """
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    options, output = config.vision, Path(config.output_dir)
    model = make_vision_encoder(options, config.seed)

    def embed(rgba: Tensor) -> Tensor:
        return model(_vision_pixels(rgba, options.image_size)).image_embeds

    def pair(rgba: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Embeddings of two random views of each animal."""
        count, views = rgba.shape[:2]
        drawn = [torch.randint(views, (count,), generator=generator) for _ in range(2)]
        return [embed(rgba[torch.arange(count), view]) for view in drawn]

    def loss_of(step: int) -> Tensor:
        generator = make_generator("demo vision", config.seed, step)
        rows = torch.randperm(len(train), generator=generator)[: options.batch]
        logits = similarity(*pair(train[rows], generator)) / options.temperature
        target = torch.arange(len(rows))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    _, done = fit("vision", model, optimizer, loss_of, config, end)
    if not done:
        return False
    with torch.no_grad():
        model.eval()
        a, b = pair(held_out, make_generator("demo normalizer", config.seed))
        known = float((similarity(a, b).argmax(1) == torch.arange(len(a))).float().mean())
        log.info("vision: %.0f %% of %d held-out animals known again in another view", 100 * known, len(a))
        embeddings = torch.cat([embed(batch) for batch in train[:500].flatten(0, 1).split(64)])
        normalizer = StableUnCLIPImageNormalizer(options.projection)
        normalizer.mean.copy_(embeddings.mean(0, keepdim=True))
        normalizer.std.copy_(embeddings.std(0, keepdim=True).clamp_min(1e-3))
    for part, name in ((normalizer, "image_normalizer"), (model.half(), "image_encoder")):
        with atomic_folder(output / name) as temporary:
            part.save_pretrained(temporary)
    return True


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities [n, n] of embeddings [n, d], standardized over the batch first.

    Without that all embeddings start out nearly parallel (images are mostly background) and training stays there.
    """
    a, b = ((x - x.mean(0)) / x.std(0).clamp_min(1e-4) for x in (a, b))
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def _vision_pixels(rgba: Tensor, size: int) -> Tensor:
    """uint8 [n, 4, h, w] -> CLIP-normalized pixels [n, 3, size, size], on white as at inference."""
    from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    image = composite(rgba.float() / 255, 1.0)
    image = F.interpolate(image, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (image - mean) / std


# ---- autoencoder ----------------------------------------------------------------------------------------------------


def train_vae(config: DemoComponentsConfig, train: Tensor, held_out: Tensor, end: float) -> dict | None:
    """Trains and writes the autoencoder. Returns measured figures, None when the time ran out.

    The loss is the foreground-weighted L1 of images and of their gradients, and the KL per latent value.
    """
    options = config.vae
    vae, flat = create_vae(options, config.image_size, config.seed), train.flatten(0, 1)
    weights = (options.foreground_weight - 1, options.gradient_weight / 2, options.kl_weight)

    def loss_of(step: int) -> Tensor:
        generator = make_generator("demo vae", config.seed, step)
        crops = float(torch.rand((), generator=generator)) < options.crop_share
        count = options.batch * (config.image_size // options.crop_size) ** 2 // 2 if crops else options.batch // 2
        rgba = flat[torch.randint(len(flat), (count,), generator=generator)]
        rgba = (animal_crops(rgba, options.crop_size, generator) if crops else rgba).float() / 255
        chosen = torch.randint(len(BACKGROUND_VALUES), (len(rgba),), generator=generator)
        image, mask = composite(rgba, torch.tensor(BACKGROUND_VALUES)[chosen].view(-1, 1, 1, 1)), rgba[:, 3:]
        if float(torch.rand((), generator=generator)) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)  # an autoencoder knows no left and right
        image = image * 2 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            posterior = vae.encode(image).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode((posterior.mean + posterior.std * noise).to(image.dtype)).sample
        weight, error = 1 + weights[0] * mask, decoded.float() - image
        l1 = (weight * error.abs()).sum() / (weight.sum() * 3)
        across = (weight[..., 1:] * error.diff(dim=-1).abs()).sum() / (weight[..., 1:].sum() * 3)
        down = (weight[..., 1:, :] * error.diff(dim=-2).abs()).sum() / (weight[..., 1:, :].sum() * 3)
        return l1 + weights[1] * (across + down) + weights[2] * posterior.kl().sum() / posterior.mean.numel()

    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01)
    average, done = fit("vae", vae, optimizer, loss_of, config, end, max_norm=1.0)
    finished = create_vae(options, config.image_size, config.seed)
    finished.load_state_dict(average)
    standardize_latents(finished.eval(), held_out)
    figures = measure_vae(finished, held_out)
    finished.register_to_config(scaling_factor=1.0)
    with atomic_folder(Path(config.output_dir) / "vae") as temporary:
        finished.half().save_pretrained(temporary)
    log.info("autoencoder on held-out animals: %s", {name: round(value, 3) for name, value in figures.items()})
    return figures if done else None


def animal_crops(rgba: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[n, 4, h, w] -> [n, 4, size, size] crops centered near each image's animal."""
    height, width = rgba.shape[-2:]
    mass = rgba[:, 3].float()
    total = mass.sum((1, 2)).clamp_min(1e-6)
    rows = (mass.sum(2) * torch.arange(height)).sum(1) / total
    columns = (mass.sum(1) * torch.arange(width)).sum(1) / total
    shift = (torch.rand(2, len(rgba), generator=generator) - 0.5) * size * 0.75
    tops = (rows + shift[0] - size / 2).round().long().clamp(0, height - size)
    lefts = (columns + shift[1] - size / 2).round().long().clamp(0, width - size)
    corners = zip(tops.tolist(), lefts.tolist())
    return torch.stack([image[:, top : top + size, x : x + size] for image, (top, x) in zip(rgba, corners)])


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, held_out: Tensor) -> dict[str, float]:
    """Reconstruction on white of uint8 [n, v, 4, h, w]: dB, foreground dB; and the latents' standard deviation."""
    rgba = held_out.flatten(0, 1).float() / 255
    rgba = rgba[rgba[:, 3].sum((1, 2)) > 0]
    images = composite(rgba, 1.0)
    latents = [vae.encode(batch * 2 - 1).latent_dist.mode() for batch in images.split(16)]
    result = torch.cat([(vae.decode(latent).sample / 2 + 0.5).clamp(0, 1) for latent in latents])
    return {
        "psnr": float(psnr(result, images).mean()),
        "foreground_psnr": float(foreground_psnr(result, images, rgba[:, 3:]).mean()),
        "latent_std": float(torch.cat(latents).std()),
    }


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, rgba: Tensor) -> None:
    """Gives every latent channel mean 0 and deviation 1 on images uint8 [n, v, 4, h, w] on white, and changes nothing
    else: the map is folded into the 1x1 convolutions on both sides of the latents.

    One scaling factor cannot: channels whose mean is far from 0 (a constant background sees to that) would drown the
    rest, and noise would hide the animal long before diffusion expects it.
    """
    images = composite(rgba.flatten(0, 1).float() / 255, 1.0)
    latents = torch.cat([vae.encode(batch * 2 - 1).latent_dist.mode() for batch in images.split(16)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inwards, outwards, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    # quant_conv gives means, then log variances: z' = (z - mean) / std.
    inwards.weight[:channels] /= std.view(-1, 1, 1, 1)
    inwards.bias[:channels] = (inwards.bias[:channels] - mean) / std
    inwards.bias[channels:] -= 2 * std.log()
    # post_quant_conv takes z = z' std + mean.
    outwards.bias += outwards.weight[:, :, 0, 0] @ mean
    outwards.weight *= std.view(1, -1, 1, 1)
