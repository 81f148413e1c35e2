"""COLMAP's sparse models, text (cameras.txt, images.txt) and binary (cameras.bin, images.bin).

Layout: https://colmap.github.io/format.html. images hold world to camera as a quaternion w x y z and a translation, in
OpenCV's axes; pixels count from the outer corner (the first pixel's center is 0.5, 0.5), as everywhere in this project.
The scale of a COLMAP world is arbitrary. Cameras stand in the order of their images' names (cam2 before cam10); images
with one and the same pose and camera (a static camera's frames) are one camera.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from multiview.files import read_text
from recording.calibration.fields import (
    COEFFICIENTS,
    check_count,
    natural_key,
    numbers,
    pinhole,
    read_bytes,
    rigid,
    size_of,
)
from recording.calibration.model import Calibration, assemble

MODELS = {  # id: (name, where each parameter goes); f stands for fx and fy at once
    0: ("SIMPLE_PINHOLE", "f cx cy"), 1: ("PINHOLE", "fx fy cx cy"), 2: ("SIMPLE_RADIAL", "f cx cy k1"),
    3: ("RADIAL", "f cx cy k1 k2"), 4: ("OPENCV", "fx fy cx cy k1 k2 p1 p2"),
    6: ("FULL_OPENCV", "fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6"),
}  # fmt: skip
OTHER_MODELS = {5: "OPENCV_FISHEYE", 7: "FOV", 8: "SIMPLE_RADIAL_FISHEYE", 9: "RADIAL_FISHEYE"}  # refused by name
PARTS = ("cameras", "images")


def is_colmap(folder: Path) -> bool:
    return any(all((folder / f"{part}{kind}").is_file() for part in PARTS) for kind in KINDS)


def read_colmap(path: Path | str) -> Calibration:
    """path: the model's folder, or one of its files (which then says text or binary)."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    kinds = [path.suffix] if path.is_file() else [kind for kind in KINDS if (folder / f"cameras{kind}").is_file()]
    missing = [f"{part}{kind}" for kind in kinds for part in PARTS if not (folder / f"{part}{kind}").is_file()]
    if missing or not kinds:
        what = f"lacks {', '.join(missing)}" if missing else "holds no cameras.txt or cameras.bin"
        raise ValueError(f"COLMAP model {folder} {what}; cameras and images are expected together")
    models = [_assemble(*KINDS[kind](folder), folder, kind) for kind in kinds]
    if len(models) == 2 and not models[0].close_to(models[1], 1e-6):
        raise ValueError(f"{folder}: the text and the binary model differ; name the one to read, e.g. cameras.bin")
    return models[-1]


def _assemble(cameras: dict, images: list, folder: Path, kind: str) -> Calibration:
    from scipy.spatial.transform import Rotation

    static: dict[tuple, str] = {}  # camera and pose -> name of the first image
    source, rows = folder / f"images{kind}", []
    for name, pose, camera_id in sorted(images, key=lambda image: natural_key(image[0])):
        if camera_id not in cameras:
            raise ValueError(f"{source}: image {name} uses camera {camera_id:g}, which cameras{kind} lacks")
        static.setdefault((camera_id, tuple(pose)), name)
    check_count(len(static), source)
    for (camera_id, pose), name in static.items():
        what, (K, lens, size) = f"{source}: image {name}", cameras[camera_id]
        w, x, y, z, *translation = numbers(pose, (7,), f"{what}: its pose").tolist()
        norm = float(np.linalg.norm([w, x, y, z]))
        if abs(norm - 1.0) > 1e-3:
            raise ValueError(f"{what}: the quaternion must have length 1, got {norm:.4g}")
        rows.append((K, rigid(Rotation.from_quat([x, y, z, w]).as_matrix(), translation, what), lens, size, name))
    return assemble(rows, source)


def _camera(model: int | str, width: float, height: float, parameters, what: str) -> tuple:
    """Returns (K, distortion coefficients, size) of one line or record of cameras. parameters: of a number, them."""
    name, keys = _supported(model, what)
    values = dict(zip(keys, numbers(parameters, (len(keys),), f"{what} ({name}): parameters"), strict=True))
    fx, fy = values.get("fx", values.get("f")), values.get("fy", values.get("f"))
    lens = [values.get(key, 0.0) for key in COEFFICIENTS]
    return pinhole(fx, fy, values["cx"], values["cy"]), lens, size_of(width, height, what)


def _supported(model: int | str, what: str) -> tuple[str, list[str]]:
    """Returns name and parameters of a model, given by id or name."""
    for number, (name, keys) in MODELS.items():
        if model in (number, name):
            return name, keys.split()
    model, names = OTHER_MODELS.get(model, model), ", ".join(name for name, _ in MODELS.values())
    raise ValueError(f"{what}: COLMAP camera model {model} is not supported; undistort the images, or use {names}")


def _read_text(folder: Path) -> tuple[dict, list]:
    def lines(name: str):
        for number, line in enumerate(read_text(folder / name).splitlines(), 1):
            if not line.startswith("#"):
                yield f"{folder / name}: line {number}", line.strip()

    cameras, images, after_image = {}, [], False
    for what, line in lines("cameras.txt"):
        words = line.split()
        if words and len(words) < 5:
            raise ValueError(f"{what} must be CAMERA_ID MODEL WIDTH HEIGHT PARAMS..., got {line[:80]!r}")
        if words:
            number, width, height, *values = _floats([words[0], *words[2:]], what)
            cameras[number] = _camera(words[1], width, height, values, what)
    for what, line in lines("images.txt"):
        words = line.split(maxsplit=9)
        # A line of points (x y id ...) or an empty one follows each image; some programs leave the empty ones out.
        points, after_image = after_image and _is_points(line.split()), False
        if points or not words:
            continue
        if len(words) != 10:
            raise ValueError(f"{what} must be IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, got {line[:80]!r}")
        values, after_image = _floats(words[:9], what), True
        images.append((words[9], values[1:8], values[8]))
    return cameras, images


def _is_points(words: list[str]) -> bool:
    try:
        return len(words) % 3 == 0 and all(float(word) is not None for word in words)
    except ValueError:
        return False


def _floats(words: list[str], what: str) -> list[float]:
    try:
        return numbers([float(word) for word in words], (len(words),), what).tolist()
    except ValueError as error:
        raise ValueError(f"{what}: numbers are expected, got {' '.join(words)[:80]!r}") from error


class _Records:
    """Reads little-endian structs one after the other; a file that ends too soon is named."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, read_bytes(path), 0

    def take(self, layout: str) -> tuple:
        size = struct.calcsize(f"<{layout}")
        self.skip(size)
        return struct.unpack_from(f"<{layout}", self.data, self.at - size)

    def skip(self, size: int) -> None:
        if self.at + size > len(self.data):
            wanted, got = f"{size} bytes are expected at {self.at}", f"the file has {len(self.data)}"
            raise ValueError(f"{self.path} is truncated: {wanted}, {got}; copy the model again")
        self.at += size

    def name(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise ValueError(f"{self.path} is truncated: the image name at byte {self.at} does not end")
        raw, self.at = self.data[self.at : end], end + 1
        return raw.decode(errors="replace")

    def repeat(self):
        """Yields once per record of the file, whose number comes first; then the file must be at its end."""
        (count,) = self.take("Q")
        for _ in range(count):
            yield
        if self.at != len(self.data):
            raise ValueError(f"{self.path} has {len(self.data) - self.at} bytes too many; it is damaged")


def _read_binary(folder: Path) -> tuple[dict, list]:
    cameras, images = {}, []
    records = _Records(folder / "cameras.bin")
    for _ in records.repeat():
        camera_id, model, width, height = records.take("IiQQ")
        what = f"{records.path}: camera {camera_id}"
        values = records.take(f"{len(_supported(model, what)[1])}d")
        cameras[camera_id] = _camera(model, width, height, values, what)
    records = _Records(folder / "images.bin")
    for _ in records.repeat():
        _, *pose, camera_id = records.take("I7dI")
        images.append((records.name(), pose, camera_id))
        records.skip(24 * records.take("Q")[0])  # x, y, point id
    return cameras, images


KINDS = {".txt": _read_text, ".bin": _read_binary}


def write_colmap(folder: Path | str, calibration: Calibration, *, binary: bool) -> None:
    """cameras and images (one camera per image, no points), and an empty points3D, which COLMAP's readers want.

    FULL_OPENCV where a lens has k3 or k4..k6, OPENCV where it has any coefficient, else PINHOLE.
    """
    from scipy.spatial.transform import Rotation

    folder = Path(folder)
    calibration.require(folder, skew=False, sizes=True)
    folder.mkdir(parents=True, exist_ok=True)
    packed = {part: [struct.pack("<Q", len(calibration))] for part in PARTS}
    lines = {part: ["# IDs first; after each image a line of its points"] for part in PARTS}
    for index, (K, w2c) in enumerate(zip(calibration.K, calibration.w2c, strict=True)):
        lens = np.append(calibration.distortion[index], [0.0, 0.0, 0.0])[:8].tolist()
        model = 6 if any(lens[4:]) else 4 if any(lens) else 1
        values = [*K[[0, 1, 0, 1], [0, 1, 2, 2]].tolist(), *lens][: len(MODELS[model][1].split())]
        x, y, z, w = Rotation.from_matrix(w2c[:3, :3]).as_quat().tolist()
        pose, (width, height), number = (w, x, y, z, *w2c[:3, 3].tolist()), calibration.sizes[index], index + 1
        name = f"cam_{index:03d}.png"
        packed["cameras"].append(struct.pack(f"<IiQQ{len(values)}d", number, model, width, height, *values))
        packed["images"].append(struct.pack("<I7dI", number, *pose, number) + name.encode() + bytes(9))
        lines["cameras"].append(f"{number} {MODELS[model][0]} {width} {height} {' '.join(map(repr, values))}")
        lines["images"].append(f"{number} {' '.join(map(repr, pose))} {number} {name}\n")
    kind = ".bin" if binary else ".txt"
    for part in PARTS:
        text = ("\n".join(lines[part]) + "\n").encode()
        (folder / f"{part}{kind}").write_bytes(b"".join(packed[part]) if binary else text)
    (folder / f"points3D{kind}").write_bytes(bytes(8) if binary else b"# no points\n")
