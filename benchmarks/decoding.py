"""Pure decoding of videos on several processes. Imports little, so that these start in a moment."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Decoding:
    """Seconds on the wall and of all processes for all frames of all videos."""

    wall: float
    cpu: float


def decode(recording: Path, frames: int, workers: int) -> Decoding:
    """All frames of all videos, a video at a time in each of `workers` processes. Their start does not count."""
    paths = sorted(recording.rglob("*.mp4"))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(decode_video, paths))
    for path, (count, *_) in zip(paths, runs, strict=True):
        if count != frames:
            raise ValueError(f"{path.parent.name}/{path.name} was looped to {frames} frames, {count} were decoded")
    _, started, ended, cpu = zip(*runs)
    return Decoding(max(ended) - min(started), sum(cpu))


def decode_video(path: Path) -> tuple[int, float, float, float]:
    """Frames; when it began and ended; CPU seconds."""
    import cv2

    started, cpu = time.time(), time.process_time()
    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    count, frame, more = 0, None, True
    while more:
        more, frame = capture.read(frame)
        count += more
    return count, started, time.time(), time.process_time() - cpu
