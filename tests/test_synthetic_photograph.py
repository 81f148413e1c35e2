"""The camera simulator: the same numbers give the same image, every fault within its range, lenses exact."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from multiview.rig import load_rig
from multiview.sample import read_dataset_info, read_sample
from synthetic import photograph as photo
from synthetic.dataset import SURFACE_POINTS, load_real_rig, make_sample, write_recording
from synthetic.scene import KEYPOINT_NAMES, laboratory_light, make_mouse
from synthetic.settings import MouseSettings

RIG, WIDTH = load_rig("mouse6"), 192
PLAIN = MouseSettings(Path("unused"), image_size=96, seed=4, num_novel_views=2, depth=True)
SMALL = replace(PLAIN, image_size=48, num_novel_views=1)
FAR = np.array([-1e3, -1e3])  # a tail's end outside the image


@pytest.fixture(scope="module")
def clean(render):
    return make_sample(RIG, PLAIN, 2, render)


def camera(**changes) -> photo.Camera:
    return photo.Camera(**vars(photo.Camera.draw(np.random.default_rng(0))) | changes)


def disc(size: int, radius: float, color: tuple[float, float, float]) -> np.ndarray:
    """[size, size, 4] an antialiased disc of one color in the middle."""
    y, x = np.mgrid[:size, :size] + 0.5
    alpha = np.clip(radius + 0.5 - np.hypot(x - size / 2, y - size / 2), 0, 1)[..., None]
    return np.concatenate([np.array(color) * (alpha > 0), alpha], 2).astype(np.float32)


def test_photographs_depend_on_seed_and_index_only_and_shares_nest(render):
    settings = replace(SMALL, photographic=1.0)
    first, _, again = (make_sample(RIG, settings, index, render) for index in (2, 3, 2))
    assert torch.equal(first.rgba, again.rgba) and first.extra == again.extra
    other = make_sample(RIG, replace(settings, seed=5), 2, render).extra["photograph"]
    assert other["noise"] != first.extra["photograph"]["noise"]
    cloud = make_mouse(0, 0)

    def photographs(share: float) -> set[int]:
        settings = replace(SMALL, image_size=8, photographic=share)
        made = (make_sample(RIG, settings, index, flat(0.0), lambda *_, **__: cloud) for index in range(60))
        return {index for index, sample in enumerate(made) if "photograph" in sample.extra}

    few, many = photographs(0.3), photographs(0.7)
    assert photographs(0.0) == set() and few < many < photographs(1.0) == set(range(60)) and 8 < len(few) < 28
    index = min(set(range(60)) - many)
    plain, same = (make_sample(RIG, replace(SMALL, photographic=share), index, render) for share in (0.0, 0.7))
    assert torch.equal(plain.rgba, same.rgba) and torch.equal(plain.depth, same.depth) and plain.extra == same.extra


def test_rig_views_change_the_animal_moves_and_the_rest_is_not_touched(clean, render):
    done = photo.photograph(clean, 6, camera(), np.random.default_rng(1))
    assert torch.equal(done.rgba[6:], clean.rgba[6:]) and torch.equal(done.depth, clean.depth)
    assert done.cameras is clean.cameras and done.rgba.min() >= 0 and done.rgba.max() <= 1
    assert all((done.rgba[view] - clean.rgba[view]).abs().max() > 0.05 for view in range(6))
    assert len(done.extra["photograph"]["views"]) == 6 and "photograph" not in clean.extra
    assert json.loads(json.dumps(done.extra["photograph"])) == done.extra["photograph"]
    moved = make_sample(RIG, replace(PLAIN, photographic=1.0), 2, render)
    scale, shift = (moved.extra["photograph"][name] for name in ("scale", "shift"))
    assert torch.equal(moved.cameras.c2w, clean.cameras.c2w)
    assert 0.88 <= scale <= 1.12 and np.abs(shift).max() <= 0.06
    assert np.allclose(moved.extra["keypoints"], np.array(clean.extra["keypoints"]) * scale + shift, atol=2e-3)
    assert moved.extra["body_length"] == pytest.approx(scale * clean.extra["body_length"], rel=1e-4)


@pytest.mark.parametrize("coarse", (1.0, 0.6))
def test_blur_keeps_a_constant_color_over_any_background(coarse):
    color, image = np.array([0.9, 0.5, 0.2], np.float32), disc(64, 20, (0.9, 0.5, 0.2))
    kernel = cv2.getGaussianKernel(9, 1.4) @ cv2.getGaussianKernel(9, 0.7).T
    blurred, alpha = photo.blurred(image, kernel.astype(np.float32), coarse)
    for background in (0.0, 0.4, 1.0):
        over, expected = (c * alpha[..., None] + background * (1 - alpha[..., None]) for c in (blurred, color))
        assert np.abs(over - expected).max() < 2e-3
    assert alpha.sum() == pytest.approx(image[..., 3].sum(), rel=0.02)
    rims = [((a > 0.05) & (a < 0.95)).sum() for a in (alpha, image[..., 3])]
    assert rims[0] > 1.3 * rims[1]


@pytest.mark.parametrize(("value", "grain"), [(0.1, 0.3), (0.9, 0.3), (0.1, 0.8), (0.9, 0.8)])
def test_noise_has_the_stated_level_and_stays_on_the_animal(value, grain):
    settings = camera(noise=0.02, grain=grain)
    noise = settings.noise_on(np.full((200, 200, 3), value, np.float32), np.random.default_rng(0))
    stated = 0.02 * (0.3 + 0.7 * value) ** 0.5
    assert noise.std(axis=(0, 1)) == pytest.approx(np.full(3, stated), rel=0.05)
    neighbors = np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1]
    assert grain < 0.8 or neighbors > 0.2  # grain, not single pixels
    image, _ = photo.photograph_view(disc(96, 20, (0.5, 0.5, 0.5)), settings, np.random.default_rng(0), FAR)
    assert image[:10].max() == 0


def test_mask_moves_within_its_bound_and_both_ways():
    size, radius, (low, high) = 128, 40.0, photo.MASK_SHIFT
    alpha = disc(size, radius, (1, 1, 1))[..., 3]
    y, x = np.mgrid[:size, :size] + 0.5
    distance, moved = radius - np.hypot(x - size / 2, y - size / 2), np.zeros(2)
    for seed in range(30):
        mask, _ = photo.segmented(alpha, 0.3, np.random.default_rng(seed), 1.0, FAR)
        assert (mask[distance < -high - 1.0] == 0).all()  # a pixel of slack: the grid and the ramp
        assert (mask[distance > -low + 1.0] < 1).sum() <= 4 * (photo.HOLE_RADIUS[1] + 1) ** 2  # at most a hole
        moved += (mask - alpha > 0.9).sum(), (alpha - mask > 0.9).sum()
    assert moved.min() > 100


def test_rim_outside_the_animal_takes_the_background():
    settings = camera(background=np.array([0.0, 1.0, 0.0], np.float32), noise=0.0, coarse=1.0, edge_width=0.3)
    image, greens = disc(128, 30, (0.8, 0.1, 0.1)), []
    for seed in range(12):
        done, _ = photo.photograph_view(image, settings, np.random.default_rng(seed), FAR)
        greens += list(done[(done[..., 3] > 0.9) & (image[..., 3] < 0.1), 1])
        assert done[54:74, 54:74, 1][done[54:74, 54:74, 3] > 0.9].max() <= 0.35
    assert len(greens) > 30 and np.median(greens) > 0.5


def test_lost_tails_leave_the_body(clean, monkeypatch):
    made = []
    for probability in (1.0, 0.0):
        monkeypatch.setattr(photo, "TAIL_LOSS_PROBABILITY", probability)
        made.append(photo.photograph(clean, 6, camera(), np.random.default_rng(2)))
    assert all("tail_lost" in view for view in made[0].extra["photograph"]["views"])
    lost, kept = (sample.rgba[:6, 3].sum((1, 2)) for sample in made)
    assert (lost / kept).min() > 0.75 and (lost / kept < 0.99).sum() >= 3


def test_laboratory_light_keeps_the_animal_and_darkens_bellies():
    lights = [laboratory_light(np.random.default_rng(seed)) for seed in range(40)]
    assert any(light.fill == 0 for light in lights) and any(light.fill > 0.1 for light in lights)
    assert all(min(light.key, light.sky, light.ground) > 0 for light in lights)
    assert all(1.0 < light.key + light.sky + light.fill < 1.7 for light in lights)
    first, second = (make_mouse(0, 1, light=replace(lights[0], belly=belly)) for belly in (0.8, 0.0))
    assert np.array_equal(first.means, second.means) and (first.rgb <= second.rgb + 1e-6).all()
    assert first.rgb.mean() < second.rgb.mean()


def test_script_writes_photographs_and_refuses_another_share(script, tmp_path):
    common = ["--output_dir", str(tmp_path), "--num_samples", "1", "--image_size", "32", "--workers", "1"]
    script.main([*common, "--photographic", "1"])
    assert read_dataset_info(tmp_path)["photographic"] == 1.0
    done = read_sample(tmp_path / "sample_000000").extra["photograph"]
    assert len(done["views"]) == 6 and {"scale", "shift", "gain", "gamma", "noise"} <= set(done)
    for other in ([], ["--photographic", "0.5"]):
        with pytest.raises(ValueError, match="photographic: 1.0 there"):
            script.main([*common, *other])


def flat(alpha: float, value: float = 0.0):
    """A renderer that shows the same everywhere."""

    def render(cloud, cameras):
        covered = torch.full((len(cameras), 1, cameras.height, cameras.width), alpha)
        return torch.full_like(covered, value).expand(-1, 3, -1, -1), covered, covered

    return render


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
def test_lens_puts_points_where_the_calibration_projects_them(corner):
    real, plain = (load_real_rig(width=WIDTH, lens=lens)[0] for lens in ("real", "none"))
    assert photo.has_lens(real) and not photo.has_lens(plain)
    place = np.array(load_real_rig()[1]["centre"])[None] + corner
    images, masks = photo.recording_cameras(real, dots(place), background=0.0)(None, 0)
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


def test_noise_and_uneven_light_are_as_stated_and_keyed():
    calibration = load_real_rig(width=WIDTH)[0]
    shoot = photo.recording_cameras(calibration, flat(1.0, 0.7), noise=4.0, seed=3)
    first, again, other = (shoot(None, frame)[0] for frame in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert float(first.std()) == pytest.approx(4.0 / 255 * (0.25 + 0.75 * 0.7) ** 0.5, rel=0.02)
    assert float(first.mean()) == pytest.approx(0.7, abs=1e-3)
    shoot = photo.recording_cameras(calibration, flat(0.0), uneven_light=True)
    walls = shoot(None, 0)[0]
    assert torch.equal(walls, shoot(None, 7)[0]) and (walls[0] - walls[1]).abs().mean() > 0.02
    assert walls.std(dim=(1, 2, 3)).min() > 0.02  # a texture
    assert walls[..., :10, :10].mean() < walls[..., 70:100, 80:110].mean()  # dark corners


def test_truth_is_what_was_shown_and_cut_videos_are_noticed(tmp_path, monkeypatch):
    cloud, folder = make_mouse(0, 0, pose="walk"), tmp_path / "recording"
    calibration, render = load_real_rig(width=64)[0], dots(make_mouse(0, 0).means[:1])
    with monkeypatch.context() as patch:
        patch.setattr("synthetic.dataset.probe", lambda files: SimpleNamespace(num_frames=1))  # as on a full disk
        with pytest.raises(OSError, match="fewer than 2 frames could be written"):
            write_recording(folder, calibration, [cloud, cloud], render)
    assert not list(tmp_path.iterdir())
    write_recording(folder, calibration, [cloud, cloud], render)
    written = json.loads((folder / "truth.json").read_text())
    assert written["keypoint_names"] == list(KEYPOINT_NAMES) and written["frames"][1]["pose"] == cloud.meta
    with np.load(folder / "truth.npz") as arrays:
        assert arrays["surface"].shape == (2, SURFACE_POINTS, 3) and np.isin(arrays["surface"], cloud.means).all()
        np.testing.assert_array_equal(arrays["keypoints"][0], cloud.keypoints)
