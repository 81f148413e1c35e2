"""The import of one recording: analyse the masks, make the plan, warp and write the samples, report."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from multiview.recording.analysis import Analysis, Recording, analyse, choose_frames, open_recording
from multiview.recording.calibration import Calibration
from multiview.recording.geometry import CALIBRATED, Placement, Plan, frame_extent, label_error, make_plan, place
from multiview.recording.masks import clean_mask
from multiview.recording.rectify import rectify
from multiview.recording.settings import ImportSettings
from multiview.recording.video import VideoReader
from multiview.rig import ViewRig, load_rig
from multiview.sample import DATASET_FILE, Sample, is_complete_sample, open_dataset, write_sample, write_split

MARGIN_PX = 2.0  # free rim of every picture, at the size written
VALIDATION_SHARE = 0.2
MIN_FOR_TWO_BLOCKS = 20


def process_recording(settings: ImportSettings, say: Callable[[str], None] = lambda text: None) -> dict:
    """Imports a recording into settings.output_dir and returns the quality report; repeating the call resumes it."""
    from multiview.recording.report import write_report

    rig = None if settings.rig == CALIBRATED else load_rig(settings.rig)
    recording = open_recording(settings)
    frames = choose_frames(recording.num_frames, settings.num_samples)
    if len(frames) < settings.num_samples:
        say(f"the recording has {recording.num_frames} frames: {len(frames)} samples instead of {settings.num_samples}")
    say(f"{len(recording.videos)} cameras, {recording.num_frames} frames; reading the masks of {len(frames)}")
    analysis = analyse(recording, frames, settings, say)
    plan = plan_dataset(recording.calibration, analysis, rig, settings)
    placements = [place(plan, recording.calibration, centre) for centre in analysis.centres]
    for line in describe(settings.output_dir, plan, recording.calibration, analysis, placements):
        say(line)
    parameters = json.loads(json.dumps(dataset_parameters(settings, recording, analysis, plan)))
    open_dataset(settings.output_dir, plan.rig, parameters)
    write_samples(recording, analysis, plan, placements, settings)
    folders = [settings.output_dir / sample_name(index) for index in range(len(analysis.frames))]
    train, val = split_by_time(folders)
    write_split(settings.output_dir / "data_mouse_train.txt", train)
    write_split(settings.output_dir / "data_mouse_val.txt", val)
    say(f"{len(train)} training and {len(val)} validation samples in {settings.output_dir}")
    return write_report(settings.output_dir, recording.calibration, analysis, plan, placements, settings.image_size)


def plan_dataset(calibration: Calibration, analysis: Analysis, rig: ViewRig | None, settings: ImportSettings) -> Plan:
    """The plan with the largest zoom (at most the standard size) at which no mask of any view reaches the border."""
    options = {
        "rig": rig,
        "framing": settings.framing,
        "poses": settings.poses,
        "body_length": analysis.body_length,
        "reference_camera": settings.reference_camera,
    }
    plan = make_plan(calibration, analysis.centres, **options)
    extents = mask_extents(calibration, plan, analysis)
    if not np.isfinite(extents).all():
        bad = analysis.frames[int(np.argwhere(~np.isfinite(extents))[0, 0])]
        raise ValueError(f"frame {bad}: a mask reaches behind its camera; the mask or the calibration is wrong")
    zoom = min(1.0, (1.0 - 2.0 * MARGIN_PX / settings.image_size) / float(extents.max()))
    return make_plan(calibration, analysis.centres, **options, zoom=zoom) if zoom < 1.0 else plan


def mask_extents(calibration: Calibration, plan: Plan, analysis: Analysis) -> np.ndarray:
    """[t, v] how far the masks reach from the pictures' centres, over half the width."""
    rows = []
    for centre, masks in zip(analysis.centres, analysis.masks, strict=True):
        rows.append(frame_extent(calibration, plan, place(plan, calibration, centre), [mask.hull for mask in masks]))
    return np.stack(rows)


def describe(
    folder: Path, plan: Plan, calibration: Calibration, analysis: Analysis, placements: list[Placement]
) -> list[str]:
    """What was decided, in words."""
    body = plan.body_length * plan.scale
    lines = [
        f"body {plan.body_length:.3g} long in the calibration's unit = {body:.3g} world units; {plan.framing} framing"
    ]
    if plan.zoom < 1.0:
        worst = int(mask_extents(calibration, plan, analysis).max(axis=1).argmax())
        lines.append(
            f"all pictures made smaller by {plan.zoom:.3f} so that nothing is clipped (frame {analysis.frames[worst]} "
            "decides)"
        )
    deviation = np.stack([placement.deviation_deg for placement in placements])
    if plan.requested is None:
        lines.append("views named by their measured azimuth (rig calibrated)")
    for slot, view in enumerate(plan.rig.views):
        lines.append(
            f"  {view.name:<16} camera {plan.order[slot]}  az {view.azimuth_deg:6.1f}  el {view.elevation_deg:5.1f}"
            f"  d {plan.rig.view_distance(view):.3f}  {plan.view_off_deg[slot]:4.1f} deg from the rig's view;"
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


# ---- output -----------------------------------------------------------------------------------------------------


def sample_name(index: int) -> str:
    return f"sample_{index:06d}"


def dataset_parameters(settings: ImportSettings, recording: Recording, analysis: Analysis, plan: Plan) -> dict:
    """What dataset.json says beside the rig; file names only, so that nothing points at one machine."""
    return {
        "kind": "recording",
        "source": {
            "calibration": Path(recording.calibration.source).name,
            "videos": [video.files[0].name for video in recording.videos],
            "num_frames": recording.num_frames,
            "frames_per_second": recording.videos[0].rate,
            "up": settings.up,
        },
        "image_size": settings.image_size,
        "requested_rig": settings.rig,
        "framing": settings.framing,
        "poses": settings.poses,
        "view_cameras": plan.order,
        "reference_camera": plan.reference_camera,
        "world_units_per_calibration_unit": plan.scale,
        "body_length": analysis.body_length,
        "zoom": plan.zoom,
        "frames": analysis.frames,
        "skipped_frames": {str(frame): reason for frame, reason in analysis.skipped.items()},
    }


def write_samples(
    recording: Recording, analysis: Analysis, plan: Plan, placements: list[Placement], settings: ImportSettings
) -> None:
    """Decodes all videos in order and writes the samples that are not there yet."""
    from tqdm import tqdm

    todo = [
        index
        for index in range(len(analysis.frames))
        if not is_complete_sample(settings.output_dir / sample_name(index))
    ]
    if not todo:
        return
    with ExitStack() as stack:
        readers = [stack.enter_context(VideoReader(video)) for video in (*recording.videos, *recording.masks)]
        decoders = stack.enter_context(ThreadPoolExecutor(min(len(readers), 2 * settings.workers)))
        writers = stack.enter_context(ThreadPoolExecutor(settings.workers))
        pending: deque[Future] = deque()
        for index in tqdm(todo, desc="samples", unit="sample", disable=None):
            frame = analysis.frames[index]
            pictures = list(decoders.map(lambda reader, frame=frame: reader.read(frame), readers))
            if len(pending) >= 2 * settings.workers:  # memory stays flat
                pending.popleft().result()
            pending.append(
                writers.submit(_write_one, recording, plan, placements[index], pictures, index, frame, settings)
            )
        while pending:
            pending.popleft().result()


def _write_one(
    recording: Recording,
    plan: Plan,
    placement: Placement,
    pictures: list[np.ndarray],
    index: int,
    frame: int,
    settings: ImportSettings,
) -> None:
    size, count = settings.image_size, len(recording.videos)
    rgba = np.stack(
        [
            rectify(
                recording.calibration,
                camera,
                pictures[camera],
                clean_mask(pictures[count + camera]),
                rotation=placement.true_rotation[slot],
                focal_px=float(placement.true_focal[slot]) * size,
                size=size,
            )
            for slot, camera in enumerate(plan.order)
        ]
    )
    sample = Sample(
        id=sample_name(index),
        rgba=torch.from_numpy(rgba),
        cameras=placement.label_cameras(size),
        view_names=list(plan.rig.view_names),
        extra={"frame": frame, "calibration_to_sample": placement.to_sample.tolist()},
    )
    write_sample(settings.output_dir / sample.id, sample)


def split_by_time(folders: list[Path]) -> tuple[list[Path], list[Path]]:
    """80/20 by blocks of time: frames next to each other are nearly the same picture, so they stay on one side.

    Validation takes one block from the middle of a short recording, two (around 1/4 and 3/4) of a longer one.
    """
    count = len(folders)
    number = max(1, round(VALIDATION_SHARE * count)) if count > 1 else 0
    if count < MIN_FOR_TWO_BLOCKS:
        held_out = set(range((count - number) // 2, (count - number) // 2 + number))
    else:
        first, second = number - number // 2, number // 2
        starts = (count // 4 - first // 2, 3 * count // 4 - second // 2)
        held_out = {*range(starts[0], starts[0] + first), *range(starts[1], starts[1] + second)}
    train = [folder for index, folder in enumerate(folders) if index not in held_out]
    return train, [folder for index, folder in enumerate(folders) if index in held_out]
