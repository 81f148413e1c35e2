"""scripts/evaluate.py: what is compared with what, baselines, metrics, sweeps, the report and its pages, refusals."""

import json
import math
import mmap
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pipeline_tiny import must, run, write_gslrm
from test_mesh import sphere

from evaluation import BASELINES, methods
from evaluation import evaluate as evaluating
from evaluation.methods import COPY, DIRECTIONS, NOVEL, OTHER_RIG_VIEWS, RIG_VIEWS, Prediction, measure, splits_of
from evaluation.report import Report, margins, metrics_table, summarise
from evaluation.sweeps import find_world_units_per_mm, plan_sweeps, predict_levels, spread_views
from multiview.cameras import Cameras
from multiview.image import composite, read_rgba
from multiview.rig import RigMismatchError, load_rig
from multiview.sample import Sample, write_dataset_info, write_sample, write_split
from pipeline.outputs import PosedViews

CPU, SIZE, RIG = torch.device("cpu"), 48, load_rig("mouse6")


def ball(num_extra: int = 2, radius: float = 0.4, colour=(0.6, 0.3, 0.2), with_depth: bool = True) -> Sample:
    """A ball of one colour at the origin from the rig's views and `num_extra` others, with exact masks and depth."""
    azimuth, elevation = torch.arange(num_extra) * 100.0 + 30, torch.full((num_extra,), 10.0)
    own, extra = RIG.cameras(SIZE), Cameras.orbit(azimuth, elevation, RIG.distance, RIG.focal, SIZE)
    cameras = Cameras(torch.cat([own.c2w, extra.c2w]), torch.cat([own.fxfycxcy, extra.fxfycxcy]), SIZE, SIZE)
    origins, directions = cameras.rays()
    along = -(origins * directions).sum(-1)
    gap = radius**2 - ((origins + along[..., None] * directions).square().sum(-1))
    mask = (gap > 0).float()[:, None]
    forward = cameras.c2w[:, None, None, :3, 2]
    depth = ((along - gap.clamp_min(0).sqrt()) * (directions * forward).sum(-1))[:, None] * mask
    rgb = torch.tensor(colour)[:, None, None].expand(len(cameras), 3, SIZE, SIZE)
    names = [*RIG.view_names, *[None] * num_extra]
    return Sample("ball", torch.cat([rgb, mask], dim=1), cameras, names, depth if with_depth else None)


def dataset(folder: Path, samples: dict[str, Sample], **info) -> Path:
    for name, sample in samples.items():
        write_sample(folder / name, sample)
    write_split(folder / "list.txt", [folder / name for name in samples])
    write_dataset_info(folder, RIG, **info)
    return folder / "list.txt"


def truth(sample: Sample, views: list[int]) -> Prediction:
    return Prediction(views, composite(sample.rgba[views], 1.0), sample.rgba[views, 3:], sample.depth[views])


# ---- what is compared, and how it is measured -----------------------------------------------------------------------


def test_views_compared_were_never_inputs():
    sample = ball(2)
    assert splits_of("1", sample, RIG) == {OTHER_RIG_VIEWS: [1, 2, 3, 4, 5]}
    assert splits_of("2", sample, RIG) == {NOVEL: [6, 7]}
    assert list(splits_of("full", sample, RIG).items()) == [(NOVEL, [6, 7]), (OTHER_RIG_VIEWS, [1, 2, 3, 4, 5])]
    assert splits_of("2", ball(0), RIG) == {RIG_VIEWS: [0, 1, 2, 3, 4, 5]}  # a recording: its name says so
    assert splits_of("full", ball(0), RIG) == {OTHER_RIG_VIEWS: [1, 2, 3, 4, 5]}


def test_directions_are_angles_from_the_input_view_and_the_side_shown_follows_from_the_nose():
    near, side, back = DIRECTIONS
    sample, angles = ball(0), {}
    for reference in (0, 2):
        predictions, splits = {"m": truth(sample, list(range(6)))}, {"all": range(6)}
        records = methods.records_of({}, predictions, sample, splits, reference, None)
        angles[reference] = [record["angle_deg"] for record in records]
    assert angles == {0: [0, 60, 120, 180, 120, 60], 2: [120, 60, 0, 60, 120, 180]}
    assert [record["direction"] for record in records] == [side, near, near, near, side, back]
    assert methods.kind_of(sample, 0) == {}
    for reference, heading, shown in (
        (0, 350.0, "the head"), (0, 80.0, "its left side"), (0, 200.0, "the hindquarters"), (2, 120.0, "the head"),
        (0, 300.0, "its right side"), (3, 90.0, "its right side"), (3, 0.0, "the hindquarters"),
    ):  # fmt: skip
        heading = replace(sample, extra={"synthetic": {"heading_deg": heading, "pose": "rear"}})
        assert methods.kind_of(heading, reference) == {"input_shows": shown, "pose": "rear"}


def test_measures_see_a_perfect_and_a_wrong_prediction():
    sample = ball(0)
    perfect = truth(sample, [0, 1])
    good = measure(perfect, sample)[0]
    assert good["foreground_psnr"] > 90 and good["mask_iou"] == 1 and good["ssim"] > 0.999 and "lpips" not in good
    blank = perfect._replace(rgb=torch.ones(2, 3, SIZE, SIZE), mask=torch.zeros(2, 1, SIZE, SIZE))
    bad, expected = measure(blank, sample)[0], -10 * torch.tensor([0.4**2, 0.7**2, 0.8**2]).mean().log10()
    assert bad["foreground_psnr"] == pytest.approx(expected.item(), abs=1e-4) and bad["mask_iou"] == 0
    # Depth: the mean over what both show.
    nearer = perfect._replace(depth=(perfect.depth - 0.05) * (perfect.depth > 0))
    half = perfect.mask.clone()
    half[..., : SIZE // 2] = 0
    elsewhere = nearer._replace(mask=half, depth=torch.where(half > 0, nearer.depth, 9.0))
    assert good["depth_error"] == 0 and measure(nearer, sample)[1]["depth_error"] == pytest.approx(0.05, abs=1e-5)
    assert measure(elsewhere, sample)[0]["depth_error"] == pytest.approx(0.05, abs=1e-5)  # not the 9 outside its mask
    assert "depth_error" not in bad and not any(map(math.isnan, bad.values()))
    assert "depth_error" not in measure(perfect, ball(0, with_depth=False))[0]


def test_lpips_is_measured_with_its_network_whole_and_inside_the_mask():
    class Furthest(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.spatial = torch.nn.Parameter(torch.ones(())), False

        def forward(self, a, b):
            difference = self.weight * (a - b).abs().amax(1, keepdim=True)
            return difference if self.spatial else difference.amax((1, 2, 3), keepdim=True)

    blank = truth(ball(0), [0, 1])._replace(rgb=torch.ones(2, 3, SIZE, SIZE))
    for record in measure(blank, ball(0), Furthest()):  # images of -1 to 1 reach the network
        assert [record["lpips"], record["foreground_lpips"]] == pytest.approx([2 * (1 - 0.2)] * 2)


def test_consistency_of_true_views_is_the_measure_of_painted_ones():
    sample = ball(0)
    rgb = composite(sample.rgba, 1.0)
    broken = rgb.roll(9, dims=-1)
    broken[0] = rgb[0]
    views = PosedViews(broken, sample.rgba[:, 3:], sample.cameras)
    found = methods.consistency_of(views, sample, RIG, with_copy=True)
    assert found["true views"]["of_truth"] == 1 and found["true views"]["score"] > 0.97
    assert found["painted views"]["of_truth"] < 0.9  # although the masks that came with them are the true ones
    true = methods.consistency_of(replace(views, rgb=rgb), sample, RIG, with_copy=False)
    assert true["painted views"]["of_truth"] == 1
    assert set(found) == {"painted views", "true views", "input copied"}


# ---- baselines ------------------------------------------------------------------------------------------------------


def baselines(stage: str, sample: Sample, *names: str, training: methods.TrainingMice | None = None):
    views = PosedViews.of(sample.rgba[:6], sample.cameras[:6])
    model = SimpleNamespace(rig=RIG, predict=lambda views: "gaussians")
    generated = None if stage == "2" else views
    return methods.predict_baselines(stage, names, sample, model, generated=generated, training=training)


def test_copied_input_is_the_input_everywhere():
    sample = ball(1)
    found = baselines("full", sample, "copy")[0][COPY]
    assert found.views == [6, 1, 2, 3, 4, 5] and len(found.rgb) == 6
    assert all(torch.equal(rgb, composite(sample.rgba[0], 1.0)) for rgb in found.rgb)
    assert baselines("2", ball(0), "copy")[0][COPY].views == [1, 2, 3, 4, 5]  # the input itself would be perfect


def test_hull_of_a_ball_is_the_ball_and_disagreeing_masks_leave_nothing():
    sample = ball(2)
    views = PosedViews.of(sample.rgba[:6], sample.cameras[:6])
    record = measure(methods.predict_hull(views, sample, [6, 7]), sample)[0]
    assert record["mask_iou"] > 0.85 and record["foreground_psnr"] > 25 and record["depth_error"] < 0.1
    apart = replace(views, masks=torch.zeros_like(views.masks))
    apart.masks[::2, :, :5, :5], apart.masks[1::2, :, -5:, -5:] = 1, 1
    empty = methods.predict_hull(apart, sample, [6, 7])
    assert empty.rgb.min() == 1 and empty.rgb.shape == (2, 3, SIZE, SIZE)
    assert empty.mask.max() == 0 and empty.depth.max() == 0


def test_nearest_training_mouse_is_like_the_input_and_held_out(tmp_path):
    mice = {"small": ball(0, 0.3), "grey": ball(0, 0.4, (0.5, 0.5, 0.5)), "like": ball(0, 0.41, (0.6, 0.32, 0.2))}
    listed, sample = dataset(tmp_path / "train", mice), ball(1)
    found = methods.TrainingMice(listed, RIG, [tmp_path / "test" / "small"]).predict(sample, [6, 1, 2, 3, 4, 5])
    shown = composite(mice["like"].rgba[3], 1.0)  # PNG: steps of 1/255
    assert found.views == [6, 1, 2, 3, 4, 5] and torch.allclose(found.rgb[3], shown, atol=0.003)
    novel, *others = measure(found, sample)
    assert novel["mask_iou"] > 0.8 and "depth_error" in novel and not any("depth_error" in one for one in others)
    with pytest.raises(ValueError, match="share 1 samples.*grey.*not held out"):
        methods.TrainingMice(listed, RIG, [tmp_path / "train" / "grey"])
    with pytest.raises(RigMismatchError):
        methods.TrainingMice(listed, load_rig("facelift6"), [])


@pytest.mark.parametrize(("stage", "count"), [("1", 3), ("2", 3), ("full", 5)])
def test_baselines_say_what_they_were_given_and_keep_to_unseen_views(stage, count, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "predict_gaussians", lambda gaussians, _, views: Prediction(views, 0, 0))
    monkeypatch.setattr(methods, "autoencoded", lambda model, images: images)
    training = methods.TrainingMice(dataset(tmp_path, {"a": ball(0)}), RIG, [])
    found, told = baselines(stage, ball(1), *BASELINES, training=training)
    assert list(found) == list(told) and len(found) == count and all(told.values())
    for label, prediction in found.items():
        if label.startswith("upper bound") and stage == "full":  # given the true rig views: those are no test of it
            assert prediction.views == [6]
    assert baselines(stage, ball(1), "none", training=training) == ({}, {})


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def run_levels(told: list, values: dict, *, sample=None, name="s", seed=0, views=(6, 7), gaussians=None):
    """Predictions by level; `told` receives the PosedViews that Stage 2 was given, whose answer is always the same."""
    model = SimpleNamespace(rig=RIG, predict=lambda views: told.append(views) or sphere(n=200))
    levels, sample = plan_sweeps(values, RIG, 0.01), sample or ball(2)
    made = predict_levels(model, sample, name, levels, list(views), seed=seed, gaussians=gaussians)
    return [prediction for _, prediction in made]


@pytest.mark.parametrize(
    ("rig", "count", "views"),
    [
        ("mouse6", 1, [0]), ("mouse6", 2, [0, 3]), ("mouse6", 3, [0, 2, 4]), ("mouse6", 4, [0, 1, 3, 4]),
        ("mouse6", 6, [0, 1, 2, 3, 4, 5]), ("uniform8", 4, [0, 2, 4, 6]),
        ("facelift6", 4, [0, 2, 3, 4]),  # 0, 90, 180, 270 degrees: not even steps of the list
    ],
)  # fmt: skip
def test_input_views_stand_as_far_apart_as_can_be(rig, count, views):
    assert spread_views(load_rig(rig), count) == views


def test_each_sweep_moves_one_factor_alone():
    values = {
        "camera_noise_deg": [0, 2], "camera_noise_mm": [3], "camera_noise_px": [4], "num_input_views": [2],
        "min_opacity": [], "max_scaling": [0.1],
    }  # fmt: skip
    levels = plan_sweeps(values, RIG, 0.01)
    best = {**levels[0], "value": None, "factor": None}
    moved = [{key: level[key] for key in best if level[key] != best[key]} for level in levels]
    assert best["views"] == [0, 1, 2, 3, 4, 5] and best["filters"] is None
    assert moved.pop()["filters"]["max_scaling"] == 0.1 and moved == [
        {"factor": "camera_noise_deg", "value": 0},
        {"factor": "camera_noise_deg", "value": 2, "rotation_deg": 2},
        {"factor": "camera_noise_mm", "value": 3, "translation_world_units": pytest.approx(0.03)},
        {"factor": "camera_noise_px", "value": 4, "pixels": 4},
        {"factor": "num_input_views", "value": 2, "views": [0, 3]},
    ]
    with pytest.raises(ValueError, match="num_input_views must be 1 to 6.*mouse6.*7"):
        plan_sweeps({"num_input_views": [7]}, RIG, None)


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


def test_the_model_is_told_noisy_cameras_and_the_truth_is_rendered():
    told, sample = [], ball(2)
    clean, noisy = run_levels(told, {"camera_noise_deg": [0, 2]}, sample=sample)
    assert torch.equal(told[0].cameras.c2w, sample.cameras.c2w[:6])
    turned = told[1].cameras.c2w[:, :3, :3].mT @ sample.cameras.c2w[:6, :3, :3]
    angle = torch.rad2deg(((turned.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1).acos())
    assert 0.1 < angle.mean() < 6 and torch.equal(told[1].cameras.origins, sample.cameras.origins[:6])
    assert torch.equal(clean.rgb, noisy.rgb)  # the same Gaussians come back: rendered from equal cameras


def test_noise_depends_on_seed_sample_and_level_alone():
    told, one = [], {"camera_noise_px": [1.0]}
    for values, keys in (
        (one, {}), ({"camera_noise_deg": [3.0], "camera_noise_px": [0.5, 1.0]}, {}), (one, {"seed": 1}),
        (one, {"name": "another"}),
    ):  # fmt: skip
        run_levels(told, values, **keys)
    first, _, half, again, other_seed, other_sample = (views.cameras.fxfycxcy for views in told)
    assert torch.equal(first, again)
    assert not any(torch.allclose(first, other) for other in (half, other_seed, other_sample))


def test_undisturbed_levels_are_computed_once_and_filters_act_on_their_gaussians():
    told = []
    clean, two, six = run_levels(told, {"camera_noise_deg": [0], "num_input_views": [2, 6]})
    assert [len(views.rgb) for views in told] == [6, 2] and clean is six and two is not six
    assert torch.equal(told[1].cameras.c2w, RIG.cameras(SIZE).c2w[[0, 3]])
    plain, mild, bare = run_levels(told, {"camera_noise_deg": [0], "min_opacity": [0.04, 0.999999]})
    assert len(told) == 3 and min(plain.mask.mean(), mild.mask.mean()) > 0.01
    assert bare.mask.max() == 0 and torch.equal(bare.rgb, torch.ones_like(bare.rgb))
    run_levels(told, {"max_scaling": [1.0]}, gaussians=sphere(n=200))  # made by both stages already
    assert len(told) == 3


# ---- the report -----------------------------------------------------------------------------------------------------


def records(method: str, quality: float, split: str = NOVEL) -> list[dict]:
    return [
        {
            "sample": f"m{i}", "method": method, "split": split, "view": 6, "angle_deg": 45.0 * i,
            "direction": list(DIRECTIONS)[min(2, (45 * i) // 61)], "foreground_psnr": quality + i % 2,
            "mask_iou": quality / 40,
        }
        for i in range(4)
    ]  # fmt: skip


def test_the_worst_is_the_largest_where_smaller_is_better():
    records = [{"psnr": i, "lpips": i, "sample": "s", "view": i, "value": float(i % 2)} for i in range(40)]
    summary = summarise(records)
    assert summary["psnr"]["worst_5_percent"] == 1 and summary["lpips"]["worst_5_percent"] == 38
    lines = metrics_table("t", records, {"value": "noise"}).markdown().splitlines()
    assert len(lines) == 6 and lines[4].startswith("| 0 | 1 | 20 | 19.00 (19.00, 0.00) |")


def test_margins_are_taken_mouse_by_mouse():
    mixed = records("Stage 2", 20.0) + records("low", 18.0) + records("other split", 30.0, RIG_VIEWS)
    mixed += [{**record, "foreground_psnr": 20.5} for record in records("even", 0.0)]
    low, even = margins(mixed, "Stage 2")[NOVEL]
    assert low["method"] == "low" and low["foreground_psnr"]["mean"] == pytest.approx(2)
    assert low["foreground_psnr"]["standard_error"] == pytest.approx(0) and low["mask_iou"]["better_share"] == 1
    assert even["foreground_psnr"]["mean"] == pytest.approx(0) and even["foreground_psnr"]["better_share"] == 0.5
    assert even["foreground_psnr"]["standard_error"] == pytest.approx(math.sqrt(1 / 3) / 2)


def test_report_keeps_the_first_and_the_worst():
    album = Report("2", 60)
    for i in range(60):
        album.show(f"m{i}", float((i * 7) % 60), torch.full((2, 3, 3, 4, 4), i / 255))
    assert [name for _, name, _ in album.worst] == ["m0", "m43", "m26"]  # 5 % of 60; 7 i = 0, 1, 2 modulo 60
    assert len(album.first) == 8 and album.first[3].unique().tolist() == [3]


def test_report_of_a_run_is_complete_and_self_contained(tmp_path):
    report = Report("2", 4, rows="truth, <Stage 2>", records=records("Stage 2", 20.0) + records("hull", 18.0))
    report.assets = [{"sample": f"m{i}", "seconds": float(i)} for i in range(4)]
    report.show("m0", 20.0, torch.zeros(2, 2, 3, 8, 8))
    report.show("m1", 21.0, torch.zeros(2, 3, 3, 8, 8))
    report.told = {"hull": "true views", "none": "is not measured"}
    report.notes = ["A note with <tags>."]
    text = report.write(tmp_path, {"stage": "2"}, {"data": "list.txt"})
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["method"] for row in content["summary"]] == ["Stage 2", "hull"] and content["cost"]["seconds"]
    assert content["baselines"] == {"hull": "true views"} and content["worst"][0]["sample"] == "m0"
    assert sum(row["views"] for row in content["by_direction"] if row["method"] == "hull") == 4
    assert "what the input view shows" not in text  # nobody said
    assert text == (tmp_path / "table.md").read_text() and "| novel views | hull | 4 | 4 | 18.50" in text
    report.records = [{**record, "input_shows": "the head", "pose": "walk"} for record in report.records]
    assert "| novel views | hull | 18.50 / 0.450 (4) | - (0) |" in report.tables()[-3].markdown()
    assert "| views compared | method | walk |" in report.tables()[-2].markdown()
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/") == 3 and "18.50 (18.50, 18.00)" in page
    assert "<tags>" not in page and "<Stage 2>" not in page and not re.search(r"(src|href)='(?!data:)", page)
    plotted = read_rgba(tmp_path / "directions.png")
    assert plotted.shape[-1] > 500 and plotted.unique().numel() > 10 and (tmp_path / "worst.png").is_file()
    sheet = read_rgba(tmp_path / "sheet.png")[0]
    assert sheet.shape == (32, 24) and (sheet == 1).nonzero().min(0).values.tolist() == [0, 16]  # two rows per mouse


def test_cost_sees_time_and_memory(monkeypatch):
    size = 40 * 2**20
    with evaluating.measure_cost(CPU) as cost:
        held = mmap.mmap(-1, size)  # straight from the kernel: what malloc is given back may stay with the process
        held.write(b"1" * size)
    with evaluating.measure_cost(CPU) as less:
        held.close()
    assert cost["seconds"] > 0 and less["peak_memory_mib"] > 40
    with evaluating.measure_cost(CPU) as later:
        pass
    assert later["peak_memory_mib"] < less["peak_memory_mib"] - 30  # the mark is reset, not the process's highest ever
    monkeypatch.setattr(evaluating, "reset_peak", lambda: False)
    with evaluating.measure_cost(CPU) as unknown:
        pass
    assert list(unknown) == ["seconds"]


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The command on two samples and a random GS-LRM, up to its stage."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = dataset(folder, {"a": ball(2), "b": ball(2, 0.3)}, source="synthetic")
    checkpoint = write_gslrm(folder / "gslrm", RIG)
    return ["scripts/evaluate.py", "--data", data, "--checkpoint", checkpoint, "--device", "cpu", "--stage", 2]


def test_stage_2_with_every_baseline_from_the_command_line(flags, tmp_path):
    train = dataset(tmp_path / "train", {"c": ball(0, 0.35)})
    must(*flags, "--train_data", train, "--output_dir", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(content["baselines"]) == 3 and len(content["assets"]) == 2
    shown = {record["method"] for record in content["views"]}
    assert shown == {"Stage 2", *content["baselines"]} and len(content["views"]) == 2 * 2 * len(shown)
    assert "depth_error" in content["summary"][0] and content["worst"][0]["sample"] in ("a", "b")
    assert (tmp_path / "out" / "report.html").is_file()
    # A recording, whose only views are inputs: the copied input is not measured against itself.
    recording = dataset(tmp_path / "recording", {"r": ball(0, with_depth=False)})
    must(*flags, "--data", recording, "--baselines", "copy", "--output_dir", tmp_path / "alone")
    views = json.loads((tmp_path / "alone" / "metrics.json").read_text())["views"]
    assert [record["view"] for record in views if record["method"] == COPY] == [1, 2, 3, 4, 5]
    assert len(views) == 6 + 5 and all(record["split"] == RIG_VIEWS for record in views)
    # Rows: truth, Stage 2; columns: the input view, which the model is not shown at, and all six.
    sheet = read_rgba(tmp_path / "alone" / "sheet.png")
    size = sheet.shape[1] // 2
    assert sheet.shape[2] == 7 * size and sheet[:3, size:, :size].min() == 1


def test_sweeps_write_tables_plots_and_records(flags, tmp_path):
    out = must(*flags, "--camera_noise_mm", 0, 5, "--num_input_views", 2, 6, "--output_dir", tmp_path)
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
        "--stage 1 --camera_noise_deg 1", "--stage 2 --camera_noise_px -1", "--stage 2 --num_input_views 0",
        "--stage 2 --world_units_per_mm 0", "--stage full --num_input_views 2", "--stage 1 --min_opacity 0.1",
        "--stage 2 --baselines none copy", "--stage 2 --baselines oracle",
    ],
)  # fmt: skip
def test_bad_arguments_end_before_anything_is_loaded(arguments):
    code, _, err = run("scripts/evaluate.py", *arguments.split())
    assert code == 2 and err.startswith("error: ")


def test_millimetres_of_an_unknown_dataset_are_refused(flags, tmp_path):
    data = dataset(tmp_path, {"a": ball(2)})
    code, _, err = run(*flags, "--data", data, "--camera_noise_mm", 1, "--output_dir", tmp_path / "out")
    assert code == 1 and "--world_units_per_mm" in err
