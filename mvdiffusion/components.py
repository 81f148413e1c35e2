"""The parts of the diffusion pipeline around the UNet, in diffusers' folder layout (FaceLift's released `pipeckpts`,
and the demo components this project makes itself), loaded strictly and offline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from multiview.files import take
from mvdiffusion.component_files import check_weights, failure_told, read_config, read_weights, require_finite
from mvdiffusion.models.unet import WEIGHTS, fill_empty, load_unet, resolve_unet_folder

PUBLIC_FOLDER = "checkpoints/mvdiffusion/pipeckpts"
DEMO_FOLDER = "checkpoints/demo/mvdiffusion"
FROZEN = ("vae", "image_encoder", "feature_extractor", "image_normalizer", "image_noising_scheduler", "scheduler")
HUB_PREFIX = "hub:"  # asks for a download: nothing else does


@dataclass(frozen=True)
class Components:
    """Frozen parts (eval mode, no gradients) and, unless left out, the UNet, on `device`; with `offload` the UNet, the
    VAE and the image encoder wait on the CPU and are there only in use."""

    vae: AutoencoderKL
    image_encoder: CLIPVisionModelWithProjection
    feature_extractor: CLIPImageProcessorPil  # FaceLift's numbers exactly, which the torchvision one misses
    image_normalizer: StableUnCLIPImageNormalizer
    image_noising_scheduler: DDPMScheduler
    scheduler: DDIMScheduler
    unet: UNet2DConditionModel | None
    unet_folder: Path | None
    folder: Path
    device: torch.device = torch.device("cpu")
    offload: bool = False

    @contextmanager
    def on_device(self, name: str) -> Iterator[None]:
        """Inside, the named part is on `device`; afterwards, with `offload`, on the CPU again."""
        if self.offload:
            getattr(self, name).to(self.device)
        try:
            yield
        finally:
            if self.offload:
                getattr(self, name).to("cpu")

    @property
    def vae_factor(self) -> int:
        """Image pixels per latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """Side of the images the UNet was made for, pixels."""
        return self.unet.config.sample_size * self.vae_factor


def local_folder(name: Path | str, parts: tuple[str, ...] = ()) -> Path:
    """Returns a folder on disk; `hub:<owner>/<repository>[/<folder>]` is downloaded from the Hugging Face hub (cached).
    Raises ValueError for a malformed name, a failed download, and where one of the component folders `parts` lacks."""
    folder = Path(name)
    if str(name).startswith(HUB_PREFIX):
        owner, _, rest = str(name).removeprefix(HUB_PREFIX).strip("/").partition("/")
        repository, _, inner = rest.partition("/")
        if not owner or not repository or "//" in rest:
            raise ValueError(f"{name} must have the form {HUB_PREFIX}<owner>/<repository>[/<folder>]")
        try:
            patterns = [f"{inner}/*"] if inner else None
            folder = Path(huggingface_hub.snapshot_download(f"{owner}/{repository}", allow_patterns=patterns)) / inner
        except (OSError, ValueError) as error:  # the hub's own errors are of these two kinds
            told = f"({str(error).splitlines()[0]}); download it elsewhere and name the folder"
            raise ValueError(f"{name} cannot be downloaded {told}") from error
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        problem = f"lacks {', '.join(missing)}" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"components folder {folder} {problem}: put FaceLift's released folder (wlyu/OpenFaceLift, `mvdiffusion/"
            f"pipeckpts`) at {PUBLIC_FOLDER}, or make the small ones with `python scripts/make_demo_components.py` and "
            f"name {DEMO_FOLDER}. Nothing is downloaded unless the folder is named as "
            f"{HUB_PREFIX}wlyu/OpenFaceLift/mvdiffusion/pipeckpts"
        )
    return folder


def load_components(
    folder: Path | str, *, unet: Path | str | None = None, with_unet: bool = True, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32, offload: bool = False,
) -> Components:  # fmt: skip
    """Loads a components folder (or `hub:...`). unet: a UNet folder or training checkpoint instead of `<folder>/unet`.
    dtype: float16 reproduces FaceLift's inference on a GPU; the CPU wants float32. Raises ValueError for missing
    folders, configurations that make no model and weights that do not fit."""
    folder = local_folder(folder, FROZEN)
    resting = torch.device("cpu") if offload else device
    network, unet_folder = None, None
    if with_unet:
        unet_folder = resolve_unet_folder(unet if unet is not None else folder / "unet")
        check_weights(unet_folder.parent, unet_folder.name)
        network = load_unet(unet_folder, dtype=dtype).to(resting).requires_grad_(False)
    image_encoder = _load_clip(CLIPVisionModelWithProjection, folder / "image_encoder", dtype)
    normalizer = _load_diffusers(StableUnCLIPImageNormalizer, folder / "image_normalizer", dtype).to(device)
    return Components(
        vae=_load_diffusers(AutoencoderKL, folder / "vae", dtype).to(resting), image_encoder=image_encoder.to(resting),
        feature_extractor=load_feature_extractor(folder / "feature_extractor", image_encoder.config.image_size),
        image_normalizer=normalizer.requires_grad_(False),  # its own `to` makes new parameters, which want gradients
        image_noising_scheduler=_load_scheduler(DDPMScheduler, folder / "image_noising_scheduler"),
        scheduler=_load_scheduler(DDIMScheduler, folder / "scheduler"),
        unet=network, unet_folder=unet_folder, folder=folder, device=torch.device(device), offload=offload,
    )  # fmt: skip


def load_text(folder: Path | str) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer and text encoder of a components folder (float32, CPU); used to make prompt embeddings only."""
    folder = local_folder(folder, ("text_encoder", "tokenizer"))
    with failure_told(f"{folder / 'tokenizer'} is no CLIP tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return tokenizer, _load_clip(CLIPTextModel, folder / "text_encoder", torch.float32)


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


def _load_clip(kind: type, folder: Path, dtype: torch.dtype) -> Any:
    """A frozen transformers model out of its folder; missing and unexpected weights are errors instead of warnings."""
    transformers_logging.disable_progress_bar()  # a bar per component, gone in milliseconds
    fields = dict.fromkeys(("hidden_size", "projection_dim", "image_size", "patch_size"), int)
    config = read_config(folder / "config.json", fields)
    weights = [file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin")]
    variant = "fp16" if weights and all(".fp16" in name for name in weights) else None
    with failure_told(f"{folder} cannot be loaded as {kind.__name__}"):
        model, report = kind.from_pretrained(
            folder, config=kind.config_class.from_dict(config), local_files_only=True, output_loading_info=True,
            dtype=dtype, variant=variant,
        )  # fmt: skip
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Older transformers stored the numbers of positions, newer ones compute them.
        names = sorted(str(name) for name in report.get(problem, ()) if not str(name).endswith("position_ids"))
        if names:
            raise ValueError(f"weights in {folder} do not fit {kind.__name__}: {problem} {', '.join(names[:5])}")
    require_finite(dict(model.named_parameters()), folder)
    return model.eval().requires_grad_(False)


def _load_scheduler(kind: type, folder: Path) -> Any:
    """A scheduler with the 1000 time steps that training draws from."""
    path = folder / "scheduler_config.json"
    fields = {"prediction_type": ("epsilon", "v_prediction"), "beta_schedule": ("scaled_linear", "squaredcos_cap_v2")}
    content = read_config(path, fields, required=tuple(fields))  # left out, another one would be taken
    with failure_told(f"{path} makes no {kind.__name__}"):
        scheduler = kind.from_config(content)
        fits = len(scheduler.betas) == 1000 and ((scheduler.betas > 0) & (scheduler.betas <= 1)).all()
    if not fits:
        raise ValueError(f"{path} must make a noise schedule of 1000 steps with betas within 0..1; copy it again")
    return scheduler


def load_feature_extractor(folder: Path, side: int | None = None) -> CLIPImageProcessorPil:
    """CLIP's image processor, tried on one image. side: of the image encoder's input, pixels, if known."""
    path = folder / "preprocessor_config.json"
    switches = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    content = read_config(path, dict.fromkeys(switches, bool), largest=4096)  # pixels
    with failure_told(f"{path} describes no CLIP image processor"):
        extractor = CLIPImageProcessorPil.from_dict(content)
        pixels = extractor(images=[Image.new("RGB", (8, 8), "white")], return_tensors="pt")["pixel_values"]
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (extractor.image_mean, extractor.image_std))
        crop = (extractor.crop_size["height"], extractor.crop_size["width"])
        # Training computes the same from these numbers alone (`latents.clip_pixels`).
        expected = ((1 - mean) / std).expand(1, 3, *crop)
        fits = side in (None, crop[0]) and crop[0] == crop[1] and pixels.shape == expected.shape
        fits = fits and pixels.isfinite().all() and torch.allclose(pixels, expected)
    if not fits:
        expected = f"images of {side or crop[0]} px, normalized by its image_mean and image_std"
        raise ValueError(f"{path} must make {expected}, for the image encoder beside it; copy it again")
    return extractor


def make_schedulers() -> tuple[DDIMScheduler, DDPMScheduler]:
    """The sampler's noise schedule and that of the image embedding, with Stable Diffusion 2.1 unCLIP's own values."""
    # But for the spacing: `trailing` begins at the last step trained, where all is noise, however few there are
    # (https://arxiv.org/abs/2305.08891). `leading` begins 5 steps at 801, whose noise the UNet never saw alone.
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    return scheduler, DDPMScheduler(beta_schedule="squaredcos_cap_v2")


def make_feature_extractor(size: int) -> CLIPImageProcessorPil:
    """CLIP's image processor for a vision encoder of images of `size` px."""
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
