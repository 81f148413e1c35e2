"""What is written on request: maps in a sample's convention, contact sheets, exports; nothing stale stays."""

import functools
import importlib.util

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from running import must, run

from gslrm.model import mesh
from gslrm.model.gaussians_renderer import render
from gslrm.model.ply import FORMATS, save_ply
from multiview.cameras import Cameras
from multiview.files import write_json
from multiview.image import read_rgba
from multiview.rig import load_rig
from multiview.sample import DEPTH_UNIT
from pipeline.outputs import PosedViews, Reconstruction, contact_sheet, depth_images, write_depth
from tests.test_mesh import sphere

RIG = load_rig("mouse6")


def picture(path):
    with Image.open(path) as opened:
        return opened.mode, torch.from_numpy(np.asarray(opened).astype(np.int64))


def test_depth_maps_are_a_samples(tmp_path):
    depth = torch.tensor([[0.0, 2.70004, 6.5535], [0.00006, 1.0, 3.14159]])
    write_depth(tmp_path / "depth" / "a.png", depth[None])
    mode, steps = picture(tmp_path / "depth" / "a.png")
    assert mode.startswith("I;16") and steps.tolist() == [[0, 27000, 65535], [1, 10000, 31416]]
    assert (steps * DEPTH_UNIT - depth).abs().max() <= 0.51 * DEPTH_UNIT
    with pytest.raises(ValueError, match=r"b\.png: depth must be at most 6\.55 world units, got 7\.00"):
        write_depth(tmp_path / "b.png", torch.full((1, 2, 2), 7.0))


def test_contact_sheet_puts_kinds_under_each_other_and_wraps():
    numbers = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 2, 3)
    sheet = contact_sheet([numbers / 10, numbers / 10 + 0.5], columns=3)
    assert sheet.shape == (3, 8, 9)
    expected = torch.tensor([[0.0, 0.1, 0.2], [0.5, 0.6, 0.7], [0.3, 0.4, 1.0], [0.8, 0.9, 1.0]])
    torch.testing.assert_close(sheet[0, ::2, ::3], expected)
    depth = torch.tensor([0.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)  # near is dark, no surface white
    assert depth_images(depth)[0, 1].flatten().tolist() == pytest.approx([1.0, 0.0, 0.4, 0.8])
    assert (depth_images(torch.zeros(2, 1, 4, 4)) == 1).all()


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_extras_are_written_on_request_and_removed_by_the_next_run(tmp_path, monkeypatch):
    small = functools.partial(mesh.extract_mesh, resolution=24, num_views=8, size=64)
    monkeypatch.setattr(mesh, "extract_mesh", small)
    gaussians, cameras = sphere(n=500), Cameras.turntable(2, 32)
    seen, photo = render(gaussians, cameras[None]), torch.rand(4, 48, 48, generator=torch.Generator().manual_seed(0))
    result = Reconstruction(gaussians, PosedViews(seen.rgb[0], seen.alpha[0], cameras), RIG, {"seconds": {}}, photo)
    result.save(tmp_path, turntable_views=0)
    usual = files(tmp_path)
    with_mesh = "ply" if importlib.util.find_spec("skimage") else None
    result.save(
        tmp_path, turntable_views=0, export=("splat", "ply_compressed"), mesh=with_mesh, maps=True, sheet=True
    )  # fmt: skip
    assert files(tmp_path) - usual == {
        "gaussians.splat", "gaussians.compressed.ply", "sheet.png", *(["mesh.ply"] if with_mesh else []),
        *(f"{kind}/view_{k:02d}.png" for kind in ("depth", "alpha") for k in range(2)),
    }  # fmt: skip
    assert (picture(tmp_path / "alpha" / "view_01.png")[1] / 255 - result.views.masks[1, 0]).abs().max() < 0.6 / 255
    sheet = read_rgba(tmp_path / "sheet.png")[:3]
    assert sheet.shape == (3, 64, 96) and (sheet[:, 32:, :32] == 1).all()  # photo and views above, renderings below
    assert (sheet[:, :32, 32:] - sheet[:, 32:, 32:]).abs().max() < 2 / 255
    (tmp_path / "notes.txt").write_text("mine")
    result.save(tmp_path, turntable_views=0)
    assert files(tmp_path) == usual | {"notes.txt"}


# ---- commands -------------------------------------------------------------------------------------------------------


def test_render_ply_writes_maps_a_sheet_and_a_turntable(tmp_path):
    gaussians, cameras = sphere(n=3000), Cameras.turntable(3, 64)
    save_ply(tmp_path / "a.ply", gaussians)
    write_json(tmp_path / "cameras.json", {"id": "x", "frames": cameras.to_frames()})
    must(
        "scripts/render_ply.py", "--ply", tmp_path / "a.ply", "--cameras", tmp_path / "cameras.json", "--device", "cpu",
        "--output_dir", tmp_path / "out", "--depth", "--alpha", "--sheet", "--turntable", tmp_path / "video" / "t.mp4",
        "--turntable_views", 4, "--turntable_size", 32,
    )  # fmt: skip
    output = render(gaussians, cameras[None])
    depth, (uv, _) = output.mean_depth()[0, 0, 0], cameras[:1].project(torch.tensor([[[0.2, -0.1, 0.3]]]))
    column, row = uv[0, 0].long().tolist()  # of the sphere's center, whose front is a radius nearer
    assert depth[row, column].item() == pytest.approx(2.7 - 0.1 - 0.5, abs=0.1) and depth[0, 0] == 0
    for k in range(3):
        steps = picture(tmp_path / "out" / "depth" / f"cam_{k:03d}.png")[1]
        assert (steps * DEPTH_UNIT - output.mean_depth()[0, k, 0]).abs().max() < 1.1 * DEPTH_UNIT and steps.any()
        assert (tmp_path / "out" / "alpha" / f"cam_{k:03d}.png").is_file()
    assert read_rgba(tmp_path / "out" / "sheet.png").shape == (4, 192, 192)
    frames = imageio_ffmpeg.read_frames(str(tmp_path / "video" / "t.mp4"))
    assert next(frames)["size"] == (32, 32) and len(list(frames)) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to render"),
        (["--cameras", "c.json"], "--cameras and --output_dir belong together"),
        (["--turntable", "t.mp4", "--depth"], "of --cameras, which is missing"),
        (["--turntable", "t.mp4", "--turntable_size", "33"], "must be even"),
    ],
)
def test_render_ply_refuses_flags_that_do_not_fit(flags, message):
    code, _, err = run("scripts/render_ply.py", "--ply", "a.ply", *flags)
    assert code == 2 and message in err


def test_inference_offers_the_formats_that_exist():
    import inference_mouse

    assert set(inference_mouse.EXPORTS) == set(FORMATS)
    assert inference_mouse.export_formats("splat,ply_compressed") == ("splat", "ply_compressed")
