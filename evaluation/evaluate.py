"""Measures the model on held-out samples, mouse by mouse: beside its baselines, or at every sweep's level."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from evaluation import SWEEPS, EvaluationSettings, methods
from evaluation.leave_one_out import leave_one_out
from evaluation.methods import OTHER_RIG_VIEWS, OWN, Prediction
from evaluation.report import Report, mean
from evaluation.sweeps import run_sweeps
from multiview.image import composite
from multiview.metrics import load_lpips, lpips_backbone_path
from multiview.rig import check_alignment
from multiview.run import git_hash, peak_bytes, reset_peak, stoppable
from multiview.sample import Sample, check_names, read_dataset_info, read_split
from pipeline.model import MouseFaceLift


def evaluate(settings: EvaluationSettings, model: MouseFaceLift) -> str:
    """Measures what the settings ask for and writes it; returns the tables as Markdown."""
    if not settings.leave_one_out:  # any calibrated cameras will do
        info = read_dataset_info(settings.data)
        check_alignment(model.rig, dataset=info["rig"])
    folders, artifacts = read_split(settings.data)[: settings.num_samples], model.artifacts
    check_names(folders)  # mice are counted by their names
    notes, lpips = [], None
    if lpips_backbone_path().is_file():
        lpips = load_lpips(model.device)
    else:
        notes.append(f"LPIPS is not measured: no weights at {lpips_backbone_path().as_posix()}.")
    head = {  # of metrics.json
        "stage": settings.stage, "data": settings.data.as_posix(),
        "train_data": settings.train_data and settings.train_data.as_posix(), "rig": artifacts.rig.to_dict(),
        "artifacts": artifacts.describe(), "num_steps": artifacts.num_steps,
        "guidance_scale": artifacts.guidance_scale, "seed": settings.seed, "git": git_hash(),
    }  # fmt: skip
    if settings.leave_one_out:
        return leave_one_out(settings, model, lpips, head | {"notes": notes})
    if any(getattr(settings, factor) for factor in SWEEPS):  # baselines have no cameras, views or filters to vary
        return run_sweeps(settings, model, info, folders, lpips, notes, head)
    training, stage, report = None, settings.stage, Report(settings.stage, len(folders))
    if "nearest" in settings.baselines and settings.train_data is not None:
        training = methods.TrainingMice(settings.train_data, model.rig, folders)
    elif "nearest" in settings.baselines:
        notes.append("The nearest training mouse is not measured: no --train_data.")
    for folder in stoppable(tqdm(folders, desc=f"stage {stage}", unit="mouse")):
        evaluate_sample(report, methods.read(folder, model, stage), folder.name, settings, model, training, lpips)
    memory = "the most that the whole process held, libraries and weights included; left out where that cannot be told"
    if model.device.type == "cuda":
        memory = "the most that torch held on the GPU, weights included"
    report.notes = [*notes, f"Memory: {memory}. Seconds: from input to the rendered views compared."]
    facts = {"data": f"{head['data']}, {len(folders)} mice", "rig": artifacts.rig.name}
    facts |= {name: str(head["artifacts"][name]) for name in ("unet", "gslrm") if head["artifacts"][name]}
    if stage != "2":
        options, steps, guidance = artifacts.options, artifacts.num_steps, artifacts.guidance_scale
        facts["sampling"] = f"{options.sampler}, {steps} steps, guidance {guidance:g}, {options.num_draws} draws"
    return report.write(settings.output_dir, head, facts | {"seed": str(settings.seed), "commit": head["git"]})


def evaluate_sample(
    report: Report, sample: Sample, name: str, settings: EvaluationSettings, model: MouseFaceLift,
    training: methods.TrainingMice | None, lpips,
) -> None:  # fmt: skip
    """Measures one mouse: the model, timed, then the baselines; what they give goes into the report."""
    stage, rig, generated = settings.stage, model.rig, None
    splits, reference = methods.splits_of(stage, sample, rig), rig.reference_view
    views = sum(splits.values(), [])
    with measure_cost(model.device) as cost:  # the model alone: baselines are not what a user runs
        if stage != "2":
            generated = model.generate(sample.rgba[reference], seed=settings.seed)
        if stage == "1":
            own = Prediction.of(views, generated.rgb[views])
        else:
            gaussians = methods.reconstruct(model, sample) if generated is None else model.predict(generated)
            own = methods.predict_gaussians(gaussians, sample, views)
    given = {"generated": generated, "training": training}
    others, report.told = methods.predict_baselines(stage, settings.baselines, sample, model, **given)
    if stage == "full":  # the same views before Stage 2: whether it gains or loses
        before = Prediction.of(splits[OTHER_RIG_VIEWS], generated.rgb[splits[OTHER_RIG_VIEWS]])
        others = {methods.GENERATED: before, **others}
    head = {"sample": name, **methods.kind_of(sample, reference)}
    records = methods.records_of(head, {OWN[stage]: own, **others}, sample, splits, reference, lpips)
    report.records += records
    asset = {"sample": name, **cost}
    if generated is not None:
        asset["consistency"] = methods.consistency_of(generated, sample, rig, with_copy="copy" in settings.baselines)
    report.assets.append(asset)
    # The sheets' rows, by view; None stands for the input view, which opens each row.
    truth = composite(sample.rgba, 1.0)
    rows = {"truth": {None: truth[reference], **dict(enumerate(truth))}}
    if stage == "full":
        rows["painted views"] = {None: generated.rgb[reference], **dict(enumerate(generated.rgb))}
    rows[OWN[stage]] = dict(zip(views, own.rgb))
    if shown := next((label for label in methods.SHOWN if label in others), None):
        rows[shown] = dict(zip(others[shown].views, others[shown].rgb))
    report.rows, white = ", ".join(rows), torch.ones_like(truth[0])
    images = [torch.stack([row.get(view, white) for view in (None, *views)]) for row in rows.values()]
    quality = mean([record for record in records if record["method"] == OWN[stage]], "foreground_psnr")
    report.show(name, quality, torch.stack(images))


@contextmanager
def measure_cost(device: torch.device) -> Iterator[dict[str, float]]:
    """Fills the dict it yields with `seconds` and, where it can be told, `peak_memory_mib`, weights included. CUDA: of
    what torch holds on the card. CPU: of the whole process."""
    cost: dict[str, float] = {}
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    known = on_gpu or reset_peak()  # some containers do not let the kernel's mark be reset
    started = time.perf_counter()
    yield cost
    if on_gpu:
        torch.cuda.synchronize(device)
    cost["seconds"] = time.perf_counter() - started
    if known:
        cost["peak_memory_mib"] = (torch.cuda.max_memory_allocated(device) if on_gpu else peak_bytes()) / 2**20
