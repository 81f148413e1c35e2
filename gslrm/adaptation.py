"""Which part of a GS-LRM trains: ranges of transformer blocks, and low-rank adapters (LoRA, by peft).

Adapters stay inside a training run. What leaves it are plain weights W + (alpha / rank) B A under the network's own
names (LoRA: Hu et al., arXiv 2106.09685), so whatever loads a GS-LRM, FaceLift included, loads a run that used them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gslrm.config import AdaptationConfig
from multiview.checkpoint import load_strict, stamp_rig
from multiview.files import atomic_folder
from multiview.rig import ViewRig

log = logging.getLogger(__name__)

ADAPTER = "default"  # peft's name of the one adapter
BLOCKS = "transformer_layers."
EMBEDDER = ("patch_embedder.", "view_type_embeddings", "gaussian_position_embeddings", "input_layer_norm.")
HEADS = ("gaussian_upsampler.", "pixel_gaussian_decoder.")
TARGETS = ("attn.to_qkv", "attn.fc", "mlp.mlp.0", "mlp.mlp.2")
PEFT_PREFIX = "base_model.model."  # what peft's own loader expects before every name


def check_adaptation(options: AdaptationConfig, num_layers: int) -> list[int]:
    """The numbers of the blocks that train. Raises ValueError for whatever cannot be meant."""
    layers = parse_layers(options.trainable_layers, num_layers)
    section = "training.adaptation"
    if options.lora_rank < 0 or options.lora_alpha <= 0 or not 0 <= options.lora_dropout < 1:
        raise ValueError(
            f"{section}: lora_rank must be 0 (off) or more, lora_alpha above 0 and lora_dropout in [0, 1), got "
            f"{options.lora_rank}, {options.lora_alpha:g}, {options.lora_dropout:g}"
        )
    unknown = sorted(set(options.lora_targets) - set(TARGETS))
    if unknown or (options.lora_rank and not options.lora_targets):
        raise ValueError(
            f"{section}.lora_targets must be some of {', '.join(TARGETS)}, got {', '.join(options.lora_targets)}"
        )
    if options.lora_rank and not layers:
        raise ValueError(f"{section}: lora_rank {options.lora_rank} needs blocks to adapt; trainable_layers names none")
    if not layers and options.freeze_embedder and options.freeze_heads:
        raise ValueError(f"{section} freezes everything: trainable_layers none, freeze_embedder and freeze_heads true")
    alone = options.lora_rank and options.freeze_embedder and options.freeze_heads
    if options.save_adapters and not alone:
        raise ValueError(
            f"{section}.save_adapters needs lora_rank above 0, freeze_embedder=true and freeze_heads=true: adapters "
            "on their own are a model only if nothing else has moved"
        )
    return layers


def parse_layers(text: str | None, num_layers: int) -> list[int]:
    """Block numbers of "20-23", "0,4-7", "none" or None (all), ascending. Raises ValueError naming what is wrong."""
    if text is None:
        return list(range(num_layers))
    if text.strip().lower() == "none":
        return []
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise ValueError(
                f"training.adaptation.trainable_layers must look like 20-23 or 0,4-7 or none, got {text!r}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= num_layers:
            raise ValueError(
                f"training.adaptation.trainable_layers: {part.strip()} is not a range within blocks 0-{num_layers - 1}"
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def adapt(model: nn.Module, options: AdaptationConfig) -> None:
    """Adds the adapters and freezes what shall not move, in place. The output does not change (B starts at 0)."""
    layers = check_adaptation(options, len(model.transformer_layers))
    if options.lora_rank:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(
            LoraConfig(
                r=options.lora_rank, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout, bias="none",
                target_modules=[f"{BLOCKS}{layer}.{target}" for layer in layers for target in options.lora_targets],
            ),
            model,
        )  # fmt: skip
        model.train(model.training)  # peft's new modules would be in training mode, dropout active, in any case
    blocks = tuple(f"{BLOCKS}{layer}." for layer in layers)
    for name, parameter in model.named_parameters():
        if name.startswith(BLOCKS):
            trains = name.startswith(blocks) and (not options.lora_rank or ".lora_" in name)
        elif name.startswith(EMBEDDER):
            trains = not options.freeze_embedder
        else:
            trains = not options.freeze_heads
            assert name.startswith(HEADS), name
        parameter.requires_grad_(trains)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if any(not p.requires_grad for p in model.parameters()):
        log.info(
            "%.3f M of %.3f M parameters train (blocks %s%s)", trained / 1e6,
            sum(p.numel() for p in model.parameters()) / 1e6, options.trainable_layers or "all",
            f", adapters of rank {options.lora_rank}" if options.lora_rank else "",
        )  # fmt: skip


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that carry an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}


@torch.no_grad()
def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The network's tensors under their own names, adapters merged in: what any GS-LRM loads.

    Without adapters this is `state_dict()`; with them merged copies are made, nothing in the model changes.
    """
    layers, weights = adapted_layers(model), {}
    for name, tensor in model.state_dict().items():
        owner = name.removesuffix(".base_layer.weight")
        if ".lora_" in name:
            continue
        if owner != name:
            name, tensor = f"{owner}.weight", tensor + layers[owner].get_delta_weight(ADAPTER)
        weights[name] = tensor
    return weights


# ---- resuming a run with adapters, exactly --------------------------------------------------------------------------


def adapter_state(model: nn.Module, options: AdaptationConfig) -> dict:
    """What a run with adapters needs beside the merged weights: the matrices under the adapters, and the adapters.

    Merging rounds, so the matrices cannot be recovered from the merged ones.
    """
    state = model.state_dict()
    return {
        "settings": lora_settings(options),
        "base": {name: tensor for name, tensor in state.items() if ".base_layer." in name},
        "adapters": {name: tensor for name, tensor in state.items() if ".lora_" in name},
    }


def lora_settings(options: AdaptationConfig) -> dict:
    names = ("trainable_layers", "lora_rank", "lora_alpha", "lora_targets")
    return {name: getattr(options, name) for name in names} if options.lora_rank else {}


def load_training_weights(
    model: nn.Module, weights: Mapping[str, Tensor], lora: Mapping | None, options: AdaptationConfig, source: Path
) -> None:
    """The weights of a training state into an adapted model. Raises ValueError if the state has other adapters."""
    expected, found = lora_settings(options), dict(lora["settings"]) if lora else {}
    if expected != found:
        raise ValueError(
            f"checkpoint {source} was trained with training.adaptation {found or 'without adapters'}, this run has "
            f"{expected or 'none'}: use the same settings, or another checkpoint_dir with resume_ckpt={source} and "
            "training.optimizer.reset_training_state=true, which starts from the merged weights"
        )
    if lora:
        owners = {name.removesuffix(".base_layer.weight") + ".weight" for name in lora["base"]}
        rest = {name: tensor for name, tensor in weights.items() if name not in owners}
        weights = {**rest, **lora["base"], **lora["adapters"]}
    load_strict(model, weights, source)


def save_adapters(model: nn.Module, folder: Path, rig: ViewRig, source: str | None) -> None:
    """The adapters alone in peft's layout (`PeftModel.from_pretrained(network, folder)` puts them on), atomically.

    source: the weights they belong to, recorded in `adapter_config.json`.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = {
        PEFT_PREFIX + name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    settings = model.peft_config[ADAPTER]
    settings.base_model_name_or_path = source
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors")
        settings.save_pretrained(str(temporary))
        stamp_rig(temporary, rig)
