"""Finding the videos of a recording and decoding them in order: a random seek misses the frame in many files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recording.masks import HALF

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

MASK_FOLDERS = ("simpleclick_undist", "masks")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
RATE_TOLERANCE = 1e-3  # relative
# Pixel formats of three planes, a byte each, brightness first. Brightness is all that a mask needs, and of a part of a
# frame the planes' own parts can be taken; frames of other formats are turned into colours as a whole.
PLANAR_FORMATS = ("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p")
LIMITED_HALF = 125  # in the place of HALF where brightness counts from 16 to 235, as in most videos


@dataclass(frozen=True)
class Video:
    """One camera's video: one file, consecutive chunks, or one picture file per frame. size: (width, height).

    counts: frames of each file. rate: frames/s, 0 where it is not known (pictures).
    """

    files: tuple[Path, ...]
    counts: tuple[int, ...]
    size: tuple[int, int]
    rate: float

    @property
    def num_frames(self) -> int:
        return sum(self.counts)

    @property
    def is_pictures(self) -> bool:
        return self.files[0].suffix.lower() in IMAGE_SUFFIXES

    @property
    def name(self) -> str:
        if len(self.files) == 1:
            return str(self.files[0])
        return f"{self.files[0].parent} ({len(self.files)} {'pictures' if self.is_pictures else 'chunks'})"


class VideoReader:
    """Reads frames of one video in increasing order. Close it, or use it in `with`."""

    def __init__(self, video: Video) -> None:
        self.video = video
        self._chunk, self._container = -1, None
        self._frames: Iterator[VideoFrame] = iter(())  # still to come of the open file
        self._next = 0  # number of the first of them
        self._chunk_end = 0
        self._converter = None

    def read(self, index: int) -> np.ndarray:
        """Frame `index` as [h, w, 3] uint8, RGB. Frames before the last one read are an error."""
        return np.ascontiguousarray(self.read_bgr(index)[..., ::-1])

    def read_bgr(self, index: int) -> np.ndarray:
        """As `read`, in the decoder's own order of channels: a picture less to copy."""
        if self.video.is_pictures:
            return self._picture(index)
        return self._colours(self._frame(index))

    def read_part(self, index: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """`read_bgr(index)[y : y + height, x : x + width]`, without making colours of the rest.

        All of a large frame's colours take a third as long as decoding it.
        """
        if self.video.is_pictures:
            return self._picture(index)[y : y + height, x : x + width]
        frame = self._frame(index)
        if frame.format.name not in PLANAR_FORMATS or not width * height:
            return self._colours(frame)[y : y + height, x : x + width]
        # From even pixels on, since colour may have half of the resolution.
        left, top = x & ~1, y & ~1
        part = _cut(frame, left, top, min(x + width + 1 & ~1, frame.width), min(y + height + 1 & ~1, frame.height))
        return self._colours(part)[y - top : y - top + height, x - left : x - left + width]

    def read_mask(self, index: int) -> tuple[np.ndarray, int]:
        """Brightness [h, w] uint8 of frame `index` of a mask video, and the level above which it shows the animal.

        Where the file's format allows it no colours are made of it, which would take half as long as decoding.
        """
        if self.video.is_pictures:
            return self._picture(index)[..., 2], HALF
        frame = self._frame(index)
        if frame.format.name in PLANAR_FORMATS:
            return _plane(frame, 0), HALF if frame.format.name.startswith("yuvj") else LIMITED_HALF
        return self._colours(frame)[..., 2], HALF

    def _picture(self, index: int) -> np.ndarray:
        self._check_order(index)
        self._next = index + 1
        return _read_picture(self.video.files[index], index, self.video.size)

    def _frame(self, index: int) -> VideoFrame:
        """Decodes up to frame `index`."""
        import av

        self._check_order(index)
        while self._chunk_end <= index:
            self._open_next_chunk()
        path, frame = self.video.files[self._chunk], None
        while self._next <= index:
            try:
                frame = next(self._frames, None)
            except av.FFmpegError:
                frame = None
            if frame is None:
                raise ValueError(
                    f"{path}: frame {self._next} cannot be decoded although the file says it holds "
                    f"{self.video.counts[self._chunk]} frames; it is truncated or damaged"
                )
            self._next += 1
        if (frame.width, frame.height) != self.video.size:
            raise ValueError(
                f"{path}: frame {index} is {frame.width} x {frame.height}, the video says it is "
                f"{self.video.size[0]} x {self.video.size[1]}"
            )
        if frame.rotation:
            raise ValueError(
                f"{path} is stored lying and to be shown turned by {frame.rotation} degrees; store it upright: "
                f"ffmpeg -i {path.name} -crf 12 upright.mp4"
            )
        return frame

    def _check_order(self, index: int) -> None:
        if not self._next <= index < self.video.num_frames:
            raise ValueError(
                f"{self.video.name}: frame {index} was asked for after frame {self._next - 1} of "
                f"{self.video.num_frames}; frames are read in increasing order"
            )

    def _open_next_chunk(self) -> None:
        self.close()
        self._chunk += 1
        self._next = self._chunk_end
        self._chunk_end += self.video.counts[self._chunk]
        self._container = _open(self.video.files[self._chunk])
        self._frames = self._container.decode(video=0)

    def _colours(self, frame: VideoFrame) -> np.ndarray:
        """[h, w, 3] uint8 BGR, as OpenCV makes them of the same frame."""
        from av.video.reformatter import Interpolation, VideoReformatter

        self._converter = self._converter or VideoReformatter()
        colours = self._converter.reformat(frame, format="bgr24", interpolation=Interpolation.BICUBIC, threads=1)
        return _plane(colours, 0, 3).reshape(frame.height, frame.width, 3)

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container, self._frames = None, iter(())

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def find_videos(folder: Path | str, num_cameras: int, flag: str) -> list[Video]:
    """The videos of cameras 0..n-1, in one of three layouts.

    `0.mp4 ... 5.mp4` (MAMMAL); `Camera1/0.mp4[, 3000.mp4, ...]` (DANNCE, chunks named by their first frame); folders
    `0 ... 5` or `Camera1 ... Camera6` of pictures, one per frame, in the order of the numbers in their names.
    flag: the command-line flag that named the folder, for messages.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder} is not a folder; 0.mp4 ... {num_cameras - 1}.mp4 are expected in it")
    if (folder / "Camera1").is_dir():
        listed = [_chunks(folder / f"Camera{index + 1}") for index in range(num_cameras)]
        extra = folder / f"Camera{num_cameras + 1}"
    elif (folder / "0").is_dir():
        listed = [_chunks(folder / str(index)) for index in range(num_cameras)]
        extra = folder / str(num_cameras)
    else:
        flat = [folder / f"{index}.mp4" for index in range(num_cameras)]
        missing = [path.name for path in flat if not path.is_file()]
        if missing:
            inner = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and (path / "0.mp4").is_file()]
            hint = f"; its folder(s) {', '.join(inner)} hold videos: did you mean one of these?" if inner else ""
            raise ValueError(f"{flag} {folder} lacks {', '.join(missing)} of {num_cameras} cameras{hint}")
        listed = [[path] for path in flat]
        extra = folder / f"{num_cameras}.mp4"
    if extra.exists():
        raise ValueError(f"{flag} {folder} holds {extra.name}, but the calibration has only {num_cameras} cameras")
    return [probe(files) for files in listed]


def check_videos(videos: list[Video], masks: list[Video]) -> None:
    """All videos show the same instants: equal frame counts and rates; masks as large as their pictures."""
    first = videos[0]
    for video in (*videos, *masks):
        if video.num_frames != first.num_frames:
            raise ValueError(
                f"{video.name} has {video.num_frames} frames, {first.name} has {first.num_frames}; frame n must be the "
                "same instant in every video, so the counts must be equal"
            )
        if video.rate and first.rate and abs(video.rate - first.rate) > RATE_TOLERANCE * first.rate:
            raise ValueError(f"{video.name} runs at {video.rate:g} frames/s, {first.name} at {first.rate:g}")
    for video, mask in zip(videos, masks):  # no masks where they are still to be found
        if video.size != mask.size:
            raise ValueError(
                f"{mask.name} is {mask.size[0]} x {mask.size[1]}, its video {video.name} {video.size[0]} x "
                f"{video.size[1]}; masks must be of the same (undistorted or raw) pictures"
            )


def probe(files: list[Path]) -> Video:
    """Counts, size and rate of one camera's file(s), from their headers. Of pictures the first one's size is taken."""
    if files[0].suffix.lower() in IMAGE_SUFFIXES:
        height, width = _read_picture(files[0], 0).shape[:2]
        return Video(tuple(files), (1,) * len(files), (width, height), 0.0)
    counts, sizes, rates = [], set(), []
    for path in files:
        with _open(path) as container:
            stream = container.streams.video[0]
            rates.append(float(stream.guessed_rate or 0.0))
            sizes.add((stream.codec_context.width, stream.codec_context.height))
            # Where the header does not count its frames, it says how long they last.
            seconds = float((stream.duration or 0) * (stream.time_base or 0))
            counts.append(stream.frames or round(seconds * rates[-1]))
        if counts[-1] <= 0:
            raise ValueError(f"video {path} says that it holds {counts[-1]} frames; it is damaged or no video")
    if len(sizes) != 1:
        raise ValueError(f"the chunks in {files[0].parent} have different picture sizes: {sorted(sizes)}")
    return Video(tuple(files), tuple(counts), sizes.pop(), rates[0])


def _chunks(folder: Path) -> list[Path]:
    """The video chunks of a camera's folder, or its pictures, in order."""
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: a camera's videos or pictures are missing")
    files = [path for path in folder.glob("*.mp4") if re.fullmatch(r"\d+", path.stem)]
    if files:
        return sorted(files, key=lambda path: int(path.stem))
    pictures = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        raise ValueError(f"{folder} holds neither chunks named by their first frame (0.mp4, 3000.mp4) nor pictures")
    unnumbered = [path.name for path in pictures if not re.search(r"\d", path.stem)]
    if unnumbered:
        raise ValueError(f"{folder / unnumbered[0]}: pictures are named by frame numbers (000000.png, frame_12.jpg)")
    numbered = sorted((int(re.findall(r"\d+", path.stem)[-1]), path) for path in pictures)
    for (number, path), (following, other) in zip(numbered, numbered[1:]):
        if following != number + 1:
            raise ValueError(f"{folder}: {path.name} is followed by {other.name}; every frame needs one picture")
    return [path for _, path in numbered]


def _read_picture(path: Path, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
    import cv2

    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError(f"{path}: the picture of frame {index} cannot be read; it is missing or damaged")
    if size is not None and picture.shape[1::-1] != size:
        raise ValueError(
            f"{path}: the picture of frame {index} is {picture.shape[1]} x {picture.shape[0]}, the first one is "
            f"{size[0]} x {size[1]}"
        )
    return picture


def _open(path: Path) -> InputContainer:
    import av

    if not path.is_file():
        raise ValueError(f"video {path} does not exist")
    try:
        container = av.open(str(path))
    except av.FFmpegError:
        container = None
    if container is None or not container.streams.video or container.streams.video[0].codec_context is None:
        raise ValueError(f"video {path} cannot be opened; it is truncated, damaged or of an unknown codec")
    # One thread each: the import runs as many decoders as it was given processes.
    container.streams.video[0].codec_context.thread_count = 1
    return container


def _plane(frame: VideoFrame, number: int, channels: int = 1) -> np.ndarray:
    """[h, channels w] uint8, one plane of a frame, not copied."""
    plane = frame.planes[number]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : channels * plane.width]


def _cut(frame: VideoFrame, left: int, top: int, right: int, bottom: int) -> VideoFrame:
    """A part of a frame of one of PLANAR_FORMATS; left and top are even."""
    import av

    part = av.VideoFrame(right - left, bottom - top, frame.format.name)
    part.colorspace, part.color_range = frame.colorspace, frame.color_range
    for number in range(3):
        own, whole = _plane(part, number), _plane(frame, number)
        x, y = left >> (whole.shape[1] < frame.width), top >> (whole.shape[0] < frame.height)
        own[:] = whole[y : y + own.shape[0], x : x + own.shape[1]]
    return part
