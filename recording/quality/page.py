"""A dataset's figures as one self-contained HTML page: no file, script or address beside it."""

from __future__ import annotations

import base64
import html
import io
import math

import torch

from multiview.image import composite, grid, resize_rgba, to_uint8
from multiview.rig import View
from multiview.sample import Sample

THUMBNAIL = 192
COLOURS = {"poor": "#b3261e", "usable": "#9a6700", "good": "#1a7f37", "note": "#57606a"}
STYLE = (
    "body{font:14px/1.4 sans-serif;margin:2em;max-width:1300px;color:#1f2328}h1 b{padding:2px 12px;border-radius:6px;"
    "color:#fff}table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #d0d7de;padding:3px 8px;"
    "text-align:right}th{background:#f6f8fa}td:first-child{text-align:left}img{max-width:100%}li{margin:4px 0}"
    ".plots{display:flex;gap:2em;flex-wrap:wrap}figure{margin:0}figcaption{max-width:420px;color:#57606a}"
)
LABELS = {  # columns of the table of views, in order, and what they are called
    "name": "view", "camera": "camera", "azimuth_deg": "azimuth deg", "elevation_deg": "elevation deg",
    "off_rig_view_deg": "off rig deg", "off_rig_deg": "off rig deg", "distance_mean": "distance",
    "distance_std": "± over frames", "focal": "focal / width", "centre_off_rms": "centre off / width",
    "mask_area": "mask area", "mask_area_variation": "± relative", "clipped": "clipped", "empty": "empty",
    "silhouette_iou": "IoU from the others", "tangency_rms": "tangents off / width", "brightness": "brightness",
    "dark_share": "dark", "bright_share": "white", "sharpness": "sharpness",
}  # fmt: skip


def to_html(title: str, report: dict, views: list[dict], wanted: tuple[View, ...], areas: list, samples: list) -> str:
    """report: grade, findings and figures. views: rows of the table. wanted: the rig's views, open circles in the plot.

    areas: [v] lists of mask areas over the samples, None where a mask is unusable. samples: shown side by side.
    """
    colour = COLOURS[report["grade"]]
    findings = "".join(
        f"<li><b style='color:{COLOURS[f['severity']]}'>{f['severity']}</b> {html.escape(f['what'])}"
        f"<br><i>{html.escape(f['remedy'])}</i></li>"
        for f in report["findings"]
    )
    totals = {**report, **report.get("pictures", {})}
    totals = {k: v for k, v in totals.items() if isinstance(v, (int, float, str)) and k != "grade"}
    pictures = "".join(_sample(sample) for sample in samples)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}: <b style='background:{colour}'>{report['grade']}</b></h1>"
        f"<ul>{findings or '<li>nothing to complain about</li>'}</ul>"
        f"<h2>Views</h2>{_table(views)}<div class='plots'>{_directions(views, wanted)}{_areas(views, areas)}</div>"
        f"<h2>Samples</h2>{pictures}<h2>Figures</h2><table>"
        + "".join(f"<tr><td>{html.escape(k)}</td><td>{_cell(v)}</td></tr>" for k, v in totals.items())
        + "</table></html>"
    )


def _table(views: list[dict]) -> str:
    columns = [key for key in LABELS if any(view.get(key) is not None for view in views)]
    head = "".join(f"<th>{LABELS[key]}</th>" for key in columns)
    rows = "".join("<tr>" + "".join(f"<td>{_cell(view.get(key))}</td>" for key in columns) + "</tr>" for view in views)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _cell(value) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


def _sample(sample: Sample) -> str:
    from PIL import Image

    small = torch.stack([resize_rgba(rgba, THUMBNAIL) for rgba in sample.rgba])
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(grid(composite(small, 1.0), columns=min(len(small), 6)))).save(buffer, format="PNG")
    frame = f" (frame {sample.extra['frame']})" if "frame" in sample.extra else ""
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<p>{html.escape(sample.id)}{frame}<br><img alt='views' src='data:image/png;base64,{data}'></p>"


def _directions(views: list[dict], wanted: tuple[View, ...]) -> str:
    """Where the cameras stand, from above: azimuth 0 (-y) is at the bottom, radius is 90 degrees minus elevation."""
    size = 340
    scale = 0.42 * size / 90

    def place(azimuth: float, elevation: float) -> tuple[float, float]:
        radius = (90 - elevation) * scale
        angle = math.radians(azimuth)
        return size / 2 - radius * math.sin(angle), size / 2 + radius * math.cos(angle)

    marks = [
        f"<circle cx='{size / 2}' cy='{size / 2}' r='{(90 - e) * scale:.1f}' fill='none' stroke='#d0d7de'/>"
        for e in (0, 30, 60)
    ]
    for view in wanted:
        x, y = place(view.azimuth_deg, view.elevation_deg)
        marks.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='9' fill='none' stroke='#0969da' stroke-width='2'/>")
    for number, view in enumerate(views):
        x, y = place(view["azimuth_deg"], view["elevation_deg"])
        marks.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='#b3261e'/>")
        marks.append(f"<text x='{x + 9:.1f}' y='{y - 6:.1f}' font-size='11'>{number}</text>")
    caption = "Cameras from above (filled) and the rig's views (open); rings at elevation 0, 30 and 60 degrees"
    return _figure(size, size, marks, caption)


def _areas(views: list[dict], areas: list) -> str:
    """Mask area over the samples, one line per view."""
    width, height = 560, 340
    highest = max((area for row in areas for area in row if area is not None), default=1.0) * 1.05
    marks = [f"<rect width='{width}' height='{height}' fill='none' stroke='#d0d7de'/>"]
    for number, row in enumerate(areas):
        step = width / max(len(row) - 1, 1)
        known = [(index, area) for index, area in enumerate(row) if area is not None]
        points = " ".join(f"{index * step:.1f},{height * (1 - area / highest):.1f}" for index, area in known)
        hue = f"hsl({360 * number / len(areas):.0f} 70% 40%)"
        marks.append(f"<polyline points='{points}' fill='none' stroke='{hue}' stroke-width='1.5'/>")
        marks.append(f"<text x='6' y='{16 + 15 * number}' font-size='12' fill='{hue}'>{number} "
                     f"{html.escape(str(views[number]['name']))}</text>")  # fmt: skip
    return _figure(width, height, marks, f"Mask area over the samples looked at; full height is {100 * highest:.1f} %")


def _figure(width: int, height: int, marks: list[str], caption: str) -> str:
    return (
        f"<figure><svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'>{''.join(marks)}</svg>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
