"""The multi-view UNet against tensors recorded from FaceLift's own code, and its folder format."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mvdiffusion_tiny import UNET, unet_inputs
from safetensors.torch import load_file

from multiview.rig import load_rig
from mvdiffusion.models.attention import attend
from mvdiffusion.models.unet import configure_views, create_unet, load_unet, resolve_unet_folder, run_unet, save_unet

GOLDEN = Path(__file__).parent / "golden" / "unet_small"
TOLERANCE = 1e-5  # float32 noise floor 3e-6; another thread count moves 2e-6; one weight moved by 0.01 gives 6e-4


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "outputs.safetensors")


def run(unet, inputs, timestep="timestep"):
    with torch.no_grad():
        return unet(
            inputs["sample"], inputs[timestep], inputs["encoder_hidden_states"], class_labels=inputs["class_labels"]
        ).sample


def test_unet_reproduces_facelift(golden):
    inputs, outputs = golden
    for attention, name, step in (
        (None, "sparse", "timestep"), ("sparse", "sparse", "timestep"), ("full", "dense", "timestep"),
        ("none", "no_multiview", "timestep"), (None, "sparse_scalar_timestep", "timestep_scalar"),
    ):  # fmt: skip
        error = (run(load_unet(GOLDEN, attention=attention), inputs, step) - outputs[name]).abs().max()
        assert error < TOLERANCE, (attention, name)


def test_attention_does_not_depend_on_an_installed_backend(golden):
    """Mistake 22: FaceLift runs dense attention when xformers is missing; here the mode is the processor's own."""
    unet = load_unet(GOLDEN)
    modes = {p.mode for n, p in unet.attn_processors.items() if ".attn1." in n}
    assert modes == {"sparse"} and unet.config.sparse_mv_attention


def test_training_in_bfloat16_on_a_cpu_attends_as_the_fused_kernel_does():
    query, key, value = torch.randn(3, 6, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    lowered = [x.bfloat16().requires_grad_() for x in (query, key, value)]
    ours = attend(*lowered)
    assert ours.grad_fn.name() == "UnsafeViewBackward0" and (ours.float() - exact).abs().max() < 0.02
    ours.sum().backward()
    assert (lowered[2].grad.float().sum((-1, -2)) - 64 * 32).abs().max() < 64  # every query's weights sum to 1
    assert torch.equal(attend(query, key, value), exact)


@torch.no_grad()
def test_sparse_sees_the_reference_view_only():
    unet, inputs, views = create_unet(UNET, 6, "sparse").eval(), unet_inputs(6), {"cameras": None, "reference_view": 0}
    changed = unet_inputs(6)
    changed["inputs"][3] += 1.0
    for mode, seen in (("sparse", [False, False, False, True, False, False]), ("full", [True] * 6)):
        configure_views(unet, 6, mode)
        before, after = (run_unet(unet, step=500, **views, **given) for given in (inputs, changed))
        assert ((before - after).flatten(1).abs().amax(1) > 1e-6).tolist() == seen
    with pytest.raises(ValueError, match="multiple of num_views=6, got 5"):
        run_unet(unet, step=500, **views, **unet_inputs(5))


def test_saved_folder_round_trips_and_keeps_facelifts_config(tmp_path, golden):
    inputs, outputs = golden
    unet, rig = load_unet(GOLDEN), load_rig("facelift6")
    save_unet(unet, tmp_path / "unet", rig)
    written = json.loads((tmp_path / "unet" / "config.json").read_text())
    original = json.loads((GOLDEN / "config.json").read_text())
    del written["_diffusers_version"], original["_diffusers_version"]  # of the writer
    assert written == original
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "unet" / name).read_bytes() == (GOLDEN / name).read_bytes()
    assert json.loads((tmp_path / "unet" / "rig.json").read_text())["name"] == "facelift6"
    assert (run(load_unet(tmp_path / "unet"), inputs) - outputs["sparse"]).abs().max() < TOLERANCE
    assert resolve_unet_folder(tmp_path) == tmp_path / "unet"


def test_conv_in_is_widened_from_a_2d_unet_only(tmp_path):
    config = {**UNET, "in_channels": 4}
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(**config).save_pretrained(tmp_path / "flat")
    with pytest.raises(ValueError, match="in_channels must be 8"):
        load_unet(tmp_path / "flat", num_views=6, attention="sparse")
    unet = load_unet(tmp_path / "flat", num_views=6, attention="sparse", widen_conv_in=True)
    flat = load_file(tmp_path / "flat" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(unet.conv_in.weight[:, :4], flat) and (unet.conv_in.weight[:, 4:] == 0).all()
    # Restarting from a UNet that has its image channels keeps them (FaceLift zeroes them again).
    kept = load_unet(GOLDEN, widen_conv_in=True).conv_in.weight
    assert torch.equal(kept, load_file(GOLDEN / "diffusion_pytorch_model.safetensors")["conv_in.weight"])
    assert kept[:, 4:].abs().max() > 0


def test_unknown_config_key_and_foreign_weights_are_refused(tmp_path):
    folder = tmp_path / "unet"
    shutil.copytree(GOLDEN, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sparse_attention": True}))
    with pytest.raises(ValueError, match="sparse_attention"):
        load_unet(folder)
    (folder / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(ValueError, match="missing: down_blocks"):
        load_unet(folder)
    with pytest.raises(ValueError, match="does not exist"):
        load_unet(tmp_path / "nothing")
