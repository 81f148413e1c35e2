"""What the frozen encoders make of each sample, on disk: a training step with it runs the UNet only.

One safetensors file per sample and augmentation variant, <folder>/<2 digits>/<key>.safetensors, in half precision (the
posterior's own deviation is far larger than the rounding). The key is a hash over everything the content depends on:
the bytes of the pictures, the encoders' weights, the picture size, the draw. So nothing stale can be read, and runs,
ranks and nodes may share a folder: a file appears under its name only when complete, and two that write the same key
write the same content.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.files import atomic_write
from multiview.image import Draw
from multiview.sampler import MixedDataset, StepSampler
from mvdiffusion.components import Components
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset
from mvdiffusion.encoding import EncodedBatch, encode

log = logging.getLogger(__name__)

FORMAT = 1  # part of every key: raise it when the content or the encoding changes
HALF = ("mean", "std", "embedding", "mask")
EXACT = ("c2w", "fxfycxcy")


class LatentCache:
    """Batches out of the cache; what is missing or damaged there is encoded and stored on the way.

    dataset: with `variants` >= 1, so that a sample's augmentations come back. folder: may be shared and kept.
    encoded, damaged: how many entries this process has encoded, and how many of these because a file was damaged.
    """

    def __init__(
        self,
        components: Components,
        dataset: MouseMVDiffusionDataset | MixedDataset,
        device: torch.device,
        folder: Path | str,
    ) -> None:
        self.components, self.dataset, self.device, self.folder = components, dataset, device, Path(folder)
        self.encoders = encoder_fingerprint(components)
        self.encoded, self.damaged = 0, 0
        self._content: dict[int, str] = {}  # 64 characters per sample

    def batches(self, sampler: StepSampler) -> Iterator[EncodedBatch]:
        for keys in sampler:
            yield self.batch(keys)

    def batch(self, keys: list[tuple[int, int]]) -> EncodedBatch:
        """The encoded batch of (epoch, index) keys: what `live_batches` makes of them, to half precision."""
        rows: dict[str, list[Tensor]] = {name: [] for name in ("mean", "std", "mask", "embedding", "prompts", *EXACT)}
        reference = self.dataset.rig.reference_view
        for epoch, index in keys:
            part, local = self.dataset.part(index)
            entry = self.entry(index, part.draw(epoch, local))
            arrangement = part.arrangement(epoch, local)
            cameras = arrangement.cameras(Cameras(entry["c2w"], entry["fxfycxcy"], part.image_size, part.image_size))
            for name in ("mean", "std", "mask"):
                rows[name].append(entry[name][arrangement.rows])
            rows["embedding"].append(entry["embedding"][part.input_views().index(int(arrangement.rows[reference]))])
            rows["prompts"].append(arrangement.prompts)
            rows["c2w"].append(cameras.c2w)
            rows["fxfycxcy"].append(cameras.fxfycxcy)
        stacked = {name: torch.stack(tensors).to(self.device) for name, tensors in rows.items()}
        mean, size = stacked["mean"].float(), self.dataset.part(0)[0].image_size
        return EncodedBatch(
            mean=mean,
            std=stacked["std"].float(),
            condition=mean[:, reference],
            embedding=stacked["embedding"].float(),
            mask=stacked["mask"].float(),
            prompts=stacked["prompts"],
            cameras=Cameras(stacked["c2w"], stacked["fxfycxcy"], size, size),
        )

    def entry(self, index: int, draw: Draw) -> dict[str, Tensor]:
        """One sample under one draw, in the stored views' order, on the CPU."""
        path = self._path(index, draw)
        if path.is_file():
            try:
                return read_entry(path)
            except ValueError as error:
                log.warning("%s; encoded anew", error)
                self.damaged += 1
        content = self._encode(index, draw)
        write_entry(path, content)
        self.encoded += 1
        return content

    def _path(self, index: int, draw: Draw) -> Path:
        part, local = self.dataset.part(index)
        if index not in self._content:
            self._content[index] = part.content_hash(local)
        parts = [FORMAT, self._content[index], self.encoders, part.image_size, part.input_views(), draw.to_dict()]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def _encode(self, index: int, draw: Draw) -> dict[str, Tensor]:
        part, local = self.dataset.part(index)
        pictures, masks, cameras = part.pictures(local, draw)
        pictures, masks = pictures.to(self.device)[None], masks.to(self.device)[None]
        found = encode(self.components, pictures, masks, pictures[:, part.input_views()])
        content = {name: found[name][0].half().cpu() for name in HALF}
        return {**content, "c2w": cameras.c2w, "fxfycxcy": cameras.fxfycxcy}


def write_entry(path: Path, content: dict[str, Tensor]) -> None:
    """Writes an entry with a checksum over its tensors, atomically."""
    from safetensors.torch import save_file

    content = {name: tensor.contiguous() for name, tensor in content.items()}
    with atomic_write(path) as temporary:
        save_file(content, temporary, metadata={"crc32": str(_checksum(content))})


def read_entry(path: Path) -> dict[str, Tensor]:
    """Reads an entry. Raises ValueError if it is cut off, foreign, or its tensors are not those that were written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            stored = handle.metadata() or {}
            content = {name: handle.get_tensor(name) for name in handle.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cache entry {path} cannot be read: {error}") from error
    if set(content) != {*HALF, *EXACT} or stored.get("crc32") != str(_checksum(content)):
        raise ValueError(f"cache entry {path} is damaged: its checksum is not that of its content")
    return content


def _checksum(content: dict[str, Tensor]) -> int:
    value = 0
    for name in sorted(content):
        value = zlib.crc32(content[name].numpy().tobytes(), value)
    return value


def encoder_fingerprint(components: Components) -> str:
    """Hash over what decides the encoders' outputs: weights, precision, scaling, CLIP's preprocessing."""
    extractor = components.feature_extractor
    settings = [components.vae.config.scaling_factor, extractor.crop_size, extractor.image_mean, extractor.image_std]
    digest = hashlib.sha256(json.dumps([str(setting) for setting in settings]).encode())
    for module in (components.vae, components.image_encoder):
        digest.update(weights_fingerprint(module.state_dict()).encode())
    return digest.hexdigest()


def weights_fingerprint(state: dict[str, Tensor]) -> str:
    """Hash over named tensors: names, types, shapes, values."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
