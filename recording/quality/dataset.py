"""Finding the samples of any dataset and measuring them in several processes."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multiview.rig import ViewRig
from multiview.sample import CAMERAS_FILE, DATASET_FILE, read_dataset_info, read_sample, read_split
from recording.quality.measure import Measured, measure_sample

MOST_VIEWS = 12  # looked at where no rig says how many belong to one


@dataclass(frozen=True)
class Found:
    """Where a dataset's samples are. rig: None if it states none. notes: what is unusual about how they were listed."""

    folders: list[Path]
    rig: ViewRig | None
    info: dict
    notes: list[str]


def find_samples(data: Path) -> Found:
    """data: a split list (FaceLift's with absolute paths or camera files too), a dataset folder, or one sample."""
    if data.is_file():
        folders, notes = read_list(data)
        root = data.parent
    elif (data / CAMERAS_FILE).is_file():
        folders, notes, root = [data], [], data.parent
    elif data.is_dir():
        folders = sorted(path.parent for path in data.glob(f"*/{CAMERAS_FILE}"))
        notes, root = [], data
        if not folders:
            raise ValueError(
                f"--data {data} holds no sample folder (<sample>/{CAMERAS_FILE} and its pictures); name a dataset "
                "folder, a sample folder or a split list"
            )
    else:
        raise ValueError(f"--data {data} does not exist; name a dataset folder, a sample folder or a split list")
    info = read_dataset_info(root) if (root / DATASET_FILE).is_file() else {}
    return Found(folders, info.pop("rig", None), info, notes)


def read_list(path: Path) -> tuple[list[Path], list[str]]:
    """Sample folders of a list. Absolute paths and lines that name the camera file are followed, and noted."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path} is not a text file with one sample folder per line: {error}") from error
    if not any(os.path.isabs(line) or line.endswith(".json") for line in lines):
        return read_split(path), []
    folders, notes = [], []
    for line in lines:
        place = path.parent / line  # an absolute line replaces the parent
        folders.append(place.parent if place.name == CAMERAS_FILE else place)
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise ValueError(
            f"{path} names {len(missing)} of {len(folders)} sample folders that are not there, the first is "
            f"{missing[0]}; was the dataset moved? Write the list with paths relative to itself"
        )
    if any(os.path.isabs(line) for line in lines):
        notes.append("absolute_paths")
    if any(line.endswith(".json") for line in lines):
        notes.append("camera_files")
    return folders, notes


def choose_evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` indices, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


def measure_folders(
    folders: list[Path], *, num_views: int | None, workers: int, progress: bool = False
) -> tuple[list[Measured], dict[str, str]]:
    """Figures of all readable samples in order, and per unreadable one why. num_views: None takes what is there."""
    from tqdm import tqdm

    jobs = [(folder, num_views) for folder in folders]
    options = {"total": len(jobs), "desc": "samples", "unit": "sample", "disable": None if progress else True}
    if workers == 1:
        results = [_measure(job) for job in tqdm(jobs, **options)]
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the workers, before they import torch
        with multiprocessing.get_context("spawn").Pool(workers, _one_thread) as pool:
            results = list(tqdm(pool.imap(_measure, jobs, chunksize=4), **options))
    measured = [result for result in results if isinstance(result, Measured)]
    broken = {str(job[0]): result for job, result in zip(jobs, results, strict=True) if isinstance(result, str)}
    return measured, broken


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _measure(job: tuple[Path, int | None]) -> Measured | str:
    """The figures, or what keeps the sample from being read: a broken sample is a finding, not the end."""
    folder, num_views = job
    try:
        sample = read_sample(folder, num_views=num_views)
        if num_views is None and len(sample.view_names) > MOST_VIEWS:
            sample = read_sample(folder, num_views=MOST_VIEWS)
        return measure_sample(sample)
    except (ValueError, OSError) as error:
        return str(error)
