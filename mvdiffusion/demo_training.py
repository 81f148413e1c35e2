"""Training of the two demo components that are learned: the autoencoder and the vision encoder. Resumable in pieces."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from multiview.checkpoint import load_checkpoint, load_strict, save_checkpoint
from multiview.files import atomic_folder
from multiview.image import composite
from multiview.metrics import foreground_psnr, psnr
from multiview.run import make_generator, seed_everything
from multiview.sample import read_sample, read_split
from mvdiffusion.demo_components import DemoComponentsConfig, VaeConfig, make_vision_encoder, write_small_parts

log = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
BACKGROUND_VALUES = (1.0, 1.0, 0.5, 0.0)  # white half of the time: what inference shows


class Clock:
    """Stops a training loop when its time is used up and says when to save."""

    def __init__(self, max_minutes: float | None, save_minutes: float) -> None:
        self.end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.save_seconds = 60 * save_minutes
        self.saved = time.monotonic()

    def is_over(self) -> bool:
        return time.monotonic() >= self.end

    def save_is_due(self) -> bool:
        if time.monotonic() - self.saved < self.save_seconds:
            return False
        self.saved = time.monotonic()
        return True


def make_demo_components(config: DemoComponentsConfig, max_minutes: float | None = None) -> dict | None:
    """Creates the components folder, or continues with it.

    Repeating the call resumes. Returns the measured figures when everything is trained, None when the time ran out.
    """
    output, work = Path(config.output_dir), Path(config.output_dir + "_training")
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    (work / ".gitignore").write_text("*\n")  # training state, never to be committed with the weights beside it
    clock = Clock(max_minutes, config.save_minutes)
    write_small_parts(output, config)
    rgba = load_pictures(config)
    train, held_out = rgba[: -config.holdout_samples], rgba[-config.holdout_samples :]
    log.info("%d training animals, %d held out, %d views each", len(train), len(held_out), rgba.shape[1])
    if not train_vision(config, train, held_out, output, work, clock):
        return None
    return train_vae(config, train, held_out, output, work, clock)


def load_pictures(config: DemoComponentsConfig) -> Tensor:
    """uint8 [samples, views, 4, s, s] of the split list's samples."""
    folders = read_split(config.data)[: config.max_samples]
    if len(folders) <= config.holdout_samples + 2:
        raise ValueError(
            f"{config.data} lists {len(folders)} samples, more than {config.holdout_samples + 2} are needed; make data "
            "first: python scripts/make_synthetic_mouse.py --output_dir <folder> --num_samples 2000"
        )
    pictures = [read_sample(folder, image_size=config.image_size).rgba for folder in folders]
    views = min(len(picture) for picture in pictures)
    return torch.stack([(picture[:views] * 255).round().byte() for picture in pictures])


def on_background(rgba: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """uint8 [n, 4, h, w] -> RGB on a random background each, 0..1 [n, 3, h, w], and the mask [n, 1, h, w]."""
    values = torch.tensor(BACKGROUND_VALUES)[torch.randint(len(BACKGROUND_VALUES), (len(rgba),), generator=generator)]
    rgba = rgba.float() / 255
    return composite(rgba, values.view(-1, 1, 1, 1)), rgba[:, 3:]


def animal_crops(rgba: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[n, 4, h, w] -> [n, 4, size, size] crops centred near each picture's animal."""
    height, width = rgba.shape[-2:]
    mass = rgba[:, 3].float()
    total = mass.sum((1, 2)).clamp_min(1e-6)
    rows = (mass.sum(2) * torch.arange(height)).sum(1) / total
    columns = (mass.sum(1) * torch.arange(width)).sum(1) / total
    shift = (torch.rand(2, len(rgba), generator=generator) - 0.5) * size * 0.75
    tops = (rows + shift[0] - size / 2).round().long().clamp(0, height - size)
    lefts = (columns + shift[1] - size / 2).round().long().clamp(0, width - size)
    return torch.stack(
        [picture[:, t : t + size, x : x + size] for picture, t, x in zip(rgba, tops.tolist(), lefts.tolist())]
    )


# ---- autoencoder ----------------------------------------------------------------------------------------------------


def create_vae(config: VaeConfig, image_size: int, seed: int):
    """An untrained AutoencoderKL (diffusers)."""
    from diffusers import AutoencoderKL

    seed_everything("demo vae", seed)
    blocks = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=list(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        sample_size=image_size,
        mid_block_add_attention=False,
    )


def vae_loss(
    picture: Tensor, mask: Tensor, decoded: Tensor, posterior, config: VaeConfig
) -> tuple[Tensor, dict[str, float]]:
    """Foreground-weighted L1 of pictures and of their gradients, and the KL per latent value.

    picture, decoded: [b, 3, h, w] in -1..1. mask: [b, 1, h, w].
    """
    weight = 1 + (config.foreground_weight - 1) * mask
    error = decoded - picture
    l1 = (weight * error.abs()).sum() / (weight.sum() * 3)
    across = (weight[..., 1:] * error.diff(dim=-1).abs()).sum() / (weight[..., 1:].sum() * 3)
    down = (weight[..., 1:, :] * error.diff(dim=-2).abs()).sum() / (weight[..., 1:, :].sum() * 3)
    kl = posterior.kl().sum() / posterior.mean.numel()
    loss = l1 + config.gradient_weight * (across + down) / 2 + config.kl_weight * kl
    return loss, {"l1": l1.item(), "gradient": ((across + down) / 2).item(), "kl": kl.item()}


def train_vae(
    config: DemoComponentsConfig, train: Tensor, held_out: Tensor, output: Path, work: Path, clock: Clock
) -> dict | None:
    """Trains and writes <output>/vae. Returns measured figures, None when the time ran out (state kept in `work`)."""
    options = config.vae
    vae = create_vae(options, config.image_size, config.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    state_path, start = work / "vae" / STATE_FILE, 0
    if state_path.is_file():
        state = load_checkpoint(state_path)
        # Another configuration than the last call's is refused here, by name.
        load_strict(vae, state["model"], state_path)
        optimizer.load_state_dict(state["optimizer"])
        average, start = {k: v.clone() for k, v in state["average"].items()}, state["step"]
        log.info("autoencoder: continuing at step %d of %d", start, options.steps)

    def save(step: int) -> None:
        state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
        save_checkpoint(state_path, state, {"step": step})

    flat = train.flatten(0, 1)
    for step in range(start, options.steps):
        if clock.is_over():
            save(step)
            log.info("autoencoder: time is up at step %d of %d; repeat the command to continue", step, options.steps)
            _write_vae(vae, average, config, held_out, output)
            return None
        _set_lr(optimizer, options.lr * schedule(step, options.steps, options.warmup_steps))
        generator = make_generator("demo vae", config.seed, step)
        crops = float(torch.rand((), generator=generator)) < options.crop_share
        count = options.batch * (config.image_size // options.crop_size) ** 2 // 2 if crops else options.batch // 2
        chosen = flat[torch.randint(len(flat), (count,), generator=generator)]
        if crops:
            chosen = animal_crops(chosen, options.crop_size, generator)
        picture, mask = on_background(chosen, generator)
        if float(torch.rand((), generator=generator)) < 0.5:
            picture, mask = picture.flip(-1), mask.flip(-1)  # an autoencoder knows no left and right
        picture = picture * 2 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            posterior = vae.encode(picture).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode((posterior.mean + posterior.std * noise).to(picture.dtype)).sample
        loss, parts = vae_loss(picture, mask, decoded.float(), posterior, options)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        update_average(average, vae, min(0.998, (1 + step) / (10 + step)))
        if (step + 1) % 100 == 0:
            log.info(
                "autoencoder step %d: loss %.4f %s", step + 1, loss.item(), {k: round(v, 4) for k, v in parts.items()}
            )
        if clock.save_is_due():
            save(step + 1)
    save(options.steps)
    return _write_vae(vae, average, config, held_out, output)


def _write_vae(vae, average: dict[str, Tensor], config: DemoComponentsConfig, held_out: Tensor, output: Path) -> dict:
    """Writes the averaged weights with their measured scaling factor; returns the held-out figures."""
    finished = create_vae(config.vae, config.image_size, config.seed)
    finished.load_state_dict(average)
    finished.eval()
    standardise_latents(finished, held_out)
    figures = measure_vae(finished, held_out)
    finished.register_to_config(scaling_factor=1.0)
    with atomic_folder(output / "vae") as temporary:
        finished.half().save_pretrained(temporary)
    log.info("autoencoder on held-out animals: %s", {name: round(value, 3) for name, value in figures.items()})
    return figures


@torch.no_grad()
def standardise_latents(vae, rgba: Tensor) -> None:
    """Gives every latent channel mean 0 and deviation 1 on pictures [n, v, 4, h, w] on white, without changing what
    the autoencoder does: the map is folded into the 1x1 convolutions on both sides of the latents.

    One scaling factor cannot: channels whose mean is far from 0 (a constant background sees to that) would drown the
    rest, and noise would hide the animal long before diffusion expects it.
    """
    pictures = composite(rgba.flatten(0, 1).float() / 255, 1.0)
    latents = torch.cat([vae.encode(batch * 2 - 1).latent_dist.mode() for batch in pictures.split(16)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inwards, outwards, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    # quant_conv gives means, then log variances: z' = (z - mean) / std.
    inwards.weight[:channels] /= std.view(-1, 1, 1, 1)
    inwards.bias[:channels] = (inwards.bias[:channels] - mean) / std
    inwards.bias[channels:] -= 2 * std.log()
    # post_quant_conv takes z = z' std + mean.
    outwards.bias += outwards.weight[:, :, 0, 0] @ mean
    outwards.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def measure_vae(vae, held_out: Tensor) -> dict[str, float]:
    """Reconstruction on white of uint8 [n, v, 4, h, w]: dB, foreground dB; and the latents' standard deviation."""
    rgba = held_out.flatten(0, 1).float() / 255
    rgba = rgba[rgba[:, 3].sum((1, 2)) > 0]
    pictures, latents, decoded = composite(rgba, 1.0), [], []
    for batch in pictures.split(16):
        latent = vae.encode(batch * 2 - 1).latent_dist.mode()
        latents.append(latent)
        decoded.append((vae.decode(latent).sample / 2 + 0.5).clamp(0, 1))
    result = torch.cat(decoded)
    return {
        "psnr": float(psnr(result, pictures).mean()),
        "foreground_psnr": float(foreground_psnr(result, pictures, rgba[:, 3:]).mean()),
        "latent_std": float(torch.cat(latents).std()),
    }


# ---- vision encoder -------------------------------------------------------------------------------------------------


def train_vision(
    config: DemoComponentsConfig, train: Tensor, held_out: Tensor, output: Path, work: Path, clock: Clock
) -> bool:
    """Trains the vision encoder to know an animal again in another view; writes it and the normalizer. False: time up.

    Two views of one animal are pulled together, other animals pushed away (InfoNCE): the embedding comes to hold coat,
    build and pose, whatever the direction.
    """
    options = config.vision
    if (work / "vision_done").is_file() and (output / "image_encoder" / "config.json").is_file():
        return True
    model = make_vision_encoder(options, config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    for step in range(options.steps):
        if clock.is_over():
            log.info("vision encoder: time is up at step %d of %d; it starts again next time", step, options.steps)
            return False
        _set_lr(optimizer, options.lr * schedule(step, options.steps, 50))
        generator = make_generator("demo vision", config.seed, step)
        rows = torch.randperm(len(train), generator=generator)[: options.batch]
        pairs = [_random_views(train[rows], generator) for _ in range(2)]
        views = [model(_vision_pixels(pair, options.image_size)).image_embeds for pair in pairs]
        logits = similarity(*views) / options.temperature
        target = torch.arange(len(rows))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            log.info("vision encoder step %d: loss %.3f (chance %.3f)", step + 1, loss.item(), math.log(len(rows)))
    _write_vision(model.eval(), config, train, held_out, output)
    (work / "vision_done").write_text("")
    return True


@torch.no_grad()
def _write_vision(model, config: DemoComponentsConfig, train: Tensor, held_out: Tensor, output: Path) -> None:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    generator = make_generator("demo normalizer", config.seed)
    size = config.vision.image_size
    a, b = (model(_vision_pixels(_random_views(held_out, generator), size)).image_embeds for _ in range(2))
    found = float((similarity(a, b).argmax(1) == torch.arange(len(a))).float().mean())
    log.info("vision encoder: %.0f %% of %d held-out animals known again in another view", 100 * found, len(a))
    pictures = train[:500].flatten(0, 1)
    embeddings = torch.cat([model(_vision_pixels(batch, size)).image_embeds for batch in pictures.split(64)])
    normalizer = StableUnCLIPImageNormalizer(config.vision.projection)
    normalizer.mean.copy_(embeddings.mean(0, keepdim=True))
    normalizer.std.copy_(embeddings.std(0, keepdim=True).clamp_min(1e-3))
    with atomic_folder(output / "image_normalizer") as temporary:
        normalizer.save_pretrained(temporary)
    with atomic_folder(output / "image_encoder") as temporary:
        model.half().save_pretrained(temporary)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities [n, n] of embeddings [n, d], standardised over the batch first.

    Without that all embeddings start out nearly parallel (pictures are mostly background) and training stays there.
    """
    a, b = ((x - x.mean(0)) / x.std(0).clamp_min(1e-4) for x in (a, b))
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def _random_views(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """[n, v, 4, h, w] -> one random view of each, [n, 4, h, w]."""
    return rgba[torch.arange(len(rgba)), torch.randint(rgba.shape[1], (len(rgba),), generator=generator)]


def _vision_pixels(rgba: Tensor, size: int) -> Tensor:
    """uint8 [n, 4, h, w] -> CLIP-normalised pixels [n, 3, size, size], on white as at inference."""
    from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    picture = composite(rgba.float() / 255, 1.0)
    picture = F.interpolate(picture, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (picture - mean) / std


# ---- shared ---------------------------------------------------------------------------------------------------------


def schedule(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of a state dict, in place."""
    for name, tensor in model.state_dict().items():
        average[name].lerp_(tensor, 1 - decay)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
