"""Gaussians to a triangle mesh: depth pictures from all around, fused to a signed distance field, then marching cubes.

The fusion is that of Curless and Levoy, "A Volumetric Method for Building Complex Models from Range Images" (1996).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multiview.cameras import TURNTABLE_HFOV_DEG, Cameras
from multiview.files import atomic_write

from .gaussians import Gaussians
from .gaussians_renderer import render

RING_ELEVATIONS_DEG = (-60.0, -20.0, 20.0, 60.0)
MIN_OPACITY = 0.05  # Gaussians fainter than this do not count for the size of the scene
TRUNCATION_VOXELS = 4.0  # distances are trusted this near the surface
MIN_PART = 1e-3  # parts of fewer voxels than this share of the largest are floaters
EMPTY, UNKNOWN = 0.0, -1.0
SUFFIXES = (".ply", ".glb")


@dataclass(frozen=True)
class Mesh:
    """vertices: [n, 3] float32, world frame. faces: [m, 3] int64, counter-clockwise seen from outside. colors: [n, 3],
    0..1."""

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray


@torch.no_grad()
def extract_mesh(
    gaussians: Gaussians, *, resolution: int = 128, num_views: int = 48, size: int = 384, backend: str = "auto"
) -> Mesh:
    """The surface of one scene (b = 1).

    resolution: voxels along the longest side. num_views: depth pictures of size x size pixels, on four rings.
    Parts thinner than about two voxels are lost. A surface that no view sees is closed behind what is seen.
    Raises ValueError for more than one scene, without scikit-image, and where there is no surface.
    """
    marching_cubes = _marching_cubes()
    if gaussians.num_scenes != 1:
        raise ValueError(f"a mesh is made of one scene, got {gaussians.num_scenes}; use gaussians.scene(i)")
    lowest, highest = _bounds(gaussians)
    voxel = float((highest - lowest).max()) / resolution
    views = _depth_views(gaussians, lowest, highest, num_views, size, backend)
    field, origin = _fuse(views, lowest, highest, voxel)
    if not (field.min() < 0 < field.max()):
        raise ValueError(f"none of {num_views} views sees a surface of the {gaussians.num_gaussians} Gaussians")
    vertices, faces, normals, _ = marching_cubes(field.cpu().numpy(), level=0.0, gradient_direction="descent")
    vertices = torch.from_numpy(vertices.copy()).to(origin) * voxel + origin
    outwards = -torch.from_numpy(normals.copy()).to(origin)  # skimage's point to where the field is negative
    colors = _colors(views, vertices, outwards, TRUNCATION_VOXELS * voxel)
    return Mesh(vertices.cpu().numpy(), faces.astype(np.int64), colors.cpu().numpy())


def check_libraries(suffix: str) -> None:
    """Raises ValueError, with the command that installs it, where a library that `suffix` needs is missing."""
    _marching_cubes()
    if suffix == ".glb":
        _trimesh()


def save_mesh(path: Path | str, mesh: Mesh) -> None:
    """Writes `.ply` (binary; vertices with 8-bit colours, z up) or `.glb` (glTF's own axes, y up), atomically.

    Raises ValueError for another suffix, and for `.glb` without trimesh.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a mesh is written as {' or '.join(SUFFIXES)}, got {path}")
    colors = (mesh.colors * 255).round().clip(0, 255).astype(np.uint8)
    with atomic_write(path) as temporary:
        if path.suffix == ".ply":
            _write_ply(temporary, mesh, colors)
        else:
            temporary.write_bytes(_glb(mesh, colors))


# ---- fusion ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Views:
    """cameras: [v]. depth: [v, h, w], EMPTY where rays pass, UNKNOWN where that is unclear. rgb: [v, 3, h, w]."""

    cameras: Cameras
    depth: Tensor
    rgb: Tensor


def _bounds(gaussians: Gaussians) -> tuple[Tensor, Tensor]:
    """Corners of a box around what can be seen, three standard deviations and a small margin included."""
    seen = gaussians.get_opacity[0, :, 0] > MIN_OPACITY
    if not seen.any():
        raise ValueError(f"a mesh needs Gaussians of opacity above {MIN_OPACITY}, got none of {len(seen)}")
    xyz = gaussians.xyz[0, seen].float()
    reach = 3 * torch.diagonal(gaussians.get_covariance[0, seen].float(), dim1=-2, dim2=-1).sqrt()
    lowest, highest = (xyz - reach).amin(dim=0), (xyz + reach).amax(dim=0)
    margin = 0.02 * (highest - lowest).max()
    return lowest - margin, highest + margin


def _depth_views(gaussians, lowest: Tensor, highest: Tensor, num_views: int, size: int, backend: str) -> _Views:
    """Pictures from rings of cameras far enough to see the whole box, one by one."""
    centre, radius = (lowest + highest) / 2, float((highest - lowest).norm()) / 2
    half = np.radians(TURNTABLE_HFOV_DEG / 2)
    number = torch.arange(num_views)
    elevation_deg = torch.tensor(RING_ELEVATIONS_DEG, dtype=torch.float64)[number % len(RING_ELEVATIONS_DEG)]
    cameras = Cameras.orbit(number * 360.0 / num_views, elevation_deg, radius / np.sin(half), 0.5 / np.tan(half), size)
    cameras = cameras.to(gaussians.device).recentre(-centre, 1.0)  # the orbit moved so that it turns about the centre
    depths, colors = [], []
    for v in range(num_views):
        depth, color = _first_surface(gaussians, cameras[None, v : v + 1], radius / 32, backend)
        depths.append(depth), colors.append(color)
    return _Views(cameras, torch.stack(depths), torch.stack(colors))


def _first_surface(gaussians: Gaussians, camera: Cameras, thickness: float, backend: str) -> tuple[Tensor, Tensor]:
    """Depth [h, w] and colour [3, h, w] of what is in front.

    A surface lets through a few per cent of the light, and the far side then pulls the mean depth back by centimetres.
    So Gaussians behind the mean depth are left out and the rest drawn again.
    """
    output = render(gaussians, camera, 0.0, backend)
    uv, z = camera[0].project(gaussians.xyz.float())
    behind = _look_up(output.mean_depth()[0, 0], uv[0])[0]
    front = gaussians.select((behind == EMPTY) | (z[0] < behind + thickness))
    first = render(front, camera, 0.0, backend)
    depth = torch.where(first.alpha < 0.5, UNKNOWN, first.mean_depth())
    depth = torch.where(output.alpha < 0.5, EMPTY, depth)
    return depth[0, 0, 0], (first.rgb / first.alpha.clamp_min(1e-6))[0, 0].clamp(0, 1)


def _look_up(pictures: Tensor, uv: Tensor) -> Tensor:
    """Nearest pixels of [c, h, w] at uv [n, 2] (pixels, clamped to the picture) -> [c, n]."""
    column, row = uv.floor().long().unbind(-1)
    return pictures[:, row.clamp(0, pictures.shape[1] - 1), column.clamp(0, pictures.shape[2] - 1)]


def _fuse(views: _Views, lowest: Tensor, highest: Tensor, voxel: float) -> tuple[Tensor, Tensor]:
    """Signed distance in units of the truncation, [x, y, z], positive outside; and the position of its first sample.

    Every view sees the whole box. Where it sees nothing, the ray is empty along its length. What no view has seen in
    front of a surface, or close behind one, is inside. The outermost samples are outside, which closes the surface.
    """
    shape = [int(n) + 3 for n in ((highest - lowest) / voxel).ceil()]
    origin = lowest - voxel
    axes = [origin[k] + voxel * torch.arange(shape[k], device=lowest.device) for k in range(3)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)
    total, weight = (torch.zeros(len(points), device=lowest.device) for _ in range(2))
    for v in range(len(views.depth)):
        uv, z = views.cameras[v].project(points)
        depth = _look_up(views.depth[v : v + 1], uv)[0]
        distance = torch.where(depth == EMPTY, 1.0, (depth - z) / (TRUNCATION_VOXELS * voxel))
        seen = ((distance > -1) & (depth != UNKNOWN)).float()
        total += seen * distance.clamp(max=1.0)
        weight += seen
    field = torch.where(weight > 0, total / weight.clamp_min(1), -1.0).view(shape)
    for k in range(3):
        field.select(k, 0).fill_(1.0), field.select(k, -1).fill_(1.0)
    return _solid(field), origin


def _solid(field: Tensor) -> Tensor:
    """The field without hollows that nothing sees from outside, and without floaters."""
    from scipy import ndimage

    empty, _ = ndimage.label((field >= 0).cpu().numpy())
    field = torch.where(torch.from_numpy((empty > 0) & (empty != empty[0, 0, 0])).to(field.device), -1.0, field)
    parts, count = ndimage.label((field < 0).cpu().numpy())
    sizes = np.bincount(parts.ravel(), minlength=2)[1:]
    small = np.concatenate([[False], sizes < MIN_PART * sizes.max()])
    return torch.where(torch.from_numpy(small[parts]).to(field.device), 1.0, field)


def _colors(views: _Views, vertices: Tensor, normals: Tensor, near: float) -> Tensor:
    """[n, 3] means over the views that see a vertex, those that face it counting most; grey for what none sees."""
    total, weight = torch.zeros_like(vertices), vertices.new_zeros(len(vertices), 1)
    for v in range(len(views.depth)):
        camera = views.cameras[v]
        uv, z = camera.project(vertices)
        seen = (_look_up(views.depth[v : v + 1], uv)[0] - z).abs() < near
        towards = torch.nn.functional.normalize(camera.c2w[:3, 3] - vertices, dim=-1)
        own = ((towards * normals).sum(-1).clamp_min(0).square() * seen)[:, None]
        total += own * _look_up(views.rgb[v], uv).T
        weight += own
    return torch.where(weight > 1e-3, total / weight.clamp_min(1e-3), 0.5)


# ---- files and optional libraries -----------------------------------------------------------------------------------


def _marching_cubes():
    try:
        from skimage.measure import marching_cubes
    except ImportError as error:
        raise ValueError(f"meshes need scikit-image ({error}): pip install -r requirements-extra.txt") from error
    return marching_cubes


def _write_ply(path: Path, mesh: Mesh, colors: np.ndarray) -> None:
    from plyfile import PlyData, PlyElement

    table = np.empty(len(mesh.vertices), [(n, "<f4") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")])
    for k, (position, color) in enumerate(zip("xyz", ("red", "green", "blue"))):
        table[position], table[color] = mesh.vertices[:, k], colors[:, k]
    faces = np.empty(len(mesh.faces), [("vertex_indices", "<i4", (3,))])
    faces["vertex_indices"] = mesh.faces
    PlyData([PlyElement.describe(table, "vertex"), PlyElement.describe(faces, "face")], byte_order="<").write(str(path))


def _trimesh():
    try:
        import trimesh
    except ImportError as error:
        raise ValueError(f".glb needs trimesh ({error}): pip install -r requirements-extra.txt") from error
    return trimesh


def _glb(mesh: Mesh, colors: np.ndarray) -> bytes:
    y_up = mesh.vertices[:, [0, 2, 1]] * np.array([1, 1, -1], np.float32)
    whole = _trimesh().Trimesh(y_up, mesh.faces, vertex_colors=colors, process=False)
    return whole.export(file_type="glb")
