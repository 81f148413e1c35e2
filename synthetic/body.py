"""Proportions of one mouse. All lengths here are in body lengths (nose to tail base along the stretched spine = 1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from synthetic.cloud import BODY_LENGTH

STATIONS = np.linspace(0.0, 1.0, 56)  # along the spine: 0 tail base .. 1 tip of the nose

# Half width, half height above and below the spine, by station: an egg with a tapering snout.
_PROFILE = np.array(
    [
        [0.000, 0.022, 0.022, 0.022],
        [0.012, 0.062, 0.062, 0.056],
        [0.040, 0.104, 0.106, 0.090],
        [0.085, 0.144, 0.146, 0.122],
        [0.150, 0.176, 0.176, 0.150],
        [0.230, 0.193, 0.188, 0.170],
        [0.320, 0.194, 0.186, 0.178],
        [0.410, 0.180, 0.174, 0.170],
        [0.500, 0.156, 0.156, 0.148],
        [0.580, 0.132, 0.136, 0.124],
        [0.650, 0.114, 0.118, 0.106],
        [0.710, 0.108, 0.106, 0.096],
        [0.765, 0.106, 0.098, 0.090],
        [0.815, 0.099, 0.088, 0.082],
        [0.860, 0.084, 0.074, 0.070],
        [0.905, 0.064, 0.059, 0.057],
        [0.945, 0.049, 0.047, 0.044],
        [0.975, 0.038, 0.038, 0.033],
        [0.992, 0.025, 0.026, 0.021],
        [1.000, 0.010, 0.011, 0.009],
    ]
)


@dataclass(frozen=True)
class MouseShape:
    """One animal. length: world units; everything else relative to the body length or to a typical mouse (1)."""

    length: float = BODY_LENGTH
    fatness: float = 1.0
    head: float = 1.0
    snout: float = 1.0
    ear_height: float = 0.158
    ear_width: float = 0.134
    ear_azimuth_deg: float = 48.0  # how far the ear's opening turns outwards from straight ahead
    tail_length: float = 0.88
    tail_radius: float = 0.027
    eye_radius: float = 0.0195
    limb: float = 1.0  # limb thickness
    hind_foot: float = 0.19
    fore_foot: float = 0.085
    upper_hind: float = 0.180
    lower_hind: float = 0.200
    upper_fore: float = 0.132
    lower_fore: float = 0.140

    def half_sizes(self) -> np.ndarray:
        """[stations, 3] half width, half height up, half height down."""
        sizes = np.stack([np.interp(STATIONS, _PROFILE[:, 0], _PROFILE[:, k]) for k in (1, 2, 3)], axis=1)
        trunk = np.exp(-(((STATIONS - 0.30) / 0.22) ** 2))
        head = np.exp(-(((STATIONS - 0.77) / 0.09) ** 2))
        snout = np.clip((STATIONS - 0.86) / 0.08, 0.0, 1.0)
        widen = 1 + (self.fatness - 1) * trunk + (self.head - 1) * head + (self.snout - 1) * snout
        sag = 1 + 0.35 * max(self.fatness - 1, 0.0) * trunk  # a fat belly hangs
        return sizes * widen[:, None] * np.stack([np.ones_like(sag), np.ones_like(sag), sag], axis=1)


def random_shape(rng: np.random.Generator) -> MouseShape:
    """Adult mice, lean to fat; body length 1.13 to 1.32 world units."""
    ear = rng.uniform(0.138, 0.180)
    limbs = rng.uniform(0.94, 1.06)
    return MouseShape(
        length=BODY_LENGTH * float(np.clip(rng.normal(1.03, 0.035), 0.94, 1.10)),
        fatness=float(np.clip(rng.normal(1.0, 0.08), 0.84, 1.22)),
        head=float(rng.uniform(0.95, 1.08)),
        snout=float(rng.uniform(0.88, 1.12)),
        ear_height=float(ear),
        ear_width=float(ear * rng.uniform(0.80, 0.95)),
        ear_azimuth_deg=float(rng.uniform(35.0, 62.0)),
        tail_length=float(rng.uniform(0.72, 1.0)),
        tail_radius=float(rng.uniform(0.024, 0.030)),
        eye_radius=float(rng.uniform(0.0175, 0.0215)),
        limb=float(rng.uniform(0.92, 1.12)),
        hind_foot=float(rng.uniform(0.17, 0.205)),
        fore_foot=float(rng.uniform(0.075, 0.095)),
        upper_hind=0.180 * limbs,
        lower_hind=0.200 * limbs,
        upper_fore=0.132 * limbs,
        lower_fore=0.140 * limbs,
    )
