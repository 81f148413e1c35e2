"""A whole mouse: shape + pose + coat + light -> SplatCloud; mice by number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from synthetic import surface as parts
from synthetic.body import MouseShape, random_shape
from synthetic.cloud import SplatCloud, orient_splats
from synthetic.coat import Coat, paint, random_coat
from synthetic.implicit import Skin
from synthetic.pose import MousePose, random_pose, rest_pose
from synthetic.skeleton import EAR, Skeleton, build_skin, solve

SPACING = 0.0112  # between samples, body lengths: no holes in pictures up to 256 px


@dataclass(frozen=True)
class Light:
    """direction: [3] unit, towards the key light. key, sky, ground: strengths; tint: per channel.

    fill, fill_direction: a second lamp. belly: 0..1, how much darker what faces down is.
    """

    direction: np.ndarray
    key: float = 0.75
    sky: float = 0.62
    ground: float = 0.30
    tint: tuple = (1.0, 1.0, 1.0)
    fill: float = 0.0
    fill_direction: tuple = (0.0, 0.0, 1.0)
    belly: float = 0.0


def random_light(rng: np.random.Generator) -> Light:
    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(35, 80))
    direction = [math.cos(azimuth) * math.cos(elevation), math.sin(azimuth) * math.cos(elevation), math.sin(elevation)]
    return Light(
        np.array(direction),
        key=rng.uniform(0.55, 0.95),
        sky=rng.uniform(0.5, 0.72),
        ground=rng.uniform(0.22, 0.40),
        tint=tuple(np.exp(rng.normal(0, 0.025, 3))),
    )


def laboratory_light(rng: np.random.Generator) -> Light:
    """Wider than `random_light`: soft light from above with weak lamps, or two lamps from two sides, dark bellies."""

    def towards(azimuth: float, low: float, high: float) -> np.ndarray:
        up = math.radians(rng.uniform(low, high))
        return np.array([math.cos(azimuth) * math.cos(up), math.sin(azimuth) * math.cos(up), math.sin(up)])

    azimuth = rng.uniform(0, 2 * math.pi)
    soft = rng.random() < 0.4
    total = rng.uniform(1.05, 1.65)  # strength of all light from above together
    sky = total * (rng.uniform(0.6, 0.85) if soft else rng.uniform(0.2, 0.5))
    fill = (total - sky) * (rng.uniform(0.15, 0.5) if rng.random() < 0.6 else 0.0)
    return Light(
        towards(azimuth, 30, 85),
        key=total - sky - fill,
        sky=sky,
        ground=sky * rng.uniform(0.1, 0.45),
        tint=tuple(np.exp(rng.normal(0, 0.02, 3))),
        fill=fill,
        fill_direction=tuple(towards(azimuth + rng.uniform(0.5, 1.5) * math.pi, 15, 70)),
        belly=rng.uniform(0.1, 0.9),
    )


def sample_surface(
    s: Skeleton, shape: MouseShape, pose: MousePose, skin: Skin, spacing: float, rng: np.random.Generator
) -> parts.Surface:
    """All parts of the posed mouse, body lengths."""
    streams = rng.spawn(6)  # one per part: a part whose number of samples varies must not disturb the others
    pieces = [parts.sample_body(s, shape, skin, spacing, streams[0])]
    pieces.append(parts.sample_tube(s.tail, s.tail_radius, 0.8 * spacing, parts.TAIL, streams[1]))
    for limb in range(4):
        pieces += parts.foot(s, shape, limb, 0.8 * spacing, streams[2 + limb])
    for k, side in enumerate((1.0, -1.0)):
        pieces += parts.ear(s, shape, side, float(pose.ear_turn[k]), 0.85 * spacing)
        centre, radius = parts.eye(s, shape, skin, side)
        pieces.append(parts.sample_blob(centre, np.eye(3), [radius] * 3, 0.5 * spacing, parts.EYE_PART))
    place, tangent, left, up = s.frame(0.992)
    axes = np.stack([tangent, left, up])
    pieces.append(
        parts.sample_blob(place + 0.004 * tangent + 0.006 * up, axes, [0.013, 0.016, 0.012], 0.6 * spacing, parts.NOSE)
    )
    return parts.Surface.joined(pieces)


def shade(surface: parts.Surface, openness: np.ndarray, albedo: np.ndarray, light: Light) -> np.ndarray:
    """[n, 3] sRGB 0..1: hemispheric and key light, occlusion, a sheen on fur, highlights in the eyes.

    openness: [n] 0..1, how much of its surroundings each sample sees.
    """
    n = surface.normals
    part = surface.part
    floor = np.clip(surface.points[:, 2] / 0.10, 0.0, 1.0)
    openness = (0.12 + 0.88 * openness) * (0.65 + 0.35 * floor)
    upward = 0.5 + 0.5 * n[:, 2]
    ambient = (light.ground + (light.sky - light.ground) * upward) * openness
    facing = n @ light.direction
    key = light.key * np.clip((facing + 0.25) / 1.25, 0, 1) * np.clip(openness * 1.25, 0, 1)
    thin = (part == parts.EAR_INNER) | (part == parts.EAR_OUTER)
    key = np.where(thin, light.key * (0.35 + 0.5 * np.clip(np.abs(facing), 0, 1)), key)  # light passes through ears
    if light.fill:
        key = key + light.fill * np.clip((n @ light.fill_direction + 0.25) / 1.25, 0, 1) * np.clip(openness, 0, 1)
    received = (ambient + key) * (1 - light.belly * np.clip(-n[:, 2], 0, 1))
    linear = albedo * (received[:, None] * np.array(light.tint))
    half = light.direction + [0, 0, 0.6]
    half = half / np.linalg.norm(half)
    gloss = np.clip(n @ half, 0, 1)
    fur = (part == parts.FUR) | (part == parts.LIMB)
    linear = linear + np.where(fur, 0.018 * light.key * gloss**12 * openness, 0.0)[:, None]
    skin_sheen = (part == parts.TAIL) | (part == parts.FOOT) | (part == parts.NOSE)
    linear = linear + np.where(skin_sheen, 0.03 * light.key * gloss**8, 0.0)[:, None]
    eye = part == parts.EYE_PART
    glint = np.clip((n[:, 2] - 0.52) / 0.1, 0, 1) * np.clip((0.86 - n[:, 2]) / 0.1, 0, 1)
    glint = glint * (gloss > 0.75)
    linear = linear + np.where(eye, 0.02 * upward**2 + 0.8 * glint, 0.0)[:, None]
    linear = np.clip(linear, 0.0, 1.0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def keypoints(s: Skeleton, shape: MouseShape, surface: parts.Surface) -> np.ndarray:
    """[22, 3] body lengths, in the order of cloud.KEYPOINT_NAMES."""
    tips = []
    for side in (1.0, -1.0):
        base, _ = parts.head_points(s, EAR, 50.0, side)
        is_ear = (surface.part == parts.EAR_INNER) & (surface.rest[:, 2] > 0.97)
        points = surface.points[is_ear]
        left = s.frame(EAR)[2]
        points = points[side * ((points - s.frame(EAR)[0]) @ left) > 0]
        tips.append(points.mean(0))
    middle = len(s.tail) // 2
    paws = []
    for limb in (2, 3, 0, 1):
        length = shape.fore_foot if limb >= 2 else shape.hind_foot
        joint_first = [s.limbs[limb, 2] + 0.7 * length * s.feet[limb], s.limbs[limb, 2], s.limbs[limb, 1]]
        paws += joint_first + ([s.limbs[limb, 0]] if limb >= 2 else [])
    rows = tips + [s.spine[-1], s.frame(0.62)[0], s.frame(0.33)[0], s.tail[0], s.tail[middle], s.tail[-1]] + paws
    return np.array(rows)


def splat_noise(surface: parts.Surface, rng: np.random.Generator) -> np.ndarray:
    """[n, 4] two normal and two uniform (0..1) numbers per splat that stay with it in every pose."""
    table = np.concatenate([rng.normal(0, 1, (16384, 2)), rng.random((16384, 2))], axis=1)
    return table[surface.number % len(table)]


def build_cloud(
    shape: MouseShape, pose: MousePose, coat: Coat, light: Light, rng: np.random.Generator, spacing: float = SPACING
) -> SplatCloud:
    """The posed mouse, heading -y, floor at z = 0, world units. `rng` drives only the layout and the fur's noise."""
    s = solve(shape, pose)
    skin = build_skin(s, shape)
    layout, pattern = rng.spawn(2)
    surface = sample_surface(s, shape, pose, skin, spacing, layout)
    openness = skin.openness(surface.points, surface.normals)
    splats = splats_from_surface(surface, openness, coat, light, pattern, scale=shape.length)
    return SplatCloud(
        **splats,
        centre=(shape.length * s.centre).astype(np.float32),
        keypoints=(shape.length * keypoints(s, shape, surface)).astype(np.float32),
        body_length=float(shape.length),
        floor=0.0,
        meta={"pose": pose.kind, "coat": coat.name},
    )


def splats_from_surface(
    surface: parts.Surface, openness: np.ndarray, coat: Coat, light: Light, rng: np.random.Generator, *, scale: float
) -> dict[str, np.ndarray]:
    """Paints and shades a surface (body lengths), one splat per sample: SplatCloud's arrays, enlarged by scale."""
    noise = splat_noise(surface, rng)
    rgb = shade(surface, openness, paint(surface, coat, noise, rng), light)
    fur = (surface.part == parts.FUR) | (surface.part == parts.LIMB)
    fuzz = np.where(fur, 0.0035 * noise[:, 1], 0.0) * np.clip(1.1 - surface.rest[:, 0], 0.15, 1)
    points = surface.points + fuzz[:, None] * surface.normals
    along = surface.size * np.where(fur, 0.80 + 0.45 * noise[:, 3], 0.66)
    across = surface.size * np.where(fur, 0.68 - 0.20 * noise[:, 3], 0.66)
    # hairs rise from the skin by a few degrees, which frays the outline
    flow = surface.flow / np.maximum(np.linalg.norm(surface.flow, axis=1, keepdims=True), 1e-9)
    lean = np.where(fur, 0.35 * noise[:, 2], 0.0)[:, None]
    normals = surface.normals - lean * (flow - (flow * surface.normals).sum(1, keepdims=True) * surface.normals)
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    log_scales, quats = orient_splats(normals, flow, along, across, 0.16 * surface.size)
    return {
        "means": (scale * points).astype(np.float32),
        "log_scales": (log_scales + math.log(scale)).astype(np.float32),
        "quats": quats,
        "opacity": np.where(fur, 0.97, 0.985).astype(np.float32),
        "rgb": rgb.astype(np.float32),
    }


def make_mouse(
    seed: int,
    index: int,
    *,
    coat: str | None = None,
    pose: str | None = None,
    heading_deg: float | None = None,
    light: Light | None = None,
) -> SplatCloud:
    """Mouse number `index` of the series `seed`, normalised: body's centre at the origin, z up.

    heading_deg: azimuth towards which the nose points (0 = -y, 90 = -x, as for cameras); None draws it uniformly.
    light: instead of the drawn one; the animal stays the same.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    shape = random_shape(rng)
    drawn_pose = rest_pose() if pose == "rest" else random_pose(rng, pose)
    drawn_coat = random_coat(rng, coat)
    drawn_light = random_light(rng)
    heading = float(rng.uniform(0, 360))
    heading = heading if heading_deg is None else heading_deg
    cloud = build_cloud(shape, drawn_pose, drawn_coat, light or drawn_light, rng)
    cloud.meta["heading_deg"] = heading % 360.0
    return cloud.centred().transformed(rotate_z_deg=-heading)
