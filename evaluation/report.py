"""What an evaluation leaves on disk: metrics.json, table.md, report.html, plots and contact sheets, from its records.

A record is a flat dict: what was compared (sample, method, split, view, ...), then METRICS. Every figure here is a
group-by over records.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation.methods import DIRECTIONS, METRICS, OWN, SIDES, Predictions
from multiview.files import atomic_write, write_json
from multiview.image import composite, grid, write_image
from multiview.report import Figure, Table, write_page

if TYPE_CHECKING:
    from multiview.sample import Sample
    from pipeline.stages import PosedViews

FIRST_SHOWN, WORST_SHOWN = 8, 12  # mice on a sheet at most
WORST_FRACTION = 0.05
COSTS, CONSISTENCY = ("seconds", "peak_memory_mib"), ("score", "of_truth", "mask", "colour")
SMALLER_IS_BETTER = ("lpips", "foreground_lpips", "depth_error", *COSTS)
DECIMALS = {"foreground_psnr": 2, "psnr": 2, "seconds": 2, "peak_memory_mib": 0}  # others: 3
PANELS = (("foreground_psnr", "foreground PSNR, dB"), ("mask_iou", "mask IoU"))
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
    """Returns per metric the mean, median and the value that the worst 5 % of the records do not exceed.

    A metric that no record holds is left out.
    """
    summary = {}
    for name in names:
        values = sorted((r[name] for r in records if name in r), reverse=name in SMALLER_IS_BETTER)
        if values:  # sorted from worst to best
            worst = values[max(0, round(WORST_FRACTION * len(values)) - 1)]
            summary[name] = {
                "mean": statistics.fmean(values), "median": statistics.median(values), "worst_5_percent": worst,
            }  # fmt: skip
    return summary


def margins(records: Sequence[dict], own: str, split: str) -> list[dict]:
    """Returns how far the method `own` lies above each other one, mouse by mouse, on the views that both show.

    Rows with method, and per metric the mean difference, its standard error over mice and the fraction of mice on
    which `own` is better.
    """
    methods = {method: rows for (method, s), rows in group_by(records, "method", "split").items() if s == split}
    mine, rows = methods.pop(own, []), []
    for method, others in methods.items() if mine else ():
        row: dict = {"method": method}
        # Paired by mouse and view: mice differ more among each other than methods do.
        theirs = group_by(others, "sample", "view")
        ours = group_by([record for record in mine if (record["sample"], record["view"]) in theirs], "sample")
        for name, _ in PANELS:
            differences = [
                mean(rows, name) - mean([r for row in rows for r in theirs[row["sample"], row["view"]]], name)
                for rows in ours.values()
            ]
            count = len(differences)
            row[name] = {
                "mean": statistics.fmean(differences),
                "standard_error": statistics.stdev(differences) / math.sqrt(count) if count > 1 else 0.0,
                "better_share": sum(difference > 0 for difference in differences) / count,
            }
        rows.append(row)
    return rows


# ---- tables ---------------------------------------------------------------------------------------------------------


def metrics_table(
    title: str, records: Sequence[dict], by: Mapping[str, str], names: Sequence[str] = METRICS, *,
    with_views: bool = True,
) -> Table:  # fmt: skip
    """Returns one row per combination of values of the keys in `by` (key -> heading): mean (median, worst 5 %)."""
    names = [name for name in names if any(name in record for record in records)]
    rows = []
    for values, group in group_by(records, *by).items():
        summary = summarise(group, names)
        row = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        row += [str(len(group_by(group, "sample"))), *([str(len(group))] if with_views else [])]
        for name in names:
            figures = [f"{value:.{DECIMALS.get(name, 3)}f}" for value in summary.get(name, {}).values()]
            row.append(f"{figures[0]} ({figures[1]}, {figures[2]})" if figures else "-")
        rows.append(row)
    counts = ["mice", "views"] if with_views else ["mice"]
    return Table(title, [*by.values(), *counts, *(f"{name} mean (median, worst 5 %)" for name in names)], rows)


def cross_table(title: str, records: Sequence[dict], key: str, values: Sequence[str]) -> Table:
    """Returns mean foreground PSNR / mask IoU (views) by split and method; one column per value of `key`."""
    rows = []
    for (split, method), group in group_by(records, "split", "method").items():
        parts = group_by(group, key)
        cells = [
            f"{mean(part, 'foreground_psnr'):.2f} / {mean(part, 'mask_iou'):.3f} ({len(part)})" if part else "- (0)"
            for part in (parts.get((value,), []) for value in values)
        ]
        rows.append([split, method, *cells])
    return Table(title, ["views compared", "method", *values], rows)


def margin_table(title: str, by_split: Mapping[str, list[dict]]) -> Table:
    rows = [
        [split, row["method"],
         *(f"{row[name]['mean']:+.{digits}f} ± {row[name]['standard_error']:.{digits}f} "
           f"({100 * row[name]['better_share']:.0f} %)" for name, digits in (("foreground_psnr", 2), ("mask_iou", 3)))]
        for split, of_split in by_split.items() for row in of_split
    ]  # fmt: skip
    return Table(title, ["views compared", "than", "foreground_psnr", "mask_iou"], rows)


# ---- pictures of results --------------------------------------------------------------------------------------------


def sheet(mice: Sequence[Tensor]) -> Tensor:
    """Returns [r, n, 3, h, w] bytes of each mouse below one another, [3, ..., ...] 0..1; shorter rows end in white."""
    columns = max(rows.shape[1] for rows in mice)
    lines = []
    for rows in mice:
        blank = rows.new_full((rows.shape[0], columns - rows.shape[1], *rows.shape[2:]), 255)
        lines.append(torch.cat([rows, blank], dim=1).flatten(0, 1))
    return grid(torch.cat(lines).float() / 255, columns)


def image_rows(
    sample: Sample, reference: int, own: Predictions, other: Predictions | None, generated: PosedViews | None
) -> Tensor:
    """Returns [r, n, 3, h, w]: the input view, then every view that the model is compared on, white where none is.

    Rows: truth, the generated views (where there are any), the model, one baseline.
    """
    columns = [reference, *(view for prediction in own.values() for view in prediction.views)]
    truth = composite(sample.rgba[columns], 1.0)
    blank, rows = torch.ones_like(truth[0]), [truth]
    if generated is not None:
        rows.append(torch.stack([generated.rgb[view] if view < len(generated.rgb) else blank for view in columns]))
    for predictions in (own, other):
        if predictions is not None:
            shown = {
                view: rgb for prediction in predictions.values() for view, rgb in zip(prediction.views, prediction.rgb)
            }
            rows.append(torch.stack([blank, *(shown.get(view, blank) for view in columns[1:])]))
    return torch.stack(rows)


def plot_directions(path: Path, records: Sequence[dict], title: str) -> None:
    """Writes a PNG: means against the angle between a view and the input view, in steps, one line per method."""
    # Calibrated rigs have as many angles as views: steps make lines that can be read.
    stepped = [{**record, "step": int(record["angle_deg"] // ANGLE_STEP_DEG)} for record in records]

    def draw(axes, metric: str) -> None:
        for (method,), group in group_by(stepped, "method").items():
            steps = [part for _, part in sorted(group_by(group, "step").items())]
            angles = [mean(part, "angle_deg") for part in steps]
            axes.plot(angles, [mean(part, metric) for part in steps], marker="o", label=method)
        axes.set_xticks(range(0, 181, 30))

    _plot(path, draw, title, "angle between the view and the input view, degrees", legend=True)


def plot_sweep(path: Path, records: Sequence[dict], label: str, title: str) -> None:
    """Writes a PNG: metrics against `value`; line: mean over views, band: first to third quartile."""
    groups = dict(sorted((value, group) for (value,), group in group_by(records, "value").items()))
    values = list(groups)

    def draw(axes, metric: str) -> None:
        columns = [[record[metric] for record in group] for group in groups.values()]
        quartiles = [statistics.quantiles(c, n=4, method="inclusive") if len(c) > 1 else c * 3 for c in columns]
        axes.fill_between(values, [q[0] for q in quartiles], [q[2] for q in quartiles], alpha=0.2, linewidth=0)
        axes.plot(values, [statistics.fmean(column) for column in columns], marker="o")
        axes.set_xticks(values)

    _plot(path, draw, title, label)


def _plot(path: Path, draw: Callable, title: str, x_label: str, *, legend: bool = False) -> None:
    """Writes a PNG with a panel per metric in PANELS; draw(axes, metric) fills one."""
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(11, 4.2), layout="constrained")
    panels = plot.subplots(1, len(PANELS))
    for axes, (metric, label) in zip(panels, PANELS):
        draw(axes, metric)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if legend:
        plot.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    plot.suptitle(title)
    plot.supxlabel(x_label)
    with atomic_write(path) as temporary:
        plot.savefig(temporary, format="png", dpi=100)


# ---- everything of one run ------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Gathers what a run measures. stage: "1", "2", "full". rows: what the rows of the sheets are, in words.

    records: one per method and view. assets: one per mouse, cost and consistency.
    """

    stage: str
    num_mice: int
    rows: str = ""
    records: list[dict] = field(default_factory=list)
    assets: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)  # images of the first mice and of the worst so far, worst first;
    worst: list[tuple[float, str, Tensor]] = field(default_factory=list)  # no others are kept

    def show(self, name: str, quality: float, rows: Tensor) -> None:
        """Keeps one mouse's images [r, n, 3, h, w] if it is among the first or the worst; quality: larger is better."""
        small = (rows * 255).round().byte()
        if len(self.first) < FIRST_SHOWN:
            self.first.append(small)
        # Bytes, and only so many: a thousand mice must not be held in memory.
        kept = min(WORST_SHOWN, max(1, math.ceil(WORST_FRACTION * self.num_mice)))
        self.worst = sorted([*self.worst, (quality, name, small)], key=lambda entry: entry[0])[:kept]

    def margins(self) -> dict[str, list[dict]]:
        """Returns by split, how far the model lies above each other method."""
        splits = (split for (split,) in group_by(self.records, "split"))
        found = {split: margins(self.records, OWN[self.stage], split) for split in splits}
        return {split: rows for split, rows in found.items() if rows}

    def consistency(self) -> list[dict]:
        """Returns the figures of every mouse, labeled by whose views they are of."""
        labels = self.assets[0].get("consistency", {})
        return [
            {"label": label, "sample": asset["sample"], **asset["consistency"][label]}
            for label in labels for asset in self.assets
        ]  # fmt: skip

    def tables(self) -> list[Table]:
        tables = [metrics_table("Quality", self.records, {"split": "views compared", "method": "method"})]
        if self.margins():
            title = "The model above each baseline, mouse by mouse: mean ± standard error (share of mice on which it is"
            tables.append(margin_table(title + " better)", self.margins()))
        title = "By the angle between view and input: foreground_psnr / mask_iou (views)"
        tables.append(cross_table(title, self.records, "direction", tuple(DIRECTIONS)))
        if any("input_shows" in record for record in self.records):
            title = "By what the input view shows of the animal: foreground_psnr / mask_iou (views)"
            tables.append(cross_table(title, self.records, "input_shows", tuple(SIDES.values())))
        for title, rows, names in (
            ("View consistency, input view included", self.consistency(), CONSISTENCY),
            ("Cost per mouse", [{"label": OWN[self.stage], **asset} for asset in self.assets], COSTS),
        ):
            if rows:
                tables.append(metrics_table(title, rows, {"label": ""}, names, with_views=False))
        return tables

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
            "margins": self.margins(),
            "consistency": {
                label: summarise(rows, CONSISTENCY) for (label,), rows in group_by(self.consistency(), "label").items()
            },
            "cost": summarise(self.assets, COSTS),
            "worst": [{"sample": name, "foreground_psnr": quality} for quality, name, _ in self.worst],
            "notes": self.notes, "assets": self.assets, "views": self.records,
        }  # fmt: skip

    def write(self, folder: Path, head: dict, facts: dict[str, str], told: dict[str, str]) -> str:
        """Writes all files; returns the Markdown. told: what each baseline was given, by method."""
        tables = self.tables()
        write_json(folder / "metrics.json", head | {"baselines": told} | self.to_dict())
        given = "".join(f"- {method}: given {text}\n" for method, text in told.items())
        text = "\n".join([*(table.markdown() for table in tables), given, *(f"{note}\n" for note in self.notes)])
        with atomic_write(folder / "table.md") as temporary:
            temporary.write_text(text)
        first, worst = sheet(self.first), sheet([rows for _, _, rows in self.worst])
        write_image(folder / "sheet.png", first)
        write_image(folder / "worst.png", worst)
        plot_directions(folder / "directions.png", self.records, facts["data"])
        names = "; ".join(f"{name} {quality:.1f} dB" for quality, name, _ in self.worst)
        rows = f"Columns: the input view, then the views compared. Rows: {self.rows}"
        blocks = [
            *tables,
            Figure("Means by the angle between a view and the input view, all splits", folder / "directions.png"),
            Figure(f"The first mice. {rows}", first),
            Figure(f"The worst mice by their mean foreground PSNR: {names}. {rows}", worst),
            *(f"{method}: given {text}." for method, text in told.items()),
            *self.notes,
        ]
        write_page(folder / "report.html", f"Evaluation: {OWN[self.stage]}", blocks, facts=facts)
        return text
