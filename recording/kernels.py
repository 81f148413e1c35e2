"""Loops over pixels and points that neither OpenCV nor NumPy has; compiled at their first use, then kept on disk."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True)
def cut(colours, window, bgr, out, left, top):
    """Pixels [h, w, 3] uint8 where window [h, w] bool is set -> RGB and alpha 255 in `out`, from its (left, top) on."""
    first, third = (2, 0) if bgr else (0, 2)
    height, width = window.shape
    for row in range(height):
        for column in range(width):
            if window[row, column]:
                pixel = out[top + row, left + column]
                pixel[0] = colours[row, column, first]
                pixel[1] = colours[row, column, 1]
                pixel[2] = colours[row, column, third]
                pixel[3] = 255


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


@numba.njit(cache=True)
def carve_centres(projections, used, bits, starts, shapes, middles, half, points):
    """Centre of mass of what all masks show, per frame [t, 3], and whether it is anything [t].

    Looked for at points^3 places of the cube middles [t, 3] +- half; the middle where there is nothing. projections:
    [t, v, 3, 4] world -> pixels of the masks, homogeneous. used: [t, v] whether a mask counts. bits: packed pixels of
    all masks, mask (t, v) from byte starts[t, v] on, rows x columns shapes[t, v].
    """
    frames, views = used.shape
    centres, found = middles.copy(), np.zeros(frames, np.bool_)
    step = 2.0 * half / points
    for frame in range(frames):
        sums, count = np.zeros(3), 0
        lower = middles[frame] - half + 0.5 * step
        for index in range(points**3):
            x = lower[0] + step * (index // (points * points))
            y = lower[1] + step * (index // points % points)
            z = lower[2] + step * (index % points)
            inside = True
            for view in range(views):
                if not used[frame, view]:
                    continue
                p = projections[frame, view]
                depth = p[2, 0] * x + p[2, 1] * y + p[2, 2] * z + p[2, 3]
                column = (p[0, 0] * x + p[0, 1] * y + p[0, 2] * z + p[0, 3]) / depth
                row = (p[1, 0] * x + p[1, 1] * y + p[1, 2] * z + p[1, 3]) / depth
                height, width = shapes[frame, view]
                if depth <= 0 or column < 0 or row < 0 or column >= width or row >= height:
                    inside = False
                    break
                pixel = int(row) * width + int(column)
                if not bits[starts[frame, view] + (pixel >> 3)] >> (7 - (pixel & 7)) & 1:
                    inside = False
                    break
            if inside:
                sums[0] += x
                sums[1] += y
                sums[2] += z
                count += 1
        if count and used[frame].sum() >= 2:
            centres[frame] = sums / count
            found[frame] = True
    return centres, found
