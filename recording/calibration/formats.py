"""Which file is a calibration of which kind; reading and writing any of them.

| format | file | axes, direction | pixels count from | unit | holds |
|---|---|---|---|---|---|
| mammal | new_cam.pkl | OpenCV, w2c | first pixel's centre | mm | skew |
| dannce | label3d_dannce.mat | OpenCV, w2c, transposed | first pixel's centre | mm | skew, k1 k2 p1 p2 k3 |
| anipose | calibration.toml | OpenCV, w2c as Rodrigues vector | first pixel's centre | the board's | skew, up to k6 |
| transforms | transforms.json | OpenGL, c2w | outer corner | any | k1 k2 p1 p2 k3 |
| colmap_text, colmap_binary | cameras, images .txt, .bin | OpenCV, w2c as quaternion | outer corner | any | up to k6 |
| opencv | opencv_cameras.json | OpenCV, w2c | outer corner | `unit` | |
| blender | blender_cameras.json | OpenGL, c2w | outer corner | `unit` | |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from recording.calibration import anipose, blender, colmap, dannce, mammal, opencv, transforms
from recording.calibration.fields import read_json
from recording.calibration.model import Calibration

FILE_NAMES = (
    mammal.FILE_NAME, dannce.FILE_NAME, anipose.FILE_NAME, transforms.FILE_NAME, opencv.FILE_NAME, blender.FILE_NAME,
)  # fmt: skip
COLMAP_FOLDERS = (".", "colmap", "sparse", "sparse/0", "colmap/sparse", "colmap/sparse/0")
EXPECTED = f"{', '.join(FILE_NAMES)} or a COLMAP model (cameras and images, .txt or .bin)"
FORMATS: dict[str, tuple[str, Callable]] = {  # format -> its place in a folder, its writer
    "mammal": (mammal.FILE_NAME, mammal.write_mammal_pickle),
    "dannce": (dannce.FILE_NAME, dannce.write_dannce_mat),
    "anipose": (anipose.FILE_NAME, anipose.write_anipose_toml),
    "transforms": (transforms.FILE_NAME, transforms.write_transforms),
    "colmap_text": ("colmap", partial(colmap.write_colmap, binary=False)),
    "colmap_binary": ("colmap", partial(colmap.write_colmap, binary=True)),
    "opencv": (opencv.FILE_NAME, opencv.write_opencv_json),
    "blender": (blender.FILE_NAME, blender.write_blender_json),
}


def find_calibration(meta_dir: Path | str) -> Path:
    """The calibration of a recording: exactly one of FILE_NAMES, or a COLMAP model, in meta_dir."""
    meta_dir = Path(meta_dir)
    if not meta_dir.is_dir():
        raise ValueError(f"--meta_dir {meta_dir} is not a folder; it must hold the calibration and the mask videos")
    found = [meta_dir / name for name in FILE_NAMES if (meta_dir / name).is_file()]
    found += [meta_dir / name for name in COLMAP_FOLDERS if colmap.is_colmap(meta_dir / name)]
    if len(found) != 1:
        what = f"holds {', '.join(path.name for path in found)}" if found else "holds no calibration"
        raise ValueError(
            f"--meta_dir {meta_dir} {what}; exactly one of {EXPECTED} is expected there, or name it with --calibration"
        )
    return found[0]


def read_calibration(path: Path | str, *, up: str = "z", validate: bool = True) -> Calibration:
    """Reads a calibration file or a COLMAP folder, recognised by name and content; checks it, turns `up` to +z.

    validate=False leaves out `Calibration.validate`, for looking at what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"calibration {path} does not exist; {EXPECTED} is expected")
    calibration = _reader(path)(path)
    return (calibration.validate() if validate else calibration).with_up(up)


def _reader(path: Path) -> Callable[[Path], Calibration]:
    if path.is_dir() or path.name in {f"{part}{kind}" for part in colmap.PARTS for kind in colmap.KINDS}:
        return colmap.read_colmap
    if path.suffix in (".pkl", ".pickle"):
        return mammal.read_mammal_pickle
    if path.suffix == ".mat":
        return dannce.read_dannce_mat
    if path.suffix == ".toml":
        return anipose.read_anipose_toml
    if path.suffix != ".json":
        raise ValueError(f"calibration {path}: unknown kind; {EXPECTED} is expected")
    content = read_json(path)
    for is_kind, reader in (
        (transforms.is_transforms, transforms.read_transforms),
        (opencv.is_opencv, opencv.read_opencv_json),
        (blender.is_blender, blender.read_blender_json),
    ):
        if is_kind(content):
            return reader
    raise ValueError(
        f"calibration {path}: no cameras found; 'frames' with transform_matrix (NeRF) or w2c (opencv_cameras.json), or "
        "'cameras' with matrix_world (Blender), are expected"
    )


def write_calibration(folder: Path | str, calibration: Calibration, format: str) -> Path:
    """Writes the calibration into `folder` under the format's own name; returns what --calibration takes.

    Raises ValueError where the format cannot hold it (lens distortion, skew, picture sizes), naming what.
    """
    if format not in FORMATS:
        raise ValueError(f"calibration format must be one of {', '.join(FORMATS)}, got {format!r}")
    name, write = FORMATS[format]
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, calibration)
    return path
