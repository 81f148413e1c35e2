"""Any dataset is graded; datasets broken on purpose get the reason they were broken for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from multiview.cameras import Cameras
from multiview.rig import load_rig
from multiview.sample import Sample, read_sample, read_split, write_dataset_info, write_sample, write_split
from recording.quality.findings import FAULTS, dataset_findings, grade
from recording.quality.measure import measure_sample, summarise
from recording.quality.report import check_dataset, find_samples
from recording.quality.silhouettes import Views, adjust, disagreement, pairs, rms, rms_per_view

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "data_mouse"
SIZE, COUNT = 64, 6
MOUSE6 = load_rig("mouse6")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    folders = [*read_split(EXAMPLES / "data_mouse_train.txt"), *read_split(EXAMPLES / "data_mouse_val.txt")]
    return [read_sample(folder, image_size=SIZE, num_views=6) for folder in folders[:COUNT]]


def images(change):
    """Returns what makes of a sample one with images changed by `change(view, rgba)`."""
    return lambda sample, _: replace(sample, rgba=torch.stack([change(v, x) for v, x in enumerate(sample.rgba)]))


def order(*views):
    return lambda sample, _: replace(sample, rgba=sample.rgba[list(views)])


def cameras(change, name="c2w"):
    """Returns what makes of a sample one with matrices or intrinsics changed in place by `change(values, cameras)`."""

    def changed(sample, _):
        values = getattr(sample.cameras, name).clone()
        change(values, sample.cameras)
        return replace(sample, cameras=replace(sample.cameras, **{name: values}))

    return changed


def focal(factor: float, views=slice(None)):
    return cameras(lambda values, _: values[views, :2].mul_(factor), "fxfycxcy")


def opengl(views):
    return cameras(lambda c2w, _: c2w[views, :3, 1:3].neg_())


def warped(picture: torch.Tensor, *, zoom: float = 1.0, turn_deg: float = 0.0, move_px=(0.0, 0.0)) -> torch.Tensor:
    """[4, h, w], enlarged, turned clockwise, then moved right and down, as a careless preprocessing would."""
    a = np.radians(turn_deg)
    rows = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) / zoom
    theta = torch.from_numpy(np.column_stack([rows, -rows @ (2 * np.array(move_px) / SIZE)])).float()[None]
    grid = F.affine_grid(theta, (1, 4, SIZE, SIZE), align_corners=False)
    return F.grid_sample(picture[None], grid, align_corners=False)[0]


def blurred(rgba: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.avg_pool2d(F.pad(rgba[None, :3], (2, 2, 2, 2), mode="replicate"), 5, 1)[0], rgba[3:]])


def higher(sample: Sample, _) -> Sample:
    old = sample.cameras
    return replace(sample, cameras=Cameras.orbit(old.azimuth_deg, old.elevation_deg + 8.0, 2.7, MOUSE6.focal, SIZE))


ZOOMS = (1.0, 0.8, 0.9, 0.75, 0.95, 0.7)
TAMPERING = {  # name: (what is done to sample i, the code it must be found under, the views it must name)
    "views swapped": (order(0, 1, 4, 3, 2, 5), "views_swapped", (2, 4)),
    "neighbours swapped": (order(1, 0, 2, 3, 4, 5), "views_swapped", (0, 1)),
    "views reversed": (order(0, 5, 4, 3, 2, 1), "views_reversed", ()),
    "one mirrored": (images(lambda v, x: x.flip(-1) if v == 1 else x), "view_mirrored", (1,)),
    # The mirror image of a regular rig is the rig itself with its views in reverse.
    "all mirrored": (images(lambda v, x: x.flip(-1)), "views_reversed", ()),
    "focal too long": (focal(1.35), "focal", ()),
    "focal too short": (focal(0.8), "focal", ()),
    "one view's focal": (focal(1.2, 3), "view_scale", (3,)),
    "one shifted": (images(lambda v, x: warped(x, move_px=(3.0, -2.0)) if v == 2 else x), "view_shift", (2,)),
    "all crops shifted": (images(lambda v, x: warped(x, move_px=(4.0, 0.0))), "principal_point", ()),
    "one camera off": (cameras(lambda c2w, old: c2w[3].copy_(old[[3]].rotate(5.0).c2w[0])), "camera_off", (3,)),
    "one picture turned": (images(lambda v, x: warped(x, turn_deg=6.0) if v == 4 else x), "view_roll", (4,)),
    "views scaled": (images(lambda v, x: warped(x, zoom=ZOOMS[v])), "views_scaled", ()),
    "every picture scaled": (lambda s, i: images(lambda v, x: warped(x, zoom=ZOOMS[(v * (i % 5 + 1) + i) % 6]))(s, i),
                             "each_scaled", ()),
    "OpenGL axes": (opengl(slice(None)), "opengl_axes", ()),
    "one camera's axes": (opengl(5), "view_looks_away", (5,)),
    "empty masks": (lambda s, i: images(lambda v, x: x * (v != 4 or i % 2 == 0))(s, i), "empty_masks", None),
    "no masks": (lambda s, i: replace(s, rgba=s.rgba.index_fill(1, torch.tensor(3), 1.0)), "no_masks", None),
    "clipped": (images(lambda v, x: warped(x, zoom=2.2)), "clipped", None),
    "millimetres": (lambda s, i: replace(s, cameras=s.cameras.recentre(torch.zeros(3), 1000.0)), "units", None),
    "other animals": (None, "silhouettes_disagree", None),
    "one blurred": (images(lambda v, x: blurred(x) if v == 2 else x), "blur", None),
    "one dark": (images(lambda v, x: torch.cat([0.6 * x[:3], x[3:]]) if v == 1 else x), "exposure", None),
    "another rig": (higher, "directions", None),
}  # fmt: skip


def findings_of(samples: list[Sample], rig=MOUSE6, hulls: bool = False):
    summary, diagnosis = summarise([measure_sample(sample, hulls=hulls) for sample in samples], rig)
    return summary, diagnosis, dataset_findings(summary, diagnosis, rig, {}, [])


def test_true_views_are_good(samples):
    summary, diagnosis, findings = findings_of(samples, hulls=True)
    assert grade(findings)["grade"] == "good" and not findings
    assert diagnosis.agrees and diagnosis.rms < 0.003 and not diagnosis.faults  # 0.2 px of 64
    assert 0.7 < summary["silhouette_iou_mean"] < 1.0 and summary["silhouette_filled_mean"] > 0.95


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_found_under_its_name(samples, name):
    change, code, views = TAMPERING[name]
    if name == "other animals":
        others = samples[2:] + samples[:2]
        broken = [replace(s, rgba=torch.cat([s.rgba[:3], o.rgba[3:]])) for s, o in zip(samples, others, strict=True)]
    else:
        broken = [change(sample, index) for index, sample in enumerate(samples)]
    _, diagnosis, findings = findings_of(broken)
    found = {finding.code: finding for finding in findings}
    assert code in found, (name, findings, diagnosis.faults)
    assert grade(findings)["grade"] in ("poor", "usable") and found[code].remedy
    if code in FAULTS:
        assert diagnosis.faults[0].code == code and diagnosis.faults[0].views == views
        assert diagnosis.explained and diagnosis.left < 0.5 * diagnosis.rms
        assert grade(findings)["grade"] == "poor"
    if name in ("one blurred", "one dark"):
        assert "top-" in found[code].what and diagnosis.agrees


def test_silhouettes_of_a_cyclic_shift_agree_but_not_of_the_wrong_direction(samples):
    """The whole animal turned by one view's step is another true animal: nothing to find, as it should be."""
    _, diagnosis, _ = findings_of([order(5, 0, 1, 2, 3, 4)(sample, 0) for sample in samples])
    assert diagnosis.agrees


def test_tangents_of_points_seen_by_true_cameras_coincide():
    """Exact outlines (projected points of a solid) leave nothing but rounding; a moved camera does not."""
    solid = np.random.default_rng(0).normal(size=(400, 3)) * [0.5, 0.2, 0.2]
    rig = MOUSE6.cameras(100)
    points = rig.project(torch.from_numpy(solid).float().expand(6, -1, -1))[0].double().numpy()[None] / 100
    views = Views(points, rig.fxfycxcy.double().numpy()[None] / 100, rig.w2c.double().numpy()[None])
    assert rms(disagreement(views)) < 1e-6
    gaps = disagreement(adjust(views, azimuth=np.radians([0, 0, 0, 1, 0, 0]), elevation=0.0))
    own = np.array([3 in pair for pair in pairs(6)])
    assert rms(gaps) > 5e-4 and rms(gaps[:, ~own]) < 1e-6 and int(np.argmax(rms_per_view(gaps, 6))) == 3
    points[0, 3] = np.nan  # a view without a mask has no tangents
    assert (np.isnan(disagreement(views))[0].all(axis=1) == own).all()


@pytest.fixture
def folder(samples, tmp_path) -> Path:
    """FaceLift's way: sample folders, no dataset.json, no view names."""
    for sample in samples[:3]:
        write_sample(tmp_path / "data" / sample.id, replace(sample, view_names=[None] * 6, extra={}))
    return tmp_path / "data"


def test_folder_without_rig_is_measured_and_described(folder, tmp_path):
    report = check_dataset(folder, tmp_path / "report", workers=2)
    assert report["grade"] == "good" and report["rig"] is None
    assert [round(view["azimuth_deg"]) for view in report["measured_rig"]["views"]] == [0, 60, 120, 180, 240, 300]
    page = (tmp_path / "report" / "quality_report.html").read_text()
    assert page.count("<img") == 3 and "<svg" in page and "http" not in page.replace("http://www.w3.org", "")
    assert json.loads((tmp_path / "report" / "quality_report.json").read_text()) == json.loads(json.dumps(report))
    assert 0.7 < report["silhouette_iou_mean"] < 1.0 and str(tmp_path) not in page
    assert check_dataset(folder, tmp_path / "again", workers=1) == report  # whatever the number of workers


def test_lists_of_facelifts_style_are_followed_and_noted(folder, tmp_path):
    names = sorted(path.name for path in folder.iterdir())
    listed = folder.parent / "facelift.txt"
    listed.write_text("".join(f"{folder / name}/opencv_cameras.json\n" for name in names))
    folders, _, notes = find_samples(listed)
    assert [path.name for path in folders] == names and notes == ["absolute_paths", "camera_files"]
    report = check_dataset(listed, tmp_path / "report", num_samples=2, workers=1)
    assert report["grade"] == "usable" and report["num_samples"] == 2 and report["findings"][0]["code"] == "list_style"
    listed.write_text("/nowhere/sample_000000\n")
    (folder.parent / "empty").mkdir()
    for data, message in (
        (listed, "facelift.txt names 1 of 1 sample folders that are not there"),
        (folder.parent / "empty", "holds no sample folder"), (folder.parent / "absent", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            find_samples(data)
    write_split(folder / "data_mouse_train.txt", [folder / names[0]])
    assert find_samples(folder / "data_mouse_train.txt")[2] == []


def test_unreadable_samples_are_reported_by_name(folder, tmp_path):
    broken = sorted(path for path in folder.iterdir())[1]
    (broken / "images" / "cam_002.png").write_bytes(b"not a picture")
    report = check_dataset(folder, tmp_path / "report", workers=1)
    assert report["grade"] == "poor" and report["findings"][0]["code"] == "unreadable"
    assert list(report["unreadable"]) == [broken.name] and "cam_002.png" in report["unreadable"][broken.name]
    for path in folder.glob("*/opencv_cameras.json"):
        path.write_text("{")
    with pytest.raises(ValueError, match="none of the 3 samples"):
        check_dataset(folder, tmp_path / "report", workers=1)


def test_stated_rig_is_compared_with_the_cameras(folder, tmp_path):
    for name, expected in (("facelift6", True), ("mouse6", False)):
        write_dataset_info(folder, load_rig(name))
        report = check_dataset(folder, tmp_path / name, num_samples=1, workers=1)
        assert ("directions" in {finding["code"] for finding in report["findings"]}) == expected


def test_command_line_prints_the_grade_and_fails_below(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import check_dataset as script

    arguments = ["--data", str(folder), "--workers", "1", "--output_dir", str(tmp_path / "r"), "--num_samples", "2"]
    script.main([*arguments, "--rig", "mouse6"])
    assert "quality: good" in capsys.readouterr().out
    for path in folder.glob("*/images/cam_001.png"):
        shutil.copy(path.with_name("cam_004.png"), path)
    with pytest.raises(ValueError, match="the dataset is poor, --fail_below good"):
        script.main([*arguments, "--fail_below", "good"])
    assert "quality: poor" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main([*arguments, "--num_views", "0"])
