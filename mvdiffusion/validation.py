"""What the pipeline makes of known samples: figures and a picture, beside what the autoencoder alone makes of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.image import grid
from multiview.metrics import (
    difference_ratio,
    foreground_psnr,
    foreground_ssim,
    load_lpips,
    lpips_backbone_path,
    lpips_distances,
    mask_from_white,
    mask_iou,
    psnr,
    ssim,
    view_consistency,
)
from mvdiffusion.components import Components
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset
from mvdiffusion.latents import condition_latents, decode_latents
from mvdiffusion.pipelines.multiview import generate_views
from mvdiffusion.prompts import PromptEmbeds

BATCH = 2  # objects generated at once


def figures(
    pictures: Tensor, targets: Tensor, masks: Tensor, reference_view: int, lpips: torch.nn.Module | None = None
) -> dict[str, float]:
    """Means over objects and views of pictures [b, n, 3, s, s]; `unseen_*` leaves the reference view out."""
    found = {
        "psnr": psnr(pictures, targets),
        "foreground_psnr": foreground_psnr(pictures, targets, masks),
        "ssim": ssim(pictures, targets),
        "foreground_ssim": foreground_ssim(pictures, targets, masks),
        "mask_iou": mask_iou(mask_from_white(pictures), (masks > 0.5).to(masks.dtype)),
    }
    if lpips is not None:
        found["lpips"], found["foreground_lpips"] = lpips_distances(lpips, pictures, targets, masks)
    unseen = [view for view in range(pictures.shape[1]) if view != reference_view]
    result = {name: float(value.mean()) for name, value in found.items()}
    result["unseen_difference_ratio"] = float(difference_ratio(pictures, targets, masks, reference_view).mean())
    return {**result, **{f"unseen_{name}": float(value[:, unseen].mean()) for name, value in found.items()}}


def consistency(pictures: Tensor, cameras: list[Cameras]) -> dict[str, float]:
    """Mean view consistency of pictures [b, n, 3, s, s] on white, seen by cameras [n] of each object.

    Empty for rigs of fewer than 3 views: a hull of the others needs two of them.
    """
    if pictures.shape[1] < 3:
        return {}
    found = [view_consistency(views, mask_from_white(views), own) for views, own in zip(pictures, cameras)]
    names = {"consistency": "score", "consistency_mask": "mask", "consistency_colour": "colour"}
    return {name: sum(row[key] for row in found) / len(found) for name, key in names.items()}


def add(result: dict[str, float], group: str, values: dict[str, float]) -> None:
    """Puts values into result under `<group>/<name>`."""
    result.update({f"{group}/{name}": value for name, value in values.items()})


@torch.no_grad()
def evaluate(
    components: Components,
    unet,
    embeds: PromptEmbeds,
    dataset: MouseMVDiffusionDataset,
    *,
    count: int,
    guidance_scales: list[float],
    num_steps: int,
    seed: int,
) -> tuple[dict[str, float], Tensor]:
    """Generates the views of the first `count` samples on white.

    Returns figures named `vae/...` and `guidance_<g>/...`, beside `truth/consistency...` of the targets themselves, and
    a contact sheet: per sample the targets, the autoencoder's version of them, and a row per guidance scale.
    LPIPS is measured where its VGG weights lie on disk (`multiview.metrics.lpips_backbone_path`).
    """
    lpips = load_lpips(unet.device) if lpips_backbone_path().is_file() else None
    components = replace(components, unet=unet)
    items = [dataset[index] for index in range(min(count, len(dataset)))]
    targets, masks = (torch.stack([item[name] for item in items]).to(unet.device) for name in ("targets", "masks"))
    references = torch.stack([item["reference"] for item in items])
    reference_view, views = embeds.rig.reference_view, targets.shape[1]
    rebuilt = torch.stack([decode_latents(components, condition_latents(components, views_)) for views_ in targets])
    rows, result = [targets, rebuilt], {}
    cameras = [Cameras(item["c2w"], item["fxfycxcy"], *targets.shape[-2:]).to(unet.device) for item in items]
    add(result, "vae", figures(rebuilt, targets, masks, reference_view, lpips))
    add(result, "truth", consistency(targets, cameras))
    for scale in guidance_scales:
        generated = torch.cat(
            [
                generate_views(
                    components, part, embeds,
                    seeds=[seed + first + k for k in range(len(part))], guidance_scale=scale, num_steps=num_steps,
                )
                for first, part in ((i, references[i : i + BATCH]) for i in range(0, len(references), BATCH))
            ]
        )  # fmt: skip
        rows.append(generated)
        add(result, f"guidance_{scale:g}", figures(generated, targets, masks, reference_view, lpips))
        add(result, f"guidance_{scale:g}", consistency(generated, cameras))
    sheet = torch.stack(rows, dim=1).flatten(0, 2)  # (sample, row, view)
    return result, grid(sheet.cpu(), views)
