"""Writes docs/config_keys.md: every key of the configurations, its default, and what the source says beside it.

python tests/config_keys.py
"""

import ast
import dataclasses
import inspect
import json
import re
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "config_keys.md"
HEAD = """# Every config key

Made from the source by `python tests/config_keys.py`; a test fails when it is out of date. `key=value` on a command
line overrides a YAML file; `--dry_run` of both trainings prints what is resolved. Flags: `python <script> --help`.
"""


def said_beside(schema: type) -> dict[str, str]:
    """Returns the comment of each field: behind it, or else directly above it (a heading stands below a blank line)."""
    lines, found = inspect.getsource(schema).splitlines(), {}
    for node in ast.parse(inspect.getsource(schema)).body[0].body:
        if isinstance(node, ast.AnnAssign):
            behind = lines[node.end_lineno - 1].partition("  # ")[2].removeprefix("fmt: skip")
            above, before = lines[node.lineno - 2].strip(), lines[node.lineno - 3].strip()
            is_own = above.startswith("# ") and before and not before.endswith('"""')
            found[node.target.id] = behind or (above[2:] if is_own else "")
    return found


def rows(schema: type, prefix: str = "") -> list[str]:
    hints, beside, table = typing.get_type_hints(schema), said_beside(schema), []
    for entry in dataclasses.fields(schema):
        kind, key = hints[entry.name], f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(kind):
            about = (kind.__doc__ or "").partition("\n\n")[0]
            about = "" if about.startswith(f"{kind.__name__}(") else " ".join(about.split())
            told = about or beside[entry.name]
            table += [f"| **`{key}`** | | {told} |"] * bool(told) + rows(kind, f"{key}.")
            continue
        made = entry.default_factory() if entry.default is dataclasses.MISSING else entry.default
        kinds = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is typing.Literal]
        values = typing.get_args(kinds[0]) if kinds else ()
        values, (low, high) = entry.metadata.get("choices") or values, entry.metadata.get("range", (None, None))
        limits = "" if low is None else f"{low:g} to {high:g}" if high < float("inf") else f"{low:g} or more"
        allowed = ", ".join(json.dumps(value) for value in values) if len(values) > 1 else limits
        meaning = "; ".join(filter(None, (entry.metadata.get("help") or beside[entry.name], allowed)))
        meaning = re.sub(r"\bNone\b", "null", meaning).replace("|", "&#124;")
        table.append(f"| `{key}` | `{json.dumps(made)}` | {meaning} |")
    return table


def page() -> str:
    """Returns the page as it should be."""
    sys.path.insert(0, str(ROOT))
    from gslrm.config import GSLRMConfig
    from mvdiffusion.config import MVDiffusionConfig
    from pipeline.options import Options

    parts = {
        "Stage 1: `train_diffusion.py`": MVDiffusionConfig, "Stage 2: `train_gslrm.py`": GSLRMConfig,
        "Inference: `inference_mouse.py`, `test_full_pipeline.py`": Options,
    }  # fmt: skip
    table = ["| key | default | meaning |", "|---|---|---|"]
    tables = [[f"\n## {title}\n", *table, *rows(schema)] for title, schema in parts.items()]
    return HEAD + "\n".join(line for table in tables for line in table) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
