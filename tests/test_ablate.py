"""The factorial runner: cells, refusals, resuming, failures, and the arithmetic of effects."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import commands
import pytest
from mvdiffusion_tiny import UNET, prepare
from pipeline_tiny import must, run

from evaluation.ablation import (
    AblationSpec,
    as_arguments,
    make_cells,
    markdown,
    read_spec,
    run_cell,
    run_child,
    summarise,
)

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


def effects(levels: dict[str, list[str]], values: dict[tuple, float], seeds: list[int]) -> tuple[dict, str]:
    """Summary and its Markdown. values: of metric m by (seed, level of each factor); one that is None has failed."""
    factors = {factor: {name: {} for name in names} for factor, names in levels.items()}
    spec, results = AblationSpec("", "", factors, ["m"], 1, seeds, {}, []), []
    for (seed, *at), value in values.items():
        failed = {"status": "failed", "reason": "exit code 1: no luck"}
        done = {"status": "done", "metrics": {"m": value}} if value is not None else failed
        results.append({"levels": dict(zip(levels, at)), "seed": seed, "seconds": 1.0, **done})
    return summarise(spec, results), markdown(spec, results)


# ---- cells ----------------------------------------------------------------------------------------------------------


def test_every_combination_is_a_cell_of_its_own_folder(tmp_path):
    spec = read_spec(write_spec(tmp_path / "s.yaml", seeds=[0, 1], overrides={"max_train_steps": 7}))
    cells = make_cells(spec)
    name, cell = list(cells.items())[-1]
    assert len(cells) == 2 * 2 * 2 and name == "full_photometric_seed1"
    assert cell["levels"] == {"attention": "full", "augmentation": "photometric"}
    told, folder = set(as_arguments(cell["overrides"])), f"output_dir={tmp_path / 'out' / name}"
    assert {"max_train_steps=7", "attention=full", "brightness_jitter=0.1", "seed=1", folder} <= told
    shipped = read_spec(ROOT / "configs/ablation_prompts_cameras_augmentation.yaml")
    assert len(make_cells(shipped)) == 8 * len(shipped.seeds)
    assert list(shipped.factors) == ["prompts", "camera_conditioning", "augmentation"]
    base, factors = str(ROOT / "configs/demo_gslrm.yaml"), {"training.losses.ssim_loss_weight": [0.0, 0.2]}
    cells = make_cells(read_spec(write_spec(tmp_path / "s.yaml", stage=2, base=base, factors=factors)))
    assert "training.runtime.seed=0" in as_arguments(cells["0.0_seed0"]["overrides"])


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
        # Told before the first run: what the trainings would not take.
        ({"factors": {"atention": ["sparse", "full"]}}, "nearest known one is 'attention'"),
        ({"factors": {"mixed_precision": ["bf16", "fp7"]}}, "mixed_precision must be one of"),
        ({"factors": {"a": {"x": {"seed": 1}, "y": {}}, "b": {"u": {"seed": 2}, "v": {}}}},
         "factor 'b' sets seed, which another factor sets too"),
        ({"factors": {"seed": {"x 1": {}, "x-1": {}}}}, "two cells share the folder name x-1_seed0"),
    ],
)  # fmt: skip
def test_wrong_specs_are_one_sentence(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_cells(read_spec(write_spec(tmp_path / "s.yaml", **changes)))


# ---- running --------------------------------------------------------------------------------------------------------


def test_cells_train_resume_and_failures_are_recorded(tmp_path, monkeypatch):
    def train(command, log):
        done = commands.run(shlex.join(["python", *command[1:]]), tmp_path)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr)
        return done.returncode

    monkeypatch.setattr("evaluation.ablation.run_child", train)
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
    assert "good_seed0: " in must("scripts/ablate.py", "--spec", path, "--dry_run") and not (tmp_path / "out").exists()
    code, _, err = run("scripts/ablate.py", "--spec", path)
    assert code == 1 and "1 of 2 runs failed" in err
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| good | 1 of 1 | " in table
    assert "- prompts none, seed 0: exit code 1: error: prompt embeddings nowhere.pt" in table
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["runs"][0]["status"] == "done" and 0 <= summary["cells"][0][METRIC]["mean"] <= 1
    assert {"truth/consistency", "guidance_1/foreground_ssim"} <= set(summary["runs"][0]["metrics"])
    # Repeated: the finished cell is read, not trained again; changed values are not mixed with it.
    spec, metrics = read_spec(path), tmp_path / "out/good_seed0/metrics.jsonl"
    written = metrics.stat().st_mtime_ns
    assert run_cell(spec, make_cells(spec)["good_seed0"])["status"] == "done" and metrics.stat().st_mtime_ns == written
    longer = read_spec(write_spec(path, factors=spec.factors, overrides={**spec.overrides, "max_train_steps": 3}))
    with pytest.raises(ValueError, match="max_train_steps: 2 there, 3 now"):
        run_cell(spec, make_cells(longer)["good_seed0"])
    for content, message in (({}, "lacks overrides"), ({"overrides": spec.overrides, "status": 3}, "values|status")):
        (tmp_path / "out/good_seed0/result.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"result.json.*{message}"):
            run_cell(spec, make_cells(spec)["good_seed0"])


CHILD = """
import os, signal, sys, time
def stop(number, _):
    print("saved", signal.Signals(number).name, flush=True)
    sys.exit(143)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, stop)
os.write(1, b"ready\\n")  # at once: the signal follows it
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_signal_reaches_the_training_and_ends_the_ablation(tmp_path, number, capsys):
    log, code, handler = tmp_path / "cell" / "training.log", "raise SystemExit(3)", signal.getsignal(number)
    assert run_child([sys.executable, "-c", code], log) == 3

    def send() -> None:
        while "ready" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        run_child([sys.executable, "-c", CHILD], log)
    assert stopped.value.code == 143 and log.read_text() == f"ready\nsaved {number.name}\n"
    assert f"stopped by {number.name}" in capsys.readouterr().err and signal.getsignal(number) == handler


# ---- effects --------------------------------------------------------------------------------------------------------


def test_effects_are_those_the_numbers_were_made_of():
    levels, gain = {"a": ["x", "y"], "b": ["u", "v", "w"]}, {"u": 0.0, "v": 2.0, "w": 5.0}
    values = {
        (seed, a, b): 10.0 * seed + (1.0 + seed) * (a == "y") + gain[b] + 3.0 * (a == "y" and b == "w")
        for seed in (0, 1) for a in levels["a"] for b in levels["b"]
    }  # fmt: skip
    found = effects(levels, values, [0, 1])[0]["effects"]["m"]
    assert {name: estimate["mean"] for name, estimate in found.items()} == pytest.approx({
        "a: y - x": 1.5 + 1.0,  # mean over b, where w adds 3
        "b: v - u": 2.0, "b: w - u": 5.0 + 1.5,
        "(a: y - x) x (b: v - u)": 0.0, "(a: y - x) x (b: w - u)": 3.0,
    })  # fmt: skip
    # 1.5 and 2.5 within the seeds, whose own offset cancels.
    assert [found[name]["spread"] for name in ("a: y - x", "b: v - u")] == pytest.approx([0.5**0.5, 0.0])
    values = {(0, a, b, c): 4.0 * (a == b == c == "1") + (a == b == "1") for a in "01" for b in "01" for c in "01"}
    found = effects({name: ["0", "1"] for name in "abc"}, values, [0])[0]["effects"]["m"]
    assert found["(a: 1 - 0) x (b: 1 - 0) x (c: 1 - 0)"]["mean"] == pytest.approx(4.0)  # change of the two-way one
    assert found["(a: 1 - 0) x (b: 1 - 0)"]["mean"] == pytest.approx(1.0 + 2.0)
    assert found["a: 1 - 0"]["spread"] is None


def test_incomplete_seeds_count_in_cells_but_not_in_effects():
    summary, text = effects({"a": ["x", "y"]}, {(0, "x"): 1.0, (0, "y"): 2.0, (1, "x"): 3.0, (1, "y"): None}, [0, 1])
    assert summary["cells"][0]["m"]["mean"] == pytest.approx(2.0) and summary["cells"][0]["m"]["n"] == 2
    assert summary["effects"]["m"] == {"a: y - x": {"mean": 1.0, "spread": None, "n": 1}}
    assert "| x | 2 of 2 | 2.000 ± 1.414 |" in text and "| a: y - x | +1.000 |" in text
    assert "over 1 complete seeds" in text and "- a y, seed 1: exit code 1: no luck" in text
