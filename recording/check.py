"""A look at a calibration: every camera in numbers and in a picture, and how well given points reproject."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from recording.calibration import Calibration, read_calibration, read_dannce_labels
from recording.calibration.checks import READINGS, field_of_view, layout
from recording.calibration.model import UP_ROTATIONS, distort, valid_radius
from recording.video import find_videos

GOOD_PX = 2.0  # reprojection of clicked labels with a sound calibration
EXPLAINED = 0.2  # another reading must leave at most this share of the error to be named


@dataclass(frozen=True)
class Points:
    """xyz: [n, 3] in the world of the calibration file. pixels: [v, n, 2] or None, outer-corner origin, nan unseen."""

    xyz: np.ndarray
    pixels: np.ndarray | None
    source: str


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
    some. video_dir: whose pictures' sizes are taken, for formats that do not say. A calibration that is wrong is drawn
    as far as it can be, and the ValueError of `Calibration.validate` follows.
    """
    calibration = read_calibration(path, up=up, validate=False)
    problem: ValueError | None = None
    try:
        calibration.validate()
        if video_dir is not None:
            videos = find_videos(Path(video_dir), len(calibration), "--video_dir")
            calibration = calibration.with_sizes([video.size for video in videos])
    except ValueError as error:
        problem = error
    found = _own_labels(path) if points is None else read_points(points, len(calibration))
    if found is not None:
        found = replace(found, xyz=found.xyz @ np.array(UP_ROTATIONS[up], dtype=np.float64).T)
    report = {"calibration": str(path), **describe(calibration)}
    for line in table(report):
        say(line)
    if found is not None and not calibration.relative:
        report["points"] = reproject(calibration, found)
        for line in point_lines(report["points"], found.source):
            say(line)
    if output is not None:
        from recording.check_picture import draw

        draw(output, calibration, None if found is None else found.xyz)
        say(f"drawn: {output}")
        report["picture"] = str(output)
    if problem is not None:
        raise problem
    return report


# ---- the cameras ------------------------------------------------------------------------------------------------


def describe(calibration: Calibration) -> dict:
    """Numbers of every camera. Angles and distances are seen from the focus, the point nearest to the optical axes."""
    found = layout(calibration.w2c, field_of_view(calibration))
    offset = calibration.centres - found.focus
    distance = np.linalg.norm(offset, axis=-1)
    cameras = []
    for index, K in enumerate(calibration.K):
        x, y, z = offset[index]
        cameras.append(
            {
                "camera": index,
                "name": calibration.name(index, "{0}"),
                "size": calibration.sizes[index],
                "fx": float(K[0, 0]), "fy": float(K[1, 1]), "cx": float(K[0, 2]), "cy": float(K[1, 2]),
                "skew": float(K[0, 1]),
                "distance": float(distance[index]),
                "azimuth_deg": float(np.degrees(np.arctan2(-x, -y)) % 360.0),
                "elevation_deg": float(np.degrees(np.arcsin(z / distance[index]))),
                "off_axis_deg": float(found.off_deg[index]),
                "lens_px": lens_shift(calibration, index),
                "distortion": calibration.distortion[index].tolist(),
            }
        )  # fmt: skip
    return {
        "unit": calibration.unit, "focus": found.focus.tolist(), "spread_deg": found.spread_deg,
        "common_ball": found.ball, "mean_distance": float(distance.mean()), "cameras": cameras,
    }  # fmt: skip


def lens_shift(calibration: Calibration, index: int) -> float | None:
    """By how many pixels, at most, the lens moves a pixel of the picture's border; None where the size is unknown."""
    size = calibration.sizes[index]
    if not np.any(calibration.distortion[index]):
        return 0.0
    if size is None:
        return None
    share = np.linspace(0.0, 1.0, 33)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]], dtype=np.float64)
    border = np.concatenate([a + share[:, None] * (b - a) for a, b in zip(corners, corners[1:])]) * size
    K = calibration.K[index]
    ideal = (border - K[:2, 2]) / [K[0, 0], K[1, 1]]
    ideal = ideal[np.linalg.norm(ideal, axis=-1) <= valid_radius(calibration.distortion[index])]
    moved = (distort(ideal, calibration.distortion[index]) - ideal) * [K[0, 0], K[1, 1]]
    return float(np.linalg.norm(moved, axis=-1).max(initial=0.0))


def table(report: dict) -> list[str]:
    unit = report["unit"] or "units"
    focus = ", ".join(f"{x:.4g}" for x in report["focus"])
    lines = [
        f"{report['calibration']}: {len(report['cameras'])} cameras; their axes come nearest to each other at "
        f"({focus}) {unit}, {report['mean_distance']:.4g} {unit} away on average",
        f"the largest ball all of them see has {100 * max(report['common_ball'], 0.0):.0f} % of that as its radius",
        "camera  picture      fx      fy      cx      cy   distance  azimuth  elevation  off axis  lens  name",
    ]
    for row in report["cameras"]:
        size = "?" if row["size"] is None else f"{row['size'][0]}x{row['size'][1]}"
        lens = "?" if row["lens_px"] is None else f"{row['lens_px']:.1f}"
        lines.append(
            f"{row['camera']:>6} {size:>10} {row['fx']:>7.5g} {row['fy']:>7.5g} {row['cx']:>7.5g} {row['cy']:>7.5g} "
            f"{row['distance']:>10.4g} {row['azimuth_deg']:>8.1f} {row['elevation_deg']:>10.1f} "
            f"{row['off_axis_deg']:>9.1f} {lens:>5}  {row['name']}"
        )
    return [*lines, "degrees as docs/conventions.md; lens: the most that distortion moves a border pixel, in pixels"]


# ---- points -----------------------------------------------------------------------------------------------------


def read_points(path: Path | str, num_cameras: int) -> Points:
    """3D points, with where each camera saw them or without.

    .npy: [n, 3] or [frames, n, 3]. .npz, .json: points_3d of that shape, points_2d ([cameras, n, 2] or [cameras,
    frames, n, 2], nan or null: unseen) if known, pixel_centre (0.5, or 0 where the pixels count from the first pixel's
    centre, as OpenCV does). A recording's truth.json or truth.npz: its keypoints. label3d_dannce.mat: its labels.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--check_points {path} does not exist; a .npy, .npz, .json or .mat file is expected")
    if path.suffix == ".mat":
        labels = read_dannce_labels(path)
        if labels is None:
            raise ValueError(f"--check_points {path} holds no labelled points (labelData)")
        content = {"points_3d": labels[0], "points_2d": labels[1]}
    elif path.suffix == ".json":
        content = _json_points(path)
    elif path.suffix in (".npy", ".npz"):
        try:
            loaded = np.load(path)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"--check_points {path}: not a numpy file of plain numbers: {error}") from error
        content = {"points_3d": loaded} if path.suffix == ".npy" else dict(loaded)
    else:
        raise ValueError(f"--check_points {path}: unknown kind; .npy, .npz, .json or label3d_dannce.mat is expected")
    return _points(content, num_cameras, path)


def _json_points(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--check_points {path} is not valid JSON: {error}") from error
    if isinstance(content, list):
        return {"points_3d": content}
    frames = content.get("frames")
    if isinstance(frames, list) and frames and "keypoints" in frames[0]:
        return {"points_3d": [frame["keypoints"] for frame in frames]}
    return content


def _points(content: dict, num_cameras: int, path: Path) -> Points:
    if "points_3d" not in content and "keypoints" in content:
        content = {"points_3d": content["keypoints"]}
    if "points_3d" not in content:
        raise ValueError(f"--check_points {path} lacks points_3d; it holds {', '.join(map(str, content)) or 'nothing'}")
    xyz = _numbers(content["points_3d"], f"--check_points {path}: points_3d")
    if xyz.ndim not in (2, 3) or xyz.shape[-1] != 3 or not xyz.size:
        raise ValueError(f"--check_points {path}: points_3d must be [n, 3] or [frames, n, 3], got {list(xyz.shape)}")
    if content.get("points_2d") is None:
        return Points(xyz.reshape(-1, 3), None, str(path))
    pixels = _numbers(content["points_2d"], f"--check_points {path}: points_2d")
    expected = (num_cameras, *xyz.shape[:-1], 2)
    if pixels.shape != expected:
        raise ValueError(
            f"--check_points {path}: points_2d must be {list(expected)} to go with {num_cameras} cameras and "
            f"points_3d, got {list(pixels.shape)}"
        )
    pixels = pixels + (0.5 - float(np.asarray(content.get("pixel_centre", 0.5))))
    return Points(xyz.reshape(-1, 3), pixels.reshape(num_cameras, -1, 2), str(path))


def _numbers(values, what: str) -> np.ndarray:
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a full array of numbers: {error}") from error


def _own_labels(path: Path | str) -> Points | None:
    if Path(path).suffix != ".mat" or read_dannce_labels(path) is None:
        return None
    return read_points(path, len(read_dannce_labels(path)[1]))


def reproject(calibration: Calibration, points: Points) -> dict:
    """Per camera: points known, in front, inside the picture; and the error in pixels where it saw them (rms, max)."""
    known = np.isfinite(points.xyz).all(axis=-1)
    if not known.any():
        raise ValueError(f"{points.source}: none of its {len(known)} points has three finite numbers")
    xyz = points.xyz[known]
    depth = np.einsum("vj,nj->vn", calibration.w2c[:, 2, :3], xyz) + calibration.w2c[:, None, 2, 3]
    projected = calibration.project(xyz)
    cameras = []
    for index, size in enumerate(calibration.sizes):
        row = {"camera": index, "in_front": int((depth[index] > 0).sum()), "inside": None}
        if size is not None:
            within = (depth[index] > 0) & ((projected[index] > 0) & (projected[index] < size)).all(axis=-1)
            row["inside"] = int(within.sum())
        if points.pixels is not None:
            row |= _errors(projected[index], points.pixels[index][known])
        cameras.append(row)
    result = {"count": int(known.sum()), "cameras": cameras}
    if points.pixels is not None:
        result["rms_px"] = _rms(projected, points.pixels[:, known])
        result["meant"] = _explanations(calibration, xyz, points.pixels[:, known], result["rms_px"])
    return result


def _errors(projected: np.ndarray, seen: np.ndarray) -> dict:
    distance = np.linalg.norm(projected - seen, axis=-1)
    distance = distance[np.isfinite(distance)]
    if not len(distance):
        return {"seen": 0, "rms_px": None, "max_px": None}
    return {
        "seen": len(distance), "rms_px": float(np.sqrt((distance**2).mean())), "max_px": float(distance.max()),
    }  # fmt: skip


def _rms(projected: np.ndarray, seen: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean(np.sum((projected - seen) ** 2, axis=-1))))


def _explanations(calibration: Calibration, xyz: np.ndarray, seen: np.ndarray, written: float) -> list[str]:
    """Other readings of calibration, points or pictures that leave far less error, best first."""
    if written <= GOOD_PX:
        return []
    found = {}
    for name, read in READINGS.items():
        found[f"the calibration is read as {name}"] = replace(calibration, w2c=read(calibration.w2c)).project(xyz)
    for factor in (1000.0, 0.001):
        found[f"the points are {factor:g} times as large (millimetres against metres)"] = calibration.project(
            xyz * factor
        )
    errors = {name: _rms(projected, seen) for name, projected in found.items()}
    if None not in calibration.sizes:
        mirrored = calibration.project(xyz)
        mirrored[..., 0] = np.array([size[0] for size in calibration.sizes])[:, None] - mirrored[..., 0]
        errors["the pictures are mirrored"] = _rms(mirrored, seen)
    plain = replace(calibration, distortion=np.zeros_like(calibration.distortion))
    errors["the pictures are undistorted already (no lens distortion)"] = _rms(plain.project(xyz), seen)
    return [name for name, error in sorted(errors.items(), key=lambda e: e[1]) if error <= EXPLAINED * written]


def point_lines(result: dict, source: str) -> list[str]:
    lines = [f"{source}: {result['count']} points", "camera  in front  inside    seen    rms px    max px"]
    for row in result["cameras"]:
        inside = "?" if row["inside"] is None else row["inside"]
        line = f"{row['camera']:>6} {row['in_front']:>9} {inside:>7}"
        if "seen" in row:
            error = ("-", "-") if row["rms_px"] is None else (f"{row['rms_px']:.4g}", f"{row['max_px']:.4g}")
            line += f" {row['seen']:>7} {error[0]:>9} {error[1]:>9}"
        lines.append(line)
    if "rms_px" in result:
        lines.append(f"all: {result['rms_px']:.4g} px rms")
        lines += [f"they would fit if {name}" for name in result["meant"]]
    return lines
