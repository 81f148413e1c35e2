"""scripts/evaluate.py: sweeps (which views, how much noise, which filter), metrics, tables, plots and refusals."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pipeline_tiny import run, write_gslrm
from test_mesh import sphere

from evaluation.methods import NOVEL, OTHER_RIG_VIEWS, RIG_VIEWS, Prediction, measure, splits_of
from evaluation.report import metrics_table, plot, summarise
from evaluation.sweeps import Level, find_world_units_per_mm, plan_sweeps, predict_levels, spread_views
from multiview.cameras import Cameras
from multiview.image import read_rgba
from multiview.rig import load_rig
from multiview.sample import Sample, write_dataset_info, write_sample, write_split

SIZE = 32
RIG = load_rig("mouse6")


def make_sample(num_extra: int) -> Sample:
    """Discs of one colour from the rig's views and `num_extra` others."""
    own = RIG.cameras(SIZE)
    extra = Cameras.orbit(torch.arange(num_extra) * 50.0 + 20, torch.full((num_extra,), 10.0), 2.7, RIG.focal, SIZE)
    cameras = replace(
        own, c2w=torch.cat([own.c2w, extra.c2w]), fxfycxcy=torch.cat([own.fxfycxcy, extra.fxfycxcy])
    )  # fmt: skip
    offset = torch.arange(SIZE) + 0.5 - SIZE / 2
    mask = (offset[:, None].square() + offset[None].square() < 64).float()
    rgba = torch.stack([torch.full_like(mask, x) for x in (0.5, 0.4, 0.3)] + [mask]).expand(len(cameras), -1, -1, -1)
    names = [*RIG.view_names, *[None] * num_extra]
    return Sample(id="s", rgba=rgba.contiguous(), cameras=cameras, view_names=names)


@pytest.fixture
def told():
    """Every PosedViews that Stage 2 was given; its answer is always the same Gaussians."""
    return []


def run_levels(told, sweeps, *, sample=None, name="s", seed=0, stage="2", gaussians=None):
    sample = sample or make_sample(2)

    def predict(views):
        told.append(views)
        return sphere(n=200)

    model = SimpleNamespace(rig=RIG, predict=predict)
    splits = splits_of(stage, sample, RIG)
    return list(predict_levels(model, sample, name, sweeps, splits, seed=seed, gaussians=gaussians))


# ---- which views ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rig", "count", "views"),
    [
        ("mouse6", 1, (0,)), ("mouse6", 2, (0, 3)), ("mouse6", 3, (0, 2, 4)), ("mouse6", 4, (0, 1, 3, 4)),
        ("mouse6", 6, (0, 1, 2, 3, 4, 5)), ("uniform8", 4, (0, 2, 4, 6)),
        ("facelift6", 4, (0, 2, 3, 4)),  # 0, 90, 180, 270 degrees: not even steps of the list
    ],
)  # fmt: skip
def test_input_views_stand_as_far_apart_as_can_be(rig, count, views):
    assert spread_views(load_rig(rig), count) == views


def test_more_views_than_the_rig_has_are_refused():
    with pytest.raises(ValueError, match="num_input_views must be 1 to 6.*mouse6.*7"):
        plan_sweeps({"num_input_views": [7]}, RIG, None)


# ---- how much noise -------------------------------------------------------------------------------------------------


def test_each_sweep_moves_one_factor_alone():
    values = {"camera_noise_deg": [0, 2], "camera_noise_mm": [3], "camera_noise_px": [4], "num_input_views": [2]}
    sweeps = plan_sweeps(values, RIG, 0.01)
    everything = (0, 1, 2, 3, 4, 5)
    assert sweeps["camera_noise_deg"] == [
        Level("camera_noise_deg", 0, everything), Level("camera_noise_deg", 2, everything, rotation_deg=2)
    ]  # fmt: skip
    assert sweeps["camera_noise_mm"] == [Level("camera_noise_mm", 3, everything, translation=pytest.approx(0.03))]
    assert sweeps["camera_noise_px"] == [Level("camera_noise_px", 4, everything, pixels=4)]
    assert sweeps["num_input_views"] == [Level("num_input_views", 2, (0, 3))]


def test_length_of_a_millimetre_comes_from_the_dataset_or_the_user():
    recording = {"source": {"calibration": "new_cam.pkl"}, "world_units_per_calibration_unit": 0.0163}
    assert find_world_units_per_mm(recording, None, "d.json")[0] == 0.0163
    assert find_world_units_per_mm(recording, 0.02, "d.json") == (0.02, "0.02 world units per mm, as given")
    scale, note = find_world_units_per_mm({"source": "synthetic"}, None, "d.json")
    assert scale == pytest.approx(1.2 / 73) and "assumed" in note
    unknown_unit = {"source": {"calibration": "transforms.json"}, "world_units_per_calibration_unit": 1.7}
    with pytest.raises(ValueError, match="transforms.json.*--world_units_per_mm 1.7"):
        find_world_units_per_mm(unknown_unit, None, "d.json")
    with pytest.raises(ValueError, match="d.json.*--world_units_per_mm"):
        find_world_units_per_mm({"rig": {}}, None, "d.json")


# ---- on which cameras -----------------------------------------------------------------------------------------------


def test_the_model_is_told_noisy_cameras_and_the_truth_is_rendered(told):
    sample = make_sample(2)
    (_, clean), (_, noisy) = run_levels(told, plan_sweeps({"camera_noise_deg": [0, 2]}, RIG, None), sample=sample)
    assert torch.equal(told[0].cameras.c2w, sample.cameras.c2w[:6])
    turned = told[1].cameras.c2w[:, :3, :3].mT @ sample.cameras.c2w[:6, :3, :3]
    angle = torch.rad2deg(((turned.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1).acos())
    assert 0.1 < angle.mean() < 6 and torch.equal(told[1].cameras.origins, sample.cameras.origins[:6])
    # The same Gaussians come back, so equal pictures mean equal cameras to render from.
    assert torch.equal(clean[NOVEL].rgb, noisy[NOVEL].rgb) and torch.equal(clean[NOVEL].truth, sample.rgba[6:])


def test_noise_depends_on_seed_sample_and_level_alone(told):
    one = {"camera_noise_px": [1.0]}
    run_levels(told, plan_sweeps(one, RIG, None))
    run_levels(told, plan_sweeps({"camera_noise_deg": [3.0], "camera_noise_px": [0.5, 1.0]}, RIG, None))
    run_levels(told, plan_sweeps(one, RIG, None), seed=1)
    run_levels(told, plan_sweeps(one, RIG, None), name="another")
    first, _, half, again, other_seed, other_sample = (views.cameras.fxfycxcy for views in told)
    assert torch.equal(first, again)
    for other in (half, other_seed, other_sample):
        assert not torch.allclose(first, other)


def test_undisturbed_levels_are_computed_once_and_views_are_chosen(told):
    found = run_levels(told, plan_sweeps({"camera_noise_deg": [0], "num_input_views": [2, 6]}, RIG, None))
    assert [level.value for level, _ in found] == [0, 2, 6]
    assert [len(views.rgb) for views in told] == [6, 2] and found[0][1] is found[2][1]
    assert torch.equal(told[1].cameras.c2w, RIG.cameras(SIZE).c2w[[0, 3]])


def test_without_extra_views_the_rig_views_are_rendered_under_their_own_name(told):
    ((_, predictions),) = run_levels(told, plan_sweeps({"num_input_views": [2]}, RIG, None), sample=make_sample(0))
    assert list(predictions) == [RIG_VIEWS] and len(predictions[RIG_VIEWS].rgb) == 6


def test_filters_act_on_the_undisturbed_gaussians_alone(told):
    sweeps = plan_sweeps({"camera_noise_deg": [0], "min_opacity": [0.04, 0.999999]}, RIG, None)
    (_, plain), (_, mild), (_, bare) = run_levels(told, sweeps)
    assert len(told) == 1 and plain[NOVEL].mask.mean() > 0.01
    assert bare[NOVEL].mask.max() == 0 and torch.equal(bare[NOVEL].rgb, torch.ones_like(bare[NOVEL].rgb))
    assert mild[NOVEL].mask.mean() > 0.01
    made = run_levels(told, plan_sweeps({"max_scaling": [1.0]}, RIG, None), stage="full", gaussians=sphere(n=200))
    assert len(told) == 1 and list(made[0][1]) == [NOVEL, OTHER_RIG_VIEWS]


# ---- numbers, tables, plots -----------------------------------------------------------------------------------------


def test_measures_see_a_perfect_and_a_wrong_prediction():
    truth = make_sample(0).rgba[:2]
    perfect = Prediction(truth[:, :3] * truth[:, 3:] + 1 - truth[:, 3:], truth[:, 3:], truth)
    wrong = replace(perfect, rgb=torch.ones(2, 3, SIZE, SIZE), mask=torch.zeros(2, 1, SIZE, SIZE))
    good, bad = measure(perfect)[0], measure(wrong)[0]
    assert good["foreground_psnr"] > 90 and good["mask_iou"] == 1 and good["ssim"] > 0.999 and "lpips" not in good
    expected = -10 * torch.tensor([0.5**2, 0.6**2, 0.7**2]).mean().log10()
    assert bad["foreground_psnr"] == pytest.approx(expected.item(), abs=1e-4) and bad["mask_iou"] == 0


def test_lpips_is_measured_with_its_network_whole_and_inside_the_mask():
    class Furthest(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.spatial = torch.nn.Parameter(torch.ones(())), False

        def forward(self, a, b):
            difference = self.weight * (a - b).abs().amax(1, keepdim=True)
            return difference if self.spatial else difference.amax((1, 2, 3), keepdim=True)

    truth = make_sample(0).rgba[:2]
    blank = Prediction(torch.ones(2, 3, SIZE, SIZE), truth[:, 3:], truth)
    records = measure(blank, Furthest())  # pictures of -1 to 1 reach the network
    assert [record["lpips"] for record in records] == pytest.approx([2 * (1 - 0.3)] * 2)
    assert [record["foreground_lpips"] for record in records] == pytest.approx([2 * (1 - 0.3)] * 2)


def test_the_worst_is_the_largest_where_smaller_is_better():
    records = [{"psnr": float(i), "lpips": float(i), "sample": "s", "value": i % 2} for i in range(40)]
    summary = summarise(records)
    assert summary["psnr"]["worst_5_percent"] == 1 and summary["lpips"]["worst_5_percent"] == 38
    records = [{**record, "value": float(record["value"])} for record in records]
    lines = metrics_table("t", records, {"value": "noise"}).markdown().splitlines()
    assert len(lines) == 6 and lines[4].startswith("| 0 | 1 | 20 | 19.00 (19.00, 0.00) |")


def test_plots_are_pictures_with_a_line_in_them(tmp_path):
    for name, slope in (("a", 1.0), ("b", 0.0)):
        groups = {v: [{"foreground_psnr": 25 - slope * v, "mask_iou": 0.9 - v / 50}] * 3 for v in (0, 1, 2)}
        plot(tmp_path / f"{name}.png", "title", "noise", {"": groups}, groups, band=True)
    a, b = read_rgba(tmp_path / "a.png"), read_rgba(tmp_path / "b.png")
    assert a.shape[-1] > 500 and not torch.equal(a, b)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A dataset of two samples and a random GS-LRM: (split list, checkpoint)."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name in ("a", "b"):
        write_sample(folder / name, make_sample(2))
    write_split(folder / "val.txt", [folder / "a", folder / "b"])
    write_dataset_info(folder, RIG, source="synthetic")
    return folder / "val.txt", write_gslrm(folder / "gslrm", RIG)


def evaluate(workspace, *arguments):
    data, checkpoint = workspace
    return run("scripts/evaluate.py", "--data", data, "--checkpoint", checkpoint, "--device", "cpu", *arguments)


def test_sweeps_write_tables_plots_and_records(workspace, tmp_path):
    code, out, err = evaluate(
        workspace, "--stage", 2, "--camera_noise_mm", 0, 5, "--num_input_views", 2, 6, "--output_dir", tmp_path
    )  # fmt: skip
    assert code == 0, err
    content = json.loads((tmp_path / "metrics.json").read_text())
    mm = content["sweeps"]["camera_noise_mm"]
    assert [level["value"] for level in mm] == [0, 5] and mm[1]["translation_world_units"] == pytest.approx(6 / 73)
    assert [level["views"] for level in content["sweeps"]["num_input_views"]] == [[0, 3], [0, 1, 2, 3, 4, 5]]
    assert len(content["views"]) == 2 * 2 * (2 + 2)
    chosen = [r["mask_iou"] for r in content["views"] if (r["factor"], r["value"]) == ("camera_noise_mm", 0)]
    assert mm[0]["mask_iou"]["mean"] == pytest.approx(sum(chosen) / 4)
    report = (tmp_path / "table.md").read_text()
    assert "assumed" in report and "2: 0, 3" in report and report in out
    for factor in ("camera_noise_mm", "num_input_views"):
        assert (tmp_path / f"sweep_{factor}.png").is_file() and (tmp_path / f"sheet_{factor}.png").is_file()
    assert not (tmp_path / "sweep_camera_noise_px.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stage", "1", "--camera_noise_deg", "1"], ["--stage", "2", "--camera_noise_px", "-1"],
        ["--stage", "2", "--num_input_views", "0"], ["--stage", "2", "--world_units_per_mm", "0"],
        ["--stage", "full", "--num_input_views", "2"], ["--stage", "1", "--min_opacity", "0.1"],
        ["--stage", "2", "--baselines", "none", "copy"], ["--stage", "2", "--baselines", "oracle"],
    ],
)  # fmt: skip
def test_bad_arguments_end_before_anything_is_loaded(arguments):
    code, _, err = run("scripts/evaluate.py", *arguments)
    assert code == 2 and "usage:" in err


def test_millimetres_of_an_unknown_dataset_are_refused(workspace, tmp_path):
    info = workspace[0].parent / "dataset.json"
    kept = info.read_text()
    info.write_text(json.dumps({"rig": json.loads(kept)["rig"]}))
    try:
        code, _, err = evaluate(workspace, "--stage", 2, "--camera_noise_mm", 1, "--output_dir", tmp_path)
        assert code == 1 and "--world_units_per_mm" in err
    finally:
        info.write_text(kept)
