"""Sequences, re-shooting and leave-one-out: what refinement gives over a dataset."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import inference_mouse
from evaluation import EvaluationSettings
from evaluation.evaluate import evaluate
from multiview.rig import load_rig
from multiview.sample import read_dataset_info, read_sample, read_split
from pipeline.model import MouseFaceLift
from pipeline.reshoot import reshoot_lists
from pipeline.sequence import reconstruct_sequence
from pipeline.verdict import WORDS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model():
    return MouseFaceLift.load(device="cpu", stages="2")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """One mouse that stands still for three frames, then another one."""
    folder = tmp_path_factory.mktemp("recording")
    for number, source in enumerate((0, 0, 0, 5)):
        shutil.copytree(ROOT / "data_mouse" / f"sample_{source:06d}", folder / f"frame_{number:02d}")
    shutil.copy(ROOT / "data_mouse" / "dataset.json", folder)
    (folder / "all.txt").write_text("".join(f"frame_{number:02d}\n" for number in range(4)))
    (folder / "first.txt").write_text("frame_00\n")
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["inference_mouse.py", *map(str, arguments)])
    monkeypatch.setattr(inference_mouse, "leave", lambda: None, raising=False)
    inference_mouse.main()


def test_a_gaussian_stays_one_surface_point_and_a_stopped_run_continues(model, recording, tmp_path, monkeypatch):
    folders = [recording / f"frame_{number:02d}" for number in range(4)]
    settings = {"refine": 8, "refine_size": 256, "seed": 0, "start": "auto", "filtered": True}  # the command's defaults
    words, failed = reconstruct_sequence(model, folders, tmp_path / "whole", **settings)
    assert not failed and len(words) == 4 and set(words.values()) <= set(WORDS)
    told = json.loads((tmp_path / "whole" / "sequence.json").read_text())
    frames = told["frames"]
    assert [frame["start"] for frame in frames[1:3]] == ["previous"] * 2
    assert len({frame["track"] for frame in frames[:3]}) == 1 and len({frame["gaussians"] for frame in frames[:3]}) == 1
    assert frames[3]["track"] != frames[0]["track"] and len(told["tracks"]) == 2  # the other mouse is another track
    assert frames[1]["given_after"]["psnr"] > frames[0]["given_after"]["psnr"]  # it is fitted on
    assert (tmp_path / "whole" / "film.mp4").stat().st_size > 1000
    # The first frame alone, then all, by the command: the same files.
    shutil.copytree(tmp_path / "whole" / "frame_00", tmp_path / "parts" / "frame_00")
    common = ["--output_dir", tmp_path / "parts", "--refine", "8", "--device", "cpu"]
    run(monkeypatch, "--dataset", recording, *common)
    for folder in folders:
        plys = [(tmp_path / name / folder.name / "gaussians.ply").read_bytes() for name in ("whole", "parts")]
        assert plys[0] == plys[1], folder.name


def test_processes_share_frames_and_bad_ones_are_left_out(model, recording, tmp_path):
    folders = [recording / "frame_00", recording / "frame_01", tmp_path / "missing", recording / "frame_03"]
    failed = [reconstruct_sequence(model, folders, tmp_path / "out", (rank, 2), refine=2)[1] for rank in (0, 1)]
    assert failed[0] == [] and len(failed[1]) == 1 and "missing" in failed[1][0]
    frames = json.loads((tmp_path / "out" / "sequence.json").read_text())["frames"]
    assert len(frames) == 3 and frames[2]["start"] != "previous"  # nothing to continue from
    index = (tmp_path / "out" / "index.html").read_text()
    assert index.count('/splats.js"') == 3 and failed[1][0] in index and "frame_00/thumbnail.png" in index
    with pytest.raises(ValueError, match="was made with .*'refine': 2.*new --output_dir"):
        reconstruct_sequence(model, folders[:1], tmp_path / "out", refine=3)
    with pytest.raises(ValueError, match="one name"):
        reconstruct_sequence(model, [recording / "frame_00"] * 2, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dataset", "nothing"], "neither a split list nor a folder"),
        (["--sample_dir", "."], "no opencv_cameras.json"),
    ],
)
def test_what_is_no_dataset_is_refused(arguments, told, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=told):
        run(monkeypatch, *arguments, "--output_dir", tmp_path)


@pytest.mark.parametrize("text", ["0", "-3", "some", "1.5"])
def test_refine_takes_auto_off_or_a_number(text, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--sample_dir", ".", "--refine", text)
    assert stopped.value.code == 2 and "auto, off or a positive number" in capsys.readouterr().err


def test_what_a_sequence_cannot_write_is_refused_first(monkeypatch, capsys):
    for words in (["--refine", "off"], ["--export", "splat"], ["--mesh"], ["sheet=true"]):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, "--dataset", "data_mouse", *words)
        assert stopped.value.code == 2 and "--dataset fits every frame" in capsys.readouterr().err


def settings(recording, tmp_path, **changes):
    given = {"data": (recording / "all.txt",), "output_dir": tmp_path / "reshot", "rig": "uniform4", "image_size": 64,
             "num_novel_views": 1, "least_psnr": 5.0, "seed": 0}  # fmt: skip
    return SimpleNamespace(**given | changes)


def test_a_recording_is_filmed_again_by_another_rig(model, recording, tmp_path, monkeypatch):
    monkeypatch.setattr("gslrm.refinement.ITERATIONS", {"hull": 4, "stage2": 4, "previous": 4})
    wanted = settings(recording, tmp_path)
    lines = list(reshoot_lists(wanted, model, (0, 2))) + list(reshoot_lists(wanted, model, (1, 2)))
    assert "4 of 4 samples, 0 left out" in lines[-1]
    assert read_dataset_info(wanted.output_dir)["rig"] == load_rig("uniform4")
    first, *_ = read_split(wanted.output_dir / "all.txt")
    sample = read_sample(first, with_depth=True)
    assert sample.num_inputs == 4 and len(sample.rgba) == 5
    assert torch.allclose(sample.cameras.c2w[:4], load_rig("uniform4").cameras(64).c2w, atol=1e-5)
    soft = (sample.rgba[:, 3] > 0.05) & (sample.rgba[:, 3] < 0.95)
    assert soft.any() and (sample.depth[sample.rgba[:, 3:] > 0.6] > 1).all()
    again = first / "images" / "cam_000.png"
    before = again.stat().st_mtime_ns
    list(reshoot_lists(wanted, model, (0, 1)))  # repeating it makes nothing anew
    assert again.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rig": "facelift6"}, "from the animal's heading"),
        ({"rig": "none"}, "rig 'none'"),
        ({"least_psnr": 90.0}, None),
    ],
)
def test_samples_that_cannot_be_shown_are_left_out_by_name(changes, told, model, recording, tmp_path, monkeypatch):
    monkeypatch.setattr("gslrm.refinement.ITERATIONS", {"hull": 2, "stage2": 2, "previous": 2})
    wanted = settings(recording, tmp_path, data=(recording / "first.txt",), **changes)
    if told is None:
        assert "0 of 1 samples, 1 left out" in list(reshoot_lists(wanted, model, (0, 1)))[0]
        reason = json.loads((wanted.output_dir / "left_out" / "frame_00.json").read_text())["reason"]
        assert "90 asked" in reason
    else:
        with pytest.raises(ValueError, match=told):
            list(reshoot_lists(wanted, model, (0, 1)))


def test_leave_one_out_compares_hull_stage_2_and_refinement(model, recording, tmp_path, monkeypatch):
    monkeypatch.setattr("gslrm.refinement.ITERATIONS", {"hull": 10, "stage2": 10, "previous": 10})
    wanted = EvaluationSettings(
        stage="2", data=recording / "first.txt", leave_one_out=True, output_dir=tmp_path, device="cpu"
    )
    assert "| refined | 1 | 6 |" in evaluate(wanted, model)
    records = json.loads((tmp_path / "metrics.json").read_text())["leave_one_out"]
    assert len(records) == 18 and {record["view"] for record in records} == set(range(6))
    mean = {
        method: sum(r["foreground_psnr"] for r in records if r["method"] == method) / 6
        for method in ("hull", "Stage 2", "refined")
    }
    assert mean["refined"] > mean["Stage 2"] - 0.3 and mean["refined"] > mean["hull"]
    assert all(r["anisotropy_p95"] < 100 for r in records if r["method"] == "refined")
    assert (tmp_path / "report.html").is_file() and (tmp_path / "sheet.png").is_file()
    with pytest.raises(ValueError, match="a test of --stage 2"):
        EvaluationSettings(stage="full", leave_one_out=True)
