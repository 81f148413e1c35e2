"""What people really bring: recordings with other bit depths, masks and layouts, cut files, full disks, two runs."""

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from filmed_spheres import film
from PIL import Image

from multiview.files import owned_folder
from recording.importer import process_recording
from recording.masks import clean_mask
from recording.segment import read_masks
from recording.settings import ImportSettings
from recording.video import VideoReader, find_videos

ROOT = Path(__file__).resolve().parent.parent
COUNT, SIZE, WIDTH, HEIGHT = 6, 32, 192, 170
SCRIPT = ROOT / "scripts" / "process_mouse_data.py"


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filmed") / "recording"
    film(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def frames(filmed):
    """name -> [camera][frame] BGR of the recording."""
    result = {}
    for name in ("videos_undist", "masks"):
        result[name] = []
        for video in find_videos(filmed / name, 6, "--video_dir"):
            with VideoReader(video) as reader:
                result[name].append([reader.read_bgr(index).copy() for index in range(COUNT)])
    return result


def settings_for(folder, output, **options):
    defaults = {"image_size": SIZE, "framing": "fill", "workers": 1}
    return ImportSettings(folder / "videos_undist", folder, output, **{**defaults, **options})


def ffmpeg(*arguments) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)], check=True)


def copied(filmed, tmp_path) -> Path:
    return Path(shutil.copytree(filmed, tmp_path / "recording"))


def as_images(filmed, frames, tmp_path, name, change, suffix=".png") -> Path:
    """The recording with one folder's videos as images; change: BGR frame -> what is saved."""
    folder = copied(filmed, tmp_path)
    shutil.rmtree(folder / name)
    for camera, listed in enumerate(frames[name]):
        (folder / name / str(camera)).mkdir(parents=True)
        for index, image in enumerate(listed):
            cv2.imwrite(str(folder / name / str(camera) / f"{index:04d}{suffix}"), change(image))
    return folder


def palette(image):
    dark = np.zeros_like(image)
    dark[..., 2] = (image[..., 0] > 127) * np.uint8(100)  # one dark red class, as annotation tools save
    return dark


def cut_out(image):
    return np.dstack([np.full_like(image, 60), (image[..., 0] > 127) * np.uint8(255)])


MASKS = {
    "0 and 1": lambda image: (image[..., 0] > 127).astype(np.uint8),
    "16 bits": lambda image: (image[..., 0] > 127).astype(np.uint16) * 65535,
    "0 and 1 of 16 bits": lambda image: (image[..., 0] > 127).astype(np.uint16),
    "10 of 16 bits": lambda image: (image[..., 0] > 127).astype(np.uint16) * 1023,
    "palette": palette,
    "cut-out": cut_out,
}


@pytest.mark.parametrize("kind", [*MASKS, "0 and 1, video", "palette, video"])
def test_masks_of_every_kind_show_the_same_animal(filmed, frames, tmp_path, kind):
    folder = as_images(filmed, frames, tmp_path, "masks", MASKS[kind.removesuffix(", video")]) / "masks"
    for camera in range(6) if kind.endswith("video") else ():
        ffmpeg(
            "-r",
            25,
            "-i",
            folder / str(camera) / "%04d.png",
            "-pix_fmt",
            "yuv420p",
            "-crf",
            0,
            folder / f"{camera}.mp4",
        )
        shutil.rmtree(folder / str(camera))
    for camera, video in enumerate(find_videos(folder, 6, "--mask_dir")):
        for mask, image in zip(read_masks(video, list(range(COUNT))), frames["masks"][camera], strict=True):
            wrong = np.count_nonzero(mask.full() != clean_mask(image[..., 2]).full())
            assert wrong <= (30 if kind == "palette, video" else 0)  # colors have half of the resolution


def test_images_of_ten_bits_and_turned_ones_are_read_as_stored(filmed, frames, tmp_path):
    ten = as_images(filmed, frames, tmp_path / "ten", "videos_undist", lambda image: image.astype(np.uint16) * 4)
    turned = as_images(filmed, frames, tmp_path / "turned", "videos_undist", lambda image: image)
    for path in (turned / "videos_undist").rglob("*.png"):
        with Image.open(path) as image:
            exif = image.getexif()
            exif[274] = 6  # to be shown turned by 90 degrees
            image.save(path, exif=exif)
    for folder, tolerance in ((ten, 2), (turned, 0)):
        for camera, video in enumerate(find_videos(folder / "videos_undist", 6, "--video_dir")):
            with VideoReader(video) as reader:
                part = reader.read_part(1, 10, 20, 100, 90).astype(int)
                assert np.abs(part - frames["videos_undist"][camera][1][20:110, 10:110]).max() <= tolerance


# ---- refused, with the file's name ------------------------------------------------------------------------------


def lose_chunk(folder, frames):
    for name in ("videos_undist", "masks"):
        for camera in range(6):
            target = folder / name / f"Camera{camera + 1}"
            target.mkdir()
            for start in (0, 2, 4):
                path = target / f"{start}.mp4"
                ffmpeg("-i", folder / name / f"{camera}.mp4", "-vf", f"trim=start_frame={start}:end_frame={start + 2}",
                       "-crf", 0, path)  # fmt: skip
            (target / "2.mp4").unlink()


def replace_file(folder, name, *arguments):
    saved = folder / "saved.mp4"
    (folder / name).rename(saved)
    ffmpeg("-i", saved, *arguments, folder / name)


def invert(folder, frames):
    replace_file(folder, "masks/2.mp4", "-vf", "negate", "-crf", 0)


def several_levels(folder, frames):
    shutil.rmtree(folder / "masks")
    for camera, listed in enumerate(frames["masks"]):
        (folder / "masks" / str(camera)).mkdir(parents=True)
        for index, image in enumerate(listed):
            image = image.copy()
            image[:100][image[:100] == 0] = 110  # another class
            cv2.imwrite(str(folder / "masks" / str(camera) / f"{index}.png"), image)


def cut_short(folder, frames):
    replace_file(folder, "videos_undist/3.mp4", "-c", "copy", "-movflags", "faststart")
    path = folder / "videos_undist" / "3.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def other_container(folder, frames):
    ffmpeg("-i", folder / "videos_undist" / "0.mp4", "-c", "copy", folder / "videos_undist" / "0.avi")
    (folder / "videos_undist" / "0.mp4").unlink()


def heic(folder, frames):
    shutil.rmtree(folder / "videos_undist")
    for camera in range(6):
        (folder / "videos_undist" / str(camera)).mkdir(parents=True)
        (folder / "videos_undist" / str(camera) / "0.heic").touch()


def sound(folder, frames):
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.1", folder / "videos_undist" / "1.mp4")


def float_images(folder, frames):
    shutil.rmtree(folder / "videos_undist")
    for camera, listed in enumerate(frames["videos_undist"]):
        (folder / "videos_undist" / str(camera)).mkdir(parents=True)
        for index, image in enumerate(listed):
            cv2.imwrite(str(folder / "videos_undist" / str(camera) / f"{index}.tiff"), image.astype(np.float32) / 255)


def other_first_number(folder, frames):
    for name in ("videos_undist", "masks"):
        shutil.rmtree(folder / name)
        for camera, listed in enumerate(frames[name]):
            (folder / name / str(camera)).mkdir(parents=True)
            for index, image in enumerate(listed[1:]):
                number = index + (camera == 4)
                cv2.imwrite(str(folder / name / str(camera) / f"{number}.png"), image)


def huge(folder, frames):
    shutil.rmtree(folder / "videos_undist")
    for camera in range(6):
        (folder / "videos_undist" / str(camera)).mkdir(parents=True)
    Image.new("L", (16000, 5000)).save(folder / "videos_undist" / "0" / "0.png")


REFUSED = {
    lose_chunk: r"Camera1/4.mp4 is named by its first frame, but the chunks before it hold 2 frames",
    invert: r"masks/2.mp4: the mask of frame 0 covers nearly the whole image.*negate",
    several_levels: r"masks/0 .*frame 0 has several levels or colors",
    cut_short: r"videos_undist/3.mp4 is truncated: \d of its 6 frames are there.*ffmpeg -i 3.mp4",
    other_container: r"lacks 0.mp4 of 6 cameras; 0.avi is there: .*ffmpeg -i 0.avi -crf 12 0.mp4",
    heic: r"videos_undist/0 holds neither .* nor images; 0.heic is there: convert",
    sound: r"1.mp4 holds no video \(its streams: audio\)",
    float_images: r"0.tiff holds float32 pixels; 8 or 16 bits",
    other_first_number: r"4/1.png is the first image of its folder, .*0/0.png that of another",
    huge: r"0.png is 16000 x 5000 pixels, 50 million are allowed.*--max_megapixels",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_right_is_refused_in_one_line_that_names_the_file(filmed, frames, tmp_path, spoil):
    folder = copied(filmed, tmp_path)
    spoil(folder, frames)
    with pytest.raises(ValueError, match=REFUSED[spoil]) as caught:
        process_recording(settings_for(folder, tmp_path / "data"))
    assert "\n" not in str(caught.value) and not (tmp_path / "data").exists()
    assert not (tmp_path / ".data.masks" / ".owner.json").exists()


def test_trimmed_videos_count_the_frames_that_they_show(filmed, tmp_path):
    folder = copied(filmed, tmp_path)
    for name in ("videos_undist", "masks"):
        for camera in range(6):
            path = folder / name / f"{camera}.mp4"
            path.rename(folder / "whole.mp4")
            ffmpeg("-ss", 2 / 25, "-i", folder / "whole.mp4", "-c", "copy", path)
    for video in find_videos(folder / "masks", 6, "--mask_dir"):
        with VideoReader(video) as reader:
            assert len([reader.read_mask(index) for index in range(video.num_frames)]) == COUNT - 2


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def importing():
    """scripts/process_mouse_data.py as a module."""
    spec = importlib.util.spec_from_file_location("process_mouse_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(folder, output, *more) -> list[str]:
    return [
        "--video_dir", str(folder / "videos_undist"), "--meta_dir", str(folder), "--output_dir", str(output),
        "--image_size", str(SIZE), "--framing", "fill", "--num_samples", "2000000000", *more,
    ]  # fmt: skip


def test_frames_without_an_animal_are_listed_and_the_rest_is_imported(
    filmed, frames, tmp_path, importing, capsys, monkeypatch
):
    def blank(image):
        return image * 0 if np.array_equal(image, frames["masks"][1][2]) else image

    folder = as_images(filmed, frames, tmp_path, "masks", blank)
    with pytest.raises(ValueError, match="1 frames were left out .*--on_bad_frame skip"):
        importing.main(flags(folder, tmp_path / "data", "--workers", "1"))
    assert "frame 2 was left out: empty mask in 1 (6 images)" in capsys.readouterr().out
    assert json.loads((tmp_path / "data" / "quality_report.json").read_text())["num_samples"] == COUNT - 1
    report = {"grade": "good", "reasons": [], "skipped_frames": 1, "num_samples": COUNT - 1}
    monkeypatch.setattr("recording.importer.process_recording", lambda settings, say: report)
    importing.main(flags(folder, tmp_path / "data", "--on_bad_frame", "skip"))  # agreed to: no error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"--output_dir": "README.md"}, "--output_dir README.md is a file"),
        ({"--video_dir": None}, "the following arguments are required: --video_dir"),
        ({"--image_size": "8"}, "--image_size: must be at least 16"),
        ({"--body_length": "-1"}, "--body_length must be positive"),
        ({"--segment": "median", "--mask_dir": "m"}, "--segment median makes masks, --mask_dir m gives them"),
        ({"--shard": "2/2"}, "--shard: i/n with 0 <= i < n is expected"),
    ],
)  # fmt: skip
def test_bad_arguments_exit_2_and_say_which(importing, monkeypatch, capsys, given, message):
    monkeypatch.chdir(ROOT)
    words = {"--video_dir": "v", "--meta_dir": "m", "--output_dir": "o"} | given
    with pytest.raises(SystemExit) as stopped:
        importing.parse_arguments([word for pair in words.items() if pair[1] for word in pair])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(filmed, tmp_path, monkeypatch):
    def full(image):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("recording.rectify.png_bytes", full)
    with pytest.raises(ValueError, match="cannot write .*data: No space left on device"):
        process_recording(settings_for(filmed, tmp_path / "data"))
    monkeypatch.undo()
    process_recording(settings_for(filmed, tmp_path / "data"))
    assert not list((tmp_path / "data").glob(".*")) and not (tmp_path / ".data.masks").exists()


def test_a_second_import_into_one_folder_is_refused_at_once(filmed, tmp_path):
    with owned_folder(tmp_path / ".data.masks"):
        with pytest.raises(ValueError, match="is in use by process"):
            process_recording(settings_for(filmed, tmp_path / "data"))
    with owned_folder(tmp_path / ".data.masks" / "shard_0_of_2"):
        for shard in ((0, 1), (0, 2)):
            with pytest.raises(ValueError, match="is in use by process"):
                process_recording(settings_for(filmed, tmp_path / "data", shard=shard))
        assert process_recording(settings_for(filmed, tmp_path / "data", shard=(1, 2))) is None


def test_a_signal_stops_between_items_and_the_next_start_removes_what_is_left(filmed, tmp_path):
    output, masks = tmp_path / "data", tmp_path / ".data.masks"
    command = [sys.executable, str(SCRIPT), *flags(filmed, output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(masks.glob("*.bits*")) and not list(masks.glob(".*.bits*")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "repeat the command to continue" in out and "Traceback" not in err
    assert not list(output.glob("data_mouse_*"))
    masks.mkdir(exist_ok=True)
    (masks / ".1.bits.01234567.tmp").touch()
    assert process_recording(settings_for(filmed, output))["num_samples"] == COUNT
    assert not list(output.glob(".*")) and not masks.exists()
