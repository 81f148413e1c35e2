"""Stage 2's losses: pure functions from predictions and targets to per-sample values.
Every function returns [b], normalized inside its sample, so that one process and several see the same mean. Each exists
plain and masked by the true alpha of the target views (of the input views for the losses on Gaussians): the
alpha-weighted mean over the sample's pixels, and 0 where no pixel is foreground.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gslrm.config import LossesConfig
from gslrm.model.gaussians import C0
from gslrm.model.gslrm import GSLRMOutput
from multiview.cameras import Cameras

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
POINTSDIST_WARMUP_STEPS, POINTSDIST_WARMUP_WEIGHT = 1000, 0.1
NAMES = ("l2", "lpips", "perceptual", "ssim", "alpha", "background", "pixelalign", "pointsdist")
NEEDS_RENDERING = set(NAMES[:6])
MASKABLE = set(NAMES) - {"alpha", "background"}
FOREGROUND_ALPHA = 0.5  # above it a pixel counts as the animal's where a pixel either counts or not
POINTSDIST_SPREAD = 0.5  # world units of target standard deviation
# Inside the direct loss: world units of surface error, color, opacity and scale brought to like size.
DIRECT_PARTS = {"xyz": 4.0, "colour": 2.0, "opacity": 0.2, "scale": 0.1}


class Batch(NamedTuple):
    """A collated batch on the device: what the model sees (b samples of v views), and what it is measured by."""

    cameras: Cameras  # [b, v] of the inputs, as the model is told them
    input_rgb: Tensor  # [b, v, 3, h, w], 0..1, as the next one
    input_alpha: Tensor
    input_depth: Tensor | None  # [b, v, 1, h, w] camera-frame z, 0 = none
    target_cameras: Cameras  # [b, t]
    rgb: Tensor  # [b, t, 3, h, w] of the rendered views, 0..1, composited like the rendering
    alpha: Tensor  # [b, t, 1, h, w]
    background: Tensor  # [b, 3]


def loss_weights(losses: LossesConfig, step: int, *, l2_warmup_steps: int = 0) -> dict[str, float]:
    """The weight of every loss above 0 in an iteration; l2_warmup_steps are without LPIPS and perceptual loss."""
    weights = {name: getattr(losses, f"{name}_loss_weight") for name in NAMES}
    weights["direct"] = losses.direct_loss_weight_after if losses.direct_warmup_steps else losses.direct_loss_weight
    if losses.warmup_pointsdist and step < POINTSDIST_WARMUP_STEPS:
        weights.update(l2=0.0, perceptual=0.0, pointsdist=POINTSDIST_WARMUP_WEIGHT)
    if step < l2_warmup_steps:
        weights.update(perceptual=0.0, lpips=0.0)
    if step < losses.direct_warmup_steps:
        weights = {"direct": losses.direct_loss_weight}
    return {name: weight for name, weight in weights.items() if weight > 0}


def total_loss(
    weights: dict[str, float], losses: LossesConfig, output: GSLRMOutput, targets: Batch, *,
    rgb: Tensor | None, alpha: Tensor | None, networks: dict[str, nn.Module],
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Weighted sum and the parts, unweighted (scalars). rgb, alpha: [b, t, 3|1, h, w] rendered; None when no loss of
    `weights` needs them. networks: `lpips`, `perceptual` (gslrm.perceptual.load_networks)."""
    compute = {
        "l2": lambda mask, _: l2_loss(rgb, targets.rgb, mask),
        "ssim": lambda mask, _: ssim_loss(rgb, targets.rgb, mask),
        "alpha": lambda *_: l2_loss(alpha, targets.alpha),
        "background": lambda *_: l2_loss(rgb, targets.rgb, 1.0 - targets.alpha),
        "lpips": lambda mask, _: networks["lpips"](rgb, targets.rgb, mask),
        "perceptual": lambda mask, _: networks["perceptual"](rgb, targets.rgb, mask),
        "pixelalign": lambda _, mask: pixelalign_loss(output, mask, losses.pixelalign_normalisation),
        "pointsdist": lambda _, mask: pointsdist_loss(output, mask),
    }
    parts: dict[str, Tensor] = {}
    for name in weights:
        if name == "direct":
            parts |= {f"direct_{part}": x for part, x in direct_losses(output, targets, losses.direct_scale_px).items()}
            parts[name] = sum(weight * parts[f"direct_{part}"] for part, weight in DIRECT_PARTS.items())
        else:
            masked = name in MASKABLE and getattr(losses, f"masked_{name}_loss")
            parts[name] = compute[name](*((targets.alpha, targets.input_alpha) if masked else (None, None)))
    means = {name: value.mean() for name, value in parts.items()}
    return sum(weight * means[name] for name, weight in weights.items()), means


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Sum(values * weight) / sum(weight) per sample: [b, ...] -> [b]; 0 where all weights are 0."""
    weight = weight.expand_as(values)
    return (values * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-6)


def l2_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error per sample [b]; with a mask [b, t, 1, h, w] over its pixels only."""
    error = (prediction - target).square()
    return error.flatten(1).mean(1) if mask is None else weighted_mean(error.mean(2, keepdim=True), mask)


def ssim_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - SSIM per sample [b], in 0..1 (Gaussian window 11, sigma 1.5, no padding); a mask is taken at its centers."""
    a, b = prediction.flatten(0, 1), target.flatten(0, 1)
    offsets = torch.arange(SSIM_WINDOW, dtype=a.dtype, device=a.device) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    window = window / window.sum()
    # A channel and group for every map: on a CPU a tenth of the time that images of one channel each take.
    maps = torch.cat([a, b, a * a, b * b, a * b], dim=1)
    for axis in ((1, -1), (-1, 1)):
        kernel = window.view(1, 1, *axis).expand(maps.shape[1], -1, -1, -1)
        maps = functional.conv2d(maps, kernel, groups=maps.shape[1])
    mu_a, mu_b, aa, bb, ab = maps.chunk(5, dim=1)
    # Rounding makes variances of flat areas negative, and SSIM then leaves [-1, 1].
    var_a, var_b = (aa - mu_a**2).clamp_min(0.0), (bb - mu_b**2).clamp_min(0.0)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    ssim = luminance * (2 * (ab - mu_a * mu_b) + c2) / (var_a + var_b + c2)
    ssim = ssim.unflatten(0, prediction.shape[:2])
    if mask is None:
        return 1.0 - ssim.flatten(1).mean(1).clamp(0.0, 1.0)
    border = SSIM_WINDOW // 2
    return 1.0 - weighted_mean(ssim.mean(2, keepdim=True), mask[..., border:-border, border:-border]).clamp(0.0, 1.0)


def pixelalign_loss(output: GSLRMOutput, input_alpha: Tensor | None = None, normalisation: str = "upstream") -> Tensor:
    """Mean distance [b] of each image Gaussian from its pixel's ray. input_alpha: [b, v, 1, h, w] weights.
    normalisation of the weighted form: `upstream` divides by the number of all pixels of the input views (FaceLift's: a
    small animal has a small loss), `foreground` by the sum of the weights."""
    # The point on the ray is held fixed, so the gradient points straight at the ray (zero on it).
    offset = output.pixel_xyz - output.ray_origins
    along = (offset.detach() * output.ray_directions).sum(-1, keepdim=True)
    distance = (offset - along * output.ray_directions).norm(dim=-1)
    present = output.pixel_valid.to(distance)
    if input_alpha is None:
        return weighted_mean(distance, present)
    weight = present * pixels_of(input_alpha, output)[..., 0]
    if normalisation == "foreground":
        return weighted_mean(distance, weight)
    return (distance * weight).sum(1) / math.prod(output.shape)


def pointsdist_loss(output: GSLRMOutput, input_alpha: Tensor | None = None) -> Tensor:
    """Spreads the points of each view around the camera's distance to the origin (mean squared error [b]): the target
    of a point is its distance from the camera, standardized over its view (corrected standard deviation), times
    POINTSDIST_SPREAD, plus the camera's distance from the origin. input_alpha: [b, v, 1, h, w]: over the pixels with
    alpha above 0.5 alone, as a model must that prunes the background: its pixels are no fair sample of a view."""
    distance = (output.pixel_xyz - output.ray_origins).norm(dim=-1)
    chosen = output.pixel_valid
    if input_alpha is not None:
        chosen = chosen & (pixels_of(input_alpha, output)[..., 0] > FOREGROUND_ALPHA)
    with torch.no_grad():
        v, h, w = output.shape
        view, weight = output.pixel_index // (h * w), chosen.double()

        def per_view(values: Tensor) -> Tensor:  # sums of [b, k] by view number: [b, v]
            return values.new_zeros(len(values), v).scatter_add(1, view, values)

        count = per_view(weight)
        mean = per_view(weight * distance) / count.clamp_min(1.0)
        centered = distance - mean.gather(1, view)
        variance = per_view(weight * centered.square()) / (count - 1.0).clamp_min(1.0)
        standardized = centered / (variance.sqrt().gather(1, view) + 1e-8)
        target = (standardized * POINTSDIST_SPREAD).to(distance) + output.ray_origins.norm(dim=-1)
    return weighted_mean((distance - target).square(), weight.to(distance))


def direct_losses(output: GSLRMOutput, targets: Batch, scale_px: float) -> dict[str, Tensor]:
    """Image Gaussians against the surface that depth maps show, without rendering; each value [b]. Over foreground
    pixels xyz: L1 to the true point; color: MSE; scale: L1 of the log-scale to `scale_px` pixel footprints; over all
    that have a Gaussian opacity: cross-entropy to the mask."""
    gaussians, n = output.gaussians, output.n_free
    v, h, w = output.shape
    view = (output.pixel_index // (h * w))[..., None]
    forward = targets.cameras.c2w[..., :3, 2].gather(1, view.expand(-1, -1, 3))
    focal = targets.cameras.fxfycxcy[..., 0].gather(1, view[..., 0])[..., None]
    rgb, alpha, depth = (pixels_of(x, output) for x in (targets.input_rgb, targets.input_alpha, targets.input_depth))
    present = output.pixel_valid[..., None].to(rgb)
    surface = present * (alpha > FOREGROUND_ALPHA) * (depth > 0)
    distance = depth / (output.ray_directions * forward).sum(-1, keepdim=True)
    truth = output.ray_origins + distance * output.ray_directions
    log_scale = torch.log(scale_px * depth.clamp_min(1e-3) / focal)
    color = gaussians.features[:, n:, 0] * C0 + 0.5
    opacity = functional.binary_cross_entropy_with_logits(gaussians.opacity[:, n:], alpha, reduction="none")
    return {
        "xyz": weighted_mean((gaussians.xyz[:, n:] - truth).abs(), surface),
        "colour": weighted_mean((color - rgb).square(), surface),
        "opacity": weighted_mean(opacity, present),
        "scale": weighted_mean((gaussians.scaling[:, n:] - log_scale).abs(), surface),
    }


def pixels_of(maps: Tensor, output: GSLRMOutput) -> Tensor:
    """[b, v, c, h, w] -> [b, k, c] at the pixels that have an image Gaussian."""
    pixels = maps.permute(0, 1, 3, 4, 2).flatten(1, 3)
    return pixels.gather(1, output.pixel_index[..., None].expand(-1, -1, pixels.shape[-1]))
