"""From proportions and a pose to geometry: spine, limbs, tail. Body lengths, heading -y, floor at z = 0."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from synthetic.body import STATIONS, MouseShape
from synthetic.implicit import Skin
from synthetic.pose import CONTROL_STATIONS, MousePose

HIP, SHOULDER = 0.13, 0.60  # spine stations of the limb girdles
EAR, EYE = 0.752, 0.853
# The tail's farthest horizontal distance from the body's centre, world units, so that the rigs' pictures (distance 2.7,
# 50 degrees, elevation up to 20) hold it; less where it lies far below the centre, under an animal that rears.
TAIL_REACH, TAIL_REACH_LOW = 1.10, (1.50, 1.0)
TAIL_NODES = 48
SIDES = np.array([1.0, -1.0, 1.0, -1.0])  # left, right of the four limbs


@dataclass(frozen=True)
class Skeleton:
    """spine, tangent, left, up: [stations, 3]; sizes: [stations, 3] half width, up, down.

    limbs: [4, 3, 3] socket, knee or elbow, ankle or wrist. feet: [4, 3] unit directions of the feet; foot_up: [4, 3].
    tail: [TAIL_NODES, 3]; tail_radius: [TAIL_NODES]. centre: [3] volume centroid of the trunk and head.
    """

    spine: np.ndarray
    tangent: np.ndarray
    left: np.ndarray
    up: np.ndarray
    sizes: np.ndarray
    limbs: np.ndarray
    feet: np.ndarray
    tail: np.ndarray
    tail_radius: np.ndarray
    centre: np.ndarray

    def frame(self, station: float) -> np.ndarray:
        """[4, 3]: position, tangent (towards the nose), left, up of the spine at a station."""
        rows = [self._at(values, station) for values in (self.spine, self.tangent, self.left, self.up)]
        return np.stack([rows[0]] + [row / np.linalg.norm(row) for row in rows[1:]])

    @staticmethod
    def _at(values: np.ndarray, station: float) -> np.ndarray:
        place = station * (len(STATIONS) - 1)
        index = min(int(place), len(STATIONS) - 2)
        return values[index] + (place - index) * (values[index + 1] - values[index])

    def size_at(self, station: float) -> np.ndarray:
        return self._at(self.sizes, station)


def solve(shape: MouseShape, pose: MousePose) -> Skeleton:
    """Places the whole skeleton: spine over its feet, limbs by two-bone inverse kinematics, tail on the floor."""
    sizes = shape.half_sizes()
    spine, tangent, left, up = _spine(pose, sizes)
    weight = sizes[:, 0] * (sizes[:, 1] + sizes[:, 2])
    middle = spine + 0.5 * (sizes[:, 1] - sizes[:, 2])[:, None] * up
    centre = (weight[:, None] * middle).sum(0) / weight.sum()
    empty = np.zeros((4, 3, 3)), np.zeros((4, 3))
    trunk = Skeleton(spine, tangent, left, up, sizes, *empty, np.zeros((2, 3)), np.zeros(2), centre)
    limbs, feet = _limbs(trunk, shape, pose)
    tail, radius = _tail(trunk, shape, pose)
    return Skeleton(spine, tangent, left, up, sizes, limbs, feet, tail, radius, centre)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Control values [7] in degrees -> [stations] radians, without corners."""
    dense = np.interp(STATIONS, CONTROL_STATIONS, values)
    kernel = np.hanning(13)[1:-1]
    padded = np.pad(dense, 5, mode="edge")
    return np.radians(np.convolve(padded, kernel / kernel.sum(), mode="valid"))


def _spine(pose: MousePose, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
    pitch, yaw = _smooth(pose.spine_pitch), _smooth(pose.spine_yaw)
    step = STATIONS[1]
    hip, shoulder = int(round(HIP / step)), int(round(SHOULDER / step))

    def curve(pitch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tangent = np.stack([np.sin(yaw) * np.cos(pitch), -np.cos(yaw) * np.cos(pitch), np.sin(pitch)], axis=1)
        middles = 0.5 * (tangent[1:] + tangent[:-1]) * step
        points = np.concatenate([np.zeros((1, 3)), np.cumsum(middles, axis=0)])
        return points - points[hip] + [0, 0, pose.hip_height], tangent

    # Pitch the whole spine until the shoulder has its height, then lift the head and the body off the floor.
    for _ in range(3):
        points, tangent = curve(pitch)
        run = np.linalg.norm(points[shoulder, :2] - points[hip, :2]) + 1e-6
        error = pose.shoulder_height - points[shoulder, 2]
        pitch = pitch + pose.level * math.atan2(error, run)
    for _ in range(6):
        points, tangent = curve(pitch)
        lowest = (points[:, 2] - 0.9 * sizes[:, 2])[shoulder + 6 :].min()
        if lowest >= 0.012:
            break
        pitch = pitch + np.clip((STATIONS - 0.5) / 0.2, 0, 1) * (0.02 - lowest) / 0.35
    points, tangent = curve(pitch)
    left = np.stack([np.cos(yaw), np.sin(yaw), np.zeros_like(yaw)], axis=1)
    up = np.cross(tangent, left)
    low = (points[:, 2] - sizes[:, 2] * np.abs(up[:, 2])).min()
    return points + [0, 0, max(0.004 - low, 0.0)], tangent, left, up


def _two_bones(root: np.ndarray, target: np.ndarray, upper: float, lower: float, pole: np.ndarray):
    """Joint and end of a two-bone chain whose joint bends towards `pole`; a target out of reach is approached."""
    reach = target - root
    distance = float(np.clip(np.linalg.norm(reach), abs(upper - lower) + 0.01, 0.985 * (upper + lower)))
    axis = reach / np.linalg.norm(reach)
    along = (upper**2 - lower**2 + distance**2) / (2 * distance)
    bend = math.sqrt(max(upper**2 - along**2, 0.0))
    pole = pole - pole @ axis * axis
    pole = pole / np.linalg.norm(pole)
    return root + along * axis + bend * pole, root + distance * axis


def _limbs(trunk: Skeleton, shape: MouseShape, pose: MousePose) -> tuple[np.ndarray, np.ndarray]:
    limbs, feet = np.zeros((4, 3, 3)), np.zeros((4, 3))
    snout = trunk.frame(0.965)
    for k, side in enumerate(SIDES):
        hind = k < 2
        place, tangent, left, up = trunk.frame(HIP if hind else SHOULDER)
        width = trunk.size_at(HIP if hind else SHOULDER)[0]
        root = place + side * width * (0.56 if hind else 0.60) * left - (0.03 if hind else 0.05) * up
        forward = np.array([left[1], -left[0], 0.0])  # horizontal heading at this girdle
        floor = place * [1, 1, 0] + (pose.foot_forward[k] + (0.02 if hind else 0.05)) * forward
        floor = floor + side * pose.foot_out[k] * left
        toe_out = math.radians(18 if hind else 8)
        foot = math.cos(toe_out) * forward + side * math.sin(toe_out) * left
        length = shape.hind_foot if hind else shape.fore_foot
        lift = pose.foot_lift[k]
        heel = (0.035 if hind else 0.030) + 1.3 * lift
        ball = floor + [0, 0, 0.012 + lift]  # where the toes begin
        ankle = ball - 0.60 * length * foot + [0, 0, heel]
        if hind:
            pole = forward + 0.45 * side * left + 0.25 * up
            limbs[k] = [root, *_two_bones(root, ankle, shape.upper_hind, shape.lower_hind, pole)]
        else:
            free = pose.hand_free[k - 2]
            hand = pose.hand_at[k - 2]
            held = root + hand[0] * tangent + side * hand[1] * left + hand[2] * up
            at_snout = snout[0] - 0.035 * snout[1] + side * 0.040 * snout[2] - 0.045 * snout[3]
            held = held + pose.hand_snout * (at_snout - held)
            hanging = tangent + pose.hand_snout * (-0.3 * side * left) - 0.6 * (1 - pose.hand_snout) * up
            hanging = hanging / np.linalg.norm(hanging)
            wrist = ankle + free * (held - 0.5 * length * hanging - ankle)
            foot = foot + free * (hanging - foot)
            pole = -tangent + 0.25 * side * left - 0.2 * up
            limbs[k] = [root, *_two_bones(root, wrist, shape.upper_fore, shape.lower_fore, pole)]
            ball = ball + free * (limbs[k, 2] + 0.6 * length * hanging - ball)
        direction = ball - limbs[k, 2]
        feet[k] = direction / max(np.linalg.norm(direction), 1e-6)
    return limbs, feet


def _tail(trunk: Skeleton, shape: MouseShape, pose: MousePose) -> tuple[np.ndarray, np.ndarray]:
    """The tail sinks from its base to the floor and bends as the pose says, more if it would leave the picture."""
    place, tangent, _, up = trunk.frame(0.012)
    t = np.linspace(0, 1, TAIL_NODES)
    radius = shape.tail_radius * (1 - 0.74 * t**0.8)
    start_yaw = math.atan2(-tangent[0], tangent[1])  # of the direction -tangent, as for the spine
    step = shape.tail_length / (TAIL_NODES - 1)
    slopes, height = np.zeros(TAIL_NODES), np.full(TAIL_NODES, place[2])
    for i in range(1, TAIL_NODES):
        resting = radius[i] + pose.tail_raise[1] * min(1.0, 4 * t[i]) * (1 - 0.5 * t[i])
        wanted = min(max((resting - height[i - 1]) / 0.10, -0.9), 0.9)
        blend = min(1.0, t[i] / 0.18)
        slopes[i] = (1 - blend) * math.radians(pose.tail_raise[0]) + blend * wanted
        height[i] = max(height[i - 1] + step * math.sin(slopes[i]), radius[i])
    bend = np.interp(t, [0.0, 0.33, 0.67, 1.0], pose.tail_bend)

    drop = (height - trunk.centre[2]) * shape.length
    limit = np.minimum(TAIL_REACH, TAIL_REACH_LOW[0] + TAIL_REACH_LOW[1] * drop)

    def curve(extra: float) -> tuple[np.ndarray, float]:
        yaw = start_yaw + np.radians(np.cumsum(bend + pose.tail_side * extra * (t > 0.12)) / (TAIL_NODES - 1))
        flat = step * np.cos(slopes) * (t > 0)
        xy = place[:2] + np.cumsum(flat[:, None] * np.stack([np.sin(yaw), -np.cos(yaw)], axis=1), axis=0)
        reach = (np.linalg.norm(xy - trunk.centre[:2], axis=1) * shape.length / limit).max()
        return np.concatenate([xy, height[:, None]], axis=1), reach

    low, high = 0.0, 0.0
    while curve(high)[1] > 1.0 and high < 720.0:
        low, high = high, high + 45.0
    for _ in range(6 if high > 0 else 0):  # continuous in the pose, so that a moving tail does not jump
        middle = 0.5 * (low + high)
        low, high = (middle, high) if curve(middle)[1] > 1.0 else (low, middle)
    return curve(high)[0], radius


def build_skin(skeleton: Skeleton, shape: MouseShape) -> Skin:
    """The furred surface: spine tube, thighs, shoulders, cheeks, limbs."""
    s = skeleton
    spine = np.concatenate([s.spine, s.tangent, s.left, s.up, s.sizes], axis=1)
    ellipsoids, cones = [], []
    for k in range(4):
        root, joint, end = s.limbs[k]
        hind = k < 2
        axis = joint - root
        length = np.linalg.norm(axis)
        axis = axis / length
        across = s.frame(HIP if hind else SHOULDER)[2]
        across = across - across @ axis * axis
        across = across / np.linalg.norm(across)
        radii = [0.52 * length + 0.020, 0.044, 0.072] if hind else [0.52 * length + 0.010, 0.032, 0.046]
        radii = np.array(radii) * [1.0, shape.limb, shape.limb]
        ellipsoids.append(np.concatenate([root + 0.36 * axis * length, axis, across, np.cross(axis, across), radii]))
        thick = np.array([0.044, 0.029, 0.0150] if hind else [0.034, 0.022, 0.0135]) * shape.limb
        cones.append(np.concatenate([root, joint, thick[:2]]))
        cones.append(np.concatenate([joint, end, thick[1:]]))
    for side in (1.0, -1.0):
        place, tangent, left, up = s.frame(0.815)
        size = s.size_at(0.815)
        centre = place + side * 0.62 * size[0] * left - 0.15 * size[2] * up
        ellipsoids.append(np.concatenate([centre, tangent, left, up, [0.062, 0.036, 0.046]]))
    return Skin(spine, np.array(ellipsoids), np.array(cones), blend=0.020)
