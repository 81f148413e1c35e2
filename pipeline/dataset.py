"""Stage 1 over a dataset: sample folders whose rig views are generated, with the rig's own cameras."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from multiview.cameras import Cameras
from multiview.image import composite, resize_rgba
from multiview.metrics import mask_from_white, view_consistency
from multiview.rig import ViewRig
from multiview.run import seed_from
from multiview.sample import (
    DATASET_FILE,
    Sample,
    is_complete_sample,
    open_dataset,
    read_dataset_info,
    read_sample,
    read_split,
    write_dataset_info,
    write_sample,
    write_split,
)
from pipeline import MouseFaceLift

POSE_TOLERANCE = 2e-3  # world units and image widths: a camera that is the rig's own, up to rounding
REFERENCE_TOLERANCES = {"elevation, degrees": 5.0, "distance, relative": 0.15, "focal length, relative": 0.1}


@dataclass(frozen=True)
class Job:
    """One sample to generate, under a new name: view `reference` of the sample folder `source` is the photograph."""

    source: Path
    reference: int
    name: str


@dataclass(frozen=True)
class Recipe:
    """What decides a generated sample besides the weights. seed: of the dataset; each sample derives its own from it.

    true_views: which of the source's own images follow the generated ones, for Stage 2 to aim at: `none`, the `novel`
    ones (in no rig view), or `all` but the photograph.
    """

    seed: int
    keep_input_view: bool = True
    true_views: str = "none"

    def sample_seed(self, name: str) -> int:
        return seed_from("synthetic data", self.seed, name)


# ---- what is generated ----------------------------------------------------------------------------------------------


def make_jobs(lists: Sequence[Path], rig: ViewRig, references: str, num_samples: int | None) -> dict[Path, list[Job]]:
    """By split list: what is to be generated. references: `reference` (the rig's) or `all` (each rig view in turn)."""
    folders = {path.parent.resolve() for path in lists}
    # One dataset.json describes all lists, and each list is written under its own name.
    if len(folders) != 1 or len({path.name for path in lists}) != len(lists):
        raise ValueError(f"the split lists must be different ones of one dataset, got {', '.join(map(str, lists))}")
    if references == "all" and rig.azimuth_zero != "reference":
        raise ValueError(
            f"--references all needs a rig whose azimuths count from the input view, rig {rig.name} counts from the "
            "animal's heading: its input is always the reference view"
        )
    source_rig = read_dataset_info(lists[0].parent)["rig"]
    views = range(source_rig.num_views) if references == "all" else (source_rig.reference_view,)
    for view in views:
        check_reference(rig, source_rig, view)
    jobs = {}
    for path in lists:
        jobs[path] = [
            Job(folder, view, folder.name if references != "all" else f"{folder.name}_ref{view}")
            for folder in read_split(path)[:num_samples]
            for view in views
        ]
    return jobs


def check_reference(rig: ViewRig, source: ViewRig, view: int) -> None:
    """Refuses images that are not taken as the rig's reference view is: other elevation, distance or focal length.

    The other views may stand anywhere: they are generated anew.
    """
    wanted, given = rig.views[rig.reference_view], source.views[view]
    far, distance = source.view_distance(given), rig.view_distance(wanted)
    gaps = (
        abs(given.elevation_deg - wanted.elevation_deg), abs(far / distance - 1), abs(source.focal / rig.focal - 1)
    )  # fmt: skip
    for (what, limit), gap in zip(REFERENCE_TOLERANCES.items(), gaps):
        if gap > limit:
            raise ValueError(
                f"view {given.name} of the dataset (rig {source.name}) is not taken as the reference view of rig "
                f"{rig.name} is: {what} differs by {gap:.3g}, at most {limit:g} is allowed; use a UNet of the "
                "dataset's rig, or leave --references all out"
            )


# ---- generating -----------------------------------------------------------------------------------------------------


def generate_samples(model: MouseFaceLift, jobs: Sequence[Job], recipe: Recipe) -> list[Sample]:
    """Generates a few samples together: each is what `model.generate` gives with the sample's own seed."""
    from mvdiffusion.pipelines.multiview import generate_views

    artifacts, size, rig = model.artifacts, model.image_size, model.rig
    sources = [read_sample(job.source, image_size=size, with_depth=(job.source / "depth").is_dir()) for job in jobs]
    photos = [source.rgba[job.reference] for source, job in zip(sources, jobs)]
    generated = generate_views(
        model.components, torch.stack([composite(photo, 1.0) for photo in photos]), artifacts.embeds,
        seeds=[recipe.sample_seed(job.name) for job in jobs], num_steps=artifacts.num_steps,
        guidance_scale=artifacts.guidance_scale, sampler=artifacts.options.sampler,
    ).cpu()  # fmt: skip
    # The rig's cameras, never the source's: they are what the generated views show.
    cameras, samples = rig.cameras(size), []
    for rgb, photo, source, job in zip((generated * 255).round() / 255, photos, sources, jobs):
        rgba = torch.cat([rgb, mask_from_white(rgb)], dim=1)
        if recipe.keep_input_view:
            rgba[rig.reference_view] = resize_rgba(photo, size)
        score = view_consistency(composite(rgba, 1.0), rgba[:, 3:], cameras)["score"]
        made = {
            "source": source.id, "reference": job.reference, "seed": recipe.sample_seed(job.name),
            "consistency": round(score, 4),
        }  # fmt: skip
        sample = Sample(job.name, rgba, cameras, list(rig.view_names), extra={"painted": made})
        samples.append(with_true_views(sample, rig, source, job.reference, recipe.true_views))
    return samples


def with_true_views(sample: Sample, rig: ViewRig, source: Sample, reference: int, which: str) -> Sample:
    """Returns the sample with the source's own views appended (`none`, `novel` or `all`, see Recipe).

    They are turned into the world where the photograph's camera is the rig's. A source whose reference
    camera is not the rig's own (another elevation, distance or lens) gives none: its world cannot be turned so.
    Depth comes along where the source has it and has seen every view of the rig: the true animal's, in generated views
    too, which is what Stage 2 shall make of them (its direct loss reads it where such a view shows an animal).
    """
    extra = [
        index for index, name in enumerate(source.view_names)
        if which != "none" and (name is None or (which == "all" and index != reference))
    ]  # fmt: skip
    own = sample.cameras[[rig.reference_view]]
    # A world may be turned about its axis, not tilted or scaled: only the azimuth is made equal, the rest must be.
    turn = float(own.azimuth_deg[0] - source.cameras.azimuth_deg[reference])
    turned = source.cameras.rotate(turn)
    if not extra or camera_gap(turned[[reference]], own) > POSE_TOLERANCE:
        return sample
    kept = turned[extra]
    cameras = Cameras(
        torch.cat([sample.cameras.c2w, kept.c2w]), torch.cat([sample.cameras.fxfycxcy, kept.fxfycxcy]),
        sample.cameras.height, sample.cameras.width,
    )  # fmt: skip
    rgba = torch.cat([sample.rgba, source.rgba[extra]])
    depth = None
    if source.depth is not None:
        gaps = torch.tensor([[camera_gap(turned[[a]], sample.cameras[[b]]) for a in range(len(turned))]
                             for b in range(len(sample.cameras))])  # fmt: skip
        same = gaps.argmin(1)  # any view of the source may be the photograph, so its views are the rig's in any order
        depth = source.depth[[*same.tolist(), *extra]] if (gaps.amin(1) <= POSE_TOLERANCE).all() else None
    names = sample.view_names + [None] * len(extra)
    return replace(sample, rgba=rgba, cameras=cameras, view_names=names, depth=depth)


def camera_gap(a: Cameras, b: Cameras) -> float:
    """Returns the largest difference of two cameras [1]: world units, rotation entries, image widths."""
    lens = (a.fxfycxcy / a.width - b.fxfycxcy / b.width).abs().max()
    return float(max((a.c2w - b.c2w).abs().max(), lens))


# ---- the dataset ----------------------------------------------------------------------------------------------------


def start_dataset(folder: Path, rig: ViewRig, parameters: dict) -> None:
    """Starts or continues the dataset folder; several shards may do so at the same time."""
    # A shard that started earlier may have made the folder and not yet the file: hidden names are halves of writes.
    present = folder.iterdir() if folder.is_dir() else ()
    if not (folder / DATASET_FILE).is_file() and all(path.name.startswith(".") for path in present):
        write_dataset_info(folder, rig, **parameters)  # every shard writes the same
    else:
        open_dataset(folder, rig, parameters)


def pending_batches(
    jobs: Sequence[Job], folder: Path, batch_size: int, shard: tuple[int, int]
) -> Iterator[tuple[list[Job], list[Job]]]:
    """(batch, those of it that are missing in folder) of this shard (number, count).

    Batches are cut from the list before anything is skipped, and generated whole: rounding in a batch depends on
    its size, so that a run that was interrupted, or shared out, gives the very same images.
    """
    number, count = shard
    batches = [list(jobs[first : first + batch_size]) for first in range(0, len(jobs), batch_size)]
    for batch in batches[number::count]:
        missing = [job for job in batch if not is_complete_sample(folder / job.name)]
        if missing:
            yield batch, missing


def write_batch(folder: Path, model: MouseFaceLift, batch: list[Job], missing: list[Job], recipe: Recipe) -> int:
    """Generates a batch and writes what is missing of it; returns how many true views that kept."""
    wanted, true = {job.name for job in missing}, 0
    for sample in generate_samples(model, batch, recipe):
        if sample.id in wanted:
            write_sample(folder / sample.id, sample)
            true += len(sample.rgba) - model.rig.num_views
    return true


def write_list(path: Path, jobs: Sequence[Job]) -> int:
    """Lists the complete samples; repeated until it is true, since another shard may finish meanwhile."""
    listed: list[Path] | None = None
    while True:
        complete = [path.parent / job.name for job in jobs if is_complete_sample(path.parent / job.name)]
        if complete == listed:
            return len(complete)
        listed = complete
        write_split(path, complete)


def fingerprint(paths: Iterable[Path]) -> str:
    """sha256 over the contents of weight files, 16 digits."""
    digest = hashlib.sha256()
    for path in sorted(paths):  # of contents in a fixed order: a moved or renamed folder is still the same weights
        with open(path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]
