"""Measures Stage 1, Stage 2 or the whole chain on held-out samples, beside a baseline from the same run.

  1     the input view -> painted views, against the sample's other rig views (baseline: the input view copied)
  2     the sample's rig views -> Gaussians, rendered from its extra views, which were never inputs
  full  the input view -> painted views -> Gaussians, rendered from the other rig views and from the extra views
Writes metrics.json, table.md and sheet.png (rows of truth and prediction). Foreground: inside the true mask.

Sweeps (stage 2): each list given is measured on its own, the others at no noise and all views. Noise is put on the
cameras that the model is told; the true ones stay for rendering. Of k input views those are taken that stand farthest
apart, the reference view among them. A table and a plot (sweep_<flag>.png) per list.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chain.flags import add_chain_flags, add_stage1_flags, positive, stage1_options
from multiview.run import main_guard

SHEET_ROWS = 8
SWEEPS = ("camera_noise_deg", "camera_noise_mm", "camera_noise_px", "num_input_views")


def not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("data_mouse/data_mouse_val.txt"), help="split list of samples"
    )
    parser.add_argument("--stage", choices=("1", "2", "full"), required=True)
    parser.add_argument("--num_samples", type=positive, default=16, help="the first so many of the list (default: 16)")
    parser.add_argument("--mvdiffusion_checkpoint", type=Path, help="Stage 1; default: the demo model")
    parser.add_argument("--checkpoint", type=Path, help="Stage 2; default: the demo model")
    add_chain_flags(parser)
    add_stage1_flags(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evaluation"))
    sweeps = parser.add_argument_group("sweeps of stage 2")
    for unit, text in (
        ("deg", "rotation of each camera, standard deviations in degrees"),
        ("mm", "position of each camera along each axis, standard deviations in mm"),
        ("px", "principal point of each camera, standard deviations in pixels of the model's input"),
    ):
        sweeps.add_argument(f"--camera_noise_{unit}", type=not_negative, nargs="+", metavar="X", default=[], help=text)
    sweeps.add_argument("--num_input_views", type=positive, nargs="+", metavar="N", default=[], help="how many go in")
    sweeps.add_argument(
        "--world_units_per_mm", type=not_negative, help="scale of the data; default: from dataset.json, if it says so"
    )
    options = parser.parse_args(arguments)
    given = [name for name in SWEEPS if getattr(options, name)]
    if given and options.stage != "2":
        parser.error(f"--{given[0]} is a sweep of --stage 2, got --stage {options.stage}")
    if options.world_units_per_mm == 0:
        parser.error("--world_units_per_mm must be above 0, got 0")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from chain.artifacts import load_stage1, load_stage2, resolve_chain, resolve_stage2
    from multiview.rig import check_alignment
    from multiview.run import resolve_device
    from multiview.sample import read_dataset_info

    device = resolve_device(options.device)
    if options.stage == "2":
        artifacts = resolve_stage2(rig=options.rig, gslrm=options.checkpoint, gslrm_config=options.gslrm_config)
    else:
        artifacts = resolve_chain(
            rig=options.rig, unet=options.mvdiffusion_checkpoint, gslrm=options.checkpoint,
            gslrm_config=options.gslrm_config, embeds=options.prompt_embeds,
            components=options.mvdiff_pretrained,
            num_steps=options.num_steps, guidance_scale=options.guidance_scale, options=stage1_options(options),
        )  # fmt: skip
    info = read_dataset_info(options.data.parent)
    check_alignment(artifacts.rig, dataset=info["rig"])
    components = load_stage1(artifacts, device) if options.stage != "2" else None
    model = load_stage2(artifacts, device) if options.stage != "1" else None
    lpips = load_lpips_if_there(device)
    if any(getattr(options, name) for name in SWEEPS):
        run_sweeps(options, artifacts, model, info, lpips, device)
    else:
        run_stage(options, artifacts, components, model, lpips, device)


def load_lpips_if_there(device):
    from multiview.metrics import load_lpips, lpips_backbone_path

    if lpips_backbone_path().is_file():
        return load_lpips(device)
    print(f"LPIPS is not measured: no weights at {lpips_backbone_path()}")
    return None


# ---- one measurement of a stage -------------------------------------------------------------------------------------


def run_stage(options, artifacts, components, model, lpips, device) -> None:
    import statistics

    from tqdm import tqdm

    from chain.evaluation import predict_chain, predict_stage1, predict_stage2, table
    from multiview.sample import read_sample, read_split

    size = components.image_size if components else model.config.image_tokenizer.image_size
    records, sheet = [], []
    for folder in tqdm(read_split(options.data)[: options.num_samples], desc=f"stage {options.stage}", unit="mouse"):
        sample = read_sample(folder, image_size=size)
        started = time.perf_counter()
        if options.stage == "1":
            predictions = predict_stage1(components, artifacts, sample, seed=options.seed)
        elif options.stage == "2":
            predictions = predict_stage2(model, sample, artifacts.rig.num_views, device)
        else:
            predictions = predict_chain(components, model, artifacts, sample, device, seed=options.seed)
        seconds = time.perf_counter() - started
        records += rows_of({"sample": folder.name, "seconds": seconds}, predictions, lpips)
        if len(sheet) < 2 * SHEET_ROWS:
            shown = next(iter(predictions.values()))
            sheet += [shown.target, shown.rgb]
    write_sheet(options.output_dir / "sheet.png", sheet)
    write_results(options, artifacts, table(records, "split", "split"), {"views": records})
    seconds = statistics.median(record["seconds"] for record in records)
    print(f"median {seconds:.2f} s per mouse; {options.output_dir / 'sheet.png'}")


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def run_sweeps(options, artifacts, model, info: dict, lpips, device) -> None:
    from tqdm import tqdm

    from chain.plots import plot_sweep
    from chain.sweeps import find_world_units_per_mm, plan_sweeps, predict_levels
    from multiview.sample import read_sample, read_split

    size, notes, scale = model.config.image_tokenizer.image_size, [], None
    if options.camera_noise_mm:
        source = (options.data.parent / "dataset.json").as_posix()
        scale, note = find_world_units_per_mm(info, options.world_units_per_mm, source)
        notes.append(f"Camera positions: {note}.")
    if options.camera_noise_px:
        notes.append(f"Pixels are those of the model's input, {size} x {size}.")
    values = {name: getattr(options, name) for name in SWEEPS if getattr(options, name)}
    sweeps = plan_sweeps(values, artifacts.rig, scale)
    folders = read_split(options.data)[: options.num_samples]
    records, sheets = [], {factor: [] for factor in sweeps}
    for folder in tqdm(folders, desc="sweeps", unit="mouse"):
        sample = read_sample(folder, image_size=size)
        levels = predict_levels(model, sample, folder.name, artifacts.rig, sweeps, device, seed=options.seed)
        for level, predictions in levels:
            head = {"factor": level.factor, "value": level.value, "sample": folder.name}
            records += rows_of(head, predictions, lpips)
            if folder == folders[0]:
                shown, sheet = next(iter(predictions.values())), sheets[level.factor]
                sheet += [shown.rgb] if sheet else [shown.target, shown.rgb]
    for factor in sweeps:
        rows = [record for record in records if record["factor"] == factor]
        title = f"{len(folders)} mice, {rows[0]['split']}; line: mean over views, band: middle half"
        plot_sweep(options.output_dir / f"sweep_{factor}.png", factor, rows, title)
        write_sheet(options.output_dir / f"sheet_{factor}.png", sheets[factor])
    write_sweeps(options, artifacts, sweeps, records, notes)


def write_sweeps(options, artifacts, sweeps: dict, records: list[dict], notes: list[str]) -> None:
    from chain.evaluation import summarise, table
    from chain.sweeps import FACTORS

    blocks, summaries = [], {}
    for factor, levels in sweeps.items():
        rows = [record for record in records if record["factor"] == factor]
        blocks.append(f"## {FACTORS[factor]}\n\n" + table(rows, "value", factor))
        if factor == "num_input_views":
            used = (f"{len(level.views)}: {', '.join(map(str, level.views))}" for level in levels)
            notes.append(f"Input views used, numbered in rig order: {'; '.join(used)}.")
        summaries[factor] = [
            {
                "value": level.value, "views": list(level.views), "rotation_deg": level.rotation_deg,
                "translation_world_units": level.translation, "pixels": level.pixels,
                **summarise([row for row in rows if row["value"] == level.value]),
            }
            for level in levels
        ]  # fmt: skip
    text = "\n".join([*blocks, *(note + "\n" for note in notes)])
    write_results(options, artifacts, text, {"sweeps": summaries, "notes": notes, "views": records})


# ---- shared ---------------------------------------------------------------------------------------------------------


def rows_of(head: dict, predictions: dict, lpips) -> list[dict]:
    """One record per split and view."""
    from chain.evaluation import measure

    return [
        {**head, "split": split, "view": view, **metrics}
        for split, prediction in predictions.items()
        for view, metrics in enumerate(measure(prediction, lpips))
    ]


def write_sheet(path: Path, rows: list) -> None:
    """Rows of pictures [n, 3, h, w] below one another."""
    import torch

    from multiview.image import grid, write_image

    write_image(path, grid(torch.cat(rows), columns=len(rows[0])))


def write_results(options, artifacts, table: str, content: dict) -> None:
    """metrics.json and table.md; the table is printed too."""
    from multiview.checkpoint import atomic_write, write_json
    from multiview.run import git_hash

    folder = options.output_dir
    head = {
        "stage": options.stage, "data": options.data.as_posix(), "rig": artifacts.rig.to_dict(),
        "artifacts": artifacts.describe(), "num_steps": artifacts.num_steps,
        "guidance_scale": artifacts.guidance_scale, "seed": options.seed, "git": git_hash(),
    }  # fmt: skip
    write_json(folder / "metrics.json", head | content)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(table)
    print(f"{table}{folder / 'metrics.json'}")


if __name__ == "__main__":
    main_guard(main)
