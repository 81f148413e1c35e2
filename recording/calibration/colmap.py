"""COLMAP's sparse models, text (cameras.txt, images.txt) and binary (cameras.bin, images.bin).

Layout: https://colmap.github.io/format.html. images hold world to camera as a quaternion w x y z and a translation, in
OpenCV's axes; pixels count from the outer corner (the first pixel's centre is 0.5, 0.5), as everywhere in this project.
The scale of a COLMAP world is arbitrary. Cameras stand in the order of their images' names (cam2 before cam10); images
with one and the same pose and camera (a static camera's frames) are one camera.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from recording.calibration.fields import intrinsics, lens_table, matrix, natural_key, picture_size
from recording.calibration.model import Calibration

# id: (name, where each parameter goes). f stands for fx and fy at once.
MODELS = {
    0: ("SIMPLE_PINHOLE", "f cx cy"),
    1: ("PINHOLE", "fx fy cx cy"),
    2: ("SIMPLE_RADIAL", "f cx cy k1"),
    3: ("RADIAL", "f cx cy k1 k2"),
    4: ("OPENCV", "fx fy cx cy k1 k2 p1 p2"),
    6: ("FULL_OPENCV", "fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6"),
}
OTHER_MODELS = {
    5: "OPENCV_FISHEYE", 7: "FOV", 8: "SIMPLE_RADIAL_FISHEYE", 9: "RADIAL_FISHEYE", 10: "THIN_PRISM_FISHEYE",
    11: "RAD_TAN_THIN_PRISM_FISHEYE",
}  # fmt: skip
NAMES = {name: number for number, (name, _) in MODELS.items()}
PARTS = ("cameras", "images")
LIMIT = 10_000_000  # more cameras or images than this is a damaged file


def is_colmap(folder: Path) -> bool:
    return folder.is_dir() and any(all((folder / f"{part}{kind}").is_file() for part in PARTS) for kind in KINDS)


def read_colmap(path: Path | str) -> Calibration:
    """path: the model's folder, or one of its files (which then says text or binary)."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    kinds = [path.suffix] if path.is_file() else [kind for kind in KINDS if (folder / f"cameras{kind}").is_file()]
    for kind in kinds:
        for part in PARTS:
            if not (folder / f"{part}{kind}").is_file():
                raise ValueError(f"COLMAP model {folder} lacks {part}{kind}; cameras and images are expected together")
    if not kinds:
        raise ValueError(f"{folder} holds no COLMAP model; cameras.txt and images.txt (or .bin) are expected")
    models = [_assemble(*KINDS[kind](folder), folder, kind) for kind in kinds]
    if len(models) == 2 and not models[0].close_to(models[1], 1e-6):
        raise ValueError(f"{folder}: the text and the binary model differ; name the one to read, e.g. cameras.bin")
    return models[-1]


def _assemble(cameras: dict, images: list, folder: Path, kind: str) -> Calibration:
    unique: dict[tuple, tuple] = {}
    source = str(folder / f"images{kind}")
    for name, quaternion, translation, camera_id in sorted(images, key=lambda image: natural_key(image[0])):
        if camera_id not in cameras:
            raise ValueError(f"{source}: image {name} uses camera {camera_id}, which cameras{kind} lacks")
        key = (camera_id, tuple(quaternion), tuple(translation))
        unique.setdefault(key, (name, _w2c(quaternion, translation, f"{source}: image {name}"), *cameras[camera_id]))
    if not unique:
        raise ValueError(f"{source} holds no images, so no camera has a pose")
    names, w2c, K, lenses, sizes = zip(*unique.values(), strict=True)
    return Calibration(np.array(K), np.array(w2c), lens_table(list(lenses), source), sizes, source, names=names)


def _w2c(quaternion, translation, what: str) -> np.ndarray:
    w, x, y, z = q = matrix(quaternion, (4,), f"{what}: quaternion")
    norm = float(np.linalg.norm(q))
    if abs(norm - 1.0) > 1e-3:
        raise ValueError(f"{what}: the quaternion must have length 1, got {norm:.4g}")
    w, x, y, z = q / norm
    w2c = np.eye(4)
    w2c[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    w2c[:3, 3] = matrix(translation, (3,), f"{what}: translation")
    return w2c


def _camera(model: int, width, height, parameters, what: str) -> tuple[np.ndarray, list[float], tuple[int, int]]:
    """(K, distortion coefficients, size) of one line or record of cameras."""
    keys = MODELS[model][1].split()
    values = dict(zip(keys, matrix(parameters, (len(keys),), f"{what} ({MODELS[model][0]}): parameters"), strict=True))
    fx, fy = values.get("fx", values.get("f")), values.get("fy", values.get("f"))
    lens = [values.get(key, 0.0) for key in ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")]
    return intrinsics(fx, fy, values["cx"], values["cy"]), lens, picture_size(width, height, what)


def _model(number: int | None, name: str | None, what: str) -> int:
    """The id of a supported model, given either way."""
    found = NAMES.get(name) if number is None else number
    if found not in MODELS:
        said = name if number is None else OTHER_MODELS.get(number, f"number {number}")
        supported = ", ".join(name for name, _ in MODELS.values())
        raise ValueError(
            f"{what}: COLMAP camera model {said} is not supported; undistort the pictures, or use one of {supported}"
        )
    return found


# ---- text -------------------------------------------------------------------------------------------------------


def _read_text(folder: Path) -> tuple[dict, list]:
    cameras = {}
    for number, line in _lines(folder / "cameras.txt"):
        what = f"{folder / 'cameras.txt'}: line {number}"
        if not line:
            continue
        fields = line.split()
        if len(fields) < 5:
            raise ValueError(f"{what} must be CAMERA_ID MODEL WIDTH HEIGHT PARAMS..., got {line!r}")
        model = _model(None, fields[1], what)
        cameras[_whole(fields[0], what)] = _camera(model, fields[2], fields[3], fields[4:], what)
    images = []
    # Two lines per image; the second lists its points and may be empty, so that empty lines count there.
    lines = iter(_lines(folder / "images.txt"))
    for number, line in lines:
        if not line:
            continue
        what = f"{folder / 'images.txt'}: line {number}"
        fields = line.split(maxsplit=9)
        if len(fields) != 10:
            raise ValueError(f"{what} must be IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, got {line!r}")
        pose = matrix(fields[1:8], (7,), f"{what}: pose")
        images.append((fields[9], pose[:4], pose[4:], _whole(fields[8], what)))
        next(lines, None)
    return cameras, images


def _lines(path: Path):
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("#"):
            yield number, line.strip()


def _whole(text: str, what: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{what}: a whole number is expected, got {text!r}")
    return int(text)


# ---- binary (little-endian) -------------------------------------------------------------------------------------


class _Records:
    """Reads structs one after the other; a file that ends too soon is named."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def take(self, layout: str) -> tuple:
        size = struct.calcsize(f"<{layout}")
        self.skip(size)
        return struct.unpack_from(f"<{layout}", self.data, self.at - size)

    def skip(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise ValueError(
                f"{self.path} is truncated: {size} bytes are expected at {self.at}, the file has {len(self.data)}"
            )
        self.at += size

    def name(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise ValueError(f"{self.path} is truncated: the image name at byte {self.at} does not end")
        raw, self.at = self.data[self.at : end], end + 1
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: the image name at byte {end - len(raw)} is not text: {error}") from error

    def count(self, what: str) -> int:
        (number,) = self.take("Q")
        if number > LIMIT:
            raise ValueError(f"{self.path}: {number} {what} cannot be; this is no COLMAP binary, or it is damaged")
        return number

    def finish(self) -> None:
        if self.at != len(self.data):
            raise ValueError(f"{self.path} has {len(self.data) - self.at} bytes too many; it is damaged")


def _read_binary(folder: Path) -> tuple[dict, list]:
    records = _Records(folder / "cameras.bin")
    cameras = {}
    for _ in range(records.count("cameras")):
        camera_id, model, width, height = records.take("IiQQ")
        what = f"{records.path}: camera {camera_id}"
        count = len(MODELS[_model(model, None, what)][1].split())
        cameras[camera_id] = _camera(model, width, height, records.take(f"{count}d"), what)
    records.finish()
    records = _Records(folder / "images.bin")
    images = []
    for _ in range(records.count("images")):
        values = records.take("I7dI")
        name = records.name()
        images.append((name, values[1:5], values[5:8], values[8]))
        records.skip(24 * records.count("points of one image"))  # x, y, point id
    records.finish()
    return cameras, images


KINDS = {".txt": _read_text, ".bin": _read_binary}


# ---- writing ----------------------------------------------------------------------------------------------------


def write_colmap(folder: Path | str, calibration: Calibration, *, binary: bool) -> None:
    """cameras and images (one camera per image, no points), and an empty points3D, which COLMAP's readers want.

    FULL_OPENCV where a lens has k3 or k4..k6, OPENCV where it has any coefficient, else PINHOLE. Raises ValueError for
    skew and unknown picture sizes, which the format cannot hold.
    """
    from scipy.spatial.transform import Rotation

    folder = Path(folder)
    calibration.require(folder, skew=False, sizes=True)
    folder.mkdir(parents=True, exist_ok=True)
    cameras, images = [], []
    for index, (K, w2c) in enumerate(zip(calibration.K, calibration.w2c, strict=True)):
        k1, k2, p1, p2, *higher = np.append(calibration.distortion[index], [0.0, 0.0, 0.0])[:8].tolist()
        model = 6 if any(higher) else 4 if any((k1, k2, p1, p2)) else 1
        keys = len(MODELS[model][1].split())
        values = [float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2]), k1, k2, p1, p2, *higher][:keys]
        cameras.append((index + 1, model, *calibration.sizes[index], values))
        x, y, z, w = Rotation.from_matrix(w2c[:3, :3]).as_quat().tolist()
        images.append((index + 1, (w, x, y, z, *w2c[:3, 3].tolist()), f"cam_{index:03d}.png"))
    (_write_binary if binary else _write_text)(folder, cameras, images)


def _write_text(folder: Path, cameras: list, images: list) -> None:
    lines = [f"{n} {MODELS[m][0]} {w} {h} {' '.join(map(repr, values))}" for n, m, w, h, values in cameras]
    (folder / "cameras.txt").write_text("\n".join(["# CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]", *lines, ""]))
    lines = [f"{n} {' '.join(map(repr, pose))} {n} {name}\n" for n, pose, name in images]
    head = "# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of its points"
    (folder / "images.txt").write_text("\n".join([head, *lines]) + "\n")
    (folder / "points3D.txt").write_text("# no points\n")


def _write_binary(folder: Path, cameras: list, images: list) -> None:
    data = [struct.pack("<Q", len(cameras))]
    data += [struct.pack(f"<IiQQ{len(v)}d", n, m, w, h, *v) for n, m, w, h, v in cameras]
    (folder / "cameras.bin").write_bytes(b"".join(data))
    data = [struct.pack("<Q", len(images))]
    data += [
        struct.pack("<I7dI", n, *pose, n) + name.encode() + b"\0" + struct.pack("<Q", 0) for n, pose, name in images
    ]
    (folder / "images.bin").write_bytes(b"".join(data))
    (folder / "points3D.bin").write_bytes(struct.pack("<Q", 0))
