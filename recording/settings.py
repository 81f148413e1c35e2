"""What an import is asked to do: default, help and check of every flag of `scripts/process_mouse_data.py`.

Imports nothing heavy, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from multiview.config import option


@dataclasses.dataclass(frozen=True)
class ImportSettings:
    video_dir: Path = option(None, "folder of the videos (required)")
    meta_dir: Path = option(None, "folder of the calibration and the mask videos (required)")
    output_dir: Path = option(None, "dataset folder, new or to be continued (required)")
    num_samples: int = option(2000, "frames, evenly spaced over the recording", least=1)
    image_size: int = option(512, "pixels, square images", least=16, most=8192)
    rig: str = option("mouse6", "whose view names to use: a rig, its file, or 'calibrated'")
    framing: str = option("facelift", "see above", choices=("exact", "fill", "facelift"))
    poses: str = option("exact", "see above", choices=("exact", "nearest"))
    scale: str = option("dataset", "one world scale, or one per sample: equal distances", choices=("dataset", "sample"))
    mask_dir: Path | None = option(None, "folder of the mask videos, if not in meta_dir")
    segment: str = option(
        "none", "find the masks by a background that stays, or a network", choices=("none", "median", "mog2", "rembg")
    )
    calibration: Path | None = option(None, "calibration file, if not the one in meta_dir")
    up: str = option(
        "z", "the axis that is up, or found: from the floor the animal walks on, or from the cameras' mean",
        choices=("z", "-z", "y", "-y", "x", "-x", "floor", "rig"),
    )  # fmt: skip
    centre: str = option("hull", "see above", choices=("hull", "triangulate"))
    smooth_frames: int = option(0, "frames of video over which centers are averaged", least=0)
    time_jumps: tuple[int, ...] = option((), "first frames after a gap in time; never smoothed across", metavar="FRAME")
    heading: str = option(
        "none", "turn samples by the animal's way of walking, or by its tail", choices=("none", "motion", "pca")
    )
    reference_camera: int | None = option(None, "camera that is the rig's reference view; left out: the best fit")
    body_length: float | None = option(None, "nose to tail base, in the calibration's unit; left out: measured")
    on_bad_frame: str = option(
        "list", "a frame with an empty mask: left out and exit 1, left out, or stop", choices=("list", "skip", "error")
    )
    split: str = option("blocks", "80/20 by blocks of time, or at random", choices=("blocks", "random"))
    split_seed: int = option(0, "of --split random", least=0)
    max_megapixels: int = option(50, "larger video frames are refused: they need 50 bytes of memory a pixel", least=1)
    workers: int = option(2, "processes, at most one per camera; the result does not depend on it", least=1)
    shard: str = option("0/1", "part i of n of the samples that this run writes, from 0", metavar="i/n")

    def __post_init__(self) -> None:
        missing = [f"--{name}" for name in ("video_dir", "meta_dir", "output_dir") if getattr(self, name) is None]
        if missing:
            raise ValueError(f"the following arguments are required: {', '.join(missing)}")
        if self.body_length is not None and not self.body_length > 0:
            raise ValueError(f"--body_length must be positive, got {self.body_length}")
        if not re.fullmatch(r"\d{1,6}/\d{1,6}", self.shard) or not self.part[0] < self.part[1]:
            raise ValueError(f"--shard must be i/n with 0 <= i < n, got {self.shard}")
        if self.segment != "none" and self.mask_dir is not None:
            both = f"--segment {self.segment} makes masks, --mask_dir {self.mask_dir} gives them"
            raise ValueError(f"{both}; leave one of them out")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"--output_dir {self.output_dir} is a file; name a folder, new or to be continued")

    @property
    def part(self) -> tuple[int, int]:
        """Which part of the samples this run writes, of how many."""
        index, count = self.shard.split("/")
        return int(index), int(count)

    @property
    def mask_folder(self) -> Path:
        """Where the cleaned masks lie while an import is under way: beside its dataset, on the same disk."""
        return self.output_dir.with_name(f".{self.output_dir.name}.masks")

    def sample(self, index: int) -> Path:
        """The folder of a sample."""
        return self.output_dir / f"sample_{index:06d}"
