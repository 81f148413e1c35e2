"""One-factor sweeps: how much calibration errors and fewer input views cost, and which Gaussians to filter away.

Noise changes the cameras that the model is told, never those that the result is rendered from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from evaluation.evaluate import Prediction, predict_gaussians, reconstruct_sample
from gslrm.model.gaussians import FilterSettings, filter_gaussians
from multiview.camera_noise import perturb
from multiview.rig import ViewRig
from multiview.run import make_generator
from synthetic.dataset import BODY_LENGTH_MM
from synthetic.skeleton import BODY_LENGTH

if TYPE_CHECKING:
    from gslrm.model.gaussians import Gaussians
    from gslrm.model.gslrm import GSLRM
    from multiview.sample import Sample

FACTORS = {  # flag -> what its values are
    "camera_noise_deg": "camera rotation error, standard deviation in degrees",
    "camera_noise_mm": "camera position error per axis, standard deviation in mm",
    "camera_noise_px": "principal point error per axis, standard deviation in px",
    "num_input_views": "input views",
    "min_opacity": "filter: least opacity kept, the rest as in the preset 'animal'",
    "max_scaling": "filter: largest standard deviation kept in world units, the rest as in the preset 'animal'",
}
FILTERS = ("min_opacity", "max_scaling")  # factors that act on the Gaussians, whoever made them
MM_CALIBRATIONS = ("new_cam.pkl",)  # formats whose unit of length is the millimetre


@dataclass(frozen=True)
class Level:
    """One setting of one factor; everything else is at its best (no noise, all views, no filter).

    translation: world units. pixels: of the model's input pictures. views: which rig views go in. filters: None keeps
    every Gaussian.
    """

    factor: str
    value: float
    views: tuple[int, ...]
    rotation_deg: float = 0.0
    translation: float = 0.0
    pixels: float = 0.0
    filters: FilterSettings | None = None

    @property
    def name(self) -> str:
        return f"{self.factor}={self.value:g}"

    def is_undisturbed(self, rig: ViewRig) -> bool:
        """Whether the Gaussians, before any filter, are those of true cameras and all views."""
        return not (self.rotation_deg or self.translation or self.pixels) and len(self.views) == rig.num_views


def plan_sweeps(
    values: dict[str, list[float]], rig: ViewRig, world_units_per_mm: float | None
) -> dict[str, list[Level]]:
    """Levels by factor. values: by factor (FACTORS); factors without values are left out.

    Raises ValueError for counts of views that the rig does not have, and for mm without a scale.
    """
    everything = tuple(range(rig.num_views))
    sweeps = {}
    for factor, numbers in values.items():
        if factor == "num_input_views":
            sweeps[factor] = [Level(factor, number, spread_views(rig, int(number))) for number in numbers]
        elif factor == "camera_noise_mm":
            if world_units_per_mm is None:
                raise ValueError("camera_noise_mm needs the length of a millimetre: pass --world_units_per_mm")
            sweeps[factor] = [Level(factor, mm, everything, translation=mm * world_units_per_mm) for mm in numbers]
        elif factor == "camera_noise_deg":
            sweeps[factor] = [Level(factor, degrees, everything, rotation_deg=degrees) for degrees in numbers]
        elif factor == "camera_noise_px":
            sweeps[factor] = [Level(factor, pixels, everything, pixels=pixels) for pixels in numbers]
        elif factor in FILTERS:
            sweeps[factor] = [
                Level(factor, number, everything, filters=FilterSettings(**{factor: number}))
                for number in numbers
            ]
        else:
            raise ValueError(f"factor must be one of {', '.join(FACTORS)}, got {factor!r}")
    return sweeps


def spread_views(rig: ViewRig, count: int) -> tuple[int, ...]:
    """`count` of the rig's views, the reference view among them, as far apart in azimuth as can be; in rig order.

    Of all choices the one whose views, as equal charges on a circle, have the least energy (the sum of 1 / chord); ties
    go to the first in rig order. mouse6: 2 -> 0, 3; 3 -> 0, 2, 4; 4 -> 0, 1, 3, 4.
    """
    if not 1 <= count <= rig.num_views:
        raise ValueError(f"num_input_views must be 1 to {rig.num_views}, the views of rig {rig.name}, got {count}")
    azimuth = [math.radians(view.azimuth_deg) for view in rig.views]

    def energy(choice: tuple[int, ...]) -> float:
        chords = (abs(2 * math.sin((azimuth[a] - azimuth[b]) / 2)) for a, b in itertools.combinations(choice, 2))
        # Rounded: choices that are turned copies of one another are ties. Views above one another are at 1e6.
        return round(sum(1 / max(chord, 1e-6) for chord in chords), 9)

    choices = (choice for choice in itertools.combinations(range(rig.num_views), count) if rig.reference_view in choice)
    return min(choices, key=energy)


def find_world_units_per_mm(info: dict, given: float | None, source: str) -> tuple[float, str]:
    """World units per mm of a dataset, and on what that rests. info: its dataset.json. given: the user's own figure.

    Recordings: the scale they were imported with, where the calibration's format fixes the unit as mm. Synthetic mice:
    their nominal body (BODY_LENGTH world units) is taken as an adult mouse's (BODY_LENGTH_MM).
    Raises ValueError where nothing says it.
    """
    if given is not None:
        return given, f"{given:.5g} world units per mm, as given"
    if info.get("source") == "synthetic":
        scale = BODY_LENGTH / BODY_LENGTH_MM
        return scale, (
            f"{scale:.5g} world units per mm: assumed, the nominal synthetic body of {BODY_LENGTH} world units "
            f"being an adult mouse of {BODY_LENGTH_MM:g} mm, nose to tail base"
        )
    recorded = info.get("world_units_per_calibration_unit")
    if recorded is None:
        raise ValueError(
            f"{source} does not say how long a millimetre is ('world_units_per_calibration_unit' of an imported "
            "recording is expected): pass --world_units_per_mm"
        )
    calibration = info["source"]["calibration"]
    if calibration not in MM_CALIBRATIONS:
        raise ValueError(
            f"{source}: the recording was imported at {recorded:.6g} world units per unit of {calibration}, whose unit "
            f"is not known to be the mm; if it is, pass --world_units_per_mm {recorded:.6g}"
        )
    return recorded, f"{recorded:.5g} world units per mm, the scale of {calibration} in {source}"


def predict_levels(
    model: GSLRM, sample: Sample, name: str, rig: ViewRig, sweeps: dict[str, list[Level]],
    splits: dict[str, list[int]], device: torch.device, *, seed: int, gaussians: Gaussians | None = None,
) -> Iterator[tuple[Level, dict[str, Prediction]]]:  # fmt: skip
    """One sample at every level of every sweep, by split. The noise depends on (seed, name, level) alone.

    gaussians: those of the undisturbed model, where they are made already (the chain's); else Stage 2 makes them.
    What levels have in common is computed once.
    """
    undisturbed = None
    for level in itertools.chain(*sweeps.values()):
        plain = level.is_undisturbed(rig)
        if plain and level.filters is None and undisturbed is not None:
            yield level, undisturbed
            continue
        if plain and gaussians is None:
            gaussians = reconstruct_sample(model, sample, rig.num_views, device)
        made = gaussians if plain else _disturbed(model, sample, name, rig, level, device, seed)
        if level.filters is not None:
            made = filter_gaussians(made, level.filters)
        predictions = predict_gaussians(made, sample, splits, device)
        if plain and level.filters is None:
            undisturbed = predictions
        yield level, predictions


def _disturbed(
    model: GSLRM, sample: Sample, name: str, rig: ViewRig, level: Level, device: torch.device, seed: int
) -> Gaussians:
    cameras = perturb(
        sample.cameras[: rig.num_views], rotation_deg=level.rotation_deg, translation=level.translation,
        pixels=level.pixels, generator=make_generator(seed, name, level.name),
    )  # fmt: skip
    return reconstruct_sample(model, sample, rig.num_views, device, views=level.views, seen_cameras=cameras)
