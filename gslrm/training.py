"""Stage 2's training: one flat loop under plain python or torchrun. Repeating the command resumes it.

The batch of a pass depends on (seed, pass) only and losses are means over samples, so n processes with batch b take the
same steps as one process with batch n*b.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gslrm.checkpoints import export_weights
from gslrm.config import GSLRMConfig, RuntimeConfig, check_config
from gslrm.data.loading import build_datasets, build_loader
from gslrm.data.mouse_dataset import MouseViewDataset
from gslrm.losses import NEEDS_RENDERING, POINTSDIST_WARMUP_STEPS, loss_weights, total_loss
from gslrm.model.gaussians_renderer import render
from gslrm.model.gslrm import GSLRM, GSLRMOutput
from gslrm.perceptual import load_networks
from gslrm.state import TrainingState, build_state, find_start, restore, save, update
from gslrm.validation import Batch, picture_metrics, prepare, run_model, validate
from multiview.config import config_to_dict
from multiview.image import grid
from multiview.rig import check_alignment, load_rig
from multiview.run import Distributed, RunFolder, WandbOptions, resolve_device, seed_everything

log = logging.getLogger(__name__)


def train(config: GSLRMConfig, *, overfit: int = 0) -> Path:
    """Trains to `max_fwdbwd_passes`, continuing whatever the checkpoint folder holds. Returns that folder.

    overfit: N > 0 trains and validates on the first N samples without augmentation, in a folder of its own.
    Raises ValueError before any work for whatever is missing: data, weights, VGG files, a rig that does not fit.
    """
    config = overfit_config(config, overfit) if overfit else config
    check_config(config)
    device = resolve_device(config.training.runtime.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.training.runtime.use_tf32
    processes = Distributed.start(device)
    try:
        return _train(config, device, processes, overfit)
    finally:
        processes.stop()


def overfit_config(config: GSLRMConfig, num_samples: int) -> GSLRMConfig:
    """The same run on few samples: no augmentation, validation on the training samples, its own folder."""
    training = config.training
    dataset = replace(training.dataset, augmentation=replace(training.dataset.augmentation, enabled=False))
    folder = f"{training.checkpointing.checkpoint_dir.rstrip('/')}_overfit{num_samples}"
    return replace(
        config,
        training=replace(
            training, dataset=dataset, checkpointing=replace(training.checkpointing, checkpoint_dir=folder)
        ),
        validation=replace(config.validation, dataset_path=dataset.dataset_path, num_samples=num_samples),
    )


def _train(config: GSLRMConfig, device: torch.device, processes: Distributed, overfit: int) -> Path:
    training, runtime, losses = config.training, config.training.runtime, config.training.losses
    every, stop = training.logging, training.schedule.max_fwdbwd_passes
    folder = Path(training.checkpointing.checkpoint_dir)
    dataset, val_dataset = build_datasets(config, overfit)
    rig = check_alignment(load_rig(config.rig) if config.rig else None, dataset=dataset.rig)
    start = find_start(config)
    networks = load_networks(losses, device)
    seed_everything("gslrm-init", runtime.seed)
    model = GSLRM(config.model, grad_checkpoint_every=runtime.grad_checkpoint_every).to(device)
    state = build_state(model, config)
    restore(state, start, rig, runtime.ema_decay, allow_rig_change=training.checkpointing.allow_rig_change)
    run = RunFolder(folder, config_to_dict(config), rig, wandb=wandb_options(config), is_main=processes.is_main)
    run.forget_after(state.passes)
    network: nn.Module = model
    if processes.world_size > 1:
        network = nn.parallel.DistributedDataParallel(model)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and runtime.amp_dtype == "fp16")
    log.info(
        "%s: %.2f M parameters, %d samples, passes %d to %d, %d process(es) on %s", folder,
        sum(p.numel() for p in model.parameters()) / 1e6, len(dataset), state.passes, stop,
        processes.world_size, device,
    )  # fmt: skip

    network.train()
    spoiled, seconds, since, seen = False, time.perf_counter(), time.perf_counter(), 0
    for raw_batch in build_loader(dataset, config, processes, start=state.passes, stop=stop):
        # 1. Forward. Weights of the losses depend on the pass; direct warm-up renders nothing.
        weights = loss_weights(losses, state.passes, l2_warmup_steps=training.schedule.l2_warmup_steps)
        is_update = (state.passes + 1) % runtime.grad_accum_steps == 0
        batch = prepare(raw_batch, training.dataset.num_input_views, device)
        clip = config.model.clip_xyz and not (losses.warmup_pointsdist and state.passes < POINTSDIST_WARMUP_STEPS)
        synchronised = nullcontext() if is_update or processes.world_size == 1 else network.no_sync()
        with synchronised:
            with autocast(device, runtime):
                output = run_model(network, config.model.prune_background_tokens, batch, clip_xyz=clip)
            rgb = alpha = None
            if NEEDS_RENDERING & set(weights):
                rgb, alpha, _ = render(
                    output.gaussians, batch.target_cameras, batch.background, runtime.raster_backend
                )
            loss, parts = total_loss(
                weights, losses, output, batch.targets, rgb=rgb, alpha=alpha, networks=networks
            )
            # 2. Backward. All processes see the same mean loss, so they skip a bad one together.
            mean_loss = processes.mean(loss.detach()).item()
            if math.isfinite(mean_loss):
                scaler.scale((loss + zero_of(output)) / runtime.grad_accum_steps).backward()
            else:
                spoiled = True
        state.passes += 1

        # 3. Update.
        gradient_norm = None
        if is_update:
            gradient_norm = update(state, scaler, runtime, spoiled=spoiled)
            spoiled = False

        # 4. Numbers and pictures.
        seen += 1
        step, last = state.passes, state.passes == stop
        if step % every.print_every == 0 or last:
            values = {name: processes.mean(value.detach()).item() for name, value in parts.items()}
            values |= {"loss": mean_loss, "lr": state.scheduler.get_last_lr()[0], "updates": state.updates}
            values |= state.counts
            if gradient_norm is not None:
                values["gradient_norm"] = gradient_norm
            if rgb is not None:
                values |= picture_metrics(rgb, alpha, batch.targets.rgb, batch.targets.alpha)
            values["seconds_per_pass"] = (time.perf_counter() - since) / seen
            run.log(step, values)
            if processes.is_main:
                log.info("pass %d/%d  %s", step, stop, summary(values, time.perf_counter() - seconds))
            since, seen = time.perf_counter(), 0
        if rgb is not None and (step % every.vis_every == 0 or last):
            run.image("train", step, training_sheet(batch, rgb))

        # 5. Checkpoint and validation.
        if step % training.checkpointing.checkpoint_every == 0 or last:
            if processes.is_main:
                save(state, config, rig)
        if val_dataset is not None and (step % config.validation.val_every == 0 or last):
            if processes.is_main:
                measure(state, val_dataset, run, device, runtime)
            processes.barrier()
            since, seen = time.perf_counter(), 0
    if training.checkpointing.export_dir and processes.is_main and not overfit:
        export_weights(folder, training.checkpointing.export_dir, dtype=torch.float16)
    run.close()
    processes.barrier()  # nobody leaves the group while another still talks
    return folder


# ---- the pieces, in the order of use --------------------------------------------------------------------------------


def autocast(device: torch.device, runtime: RuntimeConfig) -> torch.autocast:
    enabled = runtime.use_amp and (device.type == "cuda" or runtime.amp_on_cpu)
    dtype = torch.float16 if runtime.amp_dtype == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def zero_of(output: GSLRMOutput) -> Tensor:
    """0 that depends on every Gaussian value, so that every parameter has a gradient (DDP demands it) in every pass."""
    gaussians = output.gaussians
    values = (gaussians.xyz, gaussians.features, gaussians.scaling, gaussians.rotation, gaussians.opacity)
    return 0.0 * sum(value.sum() for value in values)


def measure(
    state: TrainingState, dataset: MouseViewDataset, run: RunFolder, device: torch.device, runtime: RuntimeConfig
) -> None:
    """Validates the averaged weights if there are any, else the current ones; logs numbers and a contact sheet."""
    own = None
    if state.ema is not None:
        own = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        state.model.load_state_dict(state.ema, strict=True)
    values, sheet = validate(
        state.model, dataset, device=device, autocast=autocast(device, runtime), backend=runtime.raster_backend
    )
    if own is not None:
        state.model.load_state_dict(own, strict=True)
    run.log(state.passes, values, split="val")
    run.image("val", state.passes, sheet)
    log.info("validation at pass %d  %s", state.passes, "  ".join(f"{k} {v:.3f}" for k, v in values.items()))


def wandb_options(config: GSLRMConfig) -> WandbOptions:
    options = config.training.logging.wandb
    mode = "offline" if options.offline and options.mode == "online" else options.mode
    return WandbOptions(mode=mode, project=options.project, group=options.group, name=options.exp_name)


def training_sheet(batch: Batch, rgb: Tensor) -> Tensor:
    """Contact sheet: targets of the first samples above, renderings below."""
    rows = [row for i in range(min(4, len(rgb))) for row in (batch.targets.rgb[i], rgb[i].detach().clamp(0, 1))]
    return grid(torch.cat(rows), rgb.shape[1])


def summary(values: dict[str, float], seconds: float) -> str:
    shown = ("loss", "psnr", "fg_psnr", "iou", "gradient_norm", "lr", "seconds_per_pass")
    text = "  ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)
    skipped = values["skipped_nan_loss"] + values["skipped_gradient"]
    return f"{text}  {seconds:.0f} s" + (f"  skipped {skipped:.0f}" if skipped else "")
