"""The one pinhole camera type of the project.

Conventions (docs/conventions.md is the authority): OpenCV axes (x right, y down, z forward), world z up, `x_world = c2w
@ x_cam`, `fxfycxcy` in pixels, image origin at the outer corner of the first pixel (pixel centers at +0.5, image center
at w / 2).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from multiview.files import read_json, take

# Nerfstudio's and COLMAP's names; FaceLift's files have none of them.
LENS_TERMS = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2", "skew")
LENS_WORDS = re.compile(r"distort|fish_?eye|f_?theta|lat_?long|rolling", re.IGNORECASE)
MOST_VIEWS = 4096  # of a sample; a file of more is none
LARGEST_SIDE = 1 << 15  # pixels; no camera file is believed beyond it
TURNTABLE_HFOV_DEG = 50.0  # FaceLift's


@dataclass(frozen=True)
class Cameras:
    """Pinhole cameras of one image size. c2w: [..., 4, 4] camera to world, rigid. fxfycxcy: [..., 4] pixels."""

    c2w: Tensor
    fxfycxcy: Tensor
    height: int
    width: int

    def __post_init__(self) -> None:
        shape, size = self.c2w.shape, (self.height, self.width)
        if shape[-2:] != (4, 4) or self.fxfycxcy.shape != (*shape[:-2], 4) or min(size) <= 0:
            raise ValueError(
                f"cameras: c2w must have shape [..., 4, 4], fxfycxcy [..., 4], height and width must be positive; got "
                f"{list(shape)}, {list(self.fxfycxcy.shape)}, {self.height} x {self.width}"
            )

    def validate(self, source: str = "cameras") -> Cameras:
        """Checks the values (a device synchronisation), as readers do: finite, rigid, focal lengths positive."""
        if not (torch.isfinite(self.c2w).all() and torch.isfinite(self.fxfycxcy).all()):
            raise ValueError(f"{source}: c2w and fxfycxcy must be finite")
        rotation = self.c2w[..., :3, :3].double()  # float32 would blur what 1e-3 is to tell apart
        error = (rotation.mT @ rotation - torch.eye(3, dtype=torch.float64, device=rotation.device)).abs().max()
        if error > 1e-3:  # calibrations are written with four decimals and more
            raise ValueError(f"{source}: the rotation of c2w must be orthonormal to 1e-3, it is off by {error:.2g}")
        if (torch.linalg.det(rotation) < 0).any():
            raise ValueError(f"{source}: the rotation of c2w mirrors (determinant -1); OpenCV axes are right-handed")
        if (self.fxfycxcy[..., :2] <= 0).any():  # negative ones flip the image: another convention's axes
            raise ValueError(f"{source}: fx and fy must be positive, got {self.fxfycxcy[..., :2].tolist()}")
        return self

    @staticmethod
    def from_w2c(w2c: Tensor, fxfycxcy: Tensor, height: int, width: int) -> Cameras:
        return Cameras(invert_rigid(w2c), fxfycxcy, height, width)

    @staticmethod
    def look_at(eye: Tensor, target: Tensor, fxfycxcy: Tensor, height: int, width: int) -> Cameras:
        """Cameras at `eye` [..., 3] looking at `target` [..., 3] (or [3]), world z up, no roll."""
        forward = torch.nn.functional.normalize(target - eye, dim=-1)
        up = torch.tensor([0.0, 0.0, 1.0], dtype=eye.dtype, device=eye.device).expand_as(forward)
        right = torch.linalg.cross(forward, up, dim=-1)
        if (right.norm(dim=-1) < 1e-6).any():
            raise ValueError("look_at: a camera looks straight up or down, where 'no roll' is undefined")
        right = torch.nn.functional.normalize(right, dim=-1)
        down = torch.linalg.cross(forward, right, dim=-1)
        c2w = torch.eye(4, dtype=eye.dtype, device=eye.device).repeat(*eye.shape[:-1], 1, 1)
        c2w[..., :3, :] = torch.stack([right, down, forward, eye], dim=-1)
        return Cameras(c2w, fxfycxcy.expand(*eye.shape[:-1], 4).contiguous(), height, width)

    @staticmethod
    def orbit(
        azimuth_deg: Tensor, elevation_deg: Tensor, distance: Tensor | float, focal_over_width: float, size: int
    ) -> Cameras:
        """Returns cameras of square images around the origin; azimuths, elevations, distances (or one): [...]."""
        eye = direction(azimuth_deg.double(), elevation_deg.double())
        eye = eye * torch.as_tensor(distance, dtype=torch.float64)[..., None]
        focal = focal_over_width * size
        fxfycxcy = torch.tensor([focal, focal, size / 2, size / 2], dtype=torch.float64)
        return Cameras.look_at(eye, torch.zeros(3, dtype=torch.float64), fxfycxcy, size, size).to(torch.float32)

    @staticmethod
    def turntable(num_views: int, size: int, *, elevation_deg: float = 0.0) -> Cameras:
        """FaceLift's turntable: from -y counter-clockwise over 360 degrees, end point excluded. Shape [num_views]."""
        # Azimuth runs clockwise. The distance is FaceLift's, as the rigs'.
        azimuth_deg = -torch.arange(num_views, dtype=torch.float64) * 360.0 / num_views
        focal = 0.5 / math.tan(math.radians(TURNTABLE_HFOV_DEG) / 2)
        return Cameras.orbit(azimuth_deg, torch.full_like(azimuth_deg, elevation_deg), 2.7, focal, size)

    @property
    def shape(self) -> torch.Size:
        return self.c2w.shape[:-2]

    @property
    def w2c(self) -> Tensor:  # [..., 4, 4] world to camera
        return invert_rigid(self.c2w)

    @property
    def origins(self) -> Tensor:  # [..., 3] camera centers in the world
        return self.c2w[..., :3, 3]

    @property
    def distance(self) -> Tensor:  # [...] of each camera center from the world origin
        return self.origins.norm(dim=-1)

    @property
    def azimuth_deg(self) -> Tensor:  # [...] in [0, 360): where each camera stands, seen from the world origin
        return torch.rad2deg(torch.atan2(-self.origins[..., 0], -self.origins[..., 1])) % 360.0

    @property
    def elevation_deg(self) -> Tensor:  # [...] in [-90, 90]
        return torch.rad2deg(torch.asin((self.origins[..., 2] / self.distance).clamp(-1, 1)))

    def __getitem__(self, index) -> Cameras:  # of the leading (batch, view) dimensions
        return replace(self, c2w=self.c2w[index], fxfycxcy=self.fxfycxcy[index])

    def __len__(self) -> int:
        return self.c2w.shape[0]

    def joined(self, others: Cameras) -> Cameras:
        """These cameras [v] and others [w] of the same image size, [v + w]."""
        c2w, fxfycxcy = torch.cat([self.c2w, others.c2w]), torch.cat([self.fxfycxcy, others.fxfycxcy])
        return Cameras(c2w, fxfycxcy, self.height, self.width)

    def to(self, target) -> Cameras:
        return replace(self, c2w=self.c2w.to(target), fxfycxcy=self.fxfycxcy.to(target))

    def intrinsic_matrix(self) -> Tensor:
        """[..., 3, 3] K for pixel coordinates whose origin is the outer corner of the first pixel."""
        fx, fy, cx, cy = self.fxfycxcy.unbind(-1)
        zero, one = torch.zeros_like(fx), torch.ones_like(fx)
        return torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], dim=-1).unflatten(-1, (3, 3))

    def rays(self) -> tuple[Tensor, Tensor]:
        """Origins and unit directions through the pixel centers, world frame, each [..., h, w, 3]."""
        rows, columns = (torch.arange(side).to(self.fxfycxcy) + 0.5 for side in (self.height, self.width))
        v, u = torch.meshgrid(rows, columns, indexing="ij")
        fx, fy, cx, cy = (self.fxfycxcy[..., i, None, None] for i in range(4))
        x, y = (u - cx) / fx, (v - cy) / fy
        directions = torch.nn.functional.normalize(torch.stack([x, y, torch.ones_like(x)], dim=-1), dim=-1)
        directions = torch.einsum("...ij,...hwj->...hwi", self.c2w[..., :3, :3], directions)
        directions = torch.nn.functional.normalize(directions, dim=-1)  # the rotation is orthonormal to 1e-3 only
        return self.origins[..., None, None, :].expand_as(directions), directions

    def project(self, xyz: Tensor) -> tuple[Tensor, Tensor]:
        """World points [..., n, 3] (leading dimensions as the cameras') -> pixels [..., n, 2], depth z [..., n]."""
        w2c = self.w2c
        xyz_cam = torch.einsum("...ij,...nj->...ni", w2c[..., :3, :3], xyz) + w2c[..., None, :3, 3]
        depth = xyz_cam[..., 2]
        uv = xyz_cam[..., :2] / depth[..., None] * self.fxfycxcy[..., None, :2] + self.fxfycxcy[..., None, 2:]
        return uv, depth

    def resize(self, height: int, width: int) -> Cameras:
        """The cameras of the same images resized to height x width."""
        sx, sy = width / self.width, height / self.height  # cx scales like fx: the origin is the outer corner
        return Cameras(self.c2w, self.fxfycxcy * self.fxfycxcy.new_tensor([sx, sy, sx, sy]), height, width)

    def crop(self, left: int, top: int, width: int, height: int) -> Cameras:
        """The cameras of the same images cropped (a negative left or top pads)."""
        return Cameras(self.c2w, self.fxfycxcy - self.fxfycxcy.new_tensor([0.0, 0.0, left, top]), height, width)

    def rotate(self, azimuth_deg: float) -> Cameras:
        """All cameras moved about the world's z axis so that every azimuth grows by `azimuth_deg`."""
        rotation = torch.eye(4, dtype=torch.float64)  # azimuth runs clockwise, mathematics counter-clockwise
        rotation[:3, :3] = axis_rotation(rotation[2, :3], torch.tensor(math.radians(-azimuth_deg), dtype=torch.float64))
        return replace(self, c2w=rotation.to(self.c2w) @ self.c2w)

    def recentre(self, centre: Tensor, scale: float) -> Cameras:
        """The same cameras in a world moved so that `centre` [3] is the origin, then scaled by `scale`."""
        c2w = self.c2w.clone()
        c2w[..., :3, 3] = (c2w[..., :3, 3] - centre.to(c2w)) * scale
        return replace(self, c2w=c2w)

    def mirrored(self) -> Cameras:
        """Returns cameras that see the world mirrored in x as these see the world, images flipped left to right. With M
        = diag(-1, 1, 1): a point X at pixel (u, v) becomes M X at pixel (width - u, v). Azimuth a becomes -a."""
        sign = self.c2w.new_tensor([-1.0, 1.0, 1.0, 1.0])
        fxfycxcy = self.fxfycxcy.clone()
        fxfycxcy[..., 2] = self.width - fxfycxcy[..., 2]
        return replace(self, c2w=sign[:, None] * self.c2w * sign, fxfycxcy=fxfycxcy)

    def to_frames(self) -> list[dict]:
        """The `frames` list of `opencv_cameras.json`, without `file_path`. Cameras must have shape [v]."""
        # float64 prints what float32 holds; the file then gives back the same bits.
        rows = zip(self.fxfycxcy.double().tolist(), self.w2c.double().tolist())
        names = ("w", "h", "fx", "fy", "cx", "cy", "w2c")
        return [dict(zip(names, (self.width, self.height, *row, w2c))) for row, w2c in rows]

    @staticmethod
    def from_frames(frames: list[dict], source: str, *, padded: bool = False) -> Cameras:
        """Reads the `frames` list of `opencv_cameras.json` into Cameras of shape [v], float32."""
        if not 0 < len(frames) <= MOST_VIEWS:
            raise ValueError(f"{source}: 'frames' has {len(frames)} cameras, 1 to {MOST_VIEWS} are expected")
        sizes, fxfycxcy, w2c = set(), [], []
        for number, frame in enumerate(frames):
            where = f"{source}: frame {number}"
            sizes.add(tuple(take(frame, key, int, where, least=1, most=LARGEST_SIDE) for key in ("w", "h")))
            fxfycxcy.append([take(frame, key, float, where) for key in ("fx", "fy", "cx", "cy")])
            w2c.append(take(frame, "w2c", (4, 4), where))
            bent = [key for key in LENS_TERMS if take(frame, key, float, where, default=0.0) != 0]
            words = [key for key in frame if LENS_WORDS.search(key)]
            bent += [key for key in words if (any(frame[key]) if isinstance(frame[key], list) else frame[key])]
            if bent:  # a pinhole in their place would be off by tens of pixels at the rim
                raise ValueError(f"{where} has lens terms {', '.join(bent)}; undistort the images first")
        if len(sizes) != 1 and not padded:
            raise ValueError(f"{source}: all frames must have one image size, got w x h {sorted(sizes)}")
        width, height = (max(sides) for sides in zip(*sizes))
        w2c, fxfycxcy = (torch.tensor(values, dtype=torch.float64) for values in (w2c, fxfycxcy))
        cameras = Cameras.from_w2c(w2c, fxfycxcy, height, width).to(torch.float32).validate(source)
        if ((w2c[:, 3] - w2c.new_tensor([0, 0, 0, 1])).abs() > 1e-3).any():
            raise ValueError(f"{source}: the last row of each w2c must be 0 0 0 1; is it transposed?")
        return cameras


def invert_rigid(matrix: Tensor) -> Tensor:
    """Inverse of rigid 4x4 matrices [..., 4, 4] by transposition: exact where a general inverse would round."""
    rotation, translation = matrix[..., :3, :3], matrix[..., :3, 3]
    inverse = torch.zeros_like(matrix)
    inverse[..., :3, :3] = rotation.mT
    inverse[..., :3, 3] = -(rotation.mT @ translation[..., None])[..., 0]
    inverse[..., 3, 3] = 1.0
    return inverse


def direction(azimuth_deg: Tensor, elevation_deg: Tensor) -> Tensor:
    """Returns unit vectors [..., 3] from the world origin: azimuth 0 is -y, 90 is -x (clockwise seen from above)."""
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    return torch.stack([-azimuth.sin() * elevation.cos(), -azimuth.cos() * elevation.cos(), elevation.sin()], dim=-1)


def axis_rotation(axis: Tensor, angle: Tensor) -> Tensor:
    """Returns rotations [..., 3, 3] about `axis` [..., 3] (any length but 0) by `angle` [...] radians (Rodrigues)."""
    x, y, z = torch.nn.functional.normalize(axis, dim=-1).unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    sine, cosine = angle.sin()[..., None, None], angle.cos()[..., None, None]
    return torch.eye(3, dtype=axis.dtype, device=axis.device) + sine * cross + (1.0 - cosine) * cross @ cross


def nearest_point(origins: Tensor, directions: Tensor) -> Tensor:
    """Returns the points [..., 3] nearest to n lines (origins, unit directions [..., n, 3]), by least squares."""
    across = torch.eye(3).to(directions) - directions[..., :, None] * directions[..., None, :]  # off the line
    wanted = (across @ origins[..., None]).sum(-3)
    return (torch.linalg.pinv(across.sum(-3), hermitian=True) @ wanted)[..., 0]


def read_cameras(path: Path | str) -> Cameras:
    """Reads an `opencv_cameras.json` into Cameras of shape [v]."""
    return Cameras.from_frames(take(read_json(path), "frames", list, str(path)), str(path))


def perturb(
    cameras: Cameras, *, rotation_deg: float, translation: float, pixels: float, generator: torch.Generator
) -> Cameras:
    """Returns cameras [...] with independent Gaussian calibration errors, to train against them and to measure them.

    Standard deviations: rotation_deg of the angle about a random axis through the camera center, translation of the
    center along each world axis, pixels of the principal point. The generator's unit draws are the same whatever the
    sizes are, so that a sweep compares like with like.
    """
    for name, value in (("rotation_deg", rotation_deg), ("translation", translation), ("pixels", pixels)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"camera noise: {name} is a standard deviation and must be 0 or more, got {value}")
    draws = torch.randn((*cameras.shape, 9), generator=generator, dtype=torch.float64, device=generator.device)
    axis, angle, shift, offset = draws.to(cameras.c2w.device).split([3, 1, 3, 2], dim=-1)
    c2w, fxfycxcy = cameras.c2w.double().clone(), cameras.fxfycxcy.double().clone()
    c2w[..., :3, :3] = c2w[..., :3, :3] @ axis_rotation(axis, math.radians(rotation_deg) * angle[..., 0])
    c2w[..., :3, 3] += translation * shift
    fxfycxcy[..., 2:] += pixels * offset
    return replace(cameras, c2w=c2w.to(cameras.c2w), fxfycxcy=fxfycxcy.to(cameras.fxfycxcy))
