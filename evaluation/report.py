"""What an evaluation leaves on disk: metrics.json, table.md, report.html, plots and contact sheets, from its records.

A record is a flat dict: what was compared (sample, method, split, view, ...), then METRICS. Every figure here is a
group-by over records.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from evaluation.methods import DIRECTIONS, METRICS, OWN, SIDES
from multiview.files import atomic_write, write_json
from multiview.image import grid, write_image
from multiview.report import Figure, Table, write_page

FIRST_SHOWN, WORST_SHOWN = 8, 12  # mice on a sheet at most
WORST_FRACTION = 0.05
COSTS, CONSISTENCY = ("seconds", "peak_memory_mib"), ("score", "of_truth", "mask", "colour")
SMALLER_IS_BETTER = ("lpips", "foreground_lpips", "depth_error", *COSTS)
DECIMALS = {"foreground_psnr": 2, "psnr": 2, "seconds": 2, "peak_memory_mib": 0}  # others: 3
PANELS = {"foreground_psnr": "foreground PSNR, dB", "mask_iou": "mask IoU"}
ANGLE_STEP_DEG = 30


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def group_by(records: Sequence[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Returns the records by their values of `keys`, in order of appearance."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return groups


def mean(records: Sequence[dict], name: str) -> float:
    return statistics.fmean(record[name] for record in records)


def summarise(records: Sequence[dict], names: Sequence[str] = METRICS) -> dict[str, dict[str, float]]:
    """Returns per metric the mean, median and the value that the worst 5 % of the records do not exceed. A metric that
    no record holds is left out."""
    summary = {}
    for name in names:
        values = sorted((r[name] for r in records if name in r), reverse=name in SMALLER_IS_BETTER)
        if values:  # sorted from worst to best
            worst = values[max(0, round(WORST_FRACTION * len(values)) - 1)]
            middle, median = statistics.fmean(values), statistics.median(values)
            summary[name] = {"mean": middle, "median": median, "worst_5_percent": worst}
    return summary


def margins(records: Sequence[dict], own: str) -> dict[str, list[dict]]:
    """Returns by split how far the method `own` lies above each other one, mouse by mouse, on the views both show.

    Rows with method, and per metric the mean difference, its standard error over mice and the fraction of mice on
    which `own` is better.
    """
    groups, rows = group_by(records, "split", "method"), {split: [] for (split,) in group_by(records, "split")}
    for (split, method), others in groups.items():
        if method == own or (split, own) not in groups:
            continue
        # Paired by mouse and view: mice differ more among each other than methods do.
        theirs, row = group_by(others, "sample", "view"), {"method": method}
        paired = [record for record in groups[split, own] if (record["sample"], record["view"]) in theirs]
        for name in PANELS:
            gaps = [
                mean(mine, name) - mean([r for record in mine for r in theirs[record["sample"], record["view"]]], name)
                for mine in group_by(paired, "sample").values()
            ]
            row[name] = {
                "mean": statistics.fmean(gaps),
                "standard_error": statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0,
                "better_share": sum(gap > 0 for gap in gaps) / len(gaps),
            }
        rows[split].append(row)
    return {split: of_split for split, of_split in rows.items() if of_split}


# ---- tables and plots -----------------------------------------------------------------------------------------------


def metrics_table(title: str, records: Sequence[dict], by: Mapping[str, str], names: Sequence[str] = METRICS) -> Table:
    """Returns one row per combination of values of the keys in `by` (key -> heading): mean (median, worst 5 %)."""
    names, counts = [name for name in names if any(name in record for record in records)], {"sample": "mice"}
    if "view" in records[0]:  # else there is one record per mouse
        counts["view"] = "views"
    rows = []
    for values, group in group_by(records, *by).items():
        summary, row = summarise(group, names), [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
        row += [str(len(group_by(group, "sample", key))) for key in counts]
        for name in names:
            figures = [f"{value:.{DECIMALS.get(name, 3)}f}" for value in summary.get(name, {}).values()]
            row.append(f"{figures[0]} ({figures[1]}, {figures[2]})" if figures else "-")
        rows.append(row)
    headings = [*by.values(), *counts.values(), *(f"{name} mean (median, worst 5 %)" for name in names)]
    return Table(title, headings, rows)


def cross_table(title: str, records: Sequence[dict], key: str, values: Sequence[str]) -> Table:
    """Returns mean foreground PSNR / mask IoU (views) by split and method; one column per value of `key`."""
    rows = []
    for (split, method), group in group_by(records, "split", "method").items():
        parts = [group_by(group, key).get((value,), []) for value in values]
        cells = [
            f"{mean(part, 'foreground_psnr'):.2f} / {mean(part, 'mask_iou'):.3f} ({len(part)})" if part else "- (0)"
            for part in parts
        ]
        rows.append([split, method, *cells])
    return Table(f"{title}: foreground_psnr / mask_iou (views)", ["views compared", "method", *values], rows)


def plot(
    path: Path, title: str, x_label: str, lines: Mapping[str, Mapping[float, list[dict]]], ticks: Iterable[float], *,
    band: bool = False,
) -> None:  # fmt: skip
    """Writes a PNG with a panel per metric in PANELS. lines: label -> x -> records, whose mean is drawn. band: also the
    first to third quartile of the records."""
    from matplotlib.figure import Figure as Plot

    drawing = Plot(figsize=(11, 4.2), layout="constrained")
    panels = drawing.subplots(1, len(PANELS))
    for axes, (metric, label) in zip(panels, PANELS.items()):
        for name, groups in lines.items():
            columns = [[record[metric] for record in group] for group in groups.values()]
            if band:
                quartiles = [statistics.quantiles(c, n=4, method="inclusive") if len(c) > 1 else c * 3 for c in columns]
                low, _, high = zip(*quartiles)
                axes.fill_between(list(groups), low, high, alpha=0.2, linewidth=0)
            axes.plot(list(groups), [statistics.fmean(column) for column in columns], marker="o", label=name)
        axes.set(xticks=list(ticks), ylabel=label)
        axes.grid(alpha=0.3)
    if not band:
        drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    drawing.suptitle(title)
    drawing.supxlabel(x_label)
    with atomic_write(path) as temporary:
        drawing.savefig(temporary, format="png", dpi=100)


def write_text(path: Path, parts: Sequence[Table | str], notes: Sequence[str]) -> str:
    """Writes Markdown and returns it."""
    shown = (part.markdown() if isinstance(part, Table) else part for part in parts)
    text = "\n".join([*shown, *(f"{note}\n" for note in notes)])
    with atomic_write(path) as temporary:
        temporary.write_text(text)
    return text


# ---- everything of one run ------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Gathers what a run measures. stage: "1", "2", "full". rows: what the rows of the sheets are, in words. records:
    one per method and view. assets: one per mouse, cost and consistency. told: what each baseline was given."""

    stage: str
    num_mice: int
    rows: str = ""
    records: list[dict] = field(default_factory=list)
    assets: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=dict)
    first: list[Tensor] = field(default_factory=list)  # images of the first mice and of the worst so far, worst first;
    worst: list[tuple[float, str, Tensor]] = field(default_factory=list)  # no others are kept

    def show(self, name: str, quality: float, images: Tensor) -> None:
        """Keeps one mouse's images [r, n, 3, h, w] if it is among the first or the worst; quality: larger is better."""
        small = (images * 255).round().byte()
        self.first = [*self.first, small][:FIRST_SHOWN]
        # Bytes, and only so many: a thousand mice must not be held in memory.
        kept = min(WORST_SHOWN, max(1, math.ceil(WORST_FRACTION * self.num_mice)))
        self.worst = sorted([*self.worst, (quality, name, small)], key=lambda entry: entry[0])[:kept]

    def consistency(self) -> list[dict]:
        """Returns the figures of every mouse, labeled by whose views they are of."""
        labels = self.assets[0].get("consistency", {})
        return [{"label": a, "sample": one["sample"], **one["consistency"][a]} for a in labels for one in self.assets]

    def tables(self) -> list[Table]:
        tables = [metrics_table("Quality", self.records, {"split": "views compared", "method": "method"})]
        rows = [
            [split, row["method"], *(
                f"{row[name]['mean']:+.{digits}f} ± {row[name]['standard_error']:.{digits}f} "
                f"({100 * row[name]['better_share']:.0f} %)" for name, digits in zip(PANELS, (2, 3))
            )]
            for split, of_split in margins(self.records, OWN[self.stage]).items() for row in of_split
        ]  # fmt: skip
        if rows:
            title = "The model above each baseline, mouse by mouse: mean ± standard error (share of mice on which it is"
            tables.append(Table(title + " better)", ["views compared", "than", *PANELS], rows))
        tables.append(cross_table("By the angle between view and input", self.records, "direction", tuple(DIRECTIONS)))
        for key, title in (("input_shows", "By what the input view shows of the animal"), ("pose", "By its pose")):
            if found := {record[key] for record in self.records if key in record}:
                values = tuple(SIDES.values()) if key == "input_shows" else sorted(found)
                tables.append(cross_table(title, self.records, key, values))
        if rows := self.consistency():
            tables.append(metrics_table("View consistency, input view included", rows, {"label": ""}, CONSISTENCY))
        rows = [{"label": OWN[self.stage], **asset} for asset in self.assets]
        return [*tables, metrics_table("Cost per mouse", rows, {"label": ""}, COSTS)]

    def to_dict(self) -> dict:
        """Returns JSON values: summaries first, then every mouse and every view."""
        groups = group_by(self.records, "split", "method")
        return {
            "summary": [{"split": s, "method": m, **summarise(rows)} for (s, m), rows in groups.items()],
            "by_direction": [
                {"split": s, "method": m, "direction": direction, "views": len(part), **summarise(part)}
                for (s, m), rows in groups.items()
                for direction in DIRECTIONS
                if (part := group_by(rows, "direction").get((direction,)))
            ],
            "margins": margins(self.records, OWN[self.stage]),
            "consistency": {
                label: summarise(rows, CONSISTENCY) for (label,), rows in group_by(self.consistency(), "label").items()
            },
            "cost": summarise(self.assets, COSTS),
            "worst": [{"sample": name, "foreground_psnr": quality} for quality, name, _ in self.worst],
            "notes": self.notes, "assets": self.assets, "views": self.records,
        }  # fmt: skip

    def write(self, folder: Path, head: dict, facts: dict[str, str]) -> str:
        """Writes all files; returns the Markdown."""
        tables, methods = self.tables(), group_by(self.records, "method")
        told = {method: text for method, text in self.told.items() if (method,) in methods}
        write_json(folder / "metrics.json", head | {"baselines": told} | self.to_dict())
        given = "".join(f"- {method}: given {text}\n" for method, text in told.items())
        text = write_text(folder / "table.md", [*tables, given], self.notes)
        sheets = {"sheet.png": self.first, "worst.png": [images for *_, images in self.worst]}
        for name, mice in sheets.items():
            columns = max(images.shape[1] for images in mice)
            lines = [grid(row.float() / 255, columns) for images in mice for row in images]  # shorter rows end in white
            sheets[name] = torch.cat(lines, dim=1)
            write_image(folder / name, sheets[name])
        # Calibrated rigs have as many angles as views: steps make lines that can be read.
        lines = {}
        for (method,), group in methods.items():
            stepped = [{**record, "step": int(record["angle_deg"] // ANGLE_STEP_DEG)} for record in group]
            lines[method] = {mean(p, "angle_deg"): p for _, p in sorted(group_by(stepped, "step").items())}
        x_label = "angle between the view and the input view, degrees"
        plot(folder / "directions.png", facts["data"], x_label, lines, range(0, 181, 30))
        names = "; ".join(f"{name} {quality:.1f} dB" for quality, name, _ in self.worst)
        rows = f"Columns: the input view, then the views compared. Rows: {self.rows}"
        blocks = [
            *tables,
            Figure("Means by the angle between a view and the input view, all splits", folder / "directions.png"),
            Figure(f"The first mice. {rows}", sheets["sheet.png"]),
            Figure(f"The worst mice by their mean foreground PSNR: {names}. {rows}", sheets["worst.png"]),
            *(f"{method}: given {text}." for method, text in told.items()), *self.notes,
        ]  # fmt: skip
        write_page(folder / "report.html", f"Evaluation: {OWN[self.stage]}", blocks, facts=facts)
        return text
