"""The mouse's skin as one implicit surface: a swept spine tube, ellipsoids and tapered limbs, blended smoothly."""

from dataclasses import dataclass

import numpy as np

from gslrm.model.rasterizers.projection import kernel


@dataclass(frozen=True)
class Skin:
    """Parts of the surface, body frame, float64."""

    spine: np.ndarray  # [m, 15] per station: position, tangent, left, up (3 each), half width, half height up, down
    ellipsoids: np.ndarray  # [e, 15] center, three axes (rows), three radii
    cones: np.ndarray  # [c, 8] end a, end b, radius a, radius b
    blend: float = 0.020  # width of the smooth union, body lengths

    def evaluate(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns approximate signed distances [n] (negative inside) and their gradients [n, 3] at points [n, 3]."""
        return _evaluate(np.ascontiguousarray(points), self.spine, self.ellipsoids, self.cones, self.blend)

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moves points [n, 3] onto the surface. Returns points, outward unit normals, remaining distances [n]."""
        for _ in range(3):
            distance, gradient = self.evaluate(points)
            squared = np.maximum((gradient**2).sum(1), 0.05)  # blends flatten the gradient; a step stays bounded
            points = points - (distance / squared)[:, None] * gradient
        distance, gradient = self.evaluate(points)
        return points, gradient / np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-9), distance

    def openness(self, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Returns [n] 0..1, how much of its surroundings a surface point sees: 1 in the open, 0 in a crevice."""
        total = np.zeros(len(points))
        for share, reach in ((0.5, 0.03), (0.3, 0.08), (0.2, 0.16)):  # where nothing is near, distance equals reach
            total += share * np.clip(self.evaluate(points + reach * normals)[0] / reach, 0.0, 1.0)
        return total


# Vectors are tuples of three: numba keeps them in registers, where arrays would cost an allocation per point.
@kernel()
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@kernel()
def _plus(a, weight, b):  # a weight of -1 subtracts exactly
    return a[0] + weight * b[0], a[1] + weight * b[1], a[2] + weight * b[2]


@kernel()
def _between(a, b, t):
    return a[0] * (1 - t) + b[0] * t, a[1] * (1 - t) + b[1] * t, a[2] * (1 - t) + b[2] * t


@kernel()
def _tube(p, spine):
    """Returns the distance of p [3] to the swept tube and its gradient."""
    best, nearest = 1e30, 0
    for j in range(len(spine)):
        d = _plus(p, -1.0, spine[j])
        square = _dot(d, d)
        if square < best:
            best, nearest = square, j
    last = len(spine) - 1
    along = _dot(_plus(p, -1.0, spine[nearest]), spine[nearest, 3:])
    first = min(max(nearest if along > 0 else nearest - 1, 0), last - 1)
    a, b = spine[first], spine[first + 1]
    step = _plus(b, -1.0, a)
    length, t = np.sqrt(_dot(step, step)), _dot(step, _plus(p, -1.0, a)) / _dot(step, step)
    beyond = 0.0  # distance past an end of the tube, along it
    if (nearest == 0 and along <= 0) or (nearest == last and along >= 0):
        beyond = min(t, 0.0) * length + max(t - 1.0, 0.0) * length
    t = min(max(t, 0.0), 1.0)
    tangent, left, up = _between(a[3:], b[3:], t), _between(a[6:], b[6:], t), _between(a[9:], b[9:], t)
    d = _plus(p, -1.0, _between(a, b, t))
    x, z = _dot(d, left), _dot(d, up)
    column = 13 if z > 0 else 14
    w, h = a[12] * (1 - t) + b[12] * t, a[column] * (1 - t) + b[column] * t
    cap = min(w, h)
    rho = np.sqrt((x / w) ** 2 + (z / h) ** 2 + (beyond / cap) ** 2)
    if rho < 0.05:  # on the axis no direction leads out
        return -0.95 * cap, (a[9], a[10], a[11])
    gx, gz, ga = x / (w * w * rho), z / (h * h * rho), beyond / (cap * cap * rho)
    if beyond == 0.0:  # the tube's taper tilts the gradient along it
        w_slope, h_slope = (b[12] - a[12]) / length, (b[column] - a[column]) / length
        ga = -(x * x * w_slope / w**3 + z * z * h_slope / h**3) / rho
    size = np.sqrt(gx * gx + gz * gz + ga * ga)
    g = _plus(_plus(_plus((0.0, 0.0, 0.0), gx, left), gz, up), ga, tangent)
    return (rho - 1.0) / size, (g[0] / size, g[1] / size, g[2] / size)


@kernel()
def _evaluate(points, spine, ellipsoids, cones, blend):
    distance, gradient = np.empty(len(points)), np.empty((len(points), 3))
    for i in range(len(points)):
        p = points[i]
        d0, g = _tube(p, spine)
        far = max(d0, 0.0) + 8 * blend  # parts farther than this do not change the sum
        total = 1.0  # log-sum-exp relative to the tube's distance, so that nothing overflows
        for e in ellipsoids:
            d = _plus(p, -1.0, e)
            if np.sqrt(_dot(d, d)) - max(e[12], e[13], e[14]) > far:
                continue
            x, y, z = _dot(d, e[3:]), _dot(d, e[6:]), _dot(d, e[9:])
            scaled = (x / e[12], y / e[13], z / e[14])
            slope = (x / (e[12] * e[12]), y / (e[13] * e[13]), z / (e[14] * e[14]))
            k0, k1 = np.sqrt(_dot(scaled, scaled)), np.sqrt(_dot(slope, slope)) + 1e-9
            weight = np.exp(min((d0 - k0 * (k0 - 1.0) / k1) / blend, 60.0))
            total += weight
            for a in range(3):
                g = _plus(g, weight / k1 * slope[a], e[3 + 3 * a :])
        for c in cones:
            axis, d = _plus(c[3:], -1.0, c), _plus(p, -1.0, c)
            t = min(max(_dot(d, axis) / _dot(axis, axis), 0.0), 1.0)
            d = _plus(d, -t, axis)
            away = np.sqrt(_dot(d, d)) + 1e-9
            depth = away - (c[6] * (1 - t) + c[7] * t)
            if depth > far:
                continue
            weight = np.exp(min((d0 - depth) / blend, 60.0))
            total += weight
            g = (g[0] + weight * d[0] / away, g[1] + weight * d[1] / away, g[2] + weight * d[2] / away)
        distance[i] = d0 - blend * np.log(total)
        gradient[i, 0], gradient[i, 1], gradient[i, 2] = g[0] / total, g[1] / total, g[2] / total
    return distance, gradient
