"""From proportions and a pose to geometry: spine, limbs, tail. Body lengths, heading -y, floor at z = 0."""

import math
from types import SimpleNamespace

import numpy as np

from synthetic.implicit import Skin
from synthetic.pose import CONTROL_STATIONS, MousePose

# The normalization rule for synthetic and real animals alike: the origin is the body's center (tail not counted),
# z is up, and one scale per class of animals makes the nominal body (stretched, nose to tail base) this long, which
# fills about half of an image taken from distance 2.7 with a 50-degree lens.
BODY_LENGTH = 1.2
STATIONS = np.linspace(0.0, 1.0, 56)  # along the spine: 0 tail base .. 1 tip of the nose
HIP, SHOULDER = 0.13, 0.60  # stations of the limb girdles
EAR, EYE = 0.752, 0.853
# The tail's farthest horizontal distance from the body's center, world units, so that the rigs' images (distance 2.7,
# 50 degrees, elevation up to 20) hold it; less where it lies far below the center, under an animal that rears.
TAIL_REACH, TAIL_REACH_LOW = 1.10, (1.50, 1.0)
TAIL_NODES = 48
SIDES = np.array([1.0, -1.0, 1.0, -1.0])  # left, right of the four limbs

# Station, half width, half height above and below the spine: an egg with a tapering snout.
_PROFILE = np.fromstring(
    """
    0.000 0.022 0.022 0.022   0.012 0.062 0.062 0.056   0.040 0.104 0.106 0.090   0.085 0.144 0.146 0.122
    0.150 0.172 0.180 0.134   0.230 0.188 0.192 0.148   0.320 0.188 0.190 0.152   0.410 0.172 0.178 0.146
    0.500 0.146 0.158 0.130   0.580 0.124 0.136 0.112   0.650 0.107 0.116 0.098   0.710 0.102 0.104 0.092
    0.765 0.106 0.098 0.090   0.815 0.099 0.088 0.082   0.860 0.084 0.074 0.070   0.905 0.064 0.059 0.057
    0.945 0.049 0.047 0.044   0.975 0.038 0.038 0.033   0.992 0.025 0.026 0.021   1.000 0.010 0.011 0.009
    """,
    sep=" ",
).reshape(-1, 4)
# Uniform ranges of adult animals, in the order in which they are drawn (which older seeds rely on). head, snout, limb:
# thickness. ear_azimuth_deg: how far the ear's opening turns outwards from straight ahead.
_RANGES = {
    "head": (0.95, 1.08), "snout": (0.88, 1.12), "ear_width": (0.80, 0.95), "ear_azimuth_deg": (35.0, 62.0),
    "tail_length": (0.72, 1.0), "tail_radius": (0.024, 0.030), "eye_radius": (0.0175, 0.0215), "limb": (0.92, 1.12),
    "hind_foot": (0.17, 0.205), "fore_foot": (0.075, 0.095),
}  # fmt: skip


class MouseShape(SimpleNamespace):
    """length (world units); fatness, limb_length, ear_height and _RANGES, relative to it or to a typical mouse."""


def random_length(rng: np.random.Generator) -> float:
    """Draws an adult's body length, 1.13 to 1.32 world units."""
    return BODY_LENGTH * float(np.clip(rng.normal(1.03, 0.035), 0.94, 1.10))


def random_shape(rng: np.random.Generator) -> MouseShape:
    """Draws an adult mouse, lean to fat."""
    shape = MouseShape(ear_height=float(rng.uniform(0.128, 0.172)), limb_length=float(rng.uniform(0.94, 1.06)))
    shape.length, shape.fatness = random_length(rng), float(np.clip(rng.normal(1.0, 0.08), 0.84, 1.22))
    vars(shape).update({name: float(rng.uniform(*limits)) for name, limits in _RANGES.items()})
    shape.ear_width *= shape.ear_height
    return shape


class Skeleton(SimpleNamespace):
    """spine, tangent, left, up: [stations, 3]; sizes: [stations, 3] half width, up, down.

    limbs: [4, 3, 3] socket, knee or elbow, ankle or wrist. feet: [4, 3] unit directions of the feet.
    tail: [TAIL_NODES, 3]; tail_radius: [TAIL_NODES]. center: [3] volume centroid of the trunk and head.
    """

    def frame(self, station: float) -> tuple[np.ndarray, ...]:
        """Returns position, tangent (towards the nose), left, up and half sizes of the spine at a station, [3] each."""
        values = (self.spine, self.tangent, self.left, self.up, self.sizes)
        place, *axes, sizes = (interpolate(rows, np.array([station]))[0] for rows in values)
        return place, *map(unit, axes), sizes


def interpolate(values: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Interpolates rows [k, c] linearly at t [n] 0..1."""
    place = np.clip(t, 0, 1) * (len(values) - 1)
    index = np.minimum(place.astype(int), len(values) - 2)
    return values[index] + (place - index)[:, None] * (values[index + 1] - values[index])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors [3] or [n, 3] at length 1."""
    return vectors / np.linalg.norm(vectors, axis=None if vectors.ndim == 1 else 1, keepdims=True)


def perpendicular(vector: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Returns the unit vector [3] nearest to `vector` that is perpendicular to the unit vector `axis`."""
    return unit(vector - vector @ axis * axis)


def solve(shape: MouseShape, pose: MousePose) -> Skeleton:
    """Places the whole skeleton: spine over its feet, limbs by two-bone inverse kinematics, tail on the floor."""
    profile = np.stack([np.interp(STATIONS, _PROFILE[:, 0], _PROFILE[:, k]) for k in (1, 2, 3)], axis=1)
    trunk, head = np.exp(-(((STATIONS - 0.30) / 0.22) ** 2)), np.exp(-(((STATIONS - 0.77) / 0.09) ** 2))
    snout = np.clip((STATIONS - 0.86) / 0.08, 0.0, 1.0)
    widen = 1 + (shape.fatness - 1) * trunk + (shape.head - 1) * head + (shape.snout - 1) * snout
    sizes = profile * widen[:, None]
    sizes[:, 2] *= 1 + 0.35 * max(shape.fatness - 1, 0.0) * trunk  # a fat belly hangs
    kernel = np.hanning(13)[1:-1]  # the control values are joined without corners
    pitch, yaw = (
        np.radians(np.convolve(np.pad(values, 5, mode="edge"), kernel / kernel.sum(), mode="valid"))
        for values in (np.interp(STATIONS, CONTROL_STATIONS, given) for given in (pose.spine_pitch, pose.spine_yaw))
    )
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
        pitch = pitch + pose.level * math.atan2(pose.shoulder_height - points[shoulder, 2], run)
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
    spine = points + [0, 0, max(0.004 - low, 0.0)]
    weight = sizes[:, 0] * (sizes[:, 1] + sizes[:, 2])
    # Every slice is two half ellipses whose middle lies off the spine.
    middle = spine + 0.5 * (sizes[:, 1] - sizes[:, 2])[:, None] * up
    s = Skeleton(spine=spine, tangent=tangent, left=left, up=up, sizes=sizes)
    s.center = (weight[:, None] * middle).sum(0) / weight.sum()
    s.limbs, s.feet = _limbs(s, shape, pose)
    s.tail, s.tail_radius = _tail(s, shape, pose)
    return s


def _limbs(s: Skeleton, shape: MouseShape, pose: MousePose) -> tuple[np.ndarray, np.ndarray]:
    """Returns `limbs` [4, 3, 3] and `feet` [4, 3] of the skeleton."""
    limbs, feet = np.zeros((4, 3, 3)), np.zeros((4, 3))
    snout = s.frame(0.965)
    for k, side in enumerate(SIDES):
        hind = k < 2
        place, tangent, left, up, (width, _, _) = s.frame(HIP if hind else SHOULDER)
        root = place + side * width * (0.56 if hind else 0.60) * left - (0.03 if hind else 0.05) * up
        forward = np.array([left[1], -left[0], 0.0])  # horizontal heading at this girdle
        floor = place * [1, 1, 0] + (pose.foot_forward[k] + (0.02 if hind else 0.05)) * forward
        floor = floor + side * pose.foot_out[k] * left
        toe_out = math.radians(18 if hind else 8)
        foot = math.cos(toe_out) * forward + side * math.sin(toe_out) * left
        length = shape.hind_foot if hind else shape.fore_foot
        ball = floor + [0, 0, 0.012 + pose.foot_lift[k]]  # where the toes begin
        end = ball - 0.60 * length * foot + [0, 0, (0.035 if hind else 0.030) + 1.3 * pose.foot_lift[k]]
        pole = forward + 0.45 * side * left + 0.25 * up if hind else -tangent + 0.25 * side * left - 0.2 * up
        if not hind:
            free, hand = pose.hand_free[k - 2], pose.hand_at[k - 2]
            held = root + hand[0] * tangent + side * hand[1] * left + hand[2] * up
            at_snout = snout[0] - 0.035 * snout[1] + side * 0.040 * snout[2] - 0.045 * snout[3]
            held = held + pose.hand_snout * (at_snout - held)
            hanging = unit(tangent + pose.hand_snout * (-0.3 * side * left) - 0.6 * (1 - pose.hand_snout) * up)
            end = end + free * (held - 0.5 * length * hanging - end)
        # Two bones that bend towards the pole; a target out of reach is approached.
        upper, lower = np.array([0.180, 0.200] if hind else [0.132, 0.140]) * shape.limb_length
        distance = float(np.clip(np.linalg.norm(end - root), abs(upper - lower) + 0.01, 0.985 * (upper + lower)))
        axis, along = unit(end - root), (upper**2 - lower**2 + distance**2) / (2 * distance)
        joint = root + along * axis + math.sqrt(max(upper**2 - along**2, 0.0)) * perpendicular(pole, axis)
        limbs[k] = [root, joint, root + distance * axis]
        if not hind:
            ball = ball + free * (limbs[k, 2] + 0.6 * length * hanging - ball)
        direction = ball - limbs[k, 2]
        feet[k] = direction / max(np.linalg.norm(direction), 1e-6)
    return limbs, feet


def _tail(s: Skeleton, shape: MouseShape, pose: MousePose) -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes [n, 3] and radii [n]: sinking from the base to the floor, bent more if it would leave the image."""
    (place, tangent, *_), t = s.frame(0.012), np.linspace(0, 1, TAIL_NODES)
    radius = shape.tail_radius * (1 - 0.74 * t**0.8)
    start_yaw = math.atan2(-tangent[0], tangent[1])  # of the direction -tangent, as for the spine
    step = shape.tail_length / (TAIL_NODES - 1)
    slopes, height = np.zeros(TAIL_NODES), np.full(TAIL_NODES, place[2])
    for i in range(1, TAIL_NODES):
        resting = radius[i] + pose.tail_raise[1] * min(1.0, 4 * t[i]) * (1 - 0.9 * t[i])
        wanted = min(max((resting - height[i - 1]) / 0.10, -0.9), 0.9)
        blend = min(1.0, t[i] / 0.18)
        slopes[i] = (1 - blend) * math.radians(pose.tail_raise[0]) + blend * wanted
        height[i] = max(height[i - 1] + step * math.sin(slopes[i]), radius[i])
    bend = np.interp(t, [0.0, 0.33, 0.67, 1.0], pose.tail_bend)
    drop = (height - s.center[2]) * shape.length
    limit = np.minimum(TAIL_REACH, TAIL_REACH_LOW[0] + TAIL_REACH_LOW[1] * drop)

    def curve(extra: float) -> tuple[np.ndarray, float]:
        yaw = start_yaw + np.radians(np.cumsum(bend + pose.tail_side * extra * (t > 0.12)) / (TAIL_NODES - 1))
        flat = step * np.cos(slopes) * (t > 0)
        xy = place[:2] + np.cumsum(flat[:, None] * np.stack([np.sin(yaw), -np.cos(yaw)], axis=1), axis=0)
        reach = (np.linalg.norm(xy - s.center[:2], axis=1) * shape.length / limit).max()
        return np.concatenate([xy, height[:, None]], axis=1), reach

    low, high = 0.0, 0.0
    while curve(high)[1] > 1.0 and high < 720.0:
        low, high = high, high + 45.0
    for _ in range(6 if high > 0 else 0):  # continuous in the pose, so that a moving tail does not jump
        middle = 0.5 * (low + high)
        low, high = (middle, high) if curve(middle)[1] > 1.0 else (low, middle)
    return curve(high)[0], radius


def build_skin(s: Skeleton, shape: MouseShape) -> Skin:
    """Returns the furred surface: spine tube, thighs, shoulders, cheeks, limbs."""
    ellipsoids, cones = [], []
    for k, (root, joint, end) in enumerate(s.limbs):
        axis, length = unit(joint - root), np.linalg.norm(joint - root)
        station, radii, thick = (
            (HIP, [0.52 * length + 0.020, 0.044, 0.072], [0.044, 0.029, 0.0150]) if k < 2
            else (SHOULDER, [0.52 * length + 0.010, 0.032, 0.046], [0.034, 0.022, 0.0135])
        )  # fmt: skip
        across, thick = perpendicular(s.frame(station)[2], axis), np.array(thick) * shape.limb
        radii = np.array(radii) * [1.0, shape.limb, shape.limb]
        ellipsoids.append(np.concatenate([root + 0.36 * axis * length, axis, across, np.cross(axis, across), radii]))
        cones += [np.concatenate([root, joint, thick[:2]]), np.concatenate([joint, end, thick[1:]])]
    place, tangent, left, up, (width, _, below) = s.frame(0.815)
    for side in (1.0, -1.0):
        center = place + side * 0.62 * width * left - 0.15 * below * up
        ellipsoids.append(np.concatenate([center, tangent, left, up, [0.062, 0.036, 0.046]]))
    spine = np.concatenate([s.spine, s.tangent, s.left, s.up, s.sizes], axis=1)
    return Skin(spine, np.array(ellipsoids), np.array(cones))
