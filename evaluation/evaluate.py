"""What scripts/evaluate.py measures: predictions against true views, as records. No files, no flags, no tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multiview.consistency import view_consistency
from multiview.image import composite
from multiview.metrics import (
    foreground_psnr,
    foreground_ssim,
    lpips_distances,
    mask_from_white,
    mask_iou,
    psnr,
    ssim,
)
from pipeline.stages import PosedViews, paint_views, reconstruct, views_of_sample

if TYPE_CHECKING:
    from gslrm.model.gaussians import Gaussians
    from gslrm.model.gslrm import GSLRM
    from multiview.cameras import Cameras
    from multiview.rig import ViewRig
    from multiview.sample import Sample
    from mvdiffusion.components import Components
    from pipeline.artifacts import Artifacts

NOVEL, OTHER_RIG_VIEWS, RIG_VIEWS = "novel views", "rig views but the input", "rig views, inputs among them"
OWN = {"1": "Stage 1", "2": "Stage 2", "full": "whole chain"}  # what is measured, by stage
PAINTED = "the painted views, before Stage 2"
METRICS = (
    "foreground_psnr", "psnr", "foreground_ssim", "ssim", "mask_iou", "depth_error", "foreground_lpips", "lpips",
)  # fmt: skip
SMALLER_IS_BETTER = ("lpips", "foreground_lpips", "depth_error", "seconds", "peak_memory_mib")
WORST_SHARE = 0.05
# By the angle about the world's axis between a view and the input view, degrees: up to the number.
DIRECTIONS = {"near the input (to 60 deg)": 60.0, "side (60 to 120 deg)": 120.0, "back (beyond 120 deg)": 180.0}
# What of the animal the input view shows, by the azimuth of its nose less the input view's, in quarters about these.
SIDES = {0: "the head", 90: "its left side", 180: "the hindquarters", 270: "its right side"}
SURFACE = 0.5  # alpha or mask from here on is animal, where depth is compared


@dataclass(frozen=True)
class Prediction:
    """Pictures rgb [n, 3, h, w] 0..1 on white and masks [n, 1, h, w], beside the true RGBA views [n, 4, h, w].

    views: which of the sample's they are. depth, true_depth: [n, 1, h, w] camera-frame z in world units, 0 = no
    surface; None where the method or the sample has none.
    """

    rgb: Tensor
    mask: Tensor
    truth: Tensor
    views: tuple[int, ...] = ()
    depth: Tensor | None = None
    true_depth: Tensor | None = None

    @property
    def target(self) -> Tensor:
        """The true views [n, 3, h, w] on white."""
        return composite(self.truth, 1.0)


def compare(
    sample: Sample, views: Sequence[int], rgb: Tensor, mask: Tensor, depth: Tensor | None = None
) -> Prediction:  # fmt: skip
    """Pictures of the sample's `views` beside the truth."""
    views = list(views)
    true_depth = None if sample.depth is None else sample.depth[views]
    return Prediction(rgb, mask, sample.rgba[views], tuple(views), depth, true_depth)


# ---- what each stage is compared on ---------------------------------------------------------------------------------


def splits_of(stage: str, sample: Sample, rig: ViewRig) -> dict[str, list[int]]:
    """Views that a stage ("1", "2" or "full") is compared on, by name of the split; no view is an input.

    A sample without extra views (a real recording) leaves Stage 2 nothing but its inputs, under a name that says so.
    """
    others = [view for view in range(rig.num_views) if view != rig.reference_view]
    extra = list(range(rig.num_views, len(sample.rgba)))
    if stage == "1":
        return {OTHER_RIG_VIEWS: others}
    if stage == "2":
        return {NOVEL: extra} if extra else {RIG_VIEWS: list(range(rig.num_views))}
    return {NOVEL: extra, OTHER_RIG_VIEWS: others} if extra else {OTHER_RIG_VIEWS: others}


def paint(components: Components, artifacts: Artifacts, sample: Sample, *, seed: int) -> PosedViews:
    """Stage 1 on the sample's input view, which stands for itself among the views."""
    picture = sample.rgba[artifacts.rig.reference_view]
    return paint_views(components, artifacts, picture, seed=seed, keep_input_view=True)


def predict_stage1(painted: PosedViews, sample: Sample, splits: dict[str, list[int]]) -> dict[str, Prediction]:
    """By split: the painted views against the sample's; their masks are read off the white."""
    return {
        split: compare(sample, views, painted.rgb[views], mask_from_white(painted.rgb[views]))
        for split, views in splits.items()
    }


def reconstruct_sample(
    model: GSLRM, sample: Sample, num_rig_views: int, device: torch.device, *,
    views: tuple[int, ...] | None = None, seen_cameras: Cameras | None = None,
) -> Gaussians:  # fmt: skip
    """Stage 2 on the sample's true rig views. views: which of them go in; None: all.

    seen_cameras: [num_rig_views], what the model is told instead of the truth.
    """
    chosen = list(range(num_rig_views)) if views is None else list(views)
    cameras = (sample.cameras[:num_rig_views] if seen_cameras is None else seen_cameras)[chosen]
    return reconstruct(model, views_of_sample(sample.rgba[chosen], cameras), device)


def predict_gaussians(
    gaussians: Gaussians, sample: Sample, splits: dict[str, list[int]], device: torch.device
) -> dict[str, Prediction]:
    """By split: the Gaussians [1, n] as the sample's own cameras see them."""
    return {split: render_views(gaussians, sample, views, device) for split, views in splits.items()}


@torch.no_grad()
def render_views(gaussians: Gaussians, sample: Sample, views: Sequence[int], device: torch.device) -> Prediction:
    """The Gaussians [1, n] from the sample's own cameras, on white."""
    from gslrm.model.gaussians_renderer import render

    output = render(gaussians, sample.cameras[list(views)][None].to(device), background=1.0)
    rgb, mask, depth = output.rgb[0].cpu().clamp(0, 1), output.alpha[0].cpu(), output.mean_depth(SURFACE)[0].cpu()
    return compare(sample, views, rgb, mask, depth)


# ---- numbers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(prediction: Prediction, lpips: torch.nn.Module | None = None) -> list[dict[str, float]]:
    """Metrics of every view (METRICS). foreground_*: inside the true mask. lpips: with its network (`load_lpips`).

    depth_error: see `depth_errors`; only where both depths are there, and absent from a view in which they share no
    surface.
    """
    rgb, target, mask = prediction.rgb, prediction.target, prediction.truth[:, 3:]
    columns = {
        "foreground_psnr": foreground_psnr(rgb, target, mask), "psnr": psnr(rgb, target),
        "foreground_ssim": foreground_ssim(rgb, target, mask), "ssim": ssim(rgb, target),
        "mask_iou": mask_iou(prediction.mask, mask),
    }  # fmt: skip
    if prediction.depth is not None and prediction.true_depth is not None:
        columns["depth_error"] = depth_errors(prediction)
    if lpips is not None:
        device = next(lpips.parameters()).device
        whole, inside = lpips_distances(lpips, rgb.to(device), target.to(device), mask.to(device))
        columns["foreground_lpips"], columns["lpips"] = inside.cpu(), whole.cpu()
    records = [{name: columns[name][view].item() for name in METRICS if name in columns} for view in range(len(rgb))]
    return [{name: value for name, value in record.items() if not math.isnan(value)} for record in records]


def depth_errors(prediction: Prediction) -> Tensor:
    """Mean absolute difference of depth [n], world units along the optical axis, over the pixels that both show.

    Those pixels only: what is missing or too much is the mask's IoU. nan where there are none.
    """
    shown = (prediction.mask >= SURFACE) & (prediction.depth > 0)
    there = (prediction.truth[:, 3:] > SURFACE) & (prediction.true_depth > 0)
    common = (shown & there).float()
    difference = ((prediction.depth - prediction.true_depth).abs() * common).flatten(1).sum(1)
    return difference / common.flatten(1).sum(1)


def measure_consistency(rgb: Tensor, cameras: Cameras) -> dict[str, float]:
    """mask, colour and score of `view_consistency`, with masks read off the white: painted and true views alike."""
    figures = view_consistency(rgb, mask_from_white(rgb), cameras)
    return {name: figures[name] for name in ("score", "mask", "colour")}


def angle_from_input(cameras: Cameras, reference: int) -> list[float]:
    """Degrees 0..180 about the world's axis between each view [v] and the input view, to a tenth."""
    azimuth = cameras.azimuth_deg.double()
    return [round(abs((float(a) + 180.0) % 360.0 - 180.0), 1) for a in azimuth - azimuth[reference]]


def direction_of(angle_deg: float) -> str:
    """The name in DIRECTIONS of an angle from the input view, 0..180."""
    return next(name for name, limit in DIRECTIONS.items() if angle_deg <= limit)


def side_shown(sample: Sample, reference: int) -> str | None:
    """The name in SIDES of what the input view shows; None where the sample does not say where the nose points."""
    heading = sample.extra.get("synthetic", {}).get("heading_deg")
    if heading is None:
        return None
    quarter = round((heading - float(sample.cameras.azimuth_deg[reference])) / 90.0) % 4
    return SIDES[90 * quarter]


# ---- summaries ------------------------------------------------------------------------------------------------------


def metric_names(records: list[dict]) -> list[str]:
    """The metrics that any of the records holds, in a fixed order."""
    return [name for name in METRICS if any(name in record for record in records)]


def summarise(records: list[dict], names: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Per metric the mean, median and the value that the worst 5 % of the records do not exceed.

    names: which; None: all metrics that the records hold. A metric that no record holds is left out.
    """
    summary = {}
    for name in metric_names(records) if names is None else names:
        values = [record[name] for record in records if name in record]
        if not values:
            continue
        values.sort(reverse=name in SMALLER_IS_BETTER)
        summary[name] = {
            "mean": statistics.fmean(values),
            "median": statistics.median(values),
            "worst_5_percent": values[max(0, round(WORST_SHARE * len(values)) - 1)],
        }
    return summary


def mean_by(records: list[dict], key: str, name: str) -> dict[str, float]:
    """Mean of the metric `name` by value of `key`, in order of appearance; values whose records lack it are absent."""
    return {
        value: statistics.fmean(numbers)
        for value in dict.fromkeys(record[key] for record in records)
        if (numbers := [record[name] for record in records if record[key] == value and name in record])
    }


def margins(records: list[dict], of: str, split: str) -> list[dict]:
    """How far the method `of` lies above each other one, mouse by mouse: rows with method, and per metric the mean
    difference, its standard error over mice and the share of mice on which it is better."""
    rows, chosen = [], [record for record in records if record["split"] == split]
    own = [record for record in chosen if record["method"] == of]
    for method in dict.fromkeys(record["method"] for record in chosen):
        other = [record for record in chosen if record["method"] == method]
        if method == of or not own:
            continue
        row: dict = {"method": method}
        for name in ("foreground_psnr", "mask_iou"):
            mine, theirs = mean_by(own, "sample", name), mean_by(other, "sample", name)
            differences = [mine[sample] - theirs[sample] for sample in mine if sample in theirs]
            spread = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
            row[name] = {
                "mean": statistics.fmean(differences), "standard_error": spread,
                "better_share": sum(difference > 0 for difference in differences) / len(differences),
            }  # fmt: skip
        rows.append(row)
    return rows


# ---- one sample -----------------------------------------------------------------------------------------------------


def records_of(
    head: dict, predictions: dict[str, dict[str, Prediction]], angles: list[float], lpips: torch.nn.Module | None
) -> list[dict]:
    """One record per method, split and view. predictions: method -> split -> prediction. angles: `angle_from_input`."""
    return [
        {
            **head, "method": method, "split": split, "view": view, "angle_deg": angles[view],
            "direction": direction_of(angles[view]), **metrics,
        }
        for method, by_split in predictions.items()
        for split, prediction in by_split.items()
        for view, metrics in zip(prediction.views, measure(prediction, lpips))
    ]  # fmt: skip


def consistency_of(painted: PosedViews, sample: Sample, num_rig_views: int, *, copied: Tensor | None) -> dict:
    """By whose views: figures of `measure_consistency`, and as a share of the true views' own score (`of_truth`).

    copied: [3, h, w], the input view as all views, if that is wanted beside them.
    """
    cameras = sample.cameras[:num_rig_views]
    sets = {"painted views": painted.rgb, "true views": composite(sample.rgba[:num_rig_views], 1.0)}
    if copied is not None:
        sets["input copied"] = copied.expand(num_rig_views, -1, -1, -1)
    found = {name: measure_consistency(rgb, cameras) for name, rgb in sets.items()}
    own = found["true views"]["score"]
    return {name: {**figures, "of_truth": figures["score"] / own} for name, figures in found.items()}
