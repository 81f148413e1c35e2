"""The import's throughput is measured on a looped recording whose every frame is decoded; no times are judged here."""

import importlib
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from filmed_spheres import film

from benchmarks.decoding import Decoding, decode
from benchmarks.processes import tree, tree_cpu_seconds, tree_memory
from benchmarks.recording import Import, loop, to_table

ROOT = Path(__file__).resolve().parent.parent


def test_ratios_are_of_throughputs_and_of_cpu_times():
    table = to_table(
        100, 10, 1152, 2, Decoding(4.0, 7.0), Import(10.0, 16.0, 2.0, (2.0**20, None, 3e6)), Decoding(6.0, 9.0)
    )
    before, own, after = table.records
    assert (before["frames/s"], own["frames/s"], after["CPU ms per frame"]) == (25.0, 10.0, 90.0)
    assert own["frames/s over decoding's"] == 0.5 and own["without the report"] == 0.625 and own["by CPU time"] == 0.5
    assert own["MB at 10%"] == 1.0 and own["MB at 50%"] is None and before["by CPU time"] is None
    assert "| import | 10.0 | 10.0 | 160 | 0.500 | 0.625 | 0.500 | 1.00 | - |" in table.markdown()


def test_a_tree_of_processes_counts_its_children():
    work = (
        "import time; block = bytearray(b'x') * 60_000_000\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\n"
    )
    cpu, memory = tree_cpu_seconds(), tree_memory()
    command = [sys.executable, "-c", f"{work}\ninput()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert child.pid in tree()
        assert 0.25 < tree_cpu_seconds() - cpu < 5 and 55e6 < tree_memory() - memory < 200e6
        child.stdin.close()
    assert child.pid not in tree() and tree_cpu_seconds() - cpu > 0.25  # what has ended still counts
    assert time.process_time() <= tree_cpu_seconds() + 0.05


def test_loops_keep_every_frame_and_another_number_of_frames_is_refused(tmp_path):
    film(tmp_path / "short", 4, width=64)
    loop(tmp_path / "short", tmp_path / "long", 3)
    assert (tmp_path / "long" / "new_cam.pkl").is_file() and len(list((tmp_path / "long").rglob("*.mp4"))) == 12
    assert decode(tmp_path / "long", 12, 2).cpu > 0
    with pytest.raises(ValueError, match="looped to 13 frames, 12 were decoded"):
        decode(tmp_path / "long", 13, 1)


def test_the_command_films_loops_imports_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    # The folder's place alone: processes put sockets in the system's own, whose path must be short.
    monkeypatch.setattr("tempfile.TemporaryDirectory", partial(tempfile.TemporaryDirectory, dir=tmp_path))
    monkeypatch.setattr("benchmarks.recording.WATCH_EVERY_S", 0.01)
    importlib.import_module("benchmark").main(
        ["--what", "import", "--frames", "5", "--source_frames", "3", "--video_width", "128", "--device", "cpu",
         "--output", str(tmp_path / "b.json")]
    )  # fmt: skip
    (table,) = json.loads((tmp_path / "b.json").read_text())["tables"]
    assert [record["what"] for record in table["records"]] == ["decoding before", "import", "decoding after"]
    own = table["records"][1]
    assert own["seconds"] * own["frames/s"] == pytest.approx(6) and "6 frames of six videos" in table["notes"][0]
    assert 0 < own["frames/s over decoding's"] < own["without the report"] and own["MB at 90%"] > 100
    assert not list(tmp_path.glob("benchmark_import_*"))
