"""A tiled rasterizer in plain PyTorch, to compare with: what one writes without kernels of one's own.

The mathematics of gsplat's classic mode as the project's backends have it (docs of the rasterizer's projection.py and
compositing.py name the constants), degree-0 colours, gradients by autograd alone. Tiles of 16 x 16 pixels; in each the
splats are composited in depth order in blocks, by cumulative products, until every pixel is closed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gslrm.model.gaussians import Gaussians, rotation_matrices
from multiview.cameras import Cameras

TILE_PX = 16
BLOCK = 256  # splats composited at a time: few enough that closed tiles end soon, enough to pay for the calls
EPS_2D, MARGIN, NEAR, FAR, MAX_EXTENT = 0.3, 0.3, 0.01, 1e10, 3.33
MIN_ALPHA, MAX_ALPHA, MIN_TRANSMITTANCE = 1 / 255, 0.999, 1e-4
LEAST_EXPONENT = -8.0  # below ln(1/255), where nothing is drawn; exp of much less is slow (denormal numbers)
SH_0 = 0.28209479177387814


def rasterize(gaussians: Gaussians, cameras: Cameras, background: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """rgb [v, 3, h, w], alpha [v, 1, h, w], accumulated depth [v, 1, h, w] of one scene (b = 1) from cameras [v]."""
    pictures = torch.stack([_rasterize_view(gaussians, cameras[view]) for view in range(len(cameras))])
    rgb, depth, alpha = pictures.split([3, 1, 1], dim=1)
    return rgb + (1 - alpha) * background, alpha, depth


def _rasterize_view(gaussians: Gaussians, camera: Cameras) -> Tensor:
    """[5, h, w]: red, green, blue over black, depth, alpha."""
    height, width = camera.height, camera.width
    splats, radius = _project(gaussians, camera)
    pairs, counts = _bin(splats.detach(), radius, -(-height // TILE_PX), -(-width // TILE_PX))
    per_tile = splats[pairs].split(counts)  # one gather and one split: their gradients stay cheap
    offsets = torch.arange(TILE_PX, device=splats.device) + 0.5
    tiles_x = -(-width // TILE_PX)
    tiles = [
        _composite(rows, offsets + TILE_PX * (number % tiles_x), offsets + TILE_PX * (number // tiles_x))
        for number, rows in enumerate(per_tile)
    ]
    picture = torch.stack(tiles).unflatten(0, (-1, tiles_x))  # [tile rows, tile columns, 16, 16, 5]
    return picture.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


def _project(gaussians: Gaussians, camera: Cameras) -> tuple[Tensor, Tensor]:
    """Splats [k, 10] by ascending depth and their radius [k, 2] in px.

    Columns: u, v, conic a, b, c, log opacity, red, green, blue, depth.
    """
    fx, fy, cx, cy = camera.fxfycxcy.unbind()
    rotation, translation = camera.w2c[:3, :3], camera.w2c[:3, 3]
    x, y, z = (gaussians.xyz[0] @ rotation.T + translation).unbind(-1)
    half = rotation @ rotation_matrices(gaussians.get_rotation[0]) * gaussians.get_scaling[0][:, None, :]
    margin_x, margin_y = MARGIN * 0.5 * camera.width / fx, MARGIN * 0.5 * camera.height / fy
    slope_x = (x / z).clamp(-cx / fx - margin_x, (camera.width - cx) / fx + margin_x)
    slope_y = (y / z).clamp(-cy / fy - margin_y, (camera.height - cy) / fy + margin_y)
    flat_x = (fx / z)[:, None] * (half[:, 0] - slope_x[:, None] * half[:, 2])  # the Jacobian times the axes
    flat_y = (fy / z)[:, None] * (half[:, 1] - slope_y[:, None] * half[:, 2])
    s00, s11 = flat_x.square().sum(-1) + EPS_2D, flat_y.square().sum(-1) + EPS_2D
    s01 = (flat_x * flat_y).sum(-1)
    det = s00 * s11 - s01 * s01
    opacity = gaussians.get_opacity[0, :, 0]
    color = (SH_0 * gaussians.features[0, :, 0] + 0.5).clamp_min(0)
    geometry = [fx * x / z + cx, fy * y / z + cy, s11 / det, -s01 / det, s00 / det, opacity.log()]
    splats = torch.cat([torch.stack(geometry, -1), color, z[:, None]], dim=-1)
    with torch.no_grad():
        reach = (2 * (255 * opacity).log()).clamp_min(0).sqrt().clamp_max(MAX_EXTENT)
        radius = torch.stack([(reach * s00.sqrt()).ceil(), (reach * s11.sqrt()).ceil()], -1)
        centre, size = splats[:, :2], torch.tensor([camera.width, camera.height], device=splats.device)
        inside = ((centre + radius > 0) & (centre - radius < size)).all(-1)
        drawn = (z >= NEAR) & (z <= FAR) & (opacity >= MIN_ALPHA) & (det > 0) & inside
        order = drawn.nonzero()[:, 0]
        order = order[z[order].argsort(stable=True)]
    return splats[order], radius[order]


def _bin(splats: Tensor, radius: Tensor, tiles_y: int, tiles_x: int) -> tuple[Tensor, list[int]]:
    """Splat numbers sorted by tile, then depth [pairs], and how many each tile has."""
    limit = torch.tensor([tiles_x, tiles_y], device=splats.device)
    first = ((splats[:, :2] - radius) / TILE_PX).floor().long().clamp_min(0).minimum(limit)
    last = ((splats[:, :2] + radius) / TILE_PX).ceil().long().clamp_min(0).minimum(limit)
    extent = (last - first).clamp_min(0)
    count = extent.prod(-1)
    splat = torch.repeat_interleave(count)
    rank = torch.arange(len(splat), device=splats.device) - (count.cumsum(0) - count)[splat]
    column = first[splat, 0] + rank % extent[splat, 0]
    row = first[splat, 1] + rank // extent[splat, 0]
    tile = row * tiles_x + column
    return splat[tile.argsort(stable=True)], torch.bincount(tile, minlength=tiles_x * tiles_y).tolist()


def _composite(rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Splats of one tile [k, 10], pixel centres x [16], y [16] -> [16, 16, 5].

    Pixels by splats, the splats last: cumulative products run along contiguous memory (five times faster).
    """
    total = torch.zeros(TILE_PX * TILE_PX, 5, dtype=rows.dtype, device=rows.device)
    before = torch.ones(TILE_PX * TILE_PX, 1, dtype=rows.dtype, device=rows.device)
    for block in rows.split(BLOCK) if len(rows) else ():
        u, v, a, b, c, log_opacity = block[:, :6].T.contiguous().unbind()
        dx, dy = u - x[:, None], v - y[:, None]  # [16, k]; the quadratic form: terms of x, of y and one product
        along_x, along_y = log_opacity - 0.5 * a * dx * dx, 0.5 * c * dy * dy
        exponent = along_x[None, :, :] - along_y[:, None, :] - (b * dy)[:, None, :] * dx[None, :, :]
        alpha = exponent.flatten(0, 1).clamp_min(LEAST_EXPONENT).exp().clamp_max(MAX_ALPHA)
        alpha = torch.where(alpha >= MIN_ALPHA, alpha, 0.0)
        after = before * torch.cumprod(1 - alpha, dim=1)
        weight = alpha * torch.cat([before, after[:, :-1]], dim=1) * (after > MIN_TRANSMITTANCE)
        values = torch.cat([block[:, 6:], torch.ones_like(u)[:, None]], dim=1)  # red, green, blue, depth, 1
        total = total + weight @ values
        before = after[:, -1:]
        if before.detach().amax() <= MIN_TRANSMITTANCE:  # every pixel is closed
            break
    return total.unflatten(0, (TILE_PX, TILE_PX))
