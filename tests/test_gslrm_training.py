"""Stage 2's data order, start and training loop, on toy animals of 16 pixels."""

import json
import runpy
import signal
import time
from dataclasses import replace

import pytest
import torch
from gslrm_toys import ROOT, SIZE, config_of, dataset_of, logged, run_script, settings, toy_sample

import gslrm.training
import gslrm.validation
from gslrm import losses as loss_functions
from gslrm.config import check_config
from gslrm.data.mouse_dataset import overlapping
from gslrm.model.gslrm import GSLRM
from gslrm.training import overfit_config, train
from gslrm.validation import prepare
from multiview.cameras import Cameras
from multiview.rig import RigMismatchError, load_rig
from multiview.sample import write_dataset_info, write_sample, write_split

pytestmark = pytest.mark.usefixtures("one_thread")


def test_item_layout_and_index_order(toys):
    dataset = dataset_of(toys / "train.txt", num_input_views=4, num_views=6, with_depth=True)
    item = dataset[(0, 2)]
    assert item["image"].shape == (6, 3, SIZE, SIZE) and item["alpha"].shape == (6, 1, SIZE, SIZE)
    assert item["depth"].shape == (6, 1, SIZE, SIZE) and item["c2w"].shape == (6, 4, 4)
    assert item["index"][:4, 0].tolist() == [0, 1, 2, 3]  # view_idx first: the rig's order
    assert item["index"][:, 1].tolist() == [2] * 6  # then scene_idx
    assert item["targets"].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.allclose(item["c2w"][:4], load_rig("mouse6").cameras(SIZE).c2w[:4], atol=1e-6)
    corner = item["image"][0, :, 0, 0]
    assert torch.allclose(corner, torch.ones(3), atol=0.02)
    without = dataset_of(toys / "train.txt", num_input_views=4, num_views=6, target_has_input=False)
    assert without[0]["targets"].tolist() == [4, 5]


def test_items_depend_on_seed_epoch_and_index_only(toys):
    options = {"num_input_views": 3, "num_views": 5, "random_view_selection": True, "background_color": "random"}
    one, two = (dataset_of(toys / "train.txt", seed=7, **options) for _ in range(2))
    one[(0, 1)]
    assert torch.equal(one[(3, 2)]["index"], two[(3, 2)]["index"])
    assert torch.equal(one[(3, 2)]["image"], two[(3, 2)]["image"])
    seen = {tuple(one[(epoch, 2)]["index"][:, 0].tolist()) for epoch in range(6)}
    assert len(seen) > 1
    assert len({one[(epoch, 2)]["background"][0].item() for epoch in range(12)}) > 1


def test_unreadable_sample_is_an_error_that_names_the_file_or_is_left_out(toys, tmp_path):
    for number in range(2):
        write_sample(tmp_path / f"sample_{number}", toy_sample(number, load_rig("mouse6")))
    write_dataset_info(tmp_path, load_rig("mouse6"))
    write_split(tmp_path / "train.txt", [tmp_path / "sample_0", tmp_path / "sample_1"])
    picture = tmp_path / "sample_0" / "images" / "cam_002.png"
    picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(ValueError, match="sample_0.*cam_002.png"):
        dataset_of(tmp_path / "train.txt")[0]
    dataset = dataset_of(tmp_path / "train.txt", on_bad_sample="skip")
    assert len(dataset) == 1
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


def test_direct_losses_vanish_at_the_true_surface(toys):
    item = dataset_of(toys / "train.txt", num_input_views=6, num_views=8, with_depth=True)[0]
    cameras = Cameras(item["c2w"][None, :6], item["fxfycxcy"][None, :6], SIZE, SIZE)
    torch.manual_seed(0)
    output = GSLRM(config_of(toys, "x").model)(item["image"][None, :6], cameras)
    targets = prepare({name: tensor[None] for name, tensor in item.items()}, 6, torch.device("cpu"))
    before = loss_functions.direct_losses(output, targets, 0.7)
    # Points back-projected from depth with a hand-made projection check: their camera z is the depth map.
    depth = loss_functions.pixels_of(targets.input_depth, output)
    forward = cameras.c2w[0, output.pixel_index[0] // SIZE**2, :3, 2][None]
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


def test_one_input_view_is_refused_with_the_reason(toys, tmp_path):
    with pytest.raises(ValueError, match="num_input_views must be at least 2.*Stage 1"):
        check_config(config_of(toys, tmp_path, **{"training.dataset.num_input_views": 1}))


def test_a_dataset_of_another_rig_is_refused(toys, tmp_path):
    with pytest.raises(RigMismatchError, match="facelift6"):
        train(config_of(toys, tmp_path, rig="facelift6"))


def test_overfit_reaches_its_samples_and_validates_on_them(toys, tmp_path):
    config = config_of(
        toys, tmp_path / "run", **{"training.schedule.max_fwdbwd_passes": 40, "model.prune_background_tokens": True,
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


def test_killed_run_continues_with_the_same_losses(toys, tmp_path, empty_yaml):
    changes = {
        "training.runtime.grad_accum_steps": 2, "training.dataset.background_color": "random",
        "training.dataset.min_input_views": 3,
    }  # fmt: skip
    whole, killed = train(config_of(toys, tmp_path / "whole", **changes)), tmp_path / "killed"
    process = run_script("--config", str(empty_yaml), *settings(toys, killed, **changes))
    deadline = time.time() + 100
    while not (killed / "ckpt_0000000000000002.pt").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(config_of(toys, killed, **changes))
    assert logged(killed) == pytest.approx(logged(whole), rel=1e-6) and len(logged(whole)) == 6


def test_each_pass_draws_a_number_of_inputs_and_validation_keeps_the_rigs_views(toys, tmp_path, monkeypatch):
    trained, validated = [], []
    for module, seen in ((gslrm.training, trained), (gslrm.validation, validated)):
        monkeypatch.setattr(module, "prepare", lambda b, n, d, seen=seen: seen.append(n) or prepare(b, n, d))
    choice = {"num_input_views": 8, "min_input_views": 2, "random_view_selection": True}
    changes = {f"training.dataset.{name}": value for name, value in choice.items()}
    train(config_of(toys, tmp_path / "run", **changes, **{"training.schedule.max_fwdbwd_passes": 24}))
    assert set(trained) == set(range(2, 9)) and validated == [6]
    with pytest.raises(ValueError, match=r"min_input_views must be 2 to num_input_views \(6\), got 7"):
        check_config(config_of(toys, tmp_path / "run", **{"training.dataset.min_input_views": 7}))


def test_dry_run_prints_the_resolved_config_and_bad_arguments_exit_with_2(empty_yaml, monkeypatch, capsys):
    def command(*arguments) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["train_gslrm.py", "--config", str(empty_yaml), *arguments])
        try:
            runpy.run_path(str(ROOT / "train_gslrm.py"), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, "".join(capsys.readouterr())

    code, printed = command("--dry_run", "training.optimizer.lr=3e-4")
    assert code == 0 and "lr: 0.0003" in printed and "num_input_views: 6" in printed
    assert command("learning_rate")[0] == 2
    code, printed = command("training.optimizer.learning_rate=1")
    assert code == 1 and "training.optimizer." in printed and "Traceback" not in printed


def test_start_weights_of_another_rig_need_a_word(toys, tmp_path):
    """Fine-tuning to another rig is what fine-tuning is for, but never by accident."""
    train(config_of(toys, tmp_path / "a", **{"training.schedule.max_fwdbwd_passes": 1}))
    path = next((tmp_path / "a").glob("ckpt_*.pt"))
    sidecar = json.loads(path.with_suffix(".pt.json").read_text())
    path.with_suffix(".pt.json").write_text(json.dumps({**sidecar, "rig": load_rig("uniform8").to_dict()}))
    changes = {"training.schedule.max_fwdbwd_passes": 1, "training.checkpointing.resume_ckpt": str(path)}
    with pytest.raises(RigMismatchError, match="training.checkpointing.allow_rig_change=true"):
        train(config_of(toys, tmp_path / "b", **changes))
    train(config_of(toys, tmp_path / "b", **changes, **{"training.checkpointing.allow_rig_change": "true"}))
