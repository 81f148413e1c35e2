"""Plots of sweeps; the only place that imports matplotlib."""

from __future__ import annotations

import statistics
from pathlib import Path

from evaluation.sweeps import FACTORS
from multiview.files import atomic_write

PANELS = (("foreground_psnr", "foreground PSNR, dB"), ("mask_iou", "mask IoU"))
ANGLE_STEP_DEG = 30


def plot_sweep(path: Path, factor: str, records: list[dict], title: str) -> None:
    """PNG: both metrics against the factor's values; line: mean over views, band: first to third quartile.

    records: one per level and view, with `value` and the metrics.
    """
    from matplotlib.figure import Figure

    values = sorted({record["value"] for record in records})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, len(PANELS)), PANELS):
        columns = [[record[metric] for record in records if record["value"] == value] for value in values]
        quartiles = [statistics.quantiles(c, n=4, method="inclusive") if len(c) > 1 else [c[0]] * 3 for c in columns]
        axes.fill_between(values, [q[0] for q in quartiles], [q[2] for q in quartiles], alpha=0.2, linewidth=0)
        axes.plot(values, [statistics.fmean(column) for column in columns], marker="o")
        axes.set_ylabel(label)
        axes.set_xticks(values)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.supxlabel(FACTORS[factor])
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_directions(path: Path, records: list[dict], title: str) -> None:
    """PNG: both metrics against the angle between a view and the input view; one line of means per method.

    Views are gathered in steps of ANGLE_STEP_DEG; every mark is the mean over a step, at the mean of its angles.
    records: one per view, with `method`, `angle_deg` (0..180) and the metrics.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, (metric, label) in zip(panels, PANELS):
        for method in dict.fromkeys(record["method"] for record in records):
            steps: dict[int, list[dict]] = {}
            for record in records:
                if record["method"] == method:
                    steps.setdefault(int(record["angle_deg"] // ANGLE_STEP_DEG), []).append(record)
            groups = [steps[step] for step in sorted(steps)]
            angles = [statistics.fmean(record["angle_deg"] for record in group) for group in groups]
            axes.plot(
                angles, [statistics.fmean(r[metric] for r in group) for group in groups], marker="o", label=method
            )
        axes.set_ylabel(label)
        axes.set_xlabel("angle between the view and the input view, degrees")
        axes.set_xticks(range(0, 181, 30))
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
