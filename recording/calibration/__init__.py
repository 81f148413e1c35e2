"""Calibration files of raw recordings -> one `Calibration`; one module per file format, reader and writer together.

| format | file | axes, direction | pixels count from | unit | holds |
|---|---|---|---|---|---|
| mammal | new_cam.pkl | OpenCV, w2c | first pixel's center | mm | skew |
| dannce | label3d_dannce.mat | OpenCV, w2c, transposed | first pixel's center | mm | skew, k1 k2 p1 p2 k3 |
| anipose | calibration.toml | OpenCV, w2c as Rodrigues vector | first pixel's center | the board's | skew, up to k6 |
| transforms | transforms.json | OpenGL, c2w | outer corner | any | k1 k2 p1 p2 k3 |
| colmap_text, colmap_binary | cameras, images .txt, .bin | OpenCV, w2c as quaternion | outer corner | any | up to k6 |
| opencv | opencv_cameras.json | OpenCV, w2c | outer corner | `unit` | |
| blender | blender_cameras.json | OpenGL, c2w | outer corner | `unit` | |

Fields that say how a camera sees and are in no reader's list are refused unless they say nothing (`fields.Fields`).
Imports: fields <- model <- checks, readers <- here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from multiview.files import read_json
from recording.calibration import anipose, colmap, dannce, mammal, opencv, transforms
from recording.calibration.checks import check_body_length, validate
from recording.calibration.dannce import read_dannce_labels
from recording.calibration.fields import PIXEL_CENTRE
from recording.calibration.mammal import load_numpy_pickle, write_mammal_pickle
from recording.calibration.model import Calibration, valid_radius

__all__ = [
    "FILE_NAMES", "FORMATS", "PIXEL_CENTRE", "Calibration", "check_body_length", "find_calibration",
    "load_numpy_pickle", "read_calibration", "read_dannce_labels", "valid_radius", "validate", "write_calibration",
    "write_mammal_pickle",
]  # fmt: skip

FORMATS: dict[str, tuple[str, Callable]] = {  # format -> its place in a folder, its writer
    "mammal": (mammal.FILE_NAME, mammal.write_mammal_pickle),
    "dannce": (dannce.FILE_NAME, dannce.write_dannce_mat),
    "anipose": (anipose.FILE_NAME, anipose.write_anipose_toml),
    "transforms": (transforms.FILE_NAME, transforms.write_transforms),
    "colmap_text": ("colmap", partial(colmap.write_colmap, binary=False)),
    "colmap_binary": ("colmap", partial(colmap.write_colmap, binary=True)),
    "opencv": (opencv.FILE_NAME, opencv.write_opencv_json),
    "blender": (transforms.BLENDER_NAME, transforms.write_blender_json),
}
FILE_NAMES = tuple(name for name, _ in FORMATS.values() if name != "colmap")
COLMAP_FOLDERS = (".", "colmap", "sparse", "sparse/0", "colmap/sparse", "colmap/sparse/0")
EXPECTED = f"{', '.join(FILE_NAMES)} or a COLMAP model (cameras and images, .txt or .bin)"
READERS = {
    ".pkl": mammal.read_mammal_pickle, ".pickle": mammal.read_mammal_pickle, ".mat": dannce.read_dannce_mat,
    ".toml": anipose.read_anipose_toml, ".txt": colmap.read_colmap, ".bin": colmap.read_colmap,
}  # fmt: skip
JSON_READERS = (  # the list of cameras, the key that tells whose it is
    ("frames", "transform_matrix", transforms.read_transforms), ("frames", "w2c", opencv.read_opencv_json),
    ("cameras", "matrix_world", transforms.read_blender_json),
)  # fmt: skip


def find_calibration(meta_dir: Path | str) -> Path:
    """Returns the calibration of a recording: exactly one of FILE_NAMES, or a COLMAP model, in meta_dir."""
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


def read_calibration(path: Path | str, *, up: str = "z", check: bool = True) -> Calibration:
    """Reads a calibration file or a COLMAP folder, recognised by name and content; checks it, turns `up` to +z.

    check=False leaves out `checks.validate`, for looking at what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"calibration {path} does not exist; {EXPECTED} is expected")
    if path.suffix.lower() == ".json":
        content = read_json(path)
        for group, key, read in JSON_READERS:
            cameras = content.get(group)
            if isinstance(cameras, list) and any(isinstance(camera, dict) and key in camera for camera in cameras):
                calibration = read(path, content)
                break
        else:
            raise ValueError(
                f"calibration {path}: no cameras found; 'frames' with transform_matrix (NeRF) or w2c "
                "(opencv_cameras.json), or 'cameras' with matrix_world (Blender), are expected"
            )
    else:
        read = colmap.read_colmap if path.is_dir() else READERS.get(path.suffix.lower())
        if read is None:
            raise ValueError(f"calibration {path}: unknown kind; {EXPECTED} is expected")
        calibration = read(path)
    if check:
        validate(calibration)
    return calibration.with_up(up)


def write_calibration(folder: Path | str, calibration: Calibration, format: str) -> Path:
    """Writes the calibration into `folder` under the format's own name; returns what --calibration takes.

    Raises ValueError where the format cannot hold it (lens distortion, skew, image sizes), naming what.
    """
    if format not in FORMATS:
        raise ValueError(f"calibration format must be one of {', '.join(FORMATS)}, got {format!r}")
    name, write = FORMATS[format]
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, calibration)
    return path
