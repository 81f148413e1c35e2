"""Rendered samples and whole datasets of synthetic mice, with the rasterizer handed in by the caller."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.rig import ViewRig
from multiview.sample import Sample, write_split
from synthetic.cloud import SplatCloud

# (cloud, cameras [v]) -> rgb [v, 3, h, w] over black, alpha [v, 1, h, w], mean depth z [v, 1, h, w] where alpha > 0
Render = Callable[[SplatCloud, Cameras], tuple[Tensor, Tensor, Tensor]]

NOVEL_ELEVATION_DEG = (-5.0, 60.0)
NOVEL_DISTANCE = (2.4 / 2.7, 3.0 / 2.7)  # over the rig's distance
PHOTOGRAPH_SCALE = (0.88, 1.12)  # a photograph is framed by its mask, not by the animal's true size and centre
PHOTOGRAPH_SHIFT = 0.06  # world units, along each axis
OPAQUE = 0.5  # a pixel has a depth where the animal covers more than this


def novel_cameras(rig: ViewRig, size: int, count: int, seed: int, index: int) -> Cameras:
    """`count` random cameras for sample `index`: any azimuth, NOVEL_ELEVATION_DEG, NOVEL_DISTANCE."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, index, 1]))
    azimuth, elevation = rng.uniform(0, 360, count), rng.uniform(*NOVEL_ELEVATION_DEG, count)
    distance = rig.distance * rng.uniform(*NOVEL_DISTANCE, count)
    return Cameras.orbit(*(torch.from_numpy(values) for values in (azimuth, elevation, distance)), rig.focal, size)


def draw_heading(seed: int, index: int, heading_deg: tuple[float, float] | None) -> float | None:
    """heading_deg: (centre, spread) draws uniformly in centre +- spread; None leaves any heading to the mouse."""
    if heading_deg is None:
        return None
    rng = np.random.default_rng(np.random.SeedSequence([seed, index, 2]))
    return float(heading_deg[0] + rng.uniform(-1, 1) * heading_deg[1])


def is_photographic(seed: int, index: int, share: float) -> bool:
    """Whether sample `index` is a photograph when this share of them is; a larger share only adds photographs."""
    return np.random.default_rng(np.random.SeedSequence([seed, index, 5])).random() < share


def moved(cloud: SplatCloud, rng: np.random.Generator) -> tuple[SplatCloud, dict]:
    """The animal scaled about the origin and shifted (PHOTOGRAPH_SCALE, PHOTOGRAPH_SHIFT), and by how much."""
    scale, shift = rng.uniform(*PHOTOGRAPH_SCALE), rng.uniform(-PHOTOGRAPH_SHIFT, PHOTOGRAPH_SHIFT, 3)
    done = {"scale": round(float(scale), 4), "shift": np.round(shift, 4).tolist()}
    return cloud.transformed(scale=scale, offset=shift), done


def sample_from_cloud(
    cloud: SplatCloud, cameras: Cameras, view_names: list[str | None], render: Render, *, id: str, depth: bool = False
) -> Sample:
    """Renders a cloud into a Sample: straight alpha, depth pictures on request."""
    rgb, alpha, mean_depth = render(cloud, cameras)
    straight = torch.where(alpha > 1 / 512, rgb / alpha.clamp_min(1 / 512), torch.zeros_like(rgb))
    pictures = torch.cat([straight.clamp(0, 1), alpha.clamp(0, 1)], dim=1)
    extra = {
        "synthetic": cloud.meta,
        "body_length": cloud.body_length,
        "floor": cloud.floor,
        "keypoints": np.round(cloud.keypoints.astype(float), 5).tolist(),
    }
    depths = torch.where(alpha > OPAQUE, mean_depth, torch.zeros_like(mean_depth)) if depth else None
    return Sample(id=id, rgba=pictures, cameras=cameras, view_names=view_names, depth=depths, extra=extra)


def make_sample(
    rig: ViewRig,
    size: int,
    seed: int,
    index: int,
    render: Render,
    *,
    num_novel_views: int = 0,
    depth: bool = False,
    heading_deg: tuple[float, float] | None = None,
    coat: str | None = None,
    pose: str | None = None,
    make_cloud: Callable[..., SplatCloud] | None = None,
    photographic: float = 0.0,
) -> Sample:
    """Sample `index` of the series `seed`: the rig's views in order, then num_novel_views random ones.

    heading_deg: (centre, spread) of the direction of the nose as an azimuth relative to the rig's azimuth 0; None: any.
    make_cloud: what draws the animal, by default `scene.make_mouse` (same signature).
    photographic: share 0..1 of the samples that are photographs: a laboratory's light and exposure, the animal a little
    off its place and size, the rig's views as cameras and a segmentation would give them (`photograph`); its own random
    numbers, so the other samples do not change. Novel views stay clean and depth true, of that same animal.
    The result depends on the arguments only.
    """
    from synthetic.photograph import draw_camera, photograph, toned
    from synthetic.scene import laboratory_light, make_mouse

    if not 0.0 <= photographic <= 1.0:
        raise ValueError(f"photographic must be a share in [0, 1], got {photographic}")
    heading = draw_heading(seed, index, heading_deg)
    chosen = is_photographic(seed, index, photographic)
    rng = np.random.default_rng(np.random.SeedSequence([seed, index, 6]))
    light = {"light": laboratory_light(rng)} if chosen else {}
    cloud = (make_cloud or make_mouse)(seed, index, coat=coat, pose=pose, heading_deg=heading, **light)
    if chosen:
        camera = draw_camera(rng)
        cloud, framing = moved(replace(cloud, rgb=toned(cloud.rgb, camera)), rng)
    cameras, names = rig.cameras(size), list(rig.view_names)
    if num_novel_views:
        extra = novel_cameras(rig, size, num_novel_views, seed, index)
        cameras = Cameras(
            torch.cat([cameras.c2w, extra.c2w]), torch.cat([cameras.fxfycxcy, extra.fxfycxcy]), size, size
        )
        names += [None] * num_novel_views
    sample = sample_from_cloud(cloud, cameras, names, render, id=sample_name(index), depth=depth)
    if chosen:
        sample = photograph(sample, len(rig.view_names), camera, rng)
        sample.extra["photograph"].update(framing)
    return sample


def sample_name(index: int) -> str:
    return f"sample_{index:06d}"


def split_indices(num_samples: int, val_fraction: float) -> tuple[list[int], list[int]]:
    """Training and validation indices, spread evenly; growing the dataset never moves a sample to the other side."""
    steps = [math.floor(i * val_fraction + 1e-9) for i in range(num_samples + 1)]
    is_val = [steps[i + 1] > steps[i] for i in range(num_samples)]
    return [i for i in range(num_samples) if not is_val[i]], [i for i in range(num_samples) if is_val[i]]


def write_splits(folder: Path, prefix: str, num_samples: int, val_fraction: float) -> None:
    """Writes <prefix>_train.txt and <prefix>_val.txt (the latter only if it has a line)."""
    for name, indices in zip(("train", "val"), split_indices(num_samples, val_fraction)):
        if indices:
            write_split(folder / f"{prefix}_{name}.txt", [folder / sample_name(i) for i in indices])
