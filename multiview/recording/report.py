"""The quality report of an imported recording: quality_report.json for programs, quality_report.html for eyes."""

from __future__ import annotations

import base64
import html
import io
import math
from pathlib import Path

import numpy as np
import torch

from multiview.checkpoint import atomic_write, write_json
from multiview.image import composite, grid, to_uint8
from multiview.recording.analysis import Analysis
from multiview.recording.calibration import Calibration
from multiview.recording.geometry import Placement, Plan, circular_mean_deg, directions_from, frame_extent, label_error
from multiview.sample import Sample, read_sample

INSPECTED = 24  # samples whose pictures are read
SHOWN = 4  # samples shown side by side
VOXELS = 96


def write_report(
    folder: Path, calibration: Calibration, analysis: Analysis, plan: Plan, placements: list[Placement], image_size: int
) -> dict:
    """Measures the dataset, writes quality_report.json and .html into it, returns the former's content."""
    picks = np.unique(np.round(np.linspace(0, len(placements) - 1, min(INSPECTED, len(placements)))).astype(int))
    samples = [read_sample(folder / f"sample_{index:06d}") for index in picks]
    report = measure_geometry(calibration, analysis, plan, placements, image_size)
    report["pictures"] = measure_pictures(samples, plan.rig.view_names)
    report["grade"], report["reasons"] = grade(report)
    write_json(folder / "quality_report.json", report)
    with atomic_write(folder / "quality_report.html") as temporary:
        temporary.write_text(to_html(report, plan, samples[:: max(1, len(samples) // SHOWN)][:SHOWN]))
    return report


def measure_geometry(
    calibration: Calibration, analysis: Analysis, plan: Plan, placements: list[Placement], image_size: int
) -> dict:
    """From the masks and cameras of every frame: directions, distances, centre's consistency, clipping, label error."""
    order = plan.order
    azimuth, elevation, distance = directions_from(analysis.centres, calibration.centres[order])
    relative = azimuth - azimuth[:, [plan.rig.reference_view]]
    focal_px = np.stack([placement.true_focal for placement in placements]) * image_size
    off_px = analysis.residuals[:, order] / distance * focal_px
    extents = np.stack(
        [
            frame_extent(calibration, plan, placement, [mask.hull for mask in masks])
            for placement, masks in zip(placements, analysis.masks, strict=True)
        ]
    )
    deviation = np.stack([placement.deviation_deg for placement in placements])
    border = np.array([[masks[k].touches_border for k in order] for masks in analysis.masks])
    errors = np.array([label_error(plan, calibration, placement) for placement in placements])
    views = [
        {
            "name": view.name,
            "camera": order[slot],
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


def measure_pictures(samples: list[Sample], names: list[str]) -> dict:
    """From some samples' pictures: mask areas, rim, brightness, and how well the silhouettes agree in 3D."""
    alpha = torch.stack([sample.rgba[:, 3] for sample in samples])  # [t, v, h, w]
    rgb = torch.stack([sample.rgba[:, :3] for sample in samples])
    area = alpha.mean(dim=(-1, -2))
    rim = torch.cat([alpha[..., 0, :], alpha[..., -1, :], alpha[..., :, 0], alpha[..., :, -1]], dim=-1)
    brightness = (rgb * alpha[:, :, None]).mean(dim=(2, 3, 4)) / area.clamp_min(1e-6)
    agreement = np.array([silhouette_agreement(sample) for sample in samples[:8]])
    return {
        "inspected": len(samples),
        "mask_area_mean": float(area.mean()),
        "mask_area_variation": float(area.std(unbiased=False) / area.mean()),
        "views_touching_rim": int((rim.amax(dim=-1) > 0).sum()),
        "silhouette_iou_mean": float(agreement.mean()),
        "per_view": [
            {
                "name": name,
                "mask_area": float(area[:, slot].mean()),
                "brightness": float(brightness[:, slot].mean()),
                "silhouette_iou": float(agreement[:, slot].mean()),
            }
            for slot, name in enumerate(names)
        ],
    }


def silhouette_agreement(sample: Sample) -> list[float]:
    """Per view: IoU of its mask with the outline of the visual hull of all views; 1 when cameras and masks agree.

    The hull is carved on a grid and projected back, so about 0.95 is what a perfect sample reaches.
    """
    import torch.nn.functional as F

    count = len(sample.view_names)
    masks = F.interpolate(sample.rgba[:, 3:], size=(VOXELS, VOXELS), mode="area") > 0.5
    cameras = sample.cameras.resize(VOXELS, VOXELS)
    half = float((cameras.distance / cameras.fxfycxcy[:, 0]).mean()) * VOXELS / 2
    ticks = (torch.arange(VOXELS) + 0.5) / VOXELS * 2 * half - half
    points = torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), dim=-1).reshape(-1, 3)
    for view in range(count):
        inside = _look_up(masks[view, 0], cameras[[view]].project(points[None])[0][0])
        points = points[inside]
    result = []
    for view in range(count):
        outline = torch.zeros(VOXELS, VOXELS, dtype=torch.bool)
        if len(points):
            column, row = cameras[[view]].project(points[None])[0][0].floor().long().clamp(0, VOXELS - 1).unbind(-1)
            outline[row, column] = True
        # Close the gaps that voxels nearer than the centre leave.
        closed = F.max_pool2d(outline[None, None].float(), 3, 1, 1)
        closed = 1 - F.max_pool2d(1 - closed, 3, 1, 1) > 0.5
        both, either = (closed[0, 0] & masks[view, 0]).sum(), (closed[0, 0] | masks[view, 0]).sum()
        result.append(float(both / either.clamp_min(1)))
    return result


def _look_up(mask: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    column, row = uv.floor().long().unbind(-1)
    inside = (column >= 0) & (column < mask.shape[1]) & (row >= 0) & (row < mask.shape[0])
    return inside & mask[row.clamp(0, mask.shape[0] - 1), column.clamp(0, mask.shape[1] - 1)]


def grade(report: dict) -> tuple[str, list[str]]:
    """`good`, `usable` or `poor`, with every reason and what to do about it."""
    size = report["image_size"]
    poor, usable = [], []
    if report["clipped_views"] or report["pictures"]["views_touching_rim"]:
        poor.append("animals are clipped by the pictures' border")
    if report["centre_off_px_rms"] > 0.05 * size:
        poor.append("the masks' centres do not meet in 3D: check calibration, camera numbering and synchronisation")
    elif report["centre_off_px_rms"] > 0.02 * size:
        usable.append("the masks' centres meet loosely: look for bad masks in the views with a large centre_off_px_rms")
    if report["pictures"]["silhouette_iou_mean"] < 0.75:
        poor.append("silhouettes do not agree in 3D: check calibration and masks" + _nearest_hint(report))
    elif report["pictures"]["silhouette_iou_mean"] < 0.88:
        usable.append("silhouettes agree only roughly in 3D" + _nearest_hint(report))
    if report["zoom"] < 0.6:
        usable.append(
            f"pictures are {report['zoom']:.2f} of their standard size because one mask reaches far out; a bad mask "
            "can do that"
        )
    if report["cut_by_photograph"]:
        cut = report["cut_by_photograph"]
        usable.append(f"{cut} masks touch the edge of their photograph: the animal is cut there")
    if report["skipped_frames"]:
        usable.append(f"{report['skipped_frames']} frames were left out for empty masks")
    return ("poor" if poor else "usable" if usable else "good"), poor + usable


def _nearest_hint(report: dict) -> str:
    return (
        " (poses nearest moves cameras to the rig's places, which costs this)" if report["poses"] == "nearest" else ""
    )


# ---- HTML -------------------------------------------------------------------------------------------------------


def to_html(report: dict, plan: Plan, samples: list[Sample]) -> str:
    """One self-contained page."""
    totals = {key: value for key, value in report.items() if not isinstance(value, (dict, list))}
    columns = list(report["views"][0]) + ["mask_area", "brightness", "silhouette_iou"]
    rows = [{**view, **seen} for view, seen in zip(report["views"], report["pictures"]["per_view"], strict=True)]
    table = "".join("<tr>" + "".join(f"<td>{_cell(row[c])}</td>" for c in columns) + "</tr>" for row in rows)
    pictures = "".join(
        f"<p>{html.escape(sample.id)} (frame {sample.extra.get('frame')})<br>"
        f"<img src='data:image/png;base64,{_sheet(sample)}'></p>"
        for sample in samples
    )
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in report["reasons"])
    return (
        "<!doctype html><meta charset='utf-8'><title>Quality report</title><style>body{font:14px sans-serif;margin:2em}"
        "td,th{border:1px solid #ccc;padding:3px 8px;text-align:right}table{border-collapse:collapse}</style>"
        f"<h1>Quality report: {report['grade']}</h1><ul>{reasons}</ul>"
        "<table>" + "".join(f"<tr><th>{k}</th><td>{_cell(v)}</td></tr>" for k, v in totals.items()) + "</table>"
        "<h2>Views</h2><table><tr>" + "".join(f"<th>{c}</th>" for c in columns) + f"</tr>{table}</table>"
        "<h2>Directions</h2><p>From above; radius is 90 degrees minus elevation. Filled: cameras, open: rig.</p>"
        f"{_polar(report, plan)}<h2>Samples</h2>{pictures}"
    )


def _cell(value) -> str:
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def _sheet(sample: Sample) -> str:
    from PIL import Image

    from multiview.image import resize_rgba

    small = torch.stack([resize_rgba(rgba, 192) for rgba in sample.rgba])
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(grid(composite(small, 1.0), columns=len(small)))).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _polar(report: dict, plan: Plan) -> str:
    """Cameras (filled) and the requested rig's views (open) as an SVG seen from above; azimuth 0 is below (-y)."""
    size, marks = 260, []
    wanted = plan.requested.views if plan.requested else ()
    dots = [(view["azimuth_deg"], view["elevation_deg"], "#c33") for view in report["views"]]
    dots += [(view.azimuth_deg, view.elevation_deg, "none") for view in wanted]
    for azimuth, elevation, fill in dots:
        radius = (90 - elevation) / 90 * 0.45 * size
        x = size / 2 - radius * math.sin(math.radians(azimuth))
        y = size / 2 + radius * math.cos(math.radians(azimuth))
        marks.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='6' fill='{fill}' stroke='#333'/>")
    ring = f"<circle cx='{size / 2}' cy='{size / 2}' r='{0.45 * size}' fill='none' stroke='#bbb'/>"
    return f"<svg width='{size}' height='{size}'>{ring}{''.join(marks)}</svg>"
