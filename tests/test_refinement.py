"""Refinement of posed views: it explains given views better, left-out ones no worse, anywhere in the world."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gslrm.model.gaussians import Gaussians
from gslrm.refinement import MOST_GAUSSIANS, agreement, anisotropy_p95, limit, refine
from multiview.cameras import Cameras
from multiview.image import write_image
from multiview.rig import load_rig
from multiview.sample import read_sample, write_sample
from pipeline.model import MouseFaceLift
from pipeline.outputs import PosedViews
from pipeline.posed import locate, rectify, to_rig

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data_mouse" / "sample_000000"
FEW = 60  # iterations: enough to see which way it goes


@pytest.fixture(scope="module")
def model():
    return MouseFaceLift.load(device="cpu", stages="2")


def given(folder=SAMPLE):
    sample = read_sample(folder)
    return sample, PosedViews.of(sample.rgba[: sample.num_inputs], sample.cameras[: sample.num_inputs])


def parts(views, index=slice(None)):
    return views.rgb[index], views.masks[index], views.cameras[index]


@pytest.mark.parametrize("name", ["sample_000000", "sample_000007"])
def test_no_given_view_gets_worse_and_a_left_out_one_hardly(model, name):
    """Of the tracked examples: each given view, and one that was left out by at most 0.3 dB."""
    _, views = given(ROOT / "data_mouse" / name)
    others, left = [0, 1, 2, 4, 5], [3]
    before = model.reconstruct(*parts(views, others), refine="off").gaussians
    result = model.reconstruct(*parts(views, others), refine=FEW)
    for view in others:
        own = parts(views, [view])
        assert agreement(result.gaussians, *own)["psnr"] > agreement(before, *own)["psnr"]
    asked = parts(views, left)
    assert agreement(result.gaussians, *asked)["psnr"] > agreement(before, *asked)["psnr"] - 0.3
    told = result.record["refinement"]
    assert told["given_after"]["psnr"] > told["given_before"]["psnr"] + 3
    assert result.gaussians.num_gaussians <= MOST_GAUSSIANS and told["anisotropy_p95"] < 100


def test_the_same_seed_gives_the_same_bits(model):
    _, views = given()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for start in ("hull", "stage2"):
        one, two, other = (
            model.reconstruct(*parts(views), refine=10, seed=seed, start=start).gaussians for seed in (0, 0, 1)
        )
        assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values()))
        assert one.num_gaussians != other.num_gaussians or not torch.equal(one.xyz, other.xyz)
    torch.set_num_threads(threads)


def test_the_world_may_lie_anywhere_and_have_any_size(model):
    """Moved and scaled cameras with other lenses give the same animal there; its center is found from the masks."""
    _, views = given()
    shift, scale = torch.tensor([5.0, -3.0, 2.0]), 3.0
    moved = views.cameras.recentre(torch.zeros(3), scale)
    moved = replace(moved, c2w=moved.c2w.clone())
    moved.c2w[:, :3, 3] += shift
    here = model.reconstruct(*parts(views), refine="off", filtered=False)
    there = model.reconstruct(views.rgb, views.masks, moved, refine="off", filtered=False)
    centre = locate(views.masks, views.cameras, "x").centre
    assert torch.allclose(locate(views.masks, moved, "x").centre, centre * scale + shift, atol=0.05 * scale)
    asked = views.rgb, views.masks
    assert (
        agreement(there.gaussians, *asked, moved)["iou"]
        > agreement(here.gaussians, *asked, views.cameras)["iou"] - 0.05
    )
    assert here.to_rig is None and there.to_rig is not None  # the turntable goes round the animal


def off_center(views):
    """The same images cropped unevenly: principal points off the center, no longer square."""
    cropped = replace(views.cameras.crop(10, 20, 100, 90), width=100, height=90)
    return PosedViews(views.rgb[..., 20:110, 10:110], views.masks[..., 20:110, 10:110], cropped)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_views_of_any_number_and_shape_are_taken(model, count):
    _, views = given()
    result = model.reconstruct(*parts(off_center(views), slice(0, count)), refine=5)
    assert result.gaussians.num_gaussians > 500 and result.record["input_views"] == count


def test_images_of_several_sizes_make_one_sample(tmp_path):
    """They are filled up with nothing; without being asked to, a reader refuses them."""
    sample, views = given()
    write_sample(tmp_path / "s", sample)
    path = tmp_path / "s" / "opencv_cameras.json"
    content = json.loads(path.read_text())
    content["frames"][1] |= {"w": 150, "h": 140}
    path.write_text(json.dumps(content))
    image = torch.zeros(4, 140, 150)
    image[:, :128, :128] = sample.rgba[1]
    write_image(tmp_path / "s" / "images" / "cam_001.png", image)
    padded = read_sample(tmp_path / "s", padded=True)
    assert padded.rgba.shape[-2:] == (140, 150) and torch.equal(padded.rgba[0, :, :128, :128], sample.rgba[0])
    assert locate(padded.rgba[:6, 3:], padded.cameras[:6], "x").agreement > 0.9
    with pytest.raises(ValueError, match="one image size"):
        read_sample(tmp_path / "s")


def test_views_are_rectified_exactly():
    """A camera that was turned away sees the rest of the image where the true one did."""
    _, views = given()
    rig, placement = load_rig("mouse6"), locate(views.masks, views.cameras, "x")
    back = rectify(rectify(off_center(views), views.cameras), off_center(views).cameras)
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    assert (back.rgb - off_center(views).rgb)[inner].abs().mean() < 0.01
    known = to_rig(off_center(views), rig, placement, 128)
    assert torch.allclose(known.cameras.distance, torch.tensor(rig.distance), rtol=1e-4)
    assert 0.06 < float((known.masks > 0.5).float().mean()) < 0.12  # as large as training mice


OPENGL = torch.tensor([1.0, -1.0, -1.0, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, c: (m, replace(c, c2w=c.c2w * OPENGL)), "OpenGL axes"),
        (lambda m, c: (m.flip(-1), c), "mirrored"),
        (lambda m, c: (m, c.mirrored()), "mirrored"),
        (lambda m, c: (m, c.recentre(torch.zeros(3), 75.0)), "millimeters"),
        (lambda m, c: (m[:1], c[:1]), "at least 2 posed views"),
        (lambda m, c: (m * torch.tensor([1.0, 1, 0, 1, 1, 1])[:, None, None, None], c), r"views \[2\] show no animal"),
        (lambda m, c: (m, replace(c, c2w=torch.cat([c.c2w[:1] * OPENGL, c.c2w[1:]]))), "another|away"),
    ],
)
def test_what_cannot_be_of_one_animal_is_refused_by_name(change, message):
    _, views = given()
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        locate(*change(views.masks, views.cameras), "here")


def test_gaussians_are_moved_as_cameras_are():
    torch.manual_seed(0)
    gaussians = Gaussians(*(torch.randn(1, 50, *end) for end in ([3], [1, 3], [3], [4], [1])))
    gaussians = replace(gaussians, scaling=gaussians.scaling * 0.3 - 3)
    camera, matrix = Cameras.turntable(3, 32), torch.eye(4)
    matrix[:3, :3] = 2.0 * torch.linalg.qr(torch.randn(3, 3)).Q
    matrix[:3, :3] *= torch.linalg.det(matrix[:3, :3]).sign()
    matrix[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    c2w = matrix @ camera.c2w
    c2w[:, :3, :3] /= 2.0
    rgb, masks = torch.rand(3, 3, 32, 32), torch.ones(3, 1, 32, 32)
    here, there = (
        agreement(g, rgb, masks, c)
        for g, c in ((gaussians, camera), (gaussians.moved(matrix), replace(camera, c2w=c2w)))
    )
    assert there["psnr"] == pytest.approx(here["psnr"], abs=1e-3)


def test_results_stay_within_their_limits():
    many = Gaussians(*(torch.randn(1, 2 * MOST_GAUSSIANS, *end) for end in ([3], [1, 3], [3], [4], [1])))
    assert limit(many).num_gaussians == MOST_GAUSSIANS
    needle = replace(limit(many), scaling=torch.tensor([0.0, -1.0, -3.0]).expand(1, MOST_GAUSSIANS, 3))
    assert anisotropy_p95(needle) == pytest.approx(20.09, abs=0.01)


def test_it_stops_when_nothing_improves():
    """A start that cannot be bettered, since there is nothing to see, ends after two windows."""
    _, views = given()
    start = Gaussians(*(torch.zeros(1, 4, *end) for end in ([3], [1, 3], [3], [4], [1])))
    start = replace(
        start,
        xyz=torch.eye(3)[None, [0, 1, 2, 0]],
        opacity=start.opacity - 30,
        rotation=torch.ones(1, 4, 4),
        scaling=start.scaling - 9,
    )
    seen = []
    refine(start, *parts(views), 300, progress=lambda iterations: (seen.append(i) or i for i in iterations))
    assert len(seen) < 300
