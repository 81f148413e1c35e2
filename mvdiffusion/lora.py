"""Low-rank adapters (LoRA, Hu et al. 2021; peft's layers) inside the UNet: few weights to train, none to ship.

A layer W becomes W + alpha / rank * B A, with B zero at first. `merged_state` folds the product into W and gives the
stock names, which is what inference loads; `adapter_state` holds the small matrices alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from multiview.files import write_json
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.models.camera_conditioning import is_camera_weight

ADAPTER = "default"
LAYER = ".base_layer."
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names


def add_lora(unet: Module, config: MVDiffusionConfig) -> None:
    """Puts adapters into `lora_targets`; only these, new camera weights and `lora_also_train` keep gradients.

    The adapters' first values come from torch's global generator: seed it before.
    Raises ValueError if a pattern matches nothing.
    """
    from peft import LoraConfig, inject_adapter_in_model

    options = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha or config.lora_rank, lora_dropout=0.0,
        target_modules=list(config.lora_targets), init_lora_weights=True,
    )  # fmt: skip
    names = [name for name, _ in unet.named_modules()]
    missing = [end for end in config.lora_targets if not any(f".{name}".endswith(f".{end}") for name in names)]
    if missing:
        raise ValueError(f"lora_targets: no module of the UNet is called {missing}; e.g. to_q, to_k, to_v, to_out.0")
    inject_adapter_in_model(options, unet, adapter_name=ADAPTER)
    for name, parameter in unet.named_parameters():
        kept = is_adapter_weight(name) or is_camera_weight(name) or any(part in name for part in config.lora_also_train)
        parameter.requires_grad_(kept)


def is_adapter_weight(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def stock_name(name: str) -> str:
    """The name of a base weight in the UNet without adapters."""
    return name.replace(LAYER, ".")


@torch.no_grad()
def merged_state(unet: Module, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The UNet's state under stock names, adapters folded in (float32 sums).

    values: tensors to take instead of the module's own, by the module's names (an EMA of what is trained).
    """
    state = {**unet.state_dict(), **(values or {})}
    merged = {stock_name(name): tensor for name, tensor in state.items() if not is_adapter_weight(name)}
    for prefix, layer in unet.named_modules():
        if not hasattr(layer, "lora_A") or ADAPTER not in layer.lora_A:
            continue
        down, up = (state[f"{prefix}.{name}.{ADAPTER}.weight"].float() for name in ("lora_A", "lora_B"))
        if down.ndim == 2:
            change = up @ down
        else:  # convolutions: B is 1x1
            change = torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
        weight = merged[f"{prefix}.weight"]
        merged[f"{prefix}.weight"] = (weight.float() + layer.scaling[ADAPTER] * change).to(weight.dtype)
    return merged


def save_adapters(
    unet: Module, folder: Path, config: MVDiffusionConfig, values: dict[str, Tensor] | None = None
) -> None:
    """Writes the adapters as peft does: adapter_model.safetensors and adapter_config.json. values: as above."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {**unet.state_dict(), **(values or {})}
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if is_adapter_weight(name)
    }
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    content = {
        "peft_type": "LORA", "r": config.lora_rank, "lora_alpha": config.lora_alpha or config.lora_rank,
        "lora_dropout": 0.0, "bias": "none", "target_modules": list(config.lora_targets),
        "base_model_name_or_path": config.pretrained_unet_path or config.pretrained_model_name_or_path,
    }  # fmt: skip
    write_json(folder / ADAPTER_CONFIG, content)
