"""Is this a calibration of cameras around an animal? Everything here is decided before a video is opened.

Cameras that share no volume are refused, and extrinsics that were meant otherwise: each usual way of writing them turns
the cameras into others that see no common volume, or whose axes meet far worse. What was meant is then named. Some ways
stay hidden (a world fixed to the first camera reads as well backwards) until images are compared: `quality.check`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from multiview.cameras import nearest_point
from recording.calibration.fields import OPENGL
from recording.calibration.model import Calibration, centers_of

MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1000.0}
RIG_DISTANCE_MM = (20.0, 20_000.0)  # camera to animal: from a microscope's working distance to a hall
BODY_LENGTH_MM = (20.0, 400.0)  # nose to tail base: from a mouse pup to a large rat
PARALLEL_DEG = 10.0  # axes that differ less than this meet nowhere in particular
CONVERGED_DEG = 8.0  # how far off its axis a camera may see the point that the axes meet in, in a well-aimed rig
SLACK_DEG = 10.0  # beyond this a reading that converges is believed over the one as written
LEAST_VOLUME = 0.01  # radius of the largest ball all cameras see, over their mean distance from it


def _moved(w2c: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    w2c = w2c.copy()
    w2c[:, :3, :3], w2c[:, :3, 3] = rotation, translation
    return w2c


READINGS = {
    "OpenGL axes (y up, z backward) declared as OpenCV's; turn the camera's y and z axes, or give them as "
    "transforms.json, which is read with OpenGL axes": lambda w2c: OPENGL @ w2c,
    "camera-to-world matrices where world-to-camera is meant; invert them": np.linalg.inv,
    "camera-to-world matrices with OpenGL axes where OpenCV's world-to-camera is meant; invert them and turn the "
    "camera's y and z axes, or give them as transforms.json": lambda w2c: OPENGL @ np.linalg.inv(w2c),
    "rotations that are transposed; transpose R": lambda w2c: _moved(w2c, w2c[:, :3, :3].mT, w2c[:, :3, 3]),
    "camera centres C where T is meant; T = -R C": lambda w2c: _moved(
        w2c, w2c[:, :3, :3], -np.einsum("vij,vj->vi", w2c[:, :3, :3], w2c[:, :3, 3])
    ),
}  # fmt: skip


def validate(calibration: Calibration) -> Calibration:
    """Returns the calibration, checked without its images. Raises ValueError of one line that names the file."""
    source = calibration.source
    if len(calibration) < 2:
        raise ValueError(f"{source}: at least two cameras are needed, got {len(calibration)}")
    calibration.check_intrinsics()
    seen = _check_facing(calibration)
    distance = np.linalg.norm(calibration.centres - seen.focus, axis=-1)
    middle = float(np.median(distance))
    for index in np.flatnonzero((distance > 30 * middle) | (distance < middle / 30)):
        if seen.spread_deg >= PARALLEL_DEG:  # a T in another unit
            far = f"stands {distance[index]:.4g} from what the cameras look at, the others about {middle:.4g}"
            raise ValueError(f"{source}: camera {index} {far}; are mm and m mixed (a factor of 1000)?")
    if calibration.unit is not None and calibration.unit not in MILLIMETRES:
        raise ValueError(f"{source}: unit must be one of {', '.join(MILLIMETRES)}, got {calibration.unit!r}")
    _check_length(calibration, "the cameras' distance from what they look at", distance.mean(), RIG_DISTANCE_MM)
    return calibration


@dataclass(frozen=True)
class Layout:
    """How cameras stand to each other.

    focus: [3] the point nearest to all optical axes. depth: [v] of it in each camera. off_deg: [v] how far off its axis
    each camera sees it. spread_deg: the largest angle between two axes. ball: radius of the largest ball that all
    cameras see, over their mean distance from it; negative where there is none. twins: cameras of one pose, or None.
    """

    focus: np.ndarray
    depth: np.ndarray
    off_deg: np.ndarray
    spread_deg: float
    ball: float
    twins: tuple[int, int] | None

    @property
    def possible(self) -> bool:
        """A common volume in front of all cameras."""
        # Where axes are nearly parallel, where they meet means nothing.
        facing = bool((self.depth > 0).all()) or self.spread_deg < PARALLEL_DEG
        return self.twins is None and self.ball > LEAST_VOLUME and facing

    @property
    def converged(self) -> bool:
        return self.possible and self.spread_deg >= PARALLEL_DEG and float(self.off_deg.max()) <= CONVERGED_DEG


def nearest(centers: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Returns `multiview.cameras.nearest_point` of numpy arrays [..., n, 3]."""
    pair = (torch.from_numpy(np.ascontiguousarray(values)) for values in (centers, directions))
    return nearest_point(*pair).numpy()


def layout(w2c: np.ndarray, half: np.ndarray) -> Layout:
    """w2c: [v, 4, 4]. half: [v, 4] tangents of the angles an image reaches left, right, up and down of its axis."""
    from scipy.optimize import linprog

    axes, centers, count = w2c[:, 2, :3], centers_of(w2c), len(w2c)
    focus = nearest(centers, axes)
    offset = focus - centers
    depth = np.einsum("vi,vi->v", axes, offset)
    miss = np.linalg.norm(offset - depth[:, None] * axes, axis=-1)
    spread = float(np.degrees(np.arccos(np.clip(axes @ axes.T, -1.0, 1.0)).max()))
    apart = np.linalg.norm(centers[:, None] - centers[None], axis=-1) + 1e9 * np.eye(count)
    same = apart < 1e-4 * np.median(np.linalg.norm(w2c[:, :3, 3], axis=-1))
    same &= axes @ axes.T > np.cos(np.radians(0.01))
    twins, ball = (tuple(int(k) for k in np.argwhere(same)[0]) if same.any() else None), -1.0
    if not twins:
        # A linear program (the Chebyshev center): n . (x - c) >= r for each frustum's unit inward normals n.
        middle = centers.mean(0)
        around = (centers - middle) / np.linalg.norm(centers - middle, axis=-1).max()
        normals = np.tile([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0], [0, 0, 1.0]], (count, 1, 1))
        normals[:, :4, 2] = half
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        world = np.einsum("vni,vij->vnj", normals, w2c[:, :3, :3])
        reach = np.einsum("vnj,vj->vn", world, around)
        rows, limits = np.concatenate([-world.reshape(-1, 3), np.ones((5 * count, 1))], axis=1), (-50.0, 50.0)
        found = linprog([0, 0, 0, -1.0], A_ub=rows, b_ub=-reach.ravel(), bounds=[limits, limits, limits, (None, 10.0)])
        if found.x is not None:
            ball = float(found.x[3] / np.linalg.norm(around - found.x[:3], axis=-1).mean())
    return Layout(focus, depth, np.degrees(np.arctan2(miss, depth)), spread, ball, twins)


def field_of_view(calibration: Calibration) -> np.ndarray:
    """[v, 4] tangents of what images reach left, right, up, down; a size not known is twice the principal point."""
    K, principal = calibration.K, calibration.K[:, :2, 2]
    sizes = [
        (1.0, 1.0) if calibration.relative else size if size is not None else tuple(2 * center)
        for size, center in zip(calibration.sizes, principal)
    ]
    (left, up), (right, down) = principal.T, (np.array(sizes, dtype=np.float64) - principal).T
    return np.stack([left / K[:, 0, 0], right / K[:, 0, 0], up / K[:, 1, 1], down / K[:, 1, 1]], axis=-1)


def _check_facing(calibration: Calibration) -> Layout:
    """Returns the layout of cameras that look at a common volume where no other reading makes far better sense."""
    source, w2c, half = calibration.source, calibration.w2c, field_of_view(calibration)
    written = layout(w2c, half)
    worst = float(written.off_deg.max())
    if written.possible and (len(calibration) < 4 or worst <= SLACK_DEG):
        return written
    # Several readings may do, e.g. where the world is the first camera's: all are named, the usual mistakes first.
    meant = []
    for name, read in READINGS.items():
        other = layout(read(w2c), half)
        better = other.ball > written.ball and other.off_deg.max() < 0.5 * worst
        if other.converged and (better or not written.possible):
            meant.append(name)
    if meant:
        how = "do not look at a common volume" if not written.possible else f"look past each other by {worst:.0f} deg"
        raise ValueError(f"{source}: as written the cameras {how}, but they do when read as {', or as '.join(meant)}")
    if written.twins:
        a, b = written.twins
        raise ValueError(f"{source}: cameras {a} and {b} are one and the same pose; give R and T of each camera")
    _check_odd_camera(calibration, half, written)
    if written.possible:
        return written
    away = np.flatnonzero(written.depth <= 0).tolist()
    which = f"camera(s) {away} look away from it" if away else "or their frusta miss each other"
    raise ValueError(f"{source}: the cameras look at no common volume ({which}); R or T is wrong, or K is")


def _check_odd_camera(calibration: Calibration, half: np.ndarray, written: Layout) -> None:
    """Raises ValueError for one camera whose axis misses what all others' axes meet in, with what would mend it."""
    w2c, index = calibration.w2c, int(np.argmax(written.off_deg))
    others = np.delete(np.arange(len(w2c)), index)
    if len(others) < 3 or written.off_deg[index] < 3 * CONVERGED_DEG or not layout(w2c[others], half[others]).converged:
        return
    mended = {f"matrices are {name}": read(w2c[[index]])[0] for name, read in READINGS.items()}
    for factor in (1000.0, 0.001):
        name = f"T is to be multiplied by {factor:g} (millimetres and metres mixed)"
        mended[name] = w2c[index] * np.array([1.0, 1.0, 1.0, factor])
    fits = {}
    for name, one in mended.items():
        changed = w2c.copy()
        changed[index, :3] = one[:3]
        meeting = layout(changed, half)
        if meeting.converged:
            fits[name] = float(meeting.off_deg[index])
    if fits or not written.possible:
        how = f"it would look there if its {min(fits, key=fits.get)}" if fits else "its R or T is wrong"
        raise ValueError(f"{calibration.source}: camera {index} looks away from what all the others look at; {how}")


def check_body_length(calibration: Calibration, measured: float, stated: float | None = None) -> None:
    """Raises ValueError unless the measured length (calibration's unit) is an animal's, and about --body_length."""
    if stated is not None and not 1 / 3 <= stated / measured <= 3:
        factors = [f for f in (1000.0, 0.001) if abs(np.log10(measured / stated / f)) < 0.4]
        hints = [f", {factor:g} times as much (millimetres against metres?)" for factor in factors]
        length = f"{measured:.3g} long{''.join(hints)}"
        remedy = "give --body_length in the calibration's unit, or leave it out"
        raise ValueError(f"--body_length {stated:.4g}: {calibration.source} shows an animal {length}; {remedy}")
    _check_length(calibration, "the animal's length", measured, BODY_LENGTH_MM)


def _check_length(calibration: Calibration, what: str, length: float, allowed_mm: tuple[float, float]) -> None:
    """Takes the unit at its word, where the file or its format states one."""
    length_mm = length * MILLIMETRES[calibration.unit] if calibration.unit else allowed_mm[0]
    if allowed_mm[0] <= length_mm <= allowed_mm[1]:
        return
    factors = [f for f in (1000.0, 0.001, 10.0, 0.1) if allowed_mm[0] <= length_mm * f <= allowed_mm[1]][:1]
    hints = [f"; it would be {length_mm * f:.3g} mm with T times {f:g}" for f in factors]
    hints += [" (metres and millimetres confused?)" for f in factors if f in (1000.0, 0.001)]
    got = f"{what} is {length_mm:.3g} mm, taking its {calibration.unit} at its word"
    expected = f"{allowed_mm[0]:.0f} to {allowed_mm[1]:.0f} mm are expected"
    raise ValueError(f"{calibration.source}: {got}; {expected}{''.join(hints)}")
