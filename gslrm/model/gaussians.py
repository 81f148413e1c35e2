"""Gaussians: raw (pre-activation) tensors of a batch of scenes, and what is derived from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

MAX_SH_DEGREE = 3
ODD_IN_X = (3, 4, 7, 10, 13, 15)  # of the real spherical harmonics in 3DGS order: x, xy, xz, xyz, x(..), x(..)


@dataclass(frozen=True)
class Gaussians:
    """3D Gaussians of `b` scenes with `n` Gaussians each, as raw values (what a network predicts, what a PLY holds).

    xyz: [b, n, 3] centres, world frame.
    features: [b, n, (degree + 1)^2, 3] spherical-harmonics coefficients, degree 0 to 3; at degree 0 the colour is
        0.28209479 * features + 0.5.
    scaling: [b, n, 3] natural logarithm of the standard deviations, world units.
    rotation: [b, n, 4] quaternions (w, x, y, z), need not be normalised.
    opacity: [b, n, 1] logits.
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
        b, n, _ = self.xyz.shape
        for name, width in (("scaling", 3), ("rotation", 4), ("opacity", 1)):
            shape = getattr(self, name).shape
            if shape != (b, n, width):
                raise ValueError(
                    f"{name} must have shape [{b}, {n}, {width}] to go with xyz {[b, n, 3]}, got {list(shape)}"
                )
        shape = self.features.shape
        coefficients = [(degree + 1) ** 2 for degree in range(MAX_SH_DEGREE + 1)]
        if len(shape) != 4 or shape[:2] != (b, n) or shape[3] != 3 or shape[2] not in coefficients:
            raise ValueError(
                f"features must have shape [{b}, {n}, k, 3] with k one of {coefficients} (SH degree 0 to "
                f"{MAX_SH_DEGREE}) to go with xyz {[b, n, 3]}, got {list(shape)}"
            )

    # ---- derived values -----------------------------------------------------------------------------------------

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
    def get_xyz(self) -> Tensor:
        """[b, n, 3] centres, world frame."""
        return self.xyz

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
        """[b, n, 1] in (0, 1)."""
        return self.opacity.sigmoid()

    @property
    def get_covariance(self) -> Tensor:
        """[b, n, 3, 3] covariance matrices, world frame."""
        half = rotation_matrices(self.get_rotation) * self.get_scaling[..., None, :]
        return half @ half.mT

    # ---- the same scenes, differently held ----------------------------------------------------------------------

    def map(self, function) -> Gaussians:
        """`function` applied to every tensor."""
        return Gaussians(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def to(self, target) -> Gaussians:
        return self.map(lambda tensor: tensor.to(target))

    def float(self) -> Gaussians:
        return self.map(lambda tensor: tensor.float())

    def detach(self) -> Gaussians:
        return self.map(lambda tensor: tensor.detach())

    def scene(self, index: int) -> Gaussians:
        """Scene `index` alone, still with a batch dimension of 1."""
        if not 0 <= index < self.num_scenes:
            raise ValueError(f"scene index must be in 0..{self.num_scenes - 1}, got {index}")
        return self.map(lambda tensor: tensor[index : index + 1])

    def select(self, index: Tensor) -> Gaussians:
        """The Gaussians of one scene (b = 1) that `index` picks: bool mask [n] or positions [k]."""
        if self.num_scenes != 1:
            raise ValueError(f"select needs one scene (scenes would differ in length), got {self.num_scenes}")
        return self.map(lambda tensor: tensor[:, index])

    def mirrored(self) -> Gaussians:
        """The scenes mirrored in x, as `Cameras.mirrored` sees them.

        A covariance R S^2 R^T becomes (M R M) S^2 (M R M)^T with M = diag(-1, 1, 1): the rotation's axis is a
        pseudo-vector. Of the spherical harmonics those odd in x change sign.
        """
        sign = self.xyz.new_tensor([-1.0, 1.0, 1.0])
        quaternion_sign = self.xyz.new_tensor([1.0, 1.0, -1.0, -1.0])
        features = self.features.clone()
        odd = [index for index in ODD_IN_X if index < features.shape[2]]
        features[:, :, odd] = -features[:, :, odd]
        return replace(self, xyz=self.xyz * sign, rotation=self.rotation * quaternion_sign, features=features)

    def scaled(self, modifier: float) -> Gaussians:
        """Standard deviations multiplied by `modifier` (FaceLift's optional `scaling_modifier`)."""
        if not modifier > 0:
            raise ValueError(f"modifier must be positive, got {modifier}")
        return replace(self, scaling=self.scaling + math.log(modifier))


def concatenate(parts: list[Gaussians]) -> Gaussians:
    """One Gaussians with the Gaussians of all `parts` (same number of scenes, same SH degree), in order."""
    if not parts:
        raise ValueError("concatenate needs at least one Gaussians, got an empty list")
    return Gaussians(
        **{field.name: torch.cat([getattr(part, field.name) for part in parts], dim=1) for field in fields(Gaussians)}
    )


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Unit quaternions (w, x, y, z) [..., 4] -> rotation matrices [..., 3, 3]."""
    w, x, y, z = quaternions.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
