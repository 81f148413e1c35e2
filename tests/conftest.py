"""Fixtures that several test files ask for by name."""

import importlib
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def script():
    """scripts/make_synthetic_mouse.py as a module."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("make_synthetic_mouse")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="session")
def filmed(tmp_path_factory):
    """A recording of a mouse of spheres, not to be changed."""
    from filmed_spheres import COUNT, film

    folder = tmp_path_factory.mktemp("filmed") / "recording"
    film(folder, COUNT)
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory, filmed):
    """Its dataset, imported without interruption; not to be changed."""
    from filmed_spheres import settings_for

    from recording.importer import process_recording

    folder = tmp_path_factory.mktemp("whole") / "data"
    process_recording(settings_for(filmed, folder))
    return folder


@pytest.fixture(scope="session")
def render():
    """What draws synthetic mice on the CPU."""
    from synthetic.dataset import make_renderer

    return make_renderer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny data set of mouse6, Stage 1's components without a UNet, prompt embeddings; not to be changed."""
    from mvdiffusion_tiny import prepare

    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """Toy animals for Stage 2, not to be changed."""
    from gslrm_toys import write_toys

    return write_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def empty_yaml(tmp_path):
    """A training configuration of Stage 2 that says the rig alone."""
    path = tmp_path / "empty.yaml"
    path.write_text("rig: mouse6\n")
    return path


@pytest.fixture(scope="module")
def one_thread():
    """As in subprocesses that run with one: sums of several threads differ in the last bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real():
    """The calibration of the real rig, whose images are undistorted."""
    from synthetic.dataset import load_real_rig

    return load_real_rig()[0]


def refused(path, match, read=None):
    """Reading a calibration is refused by one sentence on one line."""
    from recording.calibration.formats import read_calibration

    with pytest.raises(ValueError, match=match) as caught:
        (read or read_calibration)(path)
    assert "\n" not in str(caught.value)


@contextmanager
def file_limit(size):
    """No file of this process, or of one that it starts, may grow beyond `size` bytes: a disk with that much room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
