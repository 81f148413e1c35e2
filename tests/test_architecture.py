"""The direction of imports, what heavy libraries live where, and quick answers to --help."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("multiview", "mvdiffusion", "gslrm", "pipeline", "synthetic", "recording", "evaluation")
ALLOWED_IMPORTS = {  # package -> the packages that it may import; entry scripts and scripts/ may import all
    "multiview": set(),
    "mvdiffusion": {"multiview"},
    "gslrm": {"multiview"},
    "recording": {"multiview"},
    "synthetic": {"multiview", "recording"},
    "pipeline": {"multiview", "mvdiffusion", "gslrm"},
    "evaluation": {"multiview", "mvdiffusion", "gslrm", "pipeline", "recording", "synthetic"},
}
HOMES = {  # library -> the only places that may import it
    "diffusers": ("mvdiffusion/", "scripts/make_demo_components.py"),
    "matplotlib": ("evaluation/plots.py",),
    "gsplat": ("gslrm/model/rasterizers/", "gslrm/model/export.py"),
    "wandb": ("multiview/run.py",),
}
SCRIPTS = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")])


def sources():
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))
    yield from (ROOT / path for path in SCRIPTS)


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def test_imports_run_from_entry_scripts_to_stages_to_multiview():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for package, allowed in ALLOWED_IMPORTS.items()
        for path in (ROOT / package).rglob("*.py")
        for module in imported_modules(path)
        if module.split(".")[0] in set(PACKAGES) - allowed - {package}
    ]
    assert not wrong, wrong


def test_heavy_libraries_stay_where_they_are_used():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources()
        for module in imported_modules(path)
        for library, homes in HOMES.items()
        if module.split(".")[0] == library and not path.relative_to(ROOT).as_posix().startswith(homes)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(
    "pattern",
    [
        r"strict\s*=\s*False", r"weights_only\s*=\s*False", r"except\s*:", r"except Exception\b",
        r"allow_pickle\s*=\s*True", r"yaml\.load\(", r"(?<![\w.])eval\(", r"(?<![\w.])exec\(",
    ],
)  # fmt: skip
def test_dangerous_habits_stay_out(pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, found


def test_every_lesson_has_its_test():
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "lessons.md").read_text())
    sources_of_tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    written = set(re.findall(r"def (test_\w+)", sources_of_tests))
    assert len(named) >= 22 and not set(named) - written


def test_no_flag_that_cannot_be_turned_off():
    """store_true with default True can never be false."""
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                if options.get("action") == "store_true" and options.get("default") is True:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, wrong


def test_files_stay_small_enough_to_hold_in_a_head():
    long = [f"{p.relative_to(ROOT)}: {n}" for p in sources() if (n := len(p.read_text().splitlines())) > 500]
    assert not long, long


HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert stop.code in (0, None), stop.code
heavy = {"torch", "diffusers", "transformers", "accelerate", "numba", "cv2", "scipy", "omegaconf"} & set(sys.modules)
sys.exit(f"imported before parsing: {sorted(heavy)}" if heavy else 0)
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_needs_no_heavy_import_and_bad_arguments_exit_2(script):
    """What makes --help quick, rather than a stopwatch that a busy machine upsets (times: docs/benchmarks.md)."""
    done = subprocess.run([sys.executable, "-c", HELP, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, str(script), "--no_such_flag"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "usage:" in done.stderr
