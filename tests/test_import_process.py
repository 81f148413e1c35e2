"""The import of recordings as a process: interrupted, in parts, in several processes, other layouts, spoilt input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from filmed_spheres import film

from multiview.sample import read_sample, read_split
from recording.importer import process_recording
from recording.segment import segment
from recording.settings import ImportSettings
from recording.video import VideoReader, find_videos

ROOT = Path(__file__).resolve().parent.parent
COUNT, SIZE = 12, 48


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filmed") / "recording"
    return folder, film(folder, COUNT)


def settings_for(folder, output, **options):
    defaults = {"image_size": SIZE, "framing": "fill", "workers": 1}
    return ImportSettings(folder / "videos_undist", folder, output, **{**defaults, **options})


@pytest.fixture(scope="module")
def whole(filmed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "data"
    process_recording(settings_for(filmed[0], folder))
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spoilt(filmed, tmp_path):
    """A copy of the recording to damage."""
    return Path(shutil.copytree(filmed[0], tmp_path / "spoilt"))


# ---- interrupted, in parts --------------------------------------------------------------------------------------


def import_command(filmed, output, *flags: str) -> list[str]:
    """What `settings_for` says, as a command: a fork of a process with threads would deadlock."""
    return [
        sys.executable, str(ROOT / "scripts" / "process_mouse_data.py"),
        "--video_dir", str(filmed[0] / "videos_undist"), "--meta_dir", str(filmed[0]), "--output_dir", str(output),
        "--image_size", str(SIZE), "--framing", "fill", *flags,
    ]  # fmt: skip


def killed_import(command, moment):
    """Runs the import and kills it when moment() says so; False if it was done before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while process.poll() is None and not moment() and time.monotonic() < deadline:
        time.sleep(0.001)
    killed = process.poll() is None
    process.kill()
    process.wait()
    assert time.monotonic() < deadline, "the import neither ended nor came to the moment"
    return killed


def test_killed_at_any_moment_and_repeated_gives_the_same_files(filmed, whole, tmp_path):
    output = tmp_path / "data"
    command, masks = import_command(filmed, output, "--workers", "1"), tmp_path / ".data.masks"

    def reached(folder, pattern, number):
        return lambda: len(list(folder.glob(pattern))) >= number

    moments = [
        reached(masks, ".1.bits.*.tmp", 1),
        reached(masks, "*.npz", 6),
        reached(output, "dataset.json", 1),
        reached(output, ".sample_*.part/images/*", 2),
        reached(output, "sample_*", 4),
        reached(output, "sample_*/images/cam_003.png", 8),
        reached(output, "sample_*", COUNT),
    ]
    killed = 0
    for moment in moments:
        killed += killed_import(command, moment)
        listed = [line for name in ("train", "val") if (path := output / f"data_mouse_{name}.txt").is_file()
                  for line in read_split(path)]  # fmt: skip
        for sample in {*listed, *output.glob("sample_*")}:
            assert read_sample(sample).rgba.shape == (6, 4, SIZE, SIZE)  # nothing half written has a name
    assert killed >= 5
    process_recording(settings_for(filmed[0], output))
    assert contents(output) == contents(whole)
    assert not masks.exists()


def test_several_processes_killed_leave_nobody_behind(filmed, whole, tmp_path):
    output = tmp_path / "data"
    command = import_command(filmed, output)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 100
    while not list(output.glob("sample_*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break  # decoders and their server have ended by themselves
        time.sleep(0.05)
    else:
        pytest.fail("processes of a killed import are still there")
    process_recording(settings_for(filmed[0], output, workers=2))
    assert contents(output) == contents(whole)


def test_shards_together_are_one_run(filmed, whole, tmp_path):
    output = tmp_path / "data"
    assert process_recording(settings_for(filmed[0], output, shard=(1, 2))) is None
    assert len(list(output.glob("sample_*"))) == COUNT // 2 and not list(output.glob("*.txt"))
    report = process_recording(settings_for(filmed[0], output, shard=(0, 2)))
    assert report["grade"] and contents(output) == contents(whole)
    with pytest.raises(ValueError, match="--shard must be i/n"):
        settings_for(filmed[0], output, shard=(2, 2))


def test_random_split_is_stated_and_repeatable(filmed, whole, tmp_path):
    output = tmp_path / "data"
    shutil.copytree(whole, output)
    with pytest.raises(ValueError, match="split: blocks there, random asked for"):
        process_recording(settings_for(filmed[0], output, split="random"))


# ---- masks by background ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noisy") / "recording"
    truth = film(folder, 30, noise=4.0, flicker=0.04, radius=55.0, step_deg=137.5)
    shutil.rmtree(folder / "masks")
    return folder, truth


@pytest.mark.parametrize("method", ["median", "mog2"])
def test_background_models_find_the_animal(noisy, method):
    folder, truth = noisy
    video = find_videos(folder / "videos_undist", 6, "--video_dir")[2]
    frames = list(range(0, 30, 5))
    overlaps = []
    for frame, mask in zip(frames, segment(video, frames, method), strict=True):
        true = truth["masks"][frame][2]
        overlaps.append((mask.full() & true).sum() / (mask.full() | true).sum())
    assert min(overlaps) > 0.9, overlaps


def test_import_without_mask_videos(noisy, tmp_path):
    folder, _ = noisy
    report = process_recording(settings_for(folder, tmp_path / "data", segment="median", num_samples=4, image_size=96))
    assert report["num_samples"] == 4
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["segment"] == "median"
    with pytest.raises(ValueError, match="--segment median"):
        process_recording(settings_for(folder, tmp_path / "other"))
    with pytest.raises(ValueError, match="pip install rembg"):
        process_recording(settings_for(folder, tmp_path / "other", segment="rembg"))


# ---- other layouts, bad input -----------------------------------------------------------------------------------


def test_folders_of_pictures_give_what_the_videos_give(filmed, whole, tmp_path):
    pictures = tmp_path / "pictures"
    for name in ("videos_undist", "masks"):
        for k, video in enumerate(find_videos(filmed[0] / name, 6, "--video_dir")):
            folder = pictures / name / f"Camera{k + 1}"
            folder.mkdir(parents=True)
            with VideoReader(video) as reader:
                for frame in range(0, COUNT, 4):
                    cv2.imwrite(str(folder / f"frame_{frame // 4:04d}.png"), reader.read_bgr(frame))
    shutil.copy(filmed[0] / "new_cam.pkl", pictures)
    process_recording(settings_for(pictures, tmp_path / "data"))
    given = read_sample(tmp_path / "data" / "sample_000001")
    assert (given.rgba[:, 3] > 0.5).any() and len(list((tmp_path / "data").glob("sample_*"))) == 3
    camera = pictures / "masks" / "Camera2"
    cv2.imwrite(str(camera / "frame_0001.png"), np.zeros((10, 10, 3), np.uint8))
    with pytest.raises(ValueError, match=r"Camera2/frame_0001.png: the image of frame 1 is 10 x 10"):
        process_recording(settings_for(pictures, tmp_path / "other"))
    (camera / "frame_0001.png").unlink()
    with pytest.raises(ValueError, match="frame_0000.png is followed by frame_0002.png"):
        process_recording(settings_for(pictures, tmp_path / "other"))


def test_truncated_video_names_file_and_frame(filmed, tmp_path, monkeypatch):
    folder = spoilt(filmed, tmp_path)
    for name in ("videos_undist", "masks"):
        path = folder / name / "3.mp4"
        saved = path.read_bytes()
        # The index of a real truncated file is gone or, as here, promises frames whose data is damaged.
        at = saved.index(b"mdat")
        path.write_bytes(saved[: at + 4] + saved[at + 4 : at + 600] + b"\0" * (len(saved) - at - 600))
        with pytest.raises(ValueError, match=rf"{name}/3.mp4"):
            process_recording(settings_for(folder, tmp_path / "data", workers=1))
        path.write_bytes(saved[: len(saved) // 2])
        with pytest.raises(ValueError, match=rf"{name}/3.mp4 cannot be opened; it is truncated"):
            process_recording(settings_for(folder, tmp_path / "data"))
        path.write_bytes(saved)


def test_spoilt_recordings_are_refused_in_one_line_that_names_the_file(filmed, tmp_path):
    cases = {
        "missing": r"lacks 4.mp4 of 6 cameras",
        "short": r"videos_undist/2.mp4 has 10 frames, .*0.mp4 has 12",
        "small mask": r"masks/2.mp4 is 96 x 84, its video .*videos_undist/2.mp4 192 x 170",
    }
    from synthetic.dataset import video_writer

    for case, message in cases.items():
        folder = Path(shutil.copytree(filmed[0], tmp_path / case.replace(" ", "_")))
        if case == "missing":
            (folder / "videos_undist" / "4.mp4").unlink()
        else:
            short = case == "short"
            path = folder / ("videos_undist" if short else "masks") / "2.mp4"
            size = (192, 170) if short else (96, 84)
            writer = video_writer(path, size, 25.0, 0)
            for _ in range(10 if short else COUNT):
                writer.send(np.zeros((size[1], size[0], 3), np.uint8))
            writer.close()
        with pytest.raises(ValueError, match=message) as caught:
            process_recording(settings_for(folder, tmp_path / "data"))
        assert "\n" not in str(caught.value)


def test_error_in_another_process_arrives(filmed, tmp_path):
    folder = spoilt(filmed, tmp_path)
    from synthetic.dataset import video_writer

    writer = video_writer(folder / "masks" / "1.mp4", (192, 170), 25.0, 0)
    for _ in range(COUNT):
        writer.send(np.zeros((170, 192, 3), np.uint8))
    writer.close()
    settings = settings_for(folder, tmp_path / "data", workers=2)
    with pytest.raises(ValueError, match=r"masks/1.mp4: the mask of frame 0 is empty"):
        process_recording(replace(settings, on_bad_frame="error"))
    with pytest.raises(ValueError, match="every frame has an empty mask"):
        process_recording(settings)
