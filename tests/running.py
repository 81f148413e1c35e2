"""Commands run in this process: starting another one takes longer than what most of them do."""

import importlib
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from multiview.run import main_guard


def run(script: str, *arguments) -> tuple[int, str, str]:
    """Runs a script of the project: (exit code, stdout, stderr)."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", [script, *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main_guard(module.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def must(script: str, *arguments) -> str:
    """The same, and it must succeed: stdout."""
    code, out, err = run(script, *arguments)
    assert code == 0, err
    return out
