"""The peers compute the same as the project's code, and every part of the benchmark runs; no times are judged here."""

import json
import statistics
import tempfile
from dataclasses import fields
from functools import partial

import pytest
import torch
from mvdiffusion_tiny import UNET

from gslrm.config import ImageTokenizerConfig, ModelConfig, TransformerConfig
from gslrm.model.gaussians_renderer import render
from gslrm.model.gslrm import GSLRM
from multiview.cameras import Cameras
from multiview.rig import load_rig
from mvdiffusion.models.unet import create_unet
from tests import peer_rasterizer
from tests.peer_gslrm import PlainGSLRM
from tests.random_components import SD21_UNCLIP


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module, its model tiny and its scenes small."""
    from scripts import benchmark as module

    module.import_libraries()
    module.PRESETS["demo"] = ((32, 64, 2), ((500, 32),))
    return module


@pytest.mark.parametrize(("kind", "count", "size"), [("trained-like", 1500, 64), ("untrained", 800, 50)])
def test_the_plain_rasterizer_draws_the_same_pictures_and_gradients(benchmark, kind, count, size):
    gaussians = benchmark.random_gaussians(kind, count, "cpu")
    cameras = Cameras.turntable(5, size, elevation_deg=15.0)[:2]
    weight = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    results = []
    for draw in (lambda g: [x[0] for x in render(g, cameras[None])], lambda g: peer_rasterizer.rasterize(g, cameras)):
        leaves = gaussians.map(lambda tensor: tensor.clone().requires_grad_())
        output = draw(leaves)
        (output[0] * weight).sum().backward()
        results.append((output, {field.name: getattr(leaves, field.name).grad for field in fields(leaves)}))
    (own, own_gradients), (theirs, their_gradients) = results
    assert own[1].max() > 0.5
    for a, b in zip(own, theirs):
        assert (a - b).abs().max() < 5e-5 * max(1.0, a.abs().max().item())
    for name, gradient in own_gradients.items():
        assert (gradient - their_gradients[name]).norm() <= 1e-3 * gradient.norm() + 1e-5, name


def test_the_plain_network_computes_the_same_gaussians():
    torch.manual_seed(0)
    config = ModelConfig(ImageTokenizerConfig(32), TransformerConfig(64, n_layer=2))
    model, peer = GSLRM(config), PlainGSLRM(config)
    peer.copy_from(model)
    images, cameras = torch.rand(2, 3, 3, 32, 32), load_rig("mouse6").cameras(32)[:3]
    cameras = Cameras(cameras.c2w.expand(2, -1, -1, -1), cameras.fxfycxcy.expand(2, -1, -1), 32, 32)
    own, theirs = model(images, cameras).gaussians, peer(images, cameras)
    for name, value in vars(own).items():
        torch.testing.assert_close(getattr(theirs, name), value, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())


def test_every_part_of_the_model_runs_and_its_rows_say_what_was_measured(benchmark, tmp_path):
    path = tmp_path / "b.json"
    parts = "rasterizer,gslrm,tokens,training,rendering"
    benchmark.main(["--device", "cpu", "--what", parts, "--repeats", "2", "--no_memory", "--output", str(path)])
    content = json.loads(path.read_text())
    assert content["torch"] == torch.__version__ and path.with_suffix(".md").read_text().count("## ") == 5
    tables = [table["records"] for table in content["tables"]]
    assert [len(records) for records in tables] == [2, 2, 5, 2, 1]
    rasterizer, network, tokens, training, rendering = tables
    assert rasterizer[0]["forward, times faster"] > 0 and rendering[0]["Gaussians"] == 6 * 32 * 32
    assert [row["tokens"] for row in tokens] == sorted(row["tokens"] for row in tokens)
    assert tokens[-1]["tokens"] == tokens[-1]["of"] == 98 and tokens[-1]["operations, times fewer"] == 1.0
    # Matrix products alone, a multiply-add counts 2: 96 patches of 9 x 64 numbers; two blocks over 98 tokens (q, k, v,
    # output 4, MLP 8, then scores and weighted sum); 14 values of each pixel and of two free Gaussians.
    blocks = 2 * (2 * 98 * 12 * 64**2 + 2 * 2 * 98**2 * 64)
    expected = 3 * (2 * 96 * 9 * 64 * 64 + blocks + 2 * 96 * 64 * 64 * 14 + 2 * 2 * 64 * 14) / 1e12
    for row in (network[1], *training):  # beside them the rays are turned
        assert row["operations, TFLOP"] == pytest.approx(expected, rel=0.01) and row["peak memory, MiB"] is None
        expected = row["operations, TFLOP"]
        assert row["TFLOP/s"] == pytest.approx(expected / statistics.median(row["ms"]))


def test_runs_take_turns_and_what_is_too_large_is_named(benchmark):
    options = benchmark.argparse.Namespace(preset="demo", repeats=3, compile=False, no_memory=False)
    bench, order = benchmark.Bench(options, torch.device("cpu")), []
    times = bench.time(partial(order.append, "a"), partial(order.append, "b"))
    assert [len(seconds) for seconds in times] == [3, 3] and "".join(order) == 3 * ("a" * 3 + "b" * 3)
    # The middle round was disturbed: both took ten times as long, the ratio is unmoved.
    assert bench.faster(benchmark.Times((2.0, 20.0, 2.0)), benchmark.Times((1.0, 10.0, 1.0))) == 2.0

    def too_large():
        raise torch.OutOfMemoryError("too large")

    own, large = bench.time(lambda: None, too_large)
    assert len(own) == 3 and large == benchmark.TOO_LARGE and bench.faster(large, own) is None
    assert str(benchmark.Times((0.001, 0.002, 0.003))).startswith("2 (")
    block = []
    grown = bench.peak(lambda: block.append(torch.ones(2**23)) or block.clear())
    assert grown is None or 25 < grown < 100  # 32 MiB


def test_the_import_is_filmed_looped_measured_and_leaves_nothing_behind(benchmark, tmp_path, monkeypatch):
    # The folder's place alone: processes put sockets in the system's own, whose path must be short.
    monkeypatch.setattr("tempfile.TemporaryDirectory", partial(tempfile.TemporaryDirectory, dir=tmp_path))
    path = tmp_path / "b.json"
    sizes = ["--frames", "5", "--source_frames", "3", "--video_width", "128"]
    benchmark.main(["--what", "import", *sizes, "--device", "cpu", "--output", str(path)])
    (table,) = json.loads(path.read_text())["tables"]
    assert [record["what"] for record in table["records"]] == ["decoding before", "import", "decoding after"]
    own = table["records"][1]
    assert own["seconds"] * own["frames/s"] == pytest.approx(6) and "6 frames of 12 videos" in table["notes"][0]
    assert 0 < own["frames/s over decoding's"] < own["without the report"]
    assert own["largest memory of all processes, MiB"] > 100 and not list(tmp_path.glob("benchmark_import_*"))


TINY = {
    "unet": UNET,
    "vae": {
        "block_out_channels": [8, 8, 16], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
    "vision": {
        "hidden_size": 16, "intermediate_size": 32, "projection_dim": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    },
}  # fmt: skip


def test_stage_1_is_sampled_and_trained_with_the_real_code(benchmark, monkeypatch):
    monkeypatch.setattr("tests.random_components.demo_shape", lambda unet: TINY)
    monkeypatch.setattr("mvdiffusion.pipelines.multiview.NUM_STEPS", 4)
    options = benchmark.argparse.Namespace(preset="demo", repeats=1, compile=False, no_memory=True)
    bench = benchmark.Bench(options, torch.device("cpu"))
    _, (sparse, full), _ = bench.measure_sampling()
    assert (sparse["attention"], full["attention"], sparse["times the first row's"]) == ("sparse", "full", 1.0)
    assert sparse["operations, TFLOP"] == pytest.approx(4 * sparse["of a step, TFLOP"], rel=0.5)  # and the VAE, CLIP
    # Self-attention over all six views instead of two: of 12 images, by the layers' tokens and channels.
    extra = sum(12 * layers * 2 * 2 * n * 4 * n * channels for n, channels, layers in ((64, 16, 3), (16, 32, 4)))
    assert full["of a step, TFLOP"] - sparse["of a step, TFLOP"] == pytest.approx(extra / 1e12)
    _, rows = bench.measure_diffusion_training()
    assert [row["latents"] for row in rows] == 2 * ["from the cache", "encoded"]
    cached, encoded = rows[:2]
    assert encoded["operations, TFLOP"] > cached["operations, TFLOP"] and cached["times the cache's"] == 1.0
    assert cached["TFLOP/s"] == pytest.approx(cached["operations, TFLOP"] / cached["ms"][0])
    with torch.device("meta"):  # --preset full is FaceLift's UNet, of Stable Diffusion 2.1 unCLIP
        unet = create_unet(SD21_UNCLIP["unet"], 6, "sparse")
    numbers = sum(parameter.numel() for parameter in unet.parameters())
    assert len(unet.state_dict()) == 690 and numbers == pytest.approx(870e6, rel=0.002)


def test_the_command_refuses_unknown_parts(benchmark, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--what", "rasterizer,dance"])
    told = capsys.readouterr().err
    assert "dance" in told and "sampling, diffusion_training" in told
