"""Stage 1 training: one flat loop. Repeating the command resumes it, with the same next losses."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multiview.checkpoint import atomic_folder
from multiview.config import config_to_dict
from multiview.rig import ViewRig, check_alignment, check_start, load_rig
from multiview.run import RunFolder, make_generator, resolve_device, seed_everything
from multiview.sample import read_dataset_info
from mvdiffusion.checkpoints import check_same_run, newest_training, save_embeds, save_sampling, save_training
from mvdiffusion.components import Components, load_components
from mvdiffusion.conditioning import class_labels
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset, StepSampler
from mvdiffusion.encoding import EncodedBatch, LatentCache, live_batches
from mvdiffusion.losses import diffusion_loss, draw_timesteps, drop_masks, noise_and_target, snr_weights
from mvdiffusion.models.unet import configure_views, create_unet, load_unet, resolve_unet_folder, save_unet, unet_rig
from mvdiffusion.prompts import PromptEmbeds, check_embeds_fit, load_prompt_embeds
from mvdiffusion.validation import evaluate

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

FROZEN_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(config: MVDiffusionConfig, overfit: int | None = None) -> dict[str, float]:
    """Trains the UNet, validates, saves. overfit: train and validate on the first so many training samples.

    Returns the last validation's figures.
    """
    config = config.validate()
    if overfit is not None:
        config.output_dir, config.max_train_steps = f"{config.output_dir}_overfit{overfit}", config.overfit_steps
        config.validation_samples, config.export_dir = overfit, None
    accelerator = make_accelerator(config)
    device = accelerator.device
    rig, embeds = aligned_rig(config)
    # Frozen parts in the run's own precision on a GPU, as upstream; a CPU is no faster with less.
    dtype = FROZEN_DTYPES[config.mixed_precision] if device.type == "cuda" else torch.float32
    components = load_components(config.pretrained_model_name_or_path, with_unet=False, device=device, dtype=dtype)
    found = newest_training(config.output_dir, rig)
    if found:
        check_same_run(found, config_to_dict(config))
    unet = starting_unet(config, rig, found.folder / "unet" if found else None)
    check_embeds_fit(embeds, unet)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    ema = Ema(unet, config.ema_decay, device) if config.use_ema and accelerator.is_main_process else None
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay, eps=config.adam_epsilon,
    )  # fmt: skip
    step = 0
    if found:
        step = found.step
        if ema is not None:
            ema.load(load_unet(found.folder / "unet_ema"), step)
    model, optimizer = accelerator.prepare(unet.train(), optimizer)
    if found:
        optimizer.load_state_dict(found.optimizer["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(found.optimizer["scaler"])
        log.info("continuing %s at step %d of %d", found.folder, step, config.max_train_steps)

    size = unet.config.sample_size * components.vae_factor
    train_set = make_dataset(config, rig, size, config.train_data, limit=overfit, training=True)
    check_set = make_dataset(
        config, rig, size, config.train_data if overfit else config.validation_data, training=False
    )
    sampler = StepSampler(
        len(train_set), config.train_batch_size, seed=config.seed, start=step * config.gradient_accumulation_steps,
        rank=accelerator.process_index, world_size=accelerator.num_processes,
    )  # fmt: skip
    if config.cache_latents:
        batches = LatentCache(components, train_set, device).batches(sampler)
    else:
        batches = live_batches(components, train_set, sampler, config.dataloader_num_workers, device)
    run = RunFolder(
        config.output_dir, config_to_dict(config), rig, wandb=config.wandb, is_main=accelerator.is_main_process
    )
    run.forget_after(step)

    def save() -> None:
        if accelerator.is_main_process:
            state = {"optimizer": optimizer.state_dict()}
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
            save_training(
                config.output_dir, step, unet=unet, ema=ema.weights if ema else None, optimizer=state, embeds=embeds,
                config=config_to_dict(config), keep=config.checkpoints_total_limit,
            )  # fmt: skip
        accelerator.wait_for_everyone()

    def validate() -> dict[str, float]:
        values: dict[str, float] = {}
        if accelerator.is_main_process:
            with averaged_weights(unet, ema):
                values, sheet = evaluate(
                    components, unet, embeds, check_set, count=config.validation_samples, seed=config.seed,
                    guidance_scales=config.validation_guidance_scales, num_steps=config.validation_num_steps,
                )  # fmt: skip
            run.log(step, values, split="val")
            run.image("validation", step, sheet)
            log.info("step %d: %s", step, summary(values))
        accelerator.wait_for_everyone()
        return values

    started, first, values = time.monotonic(), step, {}
    while step < config.max_train_steps:
        lr = config.learning_rate * lr_factor(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for part in range(config.gradient_accumulation_steps):
            micro_step = step * config.gradient_accumulation_steps + part
            generator = make_generator("mvdiffusion step", config.seed, accelerator.process_index, micro_step)
            with accelerator.accumulate(model):
                loss = training_loss(model, components, embeds, next(batches), config, generator)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        step += 1
        if ema is not None:
            ema.update(unet, step)
        loss = float(accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}; lower learning_rate, or use mixed_precision: bf16")
        seconds = (time.monotonic() - started) / (step - first)
        run.log(step, {"loss": loss, "lr": lr, "seconds_per_step": seconds})
        if step % config.log_steps == 0 and accelerator.is_main_process:
            log.info("step %d of %d: loss %.4f, %.2f s/step", step, config.max_train_steps, loss, seconds)
        is_last = step == config.max_train_steps
        if step % config.checkpointing_steps == 0 or is_last:
            save()
        if step % config.validation_steps == 0 or is_last:
            values = validate()
    if step == first:  # a finished run that is started again answers with its figures
        values = validate()
    if config.export_dir and accelerator.is_main_process:
        export(unet, ema, embeds, config)
    run.close()
    return values


# ---- one step -------------------------------------------------------------------------------------------------------


def training_loss(
    model, components: Components, embeds: PromptEmbeds, batch: EncodedBatch, config: MVDiffusionConfig,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """The loss of one encoded batch; all randomness comes from `generator` (CPU), in a fixed order."""
    device, (objects, views) = batch.mean.device, batch.mean.shape[:2]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    clip_noise = normal(*batch.embedding.shape)
    posterior_noise, noise = normal(*batch.mean.shape), normal(*batch.mean.shape)
    # One time step per object: its views must be equally far along to agree with each other.
    timesteps = draw_timesteps(objects, generator, config.high_noise_share, config.high_noise_range)
    labels_dropped, latents_dropped = drop_masks(torch.rand(objects, generator=generator), config.condition_drop_rate)

    labels = class_labels(components, batch.embedding, clip_noise).masked_fill(labels_dropped.to(device)[:, None], 0)
    condition = batch.condition.masked_fill(latents_dropped.to(device)[:, None, None, None], 0)
    per_view = [x.repeat_interleave(views, dim=0) for x in (labels, condition, timesteps.to(device))]
    labels, condition, timesteps = per_view
    clean = (batch.mean + batch.std * posterior_noise).flatten(0, 1)
    kind, alphas = components.scheduler.config.prediction_type, components.scheduler.alphas_cumprod
    noisy, target = noise_and_target(clean, noise.flatten(0, 1), alphas, timesteps, kind)
    prediction = model(
        torch.cat([noisy, condition], dim=1), timesteps,
        encoder_hidden_states=embeds.tensor.to(device).repeat(objects, 1, 1), class_labels=labels,
    ).sample  # fmt: skip
    weights = snr_weights(alphas, timesteps, config.snr_gamma, kind, config.snr_weighting)
    foreground = 1 + (config.foreground_weight - 1) * (batch.mask.flatten(0, 1) > 0.05).float()
    return diffusion_loss(prediction, target, weights, foreground if config.foreground_weight != 1 else None)


def lr_factor(config: MVDiffusionConfig, step: int) -> float:
    """Learning rate over config.learning_rate at update `step` (from 0)."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return 1.0
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


# ---- what the loop is made of ---------------------------------------------------------------------------------------


def make_accelerator(config: MVDiffusionConfig) -> Accelerator:
    from accelerate import Accelerator

    device = resolve_device(config.device)
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        cpu=device.type == "cpu",
    )


def aligned_rig(config: MVDiffusionConfig) -> tuple[ViewRig, PromptEmbeds]:
    """The rig of this run, and its prompt embeddings, after comparing everything that carries one."""
    dataset = read_dataset_info(Path(config.train_data).parent)["rig"]
    rig = load_rig(config.rig) if config.rig else dataset
    embeds = load_prompt_embeds(config.prompt_embeds)
    check_alignment(rig, dataset=dataset, embeddings=embeds.rig)
    return rig, embeds


def starting_unet(config: MVDiffusionConfig, rig: ViewRig, resumed: Path | None):
    """The UNet to train (float32): the checkpoint's, a fresh one, or the pretrained one, set to the rig's views."""
    if resumed is not None:
        return load_unet(resumed)
    if config.unet:
        seed_everything("mvdiffusion unet", config.seed)
        return create_unet(config.unet, rig.num_views, config.attention or "sparse")
    folder = resolve_unet_folder(config.pretrained_unet_path or Path(config.pretrained_model_name_or_path) / "unet")
    stored = unet_rig(folder)
    if stored is not None and not config.allow_rig_change:
        check_start(rig, "allow_rig_change", unet=stored)
    unet = load_unet(folder, num_views=rig.num_views, attention=config.attention, widen_conv_in=True)
    return configure_views(unet, rig.num_views, config.attention) if config.attention else unet


def make_dataset(
    config: MVDiffusionConfig, rig: ViewRig, size: int, list_file: str, *, training: bool, limit: int | None = None
) -> MouseMVDiffusionDataset:
    """Training data as the config says; validation data on white, unturned, without jitter."""
    if not training:
        return MouseMVDiffusionDataset(list_file, rig, size, seed=config.seed)
    return MouseMVDiffusionDataset(
        list_file, rig, size, backgrounds=tuple(config.backgrounds), reference_view_idx=config.reference_view_idx,
        brightness=config.brightness_jitter, contrast=config.contrast_jitter, seed=config.seed, limit=limit,
    )  # fmt: skip


class Ema:
    """Exponential moving average of all parameters, float32: decay min(n / (9 + n), decay) after update n."""

    def __init__(self, unet, decay: float, device: torch.device) -> None:
        self.decay = decay
        self.weights = {name: tensor.detach().clone().to(device) for name, tensor in unet.state_dict().items()}

    @torch.no_grad()
    def update(self, unet, updates: int) -> None:
        """updates: how many optimiser updates the parameters have seen, from 1 (the first copies them)."""
        decay = min(updates / (9 + updates), self.decay) if updates > 1 else 0.0
        for name, tensor in unet.state_dict().items():
            self.weights[name].lerp_(tensor, 1 - decay)

    def load(self, unet, updates: int) -> None:
        for name, tensor in unet.state_dict().items():
            self.weights[name].copy_(tensor)


@contextmanager
def averaged_weights(unet, ema: Ema | None) -> Iterator[None]:
    """Inside, `unet` is in eval mode and holds the averaged weights."""
    own = {name: tensor.clone() for name, tensor in unet.state_dict().items()} if ema else None
    if ema:
        unet.load_state_dict(ema.weights)
    unet.eval()
    try:
        yield
    finally:
        if own is not None:
            unet.load_state_dict(own)
        unet.train()


def export(unet, ema: Ema | None, embeds: PromptEmbeds, config: MVDiffusionConfig) -> None:
    """The finished UNet in float16 into a components folder: unet, prompt_embeds and sampling.json."""
    folder = Path(config.export_dir)
    with atomic_folder(folder / "unet") as temporary:
        save_unet(unet, temporary, embeds.rig, state=ema.weights if ema else None, half=True)
    save_embeds(folder / "prompt_embeds", embeds)
    save_sampling(folder, config.export_num_steps, config.export_guidance_scale)
    log.info("exported to %s", folder)


def summary(values: dict[str, float]) -> str:
    """One line: the autoencoder's own figures first, then each guidance scale's."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        group, figure = name.split("/")
        if figure in ("foreground_psnr", "mask_iou", "unseen_foreground_psnr", "unseen_mask_iou"):
            groups.setdefault(group, []).append(f"{figure} {value:.2f}")
    return "; ".join(f"{group}: {', '.join(figures)}" for group, figures in groups.items())
