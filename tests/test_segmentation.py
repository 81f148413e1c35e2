"""Masks of photographs that have none: which method, how good the small network is, how it is trained."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from multiview import segmentation
from multiview.image import prepare_photo
from multiview.metrics import mask_iou
from multiview.segmentation import segment
from synthetic.segmentation import photographs, read_mice

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pictures():
    """Six photographs of the shipped example's mice over random backgrounds."""
    torch.manual_seed(5)
    mice = read_mice(ROOT / "data_mouse" / "data_mouse_train.txt", 60)
    return photographs(mice[::10])


def test_the_network_cuts_mice_out_of_cluttered_pictures(pictures):
    scores = []
    for picture, truth in zip(*pictures):
        soft, method = segment(picture.permute(1, 2, 0).numpy())
        assert method == "network" and soft.shape == truth.shape[1:] and 0 <= soft.min() and soft.max() <= 1
        scores.append(float(mask_iou(torch.from_numpy(soft)[None], truth)))
    assert np.mean(scores) > 0.8, scores


def test_a_large_picture_is_looked_at_twice(pictures):
    """The animal takes a small part of 600 x 900 pixels; the mask has the picture's size."""
    picture, truth = pictures[0][0], pictures[1][0, 0]
    large = np.full((600, 900, 3), 0.5, np.float32)
    large[300:460, 500:660] = picture.permute(1, 2, 0)
    soft, _ = segment(large)
    assert soft.shape == (600, 900) and mask_iou(torch.from_numpy(soft)[None, 300:460, 500:660], truth[None]) > 0.7
    assert (soft > 0.5).sum() < 1.3 * (truth > 0.5).sum()


def test_auto_takes_rembg_where_it_is_installed_and_the_color_model_where_nothing_is(pictures, monkeypatch, tmp_path):
    picture, truth = pictures[0][0].permute(1, 2, 0).numpy(), (pictures[1][0, 0] > 0.5).numpy()
    found = SimpleNamespace(remove=lambda image, only_mask: (truth * 255).astype(np.uint8), __spec__=object())
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "rembg", found)
        soft, method = segment(picture)
        assert method == "rembg" and np.array_equal(soft > 0.5, truth)
    for name in ("rembg", "network"):
        monkeypatch.setattr(segmentation, "WEIGHTS", tmp_path / "none")
        with pytest.raises(ValueError, match=f"mask {name} is not there"):
            segment(picture, method=name)
    plain = torch.full((3, 64, 96), 0.8)
    plain[:, 20:44, 30:66] = 0.2
    _, report = prepare_photo(torch.cat([plain, torch.ones(1, 64, 96)]), 32)
    assert report["segmented"] == "color"
    with pytest.raises(ValueError, match="mask must be one of auto, rembg, network, color, got 'x'"):
        segment(picture, method="x")


def test_training_writes_weights_that_load(tmp_path, monkeypatch):
    data = ROOT / "data_mouse"
    lists = ["--data", data / "data_mouse_train.txt", "--held_out", data / "data_mouse_val.txt"]
    command = [sys.executable, ROOT / "scripts" / "train_segmentation.py", *lists, "--steps", 2, "--batch_size", 2]
    output = tmp_path / "made" / "model.safetensors"
    done = subprocess.run([*map(str, command), "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 0 and "mean IoU" in done.stdout and "color" in done.stdout, done.stderr
    monkeypatch.setattr(segmentation, "WEIGHTS", output)
    segmentation._network.cache_clear()
    assert sum(p.numel() for p in segmentation._network().parameters()) > 3e5
    segmentation._network.cache_clear()
    assert output.stat().st_size < 1e6


def test_inference_says_which_method_found_the_mask(tmp_path):
    rgb = torch.full((3, 96, 96), 0.8)
    rgb[:, 30:66, 24:72] = 0.2
    from multiview.image import write_image

    write_image(tmp_path / "a.png", rgb)
    given = ["--mask", "color", "--output_dir", str(tmp_path), "--turntable_views", "0"]
    command = [sys.executable, str(ROOT / "inference_mouse.py"), str(tmp_path / "a.png")]
    done = subprocess.run([*command, *given], capture_output=True, text=True)
    assert done.returncode == 0 and "mask by color" in done.stdout, (done.stdout, done.stderr)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["photo"]["segmented"] == "color"
