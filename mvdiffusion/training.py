"""Stage 1 training: one flat loop. Repeating the command resumes it, with the same next losses."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from multiview.config import config_to_dict
from multiview.files import atomic_folder, full_disk_explained
from multiview.order import StepSampler
from multiview.run import RunFolder, make_generator
from mvdiffusion.checkpoints import (
    Sampling,
    check_same_run,
    newest_training,
    save_embeds,
    save_sampling,
    save_training,
)
from mvdiffusion.components import Components, load_components
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset
from mvdiffusion.latents import EncodedBatch, LatentCache, class_labels, live_batches
from mvdiffusion.lora import merged_state, save_adapters
from mvdiffusion.losses import diffusion_loss, draw_timesteps, drop_masks, noise_and_target, snr_weights
from mvdiffusion.models.unet import run_unet, save_unet
from mvdiffusion.optimization import (
    Ema,
    averaged_weights,
    drop_encoder_gradients,
    make_optimizer,
    set_learning_rates,
    trained_parameters,
)
from mvdiffusion.preparation import (
    aligned_rig,
    check_same_step,
    has_cameras,
    make_accelerator,
    make_training_set,
    picture_size,
    prepared_unet,
    restore,
    training_lists,
)
from mvdiffusion.prompts import PromptEmbeds, check_embeds_fit
from mvdiffusion.validation import evaluate

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

SHOWN_FIGURES = (
    "foreground_psnr", "unseen_foreground_psnr", "unseen_mask_iou", "unseen_difference_ratio", "consistency",
)  # fmt: skip

FROZEN_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(config: MVDiffusionConfig, overfit: int | None = None) -> dict[str, float]:
    """Trains the UNet, validates, saves. overfit: train and validate on the first so many training samples.

    Returns the last validation's figures. Raises ValueError for whatever does not fit, and for a full disk.
    """
    config = config.validate()
    if overfit is not None:
        config.output_dir, config.max_train_steps = f"{config.output_dir}_overfit{overfit}", config.overfit_steps
        config.validation_samples, config.export_dir = overfit, None
    with full_disk_explained(config.output_dir):
        return run_training(*start(config, overfit))


def run_training(trainer: Trainer, run: RunFolder) -> dict[str, float]:
    """From the trainer's step to the last: updates, logs, checkpoints, validation, export."""
    config, values = trainer.config, {}
    started, first = time.monotonic(), trainer.step
    while trainer.step < config.max_train_steps:
        loss, rate = trainer.update()
        step = trainer.step
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}; lower learning_rate, or use mixed_precision: bf16")
        seconds = (time.monotonic() - started) / (step - first)
        run.log(step, {"loss": loss, "lr": rate, "seconds_per_step": seconds})
        if step % config.log_steps == 0 and trainer.accelerator.is_main_process:
            log.info("step %d of %d: loss %.4f, %.2f s/step", step, config.max_train_steps, loss, seconds)
        is_last = step == config.max_train_steps
        if step % config.checkpointing_steps == 0 or is_last:
            trainer.save(is_last)
        if step % config.validation_steps == 0 or is_last:
            values = trainer.validate(run)
    if trainer.step == first:  # a finished run that is started again answers with its figures
        values = trainer.validate(run)
    if config.export_dir and trainer.accelerator.is_main_process:
        trainer.export()
    run.close()
    return values


# ---- the run --------------------------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """What a run holds between two updates.

    unet: the bare module. model: what accelerate made of it. trained: the parameters that train at some time, by name.
    ema: their average, on the main process. base: fingerprint of the weights that LoRA leaves alone.
    step: optimiser updates so far.
    """

    config: MVDiffusionConfig
    accelerator: Accelerator
    components: Components
    embeds: PromptEmbeds
    unet: torch.nn.Module
    model: torch.nn.Module
    trained: dict[str, Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    base: str | None
    batches: Iterator[EncodedBatch]
    check_set: MouseMVDiffusionDataset
    step: int

    def update(self) -> tuple[float, float]:
        """One optimiser update; all its randomness is keyed on (seed, rank, step). Returns loss and learning rate."""
        config, accelerator = self.config, self.accelerator
        rate = set_learning_rates(self.optimizer, config, self.step)
        losses = []
        for part in range(config.gradient_accumulation_steps):
            micro_step = self.step * config.gradient_accumulation_steps + part
            generator = make_generator("mvdiffusion step", config.seed, accelerator.process_index, micro_step)
            with accelerator.accumulate(self.model):
                batch = next(self.batches)
                loss = training_loss(self.model, self.components, self.embeds, batch, config, generator)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    drop_encoder_gradients(self.unet, config, self.step)
                    accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.trained, self.step)
        return float(accelerator.reduce(torch.stack(losses).mean(), reduction="mean")), rate

    def state(self, averaged: bool) -> dict[str, Tensor]:
        """The UNet's whole state under stock names, with the averaged values of what is trained or its own."""
        return merged_state(self.unet, self.ema.weights if averaged else None)

    def save(self, is_last: bool) -> None:
        """Writes checkpoint-<step>: whole UNets; with LoRA the trained tensors, and UNets if asked for or last."""
        if self.accelerator.is_main_process:
            config, average = self.config, self.ema is not None
            optimizer = {"optimizer": self.optimizer.state_dict()}
            if self.accelerator.scaler is not None:
                optimizer["scaler"] = self.accelerator.scaler.state_dict()
            whole = is_last or not config.lora_rank or config.lora_save_merged
            trained = None
            if config.lora_rank:
                own = {name: parameter.detach() for name, parameter in self.trained.items()}
                trained = {"own": own, "ema": self.ema.weights if average else None, "base": self.base}
            save_training(
                config.output_dir, self.step, unet=self.unet, state=self.state(False) if whole else None,
                ema=self.state(True) if whole and average else None, whole=whole, optimizer=optimizer,
                embeds=self.embeds, config=config_to_dict(config), keep=config.checkpoints_total_limit, trained=trained,
                extras=self.save_adapters if config.lora_rank else None,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def save_adapters(self, folder: Path) -> None:
        """The averaged adapters alone, in peft's form, into <folder>/lora."""
        save_adapters(self.unet, folder / "lora", self.config, self.ema.weights if self.ema else None)

    def validate(self, run: RunFolder) -> dict[str, float]:
        """Figures of the averaged UNet on the validation samples (on the main process; elsewhere empty)."""
        config, values = self.config, {}
        if self.accelerator.is_main_process:
            with averaged_weights(self.unet, self.ema):
                values, sheet = evaluate(
                    self.components, self.unet, self.embeds, self.check_set, count=config.validation_samples,
                    seed=config.seed, guidance_scales=config.validation_guidance_scales,
                    num_steps=config.validation_num_steps,
                )  # fmt: skip
            run.log(self.step, values, split="val")
            run.image("validation", self.step, sheet)
            log.info("step %d: %s", self.step, summary(values))
        self.accelerator.wait_for_everyone()
        return values

    def export(self) -> None:
        """The finished UNet in float16 into a components folder: unet, prompt_embeds and sampling.json."""
        folder = Path(self.config.export_dir)
        with atomic_folder(folder / "unet") as temporary:
            save_unet(self.unet, temporary, self.embeds.rig, state=self.state(self.ema is not None), half=True)
        save_embeds(folder / "prompt_embeds", self.embeds)
        config = self.config
        sampling = Sampling(config.export_num_steps, config.export_guidance_scale, config.export_mirror)
        save_sampling(folder, sampling)
        log.info("exported to %s", folder)


def start(config: MVDiffusionConfig, overfit: int | None) -> tuple[Trainer, RunFolder]:
    """Everything loaded, compared and, if there is a checkpoint, continued."""
    accelerator = make_accelerator(config)
    device = accelerator.device
    rig, embeds = aligned_rig(config)
    # Frozen parts in the run's own precision on a GPU, as upstream; a CPU is no faster with less.
    dtype = FROZEN_DTYPES[config.mixed_precision] if device.type == "cuda" else torch.float32
    components = load_components(config.pretrained_model_name_or_path, with_unet=False, device=device, dtype=dtype)
    found = newest_training(config.output_dir, rig)
    if found:
        check_same_run(found, config_to_dict(config))
    check_same_step(found)
    unet, base = prepared_unet(config, rig, found)
    check_embeds_fit(embeds, unet)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained = trained_parameters(unet)
    model, optimizer = accelerator.prepare(unet.train(), make_optimizer(trained, config, device))
    ema = None
    if config.use_ema and accelerator.is_main_process:
        ema = Ema(trained, config.ema_decay, device)
    step = found.step if found else 0
    if found:
        restore(found, ema, optimizer, accelerator)
        log.info("continuing %s at step %d of %d", found.folder, step, config.max_train_steps)
    size = picture_size(config, unet, components)
    train_set, percents = make_training_set(config, rig, size, limit=overfit, with_cameras=has_cameras(unet))
    sampler = StepSampler(
        [len(part) for part in train_set.parts], config.train_batch_size, seed=config.seed, percents=percents,
        start=step * config.gradient_accumulation_steps,
        rank=accelerator.process_index, world_size=accelerator.num_processes,
    )  # fmt: skip
    if config.cache_latents:
        batches = LatentCache(components, train_set, device, config.cache_dir).batches(sampler)
    else:
        batches = live_batches(components, train_set, sampler, config.dataloader_num_workers, device)
    check_list = training_lists(config)[0].train_data if overfit else config.validation_data
    check_set = MouseMVDiffusionDataset(check_list, rig, size, seed=config.seed)
    run = RunFolder(
        config.output_dir, config_to_dict(config), rig, wandb=config.wandb, is_main=accelerator.is_main_process
    )
    run.forget_after(step)
    trainer = Trainer(
        config=config, accelerator=accelerator, components=components, embeds=embeds, unet=unet, model=model,
        trained=trained, optimizer=optimizer, ema=ema, base=base, batches=batches, check_set=check_set, step=step,
    )  # fmt: skip
    return trainer, run


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
    prediction = run_unet(
        model,
        torch.cat([noisy, condition], dim=1),
        timesteps,
        prompts=embeds.tensor.to(device)[batch.prompts.flatten()],
        labels=labels,
        cameras=batch.cameras,
        reference_view=embeds.rig.reference_view,
    )
    weights = snr_weights(alphas, timesteps, config.snr_gamma, kind, config.snr_weighting)
    foreground = 1 + (config.foreground_weight - 1) * (batch.mask.flatten(0, 1) > 0.05).float()
    return diffusion_loss(prediction, target, weights, foreground if config.foreground_weight != 1 else None)


def summary(values: dict[str, float]) -> str:
    """One line: the autoencoder's own figures first, then each guidance scale's."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        group, figure = name.split("/")
        if figure in SHOWN_FIGURES:
            groups.setdefault(group, []).append(f"{figure} {value:.2f}")
    return "; ".join(f"{group}: {', '.join(figures)}" for group, figures in groups.items())
