"""Flags of scripts/make_synthetic_mouse.py: default, help and check of each, said once. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from multiview.config import option

COATS = ("black", "agouti", "brown", "grey", "white", "piebald")
POSES = ("walk", "stand", "crouch", "turn", "rear", "groom", "sniff")  # what an unnamed pose is drawn from
ASKED_POSES = ("curl", "stretch")  # drawn only where they are named: the mice of older seeds stay as they were
# Of recording.calibration.FORMATS, whose import would slow --help down; a test compares the two.
CALIBRATION_FORMATS = (
    "mammal", "dannce", "anipose", "transforms", "colmap_text", "colmap_binary", "opencv", "blender"
)  # fmt: skip
MOST_SAMPLES, MOST_PIXELS = 10_000_000, 4096  # beyond these a number is a slip of the keyboard, and fills the disk


@dataclass(frozen=True)
class MouseSettings:
    """What to make. `parameters` are the fields that decide what a sample looks like."""

    output_dir: Path = option(..., "dataset folder, new or to be continued")
    num_samples: int = option(100, "mice; a larger number extends a dataset", least=1)
    rig: str = option("mouse6", "a rig's name (configs/rigs) or a YAML/JSON file")
    image_size: int = option(128, "pixels, square images", least=8)
    seed: int = option(0, "of the series of mice", least=0)
    workers: int = option(2, "processes; the result does not depend on it", least=1)
    num_novel_views: int = option(0, "random views appended after the rig's", least=0)
    depth: bool = option(False, "write depth images too")
    heading_deg: tuple[float, ...] | None = option(
        None, "CENTER SPREAD: nose towards the rig's azimuth CENTER +- SPREAD degrees; left out: any heading"
    )
    coat: str | None = option(None, "left out: drawn at random", choices=COATS)
    pose: str | None = option(None, "left out: drawn at random", choices=(*POSES, *ASKED_POSES, "rest"))
    poses: tuple[str, ...] = option((), "several poses, in equal shares", choices=(*POSES, *ASKED_POSES))
    size: tuple[float, ...] | None = option(None, "LOW HIGH: body length in world units; left out: about 1.2")
    off_center: float = option(0.0, "how far the body lies off the image's center, share of its width", least=0)
    elevation: tuple[float, ...] | None = option(
        None, "LOW HIGH: of the input view's camera, degrees; left out: the rig's"
    )
    photographic: float = option(
        0.0, "share 0..1 of the mice whose rig views look like cut-out photographs: other light, framing, blur, "
        "noise, imperfect masks; novel views stay clean", metavar="SHARE", least=0,
    )  # fmt: skip
    val_fraction: float = option(0.2, "share of the mice kept for validation", least=0)
    prefix: str = option("data_mouse", "names the split lists: <prefix>_train.txt, _val.txt")
    device: str = option("cpu", "cpu, cuda or auto; draws the images")
    body_model: Path | None = option(None, "an external skinned mesh (.npz) to draw instead")
    body_model_poses: Path | None = option(None, "its pose library (.npz)")
    as_recording: bool = option(False, "write a raw recording of --num_samples frames")
    lens_distortion: str = option(
        "none", "of the recording: undistorted images, or photographs through the rig's real lenses (skew included)",
        choices=("none", "real"),
    )  # fmt: skip
    noise: float = option(0.0, "of the recording's sensors: deviation at white, in levels of 255", least=0)
    uneven_light: bool = option(
        False, "in the recording: uneven gain, vignetting, an exposure per camera, a textured wall behind the animal"
    )
    calibration_formats: str = option(
        "", "of the recording: mammal, dannce, anipose, transforms, colmap (or colmap_text), opencv, blender; the "
        "first lies in the folder, the others in calibrations/; left out: mammal, or dannce with real lens distortion",
        metavar="A,B,...",
    )  # fmt: skip
    video_width: int = option(1152, "pixels, of the recording's videos", least=64)
    fps: float = option(25.0, "frames per second of the recording", least=0.01)

    def __post_init__(self) -> None:
        cameras_of_recording = self.lens_distortion != "none" or self.noise or self.uneven_light
        formats, broad = self.formats, bool(self.poses or self.size or self.off_center or self.elevation)
        for wrong, message in (
            (self.num_samples > MOST_SAMPLES, f"--num_samples may be {MOST_SAMPLES} at most, got {self.num_samples}"),
            (self.image_size > MOST_PIXELS, f"--image_size may be {MOST_PIXELS} at most, got {self.image_size}"),
            (self.video_width > MOST_PIXELS or self.video_width % 2,
             f"--video_width must be even and {MOST_PIXELS} at most, got {self.video_width}"),
            (not self.val_fraction < 1.0, f"--val_fraction must be in [0, 1), got {self.val_fraction}"),
            (not self.photographic <= 1.0, f"--photographic must be in [0, 1], got {self.photographic}"),
            (not self.off_center <= 0.5, f"--off_center must be in [0, 0.5], got {self.off_center}"),
            (self.heading_deg and len(self.heading_deg) != 2, "--heading_deg takes CENTER and SPREAD"),
            (self.size and not _is_range(self.size, 0.05, 3.0), "--size takes LOW and HIGH within 0.05 and 3"),
            (self.elevation and not _is_range(self.elevation, -89, 89), "--elevation takes LOW and HIGH within +-89"),
            (len(set(formats)) != len(formats) or set(formats) - set(CALIBRATION_FORMATS),
             f"--calibration_formats takes different ones of {', '.join(CALIBRATION_FORMATS)}, "
             f"parted by commas, got {self.calibration_formats!r}"),
            (self.as_recording and self.body_model,
             "--as_recording films the procedural mouse; leave --body_model out"),
            (self.as_recording and self.photographic,
             "--photographic is a dataset's; a recording has --lens_distortion, --noise and --uneven_light"),
            (self.as_recording and broad, "--poses, --size, --off_center and --elevation are a dataset's"),
            (cameras_of_recording and not self.as_recording,
             "--lens_distortion, --noise and --uneven_light are a recording's: add --as_recording"),
            (self.body_model_poses and not self.body_model, "--body_model_poses needs --body_model"),
            (self.body_model and not self.body_model_poses,
             "--body_model needs --body_model_poses: its rest pose is no natural posture"),
            (self.body_model and (self.pose or self.poses),
             "--pose and --poses name procedural poses; with --body_model they come from --body_model_poses"),
            (self.pose and self.poses, "--pose and --poses exclude each other"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(message)

    @property
    def formats(self) -> tuple[str, ...]:
        """Calibration formats by their full names; colmap is the binary one."""
        names = self.calibration_formats.split(",") if self.calibration_formats else ()
        return tuple("colmap_binary" if name == "colmap" else name for name in names)

    @property
    def parameters(self) -> dict:
        """Content of dataset.json. Newer fields are left out at their default: older datasets can be continued."""
        names = "seed image_size num_novel_views depth heading_deg coat pose val_fraction prefix".split()
        values = {"source": "synthetic", **{name: getattr(self, name) for name in names}}
        for name in ("body_model", "body_model_poses"):
            values[name] = path.name if (path := getattr(self, name)) else None
        newer = {name: getattr(self, name) for name in ("photographic", "poses", "size", "off_center", "elevation")}
        values |= {name: value for name, value in newer.items() if value}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _is_range(values: tuple[float, ...], least: float, most: float) -> bool:
    return len(values) == 2 and least <= values[0] <= values[1] <= most
