"""The loop that both stages share, as users and schedulers run it: stops, damage, refusals."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from accelerate import PartialState
from gslrm_toys import ROOT, config_of, logged, settings, write_toys

from gslrm.training import train
from multiview.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from multiview.files import owned_folder
from multiview.run import LAUNCHED, start_processes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of an uninterrupted run."""
    return train(config_of(data, tmp_path_factory.mktemp("whole") / "run"))


def test_a_budget_stops_a_run_and_repeating_finishes_it(data, tmp_path, whole, capsys):
    folder = tmp_path / "run"
    train(config_of(data, folder, **{"training.runtime.budget_s": 0}))
    printed = capsys.readouterr().out
    assert "stopped as budget_s is over at pass 1 of 6" in printed and f"to continue:\n  {sys.orig_argv[0]} " in printed
    assert logged(folder) == logged(whole)[:1] and json.loads((folder / "summary.json").read_text())["pass"] == 1
    train(config_of(data, folder))
    assert logged(folder) == logged(whole)
    assert re.search(r"matrix_rate_fraction +[\d.e-]+\n", capsys.readouterr().out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_schedulers_signal_saves_a_checkpoint_and_says_how_to_continue(
    data, tmp_path, whole, monkeypatch, capsys, number
):
    folder, long = tmp_path / "run", {"training.schedule.max_fwdbwd_passes": 100_000}
    workers = {"training.dataloader.num_workers": 1, "training.checkpointing.checkpoint_every": 100_000}
    monkeypatch.setattr(sys, "argv", ["train_gslrm.py", "--config", "a.yaml"])

    def send() -> None:
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        train(config_of(data, folder, **long, **workers))
    printed = capsys.readouterr().out
    assert stop.value.code == (130 if number == signal.SIGINT else 143)
    assert f"stopped by {number.name} at pass" in printed
    assert f"{sys.orig_argv[0]} train_gslrm.py --config a.yaml\n" in printed and not (folder / ".owner.json").exists()
    saved = load_checkpoint(newest_checkpoint(folder))["fwdbwd_pass_step"]
    assert saved == len(logged(folder)) and logged(folder)[0] == logged(whole)[0]


def test_a_run_says_at_once_what_it_trains_and_gives_a_figure_after_the_first_step(data, tmp_path, caplog):
    folder = tmp_path / "run"
    every = {"training.logging.print_every": 4, "training.schedule.max_fwdbwd_passes": 6}
    with caplog.at_level("INFO", "multiview"):
        train(config_of(data, folder, **every))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("multiview")]
    assert lines[0] == (
        f"training Stage 2 on {data / 'train.txt'} up to pass 6 by 1 process(es) on cpu; saved in {folder}"
    )  # fmt: skip
    assert "parameters train on 4 samples, pass 0 to 6" in lines[1]
    shown = [line for line in lines if re.match(r"pass \d+/6  ", line)]
    assert [line.split()[1] for line in shown] == ["1/6", "4/6", "6/6"] and "psnr" in shown[0]
    assert len(logged(folder)) == 2  # metrics keep their rhythm
    caplog.clear()
    with caplog.at_level("INFO", "multiview"):
        train(config_of(data, folder, **{**every, "training.schedule.max_fwdbwd_passes": 9}))
    assert [m.split()[1] for m in caplog.messages if m.startswith("pass ")] == ["7/9", "8/9", "9/9"]


TERMINAL = """
import fcntl, os, pty, struct, sys, termios
parent, child = pty.openpty()
fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
pid = os.fork()
if pid == 0:
    os.dup2(child, 2)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
os.close(child)
seen = b""
try:
    while chunk := os.read(parent, 4096):
        seen += chunk
except OSError:  # the other side is closed
    pass
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.stdout.buffer.write(seen)
sys.exit(code)
"""


def test_a_terminal_gets_a_bar_with_loss_metric_rate_and_remaining_time(data, tmp_path):
    (tmp_path / "a.yaml").touch()
    words = settings(data, tmp_path / "run", **{"training.logging.tracker": "none", "validation.val_every": 2})
    command = [sys.executable, "-c", TERMINAL, "train_gslrm.py", "--config", tmp_path / "a.yaml", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300)
    shown = done.stdout.decode().replace("\r", "\n")
    assert done.returncode == 0, shown + done.stderr.decode()
    bars = re.findall(
        r"run: +(\d+)%\|.*\| (\d)/6 \[\d+:\d\d<.*pass.*, loss [\d.]+, (\w+) [\d.]+, [\d.e+]+ samples/s\]", shown
    )
    assert bars and bars[-1][1:] == ("6", "fg_psnr"), shown
    # The lines of the log stand on lines of their own, and those of the steps are left to the bar.
    assert re.search(r"(?m)^ *INFO multiview.training: validation at pass 2", shown), shown
    assert "pass 1/6" not in shown


def test_a_second_run_in_the_same_folder_is_refused(data, tmp_path):
    (tmp_path / "run").mkdir()
    with owned_folder(tmp_path / "run"), pytest.raises(ValueError, match="is in use by process.*srun alone"):
        train(config_of(data, tmp_path / "run"))


def test_a_refused_run_leaves_no_folder(data, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        train(config_of(data, tmp_path / "run", **{"training.checkpointing.resume_ckpt": "nowhere"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-100], lambda content: content[:2000] + bytes(4000) + content[6000:],
        lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],
    ],
    ids=["cut", "zeroed block", "flipped bit"],
)  # fmt: skip
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(data, tmp_path, whole, damage, caplog):
    folder = shutil.copytree(whole, tmp_path / "run")
    path = newest_checkpoint(folder)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        load_checkpoint(path)
    train(config_of(data, folder))
    assert "looking at the one before it" in caplog.text and logged(folder) == logged(whole)


def test_digests_can_be_skipped(data, whole, tmp_path, monkeypatch, caplog):
    path = tmp_path / "ckpt_0000000000000001.pt"
    save_checkpoint(path, {"x": torch.zeros(3)}, {"step": 1})
    sidecar = tmp_path / (path.name + ".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "sha256": "0" * 64}))
    assert newest_checkpoint(tmp_path) is None
    monkeypatch.setenv("MOUSE_FACELIFT_SKIP_DIGEST", "1")
    assert newest_checkpoint(tmp_path) == path and torch.equal(load_checkpoint(path)["x"], torch.zeros(3))
    # The same by a key of the configuration: the newest checkpoint counts, and there is nothing left to train.
    monkeypatch.setenv("MOUSE_FACELIFT_SKIP_DIGEST", "")
    folder = shutil.copytree(whole, tmp_path / "run")
    sidecar = folder / (newest_checkpoint(folder).name + ".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "sha256": "0" * 64}))
    caplog.clear()
    train(config_of(data, folder, **{"training.checkpointing.skip_digest": True}))
    assert "looking at the one before it" not in caplog.text and logged(folder) == logged(whole)


def test_a_port_in_use_is_one_sentence(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in zip(LAUNCHED, ("0", "2", "0", "127.0.0.1", str(port))):
            monkeypatch.setenv(name, value)
        PartialState._reset_state()  # a process has one
        with pytest.raises(ValueError, match=f"cannot meet at 127.0.0.1:{port}.*--master_port"):
            start_processes("cpu")
        PartialState._reset_state()


def test_accelerates_environment_does_not_beat_the_configuration(data, tmp_path, whole, monkeypatch):
    for name, value in (("GRADIENT_ACCUMULATION_STEPS", "4"), ("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "EAGER")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert logged(train(config_of(data, tmp_path / "run"))) == logged(whole)
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4"


@pytest.mark.parametrize(
    "change",
    [
        {"model.transformer.d": 10**8}, {"model.transformer.n_layer": 10**9},
        {"training.dataloader.num_workers": 10**5},
        {"training.dataloader.batch_size_per_gpu": 10**9}, {"model.image_tokenizer.image_size": 60_000},
        {"training.dataset.num_views": 10**9}, {"training.logging.print_every": 0}, {"validation.val_every": 0},
        {"training.runtime.grad_accum_steps": 0}, {"training.checkpointing.checkpoints_total_limit": 0},
        {"training.optimizer.lr": "nan"}, {"training.optimizer.beta1": 2}, {"training.losses.l2_loss_weight": -1},
        {"model.gaussians.sh_degree": 9}, {"training.runtime.grad_clip_norm": -1}, {"model.transformer.d_head": 0},
        {"model.image_tokenizer.patch_size": 7},
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_meant_are_refused_before_anything_is_built(data, tmp_path, change):
    began = time.perf_counter()
    with pytest.raises(ValueError, match="needs at least .* GB|must be within|must be a multiple of"):
        train(config_of(data, tmp_path / "run", **change))
    assert time.perf_counter() - began < 10 and not (tmp_path / "run").exists()
