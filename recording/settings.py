"""What an import is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from multiview.rig import DEFAULT_RIG
from recording.calibration.model import UP_ROTATIONS
from recording.centre import CENTRES, HEADINGS
from recording.geometry import FRAMINGS, POSES, SCALES
from recording.segment import METHODS
from recording.splits import SPLITS

UPS = (*UP_ROTATIONS, "floor", "rig")


@dataclass(frozen=True)
class ImportSettings:
    """What `scripts/process_mouse_data.py` takes. body_length: in the calibration's unit, None = measured.

    time_jumps: numbers of the first frames after a gap in time. shard: (i, n), this run's part of the samples.
    """

    video_dir: Path
    meta_dir: Path
    output_dir: Path
    num_samples: int = 2000
    image_size: int = 512
    rig: str = DEFAULT_RIG
    framing: str = "facelift"
    poses: str = "exact"
    scale: str = "dataset"
    mask_dir: Path | None = None
    segment: str = "none"
    calibration: Path | None = None
    up: str = "z"
    centre: str = "hull"
    smooth_frames: int = 0
    time_jumps: tuple[int, ...] = ()
    heading: str = "none"
    reference_camera: int | None = None
    body_length: float | None = None
    on_bad_frame: str = "error"
    split: str = "blocks"
    split_seed: int = 0
    shard: tuple[int, int] = (0, 1)
    workers: int = 2

    def __post_init__(self) -> None:
        for name, allowed in (
            ("framing", FRAMINGS), ("poses", POSES), ("scale", SCALES), ("segment", METHODS), ("centre", CENTRES),
            ("up", UPS), ("heading", HEADINGS), ("on_bad_frame", ("error", "skip")), ("split", SPLITS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (
            ("num_samples", 1), ("image_size", 16), ("workers", 1), ("smooth_frames", 0), ("split_seed", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.shard[0] < self.shard[1]:
            raise ValueError(f"--shard must be i/n with 0 <= i < n, got {self.shard[0]}/{self.shard[1]}")
        if self.segment != "none" and self.mask_dir is not None:
            raise ValueError(
                f"--segment {self.segment} makes masks, --mask_dir {self.mask_dir} gives them; leave one of them out"
            )
