"""numba kernels of the CPU rasterizer: one picture of one scene at a time.

All kernels live in this one file because numba's on-disk cache notices a change of the file a kernel is in, not of
the files it calls into. Geometry (per Gaussian) is computed in float64, compositing (per pixel) in float32. No
fast-math: the backward pass replays the forward pass and must take bit-identical decisions.

Every result is independent of the number of threads: a tile, or a Gaussian, is the work of one thread, and sums over
the tiles of a Gaussian run in a fixed order.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from .constants import (
    EPS_2D,
    FAR_PLANE,
    FOV_MARGIN,
    MAX_ALPHA,
    MAX_EXTENT,
    MIN_ALPHA,
    MIN_TRANSMITTANCE,
    NEAR_PLANE,
    TILE_PX,
)

MIN_ALPHA_32 = np.float32(MIN_ALPHA)
MAX_ALPHA_32 = np.float32(MAX_ALPHA)
MIN_TRANSMITTANCE_32 = np.float32(MIN_TRANSMITTANCE)
HALF = np.float32(0.5)
ONE = np.float32(1.0)
ZERO = np.float32(0.0)

# Columns of the per-Gaussian table `splats` (float32): what compositing needs, and, in the same order, the columns
# of the gradients that come back from it.
U, V, CONIC_A, CONIC_B, CONIC_C, OPACITY, RED, GREEN, BLUE, DEPTH = range(10)
NUM_COLUMNS = 10
# Planes of a picture [5, h, w].
PLANE_DEPTH, PLANE_TRANSMITTANCE = 3, 4


@njit(cache=True)
def _rotation(quaternion, out):
    """Unit quaternion (w, x, y, z) -> rotation matrix in `out` [3, 3]."""
    w = np.float64(quaternion[0])
    x = np.float64(quaternion[1])
    y = np.float64(quaternion[2])
    z = np.float64(quaternion[3])
    out[0, 0], out[0, 1], out[0, 2] = 1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)
    out[1, 0], out[1, 1], out[1, 2] = 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)
    out[2, 0], out[2, 1], out[2, 2] = 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)


@njit(cache=True)
def _to_camera(w2c, point):
    x = w2c[0, 0] * point[0] + w2c[0, 1] * point[1] + w2c[0, 2] * point[2] + w2c[0, 3]
    y = w2c[1, 0] * point[0] + w2c[1, 1] * point[1] + w2c[1, 2] * point[2] + w2c[1, 3]
    z = w2c[2, 0] * point[0] + w2c[2, 1] * point[1] + w2c[2, 2] * point[2] + w2c[2, 3]
    return x, y, z


@njit(cache=True)
def _clamped_slope(slope, focal, centre, size):
    """x / z kept within the picture and a margin, as used in the Jacobian only; and whether it was left alone."""
    margin = FOV_MARGIN * 0.5 * size / focal
    highest = (size - centre) / focal + margin
    lowest = -(centre / focal + margin)
    clamped = min(highest, max(lowest, slope))
    return clamped, clamped == slope


@njit(cache=True)
def _half_covariance(w2c, rotation, scale, out):
    """out [3, 3] = R_w2c R_q diag(scale): the camera-frame covariance is out out^T."""
    for i in range(3):
        for k in range(3):
            total = w2c[i, 0] * rotation[0, k] + w2c[i, 1] * rotation[1, k] + w2c[i, 2] * rotation[2, k]
            out[i, k] = total * scale[k]


@njit(cache=True)
def _tile_range(centre, radius, num_tiles):
    first = min(max(math.floor((centre - radius) / TILE_PX), 0.0), np.float64(num_tiles))
    last = min(max(math.ceil((centre + radius) / TILE_PX), 0.0), np.float64(num_tiles))
    return int(first), int(last)


@njit(cache=True, parallel=True)
def project(xyz, quaternion, scale, opacity, color, w2c, intrinsics, height, width, splats, tiles):
    """Projects all Gaussians of a scene into one camera.

    xyz [n, 3], quaternion [n, 4] (unit, wxyz), scale [n, 3], opacity [n], color [n, 3]: float32.
    w2c [4, 4], intrinsics [4] (fx, fy, cx, cy): float64.
    Fills splats [n, NUM_COLUMNS] and tiles [n, 4] (first x, last x, first y, last y; last exclusive; an empty range
    means not drawn). Returns the number of Gaussians whose values are not finite.
    """
    n = xyz.shape[0]
    fx, fy, cx, cy = intrinsics[0], intrinsics[1], intrinsics[2], intrinsics[3]
    tiles_x, tiles_y = (width + TILE_PX - 1) // TILE_PX, (height + TILE_PX - 1) // TILE_PX
    block = 1024
    broken = 0
    for chunk in prange((n + block - 1) // block):
        rotation = np.empty((3, 3))
        half = np.empty((3, 3))
        for g in range(chunk * block, min(n, (chunk + 1) * block)):
            tiles[g, 0] = tiles[g, 1] = tiles[g, 2] = tiles[g, 3] = 0
            x, y, z = _to_camera(w2c, xyz[g])
            _rotation(quaternion[g], rotation)
            _half_covariance(w2c, rotation, scale[g], half)
            check = x + y + z + opacity[g] + color[g, 0] + color[g, 1] + color[g, 2]
            for i in range(3):
                check += half[i, 0] + half[i, 1] + half[i, 2]
            if not math.isfinite(check):
                broken += 1
                continue
            if z < NEAR_PLANE or z > FAR_PLANE:
                continue
            slope_x, _ = _clamped_slope(x / z, fx, cx, width)
            slope_y, _ = _clamped_slope(y / z, fy, cy, height)
            s00, s01, s11 = EPS_2D, 0.0, EPS_2D
            for k in range(3):
                row_x = fx / z * (half[0, k] - slope_x * half[2, k])
                row_y = fy / z * (half[1, k] - slope_y * half[2, k])
                s00 += row_x * row_x
                s01 += row_x * row_y
                s11 += row_y * row_y
            det = s00 * s11 - s01 * s01
            if not (det > 0.0 and math.isfinite(det)) or opacity[g] < MIN_ALPHA_32:
                continue
            u, v = fx * x / z + cx, fy * y / z + cy
            extent = min(MAX_EXTENT, math.sqrt(max(0.0, 2.0 * math.log(255.0 * opacity[g]))))
            radius_x, radius_y = math.ceil(extent * math.sqrt(s00)), math.ceil(extent * math.sqrt(s11))
            if u + radius_x <= 0 or u - radius_x >= width or v + radius_y <= 0 or v - radius_y >= height:
                continue
            if radius_x <= 0 and radius_y <= 0:
                continue
            tiles[g, 0], tiles[g, 1] = _tile_range(u, radius_x, tiles_x)
            tiles[g, 2], tiles[g, 3] = _tile_range(v, radius_y, tiles_y)
            splats[g, U], splats[g, V] = u, v
            splats[g, CONIC_A], splats[g, CONIC_B], splats[g, CONIC_C] = s11 / det, -s01 / det, s00 / det
            splats[g, OPACITY] = opacity[g]
            splats[g, RED], splats[g, GREEN], splats[g, BLUE] = color[g, 0], color[g, 1], color[g, 2]
            splats[g, DEPTH] = z
    return broken


@njit(cache=True)
def depth_order(splats, tiles):
    """Indices of the Gaussians to draw, by ascending float32 depth, ties by index (a stable radix sort)."""
    n = splats.shape[0]
    keys, order = np.empty(n, np.uint32), np.empty(n, np.int32)
    bits = splats[:, DEPTH].copy().view(np.uint32)  # positive floats sort like their bits
    count = 0
    for g in range(n):
        if tiles[g, 1] > tiles[g, 0] and tiles[g, 3] > tiles[g, 2]:
            keys[count], order[count] = bits[g], g
            count += 1
    keys_next, order_next = np.empty(count, np.uint32), np.empty(count, np.int32)
    starts = np.empty(2048, np.int64)
    for shift in (0, 11, 22):
        starts[:] = 0
        for i in range(count):
            starts[(keys[i] >> shift) & 2047] += 1
        total = 0
        for digit in range(2048):
            total, starts[digit] = total + starts[digit], total
        for i in range(count):
            digit = (keys[i] >> shift) & 2047
            keys_next[starts[digit]], order_next[starts[digit]] = keys[i], order[i]
            starts[digit] += 1
        keys, keys_next = keys_next, keys
        order, order_next = order_next, order
    return order[:count].copy()


@njit(cache=True)
def bin_tiles(order, tiles, tiles_x, tiles_y):
    """Lists the Gaussians of every tile in depth order.

    Returns (tile_starts [tiles + 1], pair_rank [pairs], pair_slot [pairs], slot_starts [len(order) + 1]). Pairs are
    ordered by tile, then depth; a rank is a position in `order`; slots number the same pairs by Gaussian, so that the
    gradients of one Gaussian lie side by side.
    """
    tile_starts = np.zeros(tiles_x * tiles_y + 1, np.int64)
    slot_starts = np.empty(order.shape[0] + 1, np.int64)
    slots = 0
    for rank in range(order.shape[0]):
        x0, x1, y0, y1 = tiles[order[rank]]
        slot_starts[rank] = slots
        slots += (x1 - x0) * (y1 - y0)
        for ty in range(y0, y1):
            for tx in range(x0, x1):
                tile_starts[ty * tiles_x + tx + 1] += 1
    slot_starts[order.shape[0]] = slots
    for tile in range(tiles_x * tiles_y):
        tile_starts[tile + 1] += tile_starts[tile]
    cursor = tile_starts[:-1].copy()
    pair_rank, pair_slot = np.empty(slots, np.int32), np.empty(slots, np.int64)
    slot = 0
    for rank in range(order.shape[0]):
        x0, x1, y0, y1 = tiles[order[rank]]
        for ty in range(y0, y1):
            for tx in range(x0, x1):
                tile = ty * tiles_x + tx
                pair_rank[cursor[tile]], pair_slot[cursor[tile]] = rank, slot
                cursor[tile] += 1
                slot += 1
    return tile_starts, pair_rank, pair_slot, slot_starts


@njit(cache=True)
def _row_span(splat, reach, row, left, right):
    """Columns [first, last) of one pixel row, within left..right, that a splat's ellipse sigma <= reach can touch.

    A little generous: the exact tests are made per pixel.
    """
    a, b, c = np.float64(splat[CONIC_A]), np.float64(splat[CONIC_B]), np.float64(splat[CONIC_C])
    det = a * c - b * b
    if det <= 0.0:  # an extremely thin ellipse, after rounding to float32
        return left, right
    dy = splat[V] - (row + 0.5)
    inside = 2.0 * reach * a - det * dy * dy
    if inside < 0.0:
        return left, left
    middle = splat[U] + b * dy / a - 0.5
    half = math.sqrt(inside) / a + 0.01
    first = max(np.float64(left), math.ceil(middle - half))
    last = min(np.float64(right), math.floor(middle + half) + 1.0)
    return int(first), int(max(first, last))


@njit(cache=True, parallel=True)
def composite(splats, order, tile_starts, pair_rank, tile_order, workers, picture):
    """Front-to-back compositing. picture [5, h, w] receives red, green, blue, accumulated depth, transmittance."""
    height, width = picture.shape[1], picture.shape[2]
    tiles_x = (width + TILE_PX - 1) // TILE_PX
    for worker in prange(workers):
        acc = np.empty((5, TILE_PX, TILE_PX), np.float32)
        open_ = np.empty((TILE_PX, TILE_PX), np.bool_)
        for turn in range(worker, tile_order.shape[0], workers):
            tile = tile_order[turn]
            top, left = tile // tiles_x * TILE_PX, tile % tiles_x * TILE_PX
            bottom, right = min(height, top + TILE_PX), min(width, left + TILE_PX)
            acc[:4] = ZERO
            acc[4] = ONE
            open_[:] = True
            num_open = (bottom - top) * (right - left)
            for pair in range(tile_starts[tile], tile_starts[tile + 1]):
                num_open -= _composite_splat(splats[order[pair_rank[pair]]], acc, open_, top, bottom, left, right)
                if num_open == 0:
                    break
            for plane in range(5):
                for i in range(top, bottom):
                    for j in range(left, right):
                        picture[plane, i, j] = acc[plane, i - top, j - left]


@njit(cache=True)
def _composite_splat(splat, acc, open_, top, bottom, left, right):
    """Adds one splat to the pixels of a tile. Returns how many pixels it closed."""
    u, v, a, b, c, opacity = splat[U], splat[V], splat[CONIC_A], splat[CONIC_B], splat[CONIC_C], splat[OPACITY]
    reach = math.log(255.0 * opacity) + 1e-3
    closed = 0
    for i in range(top, bottom):
        first, last = _row_span(splat, reach, i, left, right)
        dy = v - (np.float32(i) + HALF)
        for j in range(first, last):
            if not open_[i - top, j - left]:
                continue
            dx = u - (np.float32(j) + HALF)
            sigma = HALF * (a * dx * dx + c * dy * dy) + b * dx * dy
            alpha = min(MAX_ALPHA_32, opacity * np.exp(-sigma))
            if sigma < ZERO or alpha < MIN_ALPHA_32:
                continue
            transmittance = acc[4, i - top, j - left]
            left_over = transmittance * (ONE - alpha)
            if left_over <= MIN_TRANSMITTANCE_32:
                open_[i - top, j - left] = False
                closed += 1
                continue
            weight = alpha * transmittance
            acc[0, i - top, j - left] += weight * splat[RED]
            acc[1, i - top, j - left] += weight * splat[GREEN]
            acc[2, i - top, j - left] += weight * splat[BLUE]
            acc[3, i - top, j - left] += weight * splat[DEPTH]
            acc[4, i - top, j - left] = left_over
    return closed


@njit(cache=True, parallel=True)
def composite_backward(
    splats, order, tile_starts, pair_rank, pair_slot, tile_order, workers, picture, grad_picture, slot_grads
):
    """Gradients of compositing per (tile, Gaussian) pair, slot_grads [pairs, NUM_COLUMNS], by replaying it.

    With T the transmittance before a splat, q = colour . grad (depth included) and R the part of the loss's linear
    form that lies behind the splat, d loss / d alpha = T q - R / (1 - alpha).
    """
    height, width = picture.shape[1], picture.shape[2]
    tiles_x = (width + TILE_PX - 1) // TILE_PX
    for worker in prange(workers):
        transmittance = np.empty((TILE_PX, TILE_PX), np.float32)
        behind = np.empty((TILE_PX, TILE_PX))
        open_ = np.empty((TILE_PX, TILE_PX), np.bool_)
        grad = np.zeros((4, TILE_PX, TILE_PX), np.float32)
        for turn in range(worker, tile_order.shape[0], workers):
            tile = tile_order[turn]
            top, left = tile // tiles_x * TILE_PX, tile % tiles_x * TILE_PX
            bottom, right = min(height, top + TILE_PX), min(width, left + TILE_PX)
            for i in range(top, bottom):
                for j in range(left, right):
                    total = 0.0
                    for plane in range(4):
                        grad[plane, i - top, j - left] = grad_picture[plane, i, j]
                        total += np.float64(grad_picture[plane, i, j]) * picture[plane, i, j]
                    total += np.float64(grad_picture[4, i, j]) * picture[4, i, j]
                    behind[i - top, j - left] = total
            transmittance[:] = ONE
            open_[:] = True
            num_open = (bottom - top) * (right - left)
            for pair in range(tile_starts[tile], tile_starts[tile + 1]):
                if num_open == 0:
                    slot_grads[pair_slot[pair]] = ZERO
                    continue
                num_open -= _composite_splat_backward(
                    splats[order[pair_rank[pair]]],
                    transmittance,
                    behind,
                    grad,
                    open_,
                    top,
                    bottom,
                    left,
                    right,
                    slot_grads[pair_slot[pair]],
                )


@njit(cache=True)
def _composite_splat_backward(splat, transmittance, behind, grad, open_, top, bottom, left, right, out):
    """The replay of _composite_splat: the same decisions, gradients summed into `out` [NUM_COLUMNS]."""
    u, v, a, b, c, opacity = splat[U], splat[V], splat[CONIC_A], splat[CONIC_B], splat[CONIC_C], splat[OPACITY]
    red, green, blue, depth = splat[RED], splat[GREEN], splat[BLUE], splat[DEPTH]
    g_u = g_v = g_a = g_b = g_c = g_opacity = g_red = g_green = g_blue = g_depth = ZERO
    reach = math.log(255.0 * opacity) + 1e-3
    closed = 0
    for i in range(top, bottom):
        first, last = _row_span(splat, reach, i, left, right)
        dy = v - (np.float32(i) + HALF)
        for j in range(first, last):
            if not open_[i - top, j - left]:
                continue
            dx = u - (np.float32(j) + HALF)
            sigma = HALF * (a * dx * dx + c * dy * dy) + b * dx * dy
            falloff = np.exp(-sigma)
            full = opacity * falloff
            alpha = min(MAX_ALPHA_32, full)
            if sigma < ZERO or alpha < MIN_ALPHA_32:
                continue
            before = transmittance[i - top, j - left]
            left_over = before * (ONE - alpha)
            if left_over <= MIN_TRANSMITTANCE_32:
                open_[i - top, j - left] = False
                closed += 1
                continue
            weight = alpha * before
            d_red, d_green = grad[0, i - top, j - left], grad[1, i - top, j - left]
            d_blue, d_depth = grad[2, i - top, j - left], grad[3, i - top, j - left]
            g_red += weight * d_red
            g_green += weight * d_green
            g_blue += weight * d_blue
            g_depth += weight * d_depth
            value = red * d_red + green * d_green + blue * d_blue + depth * d_depth
            rest = behind[i - top, j - left] - np.float64(weight) * value
            behind[i - top, j - left] = rest
            transmittance[i - top, j - left] = left_over
            if full > MAX_ALPHA_32:
                continue
            g_alpha = np.float32(before * value - rest / (ONE - alpha))
            g_opacity += falloff * g_alpha
            g_sigma = -full * g_alpha
            g_u += g_sigma * (a * dx + b * dy)
            g_v += g_sigma * (b * dx + c * dy)
            g_a += g_sigma * HALF * dx * dx
            g_b += g_sigma * dx * dy
            g_c += g_sigma * HALF * dy * dy
    out[U], out[V], out[CONIC_A], out[CONIC_B], out[CONIC_C], out[OPACITY] = g_u, g_v, g_a, g_b, g_c, g_opacity
    out[RED], out[GREEN], out[BLUE], out[DEPTH] = g_red, g_green, g_blue, g_depth
    return closed


@njit(cache=True, parallel=True)
def project_backward(
    xyz, quaternion, scale, w2c, intrinsics, height, width, splats, order, slot_starts, slot_grads, grads
):
    """Sums the slots of every Gaussian and takes the gradients back through the projection.

    Adds to grads [n, 14] (float32): xyz 3, quaternion 4 (of the normalised one), scale 3, opacity 1, colour 3.
    """
    fx, fy, cx, cy = intrinsics[0], intrinsics[1], intrinsics[2], intrinsics[3]
    count = order.shape[0]
    block = 1024
    for chunk in prange((count + block - 1) // block):
        rotation, half, d_half = np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3))
        total = np.empty(NUM_COLUMNS)
        for rank in range(chunk * block, min(count, (chunk + 1) * block)):
            g = order[rank]
            total[:] = 0.0
            for slot in range(slot_starts[rank], slot_starts[rank + 1]):
                for column in range(NUM_COLUMNS):
                    total[column] += slot_grads[slot, column]
            grads[g, 10] += total[OPACITY]
            grads[g, 11] += total[RED]
            grads[g, 12] += total[GREEN]
            grads[g, 13] += total[BLUE]
            x, y, z = _to_camera(w2c, xyz[g])
            _rotation(quaternion[g], rotation)
            _half_covariance(w2c, rotation, scale[g], half)
            slope_x, free_x = _clamped_slope(x / z, fx, cx, width)
            slope_y, free_y = _clamped_slope(y / z, fy, cy, height)
            a, b, c = np.float64(splats[g, CONIC_A]), np.float64(splats[g, CONIC_B]), np.float64(splats[g, CONIC_C])
            # d loss / d covariance = -conic G conic, G the symmetric gradient of the conic.
            g_a, g_b, g_c = total[CONIC_A], 0.5 * total[CONIC_B], total[CONIC_C]
            t00, t01 = a * g_a + b * g_b, a * g_b + b * g_c
            t10, t11 = b * g_a + c * g_b, b * g_b + c * g_c
            v00, v01, v11 = -(t00 * a + t01 * b), -(t00 * b + t01 * c), -(t10 * b + t11 * c)
            d_slope_x = d_slope_y = d_z = 0.0
            for k in range(3):
                # row = f / z * (half - slope * half_z); d row = 2 V row
                part_x, part_y = half[0, k] - slope_x * half[2, k], half[1, k] - slope_y * half[2, k]
                row_x, row_y = fx / z * part_x, fy / z * part_y
                d_row_x, d_row_y = 2.0 * (v00 * row_x + v01 * row_y), 2.0 * (v01 * row_x + v11 * row_y)
                d_z -= (d_row_x * row_x + d_row_y * row_y) / z
                d_part_x, d_part_y = d_row_x * fx / z, d_row_y * fy / z
                d_slope_x -= d_part_x * half[2, k]
                d_slope_y -= d_part_y * half[2, k]
                d_half[0, k], d_half[1, k] = d_part_x, d_part_y
                d_half[2, k] = -slope_x * d_part_x - slope_y * d_part_y
            d_x, d_y = total[U] * fx / z, total[V] * fy / z
            d_z += total[DEPTH] - (total[U] * fx * x + total[V] * fy * y) / (z * z)
            if free_x:
                d_x += d_slope_x / z
                d_z -= d_slope_x * x / (z * z)
            if free_y:
                d_y += d_slope_y / z
                d_z -= d_slope_y * y / (z * z)
            for k in range(3):
                grads[g, k] += w2c[0, k] * d_x + w2c[1, k] * d_y + w2c[2, k] * d_z
            _half_covariance_backward(w2c, quaternion[g], rotation, scale[g], d_half, grads[g])


@njit(cache=True)
def _half_covariance_backward(w2c, quaternion, rotation, scale, d_half, out):
    """Adds the gradients of quaternion (out[3:7]) and scale (out[7:10]), given that of R_w2c R_q diag(scale)."""
    d = np.empty((3, 3))  # of the rotation matrix R_q
    for k in range(3):
        d_scale = 0.0
        for i in range(3):
            value = w2c[0, i] * d_half[0, k] + w2c[1, i] * d_half[1, k] + w2c[2, i] * d_half[2, k]
            d_scale += value * rotation[i, k]
            d[i, k] = value * scale[k]
        out[7 + k] += d_scale
    w, x = np.float64(quaternion[0]), np.float64(quaternion[1])
    y, z = np.float64(quaternion[2]), np.float64(quaternion[3])
    out[3] += 2 * (x * (d[2, 1] - d[1, 2]) + y * (d[0, 2] - d[2, 0]) + z * (d[1, 0] - d[0, 1]))
    out[4] += 2 * (
        w * (d[2, 1] - d[1, 2]) + y * (d[0, 1] + d[1, 0]) + z * (d[0, 2] + d[2, 0]) - 2 * x * (d[1, 1] + d[2, 2])
    )
    out[5] += 2 * (
        w * (d[0, 2] - d[2, 0]) + x * (d[0, 1] + d[1, 0]) + z * (d[1, 2] + d[2, 1]) - 2 * y * (d[0, 0] + d[2, 2])
    )
    out[6] += 2 * (
        w * (d[1, 0] - d[0, 1]) + x * (d[0, 2] + d[2, 0]) + y * (d[1, 2] + d[2, 1]) - 2 * z * (d[0, 0] + d[1, 1])
    )
