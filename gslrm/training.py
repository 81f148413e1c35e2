"""Stage 2's training: one flat loop under plain python or torchrun. Repeating the command resumes it.

The batch of a pass depends on (seed, pass) only and losses are means over samples, so n processes with batch b take the
same steps as one process with batch n*b.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gslrm.checkpoints import (
    DDP_PREFIX, PATTERN, checkpoint_path, load_weights, network_tensors, read_checkpoint_rig, resolve_checkpoint,
    sidecar,
)  # fmt: skip
from gslrm.config import GSLRMConfig, OptimizerConfig, RuntimeConfig, check_config
from gslrm.data.mouse_dataset import MouseViewDataset, StepSampler
from gslrm.losses import NEEDS_RENDERING, POINTSDIST_WARMUP_STEPS, loss_weights, total_loss
from gslrm.model.gaussians_renderer import render
from gslrm.model.gslrm import GSLRM, GSLRMOutput
from gslrm.perceptual import load_networks
from gslrm.validation import Batch, picture_metrics, prepare, run_model, validate
from multiview.checkpoint import load_checkpoint, load_strict, newest_checkpoint, rotate_checkpoints, save_checkpoint
from multiview.config import config_to_dict
from multiview.image import grid
from multiview.rig import ViewRig, check_alignment, load_rig
from multiview.run import Distributed, RunFolder, WandbOptions, resolve_device, seed_everything

log = logging.getLogger(__name__)

INF_GRADIENT = 1e-3  # what infinite gradient entries become (NaN becomes 0)


@dataclass
class TrainingState:
    """Everything that a checkpoint holds and a resumed run needs."""

    model: GSLRM
    optimizer: torch.optim.AdamW
    scheduler: torch.optim.lr_scheduler.LambdaLR
    ema: dict[str, Tensor] | None = None
    passes: int = 0  # forward/backward passes done
    updates: int = 0  # parameter updates done
    counts: dict[str, int] = field(default_factory=lambda: {"skipped_nan_loss": 0, "skipped_gradient": 0})


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
    rig = load_rig(config.rig)
    dataset, val_dataset = build_datasets(config, overfit)
    check_alignment(rig, dataset=dataset.rig)
    networks = load_networks(losses, device)
    seed_everything("gslrm-init", runtime.seed)
    model = GSLRM(config.model, grad_checkpoint_every=runtime.grad_checkpoint_every).to(device)
    state = build_state(model, config)
    restore(state, config, rig)
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
                output = run_model(network, config.model.prune_background, batch, clip_xyz=clip)
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
    run.close()
    return folder


# ---- the pieces, in the order of use --------------------------------------------------------------------------------


def build_datasets(config: GSLRMConfig, overfit: int) -> tuple[MouseViewDataset, MouseViewDataset | None]:
    """Training data, and validation data (every view of each sample, fixed inputs) unless validation is off."""
    options, losses = config.training.dataset, config.training.losses
    common = {
        "image_size": config.model.image_tokenizer.image_size,
        "num_input_views": options.num_input_views,
        "on_bad_sample": options.on_bad_sample,
        "seed": config.training.runtime.seed,
    }
    dataset = MouseViewDataset(
        options.dataset_path,
        num_views=options.num_views,
        target_has_input=options.target_has_input,
        random_views=options.random_view_selection,
        maximize_view_overlap=options.maximize_view_overlap,
        overlap_rule=options.overlap_rule,
        background=options.background_color,
        augmentation=options.augmentation,
        with_depth=losses.direct_loss_weight > 0,
        limit=overfit or None,
        **common,
    )
    if overfit > len(dataset):
        raise ValueError(f"--overfit {overfit} needs {overfit} samples, {options.dataset_path} has {len(dataset)}")
    if not config.validation.enabled:
        return dataset, None
    background = "white" if options.background_color == "random" else options.background_color
    return dataset, MouseViewDataset(
        config.validation.dataset_path, num_views=None, background=background,
        limit=config.validation.num_samples, **common,
    )  # fmt: skip


def build_loader(
    dataset: MouseViewDataset, config: GSLRMConfig, processes: Distributed, *, start: int, stop: int
) -> DataLoader:
    """This process's share of the global batches of passes start ... stop - 1."""
    options = config.training.dataloader
    sampler = StepSampler(
        config.training.runtime.seed, len(dataset), batch_size=options.batch_size_per_gpu,
        rank=processes.rank, world_size=processes.world_size, start=start, stop=stop,
    )  # fmt: skip
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=options.num_workers, pin_memory=torch.cuda.is_available(),
        prefetch_factor=options.prefetch_factor if options.num_workers else None,
    )  # fmt: skip


def autocast(device: torch.device, runtime: RuntimeConfig) -> torch.autocast:
    enabled = runtime.use_amp and (device.type == "cuda" or runtime.amp_on_cpu)
    dtype = torch.float16 if runtime.amp_dtype == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def build_state(model: GSLRM, config: GSLRMConfig) -> TrainingState:
    optimizer = build_optimizer(model, config.training.optimizer)
    updates = config.training.schedule.max_fwdbwd_passes // config.training.runtime.grad_accum_steps
    return TrainingState(model, optimizer, build_scheduler(optimizer, config.training.schedule.warmup, updates))


def build_optimizer(model: GSLRM, options: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with two groups: weight decay for tensors of two or more dimensions, none for norms; frozen ones left out."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=1e-8, fused=True)


def build_scheduler(
    optimizer: torch.optim.Optimizer, warmup: int, updates: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then cosine to 0 at `updates`."""

    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (done - warmup) / max(1, updates - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def restore(state: TrainingState, config: GSLRMConfig, rig: ViewRig) -> None:
    """Continues from the run's own newest checkpoint, else starts from `resume_ckpt`, else from the random weights.

    Weights of another rig may be the start (that is what fine-tuning is for); a training state may not.
    """
    options = config.training.checkpointing
    own = newest_checkpoint(options.checkpoint_dir, PATTERN)
    whole = own is not None or not config.training.optimizer.reset_training_state
    path = own or (resolve_checkpoint(options.resume_ckpt) if options.resume_ckpt else None)
    if path is None:
        log.info("starting from random weights (training.checkpointing.resume_ckpt is not set)")
    elif not whole:
        load_weights(state.model, path)
        source = read_checkpoint_rig(path)
        log.info("starting from the weights of %s (rig %s)", path, source.name if source else "not recorded")
    else:
        source = read_checkpoint_rig(path)
        if source is not None:
            check_alignment(rig, gslrm=source)
        load_state(state, path)
        log.info("resuming %s at pass %d, update %d", path, state.passes, state.updates)
    if config.training.runtime.ema_decay > 0 and state.ema is None:
        state.ema = {name: tensor.detach().clone() for name, tensor in state.model.state_dict().items()}


def load_state(state: TrainingState, path: Path) -> None:
    """Weights, optimizer, schedule and counters of a checkpoint file."""
    checkpoint = load_checkpoint(path)
    missing = {"model", "optimizer", "lr_scheduler", "fwdbwd_pass_step", "param_update_step"} - set(checkpoint)
    if missing:
        raise ValueError(
            f"checkpoint {path} lacks {', '.join(sorted(missing))} and cannot be resumed; to start from its weights "
            "set training.optimizer.reset_training_state=true"
        )
    load_strict(state.model, network_tensors(checkpoint["model"]), path, renames=[DDP_PREFIX])
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.scheduler.load_state_dict(checkpoint["lr_scheduler"])
    state.passes, state.updates = int(checkpoint["fwdbwd_pass_step"]), int(checkpoint["param_update_step"])
    state.counts.update(checkpoint.get("counts", {}))
    if "ema" in checkpoint:
        device = next(state.model.parameters()).device
        state.ema = {name: tensor.to(device, copy=True) for name, tensor in checkpoint["ema"].items()}


def zero_of(output: GSLRMOutput) -> Tensor:
    """0 that depends on every Gaussian value, so that every parameter has a gradient (DDP demands it) in every pass."""
    gaussians = output.gaussians
    values = (gaussians.xyz, gaussians.features, gaussians.scaling, gaussians.rotation, gaussians.opacity)
    return 0.0 * sum(value.sum() for value in values)


def update(
    state: TrainingState, scaler: torch.amp.GradScaler, runtime: RuntimeConfig, *, spoiled: bool
) -> float | None:
    """One optimizer update, or its skipping, counted: a loss that was not finite, or an exploding gradient.

    The schedule advances and gradients are cleared either way. Returns the gradient norm before clipping.
    """
    norm = None
    if spoiled:
        state.counts["skipped_nan_loss"] += 1
        log.warning("update skipped: the loss was not finite")
    else:
        scaler.unscale_(state.optimizer)
        parameters = [p for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            parameter.grad.nan_to_num_(nan=0.0, posinf=INF_GRADIENT, neginf=-INF_GRADIENT)
        norm = nn.utils.clip_grad_norm_(parameters, runtime.grad_clip_norm).item()
        limit = runtime.grad_clip_norm * runtime.allowed_gradnorm_factor
        if norm > limit:
            state.counts["skipped_gradient"] += 1
            log.warning("update skipped: gradient norm %.3g above %.3g", norm, limit)
        else:
            scale = scaler.get_scale()
            scaler.step(state.optimizer)
        scaler.update()  # also after a skipped step: unscale_ must not be called twice without it
        if norm <= limit and scaler.get_scale() >= scale:  # a scale that fell means that the scaler skipped the step
            state.updates += 1
            update_ema(state, runtime.ema_decay)
    state.optimizer.zero_grad(set_to_none=True)
    with warnings.catch_warnings():  # torch warns when the schedule moves before the first update; here it may
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
        state.scheduler.step()
    return norm


@torch.no_grad()
def update_ema(state: TrainingState, decay: float) -> None:
    if state.ema is not None:
        decay = min(decay, (1 + state.updates) / (10 + state.updates))
        for name, tensor in state.model.state_dict().items():
            state.ema[name].lerp_(tensor, 1.0 - decay)


def save(state: TrainingState, config: GSLRMConfig, rig: ViewRig) -> None:
    """Writes the checkpoint and removes all but the newest few."""
    options = config.training.checkpointing
    content = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "lr_scheduler": {k: v for k, v in state.scheduler.state_dict().items() if k != "lr_lambdas"},
        "fwdbwd_pass_step": state.passes,
        "param_update_step": state.updates,
        "counts": dict(state.counts),
        "rig": rig.to_dict(),
    }
    if state.ema is not None:
        content["ema"] = state.ema
    path = checkpoint_path(options.checkpoint_dir, state.passes)
    save_checkpoint(path, content, sidecar(config, rig, state.passes))
    rotate_checkpoints(options.checkpoint_dir, PATTERN, options.checkpoints_total_limit)


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
