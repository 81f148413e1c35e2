"""Calibration files as people really bring them: facts that must not be dropped, damage, and sizes nobody asked for."""

import json
import pickle
import struct
import time
import zlib

import cv2
import numpy as np
import pytest
from conftest import refused
from scipy.io import savemat

from recording.calibration.formats import read_calibration, read_dannce_labels, write_calibration
from recording.video import find_videos
from synthetic.dataset import load_real_rig


def put(key, value, *where):
    """A change of a file's content: sets a field of the whole file, or of what `where` leads to."""

    def change(content):
        for step in where:
            content = content[step]
        content[key] = value

    return change


def edited(tmp_path, calibration, format, change):
    """A calibration file with a change made to its content (of a TOML file: to its text)."""
    path = write_calibration(tmp_path, calibration, format)
    if path.suffix == ".toml":
        path.write_text(change(path.read_text()))
        return path
    binary = path.suffix == ".pkl"
    content = pickle.loads(path.read_bytes()) if binary else json.loads(path.read_text())
    change(content)
    path.write_bytes(pickle.dumps(content) if binary else json.dumps(content).encode())
    return path


FRAME, CAMERA = ("frames", 2), ("cameras", 2)
MEANINGFUL = [  # what says how a camera sees and is not used must be refused by name
    *[("transforms", put(key, value), key) for key, value in {
        "k4": 0.02, "k5": -0.1, "p3": 0.001, "s1": 0.1, "is_fisheye": True, "ftheta_p0": 0.1, "latlong": True,
        "x_fov": 60, "equirectangular": True, "camera_model": "EQUIRECTANGULAR", "lens_mode": "ftheta", "skew": 0.3,
        "from_na": True, "rolling_shutter": [0, 0, 0.01, 0], "distortion_model": "kannala_brandt",
    }.items()],
    ("transforms", put("k4", 0.02, *FRAME), "frame 2: k4"), ("transforms", put("type", "ORTHO"), "type = 'ORTHO'"),
    ("opencv", put("model", "Fisheye", *FRAME), "frame 2: model = 'Fisheye'"),
    ("transforms", put("camera_angle_x", 2.0), "fl_x 1632.3 and camera_angle_x contradict"),
    ("opencv", put("k1", -0.1, *FRAME), "frame 2: k1"),
    ("opencv", put("distortion", [0.1, 0, 0], *FRAME), "frame 2: distortion"),
    ("opencv", put("camera_model", "OPENCV_FISHEYE"), "camera_model"),
    ("blender", put("type", "PANO", *CAMERA), "camera 2: type = 'PANO' cannot be used"),
    ("blender", put("use_crop_to_border", True, *CAMERA), "camera 2: use_crop_to_border"),
    ("mammal", put("D", np.array([0.1, 0.0]), 2), "camera 2: D = "),
    ("anipose", lambda text: text.replace("[cam_1]", "[cam_1]\nfisheye = true"), r"\[cam_1\]: fisheye = True"),
]  # fmt: skip
TYPES = [  # a field of another type, missing or impossible
    ("opencv", put("fx", None, *FRAME), "frame 2: fx must be a number, got None"),
    ("opencv", put("w2c", None, *FRAME), "frame 2: w2c must be 4 x 4 numbers, got None"),
    ("opencv", put(2, None, "frames"), "frame 2 must be an object of named fields, got None"),
    ("opencv", put(0, None, "frames"), "frame 0 must be an object"),
    ("opencv", put("file_path", 7, *FRAME), "frame 2: file_path must be a text, got 7"),
    ("opencv", put("w2c", np.eye(4).T.tolist()[:3], *FRAME), r"frame 2: w2c .* got shape \(3, 4\)"),
    ("opencv", put("w2c", [[0, 0, 0, 1]] * 3 + [[1, 2, 3, 1]], *FRAME), "frame 2: w2c must end in the row 0 0 0 1"),
    ("opencv", put("cx", True, *FRAME), "frame 2: cx must be a number, got True"),
    ("opencv", put("cx", "576", *FRAME), "frame 2: cx must be a number, got '576'"),
    ("opencv", put("fx", 10**400, *FRAME), "frame 2: fx must be a number"),
    ("opencv", put("w", 1e9, *FRAME), "frame 2: the picture size must be whole numbers from 1 to 100000"),
    ("opencv", put("unit", ["mm"]), "unit must be a text"),
    ("opencv", put("frames", {}), "no cameras found"),
    ("opencv", put("frames", [{"w2c": 1}] * 300), "1 to 256 cameras are expected"),
    ("transforms", put("transform_matrix", None, *FRAME), "frame 2: transform_matrix must be 4 x 4 numbers"),
    ("transforms", put("fl_x", None, *FRAME), "frame 2: fl_x must be a finite number"),
    ("transforms", put("file_path", {}, *FRAME), "frame 2: file_path must be a text"),
    ("transforms", lambda content: content["frames"][2].pop("h"), "frame 2 lacks h"),
    ("blender", put("render", 3), "render must be an object"),
    ("blender", put("lens", 0, *CAMERA), "camera 2: .* must be positive"),
    ("blender", put("name", 3, *CAMERA), "camera 2: name must be a text"),
]


@pytest.mark.parametrize(
    ("format", "change", "message"), [*MEANINGFUL, *TYPES], ids=lambda value: value if isinstance(value, str) else ""
)
def test_fields_that_cannot_be_used_are_refused_by_name(tmp_path, real, format, change, message):
    path = edited(tmp_path, real, format, change)
    refused(path, f"{path.name}.*{message}")


def test_fields_at_their_defaults_and_many_frames_of_static_cameras_say_nothing(tmp_path, real):
    told = {"model": "acA2040", "k4": 0.0,
            "is_fisheye": False, "rolling_shutter": [0, 0, 0, 0], "camera_model": "pinhole", "ftheta_p0": 0,
            "aabb_scale": 16, "applied_scale": 2.0, "offset": [0.5, 0.5, 0.5], "lens_mode": "Perspective"}  # fmt: skip
    for change in (
        lambda content: content.update(told),
        lambda content: content.update(frames=content["frames"] * 500),
    ):
        assert read_calibration(edited(tmp_path, real, "transforms", change)).close_to(real)


def dannce_cells(calibration):
    """params as DANNCE writes them: transposed, and the first pixel's center is 0, 0."""
    cells = np.empty((len(calibration), 1), dtype=object)
    for index, (K, w2c, (k1, k2, p1, p2, k3), *_) in enumerate(calibration.rows()):
        K = K - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        lens = {"RDistort": np.array([[k1, k2, k3]]), "TDistort": np.array([[p1, p2]])}
        cells[index, 0] = {"K": K.T, "r": w2c[:3, :3].T, "t": w2c[:3, 3][None], **lens}
    return cells


def test_dannce_mat_is_transposed_and_its_names_belong_to_its_cameras(tmp_path):
    path, lens = tmp_path / "label3d_dannce.mat", load_real_rig(lens="real")[0]
    names = np.array([f"Camera{k}" for k in (1, 2, 3, 4, 6, 7)], dtype=object)[:, None]
    for compressed in (False, True):
        savemat(path, {"params": dannce_cells(lens), "camnames": names}, do_compression=compressed)
        read = read_calibration(path)
        assert read.close_to(lens) and read.unit == "mm" and read_dannce_labels(path) is None
        assert read.names == ("Camera1", "Camera2", "Camera3", "Camera4", "Camera6", "Camera7")
    skewed, bare = dannce_cells(lens), dannce_cells(lens)
    skewed[1, 0]["Skew"] = 0.5
    del bare[3, 0]["RDistort"]
    for cells, camnames, message in (
        *((dannce_cells(lens), wrong, "camnames") for wrong in (names[:5], np.tile(names[:1], (6, 1)), np.arange(6.0))),
        (skewed, names, r"params\{2\}: Skew = "),
        (bare, names, r"params\{4\} lacks RDistort"),
    ):
        savemat(path, {"params": cells, "camnames": camnames})
        refused(path, f"label3d_dannce.mat: {message}")


def test_videos_of_named_cameras_are_found_by_their_names(tmp_path):
    for k in range(1, 7):
        (tmp_path / f"Camera{k}").mkdir()
        cv2.imwrite(str(tmp_path / f"Camera{k}" / "0.png"), np.zeros((8, 8, 3), np.uint8))
    names = ("Camera1", "Camera2", "Camera4", "Camera5", "Camera6")
    videos = find_videos(tmp_path, 5, "--video_dir", names=names)
    assert tuple(video.files[0].parent.name for video in videos) == names
    with pytest.raises(ValueError, match="holds Camera6, but the calibration has only 5 cameras"):
        find_videos(tmp_path, 5, "--video_dir")
    with pytest.raises(ValueError, match="lacks Camera9 of 2 cameras"):
        find_videos(tmp_path, 2, "--video_dir", names=("Camera1", "Camera9"))


@pytest.mark.parametrize("format", ["opencv", "anipose", "colmap_text"])
def test_byte_order_marks_are_understood(tmp_path, real, format):
    for encoding in ("utf-8-sig", "utf-16"):
        path = write_calibration(tmp_path, real, format)
        for file in [path] if path.is_file() else path.glob("*.txt"):
            file.write_bytes(file.read_text().encode(encoding))
        assert read_calibration(path).close_to(real)


def test_colmap_images_without_empty_lines_are_all_read(tmp_path, real):
    path = write_calibration(tmp_path, real, "colmap_text") / "images.txt"
    lines = path.read_text().splitlines()
    some = [line for k, line in enumerate(lines) if line or k % 4 == 2]
    for left in (some, list(filter(None, lines)), [line or "1.5 2.5 -1 700.0 20.5 33" for line in lines]):
        path.write_text("\n".join(left))
        assert read_calibration(path.parent).close_to(real)


def claims_gigabytes() -> bytes:
    """A MAT-file whose variable `params` says that it unfolds to 4 GB."""
    packed = zlib.compress(struct.pack("<II", 14, 2**32 - 64) + bytes(2**16))
    return b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(packed)) + packed


def again_and_again() -> bytes:
    """A pickle of one piece of 8 MB that is asked for as an array 100 times."""
    piece = b"B" + struct.pack("<I", 2**23) + bytes(2**23) + b"q\x010"
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR"
    array = b"cnumpy.core.numeric\n_frombuffer\n(h\x01" + dtype + b"(I1048576\ntX\x01\x00\x00\x00CtRa"
    return b"\x80\x04]" + piece + 100 * array + b"."


def many_cameras() -> bytes:
    rows = [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    frames = [{"transform_matrix": [[1, 0, 0, k], *rows[:3]]} for k in range(100_000)]
    return json.dumps({"w": 9, "h": 9, "fl_x": 9.0, "frames": frames}).encode()


BAD = [  # (file, its content or what makes it, what is said)
    ("label3d_dannce.mat", claims_gigabytes, "unfolds to 4295 MB, 537 at most"),
    ("new_cam.pkl", again_and_again, "new_cam.pkl"),
    ("calibration.toml", lambda: (".".join(["a"] * 50_000) + " = 1").encode(), "nested too deeply"),
    ("deep.toml", lambda: b"a = " + b"[" * 50_000, "deep.toml"),
    ("deep.json", lambda: b'{"frames": ' + b"[" * 100_000, "deep.json"),
    ("transforms.json", many_cameras, "1 to 256 cameras are expected"),
    ("new_cam.pickle", lambda: b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", "new_cam.pickle"),
    ("label3d_dannce.mat", b"MATLAB 7.3 MAT-file".ljust(600), "MATLAB 7.3 .*-v7"),
    ("label3d_dannce.mat", b"", "MATLAB file .* cannot be read"),
    ("transforms.json", b'{"frames": [', "transforms.json is not valid JSON"),
    ("transforms.json", b"\xff\xfe\x00", "transforms.json is no text"),
    ("calibration.toml", b"[cam_0\n", "calibration.toml is not valid TOML"),
    ("calibration.toml", b"cam_0 = 3\n", "calibration.toml has no cameras"),
    ("cameras.xml", b"<a/>", "cameras.xml: unknown kind"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_files_that_are_no_calibrations_are_refused_soon(tmp_path, name, content, message):
    """Sizes that nobody asked for among them: nothing is made as large as a file claims."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content())
    start = time.monotonic()
    refused(tmp_path / name, message)
    assert time.monotonic() - start < 20
