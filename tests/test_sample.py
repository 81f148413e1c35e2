"""Sample folders, split lists, datasets."""

import json
from dataclasses import replace

import pytest
import torch
from running import must

from multiview import sample as samples
from multiview.rig import load_rig
from multiview.sample import Sample, read_dataset_info, read_sample, read_split, write_sample, write_split


def make(size=16, views=6):
    rig = load_rig("mouse6")
    rgba = torch.rand(views, 4, size, size, generator=torch.Generator().manual_seed(1))
    depth = torch.full((views, 1, size, size), 2.5)
    depth[..., 0, 0] = 0
    return Sample("s", rgba, rig.cameras(size)[:views], rig.view_names[:views], depth)


@pytest.fixture
def written(tmp_path):
    """A sample folder of its own for each test."""
    write_sample(tmp_path / "s", make())
    return tmp_path / "s"


def test_a_sample_survives_writing_and_reading(written):
    sample, again = make(), read_sample(written, with_depth=True)
    assert (again.rgba - sample.rgba).abs().max() <= 0.5 / 255 + 1e-6
    assert (again.depth - sample.depth).abs().max() <= 1e-4
    assert torch.allclose(again.cameras.c2w, sample.cameras.c2w, atol=1e-6)
    assert again.view_names == sample.view_names and again.id == "s"


def test_resizing_moves_the_cameras_with_the_pixels(written):
    half = read_sample(written, image_size=8, num_views=2, with_depth=True)
    assert half.rgba.shape == (2, 4, 8, 8) and half.depth.shape == (2, 1, 8, 8)
    assert torch.allclose(half.cameras.fxfycxcy, load_rig("mouse6").cameras(8).fxfycxcy[:2])


def test_chosen_views_come_in_the_order_asked_for_and_the_rest_is_not_read(written):
    whole = read_sample(written, with_depth=True)
    for unread in (0, 1, 2, 4):
        (written / "images" / f"cam_{unread:03d}.png").unlink()
    some = read_sample(written, views=[5, 3], with_depth=True)
    assert torch.equal(some.rgba, whole.rgba[[5, 3]]) and torch.equal(some.depth, whole.depth[[5, 3]])
    assert torch.equal(some.cameras.c2w, whole.cameras.c2w[[5, 3]])
    assert some.view_names == [whole.view_names[5], whole.view_names[3]]
    with pytest.raises(ValueError, match=r"has 6 views, there are no views \[6, -1\]"):
        read_sample(written, views=[6, 5, -1])


def changed(folder, change):
    path = folder / "opencv_cameras.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def test_facelift_frames_without_view_names_load(written):
    assert read_sample(changed(written, lambda c: [f.pop("view") for f in c["frames"]])).view_names == [None] * 6


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
        (lambda c: c.update(frames=[]), "has 0 cameras"), (lambda c: c.update(frames=None), "frames must be a list"),
    ],
)  # fmt: skip
def test_bad_samples_are_refused_with_their_file(written, change, message):
    with pytest.raises(ValueError, match=message) as error:
        read_sample(changed(written, change))
    assert str(written) in str(error.value)


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


def test_links_that_the_user_made_are_followed(written, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample_000000").symlink_to(written)
    image = written / "images" / "cam_000.png"
    image.rename(tmp_path / "blob")
    image.symlink_to(tmp_path / "blob")  # Hugging Face's cache
    (tmp_path / "data" / "list.txt").write_text("sample_000000\n")
    assert len(read_sample(read_split(tmp_path / "data" / "list.txt")[0]).rgba) == 6


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("s", {"num_views": 6}, "has 4 views, 6 are needed"), ("s", {"with_depth": True}, "depth image"),
        ("nothing", {}, "a sample folder is expected"),
    ],
)  # fmt: skip
def test_missing_views_depth_and_folder_are_refused(tmp_path, folder, options, message):
    write_sample(tmp_path / "s", replace(make(views=4), depth=None))
    with pytest.raises(ValueError, match=message):
        read_sample(tmp_path / folder, **options)


def test_a_missing_list_is_named_rather_than_its_folder(tmp_path):
    for read in (read_dataset_info, read_split):
        with pytest.raises(ValueError, match="split list .*nope.txt does not exist; make a dataset"):
            read(tmp_path / "nope.txt")


def test_split_lists_are_relative_and_refuse_absolute_and_escaping_paths(tmp_path):
    path, folders = tmp_path / "data_mouse_train.txt", [tmp_path / "sample_000000", tmp_path / "sample_000001"]
    write_split(path, folders)
    assert path.read_text() == "sample_000000\nsample_000001\n" and read_split(path) == folders
    for text, message in ((f"{folders[0]}\n", "absolute path"), ("../elsewhere\n", "leads out"), ("\n", "empty")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_split(path)


def test_the_dataset_carries_its_rig_which_can_be_stamped_beside_a_split_list(tmp_path):
    with pytest.raises(ValueError, match="stamp_rig"):
        samples.read_dataset_info(tmp_path)
    samples.write_dataset_info(tmp_path / "a", load_rig("mouse6"), seed=3)
    info = samples.read_dataset_info(tmp_path / "a")
    assert info["rig"] == load_rig("mouse6") and info["seed"] == 3
    (tmp_path / "data_mouse_train.txt").write_text("a/b/sample_000000\n")
    must("scripts/stamp_rig.py", "--rig", "uniform6", "--path", tmp_path)
    assert samples.read_dataset_info(tmp_path)["rig"].name == "uniform6"
