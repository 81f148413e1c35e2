"""What a filmed recording adds to renderings: exact lenses, honest noise, light that stands still, the truth."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from recording.film import SURFACE_POINTS, Film, FilmConditions, Truth, has_lens
from recording.write import load_real_rig
from synthetic.cloud import KEYPOINT_NAMES, SplatCloud

WIDTH = 192


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
    pictures, masks = Film(real, dots(place), FilmConditions(background=0.0))(None, 0)
    expected = real.project(place)[:, 0]
    width, height = real.sizes[0]
    rows, columns = np.mgrid[:height, :width] + 0.5
    for light, (x, y) in zip(pictures[:, 0].double().numpy(), expected, strict=True):
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

    film = Film(flat, white, FilmConditions(noise=4.0, seed=3))
    first, again, other = film(None, 0)[0], film(None, 0)[0], film(None, 1)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    expected = 4.0 / 255 * (0.25 + 0.75 * 0.7) ** 0.5
    assert float(first.std()) == pytest.approx(expected, rel=0.02)
    assert float(first.mean()) == pytest.approx(0.7, abs=1e-3)


def test_uneven_light_stands_still_and_differs_between_cameras():
    flat = load_real_rig(width=WIDTH)[0]

    def nothing(cloud, cameras):
        shape = (len(cameras), 1, cameras.height, cameras.width)
        return torch.zeros(shape[0], 3, *shape[2:]), torch.zeros(shape)

    film = Film(flat, nothing, FilmConditions(uneven_light=True))
    first = film(None, 0)[0]
    assert torch.equal(first, film(None, 7)[0])
    assert first.std(dim=(1, 2, 3)).min() > 0.02  # a texture
    assert (first[0] - first[1]).abs().mean() > 0.02
    corner, middle = first[..., :10, :10].mean(), first[..., 70:100, 80:110].mean()
    assert corner < middle  # dark corners


def test_truth_is_what_was_shown(tmp_path):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(1500, 3)).astype(np.float32)
    cloud = SplatCloud(
        means=means, log_scales=means, quats=np.ones((1500, 4), np.float32), opacity=means[:, 0], rgb=means,
        centre=means[0], keypoints=means[: len(KEYPOINT_NAMES)], body_length=70.0, meta={"pose": "walk"},
    )  # fmt: skip
    truth = Truth(0)
    truth.add(cloud)
    truth.add(cloud)
    truth.write(tmp_path, unit="mm")
    written = json.loads((tmp_path / "truth.json").read_text())
    assert written["keypoint_names"] == list(KEYPOINT_NAMES) and written["frames"][1]["pose"] == {"pose": "walk"}
    with np.load(tmp_path / "truth.npz") as arrays:
        assert arrays["surface"].shape == (2, SURFACE_POINTS, 3)
        assert np.isin(arrays["surface"], means).all()
        np.testing.assert_array_equal(arrays["keypoints"][0], cloud.keypoints)
