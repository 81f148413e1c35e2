"""The loop that both stages share, as commands that users and schedulers run: stops, damage, refusals."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from gslrm_toys import ROOT, config_of, logged, run_script, settings, write_toys

from gslrm.training import train
from multiview.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from multiview.files import owned_folder
from multiview.run import Stop, check_size, start_processes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_toys(tmp_path_factory.mktemp("toys"))
    (folder / "rig.yaml").write_text("rig: mouse6\n")
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The losses of an uninterrupted run."""
    return logged(train(config_of(data, tmp_path_factory.mktemp("whole") / "run")))


def test_a_budget_stops_a_run_and_repeating_finishes_it(data, tmp_path, whole, capsys):
    folder = tmp_path / "run"
    train(config_of(data, folder, **{"training.runtime.budget_s": 0}))
    printed = capsys.readouterr().out
    assert "stopped as budget_s is over at pass 1 of 6" in printed and "to continue:\n  python " in printed
    assert logged(folder) == whole[:1] and json.loads((folder / "summary.json").read_text())["pass"] == 1
    train(config_of(data, folder))
    assert logged(folder) == whole
    assert re.search(r"matrix_rate_fraction +[\d.e-]+\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_every_signal_of_a_scheduler_asks_the_loop_to_stop(name):
    handler = signal.getsignal(getattr(signal, name))
    with pytest.raises(SystemExit) as caught, Stop(None):
        os.kill(os.getpid(), getattr(signal, name))  # before the first step
        time.sleep(1)
    assert caught.value.code == 143 and signal.getsignal(getattr(signal, name)) == handler
    with Stop(None) as stop:
        stop.in_loop = True
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.01)
        assert stop.is_due() and stop.signal.name == name


def test_a_schedulers_signal_saves_a_checkpoint_and_says_how_to_continue(data, tmp_path, whole):
    folder, long = tmp_path / "run", {"training.schedule.max_fwdbwd_passes": 100_000}
    workers = {"training.dataloader.num_workers": 1, "training.checkpointing.checkpoint_every": 100_000}
    process = run_script("--config", str(data / "rig.yaml"), *settings(data, folder, **long, **workers))
    deadline = time.time() + 200
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=100)[0]
    assert process.returncode == 143 and "stopped by SIGTERM at pass" in printed and "Traceback" not in printed
    assert "python train_gslrm.py --config" in printed and not (folder / ".owner.json").exists()
    saved = load_checkpoint(newest_checkpoint(folder))["fwdbwd_pass_step"]
    assert saved == len(logged(folder)) and logged(folder)[0] == whole[0]


def test_a_second_run_in_the_same_folder_is_refused(data, tmp_path):
    (tmp_path / "run").mkdir()
    with owned_folder(tmp_path / "run"), pytest.raises(ValueError, match="is in use by process.*srun alone"):
        train(config_of(data, tmp_path / "run"))


def test_a_refused_run_leaves_no_folder(data, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        train(config_of(data, tmp_path / "run", **{"training.checkpointing.resume_ckpt": "nowhere"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["flipped bit", "zeroed block", "cut"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(data, tmp_path, whole, damage, caplog):
    folder = train(config_of(data, tmp_path / "run"))
    path = newest_checkpoint(folder)
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
    elif damage == "zeroed block":
        content[2000:6000] = bytes(4000)
    path.write_bytes(content[:-100] if damage == "cut" else content)
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        load_checkpoint(path)
    train(config_of(data, folder))
    assert "looking at the one before it" in caplog.text and logged(folder) == whole


def test_digests_can_be_skipped(tmp_path, monkeypatch):
    path = tmp_path / "ckpt_0000000000000001.pt"
    save_checkpoint(path, {"x": torch.zeros(3)}, {"step": 1})
    sidecar = tmp_path / (path.name + ".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "sha256": "0" * 64}))
    assert newest_checkpoint(tmp_path) is None
    monkeypatch.setenv("MOUSE_FACELIFT_SKIP_DIGEST", "1")
    assert newest_checkpoint(tmp_path) == path and torch.equal(load_checkpoint(path)["x"], torch.zeros(3))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "has RANK but not WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "has RANK, WORLD_SIZE but not LOCAL_RANK"),
        ({"LOCAL_RANK": "1"}, "torchrun --nproc_per_node"),
    ],
)
def test_an_environment_that_is_half_set_is_one_sentence(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start_processes("cpu")


def test_a_port_in_use_is_one_sentence():
    """In a process of its own: accelerate's state is one per process."""
    code = (
        "import os, socket\n"
        "taken = socket.create_server(('127.0.0.1', 0))\n"
        "os.environ.update(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1',\n"
        "                  MASTER_PORT=str(taken.getsockname()[1]))\n"
        "from multiview.run import main_guard, start_processes\n"
        "main_guard(lambda: start_processes('cpu'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "cannot meet at 127.0.0.1" in done.stderr and "--master_port" in done.stderr
    assert "Traceback" not in done.stderr


def test_accelerates_environment_does_not_beat_the_configuration(data, tmp_path, whole, monkeypatch):
    for name, value in (("GRADIENT_ACCUMULATION_STEPS", "4"), ("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "EAGER")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert logged(train(config_of(data, tmp_path))) == whole
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4"


@pytest.mark.parametrize(
    "change",
    [
        {"model.transformer.d": 10**8}, {"model.transformer.n_layer": 10**9},
        {"training.dataloader.num_workers": 10**5},
        {"training.dataloader.batch_size_per_gpu": 10**9}, {"model.image_tokenizer.image_size": 60_000},
        {"training.dataset.num_views": 10**9}, {"training.logging.print_every": 0}, {"validation.val_every": 0},
        {"training.runtime.grad_accum_steps": 0}, {"training.checkpointing.checkpoints_total_limit": 0},
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_meant_are_refused_before_anything_is_built(data, tmp_path, change):
    began = time.perf_counter()
    with pytest.raises(ValueError, match="needs at least .* GB|must be within"):
        train(config_of(data, tmp_path / "run", **change))
    assert time.perf_counter() - began < 10 and not (tmp_path / "run").exists()


def test_what_fits_is_not_refused():
    check_size(0.9e9, 0.0, 1e6, torch.device("cpu"), "nothing")
