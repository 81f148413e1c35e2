"""Photographs of synthetic mice over random backgrounds, and the training of the small segmentation network on them."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from multiview.metrics import mask_iou
from multiview.run import resolve_device
from multiview.sample import read_sample, read_split
from multiview.segmentation import SIDE, SegmentationNetwork, segment

SKIN = torch.tensor([[0.87, 0.67, 0.55], [0.55, 0.38, 0.28]])  # hands
BEDDING = torch.tensor([[0.80, 0.68, 0.50], [0.93, 0.90, 0.85], [0.45, 0.33, 0.22]])


def noise(count: int, channels: int, rows: int, columns: int) -> Tensor:
    """Smooth noise [count, channels, SIDE, SIDE], about 0..1, of rows x columns bumps."""
    coarse = torch.rand(count, channels, rows, columns)
    return F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=False)


def per_image(count: int, low: float, high: float, channels: int = 1) -> Tensor:
    return low + (high - low) * torch.rand(count, channels, 1, 1)


def ellipses(count: int) -> Tensor:
    """[count, 1, SIDE, SIDE] 0 or 1: one ellipse each, anywhere, of any direction."""
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij"))
    offset = grid - per_image(count, -1, 1, 2)
    angle = per_image(count, 0, math.pi)
    u = offset[:, :1] * angle.cos() + offset[:, 1:] * angle.sin()
    v = offset[:, 1:] * angle.cos() - offset[:, :1] * angle.sin()
    long = per_image(count, 0.15, 0.9)
    return ((u / long) ** 2 + (v / (long * per_image(count, 0.2, 0.9))) ** 2 < 1).float()


def backgrounds(count: int) -> Tensor:
    """Table, bedding, cage and hand: [count, 3, SIDE, SIDE] 0..1."""
    plain = per_image(count, 0.02, 1) + per_image(count, -0.12, 0.12, 3)
    image = plain + per_image(count, 0, 0.4) * (noise(count, 1, 3, 3) - 0.5)  # uneven light
    image = image + per_image(count, -0.1, 0.25).clamp(min=0) * (noise(count, 1, 40, 4) - 0.5)  # grain of wood
    chips = BEDDING[torch.randint(len(BEDDING), (count,))][:, :, None, None] * (0.5 + noise(count, 1, 48, 48))
    chips = chips * (0.6 + 0.8 * noise(count, 1, 20, 20)) + per_image(count, -0.1, 0.1, 3)
    image = torch.where(per_image(count, 0, 1) < 0.35, chips, image)
    rows = torch.linspace(-1, 1, SIDE)[:, None]
    for _ in range(2):  # wires of a cage, from side to side or up and down
        slanted = (rows + per_image(count, -0.3, 0.3) * rows.T) * per_image(count, 15, 70)
        wires = slanted.sin() > per_image(count, 0.5, 0.98)
        wires = torch.where(per_image(count, 0, 1) < 0.5, wires, wires.transpose(2, 3)) & (per_image(count, 0, 1) < 0.2)
        image = torch.where(wires, per_image(count, 0, 1) + per_image(count, -0.05, 0.05, 3), image)
    for number in range(5):  # things of any color; of three of them some are fingers
        shape = ellipses(count) * (per_image(count, 0, 1) < 0.3)
        color = per_image(count, 0, 1, 3) * (0.7 + 0.6 * noise(count, 1, 6, 6))
        hand = SKIN[torch.randint(2, (count,))][:, :, None, None] * (0.85 + 0.3 * noise(count, 1, 5, 5))
        color = torch.where((per_image(count, 0, 1) < 0.5) & (number < 3), hand, color)
        image = image * (1 - shape) + color * shape
    return image.clamp(0, 1)


def photographs(mice: Tensor) -> tuple[Tensor, Tensor]:
    """Mice [b, 4, s, s] uint8, straight alpha -> pictures [b, 3, SIDE, SIDE] 0..1 and their masks [b, 1, ...]."""
    count, mice = len(mice), mice.float() / 255
    premultiplied = torch.cat([mice[:, :3] * mice[:, 3:], mice[:, 3:]], dim=1)
    # By turns from near and, out of half the pixels so that none is skipped, from afar.
    is_far = bool(torch.rand(()) < 0.5)
    premultiplied = F.avg_pool2d(premultiplied, 2) if is_far else premultiplied
    zoom = per_image(count, *((0.9, 2.6) if is_far else (0.55, 1.1))).flatten()
    turn, flip = per_image(count, -0.4, 0.4).flatten(), torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    cosine, sine, place = zoom * turn.cos(), zoom * turn.sin(), (torch.rand(2, count) - 0.5) * zoom
    matrix = torch.stack([cosine * flip, -sine, place[0], sine * flip, cosine, place[1]], dim=1).view(count, 2, 3)
    grid = F.affine_grid(matrix, [count, 4, SIDE, SIDE], align_corners=False)
    warped = F.grid_sample(premultiplied, grid, align_corners=False)
    mask = warped[:, 3:]
    behind = backgrounds(count)
    shadow = F.avg_pool2d(torch.roll(mask, (6, 3), dims=(2, 3)), 15, 1, 7)
    behind = behind * (1 - per_image(count, 0, 0.6) * shadow)
    light = per_image(count, 0.7, 1.3) * (1 + per_image(count, -0.1, 0.1, 3))
    picture = (warped[:, :3] * light + behind * (1 - mask)).clamp(0, 1) ** per_image(count, 0.75, 1.35)
    blurred = F.avg_pool2d(picture, 3, 1, 1, count_include_pad=False)
    picture = torch.lerp(picture, blurred, per_image(count, 0, 1))
    return (picture + per_image(count, 0, 0.04) * torch.randn_like(picture)).clamp(0, 1), mask


def read_mice(path: Path, most: int = 6000) -> Tensor:
    """Returns up to `most` views of a split list's unspoilt samples, [n, 4, s, s] uint8."""
    views: list[Tensor] = []
    for folder in read_split(path):
        sample = read_sample(folder)
        if len(views) < most and "photograph" not in sample.extra:  # whose masks are wrong on purpose
            views += (sample.rgba * 255).round().to(torch.uint8)
    return torch.stack(views[:most])


@torch.no_grad()
def compare(network: SegmentationNetwork, pictures: Tensor, masks: Tensor) -> dict[str, float]:
    """Mean IoU over pictures: the network's, at its first look, and the color model's (0 where it finds no animal)."""
    found = torch.zeros_like(masks)
    for picture, mask in zip(pictures, found):
        try:
            mask[0] = torch.from_numpy(segment(picture.permute(1, 2, 0).numpy(), method="color")[0])
        except ValueError:
            continue
    own = torch.cat([network.eval()(part).sigmoid() for part in pictures.split(64)])
    return {"network": float(mask_iou(own, masks).mean()), "color": float(mask_iou(found, masks).mean())}


def train_segmentation(
    data: Path, held_out: Path, *, steps: int, batch_size: int, seed: int, device: str
) -> tuple[SegmentationNetwork, dict[str, float]]:
    """Trains on the mice of one split list; returns the network and `compare` on those of another."""
    torch.manual_seed(seed)
    where, mice, others = resolve_device(device), read_mice(data), read_mice(held_out, 256)
    network = SegmentationNetwork().to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), desc="segmentation", disable=None)):
        pictures, masks = (x.to(where) for x in photographs(mice[torch.randint(len(mice), (batch_size,))]))
        with torch.autocast(where.type, torch.bfloat16):
            logits = network(pictures).float()
        probability = logits.sigmoid()
        overlap = (probability * masks).sum((1, 2, 3)) * 2 / ((probability + masks).sum((1, 2, 3)) + 1)
        loss = F.binary_cross_entropy_with_logits(logits, masks) + (1 - overlap).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return network.cpu(), compare(network.cpu(), *photographs(others))
