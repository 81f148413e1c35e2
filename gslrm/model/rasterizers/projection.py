"""numba kernels of the CPU rasterizer, per Gaussian: projection into one camera and back. float64 inside."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

TILE_PX = 16
# Columns of the per-Gaussian table `splats` (float32), written here and read by compositing. The gradients that come
# back from compositing have the first ten, in the same order. U_REST and V_REST are what float32 leaves of the
# position: a tile subtracts its own corner first and adds them then, so that large images are no less exact.
U, V, CONIC_A, CONIC_B, CONIC_C, OPACITY, RED, GREEN, BLUE, DEPTH, REACH_X, REACH_Y, U_REST, V_REST = range(14)
NUM_COLUMNS, NUM_GRADS = 14, 10
# numba's cache on disk only notices a change of the file a kernel is in: after a change of these, remove __pycache__.

EPS_2D = 0.3  # pixel^2 added to the diagonal of the projected covariance: no Gaussian falls between pixels
FAR_PLANE = 1e10
FOV_MARGIN = 0.3  # the Jacobian is evaluated at most this fraction of half an image outside the image
MAX_EXTENT = 3.33  # standard deviations; sqrt(2 ln 255) rounded up
MIN_ALPHA = np.float32(1.0 / 255.0)
NEAR_PLANE = 0.01  # world units; Gaussians with z below it are not drawn


def kernel(**options):
    """Returns a decorator that compiles on first use, keeping the result on disk where that can be written."""

    def decorate(function):
        compiled = njit(nogil=True, error_model="numpy", **options)(function)
        try:
            compiled.enable_caching()
        except RuntimeError:  # installation and home are read-only: every process compiles anew, 5 seconds
            pass
        return compiled

    return decorate


@kernel()
def _rotation(quaternion, g):
    """Row g of a table of unit quaternions (w, x, y, z) -> the three columns of the rotation matrix."""
    w, x = np.float64(quaternion[g, 0]), np.float64(quaternion[g, 1])
    y, z = np.float64(quaternion[g, 2]), np.float64(quaternion[g, 3])
    return (
        (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
        (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
        (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)),
    )


@kernel()
def _turn(w2c, v):
    """The rotation of a world-to-camera matrix times a vector."""
    return (
        w2c[0, 0] * v[0] + w2c[0, 1] * v[1] + w2c[0, 2] * v[2],
        w2c[1, 0] * v[0] + w2c[1, 1] * v[1] + w2c[1, 2] * v[2],
        w2c[2, 0] * v[0] + w2c[2, 1] * v[1] + w2c[2, 2] * v[2],
    )


@kernel()
def _to_camera(w2c, xyz, g):
    x, y, z = _turn(w2c, (np.float64(xyz[g, 0]), np.float64(xyz[g, 1]), np.float64(xyz[g, 2])))
    return x + w2c[0, 3], y + w2c[1, 3], z + w2c[2, 3]


@kernel()
def _clamped_slope(slope, focal, center, size):
    """x / z kept within the image and a margin, as used in the Jacobian only; and whether it was left alone."""
    margin = FOV_MARGIN * 0.5 * size / focal
    highest = (size - center) / focal + margin
    lowest = -(center / focal + margin)
    clamped = min(highest, max(lowest, slope))
    return clamped, clamped == slope


@kernel()
def _flat_axis(w2c, column, scale, fx_z, fy_z, slope_x, slope_y):
    """An axis of the Gaussian, one standard deviation long: its depth, and the projection's Jacobian times it, pixels.
    The 2D covariance is the sum of flat flat^T over the three axes."""
    x, y, z = _turn(w2c, column)
    x, y, z = x * scale, y * scale, z * scale
    return z, fx_z * (x - slope_x * z), fy_z * (y - slope_y * z)


@kernel()
def _axis_backward(w2c, column, scale, fx_z, fy_z, slope_x, slope_y, per_z, v00, v01, v11):
    """Gradients that reach one axis from the 2D covariance's gradient V: those of (z, slope_x, slope_y, scale) and of
    the column of the rotation matrix."""
    depth, flat_x, flat_y = _flat_axis(w2c, column, scale, fx_z, fy_z, slope_x, slope_y)
    d_flat_x, d_flat_y = 2.0 * (v00 * flat_x + v01 * flat_y), 2.0 * (v01 * flat_x + v11 * flat_y)
    e0, e1 = d_flat_x * fx_z, d_flat_y * fy_z
    e2 = -slope_x * e0 - slope_y * e1
    m0 = w2c[0, 0] * e0 + w2c[1, 0] * e1 + w2c[2, 0] * e2
    m1 = w2c[0, 1] * e0 + w2c[1, 1] * e1 + w2c[2, 1] * e2
    m2 = w2c[0, 2] * e0 + w2c[1, 2] * e1 + w2c[2, 2] * e2
    d_z, d_scale = -(d_flat_x * flat_x + d_flat_y * flat_y) * per_z, m0 * column[0] + m1 * column[1] + m2 * column[2]
    return d_z, -e0 * depth, -e1 * depth, d_scale, (m0 * scale, m1 * scale, m2 * scale)


@kernel()
def touched(center, reach, origin, size):
    """First and last (exclusive) pixel of a tile or image at `origin`, from there, with centers within the reach."""
    first = max(math.ceil(center - reach - 0.5 - origin), 0.0)
    last = min(math.floor(center + reach - 0.5 - origin) + 1.0, float(size))
    return (int(first), int(last)) if last > first else (0, 0)


@kernel()
def project(xyz, quaternion, scale, opacity, color, w2c, intrinsics, height, width, start, stop, splats, tiles):
    """Projects Gaussians start..stop-1 of a scene into one camera.

    xyz [n, 3], quaternion [n, 4] (unit, wxyz), scale [n, 3], opacity [n], color [n, 3]: float32.
    w2c [4, 4], intrinsics [4] (fx, fy, cx, cy): float64.
    Fills splats [n, NUM_COLUMNS] and tiles [n, 4] (first x, last x, first y, last y; last exclusive; an empty range
    means not drawn). Returns the number of Gaussians with values that are not finite.
    """
    fx, fy, cx, cy = intrinsics[0], intrinsics[1], intrinsics[2], intrinsics[3]
    broken = 0
    for g in range(start, stop):
        tiles[g, 0] = tiles[g, 1] = tiles[g, 2] = tiles[g, 3] = 0
        x, y, z = _to_camera(w2c, xyz, g)
        o = np.float64(opacity[g])
        check = x + y + z + o + color[g, 0] + color[g, 1] + color[g, 2] + scale[g, 0] + scale[g, 1] + scale[g, 2]
        if not math.isfinite(check + quaternion[g, 0] + quaternion[g, 1] + quaternion[g, 2] + quaternion[g, 3]):
            broken += 1
            continue
        if z < NEAR_PLANE or z > FAR_PLANE or opacity[g] < MIN_ALPHA:
            continue  # before anything that costs: batches are padded with Gaussians that nobody sees
        rotation = _rotation(quaternion, g)
        slope_x, _ = _clamped_slope(x / z, fx, cx, width)
        slope_y, _ = _clamped_slope(y / z, fy, cy, height)
        s00, s01, s11 = EPS_2D, 0.0, EPS_2D
        for k in range(3):
            _, flat_x, flat_y = _flat_axis(w2c, rotation[k], np.float64(scale[g, k]), fx / z, fy / z, slope_x, slope_y)
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
        # The ellipse alpha >= 1/255, a little enlarged for the rounding of alpha: outside it nothing is drawn.
        reach_x, reach_y = (reach * 1.001 + 0.001) * math.sqrt(s00), (reach * 1.001 + 0.001) * math.sqrt(s11)
        first, last = touched(u, reach_x, 0.0, width)
        tiles[g, 0], tiles[g, 1] = first // TILE_PX, (last - 1) // TILE_PX + 1
        first, last = touched(v, reach_y, 0.0, height)
        tiles[g, 2], tiles[g, 3] = first // TILE_PX, (last - 1) // TILE_PX + 1
        splats[g, U], splats[g, V] = u, v
        splats[g, U_REST], splats[g, V_REST] = u - splats[g, U], v - splats[g, V]
        splats[g, CONIC_A], splats[g, CONIC_B], splats[g, CONIC_C] = s11 / det, -s01 / det, s00 / det
        splats[g, OPACITY] = opacity[g]
        splats[g, RED], splats[g, GREEN], splats[g, BLUE] = color[g, 0], color[g, 1], color[g, 2]
        splats[g, DEPTH] = z
        splats[g, REACH_X], splats[g, REACH_Y] = reach_x, reach_y
    return broken


@kernel()
def project_backward(
    xyz, quaternion, scale, w2c, intrinsics, height, width, splats, order, slot_starts, slot_grads, start, stop, grads
):
    """Sums the slots of the Gaussians order[start..stop-1] and takes the gradients back through the projection, into
    grads [n, 14] (float32, zeros): xyz 3, quaternion 4 (of the normalized one), scale 3, opacity 1, color 3."""
    fx, fy, cx, cy = intrinsics[0], intrinsics[1], intrinsics[2], intrinsics[3]
    sums = np.empty(NUM_GRADS)
    for rank in range(start, stop):
        g = order[rank]
        sums[:] = 0.0
        for slot in range(slot_starts[rank], slot_starts[rank + 1]):
            for column in range(NUM_GRADS):
                sums[column] += slot_grads[slot, column]
        if not sums.any():
            continue  # hidden behind others: about half of the Gaussians of a closed surface
        g_u, g_v, g_a, g_b, g_c = sums[U], sums[V], sums[CONIC_A], 0.5 * sums[CONIC_B], sums[CONIC_C]
        grads[g, 10], grads[g, 11], grads[g, 12], grads[g, 13] = sums[OPACITY], sums[RED], sums[GREEN], sums[BLUE]
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
        d_z += sums[DEPTH] - (d_x * x + d_y * y) * per_z
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
        # d rotation / d quaternion, from sums and differences of the columns' gradients d0, d1, d2
        sum_xy, sum_xz, sum_yz = d1[0] + d0[1], d2[0] + d0[2], d2[1] + d1[2]
        turn_x, turn_y, turn_z = d1[2] - d2[1], d2[0] - d0[2], d0[1] - d1[0]
        grads[g, 3] = 2 * (qx * turn_x + qy * turn_y + qz * turn_z)
        grads[g, 4] = 2 * (qw * turn_x + qy * sum_xy + qz * sum_xz - 2 * qx * (d1[1] + d2[2]))
        grads[g, 5] = 2 * (qw * turn_y + qx * sum_xy + qz * sum_yz - 2 * qy * (d0[0] + d2[2]))
        grads[g, 6] = 2 * (qw * turn_z + qx * sum_xz + qy * sum_yz - 2 * qz * (d0[0] + d1[1]))
