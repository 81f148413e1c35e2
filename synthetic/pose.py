"""Postures: a handful of numbers per pose (so that poses interpolate), drawn at random by kind of behavior."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from synthetic.settings import POSES

CONTROL_STATIONS = np.array([0.0, 0.22, 0.45, 0.62, 0.74, 0.86, 1.0])  # where spine_pitch and spine_yaw are given
# kind: spine pitch at the control stations, hip height, shoulder height, level
_BASES = {
    "walk": ([54, 32, -12, -28, -6, -4, -16], 0.285, 0.262, 1.0),
    "stand": ([62, 36, -14, -30, -2, 0, -14], 0.270, 0.252, 1.0),
    "crouch": ([70, 42, -18, -42, -18, -16, -26], 0.185, 0.185, 1.0),
    "turn": ([58, 34, -12, -26, -4, -4, -16], 0.268, 0.252, 1.0),
    "rear": ([58, 76, 82, 76, 58, 34, 12], 0.200, 0.30, 0.0),
    "groom": ([52, 60, 38, -8, -40, -54, -62], 0.150, 0.30, 0.0),
    "sniff": ([42, 26, -6, -16, 12, 10, 0], 0.268, 0.255, 1.0),
    "curl": ([74, 46, -18, -44, -22, -20, -28], 0.180, 0.175, 1.0),
    "stretch": ([16, 10, -2, -8, 0, 2, -4], 0.200, 0.195, 1.0),
}


def _rest(*values: float) -> np.ndarray:
    return field(default_factory=lambda: np.array(values, dtype=float))


@dataclass(frozen=True)
class MousePose:
    """Lengths in body lengths, angles in degrees. Limb order: hind left, hind right, fore left, fore right.

    The default values are the symmetric standing mouse, `rest`. hand_at: [2, 3] in the shoulder's frame (forward,
    outward, up). The spine is pitched as a whole so that the shoulder has its height.
    """

    kind: str = "rest"
    spine_pitch: np.ndarray = _rest(54, 32, -8, -26, -6, 0, -12)  # up, towards the nose, at CONTROL_STATIONS
    spine_yaw: np.ndarray = _rest(0, 0, 0, 0, 0, 0, 0)  # to the animal's left, there
    hip_height: float = 0.265  # of the spine above the floor
    shoulder_height: float = 0.262
    level: float = 1.0  # weight 0..1 of the shoulder's height; 0 leaves the pitch alone, for rearing
    foot_forward: np.ndarray = _rest(0.06, 0.06, 0.03, 0.03)  # paw on the floor, from below its joint
    foot_out: np.ndarray = _rest(0.125, 0.125, 0.075, 0.075)
    foot_lift: np.ndarray = _rest(0, 0, 0, 0)
    hand_free: np.ndarray = _rest(0, 0)  # 0..1, fore paws taken off the floor towards hand_at
    hand_at: np.ndarray = field(default_factory=lambda: np.array([[0.10, 0.05, -0.10]] * 2))
    hand_snout: float = 0.0  # 0..1 takes free fore paws to the snout instead
    tail_bend: np.ndarray = _rest(0, 0, 0, 0)  # to the left at its quarters, degrees per tail length
    tail_side: float = 1.0  # or -1: where a tail too long for the image curls
    tail_raise: np.ndarray = _rest(-14, 0)  # pitch at its base, height kept above the floor
    ear_turn: np.ndarray = _rest(0, 0)  # backwards

    def stride(self, phase: float, amplitude: float) -> "MousePose":
        """Returns the pose with the limbs at `phase` (radians) of a walking cycle of this amplitude (body lengths)."""
        # Diagonal limbs go together; a paw that swings forward is lifted.
        phases = phase + np.array([0.0, math.pi, math.pi + 0.35, 0.35])
        sway = 5.0 * math.sin(phase) * np.array([1, 0.6, -0.3, -0.6, -0.5, -0.3, -0.3])
        forward = self.foot_forward + amplitude * np.sin(phases) * np.array([1, 1, 0.9, 0.9])
        lift = np.array([0.05, 0.05, 0.045, 0.045]) * np.clip(np.cos(phases), 0.0, 1.0)
        return replace(self, foot_forward=forward, foot_lift=lift, spine_yaw=self.spine_yaw + sway)


def random_pose(rng: np.random.Generator, kind: str | None = None) -> MousePose:
    """Draws a pose of the given kind (of settings.ALL_POSES), or of one of POSES at random."""
    if kind is None:
        shares = (0.28, 0.16, 0.13, 0.16, 0.10, 0.09, 0.08)
        kind = POSES[rng.choice(len(POSES), p=np.array(shares) / sum(shares))]
    pitch, hip, shoulder, level = _BASES[kind]
    pitch = np.array(pitch, dtype=float) * rng.uniform(0.85, 1.15) + rng.normal(0, [3, 4, 4, 5, 7, 7, 7])
    # All of these are drawn, whatever the kind: the numbers after them are the same for every kind.
    turn, sniff, other = rng.uniform(35, 95) * rng.choice([-1, 1]), rng.normal(0, 26), rng.normal(0, 14)
    bend = {"turn": turn, "sniff": sniff, "curl": 1.5 * turn}.get(kind, other)
    # Yaw grows from loin to neck; the head adds its own.
    yaw = bend * np.array([-0.30, -0.15, 0.25, 0.60, 0.85, 1.0, 1.05])
    yaw = yaw + rng.normal(0, 7) * np.array([0, 0, 0, 0.2, 0.7, 1, 1])
    arc, wave = rng.normal(0, 70, 2)  # of the tail: mostly one gentle arc, sometimes an S
    tail_bend = arc + wave * np.array([-0.6, -0.2, 0.4, 1.0]) + rng.normal(0, 30, 4)
    pose = MousePose(
        kind, pitch, yaw, hip * rng.uniform(0.93, 1.07), shoulder * rng.uniform(0.92, 1.08), level,
        foot_forward=np.array([0.05, 0.05, 0.03, 0.03]) + rng.normal(0, 0.022, 4),
        foot_out=np.array([0.125, 0.125, 0.075, 0.075]) * rng.uniform(0.85, 1.2, 4),
        tail_bend=tail_bend, tail_side=1.0 if tail_bend.mean() >= 0 else -1.0,
        tail_raise=np.array([rng.uniform(-30, 4), max(0.0, rng.normal(0, 0.05))]),
        ear_turn=rng.uniform(-18, 28) + rng.normal(0, 5, 2),
    )  # fmt: skip
    if kind == "walk":
        return pose.stride(rng.uniform(0, 2 * math.pi), rng.uniform(0.06, 0.14))
    if kind == "rear":
        reach = np.array([[rng.uniform(0.04, 0.14), 0.05, rng.uniform(-0.13, 0.0)] for _ in range(2)])
        return replace(pose, hand_free=np.ones(2), hand_at=reach, foot_forward=pose.foot_forward + 0.05)
    if kind == "groom":
        pose = replace(pose, hand_free=np.ones(2), hand_snout=rng.uniform(0.7, 1.0))
        return replace(pose, foot_forward=pose.foot_forward + 0.06)
    if kind == "stretch":  # hind feet left behind, fore paws ahead: a mouse that explores
        return replace(pose, foot_forward=pose.foot_forward + [-0.08, -0.08, 0.10, 0.10])
    if kind in ("stand", "sniff") and rng.random() < 0.2:
        return replace(pose, hand_free=np.array([1.0, 0.0]) if rng.random() < 0.5 else np.array([0.0, 1.0]))
    return pose


def pose_track(rng: np.random.Generator, seconds: float, kinds: tuple[str, ...]) -> Callable:
    """Draws smoothly changing postures: returns a function time (s) -> (MousePose, how much of it is walking, 0..1)."""
    keys: list[tuple[float, MousePose]] = []
    end, tail_side = 0.0, float(rng.choice([-1.0, 1.0]))  # one side for all: a tail does not jump to the other
    while not keys or keys[-1][0] <= seconds:
        kind = str(rng.choice(kinds))
        # Walking postures stand still here; the stride is added as the animal moves.
        pose = random_pose(rng, "stand" if kind == "walk" else kind)
        pose = replace(pose, tail_side=tail_side, tail_bend=pose.tail_bend * pose.tail_side * tail_side)
        keys.append((end, replace(pose, kind="walk", hand_free=np.zeros(2)) if kind == "walk" else pose))
        end += rng.uniform(0.5, 1.2)  # seconds between two drawn postures
    keys.append((end, keys[-1][1]))

    def at(time: float) -> tuple[MousePose, float]:
        index = max(k for k in range(len(keys) - 1) if keys[k][0] <= time)
        (t0, a), (t1, b) = keys[index : index + 2]
        t = (time - t0) / (t1 - t0)
        t = t * t * (3 - 2 * t)
        mixed = {name: (1 - t) * value + t * getattr(b, name) for name, value in vars(a).items() if name != "kind"}
        return MousePose(a.kind if t < 0.5 else b.kind, **mixed), (1 - t) * (a.kind == "walk") + t * (b.kind == "walk")

    return at
