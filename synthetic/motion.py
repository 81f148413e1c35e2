"""A moving mouse: postures that follow one another smoothly, a walk that wanders about an arena."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from synthetic.body import random_shape
from synthetic.cloud import SplatCloud
from synthetic.coat import random_coat
from synthetic.pose import POSES, MousePose, random_pose, stride
from synthetic.scene import SPACING, Light, build_cloud, random_light

KEY_SECONDS = (0.5, 1.2)  # between two drawn postures
WALK_SPEED = 0.9  # body lengths per second
STRIDE_HZ = 3.0
MAX_TURN_DEG_S = 110.0


def mouse_sequence(
    seed: int,
    num_frames: int,
    *,
    fps: float = 25.0,
    arena_radius: float = 1.6,
    coat: str | None = None,
    poses: tuple[str, ...] = POSES,
    spacing: float = SPACING,
) -> Iterator[SplatCloud]:
    """Yields num_frames clouds of one animal moving: floor at z = 0, arena centre at the origin, z up.

    Units are the synthetic world's (a nominal body is BODY_LENGTH long): `cloud.transformed(scale=73 / BODY_LENGTH,
    offset=...)` puts a frame into an arena in mm. The body's centre stays within arena_radius (world units) of the
    origin; `cloud.centre` and `cloud.keypoints` follow. meta holds pose, coat, heading_deg and frame.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
    shape, drawn_coat, light = random_shape(rng), random_coat(rng, coat), random_light(rng)
    keys = _key_poses(rng, num_frames / fps, poses)
    layout_seed = int(rng.integers(2**62))
    place = rng.uniform(-0.4, 0.4, 2) * arena_radius
    heading, phase, turn = float(rng.uniform(0, 360)), 0.0, 0.0
    for frame in range(num_frames):
        pose, walking = _pose_at(keys, frame / fps)
        step = shape.length * WALK_SPEED * walking / fps
        turn = 0.93 * turn + rng.normal(0, 14.0)
        rate = walking * (turn + _steer(place, heading, arena_radius))
        heading += float(np.clip(rate, -MAX_TURN_DEG_S, MAX_TURN_DEG_S)) / fps
        a = math.radians(heading)
        place = place + step * np.array([-math.sin(a), -math.cos(a)])
        reach = np.linalg.norm(place)
        place = place * min(1.0, arena_radius / max(reach, 1e-9))
        phase += 2 * math.pi * STRIDE_HZ * walking / fps
        pose = stride(pose, phase, 0.075 * walking) if walking > 0 else pose
        # The same layout and fur noise every frame: the coat stays on the animal.
        fixed = np.random.default_rng(np.random.SeedSequence(layout_seed))
        cloud = build_cloud(shape, pose, drawn_coat, _turned(light, heading), fixed, spacing)
        cloud = cloud.transformed(rotate_z_deg=-heading)
        cloud = cloud.transformed(offset=np.array([*(place - cloud.centre[:2]), 0.0]))
        cloud.meta.update(heading_deg=heading % 360.0, frame=frame)
        yield cloud


def _key_poses(rng: np.random.Generator, seconds: float, poses: tuple[str, ...]) -> list[tuple[float, MousePose]]:
    """(time, posture) pairs covering the sequence. Walking postures stand still here; the stride is added later."""
    keys, time = [], 0.0
    tail_side = float(rng.choice([-1.0, 1.0]))  # one for all: a tail does not jump to the other side
    while not keys or keys[-1][0] <= seconds:
        kind = str(rng.choice(poses))
        pose = random_pose(rng, "stand" if kind == "walk" else kind)
        pose = replace(pose, tail_side=tail_side, tail_bend=pose.tail_bend * pose.tail_side * tail_side)
        if kind == "walk":
            pose = replace(pose, kind="walk", hand_free=np.zeros(2))
        keys.append((time, pose))
        time += rng.uniform(*KEY_SECONDS)
    keys.append((time, keys[-1][1]))
    return keys


def _pose_at(keys: list[tuple[float, MousePose]], time: float) -> tuple[MousePose, float]:
    """The posture at a time, and how much of it is walking, 0..1."""
    index = max(k for k in range(len(keys) - 1) if keys[k][0] <= time)
    (t0, a), (t1, b) = keys[index], keys[index + 1]
    t = (time - t0) / (t1 - t0)
    t = t * t * (3 - 2 * t)
    return a.towards(b, t), (1 - t) * (a.kind == "walk") + t * (b.kind == "walk")


def _turned(light: Light, heading_deg: float) -> Light:
    """The room's light in the frame of an animal with this heading."""
    a = math.radians(heading_deg)
    x, y, z = light.direction
    direction = [math.cos(a) * x - math.sin(a) * y, math.sin(a) * x + math.cos(a) * y, z]
    return replace(light, direction=np.array(direction))


def _steer(place: np.ndarray, heading_deg: float, arena_radius: float) -> float:
    """Degrees per second that turn an animal near the wall back towards the centre."""
    urge = np.clip((np.linalg.norm(place) / arena_radius - 0.6) / 0.3, 0.0, 1.0)
    wanted = math.degrees(math.atan2(place[0], place[1]))  # azimuth of the direction to the centre
    return float(urge * 2.0 * ((wanted - heading_deg + 180.0) % 360.0 - 180.0))
