"""One-factor sweeps: how much calibration errors and fewer input views cost, and which Gaussians to filter away.

Noise changes the cameras that the model is told, never those that the result is rendered from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from evaluation import SWEEPS, EvaluationSettings
from evaluation.methods import Predictions, Splits, predict_gaussians, read, reconstruct_sample, records_of, splits_of
from evaluation.report import group_by, metrics_table, plot, summarise, write_text
from gslrm.model.gaussians import FilterSettings, Gaussians, filter_gaussians
from multiview.cameras import perturb
from multiview.files import write_json
from multiview.image import composite, grid, write_image
from multiview.rig import ViewRig
from multiview.run import make_generator, stoppable
from multiview.sample import Sample
from pipeline.model import MouseFaceLift
from synthetic.dataset import BODY_LENGTH_MM
from synthetic.skeleton import BODY_LENGTH

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


def plan_sweeps(
    values: Mapping[str, Sequence[float]], rig: ViewRig, world_units_per_mm: float | None
) -> dict[str, list[Level]]:
    """Returns the levels by factor. values: by factor (SWEEPS); factors without values are left out.

    Raises ValueError for counts of views that the rig does not have.
    """
    settings = {  # factor -> what a value of it changes
        "camera_noise_deg": lambda value: {"rotation_deg": value},
        "camera_noise_mm": lambda value: {"translation": value * world_units_per_mm},
        "camera_noise_px": lambda value: {"pixels": value},
        "num_input_views": lambda value: {"views": spread_views(rig, int(value))},
        "min_opacity": lambda value: {"filters": FilterSettings(min_opacity=value)},
        "max_scaling": lambda value: {"filters": FilterSettings(max_scaling=value)},
    }
    everything = {"views": tuple(range(rig.num_views))}
    return {
        factor: [Level(factor, value, **{**everything, **settings[factor](value)}) for value in numbers]
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

    Raises ValueError where nothing says it, or the calibration's format does not fix its unit as mm.
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
    """
    undisturbed = None
    for level in itertools.chain(*sweeps.values()):
        noise = {"rotation_deg": level.rotation_deg, "translation": level.translation, "pixels": level.pixels}
        plain = not any(noise.values()) and len(level.views) == model.rig.num_views
        if plain:
            gaussians = made = reconstruct_sample(model, sample) if gaussians is None else gaussians
        else:
            # Keyed on the mouse and the level, so that a level's figures do not depend on what else is swept.
            generator = make_generator(seed, name, f"{level.factor}={level.value:g}")
            noisy = perturb(sample.cameras[: model.rig.num_views], **noise, generator=generator)
            made = reconstruct_sample(model, sample, level.views, noisy)
        if level.filters is not None:
            made = filter_gaussians(made, level.filters)
        elif plain:  # e.g. no noise, and all views, are one level: rendered once
            undisturbed = undisturbed or predict_gaussians(made, sample, splits)
            yield level, undisturbed
            continue
        yield level, predict_gaussians(made, sample, splits)


def run_sweeps(
    settings: EvaluationSettings, model: MouseFaceLift, info: dict, folders: Sequence[Path], lpips, notes: list[str],
    head: dict,
) -> str:  # fmt: skip
    """Measures every level of every factor that has values; writes metrics.json, table.md, and a plot and a sheet each.

    Returns the Markdown.
    """
    scale, rig, size = None, model.rig, model.network.config.image_tokenizer.image_size
    output, records, tables, summaries = settings.output_dir, [], [], {}
    if settings.camera_noise_mm:
        source = (settings.data.parent / "dataset.json").as_posix()
        scale, note = find_world_units_per_mm(info, settings.world_units_per_mm, source)
        notes.append(f"Camera positions: {note}.")
    if settings.camera_noise_px:
        notes.append(f"Pixels are those of the model's input, {size} x {size}.")
    sweeps = plan_sweeps({factor: getattr(settings, factor) for factor in SWEEPS}, rig, scale)
    sheets = {factor: [] for factor in sweeps}
    for folder in stoppable(tqdm(folders, desc="sweeps", unit="mouse")):
        sample, made = read(folder, model, "2"), None
        splits = splits_of(settings.stage, sample, rig)
        if settings.stage == "full":
            made = model.predict(model.generate(sample.rgba[rig.reference_view], seed=settings.seed))
        levels = predict_levels(model, sample, folder.name, sweeps, splits, seed=settings.seed, gaussians=made)
        for level, predictions in levels:
            at = {"factor": level.factor, "value": level.value, "sample": folder.name}
            records += records_of(at, {"model": predictions}, sample, rig.reference_view, lpips)
            if folder == folders[0]:  # one mouse shows what a level does
                shown, sheet = next(iter(predictions.values())), sheets[level.factor]
                sheet += [shown.rgb] if sheet else [composite(shown.truth, 1.0), shown.rgb]
    title = f"{len(folders)} mice, {', '.join(splits)}; line: mean over views, band: middle half"
    for factor, levels in sweeps.items():
        write_image(output / f"sheet_{factor}.png", grid(torch.cat(sheets[factor]), columns=len(sheets[factor][0])))
        rows, label = group_by(records, "factor")[factor,], SWEEPS[factor][1]
        groups = {value: group for (value,), group in group_by(rows, "value").items()}
        tables.append(metrics_table(label, rows, {"value": factor}).markdown())
        if factor == "num_input_views":
            used = (f"{len(level.views)}: {', '.join(map(str, level.views))}" for level in levels)
            notes.append(f"Input views used, numbered in rig order: {'; '.join(used)}.")
        summaries[factor] = [
            {
                "value": level.value, "views": list(level.views), "rotation_deg": level.rotation_deg,
                "translation_world_units": level.translation, "pixels": level.pixels,
                "filters": level.filters and asdict(level.filters), **summarise(groups[level.value]),
            }
            for level in levels
        ]  # fmt: skip
        plot(output / f"sweep_{factor}.png", title, label, {"": dict(sorted(groups.items()))}, groups, band=True)
    write_json(output / "metrics.json", head | {"sweeps": summaries, "notes": notes, "views": records})
    return write_text(output / "table.md", tables, notes)
