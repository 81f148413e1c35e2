"""The recording's parts, found and checked, and what its masks say about the animal."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from recording.calibration.checks import check_body_length
from recording.calibration.formats import find_calibration, read_calibration
from recording.calibration.model import UP_ROTATIONS, Calibration
from recording.center import find_up, headings_deg, locate, smooth, tail_sides, trunk_hulls
from recording.geometry import directions_from
from recording.masks import MaskTrack, read_track, record_camera
from recording.quality.check import check_belongs
from recording.quality.silhouettes import evenly, support
from recording.settings import ImportSettings
from recording.video import MASK_FOLDERS, Video, find_videos, frame_number
from recording.workers import run_lanes

STRETCHED = 90  # percentile of the lengths seen in single frames that counts as the stretched animal
MAX_RESIDUAL = 0.10  # of the camera distance: beyond it videos and calibration do not belong together
RATE_TOLERANCE = 1e-3  # relative
BELONG_CHECKS = 4  # instants whose silhouettes are asked whether the calibration belongs to the videos


class Recording(NamedTuple):
    """masks: the mask videos; none where the masks are to be found (`--segment`)."""

    calibration: Calibration
    videos: list[Video]
    masks: list[Video]


@dataclass(frozen=True)
class Analysis:
    """What the masks say, per frame kept [t], in the calibration's unit."""

    frames: list[int]  # their numbers in the videos
    tracks: list[MaskTrack]  # [v]
    places: list[int]  # of the frames in the tracks
    centres: np.ndarray  # [t, 3]
    residuals: np.ndarray  # [t, v] distance of the center from each mask's ray
    body_length: float
    skipped: dict[int, str]
    headings_deg: np.ndarray | None = None  # [t] azimuth of the nose, None if not asked for


def open_recording(settings: ImportSettings) -> Recording:
    """Finds and checks calibration, videos and mask videos."""
    path, up = settings.calibration or find_calibration(settings.meta_dir), settings.up
    calibration = read_calibration(path, up=up if up in UP_ROTATIONS else "z")
    options = {"max_pixels": settings.max_megapixels * 1_000_000, "names": calibration.names}
    videos, masks = find_videos(settings.video_dir, len(calibration), "--video_dir", **options), []
    if settings.segment == "rembg" and importlib.util.find_spec("rembg") is None:
        raise ValueError(
            "--segment rembg needs the package rembg, which is not installed: pip install rembg onnxruntime (it "
            "fetches its network when first used), or use --segment median"
        )
    if settings.mask_dir is not None:
        masks = find_videos(settings.mask_dir, len(calibration), "--mask_dir", **options)
    elif settings.segment == "none":
        found = [settings.meta_dir / name for name in MASK_FOLDERS if (settings.meta_dir / name).is_dir()]
        if len(found) != 1:
            raise ValueError(
                f"--meta_dir {settings.meta_dir} must hold exactly one folder of mask videos named "
                f"{' or '.join(MASK_FOLDERS)} (0.mp4 ..., white animal on black), found {len(found)}; name it with "
                "--mask_dir, or find the masks with --segment median"
            )
        masks = find_videos(found[0], len(calibration), "--meta_dir", **options)
    check_videos(videos, masks)
    return Recording(calibration.with_sizes([video.size for video in videos]), videos, masks)


def check_videos(videos: list[Video], masks: list[Video]) -> None:
    """All videos show the same instants: equal frame counts and rates; masks as large as their images."""
    first, starts = videos[0], [video.files[0] for video in (*videos, *masks) if video.is_images]
    for video in (*videos, *masks):
        if video.num_frames != first.num_frames:
            counts = f"{video.name} has {video.num_frames} frames, {first.name} has {first.num_frames}"
            raise ValueError(f"{counts}; frame n must be the same instant in every video, so these must be equal")
        if video.rate and first.rate and abs(video.rate - first.rate) > RATE_TOLERANCE * first.rate:
            raise ValueError(f"{video.name} runs at {video.rate:g} frames/s, {first.name} at {first.rate:g}")
    for path in starts:
        if frame_number(path) != frame_number(starts[0]):
            firsts = f"{path} is the first image of its folder, {starts[0]} that of another"
            raise ValueError(f"{firsts}; images of one number must show the same instant: start all with the same one")
    for video, mask in zip(videos, masks):  # no masks where they are still to be found
        if video.size != mask.size:
            sizes = "{} is {} x {}, its video {} {} x {}".format(mask.name, *mask.size, video.name, *video.size)
            raise ValueError(f"{sizes}; masks must be of the same (undistorted or raw) images")


def record_masks(recording: Recording, frames: list[int], settings: ImportSettings) -> list[MaskTrack]:
    """Decodes (or segments), cleans and measures every camera's masks once; what is there already is kept."""
    folder, videos = settings.mask_folder, recording.masks or recording.videos
    keys = {}
    for camera, video in enumerate(videos):
        files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in video.files]
        digest = hashlib.sha256(json.dumps([files, frames]).encode()).hexdigest()
        keys[camera] = {"segment": settings.segment, "content": digest, "version": 6}
    tracks = [read_track(folder, camera, key) for camera, key in keys.items()]
    todo = [camera for camera in keys if tracks[camera] is None]
    make = partial(record_camera, videos, frames, settings.segment, folder, keys)
    with tqdm(total=len(todo) * len(frames), desc="masks", unit="mask", disable=None if todo else True) as bar:
        for _, step, _ in run_lanes(make, todo, len(frames) + 1, workers=settings.workers):
            bar.update(step < len(frames))
    return [read_track(folder, camera) for camera in keys]


def analyse(
    recording: Recording, frames: list[int], tracks: list[MaskTrack], settings: ImportSettings,
    say: Callable[[str], None],
) -> tuple[Recording, Analysis]:  # fmt: skip
    """Finds the animal's center in every frame, its length in the dataset and, where asked, its heading.

    tracks: of `record_masks`. Returns the recording with its world turned so that +z is up, and what was found there.
    """
    calibration = recording.calibration
    kept, skipped = _usable_frames(recording, frames, tracks, settings)
    numbers = [frames[index] for index in kept]
    centers, residuals, lengths = locate(calibration, tracks, kept)
    # Masks cut by the photograph's edge end where the animal does not.
    whole = [place for place in kept if not any(track.touches_border[place] for track in tracks)]
    asked = [whole[index] for index in evenly(len(whole), BELONG_CHECKS)]
    check_belongs(calibration, np.array([[support(track.hull(place))[0] for track in tracks] for place in asked]))
    distance, miss = directions_from(centers, calibration.centres)[2].mean(), np.median(residuals)
    if miss > MAX_RESIDUAL * distance:
        raise ValueError(
            f"{calibration.source}: the rays through the masks' centers miss each other by {miss:.3g} at a camera "
            f"distance of {distance:.3g}; the calibration does not belong to these videos, or they are numbered "
            "differently (video k must be camera k)"
        )
    measured = float(np.percentile(lengths, STRETCHED))
    check_body_length(calibration, measured, settings.body_length)
    length = settings.body_length if settings.body_length is not None else measured
    hulls, axes = trunk_hulls(calibration, tracks, kept, centers, residuals, measured)
    empty = np.flatnonzero(~axes.any(axis=1))
    if settings.heading != "none" and len(empty):
        where = f"frame {numbers[empty[0]]}: the masks have no common volume"
        raise ValueError(f"{where}, so there is no visual hull; look at its masks, or use --heading none")
    tails = tail_sides(calibration, tracks, kept, hulls, axes, measured) if settings.heading != "none" else None
    if settings.centre == "hull":
        centers = hulls
        if len(empty):
            say(f"{len(empty)} of {len(hulls)} frames: the masks have no common trunk, centers are triangulated")
    if settings.smooth_frames > 1 and len(numbers) > 1:
        if min(np.diff(numbers)) > settings.smooth_frames / 2:
            say(f"--smooth_frames {settings.smooth_frames}: the samples are farther apart, so nothing is smoothed")
        centers = smooth(centers, numbers, settings.smooth_frames, settings.time_jumps)
    if settings.up not in UP_ROTATIONS:
        up = find_up(calibration, centers, settings.up, length)
        say(f"up (--up {settings.up}) is {np.round(up, 4).tolist()} in the calibration's world")
        turn = np.eye(4)
        turn[:3, :3] = Rotation.align_vectors([0.0, 0.0, 1.0], up)[0].as_matrix()
        calibration = replace(calibration, w2c=calibration.w2c @ turn.T)
        centers, axes = centers @ turn[:3, :3].T, axes @ turn[:3, :3].T
    headings = None
    if settings.heading != "none":
        rate = recording.videos[0].rate
        headings = headings_deg(axes, tails, centers, numbers, settings, rate=rate, body_length=length)
    analysis = Analysis(numbers, tracks, kept, centers, residuals, length, skipped, headings)
    return recording._replace(calibration=calibration), analysis


def _usable_frames(
    recording: Recording, frames: list[int], tracks: list[MaskTrack], settings: ImportSettings
) -> tuple[list[int], dict[int, str]]:
    """Indices of the frames whose masks show an animal everywhere, and why others do not count."""
    names = [video.name for video in recording.masks or recording.videos]
    what = "the mask" if recording.masks else f"the mask that --segment {settings.segment} finds"
    shown = np.stack([track.area for track in tracks], axis=1) > 0  # [t, v]
    skipped = {}
    for frame, seen in zip(frames, shown):
        if not seen.all() and settings.on_bad_frame == "error":
            which = f"{names[int(seen.argmin())]}: {what} of frame {frame}"
            raise ValueError(f"{which} is empty; mend it, or leave such frames out with --on_bad_frame skip")
        if not seen.all():
            skipped[frame] = f"empty mask in {', '.join(Path(names[k]).name for k in np.flatnonzero(~seen))}"
    if len(skipped) == len(frames):
        raise ValueError(
            f"every frame has an empty mask in at least one view (frame {frames[0]}: {skipped[frames[0]]}); nothing "
            "can be imported: masks must be white where the animal is"
        )
    return np.flatnonzero(shown.all(axis=1)).tolist(), skipped
