"""Stage 2's training: what the loop of `multiview.training` needs to train a GS-LRM, start it and resume it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gslrm import checkpoints
from gslrm.config import AdaptationConfig, GSLRMConfig, check_config, size_of
from gslrm.data.mouse_dataset import build_datasets
from gslrm.losses import NEEDS_RENDERING, POINTSDIST_WARMUP_STEPS, loss_weights, total_loss
from gslrm.model.gaussians_renderer import render
from gslrm.model.gslrm import GSLRM
from gslrm.perceptual import load_networks
from gslrm.validation import image_metrics, prepare, run_model, validate
from multiview import checkpoint as files
from multiview.image import grid
from multiview.rig import check_alignment, load_rig
from multiview.run import LoopOptions, WandbOptions, autocast, check_size, git_hash, resolve_device, seed_everything
from multiview.sampler import StepSampler, load_batches
from multiview.training import Training, run_training

log = logging.getLogger(__name__)

STATE_KEYS = ("model", "optimizer", "lr_scheduler", "fwdbwd_pass_step", "param_update_step")
LORA_KEYS = ("trainable_layers", "lora_rank", "lora_alpha", "lora_targets")  # which a resumed run keeps
# Parts of the network's names: what freeze_embedder freezes, and what takes adapters.
BLOCKS, TARGETS = "transformer_layers.", ("attn.to_qkv", "attn.fc", "mlp.mlp.0", "mlp.mlp.2")
EMBEDDER = ("patch_embedder.", "view_type_embeddings", "gaussian_position_embeddings", "input_layer_norm.")


def train(config: GSLRMConfig, overfit: int = 0) -> Path:
    """Trains to `max_fwdbwd_passes`, continuing whatever the checkpoint folder holds. Returns that folder. overfit: N >
    0 trains and validates on the first N samples without augmentation, in a folder of its own. Raises ValueError."""
    config = overfit_config(config, overfit) if overfit else config
    check_config(config)
    check_adaptation(config.training.adaptation, config.model.transformer.n_layer)
    return run_training(partial(GSLRMTraining, config, overfit), loop_options(config))


def overfit_config(config: GSLRMConfig, num_samples: int) -> GSLRMConfig:
    """The same run on few samples: no augmentation, validation on the training samples, its own folder, no export."""
    training = config.training
    augmentation = replace(training.dataset.augmentation, enabled=False)
    dataset = replace(training.dataset, mix=[], min_input_views=None, augmentation=augmentation)
    folder = f"{training.checkpointing.checkpoint_dir.rstrip('/')}_overfit{num_samples}"
    checkpointing = replace(training.checkpointing, checkpoint_dir=folder, export_dir=None)
    return replace(
        config,
        training=replace(training, dataset=dataset, checkpointing=checkpointing),
        validation=replace(config.validation, dataset_path=dataset.dataset_path, num_samples=num_samples),
    )


def loop_options(config: GSLRMConfig) -> LoopOptions:
    training, runtime, every = config.training, config.training.runtime, config.training.logging
    lowers = runtime.use_amp and (runtime.amp_on_cpu or resolve_device(runtime.device).type == "cuda")
    wandb, data = every.wandb, training.dataset
    mode = "offline" if wandb.offline and wandb.mode == "online" else wandb.mode
    return LoopOptions(
        folder=training.checkpointing.checkpoint_dir, device=runtime.device, seed=runtime.seed, unit="pass",
        steps=training.schedule.max_fwdbwd_passes, accumulate=runtime.grad_accum_steps,
        batch_size=training.dataloader.batch_size_per_gpu, lr=training.optimizer.lr, warmup=training.schedule.warmup,
        max_norm=runtime.grad_clip_norm, skip_factor=runtime.allowed_gradnorm_factor,
        precision=runtime.amp_dtype if lowers else "no", ema_decay=runtime.ema_decay,
        save_every=training.checkpointing.checkpoint_every, keep=training.checkpointing.checkpoints_total_limit,
        validate_every=config.validation.val_every, log_every=every.print_every, print_every=every.print_every,
        image_every=every.vis_every, budget_s=runtime.budget_s, skip_digest=training.checkpointing.skip_digest,
        wandb=WandbOptions(mode=mode, project=wandb.project, group=wandb.group, name=wandb.exp_name),
        tracker=every.tracker, title=f"Stage 2 on {', '.join(part.dataset_path for part in (data, *data.mix))}",
    )  # fmt: skip


class GSLRMTraining(Training):
    """A GS-LRM on its way from posed views to Gaussians."""

    pattern, randomness, first_average_counts = checkpoints.PATTERN, "gslrm-dropout", True
    network: GSLRM

    def __init__(self, config: GSLRMConfig, overfit: int, accelerator: Accelerator) -> None:
        super().__init__(accelerator, loop_options(config))
        self.settings, self.config = config, asdict(config)
        training, runtime, options = config.training, config.training.runtime, config.training.optimizer
        self.advice = (
            f"Lower training.optimizer.lr (now {options.lr:g}) or lengthen training.schedule.warmup (now "
            f"{training.schedule.warmup}) and set training.optimizer.reset_lr=true; look at the data "
            "(quality_report.html; --overfit 10 must work); a loss that is not finite may also need "
            "training.runtime.use_amp=false"
        )
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = runtime.use_tf32
        check_size(*size_of(config), self.device, "model.transformer, image_size, batch_size_per_gpu or num_views")
        self.dataset, self.check_set = build_datasets(config, overfit)
        self.rig = check_alignment(load_rig(config.rig) if config.rig else None, dataset=self.dataset.rig)
        own, given = training.checkpointing.checkpoint_dir, training.checkpointing.resume_ckpt
        own = files.newest_checkpoint(own, checkpoints.PATTERN)
        path = own or (checkpoints.resolve_checkpoint(given) if given else None)
        whole = own is not None or (path is not None and not options.reset_training_state)
        self.networks = load_networks(training.losses, self.device)
        seed_everything("gslrm-init", runtime.seed)
        self.network = GSLRM(config.model, grad_checkpoint_every=runtime.grad_checkpoint_every).to(self.device)
        # Weights that carry no rig (public ones) may start any; weights of another rig only where the config says so
        # (`allow_rig_change`); a training state never.
        source = checkpoints.read_checkpoint_rig(path) if path is not None else None
        if source is not None and (whole or not training.checkpointing.allow_rig_change):
            check_alignment(self.rig, "" if whole else "training.checkpointing.allow_rig_change", gslrm=source)
        if path is None:
            log.info("starting from random weights (training.checkpointing.resume_ckpt is not set)")
        elif not whole:
            files.load_strict(self.network, checkpoints.model_weights(files.load_checkpoint(path), path), path)
            log.info("starting from the weights of %s (rig %s)", path, source.name if source else "not recorded")
        adapt(self.network, training.adaptation)
        chosen = asdict(training.adaptation)
        self.lora = {name: chosen[name] for name in LORA_KEYS} if training.adaptation.lora_rank else {}
        self.schedule_start = 0  # pass at which the learning rate's warm-up began; above 0 after reset_lr
        groups = parameter_groups(self.network, options.weight_decay)
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        self.parameters = {names[parameter]: parameter for group in groups for parameter in group["params"]}
        betas = (options.beta1, options.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=1e-8, fused=True)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = options.lr
        checkpoint = self._resume(path, own is not None) if whole else {}
        if runtime.ema_decay > 0 and accelerator.is_main_process:
            self.ema = files.Ema(self.averaged(), runtime.ema_decay)
            if "ema" in checkpoint:
                self.ema.load(checkpoint["ema"])
        if runtime.torch_compile:
            compile_blocks(self.network)
        self.is_compiled = runtime.torch_compile

    def _resume(self, path: Path, is_own: bool) -> Mapping[str, Any]:
        """Loads the state of a checkpoint file, which is returned. ValueError for less, or other frozen parameters."""
        checkpoint = files.load_checkpoint(path)
        weights_only = f"another checkpoint_dir with training.checkpointing.resume_ckpt={path} and "
        weights_only = f"start from its weights: {weights_only}training.optimizer.reset_training_state=true"
        missing = ", ".join(sorted(set(STATE_KEYS) - set(checkpoint)))
        if missing:
            raise ValueError(f"checkpoint {path} lacks {missing} and cannot be resumed; {weights_only}")
        weights = checkpoints.network_tensors(checkpoint["model"], path)
        lora = checkpoint.get("lora") or {}
        if self.lora != dict(lora.get("settings", {})):
            told = f"{lora.get('settings') or 'without adapters'}, this run has {self.lora or 'none'}"
            same = f"use the same settings, or {weights_only}, which are merged ones"
            raise ValueError(f"checkpoint {path} was trained with training.adaptation {told}: {same}")
        if lora:  # merging rounds, so the matrices under the adapters are kept beside the merged ones
            for name in lora["base"]:
                weights.pop(name.replace(".base_layer.", "."))
            weights |= {**lora["base"], **lora["adapters"]}
        files.load_strict(self.network, weights, path)
        saved = checkpoint["optimizer"]["param_groups"]
        sizes, own_sizes = ([len(g["params"]) for g in groups] for groups in (saved, self.optimizer.param_groups))
        if sizes != own_sizes or checkpoint.get("trained", list(self.parameters)) != list(self.parameters):
            told = f"trained other parameters ({sum(sizes)} tensors, this run {sum(own_sizes)})"
            raise ValueError(f"checkpoint {path} {told}: training.adaptation must stay as it was, or {weights_only}")
        self.passes, self.updates = int(checkpoint["fwdbwd_pass_step"]), int(checkpoint["param_update_step"])
        if not is_own and self.passes >= self.options.steps:
            told = f"training.schedule.max_fwdbwd_passes={self.options.steps} leaves nothing to do"
            raise ValueError(f"checkpoint {path} is at pass {self.passes}, so {told}: raise it, or {weights_only}")
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        schedule, scheduler = checkpoint.get("schedule", {}), checkpoint["lr_scheduler"]
        self.schedule_start, self.tried = int(schedule.get("start_pass", 0)), int(scheduler["last_epoch"])
        for group, lr in zip(self.optimizer.param_groups, scheduler["base_lrs"]):
            group["initial_lr"] = lr
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.counts.update(checkpoint.get("counts", {}))
        self.recent.extend(checkpoint.get("recent_skips", []))
        self._apply_resets(path, is_own, schedule)
        log.info("resuming %s at pass %d, update %d", path, self.passes, self.updates)
        return checkpoint

    def _apply_resets(self, path: Path, is_own: bool, schedule: Mapping[str, Any]) -> None:
        """`reset_lr` and `reset_weight_decay` on a resumed state; a warning where the config's own values do not count.
        A repeated command finds the reset already done in its own checkpoint (the same lr and warm-up) and goes on."""
        options, warmup = self.settings.training.optimizer, self.options.warmup
        decayed, told = self.optimizer.param_groups[0], "the config's %g counts only with training.optimizer.%s=true"
        recorded = (schedule.get("lr", decayed["initial_lr"]), schedule.get("warmup", warmup))
        if options.reset_lr and (recorded != (options.lr, warmup) or not is_own):
            for group in self.optimizer.param_groups:
                group["initial_lr"] = options.lr
            self.schedule_start, self.tried = self.passes, 0
            self.recent.clear()
            log.info("the learning rate starts again: lr %g, warm-up %d", options.lr, warmup)
        elif recorded != (options.lr, warmup):
            log.warning(f"%s continues with its lr %g (warm-up %s); {told}", path, *recorded, options.lr, "reset_lr")
        if options.reset_weight_decay:
            decayed["weight_decay"] = options.weight_decay
        elif (kept := decayed["weight_decay"]) != options.weight_decay:
            own = options.weight_decay
            log.warning(f"%s continues with its weight decay %g; {told}", path, kept, own, "reset_weight_decay")

    def schedule_length(self) -> int:
        return (self.options.steps - self.schedule_start) // self.options.accumulate

    def batches(self, sampler: StepSampler) -> Iterator[dict[str, Tensor]]:
        loader = self.settings.training.dataloader
        return load_batches(self.dataset, sampler, loader.num_workers, self.device, loader.prefetch_factor)

    def loss(self, model: nn.Module, raw_batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, tuple]:
        """Direct warm-up renders nothing."""
        config, training, losses = self.settings, self.settings.training, self.settings.training.losses
        weights = loss_weights(losses, self.passes, l2_warmup_steps=training.schedule.l2_warmup_steps)
        num_inputs, least = training.dataset.num_input_views, training.dataset.min_input_views
        if least is not None:
            num_inputs = int(torch.randint(least, num_inputs + 1, (), generator=generator))
        batch = prepare(raw_batch, num_inputs, self.device)
        clip = config.model.clip_xyz and not (losses.warmup_pointsdist and self.passes < POINTSDIST_WARMUP_STEPS)
        if training.adaptation.lora_dropout > 0:  # so that a resumed run drops what it would have dropped
            torch.manual_seed(generator.initial_seed())
        with autocast(self.device, self.options.precision):
            output = run_model(model, config.model.prune_background_tokens, batch, clip_xyz=clip)
        rgb = alpha = None
        if NEEDS_RENDERING & set(weights):
            rgb, alpha, _ = render(
                output.gaussians, batch.target_cameras, batch.background, training.runtime.raster_backend,
                recompute=training.runtime.recompute_rendering,
            )  # fmt: skip
        loss, parts = total_loss(weights, losses, output, batch, rgb=rgb, alpha=alpha, networks=self.networks)
        # 0 that depends on every Gaussian value, so that every parameter has a gradient (DDP demands it); NaN if one is
        # not finite, so that such a pass counts as one whose loss is not finite.
        names = ("xyz", "features", "scaling", "rotation", "opacity")
        zero = 0.0 * sum(getattr(output.gaussians, name).sum() for name in names)
        return loss + zero, (parts, batch, rgb, alpha)

    def numbers(self, details: tuple) -> dict[str, float]:
        parts, batch, rgb, alpha = details
        values = {name: self.accelerator.reduce(part.detach(), "mean").item() for name, part in parts.items()}
        return values if rgb is None else values | image_metrics(rgb, alpha, batch.rgb, batch.alpha)

    def image(self, details: tuple) -> Tensor | None:
        """Contact sheet: targets of the first samples above, renderings below."""
        _, batch, rgb, _ = details
        if rgb is None:
            return None
        rows = [row for i in range(min(4, len(rgb))) for row in (batch.rgb[i], rgb[i].detach().clamp(0, 1))]
        return grid(torch.cat(rows), rgb.shape[1])

    def averaged(self) -> dict[str, Tensor]:
        return files.merged_weights(self.network)

    def validate(self) -> tuple[dict[str, float], Tensor] | None:
        if self.check_set is None:
            return None
        network = self.network
        if self.ema is not None:  # one with the averaged weights, sharing their memory
            with torch.device("meta"):
                network = GSLRM(self.settings.model)
            network.load_state_dict(self.ema.weights, strict=True, assign=True)
        return validate(
            network, self.check_set, device=self.device, autocast=autocast(self.device, self.options.precision),
            backend=self.settings.training.runtime.raster_backend, lpips=self.networks.get("lpips"),
        )  # fmt: skip

    def save(self, is_last: bool) -> None:
        """Writes the checkpoint. `model` holds plain weights, so every reader of GS-LRM weights can load the file."""
        options, adaptation = self.settings.training.checkpointing, self.settings.training.adaptation
        self.set_rates()  # a checkpoint holds the rates of the update that follows, as FaceLift's do
        groups, state, rig = self.optimizer.param_groups, self.network.state_dict(), self.rig.to_dict()
        content = {
            "model": files.merged_weights(self.network), "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": {  # as torch's LambdaLR writes it, which FaceLift loads
                "base_lrs": [group["initial_lr"] for group in groups], "last_epoch": self.tried,
                "_step_count": self.tried + 1, "_is_initial": False, "_get_lr_called_within_step": False,
                "_last_lr": [group["lr"] for group in groups], "lr_lambdas": [None] * len(groups),
            },
            "fwdbwd_pass_step": self.passes, "param_update_step": self.updates,
            "schedule": {
                "start_pass": self.schedule_start, "lr": groups[0]["initial_lr"], "warmup": self.options.warmup,
            },
            "scaler": self.scaler.state_dict(), "counts": dict(self.counts), "recent_skips": list(self.recent),
            "trained": list(self.parameters), "rig": rig,
        }  # fmt: skip
        if self.lora:
            content["lora"] = {
                "settings": self.lora,
                "base": {name: tensor for name, tensor in state.items() if ".base_layer." in name},
                "adapters": {name: tensor for name, tensor in state.items() if files.is_adapter_weight(name)},
            }
        if self.ema is not None:
            content["ema"] = self.ema.weights
        path = checkpoints.checkpoint_path(options.checkpoint_dir, self.passes)
        sidecar = {"config": self.config, "rig": rig, "step": self.passes, "git": git_hash()}
        files.save_checkpoint(path, content, sidecar)
        if adaptation.save_adapters:
            files.save_adapters(self.network, path.parent / "adapters", self.rig, options.resume_ckpt)

    def export(self) -> None:
        options = self.settings.training.checkpointing
        if options.export_dir:
            path = checkpoints.export_weights(options.checkpoint_dir, options.export_dir, dtype=torch.float16)
            log.info("exported to %s", path)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """FaceLift's two groups of what trains: weight decay for tensors of two or more dimensions, none for norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, others = ([p for p in trained if (p.ndim >= 2) == wide] for wide in (True, False))
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def compile_blocks(model: GSLRM) -> None:
    """Compiles the transformer blocks in place; parameter names and everything around the blocks stay."""
    # With background tokens pruned the number of tokens changes from batch to batch: one graph for all lengths.
    for block in model.transformer_layers:
        block.compile(dynamic=True if model.config.prune_background_tokens else None)


def check_adaptation(options: AdaptationConfig, num_layers: int) -> list[int]:
    """Returns the numbers of the blocks that train, ascending: trainable_layers is "20-23", "0,4-7", "none" or None
    (all). Raises ValueError for whatever cannot be meant."""
    text, lora, section = options.trainable_layers, options.lora_rank, "training.adaptation"
    chosen = set(range(num_layers)) if text is None else set()
    for part in [] if text is None or text.strip().lower() == "none" else text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"{section}.trainable_layers must look like 20-23 or 0,4-7 or none, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= num_layers:
            raise ValueError(f"{section}.trainable_layers: {part.strip()} is not a range within 0-{num_layers - 1}")
        chosen.update(range(first, last + 1))
    frozen_rest = options.freeze_embedder and options.freeze_heads
    for wrong, told in (
        (lora < 0 or options.lora_alpha <= 0 or not 0 <= options.lora_dropout < 1,
         ": lora_rank must be 0 (off) or more, lora_alpha above 0 and lora_dropout in [0, 1), got "
         f"{lora}, {options.lora_alpha:g}, {options.lora_dropout:g}"),
        (set(options.lora_targets) - set(TARGETS) or (lora and not options.lora_targets),
         f".lora_targets must be some of {', '.join(TARGETS)}, got {', '.join(options.lora_targets)}"),
        (lora and not chosen, f": lora_rank {lora} needs blocks to adapt; trainable_layers names none"),
        (not chosen and frozen_rest,
         " freezes everything: trainable_layers none, freeze_embedder and freeze_heads true"),
        # Adapters on their own are a model only if nothing else has moved.
        (options.save_adapters and not (lora and frozen_rest),
         ".save_adapters needs lora_rank above 0, freeze_embedder=true and freeze_heads=true"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(section + told)
    return sorted(chosen)


def adapt(model: nn.Module, options: AdaptationConfig) -> None:
    """Adds the adapters and freezes what shall not move, in place. The output does not change."""
    layers = check_adaptation(options, len(model.transformer_layers))
    blocks = tuple(f"{BLOCKS}{layer}." for layer in layers)
    if options.lora_rank:
        targets = [block + target for block in blocks for target in options.lora_targets]
        files.add_adapters(model, targets, options.lora_rank, options.lora_alpha, options.lora_dropout)
    for name, parameter in model.named_parameters():
        if name.startswith(BLOCKS):
            trains = name.startswith(blocks) and (not options.lora_rank or files.is_adapter_weight(name))
        else:
            trains = not (options.freeze_embedder if name.startswith(EMBEDDER) else options.freeze_heads)
        parameter.requires_grad_(trains)
