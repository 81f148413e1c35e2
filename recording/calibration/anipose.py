"""Anipose's calibration.toml (aniposelib): one table per camera, [cam_0], [cam_1], ..., and [metadata].

rotation: Rodrigues vector of R, translation: T, X_cam = R X + T with OpenCV's axes; matrix: K; distortions: OpenCV's k1
k2 p1 p2 k3 (or fewer, or k4 k5 k6 behind); size: width, height. OpenCV made it, so pixel centres count from 0 and the
principal point gets half a pixel here. The length unit is the calibration board's, which the file does not say.
Cameras are taken in the order of their tables' names (cam_2 before cam_10).
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np

from recording.calibration.fields import (
    PIXEL_CENTRE,
    lens_table,
    matrix,
    natural_key,
    picture_size,
    rigid,
    shifted,
    vector,
)
from recording.calibration.model import Calibration

FILE_NAME = "calibration.toml"
FIELDS = ("matrix", "rotation", "translation")


def read_anipose_toml(path: Path | str) -> Calibration:
    from scipy.spatial.transform import Rotation

    try:
        content = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    keys = sorted(
        (key for key, value in content.items() if key != "metadata" and isinstance(value, dict)), key=natural_key
    )
    if not keys:
        raise ValueError(f"{path} has no cameras; tables [cam_0], [cam_1], ... with {', '.join(FIELDS)} are expected")
    K, w2c, distortion, sizes, names = [], [], [], [], []
    for key in keys:
        camera, what = content[key], f"{path}: [{key}]"
        missing = [field for field in FIELDS if field not in camera]
        if missing:
            raise ValueError(f"{what} lacks {', '.join(missing)}")
        if camera.get("fisheye", False):
            raise ValueError(f"{what}: fisheye lenses are not supported; undistort the videos, then write a pinhole K")
        K.append(shifted(matrix(camera["matrix"], (3, 3), f"{what}: matrix"), PIXEL_CENTRE))
        turn = vector(camera["rotation"], 3, f"{what}: rotation (a Rodrigues vector)")
        w2c.append(rigid(Rotation.from_rotvec(turn).as_matrix(), camera["translation"], what))
        row = camera.get("distortions", [])
        distortion.append(matrix(np.ravel(np.array(row, dtype=object)), (np.size(row),), f"{what}: distortions"))
        size = camera.get("size")
        sizes.append(None if size is None else picture_size(*vector(size, 2, f"{what}: size"), what))
        names.append(str(camera.get("name", key)))
    return Calibration(
        np.array(K), np.array(w2c), lens_table(distortion, str(path)), tuple(sizes), str(path), names=tuple(names)
    )


def write_anipose_toml(path: Path | str, calibration: Calibration) -> None:
    from scipy.spatial.transform import Rotation

    calibration.require(path)
    lines = []
    for index, K in enumerate(shifted(calibration.K, -PIXEL_CENTRE)):
        w2c = calibration.w2c[index]
        lines += [f"[cam_{index}]", f"name = {json.dumps(calibration.name(index, '{0}'))}"]
        if calibration.sizes[index] is not None:
            lines.append(f"size = {list(calibration.sizes[index])}")
        lines += [
            f"matrix = {K.tolist()}",
            f"distortions = {calibration.distortion[index].tolist()}",
            f"rotation = {Rotation.from_matrix(w2c[:3, :3]).as_rotvec().tolist()}",
            f"translation = {w2c[:3, 3].tolist()}",
            "",
        ]
    Path(path).write_text("\n".join([*lines, "[metadata]", ""]))
