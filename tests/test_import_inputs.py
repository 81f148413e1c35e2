"""What people really bring: recordings with other bit depths, masks and layouts, cut files, full disks, two runs."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import file_limit
from filmed_spheres import COUNT, SCRIPT, command, ffmpeg, full, settings_for
from PIL import Image

from multiview.files import owned_folder
from recording.importer import process_recording
from recording.masks import clean_mask, read_masks
from recording.video import VideoReader, find_videos


@pytest.fixture(scope="module")
def frames(filmed):
    """name -> [camera][frame] BGR of the recording."""
    result = {"videos_undist": [], "masks": []}
    for name, cameras in result.items():
        for video in find_videos(filmed / name, 6, "--video_dir"):
            with VideoReader(video) as reader:
                cameras.append([reader.read_bgr(index).copy() for index in range(COUNT)])
    return result


@pytest.fixture
def copied(filmed, tmp_path) -> Path:
    return Path(shutil.copytree(filmed, tmp_path / "recording"))


def save_images(folder, frames, change=lambda image: image, suffix=".png") -> None:
    """Puts images in the place of a folder's videos. frames: [camera][frame]. change: BGR frame -> what is saved."""
    shutil.rmtree(folder)
    for camera, listed in enumerate(frames):
        (folder / str(camera)).mkdir(parents=True)
        for index, image in enumerate(listed):
            cv2.imwrite(str(folder / str(camera) / f"{index:04d}{suffix}"), change(image))


def animal(image):
    return (image[..., 0] > 127).astype(np.uint8)


MASKS = {  # what is saved of a mask: one dark red class, as annotation tools save, and cut-outs among others
    "0 and 1": animal,
    "16 bits": lambda image: animal(image) * np.uint16(65535),
    "0 and 1 of 16 bits": lambda image: animal(image).astype(np.uint16),
    "10 of 16 bits": lambda image: animal(image) * np.uint16(1023),
    "palette": lambda image: animal(image)[..., None] * np.array([0, 0, 100], np.uint8),
    "cut-out": lambda image: np.dstack([np.full_like(image, 60), animal(image) * np.uint8(255)]),
}


@pytest.mark.parametrize("kind", [*MASKS, "0 and 1, video", "palette, video"])
def test_masks_of_every_kind_show_the_same_animal(frames, tmp_path, kind):
    folder = tmp_path / "masks"  # of two cameras, which will do
    folder.mkdir()
    save_images(folder, frames["masks"][:2], MASKS[kind.removesuffix(", video")])
    for camera in range(2) if kind.endswith("video") else ():
        options = ("-pix_fmt", "yuv420p", "-crf", 0)
        ffmpeg("-r", 25, "-i", folder / str(camera) / "%04d.png", *options, folder / f"{camera}.mp4")
        shutil.rmtree(folder / str(camera))
    for camera, video in enumerate(find_videos(folder, 2, "--mask_dir")):
        for mask, image in zip(read_masks(video, list(range(COUNT))), frames["masks"][camera], strict=True):
            wrong = np.count_nonzero(full(mask) != full(clean_mask(image[..., 2])))
            assert wrong <= (30 if kind == "palette, video" else 0)  # colors have half of the resolution


def test_images_of_ten_bits_and_turned_ones_are_read_as_stored(frames, tmp_path):
    for name, change, tolerance in (("ten", lambda image: image.astype(np.uint16) * 4, 2), ("turned", None, 0)):
        folder, shown = tmp_path / name, [camera[:2] for camera in frames["videos_undist"]]
        folder.mkdir()
        save_images(folder, shown, change or (lambda image: image))
        for path in folder.rglob("*.png") if change is None else ():
            with Image.open(path) as image:
                exif = image.getexif()
                exif[274] = 6  # to be shown turned by 90 degrees
                image.save(path, exif=exif)
        for camera, video in enumerate(find_videos(folder, 6, "--video_dir")):
            with VideoReader(video) as reader:
                part = reader.read_part(1, 10, 20, 100, 90).astype(int)
                assert np.abs(part - shown[camera][1][20:110, 10:110]).max() <= tolerance


def chunks(folder, frames):
    for path in [*folder.glob("videos_undist/*.mp4"), *folder.glob("masks/*.mp4")]:
        target = path.parent / f"Camera{int(path.stem) + 1}"
        target.mkdir()
        for start in (0, 4):  # frames 2 and 3 are in neither
            trim = f"trim=start_frame={start}:end_frame={start + 2}"
            ffmpeg("-i", path, "-vf", trim, "-crf", 0, target / f"{start}.mp4")


def convert(name, *arguments):
    def spoil(folder, frames):
        (folder / name).rename(folder / "saved.mp4")
        ffmpeg("-i", folder / "saved.mp4", *arguments, folder / name)

    return spoil


def several_levels(folder, frames):
    def marked(image):
        return np.where((image == 0) & (np.arange(len(image)) < 100)[:, None, None], 110, image)  # another class

    save_images(folder / "masks", frames["masks"], marked)


def empty_masks(folder, frames):
    save_images(folder / "masks", frames["masks"], np.zeros_like)


def damaged(folder, frames):
    path = folder / "masks" / "3.mp4"
    saved = path.read_bytes()  # its index promises frames whose data is damaged
    at, end = saved.index(b"mdat") + 100, saved.index(b"moov") - 4
    path.write_bytes(saved[:at] + b"\0" * (end - at) + saved[end:])


def cut(share, *arguments):
    def spoil(folder, frames):
        path = folder / "videos_undist" / "3.mp4"
        if arguments:
            convert("videos_undist/3.mp4", *arguments)(folder, frames)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return spoil


def other_container(folder, frames):
    video = folder / "videos_undist" / "0.mp4"
    ffmpeg("-i", video, "-c", "copy", video.with_suffix(".avi"))
    video.unlink()


def images_of_camera_0(make):
    def spoil(folder, frames):
        save_images(folder / "videos_undist", [[]] * 6)
        make(folder / "videos_undist" / "0")

    return spoil


def other_first_number(folder, frames):
    for name in ("videos_undist", "masks"):
        save_images(folder / name, frames[name])
        (folder / name / "4" / "0000.png").rename(folder / name / "4" / f"{COUNT:04d}.png")


REFUSED = {  # what is wrong: (what is done to a recording, what is said)
    "chunks": (chunks, r"Camera1/4.mp4 is named by its first frame, but the chunks before it hold 2 frames"),
    "inverted": (convert("masks/2.mp4", "-vf", "negate", "-crf", 0),
                 r"masks/2.mp4: the mask of frame 0 covers nearly the whole image.*negate"),
    "several levels": (several_levels, r"masks/0 .*frame 0 has several levels or colors"),
    "missing": (lambda folder, _: (folder / "videos_undist" / "4.mp4").unlink(), r"lacks 4.mp4 of 6 cameras"),
    "short": (convert("videos_undist/2.mp4", "-frames:v", 5), r"videos_undist/2.mp4 has 5 frames, .*0.mp4 has 8"),
    "small mask": (convert("masks/2.mp4", "-vf", "scale=96:84"),
                   r"masks/2.mp4 is 96 x 84, its video .*videos_undist/2.mp4 192 x 170"),
    "empty masks": (empty_masks, r"every frame has an empty mask in at least one view \(frame 0: empty mask in 0 "),
    "damaged": (damaged, r"masks/3.mp4: frame \d cannot be decoded"),
    "halved": (cut(0.5), r"videos_undist/3.mp4 cannot be opened; it is truncated"),
    "cut short": (cut(0.67, "-c", "copy", "-movflags", "faststart"),
                  r"videos_undist/3.mp4 is truncated: \d of its 8 frames are there.*ffmpeg -i 3.mp4"),
    "avi": (other_container, r"lacks 0.mp4 of 6 cameras; 0.avi is there: .*ffmpeg -i 0.avi -crf 12 0.mp4"),
    "heic": (images_of_camera_0(lambda folder: (folder / "0.heic").touch()),
             r"videos_undist/0 holds neither .* nor images; 0.heic is there: convert"),
    "sound": (lambda folder, _: ffmpeg("-f", "lavfi", "-i", "sine=duration=0.1", folder / "videos_undist/1.mp4"),
              r"1.mp4 holds no video \(its streams: audio\)"),
    "float images": (images_of_camera_0(lambda folder: cv2.imwrite(f"{folder}/0000.tiff", np.ones((9, 9), np.float32))),
                     r"0000.tiff holds float32 pixels; 8 or 16 bits"),
    "other first number": (other_first_number, r"4/0001.png is the first image of its folder, .*0/0000.png that of"),
    "huge": (images_of_camera_0(lambda folder: Image.new("L", (16000, 5000)).save(folder / "0.png")),
             r"0.png is 16000 x 5000 pixels, 50 million are allowed.*--max_megapixels"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_right_is_refused_in_one_line_that_names_the_file(copied, frames, tmp_path, wrong):
    spoil, message = REFUSED[wrong]
    spoil(copied, frames)
    workers = 2 if wrong == "damaged" else 1  # what a worker process raises arrives
    with pytest.raises(ValueError, match=message) as caught:
        process_recording(settings_for(copied, tmp_path / "data", workers=workers))
    assert "\n" not in str(caught.value) and not (tmp_path / "data").exists()
    assert not (tmp_path / ".data.masks" / ".owner.json").exists()


def test_trimmed_videos_count_the_frames_that_they_show(filmed, tmp_path):
    ffmpeg("-ss", 2 / 25, "-i", filmed / "masks" / "0.mp4", "-c", "copy", tmp_path / "0.mp4")
    (video,) = find_videos(tmp_path, 1, "--mask_dir")
    with VideoReader(video) as reader:
        assert len([reader.read_mask(index) for index in range(video.num_frames)]) == COUNT - 2


@pytest.fixture(scope="module")
def importing():
    """scripts/process_mouse_data.py as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    import process_mouse_data

    yield process_mouse_data
    sys.path.remove(str(SCRIPT.parent))


def test_frames_without_an_animal_are_listed_and_the_rest_is_imported(copied, frames, tmp_path, importing, capsys):
    blank = frames["masks"][1][2]
    save_images(copied / "masks", frames["masks"], lambda image: image * (not np.array_equal(image, blank)))
    with pytest.raises(ValueError, match="1 frames were left out .*--on_bad_frame skip"):
        importing.main(command(copied, tmp_path / "data", "--workers", "1", "--num_samples", "2000000000"))
    assert "frame 2 was left out: empty mask in 1 (8 images)" in capsys.readouterr().out
    assert json.loads((tmp_path / "data" / "quality_report.json").read_text())["num_samples"] == COUNT - 1
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert info["frames"] == [0, 1, 3, 4, 5, 6, 7] and list(info["skipped_frames"]) == ["2"]
    importing.main(command(copied, tmp_path / "data", "--on_bad_frame", "skip", "--workers", "1"))  # agreed to
    with pytest.raises(ValueError, match=r"masks/1 .*: the mask of frame 2 is empty"):
        importing.main(command(copied, tmp_path / "other", "--on_bad_frame", "error", "--workers", "1"))


BAD = {
    "--output_dir README.md is a file": {"--output_dir": "README.md"},
    "the following arguments are required: --video_dir": {"--video_dir": None},
    "--image_size: must be at least 16": {"--image_size": "8"},
    "--body_length must be positive": {"--body_length": "-1"},
    "--segment median makes masks, --mask_dir m gives them": {"--segment": "median", "--mask_dir": "m"},
    "--shard must be i/n with 0 <= i < n, got 2/2": {"--shard": "2/2"},
    "--framing: invalid choice: 'tight'": {"--framing": "tight"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_exit_2_and_say_which(importing, monkeypatch, capsys, message):
    monkeypatch.chdir(SCRIPT.parent.parent)
    words = {"--video_dir": "v", "--meta_dir": "m", "--output_dir": "o"} | BAD[message]
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
    with (
        monkeypatch.context() as short,
        file_limit(50_000),
        pytest.raises(ValueError, match="cannot write .*data: File"),
    ):
        short.setattr("recording.rectify.png_bytes", lambda image: bytes(60_000))  # of which the system takes a part
        process_recording(settings_for(filmed, tmp_path / "data"))
    assert not list((tmp_path / "data").glob("sample_*"))
    monkeypatch.undo()
    monkeypatch.setattr("recording.importer.MIN_FOR_TWO_BLOCKS", COUNT)  # frames beside a block are in no list
    said = []
    process_recording(settings_for(filmed, tmp_path / "data"), said.append)
    assert "4 samples are in neither list: they lie within 0.5 s of the border between the two" in said
    assert not list((tmp_path / "data").glob(".*")) and not (tmp_path / ".data.masks").exists()


def test_a_second_import_into_one_folder_is_refused_at_once(filmed, tmp_path):
    for owned, shards in (("", ("0/1",)), ("shard_0_of_2", ("0/1", "0/2"))):
        with owned_folder(tmp_path / ".data.masks" / owned):
            for shard in shards:
                with pytest.raises(ValueError, match="is in use by process"):
                    process_recording(settings_for(filmed, tmp_path / "data", shard=shard))
            if owned:
                assert process_recording(settings_for(filmed, tmp_path / "data", shard="1/2")) is None
