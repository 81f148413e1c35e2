"""Calibration files: every format both ways, and what each means. Bad ones: tests/test_calibration_checks.py."""

import json
import pickle
import struct
from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import refused

from recording.calibration.formats import FORMATS, find_calibration, read_calibration, write_calibration
from recording.calibration.model import Calibration, distort, undistort, valid_radius
from synthetic.dataset import load_real_rig

HOLDS = {  # format -> can it hold lens distortion, skew
    "mammal": (False, True), "dannce": (True, True), "anipose": (True, True), "transforms": (True, False),
    "colmap_text": (True, False), "colmap_binary": (True, False), "opencv": (False, False), "blender": (False, False),
}  # fmt: skip
RATIONAL = np.array([-0.16, 0.9, -0.001, -0.004, -2.7, 0.05, 0.02, -0.3])
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
HALF_PIXEL = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])  # OpenCV counts from the first pixel's center


@pytest.fixture(scope="module")
def lens() -> Calibration:
    """The same cameras as filmed: skew and lens distortion."""
    return load_real_rig(lens="real")[0]


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    return np.array(load_real_rig()[1]["centre"]) + np.random.default_rng(0).uniform(-50, 50, (40, 3))


def without_skew(calibration):
    return replace(calibration, K=calibration.K * [[1, 0, 1], [1, 1, 1], [1, 1, 1]])


def opencv_projection(calibration, index, xyz):
    """OpenCV's own projection (no skew), its pixels moved to the outer-corner origin."""
    R, t, K = calibration.w2c[index, :3, :3], calibration.w2c[index, :3, 3], calibration.K[index] - HALF_PIXEL
    return cv2.projectPoints(xyz, cv2.Rodrigues(R)[0], t, K, calibration.distortion[index])[0][:, 0] + 0.5


# ---- every format, both ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read_back_and_what_is_not_held_is_refused(tmp_path, real, lens, name):
    distorted, skewed = HOLDS[name]
    rational = replace(without_skew(lens), distortion=np.tile(RATIONAL, (6, 1)))
    cases = (
        (real, True, ""),
        (without_skew(lens), distorted, "cannot hold lens distortion"),
        (replace(lens, distortion=real.distortion), skewed, "cannot hold skew"),
        (lens, distorted and skewed, "cannot hold"),
        (rational, name in ("anipose", "colmap_text", "colmap_binary"), "k4, k5, k6" if distorted else "distortion"),
    )
    for index, (calibration, held, lacks) in enumerate(cases):
        if not held:
            with pytest.raises(ValueError, match=lacks):
                write_calibration(tmp_path, calibration, name)
            continue
        path = write_calibration(tmp_path / str(index), calibration, name)
        assert find_calibration(tmp_path / str(index)) == path
        read = read_calibration(path)
        assert read.close_to(calibration, 1e-9)
        assert read.sizes in (calibration.sizes, (None,) * 6) and read.unit in (None, "mm")
    assert set(HOLDS) == set(FORMATS)


def test_projection_and_lens_are_opencvs(lens, points):
    for distortion in (lens.distortion, np.tile(RATIONAL, (6, 1))):
        calibration = replace(without_skew(lens), distortion=distortion)
        for index, seen in enumerate(calibration.project(points)):
            np.testing.assert_allclose(seen, opencv_projection(calibration, index, points), atol=1e-7)
            expected = points - calibration.centres[index]
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(calibration.rays(index, seen), expected, atol=1e-10)


def test_a_strong_lens_is_undone_or_refused():
    barrel = np.array([-0.4, 0.0, 0.0, 0.0, 0.0])  # folds back at 1 / sqrt(1.2)
    assert valid_radius(barrel) == pytest.approx(0.9129, abs=2e-3)
    inside = np.stack(np.meshgrid(np.linspace(-0.6, 0.6, 9), np.linspace(-0.6, 0.6, 9)), -1)
    np.testing.assert_allclose(undistort(distort(inside, barrel), barrel), inside, atol=1e-10)
    assert undistort(np.array([[0.9, 0.0]]), barrel) is None  # the lens model reaches 0.61 at most


# ---- single formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["opencv", "mammal", "anipose", "colmap_text"])
def test_opengl_axes_declared_as_opencv_are_detected(tmp_path, real, format):
    flipped = write_calibration(tmp_path, replace(real, w2c=OPENGL @ real.w2c), format)
    refused(flipped, "when read as OpenGL axes")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_mammal_pickle_is_read_with_half_a_pixel_added(tmp_path, real, protocol):
    table = np.zeros((1024, 1152), np.float32)
    entries = [{"K": K - HALF_PIXEL, "R": w2c[:3, :3], "T": w2c[:3, 3:], "mapx": table} for K, w2c, *_ in real.rows()]
    for layout in (entries, dict(enumerate(entries)), dict(zip("012345", entries))):
        (tmp_path / "new_cam.pkl").write_bytes(pickle.dumps(layout, protocol=protocol))
        read = read_calibration(find_calibration(tmp_path))
        assert read.close_to(real) and read.sizes == ((1152, 1024),) * 6


def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    marker, path = tmp_path / "was_run", tmp_path / "new_cam.pkl"

    class Attack:
        def __reduce__(self):
            return (exec, (f"open({str(marker)!r}, 'w').close()",))

    system = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    for content, message in ((pickle.dumps([{"K": Attack()}]), "builtins.exec"), (system, "os.system")):
        path.write_bytes(content)
        refused(path, message)
        assert not marker.exists()


def test_anipose_toml_is_opencvs(tmp_path, lens, points):
    """A file as aniposelib writes it; the cameras stand in the order of their numbers, not of their letters."""
    lens, tables = without_skew(lens), []
    for index, (K, w2c, coefficients, *_) in enumerate(lens.rows()):
        tables.append(
            f'[cam_{8 + index}]\nname = "{"ABCDEF"[index]}"\nsize = [ 1152, 1024,]\n'
            f"matrix = {(K - HALF_PIXEL).tolist()}\ndistortions = {coefficients.tolist()}\n"
            f"rotation = {cv2.Rodrigues(w2c[:3, :3])[0].ravel().tolist()}\ntranslation = {w2c[:3, 3].tolist()}\n"
        )
    path = tmp_path / "calibration.toml"
    path.write_text("\n".join([*reversed(tables), "[metadata]\nadjusted = false\nerror = 0.3\n"]))
    read = read_calibration(path)
    assert read.names == tuple("ABCDEF") and read.sizes == ((1152, 1024),) * 6 and read.unit is None
    for index, seen in enumerate(read.project(points)):
        np.testing.assert_allclose(seen, opencv_projection(lens, index, points), atol=1e-6)


def c2w_opengl(calibration):
    return np.linalg.inv(calibration.w2c) @ OPENGL


def test_blenders_nerf_export_takes_its_size_from_the_videos_or_the_pictures(tmp_path, real):
    angle, path = 0.6911, tmp_path / "transforms.json"
    frames = [
        {"file_path": f"./train/r_{k}", "transform_matrix": m.tolist()} for k, m in enumerate(c2w_opengl(real))
    ]  # fmt: skip
    path.write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))
    read = read_calibration(path)
    with pytest.raises(ValueError, match="picture sizes"):
        read.project(np.zeros((1, 3)))
    sized = read.with_sizes([(640, 480)] * 6)
    focal = 320 / np.tan(angle / 2)
    assert sized.K[2] == pytest.approx(np.array([[focal, 0, 320], [0, focal, 240], [0, 0, 1]]))
    (tmp_path / "train").mkdir()
    for k in range(6):
        cv2.imwrite(str(tmp_path / "train" / f"r_{k}.png"), np.zeros((480, 640, 3), np.uint8))
    assert read_calibration(path).sizes == ((640, 480),) * 6
    np.testing.assert_allclose(read_calibration(path).K, sized.K)


def test_frames_of_one_static_camera_are_one_camera_in_the_order_of_their_numbers(tmp_path, real):
    frames = []
    for k in (5, 3, 0, 1, 4, 2):
        K, matrix = real.K[k], c2w_opengl(real)[k].tolist()
        frame = {"transform_matrix": matrix, "fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2], "cy": K[1, 2]}
        frames += [{**frame, "file_path": f"cam{k}/{time}.png"} for time in (0, 1)]
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps({"w": 1152, "h": 1024, "camera_model": "OPENCV", "frames": frames}))
    assert read_calibration(path).close_to(real)


COLMAP_IMAGES = """# Image list with two lines of data per image, the second sometimes empty:
9 0.7071067811865476 0.7071067811865476 0 0 1 2 3 3 cam10.png
12.5 3.25 -1 700.0 20.5 33
7 1 0 0 0 4 5 6 3 cam8.png

"""  # a quarter turn about x, and none


@pytest.mark.parametrize(
    ("model", "values", "pinhole"),
    [
        ("SIMPLE_PINHOLE", [1600, 570, 500], 3), ("PINHOLE", [1600, 1610, 570, 500], 4),
        ("SIMPLE_RADIAL", [1600, 570, 500, -0.1], 3), ("RADIAL", [1600, 570, 500, -0.1, 0.2], 3),
        ("OPENCV", [1600, 1610, 570, 500, -0.1, 0.2, 1e-3, 2e-3], 4),
        ("FULL_OPENCV", [1600, 1610, 570, 500, *RATIONAL.tolist()], 4),
    ],
)  # fmt: skip
def test_colmap_models_and_order(tmp_path, model, values, pinhole):
    folder = tmp_path / "sparse" / "0"
    folder.mkdir(parents=True)
    (folder / "images.txt").write_text(COLMAP_IMAGES)
    (folder / "cameras.txt").write_text(f"# Camera list\n3 {model} 1152 1024 {' '.join(map(str, values))}\n")
    assert find_calibration(tmp_path) == folder
    read = read_calibration(folder, check=False)
    assert read.names == ("cam8.png", "cam10.png") and read.sizes == ((1152, 1024),) * 2
    np.testing.assert_allclose(read.w2c[0, :3], [[1, 0, 0, 4], [0, 1, 0, 5], [0, 0, 1, 6]], atol=1e-12)
    np.testing.assert_allclose(read.w2c[1, :3], [[1, 0, 0, 1], [0, 0, -1, 2], [0, 1, 0, 3]], atol=1e-12)
    np.testing.assert_allclose(read.K[1], [[1600, 0, 570], [0, values[pinhole - 3], 500], [0, 0, 1]])
    assert read.distortion[1].tolist() == [*values[pinhole:], *[0] * (len(read.distortion[1]) - len(values) + pinhole)]


def test_colmap_files_that_are_wrong_are_named(tmp_path, real):
    path = write_calibration(tmp_path, real, "colmap_binary")
    cameras, images = ((path / name).read_bytes() for name in ("cameras.bin", "images.bin"))
    fisheye = cameras[:12] + struct.pack("<i", 5) + cameras[16:]
    for name, content, message in (
        ("cameras.bin", b"", "is truncated"), ("cameras.bin", cameras[:100], "is truncated"),
        ("cameras.bin", cameras + b"0", "has 1 bytes too many"), ("images.bin", b"", "is truncated"),
        ("images.bin", images[:100], "is truncated"), ("images.bin", images + b"0", "has 1 bytes too many"),
        ("cameras.bin", fisheye, "camera 1: COLMAP camera model OPENCV_FISHEYE"),
    ):  # fmt: skip
        write_calibration(tmp_path, real, "colmap_binary")
        (path / name).write_bytes(content)
        refused(path, f"{name}:? {message}")
    text = write_calibration(tmp_path / "text", real, "colmap_text")
    for camera, message in (
        (
            "# List\n1 FOV 1152 1024 1600 1600 570 500 0.9",
            "cameras.txt: line 2: COLMAP camera model FOV is not supported",
        ),
        ("1 SIMPLE_PINHOLE 1152 1024 1600 570 500", "images.txt: image cam_001.png uses camera 2, which cameras.txt"),
    ):
        (text / "cameras.txt").write_text(camera)
        refused(text, message)
    (text / "images.txt").unlink()
    refused(text, "lacks images.txt")


def test_colmap_text_and_binary_side_by_side_must_agree(tmp_path, real):
    zoomed = replace(real, K=real.K * [[1.01, 1, 1], [1, 1.01, 1], [1, 1, 1]])
    path = write_calibration(tmp_path, real, "colmap_text")
    write_calibration(tmp_path, zoomed, "colmap_binary")
    refused(path, "differ")
    assert read_calibration(path / "images.txt").close_to(real)
    write_calibration(tmp_path, real, "colmap_binary")
    assert read_calibration(path).close_to(real)


@pytest.mark.parametrize(
    "width, height, fit, fx",
    [
        (1920, 1080, "AUTO", 50 / 36 * 1920), (1080, 1920, "AUTO", 50 / 36 * 1920),
        (1080, 1920, "HORIZONTAL", 50 / 36 * 1080), (1920, 1080, "VERTICAL", 50 / 24 * 1080),
    ],
)  # fmt: skip
def test_blender_cameras_fit_the_side_that_blender_fits(tmp_path, real, width, height, fit, fx):
    c2w = c2w_opengl(real)
    c2w[2, :3, :3] *= 3.0  # an object's scale does not move its camera
    cameras = [
        {"name": f"Camera.{k}", "matrix_world": m.tolist(), "lens": 50.0, "sensor_fit": fit} for k, m in enumerate(c2w)
    ]
    cameras[1] |= {"shift_x": 0.1, "shift_y": -0.05}
    render = {"resolution_x": 2 * width, "resolution_y": 2 * height, "resolution_percentage": 50}
    path = tmp_path / "blender_cameras.json"
    path.write_text(json.dumps({"render": render, "cameras": cameras}))
    read = read_calibration(path)
    np.testing.assert_allclose(read.w2c, real.w2c, atol=1e-9)
    cx, cy, span = width / 2, height / 2, fx / 50 * (24 if fit == "VERTICAL" else 36)
    assert read.K[0] == pytest.approx(np.array([[fx, 0, cx], [0, fx, cy], [0, 0, 1]]))
    assert read.K[1, :2, 2] == pytest.approx([cx - 0.1 * span, cy - 0.05 * span])
