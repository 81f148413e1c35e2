"""MAMMAL's new_cam.pkl: a pickled list (or a dict keyed 0, 1, ...) of {K, R, T[, mapx, mapy]}.

X_cam = R X + T with column vectors; T in mm. K is that of the undistorted picture, made with OpenCV, so pixel centres
count from 0 and the principal point gets half a pixel here. The format holds no lens distortion: the videos that go
with it are undistorted already; the remap tables are only looked at for the picture size.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from pathlib import Path

import numpy as np

from recording.calibration.fields import PIXEL_CENTRE, matrix, rigid, shifted
from recording.calibration.model import Calibration

FILE_NAME = "new_cam.pkl"
UNIT = "mm"


UNPICKLING_ERRORS = (
    pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError,
    MemoryError, RecursionError, struct.error,
)  # fmt: skip


class NumpyUnpickler(pickle._Unpickler):
    """Loads plain containers, numbers, strings and numpy arrays; anything else in the file is refused, not run.

    Python's own implementation, and no function of numpy's: a damaged file crashes the C code of either. What a pickle
    of arrays calls is answered by stand-ins, made anew for each file, which know numbers and raw bytes only.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.answers = _stand_ins()

    def find_class(self, module: str, name: str):
        found = self.answers.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; only numpy arrays and plain containers are allowed"
            )
        return found


class _Dtype:
    """A numpy.dtype of numbers; its state holds the byte order."""

    def __init__(self, text) -> None:
        if not isinstance(text, str) or not re.fullmatch(r"[fiub][1248]", text):
            raise pickle.UnpicklingError(f"arrays of dtype {text!r} are not allowed; numbers only")
        self.text, self.order = text, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def array(self, raw, shape: tuple, fortran: bool) -> np.ndarray:
        data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        values = np.frombuffer(data, dtype=np.dtype(self.order + self.text))
        return values.reshape(shape, order="F" if fortran else "C").astype(values.dtype.newbyteorder("="))


class _Array:
    """A numpy.ndarray, empty until its state comes."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = dtype.array(raw, shape, bool(fortran))


def _stand_ins() -> dict:
    """(module, name) -> what answers for it; functions of this one load, so that no file can change another's."""

    def dtype(text, *_) -> _Dtype:
        return _Dtype(text)

    def reconstruct(*_) -> _Array:
        return _Array()

    def scalar(kind: _Dtype, raw) -> int | float | bool:
        return kind.array(raw, (1,), False)[0].item()

    def from_buffer(raw, kind: _Dtype, shape: tuple, order: str) -> np.ndarray:
        return kind.array(raw, shape, order == "F")

    def encode(text: str, encoding: str) -> bytes:  # protocol 2 keeps bytes as text
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"codec {encoding!r} is not allowed")
        return text.encode("latin1")

    return {
        ("numpy", "ndarray"): "ndarray",  # only named, as what _reconstruct is to make
        ("numpy", "dtype"): dtype,
        ("_codecs", "encode"): encode,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy.core.numeric", "_frombuffer"): from_buffer,
    }


def _plain(content):
    """The content with every stand-in array replaced by its ndarray."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_plain(value) for value in content)
    if isinstance(content, _Array):
        if content.value is None:
            raise pickle.UnpicklingError("an array has no content")
        return content.value
    if content is None or isinstance(content, (str, bytes, bytearray, int, float, complex, np.ndarray, set, frozenset)):
        return content
    raise pickle.UnpicklingError(f"it holds a {type(content).__name__}; only arrays and plain containers are allowed")


def load_numpy_pickle(path: Path | str):
    """The content of a pickle of numpy arrays and plain containers. Raises ValueError for any other content."""
    path = Path(path)
    try:
        return _plain(NumpyUnpickler(path.read_bytes()).load())
    except UNPICKLING_ERRORS as error:
        raise ValueError(f"pickle {path} refused: {' '.join(str(error).split()) or type(error).__name__}") from error


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
