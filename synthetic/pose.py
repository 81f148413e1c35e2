"""Postures: a handful of numbers per pose (so that poses interpolate), drawn at random by kind of behaviour."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np

CONTROL_STATIONS = np.array([0.0, 0.22, 0.45, 0.62, 0.74, 0.86, 1.0])  # where spine_pitch and spine_yaw are given
POSES = ("walk", "stand", "crouch", "turn", "rear", "groom", "sniff")
_WEIGHTS = (0.28, 0.16, 0.13, 0.16, 0.10, 0.09, 0.08)


@dataclass(frozen=True)
class MousePose:
    """Lengths in body lengths, angles in degrees. Limb order: hind left, hind right, fore left, fore right.

    spine_pitch, spine_yaw: [7] direction of the spine (towards the nose) at CONTROL_STATIONS; pitch up, yaw to the
    animal's left. hip_height, shoulder_height: of the spine above the floor; the spine is pitched as a whole so that
    the shoulder has its height (weight `level` 0..1; 0 leaves the pitch alone, for rearing).
    foot_forward, foot_out: [4] paw on the floor, from below its joint. foot_lift: [4] height of the paw.
    hand_free: [2] 0..1, fore paws taken off the floor towards hand_at; hand_at: [2, 3] in the shoulder's frame
    (forward, outward, up); hand_snout: 0..1 takes free fore paws to the snout instead.
    tail_bend: [4] curvature of the tail to the left at its quarters, degrees per tail length. tail_side: 1 or -1, where
    a tail too long for the picture curls. tail_raise: [2] pitch at its base and height kept above the floor.
    ear_turn: [2] ears rotated backwards.
    """

    kind: str
    spine_pitch: np.ndarray
    spine_yaw: np.ndarray
    hip_height: float
    shoulder_height: float
    level: float
    foot_forward: np.ndarray
    foot_out: np.ndarray
    foot_lift: np.ndarray
    hand_free: np.ndarray
    hand_at: np.ndarray
    hand_snout: float
    tail_bend: np.ndarray
    tail_side: float
    tail_raise: np.ndarray
    ear_turn: np.ndarray

    def towards(self, other: MousePose, t: float) -> MousePose:
        """The pose a share t (0..1) of the way to `other`."""
        mixed = {}
        for item in fields(self):
            a, b = getattr(self, item.name), getattr(other, item.name)
            mixed[item.name] = (a if t < 0.5 else b) if item.name == "kind" else (1 - t) * a + t * b
        return MousePose(**mixed)


# kind: spine pitch at the control stations, hip height, shoulder height, level
_BASES = {
    "rest": ([54, 32, -8, -26, -6, 0, -12], 0.265, 0.262, 1.0),
    "walk": ([54, 32, -12, -28, -6, -4, -16], 0.265, 0.262, 1.0),
    "stand": ([62, 36, -14, -30, -2, 0, -14], 0.248, 0.250, 1.0),
    "crouch": ([70, 42, -18, -42, -18, -16, -26], 0.185, 0.185, 1.0),
    "turn": ([58, 34, -12, -26, -4, -4, -16], 0.250, 0.250, 1.0),
    "rear": ([50, 66, 70, 56, 34, 16, 4], 0.165, 0.30, 0.0),
    "groom": ([52, 60, 38, -8, -40, -54, -62], 0.150, 0.30, 0.0),
    "sniff": ([42, 26, -6, -16, 12, 10, 0], 0.252, 0.255, 1.0),
}


def rest_pose() -> MousePose:
    """The symmetric standing mouse."""
    pitch, hip, shoulder, level = _BASES["rest"]
    return MousePose(
        kind="rest",
        spine_pitch=np.array(pitch, dtype=float),
        spine_yaw=np.zeros(7),
        hip_height=hip,
        shoulder_height=shoulder,
        level=level,
        foot_forward=np.array([0.06, 0.06, 0.03, 0.03]),
        foot_out=np.array([0.125, 0.125, 0.075, 0.075]),
        foot_lift=np.zeros(4),
        hand_free=np.zeros(2),
        hand_at=np.array([[0.10, 0.05, -0.10], [0.10, 0.05, -0.10]]),
        hand_snout=0.0,
        tail_bend=np.zeros(4),
        tail_side=1.0,
        tail_raise=np.array([-14.0, 0.0]),
        ear_turn=np.zeros(2),
    )


def random_pose(rng: np.random.Generator, kind: str | None = None) -> MousePose:
    """A pose of the given kind (one of POSES), or of a kind drawn at random."""
    if kind is None:
        kind = POSES[rng.choice(len(POSES), p=np.array(_WEIGHTS) / sum(_WEIGHTS))]
    if kind not in POSES:
        raise ValueError(f"pose kind must be one of {', '.join(POSES)}, got {kind!r}")
    pitch, hip, shoulder, level = _BASES[kind]
    pitch = np.array(pitch, dtype=float) * rng.uniform(0.85, 1.15) + rng.normal(0, [3, 4, 4, 5, 7, 7, 7])
    bend = {"turn": rng.uniform(35, 95) * rng.choice([-1, 1]), "sniff": rng.normal(0, 26)}.get(kind, rng.normal(0, 14))
    # yaw grows from loin to neck; the head adds its own
    yaw = bend * np.array([-0.30, -0.15, 0.25, 0.60, 0.85, 1.0, 1.05]) + rng.normal(0, 7) * np.array(
        [0, 0, 0, 0.2, 0.7, 1, 1]
    )
    tail_bend = random_tail_bend(rng)
    pose = replace(
        rest_pose(),
        kind=kind,
        spine_pitch=pitch,
        spine_yaw=yaw,
        hip_height=hip * rng.uniform(0.93, 1.07),
        shoulder_height=shoulder * rng.uniform(0.92, 1.08),
        level=level,
        foot_forward=np.array([0.05, 0.05, 0.03, 0.03]) + rng.normal(0, 0.022, 4),
        foot_out=np.array([0.125, 0.125, 0.075, 0.075]) * rng.uniform(0.85, 1.2, 4),
        tail_bend=tail_bend,
        tail_side=1.0 if tail_bend.mean() >= 0 else -1.0,
        tail_raise=np.array([rng.uniform(-30, 4), max(0.0, rng.normal(0, 0.05))]),
        ear_turn=rng.uniform(-18, 28) + rng.normal(0, 5, 2),
    )
    if kind == "walk":
        return _stride(pose, rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.10))
    if kind == "rear":
        reach = np.array([[rng.uniform(0.04, 0.14), 0.05, rng.uniform(-0.13, 0.0)] for _ in range(2)])
        return replace(pose, hand_free=np.ones(2), hand_at=reach, foot_forward=pose.foot_forward + 0.05)
    if kind == "groom":
        forward = pose.foot_forward + 0.06
        return replace(pose, hand_free=np.ones(2), hand_snout=rng.uniform(0.7, 1.0), foot_forward=forward)
    if kind in ("stand", "sniff") and rng.random() < 0.2:
        return replace(pose, hand_free=np.array([1.0, 0.0]) if rng.random() < 0.5 else np.array([0.0, 1.0]))
    return pose


def random_tail_bend(rng: np.random.Generator) -> np.ndarray:
    """[4] degrees per tail length: mostly one gentle arc, sometimes an S."""
    arc, wave = rng.normal(0, 70), rng.normal(0, 70)
    return arc + wave * np.array([-0.6, -0.2, 0.4, 1.0]) + rng.normal(0, 30, 4)


def _stride(pose: MousePose, phase: float, amplitude: float) -> MousePose:
    """A walking step: diagonal limbs together; a paw that swings forward is lifted."""
    phases = phase + np.array([0.0, math.pi, math.pi + 0.35, 0.35])
    lift = np.array([0.05, 0.05, 0.045, 0.045]) * np.clip(np.cos(phases), 0.0, 1.0)
    sway = 5.0 * math.sin(phase) * np.array([1, 0.6, -0.3, -0.6, -0.5, -0.3, -0.3])
    return replace(
        pose,
        foot_forward=pose.foot_forward + amplitude * np.sin(phases) * np.array([1, 1, 0.9, 0.9]),
        foot_lift=lift,
        spine_yaw=pose.spine_yaw + sway,
    )


def stride(pose: MousePose, phase: float, amplitude: float) -> MousePose:
    """`pose` with the limbs moved to `phase` (radians) of a walking cycle of the given amplitude (body lengths)."""
    return _stride(pose, phase, amplitude)
