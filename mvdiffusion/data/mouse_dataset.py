"""Samples for Stage 1: N views of one animal on one background, and the input picture among them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from multiview.image import BACKGROUNDS, composite
from multiview.rig import ViewRig, check_alignment
from multiview.run import make_generator
from multiview.sample import read_dataset_info, read_sample, read_split


class MouseMVDiffusionDataset(Dataset):
    """The rig's views of each sample of a split list.

    list_file: data_mouse_train.txt; the folder it lies in holds dataset.json.
    rig: the rig that is trained; a data set of another one is refused.
    backgrounds: names out of multiview.image.BACKGROUNDS; one is drawn per sample and shared by all its views.
    reference_view_idx: "0" (the rig's reference view) or "random": any view becomes the input; the targets are rotated
    with it, so that row i always is the view that stands at the rig's i-th direction *from the input*. Prompts and
    cameras describe directions relative to the input, so they stay. Only for rigs that look the same from every view.
    brightness, contrast: jitter factors 1 +- value, drawn once per sample.

    An item is asked for by index, or by (epoch, index): it depends on (seed, epoch, index) only.
    """

    def __init__(
        self,
        list_file: Path | str,
        rig: ViewRig,
        image_size: int,
        *,
        backgrounds: tuple[str, ...] = ("white",),
        reference_view_idx: str = "0",
        brightness: float = 0.0,
        contrast: float = 0.0,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self.list_file, self.rig, self.image_size = Path(list_file), rig, image_size
        self.folders = read_split(self.list_file)[:limit]
        check_alignment(rig, dataset=read_dataset_info(self.list_file.parent)["rig"])
        if reference_view_idx not in ("0", "random"):
            raise ValueError(f"reference_view_idx must be '0' or 'random', got {reference_view_idx!r}")
        if reference_view_idx == "random" and not rig.is_cyclic():
            raise ValueError(
                "reference_view_idx: random needs a rig that looks the same from every view (equal steps, azimuth_zero "
                f"'reference'), rig {rig.name} does not; use reference_view_idx: 0"
            )
        self.backgrounds, self.reference_view_idx = tuple(backgrounds), reference_view_idx
        self.brightness, self.contrast, self.seed = brightness, contrast, seed

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """targets [n, 3, s, s] 0..1, masks [n, 1, s, s], reference [3, s, s], background [3, 1, 1], index, rotation."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = make_generator("mvdiffusion data", self.seed, epoch, index)
        rgba = self.read_rgba(index)
        rotation = self.draw_rotation(generator)
        rgba = rgba.roll(-rotation, dims=0)
        name = self.backgrounds[int(torch.randint(len(self.backgrounds), (), generator=generator))]
        background = torch.full((3, 1, 1), BACKGROUNDS[name])
        rgb = photometric_jitter(rgba, self.brightness, self.contrast, generator)
        targets = composite(torch.cat([rgb, rgba[:, 3:]], dim=1), background)
        return {
            "targets": targets,
            "masks": rgba[:, 3:],
            "reference": targets[self.rig.reference_view],
            "background": background,
            "index": torch.tensor(index),
            "rotation": torch.tensor(rotation),
        }

    def read_rgba(self, index: int) -> Tensor:
        """[n, 4, s, s]: the rig's views of one sample, in the rig's order."""
        return read_sample(self.folders[index], image_size=self.image_size, num_views=self.rig.num_views).rgba

    def draw_rotation(self, generator: torch.Generator) -> int:
        """By how many views the reference moves (0 if it is fixed)."""
        if self.reference_view_idx != "random":
            return 0
        return int(torch.randint(self.rig.num_views, (), generator=generator))


def photometric_jitter(rgba: Tensor, brightness: float, contrast: float, generator: torch.Generator) -> Tensor:
    """RGB [n, 3, h, w] of RGBA [n, 4, h, w] with one brightness and one contrast factor for all views.

    Contrast turns about the animal's own mean colour: the background is composited afterwards and stays itself.
    """
    factors = 1 + (2 * torch.rand(2, generator=generator) - 1) * torch.tensor([brightness, contrast])
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    mean = (rgb * alpha).sum(dim=(0, 2, 3), keepdim=True) / alpha.sum().clamp_min(1e-6)
    return (((rgb - mean) * factors[1] + mean) * factors[0]).clamp(0, 1)


class StepSampler(Sampler):
    """Batches of (epoch, index) from a given batch on, so that a resumed run sees what it would have seen.

    Every epoch is a permutation keyed on (seed, epoch), shared by the processes: batch k takes the next
    batch_size * world_size entries, and each process its own slice of them. An epoch's tail runs on into the next.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.rank, self.world_size = rank, world_size
        self._epoch, self._order = -1, []

    def batch(self, number: int) -> list[tuple[int, int]]:
        """The (epoch, index) keys of this process's batch `number`."""
        first = (number * self.world_size + self.rank) * self.batch_size
        return [self._key(position) for position in range(first, first + self.batch_size)]

    def _key(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            generator = make_generator("mvdiffusion order", self.seed, epoch)
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=generator).tolist()
        return epoch, self._order[offset]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number = self.start
        while True:
            yield self.batch(number)
            number += 1
