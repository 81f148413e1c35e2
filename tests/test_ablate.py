"""The factorial runner: cells, refusals, resuming, failures, and the arithmetic of effects."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from mvdiffusion_tiny import UNET, prepare

from evaluation.ablation import AblationSpec, make_cells, markdown, read_spec, run_cell, summarise

ROOT = Path(__file__).resolve().parent.parent
METRIC = "guidance_1/consistency"


def write_spec(path: Path, **changes) -> Path:
    content = {
        "base": str(ROOT / "configs/demo_mvdiffusion.yaml"), "output_dir": str(path.parent / "out"),
        "factors": {
            "attention": ["sparse", "full"],
            "augmentation": {"none": {"brightness_jitter": 0}, "photometric": {"brightness_jitter": 0.1}},
        },
        "metrics": [METRIC], **changes,
    }  # fmt: skip
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def spec_of(levels: dict[str, list[str]], seeds: list[int]) -> AblationSpec:
    factors = {factor: {name: {} for name in names} for factor, names in levels.items()}
    return AblationSpec("", "", factors, ["m"], 1, seeds, {}, [])


def effects(levels: dict[str, list[str]], results: list[dict], seeds: list[int]) -> dict[str, dict]:
    return summarise(spec_of(levels, seeds), results)["effects"]["m"]


def finished(levels: dict[str, str], seed: int, value: float, **changes) -> dict:
    return {"levels": levels, "seed": seed, "status": "done", "seconds": 1.0, "metrics": {"m": value}, **changes}


# ---- cells ----------------------------------------------------------------------------------------------------------


def test_every_combination_is_a_cell_of_its_own_folder(tmp_path):
    spec = read_spec(write_spec(tmp_path / "s.yaml", seeds=[0, 1], overrides={"max_train_steps": 7}))
    cells = make_cells(spec)
    assert len(cells) == len({cell.folder for cell in cells}) == 2 * 2 * 2
    cell = cells[-1]
    assert cell.folder.name == "full_photometric_seed1"
    assert cell.levels == {"attention": "full", "augmentation": "photometric"}
    assert {"max_train_steps=7", "attention=full", "brightness_jitter=0.1", "seed=1"} <= set(cell.arguments())
    assert f"output_dir={tmp_path / 'out' / cell.folder.name}" in cell.arguments()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": ["x"]}, "unknown key 'metric'; the nearest known one is 'metrics'"),
        ({"metrics": []}, "the key 'metrics' is missing or empty"),
        ({"stage": 3}, "stage must be 1 or 2, got 3"),
        ({"seeds": [1, 1]}, "different whole numbers"), ({"seeds": ["x"]}, "different whole numbers"),
        ({"metrics": 3}, "s.yaml: "), ({"base": {"a": 1}}, "s.yaml: "), ({"overrides": [1]}, "s.yaml: "),
        ({"factors": {"a": ["x"]}}, "factor 'a' needs at least two different levels"),
        ({"factors": {"a": {"x": 1, "y": 2}}}, "mapping of level names to config overrides"),
    ],
)
def test_wrong_specs_are_one_sentence(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_spec(write_spec(tmp_path / "s.yaml", **changes))


def test_wrong_values_are_told_before_the_first_run(tmp_path):
    for factors, message in (
        ({"atention": ["sparse", "full"]}, "nearest known one is 'attention'"),
        ({"mixed_precision": ["bf16", "fp7"]}, "mixed_precision must be one of"),
    ):
        spec = read_spec(write_spec(tmp_path / "s.yaml", factors=factors))
        with pytest.raises(ValueError, match=message):
            make_cells(spec)
    both = {"a": {"x": {"seed": 1}, "y": {}}, "b": {"u": {"seed": 2}, "v": {}}}
    with pytest.raises(ValueError, match="factor 'b' sets seed, which another factor sets too"):
        make_cells(read_spec(write_spec(tmp_path / "s.yaml", factors=both)))


def test_shipped_spec_names_real_keys_and_eight_cells():
    spec = read_spec(ROOT / "configs/ablation_prompts_cameras_augmentation.yaml")
    cells = make_cells(spec)
    assert len(cells) == 8 * len(spec.seeds)
    assert list(spec.factors) == ["prompts", "camera_conditioning", "augmentation"]


def test_stage_2_configs_take_part_too(tmp_path):
    factors = {"training.losses.ssim_loss_weight": [0.0, 0.2]}
    base = str(ROOT / "configs/demo_gslrm.yaml")
    spec = read_spec(write_spec(tmp_path / "s.yaml", stage=2, base=base, factors=factors))
    cells = make_cells(spec)
    assert cells[0].folder.name == "0.0_seed0" and "training.runtime.seed=0" in cells[0].arguments()


# ---- running --------------------------------------------------------------------------------------------------------


def test_cells_train_resume_and_failures_are_recorded(tmp_path, monkeypatch, capsys):
    tiny = prepare(tmp_path / "tiny")
    path = write_spec(
        tmp_path / "s.yaml",
        factors={"prompts": {"good": {"prompt_embeds": str(tiny["embeds"])}, "none": {"prompt_embeds": "nowhere.pt"}}},
        overrides={
            "pretrained_model_name_or_path": str(tiny["components"]), "train_data": str(tiny["data"]),
            "validation_data": str(tiny["data"].with_name("data_mouse_val.txt")),
            **{f"unet.{key}": value for key, value in UNET.items()},
            "cache_dir": str(tmp_path / "cache"), "max_train_steps": 2, "train_batch_size": 1, "mixed_precision": "no",
            "checkpointing_steps": 1, "validation_samples": 1, "validation_num_steps": 2, "export_dir": None,
            "validation_guidance_scales": [1.0],
        },
    )  # fmt: skip
    sys.path.insert(0, str(ROOT / "scripts"))
    script = importlib.import_module("ablate")
    sys.path.remove(str(ROOT / "scripts"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--spec", str(path), "--dry_run"])
    script.main()
    assert "good_seed0: " in capsys.readouterr().out and not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--spec", str(path)])
    with pytest.raises(ValueError, match="1 of 2 runs failed"):
        script.main()
    table = (tmp_path / "out" / "table.md").read_text()
    assert (
        "| good | 1 of 1 | " in table
        and "- prompts none, seed 0: exit code 1: error: prompt embeddings nowhere.pt" in table
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["runs"][0]["status"] == "done" and 0 <= summary["cells"][0][METRIC]["mean"] <= 1
    assert {"truth/consistency", "guidance_1/foreground_ssim"} <= set(summary["runs"][0]["metrics"])
    # Repeated: the finished cell is read, not trained again; changed values are not mixed with it.
    spec = read_spec(path)
    cells = make_cells(spec)
    metrics = cells[0].folder / "metrics.jsonl"
    written = metrics.stat().st_mtime_ns
    assert run_cell(spec, cells[0])["status"] == "done" and metrics.stat().st_mtime_ns == written
    longer = read_spec(write_spec(path, factors=spec.factors, overrides={**spec.overrides, "max_train_steps": 3}))
    with pytest.raises(ValueError, match="max_train_steps: 2 there, 3 now"):
        run_cell(spec, make_cells(longer)[0])


# ---- effects --------------------------------------------------------------------------------------------------------


def test_effects_are_those_the_numbers_were_made_of():
    levels = {"a": ["x", "y"], "b": ["u", "v", "w"]}
    gain = {"u": 0.0, "v": 2.0, "w": 5.0}
    results = []
    for seed, offset in ((0, 0.0), (1, 10.0)):
        for a in levels["a"]:
            for b in levels["b"]:
                extra = (1.0 + seed) * (a == "y") + gain[b] + 3.0 * (a == "y" and b == "w")
                results.append(finished({"a": a, "b": b}, seed, offset + extra))
    found = effects(levels, results, [0, 1])
    assert found["a: y - x"]["mean"] == pytest.approx(1.5 + 1.0)  # mean over b, where w adds 3
    assert found["a: y - x"]["spread"] == pytest.approx(0.5**0.5)  # 2 and 3; the seeds' offset cancels
    assert found["b: v - u"]["mean"] == pytest.approx(2.0) and found["b: v - u"]["spread"] == pytest.approx(0.0)
    assert found["b: w - u"]["mean"] == pytest.approx(5.0 + 1.5)
    assert found["(a: y - x) x (b: v - u)"]["mean"] == pytest.approx(0.0)
    assert found["(a: y - x) x (b: w - u)"]["mean"] == pytest.approx(3.0)
    assert len(found) == 1 + 2 + 2


def test_three_way_interaction_is_the_change_of_the_two_way_one():
    levels = {name: ["0", "1"] for name in "abc"}
    results = [
        finished({"a": a, "b": b, "c": c}, 0, 4.0 * (a == b == c == "1") + 1.0 * (a == b == "1"))
        for a in "01" for b in "01" for c in "01"
    ]  # fmt: skip
    found = effects(levels, results, [0])
    assert found["(a: 1 - 0) x (b: 1 - 0) x (c: 1 - 0)"]["mean"] == pytest.approx(4.0)
    assert found["(a: 1 - 0) x (b: 1 - 0)"]["mean"] == pytest.approx(1.0 + 2.0)
    assert found["a: 1 - 0"]["spread"] is None


def test_incomplete_seeds_count_in_cells_but_not_in_effects():
    levels = {"a": ["x", "y"]}
    results = [
        finished({"a": "x"}, 0, 1.0), finished({"a": "y"}, 0, 2.0), finished({"a": "x"}, 1, 3.0),
        finished({"a": "y"}, 1, 0.0, status="failed", reason="exit code 1: error: out of luck"),
    ]  # fmt: skip
    spec = spec_of(levels, [0, 1])
    summary = summarise(spec, results)
    assert summary["cells"][0]["m"]["mean"] == pytest.approx(2.0) and summary["cells"][0]["m"]["n"] == 2
    assert summary["effects"]["m"] == {"a: y - x": {"mean": 1.0, "spread": None, "n": 1}}
    text = markdown(spec, results)
    assert "| x | 2 of 2 | 2.000 ± 1.414 |" in text and "| a: y - x | +1.000 |" in text
    assert "over 1 complete seeds" in text and "- a y, seed 1: exit code 1: error: out of luck" in text
