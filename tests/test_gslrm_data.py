"""Stage 2's data: views read, mixtures, augmentation, what depends on what. Random images of 16 pixels."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from gslrm_toys import dataset_of

from gslrm.config import AugmentationConfig, CameraNoiseConfig, GSLRMConfig, check_config
from gslrm.data.mouse_dataset import MouseViewDataset, build_datasets, draw_colors
from gslrm.training import overfit_config, train
from gslrm.validation import prepare
from multiview import sample as samples
from multiview.cameras import Cameras
from multiview.config import load_config
from multiview.rig import RigMismatchError, load_rig
from multiview.sample import Sample, write_dataset_info, write_sample, write_split
from multiview.sampler import StepSampler, load_batches

SIZE = 16


def write_data(folder, num_samples: int, rig_name: str = "mouse6", first: int = 0):
    rig = load_rig(rig_name)
    own = rig.cameras(SIZE)
    extra = Cameras.orbit(torch.tensor([25.0, 200.0]), torch.tensor([10.0, 40.0]), rig.distance, rig.focal, SIZE)
    cameras = Cameras(torch.cat([own.c2w, extra.c2w]), torch.cat([own.fxfycxcy, extra.fxfycxcy]), SIZE, SIZE)
    names = rig.view_names + [None, None]
    for number in range(num_samples):
        generator = torch.Generator().manual_seed(first + number)
        rgba = torch.rand(len(names), 4, SIZE, SIZE, generator=generator)
        rgba[:, 3] = (rgba[:, 3] > 0.5).float()
        depth = (2.0 + 0.1 * torch.arange(8).view(-1, 1, 1, 1)).expand(-1, 1, SIZE, SIZE)
        write_sample(folder / f"sample_{number}", Sample(f"s{number}", rgba, cameras, names, depth))
    write_dataset_info(folder, rig)
    write_split(folder / "train.txt", [folder / f"sample_{number}" for number in range(num_samples)])
    return folder / "train.txt"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder / "real", 3), write_data(folder / "synthetic", 4, first=100)


OPTIONS = {"num_input_views": 3, "num_views": 5}


def test_items_hold_the_views_they_name_and_nothing_else_is_read(data, monkeypatch):
    from gslrm.data import mouse_dataset

    dataset = dataset_of(data[0], random_view_selection=True, with_depth=True, **OPTIONS)
    whole, read = samples.read_sample(dataset.folders[1], with_depth=True), []
    for module, name in ((samples, "read_rgba"), (samples, "_read_depth"), (mouse_dataset, "read_cameras")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, plain=plain: read.append(path.stem) or plain(path))
    for epoch in range(3):
        read.clear()
        item = dataset[epoch, 1]
        views = item["index"][:, 0]
        colors_then_depth = [f"cam_{view:03d}" for view in views.tolist() for _ in range(2)]
        cameras_too = [name for name in read if not name.startswith("cam_")]
        assert [name for name in read if name.startswith("cam_")] == colors_then_depth
        assert len(cameras_too) == (epoch == 0)  # from memory after the first time
        assert torch.equal(item["alpha"], whole.rgba[views, 3:]) and torch.equal(item["depth"], whole.depth[views])
        assert torch.equal(item["c2w"], whole.cameras.c2w[views])
        shown = item["alpha"].expand(-1, 3, -1, -1) == 1
        assert torch.equal(item["image"][shown], whole.rgba[views, :3][shown]) and (item["image"][~shown] == 1).all()


def test_too_few_views_are_refused(data):
    with pytest.raises(ValueError, match="sample_0 has 8 views, 9 are needed"):
        dataset_of(data[0], num_input_views=6, num_views=9)[0]
    with pytest.raises(ValueError, match="num_input_views is 7.*6 views"):
        dataset_of(data[0], num_input_views=7, num_views=8)


def mixed_config(data, *overrides: str) -> GSLRMConfig:
    return load_config(GSLRMConfig, None, [
        f"training.dataset.dataset_path={data[0]}",
        "training.dataset.mix=[{dataset_path: " + str(data[1]) + ", ratio: 0.7}]",
        "training.dataset.num_views=5", "training.dataset.num_input_views=3", "validation.enabled=false",
        f"model.image_tokenizer.image_size={SIZE}", "training.dataloader.num_workers=0",
        "training.losses.lpips_loss_weight=0", "training.losses.perceptual_loss_weight=0", *overrides,
    ])  # fmt: skip


def test_a_mixture_loads_from_the_config(data):
    config = mixed_config(data)
    check_config(config)
    dataset, _ = build_datasets(config, 0)
    assert len(dataset) == 7 and dataset.rig.name == "mouse6"
    item = dataset[2, 4]  # sample 1 of the second dataset
    assert item["index"][:, 1].tolist() == [4] * 5
    assert torch.equal(item["image"], dataset.parts[1][2, 1]["image"])
    own = dict.fromkeys(range(3), 0) | dict.fromkeys(range(3, 7), 1)
    sampler = StepSampler(dataset.lengths, 1, seed=0, percents=dataset.percents, stop=20)
    scenes = [int(batch["index"][0, 0, 1]) for batch in load_batches(dataset, sampler, 0, torch.device("cpu"))]
    assert Counter(own[scene] for scene in scenes) == {0: 6, 1: 14}
    only, _ = build_datasets(overfit_config(replace(config, validation=config.validation), 2), 2)
    assert len(only.parts) == 1 and len(only) == 2 and only.parts[0].list_file == data[0]


def test_equal_keys_in_two_datasets_draw_differently(data):
    config = mixed_config((data[0], data[0]), "training.dataset.random_view_selection=true")
    dataset, _ = build_datasets(config, 0)
    views = [[tuple(d[epoch, 0]["index"][:, 0].tolist()) for epoch in range(4)] for d in dataset.parts]
    assert views[0] != views[1]


def test_a_dataset_of_another_rig_is_not_mixed_in(data, tmp_path):
    other = write_data(tmp_path / "other", 1, "uniform6")
    with pytest.raises(RigMismatchError, match=f"{other}.*does not go with.*{data[0]}"):
        build_datasets(mixed_config((data[0], other)), 0)


def fixed(**ranges) -> AugmentationConfig:
    values = {"brightness_range": 1.0, "contrast_range": 1.0, "saturation_range": 1.0, "hue_range_deg": 0.0, **ranges}
    return AugmentationConfig(enabled=True, **{name: [value, value] for name, value in values.items()})


def test_each_colour_change_is_what_it_says():
    rgba = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    mean = ((rgb * alpha).sum(dim=(0, 2, 3)) / alpha.sum())[:, None, None]
    grey = (0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2])[:, None]
    for options, expected in (
        ({}, rgb), ({"brightness_range": 1.1}, rgb * 1.1), ({"contrast_range": 0.5}, mean + 0.5 * (rgb - mean)),
        ({"saturation_range": 0.0}, grey.expand_as(rgb)), ({"hue_range_deg": 360.0}, rgb),
        ({"brightness_range": 9.0}, torch.ones_like(rgb)),
    ):  # fmt: skip
        changed = draw_colors(fixed(**options), torch.Generator()).recolored(rgba)
        assert torch.allclose(changed[:, :3], expected, atol=1e-6) and torch.equal(changed[:, 3:], alpha)
    red = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 4, 1, 1)
    assert draw_colors(fixed(hue_range_deg=120.0), torch.Generator()).recolored(red)[0, :3, 0, 0].argmax() != 0


def test_one_draw_of_colours_serves_all_views():
    rgba = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    wide = {name: [0.5, 1.5] for name in ("brightness_range", "contrast_range", "saturation_range")}
    wide["hue_range_deg"] = [-20.0, 20.0]
    one = draw_colors(AugmentationConfig(True, **wide), torch.Generator().manual_seed(1)).recolored(rgba)
    two = draw_colors(AugmentationConfig(True, **wide), torch.Generator().manual_seed(2)).recolored(rgba)
    assert all(torch.equal(view, one[0]) for view in one) and not torch.equal(one, two)


def noisy_dataset(list_file, **options) -> MouseViewDataset:
    noise = CameraNoiseConfig(rotation_deg=1.0, translation=0.02, pixels=0.5)
    return dataset_of(list_file, augmentation=replace(fixed(), camera_noise=noise), **{**OPTIONS, **options})


@pytest.mark.parametrize("target_has_input", [True, False])
def test_noisy_cameras_are_told_and_true_ones_rendered(data, target_has_input):
    options = {"target_has_input": target_has_input, "with_depth": True}
    plain = dataset_of(data[0], **OPTIONS, **options)[3, 1]
    item = noisy_dataset(data[0], **options)[3, 1]
    told, true = (prepare({k: v[None] for k, v in x.items()}, 3, torch.device("cpu")) for x in (item, plain))
    for name in ("rgb", "alpha", "input_rgb", "input_alpha"):
        assert torch.allclose(getattr(told, name), getattr(true, name), atol=1e-6)
    assert torch.equal(told.target_cameras.c2w, true.target_cameras.c2w)
    assert torch.equal(told.target_cameras.fxfycxcy, true.target_cameras.fxfycxcy)
    shift = (told.cameras.origins - true.cameras.origins).norm(dim=-1)
    assert (shift > 0).all() and shift.max() < 0.2 and len(set(shift[0].tolist())) == 3  # every camera its own
    assert not torch.equal(told.cameras.fxfycxcy, true.cameras.fxfycxcy)
    views = item["index"][:, 0].tolist()
    assert views == plain["index"][:, 0].tolist() + (views[:3] if target_has_input else [])
    assert all(len(item[name]) == len(views) for name in ("image", "alpha", "depth", "c2w", "fxfycxcy"))


def test_camera_noise_depends_on_seed_epoch_and_index_and_is_off_without_augmentation(data):
    first = noisy_dataset(data[0])[3, 1]["c2w"]
    assert torch.equal(noisy_dataset(data[0])[3, 1]["c2w"], first)
    for other in (noisy_dataset(data[0])[4, 1], noisy_dataset(data[0])[3, 2], noisy_dataset(data[0], seed=1)[3, 1]):
        assert not torch.equal(other["c2w"], first)
    off = replace(noisy_dataset(data[0]).augmentation, enabled=False)
    assert len(dataset_of(data[0], augmentation=off, **OPTIONS)[3, 1]["image"]) == 5


def test_augmentation_that_makes_no_sense_is_refused():
    for override, message in (
        ("camera_noise.rotation_deg=-1", "camera_noise.rotation_deg is a standard deviation"),
        ("brightness_range=[1.1,0.9]", r"brightness_range must be \[low, high\]"),
        ("hue_range_deg=[1.0]", r"hue_range_deg must be \[low, high\]"),
    ):
        with pytest.raises(ValueError, match=message):
            check_config(load_config(GSLRMConfig, None, [f"training.dataset.augmentation.{override}"]))


def test_random_views_with_overlap_stay_near_an_input(data):
    options = {"num_input_views": 2, "num_views": 4}
    dataset = dataset_of(data[0], random_view_selection=True, maximize_view_overlap=True, **options)
    seen = set()
    for epoch in range(8):
        item = dataset[epoch, 0]
        position = torch.nn.functional.normalize(item["c2w"][:, :3, 3], dim=-1)
        assert ((position @ position[:2].T).amax(1) >= 0.5 - 1e-6).all()
        assert len(set(item["index"][:, 0].tolist())) == 4
        seen.add(tuple(item["index"][:2, 0].tolist()))
    assert len(seen) > 3


def test_backgrounds(data):
    for name, value in (("white", 1.0), ("gray", 0.5), ("black", 0.0)):
        item = dataset_of(data[0], background_color=name, **OPTIONS)[0]
        assert (item["background"] == value).all()
        assert (item["image"][item["alpha"].expand(-1, 3, -1, -1) == 0] == value).all()


def test_a_resumed_run_on_a_mixture_with_noisy_cameras_and_masked_losses_takes_the_same_steps(data, tmp_path):
    config = mixed_config(
        data, "training.runtime.device=cpu", "model.transformer.d=16", "model.transformer.d_head=8",
        "model.transformer.n_layer=1", "model.prune_background_tokens=true",
        "training.dataset.augmentation.enabled=true", "training.dataset.random_view_selection=true",
        "training.dataset.augmentation.camera_noise.rotation_deg=1.0", "training.losses.masked_l2_loss=true",
        "training.losses.masked_ssim_loss=true", "training.losses.masked_pointsdist_loss=true",
        "training.losses.pointsdist_loss_weight=0.1", "training.losses.pixelalign_loss_weight=0.1",
        f"training.checkpointing.checkpoint_dir={tmp_path}", "training.checkpointing.checkpoint_every=2",
        "training.schedule.max_fwdbwd_passes=4", "training.logging.print_every=1",
    )  # fmt: skip

    def logged() -> list[list[float]]:
        train(config)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return [[line[name] for name in ("loss", "l2", "ssim", "pointsdist", "pixelalign")] for line in lines]

    whole = logged()
    for path in tmp_path.glob("ckpt_*0004.pt*"):
        path.unlink()  # as if killed after pass 2
    assert logged() == whole and len(whole) == 4
