"""Parts of the import of recordings: videos, masks, geometry, warp. The whole is in the round trip."""

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from filmed_spheres import full
from scipy import ndimage

from multiview.rig import load_rig
from recording.analysis import check_videos
from recording.geometry import assign_views, directions_from, label_error, make_plan
from recording.importer import split_samples
from recording.masks import HOLE_FRACTION, Silhouette, clean_mask, measure_mask
from recording.rectify import rectify
from recording.settings import ImportSettings
from recording.video import VideoReader, find_videos
from synthetic.dataset import load_real_rig, video_writer

MOUSE6 = load_rig("mouse6")


@pytest.fixture(scope="module")
def place() -> np.ndarray:
    """A mouse's center in the arena."""
    return np.array(load_real_rig()[1]["centre"]) + [25.0, -10.0, 16.0]


def plan_for(calibration, center, *, rig=MOUSE6, zoom=1.0, body_length=73.0, **options):
    settings = ImportSettings("v", "m", Path("o"), **{"framing": "fill", **options})
    return make_plan(calibration, np.atleast_2d(center), settings, rig=rig, zoom=zoom, body_length=body_length)


def label_cameras(plan, size=512):
    return plan.label[0].resize(size, size).to(torch.float32)


def write_video(path, frames, size=(32, 24), rate=25.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = video_writer(path, size, rate, 0)
    for number in frames:
        writer.send(np.full((size[1], size[0], 3), number, np.uint8))
    writer.close()


def test_frames_are_read_in_order_across_chunks(tmp_path):
    write_video(tmp_path / "Camera1" / "0.mp4", range(0, 100, 10))
    write_video(tmp_path / "Camera1" / "10.mp4", range(100, 150, 10))
    write_video(tmp_path / "Camera2" / "0.mp4", range(0, 150, 10))
    videos = find_videos(tmp_path, 2, "--video_dir")
    check_videos(videos, videos)
    for video in videos:
        with VideoReader(video) as reader:
            seen = [int(reader.read_bgr(index).mean().round()) for index in (0, 3, 9, 10, 14)]
            np.testing.assert_allclose(seen, [0, 30, 90, 100, 140], atol=1)
            with pytest.raises(ValueError, match="increasing order"):
                reader.read_bgr(14)


def test_videos_that_do_not_belong_together_are_refused(tmp_path):
    for name, rate in (("a/0", 25.0), ("a/1", 25.0), ("b/0", 30.0)):
        write_video(tmp_path / f"{name}.mp4", range(3), rate=rate)
    for folder, count, message in (("a", 1, "holds 1.mp4, but the calibration has only 1"), (".", 2, "did you mean")):
        with pytest.raises(ValueError, match=message):
            find_videos(tmp_path / folder, count, "--video_dir")
    with pytest.raises(ValueError, match="runs at 25 frames/s, .* at 30"):
        check_videos(find_videos(tmp_path / "b", 1, "--video_dir"), find_videos(tmp_path / "a", 2, "--mask_dir"))


def disc(height, width, x, y, radius):
    rows, columns = np.mgrid[:height, :width] + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def silhouette(mask: np.ndarray) -> Silhouette:
    return clean_mask(255 * mask.astype(np.uint8))


def test_what_is_dark_is_no_animal_and_what_a_tail_encloses_is_none_either():
    body = disc(100, 120, 50, 50, 30)
    assert (full(clean_mask(np.where(body, 255, 90).astype(np.uint8))) == body).all()  # lossy: below the threshold
    ring = body & ~disc(100, 120, 50, 50, 15)
    assert (full(silhouette(ring)) == ring).all()
    assert measure_mask(clean_mask(np.zeros((10, 10), np.uint8)))["area"] == 0


def test_largest_part_from_borders_is_the_one_counted_pixel_by_pixel():
    rng = np.random.default_rng(0)
    for sigma in np.repeat([0.6, 1.0, 2.0, 4.0], 40):
        noise = cv2.GaussianBlur(rng.normal(size=rng.integers(20, 90, 2)).astype(np.float32), (0, 0), sigma)
        mask = noise > rng.choice([-1.0, -0.5, 0.0, 1.0]) * noise.std()
        labels, _ = ndimage.label(mask, np.ones((3, 3)))
        areas = np.bincount(labels.ravel())[1:]
        if (areas == areas.max()).sum() > 1:
            continue  # either will do
        part = labels == 1 + areas.argmax()
        gaps, _ = ndimage.label(~part)
        sizes, outside = np.bincount(gaps.ravel()), np.unique([*gaps[[0, -1]].ravel(), *gaps[:, [0, -1]].ravel()])
        sizes[[0, *outside]] = mask.size
        assert np.array_equal(full(silhouette(mask)), part | (sizes[gaps] <= HOLE_FRACTION * areas.max()))


def test_centre_is_the_bodys_centre_of_mass_not_the_bounding_box():
    mask = disc(200, 400, 80, 100, 40)
    mask[97:103, 80:380] = True  # a long tail
    measured = measure_mask(silhouette(mask))
    assert np.abs(measured["centre"] - [80, 100]).max() < 2.0  # the box's center is at 210
    assert abs(measured["axis_length"] - 80) < 12  # the tail is not counted
    assert measured["hulls"][:, 0].max() == 380 and not measured["touches_border"]
    mask[97:103, 380:] = True
    assert measure_mask(silhouette(mask))["touches_border"]


def test_views_follow_direction_whatever_the_cameras_numbers_are(real, place):
    azimuth, elevation, _ = (x[0] for x in directions_from(place[None], real.centres))
    order, off = assign_views(azimuth, elevation, MOUSE6, range(6))
    assert order != list(range(6)) and off.max() < 25
    turned = (azimuth - azimuth[order[0]]) % 360
    assert (np.diff(turned[order]) > 0).all()  # sorted by azimuth, as the rig is
    shuffle = np.array([3, 1, 5, 0, 2, 4])
    shuffled, _ = assign_views(azimuth[shuffle], elevation[shuffle], MOUSE6, range(6))
    assert [int(shuffle[k]) for k in shuffled] == order  # the same physical cameras in the same views
    assert assign_views(azimuth, elevation, MOUSE6, [3])[0][0] == 3


def test_distance_is_measured_from_the_animal_and_is_the_rigs(real, place):
    middle = place - [25.0, -10.0, 0.0]  # of the arena
    label = label_cameras(plan_for(real, middle, framing="exact"))
    assert label.distance.mean().item() == pytest.approx(2.7, rel=1e-6)
    assert (label.fxfycxcy - torch.tensor([548.99377, 548.99377, 256.0, 256.0])).abs().max() < 1e-3
    # From the world's origin, a corner of the calibration pattern, the same cameras would spread from 2.0 to 3.4.
    assert label.distance.max() / label.distance.min() < 1.15
    label = label_cameras(plan_for(real, middle, framing="facelift"))
    assert (label.distance - 2.7).abs().max() < 1e-5 and (label.fxfycxcy[:, 0] - 548.99377).abs().max() < 1e-3


def test_world_origin_unit_and_heading_of_the_calibration_do_not_matter(real, place):
    base = label_cameras(plan_for(real, place))
    move = np.eye(4)
    a = math.radians(70)
    move[:2, :2] = [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]
    move[:3, 3] = [400.0, -900.0, 33.0]
    w2c = real.w2c @ np.linalg.inv(move)
    w2c[:, :3, 3] *= 0.001  # metres
    moved = (move[:3, :3] @ place + move[:3, 3]) * 0.001
    other = label_cameras(plan_for(replace(real, w2c=w2c), moved, body_length=0.073))
    torch.testing.assert_close(base.c2w, other.c2w, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(base.fxfycxcy, other.fxfycxcy, atol=1e-3, rtol=1e-5)
    assert base.azimuth_deg[0].item() % 360 == pytest.approx(0.0, abs=1e-3)  # the reference view


def test_labels_project_as_the_real_cameras_do_or_say_what_that_costs(real, place):
    """Zoom and intrinsics change together: one zoom for all views, written into the cameras."""
    for framing in ("exact", "fill"):
        plan = plan_for(real, place, framing=framing, zoom=0.8)
        assert np.ptp(plan.true_focal) < 1e-12 and plan.true_focal[0, 0] == pytest.approx(plan.focal)
        assert label_error(plan, real, 0)[1] < 1e-9
        back = np.linalg.inv(plan.to_sample[0])
        centers = plan.label[0].origins.numpy() @ back[:3, :3].T + back[:3, 3]
        np.testing.assert_allclose(centers, real.centres[plan.orders[0]], atol=1e-6)
    assert plan.rig.distance == pytest.approx(0.8 * 5.3, rel=0.05) and plan.body_length * plan.scale == 0.96
    errors = {}
    for framing, poses in (("facelift", "exact"), ("facelift", "nearest"), ("fill", "nearest")):
        plan = plan_for(real, place, framing=framing, poses=poses)
        errors[framing, poses] = label_error(plan, real, 0)[0]
        assert plan.rig.framing == framing
        if poses == "nearest":
            assert not plan.rig.differences(MOUSE6.with_framing(framing))
        else:
            assert plan.rig.differences(MOUSE6) and plan.rig.view_names == MOUSE6.view_names
    assert 0.02 < errors["facelift", "exact"] < 0.08 < errors["facelift", "nearest"] < 0.25
    assert errors["fill", "nearest"] < errors["facelift", "nearest"]


def test_rigs_and_worlds_that_a_recording_cannot_have_are_refused(real, place):
    turned = replace(real, w2c=real.w2c @ np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]]))
    np.testing.assert_allclose(turned.with_up("-y").centres, real.centres, atol=1e-9)  # y' = -z there
    with pytest.raises(ValueError, match="--up"):
        plan_for(real.with_up("-z"), place * [1.0, -1.0, 0.0])
    for rig, message in (("uniform4", "6 cameras, rig uniform4 has 4 views"), ("facelift6", "heading")):
        with pytest.raises(ValueError, match=message):
            plan_for(real, place, rig=load_rig(rig))
    plan = plan_for(real, place, rig=None)
    assert plan.rig.name == "calibrated" and plan.rig.views[0].azimuth_deg == 0.0 and plan.orders[0, 0] == 0


def pattern(directions):
    """A smooth color for every direction in space, 0..1."""
    return 0.5 + 0.5 * np.sin(directions * [25, 31, 40])


@pytest.mark.parametrize("distorted", [False, True])
def test_warp_shows_what_the_turned_camera_would_see(place, distorted):
    calibration = load_real_rig(width=576)[0]
    lens = [-0.15, 0.2, 0.001, -0.004, 0.0] if distorted else [0.0] * 5
    calibration = replace(calibration, distortion=np.array([lens] * 6))
    plan, slot, size = plan_for(calibration, place), 2, 96
    camera, (width, height) = plan.orders[0, slot], calibration.sizes[0]
    pixels = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    directions = calibration.rays(camera, pixels.reshape(-1, 2)).reshape(height, width, 3)
    photograph = (255 * pattern(directions)).round().astype(np.uint8)
    focal, rotation = plan.true_focal[0, slot] * size, plan.true_rotation[0, slot]
    everything = silhouette(np.ones((height, width), bool))
    rgba = rectify(
        calibration, camera, photograph[..., ::-1], everything, rotation=rotation, focal_px=focal, size=size
    ) / 255.0  # fmt: skip
    grid = (np.stack(np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5), axis=-1) - size / 2) / focal
    rays = np.concatenate([grid, np.ones((size, size, 1))], axis=-1) @ rotation
    inside = rgba[..., 3] > 0.999
    assert inside.mean() > 0.7
    error = np.abs(rgba[..., :3] - pattern(rays / np.linalg.norm(rays, axis=-1, keepdims=True)))[inside]
    assert error.max() < 0.006 and error.mean() < 0.0015  # 8 bits; a shift of a twentieth of a pixel would show


def test_the_background_does_not_bleed_into_the_animal(real, place):
    plan = plan_for(real, place)
    camera = plan.orders[0, 0]
    mask = silhouette(disc(1024, 1152, *real.project(place[None])[camera, 0], 12))
    view = {"rotation": plan.true_rotation[0, 0], "focal_px": plan.true_focal[0, 0] * 512, "size": 512}
    rgba = rectify(real, camera, np.full((*mask.window.shape, 3), 255, np.uint8), mask, **view)
    assert rgba[rgba[..., 3] > 0].min(axis=0)[:3].min() == 255 and (rgba[..., 3] > 0).sum() > 100
    with pytest.raises(ValueError, match=r"colors must be the mask's window, \[\d+, \d+, 3\], got \[9, 9, 3\]"):
        rectify(real, camera, np.zeros((9, 9, 3), np.uint8), mask, **view)


def test_split_takes_blocks_of_time_or_depends_on_the_seed():
    for count in (1, 2, 5, 12, 100, 2000):
        for seed in (None, 3):
            train, val = split_samples(count, None, seed)
            expected = max(1, round(0.2 * count)) if count > 1 else 0
            assert sorted(train + val) == list(range(count)) and len(val) == expected
            blocks = np.abs(np.diff(np.isin(np.arange(count), val).astype(int))).sum()
            assert blocks <= 4 or seed is not None  # at most two
            assert (train, val) == split_samples(count, None, seed)
    assert val != split_samples(count, None, 4)[1]
    train, val = split_samples(200, [0.1 * index for index in range(200)], None)
    assert min(abs(a - b) for a in train for b in val) >= 5 and len(val) == 40 and len(train) == 200 - 40 - 16
    assert len(split_samples(200, list(range(200)), None)[0]) == 160  # nothing is near anything
