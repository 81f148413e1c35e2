"""Stage 1's samples: what moves with the reference, the mirror and the crop; several data sets by ratio."""

from pathlib import Path

import pytest
import torch
from mvdiffusion_tiny import augmentation, write_dataset

from multiview.cameras import Cameras
from multiview.rig import RigMismatchError, View, ViewRig, load_rig
from multiview.sample import Sample, write_dataset_info, write_sample, write_split
from mvdiffusion.config import MixEntry
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset
from mvdiffusion.data.views import arrange
from mvdiffusion.training import build_datasets

SIZE = 32


def irregular_rig() -> ViewRig:
    """Directions that are the same neither from another view nor in the mirror, as a calibrated rig's."""
    angles = [(0, 9), (54, 25), (120, 17), (171, 20), (238, 12), (300, 22)]
    views = tuple(View(f"camera_{k}", azimuth, elevation) for k, (azimuth, elevation) in enumerate(angles))
    return ViewRig("irregular", views)


def animal() -> tuple[torch.Tensor, torch.Tensor]:
    """Points [n, 3] of no symmetry, and their colours [n, 3]."""
    generator = torch.Generator().manual_seed(0)
    xyz = torch.rand(300, 3, generator=generator) * torch.tensor([0.9, 0.5, 0.4]) + torch.tensor([-0.2, -0.1, -0.2])
    return xyz, torch.randint(0, 256, (300, 3), generator=generator).float() / 255


def draw_points(xyz: torch.Tensor, colours: torch.Tensor, cameras: Cameras) -> torch.Tensor:
    """One pixel per point, the nearest in front: RGBA [v, 4, h, w]."""
    pictures = torch.zeros(len(cameras), 4, cameras.height, cameras.width)
    uv, depth = cameras.project(xyz.expand(len(cameras), -1, -1))
    for view in range(len(cameras)):
        order = depth[view].argsort(descending=True)
        column, row = uv[view, order].floor().long().T.numpy()
        values = torch.cat([colours, torch.ones(len(xyz), 1)], dim=1)[order].T
        pictures[view].numpy()[:, row, column] = values.numpy()  # of several in one pixel numpy keeps the last
    return pictures


def write_animal(folder: Path, rig: ViewRig) -> Path:
    cameras = rig.cameras(SIZE)
    write_sample(folder / "sample_000000", Sample("a", draw_points(*animal(), cameras), cameras, rig.view_names))
    write_dataset_info(folder, rig, source="points")
    write_split(folder / "data_mouse_train.txt", [folder / "sample_000000"])
    return folder / "data_mouse_train.txt"


def turned(xyz: torch.Tensor, turn_deg: float) -> torch.Tensor:
    """The points of a world turned as `Cameras.rotate` turns cameras."""
    point = Cameras(torch.eye(4).repeat(len(xyz), 1, 1), torch.ones(len(xyz), 4), 1, 1)
    point.c2w[:, :3, 3] = xyz
    return point.rotate(turn_deg).origins


@pytest.mark.parametrize("name", ["mouse6", "facelift6", "irregular"])
def test_an_item_is_a_picture_of_the_moved_animal_by_its_own_cameras(tmp_path, name):
    """Every rotation and mirroring: rendering the mirrored, turned animal with the item's cameras gives its pixels."""
    rig = irregular_rig() if name == "irregular" else load_rig(name)
    data = write_animal(tmp_path, rig)
    dataset = MouseMVDiffusionDataset(
        data, rig, SIZE, augmentation(reference_view_idx="random", backgrounds=["black"], mirror_probability=0.5),
        with_cameras=True,
    )  # fmt: skip
    xyz, colours = animal()
    seen = set()
    for epoch in range(40):
        rotation, mirrored = dataset.draw_rotation(epoch, 0), dataset.draw(epoch, 0).mirrored
        if (rotation, mirrored) in seen:
            continue
        seen.add((rotation, mirrored))
        item = dataset[epoch, 0]
        assert (int(item["rotation"]), bool(item["mirrored"])) == (rotation, mirrored)
        moved = xyz * torch.tensor([-1.0, 1.0, 1.0]) if mirrored else xyz
        arrangement = arrange(rig, rotation, mirrored=mirrored)
        cameras = Cameras(item["c2w"], item["fxfycxcy"], SIZE, SIZE).validate()
        expected = draw_points(turned(moved, arrangement.turn_deg), colours, cameras)
        # A point on the border of a pixel may fall to either side.
        assert ((item["targets"] - expected[:, :3]).abs().amax(1) > 1e-3).sum() <= 6
        assert torch.equal(item["reference"], item["targets"][0])
        if arrangement.is_rig:
            assert item["prompts"].tolist() == list(range(rig.num_views))
            torch.testing.assert_close(cameras.c2w, rig.cameras(SIZE).c2w, atol=1e-4, rtol=0)
        if mirrored:  # and not the animal as it stands
            plain = draw_points(turned(xyz, arrangement.turn_deg), colours, cameras)
            assert ((item["targets"] - plain[:, :3]).abs().amax(1) > 1e-3).sum() > 100
    assert len(seen) == 2 * rig.num_views


def test_only_cameras_can_tell_what_an_irregular_rig_shows(tmp_path):
    rig = irregular_rig()
    data = write_animal(tmp_path, rig)
    with pytest.raises(ValueError, match="mirror_probability: 0, or tell the UNet the cameras"):
        MouseMVDiffusionDataset(data, rig, SIZE, augmentation(mirror_probability=0.5))
    with pytest.raises(ValueError, match="irregular does not; use reference_view_idx: 0"):
        MouseMVDiffusionDataset(data, rig, SIZE, augmentation(reference_view_idx="random"))
    with pytest.raises(RigMismatchError, match="requested and dataset"):
        MouseMVDiffusionDataset(data, load_rig("mouse6"), SIZE)


def test_a_turned_heading_rig_keeps_the_names_of_its_views():
    """FaceLift's views are named after the head: from the right, the right view is still called right."""
    found = arrange(load_rig("facelift6"), 2)
    assert found.rows.tolist() == [2, 3, 4, 5, 0, 1] == found.prompts.tolist()
    assert found.turn_deg == 0.0 and not found.is_rig


def test_a_crop_takes_its_cameras_along(tmp_path):
    """The centre of a ball's picture lies where the item's cameras project the ball, whatever was cut off."""
    rig, size, ball = load_rig("mouse6"), 128, torch.tensor([[0.12, -0.07, 0.05]])
    cameras = rig.cameras(size)
    uv, _ = cameras.project(ball.expand(6, -1, -1))
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    inside = [((columns - u).square() + (rows - v).square() < 36).float() for u, v in uv[:, 0]]
    rgba = torch.stack([torch.stack([mask] * 4) for mask in inside])
    write_sample(tmp_path / "sample_000000", Sample("b", rgba, cameras, rig.view_names))
    write_dataset_info(tmp_path, rig, source="ball")
    write_split(tmp_path / "list.txt", [tmp_path / "sample_000000"])
    cropped = augmentation(random_crop_ratio=0.6, mirror_probability=0.5)
    dataset = MouseMVDiffusionDataset(tmp_path / "list.txt", rig, 64, cropped)
    sides = set()
    for epoch in range(8):
        item = dataset[epoch, 0]
        found = Cameras(item["c2w"], item["fxfycxcy"], 64, 64)
        sign = torch.tensor([-1.0, 1.0, 1.0]) if item["mirrored"] else torch.ones(3)
        expected, _ = found.project((ball * sign).expand(6, -1, -1))
        mask = item["masks"][:, 0]
        v, u = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
        centre = torch.stack([(mask * u).sum((1, 2)), (mask * v).sum((1, 2))], -1) / mask.sum((1, 2))[:, None]
        assert (centre - expected[:, 0]).abs().max() < 0.35
        assert found.fxfycxcy[:, 0].unique().numel() == 1  # one crop for all views
        sides.add(round(float(cameras.fxfycxcy[0, 0] / 2 / found.fxfycxcy[0, 0]), 3))
    assert len(sides) > 4 and min(sides) >= 0.59 and max(sides) <= 1.0


def test_variants_come_back_and_differ(tmp_path):
    rig = load_rig("uniform4")
    options = {"backgrounds": ["white", "gray", "black"], "brightness_jitter": 0.1, "cache_variants": 3}
    data = write_dataset(tmp_path, rig, count=4)
    for cached, different in ((True, 3), (False, 6)):
        dataset = MouseMVDiffusionDataset(data, rig, SIZE, augmentation(cache_latents=cached, **options))
        draws = [dataset.draw(epoch, 1) for epoch in range(6)]
        assert len(set(draws)) == different and (not cached or draws[:3] == draws[3:])


def test_mixed_items_come_from_the_right_data_set(tmp_path):
    rig = load_rig("uniform4")
    lists = [write_dataset(tmp_path / name, rig, count=count) for name, count in (("a", 5), ("b", 4))]
    config = augmentation(train_data=str(lists[0]), mix=[MixEntry(str(lists[1]), 0.4)])
    config.validation_data = str(lists[0])
    mixed, _ = build_datasets(config, rig, SIZE, 0, with_cameras=False)
    plain = MouseMVDiffusionDataset(lists[1], rig, SIZE)
    assert len(mixed) == 5 and mixed.lengths == [3, 2] and mixed.percents == [60, 40]
    assert torch.equal(mixed[0, 4]["targets"], plain[0, 1]["targets"]) and int(mixed[0, 4]["index"]) == 4
    assert mixed.part(2) == (mixed.parts[0], 2) and mixed.part(3) == (mixed.parts[1], 0)
