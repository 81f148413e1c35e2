"""What the tests of the import's round trip share: the script that films, with its renderer."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_script():
    spec = importlib.util.spec_from_file_location("make_synthetic_mouse", ROOT / "scripts" / "make_synthetic_mouse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
