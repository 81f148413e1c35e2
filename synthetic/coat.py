"""Coats: linear albedo per surface sample."""

from types import SimpleNamespace

import numpy as np

from synthetic.settings import COATS
from synthetic.surface import EAR_INNER, EAR_OUTER, EYE_PART, FOOT, FUR, LIMB, NOSE, TAIL, Surface

# sRGB 0..255 of back, belly, skin (ears, feet, tail), eye
_COLORS = {
    "black": ((43, 40, 34), (48, 45, 39), (152, 123, 117), (14, 11, 11)),
    "agouti": ((112, 90, 64), (176, 154, 124), (178, 140, 130), (16, 12, 11)),
    "brown": ((112, 74, 48), (134, 98, 70), (186, 142, 130), (20, 13, 11)),
    "grey": ((116, 116, 118), (140, 139, 138), (182, 146, 142), (15, 13, 13)),
    "white": ((226, 220, 211), (229, 224, 216), (222, 170, 164), (120, 26, 34)),
    "piebald": ((50, 46, 41), (220, 213, 202), (212, 160, 152), (14, 11, 11)),
}


class Coat(SimpleNamespace):
    """Linear colors back, belly, skin, eye [3]; name; contrast of the strands; ticking: share of pale hairs. patches:
    [k, 4] center (station, left, up) and radius, unused for solid coats."""


def random_coat(rng: np.random.Generator, name: str | None = None) -> Coat:
    """Draws a coat of the given name (one of COATS), or of a name drawn at random, with its own shade."""
    if name is None:
        shares = (0.30, 0.16, 0.14, 0.12, 0.14, 0.14)
        name = COATS[rng.choice(len(COATS), p=np.array(shares) / sum(shares))]
    srgb = {key: np.array(colors) / 255.0 for key, colors in _COLORS.items()}
    linear = {key: np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4) for key, v in srgb.items()}
    back, belly, skin, eye = linear[name]
    shade = np.exp(rng.normal(0, 0.06 if name == "white" else 0.16)) * np.exp(rng.normal(0, 0.03, 3))
    if name == "piebald":  # the dark patches take the color of another coat
        back = linear[("black", "black", "brown", "agouti", "grey")[rng.integers(5)]][0]
    if name == "white" and rng.random() < 0.4:  # white with dark eyes
        eye = linear["black"][3]
    count = int(rng.integers(4, 8))
    limits = ((0.0, 1.0), (-0.16, 0.16), (-0.02, 0.16), (0.07, 0.19))
    patches = np.stack([rng.uniform(*limit, count) for limit in limits], axis=1)
    skin = skin * np.exp(rng.normal(0, 0.08)) * np.exp(rng.normal(0, 0.02, 3))
    contrast = float(rng.uniform(0.7, 1.3)) * {"white": 0.3, "piebald": 0.55}.get(name, 1.0)
    back, belly = np.clip(back * shade, 0, 0.86), np.clip(belly * (1 if name == "piebald" else shade), 0, 0.88)
    ticking = {"agouti": 0.35, "brown": 0.10, "grey": 0.10}.get(name, 0.0)
    return Coat(
        name=name, back=back, belly=belly, skin=skin, eye=eye, contrast=contrast, ticking=ticking, patches=patches
    )


def _waves(points: np.ndarray, rng: np.random.Generator, frequency: float, count: int = 6) -> np.ndarray:
    """Smooth noise [n], about -1..1, over points [n, 3]: a few plane waves."""
    directions = rng.normal(size=(count, 3))
    directions *= frequency / np.linalg.norm(directions, axis=1, keepdims=True)
    return np.sin(points @ directions.T + rng.uniform(0, 2 * np.pi, count)).sum(1) / np.sqrt(count)


def coat_albedo(surface: Surface, coat: Coat, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns [n, 3] linear albedo. noise: [n, 4] of scene.splats_from_surface."""
    part = surface.part
    station, x, z = surface.rest.T  # of the unposed animal: a moving mouse keeps its pattern
    ventral = np.clip((surface.ventral - 0.30) / 0.45, 0, 1)
    ventral = np.where(part == LIMB, 0.6 * surface.along**2, ventral * ventral * (3 - 2 * ventral))
    if coat.name == "piebald":
        bumps = _waves(surface.rest, rng, 28.0) * 0.03
        gaps = np.linalg.norm(surface.rest[:, None] - coat.patches[None, :, :3], axis=2) - coat.patches[None, :, 3]
        dark = 1 / (1 + np.exp(np.clip((gaps.min(1) + bumps) / 0.008, -30, 30)))
        mix = (dark * (1 - 0.8 * ventral))[:, None]
        base = mix * coat.back + (1 - mix) * coat.belly
    else:
        base = coat.back + ventral[:, None] * (coat.belly - coat.back)
    # strands: noise that is long along the fur and narrow across it, plus single hairs, plus broad mottling
    strands = _waves(np.stack([station * 30, np.arctan2(z, x) * 16, surface.along * 12], 1), rng, 3.0, 8)
    mottle = _waves(surface.rest, rng, 18.0)
    tone = np.exp(coat.contrast * (0.11 * strands + 0.14 * noise[:, 0] + 0.08 * mottle))
    pale = (noise[:, 2] < coat.ticking) & (ventral < 0.6)
    base = base * tone[:, None]
    base = np.where(pale[:, None], base * [1.55, 1.45, 1.25], base)
    # bare skin shows at the end of limbs and on the snout's tip
    bare_limb, bare_snout = np.clip((surface.along - 0.88) / 0.12, 0, 1), np.clip((station - 0.965) / 0.03, 0, 1)
    bare = np.where(part == LIMB, bare_limb, np.where(part == FUR, 0.4 * bare_snout, 0.0))[:, None]
    albedo = base * (1 - bare) + coat.skin * bare

    skin = coat.skin * np.exp(0.05 * noise[:, 0])[:, None]
    dark_skin = coat.name in ("black", "agouti", "grey")
    tail_rings = (1 + 0.06 * np.sin(surface.along * 260.0)) * (1 - 0.15 * surface.along)
    rim = np.clip((surface.along - 0.72) / 0.28, 0, 1)[:, None]
    deep = np.clip(z / 0.55, 0, 1)[:, None]  # for ears, z is the height above the root
    inner = skin * np.array([1.0, 0.91, 0.89]) * (0.84 + 0.22 * rim) * (0.55 + 0.45 * deep)
    hair = np.minimum(coat.belly if coat.name == "piebald" else coat.back, 0.5)
    for where, color in (
        (FOOT, skin * 1.06),
        (TAIL, skin * (0.86 if dark_skin else 0.96) * tail_rings[:, None]),
        (EAR_INNER, inner * ([0.80, 0.74, 0.66] if dark_skin else [1.0, 0.98, 0.98])),
        (EAR_OUTER, ((0.45 if dark_skin else 0.56) * skin + 0.38 * hair) * (0.92 + 0.16 * rim)),
        (NOSE, coat.skin * ([0.62, 0.50, 0.50] if coat.name == "black" else [1.0, 0.82, 0.82])),
        (EYE_PART, coat.eye),
    ):
        albedo = np.where((part == where)[:, None], color, albedo)
    return np.clip(albedo, 0.0, 1.0)
