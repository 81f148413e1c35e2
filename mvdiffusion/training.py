"""Stage 1's training: what the loop of `multiview.training` needs to train a UNet, start it and resume it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from multiview.checkpoint import Ema, add_adapters, is_adapter_weight, merged_weights, read_rig, save_adapters
from multiview.files import atomic_folder, take, write_json
from multiview.rig import ViewRig, check_alignment, load_rig
from multiview.run import PRECISIONS, LoopOptions, autocast, check_size, seed_everything
from multiview.sample import read_dataset_info
from multiview.sampler import MixedDataset, StepSampler, mixed_lists
from multiview.training import Training, run_training
from mvdiffusion import checkpoints
from mvdiffusion.components import load_components, local_folder
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset
from mvdiffusion.latents import EncodedBatch, LatentCache, live_batches, weights_fingerprint
from mvdiffusion.losses import training_loss
from mvdiffusion.models.camera_conditioning import is_camera_weight
from mvdiffusion.models.unet import configure_views, create_unet, load_unet, resolve_unet_folder, save_unet
from mvdiffusion.prompts import PromptEmbeds, check_embeds_fit, load_prompt_embeds, write_prompt_embeds
from mvdiffusion.validation import evaluate

log = logging.getLogger(__name__)

# FaceLift's own multiplier: it names the class embedding (the CLIP embedding's way into the UNet) after the camera.
CLASS_EMBEDDING = r"^class_embedding\."


def train(config: MVDiffusionConfig, overfit: int = 0) -> Path:
    """Trains to `max_train_steps`, continuing whatever the output folder holds. Returns that folder. overfit: N > 0
    trains and validates on the first N samples, in a folder of its own. Raises ValueError."""
    if overfit:  # the same run, validated on the training samples and without export
        samples = lists_of(config)[0][0]
        config = replace(
            config, output_dir=f"{config.output_dir}_overfit{overfit}", max_train_steps=config.overfit_steps, mix=[],
            train_data=samples, validation_data=samples, validation_samples=overfit, export_dir=None,
        )  # fmt: skip
    config.validate()
    return run_training(partial(MVDiffusionTraining, config, overfit), loop_options(config))


def lists_of(config: MVDiffusionConfig) -> tuple[list[str], list[int]]:
    return mixed_lists(config.train_data, [(part.train_data, part.ratio) for part in config.mix])


def loop_options(config: MVDiffusionConfig) -> LoopOptions:
    return LoopOptions(
        folder=config.output_dir, device=config.device, seed=config.seed, steps=config.max_train_steps,
        accumulate=config.gradient_accumulation_steps, batch_size=config.train_batch_size, lr=config.learning_rate,
        schedule=config.lr_scheduler, warmup=config.lr_warmup_steps, step_rules=config.step_rules,
        max_norm=config.max_grad_norm, precision=config.mixed_precision,
        ema_decay=config.ema_decay if config.use_ema else 0.0, save_every=config.checkpointing_steps,
        keep=config.checkpoints_total_limit, validate_every=config.validation_steps, print_every=config.log_steps,
        budget_s=config.budget_s, skip_digest=config.skip_digest, wandb=config.wandb,
        tracker=config.tracker, title=f"Stage 1 on {', '.join(lists_of(config)[0])}",
    )  # fmt: skip


def build_datasets(
    config: MVDiffusionConfig, rig: ViewRig, image_size: int, overfit: int, *, with_cameras: bool
) -> tuple[MixedDataset, MouseMVDiffusionDataset]:
    """Training data as the config says, and validation data: samples as they are."""
    lists, percents = lists_of(config)
    parts: list[MouseMVDiffusionDataset] = []
    for path in lists:
        options = {"with_cameras": with_cameras, "limit": overfit or None, "first_index": sum(map(len, parts))}
        parts.append(MouseMVDiffusionDataset(path, rig, image_size, config, **options))
    return MixedDataset(parts, percents), MouseMVDiffusionDataset(config.validation_data, rig, image_size)


class MVDiffusionTraining(Training):
    """A UNet on its way from one image of an animal to a rig's views."""

    pattern, randomness = checkpoints.PATTERN, "mvdiffusion step"
    shown = ("foreground_psnr", "unseen_foreground_psnr", "unseen_mask_iou", "unseen_difference_ratio", "consistency")

    def __init__(self, config: MVDiffusionConfig, overfit: int, accelerator: Accelerator) -> None:
        super().__init__(accelerator, loop_options(config))
        self.settings, self.config = config, asdict(config)
        self.advice = (
            f"Lower learning_rate (now {config.learning_rate:g}) or lengthen lr_warmup_steps (now "
            f"{config.lr_warmup_steps}); look at the data (quality_report.html; --overfit 1 must work); a loss that is "
            "not finite may also need mixed_precision: bf16"
        )
        check_size(*size_of(config), self.device, "unet.block_out_channels, layers_per_block or train_batch_size")
        self.rig, self.embeds = aligned_rig(config)
        # Frozen parts in the run's own precision on a GPU, as upstream; a CPU is no faster with less.
        dtype = getattr(torch, PRECISIONS[config.mixed_precision]) if self.device.type == "cuda" else torch.float32
        options = {"with_unet": False, "device": self.device, "dtype": dtype}
        self.components = load_components(config.pretrained_model_name_or_path, **options)
        found = checkpoints.newest_training(config.output_dir, self.rig, self.config)
        self.network, self.base = prepared_unet(config, self.rig, found)
        check_embeds_fit(self.embeds, self.network)
        if config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.network.to(self.device)
        if config.mixed_precision != "no":  # the UNet alone, wherever it is called; what it returns is float32 again
            lowered = autocast(self.device, config.mixed_precision)(self.network.forward)
            self.network.forward = convert_outputs_to_fp32(lowered)
        if config.torch_compile:
            self.network.compile(dynamic=False)
        self.parameters = trained_parameters(self.network)
        self.optimizer = make_optimizer(self.parameters, config, self.device)
        if config.use_ema and accelerator.is_main_process:
            self.ema = Ema(self.parameters, config.ema_decay)
        if found:
            if self.ema is not None:
                average = found.trained["ema"] if found.trained else load_unet(found.folder / "unet_ema").state_dict()
                self.ema.load(average)
            self.optimizer.load_state_dict(found.optimizer["optimizer"])
            if found.optimizer.get("scaler"):
                self.scaler.load_state_dict(found.optimizer["scaler"])
            self.tried = found.sidecar["step"]
            self.passes = self.tried * self.options.accumulate
            self.updates = found.sidecar.get("updates", self.tried)  # none in checkpoints older than skipped updates
            self.counts.update(found.sidecar.get("counts", {}))
            self.recent.extend(found.sidecar.get("recent_skips", []))
            log.info("continuing %s at step %d of %d", found.folder, self.tried, self.options.steps)
        else:
            start = config.pretrained_unet_path or (config.pretrained_model_name_or_path if not config.unet else None)
            log.info("starting from %s", f"the UNet of {start}" if start else "random weights (a fresh UNet's shape)")
        size = self.network.config.sample_size * self.components.vae_factor
        if config.image_size not in (None, size):
            raise ValueError(f"image_size is {config.image_size}, but this UNet generates {size} px; leave it out")
        cameras = self.network.config.camera_conditioning != "none"
        self.dataset, self.check_set = build_datasets(config, self.rig, size, overfit, with_cameras=cameras)

    def batches(self, sampler: StepSampler) -> Iterator[EncodedBatch]:
        config = self.settings
        if config.cache_latents:
            cache = LatentCache(self.components, self.dataset, self.device, config.cache_dir)
            return map(cache.batch, sampler)
        return live_batches(self.components, self.dataset, sampler, config.dataloader_num_workers, self.device)

    def loss(self, model: nn.Module, batch: EncodedBatch, generator: torch.Generator) -> tuple[Tensor, None]:
        return training_loss(model, self.components, self.embeds, batch, self.settings, generator), None

    def adjust_gradients(self) -> None:
        """`freeze_encoder`: in the first half of the run the UNet's down blocks stand still."""
        # Taking the gradients away (instead of requires_grad) leaves DDP's buckets alone; the optimizer skips a
        # parameter without one, weight decay and moments too.
        if self.settings.freeze_encoder and self.tried < self.options.steps // 2:
            for name, parameter in self.parameters.items():
                # Not conv_in, whose image channels may be new, nor new camera weights.
                if name.startswith("down_blocks.") and not is_camera_weight(name):
                    parameter.grad = None

    @torch.compiler.set_stance("force_eager")  # with torch_compile: for few batches of other sizes
    def validate(self) -> tuple[dict[str, float], Tensor]:
        config, average = self.settings, self.ema.weights if self.ema else {}
        own = {name: self.parameters[name].detach().clone() for name in average}
        fill(self.parameters, average)
        self.network.eval()
        try:
            return evaluate(
                self.components, self.network, self.embeds, self.check_set, count=config.validation_samples,
                seed=config.seed, guidance_scales=config.validation_guidance_scales,
                num_steps=config.validation_num_steps,
            )  # fmt: skip
        finally:
            fill(self.parameters, own)
            self.network.train()

    def save(self, is_last: bool) -> None:
        """Writes checkpoint-<step>: whole UNets; with LoRA what is trained, and UNets if asked for or last."""
        config, average = self.settings, self.ema.weights if self.ema else None
        optimizer = {"optimizer": self.optimizer.state_dict()}
        if self.scaler.is_enabled():
            optimizer["scaler"] = self.scaler.state_dict()
        sidecar = {
            "step": self.tried, "rig": self.rig.to_dict(), "config": self.config, "updates": self.updates,
            "counts": dict(self.counts), "recent_skips": list(self.recent),
        }  # fmt: skip
        with checkpoints.save_training(config.output_dir, sidecar, self.embeds, optimizer) as folder:
            self._save_sampling(folder)
            if is_last or not config.lora_rank or config.lora_save_merged:
                save_unet(self.network, folder / "unet", self.rig, state=merged_weights(self.network))
                if average is not None:
                    save_unet(self.network, folder / "unet_ema", self.rig, state=merged_weights(self.network, average))
            if config.lora_rank:
                own = {name: parameter.detach() for name, parameter in self.parameters.items()}
                with open(folder / "trained.pt", "wb") as handle:  # a handle: see full_disk_explained
                    torch.save({"own": own, "ema": average, "base": self.base}, handle)
                source = config.pretrained_unet_path or config.pretrained_model_name_or_path
                save_adapters(self.network, folder / "lora", self.rig, source, average)

    def export(self) -> None:
        """The finished UNet in float16 into a components folder: unet, prompt_embeds and sampling.json."""
        config = self.settings
        if not config.export_dir:
            return
        folder, state = Path(config.export_dir), merged_weights(self.network, self.ema.weights if self.ema else None)
        with atomic_folder(folder / "unet") as temporary:
            save_unet(self.network, temporary, self.rig, state=state, half=True)
        checkpoints.save_embeds(folder / "prompt_embeds", self.embeds)
        self._save_sampling(folder)
        log.info("exported to %s", folder)

    def _save_sampling(self, folder: Path) -> None:
        config = self.settings
        suits = checkpoints.Sampling(config.export_num_steps, config.export_guidance_scale, config.export_num_draws)
        write_json(folder / checkpoints.SAMPLING_FILE, suits._asdict())


def aligned_rig(config: MVDiffusionConfig) -> tuple[ViewRig, PromptEmbeds]:
    """The rig of this run and its prompt embeddings, after comparing everything that carries one."""
    dataset = read_dataset_info(lists_of(config)[0][0])["rig"]
    stated = load_rig(config.rig) if config.rig else None
    rig, source = stated or dataset, config.prompt_embeds
    if source is None:  # the same bytes from every process of a run, each written whole
        source = Path(config.output_dir) / "prompt_embeds"
        write_prompt_embeds(source, config.pretrained_model_name_or_path, rig, rig.prompt_style, angles=False)
    embeds = load_prompt_embeds(source, stated)
    check_alignment(rig, dataset=dataset, embeddings=embeds.rig)
    if config.num_views not in (None, rig.num_views):
        raise ValueError(f"num_views is {config.num_views}, but rig {rig.name} has {rig.num_views} views; leave it out")
    return rig, embeds


def starting_unet(config: MVDiffusionConfig, rig: ViewRig):
    """The UNet a run begins with (float32): a fresh one, or the pretrained one, set to the rig's views."""
    cameras, attention = config.camera_conditioning, config.attention
    if config.unet:
        seed_everything("mvdiffusion unet", config.seed)
        return create_unet(config.unet, rig.num_views, attention or "sparse", cameras or "none")
    given = config.pretrained_unet_path or local_folder(config.pretrained_model_name_or_path) / "unet"
    folder = resolve_unet_folder(given)
    stored = read_rig(folder)
    if stored is not None and not config.allow_rig_change:
        check_alignment(rig, "allow_rig_change", unet=stored)
    options = {"attention": attention, "camera_conditioning": cameras, "widen_conv_in": True}
    unet = load_unet(folder, num_views=rig.num_views, **options)
    return configure_views(unet, rig.num_views, attention) if attention else unet


def prepared_unet(config: MVDiffusionConfig, rig: ViewRig, found: checkpoints.Checkpoint | None):
    """The UNet to train, and with LoRA the fingerprint of the weights it leaves alone (else None). From a checkpoint:
    its UNet; with LoRA the run's first weights again, which must be the same, and its trained tensors."""
    unet = load_unet(found.folder / "unet") if found and not config.lora_rank else starting_unet(config, rig)
    if config.lora_rank:
        seed_everything("mvdiffusion lora", config.seed)
    choose_trained(unet, config)
    if not config.lora_rank:
        return unet, None
    trained = trained_parameters(unet)
    frozen = {name.replace(".base_layer.", "."): t for name, t in unet.named_parameters() if name not in trained}
    base = weights_fingerprint(frozen)
    if found:
        if found.trained["base"] != base:
            told = f"holds adapters of other weights than {config.pretrained_unet_path or 'the UNet'} has now"
            anew = f"start anew with another output_dir=..., or delete {found.folder.parent}"
            raise ValueError(f"{found.folder} {told}; restore them, or {anew}")
        differing = sorted(set(trained) ^ set(found.trained["own"]))
        if differing:
            raise ValueError(f"{found.folder}: trained tensors are not those of this config, e.g. {differing[:3]}")
        fill(trained, found.trained["own"])
    return unet, base


def choose_trained(unet: nn.Module, config: MVDiffusionConfig) -> None:
    """All trains, or what `trainable_modules` names; with LoRA adapters, camera weights and `lora_also_train`."""
    if config.lora_rank:
        add_adapters(unet, config.lora_targets, config.lora_rank, config.lora_alpha or config.lora_rank)
    parts = config.lora_also_train if config.lora_rank else config.trainable_modules
    for name, parameter in unet.named_parameters():
        added = config.lora_rank and (is_adapter_weight(name) or is_camera_weight(name))
        parameter.requires_grad_(bool(added or parts is None or any(part in name for part in parts)))
    if not trained_parameters(unet):
        raise ValueError(f"trainable_modules {config.trainable_modules} names no parameter of the UNet")


def trained_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train at some time of the run, by name, in the module's order."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def make_optimizer(parameters: dict[str, nn.Parameter], config: MVDiffusionConfig, device: torch.device):
    """AdamW, with use_8bit_adam bitsandbytes', over groups whose `multiplier` multiplies the schedule's rate: the first
    pattern of lr_multipliers (regular expression) found in a name decides, 1 where none is; each must match a name."""
    patterns = {**config.lr_multipliers, CLASS_EMBEDDING: config.camera_embedding_lr_mult}
    groups: dict[float, dict] = {}
    used = {CLASS_EMBEDDING}
    for name, parameter in parameters.items():
        pattern = next((pattern for pattern in patterns if re.search(pattern, name)), None)
        used.add(pattern)
        multiplier = float(patterns.get(pattern, 1.0))
        groups.setdefault(multiplier, {"params": [], "multiplier": multiplier})["params"].append(parameter)
    if unused := [pattern for pattern in patterns if pattern not in used]:
        examples = list(parameters)[:3]
        raise ValueError(f"lr_multipliers: no trained parameter's name matches {unused}; examples: {examples}")
    kind = torch.optim.AdamW
    if config.use_8bit_adam:
        if device.type != "cuda":
            raise ValueError(f"use_8bit_adam needs a CUDA device, got {device.type}; set use_8bit_adam: false")
        try:
            from bitsandbytes.optim import AdamW8bit as kind
        except ImportError as error:
            told = "use_8bit_adam needs the package bitsandbytes, which cannot be imported"
            raise ValueError(f"{told}: pip install bitsandbytes, or set use_8bit_adam: false") from error
    return kind(
        list(groups.values()), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay, eps=config.adam_epsilon,
    )  # fmt: skip


def size_of(config: MVDiffusionConfig) -> tuple[float, float, float]:
    """Lower bounds for a fresh UNet: parameters, parameters that train, and bytes of a batch of image latents."""
    unet = config.unet or {}
    where, layers = "the configuration's unet", unet.get("layers_per_block")
    channels = take(unet, "block_out_channels", (-1,), where, default=[])
    inputs, size = (take(unet, name, int, where, default=8) for name in ("in_channels", "sample_size"))
    layers = (
        min(layers) if isinstance(layers, list) and layers else take(unet, "layers_per_block", int, where, default=1)
    )
    # Each layer of a block has two 3x3 convolutions, on the way down and on the way up.
    parameters = float(36 * layers * sum(width**2 for width in channels))
    latents = config.train_batch_size * inputs * float(size) ** 2
    is_partial = config.lora_rank or config.trainable_modules is not None
    return parameters, 0.0 if is_partial else parameters, 4.0 * latents
