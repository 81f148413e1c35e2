"""A recording imported: what its dataset says is what was filmed (pictures and points: test_recording_formats.py)."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from filmed_spheres import COUNT, SCRIPT, SIZE, settings_for, spheres
from round_trip import recording_cameras, to_sample

from multiview.rig import RigMismatchError, check_alignment, load_rig
from multiview.run import main_guard
from multiview.sample import read_dataset_info, read_sample, read_split
from recording.importer import process_recording
from synthetic.dataset import load_real_rig


@pytest.fixture(scope="module")
def samples(whole):
    return [read_sample(whole / f"sample_{index:06d}") for index in range(COUNT)]


@pytest.fixture(scope="module")
def report(whole):
    return json.loads((whole / "quality_report.json").read_text())


def test_views_are_the_real_cameras_in_the_rigs_order_by_direction(whole, samples, report):
    info, (real, arena) = read_dataset_info(whole), load_real_rig(width=192)
    order = info["view_cameras"]
    assert order != sorted(order) and report["views"][0]["camera"] == info["reference_camera"]
    azimuths = [view.azimuth_deg for view in info["rig"].views]
    assert azimuths[0] == 0.0 and azimuths == sorted(azimuths)
    for index, sample in enumerate(samples):
        assert sample.extra["frame"] == index and sample.view_names == load_rig("mouse6").view_names
        measured = sample.cameras.azimuth_deg
        assert min(measured[0], 360 - measured[0]) < 1e-3 and (measured[1:].diff() > 0).all()
        np.testing.assert_allclose(recording_cameras(sample).origins.numpy(), real.centres[order], atol=2e-3)
        angle = math.radians(9.0 * index)  # of a walk on a circle
        place = np.array(arena["centre"]) + [30.0 * math.cos(angle), 30.0 * math.sin(angle), 16.0]
        true = spheres(place, math.degrees(math.atan2(math.sin(angle), -math.cos(angle))))[2]
        assert np.linalg.norm(np.linalg.inv(to_sample(sample))[:3, 3] - true) < 2.5  # mm, of a 112 mm body


def test_nothing_is_clipped_and_one_zoom_serves_all_views(samples, report):
    assert report["clipped_views"] == 0 and report["pictures"]["clipped"] == 0
    intrinsics = torch.stack([sample.cameras.fxfycxcy for sample in samples])
    assert (intrinsics[..., 2:] == SIZE / 2).all() and np.ptp(intrinsics[..., :2].numpy()) < 1e-3
    assert report["pictures"]["silhouette_iou_mean"] > 0.7


def test_zoom_is_reduced_for_all_when_a_mask_would_be_clipped(filmed, tmp_path):
    """A body stated too short would fill more than the picture."""
    options = {"body_length": 45.0, "num_samples": 3, "image_size": 64}
    report = process_recording(settings_for(filmed, tmp_path / "data", **options))
    assert report["zoom"] < 0.8 and report["clipped_views"] == 0 and report["pictures"]["clipped"] == 0
    assert max(view["extent_max"] for view in report["views"]) == pytest.approx(1 - 4 / 64, abs=1e-3)
    assert report["pictures"]["tangency_rms"] < 0.005


def test_rig_mismatch_explains_measured_views_and_nearest_poses_mend_it(whole, filmed, tmp_path):
    mouse6 = load_rig("mouse6")
    with pytest.raises(RigMismatchError, match="mouse6-measured"):
        check_alignment(mouse6, dataset=read_dataset_info(whole)["rig"])
    options = {"framing": "facelift", "poses": "nearest", "num_samples": 2}
    report = process_recording(settings_for(filmed, tmp_path / "data", **options))
    check_alignment(mouse6, dataset=read_dataset_info(tmp_path / "data")["rig"])
    cameras = read_sample(tmp_path / "data" / "sample_000000").cameras
    torch.testing.assert_close(cameras.c2w, mouse6.cameras(SIZE).c2w, atol=1e-5, rtol=1e-5)
    assert report["label_error_rms"] > 0.05 and any("not the true ones" in reason for reason in report["reasons"])


def test_lists_are_relative_and_nothing_names_a_machine(whole, filmed):
    lines = [line for name in ("train", "val") for line in (whole / f"data_mouse_{name}.txt").read_text().split()]
    assert sorted(lines) == [f"sample_{index:06d}" for index in range(COUNT)]
    assert len(read_split(whole / "data_mouse_val.txt")) == 2
    texts = [path.read_text() for path in whole.rglob("*") if path.suffix in (".json", ".txt", ".html")]
    assert not any(str(whole.parent) in text or str(filmed.parent) in text for text in texts)


def test_the_scripts_film_import_and_refuse(script, tmp_path, monkeypatch, capsys):
    """scripts/make_synthetic_mouse.py --as_recording, then scripts/process_mouse_data.py."""
    folder, output = tmp_path / "my recording", tmp_path / "data_mouse"
    words = [*"--as_recording --num_samples 2 --video_width 128 --fps 5 --output_dir".split(), str(folder)]
    script.main(words)
    assert len(json.loads((folder / "truth.json").read_text())["frames"]) == 2
    # What it prints is a whole command, and leads beside the recording rather than into the tracked data_mouse.
    program, importer, *printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert (program, importer) == ("python", "scripts/process_mouse_data.py") and Path(importer).is_file()
    with pytest.raises(ValueError, match="not empty"):
        script.main(words)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import process_mouse_data

    settings = process_mouse_data.parse_arguments(printed)[1]
    assert (settings.video_dir, settings.meta_dir) == (folder / "videos_undist", folder)
    assert settings.output_dir == tmp_path / "my recording_samples" and settings.output_dir != output
    words = ["--meta_dir", str(folder), "--output_dir", str(output), "--image_size", "64", "--workers", "1"]
    process_mouse_data.main([*words, "--video_dir", str(folder / "videos_undist")])
    shown = capsys.readouterr().out
    assert "2 samples instead of 2000" in shown and "the cameras as measured" in shown
    assert json.loads((output / "quality_report.json").read_text())["num_samples"] == 2
    assert "<img " in (output / "quality_report.html").read_text()
    with pytest.raises(SystemExit) as stopped:
        main_guard(lambda: process_mouse_data.main([*words, "--video_dir", str(tmp_path / "none")]))
    assert stopped.value.code == 1 and "error: --video_dir" in capsys.readouterr().err
