"""Frames decoded for the import are OpenCV's, bit by bit, whatever the video's format; parts are parts of the whole."""

import cv2
import numpy as np
import pytest
from filmed_spheres import ffmpeg

from recording.video import PLANAR_FORMATS, VideoReader, probe

COUNT, WIDTH, HEIGHT = 3, 198, 142
BT709 = ("-colorspace", "bt709", "-vf", "scale=out_color_matrix=bt709")
FORMATS = {
    "yuv420p": (),
    "yuv420p bt709": BT709,
    "yuvj420p": ("-color_range", "pc"),
    "yuv422p": (),
    "yuv444p": (),
    "yuvj444p bt709": ("-color_range", "pc", *BT709),
    "yuv420p10le": (),
    "rgb24": ("-c:v", "libx264rgb"),
}


def write(path, pictures, *options) -> None:
    height, width = pictures.shape[1:3]
    ffmpeg(
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "25", "-i", "-", "-c:v", "libx264",
        "-qp", "6", *options, path, content=pictures.tobytes(),
    )  # fmt: skip


def opencvs(path) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    frames = [capture.read()[1] for _ in range(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))]
    capture.release()
    return frames


@pytest.fixture(scope="module", params=FORMATS)
def video(request, tmp_path_factory):
    """Blotches of every colour and size; the expected frames."""
    path = tmp_path_factory.mktemp("formats") / "0.mp4"
    rng = np.random.default_rng(4)
    small = rng.integers(0, 256, (COUNT, HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8)
    pictures = np.stack([cv2.resize(one, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) for one in small])
    write(path, pictures, "-pix_fmt", request.param.split()[0], *FORMATS[request.param])
    frames = opencvs(path)
    assert len(frames) == COUNT and np.abs(frames[1][..., ::-1].astype(int) - pictures[1]).mean() < 12
    return path, frames, request.param


def test_frames_and_their_parts_are_opencvs(video):
    path, frames, name = video
    found, rng = probe([path]), np.random.default_rng(5)
    assert (found.counts, found.size, found.rate) == ((COUNT,), (WIDTH, HEIGHT), 25.0)
    with VideoReader(found) as reader:
        for index, frame in enumerate(frames):
            np.testing.assert_array_equal(reader.read_bgr(index), frame)
    for _ in range(12):
        width, height = (int(rng.integers(1, side + 1)) for side in (WIDTH, HEIGHT))
        x, y = int(rng.integers(0, WIDTH - width + 1)), int(rng.integers(0, HEIGHT - height + 1))
        with VideoReader(found) as reader:
            for index, frame in enumerate(frames):
                part = reader.read_part(index, x, y, width, height)
                np.testing.assert_array_equal(part, frame[y : y + height, x : x + width], f"{x} {y} {width} {height}")
    with VideoReader(found) as reader:
        assert reader.read_part(0, 3, 3, 0, 0).shape == (0, 0, 3)
        assert (reader._frame(1).format.name in PLANAR_FORMATS) == (not name.startswith(("yuv420p10", "rgb")))


def test_masks_are_halves_of_every_format(tmp_path):
    """The levels on either side of the half, as the colours have it."""
    pictures = np.repeat(np.arange(256, dtype=np.uint8)[None, None, :, None], 3, axis=3).repeat(16, axis=1)
    for name, options in FORMATS.items():
        path = tmp_path / "0.mp4"
        write(path, pictures, "-pix_fmt", name.split()[0], *options)
        with VideoReader(probe([path])) as reader:
            image, (black, white) = reader.read_mask(0)
        mask = image > (black + white) // 2
        expected = opencvs(path)[0][..., 2] > 127
        assert mask.shape == (16, 256) and (mask != expected).any(axis=0).sum() <= 2, name  # colours are rounded
        assert 120 < mask.any(axis=0).argmax() < 136 and mask[:, 140:].all(), name


def test_videos_stored_lying_are_refused_and_frames_are_counted_where_the_header_does_not(tmp_path):
    write(tmp_path / "0.mp4", np.zeros((COUNT, 32, 48, 3), np.uint8), "-pix_fmt", "yuv420p")
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "0.mp4", "-c", "copy", tmp_path / "1.mp4")
    for read in (lambda r: r.read_bgr(0), lambda r: r.read_mask(0), lambda r: r.read_part(0, 0, 0, 4, 4)):
        with VideoReader(probe([tmp_path / "1.mp4"])) as reader, pytest.raises(ValueError, match=r"1.mp4 .* upright"):
            read(reader)
    ffmpeg("-i", tmp_path / "0.mp4", "-c", "copy", "-f", "matroska", tmp_path / "1.mp4")
    assert probe([tmp_path / "1.mp4"]).counts == (COUNT,)
