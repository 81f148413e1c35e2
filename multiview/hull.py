"""The visual hull: the largest solid whose silhouettes lie in all masks. Carving, coloring, rendering, on any device.

Laurentini 1994 (the hull), Niem 1994 (voxel carving), Matusik et al. 2000 (colors from the views that see a point).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multiview.cameras import Cameras, nearest_point

RESOLUTION = 96  # voxels along the longest side of the hull's box
COARSE = 32  # voxels per side of the first look, which finds that box
CHUNK = 1 << 18  # voxels tested at once: some 30 MB
FILLED = 0.5  # a mask value from here on is animal
# Half the side of a voxel's square footprint in a picture, over its projected side. The narrow one keeps the silhouette
# its size; the wide one leaves no gap through which the far side would show.
NARROW, WIDE = 0.6, 1.0
HOLE_NEIGHBOURS = 5  # an empty pixel with so many of 8 filled around it is a pinhole between narrow footprints
OCCLUSION_VOXELS = 2.5  # a point is hidden when something stands this far before it
EMPTY = 0x7F800000 << 32  # key of a pixel that shows nothing: the bits of an infinite depth
HIDDEN_WEIGHT = 1e-4  # what a view that does not see a point counts in its colour: only where none does
RIM_WEIGHT = 0.01  # what a pixel at a mask's rim counts: only where the animal is too thin to have others


@dataclass(frozen=True)
class VisualHull:
    """Voxels of a grid that lie inside every mask. lower: [3] its corner; voxel: side, world units; shape: voxels along
    x, y, z. index: [n] linear, rising. coverage: [n], the least mask value over the views."""

    lower: Tensor
    voxel: float
    shape: tuple[int, int, int]
    index: Tensor
    coverage: Tensor

    @property
    def points(self) -> Tensor:  # [n, 3] voxel centers
        return self.lower + (torch.stack(torch.unravel_index(self.index, self.shape), dim=-1) + 0.5) * self.voxel

    @property
    def volume(self) -> float:  # cubic world units
        return len(self.index) * self.voxel**3

    @property
    def centre(self) -> Tensor:
        """[3] center of mass; voxels half outside a soft mask count half. Raises ValueError for an empty hull."""
        if not len(self.index):
            raise ValueError("the visual hull is empty: the masks of these cameras have no common volume")
        return (self.points * (self.coverage / self.coverage.sum())[:, None]).sum(0)


class Surface(NamedTuple):
    """The hull's outer voxels. points, normals: [n, 3] (outward, unit). voxel: side. colours: [n, 3] 0..1 or None."""

    points: Tensor
    normals: Tensor
    voxel: float
    colours: Tensor | None = None


def viewed_cube(cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Returns opposite corners [3], [3] of a cube that all cameras see, about the point nearest to their axes."""
    forward, origins = cameras.c2w[..., :3, 2].double(), cameras.origins.double()
    if (1 - (forward @ forward[0]).square()).max() < 1e-6:
        raise ValueError("viewed_cube: the cameras look in parallel, so they have no common center; pass bounds")
    center = nearest_point(origins, forward)
    half_field = 0.5 * torch.minimum(cameras.width / cameras.fxfycxcy[:, 0], cameras.height / cameras.fxfycxcy[:, 1])
    half = ((origins - center).norm(dim=-1) * half_field.double()).min()
    return (center - half).to(cameras.c2w.dtype), (center + half).to(cameras.c2w.dtype)


def carve(
    masks: Tensor, cameras: Cameras, *, resolution: int = RESOLUTION, bounds: tuple[Tensor, Tensor] | None = None
) -> VisualHull:
    """masks: [v, 1, h, w] 0..1 (soft rims are read between pixels), cameras: [v] -> the hull, perhaps empty. bounds:
    opposite corners [3] of the searched box (`viewed_cube`). resolution: voxels, at least, along its longest side."""
    return _carve(masks, cameras, resolution, bounds, misses=0)[0]


def carve_leave_one_out(
    masks: Tensor, cameras: Cameras, *, resolution: int = RESOLUTION, bounds: tuple[Tensor, Tensor] | None = None
) -> tuple[VisualHull, list[VisualHull]]:
    """The hull of all views, and per view the hull of all the others; arguments as `carve`, one pass for all."""
    if len(masks) < 3:
        raise ValueError(f"carve_leave_one_out needs at least 3 views, got {len(masks)}")
    found, missed_by = _carve(masks, cameras, resolution, bounds, misses=1)
    chosen = [missed_by < 0, *((missed_by < 0) | (missed_by == view) for view in range(len(masks)))]
    hull, *others = (replace(found, index=found.index[part], coverage=found.coverage[part]) for part in chosen)
    return hull, others


def _carve(
    masks: Tensor, cameras: Cameras, resolution: int, bounds: tuple[Tensor, Tensor] | None, misses: int
) -> tuple[VisualHull, Tensor]:
    """Voxels outside at most `misses` (0 or 1) masks, and the view that rejects each of them [n] (-1: none)."""
    wanted = [len(cameras), 1, cameras.height, cameras.width]
    if list(masks.shape) != wanted:
        raise ValueError(f"masks must be {wanted} (h, w last) to go with the cameras, got {list(masks.shape)}")
    masks = masks.float()
    lower, upper = (corner.to(masks) for corner in (bounds or viewed_cube(cameras)))
    voxel = float((upper - lower).max()) / COARSE
    shape = tuple(max(1, round(side / voxel)) for side in (upper - lower).tolist())
    coarse = VisualHull(lower, voxel, shape, torch.arange(math.prod(shape), device=masks.device), masks[:0])
    # Masks grown by half a voxel's diagonal where it is nearest: no voxel that holds a piece of the hull is lost.
    nearest = (cameras.origins - (lower + upper) / 2).norm(dim=-1) - (upper - lower).norm() / 2
    scale = float((cameras.fxfycxcy[:, 0] / nearest.clamp_min(0.1 * float((upper - lower).norm()))).max())
    margin = int(0.87 * voxel * scale) + 1
    # One axis after the other: the same, sooner.
    grown = F.max_pool2d(masks, (2 * margin + 1, 1), stride=1, padding=(margin, 0))
    grown = F.max_pool2d(grown, (1, 2 * margin + 1), stride=1, padding=(0, margin))
    coarse, missed_by = _test(coarse, grown, cameras, misses)
    if not len(coarse.index):
        return coarse, missed_by
    # The grid of the box around these coarse voxels, at least `resolution` long, and all its voxels within them.
    cells = torch.stack(torch.unravel_index(coarse.index, shape), dim=-1)
    first = cells.amin(0)
    sides = (cells.amax(0) - first + 1).tolist()
    parts = -(-resolution // max(sides))
    nx, ny, nz = (side * parts for side in sides)
    part = torch.arange(parts, device=cells.device)
    x, y, z = (((cells - first) * parts)[:, None] + torch.cartesian_prod(part, part, part)).flatten(0, 1).unbind(-1)
    candidates = ((x * ny + y) * nz + z).sort().values
    fine = VisualHull(lower + first * voxel, voxel / parts, (nx, ny, nz), candidates, masks[:0])
    return _test(fine, masks, cameras, misses)


def _test(candidates: VisualHull, masks: Tensor, cameras: Cameras, misses: int) -> tuple[VisualHull, Tensor]:
    """Those of the candidates that `_carve` returns."""
    height, width = 2 * cameras.height, 2 * cameras.width
    # Doubled once, then read at the nearest pixel: between bilinear and nearest in precision, one gather per voxel.
    doubled = F.interpolate(masks, scale_factor=2, mode="bilinear", align_corners=False).flatten(1)
    w2c, (fx, fy, cx, cy) = cameras.w2c, (2 * cameras.fxfycxcy).unbind(-1)
    found = []
    for index in candidates.index.split(CHUNK):
        points = replace(candidates, index=index).points
        coverage, missed_by = points.new_ones(len(index)), torch.full_like(index, -1)
        for view in range(len(cameras)):
            x, y, z = (points @ w2c[view, :3, :3].T + w2c[view, :3, 3]).unbind(-1)
            before, z = z > 0, z.clamp_min(1e-6)
            column, row = (x / z * fx[view] + cx[view]).floor(), (y / z * fy[view] + cy[view]).floor()
            seen = before & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            place = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            value = doubled[view][place] * seen
            inside = value >= FILLED
            keep = inside | (missed_by < 0) if misses else inside
            missed_by = torch.where(inside, missed_by, view)[keep]
            coverage = torch.where(inside, torch.minimum(coverage, value), coverage)[keep]
            points, index = points[keep], index[keep]
        found.append((index, coverage, missed_by))
    index, coverage, missed_by = (torch.cat(parts) for parts in zip(*found))
    return replace(candidates, index=index, coverage=coverage), missed_by


def surface(hull: VisualHull) -> Surface:
    """Voxels with a free side, and normals from the fraction of filled voxels around them (5 x 5 x 5)."""
    reach = 2
    filled = torch.zeros(math.prod(hull.shape), dtype=torch.bool, device=hull.index.device)
    filled[hull.index] = True
    padded = F.pad(filled.reshape(hull.shape), (reach,) * 6)
    _, ny, nz = padded.shape
    x, y, z = (axis + reach for axis in torch.unravel_index(hull.index, hull.shape))
    place, flat = (x * ny + y) * nz + z, padded.flatten()
    steps = torch.tensor([ny * nz, nz, 1], device=place.device)
    free = torch.zeros_like(place, dtype=torch.bool)
    for step in steps.tolist():
        free |= ~flat[place + step] | ~flat[place - step]
    place = place[free]
    axis = torch.arange(-reach, reach + 1, device=place.device)
    offsets = torch.cartesian_prod(axis, axis, axis)
    around = flat[place[:, None] + (offsets * steps).sum(-1)]
    normals = F.normalize(-(around.to(hull.lower) @ offsets.to(hull.lower)), dim=-1)
    return Surface(hull.points[free], normals, hull.voxel)


def observe(surface: Surface, rgb: Tensor, masks: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Returns what each view shows at each surface point, colors [v, n, 3], and how well it sees the point, weights [v,
    n]: the squared cosine between normal and view, 0 where something stands before the point, small at the mask's rim,
    where the background shines through. rgb: [v, 3, h, w] 0..1, masks: [v, 1, h, w], cameras: [v]."""
    inner = -F.max_pool2d(-masks.float(), 3, stride=1, padding=1)
    depth = nearest_points(surface, cameras)[1][:, None]
    uv, z = cameras.project(surface.points.expand(len(cameras), -1, -1))
    place = (uv / uv.new_tensor([cameras.width, cameras.height]) * 2 - 1)[:, None]
    colours = F.grid_sample(rgb.float(), place, padding_mode="border", align_corners=False)[:, :, 0].mT
    exact = F.grid_sample(torch.cat([inner, depth], dim=1), place, mode="nearest", align_corners=False)
    rim, nearest = exact[:, 0, 0], exact[:, 1, 0]
    seen = (z > 0) & ((nearest == 0) | (z < nearest + OCCLUSION_VOXELS * surface.voxel))
    towards = F.normalize(cameras.origins[:, None] - surface.points, dim=-1)
    facing = (surface.normals * towards).sum(-1).clamp_min(0).square()
    return colours, seen * facing * (rim + RIM_WEIGHT)


def colour_surface(surface: Surface, rgb: Tensor, masks: Tensor, cameras: Cameras) -> Surface:
    """The surface with the views' colours, weighted as `observe` says; where no view sees a point, their plain mean."""
    colours, weights = observe(surface, rgb, masks, cameras)
    weights = weights + HIDDEN_WEIGHT
    return surface._replace(colours=(colours * weights[..., None]).sum(0) / weights.sum(0)[:, None])


def nearest_points(surface: Surface, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Returns the index [v, h, w] of the point each pixel shows (-1: none; ties: the lower), its depth z (0: none)."""
    key = torch.where(silhouettes(surface, cameras)[:, 0], _splat(surface, cameras, WIDE), EMPTY)
    empty = key == EMPTY
    depth = (key >> 32).to(torch.int32).view(torch.float32).masked_fill(empty, 0)
    return torch.where(empty, -1, key & 0xFFFFFFFF), depth


def silhouettes(surface: Surface, cameras: Cameras) -> Tensor:
    """[v, 1, h, w] bool: where each camera sees the hull."""
    covered = (_splat(surface, cameras, NARROW) != EMPTY)[:, None]
    around = F.avg_pool2d(covered.float(), 3, stride=1, padding=1) * 9
    return covered | (around > HOLE_NEIGHBOURS - 0.5)


def _splat(surface: Surface, cameras: Cameras, reach: float) -> Tensor:
    """[v, h, w] keys (depth and index) of the nearest voxel whose square holds the pixel's center, or EMPTY."""
    height, width = cameras.height, cameras.width
    buffer = torch.full((len(cameras), height * width), EMPTY, dtype=torch.int64, device=surface.points.device)
    order = torch.arange(len(surface.points), device=surface.points.device)
    for view in range(len(cameras)):
        uv, z = cameras[view].project(surface.points)
        before = z > 0
        uv, z, number = uv[before], z[before], order[before]
        if not len(z):
            continue
        radius = reach * surface.voxel * cameras.fxfycxcy[view, 0] / z
        # Positive floats sort as their bits do, so that depth and index fit one integer and one pass.
        key = (z.float().view(torch.int32).long() << 32) | number
        first = (uv - radius[:, None] - 0.5).ceil()
        span = int((2 * radius.max()).ceil()) + 1
        for down, right in itertools.product(range(span), repeat=2):
            column, row = first[:, 0] + right, first[:, 1] + down
            inside = (row + 0.5 <= uv[:, 1] + radius) & (column + 0.5 <= uv[:, 0] + radius)
            inside &= (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = (row[inside] * width + column[inside]).long()
            buffer[view].scatter_reduce_(0, place, key[inside], "amin")
    return buffer.unflatten(1, (height, width))


def render_hull(surface: Surface, cameras: Cameras, background: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the colored surface as cameras [v] see it: rgb [v, 3, h, w] over the background, mask [v, 1, h, w] 0 or
    1, depth [v, 1, h, w] camera z, 0 = none. Made for images whose pixels are not far smaller than a voxel."""
    if surface.colours is None:
        raise ValueError("render_hull needs colors: call colour_surface first")
    index, depth = nearest_points(surface, cameras)
    colors = torch.cat([surface.colours, surface.colours.new_full((1, 3), background)])  # -1 is the last row
    return colors[index].permute(0, 3, 1, 2), (index >= 0)[:, None].to(colors.dtype), depth[:, None]
