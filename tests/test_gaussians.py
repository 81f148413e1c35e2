"""Gaussians, filters, PLY files."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData
from safetensors.torch import load_file

from gslrm.model.filters import PRESETS, FilterSettings, filter_gaussians, keep_mask
from gslrm.model.gaussians import Gaussians, concatenate
from gslrm.model.gaussians_renderer import render
from gslrm.model.ply import load_ply, save_ply
from multiview.cameras import Cameras

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def golden_tensors():
    return load_file(GOLDEN / "gslrm_small" / "outputs.safetensors")


@pytest.fixture(scope="module")
def golden(golden_tensors):
    """The recorded raw Gaussians of FaceLift's code (random weights)."""
    raw = {key.removeprefix("clip_off.raw."): value for key, value in golden_tensors.items() if ".raw." in key}
    return Gaussians(raw["xyz"][None], raw["features_dc"][None], raw["scaling"][None], raw["rotation"][None],
                     raw["opacity"][None])  # fmt: skip


def random_gaussians(n=50, degree=0, b=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = ((b, n, 3), (b, n, (degree + 1) ** 2, 3), (b, n, 3), (b, n, 4), (b, n, 1))
    return Gaussians(*[torch.randn(size, generator=g) for size in sizes])


def test_activations_match_recorded_values(golden, golden_tensors):
    for name, value in (
        ("scaling", golden.get_scaling),
        ("rotation", golden.get_rotation),
        ("opacity", golden.get_opacity),
    ):
        torch.testing.assert_close(value[0], golden_tensors[f"clip_off.act.{name}"], atol=1e-6, rtol=1e-6)


def test_covariance_is_rotation_times_variances():
    gaussians = random_gaussians()
    values = torch.linalg.eigvalsh(gaussians.get_covariance.double())
    expected = gaussians.get_scaling.double().square().sort(dim=-1).values
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-5)
    half_turn = replace(gaussians, rotation=torch.tensor([0.0, 0.0, 0.0, 2.0]).expand(1, 50, 4))  # about z
    variances = gaussians.get_scaling.square()
    torch.testing.assert_close(half_turn.get_covariance, torch.diag_embed(variances), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["scaling", "rotation", "opacity", "features"])
def test_shapes_that_do_not_belong_together_are_refused_by_name(name):
    gaussians = random_gaussians()
    with pytest.raises(ValueError, match=name):
        replace(gaussians, **{name: getattr(gaussians, name)[:, :-1]})
    with pytest.raises(ValueError, match="features"):
        replace(gaussians, features=torch.zeros(1, 50, 5, 3))


def test_select_scene_and_concatenate():
    gaussians = random_gaussians(b=2)
    assert torch.equal(gaussians.scene(1).xyz[0], gaussians.xyz[1])
    with pytest.raises(ValueError, match="one scene"):
        gaussians.select(torch.arange(3))
    first = gaussians.scene(0)
    parts = concatenate([first.select(torch.arange(20)), first.select(torch.arange(20, 50))])
    assert all(torch.equal(getattr(parts, n), getattr(first, n)) for n in ("xyz", "features", "rotation"))
    torch.testing.assert_close(first.scaled(2.0).get_scaling, 2 * first.get_scaling)


# ---- filters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recorded", "settings"),
    [
        ("inference_cli", "facelift_cli"),
        ("gradio", "facelift_gradio"),
        ("training_eval", "facelift_training"),
        ("method_defaults", "facelift_defaults"),
    ],
)
def test_facelift_presets_keep_the_recorded_rows(golden, recorded, settings):
    expected = load_file(GOLDEN / "gaussians" / "filters.safetensors")[f"filter.{recorded}.kept_index"]
    assert keep_mask(golden, settings).nonzero()[:, 0].tolist() == expected.tolist()


def test_near_far_percentiles_keep_the_recorded_rows(golden):
    expected = load_file(GOLDEN / "gaussians" / "filters.safetensors")["filter.with_nearfar.kept_index"]
    arguments = json.loads((GOLDEN / "gslrm_small" / "info.json").read_text())["ply"]["with_nearfar"]["args"]
    settings = FilterSettings(min_opacity=arguments["opacity_thres"], near_far=tuple(arguments["nearfar_percent"]))
    mask = keep_mask(golden, settings, torch.tensor(arguments["cam_origins"]))
    assert mask.nonzero()[:, 0].tolist() == expected.tolist()


def test_filters_return_a_new_object_and_leave_the_old_one_alone():
    gaussians = random_gaussians()
    before = gaussians.xyz.clone()
    filtered = filter_gaussians(gaussians)
    assert 0 < filtered.num_gaussians < 50 and gaussians.num_gaussians == 50
    assert torch.equal(gaussians.xyz, before)


def test_animal_filter_does_not_spare_the_upper_half():
    gaussians = replace(random_gaussians(), opacity=torch.full((1, 50, 1), 5.0), xyz=torch.full((1, 50, 3), 0.5))
    assert not PRESETS["animal"].spare_upper_half
    settings = replace(PRESETS["animal"], max_scaling=1e-9)
    assert not keep_mask(gaussians, settings).any()
    assert keep_mask(gaussians, replace(settings, spare_upper_half=True)).all()
    torch.testing.assert_close(keep_mask(gaussians).sum(), torch.tensor(50))


def test_unknown_filter_and_several_scenes_are_refused():
    with pytest.raises(ValueError, match="facelift_cli"):
        keep_mask(random_gaussians(), "heads")
    with pytest.raises(ValueError, match="one scene"):
        keep_mask(random_gaussians(b=2))


def test_filters_accept_an_empty_scene():
    assert filter_gaussians(random_gaussians(n=0), "facelift_cli", torch.zeros(1, 3)).num_gaussians == 0


# ---- PLY ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_ply_round_trip_is_exact_and_in_the_inria_layout(tmp_path, degree):
    gaussians = random_gaussians(degree=degree)
    save_ply(tmp_path / "a.ply", gaussians)
    loaded = load_ply(tmp_path / "a.ply")
    assert loaded.sh_degree == degree
    for name in ("xyz", "features", "scaling", "rotation", "opacity"):
        assert torch.equal(getattr(loaded, name), getattr(gaussians, name)), name

    content = PlyData.read(str(tmp_path / "a.ply"))
    rest = 3 * ((degree + 1) ** 2 - 1)
    assert [p.name for p in content["vertex"].properties] == (
        ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *[f"f_rest_{i}" for i in range(rest)]]
        + ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    )
    assert content.byte_order == "<" and not content.text and len(content.elements) == 1
    if degree:  # channel-major: all red coefficients first
        table = content["vertex"].data
        assert np.array_equal(table["f_rest_1"], gaussians.features[0, :, 2, 0].numpy())
        assert np.array_equal(table[f"f_rest_{rest // 3}"], gaussians.features[0, :, 1, 1].numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["a.ply"]


def test_ply_metadata_goes_to_a_sidecar(tmp_path):
    save_ply(tmp_path / "a.ply", random_gaussians(), metadata={"rig": "mouse6"})
    assert json.loads((tmp_path / "a.ply.json").read_text()) == {"rig": "mouse6"}
    assert b"mouse6" not in (tmp_path / "a.ply").read_bytes()


def test_facelift_ply_reads_as_the_recorded_degree_0_gaussians(golden):
    loaded = load_ply(GOLDEN / "gaussians" / "facelift_filtered_cli.ply")
    assert loaded.sh_degree == 0
    expected = filter_gaussians(golden, "facelift_cli")
    for name in ("xyz", "features", "scaling", "rotation", "opacity"):
        torch.testing.assert_close(getattr(loaded, name), getattr(expected, name), atol=0, rtol=0)


def test_facelift_ply_of_degree_1_unpacks_its_padded_coefficients(tmp_path):
    gaussians = random_gaussians(degree=1)
    save_ply(tmp_path / "a.ply", gaussians)
    table = PlyData.read(str(tmp_path / "a.ply"))["vertex"].data
    dtype = [(name, "<f4") for name in ("x", "y", "z")] + [(name, "u1") for name in ("red", "green", "blue")]
    dtype += [(f"f_dc_{i}", "<f4") for i in range(3)] + [(f"f_rest_{i}", "<f4") for i in range(45)]
    dtype += [(name, "<f4") for name in table.dtype.names[-8:]]
    padded = np.zeros(len(table), dtype)
    for name in set(padded.dtype.names) & set(table.dtype.names):
        padded[name] = table[name]
    from plyfile import PlyElement

    PlyData([PlyElement.describe(padded, "vertex")], byte_order="<").write(str(tmp_path / "b.ply"))
    assert torch.equal(load_ply(tmp_path / "b.ply").features, gaussians.features)


def test_broken_ply_files_are_refused_by_name(tmp_path):
    path = tmp_path / "a.ply"
    with pytest.raises(ValueError, match=r"a\.ply does not exist"):
        load_ply(path)
    save_ply(path, random_gaussians())
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"a\.ply cannot be read"):
        load_ply(path)
    path.write_bytes(whole.replace(b"float opacity", b"float opacitx"))
    with pytest.raises(ValueError, match=r"a\.ply lacks opacity"):
        load_ply(path)
    path.write_bytes(whole[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(ValueError, match=r"rot_3 must be finite"):
        load_ply(path)
    path.write_text("no ply")
    with pytest.raises(ValueError, match=r"a\.ply cannot be read"):
        load_ply(path)


def test_a_refused_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.ply"
    save_ply(path, random_gaussians())
    whole = path.read_bytes()
    bad = random_gaussians()
    bad.opacity[0, 3] = torch.inf
    with pytest.raises(ValueError, match="opacity"):
        save_ply(path, bad)
    with pytest.raises(ValueError, match="one scene"):
        save_ply(path, random_gaussians(b=2))
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_render_ply_writes_one_picture_per_camera(tmp_path):
    from multiview.cameras import Cameras
    from multiview.image import read_rgba

    save_ply(tmp_path / "a.ply", random_gaussians())
    frames = Cameras.turntable(2, 32).resize(24, 32).to_frames()
    (tmp_path / "cameras.json").write_text(json.dumps({"id": "x", "frames": frames}))
    command = [sys.executable, ROOT / "scripts" / "render_ply.py", "--ply", tmp_path / "a.ply"]
    command += ["--cameras", tmp_path / "cameras.json", "--output_dir", tmp_path / "out", "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cam_000.png", "cam_001.png"]
    picture = read_rgba(tmp_path / "out" / "cam_000.png")
    assert picture.shape == (4, 24, 32) and picture[:3].std() > 0.01

    command[3] = tmp_path / "missing.ply"
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and "missing.ply does not exist" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_mirrored_gaussians_look_like_the_mirror_image(degree):
    generator = torch.Generator().manual_seed(degree)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    gaussians = Gaussians(
        xyz=0.3 * normal(1, 40, 3), features=0.5 * normal(1, 40, (degree + 1) ** 2, 3),
        scaling=-2.5 + 0.5 * normal(1, 40, 3), rotation=normal(1, 40, 4), opacity=normal(1, 40, 1),
    )  # fmt: skip
    cameras = Cameras.orbit(torch.tensor([20.0, 140.0, 250.0]), torch.full((3,), 25.0), 2.7, 1.07, 48)[None]
    seen = render(gaussians, cameras).rgb
    torch.testing.assert_close(
        render(gaussians.mirrored(), cameras.mirrored()).rgb, seen.flip(-1), atol=1e-5, rtol=0
    )
    assert (render(gaussians, cameras.mirrored()).rgb - seen.flip(-1)).abs().max() > 0.05
