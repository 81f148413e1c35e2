"""Blender's cameras as its Python interface names them, in one JSON file, blender_cameras.json.

{"render": {"resolution_x", "resolution_y", "resolution_percentage" = 100, "pixel_aspect_x" = 1, "pixel_aspect_y" = 1},
 "cameras": [{"name", "matrix_world" 4x4, "lens" mm, "sensor_width" = 36, "sensor_height" = 24, "sensor_fit" = "AUTO",
              "shift_x" = 0, "shift_y" = 0, "type" = "PERSP"}], "unit"?: "m"}

In Blender: `[{"name": o.name, "matrix_world": [list(r) for r in o.matrix_world], "lens": o.data.lens, ...} for o in
bpy.data.objects if o.type == "CAMERA"]`. A render setting may also stand in a camera. matrix_world is camera to world
with OpenGL's axes; its scale is ignored, as Blender does. Pixels count from the outer corner: a camera without shift
looks through width / 2. Cameras stand in the file's order. Blender's NeRF exporters write transforms.json instead.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from multiview.files import write_json
from recording.calibration.fields import from_c2w, intrinsics, matrix, number, picture_size, read_json, to_c2w
from recording.calibration.model import Calibration

FILE_NAME = "blender_cameras.json"
DEFAULTS = {
    "resolution_percentage": 100, "pixel_aspect_x": 1.0, "pixel_aspect_y": 1.0, "sensor_width": 36.0,
    "sensor_height": 24.0, "sensor_fit": "AUTO", "shift_x": 0.0, "shift_y": 0.0, "type": "PERSP",
}  # fmt: skip


def is_blender(content: dict) -> bool:
    cameras = content.get("cameras")
    return isinstance(cameras, list) and bool(cameras) and isinstance(cameras[0], dict) and "matrix_world" in cameras[0]


def read_blender_json(path: Path | str) -> Calibration:
    content = read_json(path)
    render = content.get("render", {})
    K, w2c, sizes, names = [], [], [], []
    for index, camera in enumerate(content["cameras"]):
        what = f"{path}: camera {index}"
        values = {**DEFAULTS, **(render if isinstance(render, dict) else {}), **camera}
        missing = [key for key in ("matrix_world", "lens", "resolution_x", "resolution_y") if key not in values]
        if missing:
            raise ValueError(f"{what} lacks {', '.join(missing)}")
        if values["type"] != "PERSP":
            raise ValueError(f"{what}: only perspective cameras (type PERSP) are supported, got {values['type']!r}")
        percent = number(values["resolution_percentage"], f"{what}: resolution_percentage") / 100
        size = picture_size(
            int(number(values["resolution_x"], f"{what}: resolution_x") * percent),
            int(number(values["resolution_y"], f"{what}: resolution_y") * percent), what,
        )  # fmt: skip
        K.append(_intrinsics(values, size, what))
        world = matrix(values["matrix_world"], (4, 4), f"{what}: matrix_world")
        scale = np.linalg.norm(world[:3, :3], axis=0)
        if (scale < 1e-12).any():
            raise ValueError(f"{what}: matrix_world has an axis of length 0")
        world[:3, :3] /= scale
        w2c.append(from_c2w(world, f"{what}: matrix_world", opengl=True))
        sizes.append(size)
        names.append(str(values.get("name", index)))
    return Calibration(
        np.array(K), np.array(w2c), np.zeros((len(K), 5)), tuple(sizes), str(path), unit=content.get("unit"),
        names=tuple(names),
    )  # fmt: skip


def _intrinsics(values: dict, size: tuple[int, int], what: str) -> np.ndarray:
    """Blender's projection: the sensor side that `sensor_fit` names spans the picture; shifts are in that side."""
    width, height = size
    aspect = number(values["pixel_aspect_y"], f"{what}: pixel_aspect_y") / number(
        values["pixel_aspect_x"], f"{what}: pixel_aspect_x"
    )  # of a pixel, height over width
    fit = values["sensor_fit"]
    if fit not in ("AUTO", "HORIZONTAL", "VERTICAL"):
        raise ValueError(f"{what}: sensor_fit must be AUTO, HORIZONTAL or VERTICAL, got {fit!r}")
    # AUTO fits the longer side of the picture, and measures it with sensor_width whichever it is.
    sensor = number(values["sensor_height" if fit == "VERTICAL" else "sensor_width"], f"{what}: sensor size")
    horizontal = fit == "HORIZONTAL" or (fit == "AUTO" and width >= height * aspect)
    span = width if horizontal else height * aspect  # the fitted side, in units of a pixel's width
    fx = number(values["lens"], f"{what}: lens") / sensor * span
    cx = width / 2 - number(values["shift_x"], f"{what}: shift_x") * span
    cy = height / 2 + number(values["shift_y"], f"{what}: shift_y") * span / aspect
    return intrinsics(fx, fx / aspect, cx, cy)


def write_blender_json(path: Path | str, calibration: Calibration) -> None:
    """Raises ValueError for skew, lens distortion or unknown picture sizes, which the format cannot hold."""
    calibration.require(path, distortion=False, skew=False, sizes=True)
    cameras = []
    for index, (K, w2c) in enumerate(zip(calibration.K, calibration.w2c, strict=True)):
        width, height = calibration.sizes[index]
        aspect = K[0, 0] / K[1, 1]
        cameras.append(
            {
                "name": calibration.name(index, "Camera.{0:03d}"),
                "matrix_world": to_c2w(w2c, opengl=True).tolist(),
                "resolution_x": width,
                "resolution_y": height,
                "pixel_aspect_y": aspect,
                "sensor_fit": "HORIZONTAL",
                "sensor_width": 36.0,
                "lens": 36.0 * K[0, 0] / width,
                "shift_x": 0.5 - K[0, 2] / width,
                "shift_y": (K[1, 2] - height / 2) * aspect / width,
            }  # fmt: skip
        )
    write_json(Path(path), {"cameras": cameras, **({"unit": calibration.unit} if calibration.unit else {})})
