"""The import of recordings as a process: interrupted, in parts, in several processes, with masks found, of images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from filmed_spheres import COUNT, SCRIPT, SIZE, command, contents, film, full, settings_for

from multiview.sample import read_sample, read_split
from recording.importer import process_recording
from recording.masks import segment
from recording.video import VideoReader, find_videos


def wait_for(moment, process=None) -> None:
    deadline = time.monotonic() + 100
    while not moment() and (process is None or process.poll() is None):
        assert time.monotonic() < deadline, "the import neither ended nor came to the moment"
        time.sleep(0.001)


def all_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True  # decoders and their server have ended by themselves
    return False


def test_stopped_at_any_moment_and_repeated_gives_the_same_files(filmed, whole, tmp_path):
    """One import, begun again and again: nothing half written has a name, and no process is left behind."""
    output, masks = tmp_path / "data", tmp_path / ".data.masks"
    moments = [  # where, what must be there, how often; who is stopped then: a process or several, by which signal
        (masks, ".*.bits.*.tmp", 1, "1", signal.SIGTERM), (masks, "*.npz", 6, "1", signal.SIGHUP),
        (output, ".sample_*.part/images/*", 2, "2", signal.SIGKILL), (output, "sample_*", COUNT, "1", signal.SIGKILL),
    ]  # fmt: skip
    stopped = 0
    for folder, pattern, number, workers, how in moments:
        # As a command: a fork of a process with threads would deadlock.
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *command(filmed, output, "--workers", workers)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        wait_for(lambda: len(list(folder.glob(pattern))) >= number, process)  # noqa: B023
        stopped += process.poll() is None
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
        if how != signal.SIGKILL and process.returncode:
            assert process.returncode == 143 and "repeat the command to continue" in out and "Traceback" not in err
        wait_for(lambda: all_gone(process.pid))  # noqa: B023
        listed = [line for name in ("train", "val") if (path := output / f"data_mouse_{name}.txt").is_file()
                  for line in read_split(path)]  # fmt: skip
        for sample in {*listed, *output.glob("sample_*")}:
            assert read_sample(sample).rgba.shape == (6, 4, SIZE, SIZE)
    assert stopped >= 3
    masks.mkdir(exist_ok=True)
    (masks / ".1.bits.01234567.tmp").touch()
    image = output / "sample_000000" / "images" / "cam_000.png"
    kept = image.stat().st_mtime_ns
    process_recording(settings_for(filmed, output, workers=2))
    assert contents(output) == contents(whole) and not masks.exists() and image.stat().st_mtime_ns == kept


def test_shards_together_are_one_run(filmed, whole, tmp_path):
    output = tmp_path / "data"
    assert process_recording(settings_for(filmed, output, shard="1/2")) is None
    assert len(list(output.glob("sample_*"))) == COUNT // 2 and not list(output.glob("*.txt"))
    report = process_recording(settings_for(filmed, output, shard="0/2"))
    assert report["grade"] and contents(output) == contents(whole)
    with pytest.raises(ValueError, match="split: blocks there, random asked for"):
        process_recording(settings_for(filmed, output, split="random"))


def test_animals_are_found_where_there_are_no_masks(tmp_path):
    folder = tmp_path / "recording"
    truth = film(folder, 20, noise=4.0, flicker=0.04, radius=55.0, step_deg=137.5)
    shutil.rmtree(folder / "masks")
    video = find_videos(folder / "videos_undist", 6, "--video_dir")[2]
    for method in ("median", "mog2"):
        for frame, mask in zip((0, 7, 14), segment(video, [0, 7, 14], method), strict=True):
            true = truth[frame][2]
            assert (full(mask) & true).sum() > 0.9 * (full(mask) | true).sum()
    report = process_recording(settings_for(folder, tmp_path / "data", segment="median", num_samples=3))
    assert report["num_samples"] == 3
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["segment"] == "median"
    for method, message in (("none", "--segment median"), ("rembg", "pip install rembg")):
        with pytest.raises(ValueError, match=message):
            process_recording(settings_for(folder, tmp_path / "other", segment=method))


def test_folders_of_pictures_give_what_the_videos_give(filmed, whole, tmp_path):
    pictures = tmp_path / "pictures"
    for name in ("videos_undist", "masks"):
        for k, video in enumerate(find_videos(filmed / name, 6, "--video_dir")):
            folder = pictures / name / f"Camera{k + 1}"
            folder.mkdir(parents=True)
            with VideoReader(video) as reader:
                for frame in range(COUNT):
                    cv2.imwrite(str(folder / f"frame_{frame:04d}.png"), reader.read_bgr(frame))
    shutil.copy(filmed / "new_cam.pkl", pictures)
    process_recording(settings_for(pictures, tmp_path / "data"))
    expected, made = contents(whole), contents(tmp_path / "data")
    same = [name for name in expected if name.startswith("sample")]
    assert len(same) == 7 * COUNT and all(expected[name] == made[name] for name in same)
    camera = pictures / "masks" / "Camera2"
    cv2.imwrite(str(camera / "frame_0001.png"), np.zeros((10, 10, 3), np.uint8))
    with pytest.raises(ValueError, match=r"Camera2/frame_0001.png: the image of frame 1 is 10 x 10"):
        process_recording(settings_for(pictures, tmp_path / "other"))
    (camera / "frame_0001.png").unlink()
    with pytest.raises(ValueError, match="frame_0000.png is followed by frame_0002.png"):
        process_recording(settings_for(pictures, tmp_path / "other"))
