"""One-factor sweeps: how much calibration errors and fewer input views cost, and which Gaussians to filter away.

Noise changes the cameras that the model is told, never those that the result is rendered from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from evaluation import SWEEPS, EvaluationSettings
from evaluation.methods import Prediction, predict_gaussians, read, reconstruct, records_of, splits_of
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
FILTERS = ("min_opacity", "max_scaling")  # fields of FilterSettings


def plan_sweeps(values: Mapping[str, Sequence[float]], rig: ViewRig, world_units_per_mm: float | None) -> list[dict]:
    """Returns the levels of all factors (SWEEPS) that have values, as metrics.json shows them; one factor varies in
    each, the rest is at its best: no noise, all views, no filter. pixels: of the model's input images.

    Raises ValueError for counts of views that the rig does not have.
    """
    best = {"views": list(range(rig.num_views)), "rotation_deg": 0.0, "translation_world_units": 0.0, "pixels": 0.0}
    changes = {  # factor -> what a value of it changes
        "camera_noise_deg": lambda value: {"rotation_deg": value},
        "camera_noise_mm": lambda value: {"translation_world_units": value * world_units_per_mm},
        "camera_noise_px": lambda value: {"pixels": value},
        "num_input_views": lambda value: {"views": spread_views(rig, int(value))},
        **{name: lambda value, name=name: {"filters": vars(FilterSettings(**{name: value}))} for name in FILTERS},
    }
    return [
        {"factor": factor, "value": value, **best, "filters": None, **changes[factor](value)}
        for factor, numbers in values.items() for value in numbers
    ]  # fmt: skip


def spread_views(rig: ViewRig, count: int) -> list[int]:
    """Returns `count` of the rig's views, the reference view among them, as far apart in azimuth as can be.

    As equal charges on a circle they have the least energy (sum of 1 / chord); ties go to the first in rig order.
    mouse6: 2 -> 0, 3; 3 -> 0, 2, 4; 4 -> 0, 1, 3, 4.
    """
    if not 1 <= count <= rig.num_views:
        raise ValueError(f"num_input_views must be 1 to {rig.num_views}, the views of rig {rig.name}, got {count}")
    azimuth = [math.radians(view.azimuth_deg) for view in rig.views]

    def energy(choice: tuple[int, ...]) -> float:
        chords = (abs(2 * math.sin((azimuth[a] - azimuth[b]) / 2)) for a, b in itertools.combinations(choice, 2))
        # Rounded: choices that are turned copies of one another are ties. Views above one another are at 1e6.
        return round(sum(1 / max(chord, 1e-6) for chord in chords), 9)

    choices = itertools.combinations(range(rig.num_views), count)
    return list(min((choice for choice in choices if rig.reference_view in choice), key=energy))


def find_world_units_per_mm(info: dict, given: float | None, source: str) -> tuple[float, str]:
    """Returns world units per mm of a dataset, and what that rests on. info: its dataset.json. given: by the user.
    Raises ValueError where nothing says it, or the calibration's format does not fix its unit as mm."""
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
    model: MouseFaceLift, sample: Sample, name: str, levels: Sequence[dict], views: list[int], *, seed: int,
    gaussians: Gaussians | None = None,
) -> Iterator[tuple[dict, Prediction]]:  # fmt: skip
    """Yields one sample's `views` at every level. The noise depends on (seed, name, level) alone. gaussians: those of
    the undisturbed model, where they are made already (both stages'); else Stage 2 makes them."""
    undisturbed = None
    for level in levels:
        noise = {"rotation_deg": level["rotation_deg"], "pixels": level["pixels"]}
        noise["translation"] = level["translation_world_units"]
        plain = not any(noise.values()) and len(level["views"]) == model.rig.num_views
        if plain:
            gaussians = made = reconstruct(model, sample) if gaussians is None else gaussians
        else:
            # Keyed on the mouse and the level, so that a level's figures do not depend on what else is swept.
            generator = make_generator(seed, name, f"{level['factor']}={level['value']:g}")
            noisy = perturb(sample.cameras[: model.rig.num_views], **noise, generator=generator)
            made = reconstruct(model, sample, level["views"], noisy)
        if level["filters"]:
            made = filter_gaussians(made, FilterSettings(**level["filters"]))
        elif plain:  # e.g. no noise, and all views, are one level: rendered once
            undisturbed = undisturbed or predict_gaussians(made, sample, views)
            yield level, undisturbed
            continue
        yield level, predict_gaussians(made, sample, views)


def run_sweeps(
    settings: EvaluationSettings, model: MouseFaceLift, info: dict, folders: Sequence[Path], lpips, notes: list[str],
    head: dict,
) -> str:  # fmt: skip
    """Measures every level of every factor that has values; writes tables, plots and sheets, returns the Markdown."""
    scale, rig, size = None, model.rig, model.network.config.image_tokenizer.image_size
    output, records, tables, summaries, sheets = settings.output_dir, [], [], {}, {}
    if settings.camera_noise_mm:
        source = (settings.data.parent / "dataset.json").as_posix()
        scale, note = find_world_units_per_mm(info, settings.world_units_per_mm, source)
        notes.append(f"Camera positions: {note}.")
    if settings.camera_noise_px:
        notes.append(f"Pixels are those of the model's input, {size} x {size}.")
    levels = plan_sweeps({factor: getattr(settings, factor) for factor in SWEEPS}, rig, scale)
    for folder in stoppable(tqdm(folders, desc="sweeps", unit="mouse")):
        sample, made = read(folder, model, "2"), None
        splits = splits_of(settings.stage, sample, rig)
        views = sum(splits.values(), [])
        if settings.stage == "full":
            made = model.predict(model.generate(sample.rgba[rig.reference_view], seed=settings.seed))
        predicted = predict_levels(model, sample, folder.name, levels, views, seed=settings.seed, gaussians=made)
        for level, prediction in predicted:
            at = {"factor": level["factor"], "value": level["value"], "sample": folder.name}
            records += records_of(at, {"model": prediction}, sample, splits, rig.reference_view, lpips)
            if folder == folders[0]:  # one mouse shows what a level does
                shown = next(iter(splits.values()))
                sheet = sheets.setdefault(level["factor"], [composite(sample.rgba[shown], 1.0)])
                sheet.append(prediction.rgb[: len(shown)])
    title = f"{len(folders)} mice, {', '.join(splits)}; line: mean over views, band: middle half"
    for (factor,), of_factor in group_by(levels, "factor").items():
        write_image(output / f"sheet_{factor}.png", grid(torch.cat(sheets[factor]), columns=len(sheets[factor][0])))
        rows, label = group_by(records, "factor")[factor,], SWEEPS[factor][1]
        groups = {value: group for (value,), group in group_by(rows, "value").items()}
        tables.append(metrics_table(label, rows, {"value": factor}))
        if factor == "num_input_views":
            used = (f"{len(level['views'])}: {', '.join(map(str, level['views']))}" for level in of_factor)
            notes.append(f"Input views used, numbered in rig order: {'; '.join(used)}.")
        shown = [{key: value for key, value in level.items() if key != "factor"} for level in of_factor]
        summaries[factor] = [level | summarise(groups[level["value"]]) for level in shown]
        plot(output / f"sweep_{factor}.png", title, label, {"": dict(sorted(groups.items()))}, groups, band=True)
    write_json(output / "metrics.json", head | {"sweeps": summaries, "notes": notes, "views": records})
    return write_text(output / "table.md", tables, notes)
