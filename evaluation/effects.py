"""What a factorial says: cell means, main effects and interactions, with their spread over seeds."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

Levels = dict[str, list[str]]  # factor -> its levels, the first being the baseline


@dataclass(frozen=True)
class Estimate:
    """Mean over n seeds; spread is the standard deviation between seeds, None for one seed."""

    mean: float
    spread: float | None
    n: int

    @staticmethod
    def of(values: list[float]) -> Estimate | None:
        if not values:
            return None
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Estimate(statistics.fmean(values), spread, len(values))

    def text(self, signed: bool = False) -> str:
        number = f"{self.mean:+.3f}" if signed else f"{self.mean:.3f}"
        return number if self.spread is None else f"{number} ± {self.spread:.3f}"


def table_of(results: list[dict], metric: str) -> dict[tuple[str, ...], dict[int, float]]:
    """levels in the factors' order -> seed -> the metric's value, of the finished runs."""
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for result in results:
        if result["status"] == "done":
            found.setdefault(tuple(result["levels"].values()), {})[result["seed"]] = result["metrics"][metric]
    return found


def effects(results: list[dict], levels: Levels, metric: str, seeds: list[int]) -> dict[str, Estimate]:
    """Every contrast against the baseline levels, by name, e.g. "a: y - x" or "(a: y - x) x (b: v - u)".

    A main effect is the mean change when one factor goes from its baseline to a level, over all levels of the others;
    an interaction of two is how much that change grows when the other factor goes from its baseline to a level
    (difference of differences), and so on. Each is computed within a seed, then averaged over seeds; seeds with a
    missing cell are left out.
    """
    table = table_of(results, metric)
    combinations = list(itertools.product(*levels.values()))
    complete = [seed for seed in seeds if all(seed in table.get(cell, {}) for cell in combinations)]
    found = {}
    for order in range(1, len(levels) + 1):
        for chosen in itertools.combinations(levels, order):
            for tops in itertools.product(*(levels[factor][1:] for factor in chosen)):
                name = " x ".join(
                    f"({factor}: {top} - {levels[factor][0]})" for factor, top in zip(chosen, tops)
                ) if order > 1 else f"{chosen[0]}: {tops[0]} - {levels[chosen[0]][0]}"  # fmt: skip
                top_of = dict(zip(chosen, tops))
                estimate = Estimate.of([_contrast(table, levels, top_of, seed) for seed in complete])
                if estimate is not None:
                    found[name] = estimate
    return found


def _contrast(table: dict, levels: Levels, top_of: dict[str, str], seed: int) -> float:
    """The signed sum over top and baseline of the chosen factors, averaged over all levels of the others."""
    others = 1
    total = 0.0
    axes = []
    for factor, names in levels.items():
        if factor in top_of:
            axes.append([(names[0], -1), (top_of[factor], 1)])
        else:
            others *= len(names)
            axes.append([(name, 1) for name in names])
    for corner in itertools.product(*axes):
        sign = 1
        for _, factor_sign in corner:
            sign *= factor_sign
        total += sign * table[tuple(name for name, _ in corner)][seed]
    return total / others


def summarise(results: list[dict], levels: Levels, metrics: list[str], seeds: list[int]) -> dict:
    """Cells and effects as JSON values."""
    cells = []
    for combination in itertools.product(*levels.values()):
        row: dict = {"levels": dict(zip(levels, combination))}
        for metric in metrics:
            estimate = Estimate.of(list(table_of(results, metric).get(combination, {}).values()))
            row[metric] = estimate and vars(estimate)
        cells.append(row)
    contrasts = {
        metric: {name: vars(estimate) for name, estimate in effects(results, levels, metric, seeds).items()}
        for metric in metrics
    }
    return {"cells": cells, "effects": contrasts}


def markdown(results: list[dict], levels: Levels, metrics: list[str], seeds: list[int]) -> str:
    """The summary table: cell means, then effects; ± is the standard deviation between seeds."""
    by_metric = {metric: table_of(results, metric) for metric in metrics}
    lines = ["Cells: mean over seeds ± their standard deviation.", "", *_head([*levels, "runs", *metrics])]
    for combination in itertools.product(*levels.values()):
        estimates = [Estimate.of(list(by_metric[metric].get(combination, {}).values())) for metric in metrics]
        runs = estimates[0].n if estimates[0] else 0
        cells = [estimate.text() if estimate else "-" for estimate in estimates]
        lines.append("| " + " | ".join([*combination, f"{runs} of {len(seeds)}", *cells]) + " |")
    found = {metric: effects(results, levels, metric, seeds) for metric in metrics}
    used = next((estimate.n for values in found.values() for estimate in values.values()), 0)
    lines += ["", f"Effects within a seed, mean ± standard deviation over {used} complete seeds.", ""]
    lines += _head(["effect", *metrics])
    for name in next(iter(found.values()), {}):
        lines.append("| " + " | ".join([name, *(found[metric][name].text(signed=True) for metric in metrics)]) + " |")
    failed = [result for result in results if result["status"] != "done"]
    if failed:
        lines += ["", "Failed, to be tried again by repeating the command:", ""]
        lines += [f"- {_label(result)}: {result['reason']}" for result in failed]
    return "\n".join(lines) + "\n"


def _label(result: dict) -> str:
    return ", ".join(f"{factor} {level}" for factor, level in result["levels"].items()) + f", seed {result['seed']}"


def _head(names: list[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
