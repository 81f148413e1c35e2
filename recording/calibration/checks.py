"""Is this a calibration of cameras around an animal? Decided before a video is opened.


Each usual way of writing extrinsics, taken for another, turns the cameras into some that see no common volume, or whose
axes meet far worse: what was meant is then named. Some ways stay hidden (a world fixed to the first camera reads as
well backwards) until images are compared: `quality.check`.
"""

from __future__ import annotations

import numpy as np
import torch

from multiview.cameras import nearest_point
from recording.calibration.model import OPENGL, Calibration, centers_of

MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1000.0}
RIG_DISTANCE_MM = (20.0, 20_000.0)  # camera to animal: from a microscope's working distance to a hall
BODY_LENGTH_MM = (20.0, 400.0)  # nose to tail base: from a mouse pup to a large rat
PARALLEL_DEG = 10.0  # axes that differ less than this meet nowhere in particular
CONVERGED_DEG = 8.0  # how far off its axis a camera may see the point that the axes meet in, in a well-aimed rig
SLACK_DEG = 10.0  # beyond this a reading that converges is believed over the one as written
LEAST_VOLUME = 0.01  # radius of the largest ball all cameras see, over their mean distance from it


def _transposed(w2c: np.ndarray) -> np.ndarray:
    turned = w2c.copy()
    turned[:, :3, :3] = w2c[:, :3, :3].mT
    return turned


READINGS = {
    "OpenGL axes (y up, z backward) declared as OpenCV's; turn the camera's y and z axes, or give them as "
    "transforms.json, which is read with OpenGL axes": lambda w2c: OPENGL @ w2c,
    "camera-to-world matrices where world-to-camera is meant; invert them": np.linalg.inv,
    "camera-to-world matrices with OpenGL axes where OpenCV's world-to-camera is meant; invert them and turn the "
    "camera's y and z axes, or give them as transforms.json": lambda w2c: OPENGL @ np.linalg.inv(w2c),
    "rotations that are transposed; transpose R": _transposed,
    "camera centres C where T is meant; T = -R C": lambda w2c: np.linalg.inv(_transposed(w2c)),
}  # fmt: skip


class Layout:
    """How cameras stand to each other.

    focus: [3] the point nearest to all optical axes. depth: [v] of it in each camera. off_deg: [v] how far off its axis
    each camera sees it. spread_deg: the largest angle between two axes. twins: cameras of one pose, or None. ball:
    radius of the largest ball that all cameras see, over their mean distance from it; negative where there is none.
    possible: a common volume lies in front of all cameras. converged: their axes meet in it.
    """

    def __init__(self, w2c: np.ndarray, half: np.ndarray) -> None:
        """w2c: [v, 4, 4]. half: [v, 4] as `field_of_view`."""
        from scipy.optimize import linprog

        axes, centers = w2c[:, 2, :3], centers_of(w2c)
        self.focus = nearest(centers, axes)
        offset = self.focus - centers
        self.depth = np.einsum("vi,vi->v", axes, offset)
        miss = np.linalg.norm(offset - self.depth[:, None] * axes, axis=-1)
        self.off_deg = np.degrees(np.arctan2(miss, self.depth))
        self.spread_deg = float(np.degrees(np.arccos(np.clip(axes @ axes.T, -1.0, 1.0)).max()))
        apart = np.linalg.norm(centers[:, None] - centers[None], axis=-1) + 1e9 * np.eye(len(w2c))
        same = apart < 1e-4 * np.median(np.linalg.norm(w2c[:, :3, 3], axis=-1))
        same &= axes @ axes.T > np.cos(np.radians(0.01))
        self.twins = tuple(np.argwhere(same)[0].tolist()) if same.any() else None
        self.ball = -1.0
        if not self.twins:
            # A linear program (the Chebyshev center): n . (x - c) >= r for each frustum's unit inward normals n.
            middle = centers.mean(0)
            around = (centers - middle) / np.linalg.norm(centers - middle, axis=-1).max()
            normals = np.tile([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0], [0, 0, 1.0]], (len(w2c), 1, 1))
            normals[:, :4, 2] = half
            normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
            world = np.einsum("vni,vij->vnj", normals, w2c[:, :3, :3])
            reach = np.einsum("vnj,vj->vn", world, around).ravel()
            rows = np.concatenate([-world.reshape(-1, 3), np.ones((len(reach), 1))], axis=1)
            limits = [(-50.0, 50.0)] * 3 + [(None, 10.0)]
            found = linprog([0, 0, 0, -1.0], A_ub=rows, b_ub=-reach, bounds=limits).x
            if found is not None:
                self.ball = float(found[3] / np.linalg.norm(around - found[:3], axis=-1).mean())
        # Where axes are nearly parallel, where they meet means nothing.
        facing = bool((self.depth > 0).all()) or self.spread_deg < PARALLEL_DEG
        self.possible = self.ball > LEAST_VOLUME and facing
        aimed = self.spread_deg >= PARALLEL_DEG and float(self.off_deg.max()) <= CONVERGED_DEG
        self.converged = self.possible and aimed


def nearest(centers: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Returns `multiview.cameras.nearest_point` of numpy arrays [..., n, 3]."""
    pair = (torch.from_numpy(np.ascontiguousarray(values)) for values in (centers, directions))
    return nearest_point(*pair).numpy()


def field_of_view(calibration: Calibration) -> np.ndarray:
    """[v, 4] tangents of what images reach left, right, up, down; a size not known is twice the principal point."""
    K, principal = calibration.K, calibration.K[:, :2, 2]
    known = [(1.0, 1.0)] * len(K) if calibration.relative else calibration.sizes
    sizes = np.array([size or tuple(2 * center) for size, center in zip(known, principal)], dtype=np.float64)
    (left, up), (right, down) = principal.T, (sizes - principal).T
    return np.stack([left / K[:, 0, 0], right / K[:, 0, 0], up / K[:, 1, 1], down / K[:, 1, 1]], axis=-1)


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


def _check_facing(calibration: Calibration) -> Layout:
    """Returns the layout of cameras that look at a common volume where no other reading makes far better sense."""
    source, w2c, half = calibration.source, calibration.w2c, field_of_view(calibration)
    written = Layout(w2c, half)
    index = int(np.argmax(written.off_deg))
    worst, others = float(written.off_deg[index]), np.delete(np.arange(len(w2c)), index)
    if written.possible and (len(w2c) < 4 or worst <= SLACK_DEG):
        return written
    # Several readings may do, e.g. where the world is the first camera's: all are named, the usual mistakes first.
    meant = []
    for name, read in READINGS.items():
        other = Layout(read(w2c), half)
        better = other.ball > written.ball and other.off_deg.max() < 0.5 * worst
        if other.converged and (better or not written.possible):
            meant.append(name)
    if meant:
        how = "do not look at a common volume" if not written.possible else f"look past each other by {worst:.0f} deg"
        raise ValueError(f"{source}: as written the cameras {how}, but they do when read as {', or as '.join(meant)}")
    if written.twins:
        a, b = written.twins
        raise ValueError(f"{source}: cameras {a} and {b} are one and the same pose; give R and T of each camera")
    # One camera's axis may miss what all others' axes meet in: what would mend it is named.
    if len(others) >= 3 and worst >= 3 * CONVERGED_DEG and Layout(w2c[others], half[others]).converged:
        mended, fits = {f"matrices are {name}": read(w2c[[index]])[0] for name, read in READINGS.items()}, {}
        for factor in (1000.0, 0.001):
            name = f"T is to be multiplied by {factor:g} (millimetres and metres mixed)"
            mended[name] = w2c[index] * np.array([1.0, 1.0, 1.0, factor])
        for name, one in mended.items():
            changed = w2c.copy()
            changed[index] = one
            meeting = Layout(changed, half)
            if meeting.converged:
                fits[name] = float(meeting.off_deg[index])
        if fits or not written.possible:
            how = f"it would look there if its {min(fits, key=fits.get)}" if fits else "its R or T is wrong"
            raise ValueError(f"{source}: camera {index} looks away from what all the others look at; {how}")
    if not written.possible:
        away = np.flatnonzero(written.depth <= 0).tolist()
        which = f"camera(s) {away} look away from it" if away else "or their frusta miss each other"
        raise ValueError(f"{source}: the cameras look at no common volume ({which}); R or T is wrong, or K is")
    return written


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
    low, high = allowed_mm
    length_mm = length * MILLIMETRES[calibration.unit] if calibration.unit else low
    if low <= length_mm <= high:
        return
    hint, got = "", f"{what} is {length_mm:.3g} mm, taking its {calibration.unit} at its word"
    for factor in (0.1, 10.0, 0.001, 1000.0):  # of several the last, the likeliest
        if low <= length_mm * factor <= high:
            confused = " (metres and millimetres confused?)" if factor in (1000.0, 0.001) else ""
            hint = f"; it would be {length_mm * factor:.3g} mm with T times {factor:g}{confused}"
    raise ValueError(f"{calibration.source}: {got}; {low:.0f} to {high:.0f} mm are expected{hint}")
