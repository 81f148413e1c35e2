"""Sample folders, split lists, pictures."""

import json

import pytest
import torch

from multiview.image import composite, grid, read_rgba, resize_rgba, write_image
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
        (lambda c: c["frames"][0].pop("file_path"), "lacks file_path"),
        (lambda c: c["frames"][0].update(file_path="images/none.png"), "does not exist"),
        (lambda c: [f.update(w=20, h=20) for f in c["frames"]], "says"),
        (lambda c: c.update(frames=[]), "empty"),
    ],
)
def test_bad_samples_are_refused(tmp_path, change, message):
    write_sample(tmp_path / "s", make())
    path = tmp_path / "s" / "opencv_cameras.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_sample(tmp_path / "s")


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


def test_compositing_is_straight_alpha():
    rgba = torch.tensor([0.2, 0.4, 0.6, 0.25]).reshape(4, 1, 1)
    assert torch.allclose(composite(rgba, 1.0).flatten(), torch.tensor([0.8, 0.85, 0.9]))
    with pytest.raises(ValueError, match="4 channels"):
        composite(rgba[:3], 1.0)


def test_an_rgb_file_gets_alpha_one_and_a_broken_one_is_refused(tmp_path):
    write_image(tmp_path / "a.png", torch.rand(3, 4, 5))
    assert read_rgba(tmp_path / "a.png").shape == (4, 4, 5) and (read_rgba(tmp_path / "a.png")[3] == 1).all()
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(ValueError, match="b.png cannot be read"):
        read_rgba(tmp_path / "b.png")
    assert resize_rgba(read_rgba(tmp_path / "a.png"), 8).shape == (4, 8, 8)


def test_grid_fills_row_by_row():
    sheet = grid(torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 2, 2) / 3, columns=2)
    assert sheet.shape == (3, 4, 4) and sheet[0, 0, 2] == pytest.approx(1 / 3) and sheet[0, 3, 3] == 1
