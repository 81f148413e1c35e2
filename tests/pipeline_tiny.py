"""Both stages in tiny weights: Stage 1 components and UNet, embeddings, a GS-LRM, all of one rig."""

import importlib
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
from mvdiffusion_tiny import SIZE, UNET, prepare

from gslrm.checkpoints import checkpoint_path
from gslrm.config import GaussiansConfig, GSLRMConfig, ImageTokenizerConfig, ModelConfig, TransformerConfig
from gslrm.model.gslrm import GSLRM
from multiview.checkpoint import save_checkpoint
from multiview.rig import ViewRig, load_rig
from multiview.run import main_guard
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
    save_checkpoint(path, {"model": GSLRM(config.model).state_dict()}, sidecar)
    return path


def prepare_pipeline(folder: Path, rig_name: str = "mouse6") -> dict[str, Path]:
    """Everything `inference_mouse.py` needs, as paths."""
    rig = load_rig(rig_name)
    paths = prepare(folder, rig_name)
    paths["unet"] = write_unet(folder / "unet", rig)
    paths["gslrm"] = write_gslrm(folder / "gslrm", rig)
    return paths


def run(script: str, *arguments) -> tuple[int, str, str]:
    """Runs a script of the project in this process: (exit code, stdout, stderr)."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", [script, *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main_guard(module.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def must(script: str, *arguments) -> str:
    """The same, and it must succeed: stdout."""
    code, out, err = run(script, *arguments)
    assert code == 0, err
    return out
