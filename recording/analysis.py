"""The recording's parts, found and checked, and what its masks say about the animal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from recording.calibration import Calibration, check_body_length, find_calibration, read_calibration
from recording.calibration.model import UP_ROTATIONS
from recording.centre import (
    HullPlace,
    floor_up,
    headings_deg,
    hull_place,
    locate,
    rig_up,
    smooth,
    trunk_centres,
    turn_to_z,
)
from recording.geometry import directions_from
from recording.lanes import record_camera
from recording.masks import MaskStatistics
from recording.quality.belongs import check_belongs, check_silhouettes
from recording.segment import check_method
from recording.settings import ImportSettings
from recording.streams import run_streams
from recording.tracks import MaskTrack, is_recorded, read_track
from recording.video import MASK_FOLDERS, Video, check_videos, find_videos

STRETCHED = 90  # percentile of the lengths seen in single frames that counts as the stretched animal
MAX_RESIDUAL = 0.10  # of the camera distance: beyond it videos and calibration do not belong together
MIRROR_CHECKS = 3  # instants whose silhouettes are asked whether pictures are mirrored


@dataclass(frozen=True)
class Recording:
    """masks: the mask videos; none where the masks are to be found (`--segment`)."""

    calibration: Calibration
    videos: list[Video]
    masks: list[Video]

    @property
    def num_frames(self) -> int:
        return self.videos[0].num_frames


@dataclass(frozen=True)
class Analysis:
    """What the masks say, per frame kept. frames: numbers in the videos. masks: [t][v] in the calibration's order.

    centres: [t, 3]. residuals: [t, v] distance of the centre from each mask's ray. Unit: the calibration's. places:
    index of each kept frame among the frames asked for. headings_deg: [t] azimuth of the nose, None if not asked for.
    """

    frames: list[int]
    masks: list[list[MaskStatistics]]
    centres: np.ndarray
    residuals: np.ndarray
    body_length: float
    skipped: dict[int, str]
    places: list[int]
    headings_deg: np.ndarray | None = None


def hulls_of(analysis: Analysis) -> list[list[np.ndarray]]:
    """[t][v] convex hulls of the masks, as `geometry.mask_extents` takes them."""
    return [[mask.hull for mask in row] for row in analysis.masks]


def open_recording(settings: ImportSettings) -> Recording:
    """Finds and checks calibration, videos and mask videos."""
    path = settings.calibration or find_calibration(settings.meta_dir)
    calibration = read_calibration(path, up=settings.up if settings.up in UP_ROTATIONS else "z")
    videos = find_videos(settings.video_dir, len(calibration), "--video_dir")
    if settings.segment != "none":
        check_method(settings.segment)
        masks = []
    else:
        masks = find_videos(*_mask_folder(settings, len(calibration)))
    check_videos(videos, masks)
    return Recording(calibration.with_sizes([video.size for video in videos]), videos, masks)


def _mask_folder(settings: ImportSettings, num_cameras: int) -> tuple[Path, int, str]:
    if settings.mask_dir is not None:
        return settings.mask_dir, num_cameras, "--mask_dir"
    found = [settings.meta_dir / name for name in MASK_FOLDERS if (settings.meta_dir / name).is_dir()]
    if len(found) != 1:
        raise ValueError(
            f"--meta_dir {settings.meta_dir} must hold exactly one folder of mask videos named "
            f"{' or '.join(MASK_FOLDERS)} (0.mp4 ..., white animal on black), found {len(found)}; name it with "
            "--mask_dir, or find the masks with --segment median"
        )
    return found[0], num_cameras, "--meta_dir"


def choose_frames(num_frames: int, num_samples: int) -> list[int]:
    """At most num_samples frame numbers, evenly spaced over the whole recording."""
    count = min(num_frames, num_samples)
    return np.unique(np.round(np.linspace(0, num_frames - 1, count)).astype(int)).tolist()


# ---- reading the masks ----------------------------------------------------------------------------------------------


def mask_folder(settings: ImportSettings) -> Path:
    """Where the cleaned masks lie while an import is under way: beside its dataset."""
    return settings.output_dir.with_name(f".{settings.output_dir.name}.masks")


def record_masks(recording: Recording, frames: list[int], settings: ImportSettings) -> list[MaskTrack]:
    """Every camera's masks, decoded (or segmented), cleaned and measured once; what is there already is kept."""
    from tqdm import tqdm

    folder = mask_folder(settings)
    keys = {camera: _track_key(recording, camera, frames, settings) for camera in range(len(recording.videos))}
    todo = [camera for camera, key in keys.items() if not is_recorded(folder, camera, key)]
    if todo:
        videos = recording.masks or recording.videos
        make = partial(record_camera, videos, frames, settings.segment, folder, keys)
        with tqdm(total=len(todo) * len(frames), desc="masks", unit="mask", disable=None) as bar:
            for _, step, _ in run_streams(make, todo, len(frames) + 1, workers=settings.workers):
                bar.update(step < len(frames))
    return [read_track(folder, camera) for camera in keys]


def _track_key(recording: Recording, camera: int, frames: list[int], settings: ImportSettings) -> dict:
    video = recording.masks[camera] if recording.masks else recording.videos[camera]
    stats = [path.stat() for path in video.files]
    files = [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in zip(video.files, stats)]
    digest = hashlib.sha256(json.dumps([files, frames]).encode()).hexdigest()
    return {"segment": settings.segment, "content": digest, "version": 2}


# ---- the animal's place ---------------------------------------------------------------------------------------------


def analyse(
    recording: Recording,
    frames: list[int],
    tracks: list[MaskTrack],
    settings: ImportSettings,
    say: Callable[[str], None],
) -> tuple[Recording, Analysis]:
    """Finds the animal's centre in every frame, its length in the dataset and, where asked, its heading.

    Returns the recording with its world turned so that +z is up, and what was found in that world.
    """
    kept, skipped = _usable_frames(recording, frames, tracks, settings)
    if skipped:
        say(f"{len(skipped)} of {len(frames)} frames left out: empty masks")
    masks = [[track.statistics[index] for track in tracks] for index in kept]
    centres, residuals, lengths = locate(recording.calibration, masks)
    check_belongs(recording.calibration, np.array([[mask.centre for mask in row] for row in masks]))
    check_silhouettes(
        recording.calibration,
        [
            np.stack([track.silhouette(kept[index]).full() for track in tracks])
            for index in np.unique(np.linspace(0, len(kept) - 1, MIRROR_CHECKS).round().astype(int))
        ],
    )
    _check_rays(recording.calibration, centres, residuals)
    measured = float(np.percentile(lengths, STRETCHED))
    check_body_length(recording.calibration, measured, settings.body_length)
    length = settings.body_length if settings.body_length is not None else measured
    if settings.heading != "none":
        hulls = _hull_places(recording, tracks, kept, centres, measured, settings, frames)
    if settings.centre == "hull":
        centres, found = trunk_centres(recording.calibration, masks, centres, residuals, measured)
        if not found.all():
            say(f"{(~found).sum()} of {len(found)} frames: the masks have no common trunk, centres are triangulated")
    numbers = [frames[index] for index in kept]
    if settings.smooth_frames > 1 and len(numbers) > 1:
        if min(np.diff(numbers)) > settings.smooth_frames / 2:
            say(f"--smooth_frames {settings.smooth_frames}: the samples are farther apart, so nothing is smoothed")
        centres = smooth(centres, numbers, settings.smooth_frames, settings.time_jumps)
    recording, turn = _upright(recording, centres, length, settings, say)
    centres = centres @ turn.T
    headings = None
    if settings.heading != "none":
        hulls = [replace(place, axis=turn @ place.axis) for place in hulls]
        headings = headings_deg(
            hulls, centres, numbers, rule=settings.heading, rate=recording.videos[0].rate, body_length=length,
            jumps=settings.time_jumps,
        )  # fmt: skip
    analysis = Analysis(numbers, masks, centres, residuals, length, skipped, kept, headings)
    return recording, analysis


def _usable_frames(
    recording: Recording, frames: list[int], tracks: list[MaskTrack], settings: ImportSettings
) -> tuple[list[int], dict[int, str]]:
    """Indices of the frames whose masks show an animal everywhere, and why others do not count."""
    names = [video.name for video in recording.masks or recording.videos]
    what = "the mask" if recording.masks else f"the mask that --segment {settings.segment} finds"
    skipped: dict[int, str] = {}
    for index, frame in enumerate(frames):
        empty = [name for name, track in zip(names, tracks, strict=True) if track.statistics[index] is None]
        if empty and settings.on_bad_frame == "error":
            raise ValueError(
                f"{empty[0]}: {what} of frame {frame} is empty; mend it, or leave such frames out with "
                "--on_bad_frame skip"
            )
        if empty:
            skipped[frame] = f"empty mask in {', '.join(Path(name).name for name in empty)}"
    kept = [index for index, frame in enumerate(frames) if frame not in skipped]
    if not kept:
        raise ValueError("every frame has an empty mask in at least one view; nothing can be imported")
    return kept, skipped


def _check_rays(calibration: Calibration, centres: np.ndarray, residuals: np.ndarray) -> None:
    distance = directions_from(centres, calibration.centres)[2]
    if np.median(residuals) > MAX_RESIDUAL * distance.mean():
        raise ValueError(
            f"{calibration.source}: the rays through the masks' centres miss each other by "
            f"{np.median(residuals):.3g} at a camera distance of {distance.mean():.3g}; the calibration does not "
            "belong to these videos, or they are numbered differently (video k must be camera k)"
        )


def _hull_places(
    recording: Recording,
    tracks: list[MaskTrack],
    kept: list[int],
    centres: np.ndarray,
    body_length: float,
    settings: ImportSettings,
    frames: list[int],
) -> list[HullPlace]:
    """The visual hull's word on every kept frame, worked out side by side."""
    from tqdm import tqdm

    count = min(settings.workers, len(kept))
    steps = -(-len(kept) // count)
    # Tracks are read again in each process: their pixels are mapped files.
    make = partial(
        _carve_frames, recording.calibration, mask_folder(settings), len(tracks), kept, centres, body_length, count
    )
    places: list[HullPlace | None] = [None] * len(kept)
    with tqdm(total=len(kept), desc="hulls", unit="frame", disable=None) as bar:
        for lane, step, place in run_streams(make, range(count), steps, workers=settings.workers):
            if step * count + lane < len(kept):
                if place is None:
                    raise ValueError(
                        f"frame {frames[kept[step * count + lane]]}: the masks have no common volume, so there is no "
                        "visual hull; look at the masks of this frame, or use --heading none"
                    )
                places[step * count + lane] = place
                bar.update()
    return places


def _carve_frames(
    calibration: Calibration,
    folder: Path,
    num_cameras: int,
    kept: list[int],
    centres: np.ndarray,
    body_length: float,
    count: int,
    lane: int,
) -> Iterator[HullPlace | None]:
    tracks = [read_track(folder, camera) for camera in range(num_cameras)]
    for index in range(lane, len(kept), count):
        masks = [track.silhouette(kept[index]) for track in tracks]
        yield hull_place(calibration, masks, centres[index], body_length)
    yield None  # lanes that are one frame shorter


def _upright(
    recording: Recording, centres: np.ndarray, body_length: float, settings: ImportSettings, say: Callable[[str], None]
) -> tuple[Recording, np.ndarray]:
    """The recording in a world whose +z is up, and the rotation [3, 3] into it."""
    if settings.up in UP_ROTATIONS:
        return recording, np.eye(3)
    calibration = recording.calibration
    up = rig_up(calibration)
    if settings.up == "floor":
        up = floor_up(centres, up, body_length, calibration.source)
    say(f"up (--up {settings.up}) is {np.round(up, 4).tolist()} in the calibration's world")
    turn = np.eye(4)
    turn[:3, :3] = turn_to_z(up)
    return replace(recording, calibration=replace(calibration, w2c=calibration.w2c @ turn.T)), turn[:3, :3]
