"""Stage 1 over a dataset: sample folders whose rig views are generated, with the rig's own cameras."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from multiview.cameras import Cameras
from multiview.image import composite, resize_rgba
from multiview.metrics import mask_from_white, view_consistency
from multiview.rig import ViewRig
from multiview.run import seed_from, stoppable
from multiview.sample import (
    Sample,
    check_names,
    is_complete_sample,
    read_dataset_info,
    read_sample,
    read_split,
    write_complete,
    write_sample,
)
from mvdiffusion.pipelines.multiview import generate_views
from pipeline.model import MouseFaceLift

POSE_TOLERANCE = 2e-3  # world units and image widths: a camera that is the rig's own, up to rounding
REFERENCE_TOLERANCES = {"elevation, degrees": 5.0, "distance, relative": 0.15, "focal length, relative": 0.1}


class Job(NamedTuple):
    """One sample to generate, under a new name: view `reference` of the sample folder `source` is the photograph."""

    source: Path
    reference: int
    name: str
    seed: int  # depends on the dataset's and the name alone


def make_jobs(
    lists: Sequence[Path], rig: ViewRig, references: str, num_samples: int | None, seed: int
) -> dict[Path, list[Job]]:
    """By split list: what is to be generated. references: `reference` (the rig's) or `all` (each rig view in turn).
    Raises ValueError for lists of several datasets, and for photographs that are not taken as the rig's reference view
    is (elevation, distance, focal length); the other views may stand anywhere, as they are generated anew."""
    folders = {path.parent.resolve() for path in lists}
    # One dataset.json describes all lists, and each list is written under its own name.
    if len(folders) != 1 or len({path.name for path in lists}) != len(lists):
        raise ValueError(f"the split lists must be different ones of one dataset, got {', '.join(map(str, lists))}")
    if references == "all" and rig.azimuth_zero != "reference":
        raise ValueError(
            f"--references all needs a rig whose azimuths count from the input view, rig {rig.name} counts from the "
            "animal's heading: its input is always the reference view"
        )
    source, wanted = read_dataset_info(lists[0])["rig"], rig.views[rig.reference_view]
    views = range(source.num_views) if references == "all" else (source.reference_view,)
    for given in (source.views[view] for view in views):
        far = source.view_distance(given) / rig.view_distance(wanted)
        gaps = (abs(given.elevation_deg - wanted.elevation_deg), abs(far - 1), abs(source.focal / rig.focal - 1))
        for (what, limit), gap in zip(REFERENCE_TOLERANCES.items(), gaps):
            if gap > limit:
                raise ValueError(
                    f"view {given.name} of the dataset (rig {source.name}) is not taken as the reference view of rig "
                    f"{rig.name} is: {what} differs by {gap:.3g}, at most {limit:g} is allowed; use a UNet of the "
                    "dataset's rig, or leave --references all out"
                )
    jobs: dict[Path, list[Job]] = {path: [] for path in lists}
    samples = [(path, folder) for path in lists for folder in read_split(path)[:num_samples]]
    check_names([folder for _, folder in samples])
    for path, folder, view in ((*pair, view) for pair in samples for view in views):
        name = folder.name if references != "all" else f"{folder.name}_ref{view}"
        jobs[path].append(Job(folder, view, name, seed_from("synthetic data", seed, name)))
    return jobs


def generate_samples(
    model: MouseFaceLift, jobs: Sequence[Job], *, keep_input_view: bool = True, true_views: str = "none"
) -> list[Sample]:
    """Generates a few samples together: each is what `model.generate` gives with its own seed. true_views: which of
    the source's own images follow, for Stage 2 to aim at, see `with_true_views`."""
    artifacts, size, rig = model.artifacts, model.image_size, model.rig
    sources = [read_sample(job.source, image_size=size, with_depth=(job.source / "depth").is_dir()) for job in jobs]
    photos = [source.rgba[job.reference] for source, job in zip(sources, jobs)]
    generated = generate_views(
        model.components, torch.stack([composite(photo, 1.0) for photo in photos]), artifacts.embeds,
        seeds=[artifacts.draws(job.seed) for job in jobs], num_steps=artifacts.num_steps,
        guidance_scale=artifacts.guidance_scale, sampler=artifacts.options.sampler,
    ).cpu()  # fmt: skip
    # The rig's cameras, never the source's: they are what the generated views show.
    cameras, samples = rig.cameras(size), []
    for rgb, photo, source, job in zip((generated * 255).round() / 255, photos, sources, jobs):
        rgba = torch.cat([rgb, mask_from_white(rgb)], dim=1)
        if keep_input_view:
            rgba[rig.reference_view] = resize_rgba(photo, size)
        score = view_consistency(composite(rgba, 1.0), rgba[:, 3:], cameras)["score"]
        made = {"source": source.id, "reference": job.reference, "seed": job.seed, "consistency": round(score, 4)}
        sample = Sample(job.name, rgba, cameras, list(rig.view_names), extra={"painted": made})
        samples.append(with_true_views(sample, rig, source, job.reference, true_views))
    return samples


def with_true_views(sample: Sample, rig: ViewRig, source: Sample, reference: int, which: str) -> Sample:
    """Returns the sample with views of its source appended: `none`, `novel` ones (in no rig view), `all` but the input.

    They are turned into the world where the photograph's camera is the rig's; a source whose reference camera is not
    the rig's own (elevation, distance, lens) gives none. Depth comes along where the source has it and has seen every
    view of the rig: the true animal's, in generated views too, which is what Stage 2 shall make of them.
    """
    extra = [
        index for index, name in enumerate(source.view_names)
        if which != "none" and (name is None or (which == "all" and index != reference))
    ]  # fmt: skip
    own = sample.cameras[[rig.reference_view]]
    # A world may be turned about its axis, not tilted or scaled: only the azimuth is made equal, the rest must be.
    turned = source.cameras.rotate(float(own.azimuth_deg[0] - source.cameras.azimuth_deg[reference]))
    if not extra or _camera_gaps(own, turned[[reference]]) > POSE_TOLERANCE:
        return sample
    kept, depth = turned[extra], None
    c2w, lenses = (torch.cat([getattr(c, name) for c in (sample.cameras, kept)]) for name in ("c2w", "fxfycxcy"))
    cameras = replace(sample.cameras, c2w=c2w, fxfycxcy=lenses)
    if source.depth is not None:
        # Any view of the source may be the photograph, so its views are the rig's in any order.
        gaps, same = _camera_gaps(sample.cameras, turned).min(1)
        depth = source.depth[[*same.tolist(), *extra]] if (gaps <= POSE_TOLERANCE).all() else None
    rgba, names = torch.cat([sample.rgba, source.rgba[extra]]), sample.view_names + [None] * len(extra)
    return replace(sample, rgba=rgba, cameras=cameras, view_names=names, depth=depth)


def _camera_gaps(a: Cameras, b: Cameras) -> torch.Tensor:
    """Returns the largest difference of cameras [n] and [m], [n, m]: world units, rotation entries, image widths."""
    values = [torch.cat([c.c2w.flatten(1), c.fxfycxcy / c.width], dim=1) for c in (a, b)]
    return torch.cdist(*values, p=torch.inf)


def generate_list(
    path: Path, jobs: Sequence[Job], model: MouseFaceLift, batch_size: int, shard: tuple[int, int], **kept: Any
) -> tuple[int, int, int]:
    """Generates what this shard (number, count) lacks beside the split list `path`, then lists what is complete.

    kept: see `generate_samples`. Returns how many samples are listed, were generated now, and how many true views these
    kept. Batches are cut from the list before anything is skipped, and generated whole: rounding in a batch depends on
    its size, so that a run that was interrupted, or shared out, gives the very same images.
    """
    (number, count), folder, made, true = shard, path.parent, 0, 0
    batches = [jobs[first : first + batch_size] for first in range(0, len(jobs), batch_size)][number::count]
    missing = {job.name for batch in batches for job in batch if not is_complete_sample(folder / job.name)}
    with tqdm(total=len(missing), desc=f"{path.name} {number}/{count}", unit="sample", disable=None) as bar:
        for batch in stoppable([batch for batch in batches if any(job.name in missing for job in batch)]):
            for sample in generate_samples(model, batch, **kept):
                if sample.id in missing:
                    write_sample(folder / sample.id, sample)
                    made, true = made + 1, true + len(sample.rgba) - model.rig.num_views
                    bar.update()
    return write_complete(path, [folder / job.name for job in jobs]), made, true
