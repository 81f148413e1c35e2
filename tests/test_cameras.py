"""Geometric identities of the camera type; calibration noise of the stated size; damaged camera files."""

import json
import math

import pytest
import torch

from multiview.cameras import Cameras, perturb, read_cameras
from multiview.rig import load_rig

RIG = load_rig("mouse6").cameras(128)


def close(a, b):
    """Whether tensors agree to float32's rounding, relative to their size: other vector units round otherwise."""
    b = torch.as_tensor(b)
    return a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_azimuths_turn_clockwise_and_world_up_is_up_in_the_picture():
    cameras = Cameras.orbit(torch.tensor([0.0, 90.0]), torch.zeros(2), 2.7, 1.0, 8)
    assert close(cameras.origins, [[0.0, -2.7, 0.0], [-2.7, 0.0, 0.0]]) and close(cameras.azimuth_deg, [0.0, 90.0])
    turntable = Cameras.turntable(4, 64)
    assert close(turntable.azimuth_deg, [0.0, 270.0, 180.0, 90.0])
    assert turntable.fxfycxcy[0, 0].item() == pytest.approx(32 / math.tan(math.radians(25)), rel=1e-6)
    uv, depth = RIG.project(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.2]]).expand(6, 2, 3))
    assert close(uv[:, 0], torch.full((6, 2), 64.0)) and (uv[:, 1, 1] < 64 - 9).all() and (depth > 0).all()


def test_rays_project_back_onto_their_pixel_centres():
    cameras = Cameras.orbit(torch.tensor([33.0]), torch.tensor([20.0]), 2.7, 1.07, 8).crop(1, 2, 5, 4)
    origins, directions = cameras.rays()
    uv, depth = cameras.project((origins + 1.7 * directions).reshape(1, -1, 3))
    v, u = torch.meshgrid(torch.arange(4) + 0.5, torch.arange(5) + 0.5, indexing="ij")
    assert close(uv.reshape(4, 5, 2), torch.stack([u, v], -1)) and (depth > 0).all()


def test_projections_move_with_the_pixels_and_the_world():
    xyz, centre = torch.tensor([[0.3, -0.2, 0.1]]).expand(6, 1, 3), torch.tensor([0.05, 0.1, -0.2])
    uv, _ = RIG.project(xyz)
    assert close(RIG.resize(64, 64).project(xyz)[0], uv / 2)
    assert close(RIG.crop(10, 20, 50, 60).project(xyz)[0], uv - torch.tensor([10.0, 20.0]))
    assert close(RIG.recentre(centre, 3.0).project((xyz - centre) * 3.0)[0], uv)
    four = load_rig("uniform4").cameras(64)
    assert close(four.rotate(30.0).azimuth_deg, (four.azimuth_deg + 30) % 360)
    assert close(four.rotate(90.0).c2w[0], four.c2w[1])


def test_frames_survive_a_round_trip(tmp_path):
    cameras = load_rig("facelift6").cameras(512)
    (tmp_path / "a.json").write_text(json.dumps({"id": "x", "frames": cameras.to_frames()}))
    again = read_cameras(tmp_path / "a.json")
    assert close(again.c2w, cameras.c2w) and (again.height, again.width) == (512, 512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("fx"), "frame 0 lacks fx"),
        (lambda f: f.update(fx=None), "fx must be a finite number, got None"),
        (lambda f: f.update(fx="549"), "fx must be a finite number, got '549'"),
        (lambda f: f.update(fx=True), "fx must be a finite number, got True"),
        (lambda f: f.update(fx=-1.0), "positive"), (lambda f: f.update(fx=10**400), "fx must be a finite number"),
        (lambda f: f.update(w=512.5), "w must be a whole number"),
        (lambda f: f.update(h=0), "h must be a whole number, at least 1"),
        (lambda f: f.update(w=10**9), "w must be a whole number, at least 1, at most 32768"),
        (lambda f: f.update(w=256), "one image size"), (lambda f: f.update(k1=0.1, p2=0.0), "lens terms k1; undistort"),
        (lambda f: f.update(distortion=[0, 0.1]), "lens terms distortion"),
        (lambda f: f.update(w2c=None), "w2c must be 4x4 numbers, got None"),
        (lambda f: f.update(w2c=f["w2c"][:3]), "w2c must be 4x4 numbers"),
        (lambda f: f.update(w2c=[[2 * x for x in row] for row in f["w2c"]]), "orthonormal"),
        (lambda f: f.update(w2c=[[-x for x in f["w2c"][0]], *f["w2c"][1:]]), "mirrors"),
        (lambda f: f.update(w2c=[list(column) for column in zip(*f["w2c"])]), "last row"),
        (lambda f: f.update(w2c=[[float("nan")] * 4] * 4), "finite"),
    ],
)  # fmt: skip
def test_bad_cameras_are_refused_by_name(tmp_path, change, message):
    frames = load_rig("facelift6").cameras(512).to_frames()
    change(frames[0])
    (tmp_path / "bad.json").write_text(json.dumps({"frames": frames}))
    with pytest.raises(ValueError, match=f"bad.json.*{message}"):
        read_cameras(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("c2w", "message"), [(torch.eye(3), "c2w must have shape"), (torch.eye(4)[None], r"fxfycxcy \[..., 4\]")]
)
def test_shapes_are_checked_at_construction(c2w, message):
    with pytest.raises(ValueError, match=message):
        Cameras(c2w, torch.ones(4), 8, 8)


# ---- calibration noise ----------------------------------------------------------------------------------------------


def noisy(cameras: Cameras, seed: int = 0, **sizes: float) -> Cameras:
    sizes = {"rotation_deg": 0.0, "translation": 0.0, "pixels": 0.0, **sizes}
    return perturb(cameras, generator=torch.Generator().manual_seed(seed), **sizes)


def turned_deg(a: Cameras, b: Cameras) -> torch.Tensor:
    relative = a.c2w[..., :3, :3].double().mT @ b.c2w[..., :3, :3].double()
    return torch.rad2deg(torch.acos(((relative.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1)))


def test_each_size_has_its_standard_deviation_and_moves_nothing_else():
    cameras = RIG[torch.arange(4000) % 6]
    same, rotated = noisy(cameras), noisy(cameras, rotation_deg=2.0).validate()
    moved, off = noisy(cameras, translation=0.05), noisy(cameras, pixels=3.0)
    for other in (same, moved, off):
        assert torch.equal(other.c2w[:, :3, :3], cameras.c2w[:, :3, :3])
    for other in (same, rotated, off):
        assert torch.equal(other.origins, cameras.origins)
    for other in (same, rotated, moved):
        assert torch.equal(other.fxfycxcy, cameras.fxfycxcy)
    assert turned_deg(cameras, rotated).square().mean().sqrt().item() == pytest.approx(2.0, rel=0.05)
    relative = cameras.c2w[:, :3, :3].mT @ rotated.c2w[:, :3, :3]
    axes = torch.stack([relative[:, i, j] - relative[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], dim=-1)
    assert axes.std(0).max() < 1.2 * axes.std(0).min()  # about every axis
    shift, offset = moved.origins - cameras.origins, off.fxfycxcy - cameras.fxfycxcy
    assert torch.allclose(shift.std(0), torch.full((3,), 0.05), rtol=0.06) and shift.mean(0).abs().max() < 0.004
    assert torch.allclose(offset[:, 2:].std(0), torch.full((2,), 3.0), rtol=0.06) and (offset[:, :2] == 0).all()


def test_the_draws_belong_to_the_generator_and_scale_with_the_size():
    sizes = {"rotation_deg": 1.0, "translation": 0.02, "pixels": 1.0}
    one, again, other = (noisy(RIG, seed, **sizes) for seed in (3, 3, 4))
    assert torch.equal(one.c2w, again.c2w) and torch.equal(one.fxfycxcy, again.fxfycxcy)
    assert not torch.equal(one.c2w, other.c2w)
    twice = noisy(RIG, 3, **{name: 2 * size for name, size in sizes.items()})
    assert torch.allclose(twice.origins - RIG.origins, 2 * (one.origins - RIG.origins), atol=1e-6)
    assert torch.allclose(turned_deg(RIG, twice), 2 * turned_deg(RIG, one), rtol=0.02)
    assert len({round(x, 4) for x in turned_deg(RIG, one).tolist()}) == 6  # every camera its own


@pytest.mark.parametrize(("name", "value"), [("rotation_deg", -1.0), ("pixels", float("nan"))])
def test_a_size_that_is_no_standard_deviation_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}.*must be 0 or more"):
        noisy(RIG, **{name: value})
