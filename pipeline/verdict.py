"""How good a result is, in a word and with its reasons: what one should know before trusting the Gaussians.

The limits stand between synthetic mice, real cut-outs and things that are no mice (docs/benchmarks.md, Verdict).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from gslrm.model.gaussians import Gaussians
from gslrm.refinement import agreement, anisotropy_p95
from pipeline.outputs import PosedViews

WORDS = ("good", "doubtful", "poor")
# score: below which value it is doubtful, below which poor, what is then wrong.
PHOTO_LIMITS = {
    "consistency": (0.80, 0.74, "the generated views contradict each other"),
    "views_psnr": (19.0, 15.5, "the Gaussians look unlike the generated views (dB)"),
    "given_psnr": (19.5, 16.0, "the Gaussians look unlike the photograph (dB)"),
    "given_iou": (0.85, 0.76, "the Gaussians' outline differs from the photograph's"),
    "thickness": (0.20, 0.20, "the mask is thin: a tail, a line drawing, or hardly any animal"),
    "single": (0.80, 0.20, "the mask has several large parts: more than one animal"),
    "inside": (0.50, -1.0, "the animal is cut by the image's border"),
    "detail": (0.40, -1.0, "the animal is tiny in the photograph, and was enlarged"),
    "sharpness": (0.20, -1.0, "the photograph is blurred"),
    "brightness": (0.12, -1.0, "the photograph is underexposed"),
    "shade": (0.05, -1.0, "the photograph is overexposed"),
}
POSED_LIMITS = {
    "given_psnr": (20.0, 16.0, "the Gaussians look unlike the given views (dB)"),
    "given_iou": (0.88, 0.75, "the Gaussians' outlines differ from the given ones"),
    "views": (4, 3, "few views: what none of them shows is a guess"),
    "agreement_of_masks": (0.88, 0.65, "masks and cameras do not quite belong together"),
}


def judge(gaussians: Gaussians, views: PosedViews, record: dict, photo: Tensor | None, reference: int) -> dict:
    """Returns {word, reasons, scores} for run.json. gaussians: [1, n]. record: what run.json holds so far. photo:
    [4, s, s] as framed, which view `reference` shows; None for posed views. Larger scores are better."""
    told: dict[str, Any] = record.get("refinement", {}).get("given_after")
    if told is None:
        given = [part.to(gaussians.device) for part in (views.rgb, views.masks, views.cameras)]
        told = agreement(gaussians, *given)
    scores, limits = {f"given_{name}": told[name] for name in ("psnr", "iou")}, POSED_LIMITS
    if photo is None:
        scores["views"] = len(views.cameras)
    if "agreement_of_masks" in record:
        scores["agreement_of_masks"] = record["agreement_of_masks"]
    if photo is not None:
        one = [part[[reference]].to(gaussians.device) for part in (views.rgb, views.masks, views.cameras)]
        scores = {"views_psnr": told["psnr"], "consistency": views.consistency()}
        scores |= {f"given_{name}": value for name, value in agreement(gaussians, *one).items()}
        scores |= photo_scores(photo, record["photo"])
        limits = PHOTO_LIMITS
    worst, reasons = 0, []
    for name, value in scores.items():
        doubtful, poor, wrong = limits[name]
        if not value >= doubtful:
            worst = max(worst, 1 if value >= poor else 2)
            reasons.append(f"{wrong}: {name} {value:.4g}, {doubtful:g} and more is usual")
    scores = {name: round(float(value), 4) for name, value in scores.items()}
    return {"word": WORDS[worst], "reasons": reasons, "scores": {**scores, "anisotropy_p95": anisotropy_p95(gaussians)}}


def photo_scores(photo: Tensor, report: dict) -> dict[str, float]:
    """Returns what a photograph [4, s, s], framed with `report` (`prepare_photo`), says of itself.

    thickness: radius of the largest disc in the mask over the square root of its area (0.56 for a disc). single: 1 -
    area of the second largest part of the mask, of the largest. inside: 1 - pixels of the mask on the image's border,
    over the square root of its area. detail: pixels of the photograph per pixel of the framed one, at most 1.
    sharpness: what a blur by 5 pixels takes from the steps between neighbors (Crete et al. 2007). brightness: 95th
    percentile of the animal's. shade: 1 - the 5th.
    """
    import cv2

    mask = (photo[3] > 0.5).numpy().astype(np.uint8)
    parts = np.sort(cv2.connectedComponentsWithStats(mask)[2][1:, cv2.CC_STAT_AREA])[::-1]
    reach = cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    gray = cv2.cvtColor(np.ascontiguousarray(photo[:3].permute(1, 2, 0).numpy()), cv2.COLOR_RGB2GRAY)
    core = reach > min(2.0, reach.max() / 2)  # the steps at the rim are the mask's
    lost = total = 1e-6
    for axis, kernel in ((1, (5, 1)), (0, (1, 5))):
        steps, left = (np.abs(np.diff(image, axis=axis)) for image in (gray, cv2.blur(gray, kernel)))
        inner = core[:, 1:] if axis else core[1:]
        lost, total = lost + np.maximum(steps - left, 0)[inner].sum(), total + steps[inner].sum()
    dark, bright = np.quantile(gray[core], (0.05, 0.95))
    return {
        "thickness": reach.max() / np.sqrt(mask.sum()), "single": 1 - (parts[1] / parts[0] if len(parts) > 1 else 0),
        "inside": 1 - report["on_border"], "detail": min(1.0, 1 / report["scale"]), "sharpness": lost / total,
        "brightness": bright, "shade": 1 - dark,
    }  # fmt: skip
