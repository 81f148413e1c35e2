"""Do the silhouettes of posed views belong to one solid, and if not, which usual fault explains it?

A plane through two camera centers that touches the animal touches its silhouette in both images (Rieger 1986; Cipolla,
Astrom and Giblin 1995). So for every pair of views the planes through their baseline must cover the same range of
angles: two equations per pair, from the masks' convex hulls alone, without correspondences, texture or carving. They
hold for any animal in any pose; what breaks them is a wrong camera, a wrong mask or a wrong pairing of the two
(Sinha and Pollefeys 2010 calibrate cameras that way).

`diagnose` undoes every usual fault of recordings and their preprocessing in turn and names the simplest that helps.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import cv2
import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from recording.calibration.checks import nearest
from recording.calibration.model import OPENGL, centers_of

DIRECTIONS = 72  # support points per outline
FINE = 256  # outlines are taken from masks enlarged to at least this many pixels, so that soft rims count
WIDEST_DEG = 120.0  # a pair whose baseline runs nearly through the animal says nothing
CAP = 0.05  # of the width: a larger disagreement counts as this much
AGREED = 0.005  # of the width: rms up to which silhouettes agree (rounding to 64 px images makes 0.002)
ODD = 2.5  # times the disagreement of all others that makes one view the odd one
EXPLAINED = 0.5  # a fault is named when undoing it leaves at most this share of the disagreement
MAX_FAULTS = 3  # found one after the other
FITTED = 6  # samples that continuous faults are fitted to
PENALTY = 1.6  # how much better a hypothesis must do per step of complexity
FREE_WEIGHT = 1e-3  # keeps what silhouettes cannot tell (a common scale, a common shift) at zero
SCALE, SHIFT, POSE, ROLL = ("scale",), ("shift_x", "shift_y"), ("azimuth", "elevation"), ("roll",)
# What may be wrong by an amount: code, its numbers (see `adjust`), whose they are, complexity. Of two stories that
# explain as much, the one with fewer numbers in it is told; the next group is asked only where one before explains too
# little.
AMOUNTS = (
    (("focal", SCALE, "all", 1.0), ("principal_point", SHIFT, "all", 1.0), ("view_scale", SCALE, "odd", 1.0),
     ("view_shift", SHIFT, "odd", 1.0), ("view_roll", ROLL, "odd", 1.0), ("camera_off", POSE, "odd", 1.0)),
    (("views_scaled", SCALE, "each", 2.0), ("views_moved", SHIFT, "each", 2.5), ("cameras_off", POSE, "each", 2.5),
     ("views_scaled_and_moved", SCALE + SHIFT, "each", 3.0)),
    (("each_scaled", SCALE, "image", 4.0), ("each_moved", SHIFT, "image", 4.5),
     ("each_scaled_and_moved", SCALE + SHIFT, "image", 5.0)),
)  # fmt: skip


class Views(NamedTuple):
    """Outlines and cameras of t samples of v views, float64."""

    points: np.ndarray  # [t, v, n, 2] over the width, x right, y down, corner origin; nan without a usable mask
    intrinsics: np.ndarray  # [t, v, 4] fx, fy, cx, cy over the width
    w2c: np.ndarray  # [t, v, 4, 4], OpenCV axes


class Fault(NamedTuple):
    code: str  # of `findings.FAULTS`
    views: tuple[int, ...]  # concerned, empty for all
    amounts: dict[str, np.ndarray]  # that were undone, [v] each
    left: float  # rms that remains


class Diagnosis(NamedTuple):
    rms: float  # disagreement of the silhouettes over the width
    per_view: list[float]
    faults: list[Fault]
    left: float  # rms with all faults undone
    agrees: bool  # there is nothing to explain
    explained: bool  # the faults found explain all of it
    odd_view: int | None  # the view without which the others agree best
    others: float  # their rms


def support(hull: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points of a hull [n, 2] that reach farthest in DIRECTIONS directions, and these, [DIRECTIONS, 2]."""
    angle = np.arange(DIRECTIONS) / DIRECTIONS * 2 * np.pi
    way = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return hull[(way @ hull.T).argmax(axis=1)], way


def outline(alpha: np.ndarray) -> np.ndarray | None:
    """Returns support points [DIRECTIONS, 2] of the hull of a mask [h, w] 0..1, over the width; None if empty."""
    height, width = alpha.shape
    factor = max(1, -(-FINE // max(height, width)))
    fine = cv2.resize(alpha.astype(np.float32), None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    contours, _ = cv2.findContours((fine > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return None
    reached, way = support(cv2.convexHull(np.concatenate(contours))[:, 0].astype(np.float64))
    return (reached + 0.5 + 0.5 * way) / (factor * width)  # the outer side of the outermost pixel, not its center


def disagreement(views: Views) -> np.ndarray:
    """Returns [t, pairs, 2] signed distances between the two tangents of each pair of views, over the width.

    nan where a pair has none: an empty mask, or a baseline that runs through the animal. Pairs as in `pairs`.
    """
    fx, fy, cx, cy = (views.intrinsics[..., None, k] for k in range(4))
    x, y = (views.points[..., 0] - cx) / fx, (views.points[..., 1] - cy) / fy
    rays = _unit(np.stack([x, y, np.ones_like(x)], axis=-1) @ views.w2c[..., :3, :3])  # rows: R^T d
    origins = centers_of(views.w2c)
    first, second = (np.array(side) for side in zip(*pairs(views.points.shape[1]), strict=True))
    baseline = origins[:, second] - origins[:, first]
    length, baseline = np.linalg.norm(baseline, axis=-1), _unit(baseline)
    middle = rays.mean(axis=2)
    towards = middle[:, first] + middle[:, second]
    across = _unit(towards - (towards * baseline).sum(-1, keepdims=True) * baseline)
    normal = np.cross(baseline, across)
    ends, reaches = [], []
    for side in (first, second):
        u, w = (np.einsum("tpni,tpi->tpn", rays[:, side], axis) for axis in (across, normal))
        angle = np.arctan2(w, u)
        extreme = np.stack([angle.argmin(-1), angle.argmax(-1)], axis=-1)
        ends.append(np.take_along_axis(angle, extreme, -1))
        reaches.append(np.take_along_axis(np.hypot(u, w), extreme, -1) * views.intrinsics[:, side, :1])
    width = np.stack([side[..., 1] - side[..., 0] for side in ends])
    useless = ((width > np.radians(WIDEST_DEG)) | ~np.isfinite(width)).any(axis=0) | (length < 1e-6)
    return np.where(useless[..., None], np.nan, (ends[0] - ends[1]) * 0.5 * (reaches[0] + reaches[1]))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def evenly(count: int, wanted: int) -> list[int]:
    """Returns at most `wanted` of `count` indices, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


def pairs(count: int) -> list[tuple[int, int]]:
    return list(combinations(range(count), 2))


def rms(gaps: np.ndarray) -> float:
    """Returns the root mean square of disagreements, each capped; CAP where there are none to measure."""
    known = gaps[np.isfinite(gaps)]
    return float(np.sqrt(np.mean(np.minimum(np.abs(known), CAP) ** 2))) if len(known) else CAP


def rms_per_view(gaps: np.ndarray, count: int, others: bool = False) -> list[float]:
    """Returns [v] the disagreement over the pairs each view is part of; others: over the pairs it is no part of."""
    return [rms(gaps[:, [(view in pair) != others for pair in pairs(count)]]) for view in range(count)]


def adjust(views: Views, **amounts) -> Views:
    """Returns other cameras for the same images. Each amount is a number or [v].

    scale: log factor of the focal length. shift_x, shift_y: added to the principal point, over the width. azimuth,
    elevation: radians, the camera moved about the world's origin. roll: radians about its optical axis.
    """
    given = {name: np.broadcast_to(np.asarray(value, float), views.w2c.shape[1]) for name, value in amounts.items()}
    intrinsics, w2c, z = views.intrinsics.copy(), views.w2c, np.tile([0.0, 0.0, 1.0], (views.w2c.shape[1], 1))

    def turn(axes: np.ndarray, name: str) -> np.ndarray:
        """Returns [..., 4, 4] rotations by the amounts about unit axes [..., 3]."""
        turns = np.tile(np.eye(4), (*axes.shape[:-1], 1, 1))
        vectors = (axes * given[name][:, None]).reshape(-1, 3)
        turns[..., :3, :3] = Rotation.from_rotvec(vectors).as_matrix().reshape(*axes.shape, 3)
        return turns

    intrinsics[..., :2] *= np.exp(given.get("scale", np.zeros(1)))[:, None]
    intrinsics[..., 2] += given.get("shift_x", 0.0)
    intrinsics[..., 3] += given.get("shift_y", 0.0)
    if "azimuth" in given:
        w2c = w2c @ turn(z, "azimuth")
        w2c = w2c @ turn(_unit(w2c[:, :, 0, :3] * [1.0, 1.0, 0.0]), "elevation")
    return views._replace(intrinsics=intrinsics, w2c=turn(z, "roll") @ w2c if "roll" in given else w2c)


def diagnose(views: Views) -> Diagnosis:
    """Explains the disagreement of views [t, v], v >= 3, if there is any."""
    faults: list[Fault] = []
    gaps, count = disagreement(views), views.w2c.shape[1]
    start, per_view = rms(gaps), rms_per_view(gaps, count)
    centers, axes = centers_of(views.w2c), views.w2c[:, :, 2, :3]
    away = np.median(np.einsum("tvi,tvi->tv", axes, nearest(centers, axes)[:, None] - centers), axis=0) < 0
    if away.any():
        w2c = views.w2c.copy()
        w2c[:, away] = OPENGL @ w2c[:, away]
        views = views._replace(w2c=w2c)
        gaps = disagreement(views)
        concerned = () if away.all() else tuple(np.flatnonzero(away).tolist())
        faults.append(Fault("view_looks_away" if concerned else "opengl_axes", concerned, {}, rms(gaps)))
    odd, others, disagrees = first = _odd_view(gaps, count)
    while disagrees and len(faults) < MAX_FAULTS:
        best = None
        for hypotheses in (_discrete(views), *(_fitted(views, group, odd) for group in AMOUNTS)):
            for complexity, fault, mended in hypotheses:
                score = max(fault.left, 0.2 * AGREED) * PENALTY**complexity
                if fault.left <= EXPLAINED * rms(gaps) and (best is None or score < best[0]):
                    best = (score, fault, mended)
            if best is not None and best[1].left <= AGREED:
                break  # a more complicated story is not needed
        if best is None:
            break
        faults.append(best[1])
        views, gaps = best[2], disagreement(best[2])
        odd, _, disagrees = _odd_view(gaps, count)
    agrees = not faults and not disagrees
    return Diagnosis(start, per_view, faults, rms(gaps), agrees, not disagrees, first[0], others)


def _odd_view(gaps: np.ndarray, count: int) -> tuple[int | None, float, bool]:
    """Returns the view whose removal leaves the least disagreement, that of the others, and whether there is any: of
    all, or of this view with others that agree among themselves.
    """
    if count < 4:
        return None, rms(gaps), rms(gaps) > AGREED
    left = rms_per_view(gaps, count, others=True)
    odd = int(np.argmin(left))
    alone = rms_per_view(gaps, count)[odd] > max(AGREED, ODD * left[odd])
    return odd, left[odd], rms(gaps) > AGREED or alone


def _discrete(views: Views) -> Iterator[tuple[float, Fault, Views]]:
    """Wrong order, mirrored images, images upside down: nothing to fit."""
    everyone = list(range(views.w2c.shape[1]))
    orders = [("views_reversed", (), [0, *everyone[:0:-1]])]
    orders += [("views_shifted", (step,), np.roll(everyone, step)) for step in everyone[1:]]
    for pair in pairs(len(everyone)):
        order = np.array(everyone)
        order[list(pair)] = pair[::-1]
        orders.append(("views_swapped", pair, order))
    changed = [(code, concerned, views.points[:, order]) for code, concerned, order in orders]
    for concerned in [(), *((view,) for view in everyone)]:
        chosen, which = list(concerned) or everyone, "view" if concerned else "all"
        mirrored, upside_down = views.points.copy(), views.points.copy()
        mirrored[:, chosen, :, 0] = 1.0 - mirrored[:, chosen, :, 0]
        upside_down[:, chosen, :, 1] = 2 * views.intrinsics[:, chosen, None, 3] - upside_down[:, chosen, :, 1]
        changed += [(f"{which}_mirrored", concerned, mirrored), (f"{which}_upside_down", concerned, upside_down)]
    for code, concerned, points in changed:
        mended = views._replace(points=points)
        # On a regular rig all mirrored is the same as views reversed; one name for both.
        yield 0.2 * (code == "all_mirrored"), Fault(code, concerned, {}, rms(disagreement(mended))), mended


def _fitted(views: Views, group: tuple[tuple, ...], odd: int | None) -> Iterator[tuple[float, Fault, Views]]:
    """The same in all views, in the odd one, in each view, or in each image of each sample."""
    count, eye = views.w2c.shape[1], np.eye(views.w2c.shape[1])
    bases = {"all": np.ones((count, 1)), "odd": eye[:, [odd or 0]], "each": eye}
    for code, names, whose, complexity in group:
        if whose == "odd" and odd is None:
            continue
        amounts, freedom = {}, 1.0
        if whose == "image":
            ones = [Views(*(part[[index]] for part in views)) for index in range(min(FITTED, len(views.points)))]
            mended = [adjust(one, **_solve(one, names, eye)) for one in ones]
            mended = Views(*map(np.concatenate, zip(*mended)))
            # Twelve numbers or more per thirty equations explain something in any case: they must do much better.
            freedom = np.sqrt(max(1.0 - len(names) * count / (2 * len(pairs(count))), 0.05))
        else:
            some = evenly(len(views.points), FITTED)
            amounts = _solve(Views(*(part[some] for part in views)), names, bases[whose])
            mended = adjust(views, **amounts)
        left = rms(disagreement(mended)) / freedom
        yield complexity, Fault(code, (odd,) if whose == "odd" else (), amounts, left), mended


def _solve(views: Views, names: tuple[str, ...], basis: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the amounts [v] by name under which the views agree best. basis: [v, m], which views share a number."""

    def amounts(x: np.ndarray) -> dict[str, np.ndarray]:
        return {name: basis @ part for name, part in zip(names, x.reshape(len(names), -1), strict=True)}

    def residual(x: np.ndarray) -> np.ndarray:
        gaps = disagreement(adjust(views, **amounts(x))).ravel()
        return np.concatenate([np.nan_to_num(gaps, nan=CAP), FREE_WEIGHT * x])

    start = np.zeros(len(names) * basis.shape[1])
    bounds = (start - 0.7, start + 0.7)
    return amounts(least_squares(residual, start, loss="soft_l1", f_scale=AGREED, max_nfev=20, bounds=bounds).x)
