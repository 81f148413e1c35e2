"""How good a dataset of posed, masked views is, and if it is not, why: of an import, and of any dataset.

quality_report.json for programs, quality_report.html for eyes.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch

from multiview.files import read_lines, write_json
from multiview.image import composite, grid, resize_rgba
from multiview.report import Figure, Table, write_page
from multiview.rig import View, load_rig
from multiview.sample import CAMERAS_FILE, DATASET_FILE, read_dataset_info, read_sample, read_split
from recording.analysis import Analysis
from recording.calibration.model import Calibration
from recording.geometry import Plan, circular_mean_deg, directions_from, label_error
from recording.quality.findings import Finding, dataset_findings, grade, import_findings
from recording.quality.measure import Measured, measure_folders, summarise
from recording.quality.silhouettes import evenly
from recording.settings import ImportSettings

INSPECTED = 24  # samples of an import whose images are read
CARVED = 4  # of these, how many are carved, which takes most of the time: a mean over 24 views
SHOWN, THUMBNAIL = 4, 192  # samples shown side by side; pixels of a view
JSON_NAME, HTML_NAME = "quality_report.json", "quality_report.html"
LABELS = {  # columns of the table of views, in order, and what they are called
    "name": "view", "camera": "camera", "azimuth_deg": "azimuth deg", "elevation_deg": "elevation deg",
    "off_rig_view_deg": "off rig deg", "off_rig_deg": "off rig deg", "distance_mean": "distance",
    "distance_std": "± over frames", "focal": "focal / width", "centre_off_rms": "centre off / width",
    "mask_area": "mask area", "mask_area_variation": "± relative", "clipped": "clipped", "empty": "empty",
    "silhouette_iou": "IoU from the others", "tangency_rms": "tangents off / width", "brightness": "brightness",
    "bright_share": "white", "sharpness": "sharpness",
}  # fmt: skip


def find_samples(data: Path) -> tuple[list[Path], dict, list[str]]:
    """Returns sample folders, what dataset.json says ({} without one), and what is unusual about a list.

    data: a split list (FaceLift's with absolute paths or camera files too), a dataset folder, or one sample.
    """
    notes: list[str] = []
    root = data if data.is_dir() and not (data / CAMERAS_FILE).is_file() else data.parent
    if data.is_file():
        lines = read_lines(data)
        notes += ["absolute_paths"] if any(map(os.path.isabs, lines)) else []
        notes += ["camera_files"] if any(line.endswith(".json") for line in lines) else []
        places = [root / line for line in lines]  # an absolute line replaces the root
        folders = [place.parent if place.name == CAMERAS_FILE else place for place in places]
        missing = [folder for folder in folders if not folder.is_dir()]
        if not notes:
            folders = read_split(data)  # refuses what leads out of the dataset
        elif missing:
            what = f"{len(missing)} of {len(folders)} sample folders that are not there, the first {missing[0]}"
            raise ValueError(f"{data} names {what}; if the dataset moved, write paths relative to the list")
    elif not data.exists():
        raise ValueError(f"--data {data} does not exist; name a dataset folder, a sample folder or a split list")
    else:
        folders = [data] if root != data else sorted(path.parent for path in data.glob(f"*/{CAMERAS_FILE}"))
    if not folders:
        expected = f"a dataset folder, a sample folder ({CAMERAS_FILE} and its pictures) or a split list is expected"
        raise ValueError(f"--data {data} holds no sample folder; {expected}")
    return folders, read_dataset_info(root) if (root / DATASET_FILE).is_file() else {}, notes


def check_dataset(
    data: Path, output_dir: Path, *, rig: str | None = None, num_samples: int = 200, num_views: int | None = None,
    workers: int = 2, progress: bool = False,
) -> dict:  # fmt: skip
    """Measures any dataset, writes the report into output_dir, returns it.

    data: as in `find_samples`. rig: name or file, by default what dataset.json states. num_samples: evenly spaced over
    the dataset. num_views: the first so many of each sample; by default the rig's, or all.
    """
    folders, info, notes = find_samples(data)
    stated = load_rig(rig) if rig is not None else info.get("rig")
    count = num_views if num_views is not None else stated.num_views if stated is not None else None
    chosen = [folders[index] for index in evenly(len(folders), num_samples)]
    measured, broken = measure_folders(chosen, num_views=count, workers=workers, progress=progress)
    if not measured:
        first = broken[str(chosen[0])]
        raise ValueError(f"none of the {len(chosen)} samples of {data} can be read; the first: {first}")
    summary, diagnosis = summarise(measured, stated)
    told, framing, poses = [], info.get("framing"), info.get("poses")
    if diagnosis is not None and (framing == "facelift" or poses == "nearest"):
        off = f"silhouettes disagree by {100 * diagnosis.rms:.1f} % of the width"
        cameras = f"the cameras written ({framing} framing, {poses} poses) are not the true ones, as dataset.json says"
        remedy = "import with --framing fill --poses exact for cameras without this error"
        told = [Finding("labels", "note", f"{cameras}: {off}", remedy)]
    findings = [*told, *dataset_findings(summary, diagnosis, stated, broken, notes, true_labels=not told)]
    root, unreadable = data if data.is_dir() else data.parent, {}
    for name, reason in broken.items():  # a report does not name a machine
        path = Path(name)
        unreadable[path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name] = reason
    report = {"dataset_samples": len(folders), "unreadable": unreadable, **summary, **grade(findings)}
    _write(output_dir, f"Quality of {data.name}", report, report["views"], stated.views if stated else (), measured)
    return report


def write_report(settings: ImportSettings, calibration: Calibration, analysis: Analysis, plan: Plan) -> dict:
    """Measures an imported dataset, writes the report into it, returns quality_report.json's content.

    Of every frame's masks and cameras: directions, distances, center's consistency, clipping, label error.
    """
    orders = plan.orders  # with a heading, cameras change their views
    touched = np.stack([track.touches_border[analysis.places] for track in analysis.tracks], axis=1)
    seen = (*directions_from(analysis.centres, calibration.centres), analysis.residuals, touched)
    azimuth, elevation, distance, off, border = (np.take_along_axis(values, orders, axis=1) for values in seen)
    relative = azimuth - azimuth[:, [plan.rig.reference_view]]
    off_px = off / distance * (plan.true_focal * settings.image_size)
    errors = np.array([label_error(plan, calibration, index) for index in range(len(orders))])
    views = [
        {
            "name": view.name, "camera": int(orders[0, slot]),
            "azimuth_deg": float(circular_mean_deg(relative[:, slot])),
            "elevation_deg": float(elevation[:, slot].mean()),
            "off_rig_view_deg": float(plan.view_off_deg[slot]) if plan.requested else 0.0,
            "frame_deviation_deg_max": float(plan.deviation_deg[:, slot].max()),
            "distance_mean": float(distance[:, slot].mean()), "distance_std": float(distance[:, slot].std()),
            "centre_off_px_rms": float(np.sqrt((off_px[:, slot] ** 2).mean())),
            "extent_max": float(plan.extents[:, slot].max()), "cut_by_photograph": int(border[:, slot].sum()),
        }
        for slot, view in enumerate(plan.rig.views)
    ]  # fmt: skip
    picks = evenly(len(orders), INSPECTED)
    folders = [settings.sample(index) for index in picks]
    carved = [folders[place] for place in evenly(len(picks), CARVED)]
    measured, broken = measure_folders(folders, num_views=None, workers=settings.workers, carved=carved)
    summary, diagnosis = summarise(measured, plan.rig)
    report = {
        "num_samples": len(orders), "skipped_frames": len(analysis.skipped), "image_size": settings.image_size,
        "rig": plan.rig.name, "requested_rig": plan.requested.name if plan.requested else None,
        "framing": settings.framing, "poses": settings.poses,
        "body_length": plan.body_length, "body_length_world": plan.body_length * plan.scale, "zoom": plan.zoom,
        "distance_mean": float(distance.mean()), "distance_variation": float(distance.std() / distance.mean()),
        "centre_off_px_rms": float(np.sqrt((off_px**2).mean())), "centre_off_px_max": float(off_px.max()),
        "clipped_views": int((plan.extents > 1.0).sum()), "cut_by_photograph": int(border.sum()),
        "label_error_rms": float(errors[:, 0].mean()), "label_error_max": float(errors[:, 1].max()),
        "views": views, "pictures": summary,
    }  # fmt: skip
    true_labels = report["label_error_rms"] <= 1e-6  # import_findings tells how large it is
    findings = dataset_findings(summary, diagnosis, plan.rig, broken, [], true_labels=true_labels)
    report |= grade([*import_findings(report), *findings])
    rows, wanted = zip(summary["views"], views, strict=True), plan.requested.views if plan.requested else ()
    rows = [{**pictured, **view} for pictured, view in rows]
    _write(settings.output_dir, "Quality report", report, rows, wanted, measured)
    return report


def _write(
    folder: Path, title: str, report: dict, views: list[dict], wanted: tuple[View, ...], measured: list[Measured]
) -> None:
    """wanted: the rig's views, open circles in the plot."""
    write_json(folder / JSON_NAME, report)
    columns = [key for key in LABELS if any(view.get(key) is not None for view in views)]
    findings = [(finding["severity"], finding["what"], finding["remedy"]) for finding in report["findings"]]
    blocks = [
        Table("Findings", ("severity", "what", "remedy"), findings) if findings else "nothing to complain about",
        Table("Views", [LABELS[key] for key in columns], [[view.get(key) for key in columns] for view in views]),
        _plots(views, wanted, measured),
    ]
    for index in evenly(len(measured), SHOWN):
        sample = read_sample(measured[index].folder, num_views=len(views))
        small = torch.stack([resize_rgba(rgba, THUMBNAIL) for rgba in sample.rgba])
        frame = f" (frame {sample.extra['frame']})" if "frame" in sample.extra else ""
        blocks.append(Figure(f"{sample.id}{frame}", grid(composite(small, 1.0), columns=min(len(small), 6))))
    totals = {**report, **report.get("pictures", {})}
    facts = {key: value for key, value in totals.items() if isinstance(value, (int, float, str)) and key != "grade"}
    write_page(folder / HTML_NAME, title, blocks, facts=facts, badge=report["grade"])


def _plots(views: list[dict], wanted: tuple[View, ...], measured: list[Measured]) -> Figure:
    """Where the cameras stand, from above, and each view's mask area over the samples; views by their numbers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(10, 4), layout="constrained")
    above, areas = plot.add_subplot(121, projection="polar"), plot.add_subplot(122)
    above.set_theta_zero_location("S")  # azimuth 0 is -y and grows clockwise
    above.set_theta_direction(-1)
    above.set(rmin=0, rmax=100, yticks=(30, 60, 90), yticklabels=())
    for view in wanted:
        above.plot(np.radians(view.azimuth_deg), 90 - view.elevation_deg, "o", ms=11, mfc="none", mec="#0969da")
    for number, view in enumerate(views):
        where = (np.radians(view["azimuth_deg"]), 90 - view["elevation_deg"])
        above.plot(*where, "o", ms=5, color="#b3261e")
        above.annotate(str(number), where, xytext=(6, 4), textcoords="offset points")
        rows = [one.views[number] for one in measured]
        areas.plot([row["area"] if row["usable"] else np.nan for row in rows], label=str(number))
    areas.set(ylim=(0, None), xlabel="sample", ylabel="mask area")
    areas.legend(loc="upper right", fontsize=8)
    text = io.StringIO()
    with rc_context({"svg.hashsalt": HTML_NAME}):  # the same bytes every time
        plot.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    caption = "Cameras from above (filled) and the rig's views (open), rings at elevation 60, 30, 0 degrees; mask areas"
    return Figure(caption, svg=text.getvalue()[text.getvalue().index("<svg") :])
