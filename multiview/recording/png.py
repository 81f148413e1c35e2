"""PNG files of pictures that are mostly empty: only the part that shows the animal is compressed.

A general encoder spends most of its time on the empty rest (W3C PNG specification 3, sections 9 and 10: any filter per
row and any deflate stream are valid). The same picture makes the same file.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from multiview.recording.rectify import TRANSPARENT_WHITE, Cutout

SIGNATURE = b"\x89PNG\r\n\x1a\n"
DEFLATE = b"\x78\x01"  # zlib's header: a window of 32 KiB


def encode_png(cutout: Cutout) -> bytes:
    """An 8-bit RGBA PNG file of `cutout.full()`."""
    from multiview.recording.deflate import deflate, tokenise

    size = cutout.size
    first, differences = _filtered(cutout)
    # At most a token per byte of the part; runs of zeros between take fewer than they have bytes.
    tokens = np.empty(4 * differences.size + len(first) + size * (8 + 4 * size // 258) + 16, np.uint16)
    count, checksum = tokenise(first, differences, cutout.x, cutout.y, size, tokens)
    out = np.empty(2 * count + 512, np.uint8)
    stream = DEFLATE + out[: deflate(tokens[:count], out)].tobytes() + struct.pack(">I", checksum)
    header = struct.pack(">IIBBBBB", size, size, 8, 6, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", stream) + _chunk(b"IEND", b"")


def _filtered(cutout: Cutout) -> tuple[np.ndarray, np.ndarray]:
    """The picture's first row where the cutout holds it, else nothing, and each pixel's difference to the one above."""
    rgba = cutout.rgba
    height, width = rgba.shape[:2]
    differences = np.empty_like(rgba)
    first = np.zeros(0, np.uint8)
    if height:
        np.subtract(rgba[1:], rgba[:-1], out=differences[1:])
        differences[0] = rgba[0] - np.array([255, 255, 255, 0], np.uint8)
        if cutout.y == 0:
            row = np.full(cutout.size, TRANSPARENT_WHITE, np.uint32)
            row[cutout.x : cutout.x + width] = rgba[0].view(np.uint32)[:, 0]
            first = row.view(np.uint8)
    return first, differences.view(np.uint32)[..., 0]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
