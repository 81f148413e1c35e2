"""How good a dataset of posed, masked views is, and if it is not, why: of an import, and of any dataset.

quality_report.json for programs, quality_report.html for eyes.
"""

from __future__ import annotations

import html
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from multiview.files import read_lines, write_json
from multiview.report import Figure, Table, write_page
from multiview.rig import View, load_rig
from multiview.sample import CAMERAS_FILE, DATASET_FILE, read_dataset_info, read_sample, read_split
from recording.geometry import circular_mean_deg, directions_from, label_error
from recording.quality.findings import LABEL_ERRORS, Finding, dataset_findings, grade, import_findings
from recording.quality.measure import Measured, measure_folders, measure_sample, summarise

if TYPE_CHECKING:
    from recording.analysis import Analysis
    from recording.calibration.model import Calibration
    from recording.geometry import Placement, Plan

INSPECTED = 24  # samples of an import whose images are read
CARVED = 4  # of these, how many are carved, which takes most of the time: a mean over 24 views
SHOWN, THUMBNAIL = 4, 192  # samples shown side by side; pixels of a view
JSON_NAME, HTML_NAME = "quality_report.json", "quality_report.html"


# ---- any dataset ----------------------------------------------------------------------------------------------------


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
            raise ValueError(
                f"{data} names {len(missing)} of {len(folders)} sample folders that are not there, the first is "
                f"{missing[0]}; was the dataset moved? Write the list with paths relative to itself"
            )
    elif not data.exists():
        raise ValueError(f"--data {data} does not exist; name a dataset folder, a sample folder or a split list")
    else:
        folders = [data] if root != data else sorted(path.parent for path in data.glob(f"*/{CAMERAS_FILE}"))
    if not folders:
        raise ValueError(
            f"--data {data} holds no sample folder (<sample>/{CAMERAS_FILE} and its pictures); name a dataset folder, "
            "a sample folder or a split list"
        )
    return folders, read_dataset_info(root) if (root / DATASET_FILE).is_file() else {}, notes


def choose_evenly(count: int, wanted: int) -> list[int]:
    """Returns at most `wanted` of `count` indices, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


def check_dataset(
    data: Path,
    output_dir: Path,
    *,
    rig: str | None = None,
    num_samples: int = 200,
    num_views: int | None = None,
    workers: int = 2,
    progress: bool = False,
) -> dict:
    """Measures any dataset, writes the report into output_dir, returns it.

    data: split list, dataset folder or sample folder, FaceLift's included. rig: name or file, by default what
    dataset.json states. num_samples: evenly spaced over the dataset. num_views: the first so many of each sample; by
    default the rig's, or all.
    """
    folders, info, notes = find_samples(data)
    stated = load_rig(rig) if rig is not None else info.get("rig")
    count = num_views if num_views is not None else stated.num_views if stated is not None else None
    chosen = [folders[index] for index in choose_evenly(len(folders), num_samples)]
    measured, broken = measure_folders(chosen, num_views=count, workers=workers, progress=progress)
    if not measured:
        first = broken[str(chosen[0])]
        raise ValueError(f"none of the {len(chosen)} samples of {data} can be read; the first: {first}")
    summary, diagnosis = summarise(measured, stated)
    findings = dataset_findings(summary, diagnosis, stated, broken, notes)
    framing, poses = info.get("framing"), info.get("poses")
    if (framing == "facelift" or poses == "nearest") and diagnosis is not None:
        what = (
            f"the cameras written ({framing} framing, {poses} poses) are not the true ones, as dataset.json says: "
            f"silhouettes disagree by {100 * diagnosis.rms:.1f} % of the width"
        )
        remedy = "import with --framing fill --poses exact for cameras without this error"
        note = Finding("labels", "note", what, remedy)
        findings = [note, *(finding for finding in findings if finding.code not in LABEL_ERRORS)]
    root = data if data.is_dir() else data.parent
    short = {  # a report does not name a machine
        name: Path(name).relative_to(root).as_posix() if Path(name).is_relative_to(root) else Path(name).name
        for name in broken
    }
    report = {
        "dataset_samples": len(folders),
        "unreadable": {short[name]: reason for name, reason in broken.items()},
        **summary,
        **grade(findings),
    }
    _write(output_dir, f"Quality of {data.name}", report, report["views"], stated.views if stated else (), measured)
    return report


# ---- an import ------------------------------------------------------------------------------------------------------


def write_report(
    folder: Path, calibration: Calibration, analysis: Analysis, plan: Plan, placements: list[Placement],
    image_size: int, *, workers: int = 1,
) -> dict:  # fmt: skip
    """Measures an imported dataset, writes the report into it, returns quality_report.json's content."""
    folders, _, _ = find_samples(folder)
    picks = choose_evenly(len(placements), INSPECTED)
    carved = {picks[place] for place in choose_evenly(len(picks), CARVED)}

    def measured_sample(index: int) -> Measured:
        return measure_sample(read_sample(folders[index]), hulls=index in carved)

    with ThreadPoolExecutor(workers) as threads:  # decoding and carving leave Python's lock alone
        measured = list(threads.map(measured_sample, picks))
    report = measure_geometry(calibration, analysis, plan, placements, image_size)
    summary, diagnosis = summarise(measured, plan.rig)
    views = [{**seen, **view} for view, seen in zip(report["views"], summary["views"], strict=True)]
    findings = dataset_findings(summary, diagnosis, plan.rig, {}, [])
    if report["label_error_rms"] > 1e-6:  # import_findings tells how large it is
        findings = [finding for finding in findings if finding.code not in LABEL_ERRORS]
    report["pictures"] = summary
    report.update(grade([*import_findings(report), *findings]))
    _write(folder, "Quality report", report, views, plan.requested.views if plan.requested else (), measured)
    return report


def measure_geometry(
    calibration: Calibration, analysis: Analysis, plan: Plan, placements: list[Placement], image_size: int
) -> dict:
    """From the masks and cameras of every frame: directions, distances, center's consistency, clipping, label error."""
    orders = np.array([placement.order for placement in placements])  # with a heading, cameras change their views
    azimuth, elevation, distance = (
        np.take_along_axis(values, orders, axis=1) for values in directions_from(analysis.centres, calibration.centres)
    )
    relative = azimuth - azimuth[:, [plan.rig.reference_view]]
    focal_px = np.stack([placement.true_focal for placement in placements]) * image_size
    off_px = np.take_along_axis(analysis.residuals, orders, axis=1) / distance * focal_px
    deviation = np.stack([placement.deviation_deg for placement in placements])
    border = np.array(
        [[masks[k].touches_border for k in order] for order, masks in zip(orders, analysis.masks, strict=True)]
    )
    errors = np.array([label_error(plan, calibration, placement) for placement in placements])
    views = [
        {
            "name": view.name,
            "camera": plan.order[slot],
            "azimuth_deg": float(circular_mean_deg(relative[:, slot])),
            "elevation_deg": float(elevation[:, slot].mean()),
            "off_rig_view_deg": float(plan.view_off_deg[slot]) if plan.requested else 0.0,
            "frame_deviation_deg_max": float(deviation[:, slot].max()),
            "distance_mean": float(distance[:, slot].mean()),
            "distance_std": float(distance[:, slot].std()),
            "centre_off_px_rms": float(np.sqrt((off_px[:, slot] ** 2).mean())),
            "extent_max": float(plan.extents[:, slot].max()),
            "cut_by_photograph": int(border[:, slot].sum()),
        }
        for slot, view in enumerate(plan.rig.views)
    ]
    return {
        "num_samples": len(placements), "skipped_frames": len(analysis.skipped), "image_size": image_size,
        "rig": plan.rig.name, "requested_rig": plan.requested.name if plan.requested else None,
        "framing": plan.framing, "poses": plan.poses,
        "body_length": plan.body_length, "body_length_world": plan.body_length * plan.scale, "zoom": plan.zoom,
        "distance_mean": float(distance.mean()), "distance_variation": float(distance.std() / distance.mean()),
        "centre_off_px_rms": float(np.sqrt((off_px**2).mean())), "centre_off_px_max": float(off_px.max()),
        "clipped_views": int((plan.extents > 1.0).sum()), "cut_by_photograph": int(border.sum()),
        "label_error_rms": float(errors[:, 0].mean()), "label_error_max": float(errors[:, 1].max()),
        "views": views,
    }  # fmt: skip


# ---- the page -------------------------------------------------------------------------------------------------------

LABELS = {  # columns of the table of views, in order, and what they are called
    "name": "view", "camera": "camera", "azimuth_deg": "azimuth deg", "elevation_deg": "elevation deg",
    "off_rig_view_deg": "off rig deg", "off_rig_deg": "off rig deg", "distance_mean": "distance",
    "distance_std": "± over frames", "focal": "focal / width", "centre_off_rms": "centre off / width",
    "mask_area": "mask area", "mask_area_variation": "± relative", "clipped": "clipped", "empty": "empty",
    "silhouette_iou": "IoU from the others", "tangency_rms": "tangents off / width", "brightness": "brightness",
    "bright_share": "white", "sharpness": "sharpness",
}  # fmt: skip


def _write(
    folder: Path, title: str, report: dict, views: list[dict], wanted: tuple[View, ...], measured: list[Measured]
) -> None:
    """wanted: the rig's views, open circles in the plot."""
    import torch

    from multiview.image import composite, grid, resize_rgba

    write_json(folder / JSON_NAME, report)
    columns = [key for key in LABELS if any(view.get(key) is not None for view in views)]
    findings = [(finding["severity"], finding["what"], finding["remedy"]) for finding in report["findings"]]
    blocks = [
        Table("Findings", ("severity", "what", "remedy"), findings) if findings else "nothing to complain about",
        Table("Views", [LABELS[key] for key in columns], [[view.get(key) for key in columns] for view in views]),
        _directions(views, wanted), _areas(views, measured),
    ]  # fmt: skip
    for index in choose_evenly(len(measured), SHOWN):
        sample = read_sample(measured[index].folder, num_views=len(views))
        small = torch.stack([resize_rgba(rgba, THUMBNAIL) for rgba in sample.rgba])
        frame = f" (frame {sample.extra['frame']})" if "frame" in sample.extra else ""
        blocks.append(Figure(f"{sample.id}{frame}", grid(composite(small, 1.0), columns=min(len(small), 6))))
    totals = {**report, **report.get("pictures", {})}
    facts = {key: value for key, value in totals.items() if isinstance(value, (int, float, str)) and key != "grade"}
    write_page(folder / HTML_NAME, title, blocks, facts=facts, badge=report["grade"])


def _directions(views: list[dict], wanted: tuple[View, ...]) -> Figure:
    """Where the cameras stand, from above: azimuth 0 (-y) is at the bottom, radius is 90 degrees minus elevation."""
    size = 340
    scale = 0.42 * size / 90

    def place(azimuth: float, elevation: float) -> tuple[float, float]:
        radius, angle = (90 - elevation) * scale, math.radians(azimuth)
        return size / 2 - radius * math.sin(angle), size / 2 + radius * math.cos(angle)

    circle = "<circle cx='{:.1f}' cy='{:.1f}' r='{:.1f}' {}/>"
    marks = [circle.format(size / 2, size / 2, (90 - e) * scale, "fill='none' stroke='#d0d7de'") for e in (0, 30, 60)]
    open_style = "fill='none' stroke='#0969da' stroke-width='2'"
    marks += [circle.format(*place(view.azimuth_deg, view.elevation_deg), 9, open_style) for view in wanted]
    for number, view in enumerate(views):
        x, y = place(view["azimuth_deg"], view["elevation_deg"])
        marks.append(circle.format(x, y, 5, "fill='#b3261e'"))
        marks.append(f"<text x='{x + 9:.1f}' y='{y - 6:.1f}' font-size='11'>{number}</text>")
    caption = "Cameras from above (filled) and the rig's views (open); rings at elevation 0, 30 and 60 degrees"
    return Figure(caption, svg=_svg(size, size, marks))


def _areas(views: list[dict], measured: list[Measured]) -> Figure:
    """Mask area over the samples, one line per view."""
    width, height = 560, 340
    rows = [[one.views[slot] for one in measured] for slot in range(len(views))]
    highest = 1.05 * max((figures["area"] for row in rows for figures in row if figures["usable"]), default=1.0)
    marks = [f"<rect width='{width}' height='{height}' fill='none' stroke='#d0d7de'/>"]
    for number, row in enumerate(rows):
        step = width / max(len(row) - 1, 1)
        known = [(index, figures["area"]) for index, figures in enumerate(row) if figures["usable"]]
        points = " ".join(f"{index * step:.1f},{height * (1 - area / highest):.1f}" for index, area in known)
        hue = f"hsl({360 * number / len(rows):.0f} 70% 40%)"
        name = html.escape(str(views[number]["name"]))
        marks.append(f"<polyline points='{points}' fill='none' stroke='{hue}' stroke-width='1.5'/>")
        marks.append(f"<text x='6' y='{16 + 15 * number}' font-size='12' fill='{hue}'>{number} {name}</text>")
    caption = f"Mask area over the samples looked at; full height is {100 * highest:.1f} %"
    return Figure(caption, svg=_svg(width, height, marks))


def _svg(width: int, height: int, marks: list[str]) -> str:
    return f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'>{''.join(marks)}</svg>"
