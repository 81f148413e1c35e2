"""Trains the small network that cuts the animal out of a photograph: synthetic mice over random backgrounds.

Prints its mean IoU on held-out mice beside that of the color model (GrabCut) on the same pictures.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from multiview.config import Parser
from multiview.run import main_guard, resolve_device
from multiview.segmentation import SIDE, WEIGHTS, SegmentationNetwork, segment

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
        wires = torch.sin((rows + per_image(count, -0.3, 0.3) * rows.T) * per_image(count, 15, 70)) > per_image(
            count, 0.5, 0.98
        )
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
    zoom, turn = (
        torch.exp(per_image(count, math.log(0.55), math.log(3.5))).flatten(),
        per_image(count, -0.4, 0.4).flatten(),
    )
    cosine, sine = zoom * turn.cos(), zoom * turn.sin()
    flip, place = torch.where(torch.rand(count) < 0.5, -1.0, 1.0), (torch.rand(2, count) - 0.5) * zoom
    matrix = torch.stack([cosine * flip, -sine, place[0], sine * flip, cosine, place[1]], dim=1).view(count, 2, 3)
    premultiplied = torch.cat([mice[:, :3] * mice[:, 3:], mice[:, 3:]], dim=1)
    grid = F.affine_grid(matrix, (count, 4, 2 * SIDE, 2 * SIDE), align_corners=False)
    warped = F.avg_pool2d(F.grid_sample(premultiplied, grid, align_corners=False), 2)
    mask = warped[:, 3:]
    behind = backgrounds(count)
    shadow = F.avg_pool2d(torch.roll(mask, (6, 3), dims=(2, 3)), 15, 1, 7)
    behind = behind * (1 - per_image(count, 0, 0.6) * shadow)
    light = per_image(count, 0.7, 1.3) * (1 + per_image(count, -0.1, 0.1, 3))
    picture = (warped[:, :3] * light + behind * (1 - mask)).clamp(0, 1) ** per_image(count, 0.75, 1.35)
    blurred = F.avg_pool2d(picture, 3, 1, 1, count_include_pad=False)
    picture = torch.lerp(picture, blurred, per_image(count, 0, 1))
    return (picture + per_image(count, 0, 0.05) * torch.randn_like(picture)).clamp(0, 1), mask


def read_mice(path: Path, most: int) -> Tensor:
    """Returns up to `most` views of a split list's unspoilt samples, [n, 4, s, s] uint8."""
    from multiview.sample import read_sample, read_split

    views = []
    for folder in read_split(path):
        sample = read_sample(folder)
        if "photograph" not in sample.extra:  # a photographed sample's masks are wrong on purpose
            views += list((sample.rgba * 255).round().to(torch.uint8))
        if len(views) >= most:
            break
    return torch.stack(views[:most])


def iou(mask: Tensor, truth: Tensor) -> float:
    mask, truth = mask > 0.5, truth > 0.5
    return float((mask & truth).sum() / (mask | truth).sum().clamp(min=1))


def compare(network: SegmentationNetwork, pictures: Tensor, masks: Tensor) -> dict[str, float]:
    """Mean IoU over pictures of the network's single look, and of the color model (0 where it finds no animal)."""
    network.eval()
    with torch.no_grad():
        found = torch.cat([network(part).sigmoid() for part in pictures.split(64)])
    scores = {"network": [iou(*pair) for pair in zip(found, masks)], "color": []}
    for picture, mask in zip(pictures, masks):
        try:
            scores["color"].append(
                iou(torch.from_numpy(segment(picture.permute(1, 2, 0).numpy(), method="color")[0]), mask[0])
            )
        except ValueError:
            scores["color"].append(0.0)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="split list of synthetic mice, best of 256 px")
    parser.add_argument("--held_out", type=Path, required=True, help="split list of others, for the IoU")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="weights (.safetensors, float16)")
    parser.add_argument("--steps", type=int, default=4000, help="of --batch_size pictures")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    arguments = parser.parse_args()
    from safetensors.torch import save_file
    from tqdm import tqdm

    from multiview.files import atomic_write

    torch.manual_seed(arguments.seed)
    device, mice = resolve_device(arguments.device), read_mice(arguments.data, 6000)
    network = SegmentationNetwork().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=arguments.steps, pct_start=0.1)
    bar = tqdm(range(arguments.steps), desc="segmentation", disable=None)
    for _ in bar:
        pictures, masks = (x.to(device) for x in photographs(mice[torch.randint(len(mice), (arguments.batch_size,))]))
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(pictures).float()
        probability = logits.sigmoid()
        overlap = (probability * masks).sum((1, 2, 3)) * 2 / ((probability + masks).sum((1, 2, 3)) + 1)
        loss = F.binary_cross_entropy_with_logits(logits, masks) + (1 - overlap).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    held_out = photographs(read_mice(arguments.held_out, 256))
    scores = compare(network.cpu(), *held_out)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.output) as temporary:
        save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, temporary)
    told = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    print(f"{arguments.output}: mean IoU on {len(held_out[0])} pictures: {told}")


if __name__ == "__main__":
    main_guard(main)
