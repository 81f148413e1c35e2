"""The gsplat backend: what can be held without a GPU, and its agreement with the CPU backend on one."""

import functools
import sys

import pytest
import torch

from gslrm.model.gaussians_renderer import render
from multiview.cameras import Cameras
from tests.gaussian_scenes import trained_like
from tests.test_rasterizer import NAMES, cameras_for, scene


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a CUDA device")
def test_gsplat_without_a_gpu_is_refused_and_never_imported():
    """Importing gsplat's kernels where nvcc exists starts a compilation that takes minutes and fails."""
    before = {name for name in sys.modules if name.split(".")[0] == "gsplat"}
    with pytest.raises(ValueError, match="needs a CUDA device"):
        render(scene(n=5), cameras_for(v=1), backend="gsplat")
    assert {name for name in sys.modules if name.split(".")[0] == "gsplat"} == before


def test_both_backends_use_the_same_numbers():
    from gslrm.model.rasterizers import gsplat_backend, projection

    settings = gsplat_backend.SETTINGS
    assert settings["near_plane"] == projection.NEAR_PLANE and settings["far_plane"] == projection.FAR_PLANE
    assert settings["eps2d"] == projection.EPS_2D and settings["tile_size"] == projection.TILE_PX
    assert settings["rasterize_mode"] == "classic" and settings["render_mode"] == "RGB+D"
    assert settings["packed"] is False  # gsplat 1.5.3 mixes up the scenes of a batch when packed


def of_degree(degree):
    return scene(b=2, n=20_000, degree=degree, log_scale=-4.0), cameras_for(2, 3, 96, 112)


SCENES = {
    **{f"degree {degree}": functools.partial(of_degree, degree) for degree in range(4)},
    "inside": lambda: (scene(n=20_000, degree=1, log_scale=-4.0), cameras_for(1, 3, distance=0.5, hfov_deg=70)),
    "trained-like, 256 px": lambda: (trained_like(100_000), Cameras.turntable(3, 256, elevation_deg=20)[None]),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", SCENES)
def test_gsplat_agrees_with_the_cpu(name, recompute):
    """float32 against float32: a few pixels differ where an alpha meets its threshold or two depths tie."""
    gaussians, cameras = SCENES[name]()
    background = torch.rand(*cameras.shape, 3, generator=torch.Generator().manual_seed(5))
    results = []
    for device in ("cpu", "cuda"):
        leaves = gaussians.map(lambda t: t.to(device, copy=True).requires_grad_())  # noqa: B023
        ground = background.to(device, copy=True).requires_grad_()
        output = render(leaves, cameras.to(device), ground, recompute=recompute)
        (output.rgb.square().sum() + output.depth.sum() + output.alpha.square().sum()).backward()
        gradients = [getattr(leaves, tensor).grad.cpu() for tensor in NAMES] + [ground.grad.cpu()]
        results.append(([t.detach().cpu() for t in output], gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    for a, e in zip(ours, theirs):
        error = (a - e).abs()
        assert a.shape == e.shape
        assert error.mean() < 1e-5 and error.max() < 0.02 and (error < 1e-4).float().mean() > 0.999
    for tensor, a, e in zip((*NAMES, "background"), our_gradients, their_gradients):
        assert (a - e).norm() / e.norm() < 1e-3, tensor
