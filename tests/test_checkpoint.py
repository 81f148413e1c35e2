"""Checkpoints appear whole or not at all; loading is strict."""

import argparse
import errno
import os
import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from multiview import checkpoint
from multiview.checkpoint import load_checkpoint, load_strict, newest_checkpoint, read_sidecar, save_checkpoint


def write(folder, *steps, content=None):
    """A checkpoint per step; returns the path of the last one."""
    for step in steps:
        path = folder / f"ckpt_{step:016d}.pt"
        save_checkpoint(path, content or {"model": {"w": torch.ones(2000) * step}}, {"step": step})
    return path


def test_newest_is_the_newest_complete_one_found_by_reading(tmp_path):
    newest = write(tmp_path, 1, 2, 10)
    newest.write_bytes(newest.read_bytes()[:500])
    found = newest_checkpoint(tmp_path)
    assert found.name == f"ckpt_{2:016d}.pt" and load_checkpoint(found)["model"]["w"][0] == 2
    assert read_sidecar(found)["step"] == 2
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_rotation_keeps_the_newest_and_never_all_deleted(tmp_path):
    write(tmp_path, 1, 2, 3, 20)
    for keep in (3, 0):
        checkpoint.rotate_checkpoints(tmp_path, "ckpt_*.pt", keep)
        assert sorted(int(p.name[5:21]) for p in tmp_path.glob("*.pt")) == [2, 3, 20]
        assert len(list(tmp_path.glob("*.json"))) == 3


def test_strict_loading_names_what_is_missing_unexpected_and_misshapen():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    state = module.state_dict()
    load_strict(module, {f"module.{k}": v for k, v in state.items()}, "x.pt", renames=[(r"^module\.", "")])
    bad = {**state, "extra": torch.ones(1), "0.weight": torch.ones(3, 5)}
    del bad["1.bias"]
    with pytest.raises(ValueError) as error:
        load_strict(module, bad, "x.pt")
    for part in ("x.pt", "missing: 1.bias", "unexpected: extra", "0.weight [3, 5] instead of [3, 2]"):
        assert part in str(error.value)


def test_a_missing_checkpoint_and_one_with_code_inside_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere.pt does not exist"):
        load_checkpoint(tmp_path / "nowhere.pt")

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil2.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"\0\0\0\x40\0\0\0\x40") + 1] ^= 1  # in the tensor
    path.write_bytes(content)


def zeroed(path):
    content = path.read_bytes()
    path.write_bytes(content[:-3000] + bytes(64) + content[-2936:])


def unfolding(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(5_000_000))
        archive.writestr("a/version", "3")


class Asking:
    def __reduce__(self):
        return (bytearray, (6 << 30,))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:3000]), "cut off"), (lambda p: p.write_bytes(b""), "cut off"),
        (bit_flipped, "differs from its checksum"), (zeroed, "differs from its checksum|cut off"),
        (unfolding, "compressed parts"),
        (lambda p: torch.save({"model": Asking()}, p), "asks for memory by a number"),
        (lambda p: torch.save(torch.nn.Linear(2, 2), p), "holds a torch.nn.modules.linear.Linear.*torch.save"),
        (lambda p: torch.save({"model": {}, "loss": Path("x")}, p), "holds a pathlib"),
        (lambda p: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), p), "TorchScript; save"),
        (lambda p: torch.save([1, 2], p), "must hold a dict, got list"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_a_spoiled_or_foreign_checkpoint_is_one_sentence_and_the_one_before_it_is_taken(tmp_path, spoil, message):
    path = write(tmp_path, 1, 2)
    checkpoint.sidecar_path(path).unlink()  # as from elsewhere: else the digest tells first (test_training.py)
    spoil(path)
    with pytest.raises(ValueError, match=f"{path.name} .*({message})") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert newest_checkpoint(tmp_path).name == f"ckpt_{1:016d}.pt"


def test_what_other_trainings_write_is_loaded(tmp_path):
    """torch.compile's prefix, a Namespace of arguments, the format before torch 1.6, a best one besides."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3))
    state = {f"_orig_mod.{name}": tensor for name, tensor in module.state_dict().items()}
    content = {"model": state, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "ckpt_1.pt")
    torch.save(content, tmp_path / "ckpt_best.pt", _use_new_zipfile_serialization=False)
    for name in ("ckpt_1.pt", "ckpt_best.pt"):
        loaded = torch.nn.Sequential(torch.nn.Linear(2, 3))
        load_strict(loaded, load_checkpoint(tmp_path / name)["model"], name)
        assert torch.equal(loaded[0].weight, module[0].weight)
    assert newest_checkpoint(tmp_path).name == "ckpt_1.pt"
    checkpoint.rotate_checkpoints(tmp_path, "ckpt_*.pt", keep=1)
    assert (tmp_path / "ckpt_best.pt").is_file()


def test_a_checkpoint_that_the_system_cuts_off_is_one_message_and_no_litter(tmp_path):
    first, path, limits = write(tmp_path, 1), tmp_path / "ckpt_2.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    before, told = sorted(os.listdir(tmp_path)), []
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for numbers in (40_000, 24_900):  # cut off in the middle, and only when the last buffer is flushed
            with pytest.raises(ValueError, match=f"cannot write {path}: File too large") as error:
                save_checkpoint(path, {"w": torch.zeros(numbers)}, {"step": 2})
            told.append(str(error.value))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "needs 0.2 MB" in told[0] and "needs 0.1 MB" in told[1]
    assert sorted(os.listdir(tmp_path)) == before and newest_checkpoint(tmp_path) == first


@pytest.mark.parametrize("call", ["torch.save", "os.replace", "os.fsync"])
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch, call):
    path = write(tmp_path, 1, content={"w": torch.ones(5)})

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(call, fail)
        for target in (path, tmp_path / "ckpt_0000000000000002.pt"):
            with pytest.raises(ValueError, match=f"{target.name}.*No space left.*MB free.*repeat the command"):
                save_checkpoint(target, {"w": torch.zeros(5)}, {"step": 1})
    assert sorted(os.listdir(tmp_path)) == [path.name, path.name + ".json"]
    assert load_checkpoint(path)["w"].sum() == 5 and read_sidecar(path)["step"] == 1


def test_other_errors_while_saving_stay_what_they_are(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a programming error")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="programming"):
        save_checkpoint(tmp_path / "a.pt", {}, {})
    assert os.listdir(tmp_path) == []
