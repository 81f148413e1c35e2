"""Up is up: files turned for their viewers, read back by gsply, plyfile and splat-transform; pruning to a number."""

import json
import shutil
import struct
import subprocess
from dataclasses import replace

import gsply
import numpy as np
import pytest
import torch
from plyfile import PlyData
from running import must, run

from gslrm.model.gaussians_renderer import contributions, prune, render
from gslrm.model.ply import FORMATS, UP, VIEWER_UP, export, load_ply, save_ply, turned
from multiview.cameras import Cameras
from multiview.files import write_json
from multiview.rig import load_rig
from pipeline.outputs import PosedViews, Reconstruction
from tests.gaussian_scenes import concatenate
from tests.test_export import C0, matched, read_compressed, same_rotation, soft
from tests.test_gaussians import random_gaussians
from tests.test_mesh import sphere

# Where the top (world z = 3), the front (y = -3, where azimuth 0 looks from) and the right (x = 3) of an animal come.
PLACES = {"z": ((0, 0, 3), (0, -3, 0)), "y": ((0, 3, 0), (0, 0, 3)), "-y": ((0, -3, 0), (0, 0, -3))}


def animal(n=300, degree=0):
    """A cloud within -1..1 in front of a box of three large, opaque markers: top, front and right."""
    gaussians = soft(n + 3, degree)
    gaussians.xyz.div_(gaussians.xyz.abs().max())
    gaussians.xyz[0, :3] = torch.tensor([[0.0, 0, 3], [0, -3, 0], [3, 0, 0]])
    gaussians.opacity[0] = gaussians.opacity[0].clamp_min(-2)  # all are seen
    return gaussians


def read_glb(path):
    """Attributes of the only primitive, and the extension's own words."""
    content = path.read_bytes()
    magic, version, total, length, kind = struct.unpack("<4sIII4s", content[:20])
    assert (magic, version, total, kind) == (b"glTF", 2, len(content), b"JSON") and length % 4 == 0
    told = json.loads(content[20 : 20 + length])
    size, kind = struct.unpack("<I4s", content[20 + length : 28 + length])
    body = content[28 + length :]
    assert kind == b"BIN\0" and size == len(body) == told["buffers"][0]["byteLength"]
    (primitive,) = told["meshes"][0]["primitives"]
    assert primitive["mode"] == 0 and told["extensionsUsed"] == ["KHR_gaussian_splatting"]
    arrays = {}
    for name, index in primitive["attributes"].items():
        accessor = told["accessors"][index]
        view = told["bufferViews"][accessor["bufferView"]]
        assert view["byteOffset"] % 4 == 0
        width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        kind = {5126: "<f4", 5121: "u1"}[accessor["componentType"]]
        array = np.frombuffer(body[view["byteOffset"] :][: view["byteLength"]], kind).reshape(-1, width)
        assert len(array) == accessor["count"]
        arrays[name.removeprefix("KHR_gaussian_splatting:")] = array
    box = told["accessors"][primitive["attributes"]["POSITION"]]
    assert box["min"] == arrays["POSITION"].min(0).tolist() and box["max"] == arrays["POSITION"].max(0).tolist()
    return arrays, primitive["extensions"]["KHR_gaussian_splatting"]


def positions(path, name):
    """[n, 3] of an exported file, by a reader that is not ours or written out in a test."""
    if name == "splat":
        return np.fromfile(path, np.dtype([("xyz", "<f4", 3), ("rest", "u1", 20)]))["xyz"]
    if name == "ply_compressed":
        ours, theirs = read_compressed(path)["xyz"], gsply.plyread(path).means
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        return ours
    return gsply.read_spz(path).means if name == "spz" else read_glb(path)[0]["POSITION"]


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_stands_upright_in_its_viewers_and_faces_them(tmp_path, name):
    gaussians, path = animal(), tmp_path / f"a{FORMATS[name]}"
    export(path, gaussians, name)
    xyz = positions(path, name)
    assert len(xyz) == 303
    up, front = PLACES[VIEWER_UP[name]]
    for marker in (up, front, (3, 0, 0)):
        assert np.abs(xyz - marker).max(axis=1).min() < 0.01, marker
    expected = turned(gaussians, VIEWER_UP[name]).xyz[0].numpy()
    np.testing.assert_allclose([xyz.min(0), xyz.max(0)], [expected.min(0), expected.max(0)], atol=0.01)
    assert {name: VIEWER_UP[name] for name in ("splat", "spz", "glb")} == {"splat": "-y", "spz": "y", "glb": "y"}


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_turned_gaussians_are_seen_the_same_by_turned_cameras(degree):
    """Rotations, covariances and colors that depend on the direction: the picture is what all of them must keep."""
    gaussians, cameras = random_gaussians(40, degree), Cameras.turntable(3, 32, elevation_deg=20)
    seen = render(gaussians, cameras[None]).rgb
    for up in UP:
        matrix, rows = torch.eye(4), {"z": "x y z", "y": "x z -y", "-y": "x -z y"}[up].split()
        matrix[:3, :3] = torch.tensor(
            [[(name[-1] == axis) * (1 - 2 * (name[0] == "-")) for axis in "xyz"] for name in rows]
        )
        other = render(turned(gaussians, up), replace(cameras, c2w=matrix @ cameras.c2w)[None]).rgb
        torch.testing.assert_close(other, seen, atol=2e-4, rtol=0)
        back = turned(turned(gaussians, up), up, back=True)
        torch.testing.assert_close(back.xyz, gaussians.xyz)
        torch.testing.assert_close(back.features, gaussians.features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("up", UP)
def test_a_ply_says_its_up_axis_and_comes_back_to_the_world(tmp_path, up):
    gaussians, path = animal(degree=1), tmp_path / "a.ply"
    save_ply(path, gaussians, up)
    content, theirs = PlyData.read(str(path)), gsply.plyread(path)
    assert content.comments == [f"up {up}; Mouse-FaceLift"]
    stored = np.stack([content["vertex"][axis] for axis in "xyz"], -1)
    np.testing.assert_array_equal(stored, theirs.means)
    np.testing.assert_allclose(stored[:2], PLACES[up], atol=1e-6)
    loaded = load_ply(path)
    for name in ("xyz", "features", "scaling", "opacity"):
        torch.testing.assert_close(getattr(loaded, name), getattr(gaussians, name), atol=1e-5, rtol=1e-5)
    assert (loaded.get_rotation * gaussians.get_rotation).sum(-1).abs().min() > 0.99999
    # A file of others has no such comment; a comment that nobody can obey is refused.
    comment = f"comment up {up}; Mouse-FaceLift\n".encode()
    path.write_bytes(path.read_bytes().replace(comment, b"comment up y by hand\n"))
    np.testing.assert_array_equal(load_ply(path).xyz[0].numpy(), stored)
    path.write_bytes(path.read_bytes().replace(b"comment up y by hand\n", b"comment up x; Mouse-FaceLift\n"))
    with pytest.raises(ValueError, match=r"a\.ply must have one of z, y, -y up, its comment says x"):
        load_ply(path)


@pytest.mark.parametrize("degree", [0, 2])
def test_spz_and_glb_decode_to_the_gaussians(tmp_path, degree):
    gaussians = animal(degree=degree)
    gaussians.opacity[0, 7] = torch.inf
    for name in ("spz", "glb"):
        export(tmp_path / f"a.{name}", gaussians, name)
    gaussians = turned(gaussians, "y")
    data = gsply.read_spz(tmp_path / "a.spz")
    rows = matched(data.means, gaussians, 0.001)
    np.testing.assert_allclose(data.scales, gaussians.scaling[0, rows].numpy(), atol=0.04)
    np.testing.assert_allclose(1 / (1 + np.exp(-data.opacities)), gaussians.get_opacity[0, rows, 0], atol=0.01)
    np.testing.assert_allclose(data.sh0, gaussians.features[0, rows, 0].numpy(), atol=0.02)
    assert same_rotation(data.quats, gaussians, rows).min() > 0.9999
    if degree:
        np.testing.assert_allclose(data.shN, gaussians.features[0, rows, 1:].numpy().clip(-1, 1), atol=0.02)

    arrays, told = read_glb(tmp_path / "a.glb")
    assert told == {"kernel": "ellipse", "colorSpace": "srgb_rec709_display"}
    np.testing.assert_array_equal(arrays["POSITION"], gaussians.xyz[0].numpy())
    np.testing.assert_allclose(arrays["SCALE"], gaussians.get_scaling[0].numpy(), rtol=1e-6)  # linear, as ratified
    np.testing.assert_allclose(arrays["OPACITY"][:, 0], gaussians.get_opacity[0, :, 0].numpy(), atol=1e-6)
    np.testing.assert_allclose(arrays["ROTATION"][:, [3, 0, 1, 2]], gaussians.get_rotation[0].numpy(), atol=1e-6)
    assert np.abs(np.linalg.norm(arrays["ROTATION"], axis=1) - 1).max() < 1e-5
    harmonics = [arrays[f"SH_DEGREE_{d}_COEF_{m}"] for d in range(degree + 1) for m in range(2 * d + 1)]
    np.testing.assert_array_equal(np.stack(harmonics, 1), gaussians.features[0].numpy())
    color = (C0 * gaussians.features[0, :, 0] + 0.5).clamp(0, 1).numpy()
    np.testing.assert_allclose(arrays["COLOR_0"][:, :3] / 255, color, atol=0.51 / 255)


@pytest.mark.skipif(shutil.which("splat-transform") is None, reason="npm's @playcanvas/splat-transform is not there")
def test_splat_transform_reads_the_same_count_box_and_uprightness(tmp_path):
    """Its world is y down for .ply, .splat and compressed PLY, and it turns .spz and .glb as their texts say."""
    gaussians = animal()

    def convert(source, target):
        subprocess.run(["splat-transform", "-w", "-q", source, target], check=True, cwd=tmp_path, timeout=120)

    expected = turned(gaussians, "-y")
    for name in ("splat", "ply_compressed", "spz"):
        export(tmp_path / f"a{FORMATS[name]}", gaussians, name)
        convert(f"a{FORMATS[name]}", "back.ply")
        back = load_ply(tmp_path / "back.ply")
        assert len(matched(back.xyz[0].numpy(), expected, 0.01)) == 303, name
    save_ply(tmp_path / "a.ply", gaussians, "-y")
    convert("a.ply", "theirs.glb")
    export(tmp_path / "ours.glb", gaussians, "glb")
    theirs, ours = (read_glb(tmp_path / f"{name}.glb")[0] for name in ("theirs", "ours"))
    assert set(theirs) == set(ours) and len(theirs["SCALE"]) == 303
    # Upright in both; theirs shows its back, since 3DGS files are turned about the z axis there.
    np.testing.assert_allclose(theirs["POSITION"] * [-1, 1, -1], ours["POSITION"], atol=1e-5)
    for name in ("SCALE", "OPACITY", "SH_DEGREE_0_COEF_0", "COLOR_0"):
        np.testing.assert_allclose(theirs[name], ours[name], atol=1.01 if name == "COLOR_0" else 1e-5)


# ---- --gaussians N ---------------------------------------------------------------------------------------------------


def test_pruning_takes_what_no_view_shows_then_what_adds_least():
    shell, faint = sphere(n=600, logit=6.0), sphere(n=50, logit=-4.0)
    shell = replace(shell, scaling=shell.scaling + 1.2)  # opaque
    hidden = sphere(radius=0.2, n=100, logit=6.0)
    gaussians = concatenate(hidden, faint, shell)
    cameras = Cameras.turntable(6, 48)
    scores = contributions(gaussians, cameras)
    assert scores.shape == (750,) and scores[:100].max() < 1e-3 * scores[150:].median() and scores.min() >= 0
    kept = prune(gaussians, cameras, 600)
    assert kept.num_gaussians == 600 and (kept.opacity > 0).sum() > 560  # nothing faint before what is opaque
    assert (kept.xyz[0, :, None] - hidden.xyz[0]).norm(dim=-1).min() > 1e-3  # nothing hidden
    half, quarter = (prune(gaussians, cameras, count) for count in (300, 150))
    seen = render(gaussians, cameras[None]).rgb
    errors = [(render(pruned, cameras[None]).rgb - seen).square().mean() for pruned in (kept, half, quarter)]
    assert errors[0] < errors[1] < errors[2]
    order = [int((gaussians.xyz[0] == row).all(-1).nonzero()[0]) for row in quarter.xyz[0]]
    assert order == sorted(order) and torch.equal(prune(gaussians, cameras, 150).xyz, quarter.xyz)
    assert prune(gaussians, cameras, 10_000) is gaussians
    large = prune(gaussians, cameras.resize(2000, 2000), 300)  # few pixels are enough
    assert large.num_gaussians == 300


def test_a_result_records_its_pruning_and_its_up_axis(tmp_path):
    gaussians, cameras = sphere(n=400), Cameras.turntable(3, 32)
    seen = render(gaussians, cameras[None])
    record = {"seconds": {}, "gaussians": {"predicted": 500, "kept": 400}}
    result = Reconstruction(gaussians, PosedViews(seen.rgb[0], seen.alpha[0], cameras), load_rig("mouse6"), record)
    result.prune(100)
    result.up = "-y"
    result.save(tmp_path, turntable_views=0, export=tuple(FORMATS))
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["up"] == "-y" and told["gaussians"] == {"predicted": 500, "kept": 100, "before_pruning": 400}
    assert PlyData.read(str(tmp_path / "gaussians.ply")).comments == ["up -y; Mouse-FaceLift"]
    # The cameras beside it see what they saw: the file is turned back when it is read.
    loaded = render(load_ply(tmp_path / "gaussians.ply"), cameras[None]).rgb
    torch.testing.assert_close(loaded, result.render(cameras).rgb, atol=1e-4, rtol=0)
    for suffix in FORMATS.values():
        assert (tmp_path / f"gaussians{suffix}").is_file()
    result.save(tmp_path, turntable_views=0)  # nothing stale stays
    assert not any((tmp_path / f"gaussians{suffix}").exists() for suffix in FORMATS.values())


def test_a_ply_is_exported_by_its_suffix_and_pruned_for_its_cameras(tmp_path):
    gaussians, cameras = sphere(n=400), Cameras.turntable(3, 32)
    save_ply(tmp_path / "a.ply", gaussians, "y")
    write_json(tmp_path / "cameras.json", {"frames": cameras.to_frames()})
    common = ("scripts/export_ply.py", "--ply", tmp_path / "a.ply", "--output")
    for name, suffix in FORMATS.items():
        assert f"400 Gaussians, {VIEWER_UP[name]} up" in must(*common, tmp_path / f"b{suffix}")
        export(tmp_path / f"direct{suffix}", gaussians, name)
        exported, direct = (positions(tmp_path / f"{stem}{suffix}", name) for stem in ("b", "direct"))
        np.testing.assert_allclose(np.sort(exported, 0), np.sort(direct, 0), atol=0.01)
    must(*common, tmp_path / "c.ply", "--up", "--gaussians", 50, "--cameras", tmp_path / "cameras.json")
    kept = prune(gaussians, cameras, 50)
    torch.testing.assert_close(load_ply(tmp_path / "c.ply").xyz, kept.xyz)
    assert PlyData.read(str(tmp_path / "c.ply")).comments == ["up -y; Mouse-FaceLift"]
    for words, message in (
        (("c.obj",), "must end in .splat, .compressed.ply, .spz, .glb, .ply and not replace --ply"),
        ((tmp_path / "a.ply",), "not replace --ply"),
        (("c.spz", "--up"), "--up is of .ply: the others have their own axis"),
        (("c.spz", "--gaussians", 5), "--gaussians and --cameras belong together"),
    ):  # fmt: skip
        code, _, err = run(*common, *words)
        assert code == 2 and message in err


@pytest.mark.parametrize(
    ("words", "up"), [((), "z"), (("--up",), "-y"), (("--up", "-y"), "-y"), (("--up=-y",), "-y"), (("--up", "y"), "y")]
)
def test_up_is_taken_in_every_spelling(monkeypatch, words, up):
    import inference_mouse
    import test_full_pipeline

    for module in (inference_mouse, test_full_pipeline):
        monkeypatch.setattr("sys.argv", ["script", "--input_image", "a.png", *words, "--seed", "1"])
        assert module.parse_arguments()[0].up == up


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--up", "x"), "invalid choice: 'x'"), (("--gaussians", "0"), "at least 1"),
        (("--export", "obj"), "must be of splat, ply_compressed, spz, glb, got 'obj'"),
    ],
)  # fmt: skip
def test_wrong_flags_end_with_code_2(words, message):
    code, _, err = run("inference_mouse.py", "--input_image", "a.png", *words)
    assert code == 2 and message in err
    if words[0] != "--export":
        code, _, err = run("inference_mouse.py", "--dataset", "data_mouse", words[0], {"--up": "y"}.get(words[0], 5))
        assert code == 2 and "writes the PLY that the next one starts from: no" in err
