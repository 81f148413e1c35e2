"""Stage 2's losses, data order and training loop, on toy animals of 16 pixels."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gslrm import losses as loss_functions
from gslrm.config import GSLRMConfig, LossesConfig, check_config
from gslrm.data.mouse_dataset import MouseViewDataset, StepSampler, batch_keys, jitter, overlapping
from gslrm.model.gaussians import Gaussians
from gslrm.model.gaussians_renderer import render
from gslrm.model.gslrm import GSLRM, GSLRMOutput
from gslrm.perceptual import PerceptualLoss, load_networks, load_perceptual
from gslrm.state import build_scheduler, build_state, update
from gslrm.training import overfit_config, train
from multiview.cameras import Cameras
from multiview.config import load_config
from multiview.rig import RigMismatchError, load_rig
from multiview.sample import Sample, write_dataset_info, write_sample, write_split

ROOT = Path(__file__).resolve().parent.parent
SIZE = 16


def toy_sample(number: int, rig, size: int = SIZE) -> Sample:
    """A coloured ellipsoid of about half the picture's width, seen from the rig and from two more directions."""
    generator = torch.Generator().manual_seed(number)
    own = rig.cameras(size)
    extra = Cameras.orbit(torch.tensor([25.0, 200.0]), torch.tensor([10.0, 40.0]), rig.distance, rig.focal, size)
    cameras = Cameras(torch.cat([own.c2w, extra.c2w]), torch.cat([own.fxfycxcy, extra.fxfycxcy]), size, size)
    points = torch.randn(1, 600, 3, generator=generator)
    points = torch.nn.functional.normalize(points, dim=-1) * torch.tensor([0.5, 0.25, 0.25])
    colour = torch.rand(3, generator=generator) + 0.3 * points / 0.5
    gaussians = Gaussians(
        xyz=points,
        features=((colour.clamp(0.05, 0.95) - 0.5) / loss_functions.SH_C0)[:, :, None],
        scaling=torch.full((1, 600, 3), -2.8),
        rotation=torch.tensor([1.0, 0, 0, 0]).expand(1, 600, 4),
        opacity=torch.full((1, 600, 1), 6.0),
    )
    rgb, alpha, depth = (value[0] for value in render(gaussians, cameras[None], 0.0))
    rgba = torch.cat([rgb / alpha.clamp_min(1e-3), alpha], dim=1).clamp(0, 1)
    names = rig.view_names + [None, None]
    return Sample(f"toy_{number}", rgba, cameras, names, depth=torch.where(alpha > 0.5, depth / alpha, 0.0))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the subprocesses: sums of several threads differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rig = tmp_path_factory.mktemp("toys"), load_rig("mouse6")
    for number in range(5):
        write_sample(folder / f"sample_{number}", toy_sample(number, rig))
    write_dataset_info(folder, rig)
    write_split(folder / "train.txt", [folder / f"sample_{number}" for number in range(4)])
    write_split(folder / "val.txt", [folder / "sample_4"])
    return folder


def settings(data, folder, **overrides) -> list[str]:
    values = {
        "model.image_tokenizer.image_size": SIZE,
        "model.transformer.d": 32,
        "model.transformer.d_head": 16,
        "model.transformer.n_layer": 2,
        "training.runtime.device": "cpu",
        "training.runtime.grad_checkpoint_every": 0,
        "training.dataset.dataset_path": data / "train.txt",
        "training.dataset.num_views": 8,
        "training.dataloader.num_workers": 0,
        "training.losses.lpips_loss_weight": 0,
        "training.losses.perceptual_loss_weight": 0,
        "training.losses.ssim_loss_weight": 0.1,
        "training.losses.alpha_loss_weight": 0.2,
        "training.optimizer.lr": 1e-3,
        "training.schedule.max_fwdbwd_passes": 6,
        "training.schedule.warmup": 2,
        "training.checkpointing.checkpoint_dir": folder,
        "training.checkpointing.checkpoint_every": 2,
        "training.logging.print_every": 1,
        "validation.dataset_path": data / "val.txt",
        "validation.val_every": 1000,
        **overrides,
    }
    return [f"{key}={value}" for key, value in values.items()]


def config_of(data, folder, **overrides) -> GSLRMConfig:
    return load_config(GSLRMConfig, None, settings(data, folder, **overrides))


def logged(folder, name="loss", split="train") -> list[float]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["split"] == split]


def run_script(*arguments, torchrun: int = 0) -> subprocess.Popen:
    launcher = [sys.executable, "train_gslrm.py"]
    if torchrun:
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(torchrun),
            "train_gslrm.py",
        ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture
def empty_yaml(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("rig: mouse6\n")
    return path


# ---- losses ---------------------------------------------------------------------------------------------------------


def pictures(seed=0, shape=(2, 3, 3, 16, 16)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_l2_and_masked_l2():
    a, b = pictures(0), pictures(1)
    assert torch.allclose(loss_functions.l2_loss(a, b), (a - b).square().mean((1, 2, 3, 4)))
    mask = torch.zeros(2, 3, 1, 16, 16)
    mask[0, :, :, 3:7, 2:9] = 1.0
    masked = loss_functions.l2_loss(a, b, mask)
    assert torch.allclose(masked[0], (a - b)[0, :, :, 3:7, 2:9].square().mean())
    assert masked[1] == 0  # an empty mask has no foreground error
    assert torch.equal(loss_functions.l2_loss(torch.where(mask > 0, a, 0.5), b, mask), masked)


def test_ssim_is_the_usual_one_and_stays_within_0_and_1():
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = pictures(0, (2, 1, 3, 32, 32)), pictures(1, (2, 1, 3, 32, 32)) * 0.3
    b = b + 0.7 * a
    interior = loss_functions.ssim_map(a[:, 0], b[:, 0]).mean((1, 2, 3))
    _, full = structural_similarity_index_measure(
        a[:, 0], b[:, 0], sigma=1.5, kernel_size=11, data_range=1.0, reduction="none", return_full_image=True
    )
    assert torch.allclose(interior, full[..., 5:-5, 5:-5].mean((1, 2, 3)), atol=1e-5)
    flat = torch.full_like(a, 0.7) + 1e-7 * a  # rounding makes the variance of flat areas negative
    for x, y in ((a, b), (flat, flat), (flat, flat + 3e-8), (a, 1 - a)):
        for mask in (None, torch.ones(2, 1, 1, 32, 32), torch.zeros(2, 1, 1, 32, 32)):
            value = loss_functions.ssim_loss(x, y, mask)
            assert (value >= 0).all() and (value <= 1).all()
    assert loss_functions.ssim_loss(a, a).max() < 1e-5


def output_of(xyz, origins, directions, shape):
    b, k, _ = xyz.shape
    gaussians = Gaussians(
        xyz=xyz, features=torch.zeros(b, k, 1, 3), scaling=torch.zeros(b, k, 3), rotation=torch.ones(b, k, 4),
        opacity=torch.zeros(b, k, 1),
    )  # fmt: skip
    index = torch.arange(k).expand(b, -1)
    return GSLRMOutput(gaussians, index, torch.ones(b, k, dtype=torch.bool), origins, directions, 0, shape)


def test_pixelalign_is_the_distance_from_the_ray():
    origins = torch.tensor([0.0, -2.7, 0.0]).expand(1, 4, 3)
    directions = torch.tensor([0.0, 1.0, 0.0]).expand(1, 4, 3)
    xyz = torch.tensor([[0.3, 0.0, 0.4], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])[None]
    output = output_of(xyz, origins, directions, (1, 2, 2))
    assert loss_functions.pixelalign_loss(output).item() == pytest.approx(1.5 / 4)
    alpha = torch.tensor([1.0, 1.0, 0.0, 1.0]).view(1, 1, 1, 2, 2)
    assert loss_functions.pixelalign_loss(output, alpha).item() == pytest.approx(0.5 / 4)


def test_pointsdist_spreads_points_around_the_cameras_distance():
    origins = torch.tensor([0.0, -2.7, 0.0]).expand(1, 8, 3)
    directions = torch.tensor([0.0, 1.0, 0.0]).expand(1, 8, 3)
    distance = torch.tensor([1.0, 2, 3, 4, 2, 2, 2, 2])[:, None]
    output = output_of((origins + distance * directions), origins, directions, (2, 2, 2))
    first = distance[:4, 0]
    target = (first - first.mean()) / (first.std() + 1e-8) * 0.5 + 2.7
    expected = ((first - target).square().sum() + 4 * 0.7**2) / 8
    assert loss_functions.pointsdist_loss(output).item() == pytest.approx(expected.item(), rel=1e-5)


def test_direct_losses_vanish_at_the_true_surface(data):
    item = MouseViewDataset(data / "train.txt", image_size=SIZE, num_input_views=6, num_views=8, with_depth=True)[0]
    cameras = Cameras(item["c2w"][None, :6], item["fxfycxcy"][None, :6], SIZE, SIZE)
    torch.manual_seed(0)
    output = GSLRM(config_of(data, "x").model)(item["image"][None, :6], cameras)
    targets = loss_functions.Targets(
        rgb=item["image"][None], alpha=item["alpha"][None], input_rgb=item["image"][None, :6],
        input_alpha=item["alpha"][None, :6], input_forward=item["c2w"][None, :6, :3, 2],
        input_focal_px=item["fxfycxcy"][None, :6, 0], input_depth=item["depth"][None, :6],
    )  # fmt: skip
    before = loss_functions.direct_losses(output, targets, 0.7)
    # Points back-projected from depth with a hand-made projection check: their camera z is the depth map.
    depth = loss_functions.pixels_of(targets.input_depth, output)
    forward = targets.input_forward[0, output.pixel_index[0] // SIZE**2][None]
    truth = output.ray_origins + depth / (output.ray_directions * forward).sum(-1, keepdim=True) * output.ray_directions
    w2c = cameras.w2c[0, output.pixel_index[0] // SIZE**2]
    z = torch.einsum("kj,kj->k", w2c[:, 2, :3], truth[0]) + w2c[:, 2, 3]
    shown = depth[0, :, 0] > 0
    assert torch.allclose(z[shown], depth[0, shown, 0], atol=1e-5)
    colour = (loss_functions.pixels_of(targets.input_rgb, output) - 0.5) / loss_functions.SH_C0
    n = output.n_free
    gaussians = output.gaussians
    exact = replace(
        gaussians,
        xyz=torch.cat([gaussians.xyz[:, :n], truth], 1),
        features=torch.cat([gaussians.features[:, :n], colour[:, :, None]], 1),
    )
    after = loss_functions.direct_losses(replace(output, gaussians=exact), targets, 0.7)
    assert before["xyz"] > 0.1 and after["xyz"] < 1e-6 and after["colour"] < 1e-9


def test_loss_weights_follow_the_schedule():
    losses = LossesConfig(direct_loss_weight=1.0, direct_loss_weight_after=0.15, direct_warmup_steps=10)
    assert loss_functions.loss_weights(losses, 9) == {"direct": 1.0}
    assert loss_functions.loss_weights(losses, 10, l2_warmup_steps=20) == {"l2": 1.0, "ssim": 0.2, "direct": 0.15}
    assert "lpips" in loss_functions.loss_weights(losses, 20, l2_warmup_steps=20)
    points = loss_functions.loss_weights(LossesConfig(warmup_pointsdist=True), 999)
    assert points["pointsdist"] == 0.1 and "l2" not in points and "perceptual" not in points


def test_missing_vgg_weights_name_file_and_key(tmp_path):
    for key, file in (("lpips_loss_weight", "vgg16-397923af.pth"), ("perceptual_loss_weight", "verydeep-19")):
        weights = {"lpips_loss_weight": 0.0, "perceptual_loss_weight": 0.0, key: 0.5}
        with pytest.raises(ValueError, match=f"{key}.*{tmp_path}.*{file}"):
            load_networks(LossesConfig(vgg_folder=str(tmp_path), **weights), torch.device("cpu"))
    off = LossesConfig(vgg_folder=str(tmp_path), lpips_loss_weight=0, perceptual_loss_weight=0)
    assert load_networks(off, torch.device("cpu")) == {}


def test_perceptual_loss_formula_and_weights_from_a_gslrm_checkpoint(tmp_path):
    torch.manual_seed(0)
    source = PerceptualLoss()
    prefix = "loss_calculator.perceptual_loss_module.net."
    path = tmp_path / "imagenet-vgg-verydeep-19.pt"
    torch.save({"model": {prefix + name: value for name, value in source.net.state_dict().items()}}, path)
    loss = load_perceptual(path)
    a, b = pictures(0, (2, 3, 32, 32)), pictures(1, (2, 3, 32, 32))
    value = loss(a, b)
    mean = torch.tensor([123.68, 116.779, 103.939]).view(1, 3, 1, 1)
    x, y, expected = 255 * a - mean, 255 * b - mean, 0.0
    expected = (x - y).abs().mean((1, 2, 3))
    weights = {2: 1 / 2.6, 4: 1 / 4.8, 6: 1 / 3.7, 10: 1 / 5.6, 14: 10 / 1.5}
    for number in range(1, 15):
        if number in (3, 5, 9, 13):
            x, y = (torch.nn.functional.avg_pool2d(t, 2) for t in (x, y))
        x, y = (torch.relu(getattr(source.net, f"conv{number}")(t)) for t in (x, y))
        if number in weights:
            expected = expected + weights[number] * (x - y).abs().mean((1, 2, 3))
    assert torch.allclose(value, expected / 255, rtol=1e-4)
    assert loss(a, a).max() == 0


# ---- data -----------------------------------------------------------------------------------------------------------


def test_item_layout_and_index_order(data):
    dataset = MouseViewDataset(data / "train.txt", image_size=SIZE, num_input_views=4, num_views=6, with_depth=True)
    item = dataset[(0, 2)]
    assert item["image"].shape == (6, 3, SIZE, SIZE) and item["alpha"].shape == (6, 1, SIZE, SIZE)
    assert item["depth"].shape == (6, 1, SIZE, SIZE) and item["c2w"].shape == (6, 4, 4)
    assert item["index"][:4, 0].tolist() == [0, 1, 2, 3]  # view_idx first: the rig's order
    assert item["index"][:, 1].tolist() == [2] * 6  # then scene_idx
    assert item["targets"].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.allclose(item["c2w"][:4], load_rig("mouse6").cameras(SIZE).c2w[:4], atol=1e-6)
    corner = item["image"][0, :, 0, 0]
    assert torch.allclose(corner, torch.ones(3), atol=0.02)
    without = MouseViewDataset(
        data / "train.txt", image_size=SIZE, num_input_views=4, num_views=6, target_has_input=False
    )
    assert without[0]["targets"].tolist() == [4, 5]


def test_items_depend_on_seed_epoch_and_index_only(data):
    options = {"image_size": SIZE, "num_input_views": 3, "num_views": 5, "random_views": True, "background": "random"}
    one, two = (MouseViewDataset(data / "train.txt", seed=7, **options) for _ in range(2))
    one[(0, 1)]
    assert torch.equal(one[(3, 2)]["index"], two[(3, 2)]["index"])
    assert torch.equal(one[(3, 2)]["image"], two[(3, 2)]["image"])
    seen = {tuple(one[(epoch, 2)]["index"][:, 0].tolist()) for epoch in range(6)}
    assert len(seen) > 1
    assert len({one[(epoch, 2)]["background"][0].item() for epoch in range(12)}) > 1


def test_global_batches_do_not_depend_on_the_number_of_processes():
    whole = [batch_keys(5, step, 4, 7) for step in range(9)]
    visited = [key for keys in whole for key in keys]
    assert sorted(visited[:28]) == sorted((epoch, index) for epoch in range(4) for index in range(7))
    parts = [
        list(StepSampler(5, 7, batch_size=2, rank=rank, world_size=2, start=3, stop=9)) for rank in range(2)
    ]
    assert [a + b for a, b in zip(*parts)] == whole[3:]


def test_unreadable_sample_is_an_error_that_names_the_file_or_is_left_out(data, tmp_path):
    for number in range(2):
        write_sample(tmp_path / f"sample_{number}", toy_sample(number, load_rig("mouse6")))
    write_dataset_info(tmp_path, load_rig("mouse6"))
    write_split(tmp_path / "train.txt", [tmp_path / "sample_0", tmp_path / "sample_1"])
    picture = tmp_path / "sample_0" / "images" / "cam_002.png"
    picture.write_bytes(picture.read_bytes()[:40])
    options = {"image_size": SIZE, "num_input_views": 6, "num_views": 6}
    with pytest.raises(ValueError, match="sample_0.*cam_002.png"):
        MouseViewDataset(tmp_path / "train.txt", **options)[0]
    dataset = MouseViewDataset(tmp_path / "train.txt", on_bad_sample="skip", **options)
    assert dataset.num_skipped == 1 and len(dataset) == 1
    dataset[0]


def test_cameras_at_another_distance_are_refused(tmp_path):
    sample = toy_sample(0, load_rig("mouse6"))
    c2w = sample.cameras.c2w.clone()
    c2w[..., :3, 3] *= 3.4 / 2.7
    write_sample(tmp_path / "far", replace(sample, cameras=replace(sample.cameras, c2w=c2w)))
    write_dataset_info(tmp_path, load_rig("mouse6"))
    write_split(tmp_path / "train.txt", [tmp_path / "far"])
    with pytest.raises(ValueError, match="distance from the origin"):
        MouseViewDataset(tmp_path / "train.txt", image_size=SIZE, num_input_views=6, num_views=6)[0]


def test_view_overlap_rules():
    azimuths = torch.tensor([0.0, 50.0, 80.0, 120.0])
    cameras = Cameras.orbit(azimuths, torch.zeros(4), 2.7, 1.0, 8)
    assert overlapping(cameras, torch.tensor([0]), "normalised").tolist() == [True, True, False, False]
    assert overlapping(cameras, torch.tensor([0]), "upstream").tolist() == [True, True, True, False]  # 86 degrees


def test_jitter_draws_once_for_all_views_and_leaves_alpha():
    from gslrm.config import AugmentationConfig

    rgba = torch.full((3, 4, 8, 8), 0.5)
    changed = jitter(rgba, AugmentationConfig(True, [1.1, 1.1], [1.0, 1.0]), torch.Generator())
    assert torch.allclose(changed[:, :3], torch.tensor(0.55)) and torch.equal(changed[:, 3:], rgba[:, 3:])


# ---- configuration and start ----------------------------------------------------------------------------------------


def test_one_input_view_is_refused_with_the_reason(data, tmp_path):
    with pytest.raises(ValueError, match="num_input_views must be at least 2.*Stage 1"):
        check_config(config_of(data, tmp_path, **{"training.dataset.num_input_views": 1}))


def test_every_config_of_stage_2_loads():
    from gslrm.config import IGNORED_KEYS

    expected = {
        "mouse_config_finetune": (20000, 100, 2e-5, 2),
        "mouse_gslrm_v2": (30000, 500, 1e-5, 2),
        "mouse_config_debug": (1000, 50, 1e-4, 4),
    }
    for name, values in expected.items():
        config = load_config(GSLRMConfig, ROOT / "configs" / f"{name}.yaml", ignored=set(IGNORED_KEYS))
        training = config.training
        assert values == (
            training.schedule.max_fwdbwd_passes, training.schedule.warmup, training.optimizer.lr,
            training.dataloader.batch_size_per_gpu,
        )  # fmt: skip
        check_config(config)
    config = load_config(GSLRMConfig, ROOT / "configs" / "mouse_gslrm_v2.yaml")
    assert (config.training.losses.lpips_loss_weight, config.training.losses.perceptual_loss_weight) == (0.8, 0.8)
    assert config.training.checkpointing.resume_ckpt == "checkpoints/gslrm/mouse_finetune"
    check_config(load_config(GSLRMConfig, ROOT / "configs" / "demo_gslrm.yaml"))


def test_facelifts_own_yaml_layout_is_accepted(tmp_path):
    from gslrm.config import IGNORED_KEYS

    path = tmp_path / "gslrm.yaml"
    path.write_text(
        """
profile: false
model: {class_name: gslrm.model.gslrm.GSLRM, image_tokenizer: {image_size: 512}, gaussians: {n_gaussians: 2}}
training:
  runtime: {use_tf32: true, use_amp: true, amp_dtype: bf16, torch_compile: false, grad_checkpoint_every: 1}
  dataset: {dataset_path: a.txt, maximize_view_overlap: true, num_views: 8, num_input_views: 6, remove_alpha: false,
            target_has_input: true, normalize_distance_to: 0.0, background_color: white}
  dataloader: {batch_size_per_gpu: 2, num_workers: 4, num_threads: 32, prefetch_factor: 32}
  losses: {l2_loss_weight: 1.0, perceptual_loss_weight: 0.5, masked_pixelalign_loss: true, distill_loss_weight: 0.0}
  optimizer: {lr: 0.0001, beta2: 0.95, reset_lr: false, reset_weight_decay: false, reset_training_state: true}
  schedule: {num_epochs: 100000, early_stop_after_epochs: 100000, max_fwdbwd_passes: 20000, l2_warmup_steps: 500}
  checkpointing: {resume_ckpt: checkpoints/gslrm/stage_2, checkpoint_every: 5000}
  logging: {print_every: 20, wandb: {project: facelift_gslrm, job_type: train, log_every: 50, offline: false}}
inference: {enabled: false, output_dir: x}
validation: {enabled: true, val_every: 5000, output_dir: y, dataset_path: b.txt}
"""
    )
    config = load_config(GSLRMConfig, path, ignored=set(IGNORED_KEYS))
    assert config.training.dataset.maximize_view_overlap and config.training.schedule.l2_warmup_steps == 500
    check_config(config)
    path.write_text("training: {optimizer: {learning_rate: 1.0}}")
    with pytest.raises(ValueError, match="training.optimizer.learning_rate"):
        load_config(GSLRMConfig, path, ignored=set(IGNORED_KEYS))


def test_start_weights_that_do_not_exist_are_refused(data, tmp_path):
    path = tmp_path / "ckpt_0000000000021125.pt"
    with pytest.raises(ValueError, match="does not exist"):
        train(config_of(data, tmp_path / "run", **{"training.checkpointing.resume_ckpt": path}))


def test_a_dataset_of_another_rig_is_refused(data, tmp_path):
    with pytest.raises(RigMismatchError, match="facelift6"):
        train(config_of(data, tmp_path, rig="facelift6"))


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_schedule_warms_up_and_falls_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, warmup=4, updates=20)
    rates = []
    for _ in range(21):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[-1] == pytest.approx(0.0) and all(a >= b for a, b in zip(rates[3:], rates[4:]))


@pytest.mark.parametrize("case", ["fine", "exploding", "spoiled", "nan"])
def test_updates_are_skipped_and_counted(data, tmp_path, case):
    config = config_of(data, tmp_path)
    state = build_state(GSLRM(config.model), config)
    before = state.model.input_layer_norm.weight.detach().clone()
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, {"exploding": 1e3, "nan": float("nan")}.get(case, 1e-3))
    norm = update(state, config.training.runtime, spoiled=case == "spoiled")
    changed = not torch.equal(before, state.model.input_layer_norm.weight)
    assert changed == (case in ("fine",))
    counted = {"skipped_nan_loss": int(case == "spoiled"), "skipped_gradient": int(case == "exploding")}
    assert state.counts == {**counted, "skipped_overflow": 0}
    assert list(state.recent) == [case in ("spoiled", "exploding")]
    assert state.updates == int(case in ("fine", "nan")) and state.scheduler.last_epoch == 1
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert (norm is None) == (case == "spoiled") and (case != "nan" or norm == 0)


def test_fp16_scaler_is_updated_after_a_skipped_step(data, tmp_path):
    config = config_of(data, tmp_path)
    state = build_state(GSLRM(config.model), config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for size in (1e4, 1e-3):  # skipped, then taken: unscale_ twice without update() would raise
        loss = sum(parameter.sum() for parameter in state.model.parameters()) * size
        state.scaler.scale(loss).backward()
        update(state, config.training.runtime, spoiled=False)
    assert state.updates == 1 and state.counts["skipped_gradient"] == 1


def test_overfit_reaches_its_samples_and_validates_on_them(data, tmp_path):
    config = config_of(
        data, tmp_path / "run", **{"training.schedule.max_fwdbwd_passes": 40, "model.prune_background_tokens": True,
                                   "training.losses.direct_loss_weight": 1.0, "training.losses.direct_warmup_steps": 15,
                                   "training.losses.direct_loss_weight_after": 0.1, "training.runtime.ema_decay": 0.9},
    )  # fmt: skip
    folder = train(config, overfit=2)
    assert folder == tmp_path / "run_overfit2"
    direct = logged(folder)[:15]
    assert direct[-1] < 0.8 * direct[0]
    rendered = logged(folder)[15:]
    assert rendered[-1] < rendered[0]
    assert {"input_fg_psnr", "novel_fg_psnr", "novel_iou"} <= set(
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    )
    assert list((folder / "pictures").glob("val_*.png")) and list((folder / "pictures").glob("train_*.png"))
    kept = sorted(path.name for path in folder.glob("ckpt_*.pt"))
    assert kept == [f"ckpt_{step:016d}.pt" for step in (36, 38, 40)]
    content = torch.load(folder / kept[-1], weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "fwdbwd_pass_step", "param_update_step", "rig", "ema"} <= set(content)
    assert overfit_config(config, 2).training.dataset.augmentation.enabled is False


def test_exported_weights_load_for_inference(data, tmp_path):
    from gslrm.checkpoints import export_weights, load_gslrm

    folder = train(config_of(data, tmp_path / "run", **{"training.schedule.max_fwdbwd_passes": 2}))
    path = export_weights(folder, tmp_path / "shipped", dtype=torch.float16)
    model, rig, _ = load_gslrm(tmp_path / "shipped")
    assert rig.fingerprint() == load_rig("mouse6").fingerprint() and not model.training
    assert path.stat().st_size < 0.3 * (folder / "ckpt_0000000000000002.pt").stat().st_size


def test_accumulation_and_resume_give_the_same_losses(data, tmp_path):
    overrides = {"training.runtime.grad_accum_steps": 2, "training.dataset.background_color": "random"}
    whole = train(config_of(data, tmp_path / "whole", **overrides))
    part = config_of(data, tmp_path / "part", **overrides)
    train(config_of(data, tmp_path / "part", **overrides, **{"training.schedule.max_fwdbwd_passes": 6}))
    for path in (tmp_path / "part").glob("ckpt_*0006.pt*"):
        path.unlink()  # as if killed after pass 4
    assert train(part) == tmp_path / "part"
    assert logged(whole) == logged(tmp_path / "part")
    assert len(logged(whole)) == 6


def test_killed_run_continues_with_the_same_losses(data, tmp_path, empty_yaml):
    whole, killed = train(config_of(data, tmp_path / "whole")), tmp_path / "killed"
    process = run_script("--config", str(empty_yaml), *settings(data, killed))
    deadline = time.time() + 100
    while not (killed / "ckpt_0000000000000002.pt").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(config_of(data, killed))
    assert logged(killed) == pytest.approx(logged(whole), rel=1e-6)


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(data, tmp_path, empty_yaml):
    steps = {"training.schedule.max_fwdbwd_passes": 20, "validation.enabled": "false",
             "training.checkpointing.checkpoint_every": 20, "training.losses.masked_l2_loss": "true",
             "training.losses.direct_loss_weight": 1.0, "training.losses.direct_warmup_steps": 5,
             "training.losses.direct_loss_weight_after": 0.1, "model.prune_background_tokens": "true"}  # fmt: skip
    one = {**steps, "training.dataloader.batch_size_per_gpu": 4}
    train(config_of(data, tmp_path / "one", **one))
    two = {**steps, "training.dataloader.batch_size_per_gpu": 2}
    process = run_script("--config", str(empty_yaml), *settings(data, tmp_path / "two", **two), torchrun=2)
    assert process.wait(150) == 0, process.stdout.read()
    expected, got = torch.tensor(logged(tmp_path / "one")), torch.tensor(logged(tmp_path / "two"))
    assert len(got) == 20
    assert ((got - expected).abs() / expected).max() < 1e-4


def test_dry_run_prints_the_resolved_config_and_bad_arguments_exit_with_2(empty_yaml):
    process = run_script("--config", str(empty_yaml), "--dry_run", "training.optimizer.lr=3e-4")
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "lr: 0.0003" in printed and "num_input_views: 6" in printed
    process = run_script("--config", str(empty_yaml), "learning_rate")
    assert process.wait(60) == 2
    process = run_script("--config", str(empty_yaml), "training.optimizer.learning_rate=1")
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "training.optimizer." in printed and "Traceback" not in printed


def test_start_weights_of_another_rig_need_a_word(data, tmp_path):
    """Fine-tuning to another rig is what fine-tuning is for, but never by accident."""
    train(config_of(data, tmp_path / "a", **{"training.schedule.max_fwdbwd_passes": 1}))
    path = next((tmp_path / "a").glob("ckpt_*.pt"))
    sidecar = json.loads(path.with_suffix(".pt.json").read_text())
    path.with_suffix(".pt.json").write_text(json.dumps({**sidecar, "rig": load_rig("uniform8").to_dict()}))
    changes = {"training.schedule.max_fwdbwd_passes": 1, "training.checkpointing.resume_ckpt": str(path)}
    with pytest.raises(RigMismatchError, match="training.checkpointing.allow_rig_change=true"):
        train(config_of(data, tmp_path / "b", **changes))
    train(config_of(data, tmp_path / "b", **changes, **{"training.checkpointing.allow_rig_change": "true"}))
