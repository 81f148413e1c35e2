"""Training checkpoints: <output_dir>/checkpoint-<step>/{unet, unet_ema, prompt_embeds, optimizer.pt, checkpoint.json}.
With LoRA also lora/ (adapters in peft's form) and trained.pt (what a resumed run needs); the UNets then hold them
folded in, and may be left out. A folder appears under its name only when complete."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from multiview.checkpoint import DIGEST, digest_of, load_checkpoint, step_of
from multiview.files import atomic_folder, atomic_write, full_disk_explained, read_json, write_json
from multiview.rig import ViewRig, check_alignment
from multiview.run import git_hash
from mvdiffusion.component_files import SIDECAR, check_weights
from mvdiffusion.pipelines.multiview import GUIDANCE_SCALE, NUM_STEPS
from mvdiffusion.prompts import COLOUR_FILE, METADATA_FILE, PromptEmbeds

log = logging.getLogger(__name__)

PATTERN = "checkpoint-*"
# What a resumed run has in common with the one it continues: the model, and the order of the optimizer's parameters.
SAME_KEYS = (
    "pretrained_model_name_or_path", "pretrained_unet_path", "unet", "attention", "camera_conditioning", "use_ema",
    "use_8bit_adam", "lr_multipliers", "camera_embedding_lr_mult", "trainable_modules",
    "lora_rank", "lora_alpha", "lora_targets", "lora_also_train",
)  # fmt: skip
OPTIMIZER_FILE, TRAINED_FILE, SAMPLING_FILE = "optimizer.pt", "trained.pt", "sampling.json"


class Checkpoint(NamedTuple):
    """A whole training checkpoint found on disk. trained: with LoRA, {own, ema: tensors by name, base}."""

    folder: Path
    optimizer: dict
    sidecar: dict
    trained: dict | None = None


@contextmanager
def save_training(output_dir: Path | str, sidecar: dict, embeds: PromptEmbeds, optimizer: dict) -> Iterator[Path]:
    """Yields a folder for weights, which becomes checkpoint-<step> when all is written."""
    folder = Path(output_dir) / f"checkpoint-{sidecar['step']}"
    with full_disk_explained(folder), atomic_folder(folder) as temporary:
        yield temporary
        save_embeds(temporary / "prompt_embeds", embeds)
        with open(temporary / OPTIMIZER_FILE, "wb") as handle:  # a handle: see full_disk_explained
            torch.save(optimizer, handle)
        weights = sorted(path for path in temporary.rglob("*") if path.suffix in (".pt", ".safetensors"))
        digests = {str(path.relative_to(temporary)): digest_of(path) for path in weights}
        write_json(temporary / SIDECAR, {**sidecar, "git": git_hash(), DIGEST: digests})


def save_embeds(folder: Path, embeds: PromptEmbeds) -> None:
    """The prompt embeddings a UNet was trained with, beside it: what inference takes if none are named."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / COLOUR_FILE) as temporary, open(temporary, "wb") as handle:
        torch.save(embeds.tensor.half(), handle)
    write_json(folder / METADATA_FILE, {**embeds.metadata, "rig": embeds.rig.to_dict()})


class Sampling(NamedTuple):
    """What suits a UNet; the defaults are FaceLift's."""

    num_steps: int = NUM_STEPS
    guidance_scale: float = GUIDANCE_SCALE
    num_draws: int = 1


def sampling_of(unet_path: Path | str) -> Sampling:
    """Returns what suits a UNet: its folder's sampling.json, else FaceLift's."""
    path = _beside(unet_path, SAMPLING_FILE)
    content = read_json(path) if path else {}
    if content.pop("mirror", "never") != "never":  # written for the demo models before
        log.warning("%s asks for mirrored photographs, which are no longer tried; train at any heading", path)
    return Sampling(**content)


def embeds_of(unet_path: Path | str) -> Path | None:
    """Returns the prompt embeddings stored beside a UNet (paths as `components_folder_of`), None if there are none."""
    return _beside(unet_path, f"prompt_embeds/{COLOUR_FILE}")


def _beside(path: Path | str, name: str) -> Path | None:
    return next((folder / name for folder in (Path(path), Path(path).parent) if (folder / name).is_file()), None)


def newest_training(output_dir: Path | str, rig: ViewRig, config: dict) -> Checkpoint | None:
    """Returns the newest whole checkpoint, found by reading; None if there is none. Refuses one of another rig or
    model: resuming must not change what is trained; lengths, rates, paths of data may change."""
    for folder in sorted(Path(output_dir).glob(PATTERN), key=step_of, reverse=True):
        try:
            sidecar = read_json(folder / SIDECAR)
            check_weights(folder)
            optimizer, stored = load_checkpoint(folder / OPTIMIZER_FILE), sidecar["config"]
            trained = load_checkpoint(folder / TRAINED_FILE) if stored.get("lora_rank", 0) > 0 else None
        except (ValueError, KeyError, OSError) as error:
            log.warning("%s is not whole (%s); looking at the one before it", folder, error)
            continue
        check_alignment(rig, unet=ViewRig.from_dict(sidecar["rig"], str(folder / SIDECAR)))
        # A key younger than the checkpoint had no effect on it.
        differing = [key for key in SAME_KEYS if key in stored and stored[key] != config[key]]
        if differing:
            differences = "; ".join(f"{key}: {stored[key]!r} there, {config[key]!r} now" for key in differing)
            told = f"{folder} belongs to a run of another model ({differences})"
            raise ValueError(f"{told}; start anew with another output_dir=..., or delete {folder.parent}")
        return Checkpoint(folder, optimizer, sidecar, trained)
    return None


def components_folder_of(unet_path: Path | str) -> Path | None:
    """Returns the components folder of a UNet (checkpoint-<step>, its unet or unet_ema, or a components folder): what
    its checkpoint.json names, or the folder it lies in; else None."""
    for folder in (Path(unet_path), Path(unet_path).parent):
        if (folder / "vae").is_dir():
            return folder
        if (folder / SIDECAR).is_file():
            return Path(read_json(folder / SIDECAR)["config"]["pretrained_model_name_or_path"])
    return None
