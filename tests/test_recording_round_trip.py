"""A synthetic mouse filmed by a real rig, written as a raw recording and imported again, end to end."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from round_trip import load_script, recording_cameras

from multiview.image import composite
from multiview.metrics import foreground_psnr, mask_iou
from multiview.rig import RigMismatchError, check_alignment, load_rig
from multiview.sample import read_dataset_info, read_sample, read_split
from recording.importer import process_recording
from recording.settings import ImportSettings
from synthetic.dataset import ARENA_REACH, load_real_rig, make_renderer, stand_in_arena, write_recording
from synthetic.scene import mouse_sequence

ROOT = Path(__file__).resolve().parent.parent
NUM_FRAMES, WIDTH, SIZE = 6, 384, 256  # a photograph's pixel is about one of the picture's
BACKGROUND = 0.8


@pytest.fixture(scope="module")
def render():
    return make_renderer()


@pytest.fixture(scope="module")
def clouds():
    _, arena = load_real_rig()
    return [stand_in_arena(cloud, arena) for cloud in mouse_sequence(0, NUM_FRAMES, fps=2, arena_radius=ARENA_REACH)]


@pytest.fixture(scope="module")
def recording(tmp_path_factory, clouds, render):
    folder = tmp_path_factory.mktemp("raw") / "recording"
    write_recording(folder, load_real_rig(width=WIDTH)[0], clouds, render, background=BACKGROUND, quality_crf=0)
    return folder


def settings_for(recording, output, **options):
    defaults = {"num_samples": NUM_FRAMES, "image_size": SIZE, "framing": "fill", "workers": 2}
    return ImportSettings(recording / "videos_undist", recording, output, **{**defaults, **options})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, recording):
    folder = tmp_path_factory.mktemp("processed") / "data_mouse"
    report = process_recording(settings_for(recording, folder))
    return folder, report


def test_processed_pictures_equal_direct_renderings(dataset, clouds, render):
    folder, _ = dataset
    psnr, overlap = [], []
    for index, cloud in enumerate(clouds):
        sample = read_sample(folder / f"sample_{index:06d}")
        assert sample.extra["frame"] == index
        rgb, alpha = render(cloud, recording_cameras(sample))[:2]
        mask = (alpha > 0.5).float()
        psnr.append(foreground_psnr(composite(sample.rgba, BACKGROUND), rgb + BACKGROUND * (1 - alpha), mask))
        overlap.append(mask_iou((sample.rgba[:, 3:] > 0.5).float(), mask))
    # The rim of a mask is one photograph's pixel sharp here; at full size it is finer (docs/guides).
    assert torch.stack(psnr).mean() > 31 and torch.stack(overlap).mean() > 0.975


def test_cameras_are_the_real_ones_and_keypoints_land_on_the_animal(dataset, clouds):
    folder, _ = dataset
    order = read_dataset_info(folder)["view_cameras"]
    real = load_real_rig(width=WIDTH)[0]
    for index, cloud in enumerate(clouds):
        sample = read_sample(folder / f"sample_{index:06d}")
        cameras = recording_cameras(sample)
        np.testing.assert_allclose(cameras.origins.numpy(), real.centres[order], atol=2e-3)
        to_sample = np.array(sample.extra["calibration_to_sample"])
        points = cloud.keypoints.astype(float) @ to_sample[:3, :3].T + to_sample[:3, 3]
        uv, _ = sample.cameras.project(torch.from_numpy(points).float().expand(len(order), -1, -1))
        trunk = uv[:, 3:5].round().long()  # SpineF, SpineM: inside the animal in every view
        assert ((trunk >= 0) & (trunk < SIZE)).all()
        for slot in range(len(order)):
            assert (sample.rgba[slot, 3, trunk[slot, :, 1], trunk[slot, :, 0]] > 0.5).all()
        centre = np.linalg.inv(to_sample)[:3, 3]
        assert np.linalg.norm(centre - cloud.center) < 2.5  # mm, of a 73 mm body


def test_views_are_in_the_rigs_order_by_direction(dataset):
    folder, report = dataset
    info = read_dataset_info(folder)
    assert info["view_cameras"] != sorted(info["view_cameras"])
    azimuths = [view.azimuth_deg for view in info["rig"].views]
    assert azimuths[0] == 0.0 and azimuths == sorted(azimuths)
    sample = read_sample(folder / "sample_000002")
    assert sample.view_names == load_rig("mouse6").view_names
    measured = sample.cameras.azimuth_deg
    assert min(measured[0], 360 - measured[0]) < 1e-3 and (measured[1:].diff() > 0).all()
    assert report["views"][0]["camera"] == info["reference_camera"]


def test_nothing_is_clipped_and_one_zoom_serves_all_views(dataset):
    folder, report = dataset
    assert report["clipped_views"] == 0 and report["pictures"]["clipped"] == 0
    focals = []
    for index in range(NUM_FRAMES):
        sample = read_sample(folder / f"sample_{index:06d}")
        focals += sample.cameras.fxfycxcy[:, :2].flatten().tolist()
        assert (sample.cameras.fxfycxcy[:, 2:] == SIZE / 2).all()
    assert np.ptp(focals) < 1e-3
    assert report["pictures"]["silhouette_iou_mean"] > 0.7 and report["pictures"]["tangency_rms"] < 0.004


def test_zoom_is_reduced_for_all_when_a_mask_would_be_clipped(recording, tmp_path):
    """A body stated too short would fill more than the picture."""
    report = process_recording(settings_for(recording, tmp_path / "data", body_length=27.0, num_samples=3))
    assert report["zoom"] < 0.8 and report["clipped_views"] == 0 and report["pictures"]["clipped"] == 0
    assert max(view["extent_max"] for view in report["views"]) == pytest.approx(1 - 4 / SIZE, abs=1e-3)


def test_rig_mismatch_explains_measured_views_and_nearest_poses_mend_it(dataset, recording, tmp_path):
    folder, _ = dataset
    mouse6 = load_rig("mouse6")
    with pytest.raises(RigMismatchError, match="mouse6-measured"):
        check_alignment(mouse6, dataset=read_dataset_info(folder)["rig"])
    said = []
    options = {"framing": "facelift", "poses": "nearest", "num_samples": 2}
    report = process_recording(settings_for(recording, tmp_path / "data", **options), say=said.append)
    check_alignment(mouse6, dataset=read_dataset_info(tmp_path / "data")["rig"])
    cameras = read_sample(tmp_path / "data" / "sample_000000").cameras
    torch.testing.assert_close(cameras.c2w, mouse6.cameras(SIZE).c2w, atol=1e-5, rtol=1e-5)
    assert report["label_error_rms"] > 0.05 and any("not the true ones" in line for line in said)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_interrupted_import_resumes_to_the_same_files(dataset, recording, tmp_path):
    import shutil

    whole, _ = dataset
    partial = tmp_path / "data_mouse"
    shutil.copytree(whole, partial)
    shutil.rmtree(partial / "sample_000001")
    shutil.rmtree(partial / "sample_000004")
    for name in ("data_mouse_train.txt", "data_mouse_val.txt", "quality_report.json", "quality_report.html"):
        (partial / name).unlink()
    kept = (partial / "sample_000000" / "images" / "cam_000.png").stat().st_mtime_ns
    process_recording(settings_for(recording, partial, workers=1))
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


def test_empty_mask_is_an_error_that_can_be_skipped(recording, clouds, tmp_path, render):
    from synthetic.dataset import video_writer

    broken = tmp_path / "broken"
    (broken / "masks").mkdir(parents=True)
    for path in (recording / "simpleclick_undist").glob("*.mp4"):
        (broken / "masks" / path.name).write_bytes(path.read_bytes())
    (broken / "new_cam.pkl").write_bytes((recording / "new_cam.pkl").read_bytes())
    width, height = load_real_rig(width=WIDTH)[0].sizes[0]
    writer = video_writer(broken / "masks" / "2.mp4", (width, height), 100.0, 0)
    for index in range(NUM_FRAMES):
        picture = np.zeros((height, width, 3), np.uint8)
        if index != 3:
            picture[height // 2 - 20 : height // 2 + 20, width // 2 - 30 : width // 2 + 30] = 255
        writer.send(picture)
    writer.close()
    settings = ImportSettings(recording / "videos_undist", broken, tmp_path / "data", image_size=64)
    with pytest.raises(ValueError, match=r"2.mp4: the mask of frame 3 is empty.*--on_bad_frame skip"):
        process_recording(replace(settings, on_bad_frame="error"))
    said = []
    assert process_recording(settings, said.append)["skipped_frames"] == 1
    assert "frame 3 was left out: empty mask in 2.mp4" in said
    info = read_dataset_info(tmp_path / "data")
    assert info["frames"] == [0, 1, 2, 4, 5] and list(info["skipped_frames"]) == ["3"]


def test_synthetic_mouse_script_writes_a_recording(tmp_path):
    folder = tmp_path / "recording"
    arguments = [
        "--as_recording",
        "--output_dir",
        str(folder),
        "--num_samples",
        "2",
        "--video_width",
        "128",
        "--fps",
        "5",
    ]
    load_script().main(arguments)
    assert len(json.loads((folder / "truth.json").read_text())["frames"]) == 2
    settings = ImportSettings(folder / "videos_undist", folder, tmp_path / "data", image_size=64)
    assert process_recording(settings)["num_samples"] == 2
    with pytest.raises(ValueError, match="not empty"):
        load_script().main(arguments)


def test_command_line_imports_and_refuses(recording, tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "process_mouse_data.py")]
    where = ["--video_dir", str(recording / "videos_undist"), "--meta_dir", str(recording)]
    output = tmp_path / "data_mouse"
    done = subprocess.run(
        [*script, *where, "--output_dir", str(output), "--num_samples", "2000", "--image_size", "64"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{NUM_FRAMES} samples instead of 2000" in done.stdout and "dataset.json" in done.stdout
    assert json.loads((output / "quality_report.json").read_text())["num_samples"] == NUM_FRAMES
    assert "<img " in (output / "quality_report.html").read_text()
    missing = subprocess.run(
        [*script, "--video_dir", str(tmp_path / "none"), "--meta_dir", str(recording), "--output_dir", str(output)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert missing.returncode == 1 and "--video_dir" in missing.stderr and "Traceback" not in missing.stderr
    bad = subprocess.run([*script, *where, "--output_dir", str(output), "--framing", "tight"], capture_output=True)
    assert bad.returncode == 2
