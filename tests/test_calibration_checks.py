"""Calibrations that are wrong, in themselves or beside their pictures: refused, and what was meant is named."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import refused
from scipy.io import savemat

from multiview.cameras import Cameras
from multiview.rig import load_rig
from recording.calibration.checks import READINGS, check_body_length, validate
from recording.calibration.formats import (
    find_calibration,
    read_calibration,
    write_calibration,
)
from recording.calibration.model import Calibration
from recording.quality.belongs import check_belongs, check_silhouettes
from recording.quality.check import check_calibration, read_points
from synthetic.dataset import load_real_rig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    """Where an animal's centre is seen, [t, 3] mm."""
    centre = np.array(load_real_rig()[1]["centre"]) + [0.0, 0.0, 15.0]
    return centre + np.random.default_rng(0).uniform(-50, 50, (12, 3)) * [1.0, 1.0, 0.2]


def moved(calibration, seed):
    """The same cameras in a world turned and moved at random."""
    rng = np.random.default_rng(seed)
    world = np.eye(4)
    world[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    world[:3, :3] *= np.linalg.det(world[:3, :3])
    world[:3, 3] = rng.normal(size=3) * 300
    return replace(calibration, w2c=calibration.w2c @ np.linalg.inv(world))


def misread(w2c, name):
    """Matrices that are right only when read as `name`."""
    if "centres C" in name:
        wrong = w2c.copy()
        wrong[:, :3, 3] = -np.einsum("vji,vj->vi", w2c[:, :3, :3], w2c[:, :3, 3])
        return wrong
    if "camera-to-world matrices with OpenGL" in name:
        return np.linalg.inv(np.diag([1.0, -1.0, -1.0, 1.0]) @ w2c)
    return READINGS[name](w2c)  # its own inverse


# ---- wrong in themselves ----------------------------------------------------------------------------------------


def put(values, place, value):
    values[place] = value


SPOILT = {  # what is done to K [v, 3, 3] and w2c [v, 4, 4], and what is said about it
    "nan": (lambda K, w2c: put(K, (2, 0, 0), np.nan), "camera 2: K must be finite"),
    "nan T": (lambda K, w2c: put(w2c, (5, 1, 3), np.nan), "camera 5: T must be finite"),
    "left-handed": (lambda K, w2c: put(w2c, (1, 0), w2c[1, 0] * [-1, -1, -1, 1]), "camera 1: R mirrors"),
    "transposed K": (lambda K, w2c: put(K, slice(None), K.transpose(0, 2, 1).copy()), "transposed"),
    "scaled rotation": (
        lambda K, w2c: put(w2c, (3, slice(3), slice(3)), 1.1 * w2c[3, :3, :3]), "camera 3: R must be orthonormal"
    ),
    "looks away": (
        lambda K, w2c: put(w2c, (4, slice(1, 3)), -w2c[4, 1:3]), "camera 4 looks away .* its matrices are OpenGL axes"
    ),
    "one in metres": (
        lambda K, w2c: put(w2c, (2, slice(3), 3), 0.001 * w2c[2, :3, 3]),
        "camera 2 looks away .* its T is to be multiplied by 1000",
    ),
    "metres": (
        lambda K, w2c: put(w2c, (slice(None), slice(3), 3), 0.001 * w2c[:, :3, 3]),
        "0.312 mm, taking its mm at its word.* 312 mm with T times 1000",
    ),
    "twice the same": (lambda K, w2c: put(w2c, 3, w2c[1]), "cameras 1 and 3 are one and the same pose"),
    "mirrored": (lambda K, w2c: put(K, (0, 0, 0), -K[0, 0, 0]), "camera 0: fx is negative .* mirrored"),
    "millimetres for pixels": (
        lambda K, w2c: put(K, (1, slice(2), slice(2)), 0.005 * K[1, :2, :2]), "camera 1: fx 7.784 is .* fx in pixels"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_bad_calibration_is_refused_by_name(tmp_path, real, what):
    change, message = SPOILT[what]
    path, bad = tmp_path / "new_cam.pkl", replace(real, K=real.K.copy(), w2c=real.w2c.copy())
    change(bad.K, bad.w2c)
    write_calibration(tmp_path, bad, "mammal")
    entries = [{**e, "mapx": np.zeros((1024, 1152), np.float32)} for e in pickle.loads(path.read_bytes())]
    path.write_bytes(pickle.dumps(entries))
    with pytest.raises(ValueError, match=message) as caught:
        read_calibration(path)
    assert "new_cam.pkl" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_or_ambiguous_calibration_is_named(tmp_path, real):
    refused(tmp_path, "holds no calibration", find_calibration)
    write_calibration(tmp_path, real, "mammal")
    write_calibration(tmp_path, real, "opencv")
    refused(tmp_path, r"new_cam.pkl, opencv_cameras.json; exactly one", find_calibration)


def test_calibration_of_other_pictures_is_refused(real):
    with pytest.raises(ValueError, match="calibrated for 1152 x 1024"):
        real.with_sizes([(576, 512)] * 6)
    with pytest.raises(ValueError, match="principal point"):
        replace(real, sizes=(None,) * 6).with_sizes([(576, 512)] * 6)


def test_a_camera_that_is_missing_is_named(tmp_path, real):
    path = write_calibration(tmp_path, real, "mammal")
    one, *_ = entries = pickle.loads(path.read_bytes())
    bad_K, bad_T = {**one, "K": np.eye(4)}, {**one, "T": np.zeros(4)}
    for content, message in (
        ({k: entries[k] for k in (0, 1, 3, 4, 5)}, r"new_cam.pkl: .* without a gap, got keys \[0, 1, 3, 4, 5\]"),
        ([one, bad_K], r"camera 1: K must be 3 x 3 numbers, got shape \(4, 4\)"),
        ([one, bad_T], r"camera 1: T must be 3 numbers, got shape \(4,\)"),
    ):
        path.write_bytes(pickle.dumps(content))
        refused(path, message)


@pytest.mark.parametrize("name", READINGS)
def test_extrinsics_meant_otherwise_are_detected_and_named(tmp_path, real, name):
    path = write_calibration(tmp_path, replace(real, w2c=misread(real.w2c, name)), "opencv")
    with pytest.raises(ValueError, match="opencv_cameras.json: as written the cameras") as caught:
        read_calibration(path)
    assert name in str(caught.value)
    refused = named = 0
    for seed in range(20):  # where the world's axes lie by chance, some wrong readings look as sound as the right one
        right = validate(moved(real, seed))
        try:
            validate(replace(right, w2c=misread(right.w2c, name)))
        except ValueError as error:
            refused, named = refused + 1, named + (name in str(error))
    assert refused >= (20 if name.startswith("OpenGL") else 16) and named >= 0.9 * refused


def calibration_of(cameras):
    w2c, K = cameras.w2c.double().numpy(), cameras.intrinsic_matrix().double().numpy()
    u, _, v = np.linalg.svd(w2c[:, :3, :3])
    w2c[:, :3, :3] = u @ v
    return Calibration(K, w2c, np.zeros((len(K), 5)), ((512, 512),) * len(K), "rig")


def test_sound_rigs_are_not_suspected(real):
    """Every rig that ships, rolled cameras, bad aim, one side only, two cameras; each in worlds of its own."""
    rng = np.random.default_rng(0)
    rigs = [load_rig(name).cameras(512) for name in ("mouse6", "facelift6", "uniform4", "uniform8")]
    arc = Cameras.orbit(torch.linspace(-40, 40, 5), torch.full((5,), 20.0), 2.7, 1.07, 512)
    for cameras in [*rigs, arc, arc[:2], arc[[0, 2, 4]]]:
        sound = calibration_of(cameras)
        w2c = sound.w2c
        for k in range(len(w2c)):
            turn, _ = cv2.Rodrigues(rng.normal(size=3) * 0.06)
            quarter, _ = cv2.Rodrigues(np.array([0.0, 0.0, np.pi / 2 * rng.integers(4)]))
            w2c[k, :3] = quarter @ turn @ w2c[k, :3]
        for seed in range(4):
            validate(moved(sound, seed))
        validate(replace(sound, w2c=w2c @ np.linalg.inv(w2c[0])))


def test_units_are_taken_at_their_word(tmp_path, real):
    path = write_calibration(tmp_path, replace(real, unit="m"), "opencv")
    refused(path, "taking its m at its word.* T times 0.001 .metres and millimetres confused")
    path = write_calibration(tmp_path, replace(real, unit="inch"), "opencv")
    refused(path, "unit must be one of mm, cm, m")
    metres = replace(real, w2c=real.w2c * np.vstack([np.tile([1, 1, 1, 0.001], (3, 1)), np.ones(4)]), unit="m")
    assert read_calibration(write_calibration(tmp_path, metres, "opencv")).close_to(metres)
    unitless = replace(real, unit=None)
    for calibration, *lengths in ((real, 73.0), (real, 73.0, 70.0), (unitless, 0.073)):
        check_body_length(calibration, *lengths)
    for calibration, lengths, message in (
        (real, (0.073,), "0.073 mm, taking its mm at its word.* T times 1000"),
        (unitless, (73.0, 0.073), r"--body_length 0.073: .* 73 long, 1000 times as much \(millimetres"),
        (unitless, (73.0, 300.0), "--body_length 300: "),
    ):
        with pytest.raises(ValueError, match=message):
            check_body_length(calibration, *lengths)


def test_a_camera_in_another_unit_is_seen_where_its_axis_still_fits():
    """In a world around the animal, a T in metres leaves the camera on its axis, only far nearer."""
    sound = calibration_of(load_rig("mouse6").cameras(512))
    sound.w2c[:, :3, 3] *= 1000.0
    w2c = validate(sound).w2c.copy()
    w2c[3, :3, 3] *= 0.001
    refused(replace(sound, w2c=w2c), "camera 3 stands 2.7 from .* others about 2700; .*factor of 1000", validate)


# ---- wrong beside their pictures --------------------------------------------------------------------------------


def seen_by(calibration, points, noise=0.5):
    """[t, v, 2] pixels of the points, with an error of the size that centres of mass have."""
    seen = calibration.project(points).transpose(1, 0, 2)
    return seen + np.random.default_rng(1).normal(size=seen.shape) * noise


def test_pictures_tell_what_a_calibration_cannot(real, points):
    seen = seen_by(real, points, noise=2.0)
    check_belongs(real, seen)
    mirrored = seen * [-1.0, 1.0] + [1152.0, 0.0]
    one = seen.copy()
    one[:, 4] = mirrored[:, 4]
    # In the world of the first camera matrices read as well backwards: no check of the file alone can tell.
    own_world = validate(replace(real, w2c=np.linalg.inv(real.w2c @ np.linalg.inv(real.w2c[0]))))
    for calibration, pixels, message in (
        (real, mirrored, "meet if the pictures are mirrored"),
        (real, one, r"meet if the pictures of camera 4 are mirrored \(flip its video and masks\)$"),
        # Video 0 shows what camera 1 filmed ...
        (real, seen[:, [1, 2, 0, 3, 4, 5]], r"meet if camera k filmed video \[2, 0, 1, 3, 4, 5\]\[k\]"),
        (own_world, seen, "camera-to-world matrices where world-to-camera is meant; invert them"),
    ):
        with pytest.raises(ValueError, match=message):
            check_belongs(calibration, pixels)


def silhouettes(calibration, centre):
    """Masks [v, 1, h, w] of a lopsided body (a long one with a head up on one side), drawn point by point."""
    rng = np.random.default_rng(0)
    ball = rng.normal(size=(6000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    body = np.concatenate([ball[:3000] * [35, 14, 12], ball[3000:] * [11, 9, 12] + [34, 16, 16]]) + centre
    width, height = calibration.sizes[0]
    masks = np.zeros((len(calibration), 1, height, width), np.uint8)
    for picture, pixels in zip(masks, calibration.project(body)):
        for x, y in np.floor(pixels).astype(int).tolist():
            cv2.circle(picture[0], (x, y), 2, 1, -1)
        picture[0] = cv2.morphologyEx(picture[0], cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
    return torch.from_numpy(masks).float()


def test_silhouettes_tell_mirrored_pictures():
    calibration, arena = load_real_rig(width=160)
    masks = silhouettes(calibration, np.array(arena["centre"]) + [10.0, -15.0, 14.0])[:, 0].bool().numpy()
    one = masks.copy()
    one[2] = one[2, :, ::-1]
    check_silhouettes(calibration, [masks, masks])
    check_silhouettes(calibration, [one, masks])  # instants that disagree accuse nobody
    with pytest.raises(ValueError, match="pictures of camera 2 are mirrored"):
        check_silhouettes(calibration, [one, one])
    with pytest.raises(ValueError, match="the pictures are mirrored"):
        check_silhouettes(calibration, [masks[:, :, ::-1]])


# ---- the look at one --------------------------------------------------------------------------------------------


def test_check_draws_and_reprojects_a_label_files_own_labels(tmp_path, points):
    lens = load_real_rig(lens="real")[0]
    labels = points.reshape(3, 4, 3).copy()
    labels[1, 2] = np.nan
    path = tmp_path / "label3d_dannce.mat"
    write_calibration(tmp_path, lens, "dannce")
    data = np.empty((6, 1), dtype=object)
    for index, seen in enumerate(np.stack([lens.project(frame) for frame in labels], axis=1)):
        data[index, 0] = {"data_3d": labels.reshape(3, -1), "data_2d": (seen - 0.5).reshape(3, -1)}
    labelled = BytesIO()
    savemat(labelled, {"labelData": data})
    path.write_bytes(path.read_bytes() + labelled.getvalue()[128:])  # without a second header
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "process_mouse_data.py"), "--check", "--calibration", str(path),
         "--check_output", str(tmp_path / "look.png")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 cameras" in done.stdout and "11 points" in done.stdout and "azimuth" in done.stdout
    picture = cv2.imread(str(tmp_path / "look.png"))
    cameras, points, _ = check_calibration(path)
    assert max(row["rms px"] for row in points) < 1e-9 and [row["seen"] for row in points] == [11] * 6
    assert np.mean([row["distance"] for row in cameras]) == pytest.approx(312, abs=2) and "311.7 mm" in done.stdout
    from matplotlib import colormaps

    for index, row in enumerate(cameras):  # each camera is drawn in a color of its own
        color = np.round(255 * np.array(colormaps["tab10"](index)[2::-1]))
        assert (np.abs(picture - color).max(axis=-1) < 2).sum() > 50, row


def test_check_measures_what_it_is_given(tmp_path, real, points):
    path = write_calibration(tmp_path, real, "mammal")
    seen = real.project(points) + np.array([[[3.0, 4.0]]])
    given = tmp_path / "points.json"
    given.write_text(json.dumps({"points_3d": points.tolist(), "points_2d": (seen - 0.5).tolist(), "pixel_centre": 0}))
    _, rows, meant = check_calibration(path, given)
    assert [row["rms px"] for row in rows] == pytest.approx([5.0] * 6) and not meant
    given.write_text(json.dumps({"points_3d": (points / 1000).tolist(), "points_2d": seen.tolist()}))
    assert "1000 times as large" in check_calibration(path, given)[2][0]
    np.save(tmp_path / "points.npy", points)
    _, rows, _ = check_calibration(path, tmp_path / "points.npy", up="-y")
    assert [row["in front"] for row in rows] == [12] * 6
    given.write_text(json.dumps({"points_3d": points.tolist(), "points_2d": seen[:5].tolist()}))
    with pytest.raises(ValueError, match=r"points.json: points_2d must be \[6, 12, 2\].*got \[5, 12, 2\]"):
        read_points(given, 6)


def test_check_draws_a_wrong_calibration_before_it_refuses(tmp_path, real):
    wrong = replace(real, w2c=misread(real.w2c, next(iter(READINGS))))
    path, picture = write_calibration(tmp_path, wrong, "opencv"), tmp_path / "look.png"
    with pytest.raises(ValueError, match="OpenGL"):
        check_calibration(path, output=picture)
    assert cv2.imread(str(picture)) is not None


def test_the_script_knows_every_format():
    from recording.calibration.formats import FORMATS
    from synthetic.settings import CALIBRATION_FORMATS, MouseSettings

    assert CALIBRATION_FORMATS == tuple(FORMATS)
    asked = MouseSettings(Path("x"), as_recording=True, calibration_formats="mammal,dannce,colmap")
    assert asked.formats == ("mammal", "dannce", "colmap_binary")
    with pytest.raises(ValueError, match="--calibration_formats takes .* got 'mammal,matlab'"):
        replace(asked, calibration_formats="mammal,matlab")
