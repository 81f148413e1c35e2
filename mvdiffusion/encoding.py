"""Training batches as the UNet's trainer needs them: latents and conditions, encoded here or read from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from multiview.cameras import Cameras
from multiview.sampler import MixedDataset, StepSampler, load_batches
from mvdiffusion.components import Components
from mvdiffusion.conditioning import clip_pixels_fast, image_embeddings
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset


@dataclass(frozen=True)
class EncodedBatch:
    """b objects, n views, latents of c channels and side l; all scaled by the VAE's scaling factor.

    mean, std: [b, n, c, l, l], the targets' posterior. condition: [b, c, l, l], the input picture's mode.
    embedding: [b, d], the input picture's CLIP embedding. mask: [b, n, 1, l, l], share of animal in each cell.
    prompts: [b, n] int64, which of the rig's prompts describes a view. cameras: [b, n], of the pictures.
    """

    mean: Tensor
    std: Tensor
    condition: Tensor
    embedding: Tensor
    mask: Tensor
    prompts: Tensor
    cameras: Cameras


@torch.no_grad()
def encode(components: Components, pictures: Tensor, masks: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    """What the frozen encoders make of b objects' views; every picture passes the VAE once, every input CLIP once.

    pictures [b, n, 3, s, s], masks [b, n, 1, s, s], inputs [b, m, 3, s, s] (pictures among them that serve as input),
    all 0..1, on the components' device. Returns mean, std [b, n, c, l, l], embedding [b, m, d], mask [b, n, 1, l, l].
    """
    vae, objects, scale = components.vae, len(pictures), components.vae.config.scaling_factor
    posterior = vae.encode(pictures.flatten(0, 1).to(vae.dtype) * 2 - 1).latent_dist
    embedding = image_embeddings(components, clip_pixels_fast(components, inputs.flatten(0, 1)))
    return {
        "mean": (posterior.mean * scale).unflatten(0, (objects, -1)).float(),
        "std": (posterior.std * scale).unflatten(0, (objects, -1)).float(),
        "embedding": embedding.unflatten(0, (objects, -1)).float(),
        "mask": F.avg_pool2d(masks.flatten(0, 1), components.vae_factor).unflatten(0, (objects, -1)),
    }


def live_batches(
    components: Components,
    dataset: MouseMVDiffusionDataset | MixedDataset,
    sampler: StepSampler,
    workers: int,
    device: torch.device,
) -> Iterator[EncodedBatch]:
    """Reads and encodes batches as they are asked for."""
    for batch in load_batches(dataset, sampler, workers, device):
        yield encode_batch(components, batch, dataset.rig.reference_view, device)


def encode_batch(
    components: Components, batch: dict[str, Tensor], reference_view: int, device: torch.device
) -> EncodedBatch:
    """A collated batch of data set items, encoded."""
    targets, masks, prompts, c2w, fxfycxcy = (
        batch[name].to(device, non_blocking=True) for name in ("targets", "masks", "prompts", "c2w", "fxfycxcy")
    )
    found = encode(components, targets, masks, targets[:, reference_view, None])
    return EncodedBatch(
        mean=found["mean"],
        std=found["std"],
        # The input is one of the targets, so its latents are there already.
        condition=found["mean"][:, reference_view],
        embedding=found["embedding"][:, 0],
        mask=found["mask"],
        prompts=prompts,
        cameras=Cameras(c2w, fxfycxcy, *targets.shape[-2:]),
    )
