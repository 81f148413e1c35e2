"""Stage 2 training survives what goes wrong, or stops with one clear message; what was saved loads."""

import random
import subprocess

import pytest
import torch
from gslrm_rough import rough_weather
from gslrm_toys import config_of, logged, run_script, settings

from gslrm.checkpoints import load_gslrm
from gslrm.training import train
from multiview.checkpoint import load_checkpoint, newest_checkpoint
from multiview.training import TrainingDivergedError

STEPS = 60
# Shares of the passes that go wrong; every fourth loss or so is lost. And of the checkpoints that do not fit.
MISHAPS, FULL_DISK = {"wild": 0.12, "nan": 0.08, "inf": 0.04, "nan_gradient": 0.03}, 0.3

pytestmark = pytest.mark.usefixtures("one_thread")


def test_training_survives_wild_gradients_nan_losses_and_a_full_disk(toys, tmp_path, monkeypatch):
    """The command is repeated, as a user would, until all passes are done; then every pass is spoiled."""
    draw, stops, folder = random.Random(3), [], tmp_path / "run"
    kinds, shares = [*MISHAPS, None], [*MISHAPS.values(), 1 - sum(MISHAPS.values())]

    def config(steps: int):
        run = {"training.checkpointing.checkpoint_every": 10, "validation.enabled": "false"}
        return config_of(toys, folder, **run, **{"training.schedule.max_fwdbwd_passes": steps})

    with rough_weather(lambda _: draw.choices(kinds, shares)[0], lambda: draw.random() < FULL_DISK) as happened:
        while not stops or stops[-1]:
            try:
                train(config(STEPS))
                stops.append("")
            except ValueError as error:
                assert "No space left" in str(error)
                stops.append(str(error))
            for path in folder.glob("ckpt_*.pt"):
                load_checkpoint(path)  # what was saved before
    assert all(happened.get(kind, 0) > 0 for kind in (*MISHAPS, "full_disk")), happened
    assert len(stops) - 1 == happened["full_disk"] and not list(folder.rglob(".*"))
    for part in ("cannot write", "MB free", "needs", "repeat the command"):
        assert part in stops[0]
    content, (model, _, _) = load_checkpoint(newest_checkpoint(folder)), load_gslrm(folder)
    assert content["fwdbwd_pass_step"] == STEPS and all(t.isfinite().all() for t in model.state_dict().values())
    # Passes after the last checkpoint before a stop are done again, so more may have happened than was kept.
    counts = content["counts"]
    assert 0 < counts["skipped_nan_loss"] <= happened["nan"] + happened["inf"]
    assert 0 < counts["skipped_gradient"] <= happened["wild"]
    assert 0 < counts["mended_gradient"] <= happened["nan_gradient"]
    skipped = sum(count for name, count in counts.items() if name.startswith("skipped_"))
    assert content["param_update_step"] == STEPS - skipped

    monkeypatch.setattr("multiview.training.MAX_SKIPPED", 30)
    with rough_weather(lambda _: "wild"), pytest.raises(TrainingDivergedError) as hopeless:
        train(config(STEPS + 40))
    load_gslrm(folder)
    for part in (
        "training has diverged: 31 of the last", "training.optimizer.lr", "training.schedule.warmup", "reset_lr",
        "quality_report", "skipped_gradient",
    ):  # fmt: skip
        assert part in str(hopeless.value)


def test_a_spoiled_pass_leaves_no_trace_in_the_weights(toys, tmp_path):
    """A skipped update is as if its gradients had never been: the loss of pass 1 is NaN, then wild."""
    finals = []
    for kind in ("nan", "wild"):
        with rough_weather(lambda n, kind=kind: kind if n == 1 else None):
            train(config_of(toys, tmp_path / kind, **{"validation.enabled": "false"}))
        finals.append(load_checkpoint(newest_checkpoint(tmp_path / kind)))
    assert all(torch.equal(finals[0]["model"][name], finals[1]["model"][name]) for name in finals[0]["model"])
    assert finals[0]["param_update_step"] == 5
    assert finals[0]["recent_skips"] == [False, True, False, False, False, False]


def test_metrics_and_images_on_a_full_disk_end_with_the_same_message(toys, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiview.tracking.RunFolder.log", fail)
    with pytest.raises(ValueError, match="cannot write .*No space left on device.*MB free"):
        train(config_of(toys, tmp_path / "run"))


ADAPTED = {
    "training.adaptation.lora_rank": 2, "training.adaptation.trainable_layers": 1,
    "training.adaptation.freeze_embedder": "true", "training.losses.masked_l2_loss": "true",
    "training.losses.direct_loss_weight": 1.0, "training.losses.direct_warmup_steps": 2,
    "training.losses.direct_loss_weight_after": 0.1, "model.prune_background_tokens": "true",
    "training.runtime.grad_checkpoint_every": 1, "training.runtime.grad_accum_steps": 2,
    "training.optimizer.lr": 1e-2, "training.schedule.max_fwdbwd_passes": 12, "validation.enabled": "false",
}  # fmt: skip
PLAN = {3: "nan", 6: "wild", 8: "inf"}  # in the second of two passes of an update, in the first, in the first


def test_two_processes_with_adapters_skip_together_what_only_one_of_them_met(toys, empty_yaml, tmp_path):
    """Adapters, frozen parts, accumulation, recomputed blocks, pruned tokens, masked and direct losses under DDP take
    the steps of one process with twice the batch."""
    with rough_weather(PLAN.get):
        train(config_of(toys, tmp_path / "one", **ADAPTED, **{"training.dataloader.batch_size_per_gpu": 4}))
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, runpy, sys\n"
        "from gslrm_rough import rough_weather\n"
        f"plan = {PLAN} if os.environ['RANK'] == '1' else {{}}\n"
        "with rough_weather(plan.get):\n"
        "    runpy.run_path('train_gslrm.py', run_name='__main__')\n"
    )
    arguments = ["--config", str(empty_yaml), *settings(toys, tmp_path / "two", **ADAPTED)]
    process = run_script(*arguments, torchrun=2, script=str(driver))
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
    assert expected[2] - expected[-1] > 0.01  # every pass holds all four samples, and the updates taken helped
