"""One-factor sweeps: how much calibration errors and fewer input views cost, and which Gaussians to filter away.

Noise changes the cameras that the model is told, never those that the result is rendered from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.methods import Predictions, Splits, predict_gaussians, reconstruct_sample
from evaluation.report import group_by, metrics_table, plot_sweep, summarise
from gslrm.model.gaussians import FilterSettings, filter_gaussians
from multiview.cameras import perturb
from multiview.files import atomic_write, write_json
from multiview.run import make_generator
from synthetic.dataset import BODY_LENGTH_MM
from synthetic.skeleton import BODY_LENGTH

if TYPE_CHECKING:
    from gslrm.model.gaussians import Gaussians
    from multiview.rig import ViewRig
    from multiview.sample import Sample
    from pipeline import MouseFaceLift

FACTORS = {  # flag -> what its values are
    "camera_noise_deg": "camera rotation error, standard deviation in degrees",
    "camera_noise_mm": "camera position error per axis, standard deviation in mm",
    "camera_noise_px": "principal point error per axis, standard deviation in px",
    "num_input_views": "input views",
    "min_opacity": "filter: least opacity kept, the rest as in the preset 'animal'",
    "max_scaling": "filter: largest standard deviation kept in world units, the rest as in the preset 'animal'",
}
MM_CALIBRATIONS = ("new_cam.pkl",)  # formats whose unit of length is the millimetre


@dataclass(frozen=True)
class Level:
    """One setting of one factor; everything else is at its best (no noise, all views, no filter).

    translation: world units. pixels: of the model's input images. views: which rig views go in. filters: None keeps
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


def plan_sweeps(
    values: Mapping[str, Sequence[float]], rig: ViewRig, world_units_per_mm: float | None
) -> dict[str, list[Level]]:
    """Returns the levels by factor. values: by factor (FACTORS); factors without values are left out.

    Raises ValueError for counts of views that the rig does not have, and for mm without a scale.
    """
    if values.get("camera_noise_mm") and world_units_per_mm is None:
        raise ValueError("camera_noise_mm needs the length of a millimetre: pass --world_units_per_mm")

    everything, mm = tuple(range(rig.num_views)), world_units_per_mm or 0.0
    settings = {  # factor -> what a value of it changes
        "camera_noise_deg": lambda value: {"rotation_deg": value},
        "camera_noise_mm": lambda value: {"translation": value * mm},
        "camera_noise_px": lambda value: {"pixels": value},
        "num_input_views": lambda value: {"views": spread_views(rig, int(value))},
        "min_opacity": lambda value: {"filters": FilterSettings(min_opacity=value)},
        "max_scaling": lambda value: {"filters": FilterSettings(max_scaling=value)},
    }
    return {
        factor: [Level(factor, value, **{"views": everything, **settings[factor](value)}) for value in numbers]
        for factor, numbers in values.items() if numbers
    }  # fmt: skip


def spread_views(rig: ViewRig, count: int) -> tuple[int, ...]:
    """Returns `count` of the rig's views, the reference view among them, as far apart in azimuth as can be.

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

    choices = itertools.combinations(range(rig.num_views), count)
    return min((choice for choice in choices if rig.reference_view in choice), key=energy)


def find_world_units_per_mm(info: dict, given: float | None, source: str) -> tuple[float, str]:
    """Returns world units per mm of a dataset, and what that rests on. info: its dataset.json. given: by the user.

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
    model: MouseFaceLift, sample: Sample, name: str, sweeps: Mapping[str, list[Level]], splits: Splits, *, seed: int,
    gaussians: Gaussians | None = None,
) -> Iterator[tuple[Level, Predictions]]:  # fmt: skip
    """Yields one sample at every level of every sweep, by split. The noise depends on (seed, name, level) alone.

    gaussians: those of the undisturbed model, where they are made already (both stages'); else Stage 2 makes them.
    What levels have in common is computed once.
    """
    undisturbed = None
    for level in itertools.chain(*sweeps.values()):
        noise = {"rotation_deg": level.rotation_deg, "translation": level.translation, "pixels": level.pixels}
        plain = not any(noise.values()) and len(level.views) == model.rig.num_views
        if plain and level.filters is None and undisturbed is not None:  # e.g. no noise, and all views, are one level
            yield level, undisturbed
            continue
        if plain:
            gaussians = reconstruct_sample(model, sample) if gaussians is None else gaussians
            made = gaussians
        else:
            # Keyed on the mouse and the level, so that a level's figures do not depend on what else is swept.
            generator = make_generator(seed, name, level.name)
            noisy = perturb(sample.cameras[: model.rig.num_views], **noise, generator=generator)
            made = reconstruct_sample(model, sample, level.views, noisy)
        made = made if level.filters is None else filter_gaussians(made, level.filters)
        predictions = predict_gaussians(made, sample, splits)
        undisturbed = predictions if plain and level.filters is None else undisturbed
        yield level, predictions


def write_sweeps(
    folder: Path, sweeps: Mapping[str, list[Level]], records: list[dict], head: dict, title: str, notes: list[str]
) -> str:
    """Writes metrics.json, table.md and a plot per factor; returns the Markdown. records: with factor and value."""
    tables, summaries = [], {}
    for factor, levels in sweeps.items():
        rows = group_by(records, "factor")[factor,]
        by_value = group_by(rows, "value")
        tables.append(metrics_table(FACTORS[factor], rows, {"value": factor}).markdown())
        if factor == "num_input_views":
            used = (f"{len(level.views)}: {', '.join(map(str, level.views))}" for level in levels)
            notes = [*notes, f"Input views used, numbered in rig order: {'; '.join(used)}."]
        summaries[factor] = [
            {
                "value": level.value, "views": list(level.views), "rotation_deg": level.rotation_deg,
                "translation_world_units": level.translation, "pixels": level.pixels,
                "filters": level.filters and asdict(level.filters), **summarise(by_value[level.value,]),
            }
            for level in levels
        ]  # fmt: skip
        plot_sweep(folder / f"sweep_{factor}.png", rows, FACTORS[factor], title)
    text = "\n".join([*tables, *(note + "\n" for note in notes)])
    write_json(folder / "metrics.json", head | {"sweeps": summaries, "notes": notes, "views": records})
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(text)
    return text
