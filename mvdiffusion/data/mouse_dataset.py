"""Samples for Stage 1: N views of one animal on one background, and the input picture among them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from multiview.cameras import Cameras
from multiview.image import BACKGROUNDS
from multiview.rig import ViewRig, check_alignment
from multiview.run import make_generator
from multiview.sample import CAMERAS_FILE, read_dataset_info, read_sample, read_split
from mvdiffusion.data.arrangement import Arrangement, arrange
from mvdiffusion.data.augmentation import Augmentation, Draw, apply_draw, draw_augmentation


class MouseMVDiffusionDataset(Dataset):
    """The rig's views of each sample of a split list.

    list_file: data_mouse_train.txt; the folder it lies in holds dataset.json.
    rig: the rig that is trained; a data set of another one is refused.
    reference_view_idx: "0" (the rig's reference view) or "random": any view becomes the input, and targets, prompts and
    cameras move with it (mvdiffusion/data/arrangement.py), so that each row always says truly what it shows.
    augmentation: what is drawn once per sample. variants: 0 draws anew every epoch; K > 0 fixes K draws per sample and
    takes them in turn, so that they can be cached.
    with_cameras: the UNet is told the cameras. Without, a moved reference or a mirrored animal must give the rig's own
    directions again, because prompts are then all that names a view; any other rig is refused.
    first_index: what the sample's number counts from in random keys, where several data sets are mixed.

    An item is asked for by index, or by (epoch, index): it depends on (seed, epoch, index) only.
    """

    def __init__(
        self,
        list_file: Path | str,
        rig: ViewRig,
        image_size: int,
        *,
        reference_view_idx: str = "0",
        augmentation: Augmentation | None = None,
        variants: int = 0,
        with_cameras: bool = False,
        seed: int = 0,
        limit: int | None = None,
        first_index: int = 0,
    ) -> None:
        self.list_file, self.rig, self.image_size = Path(list_file), rig, image_size
        self.folders = read_split(self.list_file)[:limit]
        check_alignment(rig, dataset=read_dataset_info(self.list_file.parent)["rig"])
        if reference_view_idx not in ("0", "random"):
            raise ValueError(f"reference_view_idx must be '0' or 'random', got {reference_view_idx!r}")
        self.reference_view_idx, self.augmentation = reference_view_idx, augmentation or Augmentation()
        self.variants, self.seed, self.first_index = variants, seed, first_index
        rotations = range(rig.num_views) if reference_view_idx == "random" else (0,)
        mirrorings = (False, True) if self.augmentation.mirror > 0 else (False,)
        self.arrangements = {(k, m): arrange(rig, k, mirrored=m) for k in rotations for m in mirrorings}
        if not with_cameras:
            self._check_prompts_suffice()

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """One item of n views, row i being what prompt `prompts[i]` and camera i describe.

        targets [n, 3, s, s] 0..1; masks [n, 1, s, s]; reference [3, s, s], the input picture; background [3, 1, 1];
        prompts [n] int64; c2w [n, 4, 4] and fxfycxcy [n, 4] of the pictures; index; rotation; mirrored.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        draw, rotation = self.draw(epoch, index), self.draw_rotation(epoch, index)
        arrangement = self.arrangements[rotation, draw.mirrored]
        pictures, masks, cameras = self.pictures(index, draw)
        targets, cameras = pictures[arrangement.rows], arrangement.cameras(cameras)
        return {
            "targets": targets,
            "masks": masks[arrangement.rows],
            "reference": targets[self.rig.reference_view],
            "background": torch.full((3, 1, 1), BACKGROUNDS[draw.background]),
            "prompts": arrangement.prompts,
            "c2w": cameras.c2w,
            "fxfycxcy": cameras.fxfycxcy,
            "index": torch.tensor(index),
            "rotation": torch.tensor(rotation),
            "mirrored": torch.tensor(draw.mirrored),
        }

    # ---- the parts of an item, which the latent cache takes one by one --------------------------------------------

    def part(self, index: int) -> tuple[MouseMVDiffusionDataset, int]:
        """The data set that holds sample `index`, and the sample's number in it: see MixedDataset."""
        return self, index

    def draw(self, epoch: int, index: int) -> Draw:
        """The sample's augmentation in an epoch."""
        number = (epoch + index) % self.variants if self.variants else epoch
        kind = "variant" if self.variants else "epoch"
        generator = make_generator("mvdiffusion augmentation", self.seed, self.first_index + index, kind, number)
        return draw_augmentation(self.augmentation, generator)

    def draw_rotation(self, epoch: int, index: int) -> int:
        """By how many views the reference moves (0 if it is fixed)."""
        if self.reference_view_idx != "random":
            return 0
        generator = make_generator("mvdiffusion data", self.seed, epoch, self.first_index + index)
        return int(torch.randint(self.rig.num_views, (), generator=generator))

    def arrangement(self, epoch: int, index: int) -> Arrangement:
        """Which stored view stands in which row."""
        return self.arrangements[self.draw_rotation(epoch, index), self.draw(epoch, index).mirrored]

    def pictures(self, index: int, draw: Draw) -> tuple[Tensor, Tensor, Cameras]:
        """Pictures [n, 3, s, s], masks [n, 1, s, s] and cameras [n] of a draw, in the stored views' order."""
        whole = draw.crop[2] == 1.0  # a crop is cut out of the stored pixels, before they are resized
        sample = read_sample(
            self.folders[index], image_size=self.image_size if whole else None, num_views=self.rig.num_views
        )
        if sample.cameras.height != sample.cameras.width:
            raise ValueError(
                f"sample {self.folders[index]}: square pictures are expected, got {sample.cameras.height} x "
                f"{sample.cameras.width}"
            )
        return apply_draw(sample.rgba, sample.cameras, draw, self.image_size)

    def input_views(self) -> list[int]:
        """The stored views that can become the input."""
        return sorted({int(found.rows[self.rig.reference_view]) for found in self.arrangements.values()})

    def content_hash(self, index: int) -> str:
        """Hash over the bytes of a sample's camera file and of the pictures that are read from it."""
        path = self.folders[index] / CAMERAS_FILE
        content = path.read_bytes()
        digest = hashlib.sha256(content)
        for frame in json.loads(content)["frames"][: self.rig.num_views]:
            digest.update((self.folders[index] / frame["file_path"]).read_bytes())
        return digest.hexdigest()

    def _check_prompts_suffice(self) -> None:
        name = self.rig.name
        for (rotation, _), found in self.arrangements.items():
            if found.is_rig:
                continue
            instead = "or tell the UNet the cameras (camera_conditioning: adaln), which say what no prompt can"
            if rotation:
                raise ValueError(
                    "reference_view_idx: random needs a rig that looks the same from every view (equal steps, "
                    f"azimuth_zero 'reference'), rig {name} does not; use reference_view_idx: 0, {instead}"
                )
            raise ValueError(
                "mirror_probability needs a rig whose directions are the same in the mirror, those of rig "
                f"{name} are not; use mirror_probability: 0, {instead}"
            )
