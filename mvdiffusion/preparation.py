"""What a Stage 1 run is made of: its processes, rig, UNet, data sets and checkpoint, each compared with the others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from multiview.order import HUNDREDTHS, hundredths
from multiview.rig import ViewRig, check_alignment, check_start, load_rig
from multiview.run import resolve_device, seed_everything
from multiview.sample import read_dataset_info
from mvdiffusion.checkpoints import Checkpoint
from mvdiffusion.components import Components, local_folder
from mvdiffusion.config import MixEntry, MVDiffusionConfig
from mvdiffusion.data.augmentation import Augmentation
from mvdiffusion.data.mixing import MixedDataset
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset
from mvdiffusion.latents import weights_fingerprint
from mvdiffusion.lora import add_lora, is_adapter_weight, stock_name
from mvdiffusion.models.unet import configure_views, create_unet, load_unet, resolve_unet_folder, unet_rig
from mvdiffusion.optimization import Ema, choose_parameters
from mvdiffusion.prompts import PromptEmbeds, load_prompt_embeds

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


def make_accelerator(config: MVDiffusionConfig) -> Accelerator:
    from accelerate import Accelerator

    device = resolve_device(config.device)
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        cpu=device.type == "cpu",
    )


def training_lists(config: MVDiffusionConfig) -> list[MixEntry]:
    """The split lists that are trained on, with their shares."""
    return list(config.mix) or [MixEntry(config.train_data, 1.0)]


def aligned_rig(config: MVDiffusionConfig) -> tuple[ViewRig, PromptEmbeds]:
    """The rig of this run, and its prompt embeddings, after comparing everything that carries one."""
    dataset = read_dataset_info(Path(training_lists(config)[0].train_data).parent)["rig"]
    stated = load_rig(config.rig) if config.rig else None
    rig = stated or dataset
    embeds = load_prompt_embeds(config.prompt_embeds, stated)
    check_alignment(rig, dataset=dataset, embeddings=embeds.rig)
    if config.num_views not in (None, rig.num_views):
        raise ValueError(f"num_views is {config.num_views}, but rig {rig.name} has {rig.num_views} views; leave it out")
    return rig, embeds


# ---- the UNet -------------------------------------------------------------------------------------------------------


def starting_unet(config: MVDiffusionConfig, rig: ViewRig):
    """The UNet a run begins with (float32): a fresh one, or the pretrained one, set to the rig's views."""
    cameras = config.camera_conditioning
    if config.unet:
        seed_everything("mvdiffusion unet", config.seed)
        return create_unet(config.unet, rig.num_views, config.attention or "sparse", cameras or "none")
    folder = resolve_unet_folder(
        config.pretrained_unet_path or local_folder(config.pretrained_model_name_or_path) / "unet"
    )
    stored = unet_rig(folder)
    if stored is not None and not config.allow_rig_change:
        check_start(rig, "allow_rig_change", unet=stored)
    unet = load_unet(
        folder, num_views=rig.num_views, attention=config.attention, camera_conditioning=cameras, widen_conv_in=True
    )
    return configure_views(unet, rig.num_views, config.attention) if config.attention else unet


def prepared_unet(config: MVDiffusionConfig, rig: ViewRig, found: Checkpoint | None):
    """The UNet to train, and with LoRA the fingerprint of the weights it leaves alone (else None).

    From a checkpoint: its UNet; with LoRA the run's first weights again and its trained tensors. Raises ValueError if
    the first weights are no longer those that the checkpoint was trained on.
    """
    if not config.lora_rank:
        unet = load_unet(found.folder / "unet") if found else starting_unet(config, rig)
        choose_parameters(unet, config)
        return unet, None
    unet = starting_unet(config, rig)
    seed_everything("mvdiffusion lora", config.seed)
    add_lora(unet, config)
    frozen = {name: tensor for name, tensor in unet.named_parameters() if not tensor.requires_grad}
    base = weights_fingerprint({stock_name(name): tensor for name, tensor in frozen.items()})
    if found:
        if found.trained["base"] != base:
            raise ValueError(
                f"{found.folder} holds adapters of other weights than {config.pretrained_unet_path or 'the UNet'} has "
                f"now; restore them, or start anew with another output_dir=..., or delete {found.folder.parent}"
            )
        _fill(unet, found.trained["own"], str(found.folder))
    log.info(
        "LoRA of rank %d: %d adapter tensors, %.2f M trained parameters", config.lora_rank,
        sum(is_adapter_weight(name) for name, _ in unet.named_parameters()),
        sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad) / 1e6,
    )  # fmt: skip
    return unet, base


def restore(found: Checkpoint, ema: Ema | None, optimizer, accelerator: Accelerator) -> None:
    """The average, the optimiser's moments and the gradient scaler of a checkpoint."""
    if ema is not None:
        ema.load(found.trained["ema"] if found.trained else load_unet(found.folder / "unet_ema").state_dict())
    optimizer.load_state_dict(found.optimizer["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(found.optimizer["scaler"])


def check_same_step(found: Checkpoint | None) -> None:
    """Refuses to start where the processes see different checkpoints (nodes that do not share output_dir)."""
    from accelerate.utils import gather_object

    steps = gather_object([found.step if found else 0])
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes found checkpoints of different steps, {steps}: output_dir must lie on a file system that "
            "all nodes share"
        )


def has_cameras(unet) -> bool:
    return unet.config.camera_conditioning != "none"


# ---- data -----------------------------------------------------------------------------------------------------------


def picture_size(config: MVDiffusionConfig, unet, components: Components) -> int:
    """Side of the pictures, pixels: the UNet's."""
    size = unet.config.sample_size * components.vae_factor
    if config.image_size not in (None, size):
        raise ValueError(f"image_size is {config.image_size}, but this UNet paints pictures of {size} px; leave it out")
    return size


def make_training_set(
    config: MVDiffusionConfig, rig: ViewRig, size: int, *, with_cameras: bool, limit: int | None = None
) -> tuple[MixedDataset, list[int]]:
    """The training data as the config says, and each part's percents. limit: only the first part's first samples."""
    entries = training_lists(config)[:1] if limit else training_lists(config)
    augmentation = Augmentation(
        backgrounds=tuple(config.backgrounds), brightness=config.brightness_jitter, contrast=config.contrast_jitter,
        saturation=config.saturation_jitter, hue_deg=config.hue_jitter_deg, crop_ratio=config.random_crop_ratio,
        mirror=config.mirror_probability,
    )  # fmt: skip
    parts: list[MouseMVDiffusionDataset] = []
    for entry in entries:
        part = MouseMVDiffusionDataset(
            entry.train_data, rig, size, reference_view_idx=config.reference_view_idx, augmentation=augmentation,
            variants=config.cache_variants if config.cache_latents else 0, with_cameras=with_cameras, seed=config.seed,
            limit=limit, first_index=sum(map(len, parts)),
        )  # fmt: skip
        parts.append(part)
    return MixedDataset(parts), [HUNDREDTHS] if limit else hundredths([entry.ratio for entry in entries])


@torch.no_grad()
def _fill(unet, values: dict, source: str) -> None:
    """Copies trained tensors into the module; every trained parameter must be among them, and nothing else."""
    own = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    differing = sorted(set(own) ^ set(values))
    if differing:
        raise ValueError(f"{source}: trained tensors are not those of this config, e.g. {differing[:3]}")
    for name, parameter in own.items():
        parameter.copy_(values[name])
