"""The peers compute the same as the project's code, the tables hold what was measured; no times are judged here."""

import json
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import peer_rasterizer
from benchmarks.cases import NetworkCase, NetworkSize, disc_mask
from benchmarks.memory import peak_memory
from benchmarks.network import TOO_LARGE, times_faster, try_to_time, work_columns
from benchmarks.peer_gslrm import PlainGSLRM
from benchmarks.presets import PRESETS, Preset, measure
from benchmarks.report import Table, format_number
from benchmarks.scenes import SCENES
from benchmarks.timing import Timing, matrix_rate, ratio, time_in_turn
from gslrm.model.flops import forward_flops
from gslrm.model.gaussians_renderer import render
from gslrm.model.gslrm import GSLRM
from multiview.cameras import Cameras
from multiview.rig import load_rig

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = NetworkSize(image_size=32, d=64, layers=2, views=3)


@pytest.mark.parametrize("kind", SCENES)
@pytest.mark.parametrize(("count", "size"), [(3000, 64), (800, 50)])  # 50: not a multiple of the tile
def test_the_plain_rasterizer_draws_the_same_pictures(kind, count, size):
    gaussians = SCENES[kind](count)
    cameras = Cameras.turntable(5, size, elevation_deg=15.0)[:2]
    own = render(gaussians, cameras[None])
    rgb, alpha, depth = peer_rasterizer.rasterize(gaussians, cameras)
    assert own.alpha.max() > 0.5
    for mine, theirs in ((rgb, own.rgb), (alpha, own.alpha), (depth, own.depth)):
        assert (mine - theirs[0]).abs().max() < 1e-4


def test_the_plain_rasterizer_has_the_same_gradients():
    gaussians, camera = SCENES["trained-like"](2000), Cameras.turntable(5, 48)[:1]
    weight = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    grads = []
    for draw in (lambda g: render(g, camera[None]).rgb[0], lambda g: peer_rasterizer.rasterize(g, camera)[0]):
        leaves = gaussians.map(lambda tensor: tensor.clone().requires_grad_())
        names = [field.name for field in fields(leaves)]
        (draw(leaves) * weight).sum().backward()
        grads.append({name: getattr(leaves, name).grad for name in names})
    for name in names:
        assert (grads[0][name] - grads[1][name]).norm() < 1e-3 * grads[0][name].norm(), name


def test_the_plain_network_computes_the_same_gaussians():
    torch.manual_seed(0)
    model, peer = GSLRM(TINY.config()), PlainGSLRM(TINY.config())
    peer.copy_from(model)
    images, cameras = torch.rand(2, 3, 3, 32, 32), load_rig("mouse6").cameras(32)[:3]
    cameras = Cameras(cameras.c2w.expand(2, -1, -1, -1), cameras.fxfycxcy.expand(2, -1, -1), 32, 32)
    own, theirs = model(images, cameras).gaussians, peer(images, cameras)
    for field in fields(own):
        a, b = getattr(own, field.name), getattr(theirs, field.name)
        assert a.shape == b.shape and (a - b).abs().max() < 2e-5, field.name
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())


def test_the_plain_network_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="plain peer"):
        PlainGSLRM(TINY.config(prune=True))


@pytest.mark.parametrize("coverage", [0.05, 0.3, 0.9, 1.0])
def test_discs_cover_the_share_they_say(coverage):
    mask = disc_mask(coverage, 64)
    assert mask.mean().item() == pytest.approx(coverage, abs=1 / 64**2)
    if coverage < 0.7:  # a disc, not rows
        rows, columns = mask.amax(1).sum(), mask.amax(0).sum()
        assert abs(rows - columns) <= 1 and rows == pytest.approx(2 * 64 * (coverage / torch.pi) ** 0.5, abs=2)


def test_disc_refuses_an_empty_mask():
    with pytest.raises(ValueError, match="coverage"):
        disc_mask(0.0, 64)


def test_cases_count_the_tokens_the_network_sees_and_travel_to_other_processes():
    dense, pruned = NetworkCase(TINY), NetworkCase(TINY, coverage=0.1, passes="forward + backward")
    assert dense.num_tokens() == 2 + 3 * 16 and pruned.num_tokens() < dense.num_tokens()
    assert dense.build(CPU)().num_gaussians == 2 + 3 * 32 * 32
    assert dense.flops() == forward_flops(TINY.config(), [50])
    assert pruned.flops() == 3 * forward_flops(TINY.config(), [pruned.num_tokens()])
    assert pickle.loads(pickle.dumps(pruned)) == pruned
    with pytest.raises(ValueError, match="passes"):
        NetworkCase(TINY, passes="sideways")


def test_runs_take_turns_each_after_one_of_its_own_and_ratios_are_of_neighbours():
    order = []
    timings = time_in_turn([lambda: order.append("a"), lambda: order.append("b")], CPU, 3)
    assert "".join(order) == "aabb" * 3 and [len(t.seconds) for t in timings] == [3, 3]
    assert all(len(t.cpu_seconds) == 3 and t.to_dict()["median_cpu_ms"] >= 0 for t in timings)
    # The middle round was disturbed: both took ten times as long, the ratio is unmoved.
    assert ratio(Timing((2.0, 20.0, 2.0)), Timing((1.0, 10.0, 1.0))) == 2.0
    assert matrix_rate(CPU, 1, side=64) > 0


def test_tables_as_markdown_and_as_json():
    records = [{"what": "a", "ms": Timing((0.001, 0.002, 0.003)), "ratio": 1.234, "memory": None}]
    table = Table("T", records, ["Note."])
    assert "| a | 2.00 (1.50-2.50) | 1.23 | - |" in table.markdown() and "Note." in table.markdown()
    content = json.loads(json.dumps(table.to_dict()))
    assert content["records"][0]["ms"]["median_ms"] == pytest.approx(2.0)
    assert [format_number(x) for x in (123.4, 12.34, 1.234, 0.1234)] == ["123", "12.3", "1.23", "0.123"]


def test_every_part_runs_at_any_size():
    """The code of `--preset full`: presets differ in numbers alone."""
    assert all(type(preset) is Preset for preset in PRESETS.values())
    preset = Preset(TINY, (("trained-like", 500, 32), ("untrained", 100, 32)))
    tables = {
        what: measure(what, preset, CPU, 1, memory=False)
        for what in ("rasterizer", "gslrm", "tokens", "training", "rendering")
    }
    assert {what: len(table.records) for what, table in tables.items()} == {
        "rasterizer": 2, "gslrm": 2, "tokens": 5, "training": 2, "rendering": 1
    }  # fmt: skip
    tokens = tables["tokens"].records
    assert [record["tokens"] for record in tokens] == sorted(record["tokens"] for record in tokens)
    assert tokens[-1]["tokens"] == tokens[-1]["of"] == 50 and tokens[-1]["operations, times fewer"] == 1.0
    training = tables["training"].records[0]
    expected = 3 * forward_flops(TINY.config(), [50]) / 1e12
    assert training["operations, TFLOP"] == pytest.approx(expected)
    assert training["TFLOP/s"] == pytest.approx(expected / training["ms"].median)
    with pytest.raises(ValueError, match="what"):
        measure("nothing", preset, CPU, 1)


def test_cases_too_large_together_are_timed_alone_and_named_when_too_large_alone(monkeypatch):
    def build(case, device):
        if case.network == "plain":
            raise torch.OutOfMemoryError("too large")
        return lambda: None

    monkeypatch.setattr(NetworkCase, "build", build)
    own, peer = try_to_time([NetworkCase(TINY), NetworkCase(TINY, network="plain")], CPU, 2)
    assert len(own.seconds) == 2 and peer == TOO_LARGE
    assert times_faster(peer, own) is None and work_columns(NetworkCase(TINY), peer, 1.0)["TFLOP/s"] is None
    table = Table("T", [{"ms": peer}])
    assert "| out of memory |" in table.markdown()


def test_peak_memory_grows_with_the_work():
    """The backward pass keeps every layer's activations, the forward pass none; measured in fresh processes."""
    size = NetworkSize(image_size=64, d=128, layers=6, views=4)
    forward = peak_memory(NetworkCase(size), CPU)
    both = peak_memory(NetworkCase(size, passes="forward + backward"), CPU)
    activations = size.layers * 258 * 128 * 4 * 10  # at least ten numbers per token, channel and layer
    assert 0 < forward < both and both > activations


def test_the_command_writes_table_and_json(tmp_path):
    command = [
        sys.executable, "scripts/benchmark.py", "--preset", "demo", "--device", "cpu", "--what", "rendering",
        "--repeats", "1", "--output", str(tmp_path / "b.json"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["threads"] >= 1 and content["torch"] == torch.__version__
    assert [table["title"] for table in content["tables"]] == ["Rendering"]
    assert "98,304 trained-like Gaussians" in (tmp_path / "b.md").read_text()


def test_the_command_refuses_unknown_parts():
    command = [sys.executable, "scripts/benchmark.py", "--what", "rasterizer,dance"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "dance" in done.stderr
