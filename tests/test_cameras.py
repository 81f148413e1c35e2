"""Geometric identities of the camera type."""

import json
import math

import pytest
import torch

from multiview.cameras import Cameras, read_cameras
from multiview.rig import load_rig


def close(a, b):
    """Whether tensors agree to float32's rounding, relative to their size: other vector units round otherwise."""
    return a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_camera_at_azimuth_zero_stands_at_minus_y_and_ninety_at_minus_x():
    cameras = Cameras.orbit(torch.tensor([0.0, 90.0]), torch.zeros(2), 2.7, 1.0, 8)
    assert close(cameras.origins, torch.tensor([[0.0, -2.7, 0.0], [-2.7, 0.0, 0.0]]))
    assert close(cameras.azimuth_deg, torch.tensor([0.0, 90.0]))


def test_world_up_is_up_in_the_picture():
    xyz = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.2]]).expand(6, 2, 3)
    uv, depth = load_rig("mouse6").cameras(128).project(xyz)
    assert close(uv[:, 0], torch.full((6, 2), 64.0))
    assert (uv[:, 1, 1] < 64 - 9).all() and (depth > 0).all()


def test_rays_project_back_onto_their_pixel_centres():
    cameras = Cameras.orbit(torch.tensor([33.0]), torch.tensor([20.0]), 2.7, 1.07, 8).crop(1, 2, 5, 4)
    origins, directions = cameras.rays()
    uv, depth = cameras.project((origins + 1.7 * directions).reshape(1, -1, 3))
    v, u = torch.meshgrid(torch.arange(4) + 0.5, torch.arange(5) + 0.5, indexing="ij")
    assert close(uv.reshape(4, 5, 2), torch.stack([u, v], -1))
    assert (depth > 0).all()


def test_resize_and_crop_move_projections_with_the_pixels():
    cameras = load_rig("mouse6").cameras(128)
    xyz = torch.tensor([[0.1, 0.2, 0.3]]).expand(6, 1, 3)
    uv, _ = cameras.project(xyz)
    assert close(cameras.resize(64, 64).project(xyz)[0], uv / 2)
    assert close(cameras.crop(10, 20, 50, 60).project(xyz)[0], uv - torch.tensor([10.0, 20.0]))


def test_rotate_adds_to_every_azimuth():
    cameras = load_rig("uniform4").cameras(64)
    assert close(cameras.rotate(30.0).azimuth_deg, (cameras.azimuth_deg + 30) % 360)
    assert close(cameras.rotate(90.0).c2w[0], cameras.c2w[1])


def test_recentre_keeps_pictures_unchanged():
    cameras = load_rig("mouse6").cameras(64)
    xyz, centre = torch.tensor([[0.3, -0.2, 0.1]]).expand(6, 1, 3), torch.tensor([0.05, 0.1, -0.2])
    moved = cameras.recentre(centre, 3.0)
    assert close(moved.project((xyz - centre) * 3.0)[0], cameras.project(xyz)[0])


def test_turntable_starts_at_minus_y_and_turns_counter_clockwise():
    cameras = Cameras.turntable(4, 64)
    assert close(cameras.azimuth_deg, torch.tensor([0.0, 270.0, 180.0, 90.0]))
    assert cameras.fxfycxcy[0, 0].item() == pytest.approx(32 / math.tan(math.radians(25)), rel=1e-6)


def test_frames_survive_a_round_trip(tmp_path):
    cameras = load_rig("facelift6").cameras(512)
    path = tmp_path / "opencv_cameras.json"
    path.write_text(json.dumps({"id": "x", "frames": cameras.to_frames()}))
    again = read_cameras(path)
    assert close(again.c2w, cameras.c2w) and (again.height, again.width) == (512, 512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("fx"), "frame 0 lacks fx"),
        (lambda f: f.update(fx=None), "fx must be a finite number, got None"),
        (lambda f: f.update(fx="549"), "fx must be a finite number, got '549'"),
        (lambda f: f.update(fx=True), "fx must be a finite number, got True"),
        (lambda f: f.update(fx=-1.0), "positive"),
        (lambda f: f.update(fx=10**400), "fx must be a finite number"),
        (lambda f: f.update(w=512.5), "w must be a whole number"),
        (lambda f: f.update(h=0), "h must be a whole number, at least 1"),
        (lambda f: f.update(w=10**9), "w must be a whole number, at least 1, at most 32768"),
        (lambda f: f.update(w=256), "one image size"),
        (lambda f: f.update(k1=0.1, p2=0.0), "lens terms k1; undistort"),
        (lambda f: f.update(w2c=None), "w2c must be 4x4 numbers, got None"),
        (lambda f: f.update(w2c=f["w2c"][:3]), "w2c must be 4x4 numbers"),
        (lambda f: f.update(w2c=[[2 * x for x in row] for row in f["w2c"]]), "orthonormal"),
        (lambda f: f.update(w2c=[[-x for x in f["w2c"][0]], *f["w2c"][1:]]), "mirrors"),
        (lambda f: f.update(w2c=[list(column) for column in zip(*f["w2c"])]), "last row"),
        (lambda f: f.update(w2c=[[float("nan")] * 4] * 4), "finite"),
    ],
)
def test_bad_cameras_are_refused_by_name(tmp_path, change, message):
    frames = load_rig("facelift6").cameras(512).to_frames()
    change(frames[0])
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"frames": frames}))
    with pytest.raises(ValueError, match=message) as error:
        read_cameras(path)
    assert "bad.json" in str(error.value)


def test_shapes_are_checked_at_construction():
    with pytest.raises(ValueError, match="c2w must have shape"):
        Cameras(torch.eye(3), torch.ones(4), 8, 8)
    with pytest.raises(ValueError, match=r"fxfycxcy \[..., 4\]"):
        Cameras(torch.eye(4)[None], torch.ones(4), 8, 8)
