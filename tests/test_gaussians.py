"""Gaussians, filters, PLY files."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData
from safetensors.torch import load_file

from gslrm.model.gaussians import FilterSettings, Gaussians, filter_gaussians
from gslrm.model.gaussians_renderer import render
from gslrm.model.ply import load_ply, save_ply
from multiview.cameras import Cameras
from multiview.image import read_rgba

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


def test_shapes_that_do_not_belong_together_are_refused_by_name():
    gaussians = random_gaussians()
    for name in ("scaling", "rotation", "opacity", "features"):
        with pytest.raises(ValueError, match=name):
            replace(gaussians, **{name: getattr(gaussians, name)[:, :-1]})
    with pytest.raises(ValueError, match="features"):
        replace(gaussians, features=torch.zeros(1, 50, 5, 3))


def test_select():
    gaussians = random_gaussians(b=2)
    with pytest.raises(ValueError, match="one scene"):
        gaussians.select(torch.arange(3))
    picked = gaussians.map(lambda tensor: tensor[:1]).select(torch.tensor([4, 2]))
    assert all(torch.equal(vars(picked)[name], tensor[:1, [4, 2]]) for name, tensor in vars(gaussians).items())


HEAD = (-0.91, 0.91, -0.91, 0.91, -1.0, 1.0)
FACELIFT = {  # its command line, web demo, training and evaluation, and its method's defaults
    "inference_cli": FilterSettings(max_scaling=0.1, spare_upper_half=True, floater=0.6, crop_box=HEAD),
    "gradio": FilterSettings(max_scaling=0.2, spare_upper_half=True, floater=0.75, crop_box=HEAD),
    "training_eval": FilterSettings(min_opacity=0.02, crop_box=(-0.91, 0.91, -0.91, 0.91, -0.91, 0.91)),
    "method_defaults": FilterSettings(min_opacity=0.05, crop_box=(-1.0, 1.0, -1.0, 1.0, -1.0, 1.0)),
}


@pytest.mark.parametrize("recorded", FACELIFT)
def test_facelifts_settings_keep_the_recorded_rows(golden, recorded):
    expected = load_file(GOLDEN / "gaussians" / "filters.safetensors")[f"filter.{recorded}.kept_index"]
    before = golden.xyz.clone()
    kept = filter_gaussians(golden, FACELIFT[recorded])
    assert torch.equal(kept.xyz, golden.xyz[:, expected.long()]) and torch.equal(golden.xyz, before)


def test_values_that_are_not_finite_do_not_look_like_nothing_there():
    broken = random_gaussians()
    broken.xyz[0, :7] = torch.nan
    broken.scaling[0, 9, 1] = torch.inf
    with pytest.raises(ValueError, match="50 Gaussians must be finite, got NaN or infinity in 21 of xyz, 1 of scaling"):
        filter_gaussians(broken)
    with pytest.raises(ValueError, match="one scene"):
        filter_gaussians(random_gaussians(b=2))
    # The filter for animals does not spare the upper half.
    gaussians = replace(random_gaussians(), opacity=torch.full((1, 50, 1), 5.0), xyz=torch.full((1, 50, 3), 0.5))
    for settings, left in (
        (FilterSettings(max_scaling=1e-9), 0), (FilterSettings(max_scaling=1e-9, spare_upper_half=True), 50), (None, 50)
    ):  # fmt: skip
        assert filter_gaussians(gaussians, settings).num_gaussians == left
    assert filter_gaussians(random_gaussians(n=0)).num_gaussians == 0


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
    assert [path.name for path in tmp_path.iterdir()] == ["a.ply"]


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


def header(properties, count=b"50", form=b"binary_little_endian 1.0", before=b""):
    return b"ply\nformat " + form + b"\n" + before + b"element vertex " + count + b"\n" + properties + b"end_header\n"


FLOATS = "".join(f"property float {name}\n" for name in (
    "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
)).encode()  # fmt: skip
UNREADABLE = {  # what is done to a good file's bytes so that it cannot be read at all
    "cut": lambda b: b[:-100], "cut in its header": lambda b: b[:150], "no PLY": lambda b: b"no ply",
    "empty": lambda b: b"", "zeros": lambda b: bytes(5000), "one line without end": lambda b: b[:40] + b"x" * 10**5,
    "header without end": lambda b: b[: b.index(b"end_header")] + b"comment a\n" * 2000,
    "unknown format": lambda b: header(FLOATS, form=b"binary_middle_endian 1.0"),
    "a huge count": lambda b: b.replace(b"vertex 50", b"vertex 99999999999999"),
    "a huge count of text": lambda b: header(FLOATS, b"99999999999999", b"ascii 1.0"),
    "a large count of text": lambda b: header(FLOATS, b"999999999", b"ascii 1.0"),
    "words in text": lambda b: header(FLOATS, b"1", b"ascii 1.0") + b"a " * 17,
    "too few numbers in text": lambda b: header(FLOATS, b"2", b"ascii 1.0") + b"1 " * 17 + b"\n" + b"1 " * 3,
} | {
    f"{new} for {old}": lambda b, old=old, new=new: b.replace(old.encode(), new.encode())
    for old, new in (
        ("vertex 50", "vertex -50"), ("vertex 50", "vertex"), ("vertex 50", "vertex 5e1"), ("float opacity", "float x"),
        ("float opacity", "float16 opacity"), ("float opacity", "double opacity"),
    )
}  # fmt: skip
BROKEN = {name: (damage, "cannot be read: it is cut off, or") for name, damage in UNREADABLE.items()} | {
    "another element": (lambda b: b.replace(b"element vertex", b"element vortex"), "'vertex'.*vortex"),
    "a property missing": (lambda b: b.replace(b"float opacity", b"float opacitx"), "lacks opacity"),
    "a list": (lambda b: header(b"property list uchar int x\n", b"9") + bytes(200), "lacks .*as numbers"),
    "one more": (lambda b: header(FLOATS + b"property float f_rest_0\n") + b[300:] * 2, "f_rest properties, got 1"),
    "no Gaussians": (lambda b: header(b"property float x\n") + bytes(200), "does not hold 3D Gaussians"),
    "NaN": (lambda b: b[:-4] + np.float32(np.nan).tobytes(), "1 of rotation"),
    "infinite": (lambda b: b[:-4] + np.float32(np.inf).tobytes(), "1 of rotation"),
    "a compressed one": (
        lambda b: header(b"property uint packed_position\n", before=b"element chunk 1\nproperty float min_x\n") + b,
        "compressed one.*SuperSplat",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_ply_files_are_refused_by_name(tmp_path, case):
    path, (damage, message) = tmp_path / "a.ply", BROKEN[case]
    save_ply(path, random_gaussians())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"(?s)a\.ply.*{message}"):
        load_ply(path)


def test_mutated_ply_files_are_read_or_refused(tmp_path):
    path, generator = tmp_path / "a.ply", np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"a\.ply does not exist"):
        load_ply(path)
    save_ply(path, random_gaussians(n=5))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(300):
        mutated = whole.copy()
        mutated[generator.integers(0, 400, 4)] = generator.integers(0, 256, 4)
        path.write_bytes(mutated[: generator.integers(1, len(whole) + 1)].tobytes())
        try:
            assert 0 < load_ply(path).num_gaussians <= 5
        except ValueError as error:
            assert "a.ply" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("form", ["ascii 1.0", "binary_big_endian 1.0"])
def test_other_forms_of_ply_read_as_the_same_gaussians(tmp_path, form):
    gaussians = random_gaussians()
    gaussians.opacity[0, :2, 0] = torch.tensor([torch.inf, -torch.inf])  # the logits of 1 and 0
    save_ply(tmp_path / "a.ply", gaussians)
    content = PlyData.read(str(tmp_path / "a.ply"))
    content.text, content.byte_order = form.startswith("ascii"), ">" if "big" in form else "="
    content.write(str(tmp_path / "b.ply"))
    for path in (tmp_path / "a.ply", tmp_path / "b.ply"):
        loaded = load_ply(path)
        assert torch.allclose(loaded.rotation, gaussians.rotation, rtol=1e-5)
        assert torch.allclose(loaded.opacity, gaussians.opacity, rtol=1e-5)
    camera = Cameras.turntable(1, 32)[None]
    assert render(loaded, camera).rgb.isfinite().all()


def test_a_refused_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.ply"
    save_ply(path, random_gaussians())
    whole = path.read_bytes()
    bad = random_gaussians()
    bad.opacity[0, 3] = torch.nan
    for gaussians, message in (
        (bad, "1 of opacity"), (random_gaussians(b=2), "one scene"), (random_gaussians(n=0), "a.ply: .*not one"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            save_ply(path, gaussians)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_render_ply_writes_one_image_per_camera_each_of_its_own_size(tmp_path, monkeypatch):
    save_ply(tmp_path / "a.ply", random_gaussians())
    frames = [*Cameras.turntable(2, 32).resize(24, 32).to_frames(), *Cameras.turntable(1, 48).to_frames()]
    (tmp_path / "cameras.json").write_text(json.dumps({"id": "x", "frames": frames}))
    main = runpy.run_path(str(ROOT / "scripts" / "render_ply.py"))["main"]

    def command(ply, *options):
        words = ["--cameras", "cameras.json", "--output_dir", "out", "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", ["render_ply.py", "--ply", ply, *words])
        main()

    monkeypatch.chdir(tmp_path)
    command("a.ply", "--depth", "--alpha")
    names = ["cam_000.png", "cam_001.png", "cam_002.png"]
    assert sorted(path.name for path in Path("out").glob("*.png")) == names
    images = [read_rgba(Path("out") / name) for name in names]
    assert [tuple(image.shape) for image in images] == [(4, 24, 32), (4, 24, 32), (4, 48, 48)]
    assert images[0][:3].std() > 0.01
    assert all((Path("out") / kind / name).is_file() for kind in ("depth", "alpha") for name in names)
    for words, message in ((["missing.ply"], "missing.ply does not exist"), (["a.ply", "--sheet"], "--sheet needs")):
        with pytest.raises(ValueError, match=message):
            command(*words)
