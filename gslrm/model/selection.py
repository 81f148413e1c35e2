"""Which patches of the input views become tokens, which of their pixels become Gaussians, and the rays through them.
Everything is packed: the rows of all samples stand one after the other, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from multiview.cameras import Cameras

FOREGROUND_ALPHA = 0.1  # a pixel whose mask exceeds it is foreground


@dataclass(frozen=True)
class PatchSelection:
    """T kept patches of a batch, ordered by (sample, view, patch row, patch column), and their pixels."""

    sample: Tensor  # [T] int64, as the next three
    view: Tensor
    top: Tensor  # of the patch's first pixel
    left: Tensor
    patch_size: int
    shape: tuple[int, int, int]  # (v, h, w) of the input views
    patches_per_sample: list[int]
    pixels_per_sample: list[int]  # of those that become Gaussians
    pixel_rows: Tensor | None  # [K] int64, which of the T * p * p pixels become Gaussians; None: all of them

    def patches_of(self, maps: Tensor) -> Tensor:
        """[b, v, c, h, w] -> [T, p, p, c]."""
        p = self.patch_size
        return patch_view(maps, p)[self.sample, self.view, self.top // p, self.left // p]

    def pixels_of(self, values: Tensor) -> Tensor:
        """Values at all pixels of the kept patches [T * p * p, ...] -> at those that become Gaussians [K, ...]."""
        return values if self.pixel_rows is None else values.index_select(0, self.pixel_rows)

    def pixel_index(self) -> Tensor:
        """[K] int64: (view * h + row) * w + column of each Gaussian's pixel."""
        _, h, w = self.shape
        inside = torch.arange(self.patch_size, device=self.view.device)
        first = (self.view * h + self.top) * w + self.left
        return self.pixels_of((first[:, None] + (inside[:, None] * w + inside).flatten()).flatten())

    def rays(self, cameras: Cameras) -> tuple[Tensor, Tensor]:
        """World rays of cameras [b, v] through the kept patches' pixels: origins [T, 3], unit directions [T, p, p, 3].
        A patch is a crop of its image, so its rays are those of the cropped camera."""
        where, zero = (self.sample, self.view), torch.zeros_like(self.left)
        corner = torch.stack([zero, zero, self.left, self.top], dim=-1)
        patches = Cameras(cameras.c2w[where], cameras.fxfycxcy[where] - corner, self.patch_size, self.patch_size)
        return patches.origins, patches.rays()[1]


@torch.no_grad()
def select_patches(images: Tensor, patch_size: int, masks: Tensor | None = None, margin_px: int = 0) -> PatchSelection:
    """Every patch and pixel of views [b, v, c, h, w], or those at most `margin_px` (rows and columns alike) from the
    foreground of masks [b, v, 1, h, w] in 0..1, with any patch that has one. Masks cost one device synchronisation."""
    b, v, _, h, w = images.shape
    rows, columns, pixel_rows = h // patch_size, w // patch_size, None
    if masks is None:
        places, per_sample = torch.arange(b * v * rows * columns, device=images.device), v * rows * columns
        counts = [[per_sample] * b, [per_sample * patch_size**2] * b]
    else:
        grown = (masks > FOREGROUND_ALPHA).to(torch.float32).flatten(0, 1)
        for kernel in ((2 * margin_px + 1, 1), (1, 2 * margin_px + 1)):
            grown = functional.max_pool2d(grown, kernel, 1, (kernel[0] // 2, kernel[1] // 2))
        pixels = patch_view(grown.view(b, v, 1, h, w) > 0, patch_size).reshape(b, -1, patch_size**2)
        patches = pixels.any(-1)
        counts = torch.stack([patches.sum(1), pixels.sum((1, 2))]).tolist()
        places = patches.flatten().nonzero()[:, 0]
        kept = pixels.flatten(0, 1)[places].flatten()
        if sum(counts[1]) < len(kept):
            pixel_rows = kept.nonzero()[:, 0]
    view = places // (rows * columns)  # numbered over the whole batch
    top, left = places // columns % rows * patch_size, places % columns * patch_size
    return PatchSelection(view // v, view % v, top, left, patch_size, (v, h, w), *counts, pixel_rows)


def patch_view(maps: Tensor, patch_size: int) -> Tensor:
    """[b, v, c, h, w] -> [b, v, h / p, w / p, p, p, c], without a copy."""
    maps = maps.unflatten(-1, (-1, patch_size)).unflatten(-3, (-1, patch_size))
    return maps.permute(0, 1, 3, 5, 4, 6, 2)


def pad_rows(rows: Tensor, counts: list[int], fill: float) -> Tensor:
    """Packed rows [K, ...] -> [b, k, ...], k = the largest count; shorter samples end in rows of `fill`."""
    if len(set(counts)) == 1:
        return rows.unflatten(0, (len(counts), counts[0]))
    return pad_sequence(rows.split(counts), batch_first=True, padding_value=fill)
