"""Rendering view by view with recomputation in the backward pass: the same results from less memory."""

import weakref

import pytest
import torch

from gslrm.model.gaussians_renderer import render
from gslrm.model.rasterizers import cpu
from tests.test_rasterizer import NAMES, cameras_for, scene


def picture_and_gradients(gaussians, background, draw):
    leaves = gaussians.map(lambda t: t.clone().requires_grad_())
    background = background.clone().requires_grad_()
    output = draw(leaves, background)
    (output.rgb.square().sum() + output.depth.sum() + output.alpha.square().sum()).backward()
    return list(output), [*(getattr(leaves, name).grad for name in NAMES), background.grad]


@pytest.mark.parametrize("degree", [0, 2])
def test_recompute_gives_the_bits_of_views_rendered_one_by_one(degree):
    gaussians, cameras = scene(b=2, n=300, degree=degree, log_scale=-2.5), cameras_for(b=2, v=3)
    background = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0))

    def one_by_one(g, bg):
        views = [render(g, cameras[:, v : v + 1], bg[:, v : v + 1]) for v in range(3)]
        return type(views[0])(*[torch.cat(parts, dim=1) for parts in zip(*views)])

    pictures, gradients = picture_and_gradients(
        gaussians, background, lambda g, bg: render(g, cameras, bg, recompute=True)
    )
    for other in (one_by_one, lambda g, bg: render(g, cameras, bg)):
        other_pictures, other_gradients = picture_and_gradients(gaussians, background, other)
        assert all(torch.equal(a, e) for a, e in zip(pictures, other_pictures))
        if other is one_by_one:
            assert all(torch.equal(a, e) for a, e in zip(gradients, other_gradients))
        else:  # one call adds the views up in another order
            for a, e in zip(gradients, other_gradients):
                assert (a - e).norm() < 1e-6 * e.norm()


def test_recompute_works_under_autograd_grad_autocast_and_without_gradients():
    gaussians, cameras = scene(n=100), cameras_for(v=2)
    leaf = gaussians.xyz.clone().requires_grad_()
    moved = type(gaussians)(leaf, *[getattr(gaussians, name) for name in NAMES[1:]])
    expected = torch.autograd.grad(render(moved, cameras).rgb.square().sum(), leaf)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = render(moved, cameras, recompute=True).rgb.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(render(gaussians, cameras, recompute=True).rgb, render(gaussians, cameras).rgb)


@pytest.mark.parametrize("recompute", [False, True])
def test_only_recompute_lets_go_of_what_the_backward_pass_needs(monkeypatch, recompute):
    draw, kept = cpu._draw, []

    def recorded(*arguments):
        arrays = draw(*arguments)
        kept.extend(weakref.ref(array) for array in arrays)
        return arrays

    monkeypatch.setattr(cpu, "_draw", recorded)
    leaves = scene(n=100).map(lambda t: t.requires_grad_())
    output = render(leaves, cameras_for(v=3), recompute=recompute)
    assert len(kept) == 3 * 7
    assert all((reference() is None) == recompute for reference in kept)
    output.rgb.sum().backward()
    assert len(kept) == (2 if recompute else 1) * 3 * 7  # drawn again for the backward pass
    assert all(reference() is None for reference in kept)
