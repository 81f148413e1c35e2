"""Stage 2 training survives what goes wrong, or stops with one clear message; what was saved loads."""

import subprocess

import pytest
import torch
from gslrm_rough import hopeless_run, rough_run, rough_weather
from gslrm_toys import config_of, logged, run_script, settings, write_toys

from gslrm.training import train
from multiview.checkpoint import load_checkpoint, newest_checkpoint

STEPS = 60


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toys(tmp_path_factory.mktemp("toys"))


def test_training_survives_wild_gradients_nan_losses_and_a_full_disk(data, tmp_path, monkeypatch):
    result = rough_run(data, tmp_path / "run", STEPS, seed=3)
    happened, counts = result["happened"], result["counts"]
    assert all(happened.get(kind, 0) > 0 for kind in ("wild", "nan", "inf", "nan_gradient", "full_disk")), happened
    assert result["passes"] == STEPS and result["finite"] and not result["litter"]
    assert result["stops"] == happened["full_disk"]
    for part in ("cannot write", "MB free", "needs", "repeat the command"):
        assert part in result["message"]
    # Passes after the last checkpoint before a stop are done again, so more may have happened than was kept.
    assert 0 < counts["skipped_nan_loss"] <= happened["nan"] + happened["inf"]
    assert 0 < counts["skipped_gradient"] <= happened["wild"]
    assert 0 < counts["mended_gradient"] <= happened["nan_gradient"]
    assert result["updates"] == STEPS - sum(count for name, count in counts.items() if name.startswith("skipped_"))

    monkeypatch.setattr("multiview.training.MAX_SKIPPED", 30)
    hopeless = hopeless_run(data, tmp_path / "run", STEPS + 40)
    assert "training has diverged: 31 of the last" in hopeless["message"]
    for part in ("training.optimizer.lr", "training.schedule.warmup", "reset_lr", "quality_report", "skipped_gradient"):
        assert part in hopeless["message"]


def test_a_spoiled_pass_leaves_no_trace_in_the_weights(data, tmp_path):
    """A skipped update is as if its gradients had never been: the loss of pass 1 is NaN, then wild."""
    finals = []
    for kind in ("nan", "wild"):
        with rough_weather(lambda n, kind=kind: kind if n == 1 else None, lambda: False):
            train(config_of(data, tmp_path / kind, **{"validation.enabled": "false"}))
        finals.append(load_checkpoint(newest_checkpoint(tmp_path / kind)))
    assert all(torch.equal(finals[0]["model"][name], finals[1]["model"][name]) for name in finals[0]["model"])
    assert finals[0]["param_update_step"] == 5
    assert finals[0]["recent_skips"] == [False, True, False, False, False, False]


def test_metrics_and_pictures_on_a_full_disk_end_with_the_same_message(data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiview.run.RunFolder.log", fail)
    with pytest.raises(ValueError, match="cannot write .*No space left on device.*MB free"):
        train(config_of(data, tmp_path / "run"))


def test_the_command_on_a_full_disk_ends_with_one_message_and_exit_code_1(data, tmp_path):
    path = tmp_path / "rig.yaml"
    path.write_text("rig: mouse6\n")
    process = run_script("--config", str(path), *settings(data, tmp_path / "run"), file_limit_bytes=400_000)
    printed = process.communicate(timeout=120)[0]
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    assert process.returncode == 1 and len(errors) == 1 and "Traceback" not in printed, printed
    assert "ckpt_0000000000000002.pt: File too large" in errors[0]
    assert not list((tmp_path / "run").glob("*ckpt*"))


ADAPTED = {
    "training.adaptation.lora_rank": 2, "training.adaptation.trainable_layers": 1,
    "training.adaptation.freeze_embedder": "true",
    "training.runtime.grad_checkpoint_every": 1, "training.runtime.grad_accum_steps": 2,
    "training.optimizer.lr": 1e-2, "training.schedule.max_fwdbwd_passes": 12, "validation.enabled": "false",
}  # fmt: skip
PLAN = {3: "nan", 6: "wild", 8: "inf"}  # in the second of two passes of an update, in the first, in the first


def test_two_processes_with_adapters_skip_together_what_only_one_of_them_met(data, tmp_path):
    """Adapters, frozen parts, accumulation and recomputed blocks under DDP take the steps of one process."""
    with rough_weather(PLAN.get, lambda: False):
        train(config_of(data, tmp_path / "one", **ADAPTED, **{"training.dataloader.batch_size_per_gpu": 4}))
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, runpy, sys\n"
        "from gslrm_rough import rough_weather\n"
        f"plan = {PLAN} if os.environ['RANK'] == '1' else {{}}\n"
        "with rough_weather(plan.get, lambda: False):\n"
        "    runpy.run_path('train_gslrm.py', run_name='__main__')\n"
    )
    (tmp_path / "rig.yaml").write_text("rig: mouse6\n")
    process = run_script(
        "--config", str(tmp_path / "rig.yaml"), *settings(data, tmp_path / "two", **ADAPTED), torchrun=2,
        script=str(driver),
    )  # fmt: skip
    try:
        printed = process.communicate(timeout=400)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, printed
    one, two = (load_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("one", "two"))
    assert one["counts"] == two["counts"]
    assert (one["counts"]["skipped_nan_loss"], one["counts"]["skipped_gradient"]) == (2, 1)
    assert one["param_update_step"] == two["param_update_step"] == 3
    expected, got = torch.tensor(logged(tmp_path / "one")), torch.tensor(logged(tmp_path / "two"))
    fine = torch.tensor([number not in PLAN for number in range(12)])
    assert ((got - expected).abs() / expected)[fine].max() < 1e-4 and got[3].isnan()
    assert expected[0] - expected[-1] > 0.01  # every pass holds all four samples, and the updates taken helped
