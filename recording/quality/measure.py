"""Figures of posed, masked samples: masks, light, sharpness, cameras, silhouettes; and their summary per view."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

from multiview.cameras import Cameras
from multiview.metrics import view_consistency
from multiview.rig import ViewRig
from multiview.sample import Sample, read_sample
from recording.geometry import angular_distance, circular_mean_deg
from recording.quality.silhouettes import DIRECTIONS, FITTED, Diagnosis, Views, diagnose, evenly, outline

MOST_VIEWS = 12  # looked at where no rig says how many belong to one
MOST_FOR_SILHOUETTES = 2 * FITTED  # samples whose outlines are compared; more change nothing
RIM_ALPHA = 0.02  # more of the animal than this in the outermost row or column: it is clipped
OPAQUE_SHARE = 0.999  # a "mask" that covers so much of the image is none
EMPTY_SHARE = 1e-5
BRIGHT = 0.98  # luminance beyond which a pixel holds no detail
LUMA = (0.299, 0.587, 0.114)
MOST_TURNED_DEG = 60.0  # cameras that look elsewhere carve nothing


class Measured(NamedTuple):
    """One sample's figures. views: one dict of numbers per view. outlines: as `Views`, without their first axis."""

    folder: Path | None
    size: tuple[int, int]
    view_names: list[str | None]
    views: list[dict]
    outlines: Views


def measure_folders(
    folders: list[Path], *, num_views: int | None, workers: int, carved: Collection[Path] | None = None,
    progress: bool = False,
) -> tuple[list[Measured], dict[str, str]]:  # fmt: skip
    """Returns figures of all readable samples in order, and per unreadable one why: that is a finding, not the end.

    num_views: None takes all. carved: the samples whose hulls are carved, by default all.
    """

    def measure(folder: Path) -> Measured | str:
        try:
            sample = read_sample(folder, num_views=num_views)
            if num_views is None and len(sample.view_names) > MOST_VIEWS:
                sample = read_sample(folder, num_views=MOST_VIEWS)
            return measure_sample(sample, hulls=carved is None or folder in carved)
        except (ValueError, OSError) as error:
            return str(error)

    # Threads will do, with one of torch's each: decoding and carving leave Python's lock alone.
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        bar = tqdm(threads.map(measure, folders), "samples", len(folders), unit="sample", disable=not progress or None)
        results = dict(zip(folders, bar))
    broken = {str(folder): result for folder, result in results.items() if isinstance(result, str)}
    return [result for result in results.values() if isinstance(result, Measured)], broken


def measure_sample(sample: Sample, *, hulls: bool = True) -> Measured:
    """rgba [v, 4, h, w], cameras [v] -> figures; a view without a usable mask has None where it has no figure.

    hulls: whether to carve the hulls that predict each mask from the others, nearly all of the time.
    """
    cameras, count = sample.cameras, len(sample.rgba)
    fx, fy, cx, cy = cameras.fxfycxcy.double().T
    to_origin = torch.nn.functional.normalize(-cameras.origins, dim=-1)
    look_off = torch.rad2deg(torch.acos((cameras.c2w[:, :3, 2] * to_origin).sum(-1).clamp(-1, 1)))
    columns = {
        "azimuth_deg": cameras.azimuth_deg, "elevation_deg": cameras.elevation_deg, "distance": cameras.distance,
        "focal": fx / cameras.width, "focal_ratio": fy / fx, "cx": cx / cameras.width, "cy": cy / cameras.height,
        "look_off_deg": look_off,
    }  # fmt: skip
    points = np.full((count, DIRECTIONS, 2), np.nan)
    views = [{key: float(values[view]) for key, values in columns.items()} for view in range(count)]
    for view, rgba in enumerate(sample.rgba.numpy()):
        views[view] |= _image_figures(rgba)
        # A clipped mask's hull ends at the border, where the animal does not.
        if views[view]["usable"] and not views[view]["clipped"]:
            points[view] = outline(rgba[3])
    iou = filled = [None] * count
    if hulls and count >= 3 and all(view["usable"] for view in views) and float(look_off.max()) <= MOST_TURNED_DEG:
        found = view_consistency(sample.rgba[:, :3], sample.rgba[:, 3:], cameras)
        iou, filled = found["mask_iou_per_view"], found["mask_per_view"]
    for view, *overlap in zip(views, iou, filled, strict=True):
        view["silhouette_iou"], view["silhouette_filled"] = overlap
    outlines = Views(points, cameras.fxfycxcy.double().numpy() / cameras.width, cameras.w2c.double().numpy())
    return Measured(sample.folder, (cameras.width, cameras.height), list(sample.view_names), views, outlines)


def _image_figures(rgba: np.ndarray) -> dict:
    """rgba: [4, h, w]. area: share of the image. centre: the body's center from the image's, over the width.

    brightness: mean luminance of the animal, bright_share: the share of it that is white. sharpness: what blurring over
    3 x 3 pixels takes away inside the mask, over what blurring again takes away. A lens or a codec loses fine detail
    first, whereas an animal's light and dark sides differ in both alike.
    """
    alpha, luma = np.ascontiguousarray(rgba[3]), sum(share * channel for share, channel in zip(LUMA, rgba))
    height, width = alpha.shape
    rim = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    total, binary = float(alpha.sum(dtype=np.float64)), alpha > 0.5
    area = float(alpha.mean(dtype=np.float64))
    figures = {
        "usable": bool(binary.any()) and EMPTY_SHARE < area < OPAQUE_SHARE, "no_mask": area >= OPAQUE_SHARE,
        "area": area, "clipped": bool((rim > RIM_ALPHA).any()), "centre_x": None, "centre_y": None,
        "brightness": None, "bright_share": None, "sharpness": None,
    }  # fmt: skip
    if figures["usable"]:
        # Weighted by the squared distance from the outline, so that tail and legs hardly count.
        padded = np.pad(binary, 1).astype(np.uint8)
        depth = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1] ** 2
        figures["centre_x"] = float((depth.sum(0) @ np.arange(width)) / depth.sum() + 0.5 - width / 2) / width
        figures["centre_y"] = float((depth.sum(1) @ np.arange(height)) / depth.sum() + 0.5 - height / 2) / width
    if total >= 1:
        once = cv2.blur(luma, (3, 3))
        inside = cv2.erode((alpha > 0.9).astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=0) > 0
        fine, coarse = (np.abs(a - b)[inside] for a, b in ((luma, once), (once, cv2.blur(once, (3, 3)))))
        figures["brightness"] = float((luma * alpha).sum(dtype=np.float64) / total)
        figures["bright_share"] = float(((luma > BRIGHT) * alpha).sum(dtype=np.float64) / total)
        figures["sharpness"] = float(fine.mean() / max(coarse.mean(), 1e-9)) if len(fine) >= 25 else None
    return figures


def summarise(measured: list[Measured], rig: ViewRig | None) -> tuple[dict, Diagnosis | None]:
    """measured: at least one sample. rig: what the dataset states, None if nothing. Diagnosis: None below 3 views.

    Samples may have different numbers of views; the common ones are looked at.
    """
    first, counts = measured[0], sorted({len(one.views) for one in measured})
    count = counts[0]
    names = [name or f"view {slot}" for slot, name in enumerate(first.view_names[:count])]
    views = [{"name": names[slot], **_view_summary([one.views[slot] for one in measured])} for slot in range(count)]
    diagnosis = diagnose(outlines(measured, count)) if count >= 3 else None
    for key in ("brightness", "sharpness"):
        # Within a sample the animal and its light are the same: against its views' median remain the camera and the
        # side it sees.
        rows = np.array([[view[key] for view in one.views[:count]] for one in measured], dtype=float)
        ratios = [row / np.median(row) for row in rows if np.isfinite(row).all() and np.median(row) > 0]
        for view, ratio in zip(views, np.median(ratios, axis=0).tolist() if ratios else [None] * count):
            view[f"{key}_relative"] = ratio
    for view, stated in zip(views, rig.views if rig is not None else ()):
        where = (view["azimuth_deg"], view["elevation_deg"], stated.azimuth_deg, stated.elevation_deg)
        view["off_rig_deg"] = float(angular_distance(*where))
    for view, off in zip(views, diagnosis.per_view if diagnosis else ()):
        view["tangency_rms"] = off
    measured_rig = None
    if rig is None:  # that of the first sample's cameras
        (width, height), (_, intrinsics, w2c) = first.size, (torch.from_numpy(part[:count]) for part in first.outlines)
        labels = names if None not in first.view_names[:count] and len(set(names)) == count else None
        labels = labels or [f"view_{k:02d}" for k in range(count)]
        cameras = Cameras.from_w2c(w2c, intrinsics * width, height, width)
        measured_rig = ViewRig.from_cameras(cameras, "measured", labels).to_dict()
    distances, means = [view["distance_mean"] for view in views], ("mask_area", "silhouette_iou", "silhouette_filled")
    return {
        "num_samples": len(measured), "num_views": count, "view_counts": counts,
        "sizes": sorted({one.size for one in measured}),
        "rig": None if rig is None else rig.name, "measured_rig": measured_rig,
        "distance_mean": _mean(distances), "distance_variation": float(np.std(distances)) / _mean(distances),
        **{f"{key}_mean": _mean([view[key] for view in views]) for key in means},
        **{key: sum(view[key] for view in views) for key in ("clipped", "empty")},
        "tangency_rms": None if diagnosis is None else diagnosis.rms,
        "tangency_rms_explained": None if diagnosis is None else diagnosis.left,
        "views": views,
    }, diagnosis  # fmt: skip


def outlines(measured: list[Measured], count: int) -> Views:
    """The first `count` views of evenly chosen samples whose outlines are all known, or as they are if none has."""
    whole = [one.outlines for one in measured if np.isfinite(one.outlines.points[:count]).all()]
    whole = whole or [one.outlines for one in measured]
    chosen = [whole[index] for index in evenly(len(whole), MOST_FOR_SILHOUETTES)]
    return Views(*(np.stack([part[:count] for part in parts]) for parts in zip(*chosen)))


def _view_summary(rows: list[dict]) -> dict:
    """One view over all samples; rows: figures of `measure_sample`."""
    known = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0]}
    area = np.array([row["area"] for row in rows if row["usable"]])
    means = ("elevation_deg", "focal", "focal_ratio", "cx", "cy", "look_off_deg", "centre_x", "centre_y", "brightness",
             "bright_share", "silhouette_iou", "silhouette_filled")  # fmt: skip
    off = np.hypot(known["centre_x"], known["centre_y"])
    return {
        "azimuth_deg": float(circular_mean_deg(np.array(known["azimuth_deg"]))),
        "distance_mean": _mean(known["distance"]), "distance_std": float(np.std(known["distance"])),
        "focal_spread": float(np.ptp(known["focal"])),
        **{key: _mean(known[key]) for key in means},
        "centre_off_rms": float(np.sqrt(np.mean(off**2))) if len(off) else None,
        "mask_area": _mean(area),
        "mask_area_variation": float(area.std() / area.mean()) if len(area) else None,
        "clipped": int(sum(row["clipped"] for row in rows)),
        "empty": int(sum(not row["usable"] and not row["no_mask"] for row in rows)),
        "without_mask": int(sum(row["no_mask"] for row in rows)),
        "sharpness": float(np.median(known["sharpness"])) if known["sharpness"] else None,
    }  # fmt: skip


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
