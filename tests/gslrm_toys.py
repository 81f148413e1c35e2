"""Toy animals of 16 pixels and the smallest GS-LRM run over them, for the tests of Stage 2's training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from gslrm.config import DatasetConfig, GSLRMConfig
from gslrm.data.mouse_dataset import MouseViewDataset
from gslrm.model.gaussians import C0, Gaussians
from gslrm.model.gaussians_renderer import render
from gslrm.training import GSLRMTraining
from multiview.cameras import Cameras
from multiview.config import load_config
from multiview.rig import load_rig
from multiview.run import start_processes
from multiview.sample import Sample, write_dataset_info, write_sample, write_split

ROOT = Path(__file__).resolve().parent.parent
SIZE = 16


def toy_sample(number: int, rig, size: int = SIZE) -> Sample:
    """A coloured ellipsoid of about half the picture's width, seen from the rig and from two more directions."""
    generator = torch.Generator().manual_seed(number)
    own = rig.cameras(size)
    extra = Cameras.orbit(torch.tensor([25.0, 200.0]), torch.tensor([10.0, 40.0]), rig.distance, rig.focal, size)
    cameras = Cameras(torch.cat([own.c2w, extra.c2w]), torch.cat([own.fxfycxcy, extra.fxfycxcy]), size, size)
    points = torch.randn(1, 600, 3, generator=generator)
    points = torch.nn.functional.normalize(points, dim=-1) * torch.tensor([0.5, 0.25, 0.25])
    colour = torch.rand(3, generator=generator) + 0.3 * points / 0.5
    gaussians = Gaussians(
        xyz=points, features=((colour.clamp(0.05, 0.95) - 0.5) / C0)[:, :, None],
        scaling=torch.full((1, 600, 3), -2.8), rotation=torch.tensor([1.0, 0, 0, 0]).expand(1, 600, 4),
        opacity=torch.full((1, 600, 1), 6.0),
    )  # fmt: skip
    rgb, alpha, depth = (value[0] for value in render(gaussians, cameras[None], 0.0))
    rgba = torch.cat([rgb / alpha.clamp_min(1e-3), alpha], dim=1).clamp(0, 1)
    names = rig.view_names + [None, None]
    return Sample(f"toy_{number}", rgba, cameras, names, depth=torch.where(alpha > 0.5, depth / alpha, 0.0))


def write_toys(folder: Path) -> Path:
    """Four training samples and one for validation, with their lists."""
    rig = load_rig("mouse6")
    for number in range(5):
        write_sample(folder / f"sample_{number}", toy_sample(number, rig))
    write_dataset_info(folder, rig)
    write_split(folder / "train.txt", [folder / f"sample_{number}" for number in range(4)])
    write_split(folder / "val.txt", [folder / "sample_4"])
    return folder


def settings(data, folder, **overrides) -> list[str]:
    values = {
        "model.image_tokenizer.image_size": SIZE, "model.transformer.d": 32, "model.transformer.d_head": 16,
        "model.transformer.n_layer": 2, "training.runtime.device": "cpu", "training.runtime.grad_checkpoint_every": 0,
        "training.dataset.dataset_path": data / "train.txt", "training.dataset.num_views": 8,
        "training.dataloader.num_workers": 0, "training.losses.lpips_loss_weight": 0,
        "training.losses.perceptual_loss_weight": 0, "training.losses.ssim_loss_weight": 0.1,
        "training.losses.alpha_loss_weight": 0.2, "training.optimizer.lr": 1e-3, "training.schedule.warmup": 2,
        "training.schedule.max_fwdbwd_passes": 6, "training.checkpointing.checkpoint_dir": folder,
        "training.checkpointing.checkpoint_every": 2, "training.logging.print_every": 1,
        "validation.dataset_path": data / "val.txt", "validation.val_every": 1000, **overrides,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def config_of(data, folder, **overrides) -> GSLRMConfig:
    return load_config(GSLRMConfig, None, settings(data, folder, **overrides))


def start(config: GSLRMConfig) -> GSLRMTraining:
    """Everything loaded and resumed, as the loop gets it."""
    return GSLRMTraining(config, 0, start_processes("cpu"))


def dataset_of(list_file: Path, *, size: int = SIZE, **options) -> MouseViewDataset:
    """A data set of a list; options of its own or of the section `training.dataset`."""
    own = {name: options.pop(name) for name in ("with_depth", "seed", "limit", "every_view") if name in options}
    return MouseViewDataset(list_file, DatasetConfig(**options), size, **own)


def logged(folder, name="loss", split="train") -> list[float]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["split"] == split]


def run_script(*arguments: str, torchrun: int = 0, script: str = "train_gslrm.py") -> subprocess.Popen:
    """The training command (or a script around it) in a process of its own, or `torchrun` of them."""
    launcher = [sys.executable, script]
    if torchrun:
        launcher[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(torchrun)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen(
        [*launcher, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
