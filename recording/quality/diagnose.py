"""Which fault explains silhouettes that disagree: every usual one is undone in turn, the simplest that helps is named.

The faults are those that recordings and their preprocessing really have: views in the wrong order, mirrored pictures,
OpenGL axes, a wrong focal length, crops and rescalings that were not written into the cameras, a camera that moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from scipy.optimize import least_squares

from recording.quality.tangency import CAP, Views, disagreement, pairs, rms, rms_per_view

AGREED = 0.005  # of the width: rms up to which silhouettes agree (rounding to 64 px pictures makes 0.002)
ODD = 2.5  # times the disagreement of all others that makes one view the odd one
EXPLAINED = 0.5  # a fault is named when undoing it leaves at most this share of the disagreement
MAX_FAULTS = 3  # found one after the other
FITTED = 6  # samples that continuous faults are fitted to
PENALTY = 1.6  # how much better a hypothesis must do per step of complexity
FREE_WEIGHT = 1e-3  # keeps what silhouettes cannot tell (a common scale, a common shift) at zero
# Of two stories that explain as much, the one with fewer numbers in it. Codes left out have none.
COMPLEXITY = {
    "all_mirrored": 0.2,  # on a regular rig the same as views_reversed; one name for both
    "focal": 1.0, "principal_point": 1.0, "view_scale": 1.0, "view_shift": 1.0, "view_roll": 1.0, "camera_off": 1.0,
    "views_scaled": 2.0, "views_moved": 2.5, "cameras_off": 2.5, "views_scaled_and_moved": 3.0,
    "each_scaled": 4.0, "each_moved": 4.5, "each_scaled_and_moved": 5.0,
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """code: see `findings.FAULTS`. views: concerned, empty for all. amounts: what was undone. left: rms afterwards."""

    code: str
    views: tuple[int, ...]
    amounts: dict = field(default_factory=dict)
    left: float = 0.0


@dataclass(frozen=True)
class Diagnosis:
    """rms: disagreement of the silhouettes over the width. per_view: [v]. left: rms with all faults undone.

    agrees: whether there is nothing to explain. explained: whether the faults found explain all of it. odd_view: the
    view without which the others agree best, and rest: their rms.
    """

    rms: float
    per_view: list[float]
    faults: list[Fault]
    left: float
    agrees: bool
    explained: bool
    odd_view: int | None
    rest: float


def diagnose(views: Views) -> Diagnosis:
    """Explains the disagreement of views [t, v], v >= 3, if there is any."""
    faults: list[Fault] = []
    away = looking_away(views)
    start, per_view = rms(disagreement(views)), rms_per_view(disagreement(views), views.count)
    if away.any():
        views = turn_opengl(views, away)
        concerned = () if away.all() else tuple(np.flatnonzero(away).tolist())
        faults.append(Fault("view_looks_away" if concerned else "opengl_axes", concerned, {}, rms(disagreement(views))))
    gaps = disagreement(views)
    odd, rest = odd_view(gaps, views.count)
    agrees = not faults and not disagrees(gaps, views.count)
    while disagrees(gaps, views.count) and len(faults) < MAX_FAULTS:
        fault, mended = best_explanation(views, rms(gaps))
        if fault is None:
            break
        faults.append(fault)
        views, gaps = mended, disagreement(mended)
    explained = not disagrees(gaps, views.count)
    return Diagnosis(start, per_view, faults, rms(gaps), agrees, explained, odd, rest)


def disagrees(gaps: np.ndarray, count: int) -> bool:
    """Whether the silhouettes disagree as a whole, or one view does with all others that agree among themselves."""
    odd, rest = odd_view(gaps, count)
    alone = odd is not None and rms_per_view(gaps, count)[odd] > max(AGREED, ODD * rest)
    return rms(gaps) > AGREED or alone


def odd_view(gaps: np.ndarray, count: int) -> tuple[int | None, float]:
    """The view whose removal leaves the least disagreement among the others, and that disagreement."""
    if count < 4:
        return None, rms(gaps)
    rest = [rms(gaps[:, [view not in pair for pair in pairs(count)]]) for view in range(count)]
    view = int(np.argmin(rest))
    return view, rest[view]


def best_explanation(views: Views, now: float) -> tuple[Fault | None, Views]:
    """The hypothesis with the best penalised score, or None when no one halves the disagreement."""
    best: tuple[float, Fault, Views] | None = None
    for hypotheses in (discrete_faults, simple_faults, common_faults, sample_faults):
        for fault, mended in hypotheses(views):
            if fault.left > EXPLAINED * now:
                continue
            score = max(fault.left, 0.2 * AGREED) * PENALTY ** COMPLEXITY.get(fault.code, 0.0)
            if best is None or score < best[0]:
                best = (score, fault, mended)
        if best is not None and best[1].left <= AGREED:
            break  # a more complicated story is not needed
    return (None, views) if best is None else best[1:]


# ---- hypotheses -------------------------------------------------------------------------------------------------


def looking_away(views: Views) -> np.ndarray:
    """[v] whether the point nearest to all optical axes lies behind a camera, in most samples."""
    axes = views.w2c[:, :, 2, :3]
    centres = -np.einsum("tvji,tvj->tvi", views.w2c[..., :3, :3], views.w2c[..., :3, 3])
    projectors = np.eye(3) - axes[..., :, None] * axes[..., None, :]
    right = np.einsum("tvij,tvj->ti", projectors, centres)
    points = np.stack([np.linalg.lstsq(p, r, rcond=None)[0] for p, r in zip(projectors.sum(1), right, strict=True)])
    return np.median(np.einsum("tvi,tvi->tv", axes, points[:, None] - centres), axis=0) < 0


def turn_opengl(views: Views, chosen: np.ndarray) -> Views:
    """The chosen [v] cameras' axes read as OpenGL's (y up, z backward)."""
    w2c = views.w2c.copy()
    w2c[:, chosen] = np.diag([1.0, -1.0, -1.0, 1.0]) @ w2c[:, chosen]
    return replace(views, w2c=w2c)


def discrete_faults(views: Views) -> Iterable[tuple[Fault, Views]]:
    """Wrong order, mirrored pictures, pictures upside down: nothing to fit."""
    count = views.count
    orders = [("views_swapped", pair, _swapped(count, pair)) for pair in combinations(range(count), 2)]
    orders += [("views_reversed", (), [0, *range(count - 1, 0, -1)])]
    orders += [("views_shifted", (step,), np.roll(np.arange(count), step).tolist()) for step in range(1, count)]
    for code, concerned, order in orders:
        yield _tried(code, concerned, {}, replace(views, points=views.points[:, order]))
    for concerned in [(), *((view,) for view in range(count))]:
        chosen = list(concerned) or list(range(count))
        points = views.points.copy()
        points[:, chosen, :, 0] = 1.0 - points[:, chosen, :, 0]
        yield _tried("view_mirrored" if concerned else "all_mirrored", concerned, {}, replace(views, points=points))
        code, points = "view_upside_down" if concerned else "all_upside_down", views.points.copy()
        points[:, chosen, :, 1] = 2 * views.intrinsics[:, chosen, None, 3] - points[:, chosen, :, 1]
        yield _tried(code, concerned, {}, replace(views, points=points))


def simple_faults(views: Views) -> Iterable[tuple[Fault, Views]]:
    """One view's, or one common, wrong number."""
    yield _fitted("focal", (), views, 1, lambda x: {"scale": np.repeat(x, views.count)}, lambda x: _scale(x[0]))
    yield _fitted(
        "principal_point", (), views, 2, lambda x: {"shift": np.tile(x, (views.count, 1))}, lambda x: _shift(x)
    )
    view, _ = odd_view(disagreement(views), views.count)
    if view is None:
        return
    one = np.eye(views.count)[view]
    concerned = (view,)
    yield _fitted("view_scale", concerned, views, 1, lambda x: {"scale": x[0] * one}, lambda x: _scale(x[0]))
    yield _fitted("view_shift", concerned, views, 2, lambda x: {"shift": one[:, None] * x}, lambda x: _shift(x))
    yield _fitted("view_roll", concerned, views, 1, lambda x: {"roll": x[0] * one}, lambda x: _angles(roll_deg=x[0]))
    yield _fitted(
        "camera_off", concerned, views, 2, lambda x: {"azimuth": x[0] * one, "elevation": x[1] * one},
        lambda x: _angles(azimuth_deg=x[0], elevation_deg=x[1]),
    )  # fmt: skip


def common_faults(views: Views) -> Iterable[tuple[Fault, Views]]:
    """Numbers that are wrong in every view, the same way in all samples."""
    count = views.count
    yield _fitted("views_scaled", (), views, count, lambda x: {"scale": x}, lambda x: {"scale": np.exp(-x).tolist()})
    yield _fitted(
        "views_moved", (), views, 2 * count, lambda x: {"shift": x.reshape(count, 2)},
        lambda x: {"shift": x.reshape(count, 2).tolist()},
    )  # fmt: skip
    yield _fitted(
        "views_scaled_and_moved", (), views, 3 * count,
        lambda x: {"scale": x[:count], "shift": x[count:].reshape(count, 2)},
        lambda x: {"scale": np.exp(-x[:count]).tolist(), "shift": x[count:].reshape(count, 2).tolist()},
    )  # fmt: skip
    yield _fitted(
        "cameras_off", (), views, 2 * count, lambda x: {"azimuth": x[:count], "elevation": x[count:]},
        lambda x: {"azimuth_deg": np.degrees(x[:count]).tolist(), "elevation_deg": np.degrees(x[count:]).tolist()},
    )  # fmt: skip


def sample_faults(views: Views) -> Iterable[tuple[Fault, Views]]:
    """Pictures scaled or moved one by one, differently in every sample."""
    count = views.count
    for code, parts in (("each_scaled", 1), ("each_moved", 2), ("each_scaled_and_moved", 3)):
        mended, sizes = [], []
        for index in range(min(FITTED, len(views.points))):
            one = Views(views.points[[index]], views.intrinsics[[index]], views.w2c[[index]])

            def changes(x: np.ndarray, parts: int = parts) -> dict:
                found = {"scale": x[:count]} if parts != 2 else {}
                return found | ({"shift": x[-2 * count :].reshape(count, 2)} if parts != 1 else {})

            x = _solve(one, parts * count, changes)
            mended.append(adjust(one, **changes(x)))
            sizes.append(float(np.abs(x).mean()))
        result = Views(*(np.concatenate([getattr(m, n) for m in mended]) for n in ("points", "intrinsics", "w2c")))
        # Twelve or more numbers per thirty equations explain something in any case: such a story must do much better.
        freedom = np.sqrt(max(1.0 - parts * count / (2 * len(pairs(count))), 0.05))
        left = rms(disagreement(result)) / freedom
        yield Fault(code, (), {"mean_amount": float(np.mean(sizes))}, left), result


def adjust(views: Views, *, scale=None, shift=None, azimuth=None, elevation=None, roll=None) -> Views:
    """Other cameras for the same pictures.

    scale: [v] log factor of the focal length. shift: [v, 2] added to the principal point, over the width. azimuth,
    elevation: [v] radians, the camera moved about the world's origin. roll: [v] radians about its optical axis.
    """
    intrinsics, w2c = views.intrinsics.copy(), views.w2c
    if scale is not None:
        intrinsics[..., :2] *= np.exp(scale)[:, None]
    if shift is not None:
        intrinsics[..., 2:] += shift
    if azimuth is not None:
        w2c = w2c @ _rotations(np.array([0.0, 0.0, 1.0]), azimuth)
    if elevation is not None:
        right = w2c[:, :, 0, :3] * [1.0, 1.0, 0.0]
        right /= np.maximum(np.linalg.norm(right, axis=-1, keepdims=True), 1e-9)
        w2c = w2c @ _rotations(right, elevation)
    if roll is not None:
        w2c = _rotations(np.array([0.0, 0.0, 1.0]), roll) @ w2c
    return replace(views, intrinsics=intrinsics, w2c=w2c)


# ---- helpers ----------------------------------------------------------------------------------------------------


def _tried(code: str, concerned: tuple[int, ...], amounts: dict, mended: Views) -> tuple[Fault, Views]:
    return Fault(code, concerned, amounts, rms(disagreement(mended))), mended


def _fitted(
    code: str, concerned: tuple, views: Views, size: int, changes: Callable[[np.ndarray], dict], tell: Callable
) -> tuple[Fault, Views]:
    some = np.unique(np.linspace(0, len(views.points) - 1, FITTED).round().astype(int))
    x = _solve(Views(views.points[some], views.intrinsics[some], views.w2c[some]), size, changes)
    return _tried(code, concerned, tell(x), adjust(views, **changes(x)))


def _solve(views: Views, size: int, changes: Callable[[np.ndarray], dict]) -> np.ndarray:
    def residual(x: np.ndarray) -> np.ndarray:
        gaps = disagreement(adjust(views, **changes(x))).ravel()
        return np.concatenate([np.nan_to_num(gaps, nan=CAP), FREE_WEIGHT * x])

    bounds = (np.full(size, -0.7), np.full(size, 0.7))
    return least_squares(residual, np.zeros(size), loss="soft_l1", f_scale=AGREED, max_nfev=20, bounds=bounds).x


def _rotations(axis: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """[..., v, 4, 4] rotations about unit axes [..., 3] by angle [v], radians (Rodrigues)."""
    axis = np.broadcast_to(axis, (*np.broadcast_shapes(axis.shape[:-1], angle.shape), 3))
    zero = np.zeros_like(axis[..., 0])
    x, y, z = axis[..., 0], axis[..., 1], axis[..., 2]
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*axis.shape, 3)
    sine, cosine = np.sin(angle)[..., None, None], np.cos(angle)[..., None, None]
    result = np.zeros((*axis.shape[:-1], 4, 4))
    result[..., :3, :3] = np.eye(3) + sine * cross + (1 - cosine) * cross @ cross
    result[..., 3, 3] = 1.0
    return result


def _swapped(count: int, pair: tuple[int, int]) -> list[int]:
    order = list(range(count))
    order[pair[0]], order[pair[1]] = order[pair[1]], order[pair[0]]
    return order


def _scale(log_factor: float) -> dict:
    """The focal length written, over the one that fits."""
    return {"scale": float(np.exp(-log_factor))}


def _shift(shift: np.ndarray) -> dict:
    return {"shift": [float(value) for value in shift]}


def _angles(**radians: float) -> dict:
    return {name: float(np.degrees(value)) for name, value in radians.items()}
