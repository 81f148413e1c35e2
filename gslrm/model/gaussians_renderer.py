"""Rendering of Gaussians: the only place that picks a rasterizer backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from multiview.cameras import TURNTABLE_DISTANCE, TURNTABLE_HFOV_DEG, Cameras

from .gaussians import Gaussians

BACKENDS = ("auto", "gsplat", "cpu")


class RenderOutput(NamedTuple):
    """rgb: [b, v, 3, h, w], 0 or more, over the background (values above 1 are possible: nothing is clipped).

    alpha: [b, v, 1, h, w], 0..1.
    depth: [b, v, 1, h, w], world units along the optical axis, accumulated: sum of weight * z. The mean depth of what
        a pixel shows is depth / alpha, where alpha is not 0.
    """

    rgb: Tensor
    alpha: Tensor
    depth: Tensor

    def mean_depth(self, min_alpha: float = 0.5) -> Tensor:
        """[b, v, 1, h, w]: camera-frame z of what a pixel shows, 0 where alpha is below `min_alpha` (no surface)."""
        return torch.where(self.alpha >= min_alpha, self.depth / self.alpha.clamp_min(1e-6), 0.0)


def render(
    gaussians: Gaussians,
    cameras: Cameras,
    background: Tensor | float = 1.0,
    backend: str = "auto",
    recompute: bool = False,
) -> RenderOutput:
    """Renders b scenes from v cameras each, differentiable in the Gaussians and the background.

    cameras: [b, v]. background: a number, [3], [b, 3] or [b, v, 3], 0..1.
    backend: "gsplat" (CUDA), "cpu", or "auto": gsplat for tensors on a CUDA device, cpu for tensors on the CPU. Both
    compute the same mathematics (gsplat's classic mode) in float32, whatever autocast says.
    recompute: render view by view, keep of each only the picture and draw it again in the backward pass, so that
        memory grows with the pictures alone and not with views x Gaussians (training at 512 px). The pictures are the
        same bits; gradients are summed over the views in another order, so they are the same to rounding.
    Raises ValueError for shapes, devices or backends that do not fit.
    """
    if len(cameras.shape) != 2 or cameras.shape[0] != gaussians.num_scenes:
        raise ValueError(
            f"cameras must have shape [b, v] with b = {gaussians.num_scenes} scenes, got {list(cameras.shape)}"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    device = gaussians.device
    if cameras.c2w.device != device:
        raise ValueError(f"cameras must be on the Gaussians' device {device}, got {cameras.c2w.device}")
    if backend == "auto":
        backend = "gsplat" if device.type == "cuda" else "cpu"
    background = _expand_background(background, cameras.shape, device)
    if backend == "gsplat":
        from .rasterizers.gsplat_backend import rasterize
    else:
        from .rasterizers.cpu import rasterize
    if not recompute or not torch.is_grad_enabled():
        return RenderOutput(*rasterize(gaussians, cameras, background))
    views = []
    for v in range(cameras.shape[1]):
        of_view = (gaussians, cameras[:, v : v + 1], background[:, v : v + 1])
        # Nothing in it is random; with the state of the generators kept, every view would wait for the GPU.
        views.append(checkpoint(rasterize, *of_view, use_reentrant=False, preserve_rng_state=False))
    return RenderOutput(*[torch.cat(parts, dim=1) for parts in zip(*views)])


def _expand_background(background: Tensor | float, shape: torch.Size, device: torch.device) -> Tensor:
    b, v = shape
    if not isinstance(background, Tensor):
        return torch.full((b, v, 3), float(background), device=device)
    background = background.to(device)
    if background.shape == (3,):
        return background.expand(b, v, 3)
    if background.shape == (b, 3):
        return background[:, None].expand(b, v, 3)
    if background.shape == (b, v, 3):
        return background
    raise ValueError(f"background must be a number, [3], [{b}, 3] or [{b}, {v}, 3], got {list(background.shape)}")


@torch.no_grad()
def render_turntable(
    gaussians: Gaussians,
    num_views: int = 120,
    size: int = 384,
    *,
    elevation_deg: float = 0.0,
    distance: float = TURNTABLE_DISTANCE,
    hfov_deg: float = TURNTABLE_HFOV_DEG,
    background: Tensor | float = 1.0,
    backend: str = "auto",
    on_frame=None,
) -> Tensor:
    """Frames [num_views, 3, size, size], 0..1, of a camera going once around one scene (b = 1).

    The camera starts at -y and goes counter-clockwise seen from above in steps of 360 / num_views degrees, end point
    excluded, looking at the origin, world z up (120 views: steps of 3 degrees). FaceLift's turntable is
    num_views=8, size=384, elevation_deg=0. `on_frame(done, total)` is called after every frame, for progress bars.
    """
    if gaussians.num_scenes != 1:
        raise ValueError(f"render_turntable takes one scene, got {gaussians.num_scenes}; use gaussians.scene(i)")
    cameras = Cameras.turntable(num_views, size, elevation_deg=elevation_deg, distance=distance, hfov_deg=hfov_deg).to(
        gaussians.device
    )
    frames = []
    for number in range(num_views):
        frames.append(render(gaussians, cameras[None, number : number + 1], background, backend).rgb[0, 0].clamp(0, 1))
        if on_frame is not None:
            on_frame(number + 1, num_views)
    return torch.stack(frames)
