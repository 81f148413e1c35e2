"""Creating, loading and saving the multi-view UNet: stock diffusers weights under FaceLift's config names. Its folder
holds `config.json` (FaceLift loads it too, unless it has camera conditioning: `CameraUNet`), the weights, and
`rig.json` (the view rig it was trained with)."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from multiview.cameras import Cameras
from multiview.checkpoint import load_strict, stamp_rig, step_of
from multiview.rig import ViewRig
from mvdiffusion.component_files import check_sizes, failure_told, read_config, read_weights, what_is_there
from mvdiffusion.models import camera_conditioning as conditioning
from mvdiffusion.models.attention import MultiViewAttnProcessor

log = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model"
TRAIN_FIRST = "train one: python train_diffusion.py --config configs/mouse_mvdiffusion.yaml"
# FaceLift's keys that its own code never reads on this path, with the values its files hold.
FACELIFT_UNUSED = {
    "addition_channels": [1280, 1280, 1280], "addition_downsample": False, "cd_attention_last": False,
    "cd_attention_mid": False, "selfattn_block": "custom",
}  # fmt: skip
# Constructor arguments that FaceLift's class does not have: left out of its form where they say nothing.
UNKNOWN_TO_FACELIFT = {"attention_type": "default", "dropout": 0.0, "reverse_transformer_layers_per_block": None}
# What diffusers' EMAModel adds to the config of an EMA folder.
EMA_KEYS = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
MULTIVIEW_BLOCKS = (  # (stock name, FaceLift's name)
    ("CrossAttnDownBlock2D", "CrossAttnDownBlockMV2D"), ("CrossAttnUpBlock2D", "CrossAttnUpBlockMV2D"),
    ("UNetMidBlock2DCrossAttn", "UNetMidBlockMV2DCrossAttn"),
)  # fmt: skip
VIEW_FIELDS = {
    "num_views": int, "multiview_attention": bool, "sparse_mv_attention": bool,
    "camera_conditioning": conditioning.CAMERA_MODES,
}  # fmt: skip


class MultiViewUNet(UNet2DConditionModel):
    """The stock UNet; with camera conditioning three of its own hooks read the cameras out of `added_cond_kwargs`."""

    def add_camera_conditioning(self, mode: str) -> None:
        """Adds the mode's layers, without effect until trained, and records it in the config."""
        if mode not in conditioning.CAMERA_MODES:
            raise ValueError(f"camera_conditioning must be one of {', '.join(conditioning.CAMERA_MODES)}, got {mode!r}")
        for key in ("addition_embed_type", "encoder_hid_dim_type", "cross_attention_norm"):
            if mode != "none" and self.config[key] is not None:  # they would use the same hooks
                raise ValueError(f"camera conditioning needs a UNet with {key} null, got {self.config[key]!r}")
        if mode == "concat":
            self.conv_in = conditioning.CameraConv2d.widen(self.conv_in)
        elif mode != "none":
            width = self.time_embedding.linear_2.out_features
            outputs = width if mode == "adaln" else self.config.cross_attention_dim
            self.camera = conditioning.CameraEmbedding(mode, width, outputs)
        self.register_to_config(camera_conditioning=mode)

    def forward(self, sample: Tensor, *args: Any, added_cond_kwargs: dict | None = None, **kwargs: Any) -> Any:
        if self.config.camera_conditioning == "concat":
            sample = torch.cat([sample, added_cond_kwargs["camera_rays"].to(sample.dtype)], dim=1)
        return super().forward(sample, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    def get_aug_embed(self, emb: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict) -> Tensor | None:
        """What the stock forward adds to the time embedding: for `adaln`, the cameras'."""
        if self.config.camera_conditioning != "adaln":
            return super().get_aug_embed(emb, encoder_hidden_states, added_cond_kwargs)
        return self.camera(added_cond_kwargs["camera_features"]).to(emb.dtype)

    def process_encoder_hidden_states(self, encoder_hidden_states: Tensor, added_cond_kwargs: dict) -> Tensor:
        """What the stock forward gives to cross-attention: for `cross_attention`, with the camera tokens appended."""
        if self.config.camera_conditioning != "cross_attention":
            return super().process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)
        tokens = self.camera(added_cond_kwargs["camera_features"]).to(encoder_hidden_states.dtype)
        return torch.cat([encoder_hidden_states, tokens], dim=1)


def read_unet_config(folder: Path | str) -> dict:
    """Returns a UNet folder's config.json, checked, with `camera_conditioning`, which weights are not needed for."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"UNet folder {folder} holds no config.json; {what_is_there(path.parent)}; {TRAIN_FIRST}")
    sizes = dict.fromkeys(("cross_attention_dim", "sample_size", "in_channels", "out_channels"), int)
    content = read_config(path, sizes | VIEW_FIELDS, required=("cross_attention_dim",))
    return {**content, "camera_conditioning": content.get("camera_conditioning") or "none"}


def to_stock_config(config: dict, source: str) -> tuple[dict, str | None]:
    """Returns the stock constructor's arguments of a FaceLift or stock config, and the attention mode (None: 2D)."""
    known = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    unknown = {key for key in config if not key.startswith("_")} - known - {*VIEW_FIELDS, *FACELIFT_UNUSED, *EMA_KEYS}
    if unknown:
        raise ValueError(f"{source}: unknown UNet config keys {sorted(unknown)}")
    text = json.dumps({key: value for key, value in config.items() if key in known})
    for stock_name, name in MULTIVIEW_BLOCKS:
        text = text.replace(f'"{name}"', f'"{stock_name}"')
    mode = None
    if "multiview_attention" in config:
        mode = ("sparse" if config.get("sparse_mv_attention") else "full") if config["multiview_attention"] else "none"
    return json.loads(text), mode


def to_facelift_config(unet: MultiViewUNet) -> dict:
    """Returns the inverse of `to_stock_config`, which FaceLift (without cameras) and this project load."""
    text = unet.to_json_string()
    for stock_name, name in MULTIVIEW_BLOCKS:
        text = text.replace(f'"{stock_name}"', f'"{name}"')
    config = {"_class_name": "CameraUNet"}
    for key, value in json.loads(text).items():
        if key == "_diffusers_version" or (key[0] != "_" and (key, value) not in UNKNOWN_TO_FACELIFT.items()):
            config[key] = value
    if config["camera_conditioning"] == "none":
        del config["camera_conditioning"]
        config["_class_name"] = "UNetMV2DConditionModel"
    return {**config, **FACELIFT_UNUSED}


def configure_views(unet: MultiViewUNet, num_views: int, attention: str) -> MultiViewUNet:
    """Puts multi-view attention into every self-attention layer (attn1), or takes it out (`none`); tells the config."""
    if attention not in ("sparse", "full", "none"):
        raise ValueError(f"attention must be one of sparse, full, none, got {attention!r}")
    has_tokens = unet.config.camera_conditioning == "cross_attention"
    own, plain = (MultiViewAttnProcessor(num_views, mode) for mode in (attention, "none"))
    cross = conditioning.CameraAttnProcessor() if has_tokens else plain
    unet.set_attn_processor({name: own if ".attn1." in name else cross for name in unet.attn_processors})
    unet.register_to_config(
        num_views=num_views, multiview_attention=attention != "none", sparse_mv_attention=attention == "sparse"
    )
    return unet


def create_unet(config: dict, num_views: int, attention: str, camera_conditioning: str = "none") -> MultiViewUNet:
    """A freshly initialized UNet. config: constructor arguments of diffusers' UNet2DConditionModel."""
    check_sizes(config, "unet config")
    stock, _ = to_stock_config(config, "unet config")
    _without_weights(stock, "unet config")  # refuses what cannot be built, or is far too large, before memory is taken
    unet = MultiViewUNet(**stock)
    unet.add_camera_conditioning(camera_conditioning)
    return configure_views(unet, num_views, attention)


def _without_weights(stock: dict, source: Path | str) -> MultiViewUNet:
    """A UNet whose weights take no memory yet. Raises ValueError for a config that makes none or a gigantic one."""
    with failure_told(f"{source} makes no UNet2DConditionModel"), torch.device("meta"):
        unet = MultiViewUNet(**stock)
    count = sum(parameter.numel() for parameter in unet.parameters())
    if count > 4e9:  # SD 2.1's UNet has 0.87e9, SDXL's 2.6e9
        raise ValueError(f"{source} makes a UNet of {count / 1e9:.1f}e9 weights, at most 4e9 fit")
    return unet


def load_unet(
    folder: Path | str, *, num_views: int | None = None, attention: str | None = None,
    camera_conditioning: str | None = None, widen_conv_in: bool = False, dtype: torch.dtype = torch.float32,
) -> MultiViewUNet:  # fmt: skip
    """Loads a UNet folder of this project, of FaceLift, or (widen_conv_in: the conditioning image's input channels are
    added with zero weights) a stock 2D one. num_views, attention: override the config; needed where it says nothing.
    camera_conditioning: adds it, without effect until trained, to a UNet that has none.
    Raises ValueError for a missing folder or config, unknown keys, weights that do not fit or are not finite.
    """
    path = Path(folder) / "config.json"
    content = read_unet_config(folder)
    stock, stored_mode = to_stock_config(content, str(path))
    stored_cameras = content["camera_conditioning"]
    cameras = camera_conditioning or stored_cameras
    if stored_cameras not in ("none", cameras):
        remedy = f"leave the option out or set it to {stored_cameras}, or start from a UNet without camera conditioning"
        told = f"the UNet in {folder} was trained with camera_conditioning {stored_cameras}, got {cameras}"
        raise ValueError(f"{told}: {remedy}")
    num_views, attention = num_views or content.get("num_views"), attention or stored_mode
    if num_views is None or attention is None:
        raise ValueError(f"{path} does not say num_views and the attention mode (a 2D UNet?): state both in the config")
    latent_channels, in_channels = stock.get("out_channels") or 4, stock.get("in_channels") or 4
    if in_channels == latent_channels and not widen_conv_in:
        told = f"in_channels must be {2 * latent_channels} (noisy latents + input image), got {in_channels}"
        raise ValueError(f"UNet in {folder}: {told}; a 2D UNet must be fine-tuned first; {TRAIN_FIRST}")
    state = read_weights(path.parent, WEIGHTS)
    if in_channels == latent_channels and "conv_in.weight" in state:
        weight = state["conv_in.weight"]  # [out, c, kh, kw] -> [out, 2c, kh, kw], the new half zero
        state["conv_in.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
        stock["in_channels"] = 2 * latent_channels
        log.info("conv_in of %s widened from %d to %d channels", folder, latent_channels, 2 * latent_channels)
    unet = _without_weights(stock, path)
    unet.add_camera_conditioning(stored_cameras)
    fill_empty(unet, state, folder)
    if stored_cameras != cameras:
        unet.add_camera_conditioning(cameras)
        log.info("camera conditioning %s added to %s", cameras, folder)
    unet = unet if dtype == torch.float32 else unet.to(dtype)  # diffusers warns of every cast, also of none
    return configure_views(unet.eval(), num_views, attention)


def fill_empty(
    model: torch.nn.Module, state: dict[str, Tensor], source: Path | str, dtype: torch.dtype = torch.float32
) -> None:
    """Puts tensors, as `dtype`, into a model made without weights; refuses what does not fit it (`load_strict`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies into parameters without memory: only names and shapes are compared
        load_strict(model, state, source)
    # The tensors become the parameters: a model is in memory once and not twice. Copies, because safetensors maps its
    # file, which may be replaced while the model lives.
    model.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in state.items()}, assign=True)


def save_unet(
    unet: MultiViewUNet, folder: Path | str, rig: ViewRig, *, state: dict | None = None, half: bool = False
) -> None:
    """Writes a UNet folder; the caller makes it atomic. state: weights to write instead of the module's own (an EMA
    copy). half: float16 on disk (for shipping)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_facelift_config(unet), indent=2, sort_keys=True) + "\n")
    state = unet.state_dict() if state is None else state
    tensors = {name: (tensor.half() if half else tensor).detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    stamp_rig(folder, rig)


def resolve_unet_folder(path: Path | str) -> Path:
    """A UNet folder from what users pass: itself, a `checkpoint-<step>`, components, a run (its newest checkpoint)."""
    path = Path(path)
    newest = sorted(path.glob("checkpoint-*"), key=step_of, reverse=True)
    # Of a training checkpoint what validation measures. A run's folder has a config.json of its own.
    for folder in (folder / name for folder in (*newest, path) for name in ("", "unet_ema", "unet")):
        if (folder / "config.json").is_file():
            return folder
    found = what_is_there(path)
    raise ValueError(f"no UNet at {path}: expected config.json there or in its unet/ folder; {found}; {TRAIN_FIRST}")


def run_unet(
    unet: torch.nn.Module, inputs: Tensor, step: Tensor | int, *, prompts: Tensor, labels: Tensor,
    cameras: Cameras | None, reference_view: int,
) -> Tensor:  # fmt: skip
    """Returns one prediction [k * b * n, c, l, l] for k repetitions (guidance halves) of b objects of n views.

    unet: the module, or what accelerate (DDP), torch.compile or peft wrapped around it. reference_view: the input's.
    inputs: [k * b * n, 2 * c, l, l], noisy latents and the input image's. step: one for all, or [k * b * n].
    prompts: [k * b * n, tokens, width]. labels: [k * b * n, d].
    cameras: [b, n], of images of any size in any world frame: only where they stand relative to the reference view
    and the z axis counts. With camera conditioning needed, n any number; else None or the UNet's n views (not used).
    """
    config = unet.module.config if hasattr(unet, "module") else unet.config
    mode, views, conditions = config.camera_conditioning, config.num_views, {}
    if mode != "none":
        if cameras is None:
            raise ValueError(f"a UNet with camera_conditioning {mode} needs cameras [b, n], got None")
        views, cameras = cameras.shape[-1], cameras.to(inputs.device)
        added = conditioning.camera_inputs(mode, cameras, reference_view, inputs.shape[-1], len(inputs))
        conditions = {"added_cond_kwargs": added}
    elif cameras is not None and cameras.shape[-1] != views:
        got = f"got {cameras.shape[-1]} cameras"
        raise ValueError(f"a UNet without camera conditioning generates the {views} views it was trained with, {got}")
    for module in unet.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, MultiViewAttnProcessor):
            processor.num_views, processor.reference_view = views, reference_view
    return unet(inputs, step, encoder_hidden_states=prompts, class_labels=labels, **conditions).sample
