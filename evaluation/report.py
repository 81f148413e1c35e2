"""What an evaluation leaves on disk: metrics.json, table.md, report.html and contact sheets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation.evaluate import DIRECTIONS, OWN, SIDES, WORST_SHARE, Prediction, margins, mean_by, summarise
from evaluation.page import (
    Table,
    cross_table,
    margin_table,
    metrics_table,
    picture_html,
    plot_html,
    summary_table,
    write_page,
)
from multiview.files import atomic_write, write_json
from multiview.image import composite, grid, write_image

if TYPE_CHECKING:
    from multiview.sample import Sample
    from pipeline.stages import PosedViews

FIRST_SHOWN, WORST_SHOWN = 8, 12  # mice on a sheet at most
COSTS, CONSISTENCY = ("seconds", "peak_memory_mib"), ("score", "of_truth", "mask", "colour")


# ---- pictures -------------------------------------------------------------------------------------------------------


@dataclass
class Album:
    """Pictures of the first mice and of the worst ones seen so far; no others are kept."""

    num_mice: int
    first: list[Tensor] = field(default_factory=list)
    worst: list[tuple[float, str, Tensor]] = field(default_factory=list)  # worst first

    @property
    def num_worst(self) -> int:
        return min(WORST_SHOWN, max(1, math.ceil(WORST_SHARE * self.num_mice)))

    def add(self, name: str, quality: float, rows: Tensor) -> None:
        """rows: [r, n, 3, h, w]; quality: larger is better."""
        small = (rows * 255).round().byte()
        if len(self.first) < FIRST_SHOWN:
            self.first.append(small)
        self.worst = sorted([*self.worst, (quality, name, small)], key=lambda entry: entry[0])[: self.num_worst]


def sheet(mice: Sequence[Tensor]) -> Tensor:
    """[r, n, 3, h, w] bytes of each mouse below one another, [3, ..., ...] 0..1; shorter rows end in white."""
    columns = max(rows.shape[1] for rows in mice)
    lines = []
    for rows in mice:
        blank = rows.new_full((rows.shape[0], columns - rows.shape[1], *rows.shape[2:]), 255)
        lines.append(torch.cat([rows, blank], dim=1).flatten(0, 1))
    return grid(torch.cat(lines).float() / 255, columns)


def picture_rows(
    sample: Sample, reference: int, own: dict[str, Prediction], neighbour: dict[str, Prediction] | None,
    painted: PosedViews | None,
) -> Tensor:  # fmt: skip
    """[r, n, 3, h, w]: the input view, then every view that is compared. Rows: truth, the painted views (where there
    are any), the model, one baseline."""
    compared = [view for prediction in own.values() for view in prediction.views]
    truth = composite(sample.rgba[[reference, *compared]], 1.0)
    rows, blank = [truth], torch.ones_like(truth[:1])
    if painted is not None:
        rows.append(torch.cat([painted.rgb[[v]] if v < len(painted.rgb) else blank for v in (reference, *compared)]))
    for predictions in (own, neighbour):
        if predictions is not None:
            rows.append(torch.cat([blank, *(prediction.rgb for prediction in predictions.values())]))
    return torch.stack(rows)


# ---- everything of one run ------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Gathers what a run measures. stage: "1", "2", "full". rows: what the rows of the sheets are, in words."""

    stage: str
    album: Album
    rows: str = ""
    records: list[dict] = field(default_factory=list)
    assets: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def own(self) -> list[dict]:
        """The records of the model itself."""
        return [record for record in self.records if record["method"] == OWN[self.stage]]

    def margins(self) -> dict[str, list[dict]]:
        """By split, how far the model lies above each other method."""
        by_split = {
            split: margins(self.records, OWN[self.stage], split)
            for split in dict.fromkeys(record["split"] for record in self.records)
        }
        return {split: rows for split, rows in by_split.items() if rows}

    def consistency(self) -> dict[str, list[dict]]:
        """By whose views, the figures of every mouse."""
        labels = self.assets[0].get("consistency", {})
        return {label: [asset["consistency"][label] for asset in self.assets] for label in labels}

    def tables(self) -> list[Table]:
        titles = {"split": "views compared", "method": "method"}
        tables = [metrics_table("Quality", self.records, titles)]
        if self.margins():
            title = "The model above each baseline, mouse by mouse: mean ± standard error (share of mice on which it is"
            tables.append(margin_table(title + " better)", self.margins()))
        title = "By the angle between view and input: foreground_psnr / mask_iou (views)"
        tables.append(cross_table(title, self.records, "direction", tuple(DIRECTIONS)))
        if any("input_shows" in record for record in self.records):
            title = "By what the input view shows of the animal: foreground_psnr / mask_iou (views)"
            tables.append(cross_table(title, self.records, "input_shows", tuple(SIDES.values())))
        if self.consistency():
            tables.append(summary_table("View consistency, input view included", self.consistency(), CONSISTENCY))
        tables.append(summary_table("Cost per mouse", {OWN[self.stage]: self.assets}, COSTS))
        return tables

    def to_dict(self) -> dict:
        """Summaries first, then every mouse and every view."""
        pairs = dict.fromkeys((record["split"], record["method"]) for record in self.records)

        def chosen(split: str, method: str) -> list[dict]:
            return [record for record in self.records if (record["split"], record["method"]) == (split, method)]

        return {
            "summary": [{"split": s, "method": m, **summarise(chosen(s, m))} for s, m in pairs],
            "by_direction": [
                {"split": s, "method": m, "direction": d, "views": len(rows), **summarise(rows)}
                for s, m in pairs
                for d in DIRECTIONS
                if (rows := [record for record in chosen(s, m) if record["direction"] == d])
            ],
            "margins": self.margins(),
            "consistency": {label: summarise(rows, CONSISTENCY) for label, rows in self.consistency().items()},
            "cost": summarise(self.assets, COSTS),
            "worst": [{"sample": name, "foreground_psnr": quality} for quality, name, _ in self.album.worst],
            "notes": self.notes, "assets": self.assets, "views": self.records,
        }  # fmt: skip

    def write(self, folder: Path, head: dict, facts: dict[str, str], told: dict[str, str]) -> str:
        """Writes all files; returns the Markdown. told: what each baseline was given, by method."""
        from evaluation.plots import plot_directions

        tables = self.tables()
        write_json(folder / "metrics.json", head | {"baselines": told} | self.to_dict())
        given = "".join(f"- {method}: given {text}\n" for method, text in told.items())
        text = "\n".join([*(table.markdown() for table in tables), given, *(f"{note}\n" for note in self.notes)])
        with atomic_write(folder / "table.md") as temporary:
            temporary.write_text(text)
        first, worst = sheet(self.album.first), sheet([rows for _, _, rows in self.album.worst])
        write_image(folder / "sheet.png", first)
        write_image(folder / "worst.png", worst)
        plot_directions(folder / "directions.png", self.records, facts["data"])
        names = "; ".join(f"{name} {quality:.1f} dB" for quality, name, _ in self.album.worst)
        blocks = [
            *(table.html() for table in tables),
            plot_html(folder / "directions.png", "Means by the angle between a view and the input view, all splits"),
            picture_html(first, f"The first mice. Columns: the input view, then the views compared. Rows: {self.rows}"),
            picture_html(worst, f"The worst mice by their mean foreground PSNR: {names}. Rows: {self.rows}"),
        ]
        about = [f"{method}: given {text}." for method, text in told.items()]
        write_page(folder / "report.html", f"Evaluation: {OWN[self.stage]}", facts, blocks, [*about, *self.notes])
        return text


def quality_of(records: list[dict]) -> float:
    """One mouse's mean foreground PSNR over its views, dB; what the worst ones are found by."""
    return next(iter(mean_by(records, "sample", "foreground_psnr").values()))
