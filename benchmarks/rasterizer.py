"""Times of the rasterizer beside a plain PyTorch one, and of rendering at a preset's size."""

from __future__ import annotations

import torch

from benchmarks import peer_rasterizer
from benchmarks.report import Table
from benchmarks.scenes import SCENES, trained_like
from benchmarks.timing import ratio, time_in_turn
from gslrm.model.gaussians import Gaussians
from gslrm.model.gaussians_renderer import render
from multiview.cameras import Cameras
from multiview.rig import load_rig

# Milliseconds (forward, forward + backward) of the prototype kernels and of its own tiled PyTorch rasterizer, which the
# project set out from: two cores, quiet machine.
REFERENCE_MS = {
    ("trained-like", 20_000, 128): ((5, 10), (54, 112)),
    ("trained-like", 100_000, 128): ((15, 35), (208, 372)),
    ("trained-like", 100_000, 256): ((18, 45), (229, 511)),
    ("trained-like", 400_000, 512): ((125, 228), (1196, 3524)),
    ("untrained", 20_000, 128): ((19, 46), None),
    ("untrained", 100_000, 128): ((48, 110), None),
    ("untrained", 100_000, 256): ((108, 267), None),
    ("untrained", 400_000, 512): ((772, 1776), None),
}


def measure_rasterizer(scenes: list[tuple[str, int, int]], device: torch.device, repeats: int) -> Table:
    """scenes: (kind, number of Gaussians, picture size in pixels); one view each."""
    records = []
    for kind, count, size in scenes:
        gaussians = SCENES[kind](count, device)
        camera = Cameras.turntable(6, size)[:1].to(device)
        with torch.no_grad():
            own, peer = time_in_turn(_forwards(gaussians, camera), device, repeats)
        own_both, peer_both = time_in_turn(_backwards(gaussians, camera), device, repeats)
        known = REFERENCE_MS.get((kind, count, size)) if device.type == "cpu" else None
        kernels, tiled = known or (None, None)
        records.append({
            "scene": f"{kind}, {count // 1000}k at {size} px" if count >= 1000 else f"{kind}, {count} at {size} px",
            "forward, ms": own, "forward + backward, ms": own_both,
            "plain PyTorch: forward, ms": peer, "forward + backward, ms (plain)": peer_both,
            "times faster, forward": ratio(peer, own), "times faster, both": ratio(peer_both, own_both),
            "reference kernels, ms": _slashed(kernels), "reference plain PyTorch, ms": _slashed(tiled),
            "both, times the reference kernels'": 1e3 * own_both.median / kernels[1] if kernels else None,
        })  # fmt: skip
    note = "The reference columns are fixed figures of another run (forward / both, two cores, quiet machine)."
    return Table("Rasterizer, one view", records, [note])


def _slashed(pair: tuple[int, int] | None) -> str | None:
    return None if pair is None else f"{pair[0]} / {pair[1]}"


def _forwards(gaussians: Gaussians, camera: Cameras) -> list:
    return [lambda: render(gaussians, camera[None]), lambda: peer_rasterizer.rasterize(gaussians, camera)]


def _backwards(gaussians: Gaussians, camera: Cameras) -> list:
    leaves = gaussians.map(lambda tensor: tensor.clone().requires_grad_())

    def own() -> None:
        output = render(leaves, camera[None])
        torch.autograd.grad(output.rgb.sum() + output.alpha.sum(), list(vars(leaves).values()))

    def peer() -> None:
        rgb, alpha, _ = peer_rasterizer.rasterize(leaves, camera)
        torch.autograd.grad(rgb.sum() + alpha.sum(), list(vars(leaves).values()))

    return [own, peer]


def measure_rendering(views: int, size: int, count: int, device: torch.device, repeats: int) -> Table:
    """Six (or so) views of one reconstruction: as many Gaussians as the preset's network predicts."""
    gaussians = trained_like(count, device)
    cameras = load_rig("mouse6").cameras(size)[:views][None].to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with torch.no_grad():
        together, one = time_in_turn(
            [lambda: render(gaussians, cameras), lambda: render(gaussians, cameras[:, :1])], device, repeats
        )
    memory = (torch.cuda.max_memory_allocated(device) - before) / 2**30 if device.type == "cuda" else None
    record = {
        "what": f"{count:,} trained-like Gaussians", "views": views, "size, px": size,
        "all views in one call, ms": together, "one view, ms": one, "peak memory, GiB": memory,
    }  # fmt: skip
    return Table("Rendering", [record], ["Forward only. Peak memory on a GPU only, beyond the Gaussians themselves."])
