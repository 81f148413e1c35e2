"""Calibration files of raw recordings -> one `Calibration`, reader and writer of each format together.

docs/data_format.md has a table of the formats: axes, direction, where pixels count from, unit, lenses. Fields that say
how a camera sees and are in no reader's list are refused unless they say nothing (`model.known_fields`).
"""

from __future__ import annotations

import json
import pickle
import re
import reprlib
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from multiview.files import read_json, read_text, take, write_json
from recording.calibration import model
from recording.calibration.checks import validate
from recording.calibration.colmap import is_colmap, read_colmap, write_colmap
from recording.calibration.containers import load_mat, load_numpy_pickle
from recording.calibration.model import Calibration
from recording.calibration.transforms import read_blender_json, read_transforms, write_blender_json, write_transforms

DEEP_KEY = re.compile(r"(?:[\w\"'-]{1,99}[ \t]*\.[ \t]*){16}")  # tomllib needs minutes for a.a.a.a ... of 50,000 parts
PINHOLE = ("fx", "fy", "cx", "cy")
COLMAP_FOLDERS = (".", "colmap", "sparse", "sparse/0", "colmap/sparse", "colmap/sparse/0")


def read_mammal_pickle(path: Path) -> Calibration:
    """Reads a list (or a dict keyed 0, 1, ...) of {K, R, T[, mapx, mapy]}, X_cam = R X + T.

    K is that of the undistorted image; the remap tables are only looked at for the image size.
    """
    content = load_numpy_pickle(path)
    if not isinstance(content, (list, tuple, dict)):
        raise ValueError(f"{path}: a list or dict of cameras is expected, got {type(content).__name__}")
    keyed = content if isinstance(content, dict) else dict(enumerate(content))
    cameras, rows = {f"camera {key}": camera for key, camera in keyed.items()}, []
    places = [f"camera {index}" for index in range(len(keyed))]
    if set(cameras) != set(places):
        raise ValueError(f"{path}: a dict of cameras must be keyed 0..n-1 without a gap, got keys {list(keyed)[:8]}")
    entries, shapes = {place: cameras[place] for place in places}, {"K": (3, 3), "R": (3, 3), "T": (3,)}
    for camera, where in model.each_camera(entries, path, shapes):
        shape = getattr(camera.get("mapx"), "shape", ())
        size = model.size_of(*shape[::-1], where) if len(shape) == 2 else None
        rows.append((camera["K"], model.rigid(camera["R"], camera["T"], where), np.zeros(5), size, ""))
    return model.assemble(rows, path, unit="mm", first_pixel=model.PIXEL_CENTRE)


def write_mammal_pickle(path: Path, calibration: Calibration) -> None:
    entries = [{"K": K, "R": w2c[:3, :3].copy(), "T": w2c[:3, 3].copy()} for K, w2c, *_ in calibration.rows()]
    path.write_bytes(pickle.dumps(entries, protocol=4))


def read_dannce_mat(path: Path) -> Calibration:
    """Reads params, where K is transposed and vectors are rows, [X 1] [r; t] K, and camnames, in the order of params.

    The principal point is taken as pixel centers counted from 0, as DANNCE's and MAMMAL's own code does (MATLAB's
    calibrator nominally counts from 1: a whole pixel, the same in all views, which neither of them subtracts).
    """
    cells = load_mat(path, "params")
    if not isinstance(cells, list):
        raise ValueError(f"{path}: the variable 'params' (cell array of K, r, t, RDistort, TDistort) is missing")
    entries = {f"params{{{index}}}": cell for index, cell in enumerate(cells, 1)}
    shapes, rows = {"K": (3, 3), "r": (3, 3), "t": (3,), "RDistort": (-1,), "TDistort": (2,)}, []
    names = load_mat(path, "camnames")
    names = [""] * len(cells) if names is None or not np.size(names) else names
    named = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) == len(cells)
    if not named or (any(names) and len(set(names) - {""}) != len(cells)):
        wanted = f"a cell array of {len(cells)} different names, one per camera of params, in its order, or left out"
        raise ValueError(f"{path}: camnames must be {wanted}, got {reprlib.repr(names)}")
    for (camera, where), name in zip(model.each_camera(entries, path, shapes), names, strict=True):
        K, r, t, radial, p = (camera[key] for key in shapes)
        if len(radial) not in (2, 3):
            raise ValueError(f"{where}: RDistort must be 2 or 3 numbers, got {len(radial)}")
        rows.append((K.T, model.rigid(r.T, t, where), [*radial[:2], *p, *radial[2:]], None, name))
    return model.assemble(rows, path, unit="mm", first_pixel=model.PIXEL_CENTRE)


def read_dannce_labels(path: Path | str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns labelData as points [n, p, 3] in mm and pixels [v, n, p, 2] (outer-corner origin), nan where unlabelled.

    None where the file holds no labelled frames.
    """
    points, pixels = [], []
    cells = load_mat(path, "labelData")
    for labels in cells if isinstance(cells, list) else []:
        if not isinstance(labels, dict) or not np.size(labels.get("data_3d", [])) or "data_2d" not in labels:
            return None
        for key, width, rows in (("data_3d", 3, points), ("data_2d", 2, pixels)):
            array = np.asarray(labels[key])
            if array.ndim != 2 or array.shape[1] % width or array.dtype.kind not in "iuf":
                raise ValueError(f"{path}: labelData.{key} must be numbers [frames, {width} x points]")
            rows.append(array.astype(np.float64).reshape(len(array), -1, width))
    shapes = {array.shape[:2] for array in (*points, *pixels)}
    if len(shapes) > 1:
        raise ValueError(f"{path}: labelData has different numbers of frames or points per camera: {sorted(shapes)}")
    return (points[0], np.stack(pixels) + model.PIXEL_CENTRE) if points else None


def write_dannce_mat(path: Path, calibration: Calibration) -> None:
    from scipy.io import savemat

    params, names = (np.empty((len(calibration), 1), dtype=object) for _ in range(2))
    for index, (K, w2c, (k1, k2, p1, p2, k3), _, name) in enumerate(calibration.rows()):
        lens = {"RDistort": np.array([[k1, k2, k3]]), "TDistort": np.array([[p1, p2]])}
        params[index, 0] = {"K": K.T, "r": w2c[:3, :3].T, "t": w2c[:3, 3][None], **lens}
        names[index, 0] = name
    savemat(path, {"params": params, "camnames": names})


def read_anipose_toml(path: Path) -> Calibration:
    """Reads aniposelib's tables [cam_0], [cam_1], ..., [metadata] in their numbers' order, cam_2 before cam_10."""
    from scipy.spatial.transform import Rotation

    text = read_text(path)
    if DEEP_KEY.search(text) or len(text) > 2**20:
        raise ValueError(f"{path} is no calibration: its keys are nested too deeply, or it is longer than 1 MB")
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError, as is a number of 5000 digits
        raise ValueError(f"{path} is not valid TOML: {str(error) or type(error).__name__}") from None
    tables = [key for key, value in content.items() if isinstance(value, dict) and key != "metadata"]
    if not tables:
        raise ValueError(
            f"{path} has no cameras; tables [cam_0], [cam_1], ... with matrix, rotation, translation are expected"
        )
    entries, rows = {f"[{key}]": content[key] for key in sorted(tables, key=model.natural_key)}, []
    required, optional = {"matrix": (3, 3), "rotation": (3,), "translation": (3,)}, {"distortions": (-1,), "size": (2,)}
    for (camera, where), table in zip(model.each_camera(entries, path, required, optional), entries, strict=True):
        size = model.size_of(*camera["size"], where) if "size" in camera else None
        w2c = model.rigid(Rotation.from_rotvec(camera["rotation"]).as_matrix(), camera["translation"], where)
        name = take(camera, "name", str, where, default=table[1:-1])
        rows.append((camera["matrix"], w2c, camera.get("distortions", []), size, name))
    return model.assemble(rows, path, first_pixel=model.PIXEL_CENTRE)


def write_anipose_toml(path: Path, calibration: Calibration) -> None:
    from scipy.spatial.transform import Rotation

    lines = []
    for index, (K, w2c, lens, size, name) in enumerate(calibration.rows()):
        lines += [
            f"[cam_{index}]", f"name = {json.dumps(name)}", *([] if size is None else [f"size = {list(size)}"]),
            f"matrix = {K.tolist()}", f"distortions = {lens.tolist()}",
            f"rotation = {Rotation.from_matrix(w2c[:3, :3]).as_rotvec().tolist()}",
            f"translation = {w2c[:3, 3].tolist()}", "",
        ]  # fmt: skip
    path.write_text("\n".join([*lines, "[metadata]", ""]))


def read_opencv_json(path: Path, content: dict) -> Calibration:
    """Reads the project's own {"frames": [{"w", "h", "fx", "fy", "cx", "cy", "w2c", "file_path"?}], "unit"?}."""
    rows = []
    entries = {f"frame {index}": frame for index, frame in enumerate(content["frames"])}
    shapes = {**dict.fromkeys(("w", "h", *PINHOLE), ()), "w2c": (4, 4)}
    for index, (frame, where) in enumerate(model.each_camera(entries, path, shapes)):
        K, size = model.pinhole(*map(frame.get, PINHOLE)), model.size_of(frame["w"], frame["h"], where)
        name = take(frame, "file_path", str, where, default=str(index))
        rows.append((K, model.posed(frame["w2c"], f"{where}: w2c"), np.zeros(5), size, name))
    return model.assemble(rows, path, unit=model.unit_of(content, path))


def write_opencv_json(path: Path, calibration: Calibration) -> None:
    frames = []
    for K, w2c, _, (width, height), name in calibration.rows():
        intrinsics = {"fx": K[0, 0], "fy": K[1, 1], "cx": K[0, 2], "cy": K[1, 2]}
        frames.append({"file_path": name, "w": width, "h": height, **intrinsics, "w2c": w2c.tolist()})
    write_json(path, {"frames": frames, **({"unit": calibration.unit} if calibration.unit else {})})


# format: (its place in a folder, its writer, what it lacks, where its pixels count from, names of unnamed cameras)
FORMATS = {
    "mammal": ("new_cam.pkl", write_mammal_pickle, ("lens",), model.PIXEL_CENTRE, ""),
    "dannce": ("label3d_dannce.mat", write_dannce_mat, ("k4",), model.PIXEL_CENTRE, "Camera{1}"),
    "anipose": ("calibration.toml", write_anipose_toml, (), model.PIXEL_CENTRE, "{0}"),
    "transforms": ("transforms.json", write_transforms, ("k4", "skew"), 0.0, ""),
    "colmap_text": ("colmap", partial(write_colmap, binary=False), ("skew", "unsized"), 0.0, ""),
    "colmap_binary": ("colmap", partial(write_colmap, binary=True), ("skew", "unsized"), 0.0, ""),
    "opencv": ("opencv_cameras.json", write_opencv_json, ("lens", "skew", "unsized"), 0.0, "{0}.mp4"),
    "blender": ("blender_cameras.json", write_blender_json, ("lens", "skew", "unsized"), 0.0, "Camera.{0:03d}"),
}
READERS = {".pkl": read_mammal_pickle, ".pickle": read_mammal_pickle, ".mat": read_dannce_mat}
READERS |= {".toml": read_anipose_toml, ".txt": read_colmap, ".bin": read_colmap}
JSON_READERS = (  # the list of cameras, the key that tells whose it is; of several the last
    ("cameras", "matrix_world", read_blender_json), ("frames", "w2c", read_opencv_json),
    ("frames", "transform_matrix", read_transforms),
)  # fmt: skip
FILE_NAMES = tuple(name for name, *_ in FORMATS.values() if name != "colmap")
EXPECTED = f"{', '.join(FILE_NAMES)} or a COLMAP model (cameras and images, .txt or .bin)"


def find_calibration(meta_dir: Path | str) -> Path:
    """Returns the calibration of a recording: exactly one of FILE_NAMES, or a COLMAP model, in meta_dir."""
    meta_dir = Path(meta_dir)
    if not meta_dir.is_dir():
        raise ValueError(f"--meta_dir {meta_dir} is not a folder; it must hold the calibration and the mask videos")
    found = [meta_dir / name for name in FILE_NAMES if (meta_dir / name).is_file()]
    found += [meta_dir / name for name in COLMAP_FOLDERS if is_colmap(meta_dir / name)]
    if len(found) != 1:
        what = f"holds {', '.join(path.name for path in found)}" if found else "holds no calibration"
        remedy = f"exactly one of {EXPECTED} is expected there, or name it with --calibration"
        raise ValueError(f"--meta_dir {meta_dir} {what}; {remedy}")
    return found[0]


def read_calibration(path: Path | str, *, up: str = "z", check: bool = True) -> Calibration:
    """Reads a calibration file or a COLMAP folder, recognised by name and content; checks it, turns `up` to +z.

    check=False leaves out `checks.validate`, for looking at what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"calibration {path} does not exist; {EXPECTED} is expected")
    read, expected = read_colmap if path.is_dir() else READERS.get(path.suffix.lower()), EXPECTED
    if path.suffix.lower() == ".json":
        content = read_json(path)
        for group, key, reader in JSON_READERS:
            cameras = content.get(group)
            if isinstance(cameras, list) and any(isinstance(camera, dict) and key in camera for camera in cameras):
                read = partial(reader, content=content)
        expected = "'frames' with transform_matrix (NeRF) or w2c, or 'cameras' with matrix_world (Blender)"
    if read is None:
        what = "no cameras found" if path.suffix.lower() == ".json" else "unknown kind"
        raise ValueError(f"calibration {path}: {what}; {expected} is expected")
    calibration = read(path)
    if check:
        validate(calibration)
    return calibration.with_up(up)


def write_calibration(folder: Path | str, calibration: Calibration, format: str) -> Path:
    """Writes the calibration into `folder` under the format's own name; returns what --calibration takes."""
    if format not in FORMATS:
        raise ValueError(f"calibration format must be one of {', '.join(FORMATS)}, got {format!r}")
    name, write, lacking, first_pixel, template = FORMATS[format]
    rules = (
        (calibration.relative or ("unsized" in lacking and None in calibration.sizes),
         "needs the picture sizes (with_sizes)"),
        ("lens" in lacking and np.any(calibration.distortion), "cannot hold lens distortion"),
        ("k4" in lacking and np.any(calibration.distortion[:, 5:]), "cannot hold the coefficients k4, k5, k6"),
        ("skew" in lacking and np.any(calibration.K[:, 0, 1]), "cannot hold skew"),
    )  # fmt: skip
    lacks = " and ".join(what for wrong, what in rules if wrong)
    if lacks:
        raise ValueError(f"{name}: this format {lacks}; choose one that can (anipose)")
    path, K = Path(folder) / name, calibration.K.copy()
    path.parent.mkdir(parents=True, exist_ok=True)
    K[:, :2, 2] -= first_pixel
    names = calibration.names or tuple(template.format(index, index + 1) for index in range(len(K)))
    write(path, replace(calibration, K=K, names=names))
    return path
