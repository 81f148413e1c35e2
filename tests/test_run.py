"""Seeds, devices, stop signals, the run folder, HTML reports, and the exit codes of entry scripts."""

import errno
import json
import os
import signal
import sys
import tempfile
import time
from types import SimpleNamespace

import pytest
import torch

from multiview import run as runs
from multiview.report import Figure, Table, write_page
from multiview.rig import load_rig
from multiview.run import Stop, main_guard, start_processes, stoppable
from multiview.tracking import RunFolder

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
EVIL = "<script>alert('x')</script>|"


def test_seeds_depend_on_every_key_and_nothing_else():
    assert runs.seed_from(1, 2, "a") == runs.seed_from(1, 2, "a") != runs.seed_from(1, "2a")
    a, same, other = (torch.rand(3, generator=runs.make_generator(7, key)) for key in (0, 0, 1))
    assert torch.equal(a, same) and not torch.equal(a, other)


def test_metrics_are_forgotten_beyond_the_step_that_is_resumed(tmp_path):
    run = RunFolder(tmp_path, {}, load_rig("mouse6"))
    for step in (1, 2, 3):
        run.log(step, {"loss": torch.tensor(step / 2)})
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 3, "los')
    RunFolder(tmp_path, {"a": 1}, load_rig("mouse6"), after=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["split"]) for line in lines] == [(1, 0.5, "train"), (2, 1.0, "train")]
    assert json.loads((tmp_path / "config.json").read_text())["rig"]["name"] == "mouse6"
    RunFolder(tmp_path / "x", {}, None, is_main=False).log(1, {"loss": 1.0})
    assert not (tmp_path / "x").exists()  # only the main process writes


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}, events.Tags()


def test_tensorboard_gets_the_figures_and_a_resumed_run_appends(tmp_path):
    rig = load_rig("mouse6")
    run = RunFolder(tmp_path, {}, rig, tracker="tensorboard")
    for step in (1, 2, 3):
        run.log(step, {"loss": torch.tensor(step / 2)})
    run.image("val", 2, torch.rand(3, 4, 5))
    run.image("val", 3, None)
    run.close()
    run = RunFolder(tmp_path, {}, rig, after=2, tracker="tensorboard")  # step 3 was killed before its checkpoint
    run.log(3, {"loss": 9.0})
    run.log(3, {"psnr": 20.0}, split="val")
    run.close()
    values, tags = scalars(tmp_path / "tensorboard")
    assert values == {"train/loss": [(1, 0.5), (2, 1.0), (3, 9.0)], "val/psnr": [(3, 20.0)]} and tags["images"] == [
        "val"
    ]
    RunFolder(tmp_path / "x", {}, None, tracker="tensorboard", is_main=False).log(1, {"loss": 1.0})
    RunFolder(tmp_path / "y", {}, rig).log(1, {"loss": 1.0})
    assert not (tmp_path / "x").exists() and not (tmp_path / "y" / "tensorboard").exists()


def test_tensorboard_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ValueError, match="tensorboard is not installed: pip install -r requirements.txt, or tracker=none"
    ):
        RunFolder(tmp_path, {}, load_rig("mouse6"), tracker="tensorboard")


@pytest.mark.parametrize(
    ("tracker", "mode", "asked"),
    [("tensorboard", "disabled", None), ("none", "offline", "offline"), ("wandb", "disabled", "online"),
     ("wandb", "offline", "offline")],
)  # fmt: skip
def test_wandb_is_asked_by_the_tracker_or_by_its_own_key(tmp_path, monkeypatch, tracker, mode, asked):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **words: calls.append(words["mode"])))
    RunFolder(tmp_path, {}, load_rig("mouse6"), wandb=runs.WandbOptions(mode=mode), tracker=tracker)
    assert calls == [asked] * (asked is not None)


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, f"{sys.orig_argv[0]} train_gslrm.py a=1"),
        ({"RANK": "0", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}, "torchrun --nproc_per_node 4 train_gslrm.py a=1"),
        ({"RANK": "0", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"},
         "torchrun --nproc_per_node 4 train_gslrm.py a=1  (with your --nnodes ... on every node)"),
        ({"RANK": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}, None),  # one process says it
    ],
)  # fmt: skip
def test_a_stopped_run_prints_the_command_that_resumes_it(monkeypatch, capsys, environment, command):
    for name in ("RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_gslrm.py", "a=1"])
    Stop(0.0).end("pass 3 of 6")
    printed = capsys.readouterr().out
    assert printed.splitlines()[1:] == ([f"  {command}"] if command else [])


def test_the_first_ctrl_c_asks_and_the_second_ends_at_once(capsys, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(SystemExit) as caught, Stop(None, interrupt=True) as stop:
        stop.in_loop = True
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert stop.is_due() and "a checkpoint is saved" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        stop.end("step 1 of 2")
    assert caught.value.code == 130 and "stopped by SIGINT at step 1 of 2" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt), Stop(None) as stop:  # a folder of photographs is left at once
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_wandb_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="requirements-extra.txt"):
        RunFolder(tmp_path, {}, load_rig("mouse6"), wandb=runs.WandbOptions(mode="offline"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("rig 'x' is unknown"), "rig 'x' is unknown"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/a.mp4"),
            "out/a.mp4: No space left on device; make room",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "out"), "out: Not a directory; a file stands where"),
        (OSError("a library's own"), "a library's own"),
        (MemoryError("Unable to allocate 364. TiB"), "not enough memory (Unable to allocate 364. TiB); lower"),
        (RuntimeError("can't allocate memory: you tried\nC++ stack"), "not enough memory (can't allocate"),
        (RuntimeError("Error while serializing: (os error 28)"), "No space left on device; make room"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system; name a place"),
    ],
)
def test_a_user_error_exits_1_with_one_message(capsys, error, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_info:
        main_guard(main)
    told = capsys.readouterr().err
    assert exit_info.value.code == 1 and told.startswith(f"error: {message}") and told.count("\n") == 1


def test_a_mistake_of_the_code_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="size"):
        main_guard(lambda: torch.zeros(2) @ torch.zeros(3))


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.resolve_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="no working GPU"):
        runs.resolve_device("cuda")
    for device in ("tpu", "mps", "cuda:x", ""):
        with pytest.raises(ValueError, match=f"auto, cpu, cuda or cuda:N, got '{device}'"):
            runs.resolve_device(device)
    runs.check_size(0.9e9, 0.0, 1e6, torch.device("cpu"), "nothing")  # what fits is not refused


@SIGNALS
def test_every_signal_of_a_scheduler_asks_the_loop_to_stop(number, capsys):
    handler, done = signal.getsignal(number), []
    with pytest.raises(SystemExit) as caught, Stop(None):
        os.kill(os.getpid(), number)  # before the first step
        time.sleep(1)
    assert caught.value.code == 143 and signal.getsignal(number) == handler
    with Stop(None) as stop:
        stop.in_loop = True
        os.kill(os.getpid(), number)
        assert stop.is_due() and stop.signal == number
    # A folder's item in work is finished, the rest is left.
    with pytest.raises(SystemExit) as caught:
        for item in stoppable(range(5)):
            if item == 1:
                os.kill(os.getpid(), number)
            done.append(item)
    assert caught.value.code == 143 and done == [0, 1] and "what was finished is whole" in capsys.readouterr().err
    assert signal.getsignal(number) == handler and list(stoppable("ab")) == ["a", "b"]


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


def test_compiled_code_is_kept_elsewhere_where_installation_and_home_are_read_only(monkeypatch, caplog):
    monkeypatch.setattr(os, "environ", {})
    runs.choose_numba_cache()
    assert not os.environ
    monkeypatch.setattr(runs, "_can_write", lambda folder: False)
    runs.choose_numba_cache()
    assert os.environ["NUMBA_CACHE_DIR"].startswith(tempfile.gettempdir()) and "can be written" in caplog.text


# ---- tables and pages -----------------------------------------------------------------------------------------------


def test_tables_read_in_a_terminal_and_in_markdown():
    table = Table("Quality", ["method", "dB"], [["hull", 21.4321], ["model|b", None]], notes=["64 mice"])
    assert table.text() == "Quality\nmethod   dB\nhull     21.4\nmodel|b  –\n64 mice\n"
    assert "| hull | 21.4 |" in table.markdown() and "| model\\|b | – |" in table.markdown()


def test_page_is_one_file_with_names_escaped(tmp_path):
    figures = [Figure(EVIL, torch.rand(3, 8, 8)), Figure("plot", svg="<svg/>")]
    blocks = [Table(EVIL, [EVIL], [[EVIL]], [EVIL]), *figures, EVIL]
    write_page(tmp_path / "report.html", EVIL, blocks, facts={EVIL: EVIL}, badge="poor")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == 11 and "<svg/>" in page
    assert "data:image/jpeg;base64," in page and "http" not in page
