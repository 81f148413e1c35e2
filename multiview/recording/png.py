"""PNG files of pictures that are mostly empty: only the rows that show the animal are compressed.

A general encoder spends most of its time on the empty rest (W3C PNG specification 3, sections 9 and 10: any filter per
row and any deflate stream are valid). The same picture makes the same file, with the same version of zlib.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache

import numpy as np

from multiview.recording.rectify import Cutout

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SUB, UP = 1, 2  # filters: difference to the pixel on the left, above
LEVEL = 1


def encode_png(cutout: Cutout) -> bytes:
    """An 8-bit RGBA PNG file of `cutout.full()`."""
    size, height = cutout.size, cutout.rgba.shape[0]
    above, below = cutout.y, size - cutout.y - height
    rows = _filtered(cutout)
    packer = _packer()
    body = packer.compress(rows) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = _joined(_blank_checksum(size, above), zlib.adler32(rows), len(rows))
    checksum = _joined(checksum, _blank_checksum(size, below), below * (1 + 4 * size))
    end = _packer().flush()  # an empty last block
    parts = (b"\x78\x01", _deflated_blank(size, above), body, _deflated_blank(size, below), end)
    stream = b"".join(parts) + struct.pack(">I", checksum)
    header = struct.pack(">IIBBBBB", size, size, 8, 6, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", stream) + _chunk(b"IEND", b"")


def _packer():
    """Raw deflate; runs and Huffman codes alone serve filtered photographs as well as searching does, only faster."""
    return zlib.compressobj(LEVEL, zlib.DEFLATED, -15, 9, zlib.Z_RLE)


def _filtered(cutout: Cutout) -> bytes:
    """The rows of the picture that the cutout touches, each as filter type and difference to the row above."""
    height, width = cutout.rgba.shape[:2]
    rows = np.zeros((height, 1 + 4 * cutout.size), np.uint8)
    if not height:
        return b""
    rows[:, 0] = UP
    inner = rows[:, 1 + 4 * cutout.x : 1 + 4 * (cutout.x + width)]
    flat = cutout.rgba.reshape(height, 4 * width)
    np.subtract(flat[1:], flat[:-1], out=inner[1:])
    blank = np.tile(np.array([255, 255, 255, 0], np.uint8), cutout.size)
    top = blank.copy()
    top[4 * cutout.x : 4 * (cutout.x + width)] = flat[0]
    rows[0, 1:] = top - (blank if cutout.y else 0)
    return rows.tobytes()


@lru_cache(maxsize=2)
def _blank(size: int) -> memoryview:
    """`size` white, transparent rows as filter types and differences. The first one needs no row above it."""
    rows = np.zeros((size, 1 + 4 * size), np.uint8)
    rows[:, 0] = UP
    rows[0, 0] = SUB
    rows[0, 1:4] = 255
    return memoryview(rows.tobytes())


@lru_cache(maxsize=2048)
def _deflated_blank(size: int, count: int) -> bytes:
    """The first `count` of these rows, compressed."""
    packer = _packer()
    return packer.compress(_blank(size)[: count * (1 + 4 * size)]) + packer.flush(zlib.Z_FULL_FLUSH)


@lru_cache(maxsize=2048)
def _blank_checksum(size: int, count: int) -> int:
    return zlib.adler32(_blank(size)[: count * (1 + 4 * size)])


def _joined(first: int, second: int, second_length: int) -> int:
    """Adler-32 of two pieces of data, one after the other, from theirs (RFC 1950, section 8.2)."""
    low = (first & 0xFFFF) + (second & 0xFFFF) - 1
    high = (first >> 16) + (second >> 16) + second_length * ((first & 0xFFFF) - 1)
    return (high % 65521) << 16 | low % 65521


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
