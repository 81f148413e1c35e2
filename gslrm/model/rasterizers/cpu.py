"""The CPU rasterizer: numba kernels behind a torch.autograd.Function.

Same mathematics as gsplat's `classic` mode, differentiable in everything but the cameras. Deterministic: results do
not depend on the number of threads, which is torch.get_num_threads() unless set_num_threads says otherwise.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from multiview.cameras import Cameras

from ..gaussians import Gaussians
from .spherical_harmonics import evaluate_colors


def rasterize(gaussians: Gaussians, cameras: Cameras, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Renders `b` scenes, each from its `v` cameras. All tensors on the CPU; computes in float32.

    gaussians: b scenes. cameras: [b, v]; no gradients for them. background: [b, v, 3].
    Returns rgb [b, v, 3, h, w] (not clipped above), alpha [b, v, 1, h, w] in 0..1 and depth [b, v, 1, h, w], the
    accumulated sum of weight * z (z along the optical axis; divide by alpha for a mean depth).
    A scene with a value that is not finite gives pictures of NaN, as arithmetic does.
    Raises ValueError for tensors on another device and for cameras that require gradients.
    """
    if cameras.c2w.requires_grad or cameras.fxfycxcy.requires_grad:
        raise ValueError("the CPU rasterizer has no gradients for cameras: detach c2w and fxfycxcy")
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


class _Rasterize(torch.autograd.Function):
    """xyz [b,n,3], unit quaternions [b,n,4], scales [b,n,3], opacities [b,n], colours [b,1 or v,n,3] -> [b,v,5,h,w].

    The five planes are red, green, blue (over black), accumulated depth, transmittance.
    """

    @staticmethod
    def forward(ctx, xyz, quaternion, scale, opacity, color, w2c, intrinsics, height, width):
        tensors = [t.detach().contiguous() for t in (xyz, quaternion, scale, opacity, color, w2c, intrinsics)]
        arrays = [t.numpy() for t in tensors]
        pictures = torch.empty(*w2c.shape[:2], 5, height, width)
        planes = pictures.flatten(0, 1).numpy()
        parts, views = _parts_per_picture(len(planes)), w2c.shape[1]

        def draw(index):
            return _draw(_inputs(arrays, *divmod(index, views)), planes[index], parts)

        kept = _for_pictures(draw, len(planes), parts)
        if any(ctx.needs_input_grad):
            # Everything goes through save_for_backward, where torch.utils.checkpoint can drop and recompute it.
            kept = [torch.from_numpy(array) for of_picture in kept for array in of_picture]
            ctx.save_for_backward(*tensors, pictures, *kept)
        return pictures

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_pictures):
        saved = ctx.saved_tensors  # read once: a checkpoint hands out what it recomputed a single time
        tensors, pictures, saved = saved[:7], saved[7], saved[8:]
        arrays = [t.numpy() for t in tensors]
        planes = pictures.flatten(0, 1).numpy()
        per_picture = len(saved) // len(planes)
        kept = [[t.numpy() for t in saved[i : i + per_picture]] for i in range(0, len(saved), per_picture)]
        grad_planes = grad_pictures.float().contiguous().flatten(0, 1).numpy()
        (num_scenes, n), (color_views, views) = tensors[0].shape[:2], (tensors[4].shape[1], pictures.shape[1])
        parts = _parts_per_picture(len(planes))

        def draw_backward(index):
            inputs = _inputs(arrays, *divmod(index, views))
            return _draw_backward(inputs, kept[index], planes[index], grad_planes[index], parts)

        # Views are summed in order, whoever finishes first.
        grads = torch.zeros(num_scenes, n, 14)
        grad_color = torch.zeros(num_scenes, color_views, n, 3) if color_views > 1 else grads[:, None, :, 11:]
        for index, own in enumerate(_for_pictures(draw_backward, len(planes), parts)):
            b, v = divmod(index, views)
            grads[b] += own
            if color_views > 1:
                grad_color[b, v] = own[:, 11:]
        return grads[..., :3], grads[..., 3:7], grads[..., 7:10], grads[..., 10], grad_color, None, None, None, None


def _inputs(arrays, b: int, v: int):
    """What the kernels need to know of picture (b, v), in the order of projection.project."""
    xyz, quaternion, scale, opacity, color, w2c, intrinsics = arrays
    return xyz[b], quaternion[b], scale[b], opacity[b], color[b, v % color.shape[1]], w2c[b, v], intrinsics[b, v]


def _draw(inputs, picture, parts: int):
    """Fills picture [5, h, w], the work cut into `parts`. Returns what the backward pass needs."""
    from . import compositing, layout, projection

    _, height, width = picture.shape
    n = inputs[0].shape[0]
    splats, tiles = np.empty((n, layout.NUM_COLUMNS), np.float32), np.empty((n, 4), np.int32)
    cuts = [n * part // parts for part in range(parts + 1)]
    broken = _in_threads(
        lambda part: projection.project(*inputs, height, width, cuts[part], cuts[part + 1], splats, tiles), parts
    )
    order = compositing.depth_order(splats, tiles)
    tiles_x, tiles_y = -(-width // layout.TILE_PX), -(-height // layout.TILE_PX)
    tile_starts, pair_splat, pair_slot, slot_starts = compositing.bin_tiles(order, tiles, tiles_x, tiles_y)
    # The fullest tiles first, dealt out to the threads in turn.
    tile_order = np.argsort(-np.diff(tile_starts), kind="stable")
    _in_threads(
        lambda part: compositing.composite(splats, tile_starts, pair_splat, tile_order, part, parts, picture), parts
    )
    if any(broken):
        picture[:] = np.nan
    return splats, order, tile_starts, pair_splat, pair_slot, slot_starts, tile_order


def _draw_backward(inputs, kept, picture, grad_picture, parts: int) -> Tensor:
    """Gradients of one picture, [n, 14]: xyz 3, quaternion 4, scale 3, opacity 1, colour 3."""
    from . import compositing, layout, projection

    xyz, quaternion, scale, _, _, w2c, intrinsics = inputs
    splats, order, tile_starts, pair_splat, pair_slot, slot_starts, tile_order = kept
    _, height, width = picture.shape
    slot_grads = np.zeros((len(pair_splat), layout.NUM_GRADS), np.float32)
    grads = torch.zeros(len(xyz), 14)
    grads_array = grads.numpy()
    tile_data = (splats, tile_starts, pair_splat, pair_slot, tile_order)
    _in_threads(
        lambda part: compositing.composite_backward(*tile_data, part, parts, picture, grad_picture, slot_grads), parts
    )
    geometry = (xyz, quaternion, scale, w2c, intrinsics, height, width, splats, order, slot_starts, slot_grads)
    cuts = [len(order) * part // parts for part in range(parts + 1)]
    _in_threads(lambda part: projection.project_backward(*geometry, cuts[part], cuts[part + 1], grads_array), parts)
    return grads


# ---- threads --------------------------------------------------------------------------------------------------------
# The kernels release the GIL, so plain threads do. numba's own threading layers are avoided: one kills a forked child
# (data-loader workers), another allows one caller per process, and all of them slow down badly on a busy machine.

_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # (process, threads, executor)
_chosen_threads: int | None = None


def set_num_threads(threads: int | None) -> None:
    """How many threads the rasterizer uses in this process; None (the start): torch.get_num_threads().

    Worth setting on a machine busy with other work, where torch itself is best left with one thread: its threads wait
    for one another in every operation, the rasterizer's only two or three times per picture.
    """
    global _chosen_threads
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1 (or None: as torch), got {threads}")
    _chosen_threads = threads


def _num_threads() -> int:
    return torch.get_num_threads() if _chosen_threads is None else _chosen_threads


def _parts_per_picture(num_pictures: int) -> int:
    """Into how many parts each picture is cut: one if there are enough pictures to keep all threads busy."""
    return 1 if num_pictures >= _num_threads() else _num_threads()


def _for_pictures(function, num_pictures: int, parts: int) -> list:
    """`function` of every picture: the pictures in parallel, or one after the other if each is cut into parts.

    Never both: a thread of the pool must not wait for the pool.
    """
    if parts > 1:
        return [function(index) for index in range(num_pictures)]
    return _in_threads(function, num_pictures)


def _in_threads(function, count: int) -> list:
    """[function(0), ..., function(count - 1)]."""
    global _pool
    threads = _num_threads()
    if threads == 1 or count <= 1:
        return [function(index) for index in range(count)]
    if _pool is None or _pool[:2] != (os.getpid(), threads):  # after a fork, the parent's threads are gone
        _pool = (os.getpid(), threads, ThreadPoolExecutor(threads, thread_name_prefix="rasterize"))
    return list(_pool[2].map(function, range(count)))
