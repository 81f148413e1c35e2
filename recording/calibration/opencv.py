"""The project's own opencv_cameras.json (docs/data_format.md): OpenCV axes, outer-corner pixels, no lens, no skew.

{"frames": [{"w", "h", "fx", "fy", "cx", "cy", "w2c" 4x4, "file_path"?}], "unit"?: "mm" | "cm" | "m"}, frame k is camera
k. Read in float64, unlike a sample's cameras.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from multiview.files import write_json
from recording.calibration.fields import intrinsics, matrix, number, picture_size, read_json, rigid
from recording.calibration.model import Calibration

FILE_NAME = "opencv_cameras.json"
FIELDS = ("w", "h", "fx", "fy", "cx", "cy", "w2c")


def is_opencv(content: dict) -> bool:
    frames = content.get("frames")
    return isinstance(frames, list) and bool(frames) and isinstance(frames[0], dict) and "w2c" in frames[0]


def read_opencv_json(path: Path | str) -> Calibration:
    content = read_json(path)
    K, w2c, sizes, names = [], [], [], []
    for index, frame in enumerate(content["frames"]):
        what = f"{path}: frame {index}"
        missing = [key for key in FIELDS if not isinstance(frame, dict) or key not in frame]
        if missing:
            raise ValueError(f"{what} lacks {', '.join(missing)}")
        K.append(intrinsics(*(number(frame[key], f"{what}: {key}") for key in ("fx", "fy", "cx", "cy"))))
        values = matrix(frame["w2c"], (4, 4), f"{what}: w2c")
        w2c.append(rigid(values[:3, :3], values[:3, 3], what))
        sizes.append(picture_size(frame["w"], frame["h"], what))
        names.append(str(frame.get("file_path", index)))
    return Calibration(
        np.array(K), np.array(w2c), np.zeros((len(K), 5)), tuple(sizes), str(path), unit=content.get("unit"),
        names=tuple(names),
    )  # fmt: skip


def write_opencv_json(path: Path | str, calibration: Calibration) -> None:
    """Raises ValueError for skew, lens distortion or unknown picture sizes, which the format cannot hold."""
    calibration.require(path, distortion=False, skew=False, sizes=True)
    frames = []
    for index, (K, w2c) in enumerate(zip(calibration.K, calibration.w2c, strict=True)):
        width, height = calibration.sizes[index]
        frames.append(
            {
                "file_path": calibration.name(index, "{0}.mp4"),
                "w": width,
                "h": height,
                "fx": K[0, 0],
                "fy": K[1, 1],
                "cx": K[0, 2],
                "cy": K[1, 2],
                "w2c": w2c.tolist(),
            }  # fmt: skip
        )
    write_json(Path(path), {"frames": frames, **({"unit": calibration.unit} if calibration.unit else {})})
