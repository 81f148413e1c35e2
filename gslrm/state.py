"""What a training run keeps from one step to the next: network, optimizer, schedule, averaged weights, counters."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gslrm.checkpoints import (
    DDP_PREFIX,
    PATTERN,
    checkpoint_path,
    load_weights,
    network_tensors,
    read_checkpoint_rig,
    resolve_checkpoint,
    sidecar,
)
from gslrm.config import GSLRMConfig, OptimizerConfig, RuntimeConfig
from gslrm.model.gslrm import GSLRM
from multiview.checkpoint import load_checkpoint, load_strict, newest_checkpoint, rotate_checkpoints, save_checkpoint
from multiview.rig import ViewRig, check_alignment, check_start

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


def build_state(model: GSLRM, config: GSLRMConfig) -> TrainingState:
    optimizer = build_optimizer(model, config.training.optimizer)
    updates = config.training.schedule.max_fwdbwd_passes // config.training.runtime.grad_accum_steps
    return TrainingState(model, optimizer, build_scheduler(optimizer, config.training.schedule.warmup, updates))


def build_optimizer(model: GSLRM, options: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with two groups: weight decay for tensors of two or more dimensions, none for norms."""
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


def find_start(config: GSLRMConfig) -> tuple[Path | None, bool]:
    """Where the run starts: (checkpoint or None for random weights, whether its whole training state counts).

    The run's own newest checkpoint, else `resume_ckpt`. Raises ValueError if `resume_ckpt` does not exist.
    """
    options = config.training.checkpointing
    own = newest_checkpoint(options.checkpoint_dir, PATTERN)
    if own is not None:
        return own, True
    if not options.resume_ckpt:
        return None, False
    return resolve_checkpoint(options.resume_ckpt), not config.training.optimizer.reset_training_state


def restore(
    state: TrainingState,
    start: tuple[Path | None, bool],
    rig: ViewRig,
    ema_decay: float,
    *,
    allow_rig_change: bool = False,
) -> None:
    """Puts the start that `find_start` found into the state.

    Weights that carry no rig (public ones) may start any; weights of another rig only where the config says so
    (`allow_rig_change`); a training state never.
    """
    path, whole = start
    if path is None:
        log.info("starting from random weights (training.checkpointing.resume_ckpt is not set)")
    elif not whole:
        source = read_checkpoint_rig(path)
        if source is not None and not allow_rig_change:
            check_start(rig, "training.checkpointing.allow_rig_change", gslrm=source)
        load_weights(state.model, path)
        log.info("starting from the weights of %s (rig %s)", path, source.name if source else "not recorded")
    else:
        source = read_checkpoint_rig(path)
        if source is not None:
            check_alignment(rig, gslrm=source)
        load_state(state, path)
        log.info("resuming %s at pass %d, update %d", path, state.passes, state.updates)
    if ema_decay > 0 and state.ema is None:
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
        "lr_scheduler": state.scheduler.state_dict(),
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
