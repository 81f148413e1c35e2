"""A whole mouse: shape + pose + coat + light -> SplatCloud; mice by number, and mice that move."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.spatial.transform import Rotation

from synthetic import surface as parts
from synthetic.coat import Coat, coat_albedo, random_coat
from synthetic.pose import MousePose, pose_track, random_pose
from synthetic.settings import POSES
from synthetic.skeleton import EAR, MouseShape, build_skin, random_shape, solve, unit

KEYPOINT_NAMES = (  # DANNCE's 22, in its order
    "EarL EarR Snout SpineF SpineM TailBase TailMid TailEnd ForepawL WristL ElbowL ShoulderL "
    "ForepawR WristR ElbowR ShoulderR HindpawL AnkleL KneeL HindpawR AnkleR KneeR"
).split()


@dataclass(frozen=True)
class SplatCloud:
    """Flat Gaussian splats on an animal's surface, shading baked in. World z up, float32 arrays."""

    means: np.ndarray  # [n, 3]
    log_scales: np.ndarray  # [n, 3] natural log of the standard deviations, world units
    quats: np.ndarray  # [n, 4] wxyz, unit
    opacity: np.ndarray  # [n] 0..1
    rgb: np.ndarray  # [n, 3] 0..1, sRGB, shaded
    center: np.ndarray  # [3] of the body, tail not counted
    keypoints: np.ndarray  # [22, 3] in the order of KEYPOINT_NAMES
    body_length: float  # nose to tail base along the stretched spine, world units
    floor: float = 0.0  # its z
    meta: dict = field(default_factory=dict)  # pose, coat and other draws, JSON-able

    def transformed(
        self, *, scale: float = 1.0, rotate_z_deg: float = 0.0, tilt_deg: float = 0.0, offset=(0.0, 0.0, 0.0)
    ) -> "SplatCloud":
        """Maps x to scale * Rx(tilt_deg) Rz(rotate_z_deg) x + offset [3]: counter-clockwise seen from above, then with
        its top towards -y."""
        turn = Rotation.from_euler("zx", [rotate_z_deg, tilt_deg], degrees=True)
        rotation = turn.as_matrix()
        offset, points = np.asarray(offset, dtype=np.float64), ("means", "center", "keypoints")
        moved = {name: (scale * getattr(self, name) @ rotation.T + offset).astype(np.float32) for name in points}
        turned = turn * Rotation.from_quat(self.quats, scalar_first=True)
        quats = turned.as_quat(scalar_first=True).astype(np.float32)
        log_scales = (self.log_scales + math.log(scale)).astype(np.float32)
        length, floor = self.body_length * scale, float(scale * self.floor + offset[2])
        return replace(self, **moved, log_scales=log_scales, quats=quats, body_length=length, floor=floor)

    def facing(self, heading_deg: float) -> "SplatCloud":
        """Returns the cloud of a mouse that heads -y, centered at the origin and turned to an azimuth."""
        self.meta["heading_deg"] = heading_deg % 360.0
        return self.transformed(offset=-self.center).transformed(rotate_z_deg=-heading_deg)


@dataclass(frozen=True)
class Light:
    """A key lamp, light from above and from the floor, and perhaps a second lamp (fill). Directions: [3] unit."""

    direction: np.ndarray
    key: float
    sky: float
    ground: float
    tint: tuple
    fill: float = 0.0
    fill_direction: np.ndarray | None = None
    belly: float = 0.0  # 0..1, how much darker surfaces are that face down


def _lamp(azimuth: float, elevation_deg: float) -> np.ndarray:
    up = math.radians(elevation_deg)
    return np.array([math.cos(azimuth) * math.cos(up), math.sin(azimuth) * math.cos(up), math.sin(up)])


def random_light(rng: np.random.Generator) -> Light:
    """Draws a plain light: one lamp and soft light from above."""
    direction = _lamp(rng.uniform(0, 2 * math.pi), rng.uniform(35, 80))
    key, sky, ground = rng.uniform(0.55, 0.95), rng.uniform(0.5, 0.72), rng.uniform(0.22, 0.40)
    return Light(direction, key, sky, ground, tuple(np.exp(rng.normal(0, 0.025, 3))))


def laboratory_light(rng: np.random.Generator) -> Light:
    """Wider than `random_light`: soft light from above with weak lamps, or two lamps from two sides, dark bellies."""
    azimuth, soft = rng.uniform(0, 2 * math.pi), rng.random() < 0.4
    total = rng.uniform(1.05, 1.65)  # strength of all light from above together
    sky = total * (rng.uniform(0.6, 0.85) if soft else rng.uniform(0.2, 0.5))
    fill = (total - sky) * (rng.uniform(0.15, 0.5) if rng.random() < 0.6 else 0.0)
    direction, ground = _lamp(azimuth, rng.uniform(30, 85)), sky * rng.uniform(0.1, 0.45)
    tint = tuple(np.exp(rng.normal(0, 0.02, 3)))
    second = _lamp(azimuth + rng.uniform(0.5, 1.5) * math.pi, rng.uniform(15, 70))
    return Light(direction, total - sky - fill, sky, ground, tint, fill, second, rng.uniform(0.1, 0.9))


def shade(surface: parts.Surface, albedo: np.ndarray, light: Light) -> np.ndarray:
    """Returns [n, 3] sRGB 0..1: hemispheric and key light, occlusion, a sheen on fur, highlights in the eyes."""
    n, part = surface.normals, surface.part
    floor = np.clip(surface.points[:, 2] / 0.10, 0.0, 1.0)  # the floor shades what is near it
    openness = (0.12 + 0.88 * surface.openness) * (0.65 + 0.35 * floor)
    upward = 0.5 + 0.5 * n[:, 2]
    ambient = (light.ground + (light.sky - light.ground) * upward) * openness
    facing = n @ light.direction
    key = light.key * np.clip((facing + 0.25) / 1.25, 0, 1) * np.clip(openness * 1.25, 0, 1)
    thin = np.isin(part, (parts.EAR_INNER, parts.EAR_OUTER))
    key = np.where(thin, light.key * (0.35 + 0.5 * np.clip(np.abs(facing), 0, 1)), key)  # light passes through ears
    if light.fill:
        key = key + light.fill * np.clip((n @ light.fill_direction + 0.25) / 1.25, 0, 1) * np.clip(openness, 0, 1)
    received = (ambient + key) * (1 - light.belly * np.clip(-n[:, 2], 0, 1))
    linear = albedo * (received[:, None] * np.array(light.tint))
    gloss = np.clip(n @ unit(light.direction + [0, 0, 0.6]), 0, 1)
    fur, skin = np.isin(part, (parts.FUR, parts.LIMB)), np.isin(part, (parts.TAIL, parts.FOOT, parts.NOSE))
    linear = linear + np.where(fur, 0.026 * light.key * gloss**8 * openness, 0.0)[:, None]
    linear = linear + np.where(skin, 0.03 * light.key * gloss**8, 0.0)[:, None]
    glint = np.clip((n[:, 2] - 0.52) / 0.1, 0, 1) * np.clip((0.86 - n[:, 2]) / 0.1, 0, 1) * (gloss > 0.75)
    linear = linear + np.where(part == parts.EYE_PART, 0.02 * upward**2 + 0.8 * glint, 0.0)[:, None]
    linear = np.clip(linear, 0.0, 1.0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def build_cloud(shape: MouseShape, pose: MousePose, coat: Coat, light: Light, rng: np.random.Generator) -> SplatCloud:
    """The posed mouse, heading -y, floor at z = 0, world units. `rng` drives only the layout and the fur's noise."""
    s = solve(shape, pose)
    skin = build_skin(s, shape)
    layout, pattern = rng.spawn(2)
    surface = parts.sample_mouse(s, shape, pose, skin, layout)
    surface.openness = skin.openness(surface.points, surface.normals)
    rim = surface.points[(surface.part == parts.EAR_INNER) & (surface.rest[:, 2] > 0.97)]
    place, _, left, *_ = s.frame(EAR)
    side = (rim - place) @ left  # left is positive
    keypoints = [rim[side > 0].mean(0), rim[side < 0].mean(0), s.spine[-1], s.frame(0.62)[0], s.frame(0.33)[0]]
    keypoints += [s.tail[0], s.tail[len(s.tail) // 2], s.tail[-1]]
    for limb in (2, 3, 0, 1):  # DANNCE begins with the fore limbs, and names no hip
        socket, joint, ankle = s.limbs[limb]
        paw = ankle + 0.7 * (shape.fore_foot if limb >= 2 else shape.hind_foot) * s.feet[limb]
        keypoints += [paw, ankle, joint] + ([socket] if limb >= 2 else [])
    places = {"center": s.center, "keypoints": np.array(keypoints)}
    return splats_from_surface(surface, coat, light, pattern, length=shape.length, pose=pose.kind, **places)


def splats_from_surface(
    surface: parts.Surface, coat: Coat, light: Light, rng: np.random.Generator, *,
    length: float, center: np.ndarray, keypoints: np.ndarray, pose: str,
) -> SplatCloud:  # fmt: skip
    """Colors and shades a surface, one splat per sample. Everything is in body lengths, then enlarged by `length`."""
    # Two normal and two uniform (0..1) numbers per splat that stay with it in every pose.
    table = np.concatenate([rng.normal(0, 1, (16384, 2)), rng.random((16384, 2))], axis=1)
    noise = table[surface.number % len(table)]
    rgb = shade(surface, coat_albedo(surface, coat, noise, rng), light)
    fur = np.isin(surface.part, (parts.FUR, parts.LIMB))
    fuzz = np.where(fur, 0.0035 * noise[:, 1], 0.0) * np.clip(1.1 - surface.rest[:, 0], 0.15, 1)
    points = surface.points + fuzz[:, None] * surface.normals
    along = surface.size * np.where(fur, 0.80 + 0.45 * noise[:, 3], 0.66)
    across = surface.size * np.where(fur, 0.68 - 0.20 * noise[:, 3], 0.66)
    # hairs rise from the skin by a few degrees, which frays the outline
    flow = surface.flow / np.maximum(np.linalg.norm(surface.flow, axis=1, keepdims=True), 1e-9)
    lean, normals = np.where(fur, 0.35 * noise[:, 2], 0.0)[:, None], surface.normals
    normals = unit(normals - lean * (flow - (flow * normals).sum(1, keepdims=True) * normals))
    # Splats lie in the surface, long axis along the flow; where it points straight out, along any tangent.
    tangent = flow - (flow * normals).sum(1, keepdims=True) * normals
    size = np.linalg.norm(tangent, axis=1, keepdims=True)
    spare = unit(np.cross(normals, np.where(np.abs(normals[:, :1]) < 0.8, [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])))
    tangent = np.where(size > 1e-4, tangent / np.maximum(size, 1e-8), spare)
    frames = np.stack([tangent, np.cross(normals, tangent), normals], axis=2)
    scales = np.log(np.stack([along, across, 0.16 * surface.size], axis=1)).astype(np.float32)
    return SplatCloud(
        means=(length * points).astype(np.float32),
        log_scales=(scales + math.log(length)).astype(np.float32),
        quats=Rotation.from_matrix(frames).as_quat(scalar_first=True).astype(np.float32),
        opacity=np.where(fur, 0.97, 0.985).astype(np.float32),
        rgb=rgb.astype(np.float32),
        center=(length * center).astype(np.float32),
        keypoints=(length * keypoints).astype(np.float32),
        body_length=float(length),
        meta={"pose": pose, "coat": coat.name},
    )


def make_mouse(
    seed: int, index: int, *, coat: str | None = None, pose: str | None = None, heading_deg: float | None = None,
    light: Light | None = None,
) -> SplatCloud:  # fmt: skip
    """Mouse number `index` of the series `seed`, normalized: body's center at the origin, z up. heading_deg: azimuth of
    the nose (0 = -y, 90 = -x, as for cameras). What is None is drawn; the rest stays the same."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    shape = random_shape(rng)
    drawn_pose = MousePose() if pose == "rest" else random_pose(rng, pose)
    drawn_coat, drawn_light, heading = random_coat(rng, coat), random_light(rng), float(rng.uniform(0, 360))
    cloud = build_cloud(shape, drawn_pose, drawn_coat, light or drawn_light, rng)
    return cloud.facing(heading if heading_deg is None else heading_deg)


def mouse_sequence(
    seed: int, num_frames: int, *, fps: float, arena_radius: float, coat: str | None = None,
    poses: tuple[str, ...] = POSES,
) -> Iterator[SplatCloud]:  # fmt: skip
    """Yields num_frames clouds of one animal moving: floor at z = 0, arena center at the origin, z up. The body's
    center stays within arena_radius (world units) of the origin. meta: pose, coat, heading_deg, frame."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
    shape, drawn_coat, light = random_shape(rng), random_coat(rng, coat), random_light(rng)
    track = pose_track(rng, num_frames / fps, poses)
    layout_seed = int(rng.integers(2**62))
    place = rng.uniform(-0.4, 0.4, 2) * arena_radius
    heading, phase, turn = float(rng.uniform(0, 360)), 0.0, 0.0
    for frame in range(num_frames):
        pose, walking = track(frame / fps)
        step = shape.length * 0.9 * walking / fps  # 0.9 body lengths per second
        turn = 0.93 * turn + rng.normal(0, 14.0)
        # Near the wall the animal turns back towards the center.
        urge = np.clip((np.linalg.norm(place) / arena_radius - 0.6) / 0.3, 0.0, 1.0)
        wanted = math.degrees(math.atan2(place[0], place[1]))  # azimuth of the direction to the center
        rate = walking * (turn + float(urge * 2.0 * ((wanted - heading + 180.0) % 360.0 - 180.0)))
        heading += float(np.clip(rate, -110.0, 110.0)) / fps  # degrees per second
        a = math.radians(heading)
        place = place + step * np.array([-math.sin(a), -math.cos(a)])
        place = place * min(1.0, arena_radius / max(np.linalg.norm(place), 1e-9))
        phase += 2 * math.pi * 3.0 * walking / fps  # 3 strides per second
        pose = pose.stride(phase, 0.075 * walking) if walking > 0 else pose
        x, y, z = light.direction  # the room's light in the frame of the animal
        turned = np.array([math.cos(a) * x - math.sin(a) * y, math.sin(a) * x + math.cos(a) * y, z])
        # The same layout and fur noise every frame: the coat stays on the animal.
        fixed = np.random.default_rng(np.random.SeedSequence(layout_seed))
        cloud = build_cloud(shape, pose, drawn_coat, replace(light, direction=turned), fixed)
        cloud = cloud.transformed(rotate_z_deg=-heading)
        cloud = cloud.transformed(offset=np.array([*(place - cloud.center[:2]), 0.0]))
        cloud.meta.update(heading_deg=heading % 360.0, frame=frame)
        yield cloud
