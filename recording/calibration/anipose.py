"""Anipose's calibration.toml (aniposelib): one table per camera, [cam_0], [cam_1], ..., and [metadata].

rotation: Rodrigues vector of R, translation: T, X_cam = R X + T with OpenCV's axes; matrix: K; distortions: OpenCV's k1
k2 p1 p2 k3 (or fewer, or k4 k5 k6 behind); size: width, height. OpenCV made it, so pixel centers count from 0 and the
principal point gets half a pixel here. The length unit is the calibration board's, which the file does not say.
Cameras are taken in the order of their tables' names (cam_2 before cam_10).
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import numpy as np

from multiview.files import read_text
from recording.calibration.fields import (
    PIXEL_CENTRE,
    Fields,
    check_count,
    image_size,
    natural_key,
    rigid,
    shifted,
)
from recording.calibration.model import Calibration, assemble

FILE_NAME = "calibration.toml"
FIELDS = ("matrix", "rotation", "translation")
DEEP_KEY = re.compile(r"(?:[\w\"'-]{1,99}[ \t]*\.[ \t]*){16}")  # tomllib needs minutes for a.a.a.a ... of 50,000 parts


def read_anipose_toml(path: Path | str) -> Calibration:
    from scipy.spatial.transform import Rotation

    text = read_text(path)
    if DEEP_KEY.search(text) or len(text) > 2**20:
        raise ValueError(f"{path} is no calibration: its keys are nested too deeply, or it is longer than 1 MB")
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError, as is a number of 5000 digits
        raise ValueError(f"{path} is not valid TOML: {str(error) or type(error).__name__}") from None
    tables = [key for key, value in content.items() if isinstance(value, dict) and key != "metadata"]
    keys = sorted(tables, key=natural_key)
    if not keys:
        raise ValueError(f"{path} has no cameras; tables [cam_0], [cam_1], ... with {', '.join(FIELDS)} are expected")
    check_count(len(keys), path)
    rows = []
    for key in keys:
        camera = Fields(content[key], f"{path}: [{key}]", required=FIELDS)
        camera.refuse_unread((*FIELDS, "distortions"))
        turn = Rotation.from_rotvec(camera.vector("rotation", 3)).as_matrix()
        lens = camera.vector("distortions", np.size(camera.values["distortions"])) if "distortions" in camera else []
        size = image_size(*camera.vector("size", 2), camera.where) if "size" in camera else None
        w2c = rigid(turn, camera.values["translation"], camera.where)
        rows.append((shifted(camera.matrix("matrix", 3, 3), PIXEL_CENTRE), w2c, lens, size, camera.text("name", key)))
    return assemble(rows, path)


def write_anipose_toml(path: Path | str, calibration: Calibration) -> None:
    from scipy.spatial.transform import Rotation

    calibration.require(path)
    lines = []
    for index, K in enumerate(shifted(calibration.K, -PIXEL_CENTRE)):
        w2c, size = calibration.w2c[index], calibration.sizes[index]
        lines += [
            f"[cam_{index}]", f"name = {json.dumps(calibration.name(index, '{0}'))}",
            *([] if size is None else [f"size = {list(size)}"]), f"matrix = {K.tolist()}",
            f"distortions = {calibration.distortion[index].tolist()}",
            f"rotation = {Rotation.from_matrix(w2c[:3, :3]).as_rotvec().tolist()}",
            f"translation = {w2c[:3, 3].tolist()}", "",
        ]  # fmt: skip
    Path(path).write_text("\n".join([*lines, "[metadata]", ""]))
