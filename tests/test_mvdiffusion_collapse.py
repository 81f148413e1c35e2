"""The figure that shows a UNet which copies its input."""

import torch

from multiview.metrics import difference_ratio


def test_copies_score_0_the_truth_1_and_a_half_way_picture_half():
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 4, 1, 16, 16, generator=generator) > 0.7).float()
    targets = 1 - masks + masks * torch.rand(2, 4, 3, 16, 16, generator=generator)
    copies = targets[:, 1:2].expand_as(targets)
    torch.testing.assert_close(difference_ratio(targets, targets, masks, 1), torch.ones(2))
    torch.testing.assert_close(difference_ratio(copies, targets, masks, 1), torch.zeros(2))
    torch.testing.assert_close(difference_ratio((targets + copies) / 2, targets, masks, 1), torch.full((2,), 0.5))
    noisy_reference = targets.clone()
    noisy_reference[:, 1] = 0.3  # the painted reference view itself does not count
    torch.testing.assert_close(difference_ratio(noisy_reference, targets, masks, 1), torch.ones(2))
