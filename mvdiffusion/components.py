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

from multiview.files import take
from mvdiffusion.component_files import failure_told, read_config, read_weights, require_finite
from mvdiffusion.models.unet import WEIGHTS, fill_empty, load_unet, resolve_unet_folder

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
HUB_PREFIX = "hub:"  # asks for a download: nothing else does
COMPUTED_BUFFERS = ("position_ids",)  # older transformers stored them, newer ones compute them
LARGEST_IMAGE = 4096  # pixels, of CLIP's preprocessing


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
        """Image pixels per latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """Side of the images the UNet was made for, pixels."""
        if self.unet is None:
            raise ValueError("these components were loaded without a UNet, which fixes the image size")
        return self.unet.config.sample_size * self.vae_factor


def tune(
    components: Components, *, vae_slicing: bool = False, channels_last: bool = False, compiled: bool = False
) -> None:
    """Sets the components up, in place, for speed or memory; what they compute stays the same up to rounding.

    vae_slicing: encode and decode image by image (memory of one). channels_last: memory layout of convolutions,
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
    Raises ValueError for missing folders, for configurations that make no model and for weights that do not fit.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = local_folder(folder)
    require_folders(folder, FROZEN_FOLDERS)
    resting = torch.device("cpu") if offload else device
    network, unet_folder = None, None
    if with_unet:
        unet_folder = resolve_unet_folder(unet if unet is not None else folder / "unet")
        from mvdiffusion.checkpoints import check_weights  # which imports prompts, and they this

        check_weights(unet_folder.parent, unet_folder.name)
        network = load_unet(unet_folder, dtype=dtype).to(resting).requires_grad_(False)
    image_encoder = _load_clip(CLIPVisionModelWithProjection, CLIPVisionConfig, folder / "image_encoder", dtype)
    extractor = load_feature_extractor(folder / "feature_extractor", image_encoder.config.image_size)
    return Components(
        vae=_load_diffusers(AutoencoderKL, folder / "vae", dtype).to(resting),
        image_encoder=image_encoder.to(resting),
        feature_extractor=extractor,
        # The normalizer's own `to` makes new parameters, which would want gradients.
        image_normalizer=_load_diffusers(StableUnCLIPImageNormalizer, folder / "image_normalizer", dtype)
        .to(device)
        .requires_grad_(False),
        image_noising_scheduler=_load_scheduler(DDPMScheduler, folder / "image_noising_scheduler"),
        scheduler=_load_scheduler(DDIMScheduler, folder / "scheduler"),
        unet=network,
        unet_folder=unet_folder,
        folder=folder,
        device=torch.device(device),
        offload=offload,
    )


def load_text(folder: Path | str) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer and text encoder of a components folder (float32, CPU); used to make prompt embeddings only."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = local_folder(folder)
    require_folders(folder, TEXT_FOLDERS)
    with failure_told(f"{folder / 'tokenizer'} is no CLIP tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return tokenizer, _load_clip(CLIPTextModel, CLIPTextConfig, folder / "text_encoder", torch.float32)


def _load_diffusers(kind: type, folder: Path, dtype: torch.dtype) -> Any:
    """A frozen diffusers model out of its folder, strictly."""
    path = folder / "config.json"
    content = read_config(path, {"latent_channels": int, "embedding_dim": int})
    take(content, "scaling_factor", float, str(path), default=1.0, least=1e-6)  # latents are divided by it
    with failure_told(f"{path} makes no {kind.__name__}"), torch.device("meta"):
        model = kind.from_config(content)
    state = read_weights(folder, WEIGHTS)
    model._fix_state_dict_keys_on_load(state)  # attention layers of older files are called query, key, value
    fill_empty(model, state, folder, dtype)
    return model.eval().requires_grad_(False)


def _load_clip(kind: type, config_kind: type, folder: Path, dtype: torch.dtype) -> Any:
    """A frozen transformers model out of its folder; missing and unexpected weights are errors instead of warnings."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar per component, gone in milliseconds
    path = folder / "config.json"
    fields = {"hidden_size": int, "projection_dim": int, "image_size": int, "patch_size": int}
    config = read_config(path, fields)
    weights = [file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin")]
    variant = "fp16" if weights and all(".fp16" in name for name in weights) else None
    with failure_told(f"{folder} cannot be loaded as {kind.__name__}"):
        model, report = kind.from_pretrained(
            folder, config=config_kind.from_dict(config), local_files_only=True, output_loading_info=True, dtype=dtype,
            variant=variant,
        )  # fmt: skip
    problems = {
        title: sorted(str(name) for name in report.get(key, ()) if not str(name).endswith(COMPUTED_BUFFERS))
        for title, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"), ("shape", "mismatched_keys"))
    }
    if any(problems.values()):
        listed = "; ".join(f"{title}: {', '.join(names[:5])}" for title, names in problems.items() if names)
        raise ValueError(f"weights in {folder} do not fit {kind.__name__}: {listed}")
    require_finite(dict(model.named_parameters()), folder)
    return model.eval().requires_grad_(False)


def _load_scheduler(kind: type, folder: Path) -> Any:
    """A scheduler with the 1000 time steps that training draws from."""
    path = folder / "scheduler_config.json"
    fields = {"prediction_type": ("epsilon", "v_prediction"), "beta_schedule": ("scaled_linear", "squaredcos_cap_v2")}
    content = read_config(path, fields, required=tuple(fields))  # left out, another one would be taken
    with failure_told(f"{path} makes no {kind.__name__}"):
        scheduler = kind.from_config(content)
        fits = bool(((scheduler.betas > 0) & (scheduler.betas <= 1)).all()) and len(scheduler.betas) == 1000
    if not fits:
        raise ValueError(f"{path} must make a noise schedule of 1000 steps with betas within 0..1; copy it again")
    return scheduler


def load_feature_extractor(folder: Path, side: int | None = None) -> Any:
    """The PIL-based CLIP image processor: FaceLift's numbers exactly, which the torchvision one misses.

    side: of the image encoder's input, pixels, if known; the processor is tried on one image.
    """
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    path = folder / "preprocessor_config.json"
    switches = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    content = read_config(path, dict.fromkeys(switches, bool), largest=LARGEST_IMAGE)
    with failure_told(f"{path} describes no CLIP image processor"):
        extractor = CLIPImageProcessorPil.from_dict(content)
        pixels = extractor(images=[Image.new("RGB", (8, 8), "white")], return_tensors="pt")["pixel_values"]
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (extractor.image_mean, extractor.image_std))
        crop = (extractor.crop_size["height"], extractor.crop_size["width"])
        # Training computes the same from these numbers alone (`latents.clip_pixels_fast`).
        expected = ((1 - mean) / std).expand(1, 3, *crop)
        fits = side in (None, crop[0]) and crop[0] == crop[1] and pixels.shape == expected.shape
        fits = fits and pixels.isfinite().all() and torch.allclose(pixels, expected)
    if not fits:
        raise ValueError(
            f"{path} must make images of {side or crop[0]} px, normalized by its image_mean and image_std, for the "
            "image encoder beside it; copy it again"
        )
    return extractor
