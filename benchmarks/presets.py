"""The two sizes everything is measured at; the same code runs both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases import NetworkSize
from benchmarks.network import measure_gslrm, measure_tokens, measure_training
from benchmarks.rasterizer import measure_rasterizer, measure_rendering
from benchmarks.report import Table


@dataclass(frozen=True)
class Preset:
    """network: the GS-LRM. scenes: (kind, Gaussians, size in px) for the rasterizer."""

    network: NetworkSize
    scenes: tuple[tuple[str, int, int], ...]

    @property
    def num_gaussians(self) -> int:
        """As many as the network predicts: one per pixel of every view."""
        return self.network.views * self.network.image_size**2


_SMALL = ((20_000, 128), (100_000, 128), (100_000, 256))
PRESETS = {
    "demo": Preset(
        NetworkSize(image_size=128, d=256, layers=6),
        tuple((kind, *scene) for kind in ("trained-like", "untrained") for scene in _SMALL),
    ),
    "full": Preset(
        NetworkSize(image_size=512, d=1024, layers=24),
        tuple((kind, *scene) for kind in ("trained-like", "untrained") for scene in (*_SMALL, (400_000, 512))),
    ),
}


def measure(
    what: str, preset: Preset, device: torch.device, repeats: int, *, compile: bool = False, memory: bool = True
) -> Table:
    """One of the parts that scripts/benchmark.py offers."""
    network = preset.network
    if what == "rasterizer":
        return measure_rasterizer(list(preset.scenes), device, repeats)
    if what == "gslrm":
        return measure_gslrm(network, device, repeats, compile=compile, memory=memory)
    if what == "tokens":
        return measure_tokens(network, device, repeats, memory=memory)
    if what == "training":
        return measure_training(network, device, repeats, compile=compile, memory=memory)
    if what == "rendering":
        return measure_rendering(network.views, network.image_size, preset.num_gaussians, device, repeats)
    raise ValueError(f"what must be one of rasterizer, gslrm, tokens, training, rendering, got {what!r}")
