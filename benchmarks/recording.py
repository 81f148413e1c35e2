"""The import of a recording beside pure decoding of its videos, before and after it on as many processes.

A short recording of a synthetic mouse, seen by the real rig, is looped without encoding it again. Decoding is OpenCV's,
each frame of all videos and mask videos turned into colours, into the memory of the one before: what no import of these
videos by usual means can be faster than.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decoding import Decoding, decode
from benchmarks.processes import tree_cpu_seconds, tree_memory
from benchmarks.report import Table

PROGRESS = (0.1, 0.5, 0.9)  # shares of the samples written at which memory is read
WATCH_EVERY_S = 1.0


@dataclass(frozen=True)
class Import:
    """Seconds: whole, and of writing the quality report; memory: bytes of all processes at the shares of PROGRESS."""

    wall: float
    cpu: float
    report: float
    memory: tuple[float | None, ...]


def measure_import(render: Callable, *, frames: int, source_frames: int, video_width: int, workers: int) -> Table:
    """render: as for `recording.write`. frames: of the recording, at the least: it is looped as a whole."""
    with tempfile.TemporaryDirectory(prefix="benchmark_import_") as name:
        folder = Path(name)
        film(folder / "short", render, source_frames, video_width)
        loops = -(-frames // source_frames)
        loop(folder / "short", folder / "recording", loops)
        frames = loops * source_frames
        before = decode(folder / "recording", frames, workers)
        own = run_import(folder / "recording", folder / "data", frames, workers)
        after = decode(folder / "recording", frames, workers)
    return to_table(frames, source_frames, video_width, workers, before, own, after)


def to_table(
    frames: int, source_frames: int, video_width: int, workers: int, before: Decoding, own: Import, after: Decoding
) -> Table:
    """Ratios are of the import's throughput to the mean of decoding's, by the wall and by CPU time."""
    wall, cpu = (before.wall + after.wall) / 2, (before.cpu + after.cpu) / 2
    ratios = {
        "frames/s over decoding's": wall / own.wall, "without the report": wall / (own.wall - own.report),
        "by CPU time": cpu / own.cpu,
        **{f"MB at {share:.0%}": memory and memory / 2**20 for share, memory in zip(PROGRESS, own.memory, strict=True)},
    }  # fmt: skip
    records = []
    for what, run in (("decoding before", before), ("import", own), ("decoding after", after)):
        records.append({
            "what": what, "seconds": run.wall, "frames/s": frames / run.wall,
            "CPU ms per frame": 1e3 * run.cpu / frames,
            **{name: value if run is own else None for name, value in ratios.items()},
        })  # fmt: skip
    note = (
        f"{frames:,} frames of six videos and six mask videos {video_width} px wide ({source_frames} filmed, looped) "
        f"to samples of 512 px; {workers} processes. Memory: proportional set size of all processes, by share of "
        "samples written."
    )
    return Table("Import of a recording", records, [note])


def film(folder: Path, render: Callable, frames: int, video_width: int) -> None:
    """A clean recording, as `make_synthetic_mouse.py --as_recording` makes it by default."""
    from recording.write import ARENA_REACH, load_real_rig, stand_in_arena, write_recording
    from synthetic.motion import mouse_sequence

    calibration, arena = load_real_rig(width=video_width)
    clouds = mouse_sequence(0, frames, fps=25.0, arena_radius=ARENA_REACH)
    write_recording(
        folder, calibration, (stand_in_arena(cloud, arena) for cloud in clouds), render, frames_per_second=25.0
    )


def loop(source: Path, target: Path, times: int) -> None:
    """The recording `times` times in a row, each video's packets copied."""
    import imageio_ffmpeg

    for path in sorted(source.rglob("*.mp4")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-stream_loop", str(times - 1), "-i", path, "-c", "copy",
             copy], check=True,
        )  # fmt: skip
    for path in source.glob("new_cam.pkl"):
        (target / path.name).write_bytes(path.read_bytes())


def run_import(recording: Path, output: Path, frames: int, workers: int) -> Import:
    """What `scripts/process_mouse_data.py` does once it has started."""
    from recording.importer import process_recording
    from recording.settings import ImportSettings

    settings = ImportSettings(
        recording / "videos_undist", recording, output, num_samples=frames, image_size=512, workers=workers
    )
    seen: list[tuple[float, float]] = []  # share of the samples written, memory
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_EVERY_S):
            written = len([name for name in os.listdir(output) if name[0] == "s"]) if output.is_dir() else 0
            seen.append((written / frames, tree_memory()))

    watcher = threading.Thread(target=watch)
    started, cpu = time.time(), tree_cpu_seconds()
    watcher.start()
    try:
        process_recording(settings)
        ended, cpu = time.time(), tree_cpu_seconds() - cpu
    finally:
        done.set()
        watcher.join()
    # The lists of samples are written last before the report.
    report = ended - (output / "data_mouse_val.txt").stat().st_mtime
    memory = tuple(next((size for share, size in seen if share >= least), None) for least in PROGRESS)
    return Import(ended - started, cpu, report, memory)
