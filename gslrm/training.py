"""Stage 2's training: one flat loop under plain python or torchrun. Repeating the command resumes it.

The batch of a pass depends on (seed, pass) only and losses are means over samples, so n processes with batch b take the
same steps as one process with batch n*b.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gslrm.adaptation import check_adaptation
from gslrm.checkpoints import export_weights
from gslrm.config import GSLRMConfig, RuntimeConfig, check_config
from gslrm.data.loading import build_datasets, build_loader
from gslrm.data.mouse_dataset import MouseViewDataset
from gslrm.losses import NEEDS_RENDERING, POINTSDIST_WARMUP_STEPS, loss_weights, total_loss
from gslrm.model.gaussians_renderer import render
from gslrm.model.gslrm import GSLRM, GSLRMOutput
from gslrm.perceptual import load_networks
from gslrm.state import (
    REASONS,
    TrainingState,
    check_skips,
    find_start,
    network_to_measure,
    save,
    start_state,
    update,
)
from gslrm.validation import Batch, picture_metrics, prepare, run_model, validate
from multiview.config import config_to_dict
from multiview.files import full_disk_explained
from multiview.image import grid
from multiview.rig import ViewRig, check_alignment, load_rig
from multiview.run import Distributed, RunFolder, WandbOptions, resolve_device, seed_everything

log = logging.getLogger(__name__)


def train(config: GSLRMConfig, *, overfit: int = 0) -> Path:
    """Trains to `max_fwdbwd_passes`, continuing whatever the checkpoint folder holds. Returns that folder.

    overfit: N > 0 trains and validates on the first N samples without augmentation, in a folder of its own.
    Raises ValueError before any work for whatever is missing: data, weights, VGG files, a rig that does not fit; later
    for a full disk, and TrainingDivergedError (a ValueError) when more than half of the last 200 updates were skipped.
    """
    config = overfit_config(config, overfit) if overfit else config
    check_config(config)
    check_adaptation(config.training.adaptation, config.model.transformer.n_layer)
    device = resolve_device(config.training.runtime.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.training.runtime.use_tf32
    processes = Distributed.start(device)
    try:
        with full_disk_explained(Path(config.training.checkpointing.checkpoint_dir)):
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


@dataclass(frozen=True)
class Run:
    """What stays the same during a run."""

    config: GSLRMConfig
    device: torch.device
    processes: Distributed
    network: nn.Module  # the model, wrapped for several processes
    networks: dict[str, nn.Module]  # frozen networks of the losses
    rig: ViewRig
    folder: RunFolder


@dataclass(frozen=True)
class PassResult:
    """One forward/backward pass."""

    loss: float  # mean over the processes
    parts: dict[str, Tensor]  # this process's
    batch: Batch
    rgb: Tensor | None  # None: this pass rendered nothing
    alpha: Tensor | None


def _train(config: GSLRMConfig, device: torch.device, processes: Distributed, overfit: int) -> Path:
    training, runtime = config.training, config.training.runtime
    folder = Path(training.checkpointing.checkpoint_dir)
    dataset, val_dataset = build_datasets(config, overfit)
    rig = check_alignment(load_rig(config.rig) if config.rig else None, dataset=dataset.rig)
    start = find_start(config)
    networks = load_networks(training.losses, device)
    seed_everything("gslrm-init", runtime.seed)
    model = GSLRM(config.model, grad_checkpoint_every=runtime.grad_checkpoint_every).to(device)
    state = start_state(model, config, start, rig)
    if runtime.torch_compile:
        compile_blocks(model)
    run_folder = RunFolder(folder, config_to_dict(config), rig, wandb=wandb_options(config), is_main=processes.is_main)
    run_folder.forget_after(state.passes)
    network: nn.Module = model
    if processes.world_size > 1:
        network = nn.parallel.DistributedDataParallel(model)  # what is frozen takes no part in it
    log.info(
        "%s: %.2f M parameters, %d samples, passes %d to %d, %d process(es) on %s", folder,
        sum(p.numel() for p in model.parameters()) / 1e6, len(dataset), state.passes,
        training.schedule.max_fwdbwd_passes, processes.world_size, device,
    )  # fmt: skip
    run = Run(config, device, processes, network, networks, rig, run_folder)
    run_passes(run, state, dataset, val_dataset)
    if training.checkpointing.export_dir and processes.is_main and not overfit:
        export_weights(folder, training.checkpointing.export_dir, dtype=torch.float16)
    run_folder.close()
    processes.barrier()  # nobody leaves the group while another still talks
    return folder


def run_passes(run: Run, state: TrainingState, dataset: MouseViewDataset, val_dataset: MouseViewDataset | None) -> None:
    """The loop, from the state's pass to the last."""
    training, processes = run.config.training, run.processes
    every, stop = training.logging, training.schedule.max_fwdbwd_passes
    run.network.train()
    spoiled, began, since, seen = False, time.perf_counter(), time.perf_counter(), 0
    for raw_batch in build_loader(dataset, run.config, processes, start=state.passes, stop=stop):
        # 1. Forward and backward. All processes see the same mean loss, so they skip a bad one together.
        is_update = (state.passes + 1) % training.runtime.grad_accum_steps == 0
        result = run_pass(run, state, raw_batch, is_update=is_update)
        spoiled = spoiled or not math.isfinite(result.loss)
        state.passes += 1

        # 2. Update.
        gradient_norm = None
        if is_update:
            gradient_norm = update(state, training.runtime, spoiled=spoiled)
            spoiled = False
            check_skips(state, run.config)

        # 3. Numbers and pictures.
        seen += 1
        step, last = state.passes, state.passes == stop
        if step % every.print_every == 0 or last:
            values = numbers(run, state, result, gradient_norm)
            values["seconds_per_pass"] = (time.perf_counter() - since) / seen
            run.folder.log(step, values)
            if processes.is_main:
                log.info("pass %d/%d  %s", step, stop, summary(values, state, time.perf_counter() - began))
            since, seen = time.perf_counter(), 0
        if result.rgb is not None and (step % every.vis_every == 0 or last):
            run.folder.image("train", step, training_sheet(result.batch, result.rgb))

        # 4. Checkpoint and validation.
        if step % training.checkpointing.checkpoint_every == 0 or last:
            if processes.is_main:
                save(state, run.config, run.rig)
        if val_dataset is not None and (step % run.config.validation.val_every == 0 or last):
            if processes.is_main:
                measure(run, state, val_dataset)
            processes.barrier()
            since, seen = time.perf_counter(), 0


def run_pass(run: Run, state: TrainingState, raw_batch: dict[str, Tensor], *, is_update: bool) -> PassResult:
    """Forward, loss, and backward where the loss is finite. Direct warm-up renders nothing."""
    training, runtime, losses = run.config.training, run.config.training.runtime, run.config.training.losses
    prune = run.config.model.prune_background_tokens
    weights = loss_weights(losses, state.passes, l2_warmup_steps=training.schedule.l2_warmup_steps)
    batch = prepare(raw_batch, training.dataset.num_input_views, run.device)
    clip = run.config.model.clip_xyz and not (losses.warmup_pointsdist and state.passes < POINTSDIST_WARMUP_STEPS)
    if training.adaptation.lora_dropout > 0:  # so that a resumed run drops what it would have dropped
        seed_everything("gslrm-dropout", runtime.seed, run.processes.rank, state.passes)
    # Gradients of all but the last pass of an update stay in their process.
    synchronised = nullcontext() if is_update or run.processes.world_size == 1 else run.network.no_sync()
    with synchronised:
        with autocast(run.device, runtime):
            output = run_model(run.network, prune, batch, clip_xyz=clip)
        rgb = alpha = None
        if NEEDS_RENDERING & set(weights):
            rgb, alpha, _ = render(
                output.gaussians, batch.target_cameras, batch.background, runtime.raster_backend,
                recompute=runtime.recompute_rendering,
            )  # fmt: skip
        loss, parts = total_loss(
            weights, losses, output, batch.targets, rgb=rgb, alpha=alpha, networks=run.networks
        )
        loss = loss + zero_of(output)
        mean_loss = run.processes.mean(loss.detach()).item()
        if math.isfinite(mean_loss):
            state.scaler.scale(loss / runtime.grad_accum_steps).backward()
    return PassResult(mean_loss, parts, batch, rgb, alpha)


# ---- the pieces, in the order of use --------------------------------------------------------------------------------


def autocast(device: torch.device, runtime: RuntimeConfig) -> torch.autocast:
    enabled = runtime.use_amp and (device.type == "cuda" or runtime.amp_on_cpu)
    dtype = torch.float16 if runtime.amp_dtype == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def zero_of(output: GSLRMOutput) -> Tensor:
    """0 that depends on every Gaussian value, so that every parameter has a gradient (DDP demands it) in every pass.

    NaN if a Gaussian is not finite, so that such a pass counts as one whose loss is not finite.
    """
    gaussians = output.gaussians
    values = (gaussians.xyz, gaussians.features, gaussians.scaling, gaussians.rotation, gaussians.opacity)
    return 0.0 * sum(value.sum() for value in values)


def compile_blocks(model: GSLRM) -> None:
    """Compiles the transformer blocks in place: parameter names and everything around the blocks stay as they are.

    With background tokens pruned the number of tokens changes from batch to batch: one graph for all lengths.
    """
    for block in model.transformer_layers:
        block.compile(dynamic=True if model.config.prune_background_tokens else None)


def numbers(run: Run, state: TrainingState, result: PassResult, gradient_norm: float | None) -> dict[str, float]:
    """What a logged pass writes to metrics.jsonl."""
    values = {name: run.processes.mean(value.detach()).item() for name, value in result.parts.items()}
    values |= {"loss": result.loss, "lr": state.scheduler.get_last_lr()[0], "updates": state.updates}
    values |= state.counts
    if gradient_norm is not None:
        values["gradient_norm"] = gradient_norm
    if result.rgb is not None:
        targets = result.batch.targets
        values |= picture_metrics(result.rgb, result.alpha, targets.rgb, targets.alpha)
    return values


def measure(run: Run, state: TrainingState, dataset: MouseViewDataset) -> None:
    """Validates the averaged weights if there are any, else the current ones; logs numbers and a contact sheet."""
    runtime = run.config.training.runtime
    values, sheet = validate(
        network_to_measure(state), dataset, device=run.device, autocast=autocast(run.device, runtime),
        backend=runtime.raster_backend, lpips=run.networks.get("lpips"),
    )  # fmt: skip
    run.folder.log(state.passes, values, split="val")
    run.folder.image("val", state.passes, sheet)
    log.info("validation at pass %d  %s", state.passes, "  ".join(f"{k} {v:.3f}" for k, v in values.items()))


def wandb_options(config: GSLRMConfig) -> WandbOptions:
    options = config.training.logging.wandb
    mode = "offline" if options.offline and options.mode == "online" else options.mode
    return WandbOptions(mode=mode, project=options.project, group=options.group, name=options.exp_name)


def training_sheet(batch: Batch, rgb: Tensor) -> Tensor:
    """Contact sheet: targets of the first samples above, renderings below."""
    rows = [row for i in range(min(4, len(rgb))) for row in (batch.targets.rgb[i], rgb[i].detach().clamp(0, 1))]
    return grid(torch.cat(rows), rgb.shape[1])


def summary(values: dict[str, float], state: TrainingState, seconds: float) -> str:
    shown = ("loss", "psnr", "fg_psnr", "iou", "gradient_norm", "lr", "seconds_per_pass")
    text = "  ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)
    skipped = sum(state.counts[reason] for reason in REASONS)
    return f"{text}  {seconds:.0f} s" + (f"  skipped {skipped}" if skipped else "")
