"""Stage 2's losses against formulas written out anew, in float64 loops where the loss is short."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gslrm import losses as loss_functions
from gslrm.config import GSLRMConfig, LossesConfig, check_config
from gslrm.model.gaussians import Gaussians
from gslrm.model.gslrm import GSLRMOutput
from multiview.config import load_config
from multiview.rig import load_rig

B, T, SIZE = 2, 3, 24


def images(seed: int, channels: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.rand(B, T, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_mask(size: int = SIZE) -> torch.Tensor:
    """Soft-edged, of another size in every view; empty in the last view of sample 1."""
    mask = torch.zeros(B, T, 1, size, size, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            mask[b, t, :, 5 : 9 + 3 * t, 4 + b : 16] = torch.rand(
                4 + 3 * t, 12 - b, generator=torch.Generator().manual_seed(10 * b + t), dtype=torch.float64
            )
    mask[1, -1] = 0
    return mask


pytestmark = pytest.mark.usefixtures("one_thread")


def test_l2_plain_and_masked():
    a, b, mask = images(0), images(1), soft_mask()
    plain, masked = loss_functions.l2_loss(a, b), loss_functions.l2_loss(a, b, mask)
    x, y, m = a.numpy(), b.numpy(), mask.numpy()
    for i in range(B):
        assert plain[i].item() == pytest.approx(np.mean((x[i] - y[i]) ** 2), rel=1e-9)
        top = sum((m[i, t, 0] * ((x[i, t] - y[i, t]) ** 2).mean(0)).sum() for t in range(T))
        assert masked[i].item() == pytest.approx(top / m[i].sum(), rel=1e-9)


def ssim_at(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of one 11 x 11 window (Wang et al. 2004)."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
    covariance = (window * (x - mx) * (y - my)).sum()
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mx * my + c1) * (2 * covariance + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


def test_ssim_plain_and_masked():
    size = 14
    a, mask = images(0, size=size), soft_mask(SIZE)[..., 2:16, 2:16]
    b = 0.6 * a + 0.4 * images(1, size=size)
    plain, masked = loss_functions.ssim_loss(a, b), loss_functions.ssim_loss(a, b, mask)
    x, y, m = a.numpy(), b.numpy(), mask.numpy()
    centres = [(r, c) for r in range(5, size - 5) for c in range(5, size - 5)]
    for i in range(B):
        total, top, bottom = [], 0.0, 0.0
        for t in range(T):
            for r, c in centres:
                window = np.s_[r - 5 : r + 6, c - 5 : c + 6]
                value = np.mean([ssim_at(x[i, t, k][window], y[i, t, k][window]) for k in range(3)])
                total.append(value)
                top, bottom = top + m[i, t, 0, r, c] * value, bottom + m[i, t, 0, r, c]
        assert plain[i].item() == pytest.approx(1 - np.mean(total), abs=1e-9)
        assert masked[i].item() == pytest.approx(1 - top / bottom, abs=1e-9)


def test_ssim_of_flat_areas_stays_within_0_and_1():
    """Rounding in float32 made it negative once."""
    noise, mask = images(3).float(), soft_mask().float()
    for gray in (0.0, 0.3, 0.7, 1.0):
        for scale in (0.0, 1e-8, 1e-7, 1e-5):
            a, b = gray + scale * noise, gray + scale * noise.flip(-1)
            for weight in (None, mask, torch.zeros_like(mask)):
                value = loss_functions.ssim_loss(a, b, weight)
                assert (value >= 0).all() and (value <= 1).all()
    opposite = loss_functions.ssim_loss(noise, 1 - noise)  # SSIM itself is negative here
    assert torch.equal(opposite, torch.ones(B))


def output_of(seed: int = 0, b: int = B, v: int = 2, size: int = 8, keep: torch.Tensor | None = None) -> GSLRMOutput:
    """Random points near the rays of two cameras; keep [b, v*size*size] bool: a pruned model's output, padded."""
    generator = torch.Generator().manual_seed(seed)
    origins, directions = (x.double().flatten(0, 2) for x in load_rig("mouse6").cameras(size)[:v].rays())
    k = v * size * size
    along = 2.5 + 0.4 * torch.rand(b, k, 1, generator=generator, dtype=torch.float64)
    xyz = origins + along * directions + 0.1 * torch.randn(b, k, 3, generator=generator, dtype=torch.float64)
    index, valid = torch.arange(k).expand(b, -1), torch.ones(b, k, dtype=torch.bool)
    if keep is not None:
        count = keep.sum(1)
        index = torch.argsort((~keep).int(), dim=1, stable=True)[:, : int(count.max())]
        valid = torch.arange(index.shape[1])[None] < count[:, None]
        xyz = xyz.gather(1, index[..., None].expand(-1, -1, 3))
    k = index.shape[1]
    gaussians = Gaussians(
        xyz=xyz, features=torch.zeros(b, k, 1, 3), scaling=torch.zeros(b, k, 3), rotation=torch.ones(b, k, 4),
        opacity=torch.zeros(b, k, 1),
    )  # fmt: skip
    return GSLRMOutput(gaussians, index, valid, origins[index], directions[index], 0, (v, size, size))


def input_mask(b: int = B, v: int = 2, size: int = 8) -> torch.Tensor:
    """[b, v, 1, size, size]: soft, more than half above 0.5; empty in view 1 of sample 1."""
    mask = torch.zeros(b, v, 1, size, size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(9)
    mask[..., 2:7, 1:6] = torch.rand(b, v, 1, 5, 5, generator=generator, dtype=torch.float64) ** 0.5
    mask[1, 1] = 0
    return mask


def test_pixelalign_plain_masked_and_both_normalisations():
    output, mask = output_of(), input_mask()
    plain = loss_functions.pixelalign_loss(output)
    upstream = loss_functions.pixelalign_loss(output, mask)
    foreground = loss_functions.pixelalign_loss(output, mask, "foreground")
    for i in range(B):
        distances = []
        rays = output.ray_origins[i].numpy(), output.ray_directions[i].numpy()
        for xyz, o, d in zip(output.gaussians.xyz[i].numpy(), *rays):
            distances.append(np.linalg.norm(np.cross(xyz - o, d)))  # the distance of a point from a line
        distances, weights = np.array(distances), mask[i].flatten().numpy()
        assert plain[i].item() == pytest.approx(distances.mean(), rel=1e-6)
        assert upstream[i].item() == pytest.approx((weights * distances).mean(), rel=1e-6)
        assert foreground[i].item() == pytest.approx((weights * distances).sum() / weights.sum(), rel=1e-6)


def test_pointsdist_plain_and_masked():
    output, mask = output_of(), input_mask()
    plain, masked = loss_functions.pointsdist_loss(output), loss_functions.pointsdist_loss(output, mask)
    for i in range(B):
        distance = np.linalg.norm((output.gaussians.xyz[i] - output.ray_origins[i]).numpy(), axis=-1).reshape(2, 64)
        camera = np.linalg.norm(output.ray_origins[i].numpy(), axis=-1).reshape(2, 64)
        for value, chosen in ((plain[i], np.ones((2, 64), bool)), (masked[i], mask[i].flatten(1).numpy() > 0.5)):
            errors = []
            for v in range(2):
                seen = distance[v][chosen[v]]
                if len(seen):
                    target = (seen - seen.mean()) / (seen.std(ddof=1) + 1e-8) * 0.5 + camera[v][chosen[v]]
                    errors += list((seen - target) ** 2)
            assert value.item() == pytest.approx(np.mean(errors), rel=1e-6)


def test_masked_losses_on_gaussians_do_not_depend_on_pruning():
    mask = input_mask()
    keep = torch.nn.functional.max_pool2d((mask > 0).double().flatten(0, 1), 3, 1, 1).view(B, -1) > 0
    dense, pruned = output_of(), output_of(keep=keep)
    assert not pruned.pixel_valid.all() and pruned.pixel_index.shape[1] < dense.pixel_index.shape[1]
    for function, options in (
        (loss_functions.pixelalign_loss, ("upstream",)), (loss_functions.pixelalign_loss, ("foreground",)),
        (loss_functions.pointsdist_loss, ()),
    ):  # fmt: skip
        assert torch.allclose(function(dense, mask, *options), function(pruned, mask, *options), rtol=1e-12)


def test_losses_on_gaussians_have_finite_gradients_on_the_ray_and_at_the_camera():
    """Where a length is 0 it has no derivative; points on their ray are the rule with hard pixel alignment."""
    output = output_of()
    xyz = (output.ray_origins + 2.7 * output.ray_directions).clone()
    xyz[:, :9] = output.ray_origins[:, :9]
    xyz[:, 9:12] = xyz[:, 9:12] + 1e-200
    for mask in (None, input_mask(), torch.zeros(B, 2, 1, 8, 8, dtype=torch.float64)):
        for function in (loss_functions.pixelalign_loss, loss_functions.pointsdist_loss):
            points = xyz.clone().requires_grad_()
            value = function(replace(output, gaussians=replace(output.gaussians, xyz=points)), mask)
            value.sum().backward()
            assert torch.isfinite(value).all() and torch.isfinite(points.grad).all()
            assert mask is None or mask.any() or (value == 0).all()


def test_every_loss_and_mask_option_reaches_the_total():
    """total_loss with one loss at a time, its mask off and on, against the function itself."""
    rgb, truth, alpha, mask = images(0), images(1), images(2, 1), soft_mask()
    networks = {
        "lpips": lambda a, b, m: 3 * loss_functions.l2_loss(a, b, m),
        "perceptual": lambda a, b, m: 5 * loss_functions.l2_loss(a, b, m),
    }
    output, seen, unused = output_of(), input_mask(), None
    batch = loss_functions.Batch(unused, unused, seen, unused, unused, truth, mask, unused)

    def one(name, losses):
        total, parts = loss_functions.total_loss(
            {name: 2.0}, losses, output, batch, rgb=rgb, alpha=alpha, networks=networks
        )
        assert total.ndim == 0 and list(parts) == [name] and torch.allclose(total, 2 * parts[name])
        return parts[name]

    direct = {
        "l2": lambda m, _: loss_functions.l2_loss(rgb, truth, m),
        "ssim": lambda m, _: loss_functions.ssim_loss(rgb, truth, m),
        "lpips": lambda m, _: networks["lpips"](rgb, truth, m),
        "perceptual": lambda m, _: networks["perceptual"](rgb, truth, m),
        "pixelalign": lambda _, s: loss_functions.pixelalign_loss(output, s),
        "pointsdist": lambda _, s: loss_functions.pointsdist_loss(output, s),
    }
    assert set(direct) == loss_functions.MASKABLE
    for name, function in direct.items():
        values = []
        for on in (False, True):
            options = replace(LossesConfig(masked_pixelalign_loss=False), **{f"masked_{name}_loss": on})
            expected = function(mask if on else None, seen if on else None).mean()
            assert torch.allclose(one(name, options), expected)
            values.append(expected)
        assert not torch.allclose(*values)
    expected = loss_functions.pixelalign_loss(output, seen, "foreground").mean()
    assert torch.allclose(one("pixelalign", LossesConfig(pixelalign_normalisation="foreground")), expected)
    assert torch.allclose(one("alpha", LossesConfig()), (alpha - mask).square().mean())
    assert torch.allclose(one("background", LossesConfig()), loss_functions.l2_loss(rgb, truth, 1 - mask).mean())


def test_masked_losses_do_not_see_the_background_and_are_0_without_foreground():
    a, b, mask = images(0), images(1), torch.zeros(B, T, 1, SIZE, SIZE, dtype=torch.float64)
    mask[0, :, :, 3:7, 2:9] = 1.0
    value = loss_functions.l2_loss(a, b, mask)
    assert torch.equal(loss_functions.l2_loss(torch.where(mask > 0, a, 0.5), b, mask), value)
    assert value[0] > 0 and value[1] == 0
    pale = a.clone().requires_grad_()
    loss_functions.ssim_loss(pale, b, mask).sum().backward()
    assert torch.isfinite(pale.grad).all()


def test_loss_weights_follow_the_warm_ups():
    losses = LossesConfig(direct_loss_weight=1.0, direct_loss_weight_after=0.15, direct_warmup_steps=10)
    assert loss_functions.loss_weights(losses, 9) == {"direct": 1.0}
    assert loss_functions.loss_weights(losses, 10, l2_warmup_steps=20) == {"l2": 1.0, "ssim": 0.2, "direct": 0.15}
    assert {"lpips", "perceptual"} <= set(loss_functions.loss_weights(losses, 20, l2_warmup_steps=20))
    facelift = LossesConfig(ssim_loss_weight=0, lpips_loss_weight=0, warmup_pointsdist=True)
    assert loss_functions.loss_weights(facelift, 999) == {"pointsdist": 0.1}
    assert loss_functions.loss_weights(facelift, 1000) == {"l2": 1.0, "perceptual": 0.5}


def test_pruning_takes_only_the_masked_points_distance():
    settings = ["model.prune_background_tokens=true", "training.losses.warmup_pointsdist=true"]
    with pytest.raises(ValueError, match="masked_pointsdist_loss=true"):
        check_config(load_config(GSLRMConfig, None, settings))
    check_config(load_config(GSLRMConfig, None, [*settings, "training.losses.masked_pointsdist_loss=true"]))
    with pytest.raises(ValueError, match="expected one of .*'upstream', 'foreground'.*pixelalign_normalisation"):
        load_config(GSLRMConfig, None, ["training.losses.pixelalign_normalisation=pixels"])
