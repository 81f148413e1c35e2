"""What the tests of the import's round trip share: the renderer, and samples seen from the recording's world."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from multiview.cameras import Cameras

ROOT = Path(__file__).resolve().parent.parent


def load_script():
    spec = importlib.util.spec_from_file_location("make_synthetic_mouse", ROOT / "scripts" / "make_synthetic_mouse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cameras_in_the_arena(sample) -> Cameras:
    """A sample's cameras, moved back into the recording's world (mm)."""
    to_sample = np.array(sample.extra["calibration_to_sample"])
    scale = np.linalg.norm(to_sample[:3, 0])
    rotation = torch.from_numpy(to_sample[:3, :3] / scale)
    c2w = sample.cameras.c2w.double()
    moved = c2w.clone()
    moved[:, :3, :3] = rotation.T @ c2w[:, :3, :3]
    moved[:, :3, 3] = (c2w[:, :3, 3] - torch.from_numpy(to_sample[:3, 3])) @ rotation / scale
    return replace(sample.cameras, c2w=moved.float())


def shrunk(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """[v, c, n, n] -> [v, c, size, size], each pixel the mean over its area."""
    import cv2

    arrays = [cv2.resize(p.permute(1, 2, 0).numpy(), (size, size), interpolation=cv2.INTER_AREA) for p in pictures]
    return torch.stack([torch.from_numpy(array.reshape(size, size, -1)).permute(2, 0, 1) for array in arrays])
