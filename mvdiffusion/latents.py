"""Latents and conditions: what the frozen encoders make of images, for sampling and, encoded or cached, for training.

The cache holds one safetensors file per sample and augmentation variant, <folder>/<2 digits>/<key>.safetensors, in half
precision (the posterior's own deviation is far larger than the rounding). The key is a hash over all that the content
depends on: nothing stale is read, and runs, ranks and nodes may share a folder, as files appear only when complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import default_collate

from multiview.cameras import Cameras
from multiview.files import atomic_write
from multiview.image import Draw, to_uint8
from multiview.sampler import MixedDataset, StepSampler, load_batches
from mvdiffusion.components import Components

log = logging.getLogger(__name__)

NOISE_LEVEL = 0  # of 1000, on the CLIP embedding: FaceLift's, for training and inference
FORMAT = 1  # part of every cache key: raise it when the content or the encoding changes
HALF = ("mean", "std", "embedding", "mask")  # tensors of a cache entry in half precision; its cameras are exact


def clip_pixels(components: Components, images: Tensor, *, exact: bool) -> Tensor:
    """Images [b, 3, h, w] 0..1 -> CLIP's input [b, 3, s, s]. exact: through the PIL image processor (inference;
    FaceLift's numbers exactly), else the same in tensors (training)."""
    own = components.feature_extractor
    if exact:
        pil_images = [Image.fromarray(to_uint8(image)) for image in images]
        return own(images=pil_images, return_tensors="pt")["pixel_values"].to(images.device)
    size = (own.crop_size["height"], own.crop_size["width"])
    pixels = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values).to(pixels).view(1, 3, 1, 1) for values in (own.image_mean, own.image_std))
    return (pixels - mean) / std


def image_embeddings(components: Components, images: Tensor, *, exact: bool) -> Tensor:
    """Images [b, 3, h, w] 0..1 -> CLIP's projected embeddings [b, d]; exact: see `clip_pixels`."""
    pixels = clip_pixels(components, images, exact=exact)
    return components.image_encoder(pixels.to(components.image_encoder.dtype)).image_embeds


def class_labels(components: Components, embeddings: Tensor, noise: Tensor) -> Tensor:
    """Embeddings [b, d] and noise [b, d] -> class labels [b, 2d]: [noised embedding, embedding of the noise level]."""
    levels = torch.full((len(embeddings),), NOISE_LEVEL, device=embeddings.device, dtype=torch.long)
    normalized = components.image_normalizer.scale(embeddings)
    noised = components.image_noising_scheduler.add_noise(normalized, noise.to(normalized), levels)
    noised = components.image_normalizer.unscale(noised)
    level_embedding = get_timestep_embedding(levels, noised.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([noised, level_embedding.to(noised)], dim=-1)


def condition_latents(components: Components, images: Tensor) -> Tensor:
    """Images [b, 3, h, w] 0..1 -> the mode of their latents, scaled [b, c, h/f, w/f]."""
    vae = components.vae
    return vae.encode(images.to(vae.dtype) * 2 - 1).latent_dist.mode() * vae.config.scaling_factor


def decode_latents(components: Components, latents: Tensor) -> Tensor:
    """Scaled latents [b, c, h, w] -> images [b, 3, h*f, w*f], 0..1, float32."""
    vae = components.vae
    images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class EncodedBatch:
    """b objects, n views, latents of c channels and side l. The input is one of the targets, the reference view."""

    mean: Tensor  # [b, n, c, l, l], of the targets' posterior, scaled by the VAE's factor as std
    std: Tensor
    embedding: Tensor  # [b, d], the input's CLIP embedding
    mask: Tensor  # [b, n, 1, l, l], fraction of animal in each cell
    prompts: Tensor  # [b, n] int64, which of the rig's prompts describes a view
    cameras: Cameras  # [b, n], of the images


@torch.no_grad()
def encode(components: Components, images: Tensor, masks: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    """Encodes images [b, n, 3, s, s], masks [b, n, 1, s, s] and inputs [b, m, 3, s, s] (images that serve as input),
    all 0..1, each once. Returns mean, std [b, n, c, l, l], embedding [b, m, d], mask [b, n, 1, l, l]."""
    vae, objects, scale = components.vae, len(images), components.vae.config.scaling_factor
    posterior = vae.encode(images.flatten(0, 1).to(vae.dtype) * 2 - 1).latent_dist
    embedding = image_embeddings(components, inputs.flatten(0, 1), exact=False)
    return {
        "mean": (posterior.mean * scale).unflatten(0, (objects, -1)).float(),
        "std": (posterior.std * scale).unflatten(0, (objects, -1)).float(),
        "embedding": embedding.unflatten(0, (objects, -1)).float(),
        "mask": F.avg_pool2d(masks.flatten(0, 1), components.vae_factor).unflatten(0, (objects, -1)),
    }


def live_batches(
    components: Components, dataset: MixedDataset, sampler: StepSampler, workers: int, device: torch.device
) -> Iterator[EncodedBatch]:
    """Reads and encodes batches as they are asked for."""
    reference = dataset.rig.reference_view
    for batch in load_batches(dataset, sampler, workers, device):
        targets, masks, prompts, c2w, fxfycxcy = (
            batch[name].to(device, non_blocking=True) for name in ("targets", "masks", "prompts", "c2w", "fxfycxcy")
        )
        encoded = encode(components, targets, masks, targets[:, reference, None])
        encoded["embedding"] = encoded["embedding"][:, 0]
        yield EncodedBatch(**encoded, prompts=prompts, cameras=Cameras(c2w, fxfycxcy, *targets.shape[-2:]))


class LatentCache:
    """Batches out of the cache; what is missing or damaged there is encoded and stored on the way. dataset: with
    `variants` >= 1, so that a sample's augmentations come back."""

    def __init__(self, components: Components, dataset: MixedDataset, device: torch.device, folder: Path | str) -> None:
        self.components, self.dataset, self.device, self.folder = components, dataset, device, Path(folder)
        # What decides the encoders' outputs: weights, precision, scaling, CLIP's preprocessing.
        vae, extractor = components.vae, components.feature_extractor
        settings = [getattr(extractor, name) for name in ("crop_size", "image_mean", "image_std")]
        settings += [weights_fingerprint(module.state_dict()) for module in (vae, components.image_encoder)]
        settings.append(vae.config.scaling_factor)
        self.encoders = hashlib.sha256(str(settings).encode()).hexdigest()
        self._content: dict[int, str] = {}  # hash of a sample's files, by its index

    def batch(self, keys: list[tuple[int, int]]) -> EncodedBatch:
        """The encoded batch of (epoch, index) keys: what `live_batches` makes of them, to half precision."""
        rows, reference = [], self.dataset.rig.reference_view
        for epoch, index in keys:
            part, local = self.dataset.part(index)
            entry, arrangement = self.entry(index, part.draw(epoch, local)), part.arrangement(epoch, local)
            cameras = arrangement.cameras(Cameras(entry["c2w"], entry["fxfycxcy"], part.image_size, part.image_size))
            row = {name: entry[name][arrangement.rows].float() for name in ("mean", "std", "mask")}
            row["embedding"] = entry["embedding"][part.input_views().index(int(arrangement.rows[reference]))].float()
            rows.append({**row, "prompts": arrangement.prompts, "c2w": cameras.c2w, "fxfycxcy": cameras.fxfycxcy})
        stacked = {name: tensor.to(self.device) for name, tensor in default_collate(rows).items()}
        cameras = Cameras(stacked.pop("c2w"), stacked.pop("fxfycxcy"), part.image_size, part.image_size)
        return EncodedBatch(**stacked, cameras=cameras)

    def entry(self, index: int, draw: Draw) -> dict[str, Tensor]:
        """One sample under one draw, in the stored views' order, on the CPU: read, or else encoded and written."""
        part, local = self.dataset.part(index)
        if index not in self._content:
            self._content[index] = part.content_hash(local)
        parts = [FORMAT, self._content[index], self.encoders, part.image_size, part.input_views(), draw.to_dict()]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        path = self.folder / key[:2] / f"{key}.safetensors"
        if path.is_file():
            try:
                with safe_open(path, framework="pt") as handle:
                    content = {name: handle.get_tensor(name) for name in (*HALF, "c2w", "fxfycxcy")}
                    if (handle.metadata() or {}).get("digest") == weights_fingerprint(content):
                        return content
                problem = "its checksum is not that of its content"
            except (SafetensorError, OSError) as error:
                problem = error
            log.warning("cache entry %s is cut off, foreign or damaged: %s; encoded anew", path, problem)
        images, masks, cameras = part.pictures(local, draw)
        images, masks = images.to(self.device)[None], masks.to(self.device)[None]
        encoded = encode(self.components, images, masks, images[:, part.input_views()])
        content = {name: encoded[name][0].half().cpu().contiguous() for name in HALF}
        content.update(c2w=cameras.c2w.contiguous(), fxfycxcy=cameras.fxfycxcy.contiguous())
        with atomic_write(path) as temporary:
            save_file(content, temporary, metadata={"digest": weights_fingerprint(content)})
        return content


def weights_fingerprint(state: dict[str, Tensor]) -> str:
    """Hash over named tensors: names, types, shapes, values."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
