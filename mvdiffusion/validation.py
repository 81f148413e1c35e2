"""What the pipeline makes of known samples: figures and an image, beside what the autoencoder alone makes of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from multiview import metrics
from multiview.cameras import Cameras
from multiview.image import grid
from mvdiffusion.components import Components
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset
from mvdiffusion.latents import condition_latents, decode_latents
from mvdiffusion.pipelines.multiview import generate_views
from mvdiffusion.prompts import PromptEmbeds

BATCH = 2  # objects generated at once


def figures(
    images: Tensor, targets: Tensor, masks: Tensor, reference_view: int, lpips: torch.nn.Module | None
) -> dict[str, float]:
    """Means over objects and views of images [b, n, 3, s, s]; `unseen_*` leaves the reference view out."""
    values = {
        "psnr": metrics.psnr(images, targets), "foreground_psnr": metrics.foreground_psnr(images, targets, masks),
        "ssim": metrics.ssim(images, targets), "foreground_ssim": metrics.foreground_ssim(images, targets, masks),
        "mask_iou": metrics.mask_iou(metrics.mask_from_white(images), (masks > 0.5).to(masks.dtype)),
    }  # fmt: skip
    if lpips is not None:
        values["lpips"], values["foreground_lpips"] = metrics.lpips_distances(lpips, images, targets, masks)
    unseen = [view for view in range(images.shape[1]) if view != reference_view]
    result = {name: float(value.mean()) for name, value in values.items()}
    result["unseen_difference_ratio"] = float(metrics.difference_ratio(images, targets, masks, reference_view).mean())
    return {**result, **{f"unseen_{name}": float(value[:, unseen].mean()) for name, value in values.items()}}


def consistency(images: Tensor, cameras: list[Cameras]) -> dict[str, float]:
    """Mean view consistency of images [b, n, 3, s, s] on white, seen by cameras [n]; none for fewer than 3 views."""
    if images.shape[1] < 3:
        return {}
    rows = [metrics.view_consistency(views, metrics.mask_from_white(views), own) for views, own in zip(images, cameras)]
    names = {"consistency": "score", "consistency_mask": "mask", "consistency_colour": "colour"}
    return {name: sum(row[key] for row in rows) / len(rows) for name, key in names.items()}


@torch.no_grad()
def evaluate(
    components: Components, unet, embeds: PromptEmbeds, dataset: MouseMVDiffusionDataset, *, count: int,
    guidance_scales: list[float], num_steps: int, seed: int,
) -> tuple[dict[str, float], Tensor]:  # fmt: skip
    """Generates the views of the first `count` samples on white. Returns figures named `vae/...`, `guidance_<g>/...`
    and `truth/consistency...`, and a contact sheet: per sample the targets, the autoencoder's version of them, and a
    row per guidance scale. LPIPS is measured where its VGG weights lie on disk."""
    lpips = metrics.load_lpips(unet.device) if metrics.lpips_backbone_path().is_file() else None
    components = replace(components, unet=unet)
    items = [dataset[index] for index in range(min(count, len(dataset)))]
    targets, masks = (torch.stack([item[name] for item in items]).to(unet.device) for name in ("targets", "masks"))
    references = torch.stack([item["reference"] for item in items])
    reference_view, views = embeds.rig.reference_view, targets.shape[1]
    rebuilt = torch.stack([decode_latents(components, condition_latents(components, views_)) for views_ in targets])
    rows = [targets, rebuilt]
    cameras = [Cameras(item["c2w"], item["fxfycxcy"], *targets.shape[-2:]).to(unet.device) for item in items]
    known = (targets, masks, reference_view, lpips)
    groups = {"vae": figures(rebuilt, *known), "truth": consistency(targets, cameras)}
    seeds = [seed + number for number in range(len(references))]
    for scale in guidance_scales:
        options = {"guidance_scale": scale, "num_steps": num_steps}
        batches = (slice(first, first + BATCH) for first in range(0, len(references), BATCH))
        generated = torch.cat(
            [generate_views(components, references[b], embeds, seeds=seeds[b], **options) for b in batches]
        )
        rows.append(generated)
        groups[f"guidance_{scale:g}"] = figures(generated, *known) | consistency(generated, cameras)
    sheet = torch.stack(rows, dim=1).flatten(0, 2)  # (sample, row, view)
    result = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
    return result, grid(sheet.cpu(), views)
