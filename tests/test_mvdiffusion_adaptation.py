"""What of the UNet trains and how fast: LoRA, the frozen encoder, layer-wise rates, schedules; resumed exactly."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from mvdiffusion_tiny import UNET, config_for, losses, prepare, unet_inputs
from safetensors.torch import load_file

from multiview.checkpoint import is_adapter_weight, merged_weights, read_rig
from multiview.run import seed_everything
from mvdiffusion.checkpoints import newest_training
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.models.unet import create_unet, load_unet
from mvdiffusion.training import choose_trained, make_optimizer, train, trained_parameters

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"), "uniform4")


def quick(tiny, output: Path, **changes):
    """Large steps without accumulation or warm-up: what trains moves visibly."""
    fast = {"gradient_accumulation_steps": 1, "learning_rate": 1e-2, "lr_warmup_steps": 0, "validation_num_steps": 1}
    return config_for(tiny, output, **{**fast, **changes})


def small_unet(camera_conditioning: str = "none"):
    torch.manual_seed(0)
    return create_unet(dict(UNET), 4, "sparse", camera_conditioning)


def first_weights(camera_conditioning: str = "none") -> dict[str, torch.Tensor]:
    """What a run of seed 0 begins with."""
    seed_everything("mvdiffusion unet", 0)
    return create_unet(dict(UNET), 4, "sparse", camera_conditioning).state_dict()


@torch.no_grad()
def run_stock(unet):
    inputs, prompts, labels = unet_inputs(4).values()
    return unet(inputs, 7, encoder_hidden_states=prompts, class_labels=labels).sample


def test_merged_adapters_are_the_adapted_unet():
    unet, plain = small_unet(), small_unet()
    config = MVDiffusionConfig(lora_rank=3, lora_alpha=6.0, lora_targets=["to_q", "to_out.0", "conv1"])
    choose_trained(unet, config)
    torch.testing.assert_close(run_stock(unet), run_stock(plain), atol=0, rtol=0)  # B is zero: no effect yet
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if is_adapter_weight(name):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    state = merged_weights(unet)
    assert state.keys() == plain.state_dict().keys() and not any(map(is_adapter_weight, plain.state_dict()))
    plain.load_state_dict(state)
    adapted = run_stock(unet)
    torch.testing.assert_close(run_stock(plain), adapted, atol=2e-5, rtol=1e-4)
    assert (adapted - run_stock(small_unet())).abs().max() > 1e-2


def test_adapters_and_new_camera_weights_train_and_nothing_else():
    unet = small_unet("adaln")
    choose_trained(unet, MVDiffusionConfig(lora_rank=2, lora_also_train=["conv_in"]))
    names = set(trained_parameters(unet))
    assert {"conv_in.weight", "conv_in.bias", "camera.output.weight"} <= names
    rest = {name for name in names if not is_adapter_weight(name) and not name.startswith(("conv_in.", "camera."))}
    assert not rest and sum(map(is_adapter_weight, names)) > 10
    with pytest.raises(ValueError, match="no layer of .*UNet.* is called .'to_w'"):
        choose_trained(small_unet(), MVDiffusionConfig(lora_rank=2, lora_targets=["to_q", "to_w"]))


def test_lora_run_resumes_exactly_and_saves_both_forms(tiny, tmp_path):
    changes = {"lora_rank": 2, "lora_save_merged": False, "camera_conditioning": "adaln"}
    output = tmp_path / "run"
    train(quick(tiny, output, **changes))
    whole, last = losses(output), output / "checkpoint-4"
    assert not (output / "checkpoint-2" / "unet").exists()  # adapters alone on the way, everything at the end
    merged = load_unet(last / "unet_ema")
    assert merged.config.camera_conditioning == "adaln" and not any(map(is_adapter_weight, merged.state_dict()))
    shipped = load_file(last / "lora" / "adapter_model.safetensors")
    settings = json.loads((last / "lora" / "adapter_config.json").read_text())
    assert all(name.startswith("base_model.model.") and ".default." not in name for name in shipped)
    assert settings["r"] == 2 and settings["peft_type"] == "LORA"
    # The last merged weights are first weights + B A, layer by layer.
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    up, down = (shipped[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "BA")
    first = first_weights("adaln")[f"{name}.weight"]
    torch.testing.assert_close(merged.state_dict()[f"{name}.weight"], first + up @ down)
    assert (up @ down).abs().max() > 1e-5

    (last / "optimizer.pt").write_bytes(b"cut")  # as killed while it was written
    train(quick(tiny, output, **changes))
    assert losses(output) == whole
    found = newest_training(output, read_rig(last / "unet"), asdict(quick(tiny, output, **changes)))
    assert found.sidecar["step"] == 4 and set(found.trained) == {"own", "ema", "base"}
    with pytest.raises(ValueError, match="adapters of other weights"):
        train(quick(tiny, output, **changes, seed=1))  # another seed, another fresh UNet
    with pytest.raises(ValueError, match="run of another model .lora_rank: 2 there, 4 now"):
        train(quick(tiny, output, **{**changes, "lora_rank": 4}))


def test_frozen_encoder_and_layer_rates_hold_also_after_a_resume(tiny, tmp_path):
    output = tmp_path / "run"
    options = {"freeze_encoder": True, "lr_multipliers": {"attn1": 0.0}, "checkpointing_steps": 1}
    config = quick(tiny, output, **options, checkpoints_total_limit=4)
    train(config)
    whole = losses(output)
    states = [load_unet(output / f"checkpoint-{step}" / "unet").state_dict() for step in (1, 2, 3)]
    still = {name for name in states[0] if ".attn1." in name}
    assert all(torch.equal(states[2][name], first_weights()[name]) for name in still)
    encoder = {name for name in states[0] if name.startswith("down_blocks.")} - still
    assert all(torch.equal(states[0][name], states[1][name]) for name in encoder)
    assert not torch.equal(states[0]["conv_in.weight"], states[1]["conv_in.weight"])
    assert sum(not torch.equal(states[1][name], states[2][name]) for name in encoder) > 0.9 * len(encoder)
    # Resumed before the half: the encoder's moments start when it is let go, as in the unbroken run.
    for step in (2, 3, 4):
        (output / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"cut")
    train(config)
    assert losses(output) == whole
    with pytest.raises(ValueError, match="run of another model .lr_multipliers"):
        train(quick(tiny, output))


def test_layers_have_rates_of_their_own():
    unet = small_unet("concat")
    config = MVDiffusionConfig(
        learning_rate=1e-3, lr_warmup_steps=0, lr_multipliers={r"\.attn1\.": 0.1, r"(^|\.)camera\.": 10.0},
        camera_embedding_lr_mult=2.0,
    )  # fmt: skip
    groups = make_optimizer(trained_parameters(unet), config, CPU).param_groups
    factors = {id(parameter): group["multiplier"] for group in groups for parameter in group["params"]}
    expected = {"attn1": 0.1, "camera": 10.0, "class_embedding": 2.0}
    for name, parameter in unet.named_parameters():
        factor = next((factor for part, factor in expected.items() if part in name.split(".")), 1.0)
        assert factors[id(parameter)] == factor, name
    with pytest.raises(ValueError, match="no trained parameter's name matches"):
        make_optimizer(trained_parameters(unet), MVDiffusionConfig(lr_multipliers={"atn1": 2.0}), CPU)


def test_8bit_adam_is_refused_where_it_cannot_be(monkeypatch):
    config, parameters = MVDiffusionConfig(use_8bit_adam=True), trained_parameters(small_unet())
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        make_optimizer(parameters, config, CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        make_optimizer(parameters, config, torch.device("cuda"))


def test_only_named_modules_train():
    unet = small_unet()
    choose_trained(unet, MVDiffusionConfig(trainable_modules=["attn1"]))
    assert set(trained_parameters(unet)) == {name for name, _ in unet.named_parameters() if "attn1" in name}
    with pytest.raises(ValueError, match="names no parameter"):
        choose_trained(unet, MVDiffusionConfig(trainable_modules=["attn9"]))
