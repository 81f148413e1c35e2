"""The view rig and the refusal of mismatches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from multiview.cameras import read_cameras
from multiview.rig import (
    RigMismatchError,
    View,
    ViewRig,
    available_rigs,
    check_alignment,
    check_posed_views,
    check_rig_cameras,
    load_rig,
)

GOLDEN = Path(__file__).parent / "golden" / "cameras" / "facelift6_opencv_cameras.json"
RIG = load_rig("mouse6")
CAMERAS = RIG.cameras(128)
OPENGL = replace(CAMERAS, c2w=CAMERAS.c2w * torch.tensor([1.0, -1.0, -1.0, 1.0]))


def test_facelift6_reproduces_the_released_cameras():
    golden, rig = read_cameras(GOLDEN), load_rig("facelift6")
    own = rig.cameras(512)
    assert (golden.w2c - own.w2c).abs().max() < 1e-6 * own.w2c.abs().max()
    assert torch.allclose(golden.fxfycxcy, own.fxfycxcy, rtol=1e-7)
    assert [view.azimuth_deg for view in rig.views] == [0, 45, 90, 180, 270, 315]  # not steps of sixty degrees


def test_every_shipped_rig_loads_and_differs_from_the_others():
    rigs = [load_rig(name) for name in available_rigs()]
    assert {"facelift6", "uniform6", "mouse6", "uniform4", "uniform8"} <= {rig.name for rig in rigs}
    assert len({rig.fingerprint() for rig in rigs}) == len(rigs)
    assert all(rig.focal * 512 == pytest.approx(548.9937744140625) and rig.distance == 2.7 for rig in rigs)


def test_a_rig_survives_json_and_measuring_its_own_cameras():
    assert ViewRig.from_dict(RIG.to_dict(), "x") == RIG
    assert not RIG.differences(ViewRig.from_cameras(CAMERAS, "measured"))
    moved = RIG.cameras(64).recentre(torch.tensor([0.1, 0.0, 0.0]), 1.0)
    measured = ViewRig.from_cameras(moved, "measured")  # a calibrated rig keeps its distances
    assert len({round(measured.view_distance(view), 3) for view in measured.views}) > 1
    assert torch.allclose(measured.cameras(64).origins, moved.origins, atol=1e-4)


@pytest.mark.parametrize("role", ["embeddings", "unet", "gslrm", "cameras"])
def test_a_mismatch_is_refused_with_both_rigs_and_the_command(role):
    artifacts = {name: RIG for name in ("embeddings", "unet", "gslrm", "cameras")}
    assert check_alignment(RIG, **artifacts) == RIG
    with pytest.raises(RigMismatchError) as error:
        check_alignment(RIG, **{**artifacts, role: load_rig("facelift6")})
    text = str(error.value)
    assert "rig mouse6" in text and "rig facelift6" in text and "to mend:" in text and role in text
    assert any("top-back" in line and "front_left" not in line and " back " in line for line in text.splitlines())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"distance": 3.0}, "distance"), ({"focal": 2.0}, "focal"), ({"azimuth_zero": "heading"}, "azimuth_zero"),
        ({"views": (RIG.views[0], RIG.views[2], RIG.views[1], *RIG.views[3:])}, "azimuth of view 1"),
    ],
)  # fmt: skip
def test_each_part_of_the_geometry_counts(change, expected):
    with pytest.raises(RigMismatchError, match=expected):
        check_alignment(RIG, gslrm=replace(RIG, **change))


def test_a_wrong_number_of_views_is_refused():
    with pytest.raises(RigMismatchError, match="number of views: 6 against 4"):
        check_alignment(RIG, embeddings=load_rig("uniform4"))


def test_prompts_name_every_view_and_carry_the_numbers_on_request():
    assert RIG.prompts("mouse")[3].startswith("a rendering image of a 3D model, top-back view, from above at an angle")
    assert RIG.prompts("mouse", angles=True)[1].endswith("elevation 20 degrees, azimuth 60 degrees")
    assert load_rig("facelift6").prompts()[1] == "a rendering image of 3D models, front_right view, color map."


def test_fill_framing_doubles_distance_and_focal_length():
    fill = RIG.with_framing("fill")
    assert (fill.distance, fill.focal * 512) == (5.4, pytest.approx(2 * 548.9937744140625))
    assert fill.with_framing("exact") == RIG


def test_cameras_are_held_against_the_rig_axes_included():
    check_rig_cameras(RIG, CAMERAS, "x.json")
    check_posed_views(RIG, CAMERAS.rotate(17.0)[:4], "x.json")
    for check, cameras, message in (
        (check_rig_cameras, load_rig("facelift6").cameras(128), "azimuth of view 1"),
        (check_rig_cameras, OPENGL, "OpenGL"),
        (check_posed_views, CAMERAS.recentre(torch.zeros(3), 2.0), "distance from the origin must be 2.7"),
        (check_posed_views, replace(CAMERAS, fxfycxcy=CAMERAS.fxfycxcy * 1.5), "focal length over width"),
        (check_posed_views, OPENGL, "OpenGL"),
    ):
        with pytest.raises(ValueError, match=message):
            check(RIG, cameras, "x.json")


def test_rigs_that_cannot_be_are_refused():
    for make, message in (
        (lambda: ViewRig.from_dict({**RIG.to_dict(), "colour": 1}, "file.yaml"), "file.yaml: .* unknown keys .*colour"),
        (lambda: ViewRig("x", (View("a", 0, 0), View("a", 60, 0))), "must differ"),
        (lambda: RIG.prompts("poetry"), "prompt style"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
