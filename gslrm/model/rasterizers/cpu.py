"""The CPU rasterizer: numba kernels behind a torch.autograd.Function, differentiable in everything but the cameras.
Same mathematics as gsplat's `classic` mode. Results do not depend on the number of threads, torch.get_num_threads()."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from gslrm.model.gaussians import Gaussians
from gslrm.model.rasterizers import warm_up
from multiview.cameras import Cameras

GRADS = {"xyz": 3, "quaternion": 4, "scale": 3, "opacity": 1, "color": 3}  # columns per Gaussian, in this order


def rasterize(gaussians: Gaussians, cameras: Cameras, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Renders b scenes from cameras [b, v] over background [b, v, 3], all on the CPU, in float32: rgb, alpha and depth
    as `RenderOutput`, NaN where a scene has a value that is not finite. ValueError for cameras that need gradients."""
    if cameras.c2w.requires_grad or cameras.fxfycxcy.requires_grad:
        raise ValueError("the CPU rasterizer has no gradients for cameras: detach c2w and fxfycxcy")
    with torch.autocast("cpu", enabled=False):
        gaussians = gaussians.to(torch.float32)
        images = _Rasterize.apply(
            gaussians.xyz, gaussians.get_rotation, gaussians.get_scaling, gaussians.get_opacity[..., 0],
            gaussians.colors_seen(cameras), cameras.w2c.double(), cameras.fxfycxcy.double(),
            (cameras.height, cameras.width),
        )  # fmt: skip
        transmittance = images[:, :, 4:5]
        rgb = images[:, :, :3] + transmittance * background.float()[..., None, None]
    return rgb, 1 - transmittance, images[:, :, 3:4]


class _Rasterize(torch.autograd.Function):
    """xyz [b,n,3], unit quaternions [b,n,4], scales [b,n,3], opacities [b,n], colors [b,1 or v,n,3] -> [b,v,5,h,w]:
    red, green, blue (over black), accumulated depth, transmittance."""

    @staticmethod
    def forward(ctx, xyz, quaternion, scale, opacity, color, w2c, intrinsics, size):
        tensors = [t.detach().contiguous() for t in (xyz, quaternion, scale, opacity, color, w2c, intrinsics)]
        images = torch.empty(*w2c.shape[:2], 5, *size)
        planes, scenes = images.flatten(0, 1).numpy(), _scenes(tensors)
        kept = _for_images(lambda index, parts: _draw(scenes[index], planes[index], parts), len(planes))
        if any(ctx.needs_input_grad):
            # Everything goes through save_for_backward, where torch.utils.checkpoint can drop and recompute it.
            kept = [torch.from_numpy(array) for of_images in zip(*kept) for array in of_images]
            ctx.save_for_backward(*tensors, images, *kept)
        return images

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_images):
        saved = ctx.saved_tensors  # read once: a checkpoint hands out what it recomputed a single time
        tensors, images, saved = saved[:7], saved[7], [tensor.numpy() for tensor in saved[8:]]
        planes, scenes = images.flatten(0, 1).numpy(), _scenes(tensors)
        kept = [saved[index :: len(planes)] for index in range(len(planes))]
        grad_planes = grad_images.float().contiguous().flatten(0, 1).numpy()
        (num_scenes, n), (color_views, views) = tensors[0].shape[:2], (tensors[4].shape[1], images.shape[1])
        of_images = _for_images(
            lambda i, parts: _draw_backward(scenes[i], kept[i], planes[i], grad_planes[i], parts), len(planes)
        )
        # Views are summed in order, whoever finishes first.
        total = torch.zeros(num_scenes, n, sum(GRADS.values()))
        xyz, quaternion, scale, opacity, color = total.split(list(GRADS.values()), dim=-1)
        color = color[:, None] if color_views == 1 else torch.zeros(num_scenes, color_views, n, 3)
        for index, grads in enumerate(of_images):
            b, v = divmod(index, views)
            total[b] += grads
            if color_views > 1:
                color[b, v] = grads[:, -3:]
        return xyz, quaternion, scale, opacity[..., 0], color, None, None, None


def _scenes(tensors) -> list[tuple[np.ndarray, ...]]:
    """Per image the kernels' inputs, in the order of projection.project; images are numbered scene by scene."""
    *gaussians, color, w2c, intrinsics = (tensor.numpy() for tensor in tensors)
    places = np.ndindex(w2c.shape[:2])
    return [(*(x[b] for x in gaussians), color[b, v % color.shape[1]], w2c[b, v], intrinsics[b, v]) for b, v in places]


def _draw(inputs, image: np.ndarray, parts: int):
    """Fills image [5, h, w], the work cut into `parts`. Returns what the backward pass needs."""
    warm_up.wait()
    from gslrm.model.rasterizers import compositing, projection

    (_, *size), n, tile = image.shape, len(inputs[0]), projection.TILE_PX
    splats, tiles = np.empty((n, projection.NUM_COLUMNS), np.float32), np.empty((n, 4), np.int32)
    cuts = [n * part // parts for part in range(parts + 1)]
    broken = _in_threads(lambda i: projection.project(*inputs, *size, cuts[i], cuts[i + 1], splats, tiles), parts)
    order = compositing.depth_order(splats, tiles)
    tiles_y, tiles_x = (-(-pixels // tile) for pixels in size)
    tile_starts, pair_splat, pair_slot, slot_starts = compositing.bin_tiles(order, tiles, tiles_x, tiles_y)
    # The fullest tiles first, dealt out to the threads in turn.
    tile_order = np.argsort(-np.diff(tile_starts), kind="stable")
    kept = splats, tile_starts, pair_splat, pair_slot, tile_order
    _in_threads(lambda part: compositing.composite(*kept, part, parts, image, None, None), parts)
    if any(broken):
        image[:] = np.nan
    return *kept, order, slot_starts


def _draw_backward(inputs, kept, image: np.ndarray, grad_image: np.ndarray, parts: int) -> Tensor:
    """Returns the gradients of one image, [n, 14], columns as in GRADS."""
    from gslrm.model.rasterizers import compositing, projection

    xyz, quaternion, scale, _, _, *camera = inputs
    *tile_data, order, slot_starts = kept
    slot_grads = np.zeros((len(kept[2]), projection.NUM_GRADS), np.float32)
    grads = torch.zeros(len(xyz), sum(GRADS.values()))
    _in_threads(lambda part: compositing.composite(*tile_data, part, parts, image, grad_image, slot_grads), parts)
    geometry = xyz, quaternion, scale, *camera, *image.shape[1:], kept[0], order, slot_starts, slot_grads
    cuts, table = [len(order) * part // parts for part in range(parts + 1)], grads.numpy()
    _in_threads(lambda part: projection.project_backward(*geometry, cuts[part], cuts[part + 1], table), parts)
    return grads


# ---- threads --------------------------------------------------------------------------------------------------------
# The kernels release the GIL, so plain threads do. numba's own threading layers are avoided: one kills a forked child
# (data-loader workers), another allows one caller per process, and all of them slow down badly on a busy machine.

_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # (process, threads, executor)


def _for_images(function, count: int) -> list:
    """Returns function(index, parts) of every image: images in parallel, or one after the other, each cut into parts.
    Never both: a thread of the pool must not wait for the pool."""
    threads = torch.get_num_threads()
    if count < threads:
        return [function(index, threads) for index in range(count)]
    return _in_threads(lambda index: function(index, 1), count)


def _in_threads(function, count: int) -> list:
    """Returns [function(0), ..., function(count - 1)]."""
    global _pool
    threads = torch.get_num_threads()
    if threads == 1 or count <= 1:
        return [function(index) for index in range(count)]
    if _pool is None or _pool[:2] != (os.getpid(), threads):  # after a fork, the parent's threads are gone
        _pool = (os.getpid(), threads, ThreadPoolExecutor(threads, thread_name_prefix="rasterize"))
    return list(_pool[2].map(function, range(count)))
