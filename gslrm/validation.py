"""Measuring a GS-LRM on a split: images of its Gaussians against the true views, inputs and held-out views apart."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from gslrm.data.mouse_dataset import MouseViewDataset
from gslrm.losses import Batch
from gslrm.model.gaussians_renderer import render
from gslrm.model.gslrm import GSLRM, GSLRMOutput
from multiview import metrics
from multiview.cameras import Cameras
from multiview.image import grid


def prepare(batch: dict[str, Tensor], num_inputs: int, device: torch.device) -> Batch:
    """From MouseViewDataset's items, collated, to a Batch on the device."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    cameras = Cameras(batch["c2w"], batch["fxfycxcy"], *batch["image"].shape[-2:])
    inputs, chosen = slice(0, num_inputs), batch["targets"]
    rows = torch.arange(len(chosen), device=device)[:, None]
    return Batch(
        cameras[:, inputs], batch["image"][:, inputs], batch["alpha"][:, inputs],
        batch["depth"][:, inputs] if "depth" in batch else None,
        cameras[rows, chosen], batch["image"][rows, chosen], batch["alpha"][rows, chosen], batch["background"],
    )  # fmt: skip


def run_model(model: torch.nn.Module, prune: bool, batch: Batch, *, clip_xyz: bool = False) -> GSLRMOutput:
    return model(batch.input_rgb, batch.cameras, masks=batch.input_alpha if prune else None, clip_xyz=clip_xyz)


@torch.no_grad()
def image_metrics(rgb: Tensor, alpha: Tensor, target_rgb: Tensor, target_alpha: Tensor) -> dict[str, float]:
    """Returns means over views [..., 3|1, h, w]: psnr, iou, fg_psnr (views that show the animal)."""
    rgb, shown = rgb.clamp(0.0, 1.0), target_alpha.flatten(-3).sum(-1) > 0
    values = {"psnr": metrics.psnr(rgb, target_rgb), "iou": metrics.mask_iou(alpha, target_alpha)}
    if shown.any():
        values["fg_psnr"] = metrics.foreground_psnr(rgb[shown], target_rgb[shown], target_alpha[shown])
    return {name: value.mean().item() for name, value in values.items()}


@torch.no_grad()
def validate(
    model: GSLRM, dataset: MouseViewDataset, *, device: torch.device, autocast: torch.autocast, backend: str,
    lpips: torch.nn.Module | None = None, num_pictures: int = 4,
) -> tuple[dict[str, float], Tensor]:  # fmt: skip
    """Means over the dataset (every view) and a contact sheet [3, H, W]: per sample targets above, predictions below.
    Metrics `input_*` are of the views the model saw, `novel_*` of the others (absent if there are none)."""
    num_inputs = dataset.num_input_views
    values: dict[str, list[float]] = defaultdict(list)
    rows: list[Tensor] = []
    was_training = model.training
    model.eval()
    for number in range(len(dataset)):
        batch = prepare({name: tensor[None] for name, tensor in dataset[number].items()}, num_inputs, device)
        with autocast:
            output = run_model(model, model.config.prune_background_tokens, batch)
        rendered = render(output.gaussians, batch.target_cameras, batch.background, backend)
        for part, views in (("input", slice(0, num_inputs)), ("novel", slice(num_inputs, None))):
            rgb, truth = rendered.rgb[0, views].clamp(0.0, 1.0), batch.rgb[0, views]
            if not len(truth):
                continue
            measured = image_metrics(rgb, rendered.alpha[0, views], truth, batch.alpha[0, views])
            measured["ssim"] = metrics.ssim(rgb, truth).mean().item()
            if lpips is not None:
                measured["lpips"] = lpips(rgb, truth).mean().item()
            for name, value in measured.items():
                values[f"{part}_{name}"].append(value)
        if number < num_pictures:
            rows += [batch.rgb[0], rendered.rgb[0].clamp(0.0, 1.0)]
    model.train(was_training)
    return {name: sum(each) / len(each) for name, each in values.items()}, grid(torch.cat(rows), len(rows[0]))
