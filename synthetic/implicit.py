"""The mouse's skin as one implicit surface: a swept spine tube, ellipsoids and tapered limbs, blended smoothly."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np


@dataclass(frozen=True)
class Skin:
    """Parts of the surface, body frame, float64.

    spine: [m, 15] per station: position, tangent, left, up (3 each), half width, half height up, half height down.
    ellipsoids: [e, 15] center, three axes (rows), three radii. cones: [c, 8] end a, end b, radius a, radius b.
    blend: width of the smooth union, body lengths.
    """

    spine: np.ndarray
    ellipsoids: np.ndarray
    cones: np.ndarray
    blend: float

    def evaluate(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns approximate signed distances [n] (negative inside) and their gradients [n, 3] at points [n, 3]."""
        return _evaluate(np.ascontiguousarray(points), self.spine, self.ellipsoids, self.cones, self.blend)

    def project(self, points: np.ndarray, steps: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moves points [n, 3] onto the surface. Returns points, outward unit normals, remaining distances [n]."""
        for _ in range(steps):
            distance, gradient = self.evaluate(points)
            squared = np.maximum((gradient**2).sum(1), 0.05)  # blends flatten the gradient; a step stays bounded
            points = points - (distance / squared)[:, None] * gradient
        distance, gradient = self.evaluate(points)
        return points, gradient / np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-9), distance

    def openness(self, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Returns [n] 0..1, how much of its surroundings a surface point sees: 1 in the open, 0 in a crevice."""
        total, weight = np.zeros(len(points)), 0.0
        for share, reach in ((0.5, 0.03), (0.3, 0.08), (0.2, 0.16)):  # where nothing is near, distance equals reach
            distance, _ = self.evaluate(points + reach * normals)
            total += share * np.clip(distance / reach, 0.0, 1.0)
            weight += share
        return total / weight


@numba.njit(cache=True)
def _tube(p, spine, row, out):
    """Returns the distance of p [3] to the swept tube; writes its gradient into out[0:3]. row: [15] scratch."""
    best, nearest = 1e30, 0
    for j in range(len(spine)):
        square = 0.0
        for c in range(3):
            square += (p[c] - spine[j, c]) ** 2
        if square < best:
            best, nearest = square, j
    last = len(spine) - 1
    along = 0.0
    for c in range(3):
        along += (p[c] - spine[nearest, c]) * spine[nearest, 3 + c]
    j0 = min(max(nearest if along > 0 else nearest - 1, 0), last - 1)
    j1 = j0 + 1
    length2, t = 0.0, 0.0
    for c in range(3):
        step = spine[j1, c] - spine[j0, c]
        length2 += step * step
        t += step * (p[c] - spine[j0, c])
    length, t = np.sqrt(length2), t / length2
    beyond = 0.0  # distance past an end of the tube, along it
    if (nearest == 0 and along <= 0) or (nearest == last and along >= 0):
        beyond = min(t, 0.0) * length + max(t - 1.0, 0.0) * length
    t = min(max(t, 0.0), 1.0)
    for k in range(15):
        row[k] = spine[j0, k] * (1 - t) + spine[j1, k] * t
    x, z = 0.0, 0.0
    for c in range(3):
        x += (p[c] - row[c]) * row[6 + c]
        z += (p[c] - row[c]) * row[9 + c]
    column = 13 if z > 0 else 14
    w, h = row[12], row[column]
    cap = min(w, h)
    rho = np.sqrt((x / w) ** 2 + (z / h) ** 2 + (beyond / cap) ** 2)
    if rho < 0.05:  # on the axis no direction leads out
        for c in range(3):
            out[c] = spine[j0, 9 + c]
        return -0.95 * cap
    gx, gz, ga = x / (w * w * rho), z / (h * h * rho), beyond / (cap * cap * rho)
    if beyond == 0.0:  # the tube's taper tilts the gradient along it
        w_slope, h_slope = (spine[j1, 12] - spine[j0, 12]) / length, (spine[j1, column] - spine[j0, column]) / length
        ga = -(x * x * w_slope / w**3 + z * z * h_slope / h**3) / rho
    size = np.sqrt(gx * gx + gz * gz + ga * ga)
    for c in range(3):
        out[c] = (gx * row[6 + c] + gz * row[9 + c] + ga * row[3 + c]) / size
    return (rho - 1.0) / size


@numba.njit(cache=True)
def _evaluate(points, spine, ellipsoids, cones, blend):
    distance, gradient = np.empty(len(points)), np.empty((len(points), 3))
    row, g, d, local = np.empty(15), np.empty(3), np.empty(3), np.empty(3)
    for i in range(len(points)):
        p = points[i]
        d0 = _tube(p, spine, row, g)
        far = max(d0, 0.0) + 8 * blend  # parts farther than this do not change the sum
        total = 1.0  # log-sum-exp relative to the tube's distance, so that nothing overflows
        for e in range(len(ellipsoids)):
            for c in range(3):
                d[c] = p[c] - ellipsoids[e, c]
            widest = max(ellipsoids[e, 12], ellipsoids[e, 13], ellipsoids[e, 14])
            if np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]) - widest > far:
                continue
            k0, k1 = 0.0, 0.0
            for a in range(3):
                q, r = 0.0, ellipsoids[e, 12 + a]
                for c in range(3):
                    q += d[c] * ellipsoids[e, 3 + 3 * a + c]
                k0 += (q / r) ** 2
                local[a] = q / (r * r)
                k1 += local[a] ** 2
            k0, k1 = np.sqrt(k0), np.sqrt(k1) + 1e-9
            weight = np.exp(min((d0 - k0 * (k0 - 1.0) / k1) / blend, 60.0))
            total += weight
            for a in range(3):
                for c in range(3):
                    g[c] += weight / k1 * local[a] * ellipsoids[e, 3 + 3 * a + c]
        for e in range(len(cones)):
            t, length2 = 0.0, 0.0
            for c in range(3):
                axis = cones[e, 3 + c] - cones[e, c]
                d[c] = p[c] - cones[e, c]
                t += d[c] * axis
                length2 += axis * axis
            t = min(max(t / length2, 0.0), 1.0)
            for c in range(3):
                d[c] -= t * (cones[e, 3 + c] - cones[e, c])
            away = np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]) + 1e-9
            depth = away - (cones[e, 6] * (1 - t) + cones[e, 7] * t)
            if depth > far:
                continue
            weight = np.exp(min((d0 - depth) / blend, 60.0))
            total += weight
            for c in range(3):
                g[c] += weight * d[c] / away
        distance[i] = d0 - blend * np.log(total)
        for c in range(3):
            gradient[i, c] = g[c] / total
    return distance, gradient
