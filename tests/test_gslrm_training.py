"""Stage 2's data order, start and training loop, on toy animals of 16 pixels."""

import json
import signal
import time
from dataclasses import replace

import pytest
import torch
from gslrm_toys import ROOT, SIZE, config_of, dataset_of, logged, run_script, settings, toy_sample, write_toys

from gslrm import losses as loss_functions
from gslrm.adaptation import check_adaptation
from gslrm.config import GSLRMConfig, check_config
from gslrm.data.mouse_dataset import overlapping
from gslrm.model.gslrm import GSLRM
from gslrm.training import overfit_config, train
from multiview.cameras import Cameras
from multiview.config import load_config
from multiview.rig import RigMismatchError, load_rig
from multiview.sample import write_dataset_info, write_sample, write_split

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def empty_yaml(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("rig: mouse6\n")
    return path


def test_item_layout_and_index_order(data):
    dataset = dataset_of(data / "train.txt", num_input_views=4, num_views=6, with_depth=True)
    item = dataset[(0, 2)]
    assert item["image"].shape == (6, 3, SIZE, SIZE) and item["alpha"].shape == (6, 1, SIZE, SIZE)
    assert item["depth"].shape == (6, 1, SIZE, SIZE) and item["c2w"].shape == (6, 4, 4)
    assert item["index"][:4, 0].tolist() == [0, 1, 2, 3]  # view_idx first: the rig's order
    assert item["index"][:, 1].tolist() == [2] * 6  # then scene_idx
    assert item["targets"].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.allclose(item["c2w"][:4], load_rig("mouse6").cameras(SIZE).c2w[:4], atol=1e-6)
    corner = item["image"][0, :, 0, 0]
    assert torch.allclose(corner, torch.ones(3), atol=0.02)
    without = dataset_of(data / "train.txt", num_input_views=4, num_views=6, target_has_input=False)
    assert without[0]["targets"].tolist() == [4, 5]


def test_items_depend_on_seed_epoch_and_index_only(data):
    options = {"num_input_views": 3, "num_views": 5, "random_view_selection": True, "background_color": "random"}
    one, two = (dataset_of(data / "train.txt", seed=7, **options) for _ in range(2))
    one[(0, 1)]
    assert torch.equal(one[(3, 2)]["index"], two[(3, 2)]["index"])
    assert torch.equal(one[(3, 2)]["image"], two[(3, 2)]["image"])
    seen = {tuple(one[(epoch, 2)]["index"][:, 0].tolist()) for epoch in range(6)}
    assert len(seen) > 1
    assert len({one[(epoch, 2)]["background"][0].item() for epoch in range(12)}) > 1


def test_unreadable_sample_is_an_error_that_names_the_file_or_is_left_out(data, tmp_path):
    for number in range(2):
        write_sample(tmp_path / f"sample_{number}", toy_sample(number, load_rig("mouse6")))
    write_dataset_info(tmp_path, load_rig("mouse6"))
    write_split(tmp_path / "train.txt", [tmp_path / "sample_0", tmp_path / "sample_1"])
    picture = tmp_path / "sample_0" / "images" / "cam_002.png"
    picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(ValueError, match="sample_0.*cam_002.png"):
        dataset_of(tmp_path / "train.txt")[0]
    dataset = dataset_of(tmp_path / "train.txt", on_bad_sample="skip")
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
        dataset_of(tmp_path / "train.txt", num_input_views=6, num_views=6)[0]


def test_view_overlap_rules():
    azimuths = torch.tensor([0.0, 50.0, 80.0, 120.0])
    cameras = Cameras.orbit(azimuths, torch.zeros(4), 2.7, 1.0, 8)
    assert overlapping(cameras, torch.tensor([0]), "normalised").tolist() == [True, True, False, False]
    assert overlapping(cameras, torch.tensor([0]), "upstream").tolist() == [True, True, True, False]  # 86 degrees


def test_direct_losses_vanish_at_the_true_surface(data):
    item = dataset_of(data / "train.txt", num_input_views=6, num_views=8, with_depth=True)[0]
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
    colour = (loss_functions.pixels_of(targets.input_rgb, output) - 0.5) / loss_functions.C0
    n = output.n_free
    gaussians = output.gaussians
    exact = replace(
        gaussians,
        xyz=torch.cat([gaussians.xyz[:, :n], truth], 1),
        features=torch.cat([gaussians.features[:, :n], colour[:, :, None]], 1),
    )
    after = loss_functions.direct_losses(replace(output, gaussians=exact), targets, 0.7)
    assert before["xyz"] > 0.1 and after["xyz"] < 1e-6 and after["colour"] < 1e-9


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
    for name in ("demo_gslrm", "demo_gslrm_painted"):
        check_config(load_config(GSLRMConfig, ROOT / "configs" / f"{name}.yaml"))
    config = load_config(GSLRMConfig, ROOT / "configs" / "mouse_gslrm_lora.yaml")
    check_config(config)
    assert check_adaptation(config.training.adaptation, config.model.transformer.n_layer) == list(range(24))


def test_a_dataset_of_another_rig_is_refused(data, tmp_path):
    with pytest.raises(RigMismatchError, match="facelift6"):
        train(config_of(data, tmp_path, rig="facelift6"))


def test_overfit_reaches_its_samples_and_validates_on_them(data, tmp_path):
    config = config_of(
        data, tmp_path / "run", **{"training.schedule.max_fwdbwd_passes": 40, "model.prune_background_tokens": True,
                                   "training.losses.direct_loss_weight": 1.0, "training.losses.direct_warmup_steps": 15,
                                   "training.losses.direct_loss_weight_after": 0.1, "training.runtime.ema_decay": 0.9},
    )  # fmt: skip
    folder = train(config, 2)
    assert folder == tmp_path / "run_overfit2"
    direct = logged(folder)[:15]
    assert direct[-1] < 0.8 * direct[0]
    rendered = logged(folder)[15:]
    assert rendered[-1] < rendered[0]
    summary = json.loads((folder / "summary.json").read_text())  # the closing block
    assert {"input_fg_psnr", "novel_fg_psnr", "novel_iou", "novel_ssim"} <= set(summary["metrics"])
    assert summary["pass"] == summary["of"] == 40 and summary["trained_parameters"] == summary["parameters"] > 1000
    for name in ("seconds", "samples_per_second", "peak_memory_gb", "matrix_rate_fraction"):
        assert summary[name] > 0, name
    assert list((folder / "pictures").glob("val_*.png")) and list((folder / "pictures").glob("train_*.png"))
    kept = sorted(path.name for path in folder.glob("ckpt_*.pt"))
    assert kept == [f"ckpt_{step:016d}.pt" for step in (36, 38, 40)]
    content = torch.load(folder / kept[-1], weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "fwdbwd_pass_step", "param_update_step", "rig", "ema"} <= set(content)
    assert overfit_config(config, 2).training.dataset.augmentation.enabled is False


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
    assert process.wait(400) == 0, process.stdout.read()
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
