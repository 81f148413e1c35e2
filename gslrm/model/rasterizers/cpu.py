"""The CPU rasterizer: numba kernels behind a torch.autograd.Function.

Same mathematics as gsplat's `classic` mode, differentiable in everything but the cameras. Deterministic: the result
does not depend on the number of threads, which is torch.get_num_threads().
"""

from __future__ import annotations

import os
import threading

import torch
from torch import Tensor

from multiview.cameras import Cameras

from ..gaussians import Gaussians
from .constants import TILE_PX
from .spherical_harmonics import evaluate_colors

# numba's workqueue layer (the one that survives a fork, as data-loader workers need) allows one launch at a time.
_LAUNCH_LOCK = threading.Lock()


def rasterize(gaussians: Gaussians, cameras: Cameras, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Renders `b` scenes, each from its `v` cameras. All tensors on the CPU; computes in float32.

    gaussians: b scenes. cameras: [b, v]; no gradients for them. background: [b, v, 3].
    Returns rgb [b, v, 3, h, w] (not clipped above), alpha [b, v, 1, h, w] in 0..1 and depth [b, v, 1, h, w], the
    accumulated sum of weight * z (z along the optical axis; divide by alpha for a mean depth).
    A scene with a value that is not finite gives pictures of NaN, as arithmetic does.
    """
    if cameras.c2w.requires_grad or cameras.fxfycxcy.requires_grad:
        raise ValueError("the CPU rasterizer has no gradients for cameras: detach them or use the gsplat backend")
    for name, tensor in (("gaussians", gaussians.xyz), ("cameras", cameras.c2w), ("background", background)):
        if tensor.device.type != "cpu":
            raise ValueError(f"the CPU rasterizer needs {name} on the cpu, got {tensor.device}")
    with torch.autocast("cpu", enabled=False):
        gaussians = gaussians.float()
        pictures = _Rasterize.apply(
            gaussians.get_xyz,
            gaussians.get_rotation,
            gaussians.get_scaling,
            gaussians.get_opacity[..., 0],
            evaluate_colors(gaussians.xyz, gaussians.features, cameras.origins.float()),
            cameras.w2c.double(),
            cameras.fxfycxcy.double(),
            cameras.height,
            cameras.width,
        )
        transmittance = pictures[:, :, 4:5]
        rgb = pictures[:, :, :3] + transmittance * background.float()[..., None, None]
    return rgb, 1 - transmittance, pictures[:, :, 3:4]


def _load_kernels():
    """Imports numba (slow) on first use and chooses its threads: returns (kernels module, number of workers)."""
    import numba

    if "NUMBA_THREADING_LAYER" not in os.environ:
        numba.config.THREADING_LAYER = "workqueue"
    from . import kernels

    workers = max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(workers)
    return kernels, workers


class _Rasterize(torch.autograd.Function):
    """xyz [b,n,3], unit quaternions [b,n,4], scales [b,n,3], opacities [b,n], colours [b,1 or v,n,3] -> [b,v,5,h,w]."""

    @staticmethod
    def forward(ctx, xyz, quaternion, scale, opacity, color, w2c, intrinsics, height, width):
        ctx.needs = any(ctx.needs_input_grad)
        tensors = [t.detach().contiguous() for t in (xyz, quaternion, scale, opacity, color, w2c, intrinsics)]
        pictures = torch.empty(*w2c.shape[:2], 5, height, width)
        arrays = [t.numpy() for t in tensors]
        kept = []
        with _LAUNCH_LOCK:
            kernels, workers = _load_kernels()
            for b in range(w2c.shape[0]):
                for v in range(w2c.shape[1]):
                    kept.append(_draw(kernels, workers, _one(arrays, b, v), pictures[b, v].numpy()))
        if ctx.needs:
            ctx.save_for_backward(*tensors, pictures)
            ctx.kept = kept
        return pictures

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_pictures):
        *tensors, pictures = ctx.saved_tensors
        arrays = [t.numpy() for t in tensors]
        b_count, n = tensors[0].shape[:2]
        v_count = pictures.shape[1]
        grad_pictures = grad_pictures.float().contiguous().numpy()
        grads = torch.zeros(b_count, n, 14)
        grad_color = torch.zeros_like(tensors[4])
        with _LAUNCH_LOCK:
            kernels, workers = _load_kernels()
            for b in range(b_count):
                for v in range(v_count):
                    own = torch.zeros(n, 14) if grad_color.shape[1] > 1 else grads[b]
                    kept = ctx.kept[b * v_count + v]
                    _draw_backward(
                        kernels, workers, _one(arrays, b, v), kept, pictures[b, v].numpy(), grad_pictures[b, v], own.numpy()
                    )
                    if grad_color.shape[1] > 1:
                        grads[b, :, :11] += own[:, :11]
                        grad_color[b, v] = own[:, 11:]
        if grad_color.shape[1] == 1:
            grad_color = grads[:, None, :, 11:]
        return grads[..., :3], grads[..., 3:7], grads[..., 7:10], grads[..., 10], grad_color, None, None, None, None


def _one(arrays, b: int, v: int):
    """The inputs of one picture."""
    xyz, quaternion, scale, opacity, color, w2c, intrinsics = arrays
    return (
        xyz[b],
        quaternion[b],
        scale[b],
        opacity[b],
        color[b, v if color.shape[1] > 1 else 0],
        w2c[b, v],
        intrinsics[b, v],
    )


def _draw(kernels, workers, inputs, picture):
    """Fills picture [5, h, w]. Returns what the backward pass needs."""
    import numpy as np

    _, height, width = picture.shape
    n = inputs[0].shape[0]
    splats = np.zeros((n, kernels.NUM_COLUMNS), np.float32)
    tiles = np.zeros((n, 4), np.int32)
    broken = kernels.project(*inputs, height, width, splats, tiles)
    order = kernels.depth_order(splats, tiles)
    tiles_x, tiles_y = -(-width // TILE_PX), -(-height // TILE_PX)
    tile_starts, pair_rank, pair_slot, slot_starts = kernels.bin_tiles(order, tiles, tiles_x, tiles_y)
    # The fullest tiles first, dealt out to the workers in turn.
    tile_order = np.argsort(-np.diff(tile_starts), kind="stable")
    kernels.composite(splats, order, tile_starts, pair_rank, tile_order, workers, picture)
    if broken:
        picture[:] = np.nan
    return splats, order, tile_starts, pair_rank, pair_slot, slot_starts, tile_order


def _draw_backward(kernels, workers, inputs, kept, picture, grad_picture, grads):
    """Adds the gradients of one picture to grads [n, 14]."""
    import numpy as np

    xyz, quaternion, scale, _, _, w2c, intrinsics = inputs
    splats, order, tile_starts, pair_rank, pair_slot, slot_starts, tile_order = kept
    _, height, width = picture.shape
    slot_grads = np.empty((pair_rank.shape[0], kernels.NUM_COLUMNS), np.float32)
    kernels.composite_backward(
        splats, order, tile_starts, pair_rank, pair_slot, tile_order, workers, picture, grad_picture, slot_grads
    )
    kernels.project_backward(
        xyz, quaternion, scale, w2c, intrinsics, height, width, splats, order, slot_starts, slot_grads, grads
    )
