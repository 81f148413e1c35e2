"""Calibrations that are wrong, in themselves or beside their pictures: refused, and what was meant is named."""

import json
import pickle
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import refused
from filmed_spheres import SCRIPT
from scipy.io import savemat

from multiview.cameras import Cameras
from multiview.rig import load_rig
from recording.calibration.checks import READINGS, check_body_length, validate
from recording.calibration.formats import FORMATS, find_calibration, read_calibration, write_calibration
from recording.calibration.model import Calibration
from recording.quality.check import check_belongs, check_calibration, read_points
from recording.quality.silhouettes import outline
from synthetic.dataset import load_real_rig
from synthetic.settings import CALIBRATION_FORMATS, MouseSettings

OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
MASK_TABLE = np.zeros((1024, 1152), np.float32)


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    """Where an animal's centre is seen, [t, 3] mm."""
    center = np.array(load_real_rig()[1]["centre"]) + [0.0, 0.0, 15.0]
    return center + np.random.default_rng(0).uniform(-50, 50, (12, 3)) * [1.0, 1.0, 0.2]


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
        return np.linalg.inv(OPENGL @ w2c)
    return READINGS[name](w2c)  # its own inverse


# ---- wrong in themselves ----------------------------------------------------------------------------------------


ALL, TURN, T = slice(None), (slice(3), slice(3)), (slice(3), 3)
SPOILT = {  # (what of K [v, 3, 3] or w2c [v, 4, 4] is changed and how, what is said about it)
    "nan": ("K", (2, 0, 0), lambda x: np.nan, "camera 2: K must be finite"),
    "nan T": ("w2c", (5, 1, 3), lambda x: np.nan, "camera 5: T must be finite"),
    "left-handed": ("w2c", (1, 0), lambda x: x * [-1, -1, -1, 1], "camera 1: R mirrors"),
    "transposed K": ("K", ALL, lambda x: x.transpose(0, 2, 1).copy(), "transposed"),
    "scaled rotation": ("w2c", (3, *TURN), lambda x: 1.1 * x, "camera 3: R must be orthonormal"),
    "looks away": ("w2c", (4, slice(1, 3)), lambda x: -x, "camera 4 looks away .* its matrices are OpenGL axes"),
    "one in metres": ("w2c", (2, *T), lambda x: 0.001 * x, "camera 2 looks away .* its T is to be multiplied by 1000"),
    "metres": ("w2c", (ALL, *T), lambda x: 0.001 * x, "0.312 mm, taking its mm at its word.* 312 mm with T times 1000"),
    "mirrored": ("K", (0, 0, 0), lambda x: -x, "camera 0: fx is negative .* mirrored"),
    "millimetres for pixels": ("K", (1, slice(2), slice(2)), lambda x: 0.005 * x, "camera 1: fx 7.784 .* fx in pixels"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_bad_calibration_is_refused_by_name(tmp_path, real, what):
    name, place, change, message = SPOILT[what]
    bad = replace(real, K=real.K.copy(), w2c=real.w2c.copy())
    getattr(bad, name)[place] = change(getattr(bad, name)[place])
    path = write_calibration(tmp_path, bad, "mammal")
    path.write_bytes(pickle.dumps([{**entry, "mapx": MASK_TABLE} for entry in pickle.loads(path.read_bytes())]))
    refused(path, f"new_cam.pkl.*{message}")


def test_a_camera_that_is_missing_or_doubled_is_named(tmp_path, real):
    path = write_calibration(tmp_path, real, "mammal")
    one, two, *rest = entries = pickle.loads(path.read_bytes())
    for content, message in (
        ({k: entries[k] for k in (0, 1, 3, 4, 5)}, r"new_cam.pkl: .* without a gap, got keys \[0, 1, 3, 4, 5\]"),
        ([one, {**one, "K": np.eye(4)}], r"camera 1: K must be 3 x 3 numbers, got shape \(4, 4\)"),
        ([one, {**one, "T": np.zeros(4)}], r"camera 1: T must be 3 numbers, got shape \(4,\)"),
        ([one, two, rest[0], two, *rest[2:]], "cameras 1 and 3 are one and the same pose"),
    ):
        path.write_bytes(pickle.dumps(content))
        refused(path, message)


def test_missing_or_ambiguous_calibration_is_named(tmp_path, real):
    refused(tmp_path, "holds no calibration", find_calibration)
    for format in ("mammal", "opencv"):
        write_calibration(tmp_path, real, format)
    refused(tmp_path, r"new_cam.pkl, opencv_cameras.json; exactly one", find_calibration)


def test_calibration_of_other_pictures_is_refused(real):
    for calibration, message in ((real, "calibrated for 1152 x 1024"), (replace(real, sizes=(None,) * 6), "principal")):
        with pytest.raises(ValueError, match=message):
            calibration.with_sizes([(576, 512)] * 6)


@pytest.mark.parametrize("name", READINGS)
def test_extrinsics_meant_otherwise_are_detected_and_named(tmp_path, real, name):
    path = write_calibration(tmp_path, replace(real, w2c=misread(real.w2c, name)), "opencv")
    with pytest.raises(ValueError, match="opencv_cameras.json: as written the cameras") as caught:
        read_calibration(path)
    assert name in str(caught.value)
    refused = named = 0
    for seed in range(10):  # where the world's axes lie by chance, some wrong readings look as sound as the right one
        right = validate(moved(real, seed))
        try:
            validate(replace(right, w2c=misread(right.w2c, name)))
        except ValueError as error:
            refused, named = refused + 1, named + (name in str(error))
    assert refused >= (10 if name.startswith("OpenGL") else 8) and named >= 0.9 * refused


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
        for seed in range(2):
            validate(moved(sound, seed))
        validate(replace(sound, w2c=w2c @ np.linalg.inv(w2c[0])))


def test_units_are_taken_at_their_word(tmp_path, real):
    for unit, message in (("m", r"its m at its word.* T times 0.001 .metres and milli"), ("inch", "one of mm, cm, m")):
        refused(write_calibration(tmp_path, replace(real, unit=unit), "opencv"), message)
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


def test_pictures_tell_what_a_calibration_cannot(real, points):
    seen = real.project(points).transpose(1, 0, 2)  # [t, v, 2]
    seen += 2.0 * np.random.default_rng(1).normal(size=seen.shape)  # as large as centers of mass are off
    seen = seen.swapaxes(0, 1)[None]  # one animal of twelve points
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


def test_silhouettes_tell_mirrored_pictures():
    """Of a lopsided body, a long one with a head up on one side, drawn point by point."""
    calibration, arena = load_real_rig(width=160)
    ball = np.random.default_rng(0).normal(size=(6000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    body = np.concatenate([ball[:3000] * [35, 14, 12], ball[3000:] * [11, 9, 12] + [34, 16, 16]])
    masks = np.zeros((6, *calibration.sizes[0][::-1]), np.uint8)
    for mask, pixels in zip(masks, calibration.project(body + np.array(arena["centre"]) + [10.0, -15.0, 14.0])):
        for x, y in np.floor(pixels).astype(int).tolist():
            cv2.circle(mask, (x, y), 2, 1, -1)
        mask[:] = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
    masks = masks.astype(np.float32)

    def check(*instants):
        check_belongs(calibration, np.array([[160 * outline(mask) for mask in masks] for masks in instants]))

    one = masks.copy()
    one[2] = one[2, :, ::-1]
    check(masks, masks)
    check(one, masks)  # instants that disagree accuse nobody
    for wrong, message in (([one, one], "pictures of camera 2 are"), ([masks[:, :, ::-1]], "the pictures are")):
        with pytest.raises(ValueError, match=f"{message} mirrored"):
            check(*wrong)


# ---- the look at one --------------------------------------------------------------------------------------------


def test_check_draws_and_reprojects_a_label_files_own_labels(tmp_path, points, monkeypatch, capsys):
    lens = load_real_rig(lens="real")[0]
    labels = points.reshape(3, 4, 3).copy()
    labels[1, 2] = np.nan
    path = write_calibration(tmp_path, lens, "dannce")
    data = np.empty((6, 1), dtype=object)
    for index, seen in enumerate(np.stack([lens.project(frame) for frame in labels], axis=1)):
        data[index, 0] = {"data_3d": labels.reshape(3, -1), "data_2d": (seen - 0.5).reshape(3, -1)}
    labelled = BytesIO()
    savemat(labelled, {"labelData": data})
    path.write_bytes(path.read_bytes() + labelled.getvalue()[128:])  # without a second header
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import process_mouse_data

    monkeypatch.setattr(process_mouse_data, "STOP_SIGNALS", ())
    process_mouse_data.main(["--check", "--calibration", str(path), "--check_output", str(tmp_path / "look.png")])
    text, picture = capsys.readouterr().out, cv2.imread(str(tmp_path / "look.png"))
    assert all(told in text for told in ("6 cameras", "11 points", "azimuth", "311.7 mm"))
    cameras, rows, _ = check_calibration(path)
    assert max(row["rms px"] for row in rows) < 1e-9 and [row["seen"] for row in rows] == [11] * 6
    assert np.mean([row["distance"] for row in cameras]) == pytest.approx(312, abs=2)
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
    assert CALIBRATION_FORMATS == tuple(FORMATS)
    asked = MouseSettings(Path("x"), as_recording=True, calibration_formats="mammal,dannce,colmap")
    assert asked.formats == ("mammal", "dannce", "colmap_binary")
    with pytest.raises(ValueError, match="--calibration_formats takes .* got 'mammal,matlab'"):
        replace(asked, calibration_formats="mammal,matlab")
