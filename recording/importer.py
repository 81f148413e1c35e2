"""The import of one recording: analyse the masks, make the plan, warp and write the samples, report.

Nothing is visible before it is complete: a sample grows in a hidden folder and is renamed when all its views are there;
a killed import leaves such folders, and its repetition removes them. Shards write disjoint samples into one dataset.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from multiview.files import LOCK_FILE, full_disk_explained, owned_folder, remove_leftovers
from multiview.rig import ViewRig, load_rig
from multiview.sample import CAMERAS_FILE, DATASET_FILE, is_complete_sample, open_dataset, write_split
from recording.analysis import Analysis, Recording, analyse, open_recording, record_masks
from recording.calibration.model import Calibration
from recording.geometry import CALIBRATED, Placement, Plan, label_error, make_plan, mask_extents, place
from recording.rectify import cut_camera
from recording.settings import MAX_SAMPLES, ImportSettings, sample_name
from recording.workers import run_lanes, start_early

MARGIN_PX = 2.0  # free rim of every image, at the size written
FILTER_REACH = 0.5  # photograph pixels by which the warp widens a mask
DECODED = 100_000  # a frame of a video takes as long to decode as so many pixels of an animal to cut out
LISTED = 20  # frames left out that are named one by one; dataset.json names all
WAIT_S = 0.5  # between two looks at another shard's lock
VALIDATION_FRACTION = 0.2
MIN_FOR_TWO_BLOCKS = 20
GAP_SECONDS = 0.5  # between a training and a validation frame: what lies closer together is left out of both lists
GAP_FRACTION = 0.02  # of the samples, at most, is given up at each border


def process_recording(settings: ImportSettings, say: Callable[[str], None] = lambda text: None) -> dict | None:
    """Imports a recording into settings.output_dir and returns the quality report; repeating the call resumes it.

    With a shard of several, None is returned while other shards' samples are missing; the last one writes split lists
    and report.
    """
    before = torch.get_num_threads()
    # Torch's small tensors are not worth threads, which would wait for each other beside busy worker processes.
    torch.set_num_threads(1)
    try:
        if settings.workers > 1:
            start_early()
        with stopped_by_signals(), full_disk_explained(settings.output_dir):
            recording = open_recording(settings)  # before anything is written
            with _owned(settings):
                return _process(recording, settings, say)
    finally:
        torch.set_num_threads(before)
        with suppress(OSError):
            settings.mask_folder.rmdir()  # all that was in it went when the last shard ended


def _process(recording: Recording, settings: ImportSettings, say: Callable[[str], None]) -> dict | None:
    rig = None if settings.rig == CALIBRATED else load_rig(settings.rig)
    frames = choose_frames(recording.num_frames, settings.num_samples)
    if len(frames) < settings.num_samples:
        say(f"the recording has {recording.num_frames} frames: {len(frames)} samples instead of {settings.num_samples}")
    say(f"{len(recording.videos)} cameras, {recording.num_frames} frames; reading the masks of {len(frames)}")
    with _alone(settings):  # other shards wait for the masks, then share them
        statistics = record_masks(recording, frames, settings)
    recording, analysis = analyse(recording, frames, statistics, settings, say)
    plan, placements = plan_dataset(recording.calibration, analysis, rig, settings)
    for line in describe(settings.output_dir, plan, recording.calibration, analysis, placements):
        say(line)
    parameters = json.loads(json.dumps(dataset_parameters(settings, recording, analysis, plan)))
    with _alone(settings):
        remove_leftovers(settings.output_dir)
        open_dataset(settings.output_dir, plan.rig, parameters)
    write_samples(recording, analysis, plan, placements, settings)
    folders = [settings.output_dir / sample_name(index) for index in range(len(placements))]
    if not all(is_complete_sample(folder) for folder in folders):
        say(f"shard {settings.shard[0]}/{settings.shard[1]} is complete; the last shard writes split lists and report")
        return None
    return _conclude(recording, analysis, plan, placements, settings, say)


def _conclude(
    recording: Recording,
    analysis: Analysis,
    plan: Plan,
    placements: list[Placement],
    settings: ImportSettings,
    say: Callable[[str], None],
) -> dict:
    """Writes split lists and report of a dataset whose samples are all there."""
    from recording.quality.report import write_report

    rate = recording.videos[0].rate if settings.split == "blocks" else 0.0
    seconds = [frame / rate for frame in analysis.frames] if rate else None
    seed = settings.split_seed if settings.split == "random" else None
    train, val = split_samples(len(placements), seconds=seconds, seed=seed)
    with _alone(settings):
        os.sync()  # the lists must not reach the disk before what they list
        for name, chosen in (("train", train), ("val", val)):
            folders = [settings.output_dir / sample_name(index) for index in chosen]
            write_split(settings.output_dir / f"data_mouse_{name}.txt", folders)
        report = write_report(
            settings.output_dir, recording.calibration, analysis, plan, placements, settings.image_size,
            workers=settings.workers,
        )  # fmt: skip
        for path in settings.mask_folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK_FILE:
                path.unlink()
    for frame, reason in list(analysis.skipped.items())[:LISTED]:
        say(f"frame {frame} was left out: {reason}")
    say(f"{len(train)} training and {len(val)} validation samples in {settings.output_dir}")
    if len(train) + len(val) < len(placements):
        say(
            f"{len(placements) - len(train) - len(val)} samples are in neither list: they lie within {GAP_SECONDS} s "
            "of the border between training and validation"
        )
    return report


# ---- one owner, and signals -----------------------------------------------------------------------------------------


@contextmanager
def _owned(settings: ImportSettings) -> Iterator[None]:
    """Owns the dataset, or this shard of it; a second run of the same is refused at once."""
    shard, count = settings.shard
    folder = settings.mask_folder
    with ExitStack() as stack:
        if count == 1:
            for other in (folder, *folder.glob("shard_*")):
                stack.enter_context(owned_folder(other))
        else:
            stack.enter_context(owned_folder(folder / f"shard_{shard}_of_{count}"))
        yield


@contextmanager
def _alone(settings: ImportSettings) -> Iterator[None]:
    """Has the dataset to itself for a step, waiting for other shards."""
    with ExitStack() as stack:
        while settings.shard[1] > 1:
            try:
                stack.enter_context(owned_folder(settings.mask_folder))
                break
            except ValueError:  # another shard has it
                time.sleep(WAIT_S)
        yield


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Ends the import in an orderly way on SIGTERM, SIGHUP and SIGUSR1: what is complete stays, exit code 128 + n."""

    def stop(number: int, _) -> None:
        print(f"stopped by {signal.Signals(number).name}; repeat the command to continue", flush=True)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the plan -------------------------------------------------------------------------------------------------------


def choose_frames(num_frames: int, num_samples: int) -> list[int]:
    """Returns at most num_samples frame numbers, evenly spaced over the whole recording."""
    count = min(num_frames, num_samples)
    if count > MAX_SAMPLES:
        raise ValueError(
            f"{count} samples are asked for, {MAX_SAMPLES} are allowed in one dataset; lower --num_samples"
        )
    return np.unique(np.round(np.linspace(0, num_frames - 1, count)).astype(int)).tolist()


def plan_dataset(
    calibration: Calibration, analysis: Analysis, rig: ViewRig | None, settings: ImportSettings
) -> tuple[Plan, list[Placement]]:
    """Makes the plan with the largest zoom (at most the standard size) at which no mask reaches the border.

    Returned with the cameras of every kept frame.
    """

    def placed(zoom: float) -> tuple[Plan, list[Placement], np.ndarray]:
        plan = make_plan(
            calibration, analysis.centres, settings, rig=rig, body_length=analysis.body_length, zoom=zoom,
            headings_deg=analysis.headings_deg,
        )  # fmt: skip
        headings = [None] * len(analysis.centres) if analysis.headings_deg is None else analysis.headings_deg.tolist()
        placements = [place(plan, calibration, *where) for where in zip(analysis.centres, headings, strict=True)]
        return plan, placements, mask_extents(calibration, placements, hulls)

    hulls = [[mask.hull for mask in row] for row in analysis.masks]
    plan, placements, extents = placed(1.0)
    if not np.isfinite(extents).all():
        bad = analysis.frames[int(np.argwhere(~np.isfinite(extents))[0, 0])]
        raise ValueError(f"frame {bad}: a mask reaches behind its camera; the mask or the calibration is wrong")
    # How far a mask may reach from the center, over half the width, so that the border's pixels stay empty.
    size = settings.image_size
    focal_px = max(float(placement.true_focal.max()) for placement in placements) * size
    magnification = focal_px / float(calibration.K[:, 0, 0].min())
    largest = 1.0 - 2.0 * max(MARGIN_PX, 0.6 + FILTER_REACH * magnification) / size
    zoom = min(1.0, largest / float(extents.max()))
    if zoom < 1.0:
        plan, placements, extents = placed(zoom)
    return replace(plan, extents=extents), placements


def describe(
    folder: Path, plan: Plan, calibration: Calibration, analysis: Analysis, placements: list[Placement]
) -> list[str]:
    """Says in words what was decided."""
    body = plan.body_length * plan.scale
    lines = [
        f"body {plan.body_length:.3g} long in the calibration's unit = {body:.3g} world units; {plan.framing} framing"
    ]
    if plan.zoom < 1.0:
        worst = analysis.frames[int(plan.extents.max(axis=1).argmax())]
        lines.append(f"all images made smaller by {plan.zoom:.3f} so that nothing is clipped (frame {worst} decides)")
    deviation = np.stack([placement.deviation_deg for placement in placements])
    if plan.requested is None:
        lines.append("views named by their measured azimuth (rig calibrated)")
    for slot, view in enumerate(plan.rig.views):
        cameras = sorted({placement.order[slot] for placement in placements})
        lines.append(
            f"  {view.name:<16} camera{'s' if len(cameras) > 1 else ''} {', '.join(map(str, cameras))}"
            f"  az {view.azimuth_deg:6.1f}  el {view.elevation_deg:5.1f}  d {plan.rig.view_distance(view):.3f}"
            f"  {plan.view_off_deg[slot]:4.1f} deg from the rig's view;"
            f" single frames up to {deviation[:, slot].max():.1f} deg from this"
        )
    if plan.requested is not None and plan.rig.differences(plan.requested):
        lines.append(
            f"the dataset's rig is {plan.rig.name}, the cameras as measured, not {plan.requested.name}: train with "
            f"rig={folder / DATASET_FILE} (prompt embeddings: --rig {folder / DATASET_FILE}), or import with --poses "
            f"nearest, which labels the views with the poses of {plan.requested.name}"
        )
    errors = np.array([label_error(plan, calibration, placement) for placement in placements[:200]])
    if errors.max() > 1e-6:
        lines.append(
            f"the cameras written ({plan.framing} framing, {plan.poses} poses) are not the true ones: at the animal's "
            f"ends they are off by {100 * errors[:, 0].mean():.1f} % of its half length (rms), "
            f"{100 * errors[:, 1].max():.1f} % at most"
        )
    return lines


def dataset_parameters(settings: ImportSettings, recording: Recording, analysis: Analysis, plan: Plan) -> dict:
    """Returns what dataset.json says beside the rig; file names only, so that nothing points at one machine."""
    asked = ("image_size", "framing", "poses", "scale", "segment", "centre", "smooth_frames", "time_jumps", "heading")
    return {
        "kind": "recording",
        "source": {
            "calibration": Path(recording.calibration.source).name,
            "videos": [video.files[0].name for video in recording.videos],
            "num_frames": recording.num_frames,
            "frames_per_second": recording.videos[0].rate,
            "up": settings.up,
        },
        "requested_rig": settings.rig,
        **{name: getattr(settings, name) for name in asked},
        "split": settings.split,
        "split_seed": settings.split_seed if settings.split == "random" else None,
        "view_cameras": None if plan.by_heading else plan.order,
        "reference_camera": None if plan.by_heading else plan.reference_camera,
        "world_units_per_calibration_unit": plan.scale,
        "body_length": analysis.body_length,
        "zoom": plan.zoom,
        "frames": analysis.frames,
        "skipped_frames": {str(frame): reason for frame, reason in analysis.skipped.items()},
    }


# ---- samples --------------------------------------------------------------------------------------------------------


def write_samples(
    recording: Recording, analysis: Analysis, plan: Plan, placements: list[Placement], settings: ImportSettings
) -> None:
    """Decodes all videos in order and writes this shard's samples that are not there yet."""
    from tqdm import tqdm

    folder, size, (shard, shards) = settings.output_dir, settings.image_size, settings.shard
    mine = range(len(placements) * shard // shards, len(placements) * (shard + 1) // shards)
    todo = [index for index in mine if not is_complete_sample(folder / sample_name(index))]
    parts = {index: folder / f".{sample_name(index)}.part" for index in todo}
    for index in todo:  # what a killed import left of them
        for leftover in (parts[index], folder / sample_name(index)):
            shutil.rmtree(leftover, ignore_errors=True)
    cameras, cuts = range(len(recording.videos)), {}
    for camera in cameras:
        slots = [placements[index].order.index(camera) for index in todo]
        cuts[camera] = {
            "frame": [analysis.frames[index] for index in todo],
            "mask": [analysis.places[index] for index in todo],
            "path": [f"{parts[index].name}/images/cam_{slot:03d}.png" for index, slot in zip(todo, slots)],
            "rotation": np.array([placements[index].true_rotation[slot] for index, slot in zip(todo, slots)]),
            "focal_px": np.array([placements[index].true_focal[slot] * size for index, slot in zip(todo, slots)]),
        }
    make = partial(cut_camera, recording.calibration, recording.videos, cuts, settings.mask_folder, folder, size)
    costs = [DECODED + float(np.mean([row[camera].area for row in analysis.masks])) for camera in cameras]
    arrived = dict.fromkeys(range(len(todo)), 0)
    with tqdm(total=len(todo), desc="samples", unit="sample", disable=None if todo else True) as bar:
        for _, step, _ in run_lanes(make, cameras, len(todo), workers=settings.workers, costs=costs):
            arrived[step] += 1
            if arrived[step] == len(cameras):
                del arrived[step]
                index = todo[step]
                content = sample_cameras(index, placements[index], analysis, plan, size)
                (parts[index] / CAMERAS_FILE).write_text(content)
                os.replace(parts[index], folder / sample_name(index))
                bar.update()


def sample_cameras(index: int, placement: Placement, analysis: Analysis, plan: Plan, size: int) -> str:
    """Returns a sample's opencv_cameras.json."""
    frames = placement.label_cameras(size).to_frames()
    for slot, frame in enumerate(frames):
        frame["file_path"] = f"images/cam_{slot:03d}.png"
        frame["view"] = plan.rig.view_names[slot]
    extra = {"frame": analysis.frames[index], "calibration_to_sample": placement.to_sample.tolist()}
    if plan.by_heading:
        extra |= {"view_cameras": list(placement.order), "heading_deg": float(analysis.headings_deg[index])}
    # A line per camera. (Python's encoder takes several times as long where it indents.)
    cameras = ",\n".join(json.dumps(frame) for frame in frames)
    head = json.dumps({"id": sample_name(index), **extra})
    return f'{head[:-1]}, "frames": [\n{cameras}\n]}}\n'


def split_samples(
    count: int, *, seconds: list[float] | None = None, seed: int | None = None
) -> tuple[list[int], list[int]]:
    """Splits sample numbers 80/20 into training and validation.

    By blocks of time, since neighboring frames are nearly one image: one block from the middle of a short recording,
    two of a longer one. seconds: when each sample was taken; training samples nearer than GAP_SECONDS to a block are
    left out, but no more than GAP_FRACTION of all at each border (and none of fewer than MIN_FOR_TWO_BLOCKS).
    seed: at random instead, the same for the same seed and number, for frames far apart, or to repeat others' splits.
    """
    number = max(1, round(VALIDATION_FRACTION * count)) if count > 1 else 0
    dropped: set[int] = set()
    if seed is not None:
        held_out = set(
            np.random.default_rng(np.random.SeedSequence([seed, count])).permutation(count)[:number].tolist()
        )
    else:
        first, second = number - number // 2, number // 2
        blocks = [(count // 4 - first // 2, first), (3 * count // 4 - second // 2, second)]
        if count < MIN_FOR_TWO_BLOCKS:
            blocks = [((count - number) // 2, number)]
        held_out = {index for start, length in blocks for index in range(start, start + length)}
        for start, length in blocks if seconds is not None and count >= MIN_FOR_TWO_BLOCKS else []:
            for edge, side in ((start, -1), (start + length - 1, 1)):
                near = [edge + side * step for step in range(1, max(1, round(GAP_FRACTION * count)) + 1)]
                dropped.update(k for k in near if 0 <= k < count and abs(seconds[k] - seconds[edge]) < GAP_SECONDS)
    train = [index for index in range(count) if index not in held_out | dropped]
    return train, sorted(held_out)
