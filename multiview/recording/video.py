"""Finding the videos of a recording and decoding them in order: a random seek misses the frame in many files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MASK_FOLDERS = ("simpleclick_undist", "masks")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
RATE_TOLERANCE = 1e-3  # relative
# Pixel formats whose brightness comes first, a byte each, and is all that a mask needs. It counts from 16 to 235, so
# that half of it stands where half of the other formats' 0..255 does.
LUMA_FORMATS = (b"I420", b"Y42B", b"444P")
LUMA_HALF, HALF = 125, 127  # what is brighter is animal


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
        self._chunk, self._capture = -1, None
        self._next = 0  # number of the frame the decoder stands before
        self._chunk_end = 0
        self._frame: np.ndarray | None = None
        self._channel: np.ndarray | None = None
        self._binary: np.ndarray | None = None
        self._luma = False  # whether the open file is read as brightness alone

    def read(self, index: int) -> np.ndarray:
        """Frame `index` as [h, w, 3] uint8, RGB. Frames before the last one read are an error."""
        return np.ascontiguousarray(self.read_bgr(index)[..., ::-1])

    def read_bgr(self, index: int) -> np.ndarray:
        """As `read`, in the decoder's own order of channels, and valid until the next call: a picture less to copy."""
        self._advance(index, luma=False)
        if self.video.is_pictures:
            return _read_picture(self.video.files[index], index, self.video.size)
        ok, self._frame = self._capture.retrieve(self._frame)  # into the memory of the last one
        return self._checked(ok, self._frame, index)

    def read_mask(self, index: int) -> np.ndarray:
        """[h, w] uint8: 1 where frame `index` of a mask video is bright, 0 elsewhere. Valid until the next call.

        Where the file's format allows it no colours are made of it, which would take half as long as decoding. Frames
        of one reader are read either by this or by `read_bgr`.
        """
        import cv2

        self._advance(index, luma=True)
        if self._luma:
            with _without_warnings():
                ok, self._channel = self._capture.retrieve(self._channel)
            self._checked(ok, self._channel, index)
        elif self.video.is_pictures:
            self._channel = cv2.extractChannel(_read_picture(self.video.files[index], index, self.video.size), 2)
        else:
            ok, self._frame = self._capture.retrieve(self._frame)
            self._channel = cv2.extractChannel(self._checked(ok, self._frame, index), 2, self._channel)
        half = LUMA_HALF if self._luma else HALF
        _, self._binary = cv2.threshold(self._channel, half, 1, cv2.THRESH_BINARY, self._binary)
        return self._binary

    def _advance(self, index: int, luma: bool) -> None:
        """Decodes up to frame `index`."""
        if not self._next <= index < self.video.num_frames:
            raise ValueError(
                f"{self.video.name}: frame {index} was asked for after frame {self._next - 1} of "
                f"{self.video.num_frames}; frames are read in increasing order"
            )
        if self.video.is_pictures:
            self._next = index + 1
            return
        while self._chunk_end <= index:
            self._open_next_chunk(luma)
        while self._next <= index:
            if not self._capture.grab():
                raise ValueError(
                    f"{self.video.files[self._chunk]}: frame {self._next} cannot be decoded although the file says it "
                    f"holds {self.video.counts[self._chunk]} frames; it is truncated or damaged"
                )
            self._next += 1

    def _checked(self, ok: bool, frame: np.ndarray, index: int) -> np.ndarray:
        if not ok or frame.shape[1::-1] != self.video.size:
            raise ValueError(f"{self.video.files[self._chunk]}: frame {index} cannot be decoded")
        return frame

    def _open_next_chunk(self, luma: bool) -> None:
        self.close()
        self._chunk += 1
        self._next = self._chunk_end
        self._chunk_end += self.video.counts[self._chunk]
        path = self.video.files[self._chunk]
        self._capture, self._luma = _open_mask(path) if luma else (_open(path), False)

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()
            self._capture = None

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
    import cv2

    if files[0].suffix.lower() in IMAGE_SUFFIXES:
        height, width = _read_picture(files[0], 0).shape[:2]
        return Video(tuple(files), (1,) * len(files), (width, height), 0.0)
    counts, sizes, rates = [], set(), []
    for path in files:
        capture = _open(path)
        counts.append(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        sizes.add((int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))))
        rates.append(float(capture.get(cv2.CAP_PROP_FPS)))
        capture.release()
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


def _open(path: Path, *options: int):
    import cv2

    if not path.is_file():
        raise ValueError(f"video {path} does not exist")
    # One thread each: the import runs as many decoders as it was given processes.
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1, *options])
    if not capture.isOpened():
        raise ValueError(f"video {path} cannot be opened; it is truncated, damaged or of an unknown codec")
    return capture


def _open_mask(path: Path) -> tuple[object, bool]:
    """The opened video, and whether what it gives is its brightness [h, w] instead of colours."""
    import cv2

    capture = _open(path)
    code = int(capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT)) & 0xFFFFFFFF
    if code.to_bytes(4, "little") not in LUMA_FORMATS:
        return capture, False
    capture.release()
    with _without_warnings():
        return _open(path, cv2.CAP_PROP_CONVERT_RGB, 0), True


@contextmanager
def _without_warnings() -> Iterator[None]:
    """OpenCV warns of every frame of which it gives the first plane that there are others."""
    import cv2

    log = cv2.utils.logging
    level = log.getLogLevel()
    log.setLogLevel(log.LOG_LEVEL_ERROR)
    try:
        yield
    finally:
        log.setLogLevel(level)
