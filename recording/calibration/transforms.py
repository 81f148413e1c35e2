"""transforms.json of NeRF, instant-ngp, nerfstudio and Blender's NeRF exporters.

frames[].transform_matrix is camera to world with OpenGL's axes (y up, z backward), turned to OpenCV's here. Intrinsics
stand per frame or for the whole file: fl_x, fl_y, cx, cy, w, h, k1, k2, p1, p2 (k3), or camera_angle_x (and _y) alone,
the full angle over the picture's width. cx, cy count from the outer corner, as instant-ngp and COLMAP do. Where w and h
are missing they come from the picture a frame names, or else from the videos (`Calibration.with_sizes`).

Frames of a camera that did not move (same matrix, same intrinsics) are one camera, at the place of the first. Cameras
stand in the order of the numbers at the end of their file names where all have one, else in the file's order.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from multiview.files import write_json
from recording.calibration.fields import (
    COEFFICIENTS,
    from_c2w,
    intrinsics,
    lens_table,
    number,
    picture_size,
    read_json,
    to_c2w,
)
from recording.calibration.model import Calibration

FILE_NAME = "transforms.json"
PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")


def is_transforms(content: dict) -> bool:
    frames = content.get("frames")
    return isinstance(frames, list) and bool(frames) and isinstance(frames[0], dict) and "transform_matrix" in frames[0]


def read_transforms(path: Path | str) -> Calibration:
    content = read_json(path)
    shared = {key: value for key, value in content.items() if key != "frames"}
    cameras: dict[bytes, tuple] = {}
    for index, frame in enumerate(content["frames"]):
        what = f"{path}: frame {index}"
        if not isinstance(frame, dict) or "transform_matrix" not in frame:
            raise ValueError(f"{what} lacks transform_matrix")
        values = {**shared, **frame}
        _refuse_other_lenses(values, what)
        size = _size(values, Path(path), what)
        K = _intrinsics(values, size, what)
        w2c = from_c2w(frame["transform_matrix"], f"{what}: transform_matrix", opengl=True)
        lens = [number(values.get(key, 0.0), f"{what}: {key}") for key in ("k1", "k2", "p1", "p2", "k3")]
        name = str(frame.get("file_path", ""))
        key = np.concatenate([K.ravel(), w2c.ravel(), lens]).round(9).tobytes()
        cameras.setdefault(key, (K, w2c, lens, size, size is None and "fl_x" not in values, name))
    K, w2c, lenses, sizes, fractions, names = zip(*_in_order(list(cameras.values())), strict=True)
    if len(set(fractions)) != 1:
        raise ValueError(f"{path}: some cameras state their picture size and others do not; give w, h for all or none")
    return Calibration(
        np.array(K), np.array(w2c), lens_table(list(lenses), str(path)), sizes, str(path),
        names=names if all(names) else (), relative=fractions[0],
    )  # fmt: skip


def write_transforms(path: Path | str, calibration: Calibration) -> None:
    """Raises ValueError for skew and k4..k6, which the format cannot hold."""
    calibration.require(path, skew=False, rational=False)
    frames = []
    for index, (K, w2c) in enumerate(zip(calibration.K, calibration.w2c, strict=True)):
        frame = {"file_path": f"images/cam_{index:03d}.png"}
        if calibration.sizes[index] is not None:
            frame |= dict(zip(("w", "h"), calibration.sizes[index], strict=True))
        frame |= {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2], "cy": K[1, 2]}
        frame |= dict(zip(COEFFICIENTS[:5], calibration.distortion[index].tolist(), strict=True))
        frames.append({**frame, "transform_matrix": to_c2w(w2c, opengl=True).tolist()})
    write_json(Path(path), {"camera_model": "OPENCV", "frames": frames})


def _refuse_other_lenses(values: dict, what: str) -> None:
    model = str(values.get("camera_model", "OPENCV")).upper()
    if model not in PINHOLES or values.get("is_fisheye", False):
        model = "is_fisheye" if values.get("is_fisheye", False) else model
        raise ValueError(f"{what}: camera model {model} is not supported; expected one of {', '.join(PINHOLES)}")


def _size(values: dict, path: Path, what: str) -> tuple[int, int] | None:
    if "w" in values and "h" in values:
        return picture_size(values["w"], values["h"], what)
    name = values.get("file_path")
    if not isinstance(name, str):
        return None
    for candidate in (path.parent / name, path.parent / f"{name}.png"):  # Blender's exporters leave .png out
        if candidate.is_file() and candidate.suffix.lower() in (".png", ".jpg", ".jpeg"):
            from PIL import Image

            with Image.open(candidate) as picture:
                return picture.size
    return None


def _intrinsics(values: dict, size: tuple[int, int] | None, what: str) -> np.ndarray:
    """[3, 3] in pixels; where only an angle is known and no picture size, in fractions (`Calibration.relative`)."""
    if "fl_x" in values:
        fx = number(values["fl_x"], f"{what}: fl_x")
        fy = number(values.get("fl_y", fx), f"{what}: fl_y")
        if size is None and not ("cx" in values and "cy" in values):
            raise ValueError(f"{what} needs the picture size w, h, or cx, cy (per frame or for the file)")
        width, height = size or (0, 0)
        cx, cy = values.get("cx", width / 2), values.get("cy", height / 2)
        return intrinsics(fx, fy, number(cx, f"{what}: cx"), number(cy, f"{what}: cy"))
    if "camera_angle_x" not in values:
        raise ValueError(f"{what} needs fl_x or camera_angle_x (per frame or for the file)")
    if size is None and ("cx" in values or "cy" in values or "camera_angle_y" in values):
        raise ValueError(f"{what} needs the picture size w, h beside cx, cy or camera_angle_y")
    width, height = size or (1, 1)
    fx = _focal(values["camera_angle_x"], width, f"{what}: camera_angle_x")
    fy = _focal(values["camera_angle_y"], height, f"{what}: camera_angle_y") if "camera_angle_y" in values else fx
    cx, cy = values.get("cx", width / 2), values.get("cy", height / 2)
    return intrinsics(fx, fy, number(cx, f"{what}: cx"), number(cy, f"{what}: cy"))


def _focal(angle, side: int, what: str) -> float:
    radians = number(angle, what)
    if not 0.0 < radians < math.pi:
        raise ValueError(f"{what} must be radians between 0 and pi, got {radians:.4g}")
    return 0.5 * side / math.tan(0.5 * radians)


def _in_order(cameras: list[tuple]) -> list[tuple]:
    """By the number at the end of each file name (its folder's, where the name's own repeat), if all have one."""
    paths = [Path(camera[5]) for camera in cameras]
    for parts in ([path.stem for path in paths], [path.parent.name for path in paths]):
        found = [re.search(r"(\d+)$", part) for part in parts]
        if all(found) and len({match[1] for match in found}) == len(cameras):
            numbers = [int(match[1]) for match in found]
            return [camera for _, camera in sorted(zip(numbers, cameras, strict=True), key=lambda pair: pair[0])]
    return cameras
