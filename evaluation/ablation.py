"""A factorial of config values over one training config: every combination of levels, for every seed, is a run.

And what the runs say: cell means, main effects and interactions, with their spread over seeds.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multiview.config import load_config, read_yaml
from multiview.files import read_json, take, write_json
from multiview.report import Table
from multiview.run import REPOSITORY, STOPPED, Stop

RESULT_FILE, LOG_FILE, PREPARED_LOG = "result.json", "training.log", "prepare.log"
TRAINERS = {  # stage: script, key of the output folder, key of the seed
    1: ("train_diffusion.py", "output_dir", "seed"),
    2: ("train_gslrm.py", "training.checkpointing.checkpoint_dir", "training.runtime.seed"),
}


@dataclass
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


def as_yaml(value: Any) -> str:
    """Returns a config value as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def as_arguments(overrides: dict[str, Any]) -> list[str]:
    return [f"{key}={as_yaml(value)}" for key, value in overrides.items()]


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
    for name, given in spec.factors.items():
        if isinstance(given, list):
            given = {as_yaml(value): {name: value} for value in given}
        if not isinstance(given, dict) or not all(isinstance(values, dict) for values in given.values()):
            raise ValueError(f"{path}: factor '{name}' must be a list of values, or a mapping of level names to config "
                             "overrides")  # fmt: skip
        if len(given) < 2:
            raise ValueError(f"{path}: factor '{name}' needs at least two different levels, got {list(given)}")
        spec.factors[name] = {str(level): values for level, values in given.items()}
    return spec


def make_cells(spec: AblationSpec) -> dict[str, dict]:
    """Returns all combinations by the names of their folders, seeds innermost: an interrupted ablation has whole cells.

    Each is the head of its result: levels (factor -> level name), seed, overrides (all config values that differ from
    the base, output folder included). Its config is loaded as its training does: a wrong value is told before any run.
    """
    _, folder_key, seed_key = TRAINERS[spec.stage]
    cells: dict[str, dict] = {}
    for chosen in itertools.product(*(levels.items() for levels in spec.factors.values())):
        varied: dict[str, Any] = {}
        for factor, (_, values) in zip(spec.factors, chosen):
            if clash := set(values) & set(varied):
                raise ValueError(f"factor '{factor}' sets {', '.join(sorted(clash))}, which another factor sets too")
            varied |= values
        levels = {factor: level for factor, (level, _) in zip(spec.factors, chosen)}
        for seed in spec.seeds:
            name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", "_".join([*levels.values(), f"seed{seed}"]))
            if name in cells:
                raise ValueError(f"two cells share the folder name {name}; give the levels plainer names")
            own = {**spec.overrides, **varied, seed_key: seed, folder_key: str(Path(spec.output_dir) / name)}
            cells[name] = {"levels": levels, "seed": seed, "overrides": own}
    for cell in cells.values():
        arguments = as_arguments(cell["overrides"])
        if spec.stage == 1:
            from mvdiffusion.facelift_yaml import load_training_config

            load_training_config(spec.base, arguments)
        else:
            from gslrm.config import IGNORED_KEYS, GSLRMConfig, check_config

            check_config(load_config(GSLRMConfig, spec.base, arguments, ignored=set(IGNORED_KEYS)))
    return cells


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
        if run_child(command_line, log := Path(spec.output_dir) / PREPARED_LOG):
            raise ValueError(f"prepare: {command!r} failed: {_last_line(log)}")
        done.append(command)
        write_json(done_file, done)


def run_cell(spec: AblationSpec, cell: dict) -> dict:
    """Returns the result of a cell: the stored one if it ran to its end, else it is trained (on from a checkpoint).

    In a process of its own: its memory is freed, and its crash is not ours. Raises ValueError for a stored result of
    other values.
    """
    trainer, folder_key, _ = TRAINERS[spec.stage]
    folder = Path(cell["overrides"][folder_key])
    path, log, recorded = folder / RESULT_FILE, folder / LOG_FILE, folder / "metrics.jsonl"
    if path.is_file():
        result, now = read_json(path), json.loads(json.dumps(cell["overrides"]))
        stored = take(result, "overrides", dict, str(path))
        changed = [key for key in sorted(stored.keys() | now.keys()) if stored.get(key) != now.get(key)]
        if changed:
            told = "; ".join(f"{key}: {stored.get(key)!r} there, {now.get(key)!r} now" for key in changed)
            raise ValueError(
                f"{path} belongs to a run with other values ({told}); name a new output_dir in the spec, or delete "
                f"{folder}"
            )
        if take(result, "status", str, str(path)) == "done" and take(result, "metrics", dict, str(path)):
            return result
    command = [sys.executable, str(REPOSITORY / trainer), "--config", spec.base, *as_arguments(cell["overrides"])]
    started = time.monotonic()
    code = run_child(command, log)
    result = {**cell, "seconds": round(time.monotonic() - started, 1)}
    lines = [json.loads(line) for line in recorded.read_text().splitlines()] if recorded.is_file() else []
    last = ([line for line in lines if line["split"] == "val"] or [{}])[-1]
    values = {name: value for name, value in last.items() if name not in ("step", "split", "time")}
    missing = [name for name in spec.metrics if name not in values]
    if code:
        result |= {"status": "failed", "reason": f"exit code {code}: {_last_line(log)}"}
    elif missing:
        result |= {"status": "failed", "reason": f"no {', '.join(missing)} among {', '.join(sorted(values))}"}
    else:
        result |= {"status": "done", "metrics": values}
    write_json(path, result)
    return result


def run_child(command: list[str], log: Path) -> int:
    """Runs a command to its end and returns its exit code. A stop signal is passed on, so that a training saves itself;
    then this run ends too, with exit code 143."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with Stop() as stop, open(log, "a") as handle:  # appended: a resumed run keeps the story of the first
        stop.in_loop, is_told = True, False
        with subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT) as child:
            while child.poll() is None:
                if stop.signal is not None and not is_told:
                    child.send_signal(stop.signal)
                    is_told = True
                time.sleep(0.05)
    if stop.signal is not None:
        print(f"stopped by {stop.signal.name} in {log.parent}; repeat the command to continue", file=sys.stderr)
        raise SystemExit(STOPPED)
    return child.returncode


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or ["no output"])[-1][:300]


# ---- what the runs say ----------------------------------------------------------------------------------------------


def estimate(values: Sequence[float]) -> dict | None:
    """Returns mean over n seeds and their standard deviation (`spread`, None for one seed); None without values."""
    if not len(values):
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "n": len(values)}


def summarise(spec: AblationSpec, results: Sequence[dict]) -> dict:
    """Returns {"cells": [{"levels", metric: estimate}], "effects": {metric: {name: estimate}}}, JSON values.

    An effect is a contrast against the baseline levels (the first ones), e.g. "a: y - x" or "(a: y - x) x (b: v - u)".
    A main effect is the mean change when one factor goes from its baseline to a level, over all levels of the others;
    an interaction of two is how much that change grows when the other factor goes from its baseline to a level
    (difference of differences), and so on. Each is computed within a seed, then averaged over seeds; seeds with a
    missing cell are left out.
    """
    levels = {factor: list(named) for factor, named in spec.factors.items()}
    done = {(r["seed"], *r["levels"].values()): r["metrics"] for r in results if r["status"] == "done"}
    corners = list(itertools.product(*levels.values()))
    cells = [{"levels": dict(zip(levels, at))} for at in corners]
    # Within a seed the runs share their noise, which so cancels; a seed with a missing cell would not be balanced.
    complete = [seed for seed in spec.seeds if all((seed, *at) in done for at in corners)]
    effects: dict[str, dict] = {metric: {} for metric in spec.metrics}
    subsets = [c for n in range(1, len(levels) + 1) for c in itertools.combinations(levels, n)]
    for metric in spec.metrics:
        for cell, at in zip(cells, corners):
            cell[metric] = estimate([done[seed, *at][metric] for seed in spec.seeds if (seed, *at) in done])
        grid = np.array([done[seed, *at][metric] for seed in complete for at in corners], dtype=float)
        grid = grid.reshape(len(complete), *map(len, levels.values()))
        for chosen in subsets if complete else ():
            for tops in itertools.product(*(range(1, len(levels[factor])) for factor in chosen)):
                change, top = grid, dict(zip(chosen, tops))
                for axis, factor in reversed(list(enumerate(levels, 1))):  # the last axis first: the others stay put
                    raised = change.take(top.get(factor, 0), axis)
                    change = raised - change.take(0, axis) if factor in top else change.mean(axis)
                steps = [f"{factor}: {levels[factor][index]} - {levels[factor][0]}" for factor, index in top.items()]
                name = steps[0] if len(steps) == 1 else " x ".join(f"({step})" for step in steps)
                effects[metric][name] = estimate(change.tolist())
    return {"cells": cells, "effects": effects}


def markdown(spec: AblationSpec, results: Sequence[dict]) -> str:
    """Returns the summary: cell means, then effects; ± is the standard deviation between seeds."""
    summary, metrics = summarise(spec, results), spec.metrics

    def text(figures: dict | None, sign: str = "") -> str:
        if figures is None:
            return "-"
        spread = "" if figures["spread"] is None else f" ± {figures['spread']:.3f}"
        return f"{figures['mean']:{sign}.3f}{spread}"

    cells = []
    for row in summary["cells"]:
        runs = f"{(row[metrics[0]] or {'n': 0})['n']} of {len(spec.seeds)}"
        cells.append([*row["levels"].values(), runs, *(text(row[metric]) for metric in metrics)])
    first = summary["effects"][metrics[0]]
    effects = [[name, *(text(summary["effects"][metric][name], "+") for metric in metrics)] for name in first]
    used = next(iter(first.values()))["n"] if first else 0
    title = f"Effects within a seed, mean ± standard deviation over {used} complete seeds"
    cell_title = "Cells: mean over seeds ± their standard deviation"
    tables = [Table(cell_title, [*spec.factors, "runs", *metrics], cells), Table(title, ["effect", *metrics], effects)]
    failed = [
        f"- {', '.join(f'{factor} {level}' for factor, level in r['levels'].items())}, seed {r['seed']}: {r['reason']}"
        for r in results if r["status"] != "done"
    ]  # fmt: skip
    lines = ["## Failed, to be tried again by repeating the command", "", *failed] if failed else []
    return "\n".join([*(table.markdown() for table in tables), *lines]) + "\n"
