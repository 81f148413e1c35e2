"""Losses in the features of frozen networks: GS-LRM's perceptual loss (VGG-19) and LPIPS (VGG-16).
Their weights are found on disk; nothing is ever downloaded. The masked forms weight each layer's map of differences by
the mask, averaged over the area that a feature stands for (its stride), and divide by the sum of these weights: with a
mask of ones they are the plain forms, exactly. A feature at the outline also sees some background (its receptive
field).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from gslrm.config import LossesConfig
from gslrm.losses import weighted_mean
from multiview.checkpoint import load_checkpoint, load_strict
from multiview.metrics import load_lpips

VGG16_FILE = "vgg16-397923af.pth"  # torchvision's ImageNet weights, for LPIPS
VGG19_FILES = ("imagenet-vgg-verydeep-19.mat", "imagenet-vgg-verydeep-19.pt")  # MatConvNet's, or the same as tensors
CHECKPOINT_PREFIX = r"^(module\.)?loss_calculator\.perceptual_loss_module\.net\."

CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512)
POOL_BEFORE = (3, 5, 9, 13)  # number of the convolution that follows a pooling
# Convolutions 1_2, 2_2, 3_2, 4_2, 5_2 by running number, and the weight of the features after their ReLU.
FEATURE_WEIGHTS = {2: 1 / 2.6, 4: 1 / 4.8, 6: 1 / 3.7, 10: 1 / 5.6, 14: 10 / 1.5}
RGB_MEAN = (123.68, 116.779, 103.939)


class VGG19(nn.Module):
    """The convolutions of VGG-19 with average pooling; conv1 ... conv16 as in GS-LRM checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(1, 17):
            setattr(self, f"conv{number}", nn.Conv2d(CHANNELS[number - 1], CHANNELS[number], 3, padding=1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """[n, 3, h, w] mean-free 0..255 -> features of the layers in FEATURE_WEIGHTS."""
        features = []
        for number in range(1, max(FEATURE_WEIGHTS) + 1):
            if number in POOL_BEFORE:
                images = functional.avg_pool2d(images, 2)
            images = functional.relu(getattr(self, f"conv{number}")(images))
            if number in FEATURE_WEIGHTS:
                features.append(images)
        return features


class PerceptualLoss(nn.Module):
    """Weighted L1 distance of images and VGG-19 features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = VGG19()
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(1, 3, 1, 1), persistent=False)

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """[b, (t,) 3, h, w] in 0..1, twice; mask [b, (t,) 1, h, w] in 0..1 -> [b]."""
        images, truth = (255.0 * x.flatten(0, -4) - self.mean for x in (prediction, target))
        with torch.no_grad():
            true_features = self.net(truth)
        distance = map_mean((images - truth).abs(), mask, len(prediction))
        for weight, features, truth in zip(FEATURE_WEIGHTS.values(), self.net(images), true_features):
            distance = distance + weight * map_mean((features - truth).abs(), mask, len(prediction))
        return distance / 255.0


class LPIPSLoss(nn.Module):
    """LPIPS with the network of `multiview.metrics.load_lpips`, per sample and optionally masked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """[b, (t,) 3, h, w] in 0..1, twice; mask [b, (t,) 1, h, w] in 0..1 -> [b]."""
        import lpips

        def unit_features(images: Tensor) -> list[Tensor]:  # per layer [n, c, h', w'], unit length over c
            images = self.network.scaling_layer(images.flatten(0, -4) * 2.0 - 1.0)
            return [lpips.normalize_tensor(features) for features in self.network.net(images)]

        features = unit_features(prediction)
        with torch.no_grad():
            true_features = unit_features(target)
        layers = zip(self.network.lins, features, true_features)
        return sum(map_mean(linear((x - truth).square()), mask, len(prediction)) for linear, x, truth in layers)


def map_mean(maps: Tensor, mask: Tensor | None, num_samples: int) -> Tensor:
    """Mean of maps [n, c, h', w'] over each sample's images: [num_samples]; n is a multiple of num_samples. mask:
    [..., 1, h, w], n images; averaged down to h' x w' as weights."""
    maps = maps.mean(1, keepdim=True)
    if mask is None:
        return maps.reshape(num_samples, -1).mean(1)
    weight = functional.adaptive_avg_pool2d(mask.flatten(0, -4), maps.shape[-2:])
    return weighted_mean(maps.reshape(num_samples, -1), weight.reshape(num_samples, -1))


def load_networks(losses: LossesConfig, device: torch.device) -> dict[str, nn.Module]:
    """Returns the frozen networks of the losses whose weight is above 0. Raises ValueError naming a missing file."""
    networks: dict[str, nn.Module] = {}
    for key, names, what in (
        ("lpips", (VGG16_FILE,), "torchvision's VGG-16 weights"),
        ("perceptual", VGG19_FILES, "MatConvNet's VGG-19 weights"),
    ):
        if getattr(losses, f"{key}_loss_weight") <= 0:
            continue
        path = next((path for path in (Path(losses.vgg_folder, name) for name in names) if path.is_file()), None)
        if path is None:
            setting, place = f"training.losses.{key}_loss_weight", Path(losses.vgg_folder, " or ".join(names))
            raise ValueError(f"{setting} is above 0 and needs {what} at {place}: put it there, or set {setting}=0")
        networks[key] = LPIPSLoss(load_lpips(device, path)) if key == "lpips" else load_perceptual(path).to(device)
    return networks


def load_perceptual(path: Path) -> PerceptualLoss:
    """Reads `.mat` (MatConvNet), or `.pt` with conv1.weight ... or a GS-LRM checkpoint that holds these tensors."""
    loss, state = PerceptualLoss(), {}
    if path.suffix == ".mat":
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        try:
            layers = loadmat(path, squeeze_me=True, struct_as_record=False)["layers"]
        except (KeyError, ValueError, NotImplementedError, MatReadError) as error:
            raise ValueError(f"{path} is not MatConvNet's imagenet-vgg-verydeep-19.mat: {error}") from error
        for number, layer in enumerate([layer for layer in layers if layer.type == "conv"][:16], 1):
            weight, bias = (torch.from_numpy(values).float() for values in layer.weights)
            state[f"conv{number}.weight"] = weight.permute(3, 2, 0, 1).contiguous()  # rows, columns, in, out
            state[f"conv{number}.bias"] = bias.reshape(-1)
    else:
        content = load_checkpoint(path)
        for name, tensor in content.get("model", content).items():
            name = re.sub(CHECKPOINT_PREFIX, "", name)
            if re.fullmatch(r"conv\d+\.(weight|bias)", name):
                state[name] = tensor
    load_strict(loss.net, state, path)
    return loss.eval().requires_grad_(False)
