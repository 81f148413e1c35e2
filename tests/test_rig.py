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


def test_facelift6_reproduces_the_released_cameras():
    golden, own = read_cameras(GOLDEN), load_rig("facelift6").cameras(512)
    assert (golden.w2c - own.w2c).abs().max() < 1e-6 * own.w2c.abs().max()
    assert torch.allclose(golden.fxfycxcy, own.fxfycxcy, rtol=1e-7)


def test_facelift6_is_not_made_of_sixty_degree_steps():
    assert [view.azimuth_deg for view in load_rig("facelift6").views] == [0, 45, 90, 180, 270, 315]


def test_every_shipped_rig_loads_and_differs_from_the_others():
    rigs = [load_rig(name) for name in available_rigs()]
    assert {"facelift6", "uniform6", "mouse6", "uniform4", "uniform8"} <= {rig.name for rig in rigs}
    assert len({rig.fingerprint() for rig in rigs}) == len(rigs)
    assert all(rig.focal * 512 == pytest.approx(548.9937744140625) and rig.distance == 2.7 for rig in rigs)


def test_a_rig_survives_json_and_measuring_its_own_cameras():
    rig = load_rig("mouse6")
    assert ViewRig.from_dict(rig.to_dict(), "x") == rig
    assert not rig.differences(ViewRig.from_cameras(rig.cameras(128), "measured"))


def test_unknown_rig_keys_are_refused():
    with pytest.raises(ValueError, match="file.yaml: a view rig has unknown keys .*colour"):
        ViewRig.from_dict({**load_rig("mouse6").to_dict(), "colour": 1}, "file.yaml")


@pytest.mark.parametrize("role", ["embeddings", "unet", "gslrm", "cameras"])
def test_a_mismatch_is_refused_with_both_rigs_and_the_command(role):
    mouse, facelift = load_rig("mouse6"), load_rig("facelift6")
    artifacts = {name: mouse for name in ("embeddings", "unet", "gslrm", "cameras")}
    assert check_alignment(mouse, **artifacts) == mouse
    with pytest.raises(RigMismatchError) as error:
        check_alignment(mouse, **{**artifacts, role: facelift})
    text = str(error.value)
    assert "rig mouse6" in text and "rig facelift6" in text and "to mend:" in text and role in text
    assert any("top-back" in line and "front_left" not in line and " back " in line for line in text.splitlines())


def test_a_rotated_view_order_is_a_mismatch():
    rig = load_rig("mouse6")
    swapped = replace(rig, views=(rig.views[0], rig.views[2], rig.views[1], *rig.views[3:]))
    with pytest.raises(RigMismatchError, match="azimuth of view 1"):
        check_alignment(rig, unet=swapped)


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"distance": 3.0}, "distance"), ({"focal": 2.0}, "focal"), ({"azimuth_zero": "heading"}, "azimuth_zero")],
)
def test_each_part_of_the_geometry_counts(change, expected):
    rig = load_rig("mouse6")
    with pytest.raises(RigMismatchError, match=expected):
        check_alignment(rig, gslrm=replace(rig, **change))


def test_a_wrong_number_of_views_is_refused():
    with pytest.raises(RigMismatchError, match="number of views: 6 against 4"):
        check_alignment(load_rig("mouse6"), embeddings=load_rig("uniform4"))


def test_prompts_name_every_view_and_carry_the_numbers_on_request():
    rig = load_rig("mouse6")
    assert rig.prompts("mouse")[3].startswith("a rendering image of a 3D model, top-back view, from above at an angle")
    assert rig.prompts("mouse", angles=True)[1].endswith("elevation 20 degrees, azimuth 60 degrees")
    assert load_rig("facelift6").prompts()[1] == "a rendering image of 3D models, front_right view, color map."
    with pytest.raises(ValueError, match="prompt style"):
        rig.prompts("poetry")


def test_fill_framing_doubles_distance_and_focal_length():
    fill = load_rig("mouse6").with_framing("fill")
    assert (fill.distance, fill.focal * 512) == (5.4, pytest.approx(2 * 548.9937744140625))
    assert fill.with_framing("exact") == load_rig("mouse6")


def test_a_calibrated_rig_keeps_its_measured_distances():
    cameras = load_rig("mouse6").cameras(64).recentre(torch.tensor([0.1, 0.0, 0.0]), 1.0)
    rig = ViewRig.from_cameras(cameras, "measured")
    assert len({round(rig.view_distance(view), 3) for view in rig.views}) > 1
    assert torch.allclose(rig.cameras(64).origins, cameras.origins, atol=1e-4)


def test_camera_files_are_held_against_the_rig_axes_included():
    rig = load_rig("mouse6")
    cameras = rig.cameras(128)
    check_rig_cameras(rig, cameras, "x.json")
    with pytest.raises(RigMismatchError, match="azimuth of view 1"):
        check_rig_cameras(rig, load_rig("facelift6").cameras(128), "x.json")
    opengl = replace(cameras, c2w=cameras.c2w * torch.tensor([1.0, -1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="OpenGL"):
        check_rig_cameras(rig, opengl, "x.json")


def test_posed_views_are_held_against_distance_and_intrinsics_of_training():
    rig = load_rig("mouse6")
    cameras = rig.cameras(128)
    check_posed_views(rig, cameras.rotate(17.0)[:4], "x.json")
    with pytest.raises(ValueError, match="distance from the origin must be 2.7"):
        check_posed_views(rig, cameras.recentre(torch.zeros(3), 2.0), "x.json")
    with pytest.raises(ValueError, match="focal length over width"):
        check_posed_views(rig, replace(cameras, fxfycxcy=cameras.fxfycxcy * 1.5), "x.json")
    with pytest.raises(ValueError, match="OpenGL"):
        check_posed_views(rig, replace(cameras, c2w=cameras.c2w * torch.tensor([1.0, -1.0, -1.0, 1.0])), "x.json")


def test_duplicate_view_names_are_refused():
    with pytest.raises(ValueError, match="must differ"):
        ViewRig("x", (View("a", 0, 0), View("a", 60, 0)))


def test_views_find_their_mirror_images():
    assert load_rig("mouse6").mirror_order() == [0, 5, 4, 3, 2, 1]
    assert load_rig("facelift6").mirror_order() == [0, 5, 4, 3, 2, 1]
    rig = load_rig("uniform4")
    cameras = rig.cameras(64)
    assert (cameras.mirrored().c2w - cameras[rig.mirror_order()].c2w).abs().max() < 1e-6


def test_a_rig_without_mirror_image_is_refused():
    rig = load_rig("mouse6")
    turned = replace(rig, views=tuple(replace(view, azimuth_deg=view.azimuth_deg + 10) for view in rig.views))
    with pytest.raises(ValueError, match="reference view does not stand at azimuth 0"):
        turned.mirror_order()
    uneven = replace(rig, views=(*rig.views[:5], replace(rig.views[5], azimuth_deg=310)))
    with pytest.raises(ValueError, match="mirror image of top-front-right.*mirror=never"):
        uneven.mirror_order()
