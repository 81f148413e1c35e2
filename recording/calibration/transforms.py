"""Cameras with OpenGL's axes (y up, z backward) in JSON: transforms.json, and Blender's cameras as bpy names them.

transforms.json of NeRF, instant-ngp, nerfstudio and Blender's NeRF exporters: transform_matrix is camera to world.
Intrinsics stand per frame or for the whole file: fl_x, fl_y, cx, cy, w, h, k1, k2, p1, p2 (k3), or camera_angle_x (and
_y) alone, the full angle over the image's width. cx, cy count from the outer corner. Where w and h are missing they
come from the image a frame names, or else from the videos (`Calibration.with_sizes`).

blender_cameras.json:
{"render": {"resolution_x", "resolution_y", "resolution_percentage" = 100, "pixel_aspect_x" = 1, "pixel_aspect_y" = 1},
 "cameras": [{"name", "matrix_world" 4x4, "lens" mm, "sensor_width" = 36, "sensor_height" = 24, "sensor_fit" = "AUTO",
              "shift_x" = 0, "shift_y" = 0, "type" = "PERSP"}], "unit"?: "m"}
In Blender: `[{"name": o.name, "matrix_world": [list(r) for r in o.matrix_world], "lens": o.data.lens, ...} for o in
bpy.data.objects if o.type == "CAMERA"]`. A render setting may also stand in a camera. matrix_world is camera to world;
its scale is ignored, as Blender does. A camera without shift looks through width / 2. Cameras stand in file order.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import numpy as np

from multiview.files import damage_explained, take, write_json
from multiview.image import check_picture
from recording.calibration import model
from recording.calibration.model import Calibration

LENS = model.COEFFICIENTS[:5]
DEFAULTS = {
    "resolution_percentage": 100, "pixel_aspect_x": 1.0, "pixel_aspect_y": 1.0, "sensor_width": 36.0,
    "sensor_height": 24.0, "sensor_fit": "AUTO", "shift_x": 0.0, "shift_y": 0.0, "type": "PERSP",
}  # fmt: skip


def _from_c2w(values, what: str) -> np.ndarray:
    """Returns [4, 4] world to camera, OpenCV axes, from a camera-to-world matrix [4, 4] (or [3, 4]), OpenGL axes."""
    if isinstance(values, list) and len(values) == 3:
        values = [*values, [0.0, 0.0, 0.0, 1.0]]
    c2w = model.posed(values, what)
    w2c, R = np.eye(4), c2w[:3, :3].copy().T
    w2c[:3, :3], w2c[:3, 3] = R, -R @ c2w[:3, 3]
    return model.OPENGL @ w2c


def _to_c2w(w2c: np.ndarray) -> list[list[float]]:
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = w2c[:3, :3].T, model.centers_of(w2c)
    return (c2w @ model.OPENGL).tolist()


def read_transforms(path: Path, content: dict) -> Calibration:
    shared = {key: value for key, value in content.items() if key != "frames"}
    seen: set[str] = set()
    cameras: dict[bytes, tuple] = {}
    for index, values in enumerate(content["frames"]):
        if isinstance(values, dict):
            values = {**shared, **values}
            text = json.dumps({**values, "file_path": ""})
            if text in seen:  # of a camera that did not move there may be 100,000 frames
                continue
            seen.add(text)
        where = f"{path}: frame {index}"
        frame = model.known_fields(values, where, ("transform_matrix",), LENS)
        K, size = _intrinsics(frame, where, path)
        lens = [take(frame, key, float, where) if key in frame else 0.0 for key in LENS]
        w2c = _from_c2w(frame["transform_matrix"], f"{where}: transform_matrix")
        key = np.concatenate([K.ravel(), w2c.ravel(), lens]).round(9).tobytes()
        cameras.setdefault(key, (K, w2c, lens, size, take(frame, "file_path", str, where, default="")))
        model.check_count(len(cameras), f"{path}: of static cameras")
    rows = list(cameras.values())
    # Where only angles are said, K is in fractions of the width.
    fractions = {size is None and K[0, 2] < 1.0 for K, _, _, size, _ in rows}
    if len(fractions) != 1:
        raise ValueError(f"{path}: some cameras state their picture size and others do not; give w, h for all or none")
    # In the order of the number at the end of each file name (its folder's, where the names' own repeat), if all have.
    names = [Path(name) for *_, name in rows]
    for parts in ([name.stem for name in names], [name.parent.name for name in names]):
        ends = [re.search(r"([0-9]{1,18})$", part) for part in parts]
        if all(ends) and len({match[1] for match in ends}) == len(rows):
            rows = [rows[index] for index in sorted(range(len(rows)), key=lambda k: int(ends[k][1]))]
            break
    return model.assemble(rows, path, relative=fractions.pop())


def _intrinsics(frame: dict, where: str, path: Path) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Returns K [3, 3] in pixels and the image size; K in fractions where only an angle is known and no size."""

    def number(key: str, default: float | None = None) -> float:
        return take(frame, key, float, where) if key in frame or default is None else default

    size, focal = None, [None, None]
    if "w" in frame or "h" in frame:
        size = model.size_of(number("w"), number("h"), where)
    else:
        name = take(frame, "file_path", str, where, default="")
        for candidate in (path.parent / name, path.parent / f"{name}.png"):  # Blender's exporters leave .png out
            if size is None and candidate.suffix.lower() in (".png", ".jpg", ".jpeg") and os.path.isfile(candidate):
                with damage_explained(f"{where}: give w and h in {path.name}; the image {candidate}"):
                    size = check_picture(candidate)
    width, height = size or (1, 1)
    for axis, (key, side) in enumerate((("camera_angle_x", width), ("camera_angle_y", height))):
        if not 0.0 < number(key, 1.0) < math.pi:
            raise ValueError(f"{where}: {key} must be radians between 0 and pi, got {number(key):.4g}")
        focal[axis] = 0.5 * side / math.tan(0.5 * number(key)) if key in frame else None
    fx, fy = focal
    if "fl_x" in frame:
        fx = number("fl_x")
        fy = number("fl_y", fx)
        if size is None and not ("cx" in frame and "cy" in frame):
            raise ValueError(f"{where} needs the picture size w, h, or cx, cy (per frame or for the file)")
        if size is not None and focal[0] is not None and not 0.98 < focal[0] / fx < 1.02:
            what = f"fl_x {fx:.5g} and camera_angle_x contradict each other ({focal[0]:.5g} px at a width of {width})"
            raise ValueError(f"{where}: {what}; take out the one that is wrong")
    elif fx is None:
        raise ValueError(f"{where} needs fl_x or camera_angle_x (per frame or for the file)")
    elif size is None and ("cx" in frame or "cy" in frame or fy is not None):
        raise ValueError(f"{where} needs the picture size w, h beside cx, cy or camera_angle_y")
    center = number("cx", width / 2), number("cy", height / 2)
    return model.pinhole(fx, fx if fy is None else fy, *center), size


def write_transforms(path: Path, calibration: Calibration) -> None:
    frames = []
    for index, (K, w2c, lens, size, _) in enumerate(calibration.rows()):
        intrinsics = {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2], "cy": K[1, 2]}
        sides, lens = dict(zip("wh", size or ())), dict(zip(LENS, lens.tolist(), strict=True))
        frame = {"file_path": f"images/cam_{index:03d}.png", **sides, **intrinsics, **lens}
        frames.append({**frame, "transform_matrix": _to_c2w(w2c)})
    write_json(path, {"camera_model": "OPENCV", "frames": frames})


def read_blender_json(path: Path, content: dict) -> Calibration:
    """The side of the image that `sensor_fit` names spans the sensor; shifts are fractions of that side."""
    render = model.known_fields(content.get("render", {}), f"{path}: render", (), DEFAULTS)
    entries = {
        f"camera {index}": {**DEFAULTS, **render, **camera} if isinstance(camera, dict) else camera
        for index, camera in enumerate(content["cameras"])
    }
    rows, required = [], {"matrix_world": (4, 4), "lens": (), "resolution_x": (), "resolution_y": ()}
    optional = {key: () for key, value in DEFAULTS.items() if not isinstance(value, str)}
    for index, (camera, where) in enumerate(model.each_camera(entries, path, required, optional)):
        for key, allowed in (("type", ("PERSP",)), ("sensor_fit", ("AUTO", "HORIZONTAL", "VERTICAL"))):
            if camera[key] not in allowed:
                raise ValueError(f"{where}: {key} must be {' or '.join(allowed)}, got {camera[key]!r:.40}")
        sides = (float(int(camera[f"resolution_{side}"] * camera["resolution_percentage"] / 100)) for side in "xy")
        (width, height), fit = model.size_of(*sides, where), camera["sensor_fit"]
        world = camera["matrix_world"]
        scale = np.linalg.norm(world[:3, :3], axis=0)
        if (scale < 1e-12).any():
            raise ValueError(f"{where}: matrix_world has an axis of length 0")
        world[:3, :3] /= scale
        # AUTO fits the longer side of the image, and measures it with sensor_width whichever it is.
        side = "sensor_height" if fit == "VERTICAL" else "sensor_width"
        positive = {key: float(camera[key]) for key in ("pixel_aspect_x", "pixel_aspect_y", "lens", side)}
        if min(positive.values()) <= 0:
            raise ValueError(f"{where}: {', '.join(positive)} must be positive, got {list(positive.values())}")
        aspect = positive["pixel_aspect_y"] / positive["pixel_aspect_x"]  # of a pixel, height over width
        horizontal = fit == "HORIZONTAL" or (fit == "AUTO" and width >= height * aspect)
        span = width if horizontal else height * aspect  # the fitted side, in units of a pixel's width
        fx = positive["lens"] / positive[side] * span
        center = width / 2 - camera["shift_x"] * span, height / 2 + camera["shift_y"] * span / aspect
        w2c, name = _from_c2w(world, f"{where}: matrix_world"), take(camera, "name", str, where, default=str(index))
        rows.append((model.pinhole(fx, fx / aspect, *center), w2c, np.zeros(5), (width, height), name))
    return model.assemble(rows, path, unit=model.unit_of(content, path))


def write_blender_json(path: Path, calibration: Calibration) -> None:
    cameras = []
    for K, w2c, _, (width, height), name in calibration.rows():
        aspect = K[0, 0] / K[1, 1]
        cameras.append(
            {
                "name": name, "matrix_world": _to_c2w(w2c), "resolution_x": width, "resolution_y": height,
                "pixel_aspect_y": aspect, "sensor_fit": "HORIZONTAL", "sensor_width": 36.0,
                "lens": 36.0 * K[0, 0] / width, "shift_x": 0.5 - K[0, 2] / width,
                "shift_y": (K[1, 2] - height / 2) * aspect / width,
            }
        )  # fmt: skip
    write_json(path, {"cameras": cameras, **({"unit": calibration.unit} if calibration.unit else {})})
