"""Which part of a GS-LRM trains: ranges of transformer blocks, and low-rank adapters (LoRA) in them."""

from __future__ import annotations

import re

from torch import nn

from gslrm.config import AdaptationConfig
from multiview.checkpoint import add_adapters, is_adapter_weight

BLOCKS = "transformer_layers."
EMBEDDER = ("patch_embedder.", "view_type_embeddings", "gaussian_position_embeddings", "input_layer_norm.")
TARGETS = ("attn.to_qkv", "attn.fc", "mlp.mlp.0", "mlp.mlp.2")
SECTION = "training.adaptation"


def check_adaptation(options: AdaptationConfig, num_layers: int) -> list[int]:
    """Returns the numbers of the blocks that train. Raises ValueError for whatever cannot be meant."""
    layers, lora = parse_layers(options.trainable_layers, num_layers), options.lora_rank
    frozen_rest = options.freeze_embedder and options.freeze_heads
    for wrong, told in (
        (lora < 0 or options.lora_alpha <= 0 or not 0 <= options.lora_dropout < 1,
         ": lora_rank must be 0 (off) or more, lora_alpha above 0 and lora_dropout in [0, 1), got "
         f"{lora}, {options.lora_alpha:g}, {options.lora_dropout:g}"),
        (set(options.lora_targets) - set(TARGETS) or (lora and not options.lora_targets),
         f".lora_targets must be some of {', '.join(TARGETS)}, got {', '.join(options.lora_targets)}"),
        (lora and not layers, f": lora_rank {lora} needs blocks to adapt; trainable_layers names none"),
        (not layers and frozen_rest,
         " freezes everything: trainable_layers none, freeze_embedder and freeze_heads true"),
        # Adapters on their own are a model only if nothing else has moved.
        (options.save_adapters and not (lora and frozen_rest),
         ".save_adapters needs lora_rank above 0, freeze_embedder=true and freeze_heads=true"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(SECTION + told)
    return layers


def parse_layers(text: str | None, num_layers: int) -> list[int]:
    """Returns the block numbers of "20-23", "0,4-7", "none" or None (all), ascending. Raises ValueError."""
    if text is None or text.strip().lower() == "none":
        return [] if text else list(range(num_layers))
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"{SECTION}.trainable_layers must look like 20-23 or 0,4-7 or none, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= num_layers:
            raise ValueError(f"{SECTION}.trainable_layers: {part.strip()} is not a range within 0-{num_layers - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def adapt(model: nn.Module, options: AdaptationConfig) -> None:
    """Adds the adapters and freezes what shall not move, in place. The output does not change."""
    layers = check_adaptation(options, len(model.transformer_layers))
    blocks = tuple(f"{BLOCKS}{layer}." for layer in layers)
    if options.lora_rank:
        targets = [block + target for block in blocks for target in options.lora_targets]
        add_adapters(model, targets, options.lora_rank, options.lora_alpha, options.lora_dropout)
    for name, parameter in model.named_parameters():
        if name.startswith(BLOCKS):
            trains = name.startswith(blocks) and (not options.lora_rank or is_adapter_weight(name))
        else:
            trains = not (options.freeze_embedder if name.startswith(EMBEDDER) else options.freeze_heads)
        parameter.requires_grad_(trains)
