"""Writing the samples of an import: a process per few cameras, nothing visible before it is complete.

A sample grows in a hidden folder and is renamed when all its views are there; a killed import leaves such folders, and
its repetition removes them. Shards write disjoint samples into one dataset.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from multiview.rig import ViewRig
from multiview.sample import CAMERAS_FILE, DATASET_FILE, is_complete_sample, open_dataset
from recording.analysis import Analysis, Recording, mask_folder
from recording.geometry import Placement, Plan
from recording.lanes import Cuts, cut_camera, part_folder, picture_name, sample_name
from recording.settings import ImportSettings
from recording.streams import run_streams
from recording.tracks import MaskTrack

DECODED = 100_000  # a frame of a video takes as long to decode as so many pixels of an animal to cut out


def is_finished(folder: Path, count: int) -> bool:
    """Whether all samples of all shards are there."""
    return all(is_complete_sample(folder / sample_name(index)) for index in range(count))


def start_dataset(folder: Path, rig: ViewRig, parameters: dict) -> None:
    """`open_dataset`, after removing what a killed import left of an unfinished description."""
    for leftover in folder.glob(f".{DATASET_FILE}.*.tmp"):
        leftover.unlink()
    open_dataset(folder, rig, parameters)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a lock that other shards on this machine respect; the system frees it when the process ends, however."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def finish(settings: ImportSettings) -> Iterator[None]:
    """Around writing split lists and report: removes leftovers before, the kept masks after."""
    with alone(mask_folder(settings)):
        for leftover in settings.output_dir.glob(".*.tmp"):
            leftover.unlink()
        os.sync()  # the lists must not reach the disk before what they list
        yield
        shutil.rmtree(mask_folder(settings), ignore_errors=True)


def write_samples(
    recording: Recording,
    analysis: Analysis,
    plan: Plan,
    placements: list[Placement],
    tracks: list[MaskTrack],
    settings: ImportSettings,
) -> None:
    """Decodes all videos in order and writes this shard's samples that are not there yet."""
    from tqdm import tqdm

    todo = _unwritten(settings, len(placements))
    if not todo:
        return
    cameras = range(len(recording.videos))
    cuts = {camera: _cuts(camera, todo, analysis, placements, settings.image_size) for camera in cameras}
    make = partial(
        cut_camera, recording.calibration, recording.videos, cuts, mask_folder(settings), settings.output_dir,
        settings.image_size,
    )  # fmt: skip
    costs = [DECODED + float(np.mean([row[camera].area for row in analysis.masks])) for camera in cameras]
    arrived = dict.fromkeys(range(len(todo)), 0)
    with tqdm(total=len(todo), desc="samples", unit="sample", disable=None) as bar:
        for _, step, _ in run_streams(make, cameras, len(todo), workers=settings.workers, costs=costs):
            arrived[step] += 1
            if arrived[step] == len(cameras):
                _complete(settings.output_dir, todo[step], placements[todo[step]], analysis, plan, settings)
                del arrived[step]
                bar.update()


def _unwritten(settings: ImportSettings, count: int) -> list[int]:
    """Numbers of this shard's missing samples; what a killed import left of them is removed."""
    shard, shards = settings.shard
    own = range(count * shard // shards, count * (shard + 1) // shards)
    todo = [index for index in own if not is_complete_sample(settings.output_dir / sample_name(index))]
    for index in todo:
        for leftover in (part_folder(settings.output_dir, index), settings.output_dir / sample_name(index)):
            if leftover.exists():
                shutil.rmtree(leftover)
    return todo


def _cuts(camera: int, todo: list[int], analysis: Analysis, placements: list[Placement], size: int) -> Cuts:
    slots = [placements[index].order.index(camera) for index in todo]
    return Cuts(
        index=todo,
        frame=[analysis.frames[index] for index in todo],
        mask=[analysis.places[index] for index in todo],
        slot=slots,
        rotation=np.stack([placements[i].true_rotation[slot] for i, slot in zip(todo, slots, strict=True)]),
        focal_px=np.array([placements[i].true_focal[slot] * size for i, slot in zip(todo, slots, strict=True)]),
    )


def _complete(
    folder: Path, index: int, placement: Placement, analysis: Analysis, plan: Plan, settings: ImportSettings
) -> None:
    """Adds the cameras to a sample whose pictures are all there, and gives it its name."""
    frames = placement.label_cameras(settings.image_size).to_frames()
    for slot, frame in enumerate(frames):
        frame["file_path"] = f"images/{picture_name(slot)}"
        frame["view"] = plan.rig.view_names[slot]
    extra = {"frame": analysis.frames[index], "calibration_to_sample": placement.to_sample.tolist()}
    if plan.by_heading:
        extra |= {"view_cameras": list(placement.order), "heading_deg": float(analysis.headings_deg[index])}
    part = part_folder(folder, index)
    # A line per camera. (Python's encoder takes several times as long where it indents.)
    cameras = ",\n".join(json.dumps(frame) for frame in frames)
    head = json.dumps({"id": sample_name(index), **extra})
    (part / CAMERAS_FILE).write_text(f'{head[:-1]}, "frames": [\n{cameras}\n]}}\n')
    os.replace(part, folder / sample_name(index))
