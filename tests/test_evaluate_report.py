"""scripts/evaluate.py: what is compared with what, baselines, depth, consistency, the report and its pages."""

import json
import math
import mmap
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pipeline_tiny import must, write_gslrm

import evaluation.evaluate
import evaluation.methods
from evaluation import BASELINES
from evaluation.evaluate import measure_cost
from evaluation.methods import (
    COPY,
    DIRECTIONS,
    NOVEL,
    OTHER_RIG_VIEWS,
    RIG_VIEWS,
    TrainingMice,
    autoencoded,
    compare,
    consistency_of,
    measure,
    predict_baselines,
    predict_hull,
    records_of,
    side_shown,
    splits_of,
)
from evaluation.report import Report, image_rows, margins
from multiview.cameras import Cameras
from multiview.image import composite, read_rgba
from multiview.rig import RigMismatchError, load_rig
from multiview.sample import Sample, write_dataset_info, write_sample, write_split
from pipeline.outputs import PosedViews

CPU = torch.device("cpu")
SIZE, RADIUS = 48, 0.4
RIG = load_rig("mouse6")
COLOUR = (0.6, 0.3, 0.2)


def ball(num_extra: int = 2, radius: float = RADIUS, colour=COLOUR, with_depth: bool = True) -> Sample:
    """A ball of one colour at the origin from the rig's views and `num_extra` others, with exact masks and depth."""
    extra = Cameras.orbit(
        torch.arange(num_extra) * 100.0 + 30, torch.full((num_extra,), 10.0), RIG.distance, RIG.focal, SIZE
    )
    own = RIG.cameras(SIZE)
    cameras = replace(
        own, c2w=torch.cat([own.c2w, extra.c2w]), fxfycxcy=torch.cat([own.fxfycxcy, extra.fxfycxcy])
    )  # fmt: skip
    origins, directions = cameras.rays()
    along = -(origins * directions).sum(-1)
    gap = radius**2 - ((origins + along[..., None] * directions).square().sum(-1))
    mask = (gap > 0).float()[:, None]
    reach = along - gap.clamp_min(0).sqrt()
    forward = cameras.c2w[:, None, None, :3, 2]
    depth = (reach * (directions * forward).sum(-1))[:, None] * mask
    rgb = torch.tensor(colour)[:, None, None].expand(len(cameras), 3, SIZE, SIZE)
    names = [*RIG.view_names, *[None] * num_extra]
    return Sample("ball", torch.cat([rgb, mask], dim=1), cameras, names, depth if with_depth else None)


def dataset(folder: Path, samples: dict[str, Sample]) -> Path:
    for name, sample in samples.items():
        write_sample(folder / name, sample)
    write_split(folder / "list.txt", [folder / name for name in samples])
    write_dataset_info(folder, RIG)
    return folder / "list.txt"


# ---- what is compared -----------------------------------------------------------------------------------------------


def test_views_compared_were_never_inputs():
    sample = ball(2)
    assert splits_of("1", sample, RIG) == {OTHER_RIG_VIEWS: [1, 2, 3, 4, 5]}
    assert splits_of("2", sample, RIG) == {NOVEL: [6, 7]}
    assert splits_of("full", sample, RIG) == {NOVEL: [6, 7], OTHER_RIG_VIEWS: [1, 2, 3, 4, 5]}
    assert splits_of("2", ball(0), RIG) == {RIG_VIEWS: [0, 1, 2, 3, 4, 5]}  # a recording: its name says so
    assert splits_of("full", ball(0), RIG) == {OTHER_RIG_VIEWS: [1, 2, 3, 4, 5]}


def test_directions_are_angles_from_the_input_view():
    near, side, back = DIRECTIONS
    sample, angles = ball(0), {}
    for reference in (0, 2):
        prediction = {"all": compare(sample, range(6), composite(sample.rgba, 1.0), sample.rgba[:, 3:])}
        records = records_of({}, {"m": prediction}, sample, reference, None)
        angles[reference] = [record["angle_deg"] for record in records]
        directions = [record["direction"] for record in records]
    assert angles == {0: [0, 60, 120, 180, 120, 60], 2: [120, 60, 0, 60, 120, 180]}
    assert directions == [side, near, near, near, side, back]


def test_the_side_that_the_input_shows_follows_from_the_nose():
    sample = ball(0)
    assert side_shown(sample, 0) == {}
    for reference, heading, side in (
        (0, 350.0, "the head"), (0, 80.0, "its left side"), (0, 200.0, "the hindquarters"), (2, 120.0, "the head"),
        (0, 300.0, "its right side"), (3, 90.0, "its right side"), (3, 0.0, "the hindquarters"),
    ):  # fmt: skip
        shown = side_shown(replace(sample, extra={"synthetic": {"heading_deg": heading}}), reference)
        assert shown == {"input_shows": side}


def test_depth_error_is_the_mean_over_what_both_show():
    sample = ball(0)
    perfect = compare(sample, [0, 1], composite(sample.rgba[:2], 1.0), sample.rgba[:2, 3:], sample.depth[:2])
    nearer = replace(perfect, depth=(perfect.depth - 0.05) * (perfect.depth > 0))
    half = perfect.mask.clone()
    half[..., : SIZE // 2] = 0
    elsewhere = replace(nearer, mask=half, depth=torch.where(half > 0, nearer.depth, 9.0))
    nothing = replace(perfect, mask=torch.zeros_like(half))
    assert measure(perfect)[0]["depth_error"] == 0
    assert measure(nearer)[1]["depth_error"] == pytest.approx(0.05, abs=1e-5)
    assert measure(elsewhere)[0]["depth_error"] == pytest.approx(0.05, abs=1e-5)  # not the 9 outside its mask
    assert "depth_error" not in measure(nothing)[0] and not any(map(math.isnan, measure(nothing)[0].values()))
    assert "depth_error" not in measure(compare(ball(0, with_depth=False), [0], perfect.rgb[:1], half[:1], half[:1]))[0]


def test_consistency_of_true_views_is_the_measure_of_painted_ones():
    sample = ball(0)
    rgb = composite(sample.rgba, 1.0)
    broken = rgb.roll(9, dims=-1)
    broken[0] = rgb[0]
    views = PosedViews(broken, sample.rgba[:, 3:], sample.cameras)
    found = consistency_of(views, sample, RIG, with_copy=True)
    assert found["true views"]["of_truth"] == 1 and found["true views"]["score"] > 0.97
    assert found["painted views"]["of_truth"] < 0.9  # although the masks that came with them are the true ones
    assert consistency_of(replace(views, rgb=rgb), sample, RIG, with_copy=False)["painted views"]["of_truth"] == 1
    assert set(found) == {"painted views", "true views", "input copied"}


# ---- baselines ------------------------------------------------------------------------------------------------------


def baselines(stage: str, sample: Sample, *names: str, training: TrainingMice | None = None, model=None):
    views = PosedViews.of(sample.rgba[:6], sample.cameras[:6])
    model = model or SimpleNamespace(rig=RIG, predict=lambda views: "gaussians")
    generated = None if stage == "2" else views
    return predict_baselines(stage, names, sample, model, generated=generated, training=training)


def test_copied_input_is_the_input_everywhere():
    sample = ball(1)
    found = baselines("full", sample, "copy")[0][COPY]
    for split, views in {NOVEL: (6,), OTHER_RIG_VIEWS: (1, 2, 3, 4, 5)}.items():
        assert found[split].views == views and len(found[split].rgb) == len(views)
        assert torch.equal(found[split].rgb[-1], composite(sample.rgba[0], 1.0))
        assert torch.equal(found[split].truth, sample.rgba[list(views)])
    recording = baselines("2", ball(0), "copy")[0][COPY]
    assert recording[RIG_VIEWS].views == (1, 2, 3, 4, 5)  # the input against itself would be perfect


def test_hull_of_a_ball_is_the_ball_and_disagreeing_masks_leave_nothing():
    sample = ball(2)
    views = PosedViews.of(sample.rgba[:6], sample.cameras[:6])
    found = predict_hull(views, sample, splits_of("full", sample, RIG))
    record = measure(found[NOVEL])[0]
    assert record["mask_iou"] > 0.85 and record["foreground_psnr"] > 25 and record["depth_error"] < 0.1
    assert found[NOVEL].views == (6, 7) and found[OTHER_RIG_VIEWS].views == (1, 2, 3, 4, 5)
    apart = replace(views, masks=torch.zeros_like(views.masks))
    apart.masks[::2, :, :5, :5], apart.masks[1::2, :, -5:, -5:] = 1, 1
    empty = predict_hull(apart, sample, {NOVEL: [6, 7]})[NOVEL]
    assert empty.rgb.min() == 1 and empty.rgb.shape == (2, 3, SIZE, SIZE)
    assert empty.mask.max() == 0 and empty.depth.max() == 0


def test_nearest_training_mouse_is_like_the_input_and_held_out(tmp_path):
    mice = {"small": ball(0, 0.3), "grey": ball(0, 0.4, (0.5, 0.5, 0.5)), "like": ball(0, 0.41, (0.6, 0.32, 0.2))}
    listed, sample = dataset(tmp_path / "train", mice), ball(1)
    found = TrainingMice(listed, RIG, [tmp_path / "test" / "small"]).predict(sample, splits_of("full", sample, RIG))
    shown = composite(mice["like"].rgba[3], 1.0)  # PNG: steps of 1/255
    assert torch.allclose(found[OTHER_RIG_VIEWS].rgb[2], shown, atol=0.003)
    assert found[NOVEL].views == (6,) and measure(found[NOVEL])[0]["mask_iou"] > 0.8
    with pytest.raises(ValueError, match="share 1 samples.*grey.*not held out"):
        TrainingMice(listed, RIG, [tmp_path / "train" / "grey"])
    with pytest.raises(RigMismatchError):
        TrainingMice(listed, load_rig("facelift6"), [])


@pytest.mark.parametrize(("stage", "count"), [("1", 3), ("2", 3), ("full", 5)])
def test_baselines_say_what_they_were_given_and_keep_to_unseen_views(stage, count, tmp_path, monkeypatch):
    same = lambda first, sample, splits: dict.fromkeys(splits, first)  # noqa: E731
    monkeypatch.setattr(evaluation.methods, "predict_gaussians", same)
    monkeypatch.setattr(evaluation.methods, "autoencoded", lambda model, images: images)
    training = TrainingMice(dataset(tmp_path, {"a": ball(0)}), RIG, [])
    found, told = baselines(stage, ball(1), *BASELINES, training=training)
    assert list(found) == list(told) and len(found) == count and all(told.values())
    for label, predictions in found.items():
        if label.startswith("upper bound") and stage == "full":  # given the true rig views: those are no test of it
            assert list(predictions) == [NOVEL]
    assert baselines(stage, ball(1), "none", training=training) == ({}, {})


def test_autoencoder_is_shown_the_views_themselves():
    asked, vae = [], SimpleNamespace(dtype=torch.float32, config=SimpleNamespace(scaling_factor=2.0))
    # It halves the contrast.
    vae.encode = lambda images: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: images / 2))
    vae.decode = lambda latents: SimpleNamespace(sample=latents)
    components = SimpleNamespace(device=CPU, vae=vae, on_device=lambda name: nullcontext(asked.append(name)))
    images = composite(ball(0).rgba[1:6], 1.0)
    found = autoencoded(SimpleNamespace(components=components), images)
    assert torch.allclose(found, (images * 2 - 1) / 2 / 2 + 0.5) and asked == ["vae"]


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


def test_rows_of_images_stand_below_their_truth():
    sample = ball(1)
    own = baselines("full", sample, "copy")[0][COPY]
    painted = PosedViews.of(sample.rgba[:6], sample.cameras[:6])
    rows = image_rows(sample, 0, own, None, painted)
    assert rows.shape == (3, 7, 3, SIZE, SIZE)  # truth, painted, model; the input, a novel view, five of the rig
    assert torch.equal(rows[0, 2:], rows[1, 2:]) and rows[1, 1].min() == 1 and rows[2, 0].min() == 1


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
    report.records = [{**record, "input_shows": "the head"} for record in report.records]
    assert "| novel views | hull | 18.50 / 0.450 (4) | - (0) |" in report.tables()[-2].markdown()
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/") == 3 and "18.50 (18.50, 18.00)" in page
    assert "<tags>" not in page and "<Stage 2>" not in page and not re.search(r"(src|href)='(?!data:)", page)
    assert all((tmp_path / name).is_file() for name in ("worst.png", "directions.png"))
    sheet = read_rgba(tmp_path / "sheet.png")[0]
    assert sheet.shape == (32, 24) and (sheet == 1).nonzero().min(0).values.tolist() == [0, 16]  # two rows per mouse


def test_cost_sees_time_and_memory():
    size = 40 * 2**20
    with measure_cost(CPU) as cost:
        held = mmap.mmap(-1, size)  # straight from the kernel: what malloc is given back may stay with the process
        held.write(b"1" * size)
    with measure_cost(CPU) as less:
        held.close()
    assert cost["seconds"] > 0 and less["peak_memory_mib"] > 40
    with measure_cost(CPU) as later:
        pass
    assert later["peak_memory_mib"] < less["peak_memory_mib"] - 30  # the mark is reset, not the process's highest ever


def test_cost_without_a_high_water_mark_is_seconds_alone(monkeypatch):
    monkeypatch.setattr(evaluation.evaluate, "reset_peak", lambda: False)
    with measure_cost(CPU) as cost:
        pass
    assert list(cost) == ["seconds"]


# ---- the command ----------------------------------------------------------------------------------------------------


def test_stage_2_with_every_baseline_from_the_command_line(tmp_path):
    test = dataset(tmp_path / "test", {"a": ball(2), "b": ball(2, 0.3)})
    train = dataset(tmp_path / "train", {"c": ball(0, 0.35)})
    flags = ["--checkpoint", write_gslrm(tmp_path / "gslrm", RIG), "--stage", 2, "--device", "cpu", "--data", test]
    must("scripts/evaluate.py", *flags, "--train_data", train, "--output_dir", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(content["baselines"]) == 3 and len(content["assets"]) == 2
    methods = {record["method"] for record in content["views"]}
    assert methods == {"Stage 2", *content["baselines"]} and len(content["views"]) == 2 * 2 * len(methods)
    assert "depth_error" in content["summary"][0] and content["worst"][0]["sample"] in ("a", "b")
    assert (tmp_path / "out" / "report.html").is_file()
    # A recording, whose only views are inputs: the copied input is not measured against itself.
    recording = dataset(tmp_path / "recording", {"r": ball(0, with_depth=False)})
    flags[-1] = recording
    must("scripts/evaluate.py", *flags, "--baselines", "copy", "--output_dir", tmp_path / "alone")
    views = json.loads((tmp_path / "alone" / "metrics.json").read_text())["views"]
    assert [record["view"] for record in views if record["method"] == COPY] == [1, 2, 3, 4, 5]
    assert len(views) == 6 + 5 and all(record["split"] == RIG_VIEWS for record in views)
