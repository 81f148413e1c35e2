"""A raw recording (videos, mask videos, calibration) from renderings of moving animals: tests the import end to end.

The rasterizer is handed in by the caller, as for synthetic samples: render(cloud, cameras [v]) -> (rgb [v, 3, h, w]
over black, alpha [v, 1, h, w], anything else).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from multiview.files import atomic_folder
from multiview.image import to_uint8
from recording.calibration import PIXEL_CENTRE, Calibration, read_calibration, validate, write_calibration
from recording.film import Film, FilmConditions, Truth

RECORDINGS_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "rigs" / "recordings"
BODY_LENGTH_MM = 73.0  # nose to tail base of an adult mouse, stretched
ARENA_REACH = 0.6  # arena_radius for mouse_sequence (world units; 36 mm): all real cameras see the whole animal
VIDEO_FOLDER, MASK_FOLDER = "videos_undist", "simpleclick_undist"
CALIBRATION_FOLDER = "calibrations"  # of the further formats of one recording


def load_real_rig(
    name: str = "dannce_mouse1", *, width: int | None = None, lens: str = "none"
) -> tuple[Calibration, dict]:
    """A real recording's calibration that ships with the project, and its arena {centre [3], inner_radius}, in mm.

    width: of the pictures, even; by default as filmed. Heights follow, rounded to even numbers. lens: `none` for the
    undistorted pictures, `real` for the photographs as filmed (lens distortion, skew).
    """
    path = RECORDINGS_FOLDER / f"{name}.json"
    calibration = read_calibration(path)
    content = json.loads(path.read_text())
    if lens == "real":
        raw = [frame["raw"] for frame in content["frames"]]
        K = np.array([camera["K"] for camera in raw])
        K[:, :2, 2] += PIXEL_CENTRE
        distortion = np.array([camera["distortion"] for camera in raw])
        calibration = validate(replace(calibration, K=K, distortion=distortion))
    elif lens != "none":
        raise ValueError(f"lens must be none or real, got {lens!r}")
    return (calibration if width is None else resize_calibration(calibration, width)), content["arena"]


def resize_calibration(calibration: Calibration, width: int) -> Calibration:
    """The calibration of the same videos resized to `width` (even) and a height rounded to even."""
    old_width, old_height = calibration.sizes[0]
    height = 2 * round(old_height * width / old_width / 2)
    scale = np.diag([width / old_width, height / old_height, 1.0])
    return replace(calibration, K=scale @ calibration.K, sizes=((width, height),) * len(calibration))


def stand_in_arena(cloud, arena: dict):
    """A frame of `synthetic.motion.mouse_sequence` in a real arena, in mm: an adult mouse on its floor."""
    from synthetic.cloud import BODY_LENGTH

    return cloud.transformed(scale=BODY_LENGTH_MM / BODY_LENGTH, offset=np.asarray(arena["centre"]))


def write_recording(
    folder: Path | str,
    calibration: Calibration,
    clouds: Iterable,
    render: Callable,
    *,
    calibration_formats: Sequence[str] = (),
    conditions: FilmConditions | None = None,
    frames_per_second: float = 100.0,
    quality_crf: int = 12,
) -> None:
    """Writes a recording in MAMMAL's layout: videos_undist/k.mp4, simpleclick_undist/k.mp4, new_cam.pkl, truth.json.

    clouds: one per frame, in the calibration's world and unit (mm). calibration_formats: of `calibration.FORMATS`; the
    first lies in the folder, where it is found without being named, every other one in calibrations/<format>/. Left
    out: mammal, or dannce where there is lens distortion, which mammal cannot hold. quality_crf: x264's constant rate
    factor; 0 also keeps full colour resolution. conditions: what the cameras add to the renderings. truth.json and
    truth.npz: see `film.Truth`. The folder appears when it is complete.
    """
    conditions = conditions or FilmConditions()
    formats = calibration_formats or (("dannce",) if np.any(calibration.distortion) else ("mammal",))
    film, truth = Film(calibration, render, conditions), Truth(conditions.seed)
    with atomic_folder(folder) as temporary:
        for index, name in enumerate(formats):
            write_calibration(temporary / CALIBRATION_FOLDER / name if index else temporary, calibration, name)
        for name in (VIDEO_FOLDER, MASK_FOLDER):
            (temporary / name).mkdir()
        paths = [temporary / name / f"{k}.mp4" for name in (VIDEO_FOLDER, MASK_FOLDER) for k in range(len(calibration))]
        writers = [video_writer(path, film.size, frames_per_second, quality_crf) for path in paths]
        for frame, cloud in enumerate(clouds):
            pictures, masks = film(cloud, frame)
            for writer, picture in zip(writers, (*pictures, *masks.expand(-1, 3, -1, -1)), strict=True):
                writer.send(np.ascontiguousarray(to_uint8(picture)))
            truth.add(cloud)
        for writer in writers:
            writer.close()
        truth.write(temporary, unit="mm")


def video_writer(path: Path, size: tuple[int, int], frames_per_second: float, crf: int):
    """A started generator that takes [h, w, 3] uint8 frames; closing it finishes the H.264 file. size: (w, h)."""
    import imageio_ffmpeg

    writer = imageio_ffmpeg.write_frames(
        os.fspath(path), size, fps=frames_per_second, codec="libx264", quality=None, macro_block_size=2,
        pix_fmt_out="yuv444p" if crf == 0 else "yuv420p",
        output_params=["-crf", str(crf), "-preset", "veryfast", "-threads", "1", "-f", "mp4"],
    )  # fmt: skip
    writer.send(None)
    return writer
