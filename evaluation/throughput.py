"""The import of a recording beside pure decoding of its videos: a short synthetic one, looped without encoding.

The import is the user's own command. Decoding is OpenCV's, before and after it, on as many threads.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from multiview.run import REPOSITORY


def measure_import(options: argparse.Namespace) -> tuple[str, list[dict], str]:
    """Returns title, rows and note of a table. options: the flags of scripts/benchmark.py."""
    import imageio_ffmpeg

    from synthetic.dataset import record_mouse
    from synthetic.settings import MouseSettings

    loops, width, workers = -(-options.frames // options.source_frames), options.video_width, options.workers
    frames, seconds = loops * options.source_frames, {}
    with tempfile.TemporaryDirectory(prefix="benchmark_import_") as name:
        short, recording = Path(name, "short"), Path(name, "recording")
        record_mouse(MouseSettings(short, options.source_frames, as_recording=True, video_width=width))
        for path in sorted(short.rglob("*.mp4")):
            copy = recording / path.relative_to(short)
            copy.parent.mkdir(parents=True, exist_ok=True)
            loop = ["-v", "error", "-stream_loop", str(loops - 1), "-i", path, "-c", "copy", copy]
            subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *loop], check=True)
        shutil.copy(short / "new_cam.pkl", recording)
        seconds["decoding before"] = decode(recording, frames, workers)
        wall, cpu, report, memory = run_import(recording, Path(name, "data"), frames, workers)
        seconds["import"] = wall, cpu
        seconds["decoding after"] = decode(recording, frames, workers)
    fastest, least = ((a + b) / 2 for a, b in zip(seconds["decoding before"], seconds["decoding after"]))
    ratios = {
        "frames/s over decoding's": fastest / wall, "without the report": fastest / (wall - report),
        "by CPU time": least / cpu, "largest memory of all processes, MiB": memory,
    }  # fmt: skip
    records = []
    for what, (taken, spent) in seconds.items():
        record = {"what": what, "seconds": taken, "frames/s": frames / taken, "CPU ms/frame": 1e3 * spent / frames}
        records.append(record | (ratios if what == "import" else dict.fromkeys(ratios)))
    return "Import of a recording", records, f"{frames} frames of 12 videos {width} px wide to 512 px."


def decode(recording: Path, frames: int, workers: int) -> tuple[float, float]:
    """Decodes all videos, each frame turned into colors in the memory of the one before: wall and CPU seconds."""
    import cv2

    def count_frames(path: Path) -> int:
        capture, count, frame = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]), 0, None
        while (frame := capture.read(frame)[1]) is not None:
            count += 1
        return count

    started, cpu = time.time(), time.process_time()
    with ThreadPoolExecutor(workers) as pool:
        counts = set(pool.map(count_frames, sorted(recording.rglob("*.mp4"))))
    if counts != {frames}:
        raise ValueError(f"the videos were looped to {frames} frames, {sorted(counts)} were decoded")
    return time.time() - started, time.process_time() - cpu


def run_import(recording: Path, output: Path, frames: int, workers: int) -> tuple[float, float, float, float]:
    """Runs process_mouse_data.py: seconds with its start, CPU seconds, seconds of the report, MiB, of all processes."""
    import psutil

    cpu, started, memory = {}, time.time(), 0  # CPU seconds by process: its workers are no children that it waits for
    values = {"video_dir": recording / "videos_undist", "meta_dir": recording, "output_dir": output}
    values |= {"num_samples": frames, "image_size": 512, "workers": workers}
    given = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    child = psutil.Popen([sys.executable, str(REPOSITORY / "scripts" / "process_mouse_data.py"), *given])
    while child.poll() is None:
        try:
            family = [child, *child.children(recursive=True)]
            cpu |= {process.pid: sum(process.cpu_times()[:2]) for process in family}
            memory = max(memory, sum(process.memory_full_info().pss for process in family))
        except psutil.Error:  # one of them has ended meanwhile
            pass
        time.sleep(0.5)
    if child.returncode:
        raise ValueError(f"the import of {recording} failed; it said why above")
    ended = time.time()
    report = ended - (output / "data_mouse_val.txt").stat().st_mtime  # the lists are written last before the report
    return ended - started, sum(cpu.values()), report, memory / 2**20
