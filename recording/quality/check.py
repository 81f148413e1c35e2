"""A look at a calibration alone (--check): every camera in numbers and in an image, how well points reproject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np

from multiview.files import read_json
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
from recording.quality.belongs import mirrorings
from recording.video import find_videos

GOOD_PX, LEFT = 2.0, 0.2  # error of clicked labels with a sound calibration; share that a better reading may leave
MOST_POINTS = 2000  # drawn
VIEWS = (("from above", 90, -90), ("from the side (along +y)", 0, -90), ("obliquely", 28, -55))  # elevation, azimuth


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
    calibration = read_calibration(path, up=up, check=False)
    problem: ValueError | None = None
    try:
        validate(calibration)
        if video_dir is not None:
            videos = find_videos(Path(video_dir), len(calibration), "--video_dir", names=calibration.names)
            calibration = calibration.with_sizes([video.size for video in videos])
    except ValueError as error:
        problem = error
    seen = Layout(calibration.w2c, field_of_view(calibration))
    cameras, reprojected, meant, xyz = camera_rows(calibration, seen), [], [], None
    focus, unit = ", ".join(f"{x:.4g}" for x in seen.focus), calibration.unit or "units"
    mean_distance = np.mean([row["distance"] for row in cameras])
    title = (
        f"{path}: {len(cameras)} cameras; their axes come nearest to each other at ({focus}) {unit}, "
        f"{mean_distance:.4g} {unit} away on average"
    )
    notes = (
        f"the largest ball all of them see has {100 * max(seen.ball, 0.0):.0f} % of that as its radius",
        "degrees as docs/conventions.md; lens: the most that distortion moves a border pixel, in pixels",
    )
    say(Table(title, list(cameras[0]), [list(row.values()) for row in cameras], notes).text())
    if points or (Path(path).suffix == ".mat" and read_dannce_labels(path) is not None):
        xyz, pixels = read_points(points or path, len(calibration))
        xyz = xyz @ np.array(UP_ROTATIONS[up], dtype=np.float64).T
        known = np.isfinite(xyz).all(axis=-1)
        if not known.any():
            raise ValueError(f"{points or path}: none of its {len(known)} points has three finite numbers")
        xyz, pixels = xyz[known], None if pixels is None else pixels[:, known]
        if not calibration.relative:
            reprojected, meant = reproject(calibration, xyz, pixels)
            title, notes = f"{points or path}: {len(xyz)} points", [f"they would fit if {name}" for name in meant]
            say(Table(title, list(reprojected[0]), [list(row.values()) for row in reprojected], notes).text())
    if output is not None:
        draw(Path(output), calibration, seen, xyz)
        say(f"drawn: {output}")
    if problem is not None:
        raise problem
    return cameras, reprojected, meant


def camera_rows(calibration: Calibration, seen: Layout) -> list[dict]:
    """Numbers of every camera. Angles and distances are seen from the focus, the point nearest to the optical axes."""
    rows = []
    for index, (K, lens, size) in enumerate(zip(calibration.K, calibration.distortion, calibration.sizes)):
        x, y, z = calibration.centres[index] - seen.focus
        distance = float(np.linalg.norm([x, y, z]))
        lens_px = 0.0 if not np.any(lens) else None
        if np.any(lens) and size is not None:
            edge, focal = np.linspace(0.0, 1.0, 33), K[[0, 1], [0, 1]]
            border = np.array([point for a in edge for point in ((a, 0), (a, 1), (0, a), (1, a))]) * size
            ideal = (border - K[:2, 2]) / focal
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
    if not path.is_file():
        raise ValueError(f"{what} does not exist; a .npy, .npz, .json or .mat file is expected")
    if path.suffix == ".mat":
        labels = read_dannce_labels(path)
        if labels is None:
            raise ValueError(f"{what} holds no labelled points (labelData)")
        content = dict(zip(("points_3d", "points_2d"), labels))
    elif path.suffix == ".json":
        content = read_json(path, (dict, list))
        content = content if isinstance(content, dict) else {"points_3d": content}
        frames = content.get("frames")
        if isinstance(frames, list) and frames:
            content = {"points_3d": [known_fields(f, f"{what}: a frame", ("keypoints",))["keypoints"] for f in frames]}
    elif path.suffix in (".npy", ".npz"):
        read_bytes(path)  # refuses what is too large
        try:
            if path.suffix == ".npz" and sum(entry.file_size for entry in ZipFile(path).infolist()) > MOST_BYTES:
                raise ValueError(f"it unfolds to more than {MOST_BYTES / 1e6:.0f} MB")
            loaded = np.load(path)
            content = {"points_3d": loaded} if path.suffix == ".npy" else dict(loaded)
        except (ValueError, OSError, EOFError, BadZipFile, SyntaxError, MemoryError) as error:
            raise ValueError(f"{what}: not a numpy file of plain numbers: {error}") from error
    else:
        raise ValueError(f"{what}: unknown kind; .npy, .npz, .json or label3d_dannce.mat is expected")
    key = "points_3d" if "points_3d" in content else "keypoints"
    if key not in content:
        raise ValueError(f"{what} lacks points_3d; it holds {', '.join(map(str, content)) or 'nothing'}")
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

    def off(projected: np.ndarray, seen: np.ndarray | None = pixels) -> np.ndarray:
        return np.linalg.norm(projected - seen, axis=-1)

    projected, rows, meant = calibration.project(xyz), [], []
    depth = np.einsum("vj,nj->vn", calibration.w2c[:, 2, :3], xyz) + calibration.w2c[:, None, 2, 3]
    for index, size in enumerate(calibration.sizes):
        front, inside = depth[index] > 0, None
        if size is not None:
            inside = int((front & ((projected[index] > 0) & (projected[index] < size)).all(axis=-1)).sum())
        rows.append({"camera": index, "in front": int(front.sum()), "inside": inside})
        if pixels is not None:
            known = off(projected)[index]
            known = known[np.isfinite(known)]
            rms, most = (float(np.sqrt((known**2).mean())), float(known.max())) if len(known) else (None, None)
            rows[-1] |= {"seen": len(known), "rms px": rms, "max px": most}
    if pixels is not None and (written := np.nanmean(off(projected) ** 2) ** 0.5) > GOOD_PX:
        plain = replace(calibration, distortion=np.zeros_like(calibration.distortion))
        other = {
            f"the calibration is read as {name}": off(replace(calibration, w2c=read(calibration.w2c)).project(xyz))
            for name, read in READINGS.items()
        }
        for factor in (1000.0, 0.001):
            name = f"the points are {factor:g} times as large (millimetres against metres)"
            other[name] = off(calibration.project(xyz * factor))
        for name, flipped in mirrorings(calibration, pixels.transpose(1, 0, 2)):
            other[name] = off(projected, flipped.transpose(1, 0, 2))
        other["the pictures are undistorted already (no lens distortion)"] = off(plain.project(xyz))
        errors = {name: np.nanmean(distances**2) ** 0.5 for name, distances in other.items()}
        meant = [name for name in sorted(errors, key=errors.get) if errors[name] <= LEFT * written]
    return rows, meant


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
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path)
    except ValueError as error:  # an ending it does not know
        raise ValueError(f"--check_output {path} cannot be written; a path ending in .png is expected") from error
