"""MAMMAL's new_cam.pkl: a pickled list (or a dict keyed 0, 1, ...) of {K, R, T[, mapx, mapy]}.

X_cam = R X + T with column vectors; T in mm. K is that of the undistorted image, made with OpenCV, so pixel centers
count from 0 and the principal point gets half a pixel here. The format holds no lens distortion: the videos that go
with it are undistorted already; the remap tables are only looked at for the image size.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from pathlib import Path

import numpy as np

from recording.calibration.fields import (
    MOST_BYTES,
    PIXEL_CENTRE,
    Fields,
    check_count,
    image_size,
    read_bytes,
    rigid,
    shifted,
)
from recording.calibration.model import Calibration, assemble

FILE_NAME = "new_cam.pkl"
UNIT = "mm"
FIELDS = ("K", "R", "T")
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
        answer = self.answers.get((module.replace("numpy._core", "numpy.core"), name))
        if answer is None:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; only numpy arrays and plain containers are allowed"
            )
        return answer

    def load_bytearray8(self) -> None:
        """Takes bytes that are there; Python's own makes room for as many as the file claims."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(min(length, MOST_BYTES)))

    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}


class _Array:
    """A numpy.ndarray, empty until its state comes."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = dtype.array(raw, shape, bool(fortran))


def _stand_ins() -> dict:
    """Returns what answers for (module, name): functions of this one load, so that no file can change another's."""
    made_bytes = [0]  # one piece of a small file may be asked for again and again

    def count(data: bytes) -> bytes:
        made_bytes[0] += len(data)
        if made_bytes[0] > MOST_BYTES:
            raise pickle.UnpicklingError(f"it unfolds to more than {MOST_BYTES / 1e6:.0f} MB")
        return data

    class Dtype:
        """A numpy.dtype of numbers; its state holds the byte order."""

        def __init__(self, text, *_) -> None:
            if not isinstance(text, str) or not re.fullmatch(r"[fiub][1248]", text):
                raise pickle.UnpicklingError(f"arrays of dtype {text!r:.40} are not allowed; numbers only")
            self.text, self.order = text, "="

        def __setstate__(self, state: tuple) -> None:
            self.order = state[1] if state[1] in ("<", ">") else "="

        def array(self, raw, shape: tuple, fortran: bool) -> np.ndarray:
            data = count(raw.encode("latin1") if isinstance(raw, str) else bytes(raw))
            values = np.frombuffer(data, dtype=np.dtype(self.order + self.text))
            return values.reshape(shape, order="F" if fortran else "C").astype(values.dtype.newbyteorder("="))

    def encode(text: str, encoding: str) -> bytes:  # protocol 2 keeps bytes as text
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"codec {encoding!r:.40} is not allowed")
        return count(text.encode("latin1"))

    return {
        ("numpy", "ndarray"): "ndarray",  # only named, as what _reconstruct is to make
        ("numpy", "dtype"): lambda *state: Dtype(*state),
        ("_codecs", "encode"): encode,
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy.core.multiarray", "scalar"): lambda dtype, raw: dtype.array(raw, (1,), False)[0].item(),
        ("numpy.core.numeric", "_frombuffer"): lambda raw, dtype, shape, order: dtype.array(raw, shape, order == "F"),
    }


def _plain(content, done: dict):
    """Returns the content with every stand-in array replaced by its ndarray. done: by id, what was replaced before."""
    if id(content) in done:
        return done[id(content)]
    if isinstance(content, dict):
        result = {key: _plain(value, done) for key, value in content.items()}
    elif isinstance(content, (list, tuple)):
        result = [_plain(value, done) for value in content]
    elif isinstance(content, _Array) and content.value is not None:
        result = content.value
    elif content is None or isinstance(content, (str, bytes, int, float, complex, np.ndarray, set, frozenset)):
        result = content
    else:
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__}; only arrays and containers are allowed")
    done[id(content)] = result
    return result


def load_numpy_pickle(path: Path | str):
    """Returns the content of a pickle of numpy arrays and plain containers. Raises ValueError for any other content."""
    try:
        return _plain(NumpyUnpickler(read_bytes(path)).load(), {})
    except UNPICKLING_ERRORS as error:
        raise ValueError(f"pickle {path} refused: {' '.join(str(error).split()) or type(error).__name__}") from error


def read_mammal_pickle(path: Path | str) -> Calibration:
    content = load_numpy_pickle(path)
    if isinstance(content, dict):
        keys = {str(key): key for key in content}
        if set(keys) != {str(index) for index in range(len(content))}:
            got = list(content)[:8]
            raise ValueError(f"{path}: a dict of cameras must be keyed 0..n-1 without a gap, got keys {got}")
        content = [content[keys[str(index)]] for index in range(len(content))]
    if not isinstance(content, list):
        raise ValueError(f"{path}: a list or dict of cameras is expected, got {type(content).__name__}")
    check_count(len(content), path)
    rows = []
    for index, entry in enumerate(content):
        camera = Fields(entry, f"{path}: camera {index}", required=FIELDS)
        camera.refuse_unread(FIELDS)
        table = camera.values.get("mapx")
        size = image_size(*table.shape[::-1], camera.where) if getattr(table, "ndim", 0) == 2 else None
        K = shifted(camera.matrix("K", 3, 3), PIXEL_CENTRE)
        rows.append((K, rigid(entry["R"], entry["T"], camera.where), np.zeros(5), size, ""))
    return assemble(rows, path, unit=UNIT)


def write_mammal_pickle(path: Path | str, calibration: Calibration) -> None:
    """A list of {K, R, T}. Raises ValueError for lens distortion, which the format cannot hold."""
    calibration.require(path, distortion=False)
    entries = [
        {"K": K, "R": w2c[:3, :3].copy(), "T": w2c[:3, 3].copy()}
        for K, w2c in zip(shifted(calibration.K, -PIXEL_CENTRE), calibration.w2c, strict=True)
    ]
    Path(path).write_bytes(pickle.dumps(entries, protocol=4))
