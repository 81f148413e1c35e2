"""GS-LRM: FaceLift's numbers and names, its input variants, and pruning of the background."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from gslrm.checkpoints import load_gslrm, model_weights
from gslrm.config import IGNORED_KEYS, GSLRMConfig, ModelConfig, model_config_from_dict
from gslrm.model.gslrm import GSLRM
from gslrm.training import parameter_groups
from multiview.cameras import Cameras
from multiview.checkpoint import load_checkpoint, load_strict
from multiview.config import load_config
from tests import oracle_gslrm

GOLDEN = Path(__file__).parent / "golden" / "gslrm_small"
CHECKPOINT = GOLDEN / "ckpt_0000000000000007.pt"
TOLERANCE = 2e-5  # of values of size 1; larger ones by their size


@pytest.fixture(scope="module")
def golden():
    model, rig, _ = load_gslrm(CHECKPOINT, config_file=GOLDEN / "config.yaml")
    assert rig is None  # public weights carry none
    inputs = load_file(GOLDEN / "inputs.safetensors")
    cameras = Cameras(inputs["c2w"], inputs["fxfycxcy"], 32, 32)
    return model, inputs["image"], cameras, load_file(GOLDEN / "outputs.safetensors")


def golden_config() -> GSLRMConfig:
    return load_config(GSLRMConfig, GOLDEN / "config.yaml", ignored=set(IGNORED_KEYS))


def tiny(**changes) -> ModelConfig:
    content = {
        "image_tokenizer": {"image_size": 16, "patch_size": 8, "in_channels": changes.pop("in_channels", 9)},
        "transformer": {"d": 32, "d_head": 16, "n_layer": 2},
        **changes,
    }
    return model_config_from_dict(content, "test")


def posed_views(num_views=3, size=16, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, num_views, 3, size, size, generator=generator)
    azimuths = torch.arange(num_views) * 360.0 / num_views
    cameras = Cameras.orbit(azimuths, torch.full_like(azimuths, 20.0), 2.7, 1.07, size)
    stacked = Cameras(cameras.c2w.expand(batch, -1, -1, -1), cameras.fxfycxcy.expand(batch, -1, -1), size, size)
    return images, stacked


def spread(model: GSLRM) -> GSLRM:
    """Weights ten times the initial ones, so that the output's values differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10.0)
    return model


def assert_same(got, expected, name=""):
    """Float sums differ by the machine's vector units, in proportion to the size of what is summed."""
    error, size = (got - expected).abs().max().item(), expected.abs().max().item()
    assert error < TOLERANCE * max(1.0, size), f"{name}: {error:.2g} of {size:.2g}"


def rows_of(gaussians) -> torch.Tensor:
    """[b, n, D]: xyz, SH, log-scale, rotation, opacity."""
    fields = ("xyz", "features", "scaling", "rotation", "opacity")
    return torch.cat([getattr(gaussians, name).flatten(2) for name in fields], dim=-1)


@torch.no_grad()
def test_golden_values_are_reproduced(golden):
    model, images, cameras, expected = golden
    seen = {}

    def note(name, of_input=False):
        return lambda _, inputs, output: seen.update({name: inputs[0] if of_input else output})

    hooks = [
        model.patch_embedder[0].register_forward_hook(note("posed_images", of_input=True)),
        model.input_layer_norm.register_forward_hook(note("tokens_after_input_norm")),
        model.transformer_layers[0].register_forward_hook(note("layer0_out")),
        model.transformer_layers[2].register_forward_hook(note("layer2_out")),
        model.gaussian_upsampler.register_forward_hook(note("free_gaussian_params")),
    ]
    output = model(images, cameras)
    for hook in hooks:
        hook.remove()
    posed = rearrange(seen["posed_images"], "(b v hh ww) ph pw c -> b v c (hh ph) (ww pw)", b=1, hh=4, ww=4)
    for name, value in {**seen, "posed_images": posed}.items():
        assert_same(value, expected[f"tap.{name}"], name)
    truth = expected["clip_off.pixelalign_xyz"].permute(0, 1, 3, 4, 2).flatten(1, 3)  # [1, v * h * w, 3]
    assert_same(output.pixel_xyz, truth[0][output.pixel_index])
    assert output.gaussians.xyz.abs().max() > 1  # inference never clips
    clipped = model(images, cameras, clip_xyz=True).gaussians
    for name, gaussians in (("clip_off", output.gaussians), ("clip_on", clipped)):
        raw = {key.split(".")[-1]: value for key, value in expected.items() if key.startswith(f"{name}.raw.")}
        assert "xyz" in raw
        for key, value in raw.items():
            assert_same(getattr(gaussians, "features" if key == "features_dc" else key)[0], value, key)
    for key in ("scaling", "rotation", "opacity"):
        assert_same(getattr(output.gaussians, f"get_{key}")[0], expected[f"clip_off.act.{key}"], key)


def test_weights_and_optimizer_groups_are_exactly_facelifts():
    config = golden_config()
    model, stored = GSLRM(config.model), set(load_checkpoint(CHECKPOINT)["model"])
    assert set(model.state_dict()) == stored
    marked = replace(config.model, add_refsrc_marker=True)
    assert set(GSLRM(marked).state_dict()) - stored == {"view_type_embeddings"}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config.training.optimizer.weight_decay)
    own = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]
    for group, expected in zip(own, json.loads((GOLDEN / "info.json").read_text())["optimizer_groups"], strict=True):
        assert all(group[key] == expected[key] for key in ("params", "weight_decay"))


def test_a_checkpoint_that_does_not_fit_is_refused_by_name():
    weights, model = load_checkpoint(CHECKPOINT)["model"], GSLRM(golden_config().model)
    name = "input_layer_norm.weight"
    for changed, message in (
        ({key: value for key, value in weights.items() if key != name}, f"missing.*{name}"),
        ({**weights, "loss_calculator.other": torch.zeros(1)}, "unexpected.*loss_calculator.other"),
        ({**weights, name: torch.zeros(3)}, f"shape.*{name}"),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_strict(model, model_weights({"model": changed}, CHECKPOINT), CHECKPOINT)


AUGMENTED = {"use_custom_plucker": False, "use_aug_plucker": True, "in_channels": 12}
PLAIN = {"use_custom_plucker": False}


FLAGS = (
    {}, {"use_aug_plucker": True},  # custom takes precedence
    {"depth_preact_bias": 1.5}, {"add_refsrc_marker": True}, {"hard_pixelalign": False},
    {"depth_min": 1.0, "depth_max": 4.0, "depth_reference_origin": True},  # of plain input only
    {"gaussians": {"sh_degree": 1, "n_gaussians": 0}}, {"gaussians": {"sh_degree": 3}},
    {"gaussians": {"sh_degree": 2, "n_gaussians": 5, "scaling_modifier": 0.5}},
    AUGMENTED, {**AUGMENTED, "add_refsrc_marker": True, "gaussians": {"n_gaussians": 1}},
    PLAIN, {**PLAIN, "depth_min": 1.0, "depth_max": 4.0}, {**PLAIN, "depth_min": 1.0},  # needs both
    {**PLAIN, "depth_reference_origin": True, "depth_preact_bias": -0.7}, {**PLAIN, "hard_pixelalign": False},
)  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_flag_follows_the_formulas(flags):
    torch.manual_seed(0)
    model = spread(GSLRM(tiny(**flags)))
    images, cameras = posed_views()
    output = model(images, cameras)
    rows = rows_of(output.gaussians)[0]
    expected = oracle_gslrm.gaussians(model, images[0], cameras[0])
    assert rows.shape == expected.shape and output.n_free == model.config.gaussians.n_gaussians
    assert expected.std(0).min() > 0.01
    assert_same(rows, expected)
    with torch.no_grad():
        model.gaussian_upsampler.linear.weight *= 20.0  # so that free Gaussians lie beyond the borders too
    clipped = rows_of(model(images, cameras, clip_xyz=True).gaussians)[0]
    assert_same(clipped, oracle_gslrm.gaussians(model, images[0], cameras[0], clip_xyz=True))


def test_any_number_of_views_of_any_shape_follows_the_formulas():
    torch.manual_seed(0)
    model = spread(GSLRM(tiny(add_refsrc_marker=True)))
    cases = [posed_views(num_views) for num_views in (1, 2, 4, 6, 9)]
    square, shift = cases[2][1], torch.tensor([1.3, -2.1, 3.7, 0.4])
    cases.append((torch.rand(1, 4, 3, 16, 24), Cameras(square.c2w, square.fxfycxcy + shift, 16, 24)))  # off-center
    for images, cameras in cases:
        rows = rows_of(model(images, cameras).gaussians)[0]
        assert rows.shape[0] == 2 + images[:, :, 0].numel()
        assert_same(rows, oracle_gslrm.gaussians(model, images[0], cameras[0]))


def test_inference_gives_the_numbers_of_training(monkeypatch):
    """Without gradients linear layers go through oneDNN's layout, unless something is wrapped around them."""
    torch.manual_seed(0)
    model = spread(GSLRM(tiny()))
    images, cameras = posed_views()
    expected = rows_of(model(images, cameras).gaussians)
    calls, original = [], torch.Tensor.to_mkldnn
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda x: calls.append(1) or original(x))
    with torch.no_grad():
        assert_same(rows_of(model(images, cameras).gaussians), expected)
        used = len(calls)
        assert used == (3 * 2 if torch.backends.mkldnn.is_available() else 0)
        for layer in model.transformer_layers:
            layer.attn.fc = Wrapped(layer.attn.fc)
        assert_same(rows_of(model(images, cameras).gaussians), expected)
    assert len(calls) - used == used * 2 // 3


class Wrapped(torch.nn.Module):
    """As an adapter library wraps a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        assert not x.is_mkldnn
        return self.layer(x)


def test_autocast_leaves_rays_and_heads_in_full_precision():
    images, cameras = posed_views()
    model = GSLRM(tiny())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, cameras)
    assert output.gaussians.xyz.dtype == torch.float32
    offset = output.pixel_xyz - output.ray_origins
    assert torch.linalg.cross(offset, output.ray_directions).norm(dim=-1).max() < 1e-5
    assert torch.equal(output.ray_directions, model(images, cameras).ray_directions)


def test_inputs_that_do_not_go_together_are_refused():
    (images, cameras), masks = posed_views(), torch.ones(1, 3, 1, 16, 16)
    for arguments, word in (
        ((images[:, :, :2], cameras, None), "images"), ((images[..., :12], cameras, None), "images"),
        ((images, cameras[:, :2], None), "cameras"), ((images, cameras, masks), "masks"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            GSLRM(tiny())(*arguments[:2], masks=arguments[2])


def test_model_config_survives_the_sidecar():
    config = tiny(prune_background_tokens=True, gaussians={"n_gaussians": 4, "sh_degree": 1})
    assert model_config_from_dict(json.loads(json.dumps(asdict(config))), "sidecar") == config
    for wrong, message in (
        ({"transformer": {"heads": 3}}, "model.transformer.heads"), ({"transformer": None}, "model.transformer.None"),
        ({"transformer": {"d": "256"}}, "model.transformer.d must be a int, got '256'"), ([1], r"model.\[1\]"),
        ({"hard_pixelalign": 1}, "hard_pixelalign must be a bool"), ({"transformer": {"d": 0.5}}, "d must be a int"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"sidecar: .*{message}"):
            model_config_from_dict(wrong, "sidecar")


def test_models_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="in_channels must be 12"):
        GSLRM(tiny(use_custom_plucker=False, use_aug_plucker=True))
    with pytest.raises(ValueError, match="prune_margin_px must be at least 0, got -1"):
        GSLRM(tiny(prune_margin_px=-1))
