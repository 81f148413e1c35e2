"""numba kernels of the CPU rasterizer, per picture: depth order, tiles, compositing and its gradients. float32.

Compositing is branch-free over 8 pixels at a time, so that LLVM turns it into vector instructions. No fast-math: the
backward pass replays the forward pass and must take the same decisions.

The kernels release the GIL and use no numba threading: cpu.py deals the tiles to threads of its own. Results do not
depend on the number of threads: a tile is the work of one thread, and writes its gradients to slots of its own.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .layout import (
    BLUE,
    CONIC_A,
    CONIC_B,
    CONIC_C,
    DEPTH,
    GREEN,
    NUM_GRADS,
    OPACITY,
    REACH_X,
    REACH_Y,
    RED,
    TILE_PX,
    U,
    V,
)

MIN_ALPHA = np.float32(1.0 / 255.0)
MAX_ALPHA = np.float32(0.999)
MIN_TRANSMITTANCE = np.float32(1e-4)  # compositing stops before the splat that would bring a pixel to or below this
HALF, ONE, ZERO = np.float32(0.5), np.float32(1.0), np.float32(0.0)
LANES = 8
PLANE_T = 4  # transmittance's plane in a picture [5, h, w]; the others are red, green, blue, depth

# Cephes' expf: exp(r) for |r| <= ln(2) / 2.
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504088896341), np.float32(0.693359375), np.float32(-2.12194440e-4)
E0, E1, E2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
E3, E4, E5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
MAX_EXPONENT = np.float32(80.0)


# ---- order and tiles ------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, error_model="numpy")
def depth_order(splats, tiles):
    """Indices of the Gaussians to draw, by ascending float32 depth, ties by index (a stable radix sort)."""
    n = splats.shape[0]
    keys, order = np.empty(n, np.uint32), np.empty(n, np.int32)
    count = 0
    for g in range(n):
        if tiles[g, 1] > tiles[g, 0] and tiles[g, 3] > tiles[g, 2]:
            keys[count], order[count] = (
                np.float32(splats[g, DEPTH]).view(np.uint32),
                g,
            )  # positive floats sort like their bits
            count += 1
    keys_next, order_next = np.empty(n, np.uint32), np.empty(n, np.int32)
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


@njit(cache=True, nogil=True, error_model="numpy")
def bin_tiles(order, tiles, tiles_x, tiles_y):
    """Lists the Gaussians of every tile in depth order.

    Returns (tile_starts [tiles + 1], pair_splat [pairs], pair_slot [pairs], slot_starts [len(order) + 1]). Pairs are
    ordered by tile, then depth; slots number the same pairs by Gaussian, so that the gradients of one Gaussian lie
    side by side.
    """
    tile_starts = np.zeros(tiles_x * tiles_y + 1, np.int64)
    slot_starts = np.empty(order.shape[0] + 1, np.int64)
    slots = 0
    for rank in range(order.shape[0]):
        g = order[rank]
        slot_starts[rank] = slots
        slots += (tiles[g, 1] - tiles[g, 0]) * (tiles[g, 3] - tiles[g, 2])
        for ty in range(tiles[g, 2], tiles[g, 3]):
            for tx in range(tiles[g, 0], tiles[g, 1]):
                tile_starts[ty * tiles_x + tx + 1] += 1
    slot_starts[order.shape[0]] = slots
    for tile in range(tiles_x * tiles_y):
        tile_starts[tile + 1] += tile_starts[tile]
    cursor = tile_starts[:-1].copy()
    pair_splat, pair_slot = np.empty(slots, np.int32), np.empty(slots, np.int64)
    slot = 0
    for rank in range(order.shape[0]):
        g = order[rank]
        for ty in range(tiles[g, 2], tiles[g, 3]):
            for tx in range(tiles[g, 0], tiles[g, 1]):
                tile = ty * tiles_x + tx
                pair_splat[cursor[tile]], pair_slot[cursor[tile]] = g, slot
                cursor[tile] += 1
                slot += 1
    return tile_starts, pair_splat, pair_slot, slot_starts


# ---- compositing ----------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, inline="always")
def _exp_minus(s):
    """exp(-s) in float32 to 1e-7 relative, for 0 <= s <= 80; vectorises, which the C library's expf does not."""
    n = np.int32(s * -LOG2_E - HALF)
    whole = np.float32(n)
    r = (-s - whole * LN2_HIGH) - whole * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    return (p * r * r + r + ONE) * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def _touched(centre, reach, origin, size):
    """First and last (exclusive) pixel of a tile at `origin`, relative to it, whose centres lie within the reach."""
    first = max(math.ceil(centre - reach - 0.5 - origin), 0.0)
    last = min(math.floor(centre + reach - 0.5 - origin) + 1.0, float(size))
    return (int(first), int(last)) if last > first else (0, 0)


@njit(cache=True, nogil=True, error_model="numpy")
def _open_pixels(live):
    count = 0
    for p in range(TILE_PX * TILE_PX):
        count += live[p] > ZERO
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def composite(splats, tile_starts, pair_splat, tile_order, worker, workers, picture):
    """Front-to-back compositing of the tiles tile_order[worker::workers].

    picture [5, h, w] receives red, green, blue, accumulated depth, transmittance.
    """
    height, width = picture.shape[1], picture.shape[2]
    tiles_x = (width + TILE_PX - 1) // TILE_PX
    size = np.uint32(TILE_PX * TILE_PX)
    # The five planes of the tile, and `live`: the transmittance while a pixel is open, 0 once it is closed, so that a
    # closed pixel takes nothing more. One array, because LLVM need not fear aliases within it.
    acc = np.empty(6 * TILE_PX * TILE_PX, np.float32)
    for turn in range(worker, tile_order.shape[0], workers):
        tile = tile_order[turn]
        top, left = tile // tiles_x * TILE_PX, tile % tiles_x * TILE_PX
        rows, columns = min(height - top, TILE_PX), min(width - left, TILE_PX)
        acc[:] = ZERO
        acc[PLANE_T * TILE_PX * TILE_PX : 5 * TILE_PX * TILE_PX] = ONE
        for i in range(rows):
            acc[(5 * TILE_PX + i) * TILE_PX : (5 * TILE_PX + i) * TILE_PX + columns] = ONE
        for pair in range(tile_starts[tile], tile_starts[tile + 1]):
            if (pair - tile_starts[tile]) % 32 == 31 and _open_pixels(acc[5 * TILE_PX * TILE_PX :]) == 0:
                break
            splat = splats[pair_splat[pair]]
            u, v, opacity = splat[U], splat[V], splat[OPACITY]
            a, b, c = splat[CONIC_A], splat[CONIC_B], splat[CONIC_C]
            red, green, blue, depth = splat[RED], splat[GREEN], splat[BLUE], splat[DEPTH]
            first_row, last_row = _touched(v, splat[REACH_Y], top, rows)
            first_column, last_column = _touched(u, splat[REACH_X], left, columns)
            for block in range(first_column // LANES, (last_column + LANES - 1) // LANES):
                x0 = np.float32(left + block * LANES)
                for i in range(first_row, last_row):
                    dy = v - (np.float32(top + i) + HALF)
                    base = np.uint32(i * TILE_PX + block * LANES) & np.uint32(248)
                    for lane in range(LANES):
                        p = base + np.uint32(lane)
                        dx = u - (x0 + np.float32(np.int32(lane)) + HALF)
                        sigma = HALF * (a * dx * dx + c * dy * dy) + b * dx * dy
                        alpha = min(MAX_ALPHA, opacity * _exp_minus(min(max(sigma, ZERO), MAX_EXPONENT)))
                        before = acc[p + np.uint32(5) * size]
                        after = before * (ONE - alpha)
                        hit = (sigma >= ZERO) & (alpha >= MIN_ALPHA)
                        taken = hit & (after > MIN_TRANSMITTANCE)
                        weight = alpha * before if taken else ZERO
                        acc[p] += weight * red
                        acc[p + size] += weight * green
                        acc[p + np.uint32(2) * size] += weight * blue
                        acc[p + np.uint32(3) * size] += weight * depth
                        q = p + np.uint32(4) * size
                        acc[q] = after if taken else acc[q]
                        acc[p + np.uint32(5) * size] = after if taken else (ZERO if hit else before)
        for plane in range(5):
            for i in range(rows):
                for j in range(columns):
                    picture[plane, top + i, left + j] = acc[(plane * TILE_PX + i) * TILE_PX + j]


@njit(cache=True, nogil=True, error_model="numpy")
def composite_backward(
    splats, tile_starts, pair_splat, pair_slot, tile_order, worker, workers, picture, grad_picture, slot_grads
):
    """Gradients of compositing per (tile, Gaussian) pair, slot_grads [pairs, NUM_GRADS], by replaying it.

    With T the transmittance before a splat, q = (colour, depth) . gradient, and R what lies behind the splat of
    sum(weight q) + T_final gradient_T:  d loss / d alpha = T q - R / (1 - alpha).
    """
    height, width = picture.shape[1], picture.shape[2]
    tiles_x = (width + TILE_PX - 1) // TILE_PX
    size = np.uint32(TILE_PX * TILE_PX)
    # Planes of the tile: gradients of red, green, blue, depth; R; live (see composite). Then the lanes' sums.
    acc = np.empty(6 * TILE_PX * TILE_PX + NUM_GRADS * LANES, np.float32)
    # `& 248` below changes nothing: it tells LLVM that pixels and lanes cannot overlap, without which it does not
    # vectorise (4 times slower).
    lanes = acc[6 * TILE_PX * TILE_PX :]
    live = acc[5 * TILE_PX * TILE_PX : 6 * TILE_PX * TILE_PX]
    end = np.uint32(6) * size
    for turn in range(worker, tile_order.shape[0], workers):
        tile = tile_order[turn]
        top, left = tile // tiles_x * TILE_PX, tile % tiles_x * TILE_PX
        rows, columns = min(height - top, TILE_PX), min(width - left, TILE_PX)
        acc[:] = ZERO
        for i in range(rows):
            for j in range(columns):
                p = i * TILE_PX + j
                live[p] = ONE
                total = np.float64(grad_picture[PLANE_T, top + i, left + j]) * picture[PLANE_T, top + i, left + j]
                for plane in range(4):
                    value = grad_picture[plane, top + i, left + j]
                    acc[plane * TILE_PX * TILE_PX + p] = value
                    total += np.float64(value) * picture[plane, top + i, left + j]
                acc[4 * TILE_PX * TILE_PX + p] = total
        num_open = 1
        for pair in range(tile_starts[tile], tile_starts[tile + 1]):
            if (pair - tile_starts[tile]) % 32 == 31 and num_open > 0:
                num_open = _open_pixels(live)
            lanes[:] = ZERO
            splat = splats[pair_splat[pair]]
            u, v, opacity = splat[U], splat[V], splat[OPACITY]
            a, b, c = splat[CONIC_A], splat[CONIC_B], splat[CONIC_C]
            red, green, blue, depth = splat[RED], splat[GREEN], splat[BLUE], splat[DEPTH]
            first_row, last_row = _touched(v, splat[REACH_Y], top, rows)
            first_column, last_column = _touched(u, splat[REACH_X], left, columns)
            if num_open == 0:
                last_row = first_row
            for block in range(first_column // LANES, (last_column + LANES - 1) // LANES):
                x0 = np.float32(left + block * LANES)
                for i in range(first_row, last_row):
                    dy = v - (np.float32(top + i) + HALF)
                    base = np.uint32(i * TILE_PX + block * LANES) & np.uint32(248)
                    for lane in range(LANES):
                        k = np.uint32(lane)
                        p = base + k
                        dx = u - (x0 + np.float32(np.int32(lane)) + HALF)
                        sigma = HALF * (a * dx * dx + c * dy * dy) + b * dx * dy
                        full = opacity * _exp_minus(min(max(sigma, ZERO), MAX_EXPONENT))
                        alpha = min(MAX_ALPHA, full)
                        before = acc[p + np.uint32(5) * size]
                        after = before * (ONE - alpha)
                        hit = (sigma >= ZERO) & (alpha >= MIN_ALPHA)
                        taken = hit & (after > MIN_TRANSMITTANCE)
                        weight = alpha * before if taken else ZERO
                        d_red, d_green = acc[p], acc[p + size]
                        d_blue, d_depth = acc[p + np.uint32(2) * size], acc[p + np.uint32(3) * size]
                        value = red * d_red + green * d_green + blue * d_blue + depth * d_depth
                        rest = acc[p + np.uint32(4) * size] - weight * value
                        acc[p + np.uint32(4) * size] = rest
                        acc[p + np.uint32(5) * size] = after if taken else (ZERO if hit else before)
                        d_alpha = before * value - rest / (ONE - alpha)
                        d_sigma = -full * d_alpha if taken & (full <= MAX_ALPHA) else ZERO
                        acc[end + k] += d_sigma * dx
                        acc[end + np.uint32(8) + k] += d_sigma * dy
                        acc[end + np.uint32(16) + k] += d_sigma * dx * dx
                        acc[end + np.uint32(24) + k] += d_sigma * dx * dy
                        acc[end + np.uint32(32) + k] += d_sigma * dy * dy
                        acc[end + np.uint32(40) + k] += d_sigma
                        acc[end + np.uint32(48) + k] += weight * d_red
                        acc[end + np.uint32(56) + k] += weight * d_green
                        acc[end + np.uint32(64) + k] += weight * d_blue
                        acc[end + np.uint32(72) + k] += weight * d_depth
            _sum_lanes(lanes, splat, slot_grads[pair_slot[pair]])


@njit(cache=True, nogil=True, error_model="numpy")
def _sum_lanes(lanes, splat, out):
    """Gradients of one splat in one tile from the moments of d_sigma and the weighted colours, 8 lanes each."""
    for column in range(NUM_GRADS):
        total = ZERO
        for k in range(LANES):
            total += lanes[column * LANES + k]
        out[column] = total
    moment_x, moment_y = out[U], out[V]
    out[U] = splat[CONIC_A] * moment_x + splat[CONIC_B] * moment_y
    out[V] = splat[CONIC_B] * moment_x + splat[CONIC_C] * moment_y
    out[CONIC_A], out[CONIC_C] = HALF * out[CONIC_A], HALF * out[CONIC_C]
    out[OPACITY] = -out[OPACITY] / splat[OPACITY]
