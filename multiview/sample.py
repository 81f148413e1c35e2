"""Sample folders (posed RGBA views of one animal at one instant) and datasets of them.

Layout (docs/data_format.md):
    sample_000000/images/cam_000.png ...      RGBA, straight alpha
    sample_000000/depth/cam_000.png ...       optional, 16 bit, camera-frame z in units of DEPTH_UNIT, 0 = no surface
    sample_000000/opencv_cameras.json         {"id", "frames": [{w, h, fx, fy, cx, cy, w2c, file_path, view?}]}
The rig's views come first, in the rig's order; extra (novel) views follow, without a `view` name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multiview.cameras import Cameras
from multiview.files import DAMAGE, atomic_folder, atomic_write, read_json, read_lines, take, write_json
from multiview.image import read_rgba, resize_rgba, write_image
from multiview.rig import ViewRig

log = logging.getLogger(__name__)

CAMERAS_FILE = "opencv_cameras.json"  # FaceLift's name and layout
DATASET_FILE = "dataset.json"
MASK_MOST = 0.95  # of an image: alpha that covers more is no mask, and would make the background part of the animal
DEPTH_UNIT = 1e-4  # world units per step of the 16-bit depth images: up to 6.55 units

MOST_INPUTS = 16  # of views without names


@dataclass(frozen=True)
class Sample:
    """rgba: [v, 4, h, w] 0..1 straight alpha. cameras: [v]. depth: [v, 1, h, w] camera-frame z, 0 = none."""

    id: str
    rgba: Tensor
    cameras: Cameras
    view_names: list[str | None]
    depth: Tensor | None = None
    folder: Path | None = None
    extra: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        count, _, *size = self.rgba.shape
        wanted = [len(self.cameras), self.cameras.height, self.cameras.width]
        if [count, *size] != wanted or len(self.view_names) != count:
            told = f"images are {[count, *size]} (views, h, w), cameras expect {wanted}"
            raise ValueError(f"sample {self.id}: {told}, view names are {len(self.view_names)}; one each per view")

    @property
    def num_inputs(self) -> int:
        """Posed views to reconstruct from: those with a name, which novel views lack; the first MOST_INPUTS where none
        has one."""
        return sum(name is not None for name in self.view_names) or min(len(self.view_names), MOST_INPUTS)


def read_sample(
    folder: Path | str, *, image_size: int | None = None, num_views: int | None = None,
    views: Sequence[int] | None = None, with_depth: bool = False, padded: bool = False,
) -> Sample:  # fmt: skip
    """Reads a sample folder (FaceLift's included), or its first `num_views`, or these `views` in this order; images and
    cameras resized together to image_size if given. with_depth: depth images are required. padded: images may differ in
    size; all are filled up with nothing, right and below, to the largest. Raises ValueError naming the file, also where
    a view has no mask."""
    folder = Path(folder)
    path = folder / CAMERAS_FILE
    if not path.is_file():
        raise ValueError(f"sample {folder} has no {CAMERAS_FILE}; a sample folder is expected (docs/data_format.md)")
    content = read_json(path)  # what else it holds is kept in `extra`
    frames = take(content, "frames", list, str(path))
    if num_views is not None and len(frames) < num_views:
        raise ValueError(f"sample {folder} has {len(frames)} views, {num_views} are needed")
    chosen = list(range(len(frames)))[:num_views] if views is None else list(views)
    outside = [view for view in chosen if not 0 <= view < len(frames)]
    if outside:
        raise ValueError(f"sample {folder} has {len(frames)} views, there are no views {outside}")
    frames = [frames[view] for view in chosen]  # the others are neither checked nor opened: training reads 4 of many
    cameras = Cameras.from_frames(frames, str(path), padded=padded)
    size, images, depths, names = (cameras.height, cameras.width), [], [], []
    for view, frame in zip(chosen, frames):
        where = f"{path}: frame {view}"
        file = inside(folder, take(frame, "file_path", str, where), where)
        names.append(take(frame, "view", str, where, default=None))  # FaceLift's frames have none
        read = {file: read_rgba(file)}
        if with_depth:
            read[_depth_path(folder, view)] = _read_depth(_depth_path(folder, view))
        for name, image in read.items():
            if list(image.shape[-2:]) != [frame["h"], frame["w"]]:
                told = [int(frame["h"]), int(frame["w"])]
                raise ValueError(f"{name} is {list(image.shape[-2:])} (h, w), {path} says {told}")
            missing = (0, size[1] - image.shape[-1], 0, size[0] - image.shape[-2])
            read[name] = torch.nn.functional.pad(image, missing)
        images.append(read[file])
        depths += list(read.values())[1:]
        covered = float((images[-1][3] > 0.5).float().mean())
        if covered > MASK_MOST:
            raise ValueError(
                f"{file} has no mask of the animal: its alpha covers {covered:.0%} of the image. Save it as RGBA with "
                "the animal's mask as alpha (scripts/process_mouse_data.py --segment makes masks for recordings)"
            )
    rgba, depth = torch.stack(images), torch.stack(depths) if with_depth else None
    if image_size is not None and size != (image_size, image_size):
        if cameras.height != cameras.width:  # one size for both sides would stretch the animal
            raise ValueError(f"sample {folder}: square images are expected, got {cameras.height} x {cameras.width}")
        rgba = torch.stack([resize_rgba(image, image_size) for image in images])
        cameras = cameras.resize(image_size, image_size)
        if depth is not None:
            # Nearest, not averaged: a mean of surface and nothing is a depth that exists nowhere.
            depth = torch.nn.functional.interpolate(depth, size=(image_size, image_size), mode="nearest-exact")
    extra = {key: value for key, value in content.items() if key not in ("id", "frames")}
    return Sample(str(content.get("id", folder.name)), rgba, cameras, names, depth, folder, extra)


def write_sample(folder: Path | str, sample: Sample) -> None:
    """Writes a sample folder; it appears under its name only when complete."""
    with atomic_folder(folder) as temporary:
        (temporary / "images").mkdir()
        frames = sample.cameras.to_frames()
        for index, frame in enumerate(frames):
            # Paths by position, so that a sample can be moved and read without this code.
            frame["file_path"] = f"images/cam_{index:03d}.png"
            if sample.view_names[index] is not None:
                frame["view"] = sample.view_names[index]
            write_image(temporary / frame["file_path"], sample.rgba[index])
        if sample.depth is not None:
            (temporary / "depth").mkdir()
            for index, depth in enumerate(sample.depth):
                steps = (depth[0].double() / DEPTH_UNIT).round().clamp(0, 65535).numpy().astype(np.uint16)
                Image.fromarray(steps).save(_depth_path(temporary, index), compress_level=4)
        write_json(temporary / CAMERAS_FILE, {"id": sample.id, **sample.extra, "frames": frames})


def is_complete_sample(folder: Path | str) -> bool:
    """A folder written by `write_sample` is complete when it exists: it is renamed into place."""
    return (Path(folder) / CAMERAS_FILE).is_file()  # no image is opened: an import asks this for thousands


def read_split(list_file: Path | str) -> list[Path]:
    """Reads the sample folders of a split list, one per line, relative to it; other paths are refused."""
    list_file = _existing(list_file)
    folders = [inside(list_file.parent, line, f"split list {list_file}") for line in read_lines(list_file)]
    if not folders:
        raise ValueError(f"split list {list_file} is empty")
    return folders


def check_names(folders: Sequence[Path]) -> None:
    """Raises ValueError where two sample folders have one name, under which their results would be written."""
    if len({folder.name for folder in folders}) != len(folders):
        raise ValueError("several samples of the list have one name: their results would overwrite each other")


def _existing(list_file: Path | str) -> Path:
    if not Path(list_file).is_file():
        made = "make a dataset with scripts/make_synthetic_mouse.py or scripts/process_mouse_data.py"
        raise ValueError(f"split list {list_file} does not exist; {made}, or name its data_mouse_train.txt")
    return Path(list_file)


def write_split(list_file: Path | str, folders: list[Path | str]) -> None:
    """Writes sample folders relative to the list file, atomically."""
    with atomic_write(list_file) as temporary:
        # Relative to the list, so that a dataset can be moved; forward slashes, so that it can be moved anywhere.
        lines = [Path(os.path.relpath(folder, Path(list_file).parent)).as_posix() for folder in folders]
        temporary.write_text("".join(f"{line}\n" for line in lines))


def write_complete(list_file: Path, folders: Sequence[Path]) -> int:
    """Writes those of the sample folders that are complete, and returns their number; several processes may do so."""
    listed: list[Path] | None = None
    while True:  # until it is true: another process may finish a sample meanwhile
        complete = [folder for folder in folders if is_complete_sample(folder)]
        if complete == listed:
            return len(complete)
        write_split(list_file, complete)
        listed = complete


def write_dataset_info(folder: Path | str, rig: ViewRig, **parameters) -> None:
    """Writes `dataset.json`: the rig and whatever made the data (JSON values)."""
    write_json(Path(folder) / DATASET_FILE, {"rig": rig.to_dict(), **parameters})


def split_lists(folder: Path | str) -> tuple[Path, Path]:
    """Returns the paths of a dataset folder's training and validation list."""
    return Path(folder) / "data_mouse_train.txt", Path(folder) / "data_mouse_val.txt"


def read_dataset_info(folder: Path | str) -> dict:
    """Reads `dataset.json` of a dataset folder, or beside a split list; the value under `rig` becomes a ViewRig."""
    folder = Path(folder) if Path(folder).is_dir() else _existing(folder).parent
    path = folder / DATASET_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: a dataset carries its view rig there. To adopt a folder made elsewhere, state its "
            f"rig once: python scripts/stamp_rig.py --rig facelift6 --path {folder}"
        )
    content = read_json(path)
    return {**content, "rig": ViewRig.from_dict(take(content, "rig", dict, str(path)), str(path))}


def open_dataset(folder: Path, rig: ViewRig, parameters: dict) -> None:
    """Starts a dataset folder, or continues one made with the same rig and parameters (JSON values); refuses any other.
    The example dataset is moved aside to <folder>_example, so that the README's commands work in a clone."""
    has_info = (folder / DATASET_FILE).is_file()
    # Hidden names are locks and halves of writes: another process may be about to start the very same dataset.
    if not has_info and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and has no {DATASET_FILE}; name a new --output_dir")
    present = read_dataset_info(folder) if has_info else {}
    if present.get("example"):  # tracked by git: it is moved, never written into
        aside = folder.with_name(f"{folder.name}_example")
        if aside.exists():
            raise ValueError(f"{folder} holds the example dataset and {aside} exists already; name a new --output_dir")
        log.info("%s holds the example dataset: moved to %s", folder, aside)
        folder.rename(aside)
    if not has_info or present.get("example"):
        write_dataset_info(folder, rig, **parameters)
        return
    # Two halves of a dataset made differently would look like one.
    differences = rig.differences(present.pop("rig"))
    for key in sorted({*parameters, *present}):
        there, wanted = present.get(key), parameters.get(key)
        differences += [f"{key}: {there} there, {wanted} asked for"] if there != wanted else []
    if differences:
        raise ValueError(
            f"{folder} holds a dataset made with other parameters ({'; '.join(differences)}); "
            "name a new --output_dir, or repeat the command with the parameters of its dataset.json"
        )


def inside(folder: Path, relative: str, where: str) -> Path:
    """Returns folder / relative, refused where its text leads out of the folder (sample files come from strangers).
    Links are followed: the user made them, and Hugging Face's cache consists of them."""
    parts = relative.split("/")  # what the system itself refuses would be an error without the file's name
    if not relative or "\0" in relative or max(map(len, parts)) > 255:
        raise ValueError(f"{where} holds {relative[:60]!r}, a path is expected")
    if os.path.isabs(relative):
        raise ValueError(f"{where} holds the absolute path {relative}; paths are relative, so that data can be moved")
    if os.path.normpath(relative).split(os.sep)[0] == "..":
        raise ValueError(f"{where}: the path {relative!r} leads out of {folder}")
    return folder / relative


def _depth_path(folder: Path, index: int) -> Path:
    return folder / "depth" / f"cam_{index:03d}.png"


def _read_depth(path: Path) -> Tensor:
    """Reads a depth image [1, h, w] in world units."""
    if not path.is_file():
        raise ValueError(f"depth image {path} does not exist: synthetic mice have it (make_synthetic_mouse.py --depth)")
    try:
        with Image.open(path) as image:
            steps = np.asarray(image)
    except DAMAGE as error:
        raise ValueError(f"depth image {path} cannot be read: {error or type(error).__name__}") from error
    if steps.ndim != 2:  # a colored picture of depth has no unit
        raise ValueError(f"depth image {path} must be gray with 16 bits, got {list(steps.shape)}")
    return torch.from_numpy(steps.astype(np.float32))[None] * DEPTH_UNIT
