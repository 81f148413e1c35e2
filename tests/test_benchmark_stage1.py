"""Stage 1's workloads are the real code at the sizes they say; tables hold what was measured; no times are judged."""

import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.diffusion import measure_diffusion_training, measure_sampling, time_whole_and_steps
from benchmarks.network import TOO_LARGE
from benchmarks.timing import Timing
from mvdiffusion.demo import SD21_UNCLIP, Stage1Shape, random_components
from mvdiffusion.models.unet import create_unet
from mvdiffusion.workloads import (
    META,
    SamplingRun,
    SamplingWorkload,
    TrainingWorkload,
    encoders_size,
    make_trainer,
    unet_size,
    workloads,
)

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = Stage1Shape(
    unet={
        "sample_size": 8, "in_channels": 8, "out_channels": 4, "block_out_channels": [16, 32], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": [2, 4],
        "norm_num_groups": 8, "cross_attention_dim": 16, "use_linear_projection": True,
        "class_embed_type": "projection", "projection_class_embeddings_input_dim": 16,
    },
    vae={
        "block_out_channels": [8, 8, 16], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
    vision={
        "hidden_size": 16, "intermediate_size": 32, "projection_dim": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    },
)  # fmt: skip
SAMPLING = SamplingWorkload(TINY, num_steps=3)


@pytest.fixture()
def training(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("train_batch_size: 2\ngradient_accumulation_steps: 2\ndataloader_num_workers: 0\n")
    return TrainingWorkload(TINY, str(path))


def test_full_size_is_sd21_unclip_and_the_demo_is_what_ships():
    sampling, training = workloads("full")
    assert sampling.shape is training.shape is SD21_UNCLIP and SD21_UNCLIP.image_size == 512
    with META:
        assert len(create_unet(SD21_UNCLIP.unet, 6, "sparse").state_dict()) == 690  # FaceLift's
    assert unet_size(SD21_UNCLIP) == pytest.approx(870e6, rel=0.002)
    assert encoders_size(SD21_UNCLIP) == pytest.approx(83.7e6 + 632.1e6, rel=0.001)  # SD's VAE, CLIP ViT-H/14
    assert training.samples_per_update() == 16 and sampling.num_steps == 50 and sampling.guidance_scale == 3
    demo = workloads("demo")[0].shape
    assert demo.image_size == 128 and demo.vae["latent_channels"] == 8 and demo.unet["in_channels"] == 16
    assert demo.vision["projection_dim"] * 2 == demo.unet["projection_class_embeddings_input_dim"]
    with pytest.raises(ValueError, match="preset"):
        workloads("huge")


def test_operations_follow_steps_guidance_and_attention():
    step = SAMPLING.step_flops()
    assert SAMPLING.flops() - replace(SAMPLING, num_steps=1).flops() == pytest.approx(2 * step)
    assert step == 2 * replace(SAMPLING, guidance_scale=1.0).step_flops()
    # Self-attention over all six views instead of two: of 12 pictures, by the layers' tokens and channels.
    extra = 0
    for tokens, channels, layers in ((64, 16, 3), (16, 32, 4)):  # one down and two up blocks each, and the middle
        extra += 12 * layers * 2 * 2 * tokens * (6 - 2) * tokens * channels
    assert replace(SAMPLING, attention="full").step_flops() - step == pytest.approx(extra)


def test_training_counts_useful_operations_and_the_encoders_without_cache(training):
    forward = training.samples_per_update() * replace(SAMPLING, guidance_scale=1.0).step_flops()
    assert 2.8 * forward < training.flops() < 3 * forward  # the first layers need no gradient of their input
    assert replace(training, gradient_checkpointing=True).flops() == training.flops()
    assert replace(training, cached=False).flops() > training.flops()
    assert training.held_bytes(CPU) == 4 * (4 * unet_size(TINY) + encoders_size(TINY))


def test_a_sampling_run_paints_views_and_times_its_own_steps():
    run = pickle.loads(pickle.dumps(SAMPLING)).build(CPU)
    views = run()
    assert views.shape == (1, 6, 3, 32, 32) and views.isfinite().all() and len(run.step_seconds) == 1
    (whole, steps), = time_whole_and_steps([SAMPLING.build(CPU)], CPU, 2)  # fmt: skip
    assert len(steps.seconds) == 2 and all(3 * a <= b for a, b in zip(steps.seconds, whole.seconds))


def count_pictures(counts, module, inputs):
    counts.append(len(inputs[0]))


def test_encoders_run_only_without_the_cache(training, tmp_path):
    calls = {True: [], False: []}
    for cached, pictures in calls.items():
        trainer = make_trainer(replace(training, cached=cached), CPU, tmp_path / str(cached))
        before = {name: tensor.detach().clone() for name, tensor in trainer.unet.named_parameters()}
        trainer.components.vae.encoder.register_forward_pre_hook(partial(count_pictures, pictures))
        loss, _ = trainer.update()
        assert 0 < loss < 10 and trainer.step == 1
        assert any((before[name] != tensor).any() for name, tensor in trainer.unet.named_parameters())
    assert calls == {True: [], False: [12, 12]}  # two batches are accumulated, of two objects with six views


def test_the_data_of_a_run_go_with_it(training, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    update = training.build(CPU)
    update()
    assert list(tmp_path.glob("benchmark_stage1_*"))
    del update
    import gc

    gc.collect()
    assert not list(tmp_path.glob("benchmark_stage1_*"))


def test_tables_hold_what_was_measured(training):
    table = measure_sampling(SAMPLING, CPU, 1, memory=False)
    assert [record["attention"] for record in table.records] == ["sparse", "full"]
    first = table.records[0]
    assert first["times the first row's"] == 1.0 and first["operations, TFLOP"] == SAMPLING.flops() / 1e12
    step = first["one step of the UNet, ms"]
    assert first["step, TFLOP/s"] == pytest.approx(first["of a step, TFLOP"] / step.cpu_seconds[0])
    assert step.busy_median(torch.device("cuda")) == step.median
    table = measure_diffusion_training(training, CPU, 1, memory=False)
    assert [record["latents"] for record in table.records] == 2 * ["from the cache", "encoded"]
    for record in table.records:
        assert record["samples per second"] == pytest.approx(4 / record["ms"].median)
    assert table.records[0]["times faster with the cache"] > 0 and "4 objects" not in table.title
    assert "2 x 2 objects of 6 views of 32 px" in table.title and "| encoded |" in table.markdown()


def test_what_does_not_fit_is_named(monkeypatch):
    whole = SamplingRun.__call__

    def call(self):
        if self.workload.attention == "full":
            raise torch.OutOfMemoryError("too large")
        return whole(self)

    monkeypatch.setattr(SamplingRun, "__call__", call)
    sparse, full = measure_sampling(SAMPLING, CPU, 1, memory=False).records
    assert isinstance(sparse["whole, ms"], Timing) and full["whole, ms"] == TOO_LARGE
    assert full["step, TFLOP/s"] is None and full["times the first row's"] is None


def test_random_components_have_the_asked_precision():
    parts = random_components(TINY, dtype=torch.float16)
    assert {parts.vae.dtype, parts.image_encoder.dtype, parts.image_normalizer.mean.dtype} == {torch.float16}
    for part in (parts.vae, parts.image_encoder, parts.image_normalizer):
        assert not any(weight.requires_grad for weight in part.parameters()) and not part.training


def test_the_command_knows_the_parts():
    command = [sys.executable, "scripts/benchmark.py", "--what", "sampling,diffusion_training,dance"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "dance" in done.stderr and "sampling, diffusion_training" in done.stderr
