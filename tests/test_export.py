"""Exported files read back the way viewers read them: each reader is written out here from the format's description."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData
from safetensors.torch import load_file

from gslrm.model.gaussians import Gaussians, filter_gaussians
from gslrm.model.ply import FORMATS, export, load_ply, save_ply, turned
from tests.test_gaussians import FACELIFT, random_gaussians

C0, GOLDEN = 0.28209479177387814, Path(__file__).parent / "golden"


def soft(n=600, degree=0):
    """Random Gaussians whose colours lie within 0..1, most of them visible."""
    gaussians = random_gaussians(n, degree)
    return replace(gaussians, features=gaussians.features * 0.4, scaling=gaussians.scaling - 3)


def matched(decoded_xyz, gaussians, tolerance):
    """Row of `gaussians` for every decoded row, by position (exporters reorder)."""
    distance = torch.cdist(torch.from_numpy(decoded_xyz).double(), gaussians.xyz[0].double())
    nearest = distance.argmin(dim=1)
    assert distance.amin(dim=1).max() < tolerance and nearest.unique().numel() == len(nearest)
    return nearest


def same_rotation(decoded, gaussians, rows):
    """|dot product| of unit quaternions (w, x, y, z): q and -q are one rotation."""
    return (torch.from_numpy(decoded).float() * gaussians.get_rotation[0, rows]).sum(-1).abs()


@pytest.mark.parametrize("degree", [0, 3])
def test_ply_holds_the_bytes_gsplat_writes(tmp_path, degree):
    """gsplat's exporter has no normals; every other column must be byte for byte the same, in the same order."""
    exporter = pytest.importorskip("gsplat.exporter")
    gaussians = random_gaussians(degree=degree)
    save_ply(tmp_path / "ours.ply", gaussians)
    (tmp_path / "theirs.ply").write_bytes(
        exporter.export_splats(
            gaussians.xyz[0], gaussians.scaling[0], gaussians.rotation[0], gaussians.opacity[0, :, 0],
            gaussians.features[0, :, :1], gaussians.features[0, :, 1:], format="ply",
        )
    )  # fmt: skip
    ours, theirs = (PlyData.read(str(tmp_path / name))["vertex"].data for name in ("ours.ply", "theirs.ply"))
    assert [name for name in ours.dtype.names if name not in ("nx", "ny", "nz")] == list(theirs.dtype.names)
    for name in theirs.dtype.names:
        assert ours[name].tobytes() == theirs[name].tobytes(), name


def test_facelifts_file_is_read_and_its_bytes_are_written(tmp_path):
    """Golden file of FaceLift's code: every property that both layouts have, byte for byte, Gaussian for Gaussian."""
    raw, path = (
        load_file(GOLDEN / "gslrm_small" / "outputs.safetensors"),
        GOLDEN / "gaussians/facelift_filtered_cli.ply",
    )
    names = ("xyz", "features_dc", "scaling", "rotation", "opacity")
    gaussians = Gaussians(*[raw[f"clip_off.raw.{name}"][None] for name in names])
    gaussians, loaded = filter_gaussians(gaussians, FACELIFT["inference_cli"]), load_ply(path)
    assert loaded.sh_degree == 0 and all(
        torch.equal(vars(loaded)[name], vars(gaussians)[name]) for name in vars(loaded)
    )
    save_ply(tmp_path / "a.ply", gaussians)
    ours, theirs = (PlyData.read(str(each))["vertex"].data for each in (tmp_path / "a.ply", path))
    shared = [name for name in ours.dtype.names if name in theirs.dtype.names]
    assert len(shared) == 14 and len(ours) == len(theirs) > 0
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in shared)


def test_splat_records_decode_to_the_gaussians(tmp_path):
    gaussians = soft()
    export(tmp_path / "a.splat", gaussians, "splat")
    assert (tmp_path / "a.splat").stat().st_size == 600 * 32
    record = np.dtype([("xyz", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("wxyz", "u1", 4)])
    table, gaussians = np.fromfile(tmp_path / "a.splat", record), turned(gaussians, "-y")
    rows = matched(table["xyz"], gaussians, 1e-6)
    np.testing.assert_allclose(table["scale"], gaussians.get_scaling[0, rows].numpy(), rtol=1e-6)
    color = (0.5 + C0 * gaussians.features[0, rows, 0]).clamp(0, 1)
    rgba = torch.cat([color, gaussians.get_opacity[0, rows]], dim=-1)
    np.testing.assert_allclose(table["rgba"] / 255, rgba.numpy(), atol=1.01 / 255)
    rotation = (table["wxyz"].astype(np.float32) - 128) / 128
    rotation /= np.linalg.norm(rotation, axis=-1, keepdims=True)
    assert same_rotation(rotation, gaussians, rows).min() > 0.9997  # 8 bit: within 3 degrees


def bits(packed, shift, count):
    return ((packed >> shift) & ((1 << count) - 1)) / ((1 << count) - 1)


def read_compressed(path):
    """SuperSplat's format: chunk bounds, and 16 bytes per Gaussian (four uint32) packed between them."""
    content = PlyData.read(str(path))
    chunk = content["chunk"]
    vertex = {name: content["vertex"][name].astype(np.int64) for name in content["vertex"].data.dtype.names}
    of = np.arange(len(content["vertex"])) // 256

    def between(name, shares, axes):
        lowest, highest = (np.stack([chunk[f"{end}_{name}{a}"] for a in axes], -1)[of] for end in ("min", "max"))
        return lowest + np.stack(shares, -1) * (highest - lowest)

    def packed_111011(values):
        return [bits(values, 21, 11), bits(values, 11, 10), bits(values, 0, 11)]

    color, rotation = vertex["packed_color"], vertex["packed_rotation"]
    small = np.stack([(bits(rotation, shift, 10) - 0.5) * np.sqrt(2) for shift in (20, 10, 0)], -1)
    largest = np.sqrt(np.clip(1 - (small**2).sum(-1), 0, None))
    wxyz = np.empty((len(rotation), 4))
    for row, index in enumerate(rotation >> 30):  # which of w, x, y, z was left out, being the largest
        wxyz[row] = np.insert(small[row], index, largest[row])
    sh = None
    if len(content.elements) == 3:
        names = content["sh"].data.dtype.names
        assert len(names) in (9, 24, 45)  # SuperSplat refuses other numbers, none included
        sh = (np.stack([content["sh"][name] for name in names], -1) + 0.5) / 256 * 8 - 4
    return {
        "elements": [element.name for element in content.elements],
        "xyz": between("", packed_111011(vertex["packed_position"]), "xyz"),
        "log_scale": between("scale_", packed_111011(vertex["packed_scale"]), "xyz"),
        "rgb": between("", [bits(color, shift, 8) for shift in (24, 16, 8)], "rgb"),
        "opacity": bits(color, 0, 8), "wxyz": wxyz, "sh": sh,
    }  # fmt: skip


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_compressed_ply_decodes_to_the_gaussians(tmp_path, degree):
    gaussians = soft(degree=degree)
    gaussians.opacity[0, :7] = -8.0  # below 1/255: left out
    export(tmp_path / "a.compressed.ply", gaussians, "ply_compressed")
    seen, gaussians = read_compressed(tmp_path / "a.compressed.ply"), turned(gaussians, "-y")
    assert seen["elements"] == ["chunk", "vertex", "sh"][: 3 if degree else 2]
    rows = matched(seen["xyz"], gaussians, 0.01)  # chunks span up to 6 units, in 1024 or 2048 steps
    assert len(rows) == 593 and rows.min() >= 7
    np.testing.assert_allclose(seen["log_scale"], gaussians.scaling[0, rows].numpy(), atol=0.005)
    np.testing.assert_allclose(seen["rgb"], (0.5 + C0 * gaussians.features[0, rows, 0]).numpy(), atol=0.003)
    np.testing.assert_allclose(seen["opacity"], gaussians.get_opacity[0, rows, 0].numpy(), atol=0.6 / 255)
    assert same_rotation(seen["wxyz"], gaussians, rows).min() > 0.99999
    if degree:
        np.testing.assert_allclose(seen["sh"], gaussians.features[0, rows, 1:].mT.flatten(1).numpy(), atol=4.1 / 256)


def test_compressed_ply_takes_gaussians_that_are_all_alike(tmp_path):
    """Bounds without extent: 0 / 0 in the encoder must not reach the file."""
    gaussians = soft(n=3)
    gaussians = replace(gaussians, scaling=torch.full((1, 3, 3), -2.0), features=torch.zeros(1, 3, 1, 3))
    gaussians.opacity[:] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(tmp_path / "a.ply", gaussians, "ply_compressed")
    seen = read_compressed(tmp_path / "a.ply")
    matched(seen["xyz"], turned(gaussians, "-y"), 0.01)
    np.testing.assert_allclose(seen["log_scale"], -2.0)
    np.testing.assert_allclose(seen["rgb"], 0.5)


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_gaussians_are_refused_and_leave_the_old_file(tmp_path, name):
    path = tmp_path / f"a{FORMATS[name]}"
    export(path, soft(n=20), name)
    whole = path.read_bytes()
    broken = soft(n=20)
    broken.scaling[0, 3, 1] = torch.nan
    faint = replace(soft(n=20), opacity=torch.full((1, 20, 1), -torch.inf))
    for gaussians, form, message in (
        (broken, name, r"a\..*must be finite.* 1 of scaling"), (random_gaussians(b=2), name, "one scene, got 2"),
        (soft(n=20), "obj", "export format must be one of splat, ply_compressed, spz, glb"),
        (soft(n=0), name, "not one Gaussian"), (faint, name, "none of 20 Gaussians can be seen"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            export(path, gaussians, form)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == [path.name]
