"""The visual hull and the view-consistency score, on solids with known silhouettes and on the example mice."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_tiny import must

from multiview.cameras import Cameras
from multiview.hull import carve, carve_leave_one_out, colour_surface, render_hull, silhouettes, surface, viewed_cube
from multiview.image import composite
from multiview.metrics import foreground_psnr, mask_iou, view_consistency
from multiview.rig import load_rig
from multiview.sample import read_sample, read_split
from scripts import measure_consistency

ROOT = Path(__file__).resolve().parent.parent
SIZE = 96


@pytest.fixture(scope="module")
def mice():
    """Example mice, rendered by the project's generator."""
    folders = read_split(ROOT / "data_mouse" / "data_mouse_train.txt")[:8]
    return [read_sample(folder, image_size=SIZE, num_views=6) for folder in folders]


def ball_views(cameras: Cameras, centre: torch.Tensor, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A ball, red above its centre's height and blue below: exact rgb [v, 3, h, w] on white and masks [v, 1, h, w]."""
    origins, directions = cameras.rays()
    offset = origins - centre
    b = (offset * directions).sum(-1)
    root = b.square() - offset.square().sum(-1) + radius**2
    hit = root > 0
    point = origins + directions * (-b - root.clamp_min(0).sqrt())[..., None]
    red = torch.tensor([0.8, 0.1, 0.1])
    colour = torch.where((point[..., 2] > centre[2])[..., None], red, red.flip(0))
    rgb = torch.where(hit[..., None], colour, torch.ones(3))
    return rgb.permute(0, 3, 1, 2), hit[:, None].float()


def read(sample) -> tuple[torch.Tensor, torch.Tensor, Cameras]:
    return composite(sample.rgba, 1.0), sample.rgba[:, 3:], sample.cameras


def test_hull_of_a_ball_has_its_place_size_and_colours():
    cameras, centre, radius = load_rig("uniform8").cameras(SIZE), torch.tensor([0.1, -0.2, 0.05]), 0.4
    rgb, masks = ball_views(cameras, centre, radius)
    hull = carve(masks, cameras, resolution=96)
    assert (hull.centre - centre).norm() < 0.03
    ball = 4 / 3 * math.pi * radius**3
    assert 0.97 * ball < hull.volume < 1.25 * ball  # a hull contains its solid; one ring of cameras leaves caps
    inside = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    gaps = torch.cdist(centre + 0.97 * radius * inside, hull.points).amin(1)
    assert gaps.max() < hull.voxel
    shell = surface(hull)
    outward = torch.nn.functional.normalize(shell.points - centre, dim=-1)
    assert (shell.normals * outward).sum(-1).mean() > 0.9
    coloured = colour_surface(shell, rgb, masks, cameras)
    high, low = (coloured.points[:, 2] > centre[2] + 0.1), (coloured.points[:, 2] < centre[2] - 0.2)
    assert coloured.colours[high].mean(0)[0] > 0.7 and coloured.colours[low].mean(0)[2] > 0.6


def test_hull_seen_from_elsewhere_has_no_holes_and_the_right_depth():
    centre, radius = torch.zeros(3), 0.45
    cameras = load_rig("uniform8").cameras(SIZE)
    rgb, masks = ball_views(cameras, centre, radius)
    shell = colour_surface(surface(carve(masks, cameras)), rgb, masks, cameras)
    elsewhere = Cameras.orbit(torch.tensor([20.0, 100.0]), torch.tensor([15.0, 0.0]), 2.7, 1.072, 256)
    truth, true_masks = ball_views(elsewhere, centre, radius)
    rgb, mask, depth = render_hull(shell, elsewhere)
    assert ((mask > 0.5) | (true_masks < 0.5)).float().mean() > 0.999  # nothing of the ball is missing
    assert (mask_iou(mask, true_masks) > 0.9).all()
    assert (foreground_psnr(rgb, truth, true_masks) > 14).all()
    assert (rgb[(mask < 0.5).expand_as(rgb)] == 1).all()
    assert abs(float(depth[0, 0, 128, 128]) - (2.7 - radius)) < 0.04
    assert (depth[mask < 0.5] == 0).all()


def test_hull_holds_the_keypoints_and_fills_its_own_masks(mice):
    for sample in mice[:3]:
        rgb, masks, cameras = read(sample)
        hull = carve(masks, cameras)
        shown = silhouettes(surface(hull), cameras)
        assert (mask_iou(shown.float(), masks) > 0.8).all()
        keypoints = torch.tensor(sample.extra["keypoints"])
        assert (torch.cdist(keypoints, hull.points).amin(1) < 0.08).float().mean() > 0.9
        assert hull.centre.norm() < 0.25


def test_leaving_a_view_out_is_carving_without_it(mice):
    _, masks, cameras = read(mice[0])
    bounds = viewed_cube(cameras)
    whole, others = carve_leave_one_out(masks, cameras, resolution=48, bounds=bounds)
    keep = [k for k in range(6) if k != 2]
    alone = carve(masks[keep], cameras[keep], resolution=48, bounds=bounds)
    nearest = torch.cdist(others[2].points, alone.points).amin(1)
    assert abs(others[2].volume / alone.volume - 1) < 0.1 and nearest.max() < 2 * alone.voxel
    assert set(whole.index.tolist()) <= set(others[2].index.tolist()) and len(others[2].index) > len(whole.index)


def test_what_cannot_be_carved_is_refused_or_scores_zero(mice):
    rgb, masks, cameras = read(mice[0])
    for call, message in (
        (lambda: carve(masks[:5], cameras), r"masks must be \[6, 1, 96, 96\].*\[5, 1, 96, 96\]"),
        (lambda: carve_leave_one_out(masks[:2], cameras[:2]), "at least 3 views, got 2"),
        (lambda: carve(masks * 0, cameras).centre, "the visual hull is empty"),
        (lambda: viewed_cube(cameras[[0, 0, 0]]), "parallel"),
        (lambda: view_consistency(rgb[:4], masks, cameras), r"rgb must be \[6, 3, 96, 96\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    found = view_consistency(rgb, masks * 0, cameras)
    assert found["score"] == found["mask"] == found["mask_iou"] == found["colour"] == 0


def test_a_perfect_ball_is_consistent_and_each_term_sees_its_own_damage():
    cameras = load_rig("mouse6").cameras(SIZE)
    rgb, masks = ball_views(cameras, torch.tensor([0.1, 0.0, 0.0]), 0.4)
    truth = view_consistency(rgb, masks, cameras)
    assert truth["mask"] > 0.99 and truth["colour"] > 0.95
    assert truth["score"] == pytest.approx(truth["mask"] * truth["colour"])
    assert truth["mask"] == pytest.approx(np.mean(truth["mask_per_view"]), abs=1e-6)
    recoloured = rgb.clone()
    recoloured[1] = torch.where(masks[1] > 0.5, 1 - rgb[1], rgb[1])
    changed = view_consistency(recoloured, masks, cameras)
    assert changed["mask"] == truth["mask"] and changed["colour"] < truth["colour"] - 0.1
    assert np.argmin(changed["colour_per_view"]) == 1
    moved_masks, moved_rgb = masks.clone(), rgb.clone()
    moved_masks[4], moved_rgb[4] = masks[4].roll(9, -1), rgb[4].roll(9, -1)
    moved = view_consistency(moved_rgb, moved_masks, cameras)
    assert moved["mask"] < 0.95 and moved["mask_iou"] < truth["mask_iou"] and np.argmin(moved["mask_per_view"]) == 4


def test_score_does_not_depend_on_size_or_on_where_the_animal_faces(mice):
    small, large = mice[0], read_sample(mice[0].folder, image_size=192, num_views=6)
    a, b = (view_consistency(*read(sample))["score"] for sample in (small, large))
    assert a == pytest.approx(b, abs=0.02)
    # A cyclic rig: the whole set moved on by one view is the animal turned, no less consistent.
    rgb, masks, cameras = read(small)
    turned = view_consistency(rgb.roll(1, 0), masks.roll(1, 0), cameras)["score"]
    assert turned == pytest.approx(a, abs=0.01)


def test_score_falls_when_views_stop_being_one_animal(mice):
    drops = {
        "shuffled": 0.1, "two views swapped": 0.1, "all mirrored": 0.1, "turned +-10 deg": 0.05,
        "of different mice": 0.1, "shifted 4/128": 0.05, "two recoloured": 0.003,
    }  # fmt: skip
    for name in measure_consistency.DAMAGES:
        (rgba, cameras), (again, _) = (measure_consistency.damage(name, mice, 1) for _ in range(2))
        assert torch.equal(rgba, again)
        assert not torch.equal(rgba, mice[1].rgba) or not torch.equal(cameras.c2w, mice[1].cameras.c2w), name
    for number, true in enumerate(view_consistency(*read(sample))["score"] for sample in mice[:3]):
        assert true > 0.93
        for name, drop in drops.items():
            rgba, cameras = measure_consistency.damage(name, mice, number)
            assert view_consistency(composite(rgba, 1.0), rgba[:, 3:], cameras)["score"] < true - drop, name


def test_measured_damages_are_told_from_true_views(monkeypatch):
    monkeypatch.setattr(measure_consistency, "DAMAGES", ("all mirrored",))
    told = must("scripts/measure_consistency.py", "--num_samples", 2, "--device", "cpu")
    rows = {line.split(" | ")[0].strip("| "): line for line in told.splitlines()}
    assert "(0.50)" in rows["true views"] and rows["all mirrored"].count("(1.00)") >= 3
