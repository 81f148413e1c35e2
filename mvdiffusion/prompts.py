"""Prompt embeddings: what tells the UNet which view is which. One row per view of a rig, stored with that rig."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from multiview.checkpoint import load_checkpoint
from multiview.files import atomic_write, read_json, take, write_json
from multiview.rig import PROMPT_STYLES, RigMismatchError, ViewRig, check_alignment

COLOUR_FILE, METADATA_FILE = "clr_embeds.pt", "metadata.json"
TRACKED_FOLDER = "mvdiffusion/data/mouse_prompt_embeds_6view"
TOKENS = 77
GENERATE = "python scripts/generate_mouse_prompt_embeds.py --rig"


@dataclass(frozen=True)
class PromptEmbeds:
    """tensor: [num_views, 77, width] float32, row i for view i of `rig`. metadata: what was stored beside it."""

    tensor: Tensor
    rig: ViewRig
    source: str
    metadata: dict = field(default_factory=dict)


def encode_prompts(prompts: list[str], tokenizer: Callable, text_encoder: nn.Module) -> Tensor:
    """Prompts -> a CLIP text encoder's last hidden states [n, 77, width], float32."""
    tokens = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return text_encoder(tokens.input_ids)[0].float()


def view_similarity(tensor: Tensor) -> Tensor:
    """[n, 77, width] -> [n, n]: cosine between two views' whole token sequences, which is what cross-attention gets.
    What the prompts share (the words around the view's name, the padding) makes 0.7 to 0.9."""
    flat = nn.functional.normalize(tensor.double().flatten(1), dim=-1)
    return (flat @ flat.T).float()


def alike_views(similarity: Tensor, names: list[str], threshold: float = 0.975) -> list[str]:
    """`front and back 0.979` (FaceLift's own) for each pair of views at or above the threshold, most alike first."""
    pairs = [(float(similarity[i, j]), i, j) for i in range(len(names)) for j in range(i)]
    pairs = sorted((pair for pair in pairs if pair[0] >= threshold), reverse=True)
    return [f"{names[j]} and {names[i]} {value:.3f}" for value, i, j in pairs]


def write_prompt_embeds(
    folder: Path | str, components_folder: Path | str, rig: ViewRig, style: str, *, angles: bool
) -> dict:
    """Encodes the rig's prompts (float32, one thread: repeating gives the same bytes) and writes clr_embeds.pt,
    normal_embeds.pt (styles that have it), both float16, and metadata.json, which it returns."""
    from mvdiffusion.components import load_text, local_folder

    folder, source = Path(folder), local_folder(components_folder)
    tokenizer, text_encoder = load_text(source)
    files = {COLOUR_FILE: rig.prompts(style, angles=angles)}
    if f"{style}_normal" in PROMPT_STYLES:
        files["normal_embeds.pt"] = rig.prompts(f"{style}_normal", angles=angles)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        embeddings = {name: encode_prompts(prompts, tokenizer, text_encoder).half() for name, prompts in files.items()}
    finally:
        torch.set_num_threads(threads)
    for name, tensor in embeddings.items():
        with atomic_write(folder / name) as temporary, open(temporary, "wb") as handle:
            torch.save(tensor, handle)  # through a handle: a path's name would be stored in the file
    fingerprint = hashlib.sha256()  # of the weights and configuration that made these embeddings
    for part in ("text_encoder", "tokenizer"):
        for path in sorted(path for path in (source / part).iterdir() if path.is_file()):
            fingerprint.update(path.name.encode() + path.read_bytes())
    width, similarity = text_encoder.config.hidden_size, view_similarity(embeddings[COLOUR_FILE]).tolist()
    text = {"folder": Path(components_folder).as_posix(), "fingerprint": fingerprint.hexdigest()[:16], "width": width}
    metadata = {
        "rig": rig.to_dict(), "style": style, "angles": angles, "prompts": files[COLOUR_FILE],
        "prompts_normal": files.get("normal_embeds.pt"), "text_encoder": text,
        "shape": list(embeddings[COLOUR_FILE].shape), "dtype": "float16",
        "similarity": {
            "measure": "cosine of two views' token sequences", "views": rig.view_names,
            "matrix": [[round(value, 3) for value in row] for row in similarity],
        },
    }  # fmt: skip
    write_json(folder / METADATA_FILE, metadata)
    return metadata


def load_prompt_embeds(path: Path | str, rig: ViewRig | None = None) -> PromptEmbeds:
    """Reads prompt embeddings (clr_embeds.pt, or its folder) with their rig. rig: what the user states; required where
    no metadata.json lies beside the file (FaceLift's own), and otherwise compared with it. Raises ValueError for a
    missing file, a wrong shape, a missing rig; RigMismatchError for another rig's embeddings."""
    path = Path(path) / COLOUR_FILE if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"prompt embeddings {path} do not exist; make them: {GENERATE} <rig> --output_dir <folder>")
    tensor = load_checkpoint(path, object)
    is_tensor = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim == 3
    if not is_tensor or tensor.shape[1] != TOKENS or not 0 < tensor.shape[2] <= 8192:  # the widest public ones: 4096
        got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"prompt embeddings {path} must be a tensor [num_views, {TOKENS}, width], got {got}")
    beside, metadata = path.with_name(METADATA_FILE), {}
    if beside.is_file():
        metadata = read_json(beside)
        stored = ViewRig.from_dict(take(metadata, "rig", dict, str(beside)), str(beside))
        if rig is not None:
            check_alignment(rig, embeddings=stored)
        rig = stored
    if rig is None:
        raise ValueError(f"{path} has no {METADATA_FILE} beside it, so its rig must be stated: --rig facelift6")
    again = f"make new: {GENERATE} {rig.name} --output_dir {path.parent}"
    if len(tensor) != rig.num_views:
        found = f"{len(tensor)} views, rig {rig.name} has {rig.num_views}"
        raise RigMismatchError(f"prompt embeddings {path} describe {found}; {again}")
    tensor = tensor.float().contiguous()
    if not tensor.isfinite().all():
        raise ValueError(f"prompt embeddings {path} hold values that are not finite; {again}")
    return PromptEmbeds(tensor, rig, str(path), metadata)


def check_embeds_fit(embeds: PromptEmbeds, unet: nn.Module | Path | str, source: Path | str = "") -> None:
    """Refuses embeddings whose width or number of views is not the UNet's, naming the command that mends it. unet: a
    loaded UNet, or its folder (only config.json is read: cheap, before any weights are loaded)."""
    if isinstance(unet, Path | str):
        from mvdiffusion.models.unet import read_unet_config

        config, source = read_unet_config(unet), unet
    else:
        config = unet.config
    width, views, name = config["cross_attention_dim"], config.get("num_views"), f"UNet {source}".strip()
    if embeds.tensor.shape[-1] != width:
        folder = "checkpoints/mvdiffusion/pipeckpts" if width == 1024 else "<this UNet's components folder>"
        told = f"are {embeds.tensor.shape[-1]} wide, the {name} expects {width}: they come from another text encoder"
        remedy = f"{GENERATE} {embeds.rig.name} --model_name {folder} --output_dir <folder>"
        raise ValueError(f"prompt embeddings {embeds.source} {told}. Make them with the UNet's own: {remedy}")
    # A UNet that is given its cameras can be asked for any number of views.
    if config["camera_conditioning"] == "none" and views not in (None, embeds.rig.num_views):
        told = f"{embeds.rig.num_views} views (rig {embeds.rig.name}), the {name} was trained with {views}"
        remedy = f"use embeddings of its rig: {GENERATE} <its rig> --output_dir <folder>"
        raise RigMismatchError(f"prompt embeddings {embeds.source} describe {told}; {remedy}")
