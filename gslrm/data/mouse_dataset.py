"""MouseViewDataset: sample folders as training items. An item depends on (seed, epoch, index) only."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gslrm.config import AugmentationConfig, DatasetConfig, GSLRMConfig
from multiview.cameras import Cameras, perturb, read_cameras
from multiview.image import BACKGROUNDS, Draw, composite
from multiview.rig import ViewRig, check_posed_views
from multiview.run import make_generator, seed_from
from multiview.sample import CAMERAS_FILE, Sample, read_dataset_info, read_sample, read_split
from multiview.sampler import MixedDataset, mixed_lists

log = logging.getLogger(__name__)

OVERLAP_COSINE = 0.5  # cameras within 60 degrees of an input see what it sees


class MouseViewDataset(Dataset):
    """Items of a split list, as the `training.dataset` section says: inputs first (the rig's first views in its order,
    or with `random_view_selection` any), then others at random. every_view: every view of the sample, in order, on one
    background (validation). limit: only the first samples. first_index: of the first sample, in a mixture."""

    def __init__(
        self, list_file: Path | str, options: DatasetConfig, image_size: int, *, every_view: bool = False,
        with_depth: bool = False, seed: int = 0, limit: int | None = None, first_index: int = 0,
    ) -> None:  # fmt: skip
        self.list_file, self.options, self.image_size = Path(list_file), options, image_size
        self.every_view, self.with_depth, self.seed, self.first_index = every_view, with_depth, seed, first_index
        self.folders = read_split(list_file)[:limit]
        self.rig: ViewRig = read_dataset_info(self.list_file)["rig"]
        self.augmentation = options.augmentation if options.augmentation.enabled and not every_view else None
        self.num_input_views = options.num_input_views
        if every_view:  # validation asks for the rig's own views; what training adds to them is for it alone
            self.num_input_views = min(self.num_input_views, self.rig.num_views)
        if not options.random_view_selection and self.num_input_views > self.rig.num_views:
            told = f"{self.num_input_views}, but rig {self.rig.name} of {list_file} has {self.rig.num_views} views"
            remedy = "lower training.dataset.num_input_views or use a rig with more views"
            raise ValueError(f"num_input_views is {told}; {remedy}")
        self._known_cameras: dict[int, Cameras] = {}
        if options.on_bad_sample == "skip":
            self._drop_bad_samples()

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """key: (epoch, index), or index alone for epoch 0.

        Returns, with n views of which the first num_input_views are inputs: image [n, 3, h, w] and alpha [n, 1, h, w]
        in 0..1, composited on `background` [3]; c2w [n, 4, 4]; fxfycxcy [n, 4] pixels; index [n, 2] int64 as
        [view_idx, scene_idx]; targets [t] int64, the views to render; depth [n, 1, h, w] if asked for. With camera
        noise the inputs' cameras are what the model is told; inputs that are targets too then follow a second time.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = make_generator("gslrm-item", self.seed, epoch, index)
        views = self._choose_views(index, generator)
        sample = self._read(index, views)
        name = self.options.background_color
        if name == "random":  # white, gray or black with equal chance; white where every view is asked for
            drawn = 0 if self.every_view else int(torch.randint(len(BACKGROUNDS), (), generator=generator))
            name = list(BACKGROUNDS)[drawn]
        background = torch.full((3,), BACKGROUNDS[name])
        rgba, cameras, depth = sample.rgba, sample.cameras, sample.depth
        targets = torch.arange(0 if self.options.target_has_input else self.num_input_views, len(views))
        if self.augmentation is not None:
            rgba = draw_colors(self.augmentation, generator).recolored(rgba)
            noise = asdict(self.augmentation.camera_noise)
            if any(noise.values()):
                cameras, rows, targets = self._add_camera_noise(cameras, targets, noise, generator)
                views, rgba, depth = views[rows], rgba[rows], depth[rows] if self.with_depth else None
        return {
            "image": composite(rgba, background[:, None, None]), "alpha": rgba[:, 3:], "background": background,
            "c2w": cameras.c2w, "fxfycxcy": cameras.fxfycxcy, "targets": targets,
            "index": torch.stack([views, torch.full_like(views, self.first_index + index)], dim=-1),
            **({"depth": depth} if self.with_depth else {}),
        }  # fmt: skip

    def _cameras(self, index: int) -> Cameras:
        """The cameras [v] of a sample's file, checked; from memory after the first time."""
        if index not in self._known_cameras:
            folder = self.folders[index]
            cameras = read_cameras(folder / CAMERAS_FILE)
            needed = self.num_input_views if self.every_view else self.options.num_views
            if len(cameras) < needed:
                remedy = "lower training.dataset.num_views or write the dataset with more novel views"
                raise ValueError(f"sample {folder} has {len(cameras)} views, {needed} are needed (num_views); {remedy}")
            check_posed_views(self.rig, cameras[: self.rig.num_views], str(folder))  # novel views may stand anywhere
            self._known_cameras[index] = cameras
        return self._known_cameras[index]

    def _read(self, index: int, views: Tensor) -> Sample:
        options = {"views": views.tolist(), "with_depth": self.with_depth}
        return read_sample(self.folders[index], image_size=self.image_size, **options)

    def _drop_bad_samples(self) -> None:
        good = []
        for index, folder in enumerate(self.folders):
            try:
                self._read(index, torch.arange(len(self._cameras(index))))
                good.append(folder)
            except ValueError as error:
                log.warning("sample left out: %s", error)
        skipped = len(self.folders) - len(good)
        if not good:
            raise ValueError(f"{self.list_file}: none of its {skipped} samples can be read")
        if skipped:
            log.warning("%s: %d of %d samples left out (on_bad_sample: skip)", self.list_file, skipped, len(self))
        self.folders, self._known_cameras = good, {}

    def _choose_views(self, index: int, generator: torch.Generator) -> Tensor:
        """View numbers [num_views], inputs first; from the cameras alone, so that only chosen images are decoded."""
        cameras, options = self._cameras(index), self.options
        total, num_inputs = len(cameras), self.num_input_views
        order = torch.randperm(total, generator=generator)
        if self.every_view:
            return torch.arange(total)
        inputs = order[:num_inputs] if options.random_view_selection else torch.arange(num_inputs)
        others = order[~torch.isin(order, inputs)]
        num_others = options.num_views - num_inputs
        if options.maximize_view_overlap and num_others > 0:
            others = others[overlapping(cameras, inputs, options.overlap_rule)[others]]
            if len(others) < num_others:
                told = f"only {len(others)} cameras stand within 60 degrees of an input view, {num_others} are needed"
                remedy = "set training.dataset.maximize_view_overlap=false"
                raise ValueError(f"sample {self.folders[index]}: {told}; {remedy}")
        return torch.cat([inputs, others[:num_others]])

    def _add_camera_noise(
        self, cameras: Cameras, targets: Tensor, noise: dict[str, float], generator: torch.Generator
    ) -> tuple[Cameras, Tensor, Tensor]:
        """Returns cameras [m] as the model is told them, which of the n views each one shows [m], and the targets: an
        input that is also one comes a second time with its true camera. Losses on rays go with told ones."""
        n, num_inputs = len(cameras), self.num_input_views
        noisy = perturb(cameras[:num_inputs], **noise, generator=generator)
        rows = torch.arange(n)
        if self.options.target_has_input:
            rows = torch.cat([rows, torch.arange(num_inputs)])
            targets = torch.cat([torch.arange(n, n + num_inputs), torch.arange(num_inputs, n)])
        true = cameras[rows[num_inputs:]]
        c2w, fxfycxcy = torch.cat([noisy.c2w, true.c2w]), torch.cat([noisy.fxfycxcy, true.fxfycxcy])
        return replace(cameras, c2w=c2w, fxfycxcy=fxfycxcy), rows, targets


def draw_colors(augmentation: AugmentationConfig, generator: torch.Generator) -> Draw:
    """Draws brightness, contrast, saturation and hue, uniform in their ranges, once for all views of a sample."""
    ranges = {
        "brightness": augmentation.brightness_range, "contrast": augmentation.contrast_range,
        "saturation": augmentation.saturation_range, "hue_deg": augmentation.hue_range_deg,
    }  # fmt: skip
    drawn = torch.rand(len(ranges), generator=generator).tolist()
    return Draw(**{name: low + (high - low) * u for (name, (low, high)), u in zip(ranges.items(), drawn)})


def overlapping(cameras: Cameras, inputs: Tensor, rule: str) -> Tensor:
    """[v] bool: cameras within 60 degrees of an input's. rule: `normalised`, or FaceLift's, on raw positions."""
    positions = cameras.origins
    positions = torch.nn.functional.normalize(positions, dim=-1) if rule == "normalised" else positions
    return (positions @ positions[inputs].mT >= OVERLAP_COSINE).any(-1)


def build_datasets(config: GSLRMConfig, overfit: int) -> tuple[MixedDataset, MouseViewDataset | None]:
    """Training data, and validation data (every view of each sample, fixed inputs) unless validation is off."""
    options, seed, checked = config.training.dataset, config.training.runtime.seed, config.validation
    size = config.model.image_tokenizer.image_size
    lists, percents = mixed_lists(options.dataset_path, [(part.dataset_path, part.ratio) for part in options.mix])
    parts: list[MouseViewDataset] = []
    for number, path in enumerate(lists):
        part = MouseViewDataset(
            path, options, size, with_depth=config.training.losses.direct_loss_weight > 0, limit=overfit or None,
            seed=seed_from("gslrm-mix", seed, number) if number else seed, first_index=sum(map(len, parts)),
        )  # fmt: skip
        parts.append(part)
    if overfit > len(parts[0]):
        raise ValueError(f"--overfit {overfit} needs {overfit} samples, {lists[0]} has {len(parts[0])}")
    check_set = None
    if checked.enabled:
        check_set = MouseViewDataset(checked.dataset_path, options, size, every_view=True, limit=checked.num_samples)
    return MixedDataset(parts, percents), check_set
