"""What an import is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from multiview.recording.geometry import FRAMINGS, POSES
from multiview.rig import DEFAULT_RIG


@dataclass(frozen=True)
class ImportSettings:
    """What `scripts/process_mouse_data.py` takes. body_length: in the calibration's unit, None = measured."""

    video_dir: Path
    meta_dir: Path
    output_dir: Path
    num_samples: int = 2000
    image_size: int = 512
    rig: str = DEFAULT_RIG
    framing: str = "facelift"
    poses: str = "exact"
    mask_dir: Path | None = None
    calibration: Path | None = None
    up: str = "z"
    reference_camera: int | None = None
    body_length: float | None = None
    on_bad_frame: str = "error"
    workers: int = 2

    def __post_init__(self) -> None:
        for name, allowed in (("framing", FRAMINGS), ("poses", POSES), ("on_bad_frame", ("error", "skip"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (("num_samples", 1), ("image_size", 16), ("workers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
