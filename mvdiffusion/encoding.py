"""Training batches as the UNet's trainer needs them: latents and conditions, encoded per step or once for all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from multiview.image import BACKGROUNDS, composite
from multiview.run import make_generator
from mvdiffusion.components import Components
from mvdiffusion.conditioning import clip_pixels_fast, image_embeddings
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset, StepSampler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedBatch:
    """b objects, n views, latents of c channels and side l; all scaled by the VAE's scaling factor.

    mean, std: [b, n, c, l, l], the targets' posterior. condition: [b, c, l, l], the input picture's mode.
    embedding: [b, d], the input picture's CLIP embedding. mask: [b, n, 1, l, l], share of animal in each cell.
    """

    mean: Tensor
    std: Tensor
    condition: Tensor
    embedding: Tensor
    mask: Tensor


@torch.no_grad()
def encode(components: Components, targets: Tensor, masks: Tensor, reference: Tensor) -> EncodedBatch:
    """targets [b, n, 3, s, s], masks [b, n, 1, s, s], reference [b, 3, s, s], all 0..1, on the components' device."""
    vae, objects = components.vae, len(targets)
    scale = vae.config.scaling_factor
    posterior = vae.encode(targets.flatten(0, 1).to(vae.dtype) * 2 - 1).latent_dist
    condition = vae.encode(reference.to(vae.dtype) * 2 - 1).latent_dist.mode() * scale
    return EncodedBatch(
        mean=(posterior.mean * scale).unflatten(0, (objects, -1)).float(),
        std=(posterior.std * scale).unflatten(0, (objects, -1)).float(),
        condition=condition.float(),
        embedding=image_embeddings(components, clip_pixels_fast(components, reference)).float(),
        mask=F.avg_pool2d(masks.flatten(0, 1), components.vae_factor).unflatten(0, (objects, -1)),
    )


def live_batches(
    components: Components, dataset: MouseMVDiffusionDataset, sampler: StepSampler, workers: int, device: torch.device
) -> Iterator[EncodedBatch]:
    """Reads and encodes batches as they are asked for."""
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, pin_memory=device.type == "cuda", persistent_workers=False
    )
    for batch in loader:
        moved = {name: batch[name].to(device, non_blocking=True) for name in ("targets", "masks", "reference")}
        yield encode(components, **moved)


class LatentCache:
    """Every sample encoded once: for frozen encoders, one background and no jitter.

    The condition is the mode of the very latents it is the picture of, and the embedding of every view is kept, so a
    rotating reference view costs nothing.
    """

    def __init__(self, components: Components, dataset: MouseMVDiffusionDataset, device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        background = BACKGROUNDS[dataset.backgrounds[0]]
        parts: list[EncodedBatch] = []
        for index in range(len(dataset)):
            rgba = dataset.read_rgba(index).to(device)
            pictures = composite(rgba, background)
            # Each view as the reference of its own: condition and embedding come out per view.
            parts.append(encode(components, pictures[:, None], rgba[:, None, 3:], pictures))
            if (index + 1) % 500 == 0:
                log.info("encoded %d of %d samples", index + 1, len(dataset))
        # Half precision halves the memory; the posterior's own deviation is far larger than the rounding.
        self.mean = torch.stack([part.mean[:, 0].half() for part in parts])
        self.std = torch.stack([part.std[:, 0].half() for part in parts])
        self.embedding = torch.stack([part.embedding for part in parts])
        self.mask = torch.stack([part.mask[:, 0] for part in parts])

    def batches(self, sampler: StepSampler) -> Iterator[EncodedBatch]:
        for keys in sampler:
            yield self.batch(keys)

    def batch(self, keys: list[tuple[int, int]]) -> EncodedBatch:
        rows = torch.tensor([index for _, index in keys], device=self.device)
        rotations = [
            self.dataset.draw_rotation(make_generator("mvdiffusion data", self.dataset.seed, epoch, index))
            for epoch, index in keys
        ]

        def turned(stored: Tensor) -> Tensor:
            return torch.stack([row.roll(-k, dims=0) for row, k in zip(stored[rows], rotations)]).float()

        mean, reference = turned(self.mean), self.dataset.rig.reference_view
        return EncodedBatch(
            mean=mean,
            std=turned(self.std),
            condition=mean[:, reference],
            embedding=turned(self.embedding)[:, reference],
            mask=turned(self.mask),
        )
