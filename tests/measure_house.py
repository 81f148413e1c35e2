"""Prints how large and how connected the code is: the figures that tests/test_architecture.py holds within limits."""

import argparse
import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ENTRIES = {"inference_mouse.py", "test_full_pipeline.py", "train_diffusion.py", "train_gslrm.py"}


def product(root: Path) -> dict[str, str]:
    """Returns the text of every product file by its path under `root`; empty files are none."""
    paths = [path.relative_to(root) for path in (*root.glob("*.py"), *root.glob("[!.]*/**/*.py"))]
    kept = sorted(path.as_posix() for path in paths if path.parts[0] not in ("tests", "outputs", "shared"))
    return {name: text for name in kept if (text := (root / name).read_text()).strip()}


def imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Returns per file the product files it imports anywhere; imports for types and its package's own door apart."""
    files = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in trees}
    graph = {}
    for name, tree in trees.items():
        nodes = {n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)}
        nodes -= {n for i in tree.body if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test) for n in i.body}
        paths = [f"{getattr(n, 'module', '')}.{alias.name}".strip(".").split(".") for n in nodes for alias in n.names]
        modules = {".".join(parts[: end + 1]) for parts in paths for end in range(len(parts))}
        graph[name] = {files[module] for module in modules & set(files)} - {name, f"{Path(name).parent}/__init__.py"}
    return graph


def reachable(graph: dict[str, set[str]], start: set[str]) -> set[str]:
    """Returns the files that `start` and its imports lead to, `start` included."""
    reached: set[str] = set()
    while start := start - reached:
        reached, start = reached | start, {target for name in start for target in graph[name]}
    return reached


def measure(root: Path) -> dict[str, float]:
    """Returns the figures of one checkout by name."""
    texts = product(root)
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    reached = reachable(graph := imports(trees), ENTRIES)
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    used = Counter(n.id if isinstance(n, ast.Name) else getattr(n, "attr", "") for n in nodes)
    named = used + Counter(n.name for n in nodes if isinstance(n, ast.alias))
    top = [node for tree in trees.values() for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    callers = [n.args for n in functions if not any(re.search("jit|kernel", ast.dump(d)) for d in n.decorator_list)]
    written = [line.strip() for text in texts.values() for line in text.splitlines() if line.strip()]
    prose = [ast.get_docstring(n) or "" for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    code = sum(line[0] != "#" for line in written) - sum(bool(line) for text in prose for line in text.splitlines())
    shown = subprocess.run([sys.executable, "inference_mouse.py", "--help"], cwd=root, capture_output=True, text=True)
    return {
        "product lines": sum(lines.values()), "product files": len(lines), "longest file": max(lines.values()),
        "lines reached by the entry scripts": sum(lines[name] for name in reached), "files reached": len(reached),
        "files in the largest folder": max(Counter(str(Path(name).parent) for name in trees).values()),
        "longest function": max(n.end_lineno - n.lineno + 1 for n in functions),
        "module functions named once per 1,000 lines": 1000 / sum(lines.values()) * sum(
            used[n.name] == 1 for n in top if isinstance(n, ast.FunctionDef)),
        "unused public names": sum(not n.name.startswith("_") and not named[n.name] for n in top),
        "dataclasses": sum("dataclass" in ast.dump(d) for n in top for d in n.decorator_list),
        "functions with more than 8 parameters": sum(
            len({a.arg for a in n.args + n.kwonlyargs} - {"self"}) > 8 for n in callers),
        "flags of inference_mouse.py": shown.stdout.count("\n  --"),
        "files in a circle of imports": sum(name in reachable(graph, graph[name]) for name in graph),
        "comments per 100 code lines": 100 * sum(line[0] == "#" or "  # " in line for line in written) / code,
        "test lines": sum(len(path.read_text().splitlines()) for path in (root / "tests").rglob("*.py")),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("others", nargs="*", type=Path, help="other checkouts, each measured in a further column")
    columns = [measure(root) for root in (Path(__file__).resolve().parent.parent, *parser.parse_args().others)]
    for name in columns[0]:
        print(f"{name:<44}" + "".join(f"{column[name]:>10,.{int(column[name] % 1 > 0)}f}" for column in columns))
