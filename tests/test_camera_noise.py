"""Calibration noise: of the stated size, rigid, repeatable."""

import pytest
import torch

from multiview.cameras import Cameras, perturb
from multiview.rig import load_rig


def many(n: int = 4000) -> Cameras:
    cameras = load_rig("mouse6").cameras(64)
    return cameras[torch.arange(n) % len(cameras)]


def noisy(cameras: Cameras, seed: int = 0, **sizes: float) -> Cameras:
    sizes = {"rotation_deg": 0.0, "translation": 0.0, "pixels": 0.0, **sizes}
    return perturb(cameras, generator=torch.Generator().manual_seed(seed), **sizes)


def turned_deg(a: Cameras, b: Cameras) -> torch.Tensor:
    relative = a.c2w[..., :3, :3].double().mT @ b.c2w[..., :3, :3].double()
    trace = relative.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.acos(((trace - 1) / 2).clamp(-1, 1)))


def test_each_size_has_its_standard_deviation_and_moves_nothing_else():
    cameras = many()
    same = noisy(cameras)
    assert torch.equal(same.c2w, cameras.c2w) and torch.equal(same.fxfycxcy, cameras.fxfycxcy)
    rotated = noisy(cameras, rotation_deg=2.0).validate()
    assert turned_deg(cameras, rotated).square().mean().sqrt().item() == pytest.approx(2.0, rel=0.05)
    assert torch.equal(rotated.origins, cameras.origins) and torch.equal(rotated.fxfycxcy, cameras.fxfycxcy)
    relative = cameras.c2w[:, :3, :3].mT @ rotated.c2w[:, :3, :3]
    axes = torch.stack([relative[:, i, j] - relative[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], dim=-1)
    assert axes.std(0).max() < 1.2 * axes.std(0).min()  # about every axis
    moved = noisy(cameras, translation=0.05)
    shift = moved.origins - cameras.origins
    assert torch.allclose(shift.std(0), torch.full((3,), 0.05), rtol=0.06) and shift.mean(0).abs().max() < 0.004
    assert torch.equal(moved.c2w[:, :3, :3], cameras.c2w[:, :3, :3])
    off = noisy(cameras, pixels=3.0)
    offset = off.fxfycxcy - cameras.fxfycxcy
    assert torch.allclose(offset[:, 2:].std(0), torch.full((2,), 3.0), rtol=0.06)
    assert (offset[:, :2] == 0).all() and torch.equal(off.c2w, cameras.c2w)


def test_the_draws_belong_to_the_generator_and_scale_with_the_size():
    cameras = many(6)
    sizes = {"rotation_deg": 1.0, "translation": 0.02, "pixels": 1.0}
    one, again, other = noisy(cameras, 3, **sizes), noisy(cameras, 3, **sizes), noisy(cameras, 4, **sizes)
    assert torch.equal(one.c2w, again.c2w) and torch.equal(one.fxfycxcy, again.fxfycxcy)
    assert not torch.equal(one.c2w, other.c2w)
    twice = noisy(cameras, 3, rotation_deg=2.0, translation=0.04, pixels=2.0)
    assert torch.allclose(twice.origins - cameras.origins, 2 * (one.origins - cameras.origins), atol=1e-6)
    assert torch.allclose(turned_deg(cameras, twice), 2 * turned_deg(cameras, one), rtol=0.02)
    assert len({round(x, 4) for x in turned_deg(cameras, one).tolist()}) == 6  # every camera its own


@pytest.mark.parametrize(("name", "value"), [("rotation_deg", -1.0), ("pixels", float("nan"))])
def test_a_size_that_is_no_standard_deviation_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}.*must be 0 or more"):
        noisy(many(2), **{name: value})
