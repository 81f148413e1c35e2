"""MAMMAL's new_cam.pkl: a pickled list (or a dict keyed 0, 1, ...) of {K, R, T[, mapx, mapy]}.

X_cam = R X + T with column vectors; T in mm. K is that of the undistorted picture, made with OpenCV, so pixel centres
count from 0 and the principal point gets half a pixel here. The format holds no lens distortion: the videos that go
with it are undistorted already; the remap tables are only looked at for the picture size.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np

from multiview.recording.calibration.fields import PIXEL_CENTRE, matrix, rigid, shifted
from multiview.recording.calibration.model import Calibration

FILE_NAME = "new_cam.pkl"
UNIT = "mm"


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What protocol-2 pickles use to hold bytes; any other codec is refused."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding!r} is not allowed")
    return text.encode("latin1")


class NumpyUnpickler(pickle.Unpickler):
    """Loads plain containers, numbers, strings and numpy arrays; anything else in the file is refused, not run."""

    def find_class(self, module: str, name: str):
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar")):
            return getattr(np._core.multiarray, name)
        if (module, name) == ("numpy.core.numeric", "_frombuffer"):
            return np._core.numeric._frombuffer
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only numpy arrays and plain containers are allowed")


UNPICKLING_ERRORS = (
    pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError,
    MemoryError,
)  # fmt: skip


def load_numpy_pickle(path: Path | str):
    """The content of a pickle of numpy arrays and plain containers. Raises ValueError for any other content."""
    path = Path(path)
    try:
        return NumpyUnpickler(io.BytesIO(path.read_bytes())).load()
    except UNPICKLING_ERRORS as error:
        raise ValueError(f"pickle {path} refused: {error}") from error


def read_mammal_pickle(path: Path | str) -> Calibration:
    entries = _numbered_entries(load_numpy_pickle(path), path)
    K, w2c, sizes = [], [], []
    for index, entry in enumerate(entries):
        missing = [key for key in ("K", "R", "T") if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{path}: camera {index} lacks {', '.join(missing)}; K, R and T are expected")
        K.append(shifted(matrix(entry["K"], (3, 3), f"{path}: K of camera {index}"), PIXEL_CENTRE))
        w2c.append(rigid(entry["R"], entry["T"], f"{path}: camera {index}"))
        table = entry.get("mapx")
        sizes.append((table.shape[1], table.shape[0]) if isinstance(table, np.ndarray) and table.ndim == 2 else None)
    return Calibration(np.array(K), np.array(w2c), np.zeros((len(K), 5)), tuple(sizes), str(path), unit=UNIT)


def write_mammal_pickle(path: Path | str, calibration: Calibration) -> None:
    """A list of {K, R, T}. Raises ValueError for lens distortion, which the format cannot hold."""
    calibration.require(path, distortion=False)
    entries = [
        {"K": K, "R": w2c[:3, :3].copy(), "T": w2c[:3, 3].copy()}
        for K, w2c in zip(shifted(calibration.K, -PIXEL_CENTRE), calibration.w2c, strict=True)
    ]
    Path(path).write_bytes(pickle.dumps(entries, protocol=4))


def _numbered_entries(content, path: Path | str) -> list:
    if isinstance(content, (list, tuple)):
        if not content:
            raise ValueError(f"{path}: the list of cameras is empty")
        return list(content)
    if isinstance(content, dict):
        try:
            numbered = {int(key): value for key, value in content.items()}
        except (TypeError, ValueError):
            numbered = {}
        if sorted(numbered) == list(range(len(content))) and content:
            return [numbered[index] for index in range(len(content))]
        raise ValueError(f"{path}: a dict of cameras must be keyed 0..n-1 without a gap, got keys {list(content)[:8]}")
    raise ValueError(f"{path}: a list or dict of cameras is expected, got {type(content).__name__}")
