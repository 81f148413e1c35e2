"""Finding the videos of a recording and decoding them in order: a random seek misses the frame in many files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MASK_FOLDERS = ("simpleclick_undist", "masks")
RATE_TOLERANCE = 1e-3  # relative


@dataclass(frozen=True)
class Video:
    """One camera's video: one file, or consecutive chunks. size: (width, height)."""

    files: tuple[Path, ...]
    counts: tuple[int, ...]
    size: tuple[int, int]
    rate: float

    @property
    def num_frames(self) -> int:
        return sum(self.counts)

    @property
    def name(self) -> str:
        return str(self.files[0]) if len(self.files) == 1 else f"{self.files[0].parent} ({len(self.files)} chunks)"


class VideoReader:
    """Reads frames of one video in increasing order. Close it, or use it in `with`."""

    def __init__(self, video: Video) -> None:
        self.video = video
        self._chunk, self._capture = -1, None
        self._next = 0  # number of the frame the decoder stands before
        self._chunk_end = 0

    def read(self, index: int) -> np.ndarray:
        """Frame `index` as [h, w, 3] uint8, RGB. Frames before the last one read are an error."""
        import cv2

        if not self._next <= index < self.video.num_frames:
            raise ValueError(
                f"{self.video.name}: frame {index} was asked for after frame {self._next - 1} of "
                f"{self.video.num_frames}; frames are read in increasing order"
            )
        while self._next <= index:
            if self._next == self._chunk_end:
                self._open_next_chunk()
            if not self._capture.grab():
                raise ValueError(
                    f"{self.video.files[self._chunk]}: frame {self._next} cannot be decoded although the file says it "
                    f"holds {self.video.counts[self._chunk]} frames; it is truncated or damaged"
                )
            self._next += 1
        ok, frame = self._capture.retrieve()
        if not ok or frame.shape[1::-1] != self.video.size:
            raise ValueError(f"{self.video.files[self._chunk]}: frame {index} cannot be decoded")
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def _open_next_chunk(self) -> None:
        self.close()
        self._chunk += 1
        self._capture = _open(self.video.files[self._chunk])
        self._chunk_end += self.video.counts[self._chunk]

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def find_videos(folder: Path | str, num_cameras: int, flag: str) -> list[Video]:
    """The videos of cameras 0..n-1: `0.mp4 ... 5.mp4` (MAMMAL), or `Camera1/0.mp4[, 3000.mp4, ...]` (DANNCE).

    flag: the command-line flag that named the folder, for messages.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder} is not a folder; 0.mp4 ... {num_cameras - 1}.mp4 are expected in it")
    flat = [folder / f"{index}.mp4" for index in range(num_cameras)]
    if (folder / "Camera1").is_dir():
        listed = [_chunks(folder / f"Camera{index + 1}") for index in range(num_cameras)]
        extra = folder / f"Camera{num_cameras + 1}"
    else:
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
        if abs(video.rate - first.rate) > RATE_TOLERANCE * first.rate:
            raise ValueError(f"{video.name} runs at {video.rate:g} frames/s, {first.name} at {first.rate:g}")
    for video, mask in zip(videos, masks, strict=True):
        if video.size != mask.size:
            raise ValueError(
                f"{mask.name} is {mask.size[0]} x {mask.size[1]}, its video {video.name} {video.size[0]} x "
                f"{video.size[1]}; masks must be of the same (undistorted or raw) pictures"
            )


def probe(files: list[Path]) -> Video:
    """Counts, size and rate of one camera's file(s), from their headers."""
    import cv2

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
    files = [path for path in folder.glob("*.mp4") if re.fullmatch(r"\d+", path.stem)] if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder} holds no chunk named by its first frame (0.mp4, 3000.mp4, ...)")
    return sorted(files, key=lambda path: int(path.stem))


def _open(path: Path):
    import cv2

    if not path.is_file():
        raise ValueError(f"video {path} does not exist")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise ValueError(f"video {path} cannot be opened; it is truncated, damaged or of an unknown codec")
    return capture
