"""Losses in VGG features against the published formulas, with seeded weights in the layouts of the real files."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gslrm.config import LossesConfig
from gslrm.perceptual import VGG16_FILE, VGG19, LPIPSLoss, PerceptualLoss, load_networks, load_perceptual
from tests.test_gslrm_losses import B, images, soft_mask

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A folder with seeded stand-ins in the real files' layouts: torchvision's VGG-16, MatConvNet's VGG-19."""
    from scipy.io import savemat
    from torchvision.models import vgg16

    folder = tmp_path_factory.mktemp("vgg")
    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in vgg16(weights=None).state_dict().items() if k.startswith("features.")}
    torch.save({name: seeded(shape, generator) for name, shape in shapes.items()}, folder / VGG16_FILE)
    state = {name: seeded(value.shape, generator) for name, value in VGG19().state_dict().items()}
    layers = []
    for number in range(1, 17):
        weights = np.empty(2, dtype=object)
        weights[0] = state[f"conv{number}.weight"].permute(2, 3, 1, 0).numpy()  # rows, columns, in, out
        weights[1] = state[f"conv{number}.bias"].numpy()[None]
        layers += [{"type": "conv", "name": f"c{number}", "weights": weights}, {"type": "relu", "name": f"r{number}"}]
    layers.append({"type": "conv", "name": "fc6", "weights": weights})  # the real file goes on; that must not matter
    savemat(folder / "imagenet-vgg-verydeep-19.mat", {"layers": np.array(layers, dtype=object)})
    return folder, state


def seeded(shape, generator) -> torch.Tensor:
    if len(shape) == 1:
        return 0.05 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * math.sqrt(2 / (shape[1] * 9))


@pytest.fixture(scope="module")
def networks(vgg):
    loaded = load_networks(LossesConfig(vgg_folder=str(vgg[0])), torch.device("cpu"))
    return {name: network.double() for name, network in loaded.items()}


def layer_means(maps: list[torch.Tensor], mask: torch.Tensor | None) -> float:
    """Mean over one sample's maps [h', w'], one per view; weighted by the pooled masks [t, 1, h, w]."""
    values = np.stack([m.numpy() for m in maps])
    if mask is None:
        return values.mean()
    size = values.shape[-1]
    blocks = mask[:, 0].numpy().reshape(len(mask), size, mask.shape[-1] // size, size, -1)
    weights = blocks.mean(axis=(2, 4))
    return (values * weights).sum() / weights.sum()


@pytest.mark.parametrize("masked", [False, True])
def test_perceptual_loss_formula(vgg, networks, masked):
    """UPSTREAM: average pooling, L1 on the picture and after five ReLUs, sum / 255."""
    size = 16
    a, b, mask = images(0, size=size), images(1, size=size), soft_mask(size) if masked else None
    value = networks["perceptual"](a, b, mask)
    weights = {2: 1 / 2.6, 4: 1 / 4.8, 6: 1 / 3.7, 10: 1 / 5.6, 14: 10 / 1.5}
    state = {name: tensor.double() for name, tensor in vgg[1].items()}
    mean = torch.tensor([123.68, 116.779, 103.939], dtype=torch.float64)[:, None, None]
    for i in range(B):
        x, y = 255 * a[i] - mean, 255 * b[i] - mean
        expected = layer_means(list((x - y).abs().mean(1)), None if mask is None else mask[i])
        for n in range(1, 15):
            if n in (3, 5, 9, 13):
                x, y = (t.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)) for t in (x, y))
            x, y = (
                torch.conv2d(t, state[f"conv{n}.weight"], state[f"conv{n}.bias"], padding=1).clamp_min(0)
                for t in (x, y)
            )
            if n in weights:
                expected += weights[n] * layer_means(list((x - y).abs().mean(1)), None if mask is None else mask[i])
        assert value[i].item() == pytest.approx(expected / 255, rel=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_lpips_formula(vgg, networks, masked):
    """Zhang et al. 2018: unit-length features, squared differences, learned channel weights, summed over 5 layers."""
    size = 16
    a, b, mask = images(0, size=size), images(1, size=size), soft_mask(size) if masked else None
    value = networks["lpips"](a, b, mask)
    state = {k: v.double() for k, v in torch.load(vgg[0] / VGG16_FILE, weights_only=True).items()}
    linear = [layer.weight.double() for layer in networks["lpips"].network.lins.modules() if hasattr(layer, "weight")]
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None].double()
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None].double()
    pools, taps = (4, 9, 16, 23), (2, 7, 14, 21, 28)  # layer numbers in torchvision's `features`
    for i in range(B):
        x, y = ((2 * p[i] - 1 - shift) / scale for p in (a, b))
        expected = 0.0
        for n in range(29):
            if n in pools:
                x, y = (torch.max_pool2d(t, 2) for t in (x, y))
            if f"features.{n}.weight" in state:
                weight, bias = state[f"features.{n}.weight"], state[f"features.{n}.bias"]
                x, y = (torch.conv2d(t, weight, bias, padding=1).clamp_min(0) for t in (x, y))
            if n in taps:
                unit = [t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (x, y)]
                maps = ((unit[0] - unit[1]).square() * linear[taps.index(n)].view(1, -1, 1, 1)).sum(1)
                expected += layer_means(list(maps), None if mask is None else mask[i])
        assert value[i].item() == pytest.approx(expected, rel=1e-6)


def test_lpips_is_the_librarys_and_a_mask_of_ones_changes_nothing(networks):
    a, b = images(0, size=16)[:, :2], images(1, size=16)[:, :2]
    own = networks["lpips"].network(a.flatten(0, 1) * 2 - 1, b.flatten(0, 1) * 2 - 1).view(B, 2).mean(1)
    for name, network in networks.items():
        plain = network(a, b)
        assert torch.allclose(network(a, b, torch.ones_like(a[:, :, :1])), plain, rtol=1e-12)
        assert torch.allclose(network(a[:, 0], b[:, 0]), network(a[:, :1], b[:, :1]), rtol=1e-12)  # b 3 h w
        assert (network(a, a) == 0).all() and (plain > 0).all()
        if name == "lpips":
            assert torch.allclose(plain, own, rtol=1e-9)


def test_network_losses_have_finite_gradients_even_of_dead_features_and_empty_masks(networks):
    dead = LPIPSLoss(networks["lpips"].network)
    weights = [p for p in dead.parameters() if p.ndim == 1]
    before = [p.clone() for p in weights]
    target, mask = images(1, size=16)[:, :1], torch.zeros(B, 1, 1, 16, 16, dtype=torch.float64)
    mask[0, :, :, 4:10, 5:11] = 1.0
    for bias in (None, -1e3):  # -1e3: every feature is 0, where a length has no derivative
        for parameter, value in zip(weights, before):
            parameter.data.copy_(value if bias is None else torch.full_like(value, bias))
        for network in (dead, networks["perceptual"]):
            prediction = images(0, size=16)[:, :1].requires_grad_()
            value = network(prediction, target, mask)
            assert value[1] == 0 and torch.isfinite(value).all()
            (gradient,) = torch.autograd.grad(value.sum(), prediction)
            assert torch.isfinite(gradient).all() and (gradient[1] == 0).all()
            assert bias is not None or gradient[0].abs().max() > 0
    for parameter, value in zip(weights, before):
        parameter.data.copy_(value)


def test_vgg19_weights_come_from_mat_pt_and_gslrm_checkpoints(vgg, tmp_path):
    folder, state = vgg
    prefix = "module.loss_calculator.perceptual_loss_module.net."
    content = {"model": {**{prefix + name: value for name, value in state.items()}, "module.other": torch.ones(1)}}
    torch.save(content, tmp_path / "checkpoint.pt")
    torch.save(state, tmp_path / "imagenet-vgg-verydeep-19.pt")
    own = tmp_path / "imagenet-vgg-verydeep-19.pt"
    for path in (folder / "imagenet-vgg-verydeep-19.mat", tmp_path / "checkpoint.pt", own):
        loaded = load_perceptual(path)
        assert all(torch.equal(value, state[name]) for name, value in loaded.net.state_dict().items())
        assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    only_pt = LossesConfig(vgg_folder=str(tmp_path), lpips_loss_weight=0)
    assert isinstance(load_networks(only_pt, torch.device("cpu"))["perceptual"], PerceptualLoss)


def test_missing_vgg_weights_name_key_folder_and_file(tmp_path):
    off = LossesConfig(vgg_folder=str(tmp_path), lpips_loss_weight=0.0, perceptual_loss_weight=0.0)
    assert load_networks(off, torch.device("cpu")) == {}
    for key, file in (("lpips", "vgg16-397923af.pth"), ("perceptual", "imagenet-vgg-verydeep-19")):
        key = f"{key}_loss_weight"
        with pytest.raises(ValueError, match=f"{key}.*{tmp_path}.*{file}.*{key}=0"):
            load_networks(replace(off, **{key: 0.5}), torch.device("cpu"))


def test_a_file_that_is_not_matconvnets_is_named(tmp_path):
    path = tmp_path / "imagenet-vgg-verydeep-19.mat"
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=f"{path} is not MatConvNet's"):
        load_perceptual(path)
