"""Figures per view and for the whole dataset, from the figures of its samples."""

from __future__ import annotations

import numpy as np
import torch

from multiview.cameras import Cameras
from multiview.rig import ViewRig
from recording.geometry import angular_distance, circular_mean_deg
from recording.quality.diagnose import FITTED, Diagnosis, diagnose
from recording.quality.measure import Measured
from recording.quality.tangency import Views

MOST_FOR_SILHOUETTES = 2 * FITTED  # samples whose outlines are compared; more change nothing


def summarise(measured: list[Measured], rig: ViewRig | None) -> tuple[dict, Diagnosis | None]:
    """measured: at least one sample. rig: what the dataset states, None if nothing. Diagnosis: None below 3 views.

    Samples may have different numbers of views; the common ones are looked at.
    """
    counts = {len(one.views) for one in measured}
    count = min(counts)
    views = [_view_summary([one.views[slot] for one in measured]) for slot in range(count)]
    names = measured[0].view_names[:count]
    for key in ("brightness", "sharpness"):
        for view, ratio in zip(views, _relative(measured, key, count), strict=True):
            view[f"{key}_relative"] = ratio
    for slot, view in enumerate(views):
        view["name"] = names[slot] or f"view {slot}"
        if rig is not None and slot < rig.num_views:
            stated = rig.views[slot]
            view["off_rig_deg"] = float(
                angular_distance(view["azimuth_deg"], view["elevation_deg"], stated.azimuth_deg, stated.elevation_deg)
            )
    diagnosis = diagnose(outlines(measured, count)) if count >= 3 else None
    if diagnosis is not None:
        for view, disagreement in zip(views, diagnosis.per_view, strict=True):
            view["tangency_rms"] = disagreement
    total = {
        "num_samples": len(measured),
        "num_views": count,
        "view_counts": sorted(counts),
        "sizes": sorted({one.size for one in measured}),
        "rig": None if rig is None else rig.name,
        "measured_rig": None if rig is not None else measured_rig(measured, names).to_dict(),
        "distance_mean": _mean([view["distance_mean"] for view in views]),
        "distance_variation": float(np.std([v["distance_mean"] for v in views]))
        / _mean([v["distance_mean"] for v in views]),
        "mask_area_mean": _mean([view["mask_area"] for view in views]),
        "clipped": sum(view["clipped"] for view in views),
        "empty": sum(view["empty"] for view in views),
        "silhouette_iou_mean": _mean([view["silhouette_iou"] for view in views]),
        "silhouette_filled_mean": _mean([view["silhouette_filled"] for view in views]),
        "tangency_rms": None if diagnosis is None else diagnosis.rms,
        "tangency_rms_explained": None if diagnosis is None else diagnosis.left,
        "views": views,
    }
    return total, diagnosis


def outlines(measured: list[Measured], count: int) -> Views:
    """The first `count` views of evenly chosen samples whose outlines are all known, or as they are if none has."""
    whole = [one for one in measured if np.isfinite(one.points[:count]).all()] or measured
    chosen = np.unique(np.linspace(0, len(whole) - 1, MOST_FOR_SILHOUETTES).round().astype(int))
    arrays = [np.stack([getattr(whole[k], name)[:count] for k in chosen]) for name in ("points", "intrinsics", "w2c")]
    return Views(*arrays)


def measured_rig(measured: list[Measured], names: list[str | None]) -> ViewRig:
    """What the cameras of a dataset without a rig amount to: those of its first sample."""
    one = measured[0]
    width, height = one.size
    values = torch.from_numpy(one.intrinsics[: len(names)]) * width
    cameras = Cameras.from_w2c(torch.from_numpy(one.w2c[: len(names)]), values, height, width)
    distinct = [name for name in names if name is not None]
    complete = len(set(distinct)) == len(names)
    return ViewRig.from_cameras(
        cameras, "measured", distinct if complete else [f"view_{slot:02d}" for slot in range(len(names))]
    )


def _view_summary(rows: list[dict]) -> dict:
    """One view over all samples; rows: `measure` figures."""

    def known(key: str) -> np.ndarray:
        return np.array([row[key] for row in rows if row[key] is not None], dtype=float)

    area = np.array([row["area"] for row in rows if row["usable"]])
    centre_x, centre_y = known("centre_x"), known("centre_y")
    colours = [row["colour"] for row in rows if row["colour"] is not None]
    sharpness = known("sharpness")
    return {
        "name": "",
        "azimuth_deg": float(circular_mean_deg(known("azimuth_deg"))),
        "elevation_deg": _mean(known("elevation_deg")),
        "distance_mean": _mean(known("distance")),
        "distance_std": float(known("distance").std()),
        "focal": _mean(known("focal")),
        "focal_spread": float(np.ptp(known("focal"))),
        "focal_ratio": _mean(known("focal_ratio")),
        "cx": _mean(known("cx")),
        "cy": _mean(known("cy")),
        "look_off_deg": _mean(known("look_off_deg")),
        "centre_x": _mean(centre_x),
        "centre_y": _mean(centre_y),
        "centre_off_rms": float(np.sqrt(np.mean(centre_x**2 + centre_y**2))) if len(centre_x) else None,
        "mask_area": _mean(area),
        "mask_area_variation": float(area.std() / area.mean()) if len(area) else None,
        "clipped": int(sum(row["clipped"] for row in rows)),
        "empty": int(sum(not row["usable"] and not row["no_mask"] for row in rows)),
        "without_mask": int(sum(row["no_mask"] for row in rows)),
        "brightness": _mean(known("brightness")),
        "colour": np.mean(colours, axis=0).tolist() if colours else None,
        "dark_share": _mean(known("dark_share")),
        "bright_share": _mean(known("bright_share")),
        "sharpness": float(np.median(sharpness)) if len(sharpness) else None,
        "silhouette_iou": _mean(known("silhouette_iou")),
        "silhouette_filled": _mean(known("silhouette_filled")),
    }


def _relative(measured: list[Measured], key: str, count: int) -> list[float | None]:
    """Per view, the median over the samples of its figure over the median of the sample's views.

    Within a sample the animal and its light are the same, so what remains is the camera, and the side it sees.
    """
    rows = np.array([[view[key] for view in one.views[:count]] for one in measured], dtype=float)
    ratios = [row / np.median(row) for row in rows if np.isfinite(row).all() and np.median(row) > 0]
    return np.median(ratios, axis=0).tolist() if ratios else [None] * count


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
