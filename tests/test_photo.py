"""Cutting out and framing a photograph."""

import numpy as np
import pytest
import torch

from multiview.image import BODY_AREA, body_placement, prepare_photo, segment


def blob(height, width, cx, cy, radius, *, tail=0):
    """RGBA of a dark disc, with a thin tail to the right; transparent elsewhere."""
    y, x = np.mgrid[:height, :width] + 0.5
    mask = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
    mask |= (np.abs(y - cy) < 0.08 * radius) & (x > cx) & (x < cx + radius + tail)
    rgba = np.zeros((4, height, width), dtype=np.float32)
    rgba[:3], rgba[3] = 0.3, mask
    return torch.from_numpy(rgba)


def test_the_centre_is_the_bodys_centre_of_mass_not_pulled_by_a_tail():
    rgba = blob(200, 300, 100, 100, 40, tail=120)
    _, _, centre = body_placement(rgba[3].numpy() > 0.5)
    assert abs(centre[0] - 100) < 4 and abs(centre[1] - 100) < 1


@pytest.mark.parametrize("radius", [10, 30])
def test_any_photograph_ends_centred_and_at_the_usual_size(radius):
    result, report = prepare_photo(blob(200, 300, 220, 60, radius), 128)
    assert result.shape == (4, 128, 128) and report.cropped and not report.segmented
    assert report.body_area == pytest.approx(BODY_AREA, rel=0.1) and report.centre_offset < 0.02


def test_a_long_tail_is_never_cut_off():
    result, report = prepare_photo(blob(300, 600, 150, 150, 50, tail=300), 128)
    assert report.cropped
    alpha = result[3]
    assert alpha[:, 0].max() == 0 and alpha[:, -1].max() == 0
    assert alpha.sum() / (report.scale**2) == pytest.approx(
        blob(300, 600, 150, 150, 50, tail=300)[3].sum().item(), rel=0.05
    )


def test_a_picture_framed_like_the_training_data_is_left_alone():
    radius = 128 * (BODY_AREA / np.pi) ** 0.5
    rgba = blob(128, 128, 64, 64, radius)
    result, report = prepare_photo(rgba, 128)
    assert not report.cropped and torch.equal(result, rgba)


def test_outline_colours_do_not_bleed_in_from_transparent_pixels():
    result, _ = prepare_photo(blob(512, 512, 256, 256, 100), 128, crop="always")
    assert (result[:3, result[3] > 0.2] - 0.3).abs().max() < 0.02


def photograph(alpha):
    """A dark disc before a pale noisy background, under the given alpha [240, 320], and the disc's mask."""
    truth = blob(240, 320, 160, 120, 50)[3] > 0.5
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.01, (3, 240, 320)).astype(np.float32))
    rgb = (torch.where(truth, 0.25, 0.85).expand(3, -1, -1) + noise).clamp(0, 1)
    return torch.cat([rgb * (alpha > 0), alpha[None]]), truth.numpy()


Y, X = torch.meshgrid(torch.arange(240.0) - 119.5, torch.arange(320.0) - 159.5, indexing="ij")
ALPHAS = {  # none of them is a mask of the animal
    "opaque": torch.ones(240, 320), "a scan at 250 of 255": torch.full((240, 320), 250 / 255),
    "half transparent": torch.full((240, 320), 0.6), "one hole": 1 - ((X - 100).square() + Y.square() < 200).float(),
    "rounded corners": ((X.abs() - 120).clamp_min(0).square() + (Y.abs() - 80).clamp_min(0).square() < 1600).float(),
    "a frame": ((X.abs() < 152) & (Y.abs() < 112)).float(),
}  # fmt: skip


@pytest.mark.parametrize("name", ALPHAS)
def test_a_photograph_whose_alpha_is_no_mask_is_segmented(name, caplog):
    rgba, truth = photograph(ALPHAS[name])
    result, report = prepare_photo(rgba, 128, source="mouse.png")
    assert report.segmented and 0.5 < result[3].sum() / 128**2 / BODY_AREA < 1.5
    assert (name == "opaque") != ("mouse.png: its alpha covers" in caplog.text)
    if name == "opaque":
        mask = segment(rgba[:3].permute(1, 2, 0).numpy()) > 0.5
        assert (mask & truth).sum() / (mask | truth).sum() > 0.95


@pytest.mark.parametrize(
    ("rgba", "crop", "message"),
    [
        (torch.full((4, 64, 64), 1.0), "auto", "a.png: no animal"), (torch.zeros(4, 64, 64), "auto", "no animal"),
        (torch.full((4, 64, 64), 0.3), "auto", "shows no animal"), (torch.rand(4, 64, 64), "x", "crop"),
        (blob(64, 80, 40, 32, 15), "never", "must be square"),
        (torch.rand(4, 2, 3000), "auto", "a.png: has 3000 x 2 pixels, at least 16"),
    ],
)  # fmt: skip
def test_pictures_without_an_animal_are_refused(rgba, crop, message):
    with pytest.raises(ValueError, match=message):
        prepare_photo(rgba, 64, crop=crop, source="a.png")


def test_a_thin_strip_is_segmented_or_refused_but_never_crashes():
    with pytest.raises(ValueError, match="strip.png: no animal"):
        prepare_photo(torch.ones(4, 16, 6000), 64, source="strip.png")
