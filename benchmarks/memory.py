"""Peak memory of one run of a case.

On a GPU: what torch allocated at most beyond what was there before the run. On the CPU: by how much the process grew at
most, in a fresh process (Linux only: the kernel's high-water mark is reset between the warm-up and the run).
"""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from benchmarks.cases import Case
from multiview.run import peak_bytes, reset_peak

ROOT = Path(__file__).resolve().parent.parent


def peak_memory(case: Case, device: torch.device) -> float | None:
    """Bytes that one run of `case` needs at most beside weights and inputs; None where it cannot be measured."""
    if device.type == "cuda":
        run = case.build(device)
        run()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return float(torch.cuda.max_memory_allocated(device) - before)
    if not reset_peak():
        return None
    # Large blocks straight from the kernel, so that what is freed does not stay with the process.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.memory", str(torch.get_num_threads())]
    done = subprocess.run(command, input=pickle.dumps(case), env=environment, cwd=ROOT, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {case} failed:\n{done.stderr.decode()}")
    return float(done.stdout)


def grown_by(run) -> float:
    """Bytes by which this process grows at most while `run()` runs once more after warming up."""
    run()
    gc.collect()
    reset_peak()
    before = psutil.Process().memory_info().rss
    run()
    return max(0.0, peak_bytes() - before)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    case = pickle.load(sys.stdin.buffer)  # from `peak_memory` alone
    print(grown_by(case.build(torch.device("cpu"))))


if __name__ == "__main__":
    main()
