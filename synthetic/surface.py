"""Samples the mouse's surface: points, normals and what lies where, at an even spacing. Body lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from synthetic.implicit import Skin
from synthetic.pose import MousePose
from synthetic.skeleton import EAR, EYE, SIDES, STATIONS, MouseShape, Skeleton, perpendicular, unit

FUR, LIMB, FOOT, TAIL, EAR_INNER, EAR_OUTER, EYE_PART, NOSE = range(8)  # what a sample belongs to
SPACING = 0.0112  # between samples, body lengths: no holes in images up to 256 px
# Of the ellipsoids of the skin (thighs, shoulders, cheeks): the spine's station they belong to.
_STATIONS = (0.16, 0.16, 0.58, 0.58, 0.80, 0.80)


@dataclass
class Surface:
    """n samples. points, normals, flow [n, 3] (flow: direction the fur lies or the part runs); part [n].

    rest [n, 3]: place on the unposed animal (station, left, up) for coat patterns; ventral [n] -1 back .. 1 belly;
    along [n] 0..1 along a limb or tail, towards an ear's rim; size [n] spacing of the samples; number [n] of the
    sample, the same in every pose.
    """

    points: np.ndarray
    normals: np.ndarray
    flow: np.ndarray
    part: np.ndarray
    rest: np.ndarray
    ventral: np.ndarray
    along: np.ndarray
    size: np.ndarray
    number: np.ndarray

    @staticmethod
    def piece(points, normals, flow, part, *, rest=(0.0, 0.0, 0.0), ventral=0.0, along=0.0, size: float):
        """Returns a surface; flow, part, rest, ventral and along may be given once for all samples."""
        n = len(points)
        flow, rest = np.broadcast_to(flow, (n, 3)), np.broadcast_to(rest, (n, 3))
        part, ventral, along, size = (np.broadcast_to(value, (n,)) for value in (part, ventral, along, size))
        return Surface(points, normals, flow, part, rest, ventral, along, size, np.arange(n))

    @staticmethod
    def joined(pieces: list[Surface]) -> Surface:
        for k, piece in enumerate(pieces):
            piece.number = piece.number + 7919 * k
        return Surface(*(np.concatenate([getattr(p, f) for p in pieces]) for f in Surface.__dataclass_fields__))

    def where(self, keep: np.ndarray) -> Surface:
        return Surface(*(getattr(self, f)[keep] for f in Surface.__dataclass_fields__))


def _rings(radius_along: np.ndarray, lengths: np.ndarray, spacing: float, rng: np.random.Generator):
    """Even samples of a surface of revolution: parameter t 0..1 (by `lengths`) and angle, jittered like fur.

    radius_along: [k] mean radius at equally spaced t; lengths: [k - 1] surface lengths between them.
    """
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


def _mix(values: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Interpolates rows [k, c] linearly at t [n] 0..1."""
    place = np.clip(t, 0, 1) * (len(values) - 1)
    index = np.minimum(place.astype(int), len(values) - 2)
    return values[index] + (place - index)[:, None] * (values[index + 1] - values[index])


def sample_mouse(s: Skeleton, shape: MouseShape, pose: MousePose, skin: Skin, rng: np.random.Generator) -> Surface:
    """Samples all parts of the posed mouse; small ones more finely, since few splats must give their outline."""
    spacing = SPACING
    streams = rng.spawn(6)  # one per part: a part whose number of samples varies must not disturb the others
    pieces = [_body(s, skin, spacing, streams[0]), _tube(s.tail, s.tail_radius, 0.8 * spacing, TAIL, streams[1])]
    for limb in range(4):
        pieces += _foot(s, shape, limb, 0.8 * spacing, streams[2 + limb])
    for k, side in enumerate((1.0, -1.0)):
        pieces += _ear(s, shape, side, float(pose.ear_turn[k]), 0.85 * spacing)
        # The eyeball sits in the blended skin with half of it showing.
        point, normal, _ = skin.project(head_point(s, EYE, 28.0, side)[0][None])
        center = point[0] - 0.32 * shape.eye_radius * normal[0]
        pieces.append(_blob(center, np.eye(3), [shape.eye_radius] * 3, 0.5 * spacing, EYE_PART))
    place, tangent, left, up = s.frame(0.992)
    nose = place + 0.004 * tangent + 0.006 * up
    pieces.append(_blob(nose, np.stack([tangent, left, up]), [0.013, 0.016, 0.012], 0.6 * spacing, NOSE))
    return Surface.joined(pieces)


def _body(s: Skeleton, skin: Skin, spacing: float, rng: np.random.Generator) -> Surface:
    """Trunk, head and furred limbs, projected onto the blended skin; what lies inside another part is dropped."""
    mean = s.sizes.mean(1)
    t, angle = _rings(mean, np.hypot(np.diff(mean), STATIONS[1]), spacing, rng)
    size = _mix(s.sizes, t)
    x, z = size[:, 0] * np.cos(angle), np.where(np.sin(angle) > 0, size[:, 1], size[:, 2]) * np.sin(angle)
    points = _mix(s.spine, t) + x[:, None] * _mix(s.left, t) + z[:, None] * _mix(s.up, t)
    flow = -_mix(s.tangent, t) - 0.25 * (np.abs(np.cos(angle)) * (t < 0.7))[:, None] * _mix(s.up, t)
    rest = np.stack([t, x, z], axis=1)
    pieces = [Surface.piece(points, points, flow, FUR, rest=rest, ventral=-np.sin(angle), size=spacing)]

    for number, e in enumerate(skin.ellipsoids):  # thighs, shoulders, cheeks bulge out of the tube
        axes, radii = e[3:12].reshape(3, 3), e[12:15]
        sphere = _sphere(int(4 * math.pi * (radii[0] * radii[1:].mean()) / spacing**2))
        points = e[:3] + (sphere * radii) @ axes
        station, cheek, side = _STATIONS[number], number >= 4, (1.0, -1.0)[number % 2]
        # A thigh's or shoulder's fur lies along the limb and backwards, and counts as belly towards the foot.
        flow = -axes[0] if cheek else 0.5 * axes[0] - 0.8 * s.frame(station)[1]
        along, ventral = sphere[:, 0], 0.2 if cheek else 0.38 * sphere[:, 0]
        rest = np.stack([0 * along + station, 0 * along + side * 0.15, 0.12 * along * (0 if cheek else -1)], axis=1)
        pieces.append(Surface.piece(points, points, flow, FUR, rest=rest, ventral=ventral, size=spacing))

    for number, c in enumerate(skin.cones):
        limb, lower = divmod(number, 2)
        length, axis = np.linalg.norm(c[3:6] - c[:3]), unit(c[3:6] - c[:3])
        t, angle = _rings(c[6:8], np.array([length]), spacing * 0.9, rng)
        u = unit(np.cross(axis, [0.31, 0.52, 0.79]))
        out = np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * np.cross(axis, u)
        points = c[:3] + (t * length)[:, None] * axis + (c[6] + t * (c[7] - c[6]))[:, None] * out
        rest = np.stack([0 * t + (0.14 if limb < 2 else 0.58), SIDES[limb] * 0.15 + 0 * t, -0.1 - 0.1 * t], axis=1)
        places = {"rest": rest, "ventral": 0.35, "along": 0.5 * (lower + t)}
        pieces.append(Surface.piece(points, points, axis, LIMB, **places, size=spacing * 0.9))

    for limb in range(4):  # the knees and elbows, round
        c = skin.cones[2 * limb + 1]
        points = _blob(c[:3], np.eye(3), [c[6]] * 3, spacing, LIMB).points
        rest, axis = [0.14 if limb < 2 else 0.58, SIDES[limb] * 0.15, -0.15], unit(c[3:6] - c[:3])
        pieces.append(Surface.piece(points, points, axis, LIMB, rest=rest, ventral=0.35, along=0.5, size=spacing))

    surface = Surface.joined(pieces)
    depth, _ = skin.evaluate(surface.points)
    surface = surface.where(depth > -0.032)
    surface.points, surface.normals, left_over = skin.project(surface.points)
    return surface.where(np.abs(left_over) < 0.3 * spacing)


def _tube(path: np.ndarray, radius: np.ndarray, spacing: float, part: int, rng: np.random.Generator) -> Surface:
    """A round tube along path [k, 3] of radii [k], closed at its far end by its taper."""
    tangent = unit(np.gradient(path, axis=0))
    u = np.cross(tangent, [0.0, 0.0, 1.0])
    upright = np.linalg.norm(u, axis=1, keepdims=True) < 0.1
    u = unit(np.where(upright, np.cross(tangent, [1.0, 0.0, 0.0]), u))
    t, angle = _rings(radius, np.linalg.norm(np.diff(path, axis=0), axis=1), spacing, rng)
    normals = unit(np.cos(angle)[:, None] * _mix(u, t) + np.sin(angle)[:, None] * _mix(np.cross(u, tangent), t))
    points = _mix(path, t) + _mix(radius[:, None], t) * normals
    return Surface.piece(points, normals, _mix(tangent, t), part, along=t, size=spacing)


def _blob(center, axes, radii, spacing: float, part: int) -> Surface:
    """An ellipsoid; axes [3, 3] rows, radii [3]."""
    radii = np.asarray(radii)
    sphere = _sphere(max(int(4 * math.pi * (radii.mean() / spacing) ** 2), 24))
    normals = unit((sphere / radii) @ axes)
    along = 0.5 + 0.5 * sphere[:, 0]
    return Surface.piece(center + (sphere * radii) @ axes, normals, axes[0], part, along=along, size=spacing)


def head_point(s: Skeleton, station: float, angle_deg: float, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns a point on the head's tube and its outward direction; angle above the horizontal, side 1 is left."""
    place, _, left, up = s.frame(station)
    size = s.size_at(station)
    a = math.radians(angle_deg)
    x, z = size[0] * math.cos(a), (size[1] if a > 0 else size[2]) * math.sin(a)
    out = side * math.cos(a) / size[0] * left + math.sin(a) / size[1] * up
    return place + side * x * left + z * up, unit(out)


def _ear(s: Skeleton, shape: MouseShape, side: float, turn_deg: float, spacing: float) -> list[Surface]:
    """A thin cupped disc on the head: inner (forward, bare) and outer (backward, thinly furred) sheets."""
    base, out = head_point(s, EAR, 50.0, side)
    _, tangent, left, up = s.frame(EAR)
    azimuth = math.radians(shape.ear_azimuth_deg + turn_deg)
    stem = unit(0.84 * up + side * 0.46 * left - (0.30 + 0.3 * math.sin(math.radians(turn_deg))) * tangent)
    facing = perpendicular(math.cos(azimuth) * tangent + side * math.sin(azimuth) * left, stem)
    rows, columns = int(shape.ear_height / (0.85 * spacing)), int(shape.ear_width / (0.85 * spacing)) | 1
    v, u = np.meshgrid(np.linspace(0.0, 1.0, rows), np.linspace(-1, 1, columns), indexing="ij")
    # outline: a near-circle on a narrow root
    half = np.sqrt(np.clip(1 - ((v - 0.53) / 0.475) ** 2, 0, 1))
    half = np.maximum(half, 0.42 * (v < 0.40))
    u, v, half = u.ravel(), v.ravel(), half.ravel()
    x = u * half * 0.5 * shape.ear_width
    bowl = (x / (0.5 * shape.ear_width)) ** 2 * 0.45 + 0.55 * ((v - 0.5) / 0.5) ** 2
    lift = shape.ear_height * (0.30 * bowl - 0.10) * np.clip(v / 0.3, 0, 1)
    across = np.cross(stem, facing)
    middle = base - 0.028 * out + (v * shape.ear_height)[:, None] * stem + x[:, None] * across + lift[:, None] * facing
    slope_x = 2 * 0.45 * u * half * 0.30 * shape.ear_height / (0.5 * shape.ear_width)
    slope_v = 2 * 0.55 * (v - 0.5) / 0.25 * 0.30
    normals = unit(facing - slope_x[:, None] * across - slope_v[:, None] * stem)
    rest = np.stack([np.full(len(v), EAR), u, v], axis=1)
    rim = np.maximum(np.abs(u), np.abs(v - 0.5) * 2)
    return [
        Surface.piece(middle + sheet * 0.004 * normals, sheet * normals, stem, part, rest=rest, along=rim, size=spacing)
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
    up = np.cross(direction, across)
    ball = ankle + 0.62 * length * direction
    width = (0.021 if hind else 0.020) * shape.limb
    # metatarsus: from the ankle, widening to the ball
    t = np.linspace(0, 1, 8)
    path = ankle + t[:, None] * (ball - ankle)
    axes = np.stack([direction, across, up])
    pieces = [
        _tube(path, np.interp(t, [0, 1], [0.0165, 0.0135]) * shape.limb, spacing, FOOT, rng),
        _blob(ball - 0.004 * direction, axes, [0.026 if hind else 0.021, width, 0.011], spacing, FOOT),
        _blob(ankle, axes, [0.0155 * shape.limb] * 3, spacing, FOOT),  # the heel
    ]
    toes = 5 if hind else 4
    for k in range(toes):
        spread = (k - (toes - 1) / 2) / ((toes - 1) / 2)
        fan = math.radians(24 * spread)
        heading = math.cos(fan) * direction + math.sin(fan) * across
        reach = length * 0.40 * (1 - 0.22 * spread**2)
        t = np.linspace(0, 1, 5)
        start = ball + 0.8 * width * spread * across
        path = start + (t * reach)[:, None] * heading - (0.004 * t - 0.006 * np.sin(math.pi * t))[:, None] * up
        path[:, 2] = np.maximum(path[:, 2], 0.005)
        pieces.append(_tube(path, np.interp(t, [0, 0.8, 1], [0.0075, 0.006, 0.003]), spacing * 0.7, FOOT, rng))
    return pieces
