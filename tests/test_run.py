"""Seeds, the run folder, and the exit codes of entry scripts."""

import errno
import json
import sys

import pytest
import torch

from multiview.rig import load_rig
from multiview.run import RunFolder, WandbOptions, main_guard, make_generator, resolve_device, seed_from


def test_seeds_depend_on_every_key_and_nothing_else():
    assert seed_from(1, 2, "a") == seed_from(1, 2, "a") != seed_from(1, "2a")
    a = torch.rand(3, generator=make_generator(7, 0))
    assert torch.equal(a, torch.rand(3, generator=make_generator(7, 0)))
    assert not torch.equal(a, torch.rand(3, generator=make_generator(7, 1)))


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


def test_only_the_main_process_writes(tmp_path):
    run = RunFolder(tmp_path / "x", {}, None, is_main=False)
    run.log(1, {"loss": 1.0})
    assert not (tmp_path / "x").exists()


def test_wandb_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="requirements-extra.txt"):
        RunFolder(tmp_path, {}, load_rig("mouse6"), wandb=WandbOptions(mode="offline"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("rig 'x' is unknown"), "rig 'x' is unknown"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a.mp4"), "out/a.mp4: No space left on device"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "out"), "out: Not a directory"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system"),
    ],
)
def test_a_user_error_exits_1_with_one_message(capsys, error, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_info:
        main_guard(main)
    assert exit_info.value.code == 1 and capsys.readouterr().err == f"error: {message}\n"


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="no working GPU"):
        resolve_device("cuda")
