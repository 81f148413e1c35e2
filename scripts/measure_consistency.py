"""What the view-consistency score says of true views and of views made inconsistent on purpose.

For every kind of damage: the mean of each term over the samples, and how well the term tells damaged from true views
(area under the ROC curve: 1 always, 0.5 never). With --painted, also what Stage 1 paints from the reference view.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import main_guard
from pipeline.flags import add_chain_flags, positive

TERMS = ("mask", "colour", "score", "mask_iou")
DAMAGES = (
    "shuffled", "two views swapped", "all mirrored", "one mirrored", "all turned 10 deg", "turned +-10 deg",
    "of different mice", "one of another mouse", "input copied", "shifted 1/128", "shifted 2/128", "shifted 4/128",
    "cameras off 5 deg", "cameras off 10 deg", "brightness +-15 %", "two recoloured",
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("data_mouse/data_mouse_train.txt"), help="split list (default: %(default)s)"
    )
    parser.add_argument("--num_samples", type=positive, default=64, help="the first so many (default: %(default)s)")
    parser.add_argument("--painted", type=int, default=0, help="of them, painted by Stage 1 (default: %(default)s)")
    parser.add_argument("--mvdiffusion_checkpoint", type=Path, help="Stage 1; default: the demo model")
    parser.add_argument("--checkpoint", type=Path, help="Stage 2 of the same chain; default: the demo model")
    add_chain_flags(parser)
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON; default: printed only")
    return parser.parse_args()


def damage(name: str, samples: list, number: int):
    """Views of samples[number] ([v, 4, h, w] each), damaged: RGBA [v, 4, h, w] and the cameras [v] they claim.

    Depends on its arguments only. Raises KeyError for an unknown name.
    """
    import torch

    from multiview.run import make_generator

    sample, generator = samples[number], make_generator("damage", name, number)
    views, size = len(sample.rgba), sample.rgba.shape[-1]
    rgba, cameras = sample.rgba.clone(), sample.cameras
    draw = torch.rand(views, generator=generator)
    amount = name.removeprefix("shifted ").removeprefix("cameras off ")  # of the damages that have one
    if name == "shuffled":
        rgba[1:] = rgba[1 + torch.randperm(views - 1, generator=generator).roll(1)]
    elif name == "two views swapped":
        rgba[[2, views - 2]] = rgba[[views - 2, 2]]
    elif name == "all mirrored":
        rgba = rgba.flip(-1)
    elif name == "one mirrored":
        rgba[2] = rgba[2].flip(-1)
    elif name == "all turned 10 deg":
        rgba = turned(rgba, torch.full((views,), 10.0))
    elif name == "turned +-10 deg":
        rgba = turned(rgba, torch.where(torch.arange(views) % 2 == 0, 10.0, -10.0))
    elif name == "of different mice":
        rgba = torch.stack([samples[(number + 7 * k) % len(samples)].rgba[k] for k in range(views)])
    elif name == "one of another mouse":
        rgba[views // 2] = samples[(number + 5) % len(samples)].rgba[views // 2]
    elif name == "input copied":
        rgba = rgba[:1].expand_as(rgba)
    elif name.startswith("shifted "):
        pixels = max(1, round(int(amount.split("/")[0]) * size / 128))
        moves = [(pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)]
        chosen = (draw * 4).long().tolist()
        rgba = torch.stack([view.roll(moves[k], dims=(-2, -1)) for view, k in zip(rgba, chosen)])
    elif name.startswith("cameras off "):
        spread = float(amount.split()[0])
        moved = [cameras[[k]].rotate(spread * float(2 * draw[k] - 1)) for k in range(views)]
        cameras = type(cameras)(torch.cat([c.c2w for c in moved]), cameras.fxfycxcy, cameras.height, cameras.width)
    elif name == "brightness +-15 %":
        rgba[:, :3] = (rgba[:, :3] * (0.85 + 0.3 * draw).view(-1, 1, 1, 1)).clamp(0, 1)
    elif name == "two recoloured":
        rgba[[1, views - 2], :3] = rgba[[1, views - 2], :3][:, [2, 0, 1]]
    else:
        raise KeyError(name)
    return rgba, cameras


def turned(rgba, angles_deg):
    """Pictures [v, 4, h, w] turned in their own planes."""
    import torch

    rows = []
    for angle in torch.deg2rad(angles_deg).tolist():
        rows.append([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    places = torch.nn.functional.affine_grid(torch.tensor(rows), rgba.shape, align_corners=False)
    return torch.nn.functional.grid_sample(rgba, places, align_corners=False)


def separation(true: list[float], other: list[float]) -> float:
    """Area under the ROC curve: how often a true set scores above a damaged one."""
    wins = [(a > b) + 0.5 * (a == b) for a in true for b in other]
    return sum(wins) / len(wins)


def paint(arguments, samples: list) -> list[dict]:
    """The consistency of what Stage 1 paints from each sample's reference view."""
    from tqdm import tqdm

    from multiview.consistency import view_consistency
    from multiview.image import resize_rgba
    from multiview.run import resolve_device
    from pipeline.artifacts import load_stage1, resolve_chain
    from pipeline.stages import paint_views

    artifacts = resolve_chain(
        rig=arguments.rig, unet=arguments.mvdiffusion_checkpoint, gslrm=arguments.checkpoint,
        gslrm_config=arguments.gslrm_config, embeds=arguments.prompt_embeds, components=arguments.mvdiff_pretrained,
        num_steps=arguments.num_steps, guidance_scale=arguments.guidance_scale,
    )  # fmt: skip
    components = load_stage1(artifacts, resolve_device(arguments.device))
    found = []
    for sample in tqdm(samples, desc="painted", unit="mouse", disable=None):
        photo = resize_rgba(sample.rgba[artifacts.rig.reference_view], components.image_size)
        views = paint_views(components, artifacts, photo, seed=arguments.seed, keep_input_view=True)
        found.append(view_consistency(views.rgb, views.masks, views.cameras))
    return found


def main() -> None:
    arguments = parse_arguments()
    from tqdm import tqdm

    from multiview.consistency import view_consistency
    from multiview.files import write_json
    from multiview.image import composite
    from multiview.sample import read_dataset_info, read_sample, read_split

    rig = read_dataset_info(arguments.data.parent)["rig"]
    folders = read_split(arguments.data)[: arguments.num_samples]
    samples = [read_sample(folder, num_views=rig.num_views) for folder in folders]
    found: dict[str, list[dict]] = {}
    for name in tqdm(("true views", *DAMAGES), unit="damage", disable=None):
        found[name] = []
        for number, sample in enumerate(samples):
            rgba, cameras = damage(name, samples, number) if name in DAMAGES else (sample.rgba, sample.cameras)
            found[name].append(view_consistency(composite(rgba, 1.0), rgba[:, 3:], cameras))
    if arguments.painted:
        found["painted by Stage 1"] = paint(arguments, samples[: arguments.painted])
    print(f"{len(samples)} samples of {arguments.data}; mean (separation from the true views)")
    print("| views | " + " | ".join(TERMS) + " |\n|---" + "|---" * len(TERMS) + "|")
    for name, rows in found.items():
        cells = []
        for term in TERMS:
            values, true = [row[term] for row in rows], [row[term] for row in found["true views"]]
            cells.append(f"{sum(values) / len(values):.3f} ({separation(true, values):.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |")
    if arguments.output:
        write_json(
            arguments.output, {name: [{t: row[t] for t in TERMS} for row in rows] for name, rows in found.items()}
        )


if __name__ == "__main__":
    main_guard(main)
