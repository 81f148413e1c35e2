"""Samples for Stage 1: N views of one animal on one background, and the input image among them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from multiview.cameras import Cameras
from multiview.files import read_json
from multiview.image import BACKGROUNDS, Draw
from multiview.rig import ViewRig, check_alignment
from multiview.run import make_generator
from multiview.sample import CAMERAS_FILE, read_dataset_info, read_sample, read_split
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.data.views import Arrangement, arrange


class MouseMVDiffusionDataset(Dataset):
    """The rig's views of each sample of a split list; an item depends on (seed, epoch, index) only.

    config: what is drawn once per sample, and whether the reference view moves (targets, prompts and cameras with it);
    None: samples as they are, on white (validation). with_cameras: the UNet is told the cameras; else a moved reference
    or a mirrored animal must give the rig's own directions again, or is refused. first_index: of the first sample.
    """

    def __init__(
        self, list_file: Path | str, rig: ViewRig, image_size: int, config: MVDiffusionConfig | None = None, *,
        with_cameras: bool = False, limit: int | None = None, first_index: int = 0,
    ) -> None:  # fmt: skip
        self.list_file, self.rig, self.image_size, self.config = Path(list_file), rig, image_size, config
        self.folders, self.first_index = read_split(self.list_file)[:limit], first_index
        check_alignment(rig, dataset=read_dataset_info(self.list_file)["rig"])
        # With the latent cache every sample has so many fixed draws, taken in turn, instead of a new one per epoch.
        self.variants = config.cache_variants if config is not None and config.cache_latents else 0
        self.moves_reference = config is not None and config.reference_view_idx != "0"
        rotations = range(rig.num_views) if self.moves_reference else (0,)
        mirrorings = (False, True) if config is not None and config.mirror_probability > 0 else (False,)
        self.arrangements = {(k, m): arrange(rig, k, mirrored=m) for k in rotations for m in mirrorings}
        for (rotation, _), arrangement in self.arrangements.items():
            if with_cameras or arrangement.is_rig:
                continue
            key, must = "mirror_probability", "has the same directions in the mirror"
            if rotation:
                key, must = (
                    "reference_view_idx",
                    "looks the same from every view (equal steps, azimuth_zero 'reference')",
                )
            raise ValueError(
                f"{key}: {getattr(config, key)} needs a rig that {must}, rig {rig.name} does not; use {key}: "
                "0, or tell the UNet the cameras (camera_conditioning: adaln), which say what no prompt can"
            )

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """One item of n views, row i being what prompt `prompts[i]` and camera i describe: targets [n, 3, s, s] 0..1;
        masks [n, 1, s, s]; reference [3, s, s], the input image; background [3, 1, 1]; prompts [n] int64; c2w,
        fxfycxcy; index; rotation; mirrored."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        draw, rotation = self.draw(epoch, index), self.draw_rotation(epoch, index)
        arrangement = self.arrangements[rotation, draw.mirrored]
        images, masks, cameras = self.pictures(index, draw)
        targets, cameras = images[arrangement.rows], arrangement.cameras(cameras)
        return {
            "targets": targets, "masks": masks[arrangement.rows], "reference": targets[self.rig.reference_view],
            "background": torch.full((3, 1, 1), BACKGROUNDS[draw.background]), "prompts": arrangement.prompts,
            "c2w": cameras.c2w, "fxfycxcy": cameras.fxfycxcy, "index": torch.tensor(self.first_index + index),
            "rotation": torch.tensor(rotation), "mirrored": torch.tensor(draw.mirrored),
        }  # fmt: skip

    def draw(self, epoch: int, index: int) -> Draw:
        """Draws the sample's augmentation in an epoch."""
        config = self.config
        if config is None:
            return Draw()
        number = (epoch + index) % self.variants if self.variants else epoch
        kind = "variant" if self.variants else "epoch"
        generator = make_generator("mvdiffusion augmentation", config.seed, self.first_index + index, kind, number)
        # All numbers are drawn whatever is asked for: an option that is added moves no other.
        u = torch.rand(9, generator=generator, dtype=torch.float64).tolist()
        side = 1.0 - (1.0 - config.random_crop_ratio) * u[5]
        return Draw(
            background=config.backgrounds[int(u[0] * len(config.backgrounds))],
            brightness=1.0 + config.brightness_jitter * (2 * u[1] - 1),
            contrast=1.0 + config.contrast_jitter * (2 * u[2] - 1),
            saturation=1.0 + config.saturation_jitter * (2 * u[3] - 1),
            hue_deg=0.0 + config.hue_jitter_deg * (2 * u[4] - 1),  # not -0.0: equal draws have equal names in the cache
            crop=((1.0 - side) * u[6], (1.0 - side) * u[7], side),
            mirrored=u[8] < config.mirror_probability,
        )

    def draw_rotation(self, epoch: int, index: int) -> int:
        """Draws by how many views the reference moves (0 if it is fixed)."""
        if not self.moves_reference:
            return 0
        generator = make_generator("mvdiffusion data", self.config.seed, epoch, self.first_index + index)
        drawn = int(torch.randint(self.rig.num_views, (), generator=generator))
        stays = self.config.reference_view_idx == "half" and torch.rand((), generator=generator) < 0.5
        return 0 if stays else drawn

    def arrangement(self, epoch: int, index: int) -> Arrangement:
        return self.arrangements[self.draw_rotation(epoch, index), self.draw(epoch, index).mirrored]

    def pictures(self, index: int, draw: Draw) -> tuple[Tensor, Tensor, Cameras]:
        """Images [n, 3, s, s], masks [n, 1, s, s] and cameras [n] of a draw, in the stored views' order."""
        folder, size = self.folders[index], self.image_size if draw.crop[2] == 1.0 else None
        # A crop is cut out of the stored pixels, before they are resized.
        sample = read_sample(folder, image_size=size, num_views=self.rig.num_views)
        if (height := sample.cameras.height) != (width := sample.cameras.width):
            raise ValueError(f"sample {folder}: square images are expected, got {height} x {width}")
        return draw.apply(sample.rgba, sample.cameras, self.image_size)

    def input_views(self) -> list[int]:
        """The stored views that can become the input."""
        return sorted({int(found.rows[self.rig.reference_view]) for found in self.arrangements.values()})

    def content_hash(self, index: int) -> str:
        """Hash over the bytes of a sample's camera file and of the images that are read from it."""
        path = self.folders[index] / CAMERAS_FILE
        digest = hashlib.sha256(path.read_bytes())
        for frame in read_json(path)["frames"][: self.rig.num_views]:
            digest.update((self.folders[index] / frame["file_path"]).read_bytes())
        return digest.hexdigest()
