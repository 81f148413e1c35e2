"""Each true view of a calibrated sample asked of the others: the test on real animals, which have no novel views."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation import EvaluationSettings
from evaluation.methods import Prediction, measure, predict_gaussians, predict_hull
from evaluation.report import metrics_table
from multiview.files import atomic_write, write_json
from multiview.image import composite, write_image
from multiview.report import Figure, Table, write_page
from multiview.run import git_hash, stoppable
from multiview.sample import read_sample, read_split
from pipeline.model import MouseFaceLift
from pipeline.outputs import PosedViews

HULL, STAGE2, REFINED = "hull", "Stage 2", "refined"
METRICS = ("foreground_psnr", "psnr", "foreground_ssim", "mask_iou", "foreground_lpips")


def leave_one_out(settings: EvaluationSettings, model: MouseFaceLift, lpips, head: dict) -> str:
    """Measures hull, Stage 2 and refinement on every view of every sample; returns the tables as Markdown."""
    records, figures, folder = [], [], settings.output_dir
    for path in stoppable(tqdm(read_split(settings.data)[: settings.num_samples], desc="left out", unit="sample")):
        sample = read_sample(path)
        posed = PosedViews.of(sample.rgba[: sample.num_inputs], sample.cameras[: sample.num_inputs])
        shown: list[Tensor] = []
        for view in range(sample.num_inputs):
            others = [other for other in range(sample.num_inputs) if other != view]
            given = PosedViews(posed.rgb[others], posed.masks[others], posed.cameras[others])
            predictions, told = predict_left_out(model, given, view, sample, settings, str(path))
            name = sample.view_names[view] or f"view {view}"
            for method, prediction in predictions.items():
                (values,) = measure(prediction, sample, lpips)
                records.append({"sample": path.name, "view": view, "camera": name, "method": method, **values} | (
                    told if method == REFINED else {}
                ))  # fmt: skip
            images = [composite(sample.rgba[view], 1.0), *(p.rgb[0] for p in predictions.values())]
            shown.append(torch.cat(images, dim=1))
        figures.append((path.name, torch.cat(shown, dim=2)))
    names = [name for name in METRICS if name in records[0]]
    tables = [
        metrics_table("Views asked of all others", records, {"method": "method"}, names),
        metrics_table("By camera", records, {"camera": "camera left out", "method": "method"}, names),
    ]  # fmt: skip
    refined = [record for record in records if record["method"] == REFINED]
    tables.append(Table("Refinement", ["sample", "left out", "start", "Gaussians", "anisotropy p95", "seconds"], [
        [r["sample"], r["camera"], r["start"], r["gaussians"], r["anisotropy_p95"], r["seconds"]] for r in refined
    ]))  # fmt: skip
    write_json(folder / "metrics.json", {**head, "leave_one_out": records})
    markdown = "\n".join(table.markdown() for table in tables)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(markdown)
    write_image(folder / "sheet.png", torch.cat([image for _, image in figures[:4]], dim=1))
    rows = "rows: truth, hull, Stage 2, refined; columns: the view left out"
    pages = [Figure(f"{name}; {rows}", image) for name, image in figures[:8]]
    facts = {"data": str(settings.data), "commit": git_hash()}
    write_page(folder / "report.html", "Leave-one-out", [*tables, *pages], facts=facts)
    return markdown


def predict_left_out(
    model: MouseFaceLift, given: PosedViews, view: int, sample, settings: EvaluationSettings, name: str
) -> tuple[dict[str, Prediction], dict]:
    """Returns what hull, Stage 2 and refinement of the given views show of `view`, and facts of the refinement."""
    parts, found = (given.rgb, given.masks, given.cameras), {HULL: predict_hull(given, sample, [view])}
    for method, refine in ((STAGE2, "off"), (REFINED, "auto")):
        made = model.reconstruct(*parts, refine=refine, seed=settings.seed, name=name)
        found[method] = predict_gaussians(made.gaussians, sample, [view])
    told = made.record["refinement"]
    return found, {
        "start": told["start"], "anisotropy_p95": told["anisotropy_p95"], "gaussians": made.gaussians.num_gaussians,
        "seconds": made.record["seconds"]["refinement"],
    }  # fmt: skip
