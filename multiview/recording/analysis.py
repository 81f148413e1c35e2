"""The recording's parts, found and checked, and what its masks say about the animal."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multiview.recording.calibration import Calibration, find_calibration, read_calibration
from multiview.recording.geometry import directions_from, triangulate
from multiview.recording.masks import MaskStatistics, clean_mask, measure_mask
from multiview.recording.settings import ImportSettings
from multiview.recording.video import MASK_FOLDERS, Video, VideoReader, check_videos, find_videos

STRETCHED = 90  # percentile of the lengths seen in single frames that counts as the stretched animal
MAX_RESIDUAL = 0.10  # of the camera distance: beyond it videos and calibration do not belong together


@dataclass(frozen=True)
class Recording:
    calibration: Calibration
    videos: list[Video]
    masks: list[Video]

    @property
    def num_frames(self) -> int:
        return self.videos[0].num_frames


@dataclass(frozen=True)
class Analysis:
    """What the masks say, per frame kept. frames: numbers in the videos. masks: [t][v] in the calibration's order.

    centres: [t, 3]. residuals: [t, v] distance of the centre from each mask's ray. Unit: the calibration's.
    """

    frames: list[int]
    masks: list[list[MaskStatistics]]
    centres: np.ndarray
    residuals: np.ndarray
    body_length: float
    skipped: dict[int, str]


def open_recording(settings: ImportSettings) -> Recording:
    """Finds and checks calibration, videos and mask videos."""
    path = settings.calibration or find_calibration(settings.meta_dir)
    calibration = read_calibration(path, up=settings.up)
    videos = find_videos(settings.video_dir, len(calibration), "--video_dir")
    mask_dir, flag = settings.mask_dir, "--mask_dir"
    if mask_dir is None:
        flag = "--meta_dir"
        found = [settings.meta_dir / name for name in MASK_FOLDERS if (settings.meta_dir / name).is_dir()]
        if len(found) != 1:
            raise ValueError(
                f"--meta_dir {settings.meta_dir} must hold exactly one folder of mask videos named "
                f"{' or '.join(MASK_FOLDERS)} (0.mp4 ..., white animal on black), found {len(found)}; or name it with "
                "--mask_dir"
            )
        mask_dir = found[0]
    masks = find_videos(mask_dir, len(calibration), flag)
    check_videos(videos, masks)
    return Recording(calibration.with_sizes([video.size for video in videos]), videos, masks)


def choose_frames(num_frames: int, num_samples: int) -> list[int]:
    """At most num_samples frame numbers, evenly spaced over the whole recording."""
    count = min(num_frames, num_samples)
    return np.unique(np.round(np.linspace(0, num_frames - 1, count)).astype(int)).tolist()


def analyse(recording: Recording, frames: list[int], settings: ImportSettings, say: Callable[[str], None]) -> Analysis:
    """Reads all masks once; finds the animal's centre in every frame and its length in the dataset."""

    def measure(video: Video) -> list[MaskStatistics | None]:
        with VideoReader(video) as reader:
            return [measure_mask(clean_mask(reader.read(frame))) for frame in frames]

    with ThreadPoolExecutor(settings.workers) as pool:
        columns = list(pool.map(measure, recording.masks))
    skipped: dict[int, str] = {}
    for index, frame in enumerate(frames):
        empty = [recording.masks[v].name for v, column in enumerate(columns) if column[index] is None]
        if empty and settings.on_bad_frame == "error":
            raise ValueError(
                f"{empty[0]}: the mask of frame {frame} is empty; mend it, or leave such frames out with "
                "--on_bad_frame skip"
            )
        if empty:
            skipped[frame] = f"empty mask in {', '.join(Path(name).name for name in empty)}"
    kept = [index for index, frame in enumerate(frames) if frame not in skipped]
    if not kept:
        raise ValueError("every frame has an empty mask in at least one view; nothing can be imported")
    if skipped:
        say(f"{len(skipped)} of {len(frames)} frames left out: empty masks")
    masks = [[column[index] for column in columns] for index in kept]
    centres, residuals, lengths = [], [], []
    for row in masks:
        centre, residual, length = locate(recording.calibration, row)
        centres.append(centre)
        residuals.append(residual)
        lengths.append(length)
    centres, residuals = np.stack(centres), np.stack(residuals)
    distance = directions_from(centres, recording.calibration.centres)[2]
    if np.median(residuals) > MAX_RESIDUAL * distance.mean():
        raise ValueError(
            f"{recording.calibration.source}: the rays through the masks' centres miss each other by "
            f"{np.median(residuals):.3g} at a camera distance of {distance.mean():.3g}; the calibration does not "
            "belong to these videos, or they are numbered differently (video k must be camera k)"
        )
    length = settings.body_length if settings.body_length is not None else float(np.percentile(lengths, STRETCHED))
    return Analysis([frames[index] for index in kept], masks, centres, residuals, length, skipped)


def locate(calibration: Calibration, masks: list[MaskStatistics]) -> tuple[np.ndarray, np.ndarray, float]:
    """The animal's centre [3] from the masks' centres of mass, each ray's distance from it [v], and the body's length.

    The length is that of the view that shows the body longest, so it belongs to the pose of this frame.
    """
    directions = np.stack([calibration.rays(k, mask.centre[None])[0] for k, mask in enumerate(masks)])
    centre, residual = triangulate(calibration.centres, directions)
    distance = np.linalg.norm(calibration.centres - centre, axis=-1)
    focal = np.sqrt(calibration.K[:, 0, 0] * calibration.K[:, 1, 1])
    lengths = [mask.axis_length * far / f for mask, far, f in zip(masks, distance, focal, strict=True)]
    return centre, residual, float(max(lengths))
