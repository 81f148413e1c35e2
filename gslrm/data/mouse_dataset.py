"""MouseViewDataset: sample folders as training items. An item depends on (seed, epoch, index) only."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gslrm.config import AugmentationConfig
from gslrm.data.augmentation import choose_background, jitter
from multiview.cameras import Cameras, perturb, read_cameras
from multiview.image import composite
from multiview.rig import ViewRig, check_posed_views
from multiview.run import make_generator
from multiview.sample import CAMERAS_FILE, Sample, read_dataset_info, read_sample, read_split

log = logging.getLogger(__name__)

OVERLAP_COSINE = 0.5  # cameras within 60 degrees of an input see what it sees


class MouseViewDataset(Dataset):
    """Items of a split list.

    list_file: sample folders, one per line, relative to it; `dataset.json` with the rig lies beside it.
    image_size: pixels; pictures and cameras are resized together.
    num_input_views, num_views: inputs, and inputs plus other views, per item. Inputs come first: the rig's first views
        in its order, or with `random_views` any. The others are drawn at random, with `maximize_view_overlap` among the
        cameras within 60 degrees of an input (`overlap_rule` upstream: FaceLift's test on un-normalised positions).
    num_views None: every view of the sample, in order (validation).
    background: white, gray, black, or random (one of them per item).
    on_bad_sample: `error`, or `skip`: unreadable samples are left out, counted (`num_skipped`) and logged, here.
    limit: only the first so many samples.
    """

    def __init__(
        self,
        list_file: Path | str,
        *,
        image_size: int,
        num_input_views: int,
        num_views: int | None,
        target_has_input: bool = True,
        random_views: bool = False,
        maximize_view_overlap: bool = False,
        overlap_rule: str = "normalised",
        background: str = "white",
        augmentation: AugmentationConfig | None = None,
        with_depth: bool = False,
        on_bad_sample: str = "error",
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self.list_file = Path(list_file)
        self.folders = read_split(list_file)[:limit]
        self.rig: ViewRig = read_dataset_info(self.list_file.parent)["rig"]
        self.image_size, self.num_input_views, self.num_views = image_size, num_input_views, num_views
        self.target_has_input, self.random_views = target_has_input, random_views
        self.maximize_view_overlap, self.overlap_rule = maximize_view_overlap, overlap_rule
        self.background, self.with_depth, self.seed = background, with_depth, seed
        self.augmentation = augmentation if augmentation is not None and augmentation.enabled else None
        if not random_views and num_input_views > self.rig.num_views:
            raise ValueError(
                f"num_input_views is {num_input_views}, but rig {self.rig.name} of {list_file} has "
                f"{self.rig.num_views} views; lower training.dataset.num_input_views or use a rig with more views"
            )
        noise = asdict(self.augmentation.camera_noise) if self.augmentation is not None else {}
        self.camera_noise = noise if any(noise.values()) else None
        self._known_cameras: dict[int, Cameras] = {}
        self.num_skipped = self._drop_bad_samples() if on_bad_sample == "skip" else 0

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """key: (epoch, index), or index alone for epoch 0.

        Returns, with n views of which the first num_input_views are inputs: image [n, 3, h, w] and alpha [n, 1, h, w]
        in 0..1, composited on `background` [3]; c2w [n, 4, 4]; fxfycxcy [n, 4] pixels; index [n, 2] int64 as
        [view_idx, scene_idx]; targets [t] int64, the views to render; depth [n, 1, h, w] if asked for.

        With camera noise c2w and fxfycxcy of the inputs are what the model is told; inputs that are targets too then
        follow a second time behind the others, with their true cameras, and `targets` points at those.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = make_generator("gslrm-item", self.seed, epoch, index)
        views = self._choose_views(index, generator)
        sample = self._read(index, views)
        background = choose_background(self.background, generator)
        rgba, cameras, depth = sample.rgba, sample.cameras, sample.depth
        targets = torch.arange(0 if self.target_has_input else self.num_input_views, len(views))
        if self.augmentation is not None:
            rgba = jitter(rgba, self.augmentation, generator)
        if self.camera_noise is not None:
            cameras, rows, targets = self._misplace(cameras, targets, generator)
            views, rgba, depth = views[rows], rgba[rows], depth[rows] if self.with_depth else None
        item = {
            "image": composite(rgba, background[:, None, None]),
            "alpha": rgba[:, 3:],
            "background": background,
            "c2w": cameras.c2w,
            "fxfycxcy": cameras.fxfycxcy,
            "index": torch.stack([views, torch.full_like(views, index)], dim=-1),
            "targets": targets,
        }
        if self.with_depth:
            item["depth"] = depth
        return item

    def _cameras(self, index: int) -> Cameras:
        """The cameras [v] of a sample's file, checked; from memory after the first time. Pictures are not touched."""
        if index not in self._known_cameras:
            folder = self.folders[index]
            cameras = read_cameras(folder / CAMERAS_FILE)
            needed = self.num_input_views if self.num_views is None else self.num_views
            if len(cameras) < needed:
                raise ValueError(
                    f"sample {folder} has {len(cameras)} views, {needed} are needed (num_views); lower "
                    "training.dataset.num_views or write the dataset with more novel views"
                )
            check_posed_views(self.rig, cameras[: self.rig.num_views], str(folder))  # novel views may stand anywhere
            self._known_cameras[index] = cameras
        return self._known_cameras[index]

    def _read(self, index: int, views: Tensor) -> Sample:
        return read_sample(
            self.folders[index], image_size=self.image_size, views=views.tolist(), with_depth=self.with_depth
        )

    def _drop_bad_samples(self) -> int:
        good = []
        for index, folder in enumerate(self.folders):
            try:
                self._read(index, torch.arange(len(self._cameras(index))))
            except ValueError as error:
                log.warning("sample left out: %s", error)
            else:
                good.append(folder)
        skipped = len(self.folders) - len(good)
        if not good:
            raise ValueError(f"{self.list_file}: none of its {skipped} samples can be read")
        if skipped:
            log.warning("%s: %d of %d samples left out (on_bad_sample: skip)", self.list_file, skipped, len(self))
        self.folders, self._known_cameras = good, {}
        return skipped

    def _choose_views(self, index: int, generator: torch.Generator) -> Tensor:
        """View numbers [num_views], inputs first; from the cameras alone, so that only chosen pictures are decoded."""
        cameras = self._cameras(index)
        total, num_inputs = len(cameras), self.num_input_views
        order = torch.randperm(total, generator=generator)
        if self.num_views is None:
            return torch.arange(total)
        inputs = order[:num_inputs] if self.random_views else torch.arange(num_inputs)
        others = order[~torch.isin(order, inputs)]
        num_others = self.num_views - num_inputs
        if self.maximize_view_overlap and num_others > 0:
            others = others[overlapping(cameras, inputs, self.overlap_rule)[others]]
            if len(others) < num_others:
                raise ValueError(
                    f"sample {self.folders[index]}: only {len(others)} cameras stand within 60 degrees of an input "
                    f"view, {num_others} are needed; set training.dataset.maximize_view_overlap=false"
                )
        return torch.cat([inputs, others[:num_others]])

    def _misplace(
        self, cameras: Cameras, targets: Tensor, generator: torch.Generator
    ) -> tuple[Cameras, Tensor, Tensor]:
        """Camera noise: cameras [m] as the model is told them, which of the n views each one shows [m], the targets.

        Pictures are rendered with true cameras: an input that is also a target comes a second time, at the end. Losses
        on rays (pixel-align, direct) go with the rays that the model was told.
        """
        n, num_inputs = len(cameras), self.num_input_views
        told = perturb(cameras[:num_inputs], **self.camera_noise, generator=generator)
        rows, others = torch.arange(n), torch.arange(num_inputs, n)
        if self.target_has_input:
            rows = torch.cat([rows, torch.arange(num_inputs)])
            targets = torch.cat([torch.arange(n, n + num_inputs), others])
        cameras = replace(
            cameras,
            c2w=torch.cat([told.c2w, cameras.c2w[rows[num_inputs:]]]),
            fxfycxcy=torch.cat([told.fxfycxcy, cameras.fxfycxcy[rows[num_inputs:]]]),
        )
        return cameras, rows, targets


def overlapping(cameras: Cameras, inputs: Tensor, rule: str) -> Tensor:
    """[v] bool: cameras whose direction lies within 60 degrees of an input's."""
    positions = cameras.origins
    if rule == "normalised":
        positions = torch.nn.functional.normalize(positions, dim=-1)
    return (positions @ positions[inputs].mT >= OVERLAP_COSINE).any(-1)
