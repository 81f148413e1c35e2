"""Flags of scripts/make_synthetic_mouse.py: default, help and check of each, said once. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from multiview.config import option

COATS = ("black", "agouti", "brown", "grey", "white", "piebald")
POSES = ("walk", "stand", "crouch", "turn", "rear", "groom", "sniff")  # an unnamed pose is one of these
MICE = 2  # raised when a seed's mice change: a dataset that holds others is not continued
ALL_POSES = (*POSES, "curl", "stretch")  # the last only where they are named: mice of older seeds stay as they were
# Of recording.calibration.formats.FORMATS, whose import would slow --help down; a test compares the two.
CALIBRATION_FORMATS = tuple("mammal dannce anipose transforms colmap_text colmap_binary opencv blender".split())


# Upper limits: beyond them a number is a slip of the keyboard, and would fill memory or disk.
@dataclass(frozen=True)
class MouseSettings:
    """A dataset, or a recording, of synthetic mice."""

    output_dir: Path = option(..., "dataset folder, new or to be continued")
    num_samples: int = option(100, "mice; a larger number extends a dataset", least=1, most=10_000_000)
    rig: str = option("mouse6", "a rig's name (configs/rigs) or a YAML/JSON file")
    image_size: int = option(128, "pixels, square images", least=8, most=4096)
    seed: int = option(0, "of the series of mice", least=0)
    workers: int = option(2, "processes; the result does not depend on it", least=1, most=1024)
    num_novel_views: int = option(0, "random views appended after the rig's", least=0, most=1000)
    depth: bool = option(False, "write depth images too")
    heading_deg: tuple[float, float] | None = option(
        None, "azimuth of the nose, +- SPREAD, degrees; left out: any heading", metavar=("CENTER", "SPREAD")
    )
    coat: str | None = option(None, "left out: drawn at random", choices=COATS)
    pose: str | None = option(None, "left out: drawn at random", choices=(*ALL_POSES, "rest"))
    poses: tuple[str, ...] = option((), "several poses, in equal shares", choices=ALL_POSES)
    size: tuple[float, float] | None = option(
        None, "of the body's length, world units; left out: about 1.2", metavar=("LOW", "HIGH"), least=0.1, most=3
    )
    off_center: float = option(0.0, "how far the body may lie off the image's center, widths", least=0, most=0.5)
    elevation: tuple[float, float] | None = option(
        None, "from which the input view sees the leaning animal, degrees; left out: the rig's",
        metavar=("LOW", "HIGH"), least=-89, most=89,
    )  # fmt: skip
    varied_cameras: bool = option(
        False,
        "novel views as any lab's cameras take them: elevation 0 to 60 degrees, distance 2.2 to 3.6, focal "
        "length x 0.8 to 1.25, principal point up to a tenth of the width off the middle",
    )
    photographic: float = option(
        0.0, "share 0..1 of the mice whose rig views look like cut-out photographs: other light, framing, blur, "
        "noise, imperfect masks; novel views stay clean", metavar="SHARE", least=0, most=1,
    )  # fmt: skip
    val_fraction: float = option(0.2, "share of the mice kept for validation", least=0, most=0.999)
    prefix: str = option("data_mouse", "names the split lists: <prefix>_train.txt, _val.txt")
    device: str = option("cpu", "cpu, cuda or auto; draws the images")
    body_model: Path | None = option(None, "an external skinned mesh (.npz) to draw instead")
    body_model_poses: Path | None = option(None, "its pose library (.npz)")
    as_recording: bool = option(False, "write a raw recording of --num_samples frames")
    lens_distortion: str = option(
        "none", "of the recording; real: through the rig's real lenses, skew included", choices=("none", "real")
    )
    noise: float = option(0.0, "of the recording's sensors: deviation at white, in levels of 255", least=0)
    uneven_light: bool = option(
        False, "in the recording: uneven gain, vignetting, an exposure per camera, a textured wall behind the animal"
    )
    calibration_formats: str = option(
        "", "of the recording: mammal, dannce, anipose, transforms, colmap (or colmap_text), opencv, blender; the "
        "first lies in the folder, the others in calibrations/; left out: mammal, or dannce with real lens distortion",
        metavar="A,B,...",
    )  # fmt: skip
    video_width: int = option(1152, "pixels, of the recording's videos", least=64, most=4096)
    fps: float = option(25.0, "frames per second of the recording", least=0.01)

    def __post_init__(self) -> None:
        formats, recorded, body = self.formats, self.as_recording, self.body_model
        for wrong, message in (
            (Path(self.prefix).name != self.prefix, f"--prefix must be a plain name, got {self.prefix!r}"),
            (self.video_width % 2, f"--video_width must be even, got {self.video_width}"),
            (len(set(formats)) != len(formats) or set(formats) - set(CALIBRATION_FORMATS),
             f"--calibration_formats takes different ones of {', '.join(CALIBRATION_FORMATS)}, "
             f"parted by commas, got {self.calibration_formats!r}"),
            (recorded and body, "--as_recording films the procedural mouse; leave --body_model out"),
            (recorded and (self.photographic or self.size or self.off_center or self.elevation or self.varied_cameras),
             "--photographic, --size, --off_center, --elevation and --varied_cameras are a dataset's; a recording has "
             "--lens_distortion, --noise and --uneven_light"),
            (recorded and self.pose == "rest", "--pose rest does not move: name another pose of the recording"),
            (not recorded and (self.lens_distortion != "none" or self.noise or self.uneven_light),
             "--lens_distortion, --noise and --uneven_light are a recording's: add --as_recording"),
            (bool(body) != bool(self.body_model_poses),
             "--body_model and --body_model_poses go together: the rest pose is no natural posture"),
            (body and (self.pose or self.poses), "--pose and --poses name procedural poses; leave out --body_model"),
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
        """Content of dataset.json: the fields that decide what a sample looks like."""
        names = "seed image_size num_novel_views depth heading_deg coat pose val_fraction prefix "
        names += "body_model body_model_poses"
        newer = "photographic poses size off_center elevation varied_cameras".split()
        values = {name: getattr(self, name) for name in [*names.split(), *newer]}
        # Newer flags only where they are given: datasets made before they existed can be continued.
        values = {name: value for name, value in values.items() if value or name not in newer}
        values = {name: value.name if isinstance(value, Path) else value for name, value in values.items()}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"source": "synthetic", "mice": MICE, **values}
