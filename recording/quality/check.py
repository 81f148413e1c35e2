"""A look at a calibration alone (--check): every camera in numbers and in an image, how well points reproject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np

from multiview.files import read_json
from multiview.report import Table
from recording.calibration.checks import READINGS, field_of_view, layout, validate
from recording.calibration.fields import MOST_BYTES, Fields, read_bytes
from recording.calibration.formats import read_calibration, read_dannce_labels
from recording.calibration.model import UP_ROTATIONS, Calibration, distort, valid_radius

GOOD_PX, LEFT = 2.0, 0.2  # error of clicked labels with a sound calibration; share that a better reading may leave
MOST_POINTS = 2000  # drawn


def check_calibration(
    path: Path | str,
    points: Path | str | None = None,
    output: Path | str | None = None,
    *,
    up: str = "z",
    video_dir: Path | str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Reads a calibration, draws it into the PNG `output`, reprojects points; returns the numbers that it says.

    points: a file for `read_points`, in the file's world; left out, a label3d_dannce.mat's own labels where it has
    some. video_dir: whose images' sizes are taken, for formats that do not say. A calibration that is wrong is drawn
    as far as it can be, and the ValueError of `validate` follows.
    """
    from recording.video import find_videos

    calibration = read_calibration(path, up=up, check=False)
    problem: ValueError | None = None
    try:
        validate(calibration)
        if video_dir is not None:
            videos = find_videos(Path(video_dir), len(calibration), "--video_dir", names=calibration.names)
            calibration = calibration.with_sizes([video.size for video in videos])
    except ValueError as error:
        problem = error
    labels = Path(path).suffix == ".mat" and read_dannce_labels(path) is not None
    xyz, pixels = read_points(points or path, len(calibration)) if points or labels else (None, None)
    report = {"calibration": str(path), **describe(calibration)}
    say(cameras_table(report).text())
    if xyz is not None:
        xyz = xyz @ np.array(UP_ROTATIONS[up], dtype=np.float64).T
        if not calibration.relative:
            report["points"] = reproject(calibration, xyz, pixels, str(points or path))
            say(points_table(report["points"], str(points or path)).text())
    if output is not None:
        draw(output, calibration, xyz)
        say(f"drawn: {output}")
        report["picture"] = str(output)
    if problem is not None:
        raise problem
    return report


def describe(calibration: Calibration) -> dict:
    """Numbers of every camera. Angles and distances are seen from the focus, the point nearest to the optical axes."""
    seen = layout(calibration.w2c, field_of_view(calibration))
    offset = calibration.centres - seen.focus
    distance = np.linalg.norm(offset, axis=-1)
    cameras = [
        {
            "camera": index, "name": calibration.name(index, "{0}"), "size": calibration.sizes[index],
            "fx": float(K[0, 0]), "fy": float(K[1, 1]), "cx": float(K[0, 2]), "cy": float(K[1, 2]),
            "skew": float(K[0, 1]), "distance": float(distance[index]),
            "azimuth_deg": float(np.degrees(np.arctan2(-offset[index, 0], -offset[index, 1])) % 360.0),
            "elevation_deg": float(np.degrees(np.arcsin(offset[index, 2] / distance[index]))),
            "off_axis_deg": float(seen.off_deg[index]), "lens_px": _lens_shift(calibration, index),
            "distortion": calibration.distortion[index].tolist(),
        }
        for index, K in enumerate(calibration.K)
    ]  # fmt: skip
    return {
        "unit": calibration.unit, "focus": seen.focus.tolist(), "spread_deg": seen.spread_deg,
        "common_ball": seen.ball, "mean_distance": float(distance.mean()), "cameras": cameras,
    }  # fmt: skip


def _lens_shift(calibration: Calibration, index: int) -> float | None:
    """Returns the most pixels the lens moves a pixel of the image's border; None where the size is unknown."""
    size, lens, K = calibration.sizes[index], calibration.distortion[index], calibration.K[index]
    if not np.any(lens) or size is None:
        return None if np.any(lens) else 0.0
    share = np.linspace(0.0, 1.0, 33)[:, None]
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]], dtype=np.float64)
    border = np.concatenate([a + share * (b - a) for a, b in zip(corners, corners[1:])]) * size
    ideal = (border - K[:2, 2]) / [K[0, 0], K[1, 1]]
    ideal = ideal[np.linalg.norm(ideal, axis=-1) <= valid_radius(lens)]
    moved = (distort(ideal, lens) - ideal) * [K[0, 0], K[1, 1]]
    return float(np.linalg.norm(moved, axis=-1).max(initial=0.0))


def cameras_table(report: dict) -> Table:
    unit, focus = report["unit"] or "units", ", ".join(f"{x:.4g}" for x in report["focus"])
    keys = ("fx", "fy", "cx", "cy", "distance", "azimuth_deg", "elevation_deg", "off_axis_deg", "lens_px", "name")
    rows = [
        (row["camera"], "?" if row["size"] is None else "{}x{}".format(*row["size"]), *(row[key] for key in keys))
        for row in report["cameras"]
    ]
    return Table(
        f"{report['calibration']}: {len(rows)} cameras; their axes come nearest to each other at ({focus}) {unit}, "
        f"{report['mean_distance']:.4g} {unit} away on average",
        ("camera", "image", "fx", "fy", "cx", "cy", "distance", "azimuth", "elevation", "off axis", "lens", "name"),
        rows,
        (f"the largest ball all of them see has {100 * max(report['common_ball'], 0.0):.0f} % of that as its radius",
         "degrees as docs/conventions.md; lens: the most that distortion moves a border pixel, in pixels"),
    )  # fmt: skip


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
            content = {"points_3d": [Fields(f, f"{what}: a frame", ("keypoints",)).values["keypoints"] for f in frames]}
    elif path.suffix in (".npy", ".npz"):
        read_bytes(path)  # refuses what is too large
        try:
            if path.suffix == ".npz" and sum(entry.file_size for entry in ZipFile(path).infolist()) > MOST_BYTES:
                raise ValueError(f"it unfolds to more than {MOST_BYTES / 1e6:.0f} MB")
            loaded = np.load(path)
            content = {"points_3d": loaded} if path.suffix == ".npy" else dict(loaded)
        except (ValueError, OSError, EOFError, SyntaxError, KeyError, BadZipFile, MemoryError) as error:
            raise ValueError(f"{what}: not a numpy file of plain numbers: {error}") from error
    else:
        raise ValueError(f"{what}: unknown kind; .npy, .npz, .json or label3d_dannce.mat is expected")
    key = "points_3d" if "points_3d" in content else "keypoints"
    if key not in content:
        raise ValueError(f"{what} lacks points_3d; it holds {', '.join(map(str, content)) or 'nothing'}")
    xyz = _numbers(content[key], f"{what}: {key}")
    if xyz.ndim not in (2, 3) or xyz.shape[-1] != 3 or not xyz.size:
        raise ValueError(f"{what}: points_3d must be [n, 3] or [frames, n, 3], got {list(xyz.shape)}")
    if content.get("points_2d") is None:
        return xyz.reshape(-1, 3), None
    pixels = _numbers(content["points_2d"], f"{what}: points_2d")
    expected = (num_cameras, *xyz.shape[:-1], 2)
    if pixels.shape != expected:
        raise ValueError(
            f"{what}: points_2d must be {list(expected)} to go with {num_cameras} cameras and points_3d, got "
            f"{list(pixels.shape)}"
        )
    pixels = pixels + (0.5 - Fields(content, what).number("pixel_centre", 0.5))
    return xyz.reshape(-1, 3), pixels.reshape(num_cameras, -1, 2)


def _numbers(values, what: str) -> np.ndarray:
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what} must be a full array of numbers: {error}") from error


def reproject(calibration: Calibration, xyz: np.ndarray, pixels: np.ndarray | None, source: str) -> dict:
    """Per camera: points known, in front, inside the image; and the error in pixels where it saw them (rms, max)."""
    known = np.isfinite(xyz).all(axis=-1)
    if not known.any():
        raise ValueError(f"{source}: none of its {len(known)} points has three finite numbers")
    xyz = xyz[known]
    depth = np.einsum("vj,nj->vn", calibration.w2c[:, 2, :3], xyz) + calibration.w2c[:, None, 2, 3]
    projected = calibration.project(xyz)
    cameras = []
    for index, size in enumerate(calibration.sizes):
        row = {"camera": index, "in_front": int((depth[index] > 0).sum()), "inside": None}
        if size is not None:
            within = (depth[index] > 0) & ((projected[index] > 0) & (projected[index] < size)).all(axis=-1)
            row["inside"] = int(within.sum())
        if pixels is not None:
            off = np.linalg.norm(projected[index] - pixels[index][known], axis=-1)
            off = off[np.isfinite(off)]
            row |= {"seen": len(off), "rms_px": float(np.sqrt((off**2).mean())) if len(off) else None}
            row |= {"max_px": float(off.max()) if len(off) else None}
        cameras.append(row)
    result = {"count": int(known.sum()), "cameras": cameras}
    if pixels is not None:
        seen = pixels[:, known]
        result["rms_px"] = _error(projected, seen)
        result["meant"] = _better_meanings(calibration, xyz, seen) if result["rms_px"] > GOOD_PX else []
    return result


def _error(projected: np.ndarray, seen: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean(np.sum((projected - seen) ** 2, axis=-1))))


def _better_meanings(calibration: Calibration, xyz: np.ndarray, seen: np.ndarray) -> list[str]:
    """Returns other readings of calibration, points or images that leave far less error, best first."""
    written = calibration.project(xyz)
    other = {
        f"the calibration is read as {name}": replace(calibration, w2c=read(calibration.w2c)).project(xyz)
        for name, read in READINGS.items()
    }
    for factor in (1000.0, 0.001):
        name = f"the points are {factor:g} times as large (millimetres against metres)"
        other[name] = calibration.project(xyz * factor)
    if None not in calibration.sizes:
        widths = np.array([size[0] for size in calibration.sizes])[:, None]
        other["the pictures are mirrored"] = np.stack([widths - written[..., 0], written[..., 1]], axis=-1)
    plain = replace(calibration, distortion=np.zeros_like(calibration.distortion))
    other["the pictures are undistorted already (no lens distortion)"] = plain.project(xyz)
    errors = {name: _error(projected, seen) for name, projected in other.items()}
    return [name for name in sorted(errors, key=errors.get) if errors[name] <= LEFT * _error(written, seen)]


def points_table(result: dict, source: str) -> Table:
    keys = [key for key in ("in_front", "inside", "seen", "rms_px", "max_px") if key in result["cameras"][0]]
    rows = [[row["camera"], *(row[key] for key in keys)] for row in result["cameras"]]
    notes = [f"all: {result['rms_px']:.4g} px rms"] if "rms_px" in result else []
    notes += [f"they would fit if {name}" for name in result.get("meant", ())]
    columns = ["camera", *(key.replace("_", " ") for key in keys)]
    return Table(f"{source}: {result['count']} points", columns, rows, notes)


def draw(path: Path | str, calibration: Calibration, xyz: np.ndarray | None = None) -> None:
    """Draws all frusta from above, from the side and obliquely into a PNG. xyz: [n, 3] points, drawn as dots."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    half = field_of_view(calibration)
    focus = layout(calibration.w2c, half).focus
    centers, rotations = calibration.centres, calibration.w2c[:, :3, :3]
    length = 0.22 * float(np.median(np.linalg.norm(centers - focus, axis=-1)))
    left, right, up, down = half.T
    ones = np.ones_like(left)
    # Corners clockwise from the upper left, then the tip of a gable on the upper edge: it shows roll and turned-over
    # cameras.
    ends = np.stack([-left, -up, right, -up, right, down, -left, down, 0 * ones, -1.3 * up]).reshape(5, 2, -1)
    ends = np.concatenate([ends.transpose(2, 0, 1), np.ones((len(ones), 5, 1))], axis=-1)
    ends = centers[:, None] + length * ends @ rotations
    figure = Figure(figsize=(24, 8), dpi=100, layout="constrained")
    unit = calibration.unit or "units"
    for place, (title, elevation, azimuth) in enumerate(
        (("from above", 90, -90), ("from the side (along +y)", 0, -90), ("obliquely", 28, -55)), 1
    ):
        axes = figure.add_subplot(1, 3, place, projection="3d", proj_type="ortho", title=f"{title}; {unit}")
        axes.view_init(elevation, azimuth)
        for index, center in enumerate(centers):
            color = colormaps["tab10"](index % 10)
            a, b, c, d, tip = ends[index]
            axes.plot(*np.stack([a, b, c, d, a, tip, b]).T, color=color)
            for corner in (a, b, c, d):
                axes.plot(*np.stack([center, corner]).T, color=color, linewidth=0.8)
            along = center + rotations[index, 2] * float(rotations[index, 2] @ (focus - center))
            axes.plot(*np.stack([center, along]).T, color=color, linewidth=0.5, linestyle="--")
            axes.text(*center, str(index), color=color, fontsize=20, fontweight="bold")
        if xyz is not None:
            known = xyz[np.isfinite(xyz).all(axis=-1)]
            axes.scatter(*known[:: max(1, len(known) // MOST_POINTS)].T, s=2, color="#3c6e96")
        axes.scatter(*focus[:, None], s=60, marker="+", color="black")
        axes.set(xlabel="x", ylabel="y", zlabel="z (up)", aspect="equal")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path)
    except ValueError as error:  # an ending it does not know
        raise ValueError(f"--check_output {path} cannot be written; a path ending in .png is expected") from error
