"""What predicts views of a held-out mouse, and how a prediction is measured: the model itself, and what stands beside.

Baselines need no training, and each says what it was given. The input view alone: `copy`, `nearest`. The views that
Stage 2 gets: `hull` (true views for stage 2, generated ones for both stages together). More than the stage gets, so an
upper bound for it: `six_views` for both stages, `autoencoder` for Stage 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gslrm.model.gaussians import Gaussians
from gslrm.model.gaussians_renderer import render
from multiview import metrics
from multiview.cameras import Cameras
from multiview.hull import carve, colour_surface, render_hull, surface
from multiview.image import composite, resize_rgba
from multiview.rig import ViewRig, check_alignment
from multiview.sample import Sample, read_dataset_info, read_sample, read_split
from pipeline.model import MouseFaceLift
from pipeline.outputs import PosedViews

NOVEL, OTHER_RIG_VIEWS, RIG_VIEWS = "novel views", "rig views but the input", "rig views, inputs among them"
OWN = {"1": "Stage 1", "2": "Stage 2", "full": "whole chain"}  # the model, by stage
# Labels as in stored metrics.json.
GENERATED = "the painted views, before Stage 2"
COPY, NEAREST = "baseline: input copied", "baseline: nearest training mouse"
HULL_OF_GENERATED = "baseline: hull of the painted views"
# Stage 2 is given the true rig views as well; both stages together are given one of them.
HULL_OF_TRUE = {"2": "baseline: hull of all true rig views", "full": "upper bound: hull of all true rig views"}
SHOWN = (HULL_OF_GENERATED, *HULL_OF_TRUE.values(), NEAREST)  # on contact sheets: the first of these that is measured
METRICS = (
    "foreground_psnr", "psnr", "foreground_ssim", "ssim", "mask_iou", "depth_error", "foreground_lpips", "lpips",
)  # fmt: skip
# By the angle about the world's axis between a view and the input view, degrees: up to the number.
DIRECTIONS = {"near the input (to 60 deg)": 60.0, "side (60 to 120 deg)": 120.0, "back (beyond 120 deg)": 180.0}
# What of the animal the input view shows, by the azimuth of its nose less the input view's, in quarters about these.
SIDES = {0: "the head", 90: "its left side", 180: "the hindquarters", 270: "its right side"}
SURFACE = 0.5  # alpha or mask from here on is animal, where depth is compared
FEATURE_SIZE = 32  # input views are compared at this size by `nearest`


class Prediction(NamedTuple):
    """Images rgb [n, 3, h, w] 0..1 on white and masks [n, 1, h, w] of some of a sample's views, by their numbers.
    depth: [n, 1, h, w] camera-frame z in world units, 0 = no surface; None where the method has none."""

    views: list[int]
    rgb: Tensor
    mask: Tensor
    depth: Tensor | None = None

    @staticmethod
    def of(views: list[int], rgb: Tensor) -> Prediction:
        """Returns images whose masks are read off the white."""
        return Prediction(views, rgb, metrics.mask_from_white(rgb))


def read(folder: Path, model: MouseFaceLift, stage: str) -> Sample:
    """Returns a sample at the size of the stage's model, with depth if Stage 2 is measured and the sample has it."""
    size = model.network.config.image_tokenizer.image_size if stage == "2" else model.image_size
    return read_sample(folder, image_size=size, with_depth=stage != "1" and (folder / "depth").is_dir())


def splits_of(stage: str, sample: Sample, rig: ViewRig) -> dict[str, list[int]]:
    """Returns by name the views that a stage ("1", "2" or "full") is compared on; no view is an input. A sample without
    extra views (a real recording) leaves Stage 2 nothing but its inputs, under a name that says so."""
    others = {OTHER_RIG_VIEWS: [view for view in range(rig.num_views) if view != rig.reference_view]}
    extra = {NOVEL: list(range(rig.num_views, len(sample.rgba)))} if len(sample.rgba) > rig.num_views else {}
    if stage == "2":
        return extra or {RIG_VIEWS: list(range(rig.num_views))}
    return others if stage == "1" else {**extra, **others}


# ---- the model and its baselines ------------------------------------------------------------------------------------


def reconstruct(
    model: MouseFaceLift, sample: Sample, views: Sequence[int] | None = None, noisy: Cameras | None = None
) -> Gaussians:
    """Returns Stage 2's Gaussians of the sample's true rig views, or of those in `views`. noisy: cameras [rig views]
    that the model is told instead of the truth."""
    chosen = list(range(model.rig.num_views) if views is None else views)
    return model.predict(PosedViews.of(sample.rgba[chosen], (sample.cameras if noisy is None else noisy)[chosen]))


@torch.no_grad()
def predict_gaussians(gaussians: Gaussians, sample: Sample, views: list[int]) -> Prediction:
    """Returns the Gaussians [1, n] as the sample's own cameras see them, on white."""
    output = render(gaussians, sample.cameras[views][None].to(gaussians.device), background=1.0)
    # Off the GPU at once: metrics of all methods are compared on the CPU, in float32.
    images = output.rgb.clamp(0, 1), output.alpha, output.mean_depth(SURFACE)
    return Prediction(views, *(image[0].cpu() for image in images))


def predict_baselines(
    stage: str, names: Sequence[str], sample: Sample, model: MouseFaceLift, *, generated: PosedViews | None,
    training: TrainingMice | None,
) -> tuple[dict[str, Prediction], dict[str, str]]:  # fmt: skip
    """Returns the predictions by label of the baselines in `names` that apply, and what each was given. What was given
    the true rig views is compared on views outside the rig only, unless the sample has no others."""
    rig, splits, true = model.rig, splits_of(stage, sample, model.rig), sample.rgba
    views = sum(splits.values(), [])
    unseen = views if stage == "2" else splits.get(NOVEL, [])
    others = [view for view in views if view != rig.reference_view]
    image, mice = composite(true[rig.reference_view], 1.0), 0 if training is None else len(training.folders)
    rig_views = PosedViews.of(true[: rig.num_views], sample.cameras[: rig.num_views])
    seen = "all true rig views with their true masks; compared on views outside the rig only"
    rows = [  # name, stages it applies to, label, what it was given, prediction
        (  # against itself a copy is perfect, and says nothing
            "copy", "1 2 full", COPY, "the input view; shown unchanged as every other view",
            lambda: Prediction.of(others, image.expand(len(others), -1, -1, -1)),
        ),
        (
            "nearest", "1 2 full" if mice else "", NEAREST,
            f"the input view; of {mice} training mice the one whose input view is "
            "nearest in mask and colour. Rig views: that mouse's own. Novel views: the hull of its true rig views",
            lambda: training.predict(sample, views),
        ),
        (
            "hull", "full", HULL_OF_GENERATED,
            "what Stage 2 is given: the input with its mask, the painted views with masks read off the white",
            lambda: predict_hull(generated, sample, views),
        ),
        (
            "hull", "2 full" if unseen else "", HULL_OF_TRUE.get(stage), seen,
            lambda: predict_hull(rig_views, sample, unseen),
        ),
        (
            "refined", "2", "Stage 2, refined", "all true rig views; fitted to them from Stage 2 or their hull",
            lambda: predict_gaussians(refined(model, rig_views), sample, unseen),
        ),
        (
            "autoencoder", "1", "upper bound: the true views through the autoencoder",
            "the views themselves; only encoded and decoded, as every painted view is",
            lambda: Prediction.of(views, autoencoded(model, composite(true[views], 1.0))),
        ),
        (
            "six_views", "full" if unseen else "", "upper bound: Stage 2 from all true rig views", seen,
            lambda: predict_gaussians(reconstruct(model, sample), sample, unseen),
        ),
    ]  # fmt: skip
    rows = [row for row in rows if row[0] in names and stage in row[1].split()]
    return {label: predict() for *_, label, _, predict in rows}, {label: told for *_, label, told, _ in rows}


def refined(model: MouseFaceLift, posed: PosedViews) -> Gaussians:
    """Returns the Gaussians [1, n] fitted to posed views as inference_mouse.py does."""
    return model.reconstruct(posed.rgb, posed.masks, posed.cameras).gaussians


@torch.no_grad()
def autoencoded(model: MouseFaceLift, images: Tensor) -> Tensor:
    """Returns images [n, 3, h, w] encoded and decoded by Stage 1's autoencoder, which it cannot surpass by much."""
    from mvdiffusion.latents import condition_latents, decode_latents

    with model.components.on_device("vae"):  # with cpu_offload it waits elsewhere
        latents = condition_latents(model.components, images.to(model.components.device))
        return decode_latents(model.components, latents).cpu()


def predict_hull(posed: PosedViews, sample: Sample, views: list[int]) -> Prediction:
    """Returns the visual hull of posed views in their projected colors as the sample's cameras see it. Masks that share
    no volume leave an empty hull: white images, empty masks."""
    hull, cameras = carve(posed.masks, posed.cameras), sample.cameras[views]
    if not len(hull.index):
        empty = torch.zeros(len(views), 1, cameras.height, cameras.width)
        return Prediction(views, 1.0 - empty.expand(-1, 3, -1, -1), empty, empty)
    shell = colour_surface(surface(hull), posed.rgb, posed.masks, posed.cameras)
    return Prediction(views, *render_hull(shell, cameras))


class TrainingMice:
    """Input views of a training list, small. folders: [n]; features: [n, d], colors weighted by the mask, and the mask.
    Raises ValueError for another rig, and where a held-out sample is in the training list."""

    def __init__(self, list_file: Path, rig: ViewRig, held_out: Sequence[Path]) -> None:
        check_alignment(rig, dataset=read_dataset_info(list_file)["rig"])
        self.rig, self.folders = rig, read_split(list_file)
        # A training mouse among the held-out ones would be its own nearest neighbor.
        shared = {folder.resolve() for folder in self.folders} & {folder.resolve() for folder in held_out}
        if shared:
            raise ValueError(
                f"--train_data {list_file} and --data share {len(shared)} samples ({min(shared).name} ...): they are "
                "not held out; name two lists without common samples"
            )
        inputs = (read_sample(folder, views=[rig.reference_view], image_size=FEATURE_SIZE) for folder in self.folders)
        self.features = torch.stack([self._features(sample.rgba[0]) for sample in inputs])

    @staticmethod
    def _features(rgba: Tensor) -> Tensor:
        return torch.cat([rgba[:3] * rgba[3:], rgba[3:]]).flatten()

    def predict(self, sample: Sample, views: list[int]) -> Prediction:
        """Returns the own views, where the rig has them, of the mouse whose input is nearest; its hull elsewhere."""
        features = self._features(resize_rgba(sample.rgba[self.rig.reference_view], FEATURE_SIZE))
        nearest = self.folders[int((self.features - features).square().sum(1).argmin())]
        mouse = read_sample(nearest, num_views=self.rig.num_views, image_size=sample.cameras.width)
        posed, number = PosedViews.of(mouse.rgba, mouse.cameras), self.rig.num_views
        novel, known = [view for view in views if view >= number], [view for view in views if view < number]
        masks = posed.masks[known]
        own = Prediction(known, posed.rgb[known], masks, torch.zeros_like(masks))  # no depth: not compared
        if not novel:
            return own
        hull = predict_hull(posed, sample, novel)
        return Prediction(novel + known, *(torch.cat(pair) for pair in zip(hull[1:], own[1:])))


# ---- measuring ------------------------------------------------------------------------------------------------------


def records_of(
    head: dict, predictions: dict[str, Prediction], sample: Sample, splits: dict[str, list[int]], reference: int,
    lpips: torch.nn.Module | None,
) -> list[dict]:  # fmt: skip
    """Returns one record per method and view: head, what was compared, and its metrics."""
    azimuth = sample.cameras.azimuth_deg.double()
    split_of = {view: split for split, views in splits.items() for view in views}
    angles = [round(abs((float(a) + 180.0) % 360.0 - 180.0), 1) for a in azimuth - azimuth[reference]]
    return [
        {
            **head, "method": method, "split": split_of[view], "view": view, "angle_deg": angles[view],
            "direction": next(name for name, limit in DIRECTIONS.items() if angles[view] <= limit), **figures,
        }
        for method, prediction in predictions.items()
        for view, figures in zip(prediction.views, measure(prediction, sample, lpips))
    ]  # fmt: skip


@torch.no_grad()
def measure(prediction: Prediction, sample: Sample, lpips: torch.nn.Module | None = None) -> list[dict[str, float]]:
    """Returns the METRICS of every view. foreground_*: inside the true mask. lpips: with its network (`load_lpips`).

    depth_error: mean absolute difference of depth in world units along the optical axis, over the pixels where both
    show a surface (what is missing or too much is the mask's IoU); absent where a depth is, or no such pixel.
    """
    views, rgb, shown, depth = prediction
    target, mask = composite(sample.rgba[views], 1.0), sample.rgba[views, 3:]
    columns = {
        "foreground_psnr": metrics.foreground_psnr(rgb, target, mask), "psnr": metrics.psnr(rgb, target),
        "foreground_ssim": metrics.foreground_ssim(rgb, target, mask), "ssim": metrics.ssim(rgb, target),
        "mask_iou": metrics.mask_iou(shown, mask),
    }  # fmt: skip
    if depth is not None and sample.depth is not None:
        true_depth = sample.depth[views]
        common = ((shown >= SURFACE) & (depth > 0) & (mask > SURFACE) & (true_depth > 0)).float()
        difference = ((depth - true_depth).abs() * common).flatten(1).sum(1)
        columns["depth_error"] = difference / common.flatten(1).sum(1)
    if lpips is not None:
        device = next(lpips.parameters()).device
        whole, inside = metrics.lpips_distances(lpips, rgb.to(device), target.to(device), mask.to(device))
        columns["foreground_lpips"], columns["lpips"] = inside.cpu(), whole.cpu()
    records = [{name: columns[name][k].item() for name in METRICS if name in columns} for k in range(len(rgb))]
    return [{name: value for name, value in record.items() if not math.isnan(value)} for record in records]


def kind_of(sample: Sample, reference: int) -> dict[str, str]:
    """Returns, where they are known, the animal's `pose`, and by the nose's heading the name in SIDES of what the input
    view shows, `input_shows`."""
    told = sample.extra.get("synthetic", {})
    found = {"pose": told["pose"]} if "pose" in told else {}
    if "heading_deg" in told:
        turned = told["heading_deg"] - float(sample.cameras.azimuth_deg[reference])
        found["input_shows"] = SIDES[90 * (round(turned / 90.0) % 4)]
    return found


def consistency_of(generated: PosedViews, sample: Sample, rig: ViewRig, *, with_copy: bool) -> dict[str, dict]:
    """Returns by whose views score, mask and colour of `view_consistency`, and the score over the true views' own.
    Masks are read off the white: generated and true views alike. with_copy: also of the input view as all views."""
    cameras, true = sample.cameras[: rig.num_views], composite(sample.rgba[: rig.num_views], 1.0)
    sets, found = {"painted views": generated.rgb, "true views": true}, {}
    if with_copy:
        sets["input copied"] = true[rig.reference_view].expand(rig.num_views, -1, -1, -1)
    for name, rgb in sets.items():
        figures = metrics.view_consistency(rgb, metrics.mask_from_white(rgb), cameras)
        found[name] = {key: figures[key] for key in ("score", "mask", "colour")}
    own = found["true views"]["score"]
    return {name: {**figures, "of_truth": figures["score"] / own} for name, figures in found.items()}
