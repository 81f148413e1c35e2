"""The count of operations against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gslrm.config import GaussiansConfig, ImageTokenizerConfig, ModelConfig, TransformerConfig
from gslrm.model.flops import forward_flops
from gslrm.model.gslrm import GSLRM
from multiview.cameras import Cameras


def config_of(**changes) -> ModelConfig:
    return ModelConfig(
        image_tokenizer=ImageTokenizerConfig(image_size=32), transformer=TransformerConfig(d=64, d_head=16, n_layer=3),
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("free, degree, num_views", [(2, 0, 3), (0, 1, 2), (5, 3, 1)])
def test_count_is_what_torch_counts(free, degree, num_views):
    config = config_of(gaussians=GaussiansConfig(n_gaussians=free, sh_degree=degree))
    azimuths = torch.arange(num_views) * 60.0
    cameras = Cameras.orbit(azimuths, torch.zeros(num_views), 2.7, 1.07, 32)[None]
    images = torch.rand(1, num_views, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        GSLRM(config)(images, cameras)
    layers = (f"transformer_layers.{i}" for i in range(3))
    parts = ("patch_embedder", "gaussian_upsampler", "pixel_gaussian_decoder", *layers)
    counts = counter.get_flop_counts()  # the rotation of the rays is a matrix product too, but outside of all modules
    counted = sum(sum(counts[f"GSLRM.{part}"].values()) for part in parts)
    assert counted == forward_flops(config, [free + num_views * 16])


def test_full_size_is_74_tflop_and_samples_add_up():
    config = ModelConfig()
    assert forward_flops(config, [24578]) == pytest.approx(74.3e12, rel=0.01)
    parts = forward_flops(config, [100]) + forward_flops(config, [7])
    assert forward_flops(config, [100, 7]) == parts
    with pytest.raises(ValueError, match="at least the 2 free tokens"):
        forward_flops(config, [1])
