"""What a training run keeps from one step to the next: network, optimizer, schedule, averaged weights, counters."""

from __future__ import annotations

import logging
import math
import warnings
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gslrm.adaptation import adapt, adapter_state, load_training_weights, plain_weights, save_adapters
from gslrm.checkpoints import (
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
from multiview.checkpoint import load_checkpoint, newest_checkpoint, rotate_checkpoints, save_checkpoint
from multiview.rig import ViewRig, check_alignment, check_start

log = logging.getLogger(__name__)

INF_GRADIENT = 1e-3  # what infinite gradient entries become (NaN becomes 0)
SKIP_WINDOW, MAX_SKIPPED = 200, 100  # a run stops when more than this many of its last updates were skipped
STATE_KEYS = ("model", "optimizer", "lr_scheduler", "fwdbwd_pass_step", "param_update_step")
REASONS = {  # why an update is skipped -> what the log says
    "skipped_nan_loss": "the loss was not finite",
    "skipped_gradient": "the gradient exploded or was nothing but NaN",
    "skipped_overflow": "float16 gradients overflowed",
}
MENDED = "mended_gradient"  # counts updates whose gradient had entries that were not finite


class TrainingDivergedError(ValueError):
    """Most of the recent updates had to be skipped: going on would waste time without training anything."""


@dataclass
class TrainingState:
    """Everything that a checkpoint holds and a resumed run needs."""

    model: GSLRM  # with its adapters, if any
    optimizer: torch.optim.AdamW
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    ema: dict[str, Tensor] | None = None  # averaged plain weights (adapters merged)
    passes: int = 0  # forward/backward passes done
    updates: int = 0  # parameter updates done
    schedule_start: int = 0  # pass at which the learning rate's warm-up began; above 0 after reset_lr
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys([*REASONS, MENDED], 0))
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=SKIP_WINDOW))  # True: that update was skipped


@dataclass(frozen=True)
class Start:
    """Where a run starts. No path: random weights."""

    path: Path | None = None
    whole: bool = False  # optimizer, schedule and counters too, not the weights alone
    own: bool = False  # the run's own newest checkpoint


def build_state(model: GSLRM, config: GSLRMConfig) -> TrainingState:
    runtime, optimizer = config.training.runtime, build_optimizer(model, config.training.optimizer)
    device = next(model.parameters()).device
    scaled = device.type == "cuda" and runtime.use_amp and runtime.amp_dtype == "fp16"
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    return TrainingState(model, optimizer, schedule_from(optimizer, config, 0), scaler)


def build_optimizer(model: GSLRM, options: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with FaceLift's two groups: weight decay for tensors of two or more dimensions, none for norms.

    Parameters that do not train are in neither.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=1e-8, fused=True)


def build_scheduler(
    optimizer: torch.optim.Optimizer, warmup: int, updates: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then cosine to 0 at `updates`: the end of training (FaceLift rounds it up to whole epochs)."""

    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (done - warmup) / max(1, updates - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def schedule_from(
    optimizer: torch.optim.Optimizer, config: GSLRMConfig, start: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule of the passes from `start` to the end of training."""
    schedule = config.training.schedule
    updates = (schedule.max_fwdbwd_passes - start) // config.training.runtime.grad_accum_steps
    return build_scheduler(optimizer, schedule.warmup, updates)


# ---- starting and resuming ------------------------------------------------------------------------------------------


def find_start(config: GSLRMConfig) -> Start:
    """The run's own newest checkpoint, else `resume_ckpt`. Raises ValueError if `resume_ckpt` does not exist."""
    options = config.training.checkpointing
    own = newest_checkpoint(options.checkpoint_dir, PATTERN)
    if own is not None:
        return Start(own, whole=True, own=True)
    if not options.resume_ckpt:
        return Start()
    return Start(resolve_checkpoint(options.resume_ckpt), whole=not config.training.optimizer.reset_training_state)


def start_state(model: GSLRM, config: GSLRMConfig, start: Start, rig: ViewRig) -> TrainingState:
    """Weights, adapters, optimizer and the rest as `find_start` found them.

    Weights that carry no rig (public ones) may start any; weights of another rig only where the config says so
    (`allow_rig_change`); a training state never.
    """
    source = read_checkpoint_rig(start.path) if start.path is not None else None
    if start.path is None:
        log.info("starting from random weights (training.checkpointing.resume_ckpt is not set)")
    elif not start.whole:
        if source is not None and not config.training.checkpointing.allow_rig_change:
            check_start(rig, "training.checkpointing.allow_rig_change", gslrm=source)
        load_weights(model, start.path)
        log.info("starting from the weights of %s (rig %s)", start.path, source.name if source else "not recorded")
    elif source is not None:
        check_alignment(rig, gslrm=source)
    adapt(model, config.training.adaptation)
    state = build_state(model, config)
    if start.whole:
        load_state(state, start, config)
        log.info("resuming %s at pass %d, update %d", start.path, state.passes, state.updates)
    if config.training.runtime.ema_decay <= 0:
        state.ema = None
    elif state.ema is None:
        state.ema = {name: tensor.detach().clone() for name, tensor in plain_weights(model).items()}
    return state


def load_state(state: TrainingState, start: Start, config: GSLRMConfig) -> None:
    """Weights, adapters, optimizer, schedule, scaler and counters of a checkpoint file.

    Raises ValueError for a file that holds less, or that was trained with other parameters frozen.
    """
    path, checkpoint = start.path, load_checkpoint(start.path)
    weights_only = (
        f"start from its weights: another checkpoint_dir with training.checkpointing.resume_ckpt={path} and "
        "training.optimizer.reset_training_state=true"
    )
    missing = set(STATE_KEYS) - set(checkpoint)
    if missing:
        raise ValueError(f"checkpoint {path} lacks {', '.join(sorted(missing))} and cannot be resumed; {weights_only}")
    weights = network_tensors(checkpoint["model"], path)
    load_training_weights(state.model, weights, checkpoint.get("lora"), config.training.adaptation, path)
    saved = checkpoint["optimizer"]["param_groups"]
    sizes, own_sizes = ([len(group["params"]) for group in groups] for groups in (saved, state.optimizer.param_groups))
    if sizes != own_sizes or checkpoint.get("trained", trained_names(state.model)) != trained_names(state.model):
        raise ValueError(
            f"checkpoint {path} trained other parameters ({sum(sizes)} tensors, this run {sum(own_sizes)}): "
            f"training.adaptation must stay as it was, or {weights_only}"
        )
    state.passes, state.updates = int(checkpoint["fwdbwd_pass_step"]), int(checkpoint["param_update_step"])
    stop = config.training.schedule.max_fwdbwd_passes
    if not start.own and state.passes >= stop:
        raise ValueError(
            f"checkpoint {path} is at pass {state.passes}, so training.schedule.max_fwdbwd_passes={stop} leaves "
            f"nothing to do: raise it, or {weights_only}"
        )
    state.schedule_start = int(checkpoint.get("schedule", {}).get("start_pass", 0))
    state.scheduler = schedule_from(state.optimizer, config, state.schedule_start)
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.scheduler.load_state_dict(checkpoint["lr_scheduler"])
    if checkpoint.get("scaler"):
        state.scaler.load_state_dict(checkpoint["scaler"])
    state.counts.update(checkpoint.get("counts", {}))
    state.recent.extend(checkpoint.get("recent_skips", []))
    if "ema" in checkpoint:
        device = next(state.model.parameters()).device
        state.ema = {name: tensor.to(device, copy=True) for name, tensor in checkpoint["ema"].items()}
    apply_resets(state, start, config, checkpoint.get("schedule", {}))


def apply_resets(state: TrainingState, start: Start, config: GSLRMConfig, schedule: dict) -> None:
    """`reset_lr` and `reset_weight_decay` on a resumed state; a warning where the config's own values do not count.

    A repeated command finds the reset already done in its own checkpoint (the same lr and warm-up) and goes on.
    """
    options, warmup = config.training.optimizer, config.training.schedule.warmup
    recorded = (schedule.get("lr", state.scheduler.base_lrs[0]), schedule.get("warmup", warmup))
    differs = recorded != (options.lr, warmup)
    if options.reset_lr and (differs or not start.own):
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = options.lr
        state.schedule_start = state.passes
        state.scheduler = schedule_from(state.optimizer, config, state.passes)
        state.recent.clear()
        log.info("the learning rate starts again: lr %g, warm-up %d", options.lr, warmup)
    elif differs:
        log.warning(
            "%s continues with its lr %g (warm-up %s); the config's lr %g (warm-up %d) counts only with "
            "training.optimizer.reset_lr=true", start.path, *recorded, options.lr, warmup,
        )  # fmt: skip
    decayed = state.optimizer.param_groups[0]
    if decayed["weight_decay"] != options.weight_decay:
        if options.reset_weight_decay:
            decayed["weight_decay"] = options.weight_decay
        else:
            log.warning(
                "%s continues with its weight decay %g; the config's %g counts only with "
                "training.optimizer.reset_weight_decay=true", start.path, decayed["weight_decay"], options.weight_decay,
            )  # fmt: skip


def trained_names(model: GSLRM) -> list[str]:
    """The parameters that train, in the optimizer's order."""
    trained = [(name, p.ndim) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, ndim in trained if ndim >= 2] + [name for name, ndim in trained if ndim < 2]


# ---- one update -----------------------------------------------------------------------------------------------------


def update(state: TrainingState, runtime: RuntimeConfig, *, spoiled: bool) -> float | None:
    """One optimizer update, or its skipping, counted: a loss that was not finite, or an exploding gradient.

    The schedule advances and gradients are cleared either way. Returns the gradient norm before clipping. Every process
    sees the same mean loss and the same summed gradients, so all of them skip the same updates.
    """
    norm, skipped = None, None
    if spoiled:
        skipped = "skipped_nan_loss"
    else:
        state.scaler.unscale_(state.optimizer)
        norm, mended = clip_gradients(state.optimizer, runtime.grad_clip_norm)
        state.counts[MENDED] += mended
        scale = state.scaler.get_scale()
        if norm > runtime.grad_clip_norm * runtime.allowed_gradnorm_factor or (mended and norm == 0):
            skipped = "skipped_gradient"
        else:
            state.scaler.step(state.optimizer)
        state.scaler.update()  # also after a skipped step: unscale_ must not be called twice without it
        if skipped is None and state.scaler.get_scale() < scale:  # the scaler found an infinity and took no step
            skipped = "skipped_overflow"
    state.recent.append(skipped is not None)
    if skipped is None:
        state.updates += 1
        update_ema(state, runtime.ema_decay)
    else:
        state.counts[skipped] += 1
        log.warning(
            "update skipped: %s%s", REASONS[skipped], "" if norm is None else f" (norm {norm:.3g} before clipping)"
        )
    state.optimizer.zero_grad(set_to_none=True)
    with warnings.catch_warnings():  # torch warns when the schedule moves before the first update; here it may
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
        state.scheduler.step()
    return norm


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> tuple[float, bool]:
    """Scales all gradients to at most `max_norm`, in place: (norm before, whether entries had to be mended first).

    Entries that are not finite become 0 (NaN) or +-0.001 (infinite), as in FaceLift's trainer.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [parameter.grad for parameter in parameters]
    norm, mended = nn.utils.get_total_norm(gradients), False
    if not math.isfinite(norm.item()):
        for gradient in gradients:
            gradient.nan_to_num_(nan=0.0, posinf=INF_GRADIENT, neginf=-INF_GRADIENT)
        norm = nn.utils.get_total_norm(gradients)
        mended = math.isfinite(norm.item())  # else all were finite and merely too large to be squared
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item(), mended


def check_skips(state: TrainingState, config: GSLRMConfig) -> None:
    """Raises TrainingDivergedError when more than half of the last 200 updates were skipped."""
    skipped = sum(state.recent)
    if skipped <= MAX_SKIPPED:
        return
    counts = ", ".join(f"{name} {count}" for name, count in state.counts.items())
    training = config.training
    raise TrainingDivergedError(
        f"training has diverged: {skipped} of the last {len(state.recent)} updates were skipped (pass {state.passes}, "
        f"{state.updates} updates done; in all {counts}). Lower training.optimizer.lr (now {training.optimizer.lr:g}) "
        f"or lengthen training.schedule.warmup (now {training.schedule.warmup}) and set training.optimizer.reset_lr="
        "true; look at the data (quality_report.html; --overfit 10 must work); a loss that is not finite may also need "
        f"training.runtime.use_amp=false. The checkpoints in {training.checkpointing.checkpoint_dir} are untouched"
    )


@torch.no_grad()
def update_ema(state: TrainingState, decay: float) -> None:
    if state.ema is not None:
        decay = min(decay, (1 + state.updates) / (10 + state.updates))
        for name, tensor in plain_weights(state.model).items():
            state.ema[name].lerp_(tensor, 1.0 - decay)


def network_to_measure(state: TrainingState) -> GSLRM:
    """The network with the averaged weights if there are any (sharing their memory), else the training one."""
    if state.ema is None:
        return state.model
    with torch.device("meta"):
        network = GSLRM(state.model.config)
    network.load_state_dict(state.ema, strict=True, assign=True)
    return network


# ---- saving ---------------------------------------------------------------------------------------------------------


def save(state: TrainingState, config: GSLRMConfig, rig: ViewRig) -> None:
    """Writes the checkpoint and removes all but the newest few.

    `model` holds plain weights, adapters merged, so every reader of GS-LRM weights can load the file.
    """
    options, adaptation = config.training.checkpointing, config.training.adaptation
    content = {
        "model": plain_weights(state.model),
        "optimizer": state.optimizer.state_dict(),
        "lr_scheduler": state.scheduler.state_dict(),
        "fwdbwd_pass_step": state.passes,
        "param_update_step": state.updates,
        "schedule": {
            "start_pass": state.schedule_start, "lr": state.scheduler.base_lrs[0],
            "warmup": config.training.schedule.warmup,
        },
        "scaler": state.scaler.state_dict(),
        "counts": dict(state.counts),
        "recent_skips": list(state.recent),
        "trained": trained_names(state.model),
        "rig": rig.to_dict(),
    }  # fmt: skip
    if adaptation.lora_rank:
        content["lora"] = adapter_state(state.model, adaptation)
    if state.ema is not None:
        content["ema"] = state.ema
    path = checkpoint_path(options.checkpoint_dir, state.passes)
    save_checkpoint(path, content, sidecar(config, rig, state.passes))
    if adaptation.save_adapters:
        save_adapters(state.model, path.parent / "adapters", rig, options.resume_ckpt)
    rotate_checkpoints(options.checkpoint_dir, PATTERN, options.checkpoints_total_limit)
