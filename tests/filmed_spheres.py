"""A mouse made of spheres, filmed by the real rig: recordings for the tests of the import, in a moment."""

import math
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from recording.calibration.formats import write_calibration
from recording.calibration.model import Calibration
from recording.masks import Silhouette
from recording.settings import ImportSettings
from synthetic.dataset import load_real_rig, video_writer

COUNT, SIZE = 8, 32  # of the recording that several files import
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "process_mouse_data.py"

# x forward, y left, z up, mm; radius; the first five are trunk and head.
TRUNK = [(-18, 0, 0, 14), (-6, 0, 1, 15), (7, 0, 0, 13), (19, 0, 2, 10), (29, 0, 3, 7)]
LEGS = [(18, 9, -9, 4), (18, -9, -9, 4), (-18, 11, -9, 4), (-18, -11, -9, 4)]
TAIL = [(-33 - 4 * k, 0.12 * k * k, -6, 2.5) for k in range(14)]


def spheres(place: np.ndarray, heading_deg: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres [n, 3], radii [n], the trunk's centre of volume [3] of a mouse at `place`, nose towards an azimuth."""
    parts = np.array(TRUNK + LEGS + TAIL, dtype=np.float64)
    a = math.radians(heading_deg)  # azimuth 0 looks along -y, 90 along -x
    forward, left = np.array([-math.sin(a), -math.cos(a)]), np.array([math.cos(a), -math.sin(a)])
    xy = parts[:, :1] * forward + parts[:, 1:2] * left
    centres = np.concatenate([xy, parts[:, 2:3]], axis=1) + place
    weight = parts[:5, 3] ** 3
    return centres, parts[:, 3], weight @ centres[:5] / weight.sum()


def silhouettes(calibration: Calibration, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """[v, h, w] uint8 0 or 255."""
    import cv2

    masks = []
    for k in range(len(calibration)):
        width, height = calibration.sizes[k]
        mask = np.zeros((height, width), np.uint8)
        depth = centres @ calibration.w2c[k, 2, :3] + calibration.w2c[k, 2, 3]
        for (x, y), reach in zip(calibration.project(centres)[k], radii * calibration.K[k, 0, 0] / depth):
            at = (round((x - 0.5) * 16), round((y - 0.5) * 16))
            cv2.circle(mask, at, round(reach * 16), 255, -1, cv2.LINE_8, 4)
        masks.append(mask)
    return np.stack(masks)


def film(folder: Path, count: int, *, noise: float = 0.0, flicker: float = 0.0, radius=30.0, step_deg=9.0) -> list:
    """Writes videos_undist/, masks/ and new_cam.pkl of a walk on a circle; returns the masks [t][v, h, w] bool."""
    calibration, arena = load_real_rig(width=192)
    rng, truth = np.random.default_rng(0), []
    (size,) = set(calibration.sizes)
    rows, columns = np.mgrid[: size[1], : size[0]]
    light = 150 + 50 * np.sin(columns / 31.0) * np.cos(rows / 23.0)  # uneven
    writers = {}
    for name in ("videos_undist", "masks"):
        (folder / name).mkdir(parents=True)
        writers[name] = [video_writer(folder / name / f"{k}.mp4", size, 25.0, 0) for k in range(6)]
    for index in range(count):
        angle = math.radians(step_deg * index)
        place = np.array(arena["centre"]) + [radius * math.cos(angle), radius * math.sin(angle), 16.0]
        heading = math.degrees(math.atan2(math.sin(angle), -math.cos(angle)))  # the nose ahead
        masks = silhouettes(calibration, *spheres(place, heading)[:2])
        gain = 1.0 + flicker * rng.standard_normal()
        for k, mask in enumerate(masks):
            image = np.where(mask > 0, 40.0 + 0.1 * columns, light)[..., None] * [1.0, 0.95, 0.9] * gain
            image = image + noise * rng.standard_normal(image.shape)
            writers["videos_undist"][k].send(np.ascontiguousarray(image.clip(0, 255).astype(np.uint8)))
            writers["masks"][k].send(np.repeat(mask[..., None], 3, axis=-1))
        truth.append(masks > 0)
    for writer in (*writers["videos_undist"], *writers["masks"]):
        writer.close()
    write_calibration(folder, calibration, "mammal")
    return truth


def settings_for(folder: Path, output: Path, **options) -> ImportSettings:
    defaults = {"image_size": SIZE, "framing": "fill", "workers": 1}
    return ImportSettings(folder / "videos_undist", folder, output, **{**defaults, **options})


def command(folder: Path, output: Path, *more: str) -> list[str]:
    """What `settings_for` says, as the script's flags."""
    return [
        "--video_dir", str(folder / "videos_undist"), "--meta_dir", str(folder), "--output_dir", str(output),
        "--image_size", str(SIZE), "--framing", "fill", *more,
    ]  # fmt: skip


def ffmpeg(*arguments, content: bytes = b"") -> None:
    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)]
    subprocess.run(words, input=content, check=True)


def full(mask: Silhouette) -> np.ndarray:
    """[height, width] bool, as large as the photograph."""
    y, x = (slice(corner, corner + side) for corner, side in zip((mask.y, mask.x), mask.window.shape))
    whole = np.zeros(mask.size[::-1], dtype=bool)
    whole[y, x] = mask.window
    return whole


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
