"""What a number of scripts/evaluate.py has beside it: predictions that need no training, and upper bounds.

Each says what it was given. The input view alone: `copy`, `nearest`. The views that Stage 2 gets: `hull` (true views
for stage 2, painted ones in the chain). More than the stage gets, so an upper bound for it: `six_views` for the chain,
`autoencoder` for Stage 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation.evaluate import NOVEL, Prediction, compare, predict_gaussians, reconstruct_sample
from multiview.hull import carve, colour_surface, render_hull, surface
from multiview.image import composite, resize_rgba
from multiview.metrics import mask_from_white
from multiview.rig import check_alignment
from multiview.sample import read_dataset_info, read_sample, read_split
from pipeline.stages import PosedViews, views_of_sample

if TYPE_CHECKING:
    from gslrm.model.gslrm import GSLRM
    from multiview.cameras import Cameras
    from multiview.rig import ViewRig
    from multiview.sample import Sample
    from mvdiffusion.components import Components

COPY, NEAREST = "baseline: input copied", "baseline: nearest training mouse"
HULL_OF_PAINTED = "baseline: hull of the painted views"
HULL_OF_TRUE = "{kind}: hull of all true rig views"
SIX_VIEWS = "upper bound: Stage 2 from all true rig views"
AUTOENCODER = "upper bound: the true views through the autoencoder"
NAMES = {  # by stage
    "1": ("copy", "nearest", "autoencoder"), "2": ("copy", "nearest", "hull"),
    "full": ("copy", "nearest", "hull", "six_views"),
}  # fmt: skip
FEATURE_SIZE = 32  # input views are compared at this size


def hull_of_true(stage: str) -> str:
    """The label of that hull: Stage 2 is given the same views, the chain fewer."""
    return HULL_OF_TRUE.format(kind="baseline" if stage == "2" else "upper bound")


def describe(stage: str, names: tuple[str, ...], training: TrainingMice | None) -> dict[str, str]:
    """What each baseline was given, by label; those in `names` that apply to the stage."""
    told = {}
    if "copy" in names:
        told[COPY] = "the input view; shown unchanged as every other view"
    if "nearest" in names and training is not None:
        told[NEAREST] = (
            f"the input view; of {len(training.folders)} training mice the one whose input view is nearest in mask and "
            "colour. Rig views: that mouse's own. Novel views: the hull of its true rig views"
        )
    if "hull" in names and stage == "full":
        told[HULL_OF_PAINTED] = (
            "what Stage 2 is given: the input with its mask, the painted views with masks read off the white"
        )
    if "hull" in names and stage != "1":
        told[hull_of_true(stage)] = "all true rig views with their true masks; compared on views outside the rig only"
    if "autoencoder" in names and stage == "1":
        told[AUTOENCODER] = "the views themselves; only encoded and decoded, as every painted view is"
    if "six_views" in names and stage == "full":
        told[SIX_VIEWS] = "all true rig views with their true masks; compared on views outside the rig only"
    return told


# ---- predictions ----------------------------------------------------------------------------------------------------


def copy_input(sample: Sample, splits: dict[str, list[int]], reference: int) -> dict[str, Prediction]:
    """The input view [4, h, w] as every view; its mask read off the white, as a painted view's is."""
    picture = composite(sample.rgba[reference], 1.0)
    mask = mask_from_white(picture)
    return {
        split: compare(sample, views, picture.expand(len(views), -1, -1, -1), mask.expand(len(views), -1, -1, -1))
        for split, views in splits.items()
    }


@torch.no_grad()
def predict_autoencoder(
    components: Components, sample: Sample, splits: dict[str, list[int]]
) -> dict[str, Prediction]:  # fmt: skip
    """The true views encoded and decoded by Stage 1's autoencoder: what no painting can surpass by much."""
    from mvdiffusion.latents import condition_latents, decode_latents

    predictions = {}
    for split, views in splits.items():
        pictures = composite(sample.rgba[views], 1.0).to(components.device)
        with components.on_device("vae"):
            rgb = decode_latents(components, condition_latents(components, pictures)).cpu()
        predictions[split] = compare(sample, views, rgb, mask_from_white(rgb))
    return predictions


def show_hull(views: PosedViews, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor]:
    """The visual hull of posed views in their projected colours, from cameras [n]: rgb, mask, depth as Prediction's.

    Masks that share no volume leave an empty hull: white pictures, empty masks.
    """
    hull = carve(views.masks, views.cameras)
    if not len(hull.index):
        empty = torch.zeros(len(cameras), 1, cameras.height, cameras.width)
        return 1.0 - empty.expand(-1, 3, -1, -1), empty, empty
    return render_hull(colour_surface(surface(hull), views.rgb, views.masks, views.cameras), cameras)


def predict_hull(views: PosedViews, sample: Sample, splits: dict[str, list[int]]) -> dict[str, Prediction]:
    """The hull of `views` as the sample's cameras of each split see it."""
    wanted = [view for views_of_split in splits.values() for view in views_of_split]
    shown = dict(zip(wanted, zip(*show_hull(views, sample.cameras[wanted]))))
    return {
        split: compare(sample, chosen, *(torch.stack(part) for part in zip(*(shown[view] for view in chosen))))
        for split, chosen in splits.items()
    }


@dataclass(frozen=True)
class TrainingMice:
    """Input views of a training list, small. folders: [n]; features: [n, d]."""

    folders: list[Path]
    features: Tensor
    rig: ViewRig

    @staticmethod
    def read(list_file: Path, rig: ViewRig, held_out: list[Path]) -> TrainingMice:
        """Raises ValueError for another rig, and where a held-out sample is in the training list."""
        check_alignment(rig, dataset=read_dataset_info(list_file.parent)["rig"])
        folders = read_split(list_file)
        shared = {folder.resolve() for folder in folders} & {folder.resolve() for folder in held_out}
        if shared:
            raise ValueError(
                f"--train_data {list_file} and --data share {len(shared)} samples ({min(shared).name} ...): they are "
                "not held out; name two lists without common samples"
            )
        pictures = [
            read_sample(folder, views=[rig.reference_view], image_size=FEATURE_SIZE).rgba[0] for folder in folders
        ]
        return TrainingMice(folders, torch.stack([_features(picture) for picture in pictures]), rig)

    def nearest(self, picture: Tensor) -> Path:
        """The folder whose input view is nearest to `picture` [4, h, w], by squared difference of mask and colour."""
        features = _features(resize_rgba(picture, FEATURE_SIZE))
        return self.folders[int((self.features - features).square().sum(1).argmin())]

    def predict(self, sample: Sample, splits: dict[str, list[int]]) -> dict[str, Prediction]:
        """The nearest mouse's own views where the rig has them, its hull elsewhere."""
        count = self.rig.num_views
        mouse = read_sample(
            self.nearest(sample.rgba[self.rig.reference_view]), num_views=count, image_size=sample.cameras.width
        )
        predictions = {}
        for split, views in splits.items():
            if split == NOVEL:
                predictions |= predict_hull(views_of_sample(mouse.rgba, mouse.cameras), sample, {split: views})
            else:
                rgba = mouse.rgba[views]
                predictions[split] = compare(sample, views, composite(rgba, 1.0), rgba[:, 3:])
        return predictions


def _features(rgba: Tensor) -> Tensor:
    """Colours weighted by the mask, and the mask."""
    return torch.cat([rgba[:3] * rgba[3:], rgba[3:]]).flatten()


# ---- all of them ----------------------------------------------------------------------------------------------------


def predict_baselines(
    stage: str, names: tuple[str, ...], sample: Sample, splits: dict[str, list[int]], rig: ViewRig, *,
    painted: PosedViews | None, training: TrainingMice | None, components: Components | None, model: GSLRM | None,
    device: torch.device,
) -> dict[str, dict[str, Prediction]]:  # fmt: skip
    """label -> split -> prediction, of the baselines in `names` that apply; the same labels as `describe`.

    What was given the true rig views is compared on views outside the rig only, unless the sample has no others.
    """
    true_views = views_of_sample(sample.rgba[: rig.num_views], sample.cameras[: rig.num_views])
    unseen = {split: views for split, views in splits.items() if split == NOVEL or stage == "2"}
    found: dict[str, dict[str, Prediction]] = {}
    if "copy" in names:
        found[COPY] = copy_input(sample, splits, rig.reference_view)
    if "nearest" in names and training is not None:
        found[NEAREST] = training.predict(sample, splits)
    if "autoencoder" in names and stage == "1":
        found[AUTOENCODER] = predict_autoencoder(components, sample, splits)
    if "hull" in names and painted is not None and stage == "full":
        found[HULL_OF_PAINTED] = predict_hull(painted, sample, splits)
    if "hull" in names and stage != "1" and unseen:
        found[hull_of_true(stage)] = predict_hull(true_views, sample, unseen)
    if "six_views" in names and stage == "full" and unseen:
        gaussians = reconstruct_sample(model, sample, rig.num_views, device)
        found[SIX_VIEWS] = predict_gaussians(gaussians, sample, unseen, device)
    return found
