"""The mouse's skin as one implicit surface: a swept spine tube, ellipsoids and tapered limbs, blended smoothly."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np


@dataclass(frozen=True)
class Skin:
    """What the surface is made of, body frame, float64.

    spine: [m, 15] per station: position, tangent, left, up (3 each), half width, half height up, half height down.
    ellipsoids: [e, 15] centre, three axes (rows), three radii. cones: [c, 8] end a, end b, radius a, radius b.
    blend: width of the smooth union, world units.
    """

    spine: np.ndarray
    ellipsoids: np.ndarray
    cones: np.ndarray
    blend: float

    def evaluate(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Signed distance (about; negative inside) [n] and its gradient [n, 3] at points [n, 3]."""
        return _evaluate(np.ascontiguousarray(points), self.spine, self.ellipsoids, self.cones, self.blend)

    def project(self, points: np.ndarray, steps: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moves points [n, 3] onto the surface. Returns points, outward unit normals, remaining distances [n]."""
        for _ in range(steps):
            distance, gradient = self.evaluate(points)
            squared = np.maximum((gradient**2).sum(1), 0.05)
            points = points - (distance / squared)[:, None] * gradient
        distance, gradient = self.evaluate(points)
        normals = gradient / np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-9)
        return points, normals, distance

    def openness(self, points: np.ndarray, normals: np.ndarray, reaches: tuple = (0.03, 0.08, 0.16)) -> np.ndarray:
        """[n] 0..1, how much of the surroundings a surface point sees: 1 in the open, 0 in a crevice."""
        total, weight = np.zeros(len(points)), 0.0
        for share, reach in zip((0.5, 0.3, 0.2), reaches):
            distance, _ = self.evaluate(points + reach * normals)
            total += share * np.clip(distance / reach, 0.0, 1.0)
            weight += share
        return total / weight


@numba.njit(cache=True, fastmath=False)
def _tube(p, spine, out):
    """Distance to the swept tube; writes the gradient into out[0:3]."""
    best, nearest = 1e30, 0
    for j in range(spine.shape[0]):
        dx, dy, dz = p[0] - spine[j, 0], p[1] - spine[j, 1], p[2] - spine[j, 2]
        square = dx * dx + dy * dy + dz * dz
        if square < best:
            best, nearest = square, j
    last = spine.shape[0] - 1
    along = 0.0
    for c in range(3):
        along += (p[c] - spine[nearest, c]) * spine[nearest, 3 + c]
    j0 = nearest if along > 0 else nearest - 1
    j0 = min(max(j0, 0), last - 1)
    j1 = j0 + 1
    length2, t = 0.0, 0.0
    for c in range(3):
        step = spine[j1, c] - spine[j0, c]
        length2 += step * step
        t += step * (p[c] - spine[j0, c])
    t = t / length2
    length = np.sqrt(length2)
    beyond = 0.0  # distance past an end of the tube, along it
    if t < 0.0:
        beyond, t = t * length, 0.0
    elif t > 1.0:
        beyond, t = (t - 1.0) * length, 1.0
    x, z = 0.0, 0.0
    for c in range(3):
        d = p[c] - (spine[j0, c] * (1 - t) + spine[j1, c] * t)
        x += d * (spine[j0, 6 + c] * (1 - t) + spine[j1, 6 + c] * t)
        z += d * (spine[j0, 9 + c] * (1 - t) + spine[j1, 9 + c] * t)
    column = 13 if z > 0 else 14
    w = spine[j0, 12] * (1 - t) + spine[j1, 12] * t
    h = spine[j0, column] * (1 - t) + spine[j1, column] * t
    w_slope = (spine[j1, 12] - spine[j0, 12]) / length
    h_slope = (spine[j1, column] - spine[j0, column]) / length
    cap = min(w, h)
    interior = (nearest > 0 or along > 0) and (nearest < last or along < 0)
    if interior:
        beyond = 0.0
    rho = np.sqrt((x / w) ** 2 + (z / h) ** 2 + (beyond / cap) ** 2)
    if rho < 0.05:
        for c in range(3):
            out[c] = spine[j0, 9 + c]
        return -0.95 * cap
    gx, gz = x / (w * w * rho), z / (h * h * rho)
    ga = beyond / (cap * cap * rho)
    if beyond == 0.0:
        ga = -(x * x * w_slope / w**3 + z * z * h_slope / h**3) / rho
    size = np.sqrt(gx * gx + gz * gz + ga * ga)
    for c in range(3):
        out[c] = (
            gx * (spine[j0, 6 + c] * (1 - t) + spine[j1, 6 + c] * t)
            + gz * (spine[j0, 9 + c] * (1 - t) + spine[j1, 9 + c] * t)
            + ga * (spine[j0, 3 + c] * (1 - t) + spine[j1, 3 + c] * t)
        ) / size
    return (rho - 1.0) / size


@numba.njit(cache=True)
def _evaluate(points, spine, ellipsoids, cones, blend):
    n = points.shape[0]
    distance, gradient = np.empty(n), np.empty((n, 3))
    g, local = np.empty(3), np.empty(3)
    for i in range(n):
        p = points[i]
        d0 = _tube(p, spine, g)
        # log-sum-exp relative to the tube's distance, so that nothing overflows
        total = 1.0
        gx, gy, gz = g[0], g[1], g[2]
        for e in range(ellipsoids.shape[0]):
            dx, dy, dz = p[0] - ellipsoids[e, 0], p[1] - ellipsoids[e, 1], p[2] - ellipsoids[e, 2]
            widest = max(ellipsoids[e, 12], ellipsoids[e, 13], ellipsoids[e, 14])
            if np.sqrt(dx * dx + dy * dy + dz * dz) - widest > max(d0, 0.0) + 8 * blend:
                continue
            k0, k1 = 0.0, 0.0
            for a in range(3):
                q = dx * ellipsoids[e, 3 + 3 * a] + dy * ellipsoids[e, 4 + 3 * a] + dz * ellipsoids[e, 5 + 3 * a]
                r = ellipsoids[e, 12 + a]
                k0 += (q / r) ** 2
                k1 += (q / (r * r)) ** 2
                local[a] = q / (r * r)
            k0, k1 = np.sqrt(k0), np.sqrt(k1) + 1e-9
            d = k0 * (k0 - 1.0) / k1
            weight = np.exp(min((d0 - d) / blend, 60.0))
            total += weight
            weight /= k1
            for a in range(3):
                gx += weight * local[a] * ellipsoids[e, 3 + 3 * a]
                gy += weight * local[a] * ellipsoids[e, 4 + 3 * a]
                gz += weight * local[a] * ellipsoids[e, 5 + 3 * a]
        for e in range(cones.shape[0]):
            bx, by, bz = cones[e, 3] - cones[e, 0], cones[e, 4] - cones[e, 1], cones[e, 5] - cones[e, 2]
            dx, dy, dz = p[0] - cones[e, 0], p[1] - cones[e, 1], p[2] - cones[e, 2]
            t = (dx * bx + dy * by + dz * bz) / (bx * bx + by * by + bz * bz)
            t = min(max(t, 0.0), 1.0)
            dx, dy, dz = dx - t * bx, dy - t * by, dz - t * bz
            far = np.sqrt(dx * dx + dy * dy + dz * dz) + 1e-9
            d = far - (cones[e, 6] * (1 - t) + cones[e, 7] * t)
            if d > max(d0, 0.0) + 8 * blend:
                continue
            weight = np.exp(min((d0 - d) / blend, 60.0))
            total += weight
            gx += weight * dx / far
            gy += weight * dy / far
            gz += weight * dz / far
        distance[i] = d0 - blend * np.log(total)
        gradient[i, 0], gradient[i, 1], gradient[i, 2] = gx / total, gy / total, gz / total
    return distance, gradient
