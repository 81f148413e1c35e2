"""What scripts/evaluate.py measures: predictions against true views, as records and tables. No files, no flags."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chain.stages import paint_views, reconstruct, views_of_sample
from multiview.image import composite
from multiview.metrics import foreground_psnr, mask_from_white, mask_iou, psnr, ssim

if TYPE_CHECKING:
    from chain.artifacts import Artifacts
    from gslrm.model.gaussians import Gaussians
    from gslrm.model.gslrm import GSLRM
    from multiview.cameras import Cameras
    from multiview.sample import Sample
    from mvdiffusion.components import Components

NOVEL, RIG_VIEWS = "novel views", "rig views, inputs among them"
SMALLER_IS_BETTER = ("lpips",)


@dataclass(frozen=True)
class Prediction:
    """Pictures rgb [n, 3, h, w] 0..1 on white and masks [n, 1, h, w], beside the true RGBA views [n, 4, h, w]."""

    rgb: Tensor
    mask: Tensor
    truth: Tensor

    @property
    def target(self) -> Tensor:
        """The true views [n, 3, h, w] on white."""
        return composite(self.truth, 1.0)


def predict_stage1(components: Components, artifacts: Artifacts, sample: Sample, *, seed: int) -> dict[str, Prediction]:
    """By split: the painted views against the sample's, and the input copied as a baseline."""
    reference, others = artifacts.rig.reference_view, _other_views(artifacts)
    painted = paint_views(components, artifacts, sample.rgba[reference], seed=seed, keep_input_view=True).rgb
    copied = painted[reference].expand(len(others), -1, -1, -1)
    return {
        "painted views": Prediction(painted[others], mask_from_white(painted[others]), sample.rgba[others]),
        "baseline: input copied": Prediction(copied, mask_from_white(copied), sample.rgba[others]),
    }


def predict_stage2(
    model: GSLRM, sample: Sample, num_rig_views: int, device: torch.device, *,
    views: tuple[int, ...] | None = None, seen_cameras: Cameras | None = None,
) -> dict[str, Prediction]:  # fmt: skip
    """The sample's rig views -> Gaussians, rendered from its extra views by their true cameras.

    A sample without extra views (a real recording) is rendered from all its rig views instead, under another name.
    views: which rig views go in; None: all. seen_cameras: [num_rig_views], what the model is told instead of the truth.
    """
    chosen = list(range(num_rig_views)) if views is None else list(views)
    cameras = (sample.cameras[:num_rig_views] if seen_cameras is None else seen_cameras)[chosen]
    gaussians = reconstruct(model, views_of_sample(sample.rgba[chosen], cameras), device)
    extra = list(range(num_rig_views, len(sample.rgba)))
    if extra:
        return {NOVEL: render_views(gaussians, sample, extra, device)}
    return {RIG_VIEWS: render_views(gaussians, sample, list(range(num_rig_views)), device)}


def predict_chain(
    components: Components, model: GSLRM, artifacts: Artifacts, sample: Sample, device: torch.device, *, seed: int
) -> dict[str, Prediction]:
    """One photograph through both stages, rendered from the sample's other views."""
    views = paint_views(
        components, artifacts, sample.rgba[artifacts.rig.reference_view], seed=seed, keep_input_view=True
    )
    gaussians = reconstruct(model, views, device)
    extra = list(range(artifacts.rig.num_views, len(sample.rgba)))
    splits = {NOVEL: extra, "rig views but the input": _other_views(artifacts)}
    return {split: render_views(gaussians, sample, index, device) for split, index in splits.items() if index}


def _other_views(artifacts: Artifacts) -> list[int]:
    return [view for view in range(artifacts.rig.num_views) if view != artifacts.rig.reference_view]


@torch.no_grad()
def render_views(gaussians: Gaussians, sample: Sample, views: list[int], device: torch.device) -> Prediction:
    """The Gaussians [1, n] from the sample's own cameras, on white."""
    from gslrm.model.gaussians_renderer import render

    output = render(gaussians, sample.cameras[views][None].to(device), background=1.0)
    return Prediction(output.rgb[0].cpu().clamp(0, 1), output.alpha[0].cpu(), sample.rgba[views])


# ---- numbers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(prediction: Prediction, lpips: torch.nn.Module | None = None) -> list[dict[str, float]]:
    """Metrics of every view: foreground_psnr (inside the true mask), psnr, ssim, mask_iou; lpips with its network."""
    target, mask = prediction.target, prediction.truth[:, 3:]
    columns = {
        "foreground_psnr": foreground_psnr(prediction.rgb, target, mask), "psnr": psnr(prediction.rgb, target),
        "ssim": ssim(prediction.rgb, target), "mask_iou": mask_iou(prediction.mask, mask),
    }  # fmt: skip
    if lpips is not None:
        device = next(lpips.parameters()).device
        columns["lpips"] = lpips(prediction.rgb.to(device) * 2 - 1, target.to(device) * 2 - 1).flatten().cpu()
    return [{name: values[view].item() for name, values in columns.items()} for view in range(len(target))]


def metric_names(records: list[dict]) -> list[str]:
    """The metrics that the records hold, in a fixed order."""
    return [name for name in ("foreground_psnr", "psnr", "ssim", "mask_iou", "lpips") if name in records[0]]


def summarise(records: list[dict]) -> dict[str, dict[str, float]]:
    """Per metric the mean, median and the value that the worst 5 % of the records do not exceed."""
    summary = {}
    for name in metric_names(records):
        values = sorted((record[name] for record in records), reverse=name in SMALLER_IS_BETTER)
        worst = values[max(0, round(0.05 * len(values)) - 1)]
        summary[name] = {
            "mean": statistics.fmean(values),
            "median": statistics.median(values),
            "worst_5_percent": worst,
        }
    return summary


def table(records: list[dict], by: str, heading: str) -> str:
    """Markdown: one row per value of the key `by`, in the order in which the values appear."""
    names = metric_names(records)
    lines = [f"| {heading} | mice | views | " + " | ".join(f"{name} mean (median, worst 5 %)" for name in names) + " |"]
    lines.append("|---" * (3 + len(names)) + "|")
    for value in dict.fromkeys(record[by] for record in records):
        rows = [record for record in records if record[by] == value]
        cells = [
            f"{numbers['mean']:.3f} ({numbers['median']:.3f}, {numbers['worst_5_percent']:.3f})"
            for numbers in summarise(rows).values()
        ]
        mice = len({record["sample"] for record in rows})
        lines.append(f"| {value} | {mice} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
