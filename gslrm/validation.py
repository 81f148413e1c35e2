"""Measuring a GS-LRM on a split: pictures of its Gaussians against the true views, inputs and held-out views apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gslrm.data.mouse_dataset import MouseViewDataset
from gslrm.losses import Targets
from gslrm.model.gaussians_renderer import render
from gslrm.model.gslrm import GSLRM, GSLRMOutput
from multiview import metrics
from multiview.cameras import Cameras
from multiview.image import grid


@dataclass(frozen=True)
class Batch:
    """A collated batch on the device, split into what the model sees and what it is measured against."""

    images: Tensor  # [b, v, 3, h, w] inputs
    masks: Tensor  # [b, v, 1, h, w]
    cameras: Cameras  # [b, v]
    target_cameras: Cameras  # [b, t]
    background: Tensor  # [b, 3]
    targets: Targets


def prepare(batch: dict[str, Tensor], num_inputs: int, device: torch.device) -> Batch:
    """From MouseViewDataset's items, collated, to a Batch on the device."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    height, width = batch["image"].shape[-2:]
    cameras = Cameras(batch["c2w"], batch["fxfycxcy"], height, width)
    inputs, chosen = slice(0, num_inputs), batch["targets"]
    rows = torch.arange(len(chosen), device=device)[:, None]
    targets = Targets(
        rgb=batch["image"][rows, chosen],
        alpha=batch["alpha"][rows, chosen],
        input_rgb=batch["image"][:, inputs],
        input_alpha=batch["alpha"][:, inputs],
        input_forward=batch["c2w"][:, inputs, :3, 2],
        input_focal_px=batch["fxfycxcy"][:, inputs, 0],
        input_depth=batch["depth"][:, inputs] if "depth" in batch else None,
    )
    return Batch(
        images=batch["image"][:, inputs],
        masks=batch["alpha"][:, inputs],
        cameras=cameras[:, inputs],
        target_cameras=cameras[rows, chosen],
        background=batch["background"],
        targets=targets,
    )


def run_model(model: torch.nn.Module, prune: bool, batch: Batch, *, clip_xyz: bool = False) -> GSLRMOutput:
    return model(batch.images, batch.cameras, masks=batch.masks if prune else None, clip_xyz=clip_xyz)


@torch.no_grad()
def image_metrics(rgb: Tensor, alpha: Tensor, target_rgb: Tensor, target_alpha: Tensor) -> dict[str, float]:
    """Means over views [..., 3|1, h, w]: psnr, fg_psnr (views that show the animal), iou."""
    rgb = rgb.clamp(0.0, 1.0)
    shown = target_alpha.flatten(-3).sum(-1) > 0
    values = {
        "psnr": metrics.psnr(rgb, target_rgb).mean().item(),
        "iou": metrics.mask_iou(alpha, target_alpha).mean().item(),
    }
    if shown.any():
        values["fg_psnr"] = metrics.foreground_psnr(rgb[shown], target_rgb[shown], target_alpha[shown]).mean().item()
    return values


@torch.no_grad()
def validate(
    model: GSLRM, dataset: MouseViewDataset, *, device: torch.device, autocast: torch.autocast, backend: str,
    lpips: torch.nn.Module | None = None, num_pictures: int = 4,
) -> tuple[dict[str, float], Tensor]:
    """Means over the dataset (built with num_views None) and a contact sheet [3, H, W].

    Metrics `input_*` are of the views the model saw, `novel_*` of the others (absent if there are none): those of
    `image_metrics`, SSIM, and LPIPS where its network is given. The sheet has two rows per sample: targets above,
    predictions below.
    """
    num_inputs = dataset.num_input_views
    sums: dict[str, list[float]] = {}
    rows: list[Tensor] = []
    was_training = model.training
    model.eval()
    for number in range(len(dataset)):
        item = dataset[number]
        batch = prepare({name: tensor[None] for name, tensor in item.items()}, num_inputs, device)
        with autocast:
            output = run_model(model, model.config.prune_background_tokens, batch)
        rendered = render(output.gaussians, batch.target_cameras, batch.background, backend)
        parts = {"input": slice(0, num_inputs), "novel": slice(num_inputs, None)}
        for part, views in parts.items():
            rgb, truth = rendered.rgb[0, views].clamp(0.0, 1.0), batch.targets.rgb[0, views]
            if len(truth):
                values = image_metrics(rgb, rendered.alpha[0, views], truth, batch.targets.alpha[0, views])
                values["ssim"] = metrics.ssim(rgb, truth).mean().item()
                if lpips is not None:
                    values["lpips"] = lpips(rgb, truth).mean().item()
                for name, value in values.items():
                    sums.setdefault(f"{part}_{name}", []).append(value)
        if number < num_pictures:
            rows += [batch.targets.rgb[0], rendered.rgb[0].clamp(0.0, 1.0)]
    model.train(was_training)
    pictures = torch.cat(rows)
    return {name: sum(values) / len(values) for name, values in sums.items()}, grid(pictures, len(rows[0]))
