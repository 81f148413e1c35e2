"""Measures Stage 1, Stage 2 or the whole chain on held-out samples, beside baselines from the same run.

  1     the input view -> painted views, against the sample's other rig views
  2     the sample's true rig views -> Gaussians, rendered from its extra views, which were never inputs
  full  the input view -> painted views -> Gaussians, rendered from the extra views and from the other rig views
Writes metrics.json, table.md, report.html (self-contained), sheet.png (the first mice) and worst.png (the worst 5 %).
foreground_*: inside the true mask. depth_error: world units, where truth and prediction both show a surface.

Baselines (--baselines): copy, the input view as every view; nearest, the training mouse (--train_data) whose input view
is most like this one; hull, the visual hull of the views that Stage 2 gets, in their colours; six_views, what Stage 2
makes of the true rig views (for the chain: an upper bound); autoencoder, the true views only encoded and decoded (for
stage 1: an upper bound). The report says what each was given.

Sweeps: each list given is measured on its own, the others at no noise, all views and no filter. Noise (stage 2) is put
on the cameras that the model is told; the true ones stay for rendering. Of k input views (stage 2) those are taken that
stand farthest apart, the reference view among them. Filters (stages 2 and full) act on the Gaussians; tune them on a
validation list. A table and a plot (sweep_<flag>.png) per list.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import main_guard
from pipeline.flags import add_chain_flags, add_stage1_flags, positive, stage1_options

BASELINES = ("copy", "nearest", "hull", "six_views", "autoencoder")
NOISE_SWEEPS = ("camera_noise_deg", "camera_noise_mm", "camera_noise_px", "num_input_views")
FILTER_SWEEPS = ("min_opacity", "max_scaling")
SWEEPS = NOISE_SWEEPS + FILTER_SWEEPS


def not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("data_mouse/data_mouse_val.txt"),
        help="split list of held-out samples (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--stage", choices=("1", "2", "full"), required=True)
    parser.add_argument("--num_samples", type=positive, help="the first so many of the list (default: all)")
    parser.add_argument(
        "--baselines", nargs="+", choices=(*BASELINES, "none"), default=list(BASELINES), metavar="NAME",
        help=f"of {', '.join(BASELINES)}, none (default: all that apply)",
    )  # fmt: skip
    parser.add_argument("--train_data", type=Path, help="split list of training samples, for the baseline 'nearest'")
    parser.add_argument("--mvdiffusion_checkpoint", type=Path, help="Stage 1; default: the demo model")
    parser.add_argument("--checkpoint", type=Path, help="Stage 2; default: the demo model")
    add_chain_flags(parser)
    add_stage1_flags(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evaluation"), help="default: %(default)s")
    sweeps = parser.add_argument_group("sweeps")
    for flag, text in (
        ("camera_noise_deg", "rotation of each camera, standard deviations in degrees"),
        ("camera_noise_mm", "position of each camera along each axis, standard deviations in mm"),
        ("camera_noise_px", "principal point of each camera, standard deviations in pixels of the model's input"),
        ("min_opacity", "Gaussians more transparent than this are left out"),
        ("max_scaling", "Gaussians larger than this standard deviation in world units are left out"),
    ):
        sweeps.add_argument(f"--{flag}", type=not_negative, nargs="+", metavar="X", default=[], help=text)
    sweeps.add_argument("--num_input_views", type=positive, nargs="+", metavar="N", default=[], help="how many go in")
    sweeps.add_argument(
        "--world_units_per_mm", type=not_negative, help="scale of the data; default: from dataset.json, if it says so"
    )
    options = parser.parse_args(arguments)
    for names, stages in ((NOISE_SWEEPS, ("2",)), (FILTER_SWEEPS, ("2", "full"))):
        given = [name for name in names if getattr(options, name)]
        if given and options.stage not in stages:
            parser.error(f"--{given[0]} is a sweep of --stage {' or '.join(stages)}, got --stage {options.stage}")
    if options.world_units_per_mm == 0:
        parser.error("--world_units_per_mm must be above 0, got 0")
    if "none" in options.baselines and len(options.baselines) > 1:
        parser.error(f"--baselines none stands alone, got {' '.join(options.baselines)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from multiview.rig import check_alignment
    from multiview.run import resolve_device
    from multiview.sample import read_dataset_info, read_split
    from pipeline.artifacts import load_stage1, load_stage2, resolve_chain, resolve_stage2

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
    folders = read_split(options.data)[: options.num_samples]
    components = load_stage1(artifacts, device) if options.stage != "2" else None
    model = load_stage2(artifacts, device) if options.stage != "1" else None
    notes: list[str] = []
    lpips = load_lpips_if_there(device, notes)
    if any(getattr(options, name) for name in SWEEPS):
        run_sweeps(options, artifacts, components, model, info, folders, lpips, device, notes)
    else:
        run_stage(options, artifacts, components, model, folders, lpips, device, notes)


def load_lpips_if_there(device, notes: list[str]):
    from multiview.metrics import load_lpips, lpips_backbone_path

    if lpips_backbone_path().is_file():
        return load_lpips(device)
    notes.append(f"LPIPS is not measured: no weights at {lpips_backbone_path().as_posix()}.")
    return None


# ---- one measurement of a stage -------------------------------------------------------------------------------------


def run_stage(options, artifacts, components, model, folders, lpips, device, notes: list[str]) -> None:
    from tqdm import tqdm

    from evaluation.baselines import TrainingMice, describe
    from evaluation.cost import memory_is_of
    from evaluation.report import Album, Report

    training = None
    if "nearest" in options.baselines:
        if options.train_data is not None:
            training = TrainingMice.read(options.train_data, artifacts.rig, folders)
        else:
            notes.append("The nearest training mouse is not measured: no --train_data.")
    report = Report(options.stage, Album(len(folders)))
    for folder in tqdm(folders, desc=f"stage {options.stage}", unit="mouse"):
        evaluate_sample(report, folder, options, artifacts, components, model, training, lpips, device)
    measured = {record["method"] for record in report.records}
    told = describe(options.stage, tuple(options.baselines), training)
    told = {method: text for method, text in told.items() if method in measured}
    report.notes = [*notes, f"Memory: {memory_is_of(device)}. Seconds: from input to the rendered views compared."]
    head, facts = head_of(options, artifacts), facts_of(options, artifacts, len(folders))
    print(report.write(options.output_dir, head, facts, told))
    print(options.output_dir / "report.html")


def evaluate_sample(report, folder: Path, options, artifacts, components, model, training, lpips, device) -> None:
    """One mouse: the model, timed, then the baselines; what they give goes into the report."""
    from evaluation.baselines import HULL_OF_PAINTED, NEAREST, hull_of_true, predict_baselines
    from evaluation.cost import measure_cost
    from evaluation.evaluate import (
        OTHER_RIG_VIEWS,
        OWN,
        PAINTED,
        angle_from_input,
        consistency_of,
        paint,
        predict_gaussians,
        predict_stage1,
        reconstruct_sample,
        records_of,
        side_shown,
        splits_of,
    )  # fmt: skip
    from evaluation.report import picture_rows, quality_of
    from multiview.image import composite
    from multiview.sample import read_sample
    from pipeline.stages import reconstruct

    stage, rig = options.stage, artifacts.rig
    size = components.image_size if components else model.config.image_tokenizer.image_size
    sample = read_sample(folder, image_size=size, with_depth=stage != "1" and (folder / "depth").is_dir())
    splits = splits_of(stage, sample, rig)
    with measure_cost(device) as cost:
        painted = paint(components, artifacts, sample, seed=options.seed) if components else None
        if stage == "1":
            own = predict_stage1(painted, sample, splits)
        else:
            gaussians = reconstruct(model, painted, device) if painted else None
            gaussians = gaussians or reconstruct_sample(model, sample, rig.num_views, device)
            own = predict_gaussians(gaussians, sample, splits, device)
    others = predict_baselines(
        stage, tuple(options.baselines), sample, splits, rig, painted=painted, training=training,
        components=components, model=model, device=device,
    )  # fmt: skip
    if stage == "full":  # the same views, painted: whether Stage 2 gains or loses
        rig_views = {split: views for split, views in splits.items() if split == OTHER_RIG_VIEWS}
        others = {PAINTED: predict_stage1(painted, sample, rig_views), **others}
    angles = angle_from_input(sample.cameras, rig.reference_view)
    side = side_shown(sample, rig.reference_view)
    head = {"sample": folder.name} | ({"input_shows": side} if side else {})
    report.records += records_of(head, {OWN[stage]: own, **others}, angles, lpips)
    asset = {"sample": folder.name, **cost}
    if painted is not None:
        copied = composite(sample.rgba[rig.reference_view], 1.0) if "copy" in options.baselines else None
        asset["consistency"] = consistency_of(painted, sample, rig.num_views, copied=copied)
    report.assets.append(asset)
    shown = next((name for name in (HULL_OF_PAINTED, hull_of_true(stage), NEAREST) if name in others), None)
    in_between = painted if stage == "full" else None
    names = ["truth", *(["painted views"] if in_between else []), OWN[stage], *([shown] if shown else [])]
    report.rows = ", ".join(names)
    quality = quality_of([record for record in report.own if record["sample"] == folder.name])
    pictures = picture_rows(sample, rig.reference_view, own, others.get(shown), in_between)
    report.album.add(folder.name, quality, pictures)


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def run_sweeps(options, artifacts, components, model, info: dict, folders, lpips, device, notes: list[str]) -> None:
    from tqdm import tqdm

    from evaluation.evaluate import angle_from_input, paint, records_of, splits_of
    from evaluation.plots import plot_sweep
    from evaluation.sweeps import find_world_units_per_mm, plan_sweeps, predict_levels
    from multiview.sample import read_sample
    from pipeline.stages import reconstruct

    size, scale, rig = model.config.image_tokenizer.image_size, None, artifacts.rig
    if options.camera_noise_mm:
        source = (options.data.parent / "dataset.json").as_posix()
        scale, note = find_world_units_per_mm(info, options.world_units_per_mm, source)
        notes.append(f"Camera positions: {note}.")
    if options.camera_noise_px:
        notes.append(f"Pixels are those of the model's input, {size} x {size}.")
    values = {name: getattr(options, name) for name in SWEEPS if getattr(options, name)}
    sweeps = plan_sweeps(values, rig, scale)
    records, sheets = [], {factor: [] for factor in sweeps}
    for folder in tqdm(folders, desc="sweeps", unit="mouse"):
        sample = read_sample(folder, image_size=size, with_depth=(folder / "depth").is_dir())
        splits, angles = splits_of(options.stage, sample, rig), angle_from_input(sample.cameras, rig.reference_view)
        made = None
        if components is not None:
            made = reconstruct(model, paint(components, artifacts, sample, seed=options.seed), device)
        levels = predict_levels(
            model, sample, folder.name, rig, sweeps, splits, device, seed=options.seed, gaussians=made
        )  # fmt: skip
        for level, predictions in levels:
            head = {"factor": level.factor, "value": level.value, "sample": folder.name}
            records += records_of(head, {"model": predictions}, angles, lpips)
            if folder == folders[0]:
                shown, sheet = next(iter(predictions.values())), sheets[level.factor]
                sheet += [shown.rgb] if sheet else [shown.target, shown.rgb]
    for factor in sweeps:
        rows = [record for record in records if record["factor"] == factor]
        title = f"{len(folders)} mice, {', '.join(splits)}; line: mean over views, band: middle half"
        plot_sweep(options.output_dir / f"sweep_{factor}.png", factor, rows, title)
        write_sheet(options.output_dir / f"sheet_{factor}.png", sheets[factor])
    write_sweeps(options, artifacts, sweeps, records, notes)


def write_sweeps(options, artifacts, sweeps: dict, records: list[dict], notes: list[str]) -> None:
    from dataclasses import asdict

    from evaluation.evaluate import summarise
    from evaluation.page import metrics_table
    from evaluation.sweeps import FACTORS
    from multiview.files import atomic_write, write_json

    tables, summaries = [], {}
    for factor, levels in sweeps.items():
        rows = [record for record in records if record["factor"] == factor]
        tables.append(metrics_table(FACTORS[factor], rows, {"value": factor}).markdown())
        if factor == "num_input_views":
            used = (f"{len(level.views)}: {', '.join(map(str, level.views))}" for level in levels)
            notes.append(f"Input views used, numbered in rig order: {'; '.join(used)}.")
        summaries[factor] = [
            {
                "value": level.value, "views": list(level.views), "rotation_deg": level.rotation_deg,
                "translation_world_units": level.translation, "pixels": level.pixels,
                "filters": asdict(level.filters) if level.filters else None,
                **summarise([row for row in rows if row["value"] == level.value]),
            }
            for level in levels
        ]  # fmt: skip
    text = "\n".join([*tables, *(note + "\n" for note in notes)])
    content = {"sweeps": summaries, "notes": notes, "views": records}
    write_json(options.output_dir / "metrics.json", head_of(options, artifacts) | content)
    with atomic_write(options.output_dir / "table.md") as temporary:
        temporary.write_text(text)
    print(f"{text}{options.output_dir / 'metrics.json'}")


# ---- shared ---------------------------------------------------------------------------------------------------------


def write_sheet(path: Path, rows: list) -> None:
    """Rows of pictures [n, 3, h, w] below one another."""
    import torch

    from multiview.image import grid, write_image

    write_image(path, grid(torch.cat(rows), columns=len(rows[0])))


def head_of(options, artifacts) -> dict:
    """What was measured, for metrics.json."""
    from multiview.run import git_hash

    return {
        "stage": options.stage, "data": options.data.as_posix(),
        "train_data": options.train_data and options.train_data.as_posix(), "rig": artifacts.rig.to_dict(),
        "artifacts": artifacts.describe(), "num_steps": artifacts.num_steps,
        "guidance_scale": artifacts.guidance_scale, "seed": options.seed, "git": git_hash(),
    }  # fmt: skip


def facts_of(options, artifacts, num_mice: int) -> dict[str, str]:
    """The same in words, for the page."""
    head = head_of(options, artifacts)
    facts = {"data": f"{head['data']}, {num_mice} mice", "rig": artifacts.rig.name}
    facts |= {name: str(head["artifacts"][name]) for name in ("unet", "gslrm") if head["artifacts"][name]}
    if options.stage != "2":
        sampler = artifacts.options.sampler
        facts["sampling"] = f"{sampler}, {head['num_steps']} steps, guidance {head['guidance_scale']:g}"
    return {**facts, "seed": str(options.seed), "commit": head["git"]}


if __name__ == "__main__":
    main_guard(main)
