"""COLMAP's sparse models, text and binary, as https://colmap.github.io/format.html describes them.

images hold world to camera as a quaternion w x y z and a translation, in OpenCV's axes; pixels count from the outer
corner. Cameras stand in the order of their images' names (cam2 before cam10); images with one and the same pose and
camera (a static camera's frames) are one camera.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from multiview.files import read_text
from recording.calibration import model
from recording.calibration.model import Calibration

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
    """cameras: {id: (K, distortion coefficients, size)}. images: (name, quaternion w x y z and translation, id)."""
    from scipy.spatial.transform import Rotation

    static: dict[tuple, str] = {}  # camera and pose -> name of the first image
    source, rows = folder / f"images{kind}", []
    for name, pose, camera_id in sorted(images, key=lambda image: model.natural_key(image[0])):
        if camera_id not in cameras:
            raise ValueError(f"{source}: image {name} uses camera {camera_id:g}, which cameras{kind} lacks")
        static.setdefault((camera_id, tuple(pose)), name)
    model.check_count(len(static), source)
    for (camera_id, pose), name in static.items():
        what, (K, lens, size) = f"{source}: image {name}", cameras[camera_id]
        w, x, y, z, *translation = model.numbers(pose, (7,), f"{what}: its pose").tolist()
        norm = float(np.linalg.norm([w, x, y, z]))
        if abs(norm - 1.0) > 1e-3:
            raise ValueError(f"{what}: the quaternion must have length 1, got {norm:.4g}")
        R = Rotation.from_quat([x, y, z, w]).as_matrix()
        rows.append((K, model.rigid(R, translation, what), lens, size, name))
    return model.assemble(rows, source)


def _camera(kind: int | str, width: float, height: float, parameters, what: str) -> tuple:
    """Returns (K, distortion coefficients, size) of one line or record of cameras. kind: id or name of its model."""
    known = {key: (name, places.split()) for number, (name, places) in MODELS.items() for key in (number, name)}
    if kind not in known:
        kind, names = OTHER_MODELS.get(kind, kind), ", ".join(name for name, _ in MODELS.values())
        raise ValueError(f"{what}: COLMAP camera model {kind} is not supported; undistort the images, or use {names}")
    name, places = known[kind]
    values = dict(zip(places, model.numbers(parameters, (len(places),), f"{what} ({name}): parameters")))
    K = model.pinhole(values.get("fx", values.get("f")), values.get("fy", values.get("f")), values["cx"], values["cy"])
    return K, [values.get(key, 0.0) for key in model.COEFFICIENTS], model.size_of(width, height, what)


def _read_text(folder: Path) -> tuple[dict, list]:
    def lines(name: str):
        for number, line in enumerate(read_text(folder / name).splitlines(), 1):
            if not line.startswith("#"):
                yield f"{folder / name}: line {number}", line.strip()

    def floats(words: list[str], what: str) -> list[float]:
        try:
            return [float(word) for word in words]
        except ValueError:
            raise ValueError(f"{what}: numbers are expected, got {' '.join(words)[:80]!r}") from None

    cameras, images, after_image = {}, [], False
    for what, line in lines("cameras.txt"):
        words = line.split()
        if words and len(words) < 5:
            raise ValueError(f"{what} must be CAMERA_ID MODEL WIDTH HEIGHT PARAMS..., got {line[:80]!r}")
        if words:
            number, width, height, *values = floats([words[0], *words[2:]], what)
            cameras[number] = _camera(words[1], width, height, values, what)
    for what, line in lines("images.txt"):
        # A line of points (x y id ...) or an empty one follows each image; some programs leave the empty ones out.
        points = after_image and len(line.split()) % 3 == 0 and re.fullmatch(r"[-+.\deE\s]*", line)
        after_image = bool(line) and not points
        if after_image:
            words = line.split(maxsplit=9)
            if len(words) != 10:
                raise ValueError(f"{what} must be IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, got {line[:80]!r}")
            _, *pose, camera_id = floats(words[:9], what)
            images.append((words[9], pose, camera_id))
    return cameras, images


def _records(path: Path, read: Callable) -> None:
    """Calls `read(take)` for each record of a file; take(layout) returns the next little-endian values."""
    data, at = model.read_bytes(path), 0

    def take(layout: str) -> tuple:
        nonlocal at
        layout = f"<{layout or f'{data.find(0, at) - at}sx'}"  # without a layout a text that ends in a zero byte
        values, at = struct.unpack_from(layout, data, at), at + struct.calcsize(layout)
        return values

    try:
        for _ in range(take("Q")[0]):
            read(take)
    except (struct.error, OverflowError):  # more is asked for than there is
        raise ValueError(f"{path} is truncated or damaged at byte {at} of {len(data)}; copy the model again") from None
    if at != len(data):
        raise ValueError(f"{path} has {len(data) - at} bytes too many; it is damaged")


def _read_binary(folder: Path) -> tuple[dict, list]:
    cameras, images = {}, []

    def camera(take: Callable) -> None:
        camera_id, kind, width, height = take("IiQQ")
        values = take(f"{len(MODELS[kind][1].split()) if kind in MODELS else 0}d")
        cameras[camera_id] = _camera(kind, width, height, values, f"{folder / 'cameras.bin'}: camera {camera_id}")

    def image(take: Callable) -> None:
        _, *pose, camera_id = take("I7dI")
        images.append((take("")[0].decode(errors="replace"), pose, camera_id))
        take(f"{24 * take('Q')[0]}x")  # x, y, point id

    _records(folder / "cameras.bin", camera)
    _records(folder / "images.bin", image)
    return cameras, images


KINDS = {".txt": _read_text, ".bin": _read_binary}


def write_colmap(folder: Path, calibration: Calibration, *, binary: bool) -> None:
    """cameras and images (one camera per image, no points), and an empty points3D, which COLMAP's readers want.

    FULL_OPENCV where a lens has k3 or k4..k6, OPENCV where it has any coefficient, else PINHOLE.
    """
    from scipy.spatial.transform import Rotation

    folder.mkdir(parents=True, exist_ok=True)
    packed = {part: [struct.pack("<Q", len(calibration))] for part in PARTS}
    lines = {part: ["# IDs first; after each image a line of its points"] for part in PARTS}
    for number, (K, w2c, lens, (width, height), _) in enumerate(calibration.rows(), 1):
        lens = np.append(lens, [0.0, 0.0, 0.0])[:8].tolist()
        kind = 6 if any(lens[4:]) else 4 if any(lens) else 1
        values = [*K[[0, 1, 0, 1], [0, 1, 2, 2]].tolist(), *lens][: len(MODELS[kind][1].split())]
        x, y, z, w = Rotation.from_matrix(w2c[:3, :3]).as_quat().tolist()
        pose, name = (w, x, y, z, *w2c[:3, 3].tolist()), f"cam_{number - 1:03d}.png"
        packed["cameras"].append(struct.pack(f"<IiQQ{len(values)}d", number, kind, width, height, *values))
        packed["images"].append(struct.pack("<I7dI", number, *pose, number) + name.encode() + bytes(9))
        lines["cameras"].append(f"{number} {MODELS[kind][0]} {width} {height} {' '.join(map(repr, values))}")
        lines["images"].append(f"{number} {' '.join(map(repr, pose))} {number} {name}\n")
    ending = "bin" if binary else "txt"
    for part in PARTS:
        text = ("\n".join(lines[part]) + "\n").encode()
        (folder / f"{part}.{ending}").write_bytes(b"".join(packed[part]) if binary else text)
    (folder / f"points3D.{ending}").write_bytes(bytes(8) if binary else b"# no points\n")
