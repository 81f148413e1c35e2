"""Parts of the import: the animal's place over time, framing in random poses, splits, picture files, processes."""

import io
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from counting import counted
from filmed_spheres import full, settings_for, silhouettes, spheres
from PIL import Image

from multiview.rig import load_rig
from recording.analysis import Analysis
from recording.calibration.model import Calibration
from recording.center import find_up, headings_deg, locate, smooth, tail_sides, trunk_hulls
from recording.geometry import make_plan
from recording.importer import plan_dataset
from recording.masks import MaskTrack, Silhouette, clean_mask, read_track, record_track
from recording.rectify import png_bytes, rectify
from recording.workers import run_lanes
from synthetic.dataset import load_real_rig

LENS = np.array([-0.15, 0.2, 0.001, -0.004, 0.0])


@pytest.fixture(scope="module")
def small() -> Calibration:
    return load_real_rig(width=240)[0]


def seen(calibration: Calibration, where, heading_deg: float) -> tuple[list[Silhouette], np.ndarray]:
    """Masks and the true center of a mouse of spheres."""
    centers, radii, middle = spheres(where, heading_deg)
    return [clean_mask(mask) for mask in silhouettes(calibration, centers, radii)], middle


def tracks_of(folder, rows: list[list[Silhouette]]) -> list[MaskTrack]:
    """Masks [t][v], kept and read back."""
    for camera in range(6):
        list(record_track(folder, camera, {}, [row[camera] for row in rows]))
    return [read_track(folder, camera) for camera in range(6)]


def in_arena(rng) -> np.ndarray:
    return np.array([48.3, 54.2, 16.0]) + [*rng.uniform(-45, 45, 2), rng.uniform(0, 15)]


def nose(heading_deg: float) -> np.ndarray:
    return np.array([-math.sin(math.radians(heading_deg)), -math.cos(math.radians(heading_deg)), 0.0])


def turned_by(found: np.ndarray, true: np.ndarray) -> float:
    return np.abs((found - true + 180) % 360 - 180).max()


@pytest.mark.parametrize("distorted", [False, True])
def test_hull_finds_center_axis_and_tail(small, distorted, tmp_path):
    calibration = replace(small, distortion=np.tile(LENS, (6, 1))) if distorted else small
    rng = np.random.default_rng(5)
    headings = rng.uniform(0, 360, 6)
    rows, middles = zip(*(seen(calibration, in_arena(rng), heading) for heading in headings))
    tracks, places = tracks_of(tmp_path, rows), list(range(6))
    rough, residuals, lengths = locate(calibration, tracks, places)
    centers, axes = trunk_hulls(calibration, tracks, places, rough, residuals, lengths.max())
    off = np.linalg.norm(centers - middles, axis=1)
    assert off.max() < 2.0 and off.mean() < np.linalg.norm(rough - middles, axis=1).mean()
    noses = axes * np.sign(tail_sides(calibration, tracks, places, centers, axes, lengths.max()))[:, None]
    assert turned_by(np.degrees(np.arctan2(-noses[:, 0], -noses[:, 1])), headings) < 6.0


def test_hulls_leave_out_masks_of_something_else_and_say_where_there_is_none(small, tmp_path):
    rows, middles = zip(*(seen(small, np.array([48.3, 54.2, 16.0]), heading) for heading in (20.0, 200.0)))
    away = [rows[0][0], replace(rows[0][1], x=0, y=0), *rows[0][2:]]
    whole, outvoted = tracks_of(tmp_path / "a", rows), tracks_of(tmp_path / "b", [away, rows[1]])
    expected, _ = trunk_hulls(small, whole, [0, 1], *locate(small, whole, [0, 1])[:2], 73.0)
    rough, residuals, _ = locate(small, outvoted, [0, 1])
    centers, axes = trunk_hulls(small, outvoted, [0, 1], rough, residuals, 73.0)
    assert axes.any(axis=1).all() and np.linalg.norm(centers - middles, axis=1).max() < 2.0
    np.testing.assert_allclose(centers[1], expected[1], atol=1e-9)
    centers, axes = trunk_hulls(small, outvoted, [0, 1], rough, np.zeros((2, 6)), 73.0)  # it counts, and is elsewhere
    assert axes.any(axis=1).tolist() == [False, True]
    np.testing.assert_array_equal(centers[0], rough[0])


def test_smoothing_averages_noise_but_not_across_a_jump():
    frames = list(range(0, 400, 2))
    true = np.array([[0.05 * f + (500.0 if f >= 200 else 0.0), 0.0, 10.0] for f in frames])
    noisy = true + np.random.default_rng(0).normal(0, 2.0, true.shape)
    off, before = np.abs(smooth(noisy, frames, 24, (200,)) - true), np.abs(noisy - true)
    assert off[10:90].mean() < 0.5 * before[10:90].mean() and off.max() < 6.0
    assert np.abs(smooth(noisy, frames, 24, ()) - true).max() > 100
    np.testing.assert_array_equal(smooth(noisy, frames, 0, ()), noisy)


def test_up_is_found_from_the_floor_and_from_the_cameras(small):
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    move = np.eye(4)
    move[:3, :3] = turn  # takes +z to its last column
    tilted = replace(small, w2c=small.w2c @ move.T)
    centers = np.stack([in_arena(rng) * [1, 1, 0] + [0, 0, 16 + rng.normal()] for _ in range(60)])
    centers[::12, 2] += 40.0  # it rears
    for rule, within in (("rig", 4.0), ("floor", 0.5)):  # the cameras stand not quite evenly
        assert math.degrees(math.acos(find_up(tilted, centers @ turn.T, rule, 73.0) @ turn[:, 2])) < within
    with pytest.raises(ValueError, match="--up floor needs an animal that walks about"):
        find_up(small, centers[:1] + rng.normal(0, 1, (60, 3)), "floor", 73.0)


@pytest.mark.parametrize("rule", ["pca", "motion"])
def test_heading_is_one_way_round_for_a_whole_run(tmp_path, rule):
    rng = np.random.default_rng(2)
    true = np.cumsum(rng.normal(0, 6, 50)) + 100
    noses = np.stack([nose(heading) for heading in true])
    signs = rng.choice([-1.0, 1.0], 50)  # an axis has two ends
    index = np.arange(50)
    steps = np.where(index % 3, 6.0, -1.0)[1:, None] * noses[1:]  # it steps back at times
    centers = np.concatenate([np.zeros((1, 3)), steps]).cumsum(axis=0)
    tails = signs * np.where(index % 4, 0.6, -0.1)  # a curled tail misleads
    settings, axes = settings_for(tmp_path, tmp_path / "out", heading=rule), signs[:, None] * noses
    found = headings_deg(axes, tails, centers, index.tolist(), settings, rate=25.0, body_length=73.0)
    assert turned_by(found, true) < 1e-6


@pytest.mark.parametrize(
    ("framing", "poses", "scale", "size", "body_length"),
    [("fill", "exact", "dataset", 48, 30.0), ("facelift", "nearest", "sample", 64, 20.0),
     ("exact", "exact", "sample", 32, 73.0)],
)  # fmt: skip
def test_no_mask_reaches_the_border_in_random_poses(small, tmp_path, framing, poses, scale, size, body_length):
    """A body stated too short asks for more than fits."""
    calibration = replace(small, distortion=np.tile(LENS, (6, 1))) if framing == "fill" else small
    rng, places = np.random.default_rng(size), list(range(8))
    rows = [seen(calibration, in_arena(rng), rng.uniform(0, 360))[0] for _ in places]
    tracks = tracks_of(tmp_path, rows)
    centers, residuals, _ = locate(calibration, tracks, places)  # off the hulls' centers, as smoothed ones are
    analysis = Analysis(places, tracks, places, centers, residuals, body_length, {})
    options = {"image_size": size, "framing": framing, "poses": poses, "scale": scale}
    settings = settings_for(tmp_path, tmp_path / "out", **options)
    plan = plan_dataset(calibration, analysis, load_rig("mouse6"), settings)
    for index, (order, masks) in enumerate(zip(plan.orders, rows)):
        for slot, camera in enumerate(order):
            colors = np.zeros((*masks[camera].window.shape, 3), np.uint8)
            alpha = rectify(
                calibration, camera, colors, masks[camera], rotation=plan.true_rotation[index, slot],
                focal_px=float(plan.true_focal[index, slot]) * size, size=size,
            )[..., 3]  # fmt: skip
            assert alpha.max() == 255 and not alpha[[0, -1]].any() and not alpha[:, [0, -1]].any()


def test_each_sample_may_have_the_rigs_distance(small, tmp_path):
    rng = np.random.default_rng(4)
    centers, means = np.stack([in_arena(rng) for _ in range(8)]), []
    for scale in ("sample", "dataset"):
        settings = settings_for(tmp_path, tmp_path / "out", framing="exact", scale=scale)
        plan = make_plan(small, centers, settings, rig=load_rig("mouse6"), body_length=73.0)
        means.append(plan.label.distance.mean(dim=1).numpy())
    np.testing.assert_allclose(means[0], 2.7, rtol=1e-6)
    assert np.ptp(means[1]) > 0.01 and np.mean(means[1]) == pytest.approx(2.7, rel=1e-6)


def test_headings_choose_each_samples_views_by_the_animals_front(small, tmp_path):
    centers = np.tile([48.3, 54.2, 16.0], (4, 1))
    headings = np.array([0.0, 60.0, 180.0, 300.0])
    make = partial(make_plan, small, centers, settings_for(tmp_path, tmp_path / "out"), body_length=73.0)
    plan = make(rig=load_rig("facelift6"), headings_deg=headings)
    for heading, order, matrix, label in zip(headings, plan.orders, plan.to_sample, plan.label.origins.numpy()):
        turned = matrix[:3, :3] @ nose(heading)
        np.testing.assert_allclose(turned / np.linalg.norm(turned), [0, -1, 0], atol=1e-9)  # azimuth 0
        back = np.linalg.inv(matrix)
        np.testing.assert_allclose(label @ back[:3, :3].T + back[:3, 3], small.centres[order], atol=1e-6)
    assert plan.deviation_deg.max() < 60 and len(np.unique(plan.orders, axis=0)) > 1
    for rig, given, message in (
        ("facelift6", None, "--heading motion or pca"),
        ("mouse6", headings, "--rig facelift6"),
    ):
        with pytest.raises(ValueError, match=message):
            make(rig=load_rig(rig), headings_deg=given)


def test_png_is_read_as_it_was_and_not_much_larger_than_zlibs():
    rng = np.random.default_rng(8)
    for height, width in ((1, 1), (3, 40), (300, 250)):
        rgba = np.clip(rng.normal(0, 6, (height, width, 4)).cumsum(axis=1) + 128, 0, 255).astype(np.uint8)
        rgba[..., 3] = 255
        rgba[rng.random((height, width)) < 0.3] = [255, 255, 255, 0]
        rgba[height // 3 :, width // 2 :] = [255, 255, 255, 0]  # mostly empty, as images of an animal are
        content, whole = png_bytes(rgba), io.BytesIO()
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), rgba)
        Image.fromarray(rgba).save(whole, "png")
        assert len(content) < 1.4 * len(whole.getvalue()) + 50


def test_masks_are_kept_as_they_were(tmp_path):
    images = np.zeros((5, 30, 40), np.uint8)
    for image, (top, left) in zip(images[1:], np.random.default_rng(7).integers(0, 15, (4, 2))):
        image[top : top + 9, left : left + 13] = 255
    masks = [clean_mask(image) for image in images]
    assert len(list(record_track(tmp_path, 2, {"a": 1}, masks))) == len(masks) + 1
    assert read_track(tmp_path, 2, {"a": 2}) is None and read_track(tmp_path, 1) is None
    track = read_track(tmp_path, 2, {"a": 1})
    assert track.area.tolist() == [0, 117, 117, 117, 117] and len(track.hull(0)) == 0
    for index, mask in enumerate(masks):
        np.testing.assert_array_equal(full(track.silhouette(index)), full(mask))
        assert not index or track.hull(index).min(axis=0).tolist() == [mask.x, mask.y]


@pytest.mark.parametrize("workers", [1, 2])
def test_streams_keep_each_lanes_order_and_pass_on_errors(workers):
    got = list(run_lanes(partial(counted, None), [0, 1, 2], 10, workers=workers))
    assert sorted(got) == [(lane, step, 100 * lane + step) for lane in range(3) for step in range(10)]
    for lane in range(3):
        assert [step for own, step, _ in got if own == lane] == list(range(10))
    with pytest.raises(ValueError, match="lane 1 fails"):
        list(run_lanes(partial(counted, (1, 4)), [0, 1, 2], 10, workers=workers))
