"""`python tests/config_keys.py` writes docs/config_keys.md: every key, its default, what the source says beside it."""

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


def rows(schema: type, prefix: str = "") -> list[str]:
    """Returns the table's rows of a dataclass and of those in it. A key's meaning is the comment behind it, or else
    directly above it (a heading stands below a blank line)."""
    hints, lines, table = typing.get_type_hints(schema), inspect.getsource(schema).splitlines(), []
    nodes = {n.target.id: n for n in ast.parse("\n".join(lines)).body[0].body if isinstance(n, ast.AnnAssign)}
    for entry in dataclasses.fields(schema):
        kind, key, node = hints[entry.name], f"{prefix}{entry.name}", nodes.get(entry.name)
        if dataclasses.is_dataclass(kind):
            told = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())  # Python's own is the signature
            table += [f"| **`{key}`** | | {told} |"] * (kind.__name__ + "(" not in told) + rows(kind, f"{key}.")
            continue
        said = entry.metadata.get("help") or lines[node.end_lineno - 1].partition("  # ")[2]
        before, above = (lines[node.lineno - k].strip() for k in (3, 2)) if node else ("", "")
        said = said or above[2:] * (above.startswith("# ") and before != "" and before[-3:] != '"""')
        made = entry.default_factory() if entry.default is dataclasses.MISSING else entry.default
        parts = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is typing.Literal]
        values = entry.metadata.get("choices") or [value for part in parts for value in typing.get_args(part)]
        low, high = entry.metadata.get("range", (None, None))
        limits = "" if low is None else f"{low:g} to {high:g}" if high < float("inf") else f"{low:g} or more"
        allowed = ", ".join(map(json.dumps, values)) if len(values) > 1 else limits
        meaning = re.sub(r"\bNone\b", "null", "; ".join(filter(None, (said, allowed)))).replace("|", "&#124;")
        table.append(f"| `{key}` | `{json.dumps(made)}` | {meaning} |")
    return table


def page() -> str:
    sys.path.insert(0, str(ROOT))
    from gslrm.config import GSLRMConfig
    from mvdiffusion.config import MVDiffusionConfig
    from pipeline.options import Options

    parts = {"Stage 1: `train_diffusion.py`": MVDiffusionConfig, "Stage 2: `train_gslrm.py`": GSLRMConfig,
             "Inference: `inference_mouse.py`, `test_full_pipeline.py`": Options}  # fmt: skip
    head = "| key | default | meaning |\n|---|---|---|"
    return HEAD + "".join(f"\n## {title}\n\n" + "\n".join([head, *rows(s)]) + "\n" for title, s in parts.items())


if __name__ == "__main__":
    PAGE.write_text(page())
