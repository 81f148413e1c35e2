"""What every command does alike: one line for a mistake, a version, an input named without its flag."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from inference_mouse import SOURCES, place_input

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("script", ["inference_mouse.py", "train_gslrm.py", "scripts/process_mouse_data.py"])
def test_a_python_without_torch_says_so_in_one_line(script):
    """-S hides site-packages, as the system's Python does when the environment is not activated."""
    done = subprocess.run([sys.executable, "-S", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "has no torch" in done.stderr and "setup_mouse_env.sh" in done.stderr


def test_the_version_is_that_of_the_package_and_names_the_commit():
    done = subprocess.run([sys.executable, "inference_mouse.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+ \(commit ([0-9a-f]{12}\+?|unknown)\)\n", done.stdout), done.stdout


def test_an_input_goes_where_its_kind_belongs(tmp_path):
    for path in ("pictures/a.png", "sample/opencv_cameras.json", "data/dataset.json", "a=b.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    kinds = {"pictures/a.png": "input_image", "film.MP4": "input_video", "pictures": "input_dir",
             "sample": "sample_dir", "data": "dataset", "data/list.txt": "dataset",
             "a=b.png": "input_image"}  # fmt: skip
    for word, kind in kinds.items():
        if not (tmp_path / word).exists():
            (tmp_path / word).touch()
        arguments = argparse.Namespace(**dict.fromkeys(SOURCES), overrides=["sampler=ddim", str(tmp_path / word)])
        place_input(arguments)
        assert getattr(arguments, kind) == tmp_path / word and arguments.overrides == ["sampler=ddim"]


@pytest.mark.parametrize(("words", "message"), [([], "no input"), (["a.png", "b.png"], "2 inputs")])
def test_none_or_several_inputs_end_with_code_2(words, message):
    done = subprocess.run([sys.executable, "inference_mouse.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
