"""Samples the mouse's surface: points, normals and what lies where, at an even spacing. Body lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from synthetic.body import STATIONS, MouseShape
from synthetic.implicit import Skin
from synthetic.skeleton import EAR, EYE, SIDES, Skeleton

# What a splat belongs to.
FUR, LIMB, FOOT, TAIL, EAR_INNER, EAR_OUTER, EYE_PART, NOSE = range(8)


@dataclass
class Surface:
    """n samples. points, normals, flow [n, 3] (flow: direction the fur lies or the part runs); part [n].

    rest [n, 3]: place on the unposed animal (station, left, up) for coat patterns; ventral [n] -1 back .. 1 belly;
    along [n] 0..1 along a limb or tail, towards an ear's rim; size [n] spacing of the samples; number [n] which sample
    this is, the same in every pose.
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
    def joined(pieces: list[Surface]) -> Surface:
        for k, piece in enumerate(pieces):
            piece.number = piece.number + 7919 * k
        return Surface(*(np.concatenate([getattr(p, f) for p in pieces]) for f in Surface.__dataclass_fields__))

    def where(self, keep: np.ndarray) -> Surface:
        return Surface(*(getattr(self, f)[keep] for f in Surface.__dataclass_fields__))


def _piece(points, normals, flow, part, rest, ventral, along, size) -> Surface:
    n = len(points)
    return Surface(
        points, normals, np.broadcast_to(flow, (n, 3)), np.full(n, part), rest,
        np.broadcast_to(ventral, (n,)), np.broadcast_to(along, (n,)), np.full(n, size),
        np.arange(n),
    )  # fmt: skip


def _rings(radius_along: np.ndarray, lengths: np.ndarray, spacing: float, rng: np.random.Generator):
    """Even samples of a surface of revolution: parameter t 0..1 (by `lengths`) and angle, jittered like fur.

    radius_along: [k] mean radius at equally spaced t; lengths: [k - 1] surface lengths between them.
    """
    arc = np.concatenate([[0.0], np.cumsum(lengths)])
    rows = max(int(arc[-1] / (0.87 * spacing)), 2)
    t_rows = np.interp((np.arange(rows) + 0.5) / rows * arc[-1], arc, np.linspace(0, 1, len(arc)))
    counts = np.maximum(
        (2 * math.pi * np.interp(t_rows, np.linspace(0, 1, len(arc)), radius_along) / spacing).astype(int), 4
    )
    row = np.repeat(np.arange(rows), counts)
    number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    phase = rng.random(rows)
    angle = 2 * math.pi * (number + phase[row] + rng.uniform(-0.2, 0.2, len(row))) / counts[row]
    t = t_rows[row] + rng.uniform(-0.25, 0.25, len(row)) / rows
    return np.clip(t, 0.0, 1.0), angle


def _mix(values: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Linear interpolation of rows [k, c] at t 0..1."""
    place = np.clip(t, 0, 1) * (len(values) - 1)
    index = np.minimum(place.astype(int), len(values) - 2)
    return values[index] + (place - index)[:, None] * (values[index + 1] - values[index])


def sample_body(s: Skeleton, shape: MouseShape, skin: Skin, spacing: float, rng: np.random.Generator) -> Surface:
    """Trunk, head and furred limbs, projected onto the blended skin; what lies inside another part is dropped."""
    mean = s.sizes.mean(1)
    t, angle = _rings(mean, np.hypot(np.diff(mean), STATIONS[1]), spacing, rng)
    size = _mix(s.sizes, t)
    height = np.where(np.sin(angle) > 0, size[:, 1], size[:, 2])
    x, z = size[:, 0] * np.cos(angle), height * np.sin(angle)
    points = _mix(s.spine, t) + x[:, None] * _mix(s.left, t) + z[:, None] * _mix(s.up, t)
    rest = np.stack([t, x, z], axis=1)
    flow = -_mix(s.tangent, t) - 0.25 * (np.abs(np.cos(angle)) * (t < 0.7))[:, None] * _mix(s.up, t)
    pieces = [_piece(points, points, flow, FUR, rest, -np.sin(angle), 0.0, spacing)]

    for number, e in enumerate(skin.ellipsoids):  # thighs, shoulders, cheeks bulge out of the tube
        axes, radii = e[3:12].reshape(3, 3), e[12:15]
        count = int(4 * math.pi * (radii[0] * radii[1:].mean()) / spacing**2)
        k = np.arange(count) + 0.5
        polar, turn = 1 - 2 * k / count, math.pi * (1 + 5**0.5) * k
        ring = np.sqrt(1 - polar**2)
        unit = np.stack([polar, ring * np.cos(turn), ring * np.sin(turn)], axis=1)
        points = e[:3] + (unit * radii) @ axes
        station = (0.16, 0.16, 0.58, 0.58, 0.80, 0.80)[number]
        side = (1.0, -1.0)[number % 2]
        rest = np.stack(
            [np.full(count, station), np.full(count, side * 0.15), 0.12 * unit[:, 0] * (-1 if number < 4 else 0)], 1
        )
        ventral = 0.38 * unit[:, 0] if number < 4 else np.full(count, 0.2)
        flow = 0.5 * axes[0] - 0.8 * s.frame(station)[1] if number < 4 else -axes[0]
        pieces.append(_piece(points, points, flow, FUR, rest, ventral, 0.0, spacing))

    for number, c in enumerate(skin.cones):
        limb, lower = divmod(number, 2)
        a, b = c[:3], c[3:6]
        length = np.linalg.norm(b - a)
        axis = (b - a) / length
        t, angle = _rings(c[6:8], np.array([length]), spacing * 0.9, rng)
        u = np.cross(axis, [0.31, 0.52, 0.79])
        u = u / np.linalg.norm(u)
        radius = c[6] + t * (c[7] - c[6])
        out = np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * np.cross(axis, u)
        points = a + (t * length)[:, None] * axis + radius[:, None] * out
        rest = np.stack([np.full(len(t), 0.14 if limb < 2 else 0.58), SIDES[limb] * 0.15 + 0 * t, -0.1 - 0.1 * t], 1)
        pieces.append(_piece(points, points, axis, LIMB, rest, 0.35 - 0 * t, 0.5 * (lower + t), spacing * 0.9))

    for limb in range(4):  # the knees and elbows, round
        c = skin.cones[2 * limb + 1]
        axis = (c[3:6] - c[:3]) / np.linalg.norm(c[3:6] - c[:3])
        knob = sample_blob(c[:3], np.eye(3), [c[6]] * 3, spacing, LIMB)
        knob.flow = np.broadcast_to(axis, knob.points.shape)
        knob.rest = np.broadcast_to([0.14 if limb < 2 else 0.58, SIDES[limb] * 0.15, -0.15], knob.points.shape)
        knob.along, knob.ventral = np.full(len(knob.points), 0.5), np.full(len(knob.points), 0.35)
        pieces.append(knob)

    surface = Surface.joined(pieces)
    depth, _ = skin.evaluate(surface.points)
    surface = surface.where(depth > -0.032)
    surface.points, surface.normals, left_over = skin.project(surface.points)
    return surface.where(np.abs(left_over) < 0.3 * spacing)


def sample_tube(path: np.ndarray, radius: np.ndarray, spacing: float, part: int, rng: np.random.Generator) -> Surface:
    """A round tube along path [k, 3] of radii [k], closed at its far end by its taper."""
    tangent = np.gradient(path, axis=0)
    tangent = tangent / np.linalg.norm(tangent, axis=1, keepdims=True)
    u = np.cross(tangent, [0.0, 0.0, 1.0])
    u = np.where(np.linalg.norm(u, axis=1, keepdims=True) < 0.1, np.cross(tangent, [1.0, 0.0, 0.0]), u)
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    v = np.cross(u, tangent)
    lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)
    t, angle = _rings(radius, lengths, spacing, rng)
    normals = np.cos(angle)[:, None] * _mix(u, t) + np.sin(angle)[:, None] * _mix(v, t)
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    points = _mix(path, t) + _mix(radius[:, None], t) * normals
    rest = np.stack([0 * t, 0 * t, 0 * t], axis=1)
    return _piece(points, normals, _mix(tangent, t), part, rest, 0.0, t, spacing)


def sample_blob(centre, axes, radii, spacing: float, part: int) -> Surface:
    """An ellipsoid; axes [3, 3] rows, radii [3]."""
    radii = np.asarray(radii)
    count = max(int(4 * math.pi * (radii.mean() / spacing) ** 2), 24)
    k = np.arange(count) + 0.5
    polar, turn = 1 - 2 * k / count, math.pi * (1 + 5**0.5) * k
    ring = np.sqrt(1 - polar**2)
    unit = np.stack([polar, ring * np.cos(turn), ring * np.sin(turn)], axis=1)
    normals = (unit / radii) @ axes
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    return _piece(
        centre + (unit * radii) @ axes, normals, axes[0], part, np.zeros((count, 3)), 0.0, 0.5 + 0.5 * polar, spacing
    )


def head_points(s: Skeleton, station: float, angle_deg: float, side: float) -> tuple[np.ndarray, np.ndarray]:
    """A point on the head's tube and its outward direction; angle above the horizontal, side 1 left or -1 right."""
    place, _, left, up = s.frame(station)
    size = s.size_at(station)
    a = math.radians(angle_deg)
    x, z = size[0] * math.cos(a), (size[1] if a > 0 else size[2]) * math.sin(a)
    out = side * math.cos(a) / size[0] * left + math.sin(a) / size[1] * up
    return place + side * x * left + z * up, out / np.linalg.norm(out)


def eye(s: Skeleton, shape: MouseShape, skin: Skin, side: float) -> tuple[np.ndarray, float]:
    """Centre and radius of an eyeball that sits in the blended skin with half of it showing."""
    start, _ = head_points(s, EYE, 28.0, side)
    point, normal, _ = skin.project(start[None])
    return point[0] - 0.32 * shape.eye_radius * normal[0], shape.eye_radius


def ear(s: Skeleton, shape: MouseShape, side: float, turn_deg: float, spacing: float) -> list[Surface]:
    """A thin cupped disc on the head: inner (forward, bare) and outer (backward, thinly furred) sheets."""
    base, out = head_points(s, EAR, 50.0, side)
    _, tangent, left, up = s.frame(EAR)
    azimuth = math.radians(shape.ear_azimuth_deg + turn_deg)
    stem = 0.84 * up + side * 0.46 * left - (0.30 + 0.3 * math.sin(math.radians(turn_deg))) * tangent
    stem = stem / np.linalg.norm(stem)
    facing = math.cos(azimuth) * tangent + side * math.sin(azimuth) * left
    facing = facing - facing @ stem * stem
    facing = facing / np.linalg.norm(facing)
    across = np.cross(stem, facing)
    rows = int(shape.ear_height / (0.85 * spacing))
    columns = int(shape.ear_width / (0.85 * spacing)) | 1
    v, u = np.meshgrid(np.linspace(0.0, 1.0, rows), np.linspace(-1, 1, columns), indexing="ij")
    # outline: a near-circle on a narrow root
    half = np.sqrt(np.clip(1 - ((v - 0.53) / 0.475) ** 2, 0, 1))
    half = np.maximum(half, 0.42 * (v < 0.40))
    u, v, half = u.ravel(), v.ravel(), half.ravel()
    x = u * half * 0.5 * shape.ear_width
    bowl = (x / (0.5 * shape.ear_width)) ** 2 * 0.45 + 0.55 * ((v - 0.5) / 0.5) ** 2
    lift = shape.ear_height * (0.30 * bowl - 0.10) * np.clip(v / 0.3, 0, 1)
    root = base - 0.028 * out
    middle = root + (v * shape.ear_height)[:, None] * stem + x[:, None] * across + lift[:, None] * facing
    slope_x = 2 * 0.45 * u * half * 0.30 * shape.ear_height / (0.5 * shape.ear_width)
    slope_v = 2 * 0.55 * (v - 0.5) / 0.25 * 0.30
    normals = facing - slope_x[:, None] * across - slope_v[:, None] * stem
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    rest = np.stack([np.full(len(v), EAR), u, v], axis=1)
    rim = np.maximum(np.abs(u), np.abs(v - 0.5) * 2)
    return [
        _piece(middle + 0.004 * normals, normals, stem, EAR_INNER, rest, 0.0, rim, spacing),
        _piece(middle - 0.004 * normals, -normals, stem, EAR_OUTER, rest, 0.0, rim, spacing),
    ]


def foot(s: Skeleton, shape: MouseShape, limb: int, spacing: float, rng: np.random.Generator) -> list[Surface]:
    """A flat foot and its toes from the ankle (wrist) on."""
    hind = limb < 2
    length = shape.hind_foot if hind else shape.fore_foot
    ankle, direction = s.limbs[limb, 2], s.feet[limb]
    across = np.cross([0.0, 0.0, 1.0], direction)
    norm = np.linalg.norm(across)
    across = across / norm if norm > 0.2 else s.frame(0.6)[2]
    across = across - across @ direction * direction
    across = across / np.linalg.norm(across)
    up = np.cross(direction, across)
    ball = ankle + 0.62 * length * direction
    width = (0.021 if hind else 0.020) * shape.limb
    # metatarsus: from the ankle, widening to the ball
    t = np.linspace(0, 1, 8)
    path = ankle + t[:, None] * (ball - ankle)
    pieces = [sample_tube(path, np.interp(t, [0, 1], [0.0165, 0.0135]) * shape.limb, spacing, FOOT, rng)]
    axes = np.stack([direction, across, up])
    pieces.append(sample_blob(ball - 0.004 * direction, axes, [0.026 if hind else 0.021, width, 0.011], spacing, FOOT))
    pieces.append(sample_blob(ankle, axes, [0.0155 * shape.limb] * 3, spacing, FOOT))  # the heel
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
        pieces.append(sample_tube(path, np.interp(t, [0, 0.8, 1], [0.0075, 0.006, 0.003]), spacing * 0.7, FOOT, rng))
    return pieces
