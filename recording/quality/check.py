"""Does a calibration belong to its videos, and what is in it: asked by an import, and of a calibration alone (--check).

A calibration can be flawless in itself and still not belong to the videos: mirrored images, videos numbered in another
order, extrinsics meant otherwise in a world where both readings make sense. One animal's silhouettes, or labelled
points, decide between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from multiview.files import atomic_write, damage_explained, read_json
from multiview.report import Table
from recording.calibration.checks import READINGS, Layout, field_of_view, validate
from recording.calibration.formats import read_calibration, read_dannce_labels
from recording.calibration.model import (
    MOST_BYTES,
    UP_ROTATIONS,
    Calibration,
    distort,
    known_fields,
    numbers,
    read_bytes,
    valid_radius,
)
from recording.quality.silhouettes import AGREED, EXPLAINED, Views, disagreement, rms
from recording.video import find_videos

MOST_REORDERED = 6  # cameras whose 720 orders are tried
GOOD_PX, LEFT = 2.0, 0.2  # error of clicked labels with a sound calibration; share that a better reading may leave
MOST_POINTS = 2000  # drawn
VIEWS = (("from above", 90, -90), ("from the side (along +y)", 0, -90), ("obliquely", 28, -55))  # elevation, azimuth


def mistakes(calibration: Calibration, pixels: np.ndarray) -> Iterator[tuple[str, Calibration, np.ndarray]]:
    """Yields usual mistakes, and the calibration and pixels [t, v, ..., 2] without them: extrinsics meant otherwise,
    images mirrored, all or one camera's (where their sizes are known).
    """
    for name, read in READINGS.items():
        yield f"the calibration is read as {name}", replace(calibration, w2c=read(calibration.w2c)), pixels
    if None not in calibration.sizes:
        widths = np.array([width for width, _ in calibration.sizes], dtype=np.float64)
        flipped = pixels.copy()
        flipped[..., 0] = widths.reshape(-1, *[1] * (pixels.ndim - 3)) - pixels[..., 0]
        yield "the pictures are mirrored (flip every video and its masks left to right)", calibration, flipped
        for camera in range(len(calibration)):
            one = pixels.copy()
            one[:, camera] = flipped[:, camera]
            yield f"the pictures of camera {camera} are mirrored (flip its video and masks)", calibration, one


def check_belongs(calibration: Calibration, outlines: np.ndarray) -> None:
    """Raises ValueError where outlines [t, v, n, 2], pixels, do not fit together and a usual mistake explains it.

    Tried: every reading of the extrinsics (`checks.READINGS`) that makes sense, mirrored images, and (six cameras at
    most) the videos in another order. Fewer than three cameras say nothing.
    """
    cameras, focal = range(len(calibration)), calibration.K[:, 0, 0] / [width for width, _ in calibration.sizes]
    if len(cameras) < 3 or not len(outlines):
        return
    intrinsics = np.stack([focal, focal, 0 * focal, 0 * focal], axis=-1)

    def seen(pixels: np.ndarray) -> np.ndarray:
        normalized = [calibration.to_normalised(camera, pixels[:, camera]) * focal[camera] for camera in cameras]
        return np.stack(normalized, axis=1)

    def left(points: np.ndarray, w2c: np.ndarray = calibration.w2c) -> float:
        views = (np.broadcast_to(one, (len(points), *one.shape)) for one in (intrinsics, w2c))
        return rms(disagreement(Views(points, *views)))

    if (written := left(seen(outlines))) <= AGREED:
        return
    half = field_of_view(calibration)
    errors = {name: left(seen(pixels), other.w2c) for name, other, pixels in mistakes(calibration, outlines)
              if Layout(other.w2c, half).possible}  # fmt: skip
    if len(cameras) <= MOST_REORDERED:
        # [camera, t, video, n, 2]: where the outlines of every video would be, had this camera filmed it.
        through = np.stack([calibration.to_normalised(camera, outlines) * focal[camera] for camera in cameras])
        for order in permutations(cameras):
            points = np.stack([through[camera, :, video] for camera, video in enumerate(order)], axis=1)
            errors[f"camera k filmed video {list(order)}[k] (rename the videos)"] = left(points)
    limit = min(2 * AGREED, EXPLAINED * written)
    explanations = [name for name in sorted(errors, key=errors.get) if errors[name] <= limit]
    if explanations:
        off = f"silhouettes of the animal miss each other by {100 * written:.1f} % of the width"
        raise ValueError(f"{calibration.source}: {off}, and meet if {', or if '.join(explanations[:2])}")


def check_calibration(
    path: Path | str, points: Path | str | None = None, output: Path | str | None = None, *, up: str = "z",
    video_dir: Path | str | None = None, say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict], list[dict], list[str]]:  # fmt: skip
    """Reads a calibration, draws it into the PNG `output`, reprojects points; says and returns the numbers.

    points: a file for `read_points`, in the file's world; left out, a label3d_dannce.mat's own labels where it has
    some. video_dir: whose images' sizes are taken, for formats that do not say. A calibration that is wrong is drawn
    as far as it can be, and the ValueError of `validate` follows. Returns a row per camera, the same of the points, and
    what would make the points fit.
    """
    calibration, problem = read_calibration(path, up=up, check=False), None
    try:
        validate(calibration)
        if video_dir is not None:
            videos = find_videos(Path(video_dir), len(calibration), "--video_dir", names=calibration.names)
            calibration = calibration.with_sizes([video.size for video in videos])
    except ValueError as error:
        problem = error
    seen, xyz = Layout(calibration.w2c, field_of_view(calibration)), None
    cameras, reprojected, meant = camera_rows(calibration, seen), [], []

    def table(title: str, rows: list[dict], notes: Sequence[str]) -> None:
        say(Table(title, list(rows[0]), [list(row.values()) for row in rows], notes).text())

    focus, unit = ", ".join(f"{x:.4g}" for x in seen.focus), calibration.unit or "units"
    nearest = f"{path}: {len(cameras)} cameras; their axes come nearest to each other at ({focus}) {unit}"
    notes = (
        f"the largest ball all of them see has {100 * max(seen.ball, 0.0):.0f} % of that as its radius",
        "degrees as docs/conventions.md; lens: the most that distortion moves a border pixel, in pixels",
    )
    table(f"{nearest}, {np.mean([row['distance'] for row in cameras]):.4g} {unit} away on average", cameras, notes)
    if points or (Path(path).suffix == ".mat" and read_dannce_labels(path) is not None):
        xyz, pixels = read_points(points or path, len(calibration))
        xyz = xyz @ np.array(UP_ROTATIONS[up], dtype=np.float64).T
        known = np.isfinite(xyz).all(axis=-1)
        if not known.any():
            raise ValueError(f"{points or path}: none of its {len(known)} points has three finite numbers")
        xyz, pixels = xyz[known], None if pixels is None else pixels[:, known]
        if not calibration.relative:
            reprojected, meant = reproject(calibration, xyz, pixels)
            fits = [f"they would fit if {name}" for name in meant]
            table(f"{points or path}: {len(xyz)} points", reprojected, fits)
    if output is not None:
        draw(Path(output), calibration, seen, xyz)
        say(f"drawn: {output}")
    if problem is not None:
        raise problem
    return cameras, reprojected, meant


def camera_rows(calibration: Calibration, seen: Layout) -> list[dict]:
    """Numbers of every camera. Angles and distances are seen from the focus, the point nearest to the optical axes."""
    rows = []
    edge = np.linspace(0.0, 1.0, 33)
    border = np.array([point for a in edge for point in ((a, 0), (a, 1), (0, a), (1, a))])
    for index, (K, lens, size) in enumerate(zip(calibration.K, calibration.distortion, calibration.sizes)):
        x, y, z = calibration.centres[index] - seen.focus
        distance, focal = float(np.linalg.norm([x, y, z])), K[[0, 1], [0, 1]]
        lens_px = 0.0 if not np.any(lens) else None
        if np.any(lens) and size is not None:
            ideal = (border * size - K[:2, 2]) / focal
            ideal = ideal[np.linalg.norm(ideal, axis=-1) <= valid_radius(lens)]
            lens_px = float(np.linalg.norm((distort(ideal, lens) - ideal) * focal, axis=-1).max(initial=0.0))
        rows.append(
            {
                "camera": index, "image": "?" if size is None else "{}x{}".format(*size),
                "fx": float(K[0, 0]), "fy": float(K[1, 1]), "cx": float(K[0, 2]), "cy": float(K[1, 2]),
                "distance": distance, "azimuth": float(np.degrees(np.arctan2(-x, -y)) % 360.0),
                "elevation": float(np.degrees(np.arcsin(z / distance))), "off axis": float(seen.off_deg[index]),
                "lens": lens_px, "name": calibration.names[index] if calibration.names else f"{index}",
            }
        )  # fmt: skip
    return rows


def read_points(path: Path | str, num_cameras: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns 3D points [n, 3] and, if known, where cameras saw them [v, n, 2] (outer-corner origin, nan unseen).

    .npy: [n, 3] or [frames, n, 3]. .npz, .json: points_3d of that shape, points_2d ([cameras, n, 2] or [cameras,
    frames, n, 2], nan or null: unseen) if known, pixel_centre (0.5, or 0 where the pixels count from the first pixel's
    center, as OpenCV does). A recording's truth.json or truth.npz: its keypoints. label3d_dannce.mat: its labels.
    """
    path, what = Path(path), f"--check_points {path}"
    if not path.is_file() or path.suffix not in (".npy", ".npz", ".json", ".mat"):
        raise ValueError(f"{what} is no .npy, .npz, .json or label3d_dannce.mat file that exists")
    if path.suffix == ".mat":
        content = dict(zip(("points_3d", "points_2d"), read_dannce_labels(path) or ()))
    elif path.suffix == ".json":
        content = read_json(path, object)
        content = content if isinstance(content, dict) else {"points_3d": content}
        if isinstance(frames := content.get("frames"), list) and frames:
            content = {"points_3d": [known_fields(f, f"{what}: a frame", ("keypoints",))["keypoints"] for f in frames]}
    else:
        read_bytes(path)  # refuses what is too large
        with damage_explained(f"{what}, a numpy file of plain numbers,"):
            if path.suffix == ".npz" and sum(entry.file_size for entry in ZipFile(path).infolist()) > MOST_BYTES:
                raise ValueError(f"it unfolds to more than {MOST_BYTES / 1e6:.0f} MB")
            loaded = np.load(path)
            content = {"points_3d": loaded} if path.suffix == ".npy" else dict(loaded)
    key = "points_3d" if "points_3d" in content else "keypoints"
    if key not in content:
        raise ValueError(f"{what} lacks points_3d (or labelData); it holds {', '.join(map(str, content)) or 'nothing'}")
    try:
        xyz = np.array(content[key], dtype=np.float64)
        pixels = np.array(content["points_2d"], dtype=np.float64) if content.get("points_2d") is not None else None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what}: {key} and points_2d must be full arrays of numbers: {error}") from error
    if xyz.ndim not in (2, 3) or xyz.shape[-1] != 3 or not xyz.size:
        raise ValueError(f"{what}: {key} must be [n, 3] or [frames, n, 3], got {list(xyz.shape)}")
    if pixels is not None:
        expected, got = [num_cameras, *xyz.shape[:-1], 2], list(pixels.shape)
        if got != expected:
            raise ValueError(f"{what}: points_2d must be {expected} (cameras, then as points_3d), got {got}")
        center = float(numbers(content.get("pixel_centre", 0.5), (), f"{what}: pixel_centre"))
        pixels = (pixels + (0.5 - center)).reshape(num_cameras, -1, 2)
    return xyz.reshape(-1, 3), pixels


def reproject(calibration: Calibration, xyz: np.ndarray, pixels: np.ndarray | None) -> tuple[list[dict], list[str]]:
    """Counts points [n, 3] in front of and inside each image, and measures how far pixels [v, n, 2] are from them.

    Returns a row per camera, and which other readings of calibration, points or images leave far less error.
    """
    projected, rows = calibration.project(xyz), []
    depth = np.einsum("vj,nj->vn", calibration.w2c[:, 2, :3], xyz) + calibration.w2c[:, None, 2, 3]
    for index, size in enumerate(calibration.sizes):
        front, inside = depth[index] > 0, None
        if size is not None:
            inside = int((front & ((projected[index] > 0) & (projected[index] < size)).all(axis=-1)).sum())
        rows.append({"camera": index, "in front": int(front.sum()), "inside": inside})
    if pixels is None:
        return rows, []

    def error(points: np.ndarray, pixels: np.ndarray = pixels) -> float:
        return np.nanmean(np.linalg.norm(points - pixels, axis=-1) ** 2) ** 0.5

    for row, off in zip(rows, np.linalg.norm(projected - pixels, axis=-1)):
        off = off[np.isfinite(off)]
        row["seen"] = len(off)
        row["rms px"], row["max px"] = (float((off**2).mean() ** 0.5), float(off.max())) if len(off) else (None, None)
    if (written := error(projected)) <= GOOD_PX:
        return rows, []
    plain = replace(calibration, distortion=np.zeros_like(calibration.distortion))
    errors = {"the pictures are undistorted already (no lens distortion)": error(plain.project(xyz))}
    for name, other, moved in mistakes(calibration, pixels[None]):
        errors[name] = error(other.project(xyz), moved[0])
    for factor in (1000.0, 0.001):
        name = f"the points are {factor:g} times as large (millimetres against metres)"
        errors[name] = error(calibration.project(xyz * factor))
    return rows, [name for name in sorted(errors, key=errors.get) if errors[name] <= LEFT * written]


def draw(path: Path, calibration: Calibration, seen: Layout, xyz: np.ndarray | None) -> None:
    """Draws all frusta from above, from the side and obliquely into a PNG. xyz: [n, 3] points, drawn as dots."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    length = 0.22 * float(np.median(np.linalg.norm(calibration.centres - seen.focus, axis=-1)))
    figure = Figure(figsize=(24, 8), dpi=100, layout="constrained")
    for place, (title, elevation, azimuth) in enumerate(VIEWS, 1):
        title = f"{title}; {calibration.unit or 'units'}"
        axes = figure.add_subplot(1, 3, place, projection="3d", proj_type="ortho", title=title)
        axes.view_init(elevation, azimuth)
        for index, (center, half) in enumerate(zip(calibration.centres, field_of_view(calibration))):
            (left, right, top, bottom), R = half * [-1, 1, -1, 1], calibration.w2c[index, :3, :3]
            # Two corners, the tip of a gable between them, which shows roll and turned-over cameras, the other corners.
            ends = [(left, top, 1), (0, 1.3 * top, 1), (right, top, 1), (right, bottom, 1), (left, bottom, 1)]
            a, tip, b, c, d = center + length * np.array(ends) @ R
            ahead, color = center + R[2] * float(R[2] @ (seen.focus - center)), colormaps["tab10"](index % 10)
            axes.plot(*np.stack([a, b, c, d, a, tip, b]).T, color=color)
            axes.plot(*np.stack([a, center, b, center, c, center, d]).T, color=color, linewidth=0.8)
            axes.plot(*np.stack([center, ahead]).T, color=color, linewidth=0.5, linestyle="--")
            axes.text(*center, str(index), color=color, fontsize=20, fontweight="bold")
        if xyz is not None:
            axes.scatter(*xyz[:: max(1, len(xyz) // MOST_POINTS)].T, s=2, color="#3c6e96")
        axes.scatter(*seen.focus[:, None], s=60, marker="+", color="black")
        axes.set(xlabel="x", ylabel="y", zlabel="z (up)", aspect="equal")
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix.removeprefix("."))
    except ValueError as error:  # an ending it does not know
        raise ValueError(f"--check_output {path} cannot be written; a path ending in .png is expected") from error
