"""The CUDA rasterizer: gsplat, all cameras of all scenes in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from multiview.cameras import Cameras

from ..gaussians import Gaussians
from .spherical_harmonics import evaluate_colors

# What both backends compute, as gsplat names it; projection.py holds the same numbers (a test compares them).
SETTINGS = {
    "near_plane": 0.01,
    "far_plane": 1e10,
    "radius_clip": 0.0,
    "eps2d": 0.3,
    "tile_size": 16,
    "rasterize_mode": "classic",
    "camera_model": "pinhole",
    "render_mode": "RGB+D",  # D: accumulated, not divided by alpha
    # Not only for speed: gsplat 1.5.3's packed projection reads the opacities of scene 0 for every scene of a batch
    # when it bounds the Gaussians.
    "packed": False,
}


def rasterize(gaussians: Gaussians, cameras: Cameras, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Renders `b` scenes, each from its `v` cameras, on a CUDA device in float32, whatever autocast says.

    The same signature and results as the CPU backend's; gradients also reach c2w (not fxfycxcy).
    Raises ValueError without a CUDA device, for tensors elsewhere, and where gsplat has no compiled kernels.
    """
    if not torch.cuda.is_available():  # gsplat would start a compilation that fails
        raise ValueError("the gsplat backend needs a CUDA device and none is available: use backend='cpu'")
    for name, tensor in (("gaussians", gaussians.xyz), ("cameras", cameras.c2w), ("background", background)):
        if tensor.device.type != "cuda":
            raise ValueError(f"the gsplat backend needs {name} on a CUDA device, got {tensor.device}")
    if gaussians.num_gaussians == 0:
        return _nothing(cameras, background)
    with torch.autocast("cuda", enabled=False):
        return _call(_load_gsplat(), gaussians.float(), cameras, background.float())


def _call(rasterization, gaussians: Gaussians, cameras: Cameras, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Our arguments to gsplat's `rasterization`, its results to ours."""
    colors = evaluate_colors(gaussians.xyz, gaussians.features, cameras.origins.float())
    pictures, alpha, _ = rasterization(
        means=gaussians.get_xyz,
        quats=gaussians.get_rotation,
        scales=gaussians.get_scaling,
        opacities=gaussians.get_opacity[..., 0],
        colors=colors[:, 0] if colors.shape[1] == 1 else colors,  # [b, n, 3] or [b, v, n, 3]
        viewmats=cameras.w2c.float(),
        Ks=cameras.intrinsic_matrix().float(),
        width=cameras.width,
        height=cameras.height,
        backgrounds=background,
        **SETTINGS,
    )
    pictures, alpha = pictures.movedim(-1, 2), alpha.movedim(-1, 2)  # [b, v, h, w, c] -> [b, v, c, h, w]
    return pictures[:, :, :3].contiguous(), alpha.contiguous(), pictures[:, :, 3:].contiguous()


def _load_gsplat():
    try:
        from gsplat import rasterization
        from gsplat.cuda._backend import _C  # compiles on first use, minutes, unless a compiled library is installed
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"gsplat cannot be used ({error}): run `bash setup_mouse_env.sh --gpu`, which says what is missing, or "
            "use backend='cpu'"
        ) from error
    if _C is None:
        raise ValueError(
            "gsplat has no compiled kernels and found no CUDA toolkit to compile them with: run "
            "`bash setup_mouse_env.sh --gpu`, which says what is missing, or use backend='cpu'"
        )
    return rasterization


def _nothing(cameras: Cameras, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, v = cameras.shape
    empty = background.new_zeros(b, v, 1, cameras.height, cameras.width, dtype=torch.float32)
    return background.float()[..., None, None] + empty.expand(b, v, 3, -1, -1), empty, empty.clone()
