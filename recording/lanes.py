"""What the processes of an import do, one camera each: cleaning its masks, cutting its pictures out.

Imports little, so that a process is there in a moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recording.calibration import Calibration
from recording.masks import Silhouette, clean_mask
from recording.png import PngEncoder
from recording.rectify import picture_boxes, rectify
from recording.segment import segment
from recording.tracks import read_track, record_track
from recording.video import Video, VideoReader


@dataclass(frozen=True)
class Cuts:
    """What one camera's process must know of each sample to write, in the order of the video.

    frame: number in the video. mask: index in the track. slot: view number. rotation: [3, 3]; focal_px.
    """

    index: list[int]
    frame: list[int]
    mask: list[int]
    slot: list[int]
    rotation: np.ndarray
    focal_px: np.ndarray


def sample_name(index: int) -> str:
    return f"sample_{index:06d}"


def part_folder(folder: Path, index: int) -> Path:
    """Where a sample grows."""
    return folder / f".{sample_name(index)}.part"


def picture_name(slot: int) -> str:
    return f"cam_{slot:03d}.png"


def record_camera(
    videos: list[Video], frames: list[int], method: str, folder: Path, keys: dict[int, dict], camera: int
) -> Iterator[None]:
    """Writes one camera's track of cleaned masks. videos: of masks where method is `none`, else to be segmented."""
    video = videos[camera]
    masks = _decoded(video, frames) if method == "none" else segment(video, frames, method)
    return record_track(folder, camera, keys[camera], masks)


def _decoded(video: Video, frames: list[int]) -> Iterator[Silhouette]:
    with VideoReader(video) as reader:
        for frame in frames:
            yield clean_mask(*reader.read_mask(frame))


def cut_camera(
    calibration: Calibration,
    videos: list[Video],
    cuts: dict[int, Cuts],
    masks: Path,
    folder: Path,
    size: int,
    camera: int,
) -> Iterator[None]:
    """Writes one camera's picture of every sample, yielding after each."""
    own, track = cuts[camera], read_track(masks, camera)
    boxes = picture_boxes(calibration, camera, track.boxes[own.mask], own.rotation, own.focal_px, size)
    encode = PngEncoder(size)
    with VideoReader(videos[camera]) as reader:
        for k, index in enumerate(own.index):
            mask = track.silhouette(own.mask[k])
            cutout = rectify(
                calibration,
                camera,
                reader.read_part(own.frame[k], mask.x, mask.y, *mask.window.shape[::-1]),
                mask,
                rotation=own.rotation[k],
                focal_px=float(own.focal_px[k]),
                size=size,
                bgr=True,
                box=boxes[k],
            )
            write_picture(f"{part_folder(folder, index)}/images", picture_name(own.slot[k]), encode(cutout))
            yield


def write_picture(folder: str, name: str, content: bytes) -> None:
    """Writes a file into a folder that may not be there yet."""
    try:
        handle = open(f"{folder}/{name}", "wb", buffering=0)
    except FileNotFoundError:
        os.makedirs(folder, exist_ok=True)
        handle = open(f"{folder}/{name}", "wb", buffering=0)
    with handle:
        handle.write(content)
