"""Finding the videos of a recording and decoding them in order: a random seek misses the frame in many files.

Stored pixels are what calibrations count: nothing that a file says about turning its images for display is obeyed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

MASK_FOLDERS = ("simpleclick_undist", "masks")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
OTHER_VIDEOS = (".avi", ".mov", ".mkv", ".m4v", ".webm", ".mpg", ".mpeg", ".wmv", ".h264", ".ts")
OTHER_IMAGES = (".heic", ".heif", ".avif", ".jfif", ".webp", ".gif", ".jp2", ".dng", ".exr")
MAX_PIXELS = 50_000_000  # of a frame, by default: 8K has 33 million
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras use of files of 16
DEPTH_FRAMES = 8  # images of a folder that are asked how many
# Pixel formats of three planes, a byte each, brightness first. Brightness is all that a mask needs, and of a part of a
# frame the planes' own parts can be taken; frames of other formats are turned into colors as a whole.
PLANAR_FORMATS = ("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p")
FULL_RANGE, LIMITED_RANGE = (0, 255), (16, 235)  # black and white, as brightness is stored in most videos


@dataclass(frozen=True)
class Video:
    """One camera's video: one file, consecutive chunks, or one image file per frame."""

    files: tuple[Path, ...]
    counts: tuple[int, ...]  # frames of each file
    size: tuple[int, int]  # (width, height)
    rate: float  # frames/s, 0 where it is not known (images)
    white: int = 255  # largest value of an image file's pixels

    @property
    def num_frames(self) -> int:
        return sum(self.counts)

    @property
    def is_images(self) -> bool:
        return self.files[0].suffix.lower() in IMAGE_SUFFIXES

    @property
    def name(self) -> str:
        if len(self.files) == 1:
            return str(self.files[0])
        return f"{self.files[0].parent} ({len(self.files)} {'images' if self.is_images else 'chunks'})"


class VideoReader:
    """Reads frames of one video in increasing order; for `with`."""

    def __init__(self, video: Video) -> None:
        self.video = video
        self._container, self._frames = None, iter(())  # the open file, and its frames still to come
        self._next = 0  # number of the first of them
        self._chunk, self._chunk_end = -1, 0
        self._converter = VideoReformatter()

    def read_bgr(self, index: int) -> np.ndarray:
        """Frame `index` as [h, w, 3] uint8 BGR. Frames before the last one read are an error."""
        return _colors_of(self._image(index)) if self.video.is_images else self._colors(self._frame(index))

    def read_part(self, index: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """`read_bgr(index)[y : y + height, x : x + width]`, without making colors of the rest.

        All of a large frame's colors take a third as long as decoding it.
        """
        if self.video.is_images:
            return _colors_of(self._image(index)[y : y + height, x : x + width])
        frame = self._frame(index)
        if frame.format.name not in PLANAR_FORMATS or not width * height:
            return self._colors(frame)[y : y + height, x : x + width]
        # From even pixels on, since color may have half of the resolution.
        left, top = x & ~1, y & ~1
        right, bottom = min(x + width + 1 & ~1, frame.width), min(y + height + 1 & ~1, frame.height)
        part = av.VideoFrame(right - left, bottom - top, frame.format.name)
        part.colorspace, part.color_range = frame.colorspace, frame.color_range
        for number in range(3):
            target, whole = _plane(part, number), _plane(frame, number)
            column, row = left >> (whole.shape[1] < frame.width), top >> (whole.shape[0] < frame.height)
            target[:] = whole[row : row + target.shape[0], column : column + target.shape[1]]
        return self._colors(part)[y - top : y - top + height, x - left : x - left + width]

    def read_mask(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """The brightness [h, w] uint8 of frame `index` of a mask video, and which values are black and white.

        Where the file's format allows it no colors are made of it, which would take half as long as decoding. Of
        several colors the brightest counts: masks of a palette are red or green. Of cut-outs it is alpha that counts.
        """
        if self.video.is_images:
            image = self._image(index)
            cut_out = image.shape[2] == 4 and image[..., 3].min() < 255
            return (image[..., 3] if cut_out else _colors_of(image).max(axis=-1)), FULL_RANGE
        frame = self._frame(index)
        if frame.format.name in PLANAR_FORMATS:
            return _plane(frame, 0), FULL_RANGE if frame.format.name.startswith("yuvj") else LIMITED_RANGE
        return self._colors(frame).max(axis=-1), FULL_RANGE

    def _image(self, index: int) -> np.ndarray:
        """Reads image file `index`, [h, w, 1, 3 or 4] uint8 as OpenCV orders its channels."""
        self._check_order(index)
        self._next, path, white = index + 1, self.video.files[index], self.video.white
        image = _read_image(path, self.video.size)
        if image.dtype == np.uint8:
            return image
        if image.max() > white:
            before = f"{path} holds {image.max()}, images before end at {white}"
            raise ValueError(f"{before}; save all with 8, or full 16 bits")
        return (image * (255.0 / white)).round().astype(np.uint8)

    def _frame(self, index: int) -> av.VideoFrame:
        """Decodes up to frame `index`."""
        self._check_order(index)
        while self._chunk_end <= index:
            self.__exit__()
            self._chunk += 1
            self._next = self._chunk_end
            self._chunk_end += self.video.counts[self._chunk]
            self._container = _open(self.video.files[self._chunk])
            self._frames = self._container.decode(video=0)
        path, frame, size = self.video.files[self._chunk], None, self.video.size
        while self._next <= index:
            try:
                frame = next(self._frames, None)
            except av.FFmpegError:
                frame = None
            if frame is None:
                held = f"although the file says it holds {self.video.counts[self._chunk]} frames"
                remedy = f"cut all videos (ffmpeg -i {path.name} -frames:v {self._next} -crf 12 cut.mp4)"
                broken = f"{path}: frame {self._next} cannot be decoded {held}"
                raise ValueError(f"{broken}; it is truncated or damaged: copy it anew, or {remedy}")
            self._next += 1
        if (frame.width, frame.height) != size:
            raise ValueError(f"{path}: frame {index} is {frame.width} x {frame.height}, not {size[0]} x {size[1]}")
        if frame.rotation:
            turned = f"{path} is stored lying and to be shown turned by {frame.rotation} degrees"
            raise ValueError(f"{turned}; store it upright: ffmpeg -i {path.name} -crf 12 upright.mp4")
        return frame

    def _check_order(self, index: int) -> None:
        if not self._next <= index < self.video.num_frames:
            asked = f"frame {index} was asked for after frame {self._next - 1} of {self.video.num_frames}"
            raise ValueError(f"{self.video.name}: {asked}; frames are read in increasing order")

    def _colors(self, frame: av.VideoFrame) -> np.ndarray:
        """Makes [h, w, 3] uint8 BGR, as OpenCV does of the same frame."""
        colors = self._converter.reformat(frame, format="bgr24", interpolation=Interpolation.BICUBIC, threads=1)
        return _plane(colors, 0, 3).reshape(frame.height, frame.width, 3)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_) -> None:
        if self._container is not None:
            self._container.close()
            self._container, self._frames = None, iter(())


def find_videos(
    folder: Path | str, num_cameras: int, flag: str, max_pixels: int = MAX_PIXELS, names: Sequence[str] = ()
) -> list[Video]:
    """Finds the videos of cameras 0..n-1, in one of three layouts.

    `0.mp4 ... 5.mp4` (MAMMAL); `Camera1/0.mp4[, 3000.mp4, ...]` (DANNCE, chunks named by their first frame); folders
    `0 ... 5` or `Camera1 ... Camera6` of images, one per frame, in the order of the numbers in their names.
    flag: the command-line flag that named the folder, for messages. max_pixels: larger frames are refused. names: of
    the calibration's cameras; where folders are called so they are theirs, whatever their numbers, and others belong
    to cameras that were left out. Raises ValueError for what is missing: cameras, chunks, images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder} is not a folder; 0.mp4 ... {num_cameras - 1}.mp4 are expected in it")
    if {path.name for path in folder.iterdir() if path.is_dir()} & set(names):
        names = [*names, ""]
    else:  # one more, which must not be there
        template = "Camera{1}" if (folder / "Camera1").is_dir() else "{0}" if (folder / "0").is_dir() else "{0}.mp4"
        names = [template.format(index, index + 1) for index in range(num_cameras + 1)]
    missing = [name for name in names[:-1] if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{flag} {folder} lacks {', '.join(missing)} of {num_cameras} cameras{_hint(folder)}")
    if names[-1] and (folder / names[-1]).exists():
        raise ValueError(f"{flag} {folder} holds {names[-1]}, but the calibration has only {num_cameras} cameras")
    videos = []
    for path in (folder / name for name in names[:-1]):
        videos.append(probe(_files_in(path) if path.is_dir() else [path], max_pixels))
        chunks = [] if path.is_file() or videos[-1].is_images else [frame_number(file) for file in videos[-1].files]
        if chunks == list(range(len(chunks))):  # chunks may also be counted
            continue
        for file, number, start in zip(videos[-1].files, chunks, np.cumsum([0, *videos[-1].counts])):
            if number != start:
                held = f"{file} is named by its first frame, but the chunks before it hold {start} frames"
                remedy = "put it back, since frame n must be the same instant in every video"
                raise ValueError(f"{held}: a chunk before it is missing or cut; {remedy}")
    # One camera may film darkness: how many bits count is one number for all of them.
    return [replace(video, white=max(video.white for video in videos)) for video in videos]


def _files_in(folder: Path) -> list[Path]:
    """The video chunks of a camera's folder, or its images, in order."""
    if files := [path for path in folder.glob("*.mp4") if path.stem.isdecimal()]:
        return sorted(files, key=frame_number)
    images = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        expected = "chunks named by their first frame (0.mp4, 3000.mp4) nor images"
        raise ValueError(f"{folder} holds neither {expected}{_hint(folder)}")
    for path in images:
        if not re.search(r"\d", path.stem):
            raise ValueError(f"{path}: images are named by frame numbers (000000.png, frame_12.jpg)")
    images.sort(key=frame_number)
    for path, other in zip(images, images[1:]):
        if frame_number(other) != frame_number(path) + 1:
            raise ValueError(f"{folder}: {path.name} is followed by {other.name}; every frame needs one image")
    return images


def frame_number(path: Path) -> int:
    """The frame number of an image or chunk: the last number in its name."""
    return int(re.findall(r"\d+", path.stem)[-1])


def _hint(folder: Path) -> str:
    """What else a folder holds, in words, and the command that makes what is wanted of it."""
    inner = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and (path / "0.mp4").is_file()]
    if inner:
        return f"; its folder(s) {', '.join(inner)} hold videos: did you mean one of these?"
    for path in sorted(folder.iterdir()):
        convert = f"; {path.name} is there: convert it and its like"
        if path.suffix.lower() in OTHER_VIDEOS:
            return f"{convert} with ffmpeg -i {path.name} -crf 12 {path.stem}.mp4 (masks with -crf 0)"
        if path.suffix.lower() in OTHER_IMAGES:
            return f"{convert} to PNG (magick mogrify -format png *{path.suffix})"
    return ""


def probe(files: list[Path], max_pixels: int = MAX_PIXELS) -> Video:
    """Reads counts, size and rate of one camera's file(s) from their headers. Of images the first one's size is taken.

    Raises ValueError for files that are cut short or whose frames are too large.
    """
    if files[0].suffix.lower() in IMAGE_SUFFIXES:
        first, white = _read_image(files[0], max_pixels=max_pixels), 255
        size = first.shape[1::-1]
        if first.dtype == np.uint16:  # of which cameras often use 10 or 12 bits
            chosen = [files[int(index)] for index in np.linspace(0, len(files) - 1, DEPTH_FRAMES)]
            brightest = max(int(_read_image(path, size).max()) for path in chosen)
            white = next(2**bits - 1 for bits in DEPTHS if brightest < 2**bits)
        return Video(tuple(files), (1,) * len(files), size, 0.0, white)
    counts, sizes, rates = [], set(), []
    for path in files:
        with _open(path) as container:
            stream = container.streams.video[0]
            size = stream.codec_context.width, stream.codec_context.height
            _check_size(path, size, max_pixels)
            # An index (mp4) knows more than the header's count: what an edit cut off stays in the file.
            entries = list(stream.index_entries) if "mp4" in container.format.name else []
            held, shown = path.stat().st_size, sum(not entry.is_discard for entry in entries)
            whole = sum(entry.pos + entry.size <= held for entry in entries)
            if whole < len(entries):
                remedy = f"cut all videos and masks to what it holds (ffmpeg -i {path.name} -frames:v {whole} -crf 12"
                found = f"video {path} is truncated: {whole} of its {len(entries)} frames are there"
                raise ValueError(f"{found}; copy it anew, or {remedy} cut.mp4)")
            # Where a header does not count its frames, it says how long they last.
            rate, seconds = float(stream.guessed_rate or 0.0), float((stream.duration or 0) * (stream.time_base or 0))
            count = shown or stream.frames or round(seconds * rate)
        if count <= 0:
            raise ValueError(f"video {path} says that it holds {count} frames; it is damaged or no video")
        counts, sizes, rates = [*counts, count], sizes | {size}, [*rates, rate]
    if len(sizes) != 1:
        raise ValueError(f"the chunks in {files[0].parent} have different image sizes: {sorted(sizes)}")
    return Video(tuple(files), tuple(counts), sizes.pop(), rates[0])


def _check_size(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        limit = f"{path} is {size[0]} x {size[1]} pixels, {max_pixels / 1e6:g} million are allowed"
        raise ValueError(f"{limit}; scale videos and calibration down, or allow more with --max_megapixels")


def _read_image(path: Path, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads an image file's stored pixels [h, w, 1, 3 or 4], uint8 or uint16; size: (w, h) that is expected."""
    found, image, what = None, None, f"{path}: the image of frame {frame_number(path)}"
    try:
        with Image.open(path) as header:  # before the pixels: a large file must not take the memory first
            found = header.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is far too large an image ({error}); scale images and calibration down") from None
    except (OSError, SyntaxError, ValueError):  # OpenCV knows more formats
        pass
    if found is not None and size is None:
        _check_size(path, found, max_pixels)
    if None in (found, size) or found == size:
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        found = found if image is None else image.shape[1::-1]
    if found is not None and size not in (None, found):
        raise ValueError(f"{what} is {found[0]} x {found[1]}, the first one is {size[0]} x {size[1]}")
    if image is None:
        raise ValueError(f"{what} cannot be read; it is missing or damaged")
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path} holds {image.dtype} pixels; 8 or 16 bits are expected: save it as PNG")
    return image if image.ndim == 3 else image[..., None]


def _colors_of(image: np.ndarray) -> np.ndarray:
    return image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)


def _open(path: Path) -> InputContainer:
    if not path.is_file():
        raise ValueError(f"video {path} does not exist")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError):
        raise ValueError(f"video {path} cannot be opened; it is truncated, damaged or of an unknown codec") from None
    kinds = sorted({stream.type for stream in container.streams}) or ["none"]
    covers = [s for s in container.streams.video if av.stream.Disposition.attached_pic in s.disposition]
    if not container.streams.video or covers:
        raise ValueError(f"{path} holds no video (its streams: {', '.join(kinds)}); a video of the animal is expected")
    if container.streams.video[0].codec_context is None:
        raise ValueError(f"video {path} cannot be opened; its codec is unknown")
    # One thread each: the import runs as many decoders as it was given processes.
    container.streams.video[0].codec_context.thread_count = 1
    return container


def _plane(frame: av.VideoFrame, number: int, channels: int = 1) -> np.ndarray:
    """[h, channels w] uint8, one plane of a frame, not copied."""
    plane = frame.planes[number]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : channels * plane.width]
