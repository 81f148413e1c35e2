"""The camera simulator: the same numbers give the same image, every fault within its range, lenses exact."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from multiview.rig import load_rig
from multiview.sample import read_dataset_info, read_sample
from synthetic import photograph as photo
from synthetic.dataset import SURFACE_POINTS, is_photographic, load_real_rig, make_sample, write_recording
from synthetic.photograph import RecordingCameras, RecordingConditions, has_lens
from synthetic.scene import KEYPOINT_NAMES, SplatCloud, laboratory_light, make_mouse
from synthetic.settings import MouseSettings

SIZE, WIDTH = 96, 192
PLAIN = MouseSettings(Path("unused"), image_size=SIZE, seed=4, num_novel_views=2, depth=True)
SMALL = replace(PLAIN, image_size=48, num_novel_views=1)


@pytest.fixture(scope="module")
def rig():
    return load_rig("mouse6")


@pytest.fixture(scope="module")
def clean(rig, render):
    return make_sample(rig, PLAIN, 2, render)


def camera(**changes) -> photo.Camera:
    return replace(photo.Camera.draw(np.random.default_rng(0)), **changes)


def disc(size: int, radius: float, color: tuple[float, float, float]) -> np.ndarray:
    """[size, size, 4] an antialiased disc of one color in the middle."""
    y, x = np.mgrid[:size, :size] + 0.5
    alpha = np.clip(radius + 0.5 - np.hypot(x - size / 2, y - size / 2), 0, 1)
    return np.concatenate(
        [np.broadcast_to(color, (size, size, 3)) * (alpha > 0)[..., None], alpha[..., None]], 2
    ).astype(np.float32)


def test_photographs_depend_on_seed_and_index_only(rig, render):
    settings = replace(SMALL, photographic=1.0)
    first = make_sample(rig, settings, 2, render)
    make_sample(rig, settings, 3, render)
    again = make_sample(rig, settings, 2, render)
    assert torch.equal(first.rgba, again.rgba) and first.extra == again.extra
    other = make_sample(rig, replace(settings, seed=5), 2, render).extra["photograph"]
    assert other["noise"] != first.extra["photograph"]["noise"]


def test_share_leaves_the_other_samples_alone_and_nests(rig, render):
    chosen = {share: {i for i in range(200) if is_photographic(4, i, share)} for share in (0.0, 0.3, 0.7, 1.0)}
    assert not chosen[0.0] and chosen[0.3] < chosen[0.7] < chosen[1.0] == set(range(200))
    assert 40 < len(chosen[0.3]) < 80
    index = min(set(range(200)) - chosen[0.7])
    plain, same = (make_sample(rig, replace(SMALL, photographic=share), index, render) for share in (0.0, 0.7))
    assert torch.equal(plain.rgba, same.rgba) and torch.equal(plain.depth, same.depth) and plain.extra == same.extra


def test_novel_views_cameras_and_depth_are_not_touched(clean, rig):
    done = photo.photograph(clean, 6, camera(), np.random.default_rng(1))
    assert torch.equal(done.rgba[6:], clean.rgba[6:]) and torch.equal(done.depth, clean.depth)
    assert done.cameras is clean.cameras and done.rgba.min() >= 0 and done.rgba.max() <= 1
    assert all((done.rgba[view] - clean.rgba[view]).abs().max() > 0.05 for view in range(6))
    assert len(done.extra["photograph"]["views"]) == 6 and "photograph" not in clean.extra
    assert json.loads(json.dumps(done.extra["photograph"])) == done.extra["photograph"]


def test_animal_moves_but_cameras_stay_and_keypoints_follow(clean, rig, render):
    moved = make_sample(rig, replace(PLAIN, photographic=1.0), 2, render)
    assert torch.equal(moved.cameras.c2w, clean.cameras.c2w)
    done = moved.extra["photograph"]
    assert 0.88 <= done["scale"] <= 1.12 and np.abs(done["shift"]).max() <= 0.06
    expected = np.array(clean.extra["keypoints"]) * done["scale"] + done["shift"]
    assert np.allclose(moved.extra["keypoints"], expected, atol=2e-3)
    assert moved.extra["body_length"] == pytest.approx(done["scale"] * clean.extra["body_length"], rel=1e-4)


@pytest.mark.parametrize("coarse", (1.0, 0.6))
def test_blur_keeps_a_constant_color_over_any_background(coarse):
    color = np.array([0.9, 0.5, 0.2], np.float32)
    kernel, sigmas = photo.draw_blur(np.random.default_rng(3), 2.0)
    assert kernel.sum() == pytest.approx(1.0, abs=1e-5) and 0 <= sigmas[1] <= photo.BLUR[1]
    image = disc(64, 20, tuple(color))
    blurred, alpha = photo.blurred(image, kernel, coarse)
    for background in (0.0, 0.4, 1.0):
        over = blurred * alpha[..., None] + background * (1 - alpha[..., None])
        expected = color * alpha[..., None] + background * (1 - alpha[..., None])
        assert np.abs(over - expected).max() < 2e-3
    assert alpha.sum() == pytest.approx(image[..., 3].sum(), rel=0.02)
    assert ((alpha > 0.05) & (alpha < 0.95)).sum() > 1.3 * ((image[..., 3] > 0.05) & (image[..., 3] < 0.95)).sum()


def test_noise_has_the_stated_level_and_stays_on_the_animal():
    for value in (0.1, 0.9):
        for grain in photo.NOISE_GRAIN:
            settings = camera(noise=0.02, grain=grain)
            noise = settings.noise_on(np.full((200, 200, 3), value, np.float32), np.random.default_rng(0))
            stated = photo.noise_level(np.float32(value), 0.02)
            assert noise.std(axis=(0, 1)) == pytest.approx(np.full(3, stated), rel=0.05)
    neighbors = np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1]
    assert neighbors > 0.2  # grain, not single pixels
    assert photo.noise_level(np.float32(1.0), 0.02) == pytest.approx(0.02)
    image, _ = photo.photograph_view(disc(96, 20, (0.5, 0.5, 0.5)), camera(), np.random.default_rng(0), None)
    assert image[..., :3][:10].max() == 0 and image[..., 3][:10].max() == 0


def test_mask_moves_within_its_bound_and_both_ways():
    size, radius = 128, 40.0
    alpha = disc(size, radius, (1, 1, 1))[..., 3]
    y, x = np.mgrid[:size, :size] + 0.5
    distance = radius - np.hypot(x - size / 2, y - size / 2)
    grown = lost = 0
    for seed in range(30):
        mask, _ = photo.segmented(alpha, 0.3, np.random.default_rng(seed), 1.0, None)
        low, high = photo.MASK_SHIFT
        inner = distance > -low + 1.0  # a pixel of slack: the grid and the ramp
        assert (mask[distance < -high - 1.0] == 0).all()
        assert (mask[inner] < 1).sum() <= 4 * (photo.HOLE_RADIUS[1] + 1) ** 2  # at most a hole
        grown, lost = grown + (mask - alpha > 0.9).sum(), lost + (alpha - mask > 0.9).sum()
    assert grown > 100 and lost > 100


def test_rim_outside_the_animal_takes_the_background():
    settings = camera(background=np.array([0.0, 1.0, 0.0], np.float32), noise=0.0, coarse=1.0, edge_width=0.3)
    greens, cut = [], 0
    for seed in range(12):
        image = disc(128, 30, (0.8, 0.1, 0.1))
        done, _ = photo.photograph_view(image, settings, np.random.default_rng(seed), None)
        rim = (done[..., 3] > 0.9) & (image[..., 3] < 0.1)
        greens += list(done[rim, 1])
        middle = done[54:74, 54:74, 1][done[54:74, 54:74, 3] > 0.9]
        cut += middle.max() > 0.35
    assert len(greens) > 30 and np.median(greens) > 0.5
    assert cut == 0


def test_lost_tails_leave_the_body(clean, monkeypatch):
    monkeypatch.setattr(photo, "TAIL_LOSS_PROBABILITY", 1.0)
    lost = photo.photograph(clean, 6, camera(), np.random.default_rng(2))
    monkeypatch.setattr(photo, "TAIL_LOSS_PROBABILITY", 0.0)
    kept = photo.photograph(clean, 6, camera(), np.random.default_rng(2))
    assert all("tail_lost" in view for view in lost.extra["photograph"]["views"])
    areas = lost.rgba[:6, 3].sum((1, 2)) / kept.rgba[:6, 3].sum((1, 2))
    assert areas.min() > 0.75 and (areas < 0.99).sum() >= 3


def test_laboratory_light_keeps_the_animal_and_darkens_bellies():
    lights = [laboratory_light(np.random.default_rng(seed)) for seed in range(40)]
    assert any(light.fill == 0 for light in lights) and any(light.fill > 0.1 for light in lights)
    assert all(min(light.key, light.sky, light.ground) > 0 and 1.0 < light.key + light.sky + light.fill < 1.7
               for light in lights)  # fmt: skip
    dark = replace(lights[0], belly=0.8)
    bright = replace(lights[0], belly=0.0)
    first, second = make_mouse(0, 1, light=dark), make_mouse(0, 1, light=bright)
    assert np.array_equal(first.means, second.means) and (first.rgb <= second.rgb + 1e-6).all()
    assert first.rgb.mean() < second.rgb.mean()


def test_script_writes_photographs_and_refuses_another_share(script, tmp_path):
    common = ["--output_dir", str(tmp_path), "--num_samples", "2", "--image_size", "48", "--workers", "1"]
    script.main([*common, "--photographic", "1"])
    assert read_dataset_info(tmp_path)["photographic"] == 1.0
    done = read_sample(tmp_path / "sample_000001").extra["photograph"]
    assert len(done["views"]) == 6 and {"scale", "shift", "gain", "gamma", "noise"} <= set(done)
    for other in ([], ["--photographic", "0.5"]):
        with pytest.raises(ValueError, match="photographic: 1.0 there"):
            script.main([*common, *other])


# ---- recordings -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return load_real_rig(width=WIDTH, lens="real")[0]


def dots(places: np.ndarray):
    """A renderer that draws soft dots at the projections of `places` [n, 3], whatever the cloud."""

    def render(cloud, cameras):
        uv, _ = cameras.project(torch.from_numpy(places).float().expand(len(cameras), -1, -1))
        y, x = torch.meshgrid(torch.arange(cameras.height) + 0.5, torch.arange(cameras.width) + 0.5, indexing="ij")
        square = (x - uv[..., 0, None, None]) ** 2 + (y - uv[..., 1, None, None]) ** 2
        alpha = torch.exp(-square / (2 * 3.0**2)).amax(1, keepdim=True)
        return alpha.expand(-1, 3, -1, -1).contiguous(), alpha

    return render


@pytest.mark.parametrize("corner", [(0.0, 0.0, 15.0), (45.0, 30.0, 0.0), (-40.0, 35.0, 30.0)])
def test_lens_puts_points_where_the_calibration_projects_them(real, corner):
    assert has_lens(real) and not has_lens(load_real_rig()[0])
    place = np.array(load_real_rig()[1]["centre"])[None] + corner
    images, masks = RecordingCameras(real, dots(place), RecordingConditions(background=0.0)).photograph(None, 0)
    expected = real.project(place)[:, 0]
    width, height = real.sizes[0]
    rows, columns = np.mgrid[:height, :width] + 0.5
    for light, (x, y) in zip(images[:, 0].double().numpy(), expected, strict=True):
        assert 6 < x < width - 6 and 6 < y < height - 6
        found = np.array([(light * columns).sum(), (light * rows).sum()]) / light.sum()
        assert np.abs(found - [x, y]).max() < 0.05  # the lens bends the dot a little
    straight = replace(real, distortion=np.zeros_like(real.distortion))
    assert np.abs(straight.project(place)[:, 0] - expected).max() > 0.03  # the lens does something
    assert set(masks.unique().tolist()) <= {0.0, 1.0}


def test_noise_has_the_stated_deviation_and_is_keyed(real):
    flat = load_real_rig(width=WIDTH)[0]

    def white(cloud, cameras):
        shape = (len(cameras), 1, cameras.height, cameras.width)
        return torch.full((shape[0], 3, *shape[2:]), 0.7), torch.ones(shape)

    photograph = RecordingCameras(flat, white, RecordingConditions(noise=4.0, seed=3)).photograph
    first, again, other = photograph(None, 0)[0], photograph(None, 0)[0], photograph(None, 1)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    expected = 4.0 / 255 * (0.25 + 0.75 * 0.7) ** 0.5
    assert float(first.std()) == pytest.approx(expected, rel=0.02)
    assert float(first.mean()) == pytest.approx(0.7, abs=1e-3)


def test_uneven_light_stands_still_and_differs_between_cameras():
    flat = load_real_rig(width=WIDTH)[0]

    def nothing(cloud, cameras):
        shape = (len(cameras), 1, cameras.height, cameras.width)
        return torch.zeros(shape[0], 3, *shape[2:]), torch.zeros(shape)

    photograph = RecordingCameras(flat, nothing, RecordingConditions(uneven_light=True)).photograph
    first = photograph(None, 0)[0]
    assert torch.equal(first, photograph(None, 7)[0])
    assert first.std(dim=(1, 2, 3)).min() > 0.02  # a texture
    assert (first[0] - first[1]).abs().mean() > 0.02
    corner, middle = first[..., :10, :10].mean(), first[..., 70:100, 80:110].mean()
    assert corner < middle  # dark corners


def test_truth_is_what_was_shown_and_cut_videos_are_noticed(tmp_path, monkeypatch):
    means = np.random.default_rng(0).normal(size=(1500, 3)).astype(np.float32)
    cloud = SplatCloud(
        means=means, log_scales=means, quats=np.ones((1500, 4), np.float32), opacity=means[:, 0], rgb=means,
        center=means[0], keypoints=means[: len(KEYPOINT_NAMES)], body_length=70.0, meta={"pose": "walk"},
    )  # fmt: skip
    calibration = load_real_rig(width=64)[0]
    monkeypatch.setattr("synthetic.dataset._count_frames", lambda _: 1)  # as on a full disk
    with pytest.raises(OSError, match="fewer than 2 frames could be written"):
        write_recording(tmp_path / "recording", calibration, [cloud, cloud], dots(means[:1]))
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    write_recording(tmp_path / "recording", calibration, [cloud, cloud], dots(means[:1]))
    written = json.loads((tmp_path / "recording" / "truth.json").read_text())
    assert written["keypoint_names"] == list(KEYPOINT_NAMES) and written["frames"][1]["pose"] == {"pose": "walk"}
    with np.load(tmp_path / "recording" / "truth.npz") as arrays:
        assert arrays["surface"].shape == (2, SURFACE_POINTS, 3)
        assert np.isin(arrays["surface"], means).all()
        np.testing.assert_array_equal(arrays["keypoints"][0], cloud.keypoints)
