"""What a Stage 2 run keeps: skipped updates, schedules, what trains, and what a resumed run gets back."""

import json
import shutil

import pytest
import torch
from gslrm_toys import SIZE, config_of, logged, start

from gslrm.checkpoints import load_gslrm
from gslrm.config import AdaptationConfig
from gslrm.model.gslrm import GSLRM, TransformerBlock
from gslrm.training import adapt, check_adaptation, compile_blocks, train
from multiview.checkpoint import load_checkpoint, merged_weights
from multiview.rig import load_rig
from multiview.training import SKIP_WINDOW, TrainingDivergedError, rate_factor

RIG = load_rig("mouse6")
LAST = "ckpt_0000000000000006.pt"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def started(toys, tmp_path_factory):
    """A checkpoint to start from."""
    return train(config_of(toys, tmp_path_factory.mktemp("started"), **{"validation.enabled": "false"})) / LAST


def weights_of(path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["model"]


def views():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(1, 6, 3, SIZE, SIZE, generator=generator), RIG.cameras(SIZE)[None]


@pytest.mark.parametrize(
    ("schedule", "warmup", "total", "rules", "expected"),
    [
        ("cosine", 4, 20, "1", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 12: 0.5, 20: 0.0, 30: 0.0}),
        ("linear", 10, 110, "1", {0: 0.1, 9: 1.0, 60: 0.5}), ("constant", 10, 110, "1", {0: 0.1, 9: 1.0, 60: 1.0}),
        ("piecewise_constant", 100, 9, "1:10,0.5:20,0.1", {0: 1, 9: 1, 10: 0.5, 19: 0.5, 20: 0.1, 999: 0.1}),
    ],
)  # fmt: skip
def test_schedules_warm_up_and_follow_their_form(schedule, warmup, total, rules, expected):
    rates = {done: rate_factor(schedule, done, warmup, total, rules) for done in expected}
    assert rates == pytest.approx(expected)
    with pytest.raises(ValueError, match="step_rules must look like"):
        rate_factor("piecewise_constant", 0, 0, 10, "1:x,2")


SKIPPED = {  # every gradient, reason why the update is skipped, whether entries were mended
    "fine": (1e-3, None, False), "exploding": (1e3, "skipped_gradient", False),
    "huge": (1e30, "skipped_gradient", False),  # 1e60 is no float32
    "spoiled": (1e-3, "skipped_nan_loss", False), "nan": (torch.nan, "skipped_gradient", True),
    "partly_nan": (1e-3, None, True), "overflow": (torch.inf, "skipped_overflow", True),
}  # fmt: skip


@pytest.mark.parametrize("case", SKIPPED)
def test_updates_are_skipped_and_counted(toys, tmp_path, case):
    state, (value, reason, is_mended) = start(config_of(toys, tmp_path)), SKIPPED[case]
    if case == "overflow":
        state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        state.scaler.scale(torch.zeros(1))  # as a backward pass would
    before = state.network.input_layer_norm.weight.detach().clone()
    for parameter in state.network.parameters():
        parameter.grad = torch.full_like(parameter, value)
    if case == "partly_nan":
        state.network.gaussian_position_embeddings.grad[0] = torch.nan
    norm = state.update(spoiled=case == "spoiled")
    expected = dict.fromkeys(["skipped_nan_loss", "skipped_gradient", "skipped_overflow"], 0)
    expected |= {"mended_gradient": int(is_mended), **({reason: 1} if reason else {})}
    assert state.counts == expected
    assert torch.equal(before, state.network.input_layer_norm.weight) == bool(reason)
    assert all(bool(parameter.isfinite().all()) for parameter in state.network.parameters())
    assert list(state.recent) == [bool(reason)] and state.updates == int(not reason) and state.tried == 1
    assert all(parameter.grad is None for parameter in state.network.parameters())
    assert (norm is None) == (case == "spoiled") and (case != "nan" or norm == 0)


def test_fp16_scaler_is_updated_after_a_skipped_step(toys, tmp_path):
    state = start(config_of(toys, tmp_path))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for size in (1e4, 1e-3):  # skipped, then taken: unscale_ twice without update() would raise
        loss = sum(parameter.sum() for parameter in state.network.parameters()) * size
        state.scaler.scale(loss).backward()
        state.update(spoiled=False)
    assert state.updates == 1 and state.counts["skipped_gradient"] == 1


def test_more_than_half_of_the_last_200_updates_skipped_is_the_end_and_survives_a_resume(toys, tmp_path):
    state = start(config_of(toys, tmp_path))
    state.recent.extend([True] * 300 + [False] * 100 + [True] * 100)  # half of the last 200, whatever was before
    assert len(state.recent) == SKIP_WINDOW
    state.counts["skipped_gradient"] = 100
    state.save(False)
    resumed = start(config_of(toys, tmp_path))
    assert resumed.recent == state.recent and resumed.counts == state.counts
    resumed.recent.appendleft(True)  # the oldest, so that the next one makes no difference
    resumed.update(spoiled=True)
    with pytest.raises(TrainingDivergedError, match="101 of the last 200.*skipped_gradient 100.*lr.*warmup.*reset_lr"):
        resumed.update(spoiled=True)


def test_reset_lr_starts_warm_up_and_cosine_again_once(toys, started, tmp_path):
    changes = {
        "training.checkpointing.resume_ckpt": started, "training.optimizer.reset_training_state": "false",
        "training.optimizer.lr": 4e-4, "training.schedule.max_fwdbwd_passes": 12, "validation.enabled": "false",
    }  # fmt: skip
    with pytest.raises(ValueError, match="is at pass 6.*max_fwdbwd_passes=6 leaves nothing to do"):
        train(config_of(toys, tmp_path / "no", **{**changes, "training.schedule.max_fwdbwd_passes": 6}))
    reset = {**changes, "training.optimizer.reset_lr": "true"}
    whole = train(config_of(toys, tmp_path / "whole", **reset))
    # two updates of warm-up, then the cosine over the six passes that are left
    assert logged(whole, "lr") == pytest.approx(
        [2e-4, 4e-4, *(2e-4 * (1 + torch.cos(torch.tensor(torch.pi * k / 4))).item() for k in (0, 1, 2, 3))]
    )
    shutil.copytree(whole, tmp_path / "part")
    for path in (tmp_path / "part").glob("ckpt_*0012.pt*"):
        path.unlink()
    train(config_of(toys, tmp_path / "part", **reset))  # repeated: goes on, does not start again
    assert logged(tmp_path / "part", "lr") == logged(whole, "lr") and logged(tmp_path / "part") == logged(whole)


def test_without_reset_the_checkpoints_lr_and_decay_count_and_the_log_says_so(toys, started, tmp_path, caplog):
    changes = {
        "training.checkpointing.resume_ckpt": started, "training.optimizer.reset_training_state": "false",
        "training.schedule.max_fwdbwd_passes": 60, "training.optimizer.lr": 5e-4,
        "training.optimizer.weight_decay": 0.2,
    }  # fmt: skip
    state = start(config_of(toys, tmp_path, **changes))
    assert state.passes == 6 and state.schedule_start == 0
    assert [group["initial_lr"] for group in state.optimizer.param_groups] == [1e-3, 1e-3]
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.05, 0.0]
    assert "reset_lr=true" in caplog.text and "reset_weight_decay=true" in caplog.text
    state = start(config_of(toys, tmp_path, **changes, **{"training.optimizer.reset_weight_decay": "true"}))
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.2, 0.0]


def test_scaler_and_averaged_weights_come_back(toys, tmp_path, monkeypatch):
    config = config_of(toys, tmp_path, **{"training.runtime.ema_decay": 0.5})
    state = start(config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for parameter in state.network.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    state.scaler.scale(torch.zeros(1))
    state.update(spoiled=False)
    state.save(False)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, scaler=torch.amp.GradScaler, **__: scaler("cpu"))
    resumed = start(config)
    assert resumed.scaler.get_scale() == 1024.0 and resumed.updates == 1
    name = "input_layer_norm.weight"
    assert torch.equal(resumed.ema.weights[name], state.ema.weights[name])
    assert not torch.equal(resumed.ema.weights[name], resumed.network.state_dict()[name])
    assert start(config_of(toys, tmp_path)).ema is None


def test_layer_ranges_and_adaptation_that_cannot_be_meant():
    for text, layers in ((None, [*range(24)]), ("none", []), ("20-23", [20, 21, 22, 23]), ("5, 0-1,1", [0, 1, 5])):
        assert check_adaptation(AdaptationConfig(trainable_layers=text), 24) == layers
    for options, message in (
        ({"trainable_layers": "2-4"}, "2-4 is not a range within 0-3"),
        ({"trainable_layers": "3-2"}, "3-2 is not a range"), ({"trainable_layers": "last"}, "must look like 20-23"),
        ({"lora_rank": -1}, "lora_rank must be 0"),
        ({"lora_rank": 2, "lora_dropout": 1.0}, r"lora_dropout in \[0, 1\)"),
        ({"lora_rank": 2, "lora_targets": ["attn.qkv"]}, "lora_targets must be some of attn.to_qkv"),
        ({"lora_rank": 2, "trainable_layers": "none"}, "needs blocks to adapt"),
        ({"trainable_layers": "none", "freeze_embedder": True, "freeze_heads": True}, "freezes everything"),
        ({"lora_rank": 2, "save_adapters": True}, "save_adapters needs.*freeze_heads=true"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_adaptation(AdaptationConfig(**options), 4)


LORA = {
    "training.adaptation.lora_rank": 2, "training.adaptation.trainable_layers": 1,
    "training.adaptation.lora_targets": "[attn.to_qkv,mlp.mlp.0]", "training.adaptation.lora_dropout": 0.1,
    "training.adaptation.freeze_embedder": "true", "training.adaptation.freeze_heads": "true",
    "training.adaptation.save_adapters": "true", "training.runtime.ema_decay": 0.5,
    "training.runtime.grad_checkpoint_every": 1, "training.runtime.recompute_rendering": "true",
    "training.optimizer.lr": 1e-2,
}  # fmt: skip
ADAPTED = ("transformer_layers.1.attn.to_qkv.weight", "transformer_layers.1.mlp.mlp.0.weight")


@pytest.fixture(scope="module")
def adapted(toys, started, tmp_path_factory):
    """A finished run with adapters, and its configuration."""
    options = {**LORA, "training.checkpointing.resume_ckpt": started}
    config = config_of(toys, tmp_path_factory.mktemp("adapted"), **options)
    return train(config), config


def test_adapters_change_nothing_at_first_and_count_as_soon_as_they_move(toys, tmp_path):
    config = config_of(toys, tmp_path, **LORA)
    torch.manual_seed(0)
    model = GSLRM(config.model).eval()
    before, weights = model(*views()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapt(model, config.training.adaptation)
    assert torch.equal(model(*views()).gaussians.xyz, before.gaussians.xyz)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in merged_weights(model).items())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all(".lora_" in name and name.startswith("transformer_layers.1.") for name in trained)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    merged = GSLRM(config.model).eval()
    merged.load_state_dict(merged_weights(model), strict=True)
    got, plain = model(*views()).gaussians, merged(*views()).gaussians
    assert (got.xyz - before.gaussians.xyz).abs().max() > 1e-3
    for name in ("xyz", "features", "scaling", "rotation", "opacity"):
        assert (getattr(got, name) - getattr(plain, name)).abs().max() < 1e-5, name


def test_a_run_with_adapters_moves_only_them_and_writes_plain_weights(adapted, started):
    folder, config = adapted
    content, before = load_checkpoint(folder / LAST), weights_of(started)
    assert list(content["model"]) == list(before)
    moved = {name for name in before if not torch.equal(before[name], content["model"][name])}
    assert moved == set(ADAPTED)
    assert set(content["lora"]["base"]) == {name.replace(".weight", ".base_layer.weight") for name in ADAPTED}
    assert len(content["optimizer"]["state"]) == 4
    model, rig, _ = load_gslrm(folder)  # as inference would: averaged, merged
    assert rig.name == "mouse6" and torch.equal(model.state_dict()[ADAPTED[0]], content["ema"][ADAPTED[0]])
    assert not torch.equal(content["ema"][ADAPTED[0]], content["model"][ADAPTED[0]])


def test_a_resumed_run_with_adapters_takes_the_same_steps(toys, started, adapted, tmp_path):
    (whole, _), folder = adapted, tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in folder.glob("ckpt_*0006.pt*"):
        path.unlink()
    train(config_of(toys, folder, **LORA, **{"training.checkpointing.resume_ckpt": started}))
    assert logged(folder) == logged(whole)
    contents = [load_checkpoint(path / LAST) for path in (whole, folder)]
    first, second = ({**c["ema"], **c["lora"]["adapters"], **c["lora"]["base"]} for c in contents)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saved_adapters_are_small_and_peft_puts_them_on(adapted, started):
    from peft import PeftModel

    folder, config = adapted
    size = sum(path.stat().st_size for path in (folder / "adapters").iterdir())
    assert size < 0.1 * (folder / LAST).stat().st_size
    assert (folder / "adapters" / "rig.json").is_file()
    model = GSLRM(config.model)
    model.load_state_dict(weights_of(started), strict=True)
    adapted_model = PeftModel.from_pretrained(model, folder / "adapters").eval()
    merged = GSLRM(config.model).eval()
    merged.load_state_dict(weights_of(folder / LAST), strict=True)
    got, plain = adapted_model(*views()).gaussians, merged(*views()).gaussians
    assert (got.xyz - plain.xyz).abs().max() < 1e-5


def test_other_adaptation_than_the_checkpoints_is_refused(toys, started, adapted, tmp_path):
    folder, _ = adapted
    whole = {"training.optimizer.reset_training_state": "false", "training.schedule.max_fwdbwd_passes": 9}
    for resume, options, message in (
        (folder, {}, "lora_rank.*reset_training_state=true"),
        (started, LORA, "without adapters"),
        (folder, {**LORA, "training.adaptation.lora_alpha": 8}, "lora_alpha"),
        (started, {"training.adaptation.freeze_heads": "true"}, "trained other parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            start(config_of(toys, tmp_path, **whole, **options, **{"training.checkpointing.resume_ckpt": resume}))
    state = start(config_of(toys, tmp_path, **{"training.checkpointing.resume_ckpt": folder}))  # merged: start any run
    assert torch.equal(state.network.state_dict()[ADAPTED[0]], load_checkpoint(folder / LAST)["ema"][ADAPTED[0]])


def test_freezing_by_layer_range_moves_the_rest_alone(toys, started, tmp_path):
    options = {
        "training.checkpointing.resume_ckpt": started, "training.adaptation.trainable_layers": "0",
        "training.adaptation.freeze_embedder": "true", "training.schedule.max_fwdbwd_passes": 2,
    }  # fmt: skip
    folder = train(config_of(toys, tmp_path, **options))
    before, after = weights_of(started), weights_of(folder / "ckpt_0000000000000002.pt")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    heads = ("gaussian_upsampler.", "pixel_gaussian_decoder.")
    assert moved == {name for name in before if name.startswith(("transformer_layers.0.", *heads))}
    assert json.loads((folder / "config.json").read_text())["config"]["training"]["adaptation"]["freeze_embedder"]


@pytest.mark.parametrize("prune", [False, True])
def test_compiled_blocks_keep_names_and_numbers(toys, tmp_path, monkeypatch, prune):
    """Traced by torch.compile; the code generator is left out, which would take a C++ compiler and minutes."""
    seen = []

    def compile_eagerly(self, **options):
        seen.append(options)
        torch.nn.Module.compile(self, backend="eager", **options)

    monkeypatch.setattr(TransformerBlock, "compile", compile_eagerly)
    config = config_of(toys, tmp_path, **{"model.prune_background_tokens": str(prune).lower()})
    model = GSLRM(config.model).eval()
    images, cameras = views()
    masks = (images[:, :, :1] > 0.9).float() if prune else None
    with torch.no_grad():
        expected, names = model(images, cameras, masks=masks), list(model.state_dict())
        compile_blocks(model)
        got = model(images, cameras, masks=masks)
    assert (got.gaussians.xyz - expected.gaussians.xyz).abs().max() < 1e-5
    assert list(model.state_dict()) == names and seen == [{"dynamic": True if prune else None}] * 2


def test_pruned_samples_of_every_length_share_a_compiled_graph():
    graphs, block = [], TransformerBlock(32, 16)
    block.compile(dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for lengths in ([7, 9], [12, 4], [30, 31], [5, 70], [18, 19], [21, 6], [8, 90], [40, 3], [11, 77], [50, 51], 8, 9):
        tokens = torch.rand(lengths * 2 if isinstance(lengths, int) else sum(lengths), 32)
        with torch.no_grad():
            got, parts = block(tokens, lengths), tokens.split(lengths)
            assert (got - torch.cat([block.forward(part, len(part)) for part in parts])).abs().max() < 1e-5
    assert 0 < len(graphs) <= 3
