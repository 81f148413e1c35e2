"""Draws a calibration from above, from the side and obliquely: frusta, axes, focus, floor grid, up."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from recording.calibration import Calibration
from recording.calibration.checks import field_of_view, layout

PANEL = 800  # pixels, square
MARGIN = 60
AXIS_COLOURS = ((40, 40, 220), (40, 160, 40), (220, 90, 30))  # x red, y green, z blue, in OpenCV's order BGR
CAMERA_COLOURS = (
    (180, 119, 31), (14, 127, 255), (44, 160, 44), (40, 39, 214), (189, 103, 148), (75, 86, 140), (194, 119, 227),
    (127, 127, 127), (34, 189, 188), (207, 190, 23),
)  # fmt: skip
GREY, DARK, POINT = (225, 225, 225), (60, 60, 60), (150, 110, 60)
FRUSTUM = 0.22  # length of the drawn frusta, over the mean camera distance
MOST_POINTS = 2000


def draw(path: Path | str, calibration: Calibration, points: np.ndarray | None = None) -> None:
    """Writes the PNG. points: [n, 3] in the calibration's world, drawn as dots (thinned to MOST_POINTS)."""
    import cv2

    scene = Scene(calibration, points)
    panels = [
        scene.panel("from above", np.array([[1.0, 0, 0], [0, 1.0, 0]])),
        scene.panel("from the side (along +y)", np.array([[1.0, 0, 0], [0, 0, 1.0]])),
        scene.panel("obliquely", _oblique(35.0, 28.0)),
    ]
    divider = np.full((PANEL, 2, 3), DARK, np.uint8)
    picture = np.concatenate([panels[0], divider, panels[1], divider, panels[2]], axis=1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), picture):
        raise ValueError(f"--check_output {path} cannot be written; a path ending in .png is expected")


def _oblique(azimuth_deg: float, elevation_deg: float) -> np.ndarray:
    """[2, 3]: right and up of a parallel projection seen from there (clockwise from -y)."""
    azimuth, elevation = math.radians(azimuth_deg), math.radians(elevation_deg)
    right = [math.cos(azimuth), -math.sin(azimuth), 0.0]
    up = [math.sin(elevation) * math.sin(azimuth), math.sin(elevation) * math.cos(azimuth), math.cos(elevation)]
    return np.array([right, up])


class Scene:
    """What there is to draw, in the world; a panel projects it in parallel along one direction."""

    def __init__(self, calibration: Calibration, points: np.ndarray | None) -> None:
        half = field_of_view(calibration)
        found = layout(calibration.w2c, half)
        self.calibration, self.focus = calibration, found.focus
        self.centres = calibration.centres
        distance = float(np.median(np.linalg.norm(self.centres - self.focus, axis=-1)))
        self.length = FRUSTUM * distance
        left, right, top, bottom = half.T
        corners = np.stack(
            [
                np.stack([x, y, np.ones_like(x)], axis=-1)
                for x, y in ((-left, -top), (right, -top), (right, bottom), (-left, bottom))
            ],
            axis=1,
        )
        self.corners = self.centres[:, None] + self.length * corners @ calibration.w2c[:, :3, :3]
        self.axes = calibration.w2c[:, :3, :3]  # rows: the camera's x, y, z in the world
        self.points = np.zeros((0, 3)) if points is None else points[np.isfinite(points).all(axis=-1)]
        self.points = self.points[:: max(1, len(self.points) // MOST_POINTS)]
        everything = np.concatenate([self.centres, self.corners.reshape(-1, 3), self.focus[None]])
        low, high = everything.min(axis=0), everything.max(axis=0)
        reach = float((high - low).max())
        # The floor is z = 0 where that is near the cameras; elsewhere (COLMAP's worlds) a grid through the focus.
        self.floor = 0.0 if low[2] - 0.5 * reach <= 0.0 <= high[2] + 0.5 * reach else float(self.focus[2])
        self.cell = 10.0 ** math.floor(math.log10(reach / 4))
        self.cell *= 5 if reach / self.cell > 40 else 2 if reach / self.cell > 16 else 1
        self.low = np.minimum(low, [*low[:2], self.floor])
        self.high = np.maximum(high, [*high[:2], self.floor])

    def panel(self, title: str, view: np.ndarray) -> np.ndarray:
        """view: [2, 3], the directions in the world that are right and up in the picture."""
        import cv2

        canvas = np.full((PANEL, PANEL, 3), 255, np.uint8)
        box = np.array(
            [
                [x, y, z]
                for x in (self.low[0], self.high[0])
                for y in (self.low[1], self.high[1])
                for z in (self.low[2], self.high[2])
            ]
        )
        flat = box @ view.T
        scale = (PANEL - 2 * MARGIN) / float((flat.max(axis=0) - flat.min(axis=0)).max())
        middle = (flat.max(axis=0) + flat.min(axis=0)) / 2

        def place(xyz: np.ndarray) -> np.ndarray:
            flat = (np.asarray(xyz, dtype=np.float64) @ view.T - middle) * scale
            return np.stack([PANEL / 2 + flat[..., 0], PANEL / 2 - flat[..., 1]], axis=-1)

        def line(a: np.ndarray, b: np.ndarray, colour: tuple, width: int = 1) -> None:
            ends = np.clip(np.rint(place(np.stack([a, b])) * 16), -1e6, 1e6).astype(int)
            cv2.line(canvas, tuple(ends[0].tolist()), tuple(ends[1].tolist()), colour, width, cv2.LINE_AA, shift=4)

        def text(xyz: np.ndarray, words: str, colour: tuple, dx: int = 6, dy: int = -6, size: float = 0.55) -> None:
            x, y = np.rint(place(xyz)).astype(int).tolist()
            cv2.putText(canvas, words, (x + dx, y + dy), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)

        self._grid(line)
        for x, y in np.rint(place(self.points)).astype(int).tolist():
            cv2.circle(canvas, (x, y), 1, POINT, -1, cv2.LINE_AA)
        self._cameras(line, text)
        self._world(line, text)
        x, y = np.rint(place(self.focus)).astype(int).tolist()
        cv2.circle(canvas, (x, y), 6, DARK, 1, cv2.LINE_AA)
        cv2.drawMarker(canvas, (x, y), DARK, cv2.MARKER_CROSS, 16, 1, cv2.LINE_AA)
        text(self.focus, "focus", DARK, 9, 16, 0.45)
        unit = self.calibration.unit or "units"
        caption = f"{title}; grid {self.cell:g} {unit} at z = {self.floor:.3g}"
        cv2.putText(canvas, caption, (14, 26), cv2.FONT_HERSHEY_SIMPLEX, 0.6, DARK, 1, cv2.LINE_AA)
        return canvas

    def _grid(self, line) -> None:
        first = np.floor(self.low[:2] / self.cell) * self.cell
        last = np.ceil(self.high[:2] / self.cell) * self.cell
        for x in np.arange(first[0], last[0] + self.cell / 2, self.cell):
            line(np.array([x, first[1], self.floor]), np.array([x, last[1], self.floor]), GREY)
        for y in np.arange(first[1], last[1] + self.cell / 2, self.cell):
            line(np.array([first[0], y, self.floor]), np.array([last[0], y, self.floor]), GREY)

    def _cameras(self, line, text) -> None:
        for index, centre in enumerate(self.centres):
            colour = CAMERA_COLOURS[index % len(CAMERA_COLOURS)]
            corners = self.corners[index]
            for corner, following in zip(corners, np.roll(corners, -1, axis=0)):
                line(centre, corner, colour)
                line(corner, following, colour)
            # The picture's upper edge carries a gable, so that roll and turned-over cameras show.
            gable = corners[:2].mean(axis=0) - 0.15 * self.length * self.axes[index, 1]
            line(corners[0], gable, colour, 2)
            line(corners[1], gable, colour, 2)
            nearest = centre + self.axes[index, 2] * float(self.axes[index, 2] @ (self.focus - centre))
            line(centre, nearest, tuple(int(180 + 0.3 * c) for c in colour))
            for axis, axis_colour in zip(self.axes[index], AXIS_COLOURS, strict=True):
                line(centre, centre + 0.4 * self.length * axis, axis_colour, 2)
            text(centre, str(index), colour, -18, -8, 0.8)

    def _world(self, line, text) -> None:
        if np.all((self.low - self.length <= 0) & (self.high + self.length >= 0)):
            for axis, colour, name in zip(np.eye(3), AXIS_COLOURS, "xyz", strict=True):
                line(np.zeros(3), 0.6 * self.length * axis, colour, 3)
                text(0.6 * self.length * axis, name, colour, 4, 4)
        foot = np.array([*self.low[:2], self.floor])
        tip = foot + [0.0, 0.0, self.length]
        line(foot, tip, DARK, 2)
        for side in (np.array([1.0, 0, 0]), np.array([0, 1.0, 0])):
            for sign in (-1, 1):
                line(tip, tip - [0.0, 0.0, 0.2 * self.length] + sign * 0.1 * self.length * side, DARK, 2)
        text(tip, "up", DARK)
