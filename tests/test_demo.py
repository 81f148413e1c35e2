"""The models that ship, on held-out mice of the tracked samples: their measured quality must not fall."""

import json
from pathlib import Path

import pytest
from pipeline_tiny import must

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("stage", "views", "method", "least", "gains"),
    [
        ("1", "rig views but the input", "Stage 1", (15.8, 0.803), {"input copied": (4.5, 0.25)}),
        ("2", "novel views", "Stage 2", (21.5, 0.90), {"hull of all true rig views": (1.0, 0.035)}),
        (
            "full", "novel views", "whole chain", (19.9, 0.848),
            {"input copied": (8.0, 0.25), "hull of the painted views": (2.8, 0.035)},
        ),
    ],
)  # fmt: skip
def test_shipped_models_keep_their_quality_and_beat_their_baselines(tmp_path, stage, views, method, least, gains):
    """dB and IoU on the animal. Measured: 16.4 / 0.822, 22.0 / 0.920, 20.6 / 0.871; room is left for other rounding."""
    given = ["--baselines", "copy", "hull", "--device", "cpu", "--output_dir", tmp_path]
    must("scripts/evaluate.py", "--stage", stage, "--data", ROOT / "data_mouse" / "data_mouse_val.txt", *given)
    assert {"sheet.png", "worst.png", "table.md", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    records = json.loads((tmp_path / "metrics.json").read_text())["views"]

    def means(method):
        chosen = [record for record in records if (record["split"], record["method"]) == (views, method)]
        return [sum(record[name] for record in chosen) / len(chosen) for name in ("foreground_psnr", "mask_iou")]

    own = means(method)
    assert own[0] > least[0] and own[1] > least[1], own
    for baseline, gain in gains.items():
        other = means(f"baseline: {baseline}")
        assert own[0] > other[0] + gain[0] and own[1] > other[1] + gain[1], (baseline, own, other)


def test_sampling_begins_where_all_is_noise():
    from diffusers import DDIMScheduler

    folder = ROOT / "checkpoints" / "demo" / "mvdiffusion"
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    scheduler.set_timesteps(json.loads((folder / "sampling.json").read_text())["num_steps"])
    assert scheduler.timesteps[0] == scheduler.config.num_train_timesteps - 1


def test_shipped_weights_are_small():
    demo = ROOT / "checkpoints" / "demo"
    files = [path for path in demo.rglob("*") if path.is_file() and "_training" not in str(path)]
    assert sum(path.stat().st_size for path in files) < 40e6
