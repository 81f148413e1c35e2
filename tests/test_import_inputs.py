"""What people really bring: recordings with other bit depths, masks and layouts, cut files, full disks, two runs."""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from filmed_spheres import COUNT, SCRIPT, command, settings_for
from PIL import Image

from multiview.files import owned_folder
from recording.importer import process_recording
from recording.masks import clean_mask
from recording.segment import read_masks
from recording.video import VideoReader, find_videos
from synthetic.dataset import video_writer


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


def ffmpeg(*arguments) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)], check=True)


def copied(filmed, tmp_path) -> Path:
    return Path(shutil.copytree(filmed, tmp_path / "recording"))


def save_images(folder, frames, change=lambda image: image, suffix=".png") -> None:
    """Puts images in the place of a folder's videos. frames: [camera][frame]. change: BGR frame -> what is saved."""
    shutil.rmtree(folder)
    for camera, listed in enumerate(frames):
        (folder / str(camera)).mkdir(parents=True)
        for index, image in enumerate(listed):
            cv2.imwrite(str(folder / str(camera) / f"{index:04d}{suffix}"), change(image))


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
    folder, cameras = copied(filmed, tmp_path) / "masks", range(2)  # two cameras will do
    save_images(folder, frames["masks"][:2], MASKS[kind.removesuffix(", video")])
    for camera in cameras if kind.endswith("video") else ():
        options = ("-pix_fmt", "yuv420p", "-crf", 0)
        ffmpeg("-r", 25, "-i", folder / str(camera) / "%04d.png", *options, folder / f"{camera}.mp4")
        shutil.rmtree(folder / str(camera))
    for camera, video in enumerate(find_videos(folder, 2, "--mask_dir")):
        for mask, image in zip(read_masks(video, list(range(COUNT))), frames["masks"][camera], strict=True):
            wrong = np.count_nonzero(mask.full() != clean_mask(image[..., 2]).full())
            assert wrong <= (30 if kind == "palette, video" else 0)  # colors have half of the resolution


def test_images_of_ten_bits_and_turned_ones_are_read_as_stored(filmed, frames, tmp_path):
    for name, change, tolerance in (("ten", lambda image: image.astype(np.uint16) * 4, 2), ("turned", None, 0)):
        folder = copied(filmed, tmp_path / name) / "videos_undist"
        save_images(folder, frames["videos_undist"], change or (lambda image: image))
        for path in folder.rglob("*.png") if change is None else ():
            with Image.open(path) as image:
                exif = image.getexif()
                exif[274] = 6  # to be shown turned by 90 degrees
                image.save(path, exif=exif)
        for camera, video in enumerate(find_videos(folder, 6, "--video_dir")):
            with VideoReader(video) as reader:
                part = reader.read_part(1, 10, 20, 100, 90).astype(int)
                assert np.abs(part - frames["videos_undist"][camera][1][20:110, 10:110]).max() <= tolerance


def lose_chunk(folder, frames):
    for name in ("videos_undist", "masks"):
        for camera in range(6):
            target = folder / name / f"Camera{camera + 1}"
            target.mkdir()
            for start in (0, 4):
                trim = f"trim=start_frame={start}:end_frame={start + 2}"
                ffmpeg("-i", folder / name / f"{camera}.mp4", "-vf", trim, "-crf", 0, target / f"{start}.mp4")


def replace_file(folder, name, *arguments):
    saved = folder / "saved.mp4"
    (folder / name).rename(saved)
    ffmpeg("-i", saved, *arguments, folder / name)


def invert(folder, frames):
    replace_file(folder, "masks/2.mp4", "-vf", "negate", "-crf", 0)


def several_levels(folder, frames):
    def marked(image):
        image = image.copy()
        image[:100][image[:100] == 0] = 110  # another class
        return image

    save_images(folder / "masks", frames["masks"], marked)


def missing(folder, frames):
    (folder / "videos_undist" / "4.mp4").unlink()


def short(folder, frames):
    replace_file(folder, "videos_undist/2.mp4", "-frames:v", 5)


def small_mask(folder, frames):
    replace_file(folder, "masks/2.mp4", "-vf", "scale=96:84")


def empty_masks(folder, frames):
    writer = video_writer(folder / "masks" / "1.mp4", (192, 170), 25.0, 0)
    for _ in range(COUNT):
        writer.send(np.zeros((170, 192, 3), np.uint8))
    writer.close()


def damaged(folder, frames):
    path = folder / "masks" / "3.mp4"
    saved = path.read_bytes()  # its index promises frames whose data is damaged
    at, end = saved.index(b"mdat") + 100, saved.index(b"moov") - 4
    path.write_bytes(saved[:at] + b"\0" * (end - at) + saved[end:])


def halved(folder, frames):
    path = folder / "videos_undist" / "3.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_short(folder, frames):
    replace_file(folder, "videos_undist/3.mp4", "-c", "copy", "-movflags", "faststart")
    path = folder / "videos_undist" / "3.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def other_container(folder, frames):
    ffmpeg("-i", folder / "videos_undist" / "0.mp4", "-c", "copy", folder / "videos_undist" / "0.avi")
    (folder / "videos_undist" / "0.mp4").unlink()


def heic(folder, frames):
    save_images(folder / "videos_undist", [[]] * 6)
    (folder / "videos_undist" / "0" / "0.heic").touch()


def sound(folder, frames):
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.1", folder / "videos_undist" / "1.mp4")


def float_images(folder, frames):
    save_images(folder / "videos_undist", frames["videos_undist"], lambda image: image.astype(np.float32), ".tiff")


def other_first_number(folder, frames):
    for name in ("videos_undist", "masks"):
        save_images(folder / name, frames[name])
        (folder / name / "4" / "0000.png").rename(folder / name / "4" / f"{COUNT:04d}.png")


def huge(folder, frames):
    save_images(folder / "videos_undist", [[]] * 6)
    Image.new("L", (16000, 5000)).save(folder / "videos_undist" / "0" / "0.png")


REFUSED = {
    lose_chunk: r"Camera1/4.mp4 is named by its first frame, but the chunks before it hold 2 frames",
    invert: r"masks/2.mp4: the mask of frame 0 covers nearly the whole image.*negate",
    several_levels: r"masks/0 .*frame 0 has several levels or colors",
    missing: r"lacks 4.mp4 of 6 cameras",
    short: r"videos_undist/2.mp4 has 5 frames, .*0.mp4 has 8",
    small_mask: r"masks/2.mp4 is 96 x 84, its video .*videos_undist/2.mp4 192 x 170",
    empty_masks: r"every frame has an empty mask in at least one view",
    damaged: r"masks/3.mp4: frame \d cannot be decoded",
    halved: r"videos_undist/3.mp4 cannot be opened; it is truncated",
    cut_short: r"videos_undist/3.mp4 is truncated: \d of its 8 frames are there.*ffmpeg -i 3.mp4",
    other_container: r"lacks 0.mp4 of 6 cameras; 0.avi is there: .*ffmpeg -i 0.avi -crf 12 0.mp4",
    heic: r"videos_undist/0 holds neither .* nor images; 0.heic is there: convert",
    sound: r"1.mp4 holds no video \(its streams: audio\)",
    float_images: r"0000.tiff holds float32 pixels; 8 or 16 bits",
    other_first_number: r"4/0001.png is the first image of its folder, .*0/0000.png that of another",
    huge: r"0.png is 16000 x 5000 pixels, 50 million are allowed.*--max_megapixels",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_right_is_refused_in_one_line_that_names_the_file(filmed, frames, tmp_path, spoil):
    folder = copied(filmed, tmp_path)
    spoil(folder, frames)
    workers = 2 if spoil is damaged else 1  # what a worker process raises arrives
    with pytest.raises(ValueError, match=REFUSED[spoil]) as caught:
        process_recording(settings_for(folder, tmp_path / "data", workers=workers))
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


@pytest.fixture(scope="module")
def importing():
    """scripts/process_mouse_data.py as a module."""
    spec = importlib.util.spec_from_file_location("process_mouse_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_frames_without_an_animal_are_listed_and_the_rest_is_imported(filmed, frames, tmp_path, importing, capsys):
    folder = copied(filmed, tmp_path)
    blank = frames["masks"][1][2]
    save_images(folder / "masks", frames["masks"], lambda image: image * (not np.array_equal(image, blank)))
    with pytest.raises(ValueError, match="1 frames were left out .*--on_bad_frame skip"):
        importing.main(command(folder, tmp_path / "data", "--workers", "1", "--num_samples", "2000000000"))
    assert "frame 2 was left out: empty mask in 1 (8 images)" in capsys.readouterr().out
    assert json.loads((tmp_path / "data" / "quality_report.json").read_text())["num_samples"] == COUNT - 1
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert info["frames"] == [0, 1, 3, 4, 5, 6, 7] and list(info["skipped_frames"]) == ["2"]
    importing.main(command(folder, tmp_path / "data", "--on_bad_frame", "skip"))  # agreed to: no error
    with pytest.raises(ValueError, match=r"masks/1 .*: the mask of frame 2 is empty"):
        importing.main(command(folder, tmp_path / "other", "--on_bad_frame", "error", "--workers", "1"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"--output_dir": "README.md"}, "--output_dir README.md is a file"),
        ({"--video_dir": None}, "the following arguments are required: --video_dir"),
        ({"--image_size": "8"}, "--image_size: must be at least 16"),
        ({"--body_length": "-1"}, "--body_length must be positive"),
        ({"--segment": "median", "--mask_dir": "m"}, "--segment median makes masks, --mask_dir m gives them"),
        ({"--shard": "2/2"}, "--shard must be i/n with 0 <= i < n, got 2/2"),
        ({"--framing": "tight"}, "--framing: invalid choice: 'tight'"),
    ],
)  # fmt: skip
def test_bad_arguments_exit_2_and_say_which(importing, monkeypatch, capsys, given, message):
    monkeypatch.chdir(SCRIPT.parent.parent)
    words = {"--video_dir": "v", "--meta_dir": "m", "--output_dir": "o"} | given
    with pytest.raises(SystemExit) as stopped:
        importing.parse_arguments([word for pair in words.items() if pair[1] for word in pair])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert importing.parse_arguments(command(Path("v"), Path("o"), "--shard", "1/3"))[1].part == (1, 3)


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
        for shard in ("0/1", "0/2"):
            with pytest.raises(ValueError, match="is in use by process"):
                process_recording(settings_for(filmed, tmp_path / "data", shard=shard))
        assert process_recording(settings_for(filmed, tmp_path / "data", shard="1/2")) is None
