"""Parts of the import: the animal's place over time, framing in random poses, splits, picture files, processes."""

import io
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from counting import counted
from filmed_spheres import silhouettes, spheres
from PIL import Image

from multiview.rig import load_rig
from recording.analysis import Analysis
from recording.calibration.model import Calibration
from recording.center import (
    floor_up,
    headings_deg,
    hull_place,
    locate,
    rig_up,
    smooth,
    trunk_centers,
    turn_to_z,
)
from recording.geometry import make_plan, place
from recording.importer import plan_dataset
from recording.masks import clean_mask, measure_mask, read_statistics, read_track, record_track
from recording.rectify import png_bytes, rectify
from recording.settings import ImportSettings
from recording.workers import run_lanes, share_out
from synthetic.dataset import load_real_rig

LENS = np.array([-0.15, 0.2, 0.001, -0.004, 0.0])


@pytest.fixture(scope="module")
def small() -> Calibration:
    return load_real_rig(width=240)[0]


def seen(calibration: Calibration, where, heading_deg: float):
    """Masks, their statistics and the true centre of a mouse of spheres."""
    centres, radii, middle = spheres(where, heading_deg)
    masks = [clean_mask(mask) for mask in silhouettes(calibration, centres, radii)]
    return masks, [measure_mask(mask) for mask in masks], middle


def in_arena(rng) -> np.ndarray:
    return np.array([48.3, 54.2, 16.0]) + [*rng.uniform(-45, 45, 2), rng.uniform(0, 15)]


# ---- where the animal is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("distorted", [False, True])
def test_hull_finds_the_centre_within_two_millimetres(small, distorted):
    calibration = replace(small, distortion=np.tile(LENS, (6, 1))) if distorted else small
    rng = np.random.default_rng(5)
    errors, rough_errors, turned = [], [], []
    for _ in range(6):
        heading = float(rng.uniform(0, 360))
        masks, statistics, middle = seen(calibration, in_arena(rng), heading)
        rough, residuals, length = locate(calibration, [statistics])
        centres, there = trunk_centers(calibration, [statistics], rough, residuals, float(length[0]))
        rough, length = rough[0], float(length[0])
        found = hull_place(calibration, masks, rough, length)
        errors.append(np.linalg.norm(found.centre - middle))
        assert there.all() and np.linalg.norm(centres[0] - middle) < 2.0
        rough_errors.append(np.linalg.norm(rough - middle))
        nose = found.axis * (1 if found.reach[0] < found.reach[1] else -1)  # the tail reaches farther
        turned.append((math.degrees(math.atan2(-nose[0], -nose[1])) - heading + 180) % 360 - 180)
    assert max(errors) < 1.5 and np.mean(errors) < np.mean(rough_errors) < 1.0
    assert np.abs(turned).max() < 6.0


def test_hull_of_masks_without_common_volume_is_none(small):
    masks, statistics, middle = seen(small, np.array([48.3, 54.2, 16.0]), 0.0)
    away = replace(masks[1], x=0, y=0)
    assert hull_place(small, [masks[0], away, *masks[2:]], middle, 73.0) is None


def test_trunk_centers_leave_out_masks_of_something_else_and_say_where_there_is_no_trunk(small):
    rows, middles = [], []
    for heading in (20.0, 200.0):
        _, statistics, middle = seen(small, np.array([48.3, 54.2, 16.0]), heading)
        rows.append(statistics)
        middles.append(middle)
    rough, residuals, _ = locate(small, rows)
    whole, found = trunk_centers(small, rows, rough, residuals, 73.0)
    away = replace(rows[0][1], centre=np.zeros(2), trunk=replace(rows[0][1].trunk, x=0, y=0))
    outvoted = [[rows[0][0], away, *rows[0][2:]], rows[1]]
    other, residuals, _ = locate(small, outvoted)
    centres, kept = trunk_centers(small, outvoted, other, residuals, 73.0)
    assert found.all() and kept.all() and np.linalg.norm(centres - middles, axis=1).max() < 2.0
    np.testing.assert_allclose(centres[1], whole[1], atol=1e-9)
    centres, found = trunk_centers(small, outvoted, other, np.zeros((2, 6)), 73.0)  # it counts, and shows nothing here
    assert found.tolist() == [False, True]
    np.testing.assert_array_equal(centres[0], other[0])


def test_smoothing_averages_noise_but_not_across_a_jump():
    rng = np.random.default_rng(0)
    frames = list(range(0, 400, 2))
    true = np.array([[0.05 * f + (500.0 if f >= 200 else 0.0), 0.0, 10.0] for f in frames])
    seen_centres = true + rng.normal(0, 2.0, true.shape)
    smoothed = smooth(seen_centres, frames, 24, (200,))
    inner = slice(10, 90)
    assert np.abs((smoothed - true)[inner]).mean() < 0.5 * np.abs((seen_centres - true)[inner]).mean()
    assert np.abs(smoothed - true).max() < 6.0
    assert np.abs(smooth(seen_centres, frames, 24, ()) - true).max() > 100
    np.testing.assert_array_equal(smooth(seen_centres, frames, 0, ()), seen_centres)


def test_up_is_found_from_the_floor_and_from_the_cameras(small):
    axis = np.array([0.3, -0.5, 0.8])
    turn = turn_to_z(axis / np.linalg.norm(axis))
    move = np.eye(4)
    move[:3, :3] = turn
    tilted = replace(small, w2c=small.w2c @ move.T)
    up = turn @ [0.0, 0.0, 1.0]
    assert math.degrees(math.acos(rig_up(tilted) @ up)) < 4.0  # the cameras stand not quite evenly
    rng = np.random.default_rng(1)
    centres = np.stack([in_arena(rng) * [1, 1, 0] + [0, 0, 16 + rng.normal()] for _ in range(60)])
    centres[::12, 2] += 40.0  # it rears
    assert math.degrees(math.acos(floor_up(centres @ turn.T, rig_up(tilted), 73.0, "x") @ up)) < 0.5
    np.testing.assert_allclose(turn_to_z(up) @ up, [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(turn_to_z(np.array([0, 0, -1.0])) @ [0, 0, -1], [0, 0, 1], atol=1e-12)
    with pytest.raises(ValueError, match="--up floor needs an animal that walks about"):
        floor_up(centres[:1] + rng.normal(0, 1, (60, 3)), rig_up(small), 73.0, "x")


@pytest.mark.parametrize("rule", ["pca", "motion"])
def test_heading_is_one_way_round_for_a_whole_run(small, rule):
    from recording.center import HullPlace

    rng = np.random.default_rng(2)
    true = np.cumsum(rng.normal(0, 6, 50)) + 100
    places, centres = [], [np.zeros(3)]
    for index, heading in enumerate(true):
        a = math.radians(heading)
        nose = np.array([-math.sin(a), -math.cos(a), 0.0])
        if index:
            centres.append(centres[-1] + (6.0 * nose if index % 3 else -1.0 * nose))  # it steps back at times
        sign = rng.choice([-1.0, 1.0])  # an axis has two ends
        front, back = (45.0, 90.0) if index % 4 else (60.0, 55.0)  # a curled tail misleads
        places.append(HullPlace(np.zeros(3), sign * nose, (front, back) if sign > 0 else (back, front)))
    found = headings_deg(places, np.stack(centres), list(range(50)), rule=rule, rate=25.0, body_length=73.0)
    assert np.abs((found - true + 180) % 360 - 180).max() < 1e-6


# ---- framing ----------------------------------------------------------------------------------------------------


def analysis_of(calibration, count, rng) -> tuple[Analysis, list]:
    """Random poses, placed off their centres as smoothed or triangulated centres are."""
    rows, tracks, centres, residuals = [], [], [], []
    for _ in range(count):
        masks, statistics, _ = seen(calibration, in_arena(rng), float(rng.uniform(0, 360)))
        centre, residual, _ = locate(calibration, [statistics])
        rows.append(statistics)
        tracks.append(masks)
        centres.append(centre[0])
        residuals.append(residual[0])
    numbers = list(range(count))
    return Analysis(numbers, rows, np.stack(centres), np.stack(residuals), 73.0, {}, numbers), tracks


def check_rims(calibration, settings, count, seed) -> int:
    """Number of pictures whose border shows something."""
    analysis, tracks = analysis_of(calibration, count, np.random.default_rng(seed))
    _, placements = plan_dataset(calibration, analysis, load_rig("mouse6"), settings)
    size, touching = settings.image_size, 0
    for placement, masks in zip(placements, tracks):
        for slot, camera in enumerate(placement.order):
            colours = np.zeros((*masks[camera].window.shape, 3), np.uint8)
            alpha = rectify(
                calibration, camera, colours, masks[camera], rotation=placement.true_rotation[slot],
                focal_px=float(placement.true_focal[slot]) * size, size=size,
            )[..., 3]  # fmt: skip
            assert alpha.max() == 255
            touching += bool(alpha[[0, -1]].any() or alpha[:, [0, -1]].any())
    return touching


@pytest.mark.parametrize(
    ("framing", "poses", "scale", "size", "body_length"),
    [
        ("fill", "exact", "dataset", 48, 30.0),
        ("facelift", "nearest", "sample", 64, 20.0),
        ("exact", "exact", "sample", 32, 73.0),
    ],
)
def test_no_mask_reaches_the_border_in_random_poses(small, framing, poses, scale, size, body_length):
    """A body stated too short asks for more than fits."""
    calibration = replace(small, distortion=np.tile(LENS, (6, 1))) if framing == "fill" else small
    settings = ImportSettings(
        Path("v"), Path("m"), Path("o"), image_size=size, framing=framing, poses=poses, scale=scale,
        body_length=body_length,
    )  # fmt: skip
    assert check_rims(calibration, settings, 12, size) == 0


def test_each_sample_may_have_the_rigs_distance(small):
    rng = np.random.default_rng(4)
    centres = np.stack([in_arena(rng) for _ in range(8)])
    options = {"rig": load_rig("mouse6"), "body_length": 73.0}
    means = {}
    for scaling in ("dataset", "sample"):
        plan = make_plan(small, centres, ImportSettings("v", "m", Path("o"), framing="exact", scale=scaling), **options)
        placements = [place(plan, small, centre) for centre in centres]
        means[scaling] = [float(placement.label.distance.mean()) for placement in placements]
        for placement in placements:
            assert np.linalg.norm(placement.to_sample[:3, 0]) == pytest.approx(placement.scale)
    np.testing.assert_allclose(means["sample"], 2.7, rtol=1e-6)
    assert np.ptp(means["dataset"]) > 0.01 and np.mean(means["dataset"]) == pytest.approx(2.7, rel=1e-6)


def test_headings_choose_each_samples_views_by_the_animals_front(small):
    rig = load_rig("facelift6")
    centres = np.tile([48.3, 54.2, 16.0], (4, 1))
    headings = np.array([0.0, 60.0, 180.0, 300.0])
    options = {"rig": rig, "body_length": 73.0}
    settings = ImportSettings("v", "m", Path("o"), framing="fill")
    plan = make_plan(small, centres, settings, **options, headings_deg=headings)
    orders = set()
    for centre, heading in zip(centres, headings):
        placement = place(plan, small, centre, heading)
        orders.add(tuple(placement.order))
        nose = np.array([-math.sin(math.radians(heading)), -math.cos(math.radians(heading)), 0.0])
        turned = placement.to_sample[:3, :3] @ nose
        np.testing.assert_allclose(turned / np.linalg.norm(turned), [0, -1, 0], atol=1e-9)  # azimuth 0
        back = np.linalg.inv(placement.to_sample)
        origins = placement.label.origins.numpy() @ back[:3, :3].T + back[:3, 3]
        np.testing.assert_allclose(origins, small.centres[placement.order], atol=1e-6)
        assert placement.deviation_deg.max() < 60
    assert len(orders) > 1
    with pytest.raises(ValueError, match="--heading motion or pca"):
        make_plan(small, centres, settings, **options)
    with pytest.raises(ValueError, match="--rig facelift6"):
        make_plan(small, centres, settings, **{**options, "rig": load_rig("mouse6")}, headings_deg=headings)


# ---- splits, files, processes -----------------------------------------------------------------------------------


def test_png_is_read_as_it_was_and_not_much_larger_than_zlibs():
    rng = np.random.default_rng(8)
    for height, width in ((1, 1), (3, 40), (600, 500)):
        rgba = np.clip(rng.normal(0, 6, (height, width, 4)).cumsum(axis=1) + 128, 0, 255).astype(np.uint8)
        rgba[..., 3] = 255
        rgba[rng.random((height, width)) < 0.3] = [255, 255, 255, 0]
        rgba[height // 3 :, width // 2 :] = [255, 255, 255, 0]  # mostly empty, as images of an animal are
        content, whole = png_bytes(rgba), io.BytesIO()
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), rgba)
        Image.fromarray(rgba).save(whole, "png")
        assert len(content) < 1.4 * len(whole.getvalue()) + 50 and png_bytes(rgba) == content


def test_masks_are_kept_as_they_were(tmp_path):
    rng = np.random.default_rng(7)
    pictures = [np.zeros((30, 40), np.uint8) for _ in range(5)]
    for picture in pictures[1:]:
        top, left = rng.integers(0, 15, 2)
        picture[top : top + 9, left : left + 13] = 255
    masks = [clean_mask(picture) for picture in pictures]
    assert len(list(record_track(tmp_path, 2, {"a": 1}, masks))) == len(masks) + 1
    track, statistics = read_track(tmp_path, 2), read_statistics(tmp_path, 2)
    assert statistics[0] is None
    for index, mask in enumerate(masks):
        np.testing.assert_array_equal(track.silhouette(index).full(), mask.full())
        if index:
            np.testing.assert_array_equal(statistics[index].hull, measure_mask(mask).hull)


def test_lanes_are_shared_out_so_that_all_have_equally_much_to_do():
    assert share_out([0, 1, 2, 3], [6.0, 1.0, 2.0, 3.0], 2) == [[0], [3, 2, 1]]
    assert sorted(sum(share_out(range(6), [1.0] * 6, 4), [])) == list(range(6))


@pytest.mark.parametrize("workers", [1, 2])
def test_streams_keep_each_lanes_order_and_pass_on_errors(workers):
    got = list(run_lanes(partial(counted, None), [0, 1, 2], 10, workers=workers))
    assert sorted(got) == [(lane, step, 100 * lane + step) for lane in range(3) for step in range(10)]
    for lane in range(3):
        assert [step for own, step, _ in got if own == lane] == list(range(10))
    with pytest.raises(ValueError, match="lane 1 fails"):
        list(run_lanes(partial(counted, (1, 4)), [0, 1, 2], 10, workers=workers))
