"""Metrics against values computed by hand."""

import pytest
import torch

from multiview.metrics import (
    difference_ratio,
    foreground_psnr,
    foreground_ssim,
    load_lpips,
    lpips_distances,
    mask_from_white,
    mask_iou,
    psnr,
    ssim,
)


def test_psnr_and_its_foreground_form():
    target = torch.ones(2, 3, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :2, :2] = 1
    prediction = target - 0.1 * mask
    assert torch.allclose(foreground_psnr(prediction, target, mask), torch.full((2,), 20.0), atol=1e-3)
    assert torch.allclose(psnr(prediction, target), torch.full((2,), 20.0 + 12.041), atol=1e-2)
    with pytest.raises(ValueError, match="empty"):
        foreground_psnr(prediction, target, mask * 0)


def test_mask_iou():
    a, b = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    a[:, :2], b[:, 1:3] = 1, 1
    assert mask_iou(a, b) == pytest.approx(1 / 3) and mask_iou(a, a) == 1 and mask_iou(a * 0, b * 0) == 1


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    picture = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ssim(picture, picture), torch.ones(2), atol=1e-5)
    assert (ssim(picture, 1 - picture) < 0.2).all()


def test_foreground_ssim_looks_inside_the_mask_only():
    target = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 48, 48)
    mask[..., :12, :12] = 1
    prediction = target.clone()
    prediction[..., 30:, 30:] = 0.5  # more than a window away from the mask
    assert torch.allclose(foreground_ssim(prediction, target, mask), torch.ones(2), atol=1e-5)
    assert (ssim(prediction, target) < 0.95).all()
    assert torch.allclose(foreground_ssim(prediction, target, torch.ones_like(mask)), ssim(prediction, target))
    with pytest.raises(ValueError, match="foreground_ssim: a mask is empty"):
        foreground_ssim(prediction, target, mask * 0)


def test_mask_from_white_keeps_a_pale_animal_and_halves_a_dark_ones_rim():
    picture = torch.ones(2, 3, 128, 128)
    picture[0, :, 40:80, 40:80] = 0.9
    picture[1, :, 38:82, 38:82] = 0.8  # the blurred rim
    picture[1, :, 40:80, 40:80] = 0.1
    truth = torch.zeros(1, 128, 128)
    truth[:, 40:80, 40:80] = 1
    assert torch.equal(mask_from_white(picture), truth.expand(2, 1, 128, 128))
    assert mask_from_white(torch.ones(3, 8, 8)).sum() == 0


def test_lpips_without_weights_names_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match="vgg16-397923af.pth"):
        load_lpips(path=tmp_path / "vgg16-397923af.pth")


def test_lpips_reads_its_backbone_from_disk(tmp_path):
    from torchvision.models import vgg16

    torch.manual_seed(0)
    torch.save(vgg16(weights=None).state_dict(), tmp_path / "vgg.pth")
    network = load_lpips(path=tmp_path / "vgg.pth")
    a, b = torch.rand(1, 3, 64, 64) * 2 - 1, torch.rand(1, 3, 64, 64) * 2 - 1
    assert network(a, a).item() == pytest.approx(0, abs=1e-6) and network(a, b).item() > 0
    pair = torch.stack([a, b])[None, :, 0] / 2 + 0.5  # [1, 2, 3, h, w]
    mask = torch.zeros(1, 2, 1, 64, 64)
    mask[..., :8] = 1
    changed = pair.clone()
    changed[..., 40:] = 0
    whole, inside = lpips_distances(network, changed, pair, mask)
    assert whole.shape == inside.shape == (1, 2) and (whole > 0).all()
    assert whole[0, 0].item() == pytest.approx(network(changed[:, 0] * 2 - 1, pair[:, 0] * 2 - 1).item(), rel=1e-5)
    assert (inside < whole).all()  # what changed is far from the mask
    stored = torch.load(tmp_path / "vgg.pth", weights_only=True)
    assert torch.equal(network.net.slice1[0].weight, stored["features.0.weight"])


def test_copies_score_0_the_truth_1_and_a_half_way_picture_half():
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 4, 1, 16, 16, generator=generator) > 0.7).float()
    targets = 1 - masks + masks * torch.rand(2, 4, 3, 16, 16, generator=generator)
    copies = targets[:, 1:2].expand_as(targets)
    torch.testing.assert_close(difference_ratio(targets, targets, masks, 1), torch.ones(2))
    torch.testing.assert_close(difference_ratio(copies, targets, masks, 1), torch.zeros(2))
    torch.testing.assert_close(difference_ratio((targets + copies) / 2, targets, masks, 1), torch.full((2,), 0.5))
    noisy_reference = targets.clone()
    noisy_reference[:, 1] = 0.3  # the generated reference view itself does not count
    torch.testing.assert_close(difference_ratio(noisy_reference, targets, masks, 1), torch.ones(2))
