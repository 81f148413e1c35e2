"""Pickles and MAT-files of strangers as plain data: nothing in them is run, nothing larger than the file is made.

Both formats are read in Python alone: the C code of pickle, numpy and scipy.io makes room for whatever a file claims,
and crashes on damaged ones.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from multiview.files import damage_explained
from recording.calibration.model import MOST_BYTES, read_bytes

# Numbers of MATLAB's file format: types of elements, classes of arrays, levels of cells within cells.
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
INT8, UINT16, MATRIX, COMPRESSED, UTF16 = 1, 4, 14, 15, 17
CELL, STRUCT, CHAR, NUMERIC, COMPLEX, DEEPEST = 1, 2, 4, range(6, 16), 0x800, 16


class NumpyUnpickler(pickle._Unpickler):
    """Loads plain containers, numbers, strings and numpy arrays; anything else in the file is refused, not run."""

    made_bytes = 0

    def find_class(self, module: str, name: str):
        answers = {  # stand-ins for what a pickle of arrays calls, made anew, so that no file changes another's
            ("numpy", "ndarray"): "ndarray",  # only named, as what _reconstruct is to make
            ("numpy", "dtype"): lambda text, *_: _Dtype(text),
            ("_codecs", "encode"): lambda text, encoding: self.encode(text, encoding),  # no method a file could change
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy.core.multiarray", "scalar"): lambda dtype, raw: dtype.array(raw, (1,), False)[0].item(),
            ("numpy.core.numeric", "_frombuffer"): lambda raw, dtype, shape, order: dtype.array(
                raw, shape, order == "F"
            ),
        }
        answer = answers.get((module.replace("numpy._core", "numpy.core"), name))
        if answer is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only arrays and plain containers are allowed")
        return answer

    def encode(self, text: str, encoding: str) -> bytes:
        """Protocol 2 keeps bytes as text; one piece of a small file may be asked for again and again."""
        self.made_bytes += len(text)
        if self.made_bytes > MOST_BYTES or encoding not in ("latin1", "latin-1"):
            got = f"{self.made_bytes / 1e6:.0f} MB in codec {encoding!r:.40}"
            raise pickle.UnpicklingError(f"latin1 of at most {MOST_BYTES / 1e6:.0f} MB is expected, got {got}")
        return text.encode("latin1")

    def load_bytearray8(self) -> None:
        """Takes bytes that are there; Python's own makes room for as many as the file claims."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(min(length, MOST_BYTES)))

    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}


class _Dtype(str):
    """A numpy.dtype of numbers, by its text; its state holds the byte order."""

    order = "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def array(self, raw: bytes, shape: tuple, fortran: bool) -> np.ndarray:
        if not re.fullmatch(r"[fiub][1248]", self):
            raise pickle.UnpicklingError(f"arrays of dtype {self!r:.40} are not allowed; numbers only")
        return np.frombuffer(raw, self.order + self).reshape(shape, order="F" if fortran else "C")


class _Array:
    """A numpy.ndarray, empty until its state comes; numpy takes it for one."""

    values, shape = None, ()

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.values = dtype.array(raw, shape, fortran)
        self.shape = self.values.shape

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.values


def load_numpy_pickle(path: Path | str):
    """Returns the content of a pickle of plain containers and of what numpy reads as arrays; else a ValueError."""
    with damage_explained(f"pickle {path}"):
        return NumpyUnpickler(io.BytesIO(read_bytes(path))).load()


def load_mat(path: Path | str, name: str) -> object:
    """Returns variable `name` of a MATLAB file of version 5 to 7.2, None without it.

    Numbers are arrays, text is str, cells are lists, structs dicts, arrays of structs lists of dicts.
    """
    data = read_bytes(path)
    if data.startswith((b"MATLAB 7.3", b"\x89HDF")):
        remedy = f"s = load('{Path(path).name}'); save('{Path(path).name}', '-struct', 's', '-v7')"
        raise ValueError(f"{path} is a MATLAB 7.3 file (HDF5), which is not read; save it in MATLAB as 7: {remedy}")
    with damage_explained(f"MATLAB file {path} (of version 5 to 7.2)"):
        if data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
            raise ValueError("its header does not say version 5")
        order = "<" if data[126:128] == b"IM" else ">"
        for kind, content in _elements(data[128:], order):
            if kind == COMPRESSED:
                head = zlib.decompressobj().decompress(content, 8)  # tells how much more there is
                size = 8 + struct.unpack(f"{order}II", head)[1]
                if size > MOST_BYTES:
                    raise ValueError(f"a variable unfolds to {size / 1e6:.0f} MB, {MOST_BYTES / 1e6:.0f} at most")
                kind, content = next(_elements(zlib.decompressobj().decompress(content, size), order), (0, b""))
            if kind == MATRIX and content:
                found, value = _matrix(content, order, 0, name)
                if found == name:
                    return value
    return None


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yields type and content of each element of a MAT-file, or of a matrix in it."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:  # the content stands in the second half of the tag
            kind, size, start = kind & 0xFFFF, min(kind >> 16, 4), at + 4
        if start + size > len(data):
            raise ValueError("it is truncated or damaged")
        yield kind, data[start : start + size]
        at = start + size + (0 if kind == COMPRESSED else -(start + size - at) % 8)


def _matrix(content: bytes, order: str, depth: int, wanted: str = "") -> tuple[str, object]:
    """Returns name and value of one matrix; wanted: the value of another name is not asked for."""
    if not content or depth > DEEPEST:
        return "", np.zeros((0, 0))
    parts = _elements(content, order)
    flags, shape, raw_name = (next(parts, (0, b""))[1] for _ in range(3))
    bits, name = struct.unpack_from(f"{order}I", flags)[0], raw_name.decode(errors="replace")
    shape, array_class = np.frombuffer(shape, f"{order}i4").tolist(), bits & 255
    count = math.prod(shape)
    if wanted not in ("", name) or array_class not in (CELL, STRUCT, CHAR, *NUMERIC) or bits & COMPLEX:
        return name, None
    if not 0 <= count <= len(content):
        raise ValueError(f"an array of {count} entries in {len(content)} bytes")
    if array_class in (CELL, STRUCT):
        fields = [""]
        if array_class == STRUCT:
            (length,) = struct.unpack_from(f"{order}i", next(parts, (0, b""))[1])
            fields = np.frombuffer(next(parts, (0, b""))[1], f"S{length}").astype(str).tolist()
        values = [_matrix(part, order, depth + 1)[1] for _, part in islice(parts, count * len(fields))]
        if len(values) != count * len(fields):
            raise ValueError(f"{name or 'a cell'} is truncated")
        if array_class == CELL:
            return name, values
        rows = [values[at : at + len(fields)] for at in range(0, len(values), max(len(fields), 1))]
        structs = [dict(zip(fields, row)) for row in rows]
        return name, structs[0] if len(structs) == 1 else structs
    kind, raw = next(parts, (INT8, b""))
    if array_class == CHAR:
        utf16 = "utf-16-le" if order == "<" else "utf-16-be"
        return name, raw.decode(utf16 if kind in (UINT16, UTF16) else "utf-8")
    return name, np.frombuffer(raw, order + TYPES[kind]).reshape(shape, order="F")
