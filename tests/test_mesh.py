"""Meshes from Gaussians: a closed surface of the right size, place and colour, and files that read back."""

import importlib
import math
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData

from gslrm.model.gaussians import Gaussians
from gslrm.model.mesh import Mesh, check_libraries, extract_mesh, save_mesh
from gslrm.model.ply import save_ply
from tests.gaussian_scenes import concatenate

ROOT = Path(__file__).resolve().parent.parent
CENTRE, RADIUS, SIGMA = (0.2, -0.1, 0.3), 0.5, 0.015


def sphere(radius=RADIUS, n=4000, logit=3.0):
    """Round splats evenly on a sphere (Fibonacci lattice), coloured by their direction."""
    i = torch.arange(n) + 0.5
    polar, angle = torch.acos(1 - 2 * i / n), math.pi * (1 + 5**0.5) * i
    direction = torch.stack([angle.cos() * polar.sin(), angle.sin() * polar.sin(), polar.cos()], dim=-1)
    return Gaussians(
        xyz=(direction * radius + torch.tensor(CENTRE))[None],
        features=((direction + 1) / 2 - 0.5)[None, :, None] / 0.28209479177387814,
        scaling=torch.full((1, n, 3), math.log(SIGMA * radius / RADIUS)),
        rotation=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(1, n, 1),
        opacity=torch.full((1, n, 1), logit),
    )


def small(gaussians):
    return extract_mesh(gaussians, resolution=48, num_views=16, size=128)


def volume(mesh):
    """Signed: positive where the faces are counter-clockwise seen from outside."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]].astype(np.float64) for k in range(3))
    return (a * np.cross(b, c)).sum() / 6


def is_closed(mesh):
    """Every edge belongs to two faces that run along it in opposite directions."""
    edges = np.concatenate([mesh.faces[:, [i, (i + 1) % 3]] for i in range(3)])
    forward, backward = ({tuple(edge) for edge in e.tolist()} for e in (edges, edges[:, ::-1]))
    return len(forward) == len(edges) and forward == backward


@pytest.fixture(scope="module")
def mesh():
    pytest.importorskip("skimage")
    return small(sphere())


def test_a_sphere_of_gaussians_becomes_a_closed_sphere(mesh):
    assert is_closed(mesh)
    assert volume(mesh) == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.1)
    radius = np.linalg.norm(mesh.vertices - np.array(CENTRE), axis=1)
    assert np.abs(radius - RADIUS).max() < 2 * SIGMA


def test_vertices_have_the_colours_of_the_gaussians(mesh):
    expected = ((mesh.vertices - np.array(CENTRE)) / RADIUS + 1) / 2
    assert np.abs(mesh.colors - expected).mean() < 0.03 and np.abs(mesh.colors - expected).max() < 0.2


def test_hidden_gaussians_and_floaters_leave_no_surface(mesh):
    floater = sphere(radius=0.02, n=20)
    floater.xyz[:] = floater.xyz * 0.3 + torch.tensor([0.7, 0.5, 0.7])
    inner = sphere(radius=0.2, n=500)
    together = small(concatenate(sphere(), inner, floater))
    assert is_closed(together)
    distance = np.linalg.norm(together.vertices - np.array(CENTRE), axis=1)
    assert distance.min() > 0.45 and distance.max() < 0.55


def test_nothing_to_see_is_an_error(mesh):
    with pytest.raises(ValueError, match="opacity above 0.05"):
        small(sphere(n=50, logit=-5.0))
    with pytest.raises(ValueError, match="sees a surface"):
        small(sphere(n=50, logit=-2.5))
    with pytest.raises(ValueError, match="one scene"):
        small(sphere(n=50).map(lambda t: t.repeat(2, *[1] * (t.ndim - 1))))


def test_a_missing_library_is_named_with_the_command(monkeypatch):
    real = importlib.import_module

    def without(name, *arguments, **options):
        if name.split(".")[0] in ("skimage", "trimesh"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ValueError, match=r"scikit-image .*pip install -r requirements-extra\.txt"):
        small(sphere(n=50))
    with pytest.raises(ValueError, match=r"scikit-image .*requirements-extra\.txt"):
        check_libraries(".ply")
    with pytest.raises(ValueError, match=r"needs trimesh .*requirements-extra\.txt"):
        save_mesh("never.glb", tetrahedron())
    assert not Path("never.glb").exists()


def tetrahedron():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]], np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    return Mesh(vertices, faces, np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0.2, 0.4, 1.0]]))


def test_ply_mesh_reads_back(tmp_path):
    mesh = tetrahedron()
    assert is_closed(mesh) and volume(mesh) == pytest.approx(1.0)
    save_mesh(tmp_path / "a.ply", mesh)
    content = PlyData.read(str(tmp_path / "a.ply"))
    vertex = content["vertex"]
    np.testing.assert_array_equal(np.stack([vertex[k] for k in "xyz"], -1), mesh.vertices)
    assert [vertex[k][3] for k in ("red", "green", "blue")] == [51, 102, 255]
    np.testing.assert_array_equal(np.stack(list(content["face"]["vertex_indices"])), mesh.faces)
    with pytest.raises(ValueError, match=r"\.ply or \.glb, got .*a\.obj"):
        save_mesh(tmp_path / "a.obj", mesh)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ply"]


def test_glb_is_gltf_2_with_y_up(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    save_mesh(tmp_path / "a.glb", tetrahedron())
    whole = (tmp_path / "a.glb").read_bytes()
    assert struct.unpack("<4sII", whole[:12]) == (b"glTF", 2, len(whole))
    loaded = trimesh.load(tmp_path / "a.glb", force="mesh", process=False)
    np.testing.assert_allclose(loaded.vertices, [[0, 0, 0], [1, 0, 0], [0, 0, -2], [0, 3, 0]])  # our z is its y
    assert loaded.is_watertight and loaded.volume == pytest.approx(1.0)
    np.testing.assert_array_equal(loaded.visual.vertex_colors[3, :3], [51, 102, 255])


def test_export_mesh_script(tmp_path, monkeypatch, capsys):
    pytest.importorskip("skimage")
    save_ply(tmp_path / "gaussians.ply", sphere(n=1000))
    main = runpy.run_path(str(ROOT / "scripts" / "export_mesh.py"))["main"]
    options = ["--resolution", "24", "--views", "8", "--view_size", "64", "--device", "cpu"]
    command = ["export_mesh.py", "--ply", str(tmp_path / "gaussians.ply"), *options, "--output"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "mesh.ply")])
    main()
    assert "triangles" in capsys.readouterr().out
    assert len(PlyData.read(str(tmp_path / "mesh.ply"))["face"]) > 100
    for wrong in ("mesh.stl", "gaussians.ply"):
        monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / wrong)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2 and "--output" in capsys.readouterr().err
