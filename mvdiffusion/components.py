"""The parts of the diffusion pipeline around the UNet, in diffusers' folder layout, loaded strictly and offline.

<folder>/{unet, vae, image_encoder, feature_extractor, image_normalizer, image_noising_scheduler, scheduler,
text_encoder, tokenizer}: FaceLift's released `pipeckpts`, and the demo components this project makes itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multiview.files import DAMAGE, damage_explained, read_json
from mvdiffusion.models.unet import load_unet, resolve_unet_folder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

PUBLIC_FOLDER = "checkpoints/mvdiffusion/pipeckpts"
DEMO_FOLDER = "checkpoints/demo/mvdiffusion"
FROZEN_FOLDERS = (
    "vae", "image_encoder", "feature_extractor", "image_normalizer", "image_noising_scheduler", "scheduler",
)  # fmt: skip
TEXT_FOLDERS = ("text_encoder", "tokenizer")
# What asks for a download: nothing else does.
HUB_PREFIX = "hub:"
# Buffers that older transformers stored and newer ones compute.
COMPUTED_BUFFERS = ("position_ids",)


@dataclass(frozen=True)
class Components:
    """Frozen parts (eval mode, no gradients) and, unless left out, the UNet.

    All on `device`; with `offload` the UNet, the VAE and the image encoder wait on the CPU and are there only in use.
    """

    vae: AutoencoderKL
    image_encoder: CLIPVisionModelWithProjection
    feature_extractor: Any  # transformers' PIL-based CLIP image processor
    image_normalizer: StableUnCLIPImageNormalizer
    image_noising_scheduler: DDPMScheduler
    scheduler: DDIMScheduler
    unet: UNet2DConditionModel | None
    unet_folder: Path | None
    folder: Path
    device: torch.device = torch.device("cpu")
    offload: bool = False

    @contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """Inside, the named parts are on `device`; afterwards, with `offload`, on the CPU again."""
        if not self.offload:
            yield
            return
        for name in names:
            getattr(self, name).to(self.device)
        try:
            yield
        finally:
            for name in names:
                getattr(self, name).to("cpu")

    @property
    def vae_factor(self) -> int:
        """Picture pixels per latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """Side of the pictures the UNet was made for, pixels."""
        if self.unet is None:
            raise ValueError("these components were loaded without a UNet, which fixes the picture size")
        return self.unet.config.sample_size * self.vae_factor


def tune(
    components: Components, *, vae_slicing: bool = False, channels_last: bool = False, compiled: bool = False
) -> None:
    """Sets the components up, in place, for speed or memory; what they compute stays the same up to rounding.

    vae_slicing: encode and decode picture by picture (memory of one). channels_last: memory layout of convolutions,
    faster in half precision on a GPU. compiled: torch.compile for the UNet (its first call takes minutes).
    """
    if vae_slicing:
        components.vae.enable_slicing()
    if channels_last:
        components.unet.to(memory_format=torch.channels_last)
        components.vae.to(memory_format=torch.channels_last)
    if compiled:
        components.unet.compile()


def require_folders(folder: Path, names: tuple[str, ...]) -> None:
    """Raises one sentence that says which component folders are missing and where they come from."""
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        what = "does not exist" if not folder.is_dir() else f"lacks {', '.join(missing)}"
        raise ValueError(
            f"components folder {folder} {what}: put FaceLift's released folder (wlyu/OpenFaceLift, `mvdiffusion/"
            f"pipeckpts`) at {PUBLIC_FOLDER}, or make the small ones with `python scripts/make_demo_components.py` and "
            f"name {DEMO_FOLDER}. Nothing is downloaded unless the folder is named as {HUB_PREFIX}<owner>/<repository>"
            f"[/<folder>], here: {HUB_PREFIX}wlyu/OpenFaceLift/mvdiffusion/pipeckpts"
        )


def local_folder(name: Path | str) -> Path:
    """A folder on disk; `hub:<owner>/<repository>[/<folder>]` is downloaded from the Hugging Face hub (and cached).

    Raises ValueError for a malformed hub name and for a download that fails.
    """
    if not str(name).startswith(HUB_PREFIX):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    parts = str(name).removeprefix(HUB_PREFIX).strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise ValueError(f"{name} must have the form {HUB_PREFIX}<owner>/<repository>[/<folder>]")
    repository, inner = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        root = snapshot_download(repository, allow_patterns=[f"{inner}/*"] if inner else None)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"{name} cannot be downloaded ({str(error).splitlines()[0]}); download it elsewhere and name the folder"
        ) from error
    return Path(root) / inner


def load_components(
    folder: Path | str,
    *,
    unet: Path | str | None = None,
    with_unet: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> Components:
    """Loads a components folder (or `hub:...`, see `local_folder`).

    unet: a UNet folder (or training checkpoint) to use instead of `<folder>/unet`. dtype: float16 reproduces FaceLift's
    inference on a GPU; the CPU wants float32. offload: UNet, VAE and image encoder stay on the CPU but while they work.
    Raises ValueError for missing folders and for weights that do not fit.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPVisionModelWithProjection

    folder = local_folder(folder)
    require_folders(folder, FROZEN_FOLDERS)
    resting = torch.device("cpu") if offload else device
    network, unet_folder = None, None
    if with_unet:
        unet_folder = resolve_unet_folder(unet if unet is not None else folder / "unet")
        network = load_unet(unet_folder, dtype=dtype).to(resting).requires_grad_(False)
    scheduler = DDIMScheduler.from_config(_read_config(folder / "scheduler", "scheduler_config.json"))
    noising = DDPMScheduler.from_config(_read_config(folder / "image_noising_scheduler", "scheduler_config.json"))
    return Components(
        vae=_frozen(AutoencoderKL, folder / "vae", resting, dtype),
        image_encoder=_frozen(CLIPVisionModelWithProjection, folder / "image_encoder", resting, dtype),
        feature_extractor=load_feature_extractor(folder / "feature_extractor"),
        image_normalizer=_frozen(StableUnCLIPImageNormalizer, folder / "image_normalizer", device, dtype),
        image_noising_scheduler=noising,
        scheduler=scheduler,
        unet=network,
        unet_folder=unet_folder,
        folder=folder,
        device=torch.device(device),
        offload=offload,
    )


def load_text(folder: Path | str) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer and text encoder of a components folder (float32, CPU); used to make prompt embeddings only."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = local_folder(folder)
    require_folders(folder, TEXT_FOLDERS)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return tokenizer, _frozen(CLIPTextModel, folder / "text_encoder", "cpu", torch.float32)


def load_feature_extractor(folder: Path | str) -> Any:
    """The PIL-based CLIP image processor: FaceLift's numbers exactly, which the torchvision one misses."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    with damage_explained(f"image processor {folder}"):
        return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)


def _read_config(folder: Path, name: str) -> dict:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} holds no {name}")
    return read_json(path)


def _frozen(kind: type, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """from_pretrained that refuses missing or unexpected weights instead of warning."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar per component, gone in milliseconds
    dtype_argument = "dtype" if kind.__module__.startswith("transformers.") else "torch_dtype"
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **{dtype_argument: dtype}
        )
    except DAMAGE as error:
        raise ValueError(f"{folder} cannot be loaded as {kind.__name__}: {str(error).splitlines()[0]}") from error
    problems = {
        title: sorted(name for name in report.get(key, ()) if not name.endswith(COMPUTED_BUFFERS))
        for title, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"), ("shape", "mismatched_keys"))
    }
    found = [f"{title}: {', '.join(map(str, names[:5]))}" for title, names in problems.items() if names]
    if found:
        raise ValueError(f"weights in {folder} do not fit {kind.__name__}: {'; '.join(found)}")
    # In this order: the image normalizer's own `to` makes new parameters.
    return model.to(device).eval().requires_grad_(False)
