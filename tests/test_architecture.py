"""The direction of imports, what heavy libraries live where, and quick answers to --help."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import measure_house
import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST = {  # goals: 16,500 lines, 115 files, 9 names used once, 60 dataclasses, 9,000 lines reached, 10,000 of tests
    "product lines": 21_333, "product files": 131, "longest file": 400, "longest function": 85,
    "files in the largest folder": 19, "module functions named once per 1,000 lines": 11.3, "dataclasses": 77,
    "functions with more than 8 parameters": 1, "flags of inference_mouse.py": 28, "unused public names": 0,
    "files in a circle of imports": 0, "lines reached by the entry scripts": 11_200, "test lines": 15_000,
}  # fmt: skip
LEAST_COMMENTS = 9.5  # per 100 code lines
PACKAGES = ("multiview", "mvdiffusion", "gslrm", "pipeline", "synthetic", "recording", "evaluation")
ALLOWED_IMPORTS = {  # package -> the packages that it may import; entry scripts and scripts/ may import all
    "multiview": set(),
    "mvdiffusion": {"multiview"},
    "gslrm": {"multiview"},
    "recording": {"multiview"},
    "synthetic": {"multiview", "gslrm", "recording"},
    "pipeline": {"multiview", "mvdiffusion", "gslrm"},
    "evaluation": {"multiview", "mvdiffusion", "gslrm", "pipeline", "recording", "synthetic"},
}
HOMES = {  # library -> the only places that may import it
    "diffusers": ("mvdiffusion/", "scripts/make_demo_components.py"),
    "matplotlib": ("evaluation/report.py", "recording/quality/"),
    "gsplat": ("gslrm/model/rasterizers/", "gslrm/model/ply.py"),
    "wandb": ("multiview/tracking.py",),
    "viser": ("scripts/view.py",),  # imported by name there: an extra
    "gradio": ("scripts/web_demo.py",),
}
SCRIPTS = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")])


TEXTS = measure_house.product(ROOT)
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
DANGEROUS = (
    r"strict\s*=\s*False", r"weights_only\s*=\s*False", r"except\s*:", r"except Exception\b",
    r"allow_pickle\s*=\s*True", r"yaml\.load\(", r"(?<![\w.])eval\(", r"(?<![\w.])exec\(",
)  # fmt: skip


def imported_modules():
    """Yields (file, module) for every import of the product."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                yield name, node.module


def test_imports_run_from_entry_scripts_to_stages_to_multiview():
    wrong = []
    for name, module in imported_modules():
        package = name.split("/")[0]
        allowed = ALLOWED_IMPORTS.get(package, set(PACKAGES)) | {package}
        wrong += [f"{name} imports {module}"] if module.split(".")[0] in set(PACKAGES) - allowed else []
    assert not wrong, wrong


def test_heavy_libraries_stay_where_they_are_used():
    wrong = [
        f"{name} imports {module}"
        for name, module in imported_modules()
        for library, homes in HOMES.items()
        if module.split(".")[0] == library and not name.startswith(homes)
    ]
    assert not wrong, wrong


def test_dangerous_habits_stay_out():
    found = [
        f"{name}:{number} {line.strip()}"
        for name, text in TEXTS.items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search("|".join(DANGEROUS), line)
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
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                if options.get("action") == "store_true" and options.get("default") is True:
                    wrong.append(f"{name}:{node.lineno}")
    assert not wrong, wrong


def test_the_house_stays_within_its_limits():
    """`python tests/measure_house.py` prints the figures."""
    figures = measure_house.measure(ROOT)
    wrong = {name: figures[name] for name, most in MOST.items() if figures[name] > most}
    assert not wrong and figures["comments per 100 code lines"] >= LEAST_COMMENTS, (wrong, figures)


def test_remedies_name_flags_that_exist():
    """Every --flag inside a sentence of the product is one that some script defines."""
    defined, named = (
        {"nproc_per_node", "nnodes", "master_port", "shm-size", "help"},
        {},
    )  # torchrun's, docker's, argparse's
    for name, tree in TREES.items():
        nodes = list(ast.walk(tree))
        prose = {id(n.body[0].value) for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)
                 and n.body and isinstance(n.body[0], ast.Expr)}  # fmt: skip
        for node in nodes:
            if isinstance(node, ast.AnnAssign) and getattr(getattr(node.value, "func", None), "id", "") == "option":
                defined |= {node.target.id, f"no-{node.target.id}"}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                if re.fullmatch(r"--[a-z][\w-]*", node.value):  # an argument of add_argument
                    defined |= {node.value[2:], f"no-{node.value[2:]}"}
                elif " " in node.value:  # a sentence; `setup_mouse_env.sh --gpu` is not Python
                    for flag in re.findall(r"(?<!\.sh )(?<![\w-])--([a-z][\w-]*)", node.value):
                        named.setdefault(flag, f"{name}:{node.lineno}")
    assert len(named) > 20 and not {flag: where for flag, where in named.items() if flag not in defined}


HELP = """
import runpy, sys
script = sys.argv[1]
for flag, code in (("--help", 0), ("--no_such_flag", 2)):
    sys.argv = [script, flag]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert (stop.code or 0) == code, stop.code
heavy = {"torch", "diffusers", "transformers", "accelerate", "numba", "cv2", "scipy", "omegaconf"} & set(sys.modules)
sys.exit(f"imported before parsing: {sorted(heavy)}" if heavy else 0)
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_needs_no_heavy_import_and_bad_arguments_exit_2(script):
    """What makes --help quick, rather than a stopwatch that a busy machine upsets (times: docs/benchmarks.md)."""
    done = subprocess.run([sys.executable, "-c", HELP, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
