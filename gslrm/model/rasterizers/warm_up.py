"""Compiles the CPU rasterizer's forward kernels in a process of its own, while a command imports its libraries: 5
seconds, once per installation, in which a thread would hold the GIL. Imports neither torch nor numba by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
_process: subprocess.Popen | None = None


def start() -> None:
    """Starts compiling unless the kernels lie compiled in the cache already."""
    global _process
    if _process is None and not list((HERE / "__pycache__").glob("compositing.composite-*.nbi")):
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        _process = subprocess.Popen([sys.executable, "-m", __name__], cwd=HERE.parents[2], **quiet)


def wait() -> None:
    """Waits for what `start` began, so that nothing is compiled twice. A failure shows at the next use."""
    if _process is not None and _process.returncode is None:
        _process.wait()


def compile_kernels() -> None:
    """Draws one Gaussian: numba compiles for the types that `cpu.rasterize` passes and stores the result."""
    import numpy as np

    from gslrm.model.rasterizers import compositing, projection

    xyz, quaternion, scale, opacity, color = (np.ones((1, width), np.float32) for width in (3, 4, 3, 1, 3))
    splats, tiles = np.empty((1, projection.NUM_COLUMNS), np.float32), np.empty((1, 4), np.int32)
    camera = np.eye(4), np.ones(4), 16, 16
    projection.project(xyz, quaternion, scale, opacity[:, 0].copy(), color, *camera, 0, 1, splats, tiles)
    order = compositing.depth_order(splats, tiles)
    starts, *pairs, _ = compositing.bin_tiles(order, tiles, 1, 1)
    image = np.empty((5, 16, 16), np.float32)
    compositing.composite(splats, starts, *pairs, np.argsort(-np.diff(starts), kind="stable"), 0, 1, image, None, None)


if __name__ == "__main__":
    compile_kernels()
