"""Tables of an evaluation, in Markdown and HTML, and its self-contained page: no file, script or address beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from evaluation.evaluate import metric_names, summarise
from multiview.files import atomic_write
from multiview.image import to_uint8

SHEET_WIDTH = 1280  # pixels of an embedded contact sheet; wider ones are reduced
JPEG_QUALITY = 82
DECIMALS = {"foreground_psnr": 2, "psnr": 2, "seconds": 2, "peak_memory_mib": 0}  # others: 3
STYLE = (
    "body{font:14px/1.45 sans-serif;margin:2em;max-width:1400px;color:#1f2328}table{border-collapse:collapse;"
    "font-size:13px;margin:.5em 0}td,th{border:1px solid #d0d7de;padding:3px 8px;text-align:right;white-space:nowrap}"
    "th{background:#f6f8fa}td.text{text-align:left}img{max-width:100%;border:1px solid #d0d7de}"
    ".wide{overflow-x:auto}figure{margin:0 0 1.5em}figcaption,p.note{color:#57606a}"
)


@dataclass(frozen=True)
class Table:
    """heading: of each column; rows: texts, as many each. text_columns: so many at the left are words."""

    title: str
    heading: list[str]
    rows: list[list[str]]
    text_columns: int = 1

    def markdown(self) -> str:
        lines = ["| " + " | ".join(self.heading) + " |", "|---" * len(self.heading) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n"

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in self.heading)
        body = "".join(
            "<tr>" + "".join(self._cell(i, text) for i, text in enumerate(row)) + "</tr>" for row in self.rows
        )
        return f"<h2>{html.escape(self.title)}</h2><div class='wide'><table><tr>{head}</tr>{body}</table></div>"

    def _cell(self, column: int, text: str) -> str:
        kind = " class='text'" if column < self.text_columns else ""
        return f"<td{kind}>{html.escape(text)}</td>"


# ---- tables ---------------------------------------------------------------------------------------------------------


def metrics_table(title: str, records: list[dict], by: dict[str, str]) -> Table:
    """One row per combination of values of the keys in `by` (key -> heading), in the order in which they appear."""
    names = metric_names(records)
    heading = [*by.values(), "mice", "views", *(f"{name} mean (median, worst 5 %)" for name in names)]
    rows = []
    for values in dict.fromkeys(tuple(record[key] for key in by) for record in records):
        chosen = [record for record in records if tuple(record[key] for key in by) == values]
        mice, summary = len({record["sample"] for record in chosen}), summarise(chosen)
        rows.append([*map(_text, values), str(mice), str(len(chosen)), *(_three(name, summary) for name in names)])
    return Table(title, heading, rows, text_columns=len(by))


def cross_table(title: str, records: list[dict], key: str, values: Sequence[str]) -> Table:
    """Foreground PSNR and mask IoU, means, by split and method; one column per value of the records' `key`."""
    rows = []
    for split, method in dict.fromkeys((record["split"], record["method"]) for record in records):
        cells = []
        for value in values:
            wanted = (split, method, value)
            chosen = [r for r in records if (r["split"], r["method"], r.get(key)) == wanted]
            summary = summarise(chosen, ("foreground_psnr", "mask_iou"))
            means = f"{summary['foreground_psnr']['mean']:.2f} / {summary['mask_iou']['mean']:.3f}" if chosen else "-"
            cells.append(f"{means} ({len(chosen)})")
        rows.append([split, method, *cells])
    return Table(title, ["views compared", "method", *values], rows, text_columns=2)


def margin_table(title: str, margins: dict[str, list[dict]]) -> Table:
    """margins: by split, rows of `evaluation.evaluate.margins`."""
    rows = [
        [
            split, row["method"],
            *(f"{row[name]['mean']:+.{digits}f} ± {row[name]['standard_error']:.{digits}f} "
              f"({100 * row[name]['better_share']:.0f} %)"
              for name, digits in (("foreground_psnr", 2), ("mask_iou", 3))),
        ]
        for split, rows_of_split in margins.items() for row in rows_of_split
    ]  # fmt: skip
    return Table(title, ["views compared", "than", "foreground_psnr", "mask_iou"], rows, text_columns=2)


def summary_table(title: str, rows: dict[str, list[dict]], names: Sequence[str]) -> Table:
    """One row per entry of `rows` (label -> records): the metrics `names` as mean (median, worst 5 %)."""
    lines = []
    for label, records in rows.items():
        summary = summarise(records, names)
        lines.append([label, str(len(records)), *(_three(name, summary) for name in names)])
    return Table(title, ["", "mice", *(f"{name} mean (median, worst 5 %)" for name in names)], lines)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _three(name: str, summary: dict) -> str:
    if name not in summary:
        return "-"
    digits = DECIMALS.get(name, 3)
    mean, median, worst = (f"{summary[name][kind]:.{digits}f}" for kind in ("mean", "median", "worst_5_percent"))
    return f"{mean} ({median}, {worst})"


# ---- the page -------------------------------------------------------------------------------------------------------


def picture_html(picture: Tensor, caption: str) -> str:
    """A figure with the picture [3, h, w] 0..1 inside, as JPEG, at most SHEET_WIDTH wide."""
    if picture.shape[-1] > SHEET_WIDTH:
        size = [round(side * SHEET_WIDTH / picture.shape[-1]) for side in picture.shape[-2:]]
        picture = torch.nn.functional.interpolate(picture[None], size=size, mode="area")[0]
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(picture)).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return _figure("jpeg", buffer.getvalue(), caption)


def plot_html(path: Path, caption: str) -> str:
    """A figure with a PNG file inside."""
    return _figure("png", path.read_bytes(), caption)


def _figure(kind: str, content: bytes, caption: str) -> str:
    data = base64.b64encode(content).decode()
    return (
        f"<figure><img src='data:image/{kind};base64,{data}' alt='{html.escape(caption, quote=True)}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def write_page(path: Path, title: str, facts: dict[str, str], blocks: Sequence[str], notes: Sequence[str]) -> None:
    """blocks: HTML of tables and figures, in order. facts: what was measured, name -> text."""
    told = "".join(
        f"<tr><td class='text'>{html.escape(name)}</td><td class='text'>{html.escape(text)}</td></tr>"
        for name, text in facts.items()
    )
    said = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in notes)
    with atomic_write(path) as temporary:
        temporary.write_text(
            f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
            f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><table>{told}</table>{''.join(blocks)}"
            f"<h2>Notes</h2>{said}</html>"
        )
