"""Calibration files of raw recordings -> one `Calibration`; one module per file format, reader and writer together.

model.py    Calibration: K, distortion, w2c; projection, rays, the lens model
checks.py   is it a calibration of cameras around an animal, and what was meant if not
fields.py   numbers out of files, checked
formats.py  find, read and write any of the formats (the table of their conventions is there)
"""

from recording.calibration.checks import check_body_length, check_facing, check_intrinsics, rig_distance
from recording.calibration.dannce import read_dannce_labels
from recording.calibration.fields import PIXEL_CENTRE
from recording.calibration.formats import (
    FILE_NAMES,
    FORMATS,
    find_calibration,
    read_calibration,
    write_calibration,
)
from recording.calibration.mammal import load_numpy_pickle, write_mammal_pickle
from recording.calibration.model import Calibration, valid_radius

__all__ = [
    "FILE_NAMES", "FORMATS", "PIXEL_CENTRE", "Calibration", "check_body_length", "check_facing", "check_intrinsics",
    "find_calibration", "load_numpy_pickle", "read_calibration", "read_dannce_labels", "rig_distance", "valid_radius",
    "write_calibration", "write_mammal_pickle",
]  # fmt: skip
