"""A slow, plain float64 rasterizer with autograd: the oracle that the backends are held to. Not for use.

Written from the mathematics of gsplat's classic mode (docs of the rasterizer), every Gaussian against every pixel,
with no tiles, no bounding boxes and nothing shared with the code under test but the Cameras.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _real_spherical_harmonics(directions: Tensor, degree: int) -> Tensor:
    """[..., 3] unit -> [..., (degree+1)^2]; real spherical harmonics with the Condon-Shortley phase, l up to 3."""
    x, y, z = directions.unbind(-1)
    pi = torch.pi
    one = torch.ones_like(x)
    values = [one * (1 / (4 * pi)) ** 0.5]
    if degree >= 1:
        values += [-((3 / (4 * pi)) ** 0.5) * y, (3 / (4 * pi)) ** 0.5 * z, -((3 / (4 * pi)) ** 0.5) * x]
    if degree >= 2:
        k = (15 / (4 * pi)) ** 0.5
        values += [k * x * y, -k * y * z, (5 / (16 * pi)) ** 0.5 * (3 * z**2 - 1), -k * x * z, k / 2 * (x**2 - y**2)]
    if degree >= 3:
        a, b, c = (35 / (32 * pi)) ** 0.5, (105 / (4 * pi)) ** 0.5, (21 / (32 * pi)) ** 0.5
        values += [
            -a * (3 * x**2 - y**2) * y,
            b * x * y * z,
            -c * y * (5 * z**2 - 1),
            (7 / (16 * pi)) ** 0.5 * (5 * z**3 - 3 * z),
            -c * x * (5 * z**2 - 1),
            b / 2 * (x**2 - y**2) * z,
            -a * (x**2 - 3 * y**2) * x,
        ]
    return torch.stack(values, dim=-1)


def _rotation(q: Tensor) -> Tensor:
    q = q / q.norm(dim=-1, keepdim=True)
    w, v = q[..., :1], q[..., 1:]
    cross = torch.zeros(*q.shape[:-1], 3, 3, dtype=q.dtype)
    cross[..., 0, 1], cross[..., 0, 2], cross[..., 1, 2] = -v[..., 2], v[..., 1], -v[..., 0]
    cross = cross - cross.mT
    return torch.eye(3, dtype=q.dtype) + 2 * w[..., None] * cross + 2 * cross @ cross  # Rodrigues


def _render_one(xyz, features, scaling, rotation, opacity, w2c, fxfycxcy, height, width, background):
    """One scene, one camera, all float64. Returns rgb [3,h,w], alpha [1,h,w], depth [1,h,w]."""
    r_cam, fx, fy, cx, cy = w2c[:3, :3], *fxfycxcy
    degree = int(features.shape[1] ** 0.5) - 1
    directions = xyz - (-r_cam.T @ w2c[:3, 3])
    directions = directions / directions.norm(dim=-1, keepdim=True)
    color = ((_real_spherical_harmonics(directions, degree)[..., None] * features).sum(1) + 0.5).clamp_min(0)

    camera = xyz @ r_cam.T + w2c[:3, 3]
    x, y, z = camera.unbind(-1)
    r_world = _rotation(rotation)
    sigma = r_world @ torch.diag_embed((2 * scaling).exp()) @ r_world.mT
    sigma = r_cam @ sigma @ r_cam.T
    margin_x, margin_y = 0.3 * 0.5 * width / fx, 0.3 * 0.5 * height / fy
    tx = z * (x / z).clamp(-(cx / fx + margin_x), (width - cx) / fx + margin_x)
    ty = z * (y / z).clamp(-(cy / fy + margin_y), (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack(
        [torch.stack([fx / z, zero, -fx * tx / z**2], -1), torch.stack([zero, fy / z, -fy * ty / z**2], -1)], -2
    )
    covariance = jacobian @ sigma @ jacobian.mT + 0.3 * torch.eye(2, dtype=xyz.dtype)
    conic = torch.linalg.inv(covariance)
    mean = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1)
    o = opacity[:, 0].sigmoid()

    keep = torch.nonzero((z >= 0.01) & (z <= 1e10) & (o >= 1 / 255))[:, 0]
    keep = keep[torch.sort(z[keep].float(), stable=True).indices]
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([columns, rows], -1).reshape(-1, 2).to(xyz.dtype)
    d = mean[keep, None] - pixels
    power = 0.5 * torch.einsum("npi,nij,npj->np", d, conic[keep], d)
    alpha = (o[keep, None] * torch.exp(-power)).clamp(max=0.999)
    alpha = torch.where((power >= 0) & (alpha >= 1 / 255), alpha, 0.0)
    after = torch.cumprod(1 - alpha, dim=0)
    alpha = torch.where(after > 1e-4, alpha, 0.0)  # T only falls: the first to reach 1e-4 closes the pixel
    after = torch.cumprod(1 - alpha, dim=0)
    before = torch.cat([torch.ones_like(after[:1]), after[:-1]])
    weight = before * alpha
    transmittance = after[-1] if len(keep) else torch.ones(height * width, dtype=xyz.dtype)
    rgb = weight.T @ color[keep] + transmittance[:, None] * background
    depth = weight.T @ z[keep, None]
    return (
        rgb.T.reshape(3, height, width),
        1 - transmittance.reshape(1, height, width),
        depth.T.reshape(1, height, width),
    )


def rasterize(gaussians, cameras, background):
    """The signature of the backends. Everything is converted to float64; gradients flow back to the inputs."""
    tensors = [getattr(gaussians, n).double() for n in ("xyz", "features", "scaling", "rotation", "opacity")]
    w2c, intrinsics, background = cameras.w2c.double(), cameras.fxfycxcy.double(), background.double()
    size = (cameras.height, cameras.width)
    outputs = [
        _render_one(*[t[b] for t in tensors], w2c[b, v], intrinsics[b, v], *size, background[b, v])
        for b in range(cameras.shape[0])
        for v in range(cameras.shape[1])
    ]
    return tuple(torch.stack(parts).unflatten(0, tuple(cameras.shape)) for parts in zip(*outputs))
