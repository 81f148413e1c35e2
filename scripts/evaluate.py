"""Measures Stage 1, Stage 2 or the whole chain on held-out samples, beside a baseline from the same run.

  1     the input view -> painted views, against the sample's other rig views (baseline: the input view copied)
  2     the sample's rig views -> Gaussians, rendered from its extra views, which were never inputs
  full  the input view -> painted views -> Gaussians, rendered from the other rig views and from the extra views
Writes metrics.json, table.md and sheet.png (rows of truth and prediction). Foreground: inside the true mask.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chain.flags import add_chain_flags, positive
from multiview.run import main_guard

SHEET_ROWS = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("data_mouse/data_mouse_val.txt"), help="split list of samples"
    )
    parser.add_argument("--stage", choices=("1", "2", "full"), required=True)
    parser.add_argument("--num_samples", type=positive, default=16, help="the first so many of the list (default: 16)")
    parser.add_argument("--mvdiffusion_checkpoint", type=Path, help="Stage 1; default: the demo model")
    parser.add_argument("--checkpoint", type=Path, help="Stage 2; default: the demo model")
    add_chain_flags(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evaluation"))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from tqdm import tqdm

    from chain.artifacts import load_stage1, load_stage2, resolve_chain, resolve_stage2
    from multiview.rig import check_alignment
    from multiview.run import resolve_device
    from multiview.sample import read_dataset_info, read_sample, read_split

    device = resolve_device(arguments.device)
    if arguments.stage == "2":
        artifacts = resolve_stage2(rig=arguments.rig, gslrm=arguments.checkpoint, gslrm_config=arguments.gslrm_config)
    else:
        artifacts = resolve_chain(
            rig=arguments.rig, unet=arguments.mvdiffusion_checkpoint, gslrm=arguments.checkpoint,
            gslrm_config=arguments.gslrm_config, embeds=arguments.prompt_embeds,
            components=arguments.mvdiff_pretrained,
            num_steps=arguments.num_steps, guidance_scale=arguments.guidance_scale,
        )  # fmt: skip
    check_alignment(artifacts.rig, dataset=read_dataset_info(arguments.data.parent)["rig"])
    components = load_stage1(artifacts, device) if arguments.stage != "2" else None
    model = load_stage2(artifacts, device) if arguments.stage != "1" else None
    size = components.image_size if components else model.config.image_tokenizer.image_size
    folders = read_split(arguments.data)[: arguments.num_samples]
    records, sheet = [], []
    for folder in tqdm(folders, desc=f"stage {arguments.stage}", unit="mouse"):
        sample = read_sample(folder, image_size=size)
        started = time.perf_counter()
        pairs = predict(arguments, artifacts, components, model, sample, device)
        seconds = time.perf_counter() - started
        for split, (rgb, mask, truth) in pairs.items():
            records += measure(folder.name, split, rgb, mask, truth, seconds)
        if len(sheet) < 2 * SHEET_ROWS:
            sheet += sheet_rows(pairs)
    write_results(arguments, artifacts, records, sheet)


def predict(arguments, artifacts, components, model, sample, device) -> dict:
    """By split: predicted pictures [n, 3, h, w], masks [n, 1, h, w], and the true RGBA views [n, 4, h, w]."""
    from chain.stages import paint_views, reconstruct, views_of_sample
    from gslrm.model.gaussians_renderer import render
    from multiview.metrics import mask_from_white

    count, reference = artifacts.rig.num_views, artifacts.rig.reference_view
    others = [k for k in range(count) if k != reference]
    if arguments.stage == "2":
        views = views_of_sample(sample.rgba[:count], sample.cameras[:count])
    else:
        views = paint_views(components, artifacts, sample.rgba[reference], seed=arguments.seed, keep_input_view=True)
    if arguments.stage == "1":
        copied = views.rgb[reference].expand(len(others), -1, -1, -1)
        return {
            "painted views": (views.rgb[others], mask_from_white(views.rgb[others]), sample.rgba[others]),
            "baseline: input copied": (copied, mask_from_white(copied), sample.rgba[others]),
        }
    gaussians = reconstruct(model, views, device)
    splits = {"novel views": list(range(count, len(sample.rgba)))}
    if arguments.stage == "full":
        splits["rig views but the input"] = others
    found = {}
    for split, indices in splits.items():
        if indices:
            output = render(gaussians, sample.cameras[indices][None].to(device), background=1.0)
            found[split] = output.rgb[0].cpu().clamp(0, 1), output.alpha[0].cpu(), sample.rgba[indices]
    return found


def measure(name: str, split: str, rgb, mask, truth, seconds: float) -> list[dict]:
    """One record per view."""
    from multiview.image import composite
    from multiview.metrics import foreground_psnr, mask_iou, psnr, ssim

    target, true_mask = composite(truth, 1.0), truth[:, 3:]
    columns = {
        "foreground_psnr": foreground_psnr(rgb, target, true_mask), "psnr": psnr(rgb, target),
        "ssim": ssim(rgb, target), "mask_iou": mask_iou(mask, true_mask),
    }  # fmt: skip
    return [
        {
            "sample": name,
            "split": split,
            "view": view,
            "seconds": seconds,
            **{k: v[view].item() for k, v in columns.items()},
        }
        for view in range(len(rgb))
    ]


def sheet_rows(pairs: dict) -> list:
    """A row of truth and a row of prediction of the first split."""
    from multiview.image import composite

    rgb, _, truth = next(iter(pairs.values()))
    return [composite(truth, 1.0), rgb]


def write_results(arguments, artifacts, records: list[dict], sheet: list) -> None:
    """metrics.json, table.md (also printed) and sheet.png."""
    import statistics

    import torch

    from multiview.checkpoint import atomic_write, write_json
    from multiview.image import grid, write_image
    from multiview.run import git_hash

    names = ("foreground_psnr", "psnr", "ssim", "mask_iou")
    lines = ["| split | mice | views | " + " | ".join(f"{name} mean (median, worst 5 %)" for name in names) + " |"]
    lines.append("|---" * (3 + len(names)) + "|")
    for split in dict.fromkeys(record["split"] for record in records):
        rows = [record for record in records if record["split"] == split]
        cells = []
        for name in names:
            values = sorted(record[name] for record in rows)
            worst = values[max(0, round(0.05 * len(values)) - 1)]
            cells.append(f"{statistics.fmean(values):.3f} ({statistics.median(values):.3f}, {worst:.3f})")
        mice = len({record["sample"] for record in rows})
        lines.append(f"| {split} | {mice} | {len(rows)} | " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    folder = arguments.output_dir
    content = {
        "stage": arguments.stage, "data": arguments.data.as_posix(), "rig": artifacts.rig.to_dict(),
        "artifacts": artifacts.describe(), "num_steps": artifacts.num_steps,
        "guidance_scale": artifacts.guidance_scale, "seed": arguments.seed, "git": git_hash(), "views": records,
    }  # fmt: skip
    write_json(folder / "metrics.json", content)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(table)
    write_image(folder / "sheet.png", grid(torch.cat(sheet), columns=len(sheet[0])))
    seconds = statistics.median(record["seconds"] for record in records)
    print(f"{table}median {seconds:.2f} s per mouse; {folder / 'metrics.json'}, {folder / 'sheet.png'}")


if __name__ == "__main__":
    main_guard(main)
