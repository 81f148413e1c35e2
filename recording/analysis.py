"""The recording's parts, found and checked, and what its masks say about the animal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from recording.calibration.checks import check_body_length
from recording.calibration.formats import find_calibration, read_calibration
from recording.calibration.model import UP_ROTATIONS, Calibration
from recording.center import (
    HullPlace,
    floor_up,
    headings_deg,
    hull_place,
    locate,
    rig_up,
    smooth,
    trunk_centers,
    turn_to_z,
)
from recording.geometry import directions_from
from recording.masks import MaskStatistics, is_recorded, read_statistics, read_track
from recording.quality.belongs import check_belongs, check_silhouettes
from recording.segment import check_method, record_camera
from recording.settings import ImportSettings
from recording.video import MASK_FOLDERS, Video, find_videos, frame_number
from recording.workers import run_lanes

STRETCHED = 90  # percentile of the lengths seen in single frames that counts as the stretched animal
MAX_RESIDUAL = 0.10  # of the camera distance: beyond it videos and calibration do not belong together
RATE_TOLERANCE = 1e-3  # relative
MIRROR_CHECKS = 3  # instants whose silhouettes are asked whether images are mirrored


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

    centres: [t, 3]. residuals: [t, v] distance of the center from each mask's ray. Unit: the calibration's. places:
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


def open_recording(settings: ImportSettings) -> Recording:
    """Finds and checks calibration, videos and mask videos."""
    path = settings.calibration or find_calibration(settings.meta_dir)
    calibration = read_calibration(path, up=settings.up if settings.up in UP_ROTATIONS else "z")
    most = settings.max_megapixels * 1_000_000
    videos = find_videos(settings.video_dir, len(calibration), "--video_dir", most, calibration.names)
    check_method(settings.segment)
    masks = []
    if settings.segment == "none":
        folder, flag = settings.mask_dir, "--mask_dir"
        if folder is None:
            found = [settings.meta_dir / name for name in MASK_FOLDERS if (settings.meta_dir / name).is_dir()]
            if len(found) != 1:
                raise ValueError(
                    f"--meta_dir {settings.meta_dir} must hold exactly one folder of mask videos named "
                    f"{' or '.join(MASK_FOLDERS)} (0.mp4 ..., white animal on black), found {len(found)}; name it with "
                    "--mask_dir, or find the masks with --segment median"
                )
            folder, flag = found[0], "--meta_dir"
        masks = find_videos(folder, len(calibration), flag, most, calibration.names)
    check_videos(videos, masks)
    return Recording(calibration.with_sizes([video.size for video in videos]), videos, masks)


def check_videos(videos: list[Video], masks: list[Video]) -> None:
    """All videos show the same instants: equal frame counts and rates; masks as large as their images."""
    first = videos[0]
    numbered = [video for video in (*videos, *masks) if video.is_images]
    for video in (*videos, *masks):
        if video.num_frames != first.num_frames:
            raise ValueError(
                f"{video.name} has {video.num_frames} frames, {first.name} has {first.num_frames}; frame n must be the "
                "same instant in every video, so the counts must be equal"
            )
        if video.rate and first.rate and abs(video.rate - first.rate) > RATE_TOLERANCE * first.rate:
            raise ValueError(f"{video.name} runs at {video.rate:g} frames/s, {first.name} at {first.rate:g}")
        if video.is_images and frame_number(video.files[0]) != frame_number(numbered[0].files[0]):
            raise ValueError(
                f"{video.files[0]} is the first image of its folder, {numbered[0].files[0]} that of another; images "
                "of one number must show the same instant, so all folders must start with the same one"
            )
    for video, mask in zip(videos, masks):  # no masks where they are still to be found
        if video.size != mask.size:
            raise ValueError(
                f"{mask.name} is {mask.size[0]} x {mask.size[1]}, its video {video.name} {video.size[0]} x "
                f"{video.size[1]}; masks must be of the same (undistorted or raw) images"
            )


def record_masks(
    recording: Recording, frames: list[int], settings: ImportSettings
) -> list[list[MaskStatistics | None]]:
    """Decodes (or segments), cleans and measures every camera's masks once; what is there already is kept.

    Pixels stay on disk. Returns what was measured, [v][t], None for empty masks.
    """
    from tqdm import tqdm

    folder, videos = settings.mask_folder, recording.masks or recording.videos
    keys = {}
    for camera, video in enumerate(videos):
        stats = [(path.name, path.stat()) for path in video.files]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        digest = hashlib.sha256(json.dumps([files, frames]).encode()).hexdigest()
        keys[camera] = {"segment": settings.segment, "content": digest, "version": 5}
    todo = [camera for camera, key in keys.items() if not is_recorded(folder, camera, key)]
    make = partial(record_camera, videos, frames, settings.segment, folder, keys)
    with tqdm(total=len(todo) * len(frames), desc="masks", unit="mask", disable=None if todo else True) as bar:
        for _, step, _ in run_lanes(make, todo, len(frames) + 1, workers=settings.workers):
            bar.update(step < len(frames))
    return [read_statistics(folder, camera) for camera in keys]


# ---- the animal's place ---------------------------------------------------------------------------------------------


def analyse(
    recording: Recording,
    frames: list[int],
    statistics: list[list[MaskStatistics | None]],
    settings: ImportSettings,
    say: Callable[[str], None],
) -> tuple[Recording, Analysis]:
    """Finds the animal's center in every frame, its length in the dataset and, where asked, its heading.

    statistics: [v][t] of `record_masks`. Returns the recording with its world turned so that +z is up, and what was
    found in that world.
    """
    calibration, rate = recording.calibration, recording.videos[0].rate
    kept, skipped = _usable_frames(recording, frames, statistics, settings)
    masks = [[camera[index] for camera in statistics] for index in kept]
    numbers = [frames[index] for index in kept]
    centers, residuals, lengths = locate(calibration, masks)
    _check_belongs(calibration, masks, centers, residuals, kept, settings)
    measured = float(np.percentile(lengths, STRETCHED))
    check_body_length(calibration, measured, settings.body_length)
    length = settings.body_length if settings.body_length is not None else measured
    hulls = _hull_places(calibration, kept, centers, measured, numbers, settings)
    if settings.centre == "hull":
        centers, found = trunk_centers(calibration, masks, centers, residuals, measured)
        if not found.all():
            say(f"{(~found).sum()} of {len(found)} frames: the masks have no common trunk, centers are triangulated")
    if settings.smooth_frames > 1 and len(numbers) > 1:
        if min(np.diff(numbers)) > settings.smooth_frames / 2:
            say(f"--smooth_frames {settings.smooth_frames}: the samples are farther apart, so nothing is smoothed")
        centers = smooth(centers, numbers, settings.smooth_frames, settings.time_jumps)
    if settings.up not in UP_ROTATIONS:
        up = rig_up(calibration)
        if settings.up == "floor":
            up = floor_up(centers, up, length, calibration.source)
        say(f"up (--up {settings.up}) is {np.round(up, 4).tolist()} in the calibration's world")
        turn = np.eye(4)
        turn[:3, :3] = turn_to_z(up)
        recording = replace(recording, calibration=replace(calibration, w2c=calibration.w2c @ turn.T))
        centers = centers @ turn[:3, :3].T
        hulls = [replace(place, axis=turn[:3, :3] @ place.axis) for place in hulls]
    headings = None
    if settings.heading != "none":
        headings = headings_deg(
            hulls, centers, numbers, rule=settings.heading, rate=rate, body_length=length, jumps=settings.time_jumps
        )
    return recording, Analysis(numbers, masks, centers, residuals, length, skipped, kept, headings)


def _usable_frames(
    recording: Recording, frames: list[int], statistics: list[list[MaskStatistics | None]], settings: ImportSettings
) -> tuple[list[int], dict[int, str]]:
    """Returns indices of the frames whose masks show an animal everywhere, and why others do not count."""
    names = [video.name for video in recording.masks or recording.videos]
    what = "the mask" if recording.masks else f"the mask that --segment {settings.segment} finds"
    skipped: dict[int, str] = {}
    for index, frame in enumerate(frames):
        empty = [name for name, camera in zip(names, statistics, strict=True) if camera[index] is None]
        if empty and settings.on_bad_frame == "error":
            raise ValueError(
                f"{empty[0]}: {what} of frame {frame} is empty; mend it, or leave such frames out with "
                "--on_bad_frame skip"
            )
        if empty:
            skipped[frame] = f"empty mask in {', '.join(Path(name).name for name in empty)}"
    kept = [index for index, frame in enumerate(frames) if frame not in skipped]
    if not kept:
        raise ValueError(
            f"every frame has an empty mask in at least one view (frame {frames[0]}: {skipped[frames[0]]}); nothing "
            "can be imported: masks must be white where the animal is"
        )
    return kept, skipped


def _check_belongs(
    calibration: Calibration,
    masks: list[list[MaskStatistics]],
    centers: np.ndarray,
    residuals: np.ndarray,
    kept: list[int],
    settings: ImportSettings,
) -> None:
    """Raises ValueError where videos and calibration do not belong together."""
    check_belongs(calibration, np.array([[mask.centre for mask in row] for row in masks]))
    tracks = [read_track(settings.mask_folder, camera) for camera in range(len(calibration))]
    asked = np.unique(np.linspace(0, len(kept) - 1, MIRROR_CHECKS).round().astype(int))
    check_silhouettes(
        calibration, [np.stack([track.silhouette(kept[index]).full() for track in tracks]) for index in asked]
    )
    distance = directions_from(centers, calibration.centres)[2]
    if np.median(residuals) > MAX_RESIDUAL * distance.mean():
        raise ValueError(
            f"{calibration.source}: the rays through the masks' centers miss each other by "
            f"{np.median(residuals):.3g} at a camera distance of {distance.mean():.3g}; the calibration does not "
            "belong to these videos, or they are numbered differently (video k must be camera k)"
        )


def _hull_places(
    calibration: Calibration,
    kept: list[int],
    centers: np.ndarray,
    body_length: float,
    numbers: list[int],
    settings: ImportSettings,
) -> list[HullPlace]:
    """Returns the visual hull's word on every kept frame; [] where no heading is asked for."""
    from tqdm import tqdm

    if settings.heading == "none":
        return []
    tracks = [read_track(settings.mask_folder, camera) for camera in range(len(calibration))]

    def carve(place: int) -> HullPlace:
        masks = [track.silhouette(kept[place]) for track in tracks]
        found = hull_place(calibration, masks, centers[place], body_length)
        if found is None:
            raise ValueError(
                f"frame {numbers[place]}: the masks have no common volume, so there is no visual hull; look at the "
                "masks of this frame, or use --heading none"
            )
        return found

    with ThreadPoolExecutor(settings.workers) as threads:  # carving leaves Python's lock alone
        return list(tqdm(threads.map(carve, range(len(kept))), total=len(kept), desc="hulls", disable=None))
