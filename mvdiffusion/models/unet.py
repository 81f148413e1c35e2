"""Creating, loading and saving the multi-view UNet: stock diffusers weights under FaceLift's config names.

A UNet folder holds `config.json` (with FaceLift's block names, num_views and attention flags, so that FaceLift loads
it too), `diffusion_pytorch_model.safetensors` and `rig.json` (the view rig it was trained with). One with camera
conditioning says so (`_class_name: CameraUNet`, `camera_conditioning`), has more weights (`is_camera_weight`), and is
this project's alone.

How the UNet is called, in training and inference alike:

    unet = create_unet(config, num_views, attention, camera_conditioning="adaln")
    unet = load_unet(folder, camera_conditioning=None)  # None: as stored; a name adds it to a UNet that has none
    v = run_unet(unet, inputs, step, prompts=..., labels=..., cameras=..., reference_view=rig.reference_view)

`unet.config.camera_conditioning` is `none`, `adaln`, `cross_attention` or `concat`. `run_unet` takes the bare module or
what accelerate (DDP), torch.compile or peft wrapped around it; see there for shapes. The weights are ordinary
parameters of `unet`: EMA, state_dict and `save_unet` cover them, and peft's targets (`to_q`, ...) do not match them.
"""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.checkpoint import load_strict, read_rig, stamp_rig
from multiview.files import damage_explained, read_json, take
from multiview.rig import ViewRig
from mvdiffusion.models.attention import set_multiview_attention, set_views
from mvdiffusion.models.camera_conditioning import camera_inputs, is_camera_weight

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

log = logging.getLogger(__name__)

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
LEGACY_WEIGHTS_NAME = "diffusion_pytorch_model.bin"
TRAIN_COMMAND = "python train_diffusion.py --config configs/mouse_mvdiffusion.yaml"

# FaceLift's keys that its own code never reads on this path, with the values its files hold.
FACELIFT_UNUSED = {
    "addition_channels": [1280, 1280, 1280],
    "addition_downsample": False,
    "cd_attention_last": False,
    "cd_attention_mid": False,
    "selfattn_block": "custom",
}
# Constructor arguments that FaceLift's class does not have: left out of its form where they say nothing.
UNKNOWN_TO_FACELIFT = {"attention_type": "default", "dropout": 0.0, "reverse_transformer_layers_per_block": None}
VIEW_KEYS = ("num_views", "multiview_attention", "sparse_mv_attention", "camera_conditioning")
# What diffusers' EMAModel adds to the config of an EMA folder.
EMA_KEYS = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
BLOCK_KEYS = ("down_block_types", "up_block_types", "mid_block_type")
MULTIVIEW_BLOCKS = {  # stock name -> FaceLift's name
    "CrossAttnDownBlock2D": "CrossAttnDownBlockMV2D",
    "CrossAttnUpBlock2D": "CrossAttnUpBlockMV2D",
    "UNetMidBlock2DCrossAttn": "UNetMidBlockMV2DCrossAttn",
}


# ---- configuration --------------------------------------------------------------------------------------------------


def to_stock_config(config: dict, source: str) -> tuple[dict, int | None, str | None]:
    """FaceLift's (or a stock) UNet config -> the stock constructor's arguments, num_views, attention mode.

    num_views and the mode are None where the config does not say (a plain 2D UNet).
    Raises ValueError for a key that is neither diffusers' nor FaceLift's.
    """
    from diffusers import UNet2DConditionModel

    known = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    stock, unknown = {}, []
    for key, value in config.items():
        if key in known:
            stock[key] = value
        elif not key.startswith("_") and key not in {*VIEW_KEYS, *FACELIFT_UNUSED, *EMA_KEYS}:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{source}: unknown UNet config keys {sorted(unknown)}")
    for key in BLOCK_KEYS:
        if stock.get(key) is not None:
            stock[key] = _map_names(stock[key], lambda name: name.replace("BlockMV2D", "Block2D"))
    mode = None
    if "multiview_attention" in config:
        mode = "none"
        if config["multiview_attention"]:
            mode = "sparse" if config.get("sparse_mv_attention", False) else "full"
    return stock, config.get("num_views"), mode


def to_facelift_config(stock: dict, num_views: int, attention: str, camera_conditioning: str = "none") -> dict:
    """The inverse of `to_stock_config`: what is written, loadable by FaceLift (without cameras) and by this project."""
    config = {
        key: value
        for key, value in stock.items()
        if not key.startswith("_") and (key, value) not in UNKNOWN_TO_FACELIFT.items()
    }
    for key in BLOCK_KEYS:
        config[key] = _map_names(config[key], lambda name: MULTIVIEW_BLOCKS.get(name, name))
    config.update(FACELIFT_UNUSED)
    config["num_views"] = num_views
    config["multiview_attention"] = attention != "none"
    config["sparse_mv_attention"] = attention == "sparse"
    name = "UNetMV2DConditionModel"
    if camera_conditioning != "none":
        name, config["camera_conditioning"] = "CameraUNet", camera_conditioning
    return {"_class_name": name, "_diffusers_version": stock["_diffusers_version"], **config}


def _map_names(names: str | list | tuple, rename) -> str | list:
    return rename(names) if isinstance(names, str) else [rename(name) for name in names]


# ---- creation, loading, saving --------------------------------------------------------------------------------------


def configure_views(unet: UNet2DConditionModel, num_views: int, attention: str) -> UNet2DConditionModel:
    """Sets the number of views and the attention mode, and records both in the UNet's config."""
    set_multiview_attention(unet, num_views, attention)
    unet.register_to_config(
        num_views=num_views, multiview_attention=attention != "none", sparse_mv_attention=attention == "sparse"
    )
    return unet


def create_unet(
    config: dict, num_views: int, attention: str, camera_conditioning: str = "none"
) -> UNet2DConditionModel:
    """A freshly initialised UNet. config: constructor arguments of diffusers' UNet2DConditionModel."""
    stock, _, _ = to_stock_config(config, "unet config")
    return configure_views(_build(stock, camera_conditioning), num_views, attention)


def _build(stock: dict, camera_conditioning: str) -> UNet2DConditionModel:
    """The stock class where there are no cameras, else the same with zero-initialised camera layers."""
    if camera_conditioning == "none":
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(**stock)
        unet.register_to_config(camera_conditioning="none")
        return unet
    from mvdiffusion.models.camera_unet import CameraUNet

    return CameraUNet(**stock).add_camera_conditioning(camera_conditioning)


def run_unet(
    unet: torch.nn.Module,
    inputs: Tensor,
    step: Tensor | int,
    *,
    prompts: Tensor,
    labels: Tensor,
    cameras: Cameras | None,
    reference_view: int,
) -> Tensor:
    """One prediction for a batch of k * b * n latents: k repetitions (guidance halves) of b objects of n views.

    unet: the module, or what accelerate, torch.compile or peft wrapped around it.
    inputs: [k * b * n, 2 * c, l, l], noisy latents and the input picture's. step: one for all, or [k * b * n].
    prompts: [k * b * n, tokens, width]. labels: [k * b * n, d].
    cameras: [b, n], of pictures of any size in any world frame: only where they stand relative to the reference view
    and the world's z axis counts. Needed with camera conditioning, where n may be any number; otherwise None or the n
    views that the UNet was made for (their poses are not used).
    reference_view: index of the view that shows the input picture.
    Returns [k * b * n, c, l, l]. Raises ValueError where cameras are missing or do not go with the batch.
    """
    config = unet.module.config if hasattr(unet, "module") else unet.config
    mode, views = config.camera_conditioning, config.num_views
    conditions = {}
    if mode != "none":
        if cameras is None:
            raise ValueError(f"a UNet with camera_conditioning {mode} needs cameras [b, n], got None")
        views = cameras.shape[-1]
        cameras = cameras.to(inputs.device)
        added = camera_inputs(mode, cameras, reference_view, inputs.shape[-1], len(inputs))
        conditions = {"added_cond_kwargs": added}
    elif cameras is not None and cameras.shape[-1] != views:
        raise ValueError(
            f"a UNet without camera conditioning paints the {views} views it was trained with, got "
            f"{cameras.shape[-1]} cameras"
        )
    set_views(unet, views, reference_view)
    return unet(inputs, step, encoder_hidden_states=prompts, class_labels=labels, **conditions).sample


def attention_mode(unet: UNet2DConditionModel) -> str:
    """`sparse`, `full` or `none`, as recorded by `configure_views`."""
    if not unet.config.multiview_attention:
        return "none"
    return "sparse" if unet.config.sparse_mv_attention else "full"


def load_unet(
    folder: Path | str,
    *,
    num_views: int | None = None,
    attention: str | None = None,
    camera_conditioning: str | None = None,
    widen_conv_in: bool = False,
    dtype: torch.dtype = torch.float32,
) -> UNet2DConditionModel:
    """Loads a UNet folder of this project, of FaceLift, or (widen_conv_in) a stock 2D one.

    num_views, attention: override what the config says; needed where it says nothing.
    camera_conditioning: None takes what the config says; a name adds it, without effect until trained, to a UNet that
    has none (and is refused by a UNet that has another).
    widen_conv_in: where the source has only the noisy latents' input channels, the conditioning image's are added with
    zero weights. A UNet that has them already keeps its own weights.
    Raises ValueError for a missing folder or config, unknown keys, weights that do not fit.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"UNet folder {folder} holds no config.json; {_what_is_there(folder)}; train one: {TRAIN_COMMAND}"
        )
    content = read_json(path)
    stock, stored_views, stored_mode = to_stock_config(content, str(path))
    stored_cameras = content.get("camera_conditioning", "none")
    camera_conditioning = camera_conditioning or stored_cameras
    if stored_cameras not in ("none", camera_conditioning):
        raise ValueError(
            f"the UNet in {folder} was trained with camera_conditioning {stored_cameras}, got {camera_conditioning}: "
            f"leave the option out or set it to {stored_cameras}, or start from a UNet without camera conditioning"
        )
    stored_views = take(content, "num_views", int, str(path), default=None, least=1, most=1000)
    num_views, attention = num_views or stored_views, attention or stored_mode
    if num_views is None or attention is None:
        raise ValueError(f"{path} does not say num_views and the attention mode (a 2D UNet?): state both in the config")
    state = _read_weights(folder)
    latent_channels, in_channels = stock.get("out_channels", 4), stock.get("in_channels", 4)
    if in_channels == latent_channels:
        if not widen_conv_in:
            raise ValueError(
                f"UNet in {folder}: in_channels must be {2 * latent_channels} (noisy latents + input picture), got "
                f"{in_channels}; it is a 2D UNet, to be fine-tuned first: {TRAIN_COMMAND}"
            )
        state["conv_in.weight"] = _widened(state["conv_in.weight"])
        stock["in_channels"] = 2 * latent_channels
        log.info("conv_in of %s widened from %d to %d channels", folder, latent_channels, 2 * latent_channels)
    with damage_explained(f"UNet config {path}"):
        unet = _build(stock, camera_conditioning)
    if stored_cameras != camera_conditioning:
        added = {name: tensor for name, tensor in unet.state_dict().items() if is_camera_weight(name)}
        state = {**state, **added}
        log.info("camera conditioning %s added to %s (%d new tensors)", camera_conditioning, folder, len(added))
    load_strict(unet, state, str(folder))
    if dtype != torch.float32:
        unet = unet.to(dtype)
    return configure_views(unet.eval(), num_views, attention)


def save_unet(
    unet: UNet2DConditionModel, folder: Path | str, rig: ViewRig, *, state: dict | None = None, half: bool = False
) -> None:
    """Writes a UNet folder: FaceLift's config.json, safetensors weights, rig.json.

    state: weights to write instead of the module's own (an EMA copy). half: float16 on disk (for shipping).
    `folder` is created; the caller makes the write atomic (multiview.checkpoint.atomic_folder).
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(unet.to_json_string())
    content = to_facelift_config(
        {key: value for key, value in config.items() if key not in VIEW_KEYS},
        unet.config.num_views,
        attention_mode(unet),
        unet.config.camera_conditioning,
    )
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    state = unet.state_dict() if state is None else state
    tensors = {name: (tensor.half() if half else tensor).detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    stamp_rig(folder, rig)


def resolve_unet_folder(path: Path | str, *, prefer_ema: bool = True) -> Path:
    """A UNet folder from what users pass: the folder itself, a `checkpoint-<step>`, or a components folder.

    In a training checkpoint `unet_ema` is preferred (it is what validation measures) unless prefer_ema is False.
    """
    path = Path(path)
    names = ("", "unet_ema", "unet") if prefer_ema else ("", "unet", "unet_ema")
    for name in names:
        if (path / name / "config.json").is_file():
            return path / name
    raise ValueError(
        f"no UNet at {path}: expected config.json there or in its unet/ folder; {_what_is_there(path)}; "
        f"train one: {TRAIN_COMMAND}"
    )


def unet_rig(folder: Path | str) -> ViewRig | None:
    """The rig stamped into a UNet folder; None for public weights, which carry none."""
    return read_rig(Path(folder))


def camera_conditioning_of(folder: Path | str) -> str:
    """What a UNet folder's config says, without loading weights: `none`, `adaln`, `cross_attention` or `concat`."""
    return read_json(Path(folder) / "config.json").get("camera_conditioning", "none")


def _what_is_there(folder: Path) -> str:
    if not folder.exists():
        return "the folder does not exist"
    return f"it holds {sorted(item.name for item in folder.iterdir())[:8]}" if folder.is_dir() else "it is not a folder"


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / WEIGHTS_NAME).is_file():
        try:
            return load_file(folder / WEIGHTS_NAME)
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS_NAME} is damaged or incomplete: {error}; copy it again") from error
    if (folder / LEGACY_WEIGHTS_NAME).is_file():
        return torch.load(folder / LEGACY_WEIGHTS_NAME, map_location="cpu", weights_only=True)
    raise ValueError(f"UNet folder {folder} holds neither {WEIGHTS_NAME} nor {LEGACY_WEIGHTS_NAME}")


def _widened(weight: Tensor) -> Tensor:
    """conv_in weights [out, c, kh, kw] -> [out, 2c, kh, kw], the new half zero."""
    return torch.cat([weight, torch.zeros_like(weight)], dim=1)
