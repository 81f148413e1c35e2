"""Metrics against values computed by hand."""

import numpy as np
import pytest
import torch

from multiview import metrics


def test_psnr_and_its_foreground_form():
    target = torch.ones(2, 3, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :2, :2] = 1
    prediction = target - 0.1 * mask
    assert torch.allclose(metrics.foreground_psnr(prediction, target, mask), torch.full((2,), 20.0), atol=1e-3)
    assert torch.allclose(metrics.psnr(prediction, target), torch.full((2,), 20.0 + 12.041), atol=1e-2)
    with pytest.raises(ValueError, match="empty"):
        metrics.foreground_psnr(prediction, target, mask * 0)


def test_mask_iou():
    a, b = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    a[:, :2], b[:, 1:3] = 1, 1
    assert metrics.mask_iou(a, b) == pytest.approx(1 / 3)
    assert metrics.mask_iou(a, a) == metrics.mask_iou(a * 0, b * 0) == 1


def test_ssim_is_that_of_its_paper_and_its_foreground_form_looks_inside_the_mask_only():
    target = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(metrics.ssim(target, target), torch.ones(2), atol=1e-5)
    assert (metrics.ssim(target, 1 - target) < 0.2).all()
    axis = np.exp(-(((np.arange(11) - 5) / 1.5) ** 2) / 2)  # by hand, around pixel (20, 9)
    x, y = (image[1, 2, 15:26, 4:15].double().numpy() for image in (target, target**2))
    window = np.outer(axis, axis) / axis.sum() ** 2
    mx, my, xx, yy, xy = ((window * values).sum() for values in (x, y, x * x, y * y, x * y))
    top = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
    expected = top / ((mx**2 + my**2 + 1e-4) * (xx - mx**2 + yy - my**2 + 9e-4))
    assert metrics.ssim_map(target, target**2)[1, 2, 20, 9].item() == pytest.approx(expected, rel=1e-4)
    mask, prediction = torch.zeros(2, 1, 48, 48), target.clone()
    mask[..., :12, :12] = 1
    prediction[..., 30:, 30:] = 0.5  # more than a window away from the mask
    assert torch.allclose(metrics.foreground_ssim(prediction, target, mask), torch.ones(2), atol=1e-5)
    assert (metrics.ssim(prediction, target) < 0.95).all()
    everywhere = metrics.foreground_ssim(prediction, target, torch.ones_like(mask))
    assert torch.allclose(everywhere, metrics.ssim(prediction, target))
    with pytest.raises(ValueError, match="foreground_ssim: a mask is empty"):
        metrics.foreground_ssim(prediction, target, mask * 0)


def test_mask_from_white_keeps_a_pale_animal_and_halves_a_dark_ones_rim():
    picture = torch.ones(2, 3, 128, 128)
    picture[0, :, 40:80, 40:80] = 0.9
    picture[1, :, 38:82, 38:82] = 0.8  # the blurred rim
    picture[1, :, 40:80, 40:80] = 0.1
    truth = torch.zeros(1, 128, 128)
    truth[:, 40:80, 40:80] = 1
    assert torch.equal(metrics.mask_from_white(picture), truth.expand(2, 1, 128, 128))
    assert metrics.mask_from_white(torch.ones(3, 8, 8)).sum() == 0


def test_lpips_reads_its_backbone_from_disk_or_names_it(tmp_path):
    from torchvision.models.vgg import cfgs, make_layers

    with pytest.raises(ValueError, match="vgg16-397923af.pth"):
        metrics.load_lpips(path=tmp_path / "vgg16-397923af.pth")
    torch.manual_seed(0)
    stored = {f"features.{name}": tensor for name, tensor in make_layers(cfgs["D"]).state_dict().items()}
    torch.save(stored, tmp_path / "vgg.pth")
    network = metrics.load_lpips(path=tmp_path / "vgg.pth")
    assert torch.equal(network.net.slice1[0].weight, stored["features.0.weight"])
    pair, mask = torch.rand(1, 2, 3, 64, 64), torch.zeros(1, 2, 1, 64, 64)
    mask[..., :8] = 1
    changed = pair.clone()
    changed[..., 40:] = 0
    a, b = changed[:, 0] * 2 - 1, pair[:, 0] * 2 - 1
    assert network(a, a).item() == pytest.approx(0, abs=1e-6) and network(a, b).item() > 0
    whole, inside = metrics.lpips_distances(network, changed, pair, mask)
    assert whole.shape == inside.shape == (1, 2) and (whole > 0).all()
    assert whole[0, 0].item() == pytest.approx(network(a, b).item(), rel=1e-5)
    assert (inside < whole).all()  # what changed is far from the mask


def test_copies_score_0_the_truth_1_and_a_half_way_picture_half():
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 4, 1, 16, 16, generator=generator) > 0.7).float()
    targets = 1 - masks + masks * torch.rand(2, 4, 3, 16, 16, generator=generator)
    copies = targets[:, 1:2].expand_as(targets)
    noisy_reference = targets.clone()
    noisy_reference[:, 1] = 0.3  # the generated reference view itself does not count
    for views, ratio in ((targets, 1.0), (copies, 0.0), ((targets + copies) / 2, 0.5), (noisy_reference, 1.0)):
        torch.testing.assert_close(metrics.difference_ratio(views, targets, masks, 1), torch.full((2,), ratio))
