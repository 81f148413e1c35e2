"""Gaussians to a triangle mesh: depth maps from all around, fused to a signed distance field (Curless and Levoy, "A
Volumetric Method for Building Complex Models from Range Images", 1996), then marching cubes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gslrm.model.gaussians import Gaussians, rotation_matrices
from gslrm.model.gaussians_renderer import render
from multiview.cameras import TURNTABLE_HFOV_DEG, Cameras
from multiview.files import atomic_write

RING_ELEVATIONS_DEG = (-60.0, -20.0, 20.0, 60.0)
MIN_OPACITY = 0.05  # Gaussians fainter than this do not count for the size of the scene
TRUNCATION_VOXELS = 4.0  # distances are trusted this near the surface
MIN_PART = 1e-3  # parts of fewer voxels than this fraction of the largest are floaters
EMPTY, UNKNOWN = 0.0, -1.0  # in depth maps: rays pass; it is unclear whether they do
SUFFIXES = (".ply", ".glb")
LIBRARIES = {"skimage.measure": "scikit-image", "trimesh": "trimesh"}  # the second for .glb alone


class Mesh(NamedTuple):
    """vertices: [n, 3] float32, world. faces: [m, 3] int64, counter-clockwise from outside. colors: [n, 3], 0..1."""

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray


def check_libraries(suffix: str) -> None:
    """Raises ValueError for a library that a .ply or .glb mesh needs, with the command that installs it."""
    for module in list(LIBRARIES)[: 2 if suffix == ".glb" else 1]:
        _library(module)


def _library(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = LIBRARIES[module]
        raise ValueError(f"this mesh needs {name} ({error}): pip install -r requirements-extra.txt") from error


@torch.no_grad()
def extract_mesh(gaussians: Gaussians, *, resolution: int = 128, num_views: int = 48, size: int = 384) -> Mesh:
    """Returns the surface of one scene (b = 1), closed behind what is seen, without parts thinner than two voxels.
    resolution: voxels along the longest side. num_views: depth maps of size x size pixels, on four rings.
    Raises ValueError for more than one scene, without scikit-image, and where there is no surface."""
    marching_cubes = _library("skimage.measure").marching_cubes
    # A box around what can be seen, three standard deviations and a small margin included.
    seen = gaussians.select((gaussians.get_opacity > MIN_OPACITY)[0, :, 0]).to(torch.float32)
    if seen.num_gaussians == 0:
        count = gaussians.num_gaussians
        raise ValueError(f"a mesh needs Gaussians of opacity above {MIN_OPACITY}, got none of {count}")
    axes = (rotation_matrices(seen.get_rotation) * seen.get_scaling[..., None, :])[0]
    reach = 3 * torch.diagonal(axes @ axes.mT, dim1=-2, dim2=-1).sqrt()
    lowest, highest = (seen.xyz[0] - reach).amin(dim=0), (seen.xyz[0] + reach).amax(dim=0)
    margin = 0.02 * (highest - lowest).max()
    lowest, highest = lowest - margin, highest + margin
    voxel = float((highest - lowest).max()) / resolution

    views = _depth_maps(gaussians, lowest, highest, num_views, size)
    field, origin = _fuse(views, lowest, highest, voxel)
    if not (field.min() < 0 < field.max()):
        raise ValueError(f"none of {num_views} views sees a surface of the {gaussians.num_gaussians} Gaussians")
    vertices, faces, normals, _ = marching_cubes(field.cpu().numpy(), level=0.0, gradient_direction="descent")
    vertices = torch.from_numpy(vertices.copy()).to(origin) * voxel + origin
    outwards = -torch.from_numpy(normals.copy()).to(origin)  # skimage's point to where the field is negative

    # Of each vertex the mean color over the views that see it, weighted by how they face it; gray where none does.
    total, weight = torch.zeros_like(vertices), vertices.new_zeros(len(vertices), 1)
    for camera, depth, image in views:
        uv, z = camera.project(vertices)
        visible = (_look_up(depth[None], uv)[0] - z).abs() < TRUNCATION_VOXELS * voxel
        towards = torch.nn.functional.normalize(camera.c2w[:3, 3] - vertices, dim=-1)
        facing = ((towards * outwards).sum(-1).clamp_min(0).square() * visible)[:, None]
        total += facing * _look_up(image, uv).T
        weight += facing
    colors = torch.where(weight > 1e-3, total / weight.clamp_min(1e-3), 0.5)
    return Mesh(vertices.cpu().numpy(), faces.astype(np.int64), colors.cpu().numpy())


def save_mesh(path: Path | str, mesh: Mesh) -> None:
    """Writes `.ply` (binary; vertices with 8-bit colors, z up) or `.glb` (glTF's own axes, y up), atomically. Raises
    ValueError for another suffix, and for `.glb` without trimesh."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a mesh is written as {' or '.join(SUFFIXES)}, got {path}")
    trimesh = _library("trimesh") if path.suffix == ".glb" else None
    colors = (mesh.colors * 255).round().clip(0, 255).astype(np.uint8)
    with atomic_write(path) as temporary:
        if trimesh:
            y_up = mesh.vertices[:, [0, 2, 1]] * np.array([1, 1, -1], np.float32)
            whole = trimesh.Trimesh(y_up, mesh.faces, vertex_colors=colors, process=False)
            temporary.write_bytes(whole.export(file_type="glb"))
            return
        from plyfile import PlyData, PlyElement

        columns = [(axis, "<f4", mesh.vertices[:, k]) for k, axis in enumerate("xyz")]
        columns += [(name, "u1", colors[:, k]) for k, name in enumerate(("red", "green", "blue"))]
        table = np.rec.fromarrays([values for *_, values in columns], [(name, kind) for name, kind, _ in columns])
        faces = np.ascontiguousarray(mesh.faces, "<i4").view([("vertex_indices", "<i4", (3,))])[:, 0]
        elements = [PlyElement.describe(table, "vertex"), PlyElement.describe(faces, "face")]
        PlyData(elements, byte_order="<").write(str(temporary))


def _depth_maps(gaussians: Gaussians, lowest: Tensor, highest: Tensor, num_views: int, size: int) -> list[tuple]:
    """Renders from rings of cameras far enough to see the whole box: per view camera, depth [h, w], image [3, h, w]."""
    # A surface lets through a few per cent of the light, and the far side then pulls the mean depth back by
    # centimeters. So Gaussians behind the mean depth are left out and the rest drawn again.
    center, radius = (lowest + highest) / 2, float((highest - lowest).norm()) / 2
    half = np.radians(TURNTABLE_HFOV_DEG / 2)
    number = torch.arange(num_views)
    elevation_deg = torch.tensor(RING_ELEVATIONS_DEG, dtype=torch.float64)[number % len(RING_ELEVATIONS_DEG)]
    cameras = Cameras.orbit(number * 360.0 / num_views, elevation_deg, radius / np.sin(half), 0.5 / np.tan(half), size)
    cameras = cameras.to(gaussians.device).recentre(-center, 1.0)  # the orbit moved so that it turns about the center
    views = []
    for v in range(num_views):
        camera = cameras[None, v : v + 1]
        output = render(gaussians, camera, 0.0)
        uv, z = camera[0].project(gaussians.xyz.float())
        behind = _look_up(output.mean_depth()[0, 0], uv[0])[0]
        first = render(gaussians.select((behind == EMPTY) | (z[0] < behind + radius / 32)), camera, 0.0)
        depth = torch.where(first.alpha < 0.5, UNKNOWN, first.mean_depth())
        depth = torch.where(output.alpha < 0.5, EMPTY, depth)[0, 0, 0]
        views.append((cameras[v], depth, (first.rgb / first.alpha.clamp_min(1e-6))[0, 0].clamp(0, 1)))
    return views


def _look_up(images: Tensor, uv: Tensor) -> Tensor:
    """Nearest pixels of [c, h, w] at uv [n, 2] (pixels, clamped to the image) -> [c, n]."""
    column, row = uv.floor().long().unbind(-1)
    return images[:, row.clamp(0, images.shape[1] - 1), column.clamp(0, images.shape[2] - 1)]


def _fuse(views: list, lowest: Tensor, highest: Tensor, voxel: float) -> tuple[Tensor, Tensor]:
    """Signed distance in units of the truncation, [x, y, z], positive outside; and the position of its first sample.
    Where a view sees nothing, the ray is empty along its length. What no view has seen in front of a surface, or close
    behind one, is inside. The outermost samples are outside, which closes the surface."""
    from scipy import ndimage

    shape = [int(n) + 3 for n in ((highest - lowest) / voxel).ceil()]
    origin = lowest - voxel
    axes = [origin[k] + voxel * torch.arange(shape[k], device=lowest.device) for k in range(3)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)
    total, weight = (torch.zeros(len(points), device=lowest.device) for _ in range(2))
    for camera, depth_map, _ in views:
        uv, z = camera.project(points)
        depth = _look_up(depth_map[None], uv)[0]
        distance = torch.where(depth == EMPTY, 1.0, (depth - z) / (TRUNCATION_VOXELS * voxel))
        seen = ((distance > -1) & (depth != UNKNOWN)).float()
        total += seen * distance.clamp(max=1.0)
        weight += seen
    field = torch.where(weight > 0, total / weight.clamp_min(1), -1.0).view(shape)
    for k in range(3):
        field.select(k, 0).fill_(1.0), field.select(k, -1).fill_(1.0)
    # Hollows that nothing sees from outside are filled, and floaters removed.
    empty, _ = ndimage.label((field >= 0).cpu().numpy())
    field = torch.where(torch.from_numpy((empty > 0) & (empty != empty[0, 0, 0])).to(field.device), -1.0, field)
    parts, _ = ndimage.label((field < 0).cpu().numpy())
    sizes = np.bincount(parts.ravel(), minlength=2)[1:]
    small = np.concatenate([[False], sizes < MIN_PART * sizes.max()])
    return torch.where(torch.from_numpy(small[parts]).to(field.device), 1.0, field), origin
