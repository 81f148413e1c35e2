"""Loops over pixels that neither OpenCV nor NumPy has in one piece; compiled at their first use, then kept on disk."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True)
def straighten(premultiplied, blurred, out):
    """Premultiplied RGBA [h, w, 4] uint8 -> straight, into `out`.

    Where alpha is 0 the colour is that of `blurred`, the same picture's mean around each pixel; white where that is
    empty too.
    """
    full, largest = np.float32(255.0), np.float32(255)
    height, width = premultiplied.shape[:2]
    for row in range(height):
        for column in range(width):
            alpha = premultiplied[row, column, 3]
            if alpha == 255:
                for channel in range(4):
                    out[row, column, channel] = premultiplied[row, column, channel]
                continue
            out[row, column, 3] = alpha
            source = premultiplied if alpha else blurred
            if source[row, column, 3] == 0:
                for channel in range(3):
                    out[row, column, channel] = 255
                continue
            scale = full / np.float32(source[row, column, 3])
            for channel in range(3):
                value = np.rint(np.float32(source[row, column, channel]) * scale)
                out[row, column, channel] = np.uint8(min(value, largest))
