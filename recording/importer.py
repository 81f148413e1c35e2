"""The import of one recording: analyse the masks, make the plan, warp and write the samples, report.

Nothing is visible before it is complete: a sample grows in a hidden folder and is renamed when all its views are there;
a killed import leaves such folders, and its repetition removes them. Shards write disjoint samples into one dataset.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from multiview.files import LOCK_FILE, full_disk_explained, owned_folder, remove_leftovers
from multiview.rig import ViewRig, load_rig
from multiview.sample import CAMERAS_FILE, is_complete_sample, open_dataset, write_split
from recording.analysis import Analysis, Recording, analyse, open_recording, record_masks
from recording.calibration.model import Calibration
from recording.geometry import CALIBRATED, Plan, make_plan, mask_extents
from recording.quality.report import write_report
from recording.rectify import cut_camera
from recording.settings import ImportSettings
from recording.workers import run_lanes, start_server

MAX_SAMPLES = 1_000_000  # sample names have six digits
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
            start_server()  # beside what follows, so that it is there when it is needed
        with full_disk_explained(settings.output_dir):
            recording = open_recording(settings)  # before anything is written
            (shard, count), folder = settings.part, settings.mask_folder
            folders = [folder, *folder.glob("shard_*")] if count == 1 else [folder / f"shard_{shard}_of_{count}"]
            with ExitStack() as stack:  # a second run of the same is refused at once
                for path in folders:
                    stack.enter_context(owned_folder(path))
                return _process(recording, settings, say)
    finally:
        torch.set_num_threads(before)
        with suppress(OSError):
            settings.mask_folder.rmdir()  # all that was in it went when the last shard ended


def _process(recording: Recording, settings: ImportSettings, say: Callable[[str], None]) -> dict | None:
    rig = None if settings.rig == CALIBRATED else load_rig(settings.rig)
    num_frames = recording.videos[0].num_frames
    count = min(num_frames, settings.num_samples)
    if count > MAX_SAMPLES:
        raise ValueError(f"{count} samples are asked for, one dataset holds {MAX_SAMPLES}; lower --num_samples")
    if count < settings.num_samples:
        say(f"the recording has {num_frames} frames: {count} samples instead of {settings.num_samples}")
    frames = np.unique(np.round(np.linspace(0, num_frames - 1, count)).astype(int)).tolist()
    say(f"{len(recording.videos)} cameras, {num_frames} frames; reading the masks of {len(frames)}")
    with _alone(settings):  # other shards wait for the masks, then share them
        tracks = record_masks(recording, frames, settings)
    recording, analysis = analyse(recording, frames, tracks, settings, say)
    plan = plan_dataset(recording.calibration, analysis, rig, settings)
    body = f"body {plan.body_length:.3g} long in the calibration's unit"
    say(f"{body} = {plan.body_length * plan.scale:.3g} world units; {settings.framing} framing")
    if plan.zoom < 1.0:
        worst = analysis.frames[int(plan.extents.max(axis=1).argmax())]
        say(f"all images made smaller by {plan.zoom:.3f} so that nothing is clipped (frame {worst} decides)")
    if rig is not None and plan.rig.differences(rig):
        nearest = f"--poses nearest would label the views with the poses of {rig.name}"
        say(f"the dataset's rig is {plan.rig.name}, the cameras as measured ({nearest})")
    parameters = json.loads(json.dumps(dataset_parameters(settings, recording, analysis, plan)))
    with _alone(settings):
        remove_leftovers(settings.output_dir)
        open_dataset(settings.output_dir, plan.rig, parameters)
    write_samples(recording, analysis, plan, settings)
    if not all(is_complete_sample(settings.sample(index)) for index in range(len(analysis.frames))):
        say(f"shard {settings.shard} is complete; the last shard writes split lists and report")
        return None
    with _alone(settings):
        train, val = write_splits(recording, analysis, settings)
        report = write_report(settings, recording.calibration, analysis, plan)
        for path in settings.mask_folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK_FILE:
                path.unlink()
    for frame, reason in list(analysis.skipped.items())[:LISTED]:
        say(f"frame {frame} was left out: {reason}")
    say(f"{train} training and {val} validation samples in {settings.output_dir}")
    if left_out := len(analysis.frames) - train - val:
        say(f"{left_out} samples are in neither list: they lie within {GAP_SECONDS} s of the border between the two")
    return report


@contextmanager
def _alone(settings: ImportSettings) -> Iterator[None]:
    """Has the dataset to itself for a step, waiting for other shards."""
    with ExitStack() as stack:
        while settings.part[1] > 1:
            try:
                stack.enter_context(owned_folder(settings.mask_folder))
                break
            except ValueError:  # another shard has it
                time.sleep(WAIT_S)
        yield


def plan_dataset(calibration: Calibration, analysis: Analysis, rig: ViewRig | None, settings: ImportSettings) -> Plan:
    """Makes the plan with the largest zoom (at most the standard size) at which no mask reaches the border."""
    options = {"rig": rig, "body_length": analysis.body_length, "headings_deg": analysis.headings_deg}
    plan, size = make_plan(calibration, analysis.centres, settings, **options), settings.image_size
    hulls = [[track.hull(place) for place in analysis.places] for track in analysis.tracks]
    extents = mask_extents(calibration, plan, hulls)
    if not np.isfinite(extents).all():
        bad = analysis.frames[int(np.argwhere(~np.isfinite(extents))[0, 0])]
        raise ValueError(f"frame {bad}: a mask reaches behind its camera; the mask or the calibration is wrong")
    # How far a mask may reach from the center, over half the width, so that the border's pixels stay empty.
    magnification = float(plan.true_focal.max()) * size / float(calibration.K[:, 0, 0].min())
    largest = 1.0 - 2.0 * max(MARGIN_PX, 0.6 + FILTER_REACH * magnification) / size
    zoom = min(1.0, largest / float(extents.max()))
    if zoom < 1.0:  # every true focal length is so much shorter
        plan, extents = make_plan(calibration, analysis.centres, settings, zoom=zoom, **options), extents * zoom
    return replace(plan, extents=extents)


def dataset_parameters(settings: ImportSettings, recording: Recording, analysis: Analysis, plan: Plan) -> dict:
    """What dataset.json says beside the rig; file names only, so that nothing points at one machine."""
    asked = ("image_size", "framing", "poses", "scale", "segment", "centre", "smooth_frames", "time_jumps", "heading")
    order = plan.orders[0].tolist() if analysis.headings_deg is None else None
    return {
        "kind": "recording",
        "source": {
            "calibration": Path(recording.calibration.source).name,
            "videos": [video.files[0].name for video in recording.videos],
            "num_frames": recording.videos[0].num_frames, "frames_per_second": recording.videos[0].rate,
            "up": settings.up,
        },
        "requested_rig": settings.rig,
        **{name: getattr(settings, name) for name in asked},
        "split": settings.split, "split_seed": settings.split_seed if settings.split == "random" else None,
        "view_cameras": order, "reference_camera": order and order[plan.rig.reference_view],
        "world_units_per_calibration_unit": plan.scale, "body_length": analysis.body_length, "zoom": plan.zoom,
        "frames": analysis.frames,
        "skipped_frames": {str(frame): reason for frame, reason in analysis.skipped.items()},
    }  # fmt: skip


def write_samples(recording: Recording, analysis: Analysis, plan: Plan, settings: ImportSettings) -> None:
    """Decodes all videos in order and writes this shard's samples that are not there yet."""
    size, (shard, shards), count = settings.image_size, settings.part, len(plan.orders)
    mine = range(count * shard // shards, count * (shard + 1) // shards)
    todo = np.array([index for index in mine if not is_complete_sample(settings.sample(index))], dtype=int)
    parts = [settings.output_dir / f".{settings.sample(index).name}.part" for index in todo]
    for index, part in zip(todo, parts):  # what a killed import left of them
        for leftover in (part, settings.sample(index)):
            shutil.rmtree(leftover, ignore_errors=True)
    cameras, cuts = range(len(recording.videos)), {}
    for camera in cameras:
        slots = (plan.orders[todo] == camera).argmax(axis=1)
        cuts[camera] = {
            "frame": [analysis.frames[index] for index in todo],
            "mask": [analysis.places[index] for index in todo],
            "path": [f"{part.name}/images/cam_{slot:03d}.png" for part, slot in zip(parts, slots)],
            "rotation": plan.true_rotation[todo, slots],
            "focal_px": plan.true_focal[todo, slots] * size,
        }
    folders = settings.mask_folder, settings.output_dir
    make = partial(cut_camera, recording.calibration, recording.videos, cuts, *folders, size)
    costs = [DECODED + float(track.area[analysis.places].mean()) for track in analysis.tracks]
    arrived = Counter()
    with tqdm(total=len(todo), desc="samples", unit="sample", disable=None if len(todo) else True) as bar:
        for _, step, _ in run_lanes(make, cameras, len(todo), workers=settings.workers, costs=costs):
            arrived[step] += 1
            if arrived[step] == len(cameras):
                sample = settings.sample(todo[step])
                (parts[step] / CAMERAS_FILE).write_text(sample_cameras(sample.name, todo[step], analysis, plan, size))
                os.replace(parts[step], sample)
                bar.update()


def sample_cameras(name: str, index: int, analysis: Analysis, plan: Plan, size: int) -> str:
    """Returns a sample's opencv_cameras.json, a line per camera."""
    frames = plan.label[index].resize(size, size).to(torch.float32).to_frames()
    for slot, frame in enumerate(frames):
        frame |= {"file_path": f"images/cam_{slot:03d}.png", "view": plan.rig.view_names[slot]}
    extra = {"frame": analysis.frames[index], "calibration_to_sample": plan.to_sample[index].tolist()}
    if analysis.headings_deg is not None:
        extra |= {"view_cameras": plan.orders[index].tolist(), "heading_deg": float(analysis.headings_deg[index])}
    cameras = ",\n".join(json.dumps(frame) for frame in frames)  # Python's encoder is several times slower at indenting
    head = json.dumps({"id": name, **extra})
    return f'{head[:-1]}, "frames": [\n{cameras}\n]}}\n'


def write_splits(recording: Recording, analysis: Analysis, settings: ImportSettings) -> tuple[int, int]:
    """Writes the split lists of a dataset whose samples are all there; returns how many each has."""
    rate = recording.videos[0].rate
    seconds = [frame / rate for frame in analysis.frames] if rate else None
    seed = settings.split_seed if settings.split == "random" else None
    splits = split_samples(len(analysis.frames), seconds, seed)
    os.sync()  # the lists must not reach the disk before what they list
    for name, chosen in zip(("train", "val"), splits):
        write_split(settings.output_dir / f"data_mouse_{name}.txt", [settings.sample(index) for index in chosen])
    return len(splits[0]), len(splits[1])


def split_samples(count: int, seconds: list[float] | None, seed: int | None) -> tuple[list[int], list[int]]:
    """Splits sample numbers 80/20 into training and validation.

    By blocks of time, since neighboring frames are nearly one image: one block from the middle of a short recording,
    two of a longer one. seconds: when each sample was taken; training samples nearer than GAP_SECONDS to a block are
    left out, but no more than GAP_FRACTION of all at each border (and none of fewer than MIN_FOR_TWO_BLOCKS).
    seed: at random instead, the same for the same seed and number, for frames far apart, or to repeat others' splits.
    """
    number = max(1, round(VALIDATION_FRACTION * count)) if count > 1 else 0
    held_out, dropped = set(), set()
    if seed is not None:
        shuffled = np.random.default_rng(np.random.SeedSequence([seed, count])).permutation(count)
        held_out.update(shuffled[:number].tolist())
    elif count < MIN_FOR_TWO_BLOCKS:
        held_out.update(range((count - number) // 2, (count - number) // 2 + number))
    else:
        for middle, length in ((count // 4, number - number // 2), (3 * count // 4, number // 2)):
            first, last = middle - length // 2, middle - length // 2 + length - 1
            held_out.update(range(first, last + 1))
            for step in range(1, max(1, round(GAP_FRACTION * count)) + 1) if seconds else ():
                near = [(k, edge) for k, edge in ((first - step, first), (last + step, last)) if 0 <= k < count]
                dropped.update(k for k, edge in near if abs(seconds[k] - seconds[edge]) < GAP_SECONDS)
    return [index for index in range(count) if index not in held_out | dropped], sorted(held_out)
