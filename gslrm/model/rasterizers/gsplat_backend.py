"""The CUDA rasterizer: gsplat, all cameras of all scenes in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from gslrm.model.gaussians import Gaussians
from multiview.cameras import Cameras

# What both backends compute, as gsplat names it; projection.py holds the same numbers (a test compares them).
SETTINGS = {
    "near_plane": 0.01, "far_plane": 1e10, "radius_clip": 0.0, "eps2d": 0.3, "tile_size": 16,
    "rasterize_mode": "classic", "camera_model": "pinhole",
    "render_mode": "RGB+D",  # D: accumulated, not divided by alpha
    # Not only for speed: gsplat 1.5.3's packed projection reads the opacities of scene 0 for every scene of a batch
    # when it bounds the Gaussians.
    "packed": False,
}  # fmt: skip


def rasterize(gaussians: Gaussians, cameras: Cameras, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Renders as the CPU backend does, on a CUDA device; gradients also reach c2w. ValueError where gsplat cannot
    run."""
    background = background.float()
    if gaussians.num_gaussians == 0:  # gsplat's kernels refuse an empty scene
        empty = background.new_zeros(*cameras.shape, 1, cameras.height, cameras.width)
        return background[..., None, None] + empty.expand(-1, -1, 3, -1, -1), empty, empty.clone()
    with torch.autocast("cuda", enabled=False):
        return call(_load_gsplat(), gaussians.to(torch.float32), cameras, background)


def call(rasterization, gaussians: Gaussians, cameras: Cameras, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Passes our arguments to gsplat's `rasterization` and brings its results into our layout."""
    colors = gaussians.colors_seen(cameras)
    images, alpha, _ = rasterization(
        means=gaussians.xyz, quats=gaussians.get_rotation, scales=gaussians.get_scaling,
        opacities=gaussians.get_opacity[..., 0],
        colors=colors[:, 0] if colors.shape[1] == 1 else colors,  # [b, n, 3] or [b, v, n, 3]
        viewmats=cameras.w2c.float(), Ks=cameras.intrinsic_matrix().float(), width=cameras.width,
        height=cameras.height, backgrounds=background, **SETTINGS,
    )  # fmt: skip
    images, alpha = images.movedim(-1, 2), alpha.movedim(-1, 2)  # [b, v, h, w, c] -> [b, v, c, h, w]
    return images[:, :, :3].contiguous(), alpha.contiguous(), images[:, :, 3:].contiguous()


def _load_gsplat():
    """Returns gsplat's `rasterization`. Raises ValueError, with the command that helps, where it cannot run."""
    remedy = "run `bash setup_mouse_env.sh --gpu`, which says what is missing, or use backend='cpu'"
    try:
        from gsplat import rasterization
        from gsplat.cuda._backend import _C  # compiles on first use, minutes, unless a compiled library is installed
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"gsplat cannot be used ({error}): {remedy}") from error
    if _C is None:
        raise ValueError(f"gsplat has no compiled kernels and found no CUDA toolkit to compile them with: {remedy}")
    return rasterization
