"""What runs of the network are timed: plain numbers, so that a case can be handed to a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from benchmarks.peer_gslrm import PlainGSLRM
from benchmarks.timing import matrix_dtype
from gslrm.config import ImageTokenizerConfig, ModelConfig, TransformerConfig
from gslrm.model.flops import forward_flops
from gslrm.model.gaussians_renderer import render
from gslrm.model.gslrm import GSLRM
from gslrm.model.selection import select_foreground
from multiview.cameras import Cameras
from multiview.rig import load_rig

NETWORKS = ("gslrm", "plain")
PASSES = ("forward", "forward + backward", "training step")


class Case(Protocol):
    """Anything that is timed: here NetworkCase, and Stage 1's workloads. Must pickle."""

    def build(self, device: torch.device) -> Callable[[], object]: ...

    def flops(self) -> float: ...


@dataclass(frozen=True)
class NetworkSize:
    image_size: int
    d: int
    layers: int
    views: int = 6
    patch_size: int = 8
    d_head: int = 64

    def config(self, *, prune: bool = False) -> ModelConfig:
        return ModelConfig(
            image_tokenizer=ImageTokenizerConfig(image_size=self.image_size, patch_size=self.patch_size),
            transformer=TransformerConfig(d=self.d, d_head=self.d_head, n_layer=self.layers),
            prune_background_tokens=prune,
        )

    def __str__(self) -> str:
        return f"d {self.d}, {self.layers} layers, {self.views} views of {self.image_size} px"


@dataclass(frozen=True)
class NetworkCase:
    """One thing to run. coverage: share of each view inside its mask (the network prunes); None: dense."""

    size: NetworkSize
    network: str = "gslrm"  # or plain: written with torch's own modules
    passes: str = "forward"
    coverage: float | None = None
    grad_checkpoint_every: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("network", NETWORKS), ("passes", PASSES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def masks(self, device: torch.device | str = "cpu") -> torch.Tensor | None:
        if self.coverage is None:
            return None
        return disc_mask(self.coverage, self.size.image_size, device).expand(1, self.size.views, 1, -1, -1).contiguous()

    def num_tokens(self) -> int:
        """Tokens of the sequence, the free ones included."""
        config, masks = self.size.config(), self.masks()
        if masks is None:
            patches = self.size.views * (self.size.image_size // self.size.patch_size) ** 2
        else:
            selection = select_foreground(masks, self.size.patch_size, config.prune_margin_px)
            patches = selection.patches_per_sample[0]
        return config.gaussians.n_gaussians + patches

    def flops(self) -> float:
        """Useful operations: a backward pass counts as two forward passes, recomputation does not count."""
        forward = forward_flops(self.size.config(), [self.num_tokens()])
        return forward if self.passes == "forward" else 3 * forward

    def build(self, device: torch.device) -> Callable[[], object]:
        """The function to time. Random weights, one scene of random pictures, the rig `mouse6`."""
        torch.manual_seed(0)
        config = self.size.config(prune=self.coverage is not None)
        if self.network == "plain":
            model = PlainGSLRM(config)
        else:
            model = GSLRM(config, grad_checkpoint_every=self.grad_checkpoint_every)
        model = model.to(device).requires_grad_(self.passes != "forward")
        size = self.size.image_size
        images = torch.rand(1, self.size.views, 3, size, size, device=device)
        cameras = load_rig("mouse6").cameras(size)[: self.size.views][None].to(device)
        masks = self.masks(device)
        inputs = {} if masks is None else {"masks": masks}
        if self.compile:
            _compile(model)

        def predict():
            with torch.autocast(device.type, dtype=matrix_dtype(device), enabled=device.type == "cuda"):
                output = model(images, cameras, **inputs)
            return output if self.network == "plain" else output.gaussians

        if self.passes == "forward":
            return torch.no_grad()(predict)
        if self.passes == "forward + backward":
            return lambda: _backward(model, predict())
        return training_step(model, predict, images, cameras)


def _compile(model: torch.nn.Module) -> None:
    """As training does it; the plain network as a whole. Graphs of earlier cases are forgotten."""
    torch.compiler.reset()
    if isinstance(model, PlainGSLRM):
        model.compile()
        return
    from gslrm.training import compile_blocks

    compile_blocks(model)


def _backward(model: torch.nn.Module, gaussians) -> None:
    model.zero_grad(set_to_none=True)
    sum(tensor.square().mean() for tensor in vars(gaussians).values()).backward()


def training_step(model: torch.nn.Module, predict, images: torch.Tensor, cameras: Cameras) -> Callable[[], object]:
    """Forward, rendering of the input views, L2 loss, backward, clipping, AdamW. Losses with VGG are not in it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=images.device.type == "cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        rgb = render(predict(), cameras).rgb
        torch.nn.functional.mse_loss(rgb, images).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def disc_mask(coverage: float, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[size, size] of 0 and 1: a disc around the centre that covers the share `coverage` of the picture.

    The nearest pixels to the centre make the disc, so the share is exact; above pi / 4 the picture cuts it.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be above 0 and at most 1, got {coverage}")
    offset = torch.arange(size, device=device) + 0.5 - size / 2
    distance = (offset[:, None].square() + offset[None].square()).flatten()
    mask = torch.zeros(size * size, device=device)
    mask[distance.argsort(stable=True)[: round(coverage * size * size)]] = 1.0
    return mask.view(size, size)


def variants(case: NetworkCase, compile: bool) -> list[NetworkCase]:
    """The case, and on request the same compiled."""
    return [case, replace(case, compile=True)] if compile else [case]
