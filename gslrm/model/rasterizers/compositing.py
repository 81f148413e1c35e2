"""numba kernels of the CPU rasterizer, per image: depth order, tiles, compositing and its gradients. float32.

Compositing is branch-free over runs of eight pixels (half a row of a tile), so that LLVM turns it into vector
instructions. No fast-math: the backward pass replays the forward pass and must take the same decisions.
The kernels release the GIL: cpu.py deals the tiles to threads of its own. Results do not depend on their number: a tile
is the work of one thread, and writes its gradients to slots of its own.
"""

from __future__ import annotations

import numpy as np

# isort: off
from .projection import (
    BLUE, CONIC_A, CONIC_B, CONIC_C, DEPTH, GREEN, MIN_ALPHA, NUM_COLUMNS, NUM_GRADS, OPACITY, REACH_X, REACH_Y, RED,
    TILE_PX, U_REST, V_REST, U, V, kernel, touched,
)  # fmt: skip

MAX_ALPHA = np.float32(0.999)
MIN_TRANSMITTANCE = np.float32(1e-4)  # compositing stops before the splat that would bring a pixel to or below this
HALF, ONE, ZERO = np.float32(0.5), np.float32(1.0), np.float32(0.0)
PLANE_T = 4  # transmittance's plane in a image [5, h, w]; the others are red, green, blue, depth

# Cephes' expf: exp(r) for |r| <= ln(2) / 2.
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504088896341), np.float32(0.693359375), np.float32(-2.12194440e-4)
E0, E1, E2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
E3, E4, E5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
MAX_EXPONENT = np.float32(80.0)


# ---- order and tiles ------------------------------------------------------------------------------------------------


@kernel()
def depth_order(splats, tiles):
    """Indices of the Gaussians to draw, by ascending float32 depth, ties by index (a stable radix sort)."""
    n = splats.shape[0]
    keys, order = np.empty(n, np.uint32), np.empty(n, np.int32)
    count = 0
    for g in range(n):
        if tiles[g, 1] > tiles[g, 0] and tiles[g, 3] > tiles[g, 2]:
            keys[count], order[count] = np.float32(splats[g, DEPTH]).view(np.uint32), g  # positive: sort by the bits
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


@kernel()
def bin_tiles(order, tiles, tiles_x, tiles_y):
    """Lists the Gaussians of every tile in depth order: (tile_starts [tiles + 1], pair_splat [pairs], pair_slot
    [pairs], slot_starts [len(order) + 1]). Pairs are ordered by tile, then depth; slots number the same pairs by
    Gaussian, so that the gradients of one Gaussian lie side by side."""
    boxes = tiles[order]  # in order: read at random once, not twice
    tile_starts = np.zeros(tiles_x * tiles_y + 1, np.int64)
    slot_starts = np.empty(order.shape[0] + 1, np.int64)
    slots = 0
    for rank in range(order.shape[0]):
        slot_starts[rank] = slots
        slots += (boxes[rank, 1] - boxes[rank, 0]) * (boxes[rank, 3] - boxes[rank, 2])
        for ty in range(boxes[rank, 2], boxes[rank, 3]):
            for tx in range(boxes[rank, 0], boxes[rank, 1]):
                tile_starts[ty * tiles_x + tx + 1] += 1
    slot_starts[order.shape[0]] = slots
    for tile in range(tiles_x * tiles_y):
        tile_starts[tile + 1] += tile_starts[tile]
    cursor = tile_starts[:-1].copy()
    pair_splat, pair_slot = np.empty(slots, np.int32), np.empty(slots, np.int64)
    slot = 0
    for rank in range(order.shape[0]):
        for ty in range(boxes[rank, 2], boxes[rank, 3]):
            for tx in range(boxes[rank, 0], boxes[rank, 1]):
                tile = ty * tiles_x + tx
                pair_splat[cursor[tile]], pair_slot[cursor[tile]] = order[rank], slot
                cursor[tile] += 1
                slot += 1
    return tile_starts, pair_splat, pair_slot, slot_starts


# ---- compositing ----------------------------------------------------------------------------------------------------
# A tile is worked on in one flat array `acc` of planes of 16 x 16 pixels (one array, because LLVM must know that they
# do not overlap). Plane LIVE holds the transmittance while a pixel is open, 0 once it is closed or where it lies
# outside the image: such a pixel takes nothing more.

PLANE = TILE_PX * TILE_PX
P1, P2, P3, P4, P5 = (np.uint32(i * PLANE) for i in range(1, 6))
LIVE = 5 * PLANE
RUN = 8  # pixels worked on at once
HAND = 32  # splats taken from the table at once
# Changes nothing, but tells LLVM that the planes end before the backward pass's sums: else it does not vectorise.
RUN_MASK = np.uint32(PLANE - RUN)
SUMS = 6 * PLANE  # backward: ten sums, RUN lanes each, behind the planes
L0, L1, L2, L3, L4, L5, L6, L7, L8, L9 = (np.uint32(SUMS + i * RUN) for i in range(NUM_GRADS))


@kernel(inline="always")
def _exp_minus(s):
    """exp(-s) in float32 to 1e-7 relative, for 0 <= s <= 80; vectorises, which the C library's expf does not."""
    n = np.int32(s * -LOG2_E - HALF)
    whole = np.float32(n)
    r = (-s - whole * LN2_HIGH) - whole * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    return (p * r * r + r + ONE) * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@kernel()
def _start_tile(acc, image, grad_image, top, left, rows, columns):
    """Planes of a tile before its first splat: zeros, transmittance, LIVE; backward: gradients of red, green, blue and
    depth, R (see composite), LIVE."""
    acc[:] = ZERO
    for i in range(rows):
        for j in range(columns):
            p, y, x = i * TILE_PX + j, top + i, left + j
            acc[LIVE + p] = ONE
            if grad_image is None:
                acc[PLANE_T * PLANE + p] = ONE
            else:
                total = np.float64(grad_image[PLANE_T, y, x]) * image[PLANE_T, y, x]
                for plane in range(4):
                    acc[plane * PLANE + p] = grad_image[plane, y, x]
                    total += np.float64(grad_image[plane, y, x]) * image[plane, y, x]
                acc[PLANE_T * PLANE + p] = total


@kernel(inline="always")
def _composite_splat(acc, splat, top, left, rows, columns, grad_image):
    first_row, last_row = touched(splat[V], splat[REACH_Y], top, rows)
    first_column, last_column = touched(splat[U], splat[REACH_X], left, columns)
    u, v = splat[U] - np.float32(left) + splat[U_REST], splat[V] - np.float32(top) + splat[V_REST]
    a, b, c = splat[CONIC_A], splat[CONIC_B], splat[CONIC_C]
    red, green, blue, depth, opacity = splat[RED], splat[GREEN], splat[BLUE], splat[DEPTH], splat[OPACITY]
    if grad_image is not None:
        acc[SUMS:] = ZERO
    for i in range(first_row, last_row):
        dy = v - (np.float32(i) + HALF)
        for run in range(first_column // RUN, (last_column + RUN - 1) // RUN):
            start = np.uint32(i * TILE_PX + run * RUN) & RUN_MASK
            u_run = u - np.float32(run * RUN)
            for lane in range(RUN):
                k = np.uint32(lane)
                p = start + k
                dx = u_run - (np.float32(np.int32(lane)) + HALF)
                sigma = HALF * (a * dx * dx + c * dy * dy) + b * dx * dy
                full = opacity * _exp_minus(min(max(sigma, ZERO), MAX_EXPONENT))
                alpha = min(MAX_ALPHA, full)
                before = acc[p + P5]
                after = before * (ONE - alpha)
                hit = (sigma >= ZERO) & (alpha >= MIN_ALPHA)
                taken = hit & (after > MIN_TRANSMITTANCE)
                weight = alpha * before if taken else ZERO
                if grad_image is None:
                    acc[p] += weight * red
                    acc[p + P1] += weight * green
                    acc[p + P2] += weight * blue
                    acc[p + P3] += weight * depth
                    acc[p + P4] = after if taken else acc[p + P4]
                else:
                    d_red, d_green, d_blue, d_depth = acc[p], acc[p + P1], acc[p + P2], acc[p + P3]
                    value = red * d_red + green * d_green + blue * d_blue + depth * d_depth
                    rest = acc[p + P4] - weight * value
                    acc[p + P4] = rest
                    d_alpha = before * value - rest / (ONE - alpha)
                    d_sigma = -full * d_alpha if taken & (full <= MAX_ALPHA) else ZERO
                    acc[k + L0] += d_sigma * dx
                    acc[k + L1] += d_sigma * dy
                    acc[k + L2] += d_sigma * dx * dx
                    acc[k + L3] += d_sigma * dx * dy
                    acc[k + L4] += d_sigma * dy * dy
                    acc[k + L5] += d_sigma
                    acc[k + L6] += weight * d_red
                    acc[k + L7] += weight * d_green
                    acc[k + L8] += weight * d_blue
                    acc[k + L9] += weight * d_depth
                acc[p + P5] = after if taken else (ZERO if hit else before)


@kernel(fastmath={"reassoc"})
def _sum_lanes(acc, splat, slot_grads, slot):
    """Gradients of one splat in one tile from the lanes' moments of d_sigma and weighted colors."""
    for column in range(NUM_GRADS):
        total = ZERO
        for k in range(RUN):
            total += acc[SUMS + column * RUN + k]
        slot_grads[slot, column] = total
    moment_x, moment_y = slot_grads[slot, U], slot_grads[slot, V]
    slot_grads[slot, U] = splat[CONIC_A] * moment_x + splat[CONIC_B] * moment_y
    slot_grads[slot, V] = splat[CONIC_B] * moment_x + splat[CONIC_C] * moment_y
    slot_grads[slot, CONIC_A] *= HALF
    slot_grads[slot, CONIC_C] *= HALF
    slot_grads[slot, OPACITY] /= -splat[OPACITY]


@kernel()
def composite(splats, tile_starts, pair_splat, pair_slot, tile_order, worker, workers, image, grad_image, slot_grads):
    """Front-to-back compositing of the tiles tile_order[worker::workers], or its gradients by doing it again.

    Forward (grad_image and slot_grads None, for which numba compiles a kernel of its own): image [5, h, w] receives
    red, green, blue, accumulated depth, transmittance. Backward: slot_grads [pairs, NUM_GRADS] (zeros) receives the
    gradients per (tile, Gaussian) pair. With T the transmittance before a splat, q = (color, depth) . gradient, and R
    what lies behind the splat of sum(weight q) + T_final gradient_T:  d loss / d alpha = T q - R / (1 - alpha).
    """
    acc, hand = np.empty(SUMS + NUM_GRADS * RUN, np.float32), np.empty((HAND, NUM_COLUMNS), np.float32)
    height, width = image.shape[1], image.shape[2]
    tiles_x = (width + TILE_PX - 1) // TILE_PX
    for turn in range(worker, tile_order.shape[0], workers):
        tile = tile_order[turn]
        top, left = tile // tiles_x * TILE_PX, tile % tiles_x * TILE_PX
        rows, columns = min(height - top, TILE_PX), min(width - left, TILE_PX)
        _start_tile(acc, image, grad_image, top, left, rows, columns)
        for pair in range(tile_starts[tile], tile_starts[tile + 1]):
            held = (pair - tile_starts[tile]) % HAND
            if held == 0:
                if not acc[LIVE : LIVE + PLANE].any():
                    break
                # The next splats side by side: reads that do not wait for one another cost half as much.
                for i in range(min(HAND, tile_starts[tile + 1] - pair)):
                    for column in range(NUM_COLUMNS):
                        hand[i, column] = splats[pair_splat[pair + i], column]
            _composite_splat(acc, hand[held], top, left, rows, columns, grad_image)
            if grad_image is not None:
                _sum_lanes(acc, hand[held], slot_grads, pair_slot[pair])
        if grad_image is None:
            for plane in range(5):
                for i in range(rows):
                    for j in range(columns):
                        image[plane, top + i, left + j] = acc[plane * PLANE + i * TILE_PX + j]
