"""The project's own opencv_cameras.json (docs/data_format.md): OpenCV axes, outer-corner pixels, no lens, no skew.

{"frames": [{"w", "h", "fx", "fy", "cx", "cy", "w2c" 4x4, "file_path"?}], "unit"?: "mm" | "cm" | "m"}, frame k is camera
k. Read in float64, unlike a sample's cameras.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from multiview.files import write_json
from recording.calibration.fields import Fields, check_count, intrinsics, last_row_checked, rigid
from recording.calibration.model import Calibration, assemble

FILE_NAME = "opencv_cameras.json"
FIELDS = ("w", "h", "fx", "fy", "cx", "cy", "w2c")


def read_opencv_json(path: Path | str, content: dict) -> Calibration:
    rows = []
    check_count(len(content["frames"]), path)
    for index, values in enumerate(content["frames"]):
        frame = Fields(values, f"{path}: frame {index}", required=FIELDS)
        frame.refuse_unread(FIELDS)
        w2c = last_row_checked(frame.matrix("w2c", 4, 4), f"{frame.where}: w2c")
        K = intrinsics(*map(frame.number, ("fx", "fy", "cx", "cy")))
        name = frame.text("file_path", str(index))
        rows.append((K, rigid(w2c[:3, :3], w2c[:3, 3], frame.where), np.zeros(5), frame.size(), name))
    whole = Fields(content, str(path))
    whole.refuse_unread(())
    return assemble(rows, path, unit=whole.text("unit"))


def write_opencv_json(path: Path | str, calibration: Calibration) -> None:
    """Raises ValueError for skew, lens distortion or unknown image sizes, which the format cannot hold."""
    calibration.require(path, distortion=False, skew=False, sizes=True)
    frames = [
        {
            "file_path": calibration.name(index, "{0}.mp4"),
            "w": calibration.sizes[index][0], "h": calibration.sizes[index][1],
            "fx": K[0, 0], "fy": K[1, 1], "cx": K[0, 2], "cy": K[1, 2], "w2c": calibration.w2c[index].tolist(),
        }
        for index, K in enumerate(calibration.K)
    ]  # fmt: skip
    write_json(Path(path), {"frames": frames, **({"unit": calibration.unit} if calibration.unit else {})})
