"""What is wrong with a dataset, how bad that is, and what to do about it: one list of findings, and the grade.

The grade is that of the worst finding: `poor`, a model trained on it learns wrong geometry; `usable`, part of it is
worse than it could be; `good`, nothing of both. Notes do not count: they say what a command that reads the dataset has
to know.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from multiview.rig import FACELIFT_DISTANCE, FACELIFT_FOCAL, ViewRig
from recording.quality.silhouettes import AMOUNTS, Diagnosis

GRADES = ("poor", "usable", "good")
MANY = 0.02  # share of images from which a fault is the dataset's, not a slip
FOCAL_TOLERANCE, DISTANCE_TOLERANCE = 0.02, 0.05
METRIC_DISTANCE = 20.0  # a camera farther than this from the origin is given in millimetres or centimetres
AREA_SMALL, AREA_LARGE = 0.02, 0.45
IOU_POOR = 0.6
ENOUGH = 5  # samples from which differences between views are the cameras', not the animal's sides
USABLE_CENTER, POOR_CENTER = 0.02, 0.05  # of the image's size: rays of an import's masks
TOLERATED_LABEL_ERROR = 0.07  # of the half length: what facelift framing costs with exact poses
SMALL_ZOOM = 0.6
# Findings that follow from labels which are not the true cameras (facelift framing, nearest poses).
LABEL_ERRORS = {"silhouettes_disagree", *(code for group in AMOUNTS for code, *_ in group)}
REPROCESS = "make the samples again with scripts/process_mouse_data.py, which writes every change into the cameras"
OPENGL = "negate the second and third row of their w2c, or import them as transforms.json"
AGAIN = "calibrate it again"
FAULTS = {  # code of a fault that silhouettes show: (what, remedy); {views}, {scale}, {degrees}, {pixels} are filled in
    "opengl_axes": ("all cameras look away from the animal: their axes are OpenGL's (y up, z backward)", OPENGL),
    "view_looks_away": ("the cameras of {views} look away from the animal: OpenGL axes, or R and T are wrong", OPENGL),
    "views_swapped": ("the pictures of {views} are swapped", "exchange the two, or their cameras"),
    # On a rig that is its own mirror image these two look the same.
    "views_reversed": ("the views run the other way round than their cameras, or all pictures are mirrored",
                       "list the pictures in the cameras' order (azimuth grows clockwise), or flip them"),
    "all_mirrored": ("all pictures are mirrored, or the views run the other way round than their cameras",
                     "flip them, or look for a left-handed world in the calibration"),
    "views_shifted": ("the pictures are {step} places off in the cameras' order", "list them in the cameras' order"),
    "view_mirrored": ("the picture of {views} is mirrored", "flip it left to right"),
    "view_upside_down": ("the picture of {views} is upside down", "flip it"),
    "all_upside_down": ("all pictures are upside down", "flip them, or the cameras' y axes"),
    "focal": ("the focal length written is {scale} of the one that fits", "every resize scales it, a crop does not"),
    "principal_point": ("all pictures are moved by about {pixels} px", "write every crop or shift into cx, cy"),
    "view_scale": ("{views} is scaled: its focal length is {scale} of the one that fits", "write its zoom into fx, fy"),
    "view_shift": ("{views} is moved by {pixels} px against its camera, or the camera turned by {turn} deg",
                   "write the crop's offset into cx, cy, or calibrate this camera again"),
    "view_roll": ("{views} is turned by {degrees} deg about its optical axis", AGAIN),
    "camera_off": ("the camera of {views} stands about {degrees} deg from where it is said to: it was moved", AGAIN),
    "cameras_off": ("several cameras stand up to {degrees} deg from where they are said to",
                    "poses of an ideal rig were written for real cameras, or the calibration is old"),
    "views_scaled": ("views are scaled differently (factors {scale}) than their cameras say", REPROCESS),
    "views_moved": ("views are moved differently (up to {pixels} px) against their cameras", REPROCESS),
    "views_scaled_and_moved": ("views are scaled (factors {scale}) and moved against their cameras", REPROCESS),
    "each_scaled": ("every picture is scaled on its own, which its camera does not say", REPROCESS),
    "each_moved": ("every picture is moved on its own, which its camera does not say", REPROCESS),
    "each_scaled_and_moved": ("every picture is scaled and moved, which its camera does not say", REPROCESS),
}  # fmt: skip
VIEW_RULES = (  # code, severity, a view's number, its limit, what ({views}: beyond it, view: the worst one), remedy
    ("mask_variation", "usable", lambda v: v["mask_area_variation"] or 0, 0.6,
     "the mask's area jumps from frame to frame in {views}", "look for frames with the floor in it, or no animal"),
    ("principal_point_stated", "usable", lambda v: max(abs(v["cx"] - 0.5), abs(v["cy"] - 0.5) * v["aspect"]), 0.02,
     "the principal point is not the picture's centre in {views}, as stage 1 assumes", REPROCESS),
    ("directions", "poor", lambda v: v.get("off_rig_deg", 0.0), 3.0,
     "cameras of {views} are up to {view[off_rig_deg]:.1f} deg from where rig {rig} has them",
     "state the rig they really have, or import with --poses nearest"),
    ("not_at_origin", "usable", lambda v: v["look_off_deg"], 3.0,
     "cameras of {views} do not look at the origin (up to {view[look_off_deg]:.1f} deg off)", REPROCESS),
    ("centre", "usable", lambda v: v["centre_off_rms"] or 0, 0.15,
     "the animal stands far from the picture's centre in {views}", "move the world's origin to it, not the pictures"),
    ("blur", "compared", lambda v: 1.0 - (v["sharpness_relative"] or 1.0), 0.25,
     "{views}: less sharp than the others ({view[sharpness_relative]:.2f} of the views' median)",
     "clean or focus these lenses; check the video's bit rate"),
    ("exposure", "compared", lambda v: abs((v["brightness_relative"] or 1.0) - 1.0), 0.2,
     "{views}: darker or brighter than the others ({view[brightness_relative]:.2f} of the views' median)",
     "match the exposures"),
    ("overexposed", "usable", lambda v: v["bright_share"] or 0, 0.1, "much of the animal is pure white in {views}",
     "lower the exposure: what is white carries no texture"),
)  # fmt: skip
COUNT_RULES = (  # a view's count of images, code, what they are, remedy
    ("empty", "empty_masks", "masks are empty", "segment these pictures again, or leave their frames out"),
    ("without_mask", "no_masks", "pictures have no mask (alpha is 1 all over)", "write the animal's mask into alpha"),
    ("clipped", "clipped", "masks touch the border: the animal is clipped", "make it smaller in all views alike"),
)  # fmt: skip


class Finding(NamedTuple):
    code: str
    severity: str  # poor, usable or note
    what: str  # the reason, with numbers
    remedy: str


def grade(findings: list[Finding]) -> dict:
    """Returns {grade, reasons: sentences, findings: dicts}, the worst first."""
    order = {"poor": 0, "usable": 1, "note": 2}
    findings = sorted(findings, key=lambda finding: order[finding.severity])
    return {
        "grade": GRADES[min((order[finding.severity] for finding in findings), default=2)],
        "reasons": [f"{finding.what}: {finding.remedy}" for finding in findings],
        "findings": [finding._asdict() for finding in findings],
    }


def _applying(*rules: tuple) -> list[Finding]:
    """Returns the findings of the rules (whether it applies, code, severity, what, remedy) that apply."""
    return [Finding(*rule) for applies, *rule in rules if applies]


def dataset_findings(
    summary: dict, diagnosis: Diagnosis | None, rig: ViewRig | None, broken: dict[str, str], notes: list[str],
    *, true_labels: bool = True,
) -> list[Finding]:  # fmt: skip
    """Everything that the samples themselves show. true_labels: False leaves out what follows from labels that are not.

    summary, diagnosis: of `measure.summarise`. broken: unreadable samples and why. notes: of `report.find_samples`.
    """
    num_samples, area, iou = summary["num_samples"], summary["mask_area_mean"], summary["silhouette_iou_mean"]
    found = _applying(
        (broken, "unreadable", "poor" if len(broken) > MANY * (len(broken) + num_samples) else "usable",
         f"{len(broken)} samples cannot be read, the first: {next(iter(broken.values()), '')}",
         "mend or remove them from the lists; a training would stop there"),
        (len(summary["view_counts"]) > 1, "view_counts", "usable", f"samples have {summary['view_counts']} views",
         "trainings read the first views of each and need as many as the rig has in all of them"),
        (len(summary["sizes"]) > 1, "picture_sizes", "note", f"pictures have several sizes: {summary['sizes']}",
         "they are resized together with their cameras when read"),
        (notes, "list_style", "usable", "the list holds absolute paths or names camera files, as FaceLift's do",
         "trainings here take one sample folder per line, relative to the list, so that a dataset can be moved"),
        (iou is not None and iou < IOU_POOR and diagnosis is not None and diagnosis.agrees, "silhouette_iou", "usable",
         f"masks predicted from the other views overlap only by {iou or 0:.2f}",
         "few or one-sided views do that; bad masks inside the outline too"),
        (area is not None and not AREA_SMALL <= area <= AREA_LARGE, "animal_size", "usable",
         f"the animal covers {100 * (area or 0):.1f} % of the pictures on average",
         "5 to 20 % are usual; choose another framing when importing"),
    )  # fmt: skip
    found += [*_view_findings(summary, rig), *_silhouette_findings(summary, diagnosis)]
    return [finding for finding in found if true_labels or finding.code not in LABEL_ERRORS]


def _names(summary: dict, slots) -> str:
    slots = list(slots)
    return "all views" if len(slots) == summary["num_views"] else ", ".join(summary["views"][k]["name"] for k in slots)


def _view_findings(summary: dict, rig: ViewRig | None) -> list[Finding]:
    views, num_samples, total = summary["views"], summary["num_samples"], summary["num_samples"] * summary["num_views"]
    (width, height), found = summary["sizes"][0], []
    for key, code, what, remedy in COUNT_RULES:
        count = sum(view[key] for view in views)
        where = _names(summary, [slot for slot, view in enumerate(views) if view[key]])
        severity = "poor" if count > MANY * total or key == "clipped" else "usable"
        found += _applying((count, code, severity, f"{count} of {total} {what} ({where})", remedy))
    for code, severity, number, limit, what, remedy in VIEW_RULES:
        numbers = [number({**view, "aspect": height / width}) for view in views]
        if max(numbers) > limit:
            severity = severity if severity != "compared" else "usable" if num_samples >= ENOUGH else "note"
            where = _names(summary, [slot for slot, one in enumerate(numbers) if one > limit])
            what = what.format(views=where, view=views[int(np.argmax(numbers))], rig=rig.name if rig else "?")
            found.append(Finding(code, severity, what, remedy))
    # Distance and focal length as written, against the rig's, or what released weights expect.
    expected, severity = (f"rig {rig.name}", "poor") if rig is not None else ("FaceLift's released weights", "note")
    focal, distance = (rig.focal, rig.distance) if rig is not None else (FACELIFT_FOCAL, FACELIFT_DISTANCE)
    mean_focal, mean_distance = float(np.mean([view["focal"] for view in views])), summary["distance_mean"]
    metric = mean_distance > METRIC_DISTANCE
    return found + _applying(
        (metric, "units", "poor", f"cameras stand {mean_distance:.0f} from the origin: millimetres, not world units",
         f"scale the world so that the mean distance is {distance:g}; {REPROCESS}"),
        (not metric and abs(mean_distance / distance - 1) > DISTANCE_TOLERANCE, "distance", severity,
         f"cameras stand {mean_distance:.2f} from the origin, {expected} says {distance:.2f}",
         "one scale of the world for all views mends it"),
        (abs(mean_focal / focal - 1) > FOCAL_TOLERANCE, "focal_stated", severity,
         f"the focal length written is {mean_focal * width:.0f} px of {width}, {expected} says {focal * width:.0f}",
         "a resize moves fx, fy, cx, cy with the pixels, a crop cx, cy; another lens needs a rig of its own"),
    )  # fmt: skip


def _silhouette_findings(summary: dict, diagnosis: Diagnosis | None) -> list[Finding]:
    if diagnosis is None:
        return []
    width, focal = summary["sizes"][0][0], float(np.mean([view["focal"] for view in summary["views"]]))
    found, zero = [], np.zeros(summary["num_views"])
    for code, views, amounts, _ in diagnosis.faults:
        slots = list(views) or list(range(summary["num_views"]))
        shift = float(np.hypot(*(amounts.get(name, zero)[slots] for name in ("shift_x", "shift_y"))).max())
        angles = np.stack([amounts.get(name, zero) for name in ("azimuth", "elevation", "roll")])
        scales = np.exp(-amounts.get("scale", zero)[slots])  # the focal length written, over the one that fits
        what, remedy = FAULTS[code]
        filled = what.format(
            views=_names(summary, views), pixels=f"{shift * width:.1f}", step=views[0] if views else 0,
            scale=" ".join(f"{scale:.2f}" for scale in (scales if np.ptp(scales) >= 1e-9 else scales[:1])),
            degrees=f"{np.degrees(np.linalg.norm(angles, axis=0).max()):.1f}",
            turn=f"{np.degrees(np.arctan(shift / focal)):.1f}",
        )  # fmt: skip
        found.append(Finding(code, "poor", filled, remedy))
    if not diagnosis.explained:
        odd = ""
        if diagnosis.odd_view is not None and diagnosis.others < 0.5 * diagnosis.left:
            name = _names(summary, [diagnosis.odd_view])
            odd = f"; without {name} the others agree to {diagnosis.others * width:.1f} px"
        off = f"{diagnosis.left * width:.1f} px rms of {width}"
        what = f"silhouettes disagree by {off} and no usual fault explains it{odd}"
        remedy = "check masks, synchronisation (frame n must be the same instant in every view) and the calibration"
        found.append(Finding("silhouettes_disagree", "poor", what, remedy))
    return found


def import_findings(report: dict) -> list[Finding]:
    """What only the recording itself shows: all masks of all frames, and the calibration."""
    size, off, label_error_rms = report["image_size"], report["centre_off_px_rms"], report["label_error_rms"]
    return _applying(
        (report["clipped_views"], "clipped", "poor", f"{report['clipped_views']} masks reach beyond their pictures",
         "import again with a larger --body_length"),
        (off > USABLE_CENTER * size, "centres", "poor" if off > POOR_CENTER * size else "usable",
         f"the masks' centres miss each other in 3D by {off:.1f} px rms of {size}",
         "check calibration, camera numbering, synchronisation, and masks of views with a large centre_off_px_rms"),
        (label_error_rms > 1e-6, "labels", "usable" if label_error_rms > TOLERATED_LABEL_ERROR else "note",
         f"the cameras written ({report['framing']} framing, {report['poses']} poses) are not the true ones: off by "
         f"{100 * label_error_rms:.1f} % of the animal's half length at its ends (rms)",
         "this was asked for; --framing fill --poses exact has no such error, for models trained so"),
        (report["zoom"] < SMALL_ZOOM, "zoom", "usable",
         f"pictures are {report['zoom']:.2f} of their standard size because one mask reaches far out",
         "look at the frame that decides: a bad mask can do that"),
        (report["cut_by_photograph"], "cut", "usable",
         f"{report['cut_by_photograph']} masks touch the edge of their photograph: the animal is cut there",
         "leave these frames out, or film a wider field"),
        (report["skipped_frames"], "skipped", "usable",
         f"{report['skipped_frames']} frames were left out for empty masks",
         "segment these frames again if they matter"),
    )  # fmt: skip
