"""Samples the mouse's surface: points, normals and what lies where, at an even spacing. Body lengths."""

import math
from copy import copy

import numpy as np

from synthetic.implicit import Skin
from synthetic.pose import MousePose
from synthetic.skeleton import EAR, EYE, SIDES, STATIONS, MouseShape, Skeleton, interpolate, perpendicular, unit

FUR, LIMB, FOOT, TAIL, EAR_INNER, EAR_OUTER, EYE_PART, NOSE = range(8)  # what a sample belongs to
SPACING = 0.0112  # between samples, body lengths: no holes in images up to 256 px


class Surface:
    """n samples. points, normals, flow [n, 3] (flow: direction the fur lies or the part runs); part [n].

    rest [n, 3]: place on the unposed animal (station, left, up) for coat patterns; ventral [n] -1 back .. 1 belly;
    along [n] 0..1 along a limb or tail, towards an ear's rim; size [n] spacing of the samples; number [n] of the
    sample, the same in every pose; openness [n] 0..1, how much of its surroundings it sees.
    flow, part, size, rest, ventral and along may be given once for all samples.
    """

    def __init__(self, points, normals, flow, part, size, rest=(0.0, 0.0, 0.0), ventral=0.0, along=0.0) -> None:
        n = len(points)
        self.points, self.normals, self.number, self.openness = points, normals, np.arange(n), np.ones(n)
        self.flow, self.rest = (np.broadcast_to(value, (n, 3)) for value in (flow, rest))
        values = (part, size, ventral, along)
        self.part, self.size, self.ventral, self.along = (np.broadcast_to(value, n) for value in values)

    def where(self, keep: np.ndarray) -> "Surface":
        chosen = copy(self)
        vars(chosen).update({name: values[keep] for name, values in vars(self).items()})
        return chosen


def join(pieces: list[Surface]) -> Surface:
    whole = copy(pieces[0])
    for k, piece in enumerate(pieces):
        piece.number = piece.number + 7919 * k
    vars(whole).update({name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in vars(whole)})
    return whole


def _rings(radius_along: np.ndarray, lengths: np.ndarray, spacing: float, rng: np.random.Generator):
    """Even samples t 0..1, angle of a surface of revolution of radii [k], [k - 1] lengths apart; jittered like fur."""
    arc = np.concatenate([[0.0], np.cumsum(lengths)])
    even = np.linspace(0, 1, len(arc))
    rows = max(int(arc[-1] / (0.87 * spacing)), 2)
    t_rows = np.interp((np.arange(rows) + 0.5) / rows * arc[-1], arc, even)
    counts = np.maximum((2 * math.pi * np.interp(t_rows, even, radius_along) / spacing).astype(int), 4)
    row = np.repeat(np.arange(rows), counts)
    number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    phase = rng.random(rows)
    angle = 2 * math.pi * (number + phase[row] + rng.uniform(-0.2, 0.2, len(row))) / counts[row]
    t = t_rows[row] + rng.uniform(-0.25, 0.25, len(row)) / rows
    return np.clip(t, 0.0, 1.0), angle


def _sphere(count: int) -> np.ndarray:
    """Returns [count, 3] even points of the unit sphere, along a golden spiral."""
    k = np.arange(count) + 0.5
    polar, turn = 1 - 2 * k / count, math.pi * (1 + 5**0.5) * k
    ring = np.sqrt(1 - polar**2)
    return np.stack([polar, ring * np.cos(turn), ring * np.sin(turn)], axis=1)


def sample_mouse(s: Skeleton, shape: MouseShape, pose: MousePose, skin: Skin, rng: np.random.Generator) -> Surface:
    """Samples all parts of the posed mouse; small ones more finely, since few splats must give their outline."""
    streams = rng.spawn(6)  # one per part: a part whose number of samples varies must not disturb the others
    pieces = [_body(s, skin, streams[0]), _tube(s.tail, s.tail_radius, 0.8 * SPACING, TAIL, streams[1])]
    for limb in range(4):
        pieces += _foot(s, shape, limb, 0.8 * SPACING, streams[2 + limb])
    for k, side in enumerate((1.0, -1.0)):
        pieces += _ear(s, shape, side, float(pose.ear_turn[k]), 0.85 * SPACING)
        # The eyeball sits in the blended skin with half of it showing.
        point, normal, _ = skin.project(head_point(s, EYE, 28.0, side)[0][None])
        center = point[0] - 0.32 * shape.eye_radius * normal[0]
        pieces.append(_blob(center, np.eye(3), [shape.eye_radius] * 3, 0.5 * SPACING, EYE_PART))
    place, *axes, _ = s.frame(0.992)
    nose = place + 0.004 * axes[0] + 0.006 * axes[2]
    return join([*pieces, _blob(nose, np.stack(axes), [0.013, 0.016, 0.012], 0.6 * SPACING, NOSE)])


def _body(s: Skeleton, skin: Skin, rng: np.random.Generator) -> Surface:
    """Trunk, head and furred limbs, projected onto the blended skin; what lies inside another part is dropped."""
    mean = s.sizes.mean(1)
    t, angle = _rings(mean, np.hypot(np.diff(mean), STATIONS[1]), SPACING, rng)
    size = interpolate(s.sizes, t)
    x, z = size[:, 0] * np.cos(angle), np.where(np.sin(angle) > 0, size[:, 1], size[:, 2]) * np.sin(angle)
    points = interpolate(s.spine, t) + x[:, None] * interpolate(s.left, t) + z[:, None] * interpolate(s.up, t)
    flow = -interpolate(s.tangent, t) - 0.25 * (np.abs(np.cos(angle)) * (t < 0.7))[:, None] * interpolate(s.up, t)
    pieces = [Surface(points, points, flow, FUR, SPACING, np.stack([t, x, z], axis=1), -np.sin(angle))]

    for number, e in enumerate(skin.ellipsoids):  # thighs, shoulders, cheeks bulge out of the tube
        axes, radii = e[3:12].reshape(3, 3), e[12:15]
        sphere = _sphere(int(4 * math.pi * (radii[0] * radii[1:].mean()) / SPACING**2))
        points, along = e[:3] + (sphere * radii) @ axes, sphere[:, 0]
        station, cheek, side = (0.16, 0.58, 0.80)[number // 2], number >= 4, (1.0, -1.0)[number % 2]
        # A thigh's or shoulder's fur lies along the limb and backwards, and counts as belly towards the foot.
        flow = -axes[0] if cheek else 0.5 * axes[0] - 0.8 * s.frame(station)[1]
        rest = np.stack([0 * along + station, 0 * along + side * 0.15, 0.12 * along * (0 if cheek else -1)], axis=1)
        pieces.append(Surface(points, points, flow, FUR, SPACING, rest, 0.2 if cheek else 0.38 * along))

    knees = []  # and elbows, round
    for number, c in enumerate(skin.cones):
        limb, lower = divmod(number, 2)
        length, axis = np.linalg.norm(c[3:6] - c[:3]), unit(c[3:6] - c[:3])
        station, side = 0.14 if limb < 2 else 0.58, SIDES[limb] * 0.15
        t, angle = _rings(c[6:8], np.array([length]), SPACING * 0.9, rng)
        u = unit(np.cross(axis, [0.31, 0.52, 0.79]))
        out = np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * np.cross(axis, u)
        points = c[:3] + (t * length)[:, None] * axis + (c[6] + t * (c[7] - c[6]))[:, None] * out
        rest = np.stack([0 * t + station, side + 0 * t, -0.1 - 0.1 * t], axis=1)
        pieces.append(Surface(points, points, axis, LIMB, SPACING * 0.9, rest, 0.35, 0.5 * (lower + t)))
        if lower:
            points = _blob(c[:3], np.eye(3), [c[6]] * 3, SPACING, LIMB).points
            knees.append(Surface(points, points, axis, LIMB, SPACING, [station, side, -0.15], 0.35, 0.5))

    surface = join(pieces + knees)
    surface = surface.where(skin.evaluate(surface.points)[0] > -0.032)
    surface.points, surface.normals, left_over = skin.project(surface.points)
    return surface.where(np.abs(left_over) < 0.3 * SPACING)


def _tube(path: np.ndarray, radius: np.ndarray, spacing: float, part: int, rng: np.random.Generator) -> Surface:
    """A round tube along path [k, 3] of radii [k], closed at its far end by its taper."""
    tangent = unit(np.gradient(path, axis=0))
    u = np.cross(tangent, [0.0, 0.0, 1.0])
    upright = np.linalg.norm(u, axis=1, keepdims=True) < 0.1
    u = unit(np.where(upright, np.cross(tangent, [1.0, 0.0, 0.0]), u))
    t, angle = _rings(radius, np.linalg.norm(np.diff(path, axis=0), axis=1), spacing, rng)
    u, v = interpolate(u, t), interpolate(np.cross(u, tangent), t)
    normals = unit(np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * v)
    points = interpolate(path, t) + interpolate(radius[:, None], t) * normals
    return Surface(points, normals, interpolate(tangent, t), part, spacing, along=t)


def _blob(center, axes, radii, spacing: float, part: int) -> Surface:
    """An ellipsoid; axes [3, 3] rows, radii [3]."""
    sphere = _sphere(max(int(4 * math.pi * (np.mean(radii) / spacing) ** 2), 24))
    normals = unit((sphere / radii) @ axes)
    return Surface(center + (sphere * radii) @ axes, normals, axes[0], part, spacing, along=0.5 + 0.5 * sphere[:, 0])


def head_point(s: Skeleton, station: float, angle_deg: float, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns a point on the head's tube and its outward direction; angle above the horizontal, side 1 is left."""
    place, _, left, up, size = s.frame(station)
    a = math.radians(angle_deg)
    x, z = size[0] * math.cos(a), (size[1] if a > 0 else size[2]) * math.sin(a)
    out = side * math.cos(a) / size[0] * left + math.sin(a) / size[1] * up
    return place + side * x * left + z * up, unit(out)


def _ear(s: Skeleton, shape: MouseShape, side: float, turn_deg: float, spacing: float) -> list[Surface]:
    """A thin cupped disc on the head: inner (forward, bare) and outer (backward, thinly furred) sheets."""
    base, out = head_point(s, EAR, 50.0, side)
    _, tangent, left, up, _ = s.frame(EAR)
    azimuth = math.radians(shape.ear_azimuth_deg + turn_deg)
    stem = unit(0.84 * up + side * 0.46 * left - (0.30 + 0.3 * math.sin(math.radians(turn_deg))) * tangent)
    facing = perpendicular(math.cos(azimuth) * tangent + side * math.sin(azimuth) * left, stem)
    rows, columns = int(shape.ear_height / (0.85 * spacing)), int(shape.ear_width / (0.85 * spacing)) | 1
    v, u = np.meshgrid(np.linspace(0.0, 1.0, rows), np.linspace(-1, 1, columns), indexing="ij")
    u, v = u.ravel(), v.ravel()
    # The outline is a near-circle on a narrow root.
    half = np.maximum(np.sqrt(np.clip(1 - ((v - 0.53) / 0.475) ** 2, 0, 1)), 0.42 * (v < 0.40))
    x = u * half * 0.5 * shape.ear_width
    bowl = (x / (0.5 * shape.ear_width)) ** 2 * 0.45 + 0.55 * ((v - 0.5) / 0.5) ** 2
    lift = shape.ear_height * (0.30 * bowl - 0.10) * np.clip(v / 0.3, 0, 1)
    across = np.cross(stem, facing)
    middle = base - 0.028 * out + (v * shape.ear_height)[:, None] * stem + x[:, None] * across + lift[:, None] * facing
    slope_x = 2 * 0.45 * u * half * 0.30 * shape.ear_height / (0.5 * shape.ear_width)
    slope_v = 2 * 0.55 * (v - 0.5) / 0.25 * 0.30
    normals = unit(facing - slope_x[:, None] * across - slope_v[:, None] * stem)
    rest, rim = np.stack([np.full(len(v), EAR), u, v], axis=1), np.maximum(np.abs(u), np.abs(v - 0.5) * 2)
    return [
        Surface(middle + sheet * 0.004 * normals, sheet * normals, stem, part, spacing, rest, along=rim)
        for sheet, part in ((1.0, EAR_INNER), (-1.0, EAR_OUTER))
    ]


def _foot(s: Skeleton, shape: MouseShape, limb: int, spacing: float, rng: np.random.Generator) -> list[Surface]:
    """A flat foot and its toes from the ankle (wrist) on."""
    hind = limb < 2
    length = shape.hind_foot if hind else shape.fore_foot
    ankle, direction = s.limbs[limb, 2], s.feet[limb]
    across = np.cross([0.0, 0.0, 1.0], direction)
    norm = np.linalg.norm(across)  # small where the foot hangs straight down
    across = perpendicular(across / norm if norm > 0.2 else s.frame(0.6)[2], direction)
    axes = np.stack([direction, across, np.cross(direction, across)])
    ball = ankle + 0.62 * length * direction
    width = (0.021 if hind else 0.020) * shape.limb
    t = np.linspace(0, 1, 8)
    radius = np.interp(t, [0, 1], [0.0165, 0.0135]) * shape.limb
    pieces = [  # from the ankle to the ball, widening; the ball; the heel
        _tube(ankle + t[:, None] * (ball - ankle), radius, spacing, FOOT, rng),
        _blob(ball - 0.004 * direction, axes, [0.026 if hind else 0.021, width, 0.011], spacing, FOOT),
        _blob(ankle, axes, [0.0155 * shape.limb] * 3, spacing, FOOT),
    ]
    toes = 5 if hind else 4
    for k in range(toes):
        spread = (k - (toes - 1) / 2) / ((toes - 1) / 2)
        fan, reach = math.radians(24 * spread), length * 0.40 * (1 - 0.22 * spread**2)
        heading = math.cos(fan) * direction + math.sin(fan) * across
        start, t = ball + 0.8 * width * spread * across, np.linspace(0, 1, 5)
        path = start + (t * reach)[:, None] * heading - (0.004 * t - 0.006 * np.sin(math.pi * t))[:, None] * axes[2]
        path[:, 2] = np.maximum(path[:, 2], 0.005)
        pieces.append(_tube(path, np.interp(t, [0, 0.8, 1], [0.0075, 0.006, 0.003]), spacing * 0.7, FOOT, rng))
    return pieces
