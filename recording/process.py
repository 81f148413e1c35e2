"""The import of one recording: analyse the masks, make the plan, warp and write the samples, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from multiview.rig import ViewRig, load_rig
from multiview.sample import DATASET_FILE, write_split
from recording.analysis import (
    Analysis,
    Recording,
    analyse,
    choose_frames,
    hulls_of,
    mask_folder,
    open_recording,
    record_masks,
)
from recording.calibration import Calibration
from recording.geometry import CALIBRATED, Placement, Plan, label_error, make_plan, mask_extents, place
from recording.output import alone, finish, is_finished, sample_name, start_dataset, write_samples
from recording.settings import ImportSettings
from recording.splits import split_blocks, split_random
from recording.streams import start_early

MARGIN_PX = 2.0  # free rim of every picture, at the size written
FILTER_REACH = 0.5  # photograph pixels by which the warp widens a mask


def process_recording(settings: ImportSettings, say: Callable[[str], None] = lambda text: None) -> dict | None:
    """Imports a recording into settings.output_dir and returns the quality report; repeating the call resumes it.

    With a shard of several, None is returned while other shards' samples are missing; the last one writes split lists
    and report.
    """
    with one_thread():
        return _process(settings, say)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's small tensors are not worth threads, which would wait for each other beside busy worker processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _process(settings: ImportSettings, say: Callable[[str], None]) -> dict | None:
    if settings.workers > 1:
        start_early()
    rig = None if settings.rig == CALIBRATED else load_rig(settings.rig)
    recording = open_recording(settings)
    frames = choose_frames(recording.num_frames, settings.num_samples)
    if len(frames) < settings.num_samples:
        say(f"the recording has {recording.num_frames} frames: {len(frames)} samples instead of {settings.num_samples}")
    say(f"{len(recording.videos)} cameras, {recording.num_frames} frames; reading the masks of {len(frames)}")
    with alone(mask_folder(settings)):  # other shards wait for the masks, then share them
        tracks = record_masks(recording, frames, settings)
    recording, analysis = analyse(recording, frames, tracks, settings, say)
    plan, placements = plan_dataset(recording.calibration, analysis, rig, settings)
    for line in describe(settings.output_dir, plan, recording.calibration, analysis, placements):
        say(line)
    parameters = json.loads(json.dumps(dataset_parameters(settings, recording, analysis, plan)))
    with alone(mask_folder(settings)):
        start_dataset(settings.output_dir, plan.rig, parameters)
    write_samples(recording, analysis, plan, placements, tracks, settings)
    if not is_finished(settings.output_dir, len(placements)):
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
    """Split lists and report of a dataset whose samples are all there."""
    from recording.quality.report import write_report

    folders = [settings.output_dir / sample_name(index) for index in range(len(placements))]
    if settings.split == "random":
        train, val = split_random(folders, settings.split_seed)
    else:
        rate = recording.videos[0].rate
        train, val = split_blocks(folders, seconds=[frame / rate for frame in analysis.frames] if rate else None)
    with finish(settings):
        write_split(settings.output_dir / "data_mouse_train.txt", train)
        write_split(settings.output_dir / "data_mouse_val.txt", val)
        report = write_report(
            settings.output_dir, recording.calibration, analysis, plan, placements, settings.image_size,
            workers=settings.workers,
        )  # fmt: skip
    say(f"{len(train)} training and {len(val)} validation samples in {settings.output_dir}")
    return report


def place_all(plan: Plan, calibration: Calibration, analysis: Analysis) -> list[Placement]:
    """The cameras of every kept frame."""
    headings = [None] * len(analysis.centres) if analysis.headings_deg is None else analysis.headings_deg.tolist()
    return [place(plan, calibration, *where) for where in zip(analysis.centres, headings, strict=True)]


def plan_dataset(
    calibration: Calibration, analysis: Analysis, rig: ViewRig | None, settings: ImportSettings
) -> tuple[Plan, list[Placement]]:
    """The plan with the largest zoom (at most the standard size) at which no mask of any view reaches the border.

    Returned with the cameras of every kept frame.
    """
    options = {
        "rig": rig,
        "framing": settings.framing,
        "poses": settings.poses,
        "body_length": analysis.body_length,
        "reference_camera": settings.reference_camera,
        "scaling": settings.scale,
        "headings_deg": analysis.headings_deg,
    }
    plan = make_plan(calibration, analysis.centres, **options)
    placements = place_all(plan, calibration, analysis)
    extents = mask_extents(calibration, placements, hulls_of(analysis))
    if not np.isfinite(extents).all():
        bad = analysis.frames[int(np.argwhere(~np.isfinite(extents))[0, 0])]
        raise ValueError(f"frame {bad}: a mask reaches behind its camera; the mask or the calibration is wrong")
    zoom = min(1.0, _largest_extent(calibration, placements, settings.image_size) / float(extents.max()))
    if zoom < 1.0:
        plan = make_plan(calibration, analysis.centres, **options, zoom=zoom)
        placements = place_all(plan, calibration, analysis)
    return plan, placements


def _largest_extent(calibration: Calibration, placements: list[Placement], size: int) -> float:
    """How far a mask may reach from the centre, over half the width, so that the border's pixels stay empty."""
    focal_px = max(float(placement.true_focal.max()) for placement in placements) * size
    magnification = focal_px / float(calibration.K[:, 0, 0].min())
    return 1.0 - 2.0 * max(MARGIN_PX, 0.6 + FILTER_REACH * magnification) / size


def describe(
    folder: Path, plan: Plan, calibration: Calibration, analysis: Analysis, placements: list[Placement]
) -> list[str]:
    """What was decided, in words."""
    body = plan.body_length * plan.scale
    lines = [
        f"body {plan.body_length:.3g} long in the calibration's unit = {body:.3g} world units; {plan.framing} framing"
    ]
    if plan.zoom < 1.0:
        worst = int(mask_extents(calibration, placements, hulls_of(analysis)).max(axis=1).argmax())
        lines.append(
            f"all pictures made smaller by {plan.zoom:.3f} so that nothing is clipped (frame {analysis.frames[worst]} "
            "decides)"
        )
    deviation = np.stack([placement.deviation_deg for placement in placements])
    if plan.requested is None:
        lines.append("views named by their measured azimuth (rig calibrated)")
    for slot, view in enumerate(plan.rig.views):
        lines.append(
            f"  {view.name:<16} {_camera_of(placements, slot)}  az {view.azimuth_deg:6.1f}"
            f"  el {view.elevation_deg:5.1f}  d {plan.rig.view_distance(view):.3f}"
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


def _camera_of(placements: list[Placement], slot: int) -> str:
    cameras = sorted({placement.order[slot] for placement in placements})
    return f"camera{'s' if len(cameras) > 1 else ''} {', '.join(map(str, cameras))}"


def dataset_parameters(settings: ImportSettings, recording: Recording, analysis: Analysis, plan: Plan) -> dict:
    """What dataset.json says beside the rig; file names only, so that nothing points at one machine."""
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
