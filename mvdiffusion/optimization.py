"""What is trained, how fast, and the average that is kept of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.models.camera_conditioning import is_camera_weight

# FaceLift's own multiplier: it names the class embedding (the CLIP embedding's way into the UNet) after the camera.
CLASS_EMBEDDING = r"^class_embedding\."
ENCODER = "down_blocks."


# ---- what is trained ------------------------------------------------------------------------------------------------


def choose_parameters(unet: Module, config: MVDiffusionConfig) -> None:
    """Without LoRA: everything trains, or what `trainable_modules` names. Sets requires_grad."""
    if config.trainable_modules is None:
        return
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(any(part in name for part in config.trainable_modules))
    if not any(parameter.requires_grad for parameter in unet.parameters()):
        raise ValueError(f"trainable_modules {config.trainable_modules} names no parameter of the UNet")


def trained_parameters(unet: Module) -> dict[str, Parameter]:
    """The parameters that train at some time of the run, by name, in the module's order."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def is_encoder(name: str) -> bool:
    """The contracting half of the UNet. Not conv_in, whose picture channels may be new, nor new camera weights."""
    return name.startswith(ENCODER) and not is_camera_weight(name)


def drop_encoder_gradients(unet: Module, config: MVDiffusionConfig, step: int) -> None:
    """`freeze_encoder`: in the first half of the run the UNet's down blocks stand still.

    Taking the gradients away (instead of requires_grad) leaves DDP's buckets alone; a parameter without gradient is
    skipped by the optimiser, its weight decay and moments too.
    """
    if not config.freeze_encoder or step >= config.max_train_steps // 2:
        return
    for name, parameter in unet.named_parameters():
        if is_encoder(name):
            parameter.grad = None


# ---- optimiser and learning rate ------------------------------------------------------------------------------------


def parameter_groups(parameters: dict[str, Parameter], config: MVDiffusionConfig) -> list[dict]:
    """Groups of equal learning rate; `multiplier` is what multiplies the schedule's.

    lr_multipliers: the first pattern (regular expression) found in a name decides; 1 where none is.
    Raises ValueError for a pattern that no parameter's name matches.
    """
    patterns = {**config.lr_multipliers, CLASS_EMBEDDING: config.camera_embedding_lr_mult}
    groups: dict[float, dict] = {}
    used = {CLASS_EMBEDDING}
    for name, parameter in parameters.items():
        found = next((pattern for pattern in patterns if re.search(pattern, name)), None)
        used.add(found)
        multiplier = 1.0 if found is None else float(patterns[found])
        group = groups.setdefault(multiplier, {"params": [], "multiplier": multiplier})
        group["params"].append(parameter)
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused:
        examples = list(parameters)[:3]
        raise ValueError(f"lr_multipliers: no trained parameter's name matches {unused}; examples: {examples}")
    return list(groups.values())


def make_optimizer(parameters: dict[str, Parameter], config: MVDiffusionConfig, device: torch.device):
    """AdamW over `parameter_groups`; with use_8bit_adam bitsandbytes' 8-bit one, which needs CUDA."""
    options = {
        "lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay, "eps": config.adam_epsilon,
    }  # fmt: skip
    groups = parameter_groups(parameters, config)
    if not config.use_8bit_adam:
        return torch.optim.AdamW(groups, **options)
    if device.type != "cuda":
        raise ValueError(f"use_8bit_adam needs a CUDA device, got {device.type}; set use_8bit_adam: false")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "use_8bit_adam needs the package bitsandbytes, which cannot be imported: pip install bitsandbytes, or set "
            "use_8bit_adam: false"
        ) from error
    return AdamW8bit(groups, **options)


def set_learning_rates(optimizer, config: MVDiffusionConfig, step: int) -> float:
    """Sets every group's rate for update `step`; returns the rate before the multipliers."""
    rate = config.learning_rate * lr_factor(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("multiplier", 1.0)  # checkpoints older than the multipliers hold none
    return rate


def lr_factor(config: MVDiffusionConfig, step: int) -> float:
    """Learning rate over config.learning_rate at update `step` (from 0)."""
    if config.lr_scheduler == "piecewise_constant":  # FaceLift's: its warm-up is ignored
        return piecewise_factor(config.step_rules, step)
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler in ("constant", "constant_with_warmup"):
        return 1.0
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return 1 - done if config.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def piecewise_factor(rules: str, step: int) -> float:
    """diffusers' step rules: "1:200000,0.5" is 1 before update 200,000 and 0.5 from it on."""
    *pieces, last = rules.split(",")
    try:
        for piece in pieces:
            factor, end = piece.split(":")
            if step < int(end):
                return float(factor)
        return float(last)
    except ValueError:
        raise ValueError(f'step_rules must look like "1:20000,0.5", got {rules!r}') from None


# ---- the average ----------------------------------------------------------------------------------------------------


class Ema:
    """Exponential moving average of named tensors, in float32: decay min(n / (9 + n), decay) after update n."""

    def __init__(self, tensors: dict[str, Tensor], decay: float, device: torch.device) -> None:
        self.decay = decay
        self.weights = {name: tensor.detach().float().clone().to(device) for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, tensors: dict[str, Tensor], updates: int) -> None:
        """updates: how many optimiser updates the tensors have seen, from 1 (the first copies them)."""
        decay = min(updates / (9 + updates), self.decay) if updates > 1 else 0.0
        for name, average in self.weights.items():
            average.lerp_(tensors[name].to(average), 1 - decay)

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, average in self.weights.items():
            average.copy_(tensors[name])


@contextmanager
def averaged_weights(unet: Module, ema: Ema | None) -> Iterator[None]:
    """Inside, `unet` is in eval mode and holds the averaged weights."""
    parameters = dict(unet.named_parameters())
    own = {name: parameters[name].detach().clone() for name in ema.weights} if ema else {}
    _fill(parameters, ema.weights if ema else {})
    unet.eval()
    try:
        yield
    finally:
        _fill(parameters, own)
        unet.train()


@torch.no_grad()
def _fill(parameters: dict[str, Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
