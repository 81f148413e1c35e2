"""The gsplat backend on a CPU: gsplat 1.5.3's own Python around plain PyTorch in place of its CUDA kernels.

gsplat ships PyTorch versions of its projection, tiling and spherical harmonics; compositing (its version of which needs
CUDA as well) is written out here. What this cannot show is that the CUDA kernels themselves agree: test_gsplat_backend.
"""

import pytest
import torch

from gslrm.model.gaussians import Gaussians, sh_basis
from gslrm.model.gaussians_renderer import render
from gslrm.model.rasterizers.gsplat_backend import call
from tests.test_rasterizer import NAMES, cameras_for, scene

pytest.importorskip("gsplat")


def project(means, covars, quats, scales, viewmats, Ks, width, height, *, packed, opacities, **options):
    """gsplat.cuda._wrapper.fully_fused_projection."""
    from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci

    assert covars is None and packed is False and options.pop("radius_clip") == 0 and not options.pop("sparse_grad")
    covars = _quat_scale_to_covar_preci(quats, scales, compute_preci=False)[0]
    return _fully_fused_projection(means, covars, viewmats, Ks, width, height, **options)


def tiles(means2d, radii, depths, tile_size, tile_width, tile_height, **options):
    """gsplat.cuda._wrapper.isect_tiles."""
    from gsplat.cuda._torch_impl import _isect_tiles

    arguments = (t.detach() for t in (means2d, radii, depths))
    return _isect_tiles(*arguments, tile_size, tile_width, tile_height)


def composite(
    means2d, conics, colors, opacities, width, height, tile_size, offsets, flatten_ids, *, backgrounds, packed, absgrad
):
    """gsplat.cuda._wrapper.rasterize_to_pixels: [b, v, n, ...] -> pictures [b, v, h, w, c], alpha [b, v, h, w, 1]."""
    assert not packed and not absgrad
    means2d, conics, colors = (t.flatten(0, 2) for t in (means2d, conics, colors))
    shape, opacities = offsets.shape[:2], opacities.flatten()
    starts = torch.cat([offsets.flatten(), torch.tensor([len(flatten_ids)])]).tolist()
    rows, columns = torch.meshgrid(torch.arange(tile_size), torch.arange(tile_size), indexing="ij")
    pictures, alphas = [], []
    for number, (first, last) in enumerate(zip(starts, starts[1:])):
        image, tile = divmod(number, offsets[0, 0].numel())
        corner = torch.tensor(divmod(tile, offsets.shape[-1])[::-1]) * tile_size
        pixels = torch.stack([columns, rows], dim=-1).view(-1, 2) + corner + 0.5
        ids = flatten_ids[first:last].long()
        dx, dy = (means2d[ids, None] - pixels).unbind(-1)  # [splats, pixels]
        a, b, c = conics[ids, :, None].unbind(1)
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = (opacities[ids, None] * torch.exp(-sigma)).clamp(max=0.999)
        alpha = torch.where((sigma >= 0) & (alpha >= 1 / 255), alpha, 0.0)
        alpha = torch.where(torch.cumprod(1 - alpha, dim=0) > 1e-4, alpha, 0.0)
        after = torch.cat([torch.ones(1, len(pixels)), torch.cumprod(1 - alpha, dim=0)])
        picture = (alpha * after[:-1]).T @ colors[ids] + after[-1][:, None] * backgrounds.flatten(0, 1)[image]
        pictures.append(picture), alphas.append(1 - after[-1][:, None])

    def assemble(parts):
        whole = torch.stack(parts).view(*shape, *offsets.shape[2:], tile_size, tile_size, -1)
        return whole.transpose(3, 4).flatten(2, 3).flatten(3, 4)[:, :, :height, :width]

    return assemble(pictures), assemble(alphas)


@pytest.fixture
def rasterization(monkeypatch):
    """gsplat's entry point with its kernels replaced, refusing arguments it does not know."""
    from gsplat import rendering
    from gsplat.cuda._torch_impl import _isect_offset_encode

    monkeypatch.setattr(rendering, "fully_fused_projection", project)
    monkeypatch.setattr(rendering, "isect_tiles", tiles)
    monkeypatch.setattr(rendering, "isect_offset_encode", _isect_offset_encode)
    monkeypatch.setattr(rendering, "rasterize_to_pixels", composite)
    return rendering.rasterization


def pictures_and_gradients(draw, gaussians, background):
    leaves = [getattr(gaussians, name).clone().requires_grad_() for name in NAMES]
    leaves.append(background.clone().requires_grad_())
    outputs = draw(Gaussians(*leaves[:-1]), leaves[-1])
    weights = torch.rand((*outputs[0].shape[:2], 5, *outputs[0].shape[3:]), generator=torch.Generator().manual_seed(1))
    return outputs, torch.autograd.grad((torch.cat(list(outputs), dim=2) * weights).sum(), leaves)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("place", ["outside", "inside"])
def test_gsplat_given_our_arguments_draws_what_the_cpu_backend_draws(rasterization, degree, place):
    """Two scenes, two views, a background per view, an off-centre principal point; inside: Gaussians behind cameras."""
    # A seed with no alpha within float32 of a threshold: such a pixel would differ by up to 1/255.
    gaussians = scene(b=2, n=60, degree=degree, seed=degree + 10, log_scale=-3.0 if place == "outside" else -3.5)
    cameras = cameras_for(b=2, v=2, **({} if place == "outside" else {"distance": 0.5, "hfov_deg": 70}))
    background = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(5))
    theirs, their_gradients = pictures_and_gradients(
        lambda g, bg: call(rasterization, g, cameras, bg), gaussians, background
    )
    ours, our_gradients = pictures_and_gradients(lambda g, bg: render(g, cameras, bg), gaussians, background)
    for a, e in zip(ours, theirs):
        assert a.shape == e.shape and (a - e).abs().max() < 2e-5 * max(1.0, e.abs().max())
    for name, a, e in zip((*NAMES, "background"), our_gradients, their_gradients):
        assert (a - e).norm() < 2e-5 * e.norm(), name


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_spherical_harmonics_are_gsplats(degree):
    from gsplat.cuda._torch_impl import _spherical_harmonics

    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(500, 3, generator=g), dim=-1)
    coefficients = torch.randn(500, (degree + 1) ** 2, 3, generator=g)
    ours = torch.einsum("nk,nkc->nc", sh_basis(directions, degree), coefficients)
    torch.testing.assert_close(ours, _spherical_harmonics(degree, directions, coefficients), atol=2e-6, rtol=1e-5)
