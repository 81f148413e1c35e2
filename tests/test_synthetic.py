"""The synthetic mouse: deterministic, inside the image, the right size, the right way round; its datasets."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from multiview.files import owned_folder
from multiview.rig import load_rig
from multiview.sample import read_dataset_info, read_sample, read_split
from synthetic.body_model import BodyModelMice
from synthetic.coat import COATS, random_coat
from synthetic.dataset import make_sample, sample_cameras
from synthetic.pose import MousePose
from synthetic.scene import KEYPOINT_NAMES, build_cloud, make_mouse, mouse_sequence, random_light
from synthetic.settings import ALL_POSES, MouseSettings
from synthetic.skeleton import BODY_LENGTH, random_shape, solve

SIZE, RIG = 96, load_rig("mouse6")
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_synthetic_mouse.py"
PLAIN = MouseSettings(Path("unused"), image_size=SIZE, seed=4)
EAR_L, EAR_R, SNOUT, TAIL_BASE = (KEYPOINT_NAMES.index(name) for name in ("EarL", "EarR", "Snout", "TailBase"))


def test_make_mouse_depends_on_seed_and_index_only():
    first = make_mouse(3, 7)
    other, again = make_mouse(3, 8), make_mouse(3, 7)
    assert np.array_equal(first.means, again.means) and np.array_equal(first.rgb, again.rgb)
    assert 8_000 <= len(first.means) <= 20_000
    assert len(other.means) != len(first.means) or not np.allclose(other.means, first.means)
    # While settings.MICE stays the same, datasets can be continued.
    assert first.rgb.mean() == pytest.approx(0.4501892, abs=1e-5)
    for name, values in {
        "rgb": [0.3708151, 0.3865641, 0.3843590], "means": [-0.2485432, -0.0402403, -0.2373857],
        "quats": [0.0625197, 0.6206234, 0.1729751, -0.7622319], "log_scales": [-4.4769244, -4.6714730, -6.1072783],
    }.items():  # fmt: skip
        assert np.allclose(getattr(first, name)[1234], values, atol=1e-5)


@pytest.fixture
def sparse(monkeypatch):
    """Mice of a seventh as many splats, which stand where they always do."""
    monkeypatch.setattr("synthetic.surface.SPACING", 0.03)


@pytest.mark.parametrize("pose", [*ALL_POSES, "rest"])
def test_poses_stay_inside_every_view(pose, sparse):
    cameras = RIG.cameras(SIZE)
    for index in range(4):
        cloud = make_mouse(11, index, pose=pose)
        assert np.isfinite(cloud.means).all() and np.isfinite(cloud.rgb).all()
        uv, _ = cameras.project(torch.from_numpy(cloud.means)[None].expand(len(cameras), -1, -1))
        assert uv.min() > 0.5 and uv.max() < SIZE - 0.5


def test_normalization_puts_the_body_center_at_the_origin():
    for index in range(6):
        cloud = make_mouse(5, index)
        assert np.abs(cloud.center).max() < 1e-6
        assert 0.93 * BODY_LENGTH <= cloud.body_length <= 1.11 * BODY_LENGTH
        # Without the tail, the splats surround the origin in every direction.
        body = cloud.means[np.abs(cloud.means).max(axis=1) < 0.45 * cloud.body_length]
        assert np.abs(np.median(body, axis=0)).max() < 0.12 * cloud.body_length
        assert cloud.means[:, 2].min() == pytest.approx(cloud.floor, abs=0.03)  # it stands on the floor
    spine = solve(random_shape(np.random.default_rng(0)), MousePose()).spine
    assert np.linalg.norm(np.diff(spine, axis=0), axis=1).sum() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("heading", "axis"), [(0.0, (0, -1)), (90.0, (-1, 0)), (180.0, (0, 1))])
def test_heading_points_the_nose_at_the_azimuth(heading, axis, sparse):
    points = make_mouse(2, 1, pose="rest", heading_deg=heading).keypoints
    nose, left = points[SNOUT][:2], points[EAR_L] - points[EAR_R]
    assert np.dot(nose / np.linalg.norm(nose), axis) > 0.99
    assert axis[0] * left[1] - axis[1] * left[0] > 0  # counter-clockwise from the nose, seen from above


def test_rest_mouse_is_left_right_symmetric():
    rng = np.random.default_rng(0)
    shape = random_shape(rng)
    shape.tail_length = 0.4  # a longer one would curl to stay in the image
    cloud = build_cloud(shape, MousePose(), random_coat(rng, "grey"), random_light(rng), rng)
    distance, _ = cKDTree(cloud.means).query(cloud.means * [-1, 1, 1])
    assert np.quantile(distance, 0.99) < 0.03 and distance.max() < 0.06
    swap = [KEYPOINT_NAMES.index(n[:-1] + {"L": "R", "R": "L"}[n[-1]]) if n[-1] in "LR" else i
            for i, n in enumerate(KEYPOINT_NAMES)]  # fmt: skip
    assert np.abs(cloud.keypoints * [-1, 1, 1] - cloud.keypoints[swap]).max() < 0.02


@pytest.mark.parametrize("coat", COATS)
def test_coats_have_their_brightness(coat, sparse):
    low, high = {"black": (0.05, 0.35), "white": (0.5, 1.0), "piebald": (0.2, 0.95)}.get(coat, (0.15, 0.75))
    cloud = make_mouse(1, 0, coat=coat, pose="stand")
    assert cloud.meta["coat"] == coat and low < np.median(cloud.rgb) < high
    assert cloud.rgb.min() >= 0 and cloud.rgb.max() <= 1


def test_sequence_moves_smoothly_and_keeps_its_coat(sparse):
    clouds = list(mouse_sequence(1, 12, fps=25.0, arena_radius=1.0, coat="piebald"))
    steps = [np.abs(b.keypoints - a.keypoints).max() for a, b in zip(clouds, clouds[1:])]
    assert max(steps) < 0.25 and sum(steps) > 0
    assert all(np.linalg.norm(c.center[:2]) < 1.01 for c in clouds)
    assert all(c.floor == 0.0 and c.means[:, 2].min() > -0.03 for c in clouds)
    assert json.dumps(clouds[-1].meta) and {c.meta["coat"] for c in clouds} == {"piebald"}
    sizes = [len(c.means) for c in clouds]
    assert max(sizes) - min(sizes) < 0.1 * max(sizes)


def test_sample_covers_its_share_and_its_depth_and_alpha_are_true(render):
    sample = make_sample(RIG, replace(PLAIN, num_novel_views=2, depth=True), 2, render)
    assert sample.rgba.shape == (8, 4, SIZE, SIZE) and sample.view_names[6:] == [None, None]
    coverage = sample.rgba[:6, 3].mean(dim=(1, 2))
    assert 0.065 < coverage.mean() < 0.4 and coverage.min() > 0.04
    cloud = torch.from_numpy(make_mouse(4, 2).means)
    for view in (0, 3, 7):
        depth = sample.depth[view, 0]
        v, u = torch.nonzero(depth > 0, as_tuple=True)
        fx, fy, cx, cy = sample.cameras.fxfycxcy[view]
        z = depth[v, u]
        local = torch.stack([(u + 0.5 - cx) / fx * z, (v + 0.5 - cy) / fy * z, z], dim=-1)
        c2w = sample.cameras.c2w[view]
        nearest = torch.cdist(local @ c2w[:3, :3].T + c2w[:3, 3], cloud).amin(dim=1)
        # the mean depth of a pixel may lie between a near and a far surface, but only along outlines
        assert nearest.quantile(0.9) < 0.035
    # Premultiplied colors would turn a white mouse's outline dark.
    white = make_sample(RIG, replace(PLAIN, coat="white"), 3, render).rgba
    alpha, brightness = white[:, 3], white[:, :3].mean(1)
    assert brightness[(alpha > 0.2) & (alpha < 0.6)].median() > 0.6 * brightness[alpha > 0.95].median()


def test_heading_size_place_pose_and_cameras_stay_in_their_ranges(render):
    settings = replace(
        PLAIN, image_size=16, heading_deg=(30.0, 10.0), size=(0.4, 1.3), off_center=0.1, elevation=(30.0, 50.0),
        poses=("curl", "stretch"),
    )  # fmt: skip
    samples = [make_sample(RIG, settings, index, render) for index in range(5)]
    drawn = [sample.extra["synthetic"] for sample in samples]
    assert all(20.0 <= d["heading_deg"] <= 40.0 for d in drawn) and len({d["heading_deg"] for d in drawn}) == 5
    assert {d["pose"] for d in drawn} == {"curl", "stretch"}
    lengths = [sample.extra["body_length"] for sample in samples]
    assert 0.4 <= min(lengths) and max(lengths) <= 1.3 and max(lengths) - min(lengths) > 0.2
    for index, sample in enumerate(samples):  # the rig stays; the input view sees the animal from above as it leans
        assert torch.equal(sample.cameras.c2w, RIG.cameras(16).c2w)
        level = make_sample(RIG, replace(settings, elevation=None), index, render).extra["keypoints"]
        turn, _ = Rotation.align_vectors(*(np.subtract(p[1:], p[0]) for p in (sample.extra["keypoints"], level)))
        towards = sample.cameras.origins[RIG.reference_view].numpy() @ turn.apply([0, 0, 1])
        seen_from = np.degrees(np.arcsin(towards / RIG.distance))
        assert seen_from == pytest.approx(sample.extra["synthetic"]["input_elevation_deg"], abs=0.05)
        assert 30 <= seen_from <= 50
    novel, others = (sample_cameras(RIG, replace(PLAIN, num_novel_views=20), index)[6:] for index in (1, 2))
    assert (novel.elevation_deg > -5.1).all() and (novel.elevation_deg < 60.1).all()
    assert (novel.distance > 2.39).all() and (novel.distance < 3.01).all()
    assert not torch.allclose(novel.c2w, others.c2w)
    varied = sample_cameras(RIG, replace(PLAIN, num_novel_views=200, varied_cameras=True), 1)[6:]
    lens = varied.fxfycxcy / varied.width / torch.tensor([RIG.focal, RIG.focal, 1, 1])
    for values, low, high in (
        (varied.elevation_deg, 0.0, 60.0), (varied.distance, 2.2, 3.6), (lens[:, 0], 0.8, 1.25), (lens[:, 2:], 0.4, 0.6)
    ):  # fmt: skip
        assert (
            low - 1e-4 <= values.min() < low + (high - low) / 9
            and high - (high - low) / 9 < values.max() <= high + 1e-4
        )
    assert torch.equal(lens[:, 0], lens[:, 1])


def split_lists(folder: Path) -> list[set[Path]]:
    return [set(read_split(folder / f"data_mouse_{name}.txt")) for name in ("train", "val")]


def test_script_writes_the_same_dataset_with_any_workers_and_resumes(script, tmp_path):
    one, common = tmp_path / "one", "--image_size 48 --num_novel_views 1 --depth --val_fraction 0.34".split()
    for name, workers in (("one", "1"), ("two", "2")):
        script.main(["--output_dir", str(tmp_path / name), "--num_samples", "3", *common, "--workers", workers])
    for index in range(3):
        a, b = (read_sample(tmp_path / n / f"sample_{index:06d}", with_depth=True) for n in ("one", "two"))
        assert torch.equal(a.rgba, b.rgba) and torch.equal(a.depth, b.depth)
    assert read_dataset_info(one)["rig"].name == "mouse6"
    lists = split_lists(one)
    assert list(map(len, lists)) == [2, 1]
    kept = one / "sample_000000" / "images" / "cam_000.png"
    before = kept.stat().st_mtime_ns
    script.main(["--output_dir", str(one), "--num_samples", "6", *common, "--workers", "1"])
    assert kept.stat().st_mtime_ns == before
    grown = split_lists(one)
    assert list(map(len, grown)) == [4, 2] and all(old <= new for old, new in zip(lists, grown))
    with pytest.raises(ValueError, match="seed: 0 there, 5 asked for"):
        script.main(["--output_dir", str(one), *common, "--workers", "1", "--seed", "5"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num_samples 2000000000", "argument --num_samples: must be at most 10000000"),
        ("--image_size 100000", "must be at most 4096"),
        ("--photographic 0.5 --as_recording", "--photographic, .* are a dataset's"),
        ("--heading_deg 70", "expected 2 arguments"),
        ("--size 0.4 30", "--size: must be at most 3"),
        ("--noise 3", "add --as_recording"),
        ("--noise nan", "must be finite"),
        ("--prefix a/b", "--prefix must be a plain name"),
        ("--as_recording --video_width 129", "--video_width must be even"),
        ("--body_model m.npz", "go together"),
        ("--pose walk --poses rear", "exclude each other"),
    ],
)
def test_arguments_are_refused_before_any_work(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        script.parse_arguments(["--output_dir", "out", *arguments.split()])
    assert end.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_script_refuses_folders_that_are_not_its_own(script, tmp_path):
    common = ["--num_samples", "1", "--workers", "1", "--image_size", "16"]
    foreign, file = tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    for path in (foreign / "notes.txt", file):
        path.write_text("mine")
    for folder, more, message in (
        (foreign, [], "not empty and has no dataset.json"),
        (foreign, ["--as_recording"], "not empty; a recording is written into a new folder"),
        (file, [], "is a file; name another folder"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(["--output_dir", str(folder), *common, *more])
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]
    # A full disk is one sentence, and lists nothing.
    used, full = tmp_path / "used", mock.Mock(side_effect=OSError(28, "No space left on device"))
    with mock.patch("multiview.sample.write_image", full):
        with pytest.raises(ValueError, match="cannot write .*No space left on device"):
            script.main(["--output_dir", str(used), *common])
    assert [path.name for path in used.iterdir()] == ["dataset.json"]
    with owned_folder(used), pytest.raises(ValueError, match="is in use by process"):
        script.main(["--output_dir", str(used), *common])


def test_sigterm_keeps_whole_samples_and_the_command_continues(script, tmp_path):
    arguments, told = ["--output_dir", str(tmp_path), "--image_size", "16", "--num_samples"], subprocess.PIPE
    run = subprocess.Popen([sys.executable, SCRIPT, *arguments, "2000"], stderr=told, text=True, start_new_session=True)
    while run.poll() is None and not (tmp_path / "sample_000001").exists():
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)  # as a cluster does: the workers receive it too
    assert "repeat the command" in run.communicate(timeout=60)[1] and run.returncode == 143
    assert not list(tmp_path.glob("*.txt")) and not (tmp_path / ".owner.json").exists()
    script.main([*arguments, "3", "--workers", "1"])
    assert len(read_split(tmp_path / "data_mouse_train.txt")) == 3 and not list(tmp_path.glob(".*"))


def tiny_body() -> dict[str, np.ndarray]:
    """Two boxes in a row along y on two joints (root, spine, head); nose at -y; the arrays of BODY_KEYS."""
    corners = np.array([[x, y, z] for x in (-0.1, 0.1) for y in (-0.3, 0.0, 0.3) for z in (0.0, 0.2)])
    quads = [(0, 1, 3, 2), (2, 3, 5, 4), (7, 6, 8, 9), (9, 8, 10, 11), (0, 6, 7, 1), (5, 11, 10, 4),
             (1, 7, 9, 3), (3, 9, 11, 5), (6, 0, 2, 8), (8, 2, 4, 10)]  # fmt: skip
    faces = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))], dtype=np.int32)
    n, trans = len(corners), np.array([[0, 0, 0.1], [0, 0, 0], [0, -0.15, 0]])
    return {
        "vertices": corners.astype(np.float32), "faces": faces, "weights_vertex": np.arange(n, dtype=np.int32),
        "weights_joint": np.where(corners[:, 1] < -0.2, 2, 1), "weights_value": np.ones(n, dtype=np.float32),
        "parents": np.array([-1, 0, 1]), "joint_names": np.array(["root", "spine", "skull"]),
        "rest_joints": np.cumsum(trans, 0), "rest_local_rot": np.tile(np.eye(3), (3, 1, 1)), "rest_local_trans": trans,
        "bone_scale_group": np.array([-1, -1, 1]), "keypoint_is_vertex": np.ones(22, dtype=np.int8),
        "keypoint_ptr": np.arange(23), "keypoint_ids": np.array([4 if k == 5 else 0 for k in range(22)]),
        "vertex_colour_linear": np.full((n, 3), 0.3, dtype=np.float32), "vertex_fur": np.ones(n, dtype=np.float32),
    }  # fmt: skip


@pytest.fixture
def body_files(tmp_path):
    vectors = np.zeros((3, 3, 3), dtype=np.float32)
    vectors[1, 2], vectors[2, 2] = [0, 0, 0.3], [0, 0, -0.3]
    np.savez(tmp_path / "body.npz", **tiny_body())
    turns = np.tile(np.eye(3), (3, 1, 1))
    np.savez(tmp_path / "poses.npz", local_rotvec=vectors, bone_scale=np.ones((3, 1), np.float32), global_R=turns)
    return tmp_path / "body.npz", tmp_path / "poses.npz"


def test_body_model_rest_pose_reproduces_the_mesh_and_turns_with_a_joint(body_files):
    model = BodyModelMice(*body_files)
    rest, mesh = model.arrays["rest_local_rot"], model.arrays["vertices"]
    vertices, _ = model.pose(rest, np.ones(1))
    assert np.allclose(vertices - vertices[2], mesh - mesh[2], atol=1e-6)
    turned, still = rest.copy(), mesh[:, 1] > -0.2
    turned[2] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    moved, _ = model.pose(turned, np.ones(1))
    assert np.allclose(moved[still], vertices[still])
    # the nose corner lies 0.15 before the joint and 0.1 to its right: a quarter turn to the left about z
    assert np.allclose(moved[0] - [0, -0.15, 0], [0.15, -0.1, 0.0], atol=1e-6)


def test_body_model_mice_fill_a_normalized_cloud_and_damaged_files_are_named(body_files):
    mice = BodyModelMice(*body_files)
    cloud, again = mice(0, 3, coat="brown", heading_deg=90.0), mice(0, 3, coat="brown", heading_deg=90.0)
    assert np.array_equal(cloud.means, again.means)
    lit = mice(0, 3, coat="brown", heading_deg=90.0, light=random_light(np.random.default_rng(5)))
    assert np.array_equal(lit.means, cloud.means) and not np.allclose(lit.rgb, cloud.rgb)
    assert np.abs(cloud.center).max() < 1e-6 and np.abs(cloud.means.mean(axis=0)).max() < 0.15
    length = np.linalg.norm(cloud.keypoints[SNOUT] - cloud.keypoints[TAIL_BASE])
    assert 0.9 * BODY_LENGTH < length < 1.15 * BODY_LENGTH
    assert cloud.means[:, 2].min() == pytest.approx(cloud.floor, abs=0.02)
    body, poses = body_files
    np.savez(body, **{key: value for key, value in tiny_body().items() if key != "parents"})
    for path, message in ((body, ".parents is not a file"), (body.with_name("absent.npz"), ".*an .npz with vertices")):
        with pytest.raises(ValueError, match=f"{path.name} cannot be used: {message}"):
            BodyModelMice(path, poses)
