"""Sample folders, split lists, datasets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from multiview.rig import load_rig
from multiview.sample import (
    Sample,
    read_dataset_info,
    read_sample,
    read_split,
    write_dataset_info,
    write_sample,
    write_split,
)

ROOT = Path(__file__).resolve().parent.parent


def make(size=16, views=6):
    rig = load_rig("mouse6")
    rgba = torch.rand(views, 4, size, size, generator=torch.Generator().manual_seed(1))
    depth = torch.full((views, 1, size, size), 2.5)
    depth[..., 0, 0] = 0
    return Sample("s", rgba, rig.cameras(size)[:views], rig.view_names[:views], depth)


def test_a_sample_survives_writing_and_reading(tmp_path):
    sample = make()
    write_sample(tmp_path / "sample_000000", sample)
    again = read_sample(tmp_path / "sample_000000", with_depth=True)
    assert (again.rgba - sample.rgba).abs().max() <= 0.5 / 255 + 1e-6
    assert (again.depth - sample.depth).abs().max() <= 1e-4
    assert torch.allclose(again.cameras.c2w, sample.cameras.c2w, atol=1e-6)
    assert again.view_names == sample.view_names and again.id == "s"


def test_resizing_moves_the_cameras_with_the_pixels(tmp_path):
    write_sample(tmp_path / "s", make(16))
    half = read_sample(tmp_path / "s", image_size=8, num_views=2, with_depth=True)
    assert half.rgba.shape == (2, 4, 8, 8) and half.depth.shape == (2, 1, 8, 8)
    assert torch.allclose(half.cameras.fxfycxcy, load_rig("mouse6").cameras(8).fxfycxcy[:2])


def test_chosen_views_come_in_the_order_asked_for_and_the_rest_is_not_read(tmp_path):
    write_sample(tmp_path / "s", make())
    whole = read_sample(tmp_path / "s", with_depth=True)
    for unread in (0, 1, 2, 4):
        (tmp_path / "s" / "images" / f"cam_{unread:03d}.png").unlink()
    some = read_sample(tmp_path / "s", views=[5, 3], with_depth=True)
    assert torch.equal(some.rgba, whole.rgba[[5, 3]]) and torch.equal(some.depth, whole.depth[[5, 3]])
    assert torch.equal(some.cameras.c2w, whole.cameras.c2w[[5, 3]])
    assert some.view_names == [whole.view_names[5], whole.view_names[3]]
    with pytest.raises(ValueError, match=r"has 6 views, there are no views \[6, -1\]"):
        read_sample(tmp_path / "s", views=[6, 5, -1])


def test_facelift_frames_without_view_names_load(tmp_path):
    write_sample(tmp_path / "s", make())
    path = tmp_path / "s" / "opencv_cameras.json"
    content = json.loads(path.read_text())
    for frame in content["frames"]:
        del frame["view"]
    path.write_text(json.dumps(content))
    assert read_sample(tmp_path / "s").view_names == [None] * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["frames"][0].update(file_path="../../secret.png"), "leads out of"),
        (lambda c: c["frames"][0].update(file_path="images/../../secret.png"), "leads out of"),
        (lambda c: c["frames"][0].update(file_path="/etc/passwd"), "absolute path"),
        (lambda c: c["frames"][0].update(file_path="a\0b"), "a path is expected"),
        (lambda c: c["frames"][0].update(file_path="x" * 300), "a path is expected"),
        (lambda c: c["frames"][0].update(file_path=7), "file_path must be a text, got 7"),
        (lambda c: c["frames"][0].pop("file_path"), "lacks file_path"),
        (lambda c: c["frames"][0].update(file_path="images/none.png"), "does not exist"),
        (lambda c: c["frames"].insert(2, None), "frame 2 must hold an object of keys and values, got None"),
        (lambda c: [f.update(w=20, h=20) for f in c["frames"]], "says"),
        (lambda c: c.update(frames=[]), "empty"),
        (lambda c: c.update(frames=None), "frames must be a list"),
    ],
)
def test_bad_samples_are_refused_with_their_file(tmp_path, change, message):
    write_sample(tmp_path / "s", make())
    path = tmp_path / "s" / "opencv_cameras.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        read_sample(tmp_path / "s")
    assert str(tmp_path / "s") in str(error.value)


@pytest.mark.parametrize("alpha", [1.0, 0.98, "rounded"])
def test_a_sample_without_masks_is_refused(tmp_path, alpha):
    """Alpha that covers the whole image would make the background part of the animal (instant-ngp#92)."""
    sample = make(64)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    sample.rgba[3, 3] = ((x - 32).abs() + (y - 32).abs() < 58).float() if alpha == "rounded" else alpha
    write_sample(tmp_path / "s", sample)
    with pytest.raises(ValueError, match="cam_003.png has no mask of the animal: its alpha covers .*RGBA"):
        read_sample(tmp_path / "s")
    assert len(read_sample(tmp_path / "s", num_views=3).rgba) == 3


def test_links_that_the_user_made_are_followed(tmp_path):
    write_sample(tmp_path / "elsewhere" / "s", make())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample_000000").symlink_to(tmp_path / "elsewhere" / "s")
    image = tmp_path / "elsewhere" / "s" / "images" / "cam_000.png"
    image.rename(tmp_path / "blob")
    image.symlink_to(tmp_path / "blob")  # Hugging Face's cache
    (tmp_path / "data" / "list.txt").write_text("sample_000000\n")
    assert len(read_sample(read_split(tmp_path / "data" / "list.txt")[0]).rgba) == 6


def test_missing_views_depth_and_folder_are_refused(tmp_path):
    sample = make(views=4)
    write_sample(tmp_path / "s", Sample("s", sample.rgba, sample.cameras, sample.view_names))
    with pytest.raises(ValueError, match="has 4 views, 6 are needed"):
        read_sample(tmp_path / "s", num_views=6)
    with pytest.raises(ValueError, match="depth image"):
        read_sample(tmp_path / "s", with_depth=True)
    with pytest.raises(ValueError, match="a sample folder is expected"):
        read_sample(tmp_path / "nothing")


def test_split_lists_are_relative_and_refuse_absolute_and_escaping_paths(tmp_path):
    path = tmp_path / "data_mouse_train.txt"
    write_split(path, [tmp_path / "sample_000000", tmp_path / "sample_000001"])
    assert path.read_text() == "sample_000000\nsample_000001\n"
    assert read_split(path) == [tmp_path / "sample_000000", tmp_path / "sample_000001"]
    path.write_text(f"{tmp_path}/sample_000000\n")
    with pytest.raises(ValueError, match="absolute path"):
        read_split(path)
    path.write_text("../elsewhere\n")
    with pytest.raises(ValueError, match="leads out"):
        read_split(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        read_split(path)


def test_the_dataset_carries_its_rig(tmp_path):
    with pytest.raises(ValueError, match="stamp_rig"):
        read_dataset_info(tmp_path)
    write_dataset_info(tmp_path, load_rig("mouse6"), seed=3)
    info = read_dataset_info(tmp_path)
    assert info["rig"] == load_rig("mouse6") and info["seed"] == 3


def test_a_folder_that_holds_a_split_list_alone_is_stamped_as_a_dataset(tmp_path):
    (tmp_path / "data_mouse_train.txt").write_text("a/b/sample_000000\n")
    command = [sys.executable, "scripts/stamp_rig.py", "--rig", "uniform6", "--path", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and read_dataset_info(tmp_path)["rig"].name == "uniform6", done.stderr
