"""Text readers, files whole or not at all, one owner per folder, leftovers of killed runs."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from multiview import files
from multiview.files import LOCK_FILE, atomic_folder, atomic_write, owned_folder, read_json

ROOT = Path(__file__).resolve().parent.parent
OWNER = "import sys, time; from multiview.files import owned_folder\nwith owned_folder(sys.argv[1]):\n" \
        "    print('owned', flush=True); time.sleep(60)\n"  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_in_every_usual_encoding(tmp_path, encoding):
    (tmp_path / "list.txt").write_bytes(" Käfig 1 \r\n\r\nb\n".encode(encoding))
    (tmp_path / "a.json").write_bytes('{"ä": 1}'.encode(encoding))
    assert files.read_lines(tmp_path / "list.txt") == ["Käfig 1", "b"] and read_json(tmp_path / "a.json") == {"ä": 1}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\x00\x81", "save it as UTF-8"), (b'{"a": ', "not valid JSON"), (b"[1]", "object of keys"),
        (b"[" * 100_000, "nested too deeply"), (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)  # fmt: skip
def test_bad_json_is_refused_by_name(tmp_path, content, told):
    (tmp_path / "cameras.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/cameras.json.*{told}"):
        read_json(tmp_path / "cameras.json")


def test_missing_file_and_folder_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="none.txt does not exist"):
        files.read_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read"):
        files.read_text(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_folder_leaves_the_old_folder_and_no_litter(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert (folder / "x").read_text() == "old" and os.listdir(tmp_path) == ["checkpoint-1"]
    with atomic_folder(folder) as temporary:
        (temporary / "x").write_text("new")
        (temporary / "x").chmod(0o600)  # as some versions of safetensors leave it
    assert (folder / "x").read_text() == "new" and os.listdir(tmp_path) == ["checkpoint-1"]
    # Who may read the folder may read the weights in it.
    assert (folder / "x").stat().st_mode & 0o666 == folder.stat().st_mode & 0o666


def test_second_owner_is_refused_and_a_killed_one_is_replaced(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "owned\n"
    with pytest.raises(ValueError, match=f"in use by process {first.pid}"), owned_folder(tmp_path):
        pass
    first.kill()
    first.wait()
    (tmp_path / ".half.json.0123abcd.tmp").touch()
    with owned_folder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("owner", "age_s", "alive"),
    [
        ({"host": "another", "pid": 1, "start": 0.0}, 0, True),
        ({"host": "another", "pid": 1, "start": 0.0}, 400, False),
        ({"host": socket.gethostname(), "pid": os.getpid(), "start": 0.0}, 0, False),  # the number was used again
        ("", 0, True), ("", 400, False),
    ],
)  # fmt: skip
def test_stale_locks_are_recognised(tmp_path, owner, age_s, alive):
    assert files.BEAT_S * 3 < files.STALE_S < 400
    lock = tmp_path / LOCK_FILE
    lock.write_text(json.dumps(owner) if owner else "")
    os.utime(lock, (time.time() - age_s,) * 2)
    if alive:
        with pytest.raises(ValueError, match="in use"), owned_folder(tmp_path):
            pass
    else:
        with owned_folder(tmp_path):
            assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_leftovers_go_and_a_folder_killed_between_its_renames_comes_back(tmp_path):
    for name in (".new.01234567.tmp", ".kept.89abcdef.old", ".there.89abcdef.old", "there"):
        (tmp_path / name).mkdir()
    for name in (".new.01234567.tmp/a", ".other"):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", "kept", "there"]
