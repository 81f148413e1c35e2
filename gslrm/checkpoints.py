"""Stage 2's checkpoints, `ckpt_<16 digits>.pt` with a JSON sidecar: FaceLift's keys (`model`, `optimizer`,
`lr_scheduler`, `fwdbwd_pass_step`, `param_update_step`) plus `rig`, `ema` (averaged weights), `lora` (adapters; `model`
is then merged). Loaded strictly, with named rules for foreign ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gslrm.config import IGNORED_KEYS, GSLRMConfig, ModelConfig, model_config_from_dict
from gslrm.model.gslrm import GSLRM
from multiview import checkpoint as files
from multiview.config import load_config
from multiview.files import take
from multiview.rig import ViewRig

log = logging.getLogger(__name__)

PATTERN = "ckpt_*.pt"
FACELIFT_CHECKPOINT = "checkpoints/gslrm/ckpt_0000000000021125.pt"

# Named rules for foreign checkpoints; everything else must fit exactly.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")  # DistributedDataParallel, torch.compile
LOSS_NETWORKS = "loss_calculator.perceptual_loss_module."  # FaceLift stores its frozen VGG


def checkpoint_path(folder: Path | str, step: int) -> Path:
    return Path(folder) / f"ckpt_{step:016d}.pt"


def resolve_checkpoint(path: Path | str) -> Path:
    """A checkpoint file, or the newest complete one of a folder. Raises ValueError when there is none."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        newest = files.newest_checkpoint(path, PATTERN)
        if newest is None:
            raise ValueError(f"GS-LRM checkpoint folder {path} holds no complete {PATTERN}")
        return newest
    hint = "Train one with train_gslrm.py"
    if path.name == Path(FACELIFT_CHECKPOINT).name:
        hint = "FaceLift's weights (huggingface.co/wlyu/OpenFaceLift, non-commercial research) go there"
    raise ValueError(f"GS-LRM checkpoint {path} does not exist. {hint}; nothing is used in its place")


def model_weights(checkpoint: Mapping, source: Path) -> dict[str, Tensor]:
    """The network's tensors of a checkpoint (averaged if it keeps such) or state dict, as `network_tensors`."""
    tensors = checkpoint.get("ema") or checkpoint.get("model", checkpoint)
    if tensors and isinstance(tensors, Mapping) and all(isinstance(value, Tensor) for value in tensors.values()):
        return network_tensors(tensors, source)
    told = (
        f"has no key 'model' and is no plain dictionary of tensors (keys: {', '.join(map(str, list(checkpoint)[:5]))})"
    )
    raise ValueError(f"checkpoint {source} {told}; a GS-LRM checkpoint or state dict is expected")


def network_tensors(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Returns the tensors under their plain names, without the frozen loss network of FaceLift's trainer.
    Raises ValueError naming the file and how many values are not finite: the reconstruction would be empty."""
    named = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    named = {name: tensor for name, tensor in named.items() if not name.startswith(LOSS_NETWORKS)}
    odd = [name for name, t in named.items() if t.is_meta or t.layout is not torch.strided or not t.is_floating_point()]
    if odd:
        raise ValueError(f"checkpoint {source}: {odd[0]} holds no plain floating-point numbers; save .state_dict()")
    bad = {name: count for name, tensor in named.items() if (count := int((~torch.isfinite(tensor)).sum()))}
    if bad:
        told = f"{sum(bad.values())} weights are not finite, the first in {next(iter(bad))}"
        remedy = "the training diverged or the file is damaged: take an earlier checkpoint"
        raise ValueError(f"checkpoint {source}: {told}; {remedy}")
    return named


def read_checkpoint_rig(path: Path) -> ViewRig | None:
    """The rig of a checkpoint: its sidecar's, else the folder's `rig.json`, else None (public weights carry none)."""
    rig = (files.read_sidecar(path) or {}).get("rig")
    if rig:
        return ViewRig.from_dict(rig, f"{path}.json")
    return files.read_rig(path.parent)


def load_gslrm(
    path: Path | str, *, config_file: Path | str | None = None, device: torch.device | str = "cpu"
) -> tuple[GSLRM, ViewRig | None, Path]:
    """Returns (network in eval mode, its rig or None, the file it came from). path: checkpoint file or folder.
    config_file: a training YAML; without it the sidecar's configuration counts, without one FaceLift's."""
    path = resolve_checkpoint(path)
    if config_file is not None:
        model_config = load_config(GSLRMConfig, config_file, ignored=set(IGNORED_KEYS)).model
    else:
        where = f"{path}.json"  # a sidecar with a stamped rig alone has no config
        config = take(files.read_sidecar(path) or {}, "config", dict, where, default={})
        model_config = model_config_from_dict(take(config, "model", dict, where), where) if config else ModelConfig()
    model = GSLRM(model_config)
    files.load_strict(model, model_weights(files.load_checkpoint(path), path), path)
    return model.eval().to(device), read_checkpoint_rig(path), path


def export_weights(
    source: Path | str, destination: Path | str, *, dtype: torch.dtype = torch.float32, facelift: bool = False,
    vgg_folder: Path | str | None = None,
) -> Path:  # fmt: skip
    """Writes a checkpoint with the network alone (averaged weights if kept), to ship it: into a .pt file, or a folder
    as `ckpt_<step>.pt`. facelift: exactly the keys that FaceLift's strict loader wants; the rig is then in the sidecar
    alone. vgg_folder: with facelift, adds the 32 frozen VGG-19 tensors from there (float32), which that loader wants
    when its config has a perceptual loss, as its shipped one has."""
    source, destination = resolve_checkpoint(source), Path(destination)
    checkpoint, content = files.load_checkpoint(source), files.read_sidecar(source)
    if "fwdbwd_pass_step" not in checkpoint or not {"config", "rig"} <= set(content or {}):
        told = f"checkpoint {source} lacks its step, or a sidecar {source.name}.json with config and rig"
        raise ValueError(f"{told}: only checkpoints of train_gslrm.py are exported")
    if vgg_folder is not None and not facelift:
        raise ValueError("vgg_folder is for FaceLift's layout (facelift=True); nothing else reads VGG tensors there")
    weights = {name: tensor.to(dtype).clone() for name, tensor in model_weights(checkpoint, source).items()}
    where, step = f"{source}.json", take(checkpoint, "fwdbwd_pass_step", int, f"checkpoint {source}", least=0)
    ViewRig.from_dict(take(content, "rig", dict, where), where)
    model_config_from_dict(model := take(take(content, "config", dict, where), "model", dict, where), where)
    path = checkpoint_path(destination, step) if destination.suffix != ".pt" else destination
    if path.resolve() == source.resolve():
        raise ValueError(f"the export would replace {source}, which training continues from; name another place")
    exported: dict = {"model": weights, "fwdbwd_pass_step": step}
    if facelift:
        exported["param_update_step"] = int(checkpoint.get("param_update_step", step))
        if model.get("prune_background_tokens"):
            log.warning("%s was trained on foreground tokens alone; FaceLift will run it on all of them", source)
    else:
        exported["rig"] = content["rig"]
    if vgg_folder is not None:
        from gslrm.perceptual import VGG19_FILES, load_perceptual

        vgg = next((Path(vgg_folder, name) for name in VGG19_FILES if Path(vgg_folder, name).is_file()), None)
        if vgg is None:
            told = f"FaceLift's checkpoints hold VGG-19 and {vgg_folder} has no {' or '.join(VGG19_FILES)}"
            without = "export without it (--no_vgg) for a FaceLift config whose perceptual_loss_weight is 0"
            raise ValueError(f"{told}: put MatConvNet's file there, or {without}")
        network = load_perceptual(vgg).net.state_dict()
        weights |= {f"{LOSS_NETWORKS}net.{name}": tensor.clone() for name, tensor in network.items()}
    files.save_checkpoint(path, exported, content)
    return path
