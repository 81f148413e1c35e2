"""How many floating-point operations a forward pass of GS-LRM costs."""

from __future__ import annotations

from gslrm.config import ModelConfig


def forward_flops(config: ModelConfig, num_tokens_per_sample: list[int]) -> float:
    """Operations of one forward pass: matrix products alone, a multiply-add counts 2.

    num_tokens_per_sample: the length of each sample's sequence, free Gaussian tokens included. Six dense 512-px views,
        patch size 8 and 2 free tokens: [24578]. With pruning: 2 + the patches that the grown mask touches.
    Raises ValueError for a sequence shorter than the free tokens, which are always there.
    """
    d, layers = config.transformer.d, config.transformer.n_layer
    free, patch_area = config.gaussians.n_gaussians, config.image_tokenizer.patch_size**2
    num_values = 3 + 3 * (config.gaussians.sh_degree + 1) ** 2 + 3 + 4 + 1  # xyz, SH, scale, rotation, opacity
    total = 0
    for n in num_tokens_per_sample:
        if n < free:
            raise ValueError(f"num_tokens_per_sample must be at least the {free} free tokens, got {n}")
        patches = n - free
        total += 2 * patches * config.image_tokenizer.in_channels * patch_area * d
        total += layers * 2 * n * 12 * d * d  # q, k, v: 3; output: 1; MLP: 4 + 4
        total += layers * 2 * 2 * n * n * d  # scores and weighted sum over all heads
        total += 2 * patches * d * patch_area * num_values + 2 * free * d * num_values
    return float(total)
