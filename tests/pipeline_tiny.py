"""Both stages in tiny weights: Stage 1 components and UNet, embeddings, a GS-LRM, all of one rig."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from mvdiffusion_tiny import SIZE, UNET, prepare
from running import must, run  # noqa: F401 (other tests have them from here)

from gslrm.checkpoints import checkpoint_path
from gslrm.config import GaussiansConfig, GSLRMConfig, ImageTokenizerConfig, ModelConfig, TransformerConfig
from gslrm.model.gslrm import GSLRM
from multiview.checkpoint import save_checkpoint
from multiview.rig import ViewRig, load_rig
from mvdiffusion.models.unet import create_unet, save_unet


def write_unet(folder: Path, rig: ViewRig, **changes) -> Path:
    """A random UNet folder of the tiny shape."""
    torch.manual_seed(0)
    save_unet(create_unet({**UNET, **changes}, rig.num_views, "sparse"), folder, rig)
    return folder


def write_gslrm(folder: Path, rig: ViewRig, step: int = 5) -> Path:
    """A random GS-LRM checkpoint of the tiny shape; returns the file."""
    torch.manual_seed(0)
    model = ModelConfig(
        image_tokenizer=ImageTokenizerConfig(image_size=SIZE, patch_size=8),
        transformer=TransformerConfig(d=32, d_head=16, n_layer=1), gaussians=GaussiansConfig(),
    )  # fmt: skip
    config = replace(GSLRMConfig(), rig=rig.name, model=model)
    path = checkpoint_path(folder, step)
    sidecar = {"config": asdict(config), "rig": rig.to_dict(), "step": step}
    save_checkpoint(path, {"model": GSLRM(config.model).state_dict(), "fwdbwd_pass_step": step}, sidecar)
    return path


def prepare_pipeline(folder: Path, rig_name: str = "mouse6") -> dict[str, Path]:
    """Everything `inference_mouse.py` needs, as paths."""
    rig = load_rig(rig_name)
    paths = prepare(folder, rig_name)
    paths["unet"] = write_unet(folder / "unet", rig)
    paths["gslrm"] = write_gslrm(folder / "gslrm", rig)
    return paths
