"""Rendering of Gaussians: the only place that picks a rasterizer backend."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gslrm.model.gaussians import Gaussians
from multiview.cameras import Cameras

BACKENDS = ("auto", "gsplat", "cpu")
PRUNING_SIZE, PRUNING_RATE = 256, 0.7  # pixels on the longer side; what a round keeps


class RenderOutput(NamedTuple):
    """rgb: [b, v, 3, h, w], 0 or more, over the background (values above 1 are possible: nothing is clipped). alpha:
    [b, v, 1, h, w], 0..1. depth: [b, v, 1, h, w], world units along the optical axis, accumulated: sum of weight *
    z."""

    rgb: Tensor
    alpha: Tensor
    depth: Tensor

    def mean_depth(self, min_alpha: float = 0.5) -> Tensor:
        """[b, v, 1, h, w]: camera-frame z of what a pixel shows, 0 where alpha is below `min_alpha` (no surface)."""
        return torch.where(self.alpha >= min_alpha, self.depth / self.alpha.clamp_min(1e-6), 0.0)


def render(
    gaussians: Gaussians, cameras: Cameras, background: Tensor | float = 1.0, backend: str = "auto",
    recompute: bool = False,
) -> RenderOutput:  # fmt: skip
    """Renders b scenes from v cameras each, differentiable in the Gaussians and the background.

    cameras: [b, v]. background: a number, [3], [b, 3] or [b, v, 3], 0..1. backend: "gsplat" (CUDA), "cpu", or "auto" by
    the tensors' device; both compute gsplat's classic mode in float32, under autocast too. recompute: render view by
    view, keep the images alone and draw them again in the backward pass, so that memory does not grow with views x
    Gaussians (training at 512 px): the images are the same bits, gradients (another order of views) equal to rounding.
    Raises ValueError for shapes, devices or backends that do not fit.
    """
    device, (b, v) = gaussians.device, (gaussians.num_scenes, cameras.shape[-1] if cameras.shape else 0)
    if cameras.shape != (b, v) or cameras.c2w.device != device:
        expected = f"shape [b, v] with b = {b} scenes and be on the Gaussians' device {device}"
        raise ValueError(f"cameras must have {expected}, got {list(cameras.shape)} on {cameras.c2w.device}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    on_gpu = device.type == "cuda" if backend == "auto" else backend == "gsplat"
    if device.type != ("cuda" if on_gpu else "cpu"):  # gsplat without a GPU would start a compilation that fails
        raise ValueError(f"backend {backend} needs a {'CUDA device' if on_gpu else 'CPU'}, got tensors on {device}")
    background = torch.as_tensor(background, dtype=None if isinstance(background, Tensor) else torch.float32)
    if background.shape not in ((), (3,), (b, 3), (b, v, 3)):
        raise ValueError(f"background must be a number, [3], [{b}, 3] or [{b}, {v}, 3], got {list(background.shape)}")
    background = background.to(device)
    background = (background[:, None] if background.ndim == 2 else background).expand(b, v, 3)
    if on_gpu:
        from gslrm.model.rasterizers.gsplat_backend import rasterize
    else:
        from gslrm.model.rasterizers.cpu import rasterize
    if not recompute or not torch.is_grad_enabled():
        return RenderOutput(*rasterize(gaussians, cameras, background))
    views = []
    for view in range(v):
        of_view = (gaussians, cameras[:, view : view + 1], background[:, view : view + 1])
        # Nothing in it is random; with the state of the generators kept, every view would wait for the GPU.
        views.append(checkpoint(rasterize, *of_view, use_reentrant=False, preserve_rng_state=False))
    return RenderOutput(*[torch.cat(parts, dim=1) for parts in zip(*views)])


def contributions(gaussians: Gaussians, cameras: Cameras) -> Tensor:
    """Returns what each Gaussian of one scene (b = 1) adds to the views of cameras [v], on white [n]: its blending
    weights times the squared change of the pixels without it, both summed over all pixels. Unseen ones have 0."""
    gray = torch.zeros_like(gaussians.features[:, :, :1], requires_grad=True)  # far from the clamp of colors at 0
    logits, changes = gaussians.opacity.detach().requires_grad_(), torch.zeros_like(gaussians.opacity)
    generator = torch.Generator(gaussians.device).manual_seed(0)
    with torch.enable_grad():
        for view in range(len(cameras)):  # one by one: the memory of one
            camera = cameras[None, view : view + 1]
            # Weights are the gradients of the pixels with respect to colors.
            render(replace(gaussians, features=gray), camera, 0.0).rgb.sum().backward()
            rgb = render(replace(gaussians, opacity=logits), camera, 1.0).rgb
            # E (sum_p r_p x_p)^2 = sum_p x_p^2 for independent r_p of variance 1: one backward pass for all pixels.
            noise = torch.randn(rgb.shape, generator=generator, device=rgb.device)
            changes += torch.autograd.grad((rgb * noise).sum(), logits)[0].square()
    # Pixels are linear in each opacity o, whose derivative by its logit is o (1 - o): o times the slope is the change.
    return (gray.grad[:, :, 0, :1] * changes / (1 - gaussians.get_opacity + 1e-3).square())[0, :, 0]


def prune(gaussians: Gaussians, cameras: Cameras, count: int) -> Gaussians:
    """Returns the `count` Gaussians of one scene (b = 1) that add most to the views of cameras [v], in their order; all
    where there are no more."""
    if (factor := max(cameras.height, cameras.width) / PRUNING_SIZE) > 1:  # fewer pixels tell the same
        cameras = cameras.resize(round(cameras.height / factor), round(cameras.width / factor))
    while (present := gaussians.num_gaussians) > count:  # in rounds: who is left takes over the weights of who is gone
        kept = contributions(gaussians, cameras).topk(max(count, int(PRUNING_RATE * present))).indices
        gaussians = gaussians.select(kept.sort().values)
    return gaussians


@torch.no_grad()
def render_turntable(
    gaussians: Gaussians, num_views: int = 120, size: int = 384, *, elevation_deg: float = 0.0,
    background: Tensor | float = 1.0, on_frame=None,
) -> Tensor:  # fmt: skip
    """Renders the frames [num_views, 3, size, size], 0..1, of a camera going once around one scene (b = 1), from -y
    counter-clockwise seen from above in steps of 360 / num_views degrees. FaceLift's turntable is num_views=8,
    size=384, elevation_deg=0. `on_frame(done, total)` is called after every frame, for progress bars."""
    if (needed := 24.0 * num_views * size**2) > 32e9:  # the frames, and once more in the stack
        raise ValueError(
            f"{num_views} frames of {size} px need {needed / 1e9:.0f} GB; lower the turntable's views or size"
        )
    cameras, frames = Cameras.turntable(num_views, size, elevation_deg=elevation_deg).to(gaussians.device)[None], []
    for number in range(num_views):
        frames.append(render(gaussians, cameras[:, number : number + 1], background).rgb[0, 0].clamp(0, 1))
        if on_frame is not None:
            on_frame(number + 1, num_views)
    return torch.stack(frames)
