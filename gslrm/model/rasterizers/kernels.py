"""numba kernels of the CPU rasterizer: one picture of one scene at a time.

All kernels live in this one file because numba's on-disk cache notices a change of the file a kernel is in, not of
the files it calls into. Geometry (per Gaussian) is computed in float64; compositing (per pixel) in float32,
branch-free over 8 pixels at a time, so that LLVM turns it into vector instructions. No fast-math: the backward pass
replays the forward pass and must take the same decisions.

The kernels release the GIL and use no numba threading: cpu.py runs them in threads of its own. Results do not depend
on the number of threads: a tile, or a Gaussian, is the work of one thread, and the sum over the tiles of a Gaussian
runs in a fixed order.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

EPS_2D = 0.3  # pixel^2 added to the diagonal of the projected covariance: no Gaussian falls between pixels
FAR_PLANE = 1e10
FOV_MARGIN = 0.3  # the Jacobian is evaluated at most this fraction of half a picture outside the picture
MAX_EXTENT = 3.33  # standard deviations; sqrt(2 ln 255) rounded up
NEAR_PLANE = 0.01  # world units; Gaussians with z below it are not drawn
TILE_PX = 16
LANES = 8

MIN_ALPHA = np.float32(1.0 / 255.0)
MAX_ALPHA = np.float32(0.999)
MIN_TRANSMITTANCE = np.float32(1e-4)  # compositing stops before the splat that would bring a pixel to or below this
HALF, ONE, ZERO = np.float32(0.5), np.float32(1.0), np.float32(0.0)

# Columns of the per-Gaussian table `splats` (float32): what compositing needs. The gradients that come back from it
# have the first ten, in the same order.
U, V, CONIC_A, CONIC_B, CONIC_C, OPACITY, RED, GREEN, BLUE, DEPTH, REACH_X, REACH_Y = range(12)
NUM_COLUMNS, NUM_GRADS = 12, 10
PLANE_T = 4  # transmittance's plane in a picture [5, h, w]; the others are red, green, blue, depth

# Cephes' expf: exp(r) for |r| <= ln(2) / 2.
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504088896341), np.float32(0.693359375), np.float32(-2.12194440e-4)
E0, E1, E2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
E3, E4, E5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
MAX_EXPONENT = np.float32(80.0)


@njit(cache=True, nogil=True, inline="always")
def _exp_minus(s):
    """exp(-s) in float32 to 1e-7 relative, for 0 <= s <= 80; vectorises, which the C library's expf does not."""
    n = np.int32(s * -LOG2_E - HALF)
    whole = np.float32(n)
    r = (-s - whole * LN2_HIGH) - whole * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    return (p * r * r + r + ONE) * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


# ---- geometry: one Gaussian, one camera, float64 --------------------------------------------------------------------


@njit(cache=True, nogil=True, error_model="numpy")
def _rotation(quaternion, g):
    """Row g of a table of unit quaternions (w, x, y, z) -> the three columns of the rotation matrix."""
    w, x = np.float64(quaternion[g, 0]), np.float64(quaternion[g, 1])
    y, z = np.float64(quaternion[g, 2]), np.float64(quaternion[g, 3])
    return (
        (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
        (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
        (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)),
    )


@njit(cache=True, nogil=True, error_model="numpy")
def _to_camera(w2c, xyz, g):
    x, y, z = np.float64(xyz[g, 0]), np.float64(xyz[g, 1]), np.float64(xyz[g, 2])
    return (
        w2c[0, 0] * x + w2c[0, 1] * y + w2c[0, 2] * z + w2c[0, 3],
        w2c[1, 0] * x + w2c[1, 1] * y + w2c[1, 2] * z + w2c[1, 3],
        w2c[2, 0] * x + w2c[2, 1] * y + w2c[2, 2] * z + w2c[2, 3],
    )


@njit(cache=True, nogil=True, error_model="numpy")
def _clamped_slope(slope, focal, centre, size):
    """x / z kept within the picture and a margin, as used in the Jacobian only; and whether it was left alone."""
    margin = FOV_MARGIN * 0.5 * size / focal
    highest = (size - centre) / focal + margin
    lowest = -(centre / focal + margin)
    clamped = min(highest, max(lowest, slope))
    return clamped, clamped == slope


@njit(cache=True, nogil=True, error_model="numpy")
def _axis(w2c, column, scale):
    """An axis of the Gaussian, one standard deviation long, in the camera's frame.

    The covariance in the camera's frame is the sum of axis axis^T over the three axes.
    """
    return (
        (w2c[0, 0] * column[0] + w2c[0, 1] * column[1] + w2c[0, 2] * column[2]) * scale,
        (w2c[1, 0] * column[0] + w2c[1, 1] * column[1] + w2c[1, 2] * column[2]) * scale,
        (w2c[2, 0] * column[0] + w2c[2, 1] * column[1] + w2c[2, 2] * column[2]) * scale,
    )


@njit(cache=True, nogil=True, error_model="numpy")
def _flatten(axis, fx_z, fy_z, slope_x, slope_y):
    """The Jacobian of the projection times an axis: pixels."""
    return fx_z * (axis[0] - slope_x * axis[2]), fy_z * (axis[1] - slope_y * axis[2])


@njit(cache=True, nogil=True, error_model="numpy")
def _axis_backward(w2c, column, scale, fx_z, fy_z, slope_x, slope_y, per_z, v00, v01, v11):
    """Gradients that reach one axis from the 2D covariance's gradient V.

    Returns those of (z, slope_x, slope_y, scale) and of the column of the rotation matrix.
    """
    axis = _axis(w2c, column, scale)
    flat_x, flat_y = _flatten(axis, fx_z, fy_z, slope_x, slope_y)
    d_flat_x, d_flat_y = 2.0 * (v00 * flat_x + v01 * flat_y), 2.0 * (v01 * flat_x + v11 * flat_y)
    e0, e1 = d_flat_x * fx_z, d_flat_y * fy_z
    e2 = -slope_x * e0 - slope_y * e1
    m0 = w2c[0, 0] * e0 + w2c[1, 0] * e1 + w2c[2, 0] * e2
    m1 = w2c[0, 1] * e0 + w2c[1, 1] * e1 + w2c[2, 1] * e2
    m2 = w2c[0, 2] * e0 + w2c[1, 2] * e1 + w2c[2, 2] * e2
    return (
        -(d_flat_x * flat_x + d_flat_y * flat_y) * per_z,
        -e0 * axis[2],
        -e1 * axis[2],
        m0 * column[0] + m1 * column[1] + m2 * column[2],
        (m0 * scale, m1 * scale, m2 * scale),
    )


@njit(cache=True, nogil=True, error_model="numpy")
def _tile_range(centre, radius, num_tiles):
    first = min(max(math.floor((centre - radius) / TILE_PX), 0.0), float(num_tiles))
    last = min(max(math.ceil((centre + radius) / TILE_PX), 0.0), float(num_tiles))
    return int(first), int(last)


@njit(cache=True, nogil=True, error_model="numpy")
def project(xyz, quaternion, scale, opacity, color, w2c, intrinsics, height, width, start, stop, splats, tiles):
    """Projects Gaussians start..stop-1 of a scene into one camera.

    xyz [n, 3], quaternion [n, 4] (unit, wxyz), scale [n, 3], opacity [n], color [n, 3]: float32.
    w2c [4, 4], intrinsics [4] (fx, fy, cx, cy): float64.
    Fills splats [n, NUM_COLUMNS] and tiles [n, 4] (first x, last x, first y, last y; last exclusive; an empty range
    means not drawn). Returns the number of Gaussians with values that are not finite.
    """
    fx, fy, cx, cy = intrinsics[0], intrinsics[1], intrinsics[2], intrinsics[3]
    tiles_x, tiles_y = (width + TILE_PX - 1) // TILE_PX, (height + TILE_PX - 1) // TILE_PX
    broken = 0
    for g in range(start, stop):
        tiles[g, 0] = tiles[g, 1] = tiles[g, 2] = tiles[g, 3] = 0
        x, y, z = _to_camera(w2c, xyz, g)
        rotation = _rotation(quaternion, g)
        o = np.float64(opacity[g])
        check = x + y + z + o + color[g, 0] + color[g, 1] + color[g, 2] + scale[g, 0] + scale[g, 1] + scale[g, 2]
        if not math.isfinite(check + rotation[0][0] + rotation[1][0] + rotation[1][1]):
            broken += 1
            continue
        if z < NEAR_PLANE or z > FAR_PLANE or opacity[g] < MIN_ALPHA:
            continue
        slope_x, _ = _clamped_slope(x / z, fx, cx, width)
        slope_y, _ = _clamped_slope(y / z, fy, cy, height)
        s00, s01, s11 = EPS_2D, 0.0, EPS_2D
        for k in range(3):
            axis = _axis(w2c, rotation[k], np.float64(scale[g, k]))
            flat_x, flat_y = _flatten(axis, fx / z, fy / z, slope_x, slope_y)
            s00 += flat_x * flat_x
            s01 += flat_x * flat_y
            s11 += flat_y * flat_y
        det = s00 * s11 - s01 * s01
        if not (det > 0.0 and math.isfinite(det)):
            continue
        u, v = fx * x / z + cx, fy * y / z + cy
        reach = math.sqrt(max(0.0, 2.0 * math.log(255.0 * o)))
        radius_x = math.ceil(min(MAX_EXTENT, reach) * math.sqrt(s00))
        radius_y = math.ceil(min(MAX_EXTENT, reach) * math.sqrt(s11))
        if u + radius_x <= 0 or u - radius_x >= width or v + radius_y <= 0 or v - radius_y >= height:
            continue
        tiles[g, 0], tiles[g, 1] = _tile_range(u, radius_x, tiles_x)
        tiles[g, 2], tiles[g, 3] = _tile_range(v, radius_y, tiles_y)
        splats[g, U], splats[g, V] = u, v
        splats[g, CONIC_A], splats[g, CONIC_B], splats[g, CONIC_C] = s11 / det, -s01 / det, s00 / det
        splats[g, OPACITY] = opacity[g]
        splats[g, RED], splats[g, GREEN], splats[g, BLUE] = color[g, 0], color[g, 1], color[g, 2]
        splats[g, DEPTH] = z
        # The ellipse alpha >= 1/255, a little enlarged for the rounding of alpha: outside it nothing is drawn.
        splats[g, REACH_X] = (reach * 1.001 + 0.001) * math.sqrt(s00)
        splats[g, REACH_Y] = (reach * 1.001 + 0.001) * math.sqrt(s11)
    return broken


@njit(cache=True, nogil=True, error_model="numpy")
def project_backward(
    xyz, quaternion, scale, w2c, intrinsics, height, width, splats, order, slot_starts, slot_grads, start, stop, grads
):
    """Sums the slots of the Gaussians order[start..stop-1] and takes the gradients back through the projection.

    Writes grads [n, 14] (float32): xyz 3, quaternion 4 (of the normalised one), scale 3, opacity 1, colour 3.
    """
    fx, fy, cx, cy = intrinsics[0], intrinsics[1], intrinsics[2], intrinsics[3]
    for rank in range(start, stop):
        g = order[rank]
        g_u = g_v = g_a = g_b = g_c = g_opacity = g_red = g_green = g_blue = g_depth = 0.0
        for slot in range(slot_starts[rank], slot_starts[rank + 1]):
            g_u += slot_grads[slot, U]
            g_v += slot_grads[slot, V]
            g_a += slot_grads[slot, CONIC_A]
            g_b += 0.5 * slot_grads[slot, CONIC_B]
            g_c += slot_grads[slot, CONIC_C]
            g_depth += slot_grads[slot, DEPTH]
            g_opacity += slot_grads[slot, OPACITY]
            g_red += slot_grads[slot, RED]
            g_green += slot_grads[slot, GREEN]
            g_blue += slot_grads[slot, BLUE]
        grads[g, 10], grads[g, 11], grads[g, 12], grads[g, 13] = g_opacity, g_red, g_green, g_blue
        x, y, z = _to_camera(w2c, xyz, g)
        rotation = _rotation(quaternion, g)
        per_z = 1.0 / z
        fx_z, fy_z = fx * per_z, fy * per_z
        slope_x, free_x = _clamped_slope(x / z, fx, cx, width)
        slope_y, free_y = _clamped_slope(y / z, fy, cy, height)
        a, b, c = np.float64(splats[g, CONIC_A]), np.float64(splats[g, CONIC_B]), np.float64(splats[g, CONIC_C])
        # d loss / d covariance = V = -conic G conic, G the symmetric gradient of the conic.
        t00, t01 = a * g_a + b * g_b, a * g_b + b * g_c
        t10, t11 = b * g_a + c * g_b, b * g_b + c * g_c
        v00, v01, v11 = -(t00 * a + t01 * b), -(t00 * b + t01 * c), -(t10 * b + t11 * c)
        camera = (fx_z, fy_z, slope_x, slope_y, per_z, v00, v01, v11)
        z0, sx0, sy0, grads[g, 7], d0 = _axis_backward(w2c, rotation[0], np.float64(scale[g, 0]), *camera)
        z1, sx1, sy1, grads[g, 8], d1 = _axis_backward(w2c, rotation[1], np.float64(scale[g, 1]), *camera)
        z2, sx2, sy2, grads[g, 9], d2 = _axis_backward(w2c, rotation[2], np.float64(scale[g, 2]), *camera)
        d_slope_x, d_slope_y, d_z = sx0 + sx1 + sx2, sy0 + sy1 + sy2, z0 + z1 + z2
        d_x, d_y = g_u * fx_z, g_v * fy_z
        d_z += g_depth - (d_x * x + d_y * y) * per_z
        if free_x:
            d_x += d_slope_x * per_z
            d_z -= d_slope_x * x * per_z * per_z
        if free_y:
            d_y += d_slope_y * per_z
            d_z -= d_slope_y * y * per_z * per_z
        for k in range(3):
            grads[g, k] = w2c[0, k] * d_x + w2c[1, k] * d_y + w2c[2, k] * d_z
        qw, qx = np.float64(quaternion[g, 0]), np.float64(quaternion[g, 1])
        qy, qz = np.float64(quaternion[g, 2]), np.float64(quaternion[g, 3])
        grads[g, 3] = 2 * (qx * (d1[2] - d2[1]) + qy * (d2[0] - d0[2]) + qz * (d0[1] - d1[0]))
        grads[g, 4] = 2 * (qw * (d1[2] - d2[1]) + qy * (d1[0] + d0[1]) + qz * (d2[0] + d0[2]) - 2 * qx * (d1[1] + d2[2]))
        grads[g, 5] = 2 * (qw * (d2[0] - d0[2]) + qx * (d1[0] + d0[1]) + qz * (d2[1] + d1[2]) - 2 * qy * (d0[0] + d2[2]))
        grads[g, 6] = 2 * (qw * (d0[1] - d1[0]) + qx * (d2[0] + d0[2]) + qy * (d2[1] + d1[2]) - 2 * qz * (d0[0] + d1[1]))


# ---- order and tiles ------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, error_model="numpy")
def depth_order(splats, tiles):
    """Indices of the Gaussians to draw, by ascending float32 depth, ties by index (a stable radix sort)."""
    n = splats.shape[0]
    keys, order = np.empty(n, np.uint32), np.empty(n, np.int32)
    count = 0
    for g in range(n):
        if tiles[g, 1] > tiles[g, 0] and tiles[g, 3] > tiles[g, 2]:
            keys[count], order[count] = np.float32(splats[g, DEPTH]).view(np.uint32), g  # positive floats sort like their bits
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
