"""A synthetic mouse filmed by a real rig, written as a raw recording and imported again, end to end."""

import json
import shutil

import numpy as np
import pytest
import torch
from filmed_spheres import SCRIPT, contents
from round_trip import moved_to_sample, recording_cameras, to_sample

from multiview.image import composite
from multiview.metrics import foreground_psnr, mask_iou
from multiview.rig import RigMismatchError, check_alignment, load_rig
from multiview.run import main_guard
from multiview.sample import read_dataset_info, read_sample, read_split
from recording.importer import process_recording
from recording.settings import ImportSettings
from synthetic.dataset import ARENA_REACH, load_real_rig, stand_in_arena, write_recording
from synthetic.scene import mouse_sequence

NUM_FRAMES, WIDTH, SIZE = 3, 384, 256  # a photograph's pixel is about one of the picture's
BACKGROUND = 0.8


@pytest.fixture(scope="module")
def clouds():
    arena = load_real_rig()[1]
    return [stand_in_arena(cloud, arena) for cloud in mouse_sequence(0, NUM_FRAMES, fps=2, arena_radius=ARENA_REACH)]


@pytest.fixture(scope="module")
def recording(tmp_path_factory, clouds, render):
    folder = tmp_path_factory.mktemp("raw") / "recording"
    write_recording(folder, load_real_rig(width=WIDTH)[0], clouds, render, background=BACKGROUND, quality_crf=0)
    return folder


def settings_for(recording, output, **options):
    defaults = {"num_samples": NUM_FRAMES, "image_size": SIZE, "framing": "fill", "workers": 1}
    return ImportSettings(recording / "videos_undist", recording, output, **{**defaults, **options})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, recording):
    """Its folder and report, made by two processes."""
    folder = tmp_path_factory.mktemp("processed") / "data_mouse"
    return folder, process_recording(settings_for(recording, folder, workers=2))


@pytest.fixture(scope="module")
def samples(dataset):
    return [read_sample(dataset[0] / f"sample_{index:06d}") for index in range(NUM_FRAMES)]


def test_processed_pictures_equal_direct_renderings(samples, clouds, render):
    psnr, overlap = [], []
    for index, (sample, cloud) in enumerate(zip(samples, clouds)):
        assert sample.extra["frame"] == index
        rgb, alpha = render(cloud, recording_cameras(sample))[:2]
        mask = (alpha > 0.5).float()
        psnr.append(foreground_psnr(composite(sample.rgba, BACKGROUND), rgb + BACKGROUND * (1 - alpha), mask))
        overlap.append(mask_iou((sample.rgba[:, 3:] > 0.5).float(), mask))
    # The rim of a mask is one photograph's pixel sharp here; at full size it is finer (docs/guides).
    assert torch.stack(psnr).mean() > 31 and torch.stack(overlap).mean() > 0.975


def test_cameras_are_the_real_ones_and_keypoints_land_on_the_animal(dataset, samples, clouds):
    order = read_dataset_info(dataset[0])["view_cameras"]
    real = load_real_rig(width=WIDTH)[0]
    for sample, cloud in zip(samples, clouds):
        np.testing.assert_allclose(recording_cameras(sample).origins.numpy(), real.centres[order], atol=2e-3)
        points = moved_to_sample(sample, cloud.keypoints)
        trunk = sample.cameras.project(points.expand(len(order), -1, -1))[0][:, 3:5].round().long()
        assert ((trunk >= 0) & (trunk < SIZE)).all()  # SpineF, SpineM: inside the animal in every view
        assert (sample.rgba[torch.arange(len(order))[:, None], 3, trunk[..., 1], trunk[..., 0]] > 0.5).all()
        center = np.linalg.inv(to_sample(sample))[:3, 3]
        assert np.linalg.norm(center - cloud.center) < 2.5  # mm, of a 73 mm body


def test_views_are_in_the_rigs_order_by_direction(dataset, samples):
    folder, report = dataset
    info = read_dataset_info(folder)
    assert info["view_cameras"] != sorted(info["view_cameras"])
    azimuths = [view.azimuth_deg for view in info["rig"].views]
    assert azimuths[0] == 0.0 and azimuths == sorted(azimuths)
    assert samples[2].view_names == load_rig("mouse6").view_names
    measured = samples[2].cameras.azimuth_deg
    assert min(measured[0], 360 - measured[0]) < 1e-3 and (measured[1:].diff() > 0).all()
    assert report["views"][0]["camera"] == info["reference_camera"]


def test_nothing_is_clipped_and_one_zoom_serves_all_views(dataset, samples):
    _, report = dataset
    assert report["clipped_views"] == 0 and report["pictures"]["clipped"] == 0
    intrinsics = torch.stack([sample.cameras.fxfycxcy for sample in samples])
    assert (intrinsics[..., 2:] == SIZE / 2).all() and np.ptp(intrinsics[..., :2].numpy()) < 1e-3
    assert report["pictures"]["silhouette_iou_mean"] > 0.7 and report["pictures"]["tangency_rms"] < 0.004


def test_zoom_is_reduced_for_all_when_a_mask_would_be_clipped(recording, tmp_path):
    """A body stated too short would fill more than the picture."""
    report = process_recording(settings_for(recording, tmp_path / "data", body_length=27.0, image_size=128))
    assert report["zoom"] < 0.8 and report["clipped_views"] == 0 and report["pictures"]["clipped"] == 0
    assert max(view["extent_max"] for view in report["views"]) == pytest.approx(1 - 4 / 128, abs=1e-3)


def test_rig_mismatch_explains_measured_views_and_nearest_poses_mend_it(dataset, recording, tmp_path):
    mouse6 = load_rig("mouse6")
    with pytest.raises(RigMismatchError, match="mouse6-measured"):
        check_alignment(mouse6, dataset=read_dataset_info(dataset[0])["rig"])
    options = {"framing": "facelift", "poses": "nearest", "num_samples": 2, "image_size": 64}
    report = process_recording(settings_for(recording, tmp_path / "data", **options))
    check_alignment(mouse6, dataset=read_dataset_info(tmp_path / "data")["rig"])
    cameras = read_sample(tmp_path / "data" / "sample_000000").cameras
    torch.testing.assert_close(cameras.c2w, mouse6.cameras(64).c2w, atol=1e-5, rtol=1e-5)
    assert report["label_error_rms"] > 0.05 and any("not the true ones" in reason for reason in report["reasons"])


def test_interrupted_import_resumes_to_the_same_files(dataset, recording, tmp_path):
    whole, partial = dataset[0], tmp_path / "data_mouse"
    shutil.copytree(whole, partial)
    shutil.rmtree(partial / "sample_000001")
    for name in ("data_mouse_train.txt", "data_mouse_val.txt", "quality_report.json", "quality_report.html"):
        (partial / name).unlink()
    kept = (partial / "sample_000000" / "images" / "cam_000.png").stat().st_mtime_ns
    process_recording(settings_for(recording, partial))
    assert contents(partial) == contents(whole)
    assert (partial / "sample_000000" / "images" / "cam_000.png").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="other parameters .*framing: fill there, exact asked for"):
        process_recording(settings_for(recording, partial, framing="exact"))


def test_lists_are_relative_and_nothing_names_a_machine(dataset, recording):
    folder, _ = dataset
    lines = [line for name in ("train", "val") for line in (folder / f"data_mouse_{name}.txt").read_text().split()]
    assert sorted(lines) == [f"sample_{index:06d}" for index in range(NUM_FRAMES)]
    assert len(read_split(folder / "data_mouse_val.txt")) == 1
    texts = [path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".html")]
    assert not any(str(folder.parent) in text or str(recording.parent) in text for text in texts)


def test_the_scripts_film_import_and_refuse(script, tmp_path, monkeypatch, capsys):
    """scripts/make_synthetic_mouse.py --as_recording, then scripts/process_mouse_data.py."""
    folder, output = tmp_path / "recording", tmp_path / "data_mouse"
    words = f"--as_recording --output_dir {folder} --num_samples 2 --video_width 128 --fps 5".split()
    script.main(words)
    assert len(json.loads((folder / "truth.json").read_text())["frames"]) == 2
    with pytest.raises(ValueError, match="not empty"):
        script.main(words)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import process_mouse_data

    words = ["--meta_dir", str(folder), "--output_dir", str(output), "--image_size", "64", "--workers", "1"]
    process_mouse_data.main([*words, "--video_dir", str(folder / "videos_undist")])
    shown = capsys.readouterr().out
    assert "2 samples instead of 2000" in shown and "dataset.json" in shown
    assert json.loads((output / "quality_report.json").read_text())["num_samples"] == 2
    assert "<img " in (output / "quality_report.html").read_text()
    with pytest.raises(SystemExit) as stopped:
        main_guard(lambda: process_mouse_data.main([*words, "--video_dir", str(tmp_path / "none")]))
    assert stopped.value.code == 1 and "error: --video_dir" in capsys.readouterr().err
