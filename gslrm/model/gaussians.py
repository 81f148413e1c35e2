"""Gaussians: raw (pre-activation) tensors of a batch of scenes, what is derived from them, and which to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from multiview.cameras import Cameras

MAX_SH_DEGREE = 3
# Of the real spherical harmonics in the order and signs of 3D Gaussian splatting, by degree.
C0 = 0.28209479177387814
C1 = 0.4886025119029199
C2 = (1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
C3 = (0.5900435899266435, 2.890611442640554, 0.4570457994644658, 0.3731763325901154, 1.445305721320277)


@dataclass(frozen=True)
class Gaussians:
    """3D Gaussians of `b` scenes with `n` Gaussians each, as raw values (what a network predicts, what a PLY holds)."""

    xyz: Tensor  # [b, n, 3] centers, world frame
    features: Tensor  # [b, n, (degree + 1)^2, 3] spherical harmonics, degree 0 to 3; degree 0: 0.28209479 f + 0.5
    scaling: Tensor  # [b, n, 3] natural logarithm of the standard deviations, world units
    rotation: Tensor  # [b, n, 4] quaternions (w, x, y, z), need not be normalized
    opacity: Tensor  # [b, n, 1] logits; +-infinity is a legal one

    def __post_init__(self) -> None:
        if self.xyz.ndim != 3 or self.xyz.shape[-1] != 3:
            raise ValueError(f"xyz must have shape [b, n, 3], got {list(self.xyz.shape)}")
        harmonics = [[(degree + 1) ** 2, 3] for degree in range(MAX_SH_DEGREE + 1)]
        ends = {"features": harmonics, "scaling": [[3]], "rotation": [[4]], "opacity": [[1]]}
        for name, allowed in ends.items():
            shape = list(getattr(self, name).shape)
            if shape not in [[*self.xyz.shape[:2], *end] for end in allowed]:
                expected = f"[b, n] as xyz {list(self.xyz.shape)}, then one of {allowed}"
                raise ValueError(f"{name} must have shape {expected}, got {shape}")

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
            found = "NaN or infinity in " + ", ".join(f"{count} of {name}" for name, count in bad.items() if count)
            raise ValueError(f"{source}: values of the {self.num_gaussians} Gaussians must be finite, got {found}")

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

    def colors_seen(self, cameras: Cameras) -> Tensor:
        """Colors max(SH + 0.5, 0) of float32 Gaussians seen from cameras [b, v]: [b, v, n, 3]; at degree 0, the same
        from everywhere, [b, 1, n, 3]."""
        if self.sh_degree == 0:
            colors = C0 * self.features[:, None, :, 0]
        else:
            directions = torch.nn.functional.normalize(self.xyz[:, None] - cameras.origins.float()[:, :, None], dim=-1)
            colors = torch.einsum("bvnk,bnkc->bvnc", sh_basis(directions, self.sh_degree), self.features)
        return (colors + 0.5).clamp_min(0.0)

    def moved(self, matrix: Tensor) -> Gaussians:
        """Returns the scenes after x -> matrix x, a similarity [4, 4]: rotation, uniform scale and translation."""
        scale = torch.linalg.det(matrix[:3, :3].double()).pow(1 / 3)
        rotation = matrix[:3, :3].double() / scale
        turned = (rotation - torch.eye(3).to(rotation)).abs().max() > 1e-6
        features = self.features
        if turned and self.sh_degree:
            # Seen along d, the turned Gaussian has the color that it had along R^T d: a linear map of coefficients.
            directions = torch.nn.functional.normalize(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))
            before = sh_basis(directions.double() @ rotation.cpu(), self.sh_degree)
            turn = torch.linalg.lstsq(sh_basis(directions.double(), self.sh_degree), before).solution
            features = turn.to(features) @ features
        from scipy.spatial.transform import Rotation

        x, y, z, w = torch.from_numpy(Rotation.from_matrix(rotation.cpu().numpy()).as_quat()).to(self.rotation)
        a, b, c, d = self.rotation.unbind(-1)  # the quaternion product (w, x, y, z)(a, b, c, d)
        product = [w * a - x * b - y * c - z * d, w * b + x * a + y * d - z * c,
                   w * c - x * d + y * a + z * b, w * d + x * c - y * b + z * a]  # fmt: skip
        xyz = self.xyz @ matrix[:3, :3].to(self.xyz).T + matrix[:3, 3].to(self.xyz)
        rotation = torch.stack(product, dim=-1) if turned else self.rotation
        scaling = self.scaling + float(scale.log())
        return replace(self, xyz=xyz, features=features, scaling=scaling, rotation=rotation)


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Unit quaternions (w, x, y, z) [..., 4] -> rotation matrices [..., 3, 3]; differentiable, on any device."""
    w, x, y, z = quaternions.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


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
        basis += [-C3[0] * y * (3 * xx - yy), C3[1] * x * y * z, -C3[2] * y * (4 * zz - xx - yy)]
        basis += [C3[3] * z * (2 * zz - 3 * xx - 3 * yy), -C3[2] * x * (4 * zz - xx - yy)]
        basis += [C3[4] * z * (xx - yy), -C3[0] * x * (xx - 3 * yy)]
    return torch.stack(basis, dim=-1)


@dataclass(frozen=True)
class FilterSettings:
    """Steps in this order, lengths in world units; None leaves a step out. The defaults are for an animal."""

    min_opacity: float = 0.04  # keeps opacity > min_opacity
    max_scaling: float | None = None  # keeps the largest standard deviation < max_scaling
    spare_upper_half: bool = False  # z > 0 passes max_scaling (FaceLift: hair on an upright head; limbs have no up)
    floater: float | None = None  # removes |x| > floater and |y| > floater and z < -floater, the lower corners
    # Lowest and highest x, y, z, inclusive: the body is about 1.2 units long and a stretched tail as long again.
    crop_box: tuple[float, float, float, float, float, float] | None = (-1.5, 1.5, -1.5, 1.5, -1.0, 1.0)


@torch.no_grad()
def filter_gaussians(gaussians: Gaussians, settings: FilterSettings | None = None) -> Gaussians:
    """Returns the Gaussians of one scene (b = 1) that pass, in their order; possibly none. Raises ValueError for more
    than one scene, and for values that are not finite."""
    settings = settings or FilterSettings()
    # Every comparison with NaN fails: a broken network would look like one that sees nothing.
    gaussians.check_finite("Stage 2")
    xyz = gaussians.xyz[0].float()
    keep = gaussians.get_opacity[0, :, 0].float() > settings.min_opacity
    if settings.max_scaling is not None:
        small = gaussians.get_scaling[0].float().amax(dim=-1) < settings.max_scaling
        keep &= small | (xyz[:, 2] > 0) if settings.spare_upper_half else small
    if settings.floater is not None:
        keep &= ~((xyz[:, :2].abs() > settings.floater).all(dim=-1) & (xyz[:, 2] < -settings.floater))
    if settings.crop_box is not None:
        lowest, highest = xyz.new_tensor(settings.crop_box).view(3, 2).unbind(-1)
        keep &= ((xyz >= lowest) & (xyz <= highest)).all(dim=-1)
    return gaussians.select(keep)
