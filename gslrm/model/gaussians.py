"""Gaussians: raw (pre-activation) tensors of a batch of scenes, and what is derived from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_SH_DEGREE = 3
ODD_IN_X = (3, 4, 7, 10, 13, 15)  # of the real spherical harmonics in 3DGS order: x, xy, xz, xyz, x(..), x(..)


@dataclass(frozen=True)
class Gaussians:
    """3D Gaussians of `b` scenes with `n` Gaussians each, as raw values (what a network predicts, what a PLY holds).

    xyz: [b, n, 3] centers, world frame.
    features: [b, n, (degree + 1)^2, 3] spherical-harmonics coefficients, degree 0 to 3; at degree 0 the color is
        0.28209479 * features + 0.5.
    scaling: [b, n, 3] natural logarithm of the standard deviations, world units.
    rotation: [b, n, 4] quaternions (w, x, y, z), need not be normalized.
    opacity: [b, n, 1] logits; +-infinity is a legal one.
    Raises ValueError if the shapes do not belong together.
    """

    xyz: Tensor
    features: Tensor
    scaling: Tensor
    rotation: Tensor
    opacity: Tensor

    def __post_init__(self) -> None:
        if self.xyz.ndim != 3 or self.xyz.shape[-1] != 3:
            raise ValueError(f"xyz must have shape [b, n, 3], got {list(self.xyz.shape)}")
        harmonics = [[(degree + 1) ** 2, 3] for degree in range(MAX_SH_DEGREE + 1)]
        ends = {"features": harmonics, "scaling": [[3]], "rotation": [[4]], "opacity": [[1]]}
        for name, allowed in ends.items():
            shape = list(getattr(self, name).shape)
            if shape not in [[*self.xyz.shape[:2], *end] for end in allowed]:
                raise ValueError(
                    f"{name} must have shape [b, n] as xyz {list(self.xyz.shape)}, then one of {allowed}, got {shape}"
                )

    @property
    def num_scenes(self) -> int:
        return self.xyz.shape[0]

    @property
    def num_gaussians(self) -> int:
        """Gaussians per scene."""
        return self.xyz.shape[1]

    @property
    def sh_degree(self) -> int:
        return math.isqrt(self.features.shape[2]) - 1

    @property
    def device(self) -> torch.device:
        return self.xyz.device

    @property
    def get_scaling(self) -> Tensor:
        """[b, n, 3] standard deviations, world units."""
        return self.scaling.exp()

    @property
    def get_rotation(self) -> Tensor:
        """[b, n, 4] unit quaternions (w, x, y, z)."""
        return torch.nn.functional.normalize(self.rotation, dim=-1)

    @property
    def get_opacity(self) -> Tensor:
        """[b, n, 1] in 0..1."""
        return self.opacity.sigmoid()

    def check_finite(self, source: object) -> None:
        """Raises ValueError, naming `source` and the number of bad values, for NaN and (but of opacity) infinity."""
        bad = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in vars(self).items()}
        bad["opacity"] = int(self.opacity.isnan().sum())  # the logit of 1 and of 0 is infinite
        if any(bad.values()):
            found = ", ".join(f"{count} of {name}" for name, count in bad.items() if count)
            raise ValueError(
                f"{source}: values of the {self.num_gaussians} Gaussians must be finite, got NaN or infinity in {found}"
            )

    def map(self, function) -> Gaussians:
        """Applies `function` to every tensor."""
        return Gaussians(**{name: function(tensor) for name, tensor in vars(self).items()})

    def to(self, target) -> Gaussians:
        return self.map(lambda tensor: tensor.to(target))

    def select(self, index: Tensor) -> Gaussians:
        """Returns the Gaussians of one scene (b = 1) that `index` picks: bool mask [n] or positions [k]."""
        if self.num_scenes != 1:
            raise ValueError(f"select needs one scene (scenes would differ in length), got {self.num_scenes}")
        return self.map(lambda tensor: tensor[:, index])

    def mirrored(self) -> Gaussians:
        """Returns the scenes mirrored in x, as `Cameras.mirrored` sees them.

        A covariance R S^2 R^T becomes (M R M) S^2 (M R M)^T with M = diag(-1, 1, 1): the rotation's axis is a
        pseudo-vector. Of the spherical harmonics those odd in x change sign.
        """
        sign_xyz, sign_wxyz = self.xyz.new_tensor([-1.0, 1.0, 1.0]), self.xyz.new_tensor([1.0, 1.0, -1.0, -1.0])
        features = self.features.clone()
        features[:, :, [index for index in ODD_IN_X if index < features.shape[2]]] *= -1
        return replace(self, xyz=self.xyz * sign_xyz, rotation=self.rotation * sign_wxyz, features=features)


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Unit quaternions (w, x, y, z) [..., 4] -> rotation matrices [..., 3, 3]; differentiable, on any device."""
    w, x, y, z = quaternions.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
