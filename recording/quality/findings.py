"""The grade of a dataset, its reasons, and what to do about each.

`poor`: a model trained on it learns wrong geometry. `usable`: part of it is worse than it could be. `good`: nothing of
both. Notes do not count: they say what a command that reads the dataset has to know.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from multiview.rig import FACELIFT_DISTANCE, FACELIFT_FOCAL, ViewRig
from recording.quality.diagnose import Diagnosis, Fault

GRADES = ("poor", "usable", "good")
MANY = 0.02  # share of pictures from which a fault is the dataset's, not a slip
FOCAL_TOLERANCE, DISTANCE_TOLERANCE, PRINCIPAL_TOLERANCE = 0.02, 0.05, 0.02
METRIC_DISTANCE = 20.0  # a camera farther than this from the origin is given in millimetres or centimetres
RIG_OFF_DEG, LOOK_OFF_DEG = 3.0, 3.0
CENTRE_OFF, AREA_SMALL, AREA_LARGE, AREA_VARIATION = 0.15, 0.02, 0.45, 0.6
DIM, LOST_SHARE, DULL = 0.2, 0.10, 0.5  # of the views' median brightness; share of pixels; of the median sharpness
IOU_POOR = 0.6
ENOUGH = 5  # samples from which differences between views are the cameras', not the animal's sides
REPROCESS = "make the samples again with scripts/process_mouse_data.py, which writes every change into the cameras"


@dataclass(frozen=True)
class Finding:
    """severity: poor, usable or note. what: the reason, with numbers. remedy: what to do."""

    code: str
    severity: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def grade(findings: list[Finding]) -> dict:
    """{grade, reasons: sentences, findings: dicts}, the worst first."""
    order = {"poor": 0, "usable": 1, "note": 2}
    findings = sorted(findings, key=lambda finding: order[finding.severity])
    worst = min((order[finding.severity] for finding in findings), default=2)
    return {
        "grade": GRADES[worst],
        "reasons": [str(finding) for finding in findings],
        "findings": [asdict(finding) for finding in findings],
    }


def dataset_findings(
    summary: dict, diagnosis: Diagnosis | None, rig: ViewRig | None, broken: dict[str, str], notes: list[str]
) -> list[Finding]:
    """Everything that the samples themselves show."""
    return [
        *_reading(summary, broken, notes),
        *_masks(summary),
        *_silhouettes(summary, diagnosis),
        *_cameras(summary, rig),
        *_pictures(summary),
    ]


# ---- groups -----------------------------------------------------------------------------------------------------


def _reading(summary: dict, broken: dict[str, str], notes: list[str]) -> list[Finding]:
    found = []
    if broken:
        share = len(broken) / (len(broken) + summary["num_samples"])
        first = next(iter(broken.values()))
        found.append(
            Finding(
                "unreadable", "poor" if share > MANY else "usable",
                f"{len(broken)} samples cannot be read, the first: {first}",
                "mend or remove them from the lists; a training would stop there",
            )
        )  # fmt: skip
    if len(summary["view_counts"]) > 1:
        found.append(
            Finding(
                "view_counts", "usable", f"samples have {summary['view_counts']} views",
                "trainings read the first views of each and need as many as the rig has in all of them",
            )
        )  # fmt: skip
    if len(summary["sizes"]) > 1:
        found.append(
            Finding(
                "picture_sizes", "note", f"pictures have several sizes: {summary['sizes']}",
                "they are resized together with their cameras when read",
            )
        )  # fmt: skip
    if "absolute_paths" in notes or "camera_files" in notes:
        found.append(
            Finding(
                "list_style", "usable", "the list holds absolute paths or names camera files, as FaceLift's do",
                "trainings here take one sample folder per line, relative to the list, so that a dataset can be moved",
            )
        )  # fmt: skip
    return found


def _masks(summary: dict) -> list[Finding]:
    total = summary["num_samples"] * summary["num_views"]
    found = []
    for key, code, what, remedy in (
        ("empty", "empty_masks", "masks are empty", "segment these pictures again, or leave their frames out"),
        ("without_mask", "no_masks", "pictures have no mask (alpha is 1 all over)",
         "write the animal's mask into the alpha channel; every loss and the silhouettes need it"),
        ("clipped", "clipped", "masks touch the border: the animal is clipped",
         "make it smaller in all views alike (process_mouse_data.py chooses the largest zoom that clips nothing)"),
    ):  # fmt: skip
        number = sum(view[key] for view in summary["views"])
        if number:
            where = _names(summary, [slot for slot, view in enumerate(summary["views"]) if view[key]])
            severity = "poor" if number > MANY * total or key == "clipped" else "usable"
            found.append(Finding(code, severity, f"{number} of {total} {what} ({where})", remedy))
    area = summary["mask_area_mean"]
    if area is not None and not AREA_SMALL <= area <= AREA_LARGE:
        found.append(
            Finding(
                "animal_size", "usable", f"the animal covers {100 * area:.1f} % of the pictures on average",
                "5 to 20 % are usual; choose another framing when importing",
            )
        )  # fmt: skip
    uneven = [k for k, v in enumerate(summary["views"]) if (v["mask_area_variation"] or 0) > AREA_VARIATION]
    if uneven:
        found.append(
            Finding(
                "mask_variation", "usable", f"the mask's area jumps from frame to frame in {_names(summary, uneven)}",
                "look for frames in which the segmentation lost the animal or took the floor with it",
            )
        )  # fmt: skip
    return found


def _silhouettes(summary: dict, diagnosis: Diagnosis | None) -> list[Finding]:
    if diagnosis is None:
        return []
    found = [_fault_finding(summary, fault) for fault in diagnosis.faults]
    if not diagnosis.explained:
        width = summary["sizes"][0][0]
        odd = ""
        if diagnosis.odd_view is not None and diagnosis.rest < 0.5 * diagnosis.left:
            name = _names(summary, [diagnosis.odd_view])
            odd = f"; without {name} the others agree to {diagnosis.rest * width:.1f} px"
        found.append(
            Finding(
                "silhouettes_disagree", "poor",
                f"silhouettes disagree by {diagnosis.left * width:.1f} px rms of {width} and no usual fault explains "
                f"it{odd}",
                "check masks, synchronisation (frame n must be the same instant in every view) and the calibration",
            )
        )  # fmt: skip
    iou = summary["silhouette_iou_mean"]
    if iou is not None and iou < IOU_POOR and diagnosis.agrees:
        found.append(
            Finding(
                "silhouette_iou", "usable", f"masks predicted from the other views overlap only by {iou:.2f}",
                "few or one-sided views do that; bad masks inside the outline too",
            )
        )  # fmt: skip
    return found


def _cameras(summary: dict, rig: ViewRig | None) -> list[Finding]:
    views = summary["views"]
    found = _stated(summary, rig)
    off_centre = [k for k, view in enumerate(views) if _off_centre(view, summary)]
    if off_centre:
        what = f"the principal point is not the picture's centre in {_names(summary, off_centre)}"
        remedy = "stage 1 assumes that it is; the import turns cameras to the animal and centres it exactly"
        found.append(Finding("principal_point_stated", "usable", what, remedy))
    away = [k for k, view in enumerate(views) if view.get("off_rig_deg", 0.0) > RIG_OFF_DEG]
    if away:
        worst = max(views[k]["off_rig_deg"] for k in away)
        what = f"cameras of {_names(summary, away)} are up to {worst:.1f} deg from where rig {rig.name} has them"
        remedy = "state the rig they really have, or import with --poses nearest"
        found.append(Finding("directions", "poor", what, remedy))
    turned = [k for k, view in enumerate(views) if view["look_off_deg"] > LOOK_OFF_DEG]
    if turned:
        worst = max(view["look_off_deg"] for view in views)
        what = f"cameras of {_names(summary, turned)} do not look at the origin (up to {worst:.1f} deg off)"
        remedy = "the import turns every camera to the animal's centre and puts it at the origin"
        found.append(Finding("not_at_origin", "usable", what, remedy))
    return found


def _stated(summary: dict, rig: ViewRig | None) -> list[Finding]:
    """Distance and focal length as written, against the rig's; against what released weights expect without one."""
    expected, severity = (f"rig {rig.name}", "poor") if rig is not None else ("FaceLift's released weights", "note")
    focal = rig.focal if rig is not None else FACELIFT_FOCAL
    distance = rig.distance if rig is not None else FACELIFT_DISTANCE
    width, mean_distance = summary["sizes"][0][0], summary["distance_mean"]
    mean_focal = float(np.mean([view["focal"] for view in summary["views"]]))
    found = []
    if mean_distance > METRIC_DISTANCE:
        what = f"cameras stand {mean_distance:.0f} from the origin: millimetres, not world units"
        remedy = f"scale the world so that the mean distance is {distance:g}; {REPROCESS}"
        found.append(Finding("units", "poor", what, remedy))
    elif abs(mean_distance / distance - 1) > DISTANCE_TOLERANCE:
        what = f"cameras stand {mean_distance:.2f} from the origin, {expected} says {distance:.2f}"
        found.append(Finding("distance", severity, what, "one scale of the world for all views mends it"))
    if abs(mean_focal / focal - 1) > FOCAL_TOLERANCE:
        what = (
            f"the focal length written is {mean_focal * width:.0f} px of {width}, {expected} says {focal * width:.0f}"
        )
        remedy = "a resize moves fx, fy, cx, cy with the pixels, a crop cx, cy; another lens needs a rig of its own"
        found.append(Finding("focal_stated", severity, what, remedy))
    return found


def _pictures(summary: dict) -> list[Finding]:
    views, found = summary["views"], []
    strayed = [k for k, view in enumerate(views) if (view["centre_off_rms"] or 0) > CENTRE_OFF]
    if strayed:
        found.append(
            Finding(
                "centre", "usable", f"the animal stands far from the picture's centre in {_names(summary, strayed)}",
                "move the world's origin to the animal; never the pictures alone",
            )
        )  # fmt: skip
    for key, code, what, remedy in (
        ("sharpness", "blur", "less sharp than the others", "clean or focus these lenses; check the video's bit rate"),
        ("brightness", "exposure", "darker or brighter than the others", "match the exposures"),
    ):
        ratios = [view[f"{key}_relative"] or 1.0 for view in views]
        off = [k for k, r in enumerate(ratios) if (r < DULL if key == "sharpness" else abs(r - 1) > DIM)]
        if off:
            worst = max((ratios[k] for k in off), key=lambda ratio: abs(np.log(ratio)))
            what = f"{_names(summary, off)}: {what} ({worst:.2f} of the views' median)"
            severity = "usable" if summary["num_samples"] >= ENOUGH else "note"
            found.append(Finding(code, severity, what, remedy))
    lost = [k for k, view in enumerate(views) if (view["bright_share"] or 0) > LOST_SHARE]
    if lost:
        found.append(
            Finding("overexposed", "usable", f"much of the animal is pure white in {_names(summary, lost)}",
                    "lower the exposure: what is white carries no texture")
        )  # fmt: skip
    return found


# ---- faults that silhouettes show -------------------------------------------------------------------------------

FAULTS = {  # code: (what, remedy); {views}, {scale}, {degrees}, {pixels} are filled in
    "opengl_axes": ("all cameras look away from the animal: their axes are OpenGL's (y up, z backward)",
                    "negate the second and third row of every w2c, or import them as transforms.json"),
    "view_looks_away": ("the cameras of {views} look away from the animal",
                        "their axes are OpenGL's, or R and T are wrong; negate rows y and z of these w2c"),
    "views_swapped": ("the pictures of {views} are swapped", "exchange the two, or their cameras"),
    # On a rig that is its own mirror image these two look the same.
    "views_reversed": ("the views run the other way round than their cameras, or all pictures are mirrored",
                       "list the pictures in the cameras' order (azimuth grows clockwise), or flip them"),
    "views_shifted": ("the pictures are {step} places off in the cameras' order", "list them in the cameras' order"),
    "view_mirrored": ("the picture of {views} is mirrored", "flip it left to right"),
    "all_mirrored": ("all pictures are mirrored, or the views run the other way round than their cameras",
                     "flip them, or look for a left-handed world in the calibration"),
    "view_upside_down": ("the picture of {views} is upside down", "flip it"),
    "all_upside_down": ("all pictures are upside down", "flip them, or the cameras' y axes"),
    "focal": ("the focal length written is {scale:.2f} of the one the silhouettes fit",
              "use the focal length of the pictures as they are: every resize scales it, a crop does not"),
    "principal_point": ("all pictures are moved by about {pixels} px against their cameras",
                        "a crop or shift was not written into cx, cy"),
    "view_scale": ("{views} is scaled: its focal length is {scale:.2f} of the one that fits",
                   "one zoom for all views, or write it into this view's fx, fy"),
    "view_shift": ("{views} is moved by {pixels} px against its camera, or the camera turned by {degrees:.1f} deg",
                   "write the crop's offset into cx, cy, or calibrate this camera again"),
    "view_roll": ("{views} is turned by {degrees:.1f} deg about its optical axis", "calibrate this camera again"),
    "camera_off": ("the camera of {views} stands about {degrees:.1f} deg from where it is said to",
                   "it was moved after the calibration, or R and T are another's: calibrate it again"),
    "views_scaled": ("views are scaled differently (factors {scales}) than their cameras say", REPROCESS),
    "views_moved": ("views are moved differently (up to {pixels} px) against their cameras", REPROCESS),
    "views_scaled_and_moved": ("views are scaled (factors {scales}) and moved against their cameras", REPROCESS),
    "cameras_off": ("several cameras stand up to {degrees:.1f} deg from where they are said to",
                    "poses of an ideal rig were written for real cameras, or the calibration is old"),
    "each_scaled": ("every picture is scaled on its own, which its camera does not say", REPROCESS),
    "each_moved": ("every picture is centred on its own, which its camera does not say", REPROCESS),
    "each_scaled_and_moved": ("every picture is scaled and centred on its own, which its camera does not say",
                              REPROCESS),
}  # fmt: skip


def _fault_finding(summary: dict, fault: Fault) -> Finding:
    what, remedy = FAULTS[fault.code]
    width, focal = summary["sizes"][0][0], float(np.mean([view["focal"] for view in summary["views"]]))
    amounts = fault.amounts
    shift = float(np.linalg.norm(np.atleast_2d(amounts["shift"]), axis=1).max()) if "shift" in amounts else 0.0
    angles = [np.abs(amounts[key]) for key in ("azimuth_deg", "elevation_deg", "roll_deg") if key in amounts]
    degrees = float(np.max(np.linalg.norm(np.atleast_2d(angles), axis=0))) if angles else 0.0
    if fault.code == "view_shift":
        degrees = float(np.degrees(np.arctan(shift / focal)))
    scales = amounts.get("scale", 1.0)
    filled = what.format(
        views=_names(summary, fault.views),
        scale=scales if isinstance(scales, float) else 1.0,
        scales=" ".join(f"{scale:.2f}" for scale in np.atleast_1d(scales)),
        pixels=f"{shift * width:.1f}",
        degrees=degrees,
        step=fault.views[0] if fault.views else 0,
    )
    return Finding(fault.code, "poor", filled, remedy)


def _off_centre(view: dict, summary: dict) -> bool:
    width, height = summary["sizes"][0]
    return abs(view["cx"] - 0.5) > PRINCIPAL_TOLERANCE or abs(view["cy"] - 0.5 * height / width) > PRINCIPAL_TOLERANCE


def _names(summary: dict, slots) -> str:
    slots = list(slots)
    if len(slots) == summary["num_views"]:
        return "all views"
    return ", ".join(summary["views"][slot]["name"] for slot in slots)
