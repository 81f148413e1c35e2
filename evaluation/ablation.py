"""A factorial of config values over one training config: every combination of levels, for every seed, is a run."""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multiview.files import write_json
from multiview.run import REPOSITORY

log = logging.getLogger(__name__)

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
    stage: int = 1
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: dict[str, Any] = field(default_factory=dict)
    prepare: list[str] = field(default_factory=list)


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
    from omegaconf import OmegaConf
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"ablation spec {path} does not exist")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except YAMLError as error:
        raise ValueError(f"ablation spec {path} is not valid YAML: {' '.join(str(error).split())}") from error
    known = set(AblationSpec.__dataclass_fields__)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    for key in content:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{path}: unknown key '{key}'; the nearest known one is '{nearest}'")
    for key in ("base", "output_dir", "factors", "metrics"):
        if not content.get(key):
            raise ValueError(f"{path}: the key '{key}' is missing or empty")
    if content.get("stage", 1) not in TRAINERS:
        raise ValueError(f"{path}: stage must be 1 or 2, got {content['stage']!r}")
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or len(set(seeds)) != len(seeds) or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"{path}: seeds must be a list of different whole numbers, got {seeds!r}")
    if not isinstance(content["factors"], dict):
        raise ValueError(f"{path}: factors must map names to levels")
    content["factors"] = {name: _levels(name, given, path) for name, given in content["factors"].items()}
    return AblationSpec(**content)


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


def check_cells(spec: AblationSpec, cells: list[Cell]) -> None:
    """Loads every cell's config, so that a wrong key or value is told before the first run starts."""
    from multiview.config import load_config

    if spec.stage == 1:
        from mvdiffusion.config import IGNORED_KEYS, MVDiffusionConfig

        for cell in cells:
            load_config(MVDiffusionConfig, spec.base, cell.arguments(), ignored=set(IGNORED_KEYS)).validate()
    else:
        from gslrm.config import IGNORED_KEYS, GSLRMConfig

        for cell in cells:
            load_config(GSLRMConfig, spec.base, cell.arguments(), ignored=set(IGNORED_KEYS))


def prepare(spec: AblationSpec) -> None:
    """Runs the spec's commands that have not been run for this output folder. Raises ValueError if one fails."""
    done_file = Path(spec.output_dir) / "prepared.json"
    done = json.loads(done_file.read_text()) if done_file.is_file() else []
    for command in spec.prepare:
        script, *arguments = shlex.split(command)
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


def run_cells(spec: AblationSpec, cells: list[Cell], on_cell: Callable[[Cell, dict], None]) -> list[dict]:
    """Runs what is not finished, in order; a failed cell does not stop the others and is tried again next time.

    on_cell is told of each cell's result. Returns the results in the cells' order.
    """
    results = []
    for cell in cells:
        result = finished_result(cell)
        if result is None:
            result = run_cell(spec, cell)
            write_json(cell.folder / RESULT_FILE, result)
        results.append(result)
        on_cell(cell, result)
    return results


def finished_result(cell: Cell) -> dict | None:
    """The stored result of a cell that ran to its end; None if it must run (anew, or on from its last checkpoint)."""
    path = cell.folder / RESULT_FILE
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    if result["overrides"] != json.loads(json.dumps(cell.overrides)):
        raise ValueError(
            f"{path} belongs to a run with other values ({_difference(result['overrides'], cell.overrides)}); name a "
            f"new output_dir in the spec, or delete {cell.folder}"
        )
    return result if result["status"] == "done" else None


def run_cell(spec: AblationSpec, cell: Cell) -> dict:
    """Trains one cell in a process of its own and reads its last validation."""
    script, _, _ = TRAINERS[spec.stage]
    cell.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPOSITORY / script), "--config", spec.base, *cell.arguments()]
    started = time.monotonic()
    with open(cell.folder / LOG_FILE, "a") as handle:
        code = subprocess.run(command, stdout=handle, stderr=subprocess.STDOUT, env=os.environ).returncode
    result = {
        "levels": cell.levels, "seed": cell.seed, "overrides": cell.overrides,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    if code:
        reason = _last_line((cell.folder / LOG_FILE).read_text(errors="replace"))
        return {**result, "status": "failed", "reason": f"exit code {code}: {reason}"}
    values = last_validation(cell.folder)
    missing = [name for name in spec.metrics if name not in values]
    if missing:
        return {**result, "status": "failed", "reason": f"no {', '.join(missing)} among {', '.join(sorted(values))}"}
    return {**result, "status": "done", "metrics": values}


def last_validation(folder: Path) -> dict[str, float]:
    """The figures of the last `val` line of metrics.jsonl, empty if there is none."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    found = [line for line in lines if line["split"] == "val"]
    return {k: v for k, v in found[-1].items() if k not in ("step", "split", "time")} if found else {}


def as_yaml(value: Any) -> str:
    """A config value as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def _difference(stored: dict, now: dict) -> str:
    keys = [key for key in sorted(set(stored) | set(now)) if stored.get(key) != now.get(key)]
    return "; ".join(f"{key}: {stored.get(key)!r} there, {now.get(key)!r} now" for key in keys)
