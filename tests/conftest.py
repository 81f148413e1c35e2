"""Fixtures that several test files ask for by name."""

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def script():
    """scripts/make_synthetic_mouse.py as a module."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("make_synthetic_mouse")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def render():
    """What draws synthetic mice on the CPU."""
    from synthetic.dataset import make_renderer

    return make_renderer()


@pytest.fixture(scope="module")
def one_thread():
    """As in subprocesses that run with one: sums of several threads differ in the last bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
