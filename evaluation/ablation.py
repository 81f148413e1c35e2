"""A factorial of config values over one training config: every combination of levels, for every seed, is a run.

And what the runs say: cell means, main effects and interactions, with their spread over seeds.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multiview.config import read_yaml
from multiview.files import read_json, take, write_json
from multiview.report import Table
from multiview.run import REPOSITORY

RESULT_FILE, LOG_FILE = "result.json", "training.log"
TRAINERS = {  # stage: script, key of the output folder, key of the seed
    1: ("train_diffusion.py", "output_dir", "seed"),
    2: ("train_gslrm.py", "training.checkpointing.checkpoint_dir", "training.runtime.seed"),
}


@dataclass(frozen=True)
class AblationSpec:
    """What a spec YAML holds (docs: the file in configs/).

    base: training YAML. stage: 1 or 2. output_dir: a folder per cell is made there. factors: name -> level name ->
    config overrides of that level; a plain list of values stands for the key of the factor's name. seeds: of training.
    overrides: of every cell. metrics: names in the cells' last validation, to be tabulated. prepare: commands
    (scripts/....py with arguments) that make what the cells need, run before the first one.
    """

    base: str
    output_dir: str
    factors: dict[str, dict[str, dict[str, Any]]]
    metrics: list[str]
    stage: int
    seeds: list[int]
    overrides: dict[str, Any]
    prepare: list[str]


@dataclass(frozen=True)
class Cell:
    """levels: factor -> level name. overrides: all config values that differ from the base, output folder included."""

    levels: dict[str, str]
    seed: int
    overrides: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def arguments(self) -> list[str]:
        return [f"{key}={as_yaml(value)}" for key, value in self.overrides.items()]


def read_spec(path: Path | str) -> AblationSpec:
    """Reads and checks a spec YAML. Raises ValueError naming the file, the key and what was expected."""
    content, where, known = read_yaml(path, {"base", "output_dir"}), str(path), set(AblationSpec.__dataclass_fields__)
    for key in map(str, content):
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{path}: unknown key '{key}'; the nearest known one is '{nearest}'")
    for key in ("base", "output_dir", "factors", "metrics"):  # an empty one would run nothing, and say nothing
        if not content.get(key):
            raise ValueError(f"{path}: the key '{key}' is missing or empty")
    spec = AblationSpec(
        **{key: take(content, key, str, where) for key in ("base", "output_dir")},
        **{key: take(content, key, dict, where, default={}) for key in ("factors", "overrides")},
        **{key: take(content, key, list, where, default=[]) for key in ("metrics", "prepare")},
        stage=take(content, "stage", int, where, default=1), seeds=take(content, "seeds", list, where, default=[0]),
    )  # fmt: skip
    if not all(isinstance(text, str) for text in (*spec.metrics, *spec.prepare)):
        raise ValueError(f"{path}: metrics and prepare must be lists of texts")
    if spec.stage not in TRAINERS:
        raise ValueError(f"{path}: stage must be 1 or 2, got {spec.stage!r}")
    if not spec.seeds or len(set(map(str, spec.seeds))) != len(spec.seeds) or {type(s) for s in spec.seeds} != {int}:
        raise ValueError(f"{path}: seeds must be a list of different whole numbers, got {spec.seeds!r}")
    return replace(spec, factors={name: _levels(name, given, path) for name, given in spec.factors.items()})


def _levels(name: str, given: Any, path: Path) -> dict[str, dict[str, Any]]:
    """level name -> overrides, from a list of values of the key `name`, or from a mapping of named levels."""
    if isinstance(given, list):
        levels = {as_yaml(value): {name: value} for value in given}
    elif isinstance(given, dict) and all(isinstance(values, dict) for values in given.values()):
        levels = {str(level): values for level, values in given.items()}
    else:
        raise ValueError(
            f"{path}: factor '{name}' must be a list of values, or a mapping of level names to config overrides"
        )
    if len(levels) < 2:
        raise ValueError(f"{path}: factor '{name}' needs at least two different levels, got {list(levels)}")
    return levels


def make_cells(spec: AblationSpec) -> list[Cell]:
    """All combinations, seeds innermost: an interrupted ablation has whole cells rather than whole seeds."""
    _, folder_key, seed_key = TRAINERS[spec.stage]
    cells = []
    for chosen in itertools.product(*(levels.items() for levels in spec.factors.values())):
        levels = {factor: level for factor, (level, _) in zip(spec.factors, chosen)}
        overrides: dict[str, Any] = dict(spec.overrides)
        for factor, (_, values) in zip(spec.factors, chosen):
            clash = set(values) & (set(overrides) - set(spec.overrides))
            if clash:
                raise ValueError(f"factor '{factor}' sets {', '.join(sorted(clash))}, which another factor sets too")
            overrides.update(values)
        for seed in spec.seeds:
            label = "_".join([*levels.values(), f"seed{seed}"])
            folder = Path(spec.output_dir) / re.sub(r"[^A-Za-z0-9_.+-]+", "-", label)
            own = {**overrides, seed_key: seed, folder_key: str(folder)}
            cells.append(Cell(levels, seed, own, folder))
    names = [cell.name for cell in cells]
    if len(set(names)) != len(names):
        raise ValueError(f"two cells share a folder name; give the levels plainer names: {sorted(names)}")
    return cells


def check_cells(spec: AblationSpec, cells: Sequence[Cell]) -> None:
    """Loads every cell's config as its training does, so that a wrong value is told before the first run starts."""
    for cell in cells:
        if spec.stage == 1:
            from mvdiffusion.facelift_yaml import load_training_config

            load_training_config(spec.base, cell.arguments())
        else:
            from gslrm.config import IGNORED_KEYS, GSLRMConfig, check_config
            from multiview.config import load_config

            check_config(load_config(GSLRMConfig, spec.base, cell.arguments(), ignored=set(IGNORED_KEYS)))


def prepare(spec: AblationSpec) -> None:
    """Runs the spec's commands that have not been run for this output folder. Raises ValueError if one fails."""
    done_file = Path(spec.output_dir) / "prepared.json"
    done = read_json(done_file, list) if done_file.is_file() else []
    for command in spec.prepare:
        script, *arguments = shlex.split(command)
        # A spec may come from somebody else: it runs the project's own scripts, and no shell.
        if not re.fullmatch(r"scripts/\w+\.py", script):
            raise ValueError(f"prepare: {command!r} must start with one of the project's scripts/<name>.py")
        if command in done:
            continue
        command_line = [sys.executable, str(REPOSITORY / script), *arguments]
        finished = subprocess.run(command_line, capture_output=True, text=True)
        if finished.returncode:
            raise ValueError(f"prepare: {command!r} failed: {_last_line(finished.stderr)}")
        done.append(command)
        write_json(done_file, done)


# ---- running --------------------------------------------------------------------------------------------------------


def run_cells(spec: AblationSpec, cells: Sequence[Cell], on_cell: Callable[[Cell, dict], None]) -> list[dict]:
    """Runs what is not finished, in order; a failed cell does not stop the others and is tried again next time.

    on_cell is told of each cell's result. Returns the results in the cells' order.
    """
    results = []
    for cell in cells:
        result = finished_result(cell)
        if result is None:  # a process of its own: its memory is freed, and its crash is not ours
            result = run_cell(spec, cell)
            write_json(cell.folder / RESULT_FILE, result)
        results.append(result)
        on_cell(cell, result)
    return results


def finished_result(cell: Cell) -> dict | None:
    """Returns the stored result of a cell that ran to its end; None if it must run (anew, or on from a checkpoint)."""
    path = cell.folder / RESULT_FILE
    if not path.is_file():
        return None
    result, now = read_json(path), json.loads(json.dumps(cell.overrides))
    stored = result["overrides"]
    if stored != now:
        changed = [key for key in sorted(stored.keys() | now.keys()) if stored.get(key) != now.get(key)]
        told = "; ".join(f"{key}: {stored.get(key)!r} there, {now.get(key)!r} now" for key in changed)
        raise ValueError(
            f"{path} belongs to a run with other values ({told}); name a new output_dir in the spec, or delete "
            f"{cell.folder}"
        )
    return result if result["status"] == "done" else None


def run_cell(spec: AblationSpec, cell: Cell) -> dict:
    """Trains one cell in a process of its own and reads its last validation."""
    script, _, _ = TRAINERS[spec.stage]
    cell.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPOSITORY / script), "--config", spec.base, *cell.arguments()]
    started = time.monotonic()
    with open(cell.folder / LOG_FILE, "a") as handle:  # appended: a resumed run keeps the story of the first
        code = subprocess.run(command, stdout=handle, stderr=subprocess.STDOUT).returncode
    seconds = round(time.monotonic() - started, 1)
    result = {"levels": cell.levels, "seed": cell.seed, "overrides": cell.overrides, "seconds": seconds}
    if code:
        reason = _last_line((cell.folder / LOG_FILE).read_text(errors="replace"))
        return {**result, "status": "failed", "reason": f"exit code {code}: {reason}"}
    path = cell.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    validations = [line for line in lines if line["split"] == "val"]
    values = {k: v for k, v in (validations or [{}])[-1].items() if k not in ("step", "split", "time")}
    missing = [name for name in spec.metrics if name not in values]
    if missing:
        return {**result, "status": "failed", "reason": f"no {', '.join(missing)} among {', '.join(sorted(values))}"}
    return {**result, "status": "done", "metrics": values}


def as_yaml(value: Any) -> str:
    """Returns a config value as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


# ---- what the runs say ----------------------------------------------------------------------------------------------

Levels = dict[str, list[str]]  # factor -> its levels, the first being the baseline


def estimate(values: Sequence[float]) -> dict | None:
    """Returns mean over n seeds and their standard deviation (`spread`, None for one seed); None without values."""
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "n": len(values)}


def cell_values(results: Sequence[dict], metric: str, **levels: str) -> list[float]:
    """Returns the metric's values of the finished runs at these levels of some factors."""
    return [r["metrics"][metric] for r in results if r["status"] == "done" and levels.items() <= r["levels"].items()]


def main_effects(results: Sequence[dict], levels: Levels, metric: str, seeds: Sequence[int]) -> dict[str, dict]:
    """Returns every contrast against the baseline levels, by name, e.g. "a: y - x" or "(a: y - x) x (b: v - u)".

    A main effect is the mean change when one factor goes from its baseline to a level, over all levels of the others;
    an interaction of two is how much that change grows when the other factor goes from its baseline to a level
    (difference of differences), and so on. Each is computed within a seed, then averaged over seeds; seeds with a
    missing cell are left out.
    """
    cells = math.prod(map(len, levels.values()))
    by_seed = [[result for result in results if result["seed"] == seed] for seed in seeds]
    # Within a seed the runs share their noise, which so cancels; a seed with a missing cell would not be balanced.
    complete = [runs for runs in by_seed if len(cell_values(runs, metric)) == cells]
    found = {}
    for order in range(1, len(levels) + 1):
        for chosen in itertools.combinations(levels, order):
            for tops in itertools.product(*(levels[factor][1:] for factor in chosen)):
                steps = [f"{factor}: {top} - {levels[factor][0]}" for factor, top in zip(chosen, tops)]
                contrasts = []
                for runs in complete:
                    total = 0.0
                    for raised in itertools.product((False, True), repeat=order):
                        corner = {f: top if up else levels[f][0] for f, top, up in zip(chosen, tops, raised)}
                        sign = (-1) ** raised.count(False)
                        total += sign * statistics.fmean(cell_values(runs, metric, **corner))
                    contrasts.append(total)
                if contrasts:
                    found[" x ".join(f"({step})" for step in steps) if order > 1 else steps[0]] = estimate(contrasts)
    return found


def summarise(results: Sequence[dict], levels: Levels, metrics: Sequence[str], seeds: Sequence[int]) -> dict:
    """Returns cells and effects as JSON values."""
    cells = [
        {"levels": at, **{metric: estimate(cell_values(results, metric, **at)) for metric in metrics}}
        for at in (dict(zip(levels, names)) for names in itertools.product(*levels.values()))
    ]
    return {"cells": cells, "effects": {metric: main_effects(results, levels, metric, seeds) for metric in metrics}}


def markdown(results: Sequence[dict], levels: Levels, metrics: Sequence[str], seeds: Sequence[int]) -> str:
    """Returns the summary: cell means, then effects; ± is the standard deviation between seeds."""
    summary = summarise(results, levels, metrics, seeds)

    def text(figures: dict | None, sign: str = "") -> str:
        if figures is None:
            return "-"
        spread = "" if figures["spread"] is None else f" ± {figures['spread']:.3f}"
        return f"{figures['mean']:{sign}.3f}{spread}"

    cells = []
    for row in summary["cells"]:
        first = row[metrics[0]]
        runs = f"{first['n'] if first else 0} of {len(seeds)}"
        cells.append([*row["levels"].values(), runs, *(text(row[metric]) for metric in metrics)])
    by_metric = summary["effects"]
    names = list(by_metric[metrics[0]])
    used = by_metric[metrics[0]][names[0]]["n"] if names else 0
    effects = [[name, *(text(by_metric[metric][name], "+") for metric in metrics)] for name in names]
    tables = [
        Table("Cells: mean over seeds ± their standard deviation", [*levels, "runs", *metrics], cells),
        Table(
            f"Effects within a seed, mean ± standard deviation over {used} complete seeds", ["effect", *metrics],
            effects,
        ),
    ]  # fmt: skip
    failed = [
        f"- {', '.join(f'{factor} {level}' for factor, level in r['levels'].items())}, seed {r['seed']}: {r['reason']}"
        for r in results if r["status"] != "done"
    ]  # fmt: skip
    lines = ["## Failed, to be tried again by repeating the command", "", *failed] if failed else []
    return "\n".join([*(table.markdown() for table in tables), *lines]) + "\n"
