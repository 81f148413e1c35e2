"""Plots of sweeps; the only place that imports matplotlib."""

from __future__ import annotations

import statistics
from pathlib import Path

from chain.sweeps import FACTORS
from multiview.checkpoint import atomic_write

PANELS = (("foreground_psnr", "foreground PSNR, dB"), ("mask_iou", "mask IoU"))


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
