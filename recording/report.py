"""quality_report.json for programs and quality_report.html for eyes: of an import, and of any dataset."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from multiview.files import atomic_write, write_json
from multiview.rig import View, load_rig
from multiview.sample import read_sample
from recording.analysis import Analysis, hulls_of
from recording.calibration import Calibration
from recording.geometry import Placement, Plan, circular_mean_deg, directions_from, label_error, mask_extents
from recording.lanes import sample_name
from recording.quality.dataset import choose_evenly, find_samples, measure_folders
from recording.quality.findings import Finding, dataset_findings, grade
from recording.quality.measure import Measured, measure_sample
from recording.quality.page import to_html
from recording.quality.summary import summarise

INSPECTED = 24  # samples of an import whose pictures are read
CARVED = 4  # of these, how many are carved, which takes most of the time: a mean over 24 views
SHOWN = 4  # samples shown side by side
USABLE_CENTRE, POOR_CENTRE = 0.02, 0.05  # of the picture's size
TOLERATED_LABEL_ERROR = 0.07  # of the half length: what facelift framing costs with exact poses
SMALL_ZOOM = 0.6
# Findings that follow from labels which are not the true cameras (facelift framing, nearest poses).
LABEL_ERRORS = ("silhouettes_disagree", "focal", "principal_point", "camera_off", "cameras_off", "views_scaled",
                "views_moved", "views_scaled_and_moved", "view_scale", "view_shift", "view_roll", "each_scaled",
                "each_moved", "each_scaled_and_moved")  # fmt: skip
JSON_NAME, HTML_NAME = "quality_report.json", "quality_report.html"


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
    found = find_samples(data)
    stated = load_rig(rig) if rig is not None else found.rig
    count = num_views if num_views is not None else stated.num_views if stated is not None else None
    folders = [found.folders[index] for index in choose_evenly(len(found.folders), num_samples)]
    measured, broken = measure_folders(folders, num_views=count, workers=workers, progress=progress)
    if not measured:
        first = broken[str(folders[0])]
        raise ValueError(f"none of the {len(folders)} samples of {data} can be read; the first: {first}")
    summary, diagnosis = summarise(measured, stated)
    findings = dataset_findings(summary, diagnosis, stated, broken, found.notes)
    if found.info.get("framing") == "facelift" or found.info.get("poses") == "nearest":
        findings = _known_labels(findings, found.info["framing"], found.info["poses"], summary["tangency_rms"])
    report = {
        "dataset_samples": len(found.folders),
        "unreadable": {_short(name, data): reason for name, reason in broken.items()},
        **summary,
        **grade(findings),
    }
    _write(output_dir, f"Quality of {data.name}", report, report["views"], stated.views if stated else (), measured)
    return report


def write_report(
    folder: Path, calibration: Calibration, analysis: Analysis, plan: Plan, placements: list[Placement],
    image_size: int, *, workers: int = 1,
) -> dict:  # fmt: skip
    """Measures an imported dataset, writes the report into it, returns quality_report.json's content."""
    picks = choose_evenly(len(placements), INSPECTED)
    carved = {picks[place] for place in choose_evenly(len(picks), CARVED)}

    def measured_sample(index: int) -> Measured:
        return measure_sample(read_sample(folder / sample_name(index)), hulls=index in carved)

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
    wanted = plan.requested.views if plan.requested else ()
    _write(folder, "Quality report", report, views, wanted, measured)
    return report


def _write(
    folder: Path, title: str, report: dict, views: list[dict], wanted: tuple[View, ...], measured: list[Measured]
) -> None:
    shown = [measured[index].folder for index in choose_evenly(len(measured), SHOWN)]
    samples = [read_sample(path, num_views=len(views)) for path in shown]
    areas = [
        [one.views[slot]["area"] if one.views[slot]["usable"] else None for one in measured]
        for slot in range(len(views))
    ]
    write_json(folder / JSON_NAME, report)
    with atomic_write(folder / HTML_NAME) as temporary:
        temporary.write_text(to_html(title, report, views, wanted, areas, samples))


def measure_geometry(
    calibration: Calibration, analysis: Analysis, plan: Plan, placements: list[Placement], image_size: int
) -> dict:
    """From the masks and cameras of every frame: directions, distances, centre's consistency, clipping, label error."""
    orders = np.array([placement.order for placement in placements])  # with a heading, cameras change their views
    azimuth, elevation, distance = (
        np.take_along_axis(values, orders, axis=1)
        for values in directions_from(analysis.centres, calibration.centres)
    )
    relative = azimuth - azimuth[:, [plan.rig.reference_view]]
    focal_px = np.stack([placement.true_focal for placement in placements]) * image_size
    off_px = np.take_along_axis(analysis.residuals, orders, axis=1) / distance * focal_px
    extents = mask_extents(calibration, placements, hulls_of(analysis))
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
            "extent_max": float(extents[:, slot].max()),
            "cut_by_photograph": int(border[:, slot].sum()),
        }
        for slot, view in enumerate(plan.rig.views)
    ]
    return {
        "num_samples": len(placements),
        "skipped_frames": len(analysis.skipped),
        "image_size": image_size,
        "rig": plan.rig.name,
        "requested_rig": plan.requested.name if plan.requested else None,
        "framing": plan.framing,
        "poses": plan.poses,
        "body_length": plan.body_length,
        "body_length_world": plan.body_length * plan.scale,
        "zoom": plan.zoom,
        "distance_mean": float(distance.mean()),
        "distance_variation": float(distance.std() / distance.mean()),
        "centre_off_px_rms": float(np.sqrt((off_px**2).mean())),
        "centre_off_px_max": float(off_px.max()),
        "clipped_views": int((extents > 1.0).sum()),
        "cut_by_photograph": int(border.sum()),
        "label_error_rms": float(errors[:, 0].mean()),
        "label_error_max": float(errors[:, 1].max()),
        "views": views,
    }


def import_findings(report: dict) -> list[Finding]:
    """What only the recording itself shows: all masks of all frames, and the calibration."""
    size, found = report["image_size"], []
    if report["clipped_views"]:
        what = f"{report['clipped_views']} masks reach beyond their pictures"
        found.append(Finding("clipped", "poor", what, "import again with a larger --body_length"))
    off = report["centre_off_px_rms"]
    if off > USABLE_CENTRE * size:
        severity = "poor" if off > POOR_CENTRE * size else "usable"
        what = f"the masks' centres miss each other in 3D by {off:.1f} px rms of {size}"
        remedy = (
            "check calibration, camera numbering, synchronisation, and masks of views with a large centre_off_px_rms"
        )
        found.append(Finding("centres", severity, what, remedy))
    if report["label_error_rms"] > 1e-6:
        what = (
            f"the cameras written ({report['framing']} framing, {report['poses']} poses) are not the true ones: off by "
            f"{100 * report['label_error_rms']:.1f} % of the animal's half length at its ends (rms)"
        )
        remedy = "this was asked for; --framing fill --poses exact has no such error, for models trained so"
        severity = "usable" if report["label_error_rms"] > TOLERATED_LABEL_ERROR else "note"
        found.append(Finding("labels", severity, what, remedy))
    if report["zoom"] < SMALL_ZOOM:
        what = f"pictures are {report['zoom']:.2f} of their standard size because one mask reaches far out"
        found.append(Finding("zoom", "usable", what, "look at the frame that decides: a bad mask can do that"))
    if report["cut_by_photograph"]:
        what = f"{report['cut_by_photograph']} masks touch the edge of their photograph: the animal is cut there"
        found.append(Finding("cut", "usable", what, "leave these frames out, or film a wider field"))
    if report["skipped_frames"]:
        what = f"{report['skipped_frames']} frames were left out for empty masks"
        found.append(Finding("skipped", "usable", what, "segment these frames again if they matter"))
    return found


def _known_labels(findings: list[Finding], framing: str, poses: str, disagreement: float | None) -> list[Finding]:
    """One note in place of the faults that an import which writes other cameras than the true ones has by design."""
    if disagreement is None:
        return findings
    what = (
        f"the cameras written ({framing} framing, {poses} poses) are not the true ones, as dataset.json says: "
        f"silhouettes disagree by {100 * disagreement:.1f} % of the width"
    )
    known = Finding("labels", "note", what, "import with --framing fill --poses exact for cameras without this error")
    return [known, *(finding for finding in findings if finding.code not in LABEL_ERRORS)]


def _short(name: str, data: Path) -> str:
    """A sample's path relative to its dataset, so that a report does not name a machine."""
    root = data if data.is_dir() else data.parent
    path = Path(name)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
