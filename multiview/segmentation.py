"""The animal's mask of a photograph that has none.

`rembg`: a large network, where that package is installed; `network`: a small one trained on this project's own mice,
checkpoints/demo/segmentation; `color`: distance from the border's color, refined by GrabCut. `auto`: the first of
these that is there and finds an animal.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from multiview.run import REPOSITORY

METHODS = ("auto", "rembg", "network", "color")
WEIGHTS = REPOSITORY / "checkpoints" / "demo" / "segmentation" / "model.safetensors"
SIDE = 160  # pixels, of the small network's images
LEAST, MOST = 0.003, 0.8  # of the image's area: what covers less or more is no animal's mask
LARGEST = 1024  # pixels, the longest side of what it looks at
WINDOW = 1.8  # side of the second look over the animal's longer side


class SegmentationNetwork(nn.Module):
    """A U-Net: images [b, 3, s, s] 0..1, s a multiple of 32 -> logits [b, 1, s, s] of the animal's mask."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48, 64, 72)) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())

        pairs = list(zip(widths, widths[1:]))
        self.first = nn.Sequential(block(3, widths[0], 2), block(widths[0], widths[0]))
        self.down = nn.ModuleList(nn.Sequential(block(a, b, 2), block(b, b)) for a, b in pairs)
        self.up = nn.ModuleList(block(a + b, a) for a, b in reversed(pairs))
        self.last = nn.Conv2d(widths[0], 4, 1)  # four pixels of the mask from one of half size

    def forward(self, images: Tensor) -> Tensor:
        levels = [self.first(images * 2 - 1)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for up, beside in zip(self.up, reversed(levels)):
            x = up(torch.cat([beside, nn.functional.interpolate(x, scale_factor=2.0)], dim=1))
        return nn.functional.pixel_shuffle(self.last(x), 2)


def segment(rgb: np.ndarray, source: str = "image", method: str = "auto") -> tuple[np.ndarray, str]:
    """[h, w, 3] 0..1 -> soft mask [h, w] 0..1 of the largest piece, and the method that found it. Raises ValueError
    where there is none, or the method is not there."""
    import cv2

    if method not in METHODS:
        raise ValueError(f"mask must be one of {', '.join(METHODS)}, got {method!r}")
    there = {"rembg": importlib.util.find_spec("rembg") is not None, "network": WEIGHTS.is_file(), "color": True}
    if method != "auto" and not there[method]:
        remedy = "pip install rembg onnxruntime" if method == "rembg" else "python scripts/train_segmentation.py --help"
        raise ValueError(f"mask {method} is not there ({remedy}); auto takes what is")
    for chosen in [name for name, found in there.items() if found] if method == "auto" else [method]:
        soft = {"rembg": _by_rembg, "network": _by_network, "color": _by_color}[chosen](rgb)
        count, parts, stats, _ = cv2.connectedComponentsWithStats((soft > 0.5).astype(np.uint8), connectivity=8)
        if count > 2:  # the largest piece is the animal
            largest = (parts == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))).astype(np.uint8)
            soft = soft * cv2.dilate(largest, np.ones((3, 3)))  # its soft rim too
        if LEAST < (covered := (soft > 0.5).mean()) < MOST:
            return np.clip(soft, 0, 1).astype(np.float32), chosen
    told = f"{source}: no animal could be told from the background (mask by {chosen} covers {covered:.1%})"
    raise ValueError(f"{told}; pass an RGBA image whose alpha is the animal's mask")


def _by_rembg(rgb: np.ndarray) -> np.ndarray:
    import rembg

    return np.asarray(rembg.remove((rgb * 255).round().astype(np.uint8), only_mask=True)) / np.float32(255)


@lru_cache(1)
def _network() -> SegmentationNetwork:
    network = SegmentationNetwork()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return network.eval()


@torch.no_grad()
def _by_network(rgb: np.ndarray) -> np.ndarray:
    """The whole image first, as a square; then a closer look at where the animal is."""
    import cv2

    size, most = rgb.shape[1::-1], max(rgb.shape[:2])
    if most > LARGEST:  # blurring all of a large photograph would take seconds
        rgb = cv2.resize(rgb, tuple(max(1, round(s * LARGEST / most)) for s in size), interpolation=cv2.INTER_AREA)
    height, width = rgb.shape[:2]
    soft = np.zeros((height, width), dtype=np.float32)
    x, y, side = width / 2, height / 2, float(max(height, width))
    for _ in range(2):
        # Window to network: beyond the image its border goes on.
        scale = SIDE / side
        to_window = np.float32([[scale, 0, SIDE / 2 - scale * x], [0, scale, SIDE / 2 - scale * y]])
        blurred = cv2.GaussianBlur(rgb, (0, 0), 0.4 / scale) if scale < 1 else rgb  # warping takes single pixels
        image = cv2.warpAffine(blurred, to_window, (SIDE, SIDE), borderMode=cv2.BORDER_REPLICATE)
        found = _network()(torch.from_numpy(image).permute(2, 0, 1)[None])[0, 0].numpy()
        back = {"flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, "borderMode": cv2.BORDER_CONSTANT, "borderValue": -20}
        soft = cv2.warpAffine(found, to_window, (width, height), **back)
        soft = 1 / (1 + np.exp(-soft))
        count, _, stats, _ = cv2.connectedComponentsWithStats((soft > 0.5).astype(np.uint8), connectivity=8)
        if count < 2:
            break
        left, top, w, h = stats[1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA])), :4]
        x, y, side = left + w / 2, top + h / 2, max(WINDOW * max(w, h), SIDE)  # enlarged pixels show no more
    return cv2.resize(soft, size, interpolation=cv2.INTER_LINEAR)


def _by_color(rgb: np.ndarray) -> np.ndarray:
    import cv2

    height, width = rgb.shape[:2]
    scale = min(1.0, 512 / max(height, width))
    small = cv2.resize(rgb, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
    edge = max(2, round(0.03 * min(small.shape[:2])))
    edges = (small[:edge], small[-edge:], small[:, :edge], small[:, -edge:])
    border = np.concatenate([part.reshape(-1, 3) for part in edges])
    distance = np.abs(small - np.median(border, axis=0)).max(axis=-1)
    spread = float(np.percentile(np.abs(border - np.median(border, axis=0)).max(axis=-1), 90))
    seed = distance > max(0.10, 2.0 * spread)
    labels = np.where(seed, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[:edge], labels[-edge:], labels[:, :edge], labels[:, -edge:] = (cv2.GC_BGD,) * 4
    if LEAST < seed.mean() < MOST:
        cv2.setRNGSeed(0)
        pixels, models = (small * 255).round().astype(np.uint8), (np.zeros((1, 65)), np.zeros((1, 65)))
        cv2.grabCut(pixels, labels, None, *models, 5, cv2.GC_INIT_WITH_MASK)
    mask = ((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.float32)
    return cv2.resize(cv2.GaussianBlur(mask, (0, 0), 0.7), (width, height), interpolation=cv2.INTER_LINEAR)
