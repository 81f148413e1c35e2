"""Real spherical harmonics of degree 0 to 3 in the ordering and signs of 3D Gaussian splatting."""

from __future__ import annotations

import torch
from torch import Tensor

from gslrm.model.gaussians import Gaussians
from multiview.cameras import Cameras

C0 = 0.28209479177387814
C1 = 0.4886025119029199
C2 = (1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
C3 = (0.5900435899266435, 2.890611442640554, 0.4570457994644658, 0.3731763325901154, 1.445305721320277)


def sh_basis(directions: Tensor, degree: int) -> Tensor:
    """Unit directions [..., 3] -> values of the (degree + 1)^2 basis functions [..., (degree + 1)^2]."""
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, C0)]
    if degree >= 1:
        basis += [-C1 * y, C1 * z, -C1 * x]
    if degree >= 2:
        xx, yy, zz = x * x, y * y, z * z
        basis += [C2[0] * x * y, -C2[0] * y * z, C2[1] * (2 * zz - xx - yy), -C2[0] * x * z, C2[2] * (xx - yy)]
    if degree >= 3:
        basis += [
            -C3[0] * y * (3 * xx - yy),
            C3[1] * x * y * z,
            -C3[2] * y * (4 * zz - xx - yy),
            C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            -C3[2] * x * (4 * zz - xx - yy),
            C3[4] * z * (xx - yy),
            -C3[0] * x * (xx - 3 * yy),
        ]
    return torch.stack(basis, dim=-1)


def evaluate_colors(gaussians: Gaussians, cameras: Cameras) -> Tensor:
    """Colors max(SH + 0.5, 0) of b scenes seen from cameras [b, v], float32.

    Returns [b, v, n, 3], or [b, 1, n, 3] at degree 0, where the color is the same from everywhere.
    """
    if gaussians.sh_degree == 0:
        colors = C0 * gaussians.features[:, None, :, 0]
    else:
        directions = torch.nn.functional.normalize(gaussians.xyz[:, None] - cameras.origins.float()[:, :, None], dim=-1)
        colors = torch.einsum("bvnk,bnkc->bvnc", sh_basis(directions, gaussians.sh_degree), gaussians.features)
    return (colors + 0.5).clamp_min(0.0)
