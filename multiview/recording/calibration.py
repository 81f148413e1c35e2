"""Calibration files of raw recordings -> one `Calibration`.

Every reader returns OpenCV axes and pixel coordinates whose origin is the outer corner of the first pixel. Formats that
count pixel centres from 0 (OpenCV's convention: MAMMAL's new_cam.pkl, DANNCE's label3d_dannce.mat) get +0.5 on the
principal point here, once.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from multiview.cameras import Cameras, read_cameras

PIXEL_CENTRE = 0.5  # pixel-index coordinates -> outer-corner coordinates
FILE_NAMES = ("new_cam.pkl", "label3d_dannce.mat", "transforms.json", "opencv_cameras.json")
UP_ROTATIONS = {  # rotation that turns the named axis of the calibration's world into +z
    "z": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "-z": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "y": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "-y": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "x": ((0, 0, -1), (0, 1, 0), (1, 0, 0)),
    "-x": ((0, 0, 1), (0, 1, 0), (-1, 0, 0)),
}


@dataclass(frozen=True)
class Calibration:
    """The cameras of one recording, float64; camera k films video k.

    K: [v, 3, 3] pixels, outer-corner origin (skew allowed). w2c: [v, 4, 4] OpenCV axes, the file's length unit.
    distortion: [v, 5] OpenCV's k1, k2, p1, p2, k3. sizes: (width, height) per camera, None where the file does not say.
    """

    K: np.ndarray
    w2c: np.ndarray
    distortion: np.ndarray
    sizes: tuple[tuple[int, int] | None, ...]
    source: str

    def __len__(self) -> int:
        return len(self.K)

    @property
    def centres(self) -> np.ndarray:
        """[v, 3] camera centres in the calibration's world."""
        return -np.einsum("vji,vj->vi", self.w2c[:, :3, :3], self.w2c[:, :3, 3])

    def with_up(self, up: str) -> Calibration:
        """The same cameras in a world turned so that the axis `up` points along +z."""
        if up not in UP_ROTATIONS:
            raise ValueError(f"up axis must be one of {', '.join(UP_ROTATIONS)}, got {up!r}")
        turn = np.eye(4)
        turn[:3, :3] = np.array(UP_ROTATIONS[up], dtype=np.float64)
        return replace(self, w2c=self.w2c @ turn.T)

    def with_sizes(self, sizes: list[tuple[int, int]]) -> Calibration:
        """Takes picture sizes from the videos, refused where the file states another or its K cannot belong to them."""
        for index, (said, real) in enumerate(zip(self.sizes, sizes, strict=True)):
            if said is not None and tuple(said) != tuple(real):
                raise ValueError(
                    f"{self.source}: camera {index} is calibrated for {said[0]} x {said[1]} pictures, its video has "
                    f"{real[0]} x {real[1]}; the calibration must belong to the videos as they are"
                )
            cx, cy = self.K[index, 0, 2], self.K[index, 1, 2]
            if not (0 < cx < real[0] and 0 < cy < real[1]):
                raise ValueError(
                    f"{self.source}: the principal point ({cx:.1f}, {cy:.1f}) of camera {index} lies outside its "
                    f"{real[0]} x {real[1]} video; was the video resized or cropped after the calibration?"
                )
        return replace(self, sizes=tuple(tuple(size) for size in sizes))

    def cameras(self) -> Cameras:
        """As one Cameras [v] (float64); needs one picture size, no skew and no distortion."""
        if len(set(self.sizes)) != 1 or self.sizes[0] is None:
            raise ValueError(f"{self.source}: the cameras must share one known picture size, got {self.sizes}")
        if np.abs(self.K[:, 0, 1]).max() > 0 or np.abs(self.distortion).max() > 0:
            raise ValueError(f"{self.source}: cameras with skew or lens distortion are no plain pinhole cameras")
        width, height = self.sizes[0]
        values = np.stack([self.K[:, 0, 0], self.K[:, 1, 1], self.K[:, 0, 2], self.K[:, 1, 2]], axis=-1)
        return Cameras.from_w2c(torch.from_numpy(self.w2c), torch.from_numpy(values), height, width)

    def project(self, xyz: np.ndarray) -> np.ndarray:
        """World points [n, 3] -> pixels [v, n, 2], distortion and skew included."""
        camera = np.einsum("vij,nj->vni", self.w2c[:, :3, :3], xyz) + self.w2c[:, None, :3, 3]
        normalised = camera[..., :2] / camera[..., 2:]
        return np.stack([self.to_pixels(index, points) for index, points in enumerate(normalised)])

    def to_pixels(self, index: int, normalised: np.ndarray) -> np.ndarray:
        """Undistorted normalised coordinates [..., 2] of camera `index` -> pixels [..., 2]."""
        x, y = normalised[..., 0], normalised[..., 1]
        if np.any(self.distortion[index]):
            k1, k2, p1, p2, k3 = self.distortion[index]
            r2 = x * x + y * y
            radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
            x, y = (
                x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
                y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
            )
        K = self.K[index]
        return np.stack([K[0, 0] * x + K[0, 1] * y + K[0, 2], K[1, 1] * y + K[1, 2]], axis=-1)

    def to_normalised(self, index: int, pixels: np.ndarray) -> np.ndarray:
        """Pixels [n, 2] of camera `index` -> undistorted normalised coordinates [n, 2]."""
        K = self.K[index]
        y = (pixels[..., 1] - K[1, 2]) / K[1, 1]
        x = (pixels[..., 0] - K[0, 2] - K[0, 1] * y) / K[0, 0]
        distorted = np.stack([x, y], axis=-1)
        if not np.any(self.distortion[index]):
            return distorted
        plain = replace(self, K=np.eye(3)[None].repeat(len(self), 0))
        guess = distorted.copy()
        for _ in range(50):  # fixed point: converges wherever the lens model itself is one-to-one
            step = distorted - plain.to_pixels(index, guess)
            guess = guess + step
            if np.abs(step).max(initial=0.0) < 1e-12:
                return guess
        raise ValueError(
            f"{self.source}: the lens distortion {self.distortion[index].tolist()} of camera {index} cannot be undone "
            f"over the picture; check its coefficients (k1, k2, p1, p2, k3)"
        )

    def rays(self, index: int, pixels: np.ndarray) -> np.ndarray:
        """Pixels [n, 2] of camera `index` -> unit directions in the world [n, 3]."""
        normalised = self.to_normalised(index, pixels)
        directions = np.concatenate([normalised, np.ones_like(normalised[..., :1])], axis=-1)
        directions = directions @ self.w2c[index, :3, :3]
        return directions / np.linalg.norm(directions, axis=-1, keepdims=True)

    def validate(self) -> Calibration:
        """Finite, rigid, right-handed, sane intrinsics, all cameras facing what they surround."""
        if not all(np.isfinite(values).all() for values in (self.K, self.w2c, self.distortion)):
            raise ValueError(f"{self.source}: K, R, T and distortion must be finite numbers")
        fxfycxcy = np.stack([self.K[:, 0, 0], self.K[:, 1, 1], self.K[:, 0, 2], self.K[:, 1, 2]], axis=-1)
        Cameras.from_w2c(torch.from_numpy(self.w2c), torch.from_numpy(fxfycxcy), 1, 1).validate(self.source)
        ratio = fxfycxcy[:, 0] / fxfycxcy[:, 1]
        if ((ratio < 0.8) | (ratio > 1.25)).any() or np.abs(self.K[:, [1, 2, 2], [0, 0, 1]]).max() > 1e-6:
            raise ValueError(
                f"{self.source}: K must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with fx and fy alike, got "
                f"{self.K[0].round(3).tolist()} for camera 0; is it transposed?"
            )
        if len(self) < 2:
            raise ValueError(f"{self.source}: at least two cameras are needed, got {len(self)}")
        self._check_facing()
        return self

    def _check_facing(self) -> None:
        """Cameras that surround an animal look at a common volume; with OpenGL axes they look away from it."""
        axes, centres = self.w2c[:, 2, :3], self.centres
        projectors = np.eye(3) - axes[:, :, None] * axes[:, None, :]
        point = np.linalg.lstsq(projectors.sum(0), np.einsum("vij,vj->i", projectors, centres), rcond=None)[0]
        depth = np.einsum("vi,vi->v", axes, point - centres)
        if (depth <= 0).all():
            raise ValueError(
                f"{self.source}: all cameras look away from the point their axes meet in, so the axes are OpenGL's "
                "(z backward) where OpenCV's (z forward) are meant; turn columns y and z of every c2w, or give the "
                "cameras as transforms.json, which is read with OpenGL axes"
            )
        if (depth <= 0).any():
            raise ValueError(
                f"{self.source}: camera(s) {np.flatnonzero(depth <= 0).tolist()} look away from the point the cameras' "
                "axes meet in; their R or T is wrong"
            )


def find_calibration(meta_dir: Path | str) -> Path:
    """The calibration file of a recording: exactly one of FILE_NAMES in meta_dir."""
    meta_dir = Path(meta_dir)
    if not meta_dir.is_dir():
        raise ValueError(f"--meta_dir {meta_dir} is not a folder; it must hold the calibration and the mask videos")
    found = [meta_dir / name for name in FILE_NAMES if (meta_dir / name).is_file()]
    if len(found) != 1:
        what = f"holds {', '.join(path.name for path in found)}" if found else "holds no calibration"
        raise ValueError(
            f"--meta_dir {meta_dir} {what}; exactly one of {', '.join(FILE_NAMES)} is expected there, or name the file "
            "with --calibration"
        )
    return found[0]


def read_calibration(path: Path | str, *, up: str = "z") -> Calibration:
    """Reads a calibration by file name or suffix, validates it, turns `up` to +z."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"calibration {path} does not exist; one of {', '.join(FILE_NAMES)} is expected")
    if path.suffix in (".pkl", ".pickle"):
        calibration = read_mammal_pickle(path)
    elif path.suffix == ".mat":
        calibration = read_dannce_mat(path)
    elif path.suffix == ".json":
        content = _read_json(path)
        calibration = read_transforms(path) if _is_transforms(content) else read_opencv_json(path)
    else:
        raise ValueError(f"calibration {path}: unknown kind; expected {', '.join(FILE_NAMES)}")
    return calibration.validate().with_up(up)


# ---- MAMMAL: new_cam.pkl ----------------------------------------------------------------------------------------


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What protocol-2 pickles use to hold bytes; any other codec is refused."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding!r} is not allowed")
    return text.encode("latin1")


class NumpyUnpickler(pickle.Unpickler):
    """Loads plain containers, numbers, strings and numpy arrays; anything else in the file is refused, not run."""

    def find_class(self, module: str, name: str):
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar")):
            return getattr(np._core.multiarray, name)
        if (module, name) == ("numpy.core.numeric", "_frombuffer"):
            return np._core.numeric._frombuffer
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only numpy arrays and plain containers are allowed")


def load_numpy_pickle(path: Path | str):
    """The content of a pickle of numpy arrays and plain containers. Raises ValueError for any other content."""
    path = Path(path)
    try:
        return NumpyUnpickler(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"pickle {path} refused: {error}") from error


def read_mammal_pickle(path: Path | str) -> Calibration:
    """MAMMAL's new_cam.pkl: a list (or a dict keyed 0, 1, ...) of {K, R, T[, mapx, mapy]}.

    X_cam = R X + T with column vectors, K of the undistorted picture, pixel centres counted from 0, T in mm. The remap
    tables are only looked at for the picture size: the videos that go with this file are undistorted already.
    """
    entries = _numbered_entries(load_numpy_pickle(path), path)
    K, w2c, sizes = [], [], []
    for index, entry in enumerate(entries):
        missing = [key for key in ("K", "R", "T") if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{path}: camera {index} lacks {', '.join(missing)}; K, R and T are expected")
        K.append(_matrix(entry["K"], (3, 3), f"{path}: K of camera {index}"))
        w2c.append(_rigid(entry["R"], entry["T"], f"{path}: camera {index}"))
        table = entry.get("mapx")
        sizes.append((int(table.shape[1]), int(table.shape[0])) if isinstance(table, np.ndarray) else None)
    K = np.stack(K)
    K[:, :2, 2] += PIXEL_CENTRE
    return Calibration(K, np.stack(w2c), np.zeros((len(K), 5)), tuple(sizes), str(path))


def _numbered_entries(content, path: Path | str) -> list:
    if isinstance(content, (list, tuple)):
        return list(content)
    if isinstance(content, dict):
        try:
            numbered = {int(key): value for key, value in content.items()}
        except ValueError:
            numbered = {}
        if sorted(numbered) == list(range(len(content))) and content:
            return [numbered[index] for index in range(len(content))]
        raise ValueError(f"{path}: a dict of cameras must be keyed 0..n-1, got keys {list(content)[:8]}")
    raise ValueError(f"{path}: a list or dict of cameras is expected, got {type(content).__name__}")


# ---- DANNCE: label3d_dannce.mat ---------------------------------------------------------------------------------


def read_dannce_mat(path: Path | str) -> Calibration:
    """DANNCE's label3d_dannce.mat: params{c}.K transposed, row vectors [X 1] [r; t] K, RDistort k1 k2 (k3), TDistort.

    The principal point is taken as pixel centres counted from 0, as DANNCE's and MAMMAL's own code does.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, squeeze_me=False, struct_as_record=False, variable_names=["params"])
    except (MatReadError, NotImplementedError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a MATLAB file this reader understands (version 5 to 7.2): {error}") from error
    if "params" not in content:
        raise ValueError(f"{path}: the variable 'params' (cell array of K, r, t, RDistort, TDistort) is missing")
    K, w2c, distortion = [], [], []
    for index, cell in enumerate(np.asarray(content["params"], dtype=object).ravel()):
        params = np.asarray(cell, dtype=object).ravel()[0]
        missing = [key for key in ("K", "r", "t", "RDistort", "TDistort") if not hasattr(params, key)]
        if missing:
            raise ValueError(f"{path}: params{{{index + 1}}} lacks {', '.join(missing)}")
        K.append(_matrix(params.K, (3, 3), f"{path}: K of camera {index}").T)
        rotation = _matrix(params.r, (3, 3), f"{path}: r of camera {index}").T
        w2c.append(_rigid(rotation, params.t, f"{path}: camera {index}"))
        radial = np.append(np.asarray(params.RDistort, dtype=np.float64).ravel(), [0.0, 0.0, 0.0])[:3]
        tangential = np.asarray(params.TDistort, dtype=np.float64).ravel()
        distortion.append([radial[0], radial[1], tangential[0], tangential[1], radial[2]])
    K = np.stack(K)
    K[:, :2, 2] += PIXEL_CENTRE
    return Calibration(K, np.stack(w2c), np.array(distortion), (None,) * len(K), str(path))


# ---- JSON: transforms.json (NeRF, instant-ngp), opencv_cameras.json ---------------------------------------------


def _is_transforms(content: dict) -> bool:
    frames = content.get("frames")
    return isinstance(frames, list) and bool(frames) and isinstance(frames[0], dict) and "transform_matrix" in frames[0]


def read_transforms(path: Path | str) -> Calibration:
    """NeRF's transforms.json: c2w with OpenGL axes (y up, z backward), turned to OpenCV's here; frame k is camera k.

    Intrinsics (fl_x, fl_y, cx, cy, w, h, k1, k2, p1, p2, k3, or camera_angle_x) per frame or for the whole file; cx, cy
    count from the outer corner, as instant-ngp and COLMAP do.
    """
    content = _read_json(Path(path))
    K, w2c, distortion, sizes = [], [], [], []
    for index, frame in enumerate(content["frames"]):
        values = {**{key: value for key, value in content.items() if key != "frames"}, **frame}
        if "w" not in values or "h" not in values:
            raise ValueError(f"{path}: frame {index} needs the picture size w, h (per frame or for the file)")
        width, height = int(values["w"]), int(values["h"])
        if "fl_x" in values:
            focal_x = float(values["fl_x"])
        elif "camera_angle_x" in values:
            focal_x = 0.5 * width / math.tan(0.5 * float(values["camera_angle_x"]))
        else:
            raise ValueError(f"{path}: frame {index} needs fl_x or camera_angle_x")
        focal_y = float(values.get("fl_y", focal_x))
        cx, cy = float(values.get("cx", width / 2)), float(values.get("cy", height / 2))
        K.append([[focal_x, 0.0, cx], [0.0, focal_y, cy], [0.0, 0.0, 1.0]])
        c2w = _matrix(frame.get("transform_matrix"), (4, 4), f"{path}: transform_matrix of frame {index}")
        c2w = c2w @ np.diag([1.0, -1.0, -1.0, 1.0])
        rotation = c2w[:3, :3].T
        w2c.append(_rigid(rotation, -rotation @ c2w[:3, 3], f"{path}: frame {index}"))
        distortion.append([float(values.get(key, 0.0)) for key in ("k1", "k2", "p1", "p2", "k3")])
        sizes.append((width, height))
    return Calibration(np.array(K), np.stack(w2c), np.array(distortion), tuple(sizes), str(path))


def read_opencv_json(path: Path | str) -> Calibration:
    """The project's own opencv_cameras.json: OpenCV axes, outer-corner pixels, no distortion."""
    cameras = read_cameras(path)
    w2c = cameras.w2c.double().numpy()
    u, _, v = np.linalg.svd(w2c[:, :3, :3])  # read in float32: orthonormal again in float64
    w2c[:, :3, :3] = u @ v
    K = cameras.intrinsic_matrix().double().numpy()
    return Calibration(K, w2c, np.zeros((len(K), 5)), ((cameras.width, cameras.height),) * len(K), str(path))


# ---- helpers ----------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"calibration {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"calibration {path} must hold an object, got {type(content).__name__}")
    return content


def _matrix(values, shape: tuple[int, int], what: str) -> np.ndarray:
    try:
        matrix = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a {shape[0]}x{shape[1]} matrix of numbers: {error}") from error
    if matrix.shape != shape:
        raise ValueError(f"{what} must have shape {shape}, got {matrix.shape}")
    return matrix


def _rigid(rotation, translation, what: str) -> np.ndarray:
    """[4, 4] world to camera from R [3, 3] and T of 3 numbers in any orientation."""
    w2c = np.eye(4)
    w2c[:3, :3] = _matrix(rotation, (3, 3), f"{what}: R")
    translation = np.asarray(translation, dtype=np.float64).ravel()
    if translation.shape != (3,):
        raise ValueError(f"{what}: T must hold 3 numbers, got {translation.size}")
    w2c[:3, 3] = translation
    return w2c
