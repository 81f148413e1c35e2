"""Image metrics: whole image, foreground, agreement of posed views. Images and masks [..., c, h, w] 0..1."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from multiview.cameras import Cameras
from multiview.checkpoint import load_checkpoint, load_strict
from multiview.hull import carve_leave_one_out, observe, silhouettes, surface
from multiview.run import shipped

LPIPS_BACKBONE = Path("checkpoints/vgg/vgg16-397923af.pth")
CONSISTENCY_RESOLUTION = 64  # voxels along the hull; finer changes the figures in the third decimal
CONSISTENCY_SIZE = 128  # larger images are reduced to this: figures compare between sizes, and cost the same
SEEN = 0.05  # a point counts for a view that sees it with at least this weight, and the others together too
MASK_LEAST, MASK_SHARE, MASK_REACH = 0.04, 0.4, 2 / 128  # `mask_from_white`; the reach in image widths


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image, [...]. On white backgrounds it reads about 10 dB high."""
    return _decibel((prediction - target).square().flatten(-3).mean(-1))


def foreground_psnr(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """PSNR in dB over the pixels of the ground-truth mask (weighted by it), [...]."""
    error = (prediction - target).square().mean(-3, keepdim=True)  # over colors first: the mask has one channel
    return _decibel(_masked_mean(error, mask, "foreground_psnr"))


def mask_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of two masks thresholded at 0.5, [...]; 1 where both are empty."""
    a, b = prediction > 0.5, target > 0.5
    intersection, union = (a & b).flatten(-3).sum(-1).float(), (a | b).flatten(-3).sum(-1).float()
    return torch.where(union > 0, intersection / union.clamp_min(1), torch.ones_like(union))


def mask_from_white(rgb: Tensor) -> Tensor:
    """Returns the mask [..., 1, h, w] of a generated image on white [..., 3, h, w].

    A pixel belongs to the animal when it is darker than white by MASK_LEAST and by MASK_SHARE of the darkest pixel near
    it: that halves the soft rim of a black animal without losing a white one. IoU on 16 held-out mice 0.97, 0.90 to
    0.94 for any one threshold.
    """
    darkness = (1.0 - rgb).amax(-3, keepdim=True)
    reach = max(1, round(MASK_REACH * rgb.shape[-1]))
    flat = darkness.flatten(0, -4) if darkness.ndim > 3 else darkness[None]
    darkest = torch.nn.functional.max_pool2d(flat, 2 * reach + 1, stride=1, padding=reach).reshape(darkness.shape)
    return (darkness > (MASK_SHARE * darkest).clamp_min(MASK_LEAST)).to(rgb.dtype)


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity per image, [...], the mean of `ssim_map`."""
    return ssim_map(prediction, target).mean((-3, -2, -1))


def foreground_ssim(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Structural similarity averaged over the ground-truth mask (weighted by it), [...]; windows reach beyond it."""
    return _masked_mean(ssim_map(prediction, target).mean(-3, keepdim=True), mask, "foreground_ssim")


def ssim_map(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity around every pixel, [..., c, h, w] (Gaussian window 11, sigma 1.5, data range 1, borders
    reflected; Wang et al. 2004)."""
    a, b = (F.pad(images.flatten(0, -4), (5,) * 4, mode="reflect") for images in (prediction, target))
    window = torch.exp(-0.5 * (torch.arange(-5, 6).to(a) / 1.5) ** 2)
    window = window / window.sum()
    # One axis after the other: 2-3 times as fast on a CPU as torchmetrics, whose import alone takes 4 s.
    maps = torch.cat([a, b, a * a, b * b, a * b], dim=1)
    for axis in ((1, -1), (-1, 1)):
        maps = F.conv2d(maps, window.view(1, 1, *axis).expand(maps.shape[1], -1, -1, -1), groups=maps.shape[1])
    mean_a, mean_b, aa, bb, ab = maps.chunk(5, dim=1)
    # Rounding makes variances of flat areas negative, and SSIM would leave [-1, 1].
    variances = (aa - mean_a**2).clamp_min(0) + (bb - mean_b**2).clamp_min(0)
    likeness = (2 * mean_a * mean_b + 0.01**2) * (2 * (ab - mean_a * mean_b) + 0.03**2)
    return (likeness / ((mean_a**2 + mean_b**2 + 0.01**2) * (variances + 0.03**2))).reshape(prediction.shape)


def _masked_mean(values: Tensor, mask: Tensor, name: str) -> Tensor:
    """Mean of values [..., 1, h, w] weighted by mask [..., 1, h, w], [...]."""
    if mask.shape[-3] != 1:
        raise ValueError(f"mask must have 1 channel, got shape {list(mask.shape)}")
    weight = mask.flatten(-3).sum(-1)
    if (weight <= 0).any():  # a mean over nothing would be a perfect or a void score, by chance
        raise ValueError(f"{name}: a mask is empty, there is no foreground to measure")
    return (values * mask).flatten(-3).sum(-1) / weight


def difference_ratio(images: Tensor, targets: Tensor, masks: Tensor, reference_view: int) -> Tensor:
    """Returns how much generated views differ from the input image, over how much the true ones do [b]: 1 as the truth,
    0 copies of the input. images, targets: [b, n, 3, s, s] on one background; masks: [b, n, 1, s, s]. Counted where the
    animal truly stands in the view or in the input, over the unseen views."""
    others = [view for view in range(targets.shape[1]) if view != reference_view]
    region = (torch.maximum(masks[:, others], masks[:, reference_view, None]) > 0.5).to(targets.dtype)
    given = targets[:, reference_view, None]
    differing = [(views[:, others] - given).abs().mean(2, keepdim=True) * region for views in (images, targets)]
    generated, true = (values.sum(dim=(1, 2, 3, 4)) for values in differing)
    return generated / true.clamp_min(1e-6)


@torch.no_grad()
def lpips_distances(
    network: torch.nn.Module, prediction: Tensor, target: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns LPIPS of whole images [..., 3, h, w] and its map averaged over the ground-truth mask, [...] each."""
    whole, inside = [], []
    # One image at a time: VGG's features of a whole set take gigabytes.
    for a, b, m in zip(prediction.flatten(0, -4), target.flatten(0, -4), mask.flatten(0, -4)):
        a, b = a[None] * 2 - 1, b[None] * 2 - 1
        network.spatial = True
        inside.append(_masked_mean(network(a, b), m[None], "lpips_distances")[0])
        network.spatial = False
        whole.append(network(a, b).flatten()[0])
    shape = prediction.shape[:-3]
    return torch.stack(whole).reshape(shape), torch.stack(inside).reshape(shape)


def lpips_backbone_path() -> Path:
    """Returns where the VGG-16 weights of LPIPS lie, or are expected."""
    return shipped(LPIPS_BACKBONE)


def load_lpips(device: torch.device | str = "cpu", path: Path | str | None = None) -> torch.nn.Module:
    """LPIPS (VGG, images in [-1, 1]) with the backbone read from disk; never downloads."""
    path = Path(path) if path is not None else lpips_backbone_path()
    if not path.is_file():
        told = f"LPIPS needs torchvision's VGG-16 weights at {path}"
        raise ValueError(f"{told}: put the file vgg16-397923af.pth there, or set the LPIPS weight to 0")
    import lpips

    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    features = {str(name).removeprefix("features."): tensor for name, tensor in load_checkpoint(path).items()}
    for name, module in network.net.named_children():
        if name.startswith("slice"):  # lpips splits torchvision's `features` into slices of the same layer numbers
            own = {key: features[key] for key in module.state_dict() if key in features}
            load_strict(module, own, f"{path} ({name})")
    return network.eval().requires_grad_(False).to(device)


def _decibel(mean_squared_error: Tensor) -> Tensor:
    return -10.0 * torch.log10(mean_squared_error.clamp_min(1e-10))  # equal images: 100 dB, so that means stay finite


def view_consistency(rgb: Tensor, masks: Tensor, cameras: Cameras) -> dict[str, float | list[float]]:
    """Measures without ground truth whether posed views show one and the same solid. Figures 0..1, larger is better.

    rgb: [v, 3, h, w], masks: [v, 1, h, w], cameras: [v], v >= 3. Returns means over views, and lists [v] `.._per_view`:
    mask: fraction of a view's mask that the hull of the others fills; 1 for silhouettes of one solid (silhouette
    coherence: Hernandez, Schmitt and Cipolla 2007). mask_iou: the same as IoU, below 1 even for the truth.
    colour: 1 - mean absolute difference between what a view and the others show of a point of the hull's surface
    (photo-consistency: Kutulakos and Seitz 2000); nan, and 0 in the mean, where none is shared. score: mask * colour.
    """
    size = (cameras.height, cameras.width)
    for name, tensor, wanted in (("rgb", rgb, [len(cameras), 3, *size]), ("masks", masks, [len(cameras), 1, *size])):
        if list(tensor.shape) != wanted:
            raise ValueError(f"{name} must be {wanted} to go with its cameras, got {list(tensor.shape)}")
    rgb, masks = rgb.float(), masks.float()
    if max(size) > CONSISTENCY_SIZE:
        size = [max(1, round(side * CONSISTENCY_SIZE / max(size))) for side in size]
        rgb, masks = F.interpolate(torch.cat([rgb, masks], dim=1), size=size, mode="area").split([3, 1], dim=1)
        cameras = cameras.resize(*size)
    whole, others = carve_leave_one_out(masks, cameras, resolution=CONSISTENCY_RESOLUTION)
    shown = torch.cat([silhouettes(surface(hull), cameras[[view]]) for view, hull in enumerate(others)])
    drawn = masks > 0.5
    both, either = (drawn & shown).flatten(1).sum(1), (drawn | shown).flatten(1).sum(1)
    filled, overlap = both / drawn.flatten(1).sum(1).clamp_min(1), both / either.clamp_min(1)

    # How the colors of the hull's surface agree with the other views', per view [v]; nan: nothing shared.
    colors, weights = observe(surface(whole), rgb, masks, cameras)
    weighted, rest = colors * weights[..., None], weights.sum(0) - weights
    mean_of_others = (weighted.sum(0) - weighted) / rest.clamp_min(1e-6)[..., None]
    shared = torch.where((weights > SEEN) & (rest > SEEN), weights * rest, 0)
    color = 1 - ((colors - mean_of_others).abs().mean(-1) * shared).sum(1) / shared.sum(1)
    known = color[~color.isnan()]
    mask, mean_color = float(filled.mean()), float(known.mean()) if len(known) else 0.0
    return {
        "mask": mask, "colour": mean_color, "score": mask * mean_color, "mask_iou": float(overlap.mean()),
        "mask_per_view": filled.tolist(), "colour_per_view": color.tolist(), "mask_iou_per_view": overlap.tolist(),
    }  # fmt: skip
