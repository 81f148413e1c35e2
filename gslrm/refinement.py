"""Fits Gaussians to the posed views of one scene: seconds on a CPU, from Stage 2, the hull or the frame before.

As 3D Gaussian splatting (Kerbl et al. 2023) without densification: Adam moves, colors and resizes the Gaussians of a
good start until renderings agree with the given images and masks. docs/benchmarks.md measures each choice made here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gslrm.losses import ssim_loss
from gslrm.model.gaussians import C0, Gaussians
from gslrm.model.gaussians_renderer import render
from multiview import metrics
from multiview.cameras import Cameras
from multiview.hull import VisualHull, colour_surface, surface
from multiview.run import make_generator

MOST_GAUSSIANS = 60_000  # of a result; Stage 2 at 512 px predicts up to a million
ITERATIONS = {"hull": 300, "stage2": 150, "previous": 100}  # of `auto`, by the start: a worse one needs more
TRIAL_ITERATIONS = 20  # that tell the better start from the worse
SURE_IOU = 0.9  # a Stage 2 that explains the given masks so well needs no trial
NEIGHBOURS = 4  # whose colors and opacities are held together
HULL_SIGMA = 0.7  # standard deviation of a hull's Gaussian, voxels
HULL_OPACITY = 2.0  # its logit
WINDOW, LEAST_GAIN = 25, 0.002  # stops when the mean loss of so many iterations falls by less than this fraction


@dataclass(frozen=True)
class RefineSettings:
    """How Gaussians are fitted. Rates are Adam's; lengths are in units of the scene's radius (see `scene_radius`)."""

    views_per_iteration: int = 2
    rate_xyz: float = 2.5e-3
    rate_color: float = 1e-2
    rate_scaling: float = 4e-2
    rate_rotation: float = 2e-2
    rate_opacity: float = 0.2
    weight_l1: float = 8.0
    weight_ssim: float = 2.0
    weight_alpha: float = 5.0
    weight_scale: float = 0.008  # of the mean size, in units of the radius: no Gaussian hides behind others and swells
    weight_smooth: float = 0.1  # of the difference to the colors and opacities of the start's nearest neighbors
    least_sigma: float = 0.0  # no Gaussian becomes narrower, so that no holes open between the given views


# A hull's surface lies outside of the true one wherever the animal is hollow, so that its Gaussians have to travel; its
# neighbors' colors are too rough a guess to hold on to.
SETTINGS = {
    "hull": RefineSettings(rate_xyz=1e-2, weight_smooth=0.0, least_sigma=0.02),
    "stage2": RefineSettings(),
    # A surface point keeps its color and moves; with slower centers a frame of a running mouse is not caught up with.
    "previous": RefineSettings(rate_xyz=1e-2, rate_color=3e-3, weight_smooth=0.0, least_sigma=0.02),
}  # fmt: skip


def hull_start(hull: VisualHull, rgb: Tensor, masks: Tensor, cameras: Cameras) -> Gaussians:
    """Returns one Gaussian per surface voxel of the visual hull [1, n], with the views' projected colors.

    rgb: [v, 3, h, w] 0..1, masks: [v, 1, h, w] 0..1, cameras: [v].
    """
    points = colour_surface(surface(hull), rgb, masks, cameras)
    xyz, one = points.points[None], torch.ones_like(points.points[None, :, :1])
    return Gaussians(
        xyz, ((points.colours - 0.5) / C0)[None, :, None], one.expand_as(xyz) * math.log(HULL_SIGMA * points.voxel),
        torch.cat([one, torch.zeros_like(xyz)], dim=-1), HULL_OPACITY * one,
    )  # fmt: skip


def limit(gaussians: Gaussians) -> Gaussians:
    """Returns at most MOST_GAUSSIANS of one scene, taken evenly from their order and grown to cover the same area."""
    n = gaussians.num_gaussians
    if n <= MOST_GAUSSIANS:
        return gaussians
    kept = gaussians.select(torch.linspace(0, n - 1, MOST_GAUSSIANS).long().to(gaussians.device))
    return Gaussians(**{**vars(kept), "scaling": kept.scaling + 0.5 * math.log(n / MOST_GAUSSIANS)})


def scene_radius(gaussians: Gaussians) -> float:
    """Returns the median distance of one scene's Gaussians that are more opaque than not from their median, units."""
    xyz = gaussians.xyz[0][gaussians.opacity[0, :, 0] > 0]
    xyz = xyz if len(xyz) else gaussians.xyz[0]
    return max(float((xyz - xyz.median(0).values).norm(dim=-1).median()), 1e-6)


def anisotropy_p95(gaussians: Gaussians) -> float:
    """Returns the 95th percentile of the ratio of the largest to the smallest standard deviation of a Gaussian."""
    ratio = (gaussians.scaling.amax(-1) - gaussians.scaling.amin(-1)).flatten().float().sort().values
    return float(ratio[int(0.95 * (len(ratio) - 1))].exp()) if len(ratio) else 1.0


@torch.no_grad()
def agreement(gaussians: Gaussians, rgb: Tensor, masks: Tensor, cameras: Cameras) -> dict[str, float]:
    """Returns the mean foreground PSNR in dB and mask IoU of the views as the Gaussians show them."""
    psnr, iou = [], []
    for view in range(len(rgb)):  # one by one: the memory of one
        seen = render(gaussians, cameras[view : view + 1][None])
        psnr.append(metrics.foreground_psnr(seen.rgb[0].clamp(0, 1), rgb[view : view + 1], masks[view : view + 1]))
        iou.append(metrics.mask_iou(seen.alpha[0], masks[view : view + 1]))
    return {"psnr": float(torch.cat(psnr).mean()), "iou": float(torch.cat(iou).mean())}


def refine(
    start: Gaussians, rgb: Tensor, masks: Tensor, cameras: Cameras, iterations: int,
    settings: RefineSettings = RefineSettings(), *, seed: int = 0,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> tuple[Gaussians, int]:  # fmt: skip
    """Returns the Gaussians [1, n] fitted to the views, in their order, the same for the same seed; and how many
    iterations were made: fewer than `iterations` where nothing improves any more.

    start: one scene. rgb: [v, 3, h, w] on white, masks: [v, 1, h, w], 0..1, cameras: [v]; all on the start's device.
    progress: wraps the iterations, for a bar; one with `set_postfix` is told the PSNR in dB of the views in work.
    """
    generator, s, radius = make_generator("refine", seed), settings, scene_radius(start)
    raw = {name: tensor.detach().float().clone().requires_grad_() for name, tensor in vars(start).items()}
    rates = {"xyz": s.rate_xyz * radius, "features": s.rate_color, "scaling": s.rate_scaling,
             "rotation": s.rate_rotation, "opacity": s.rate_opacity}  # fmt: skip
    groups = [{"params": [raw[name]], "lr": rate} for name, rate in rates.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    smooth = s.weight_smooth if start.num_gaussians > NEIGHBOURS else 0.0
    if smooth:
        from scipy.spatial import cKDTree

        xyz = start.xyz[0].detach().cpu().numpy()
        near = torch.from_numpy(cKDTree(xyz).query(xyz, NEIGHBOURS + 1)[1][:, 1:]).to(rgb.device)
    color = rgb - (1 - masks)  # premultiplied by the mask: over black
    order: list[int] = []
    losses: list[float] = []
    bar = range(iterations) if progress is None else progress(range(iterations))
    for _ in bar:
        chosen = []
        while len(chosen) < min(s.views_per_iteration, len(rgb)):
            order = order or torch.randperm(len(rgb), generator=generator).tolist()
            chosen.append(order.pop())
        # A background that is new each time leaves no color to hide before: this is what makes outlines right.
        background = torch.rand(3, generator=generator).to(rgb)
        gaussians = Gaussians(**raw)
        out = render(gaussians, cameras[chosen][None], background)
        target = (color[chosen] + (1 - masks[chosen]) * background[:, None, None])[None]
        loss = s.weight_l1 * (out.rgb - target).abs().mean() + s.weight_ssim * ssim_loss(out.rgb, target).mean()
        loss = loss + s.weight_alpha * (out.alpha[0] - masks[chosen]).abs().mean()
        loss = loss + s.weight_scale / radius * gaussians.get_scaling.mean()
        if smooth:
            held = torch.cat([raw["features"][0, :, 0], raw["opacity"][0]], dim=-1)
            # index_select: gradients of indexing are summed by several threads in any order.
            step = (held[:, None] - held.index_select(0, near.flatten()).unflatten(0, near.shape)).abs()
            loss = loss + smooth * (step[..., :3].mean() + 0.05 * step[..., 3].mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if s.least_sigma:
            raw["scaling"].data.clamp_(min=math.log(s.least_sigma * radius))
        schedule.step()
        losses.append(loss.item())
        if hasattr(bar, "set_postfix"):
            bar.set_postfix(psnr=f"{float(metrics.psnr(out.rgb[0].detach().clamp(0, 1), target[0]).mean()):.1f}")
        recent, before = losses[-WINDOW:], losses[-2 * WINDOW : -WINDOW]
        if len(before) == WINDOW and sum(recent) > (1 - LEAST_GAIN) * sum(before):
            break
    return Gaussians(**raw).map(Tensor.detach), len(losses)


def choose_start(
    starts: dict[str, Gaussians], rgb: Tensor, masks: Tensor, cameras: Cameras, *, seed: int = 0
) -> tuple[str, dict[str, dict[str, float]]]:
    """Returns the name of the start that explains the given views better after a short fit, and each one's agreement.

    How well an unfitted start does says too little: a hull's colors come from the very views it is compared with.
    """
    tried = {}
    for name, start in starts.items():
        fitted, _ = refine(start, rgb, masks, cameras, TRIAL_ITERATIONS, SETTINGS[name], seed=seed)
        tried[name] = agreement(fitted, rgb, masks, cameras)
    return max(tried, key=lambda name: tried[name]["psnr"]), tried
