"""The view rig: the one description of the set of views, carried by every artifact and compared wherever two meet."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from multiview.cameras import Cameras
from multiview.config import read_yaml
from multiview.files import read_json, take

RIGS_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "rigs"
DEFAULT_RIG = "mouse6"

FACELIFT_DISTANCE = 2.7
FACELIFT_FOCAL = 548.9937744140625 / 512  # over the image's width
FILL_FACTOR = 2.0  # `framing: fill`: how much farther and longer than FaceLift's camera

# Two rigs are one when every view agrees within these.
ANGLE_TOLERANCE_DEG = 0.05
LENGTH_TOLERANCE = 1e-3  # relative, distance and focal length

PROMPT_STYLES = {  # the texts that released and own embeddings were made from: a changed word is another embedding
    "facelift": "a rendering image of 3D models, {view} view, color map.",
    "facelift_normal": "a rendering image of 3D models, {view} view, normal map.",
    "mouse": "a rendering image of a 3D model, {view} view, from above at an angle, color map.",
    "mouse_normal": "a rendering image of a 3D model, {view} view, from above at an angle, normal map.",
    "laboratory": "a laboratory mouse, white background, high quality",
}
CHOICES = {  # what a rig file may say; anything else would be read as something that it is not
    "azimuth_zero": ("heading", "reference"),
    "framing": ("exact", "fill", "facelift"),
    "up_axis": ("z",),  # the key exists so that files can say so, and foreign ones be refused
    "prompt_style": tuple(PROMPT_STYLES),
}
ANGLES_SUFFIX = ", elevation {elevation:g} degrees, azimuth {azimuth:g} degrees"

MENDING = {  # by role, the command that makes the artifact anew for the rig
    "embeddings": "python scripts/generate_mouse_prompt_embeds.py --rig {rig} --model_name <the folder whose text "
    "encoder the UNet was trained with>",
    "unet": "python train_diffusion.py --config configs/mouse_mvdiffusion.yaml rig={rig}",
    "gslrm": "python train_gslrm.py --config configs/mouse_config_finetune.yaml rig={rig}",
    "cameras": "leave --camera_json out to use the rig's own cameras, or pass a camera file of rig {rig}",
    "dataset": "train with rig=<dataset>/dataset.json, or import it with --poses nearest --rig {rig} (the views then "
    "carry the rig's own directions; the report says what that costs)",
}


class RigMismatchError(ValueError):
    """Two artifacts describe different view sets."""


@dataclass(frozen=True)
class View:
    """One view. Azimuth 0 is the camera at -y, 90 at -x (clockwise seen from above); distance None = the rig's."""

    name: str
    azimuth_deg: float
    elevation_deg: float
    distance: float | None = None


@dataclass(frozen=True)
class ViewRig:
    """An ordered set of views around the origin, world z up. distance: world units. focal: focal length over image
    width. azimuth_zero: `heading` (the animal's own front) or `reference` (the side of the input view). framing: how
    the animal's size was chosen (docs/data_format.md). reference_view: index of the input view."""

    name: str
    views: tuple[View, ...]
    distance: float = FACELIFT_DISTANCE
    focal: float = FACELIFT_FOCAL
    azimuth_zero: str = "reference"
    framing: str = "exact"
    up_axis: str = "z"
    reference_view: int = 0  # FaceLift's input is its first view
    prompt_style: str = "mouse"

    def __post_init__(self) -> None:
        last, allowed = len(self.views) - 1, ""
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                allowed = f"{key} must be one of {', '.join(choices)}, got {getattr(self, key)!r}"
        for wrong, told in (
            (not self.views, "at least one view is needed"),
            # Prompts and files are made from the names.
            (len(set(self.view_names)) <= last, f"view names must differ, got {self.view_names}"),
            (not 0 <= self.reference_view <= last, f"reference_view must be 0..{last}, got {self.reference_view}"),
            (allowed, allowed),
            (min(self.distance, self.focal, *map(self.view_distance, self.views)) <= 0,
             "distance and focal must be positive"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(f"rig {self.name}: {told}")

    @property
    def num_views(self) -> int:
        return len(self.views)

    @property
    def view_names(self) -> list[str]:
        return [view.name for view in self.views]

    def view_distance(self, view: View) -> float:
        return self.distance if view.distance is None else view.distance

    def cameras(self, size: int) -> Cameras:
        """Returns the rig's cameras for square images of `size` pixels, shape [num_views]."""
        # float64, since differences of a rig from its own cameras are measured in hundredths of a degree.
        rows = [(view.azimuth_deg, view.elevation_deg, self.view_distance(view)) for view in self.views]
        azimuth, elevation, distance = torch.tensor(rows, dtype=torch.float64).unbind(-1)
        return Cameras.orbit(azimuth, elevation, distance, self.focal, size)

    def prompts(self, style: str | None = None, *, angles: bool = False) -> list[str]:
        """Returns one text prompt per view. `angles` appends the numbers (elevation, azimuth)."""
        style = style or self.prompt_style
        if style not in PROMPT_STYLES:
            raise ValueError(f"prompt style must be one of {', '.join(PROMPT_STYLES)}, got {style!r}")
        template = PROMPT_STYLES[style] + (ANGLES_SUFFIX if angles else "")
        return [template.format(view=v.name, elevation=v.elevation_deg, azimuth=v.azimuth_deg) for v in self.views]

    def fingerprint(self) -> str:
        """Returns a short hash of geometry and order, equal for rigs that agree up to rounding."""
        places = [(v.azimuth_deg, v.elevation_deg, self.view_distance(v)) for v in self.views]
        # Rounded, so that a rig and the same rig read from a file have one fingerprint.
        rounded = [[round(azimuth, 2), round(elevation, 2), round(far, 3)] for azimuth, elevation, far in places]
        content = [self.azimuth_zero, self.reference_view, round(self.focal, 5), *rounded]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def differences(self, other: ViewRig) -> list[str]:
        """Returns the differences that keep two rigs apart (empty: none). Geometry counts, names and prompts do not."""
        if self.num_views != other.num_views:  # then no view has a counterpart to be compared with
            return [f"number of views: {self.num_views} against {other.num_views}"]
        told = []
        for index, (a, b) in enumerate(zip(self.views, other.views)):
            if abs((a.azimuth_deg - b.azimuth_deg + 180.0) % 360.0 - 180.0) > ANGLE_TOLERANCE_DEG:
                told.append(f"azimuth of view {index}: {a.azimuth_deg:g} against {b.azimuth_deg:g} degrees")
            if abs(a.elevation_deg - b.elevation_deg) > ANGLE_TOLERANCE_DEG:
                told.append(f"elevation of view {index}: {a.elevation_deg:g} against {b.elevation_deg:g} degrees")
            near, far = self.view_distance(a), other.view_distance(b)
            if abs(near - far) > LENGTH_TOLERANCE * near:
                told.append(f"distance of view {index}: {near:g} against {far:g}")
        if abs(self.focal - other.focal) > LENGTH_TOLERANCE * self.focal:
            told.append(f"focal length over width: {self.focal:g} against {other.focal:g}")
        for key in ("azimuth_zero", "reference_view"):
            if getattr(self, key) != getattr(other, key):
                told.append(f"{key.replace('_v', ' v')}: {getattr(self, key)} against {getattr(other, key)}")
        return told

    def with_framing(self, framing: str) -> ViewRig:
        """Returns the rig in another framing: `fill` doubles distance and focal length, the others keep 2.7 and 549."""
        # Farther and longer by one factor: the animal keeps its size in the image and loses perspective.
        factor = (FILL_FACTOR if framing == "fill" else 1.0) / (FILL_FACTOR if self.framing == "fill" else 1.0)
        return replace(self, framing=framing, distance=self.distance * factor, focal=self.focal * factor)

    def to_dict(self) -> dict:
        content = asdict(self)
        content["views"] = [{k: v for k, v in asdict(view).items() if v is not None} for view in self.views]
        return content

    @staticmethod
    def from_dict(content: dict, source: str) -> ViewRig:
        """Reads the content of a rig file (`to_dict`); unknown, missing and wrong values are errors naming `source`."""
        where = f"{source}: a view rig"
        # Views first: the rig's own check of its views then speaks of View objects.
        rows = enumerate(take(content, "views", list, where))
        views = tuple(_from_row(View, row, f"{source}: view {index}") for index, row in rows)
        for view in views:
            if not abs(view.azimuth_deg) <= 720 or not abs(view.elevation_deg) <= 90:
                raise ValueError(f"{source}: view {view.name} needs angles in degrees, elevation -90..90, got {view}")
        try:
            return _from_row(ViewRig, {**content, "views": views}, where)
        except ValueError as error:  # the rig's own checks name the rig alone
            raise ValueError(str(error) if source in str(error) else f"{source}: {error}") from None

    def novel_cameras(self, count: int, size: int, rng: np.random.Generator, *, varied: bool = False) -> Cameras:
        """Returns random cameras [count] around the rig: elevation -5 to 60 degrees, distance within 11 %. varied: as
        laboratories have them; elevation 0 to 60, distance 2.2 to 3.6 where the rig's is 2.7, focal length x 0.8 to
        1.25, principal point up to a tenth of the width off the middle (the animal with it)."""
        lowest, nearest, farthest = (0.0, 2.2, 3.6) if varied else (-5.0, 2.4, 3.0)
        azimuth, elevation = rng.uniform(0, 360, count), rng.uniform(lowest, 60.0, count)
        distance = self.distance * rng.uniform(nearest / 2.7, farthest / 2.7, count)
        cameras = Cameras.orbit(*map(torch.from_numpy, (azimuth, elevation, distance)), self.focal, size)
        if not varied:
            return cameras
        zoom = np.exp2(rng.uniform(np.log2(0.8), np.log2(1.25), (count, 1))).repeat(2, axis=1)
        change = torch.from_numpy(np.concatenate([zoom, 1 + rng.uniform(-0.2, 0.2, (count, 2))], axis=1))
        return replace(cameras, fxfycxcy=(cameras.fxfycxcy * change).to(cameras.fxfycxcy))

    @staticmethod
    def from_cameras(cameras: Cameras, name: str, view_names: list[str] | None = None) -> ViewRig:
        """Returns the rig of measured cameras [v] that look at the origin, in the given order."""
        azimuths, distances = cameras.azimuth_deg.tolist(), cameras.distance.tolist()
        names = view_names or [f"azimuth_{azimuth:.1f}" for azimuth in azimuths]
        views = tuple(View(*row) for row in zip(names, azimuths, cameras.elevation_deg.tolist(), distances))
        focal = float(cameras.fxfycxcy[..., 0].mean()) / cameras.width
        return ViewRig(name=name, views=views, distance=sum(distances) / len(distances), focal=focal)


def _from_row(schema: type, row: dict, where: str):
    """Returns a View or ViewRig from keys and values; each must be known and of the type its field is written with."""
    fields = schema.__dataclass_fields__
    kinds = {"str": str, "int": int, "tuple[View, ...]": tuple}  # annotations are texts here; the rest are numbers
    defaults = {key: ... if f.default is MISSING else f.default for key, f in fields.items()}
    values = {key: take(row, key, kinds.get(f.type, float), where, default=defaults[key]) for key, f in fields.items()}
    if unknown := sorted(map(str, set(row) - set(fields))):
        raise ValueError(f"{where} has unknown keys {unknown}; known: {sorted(fields)}")
    return schema(**values)


def available_rigs() -> list[str]:
    return sorted(path.stem for path in RIGS_FOLDER.glob("*.yaml"))


def load_rig(name_or_path: str | Path) -> ViewRig:
    """Reads a rig by name (`configs/rigs/<name>.yaml`), or from a YAML/JSON file (bare, or under the key `rig`)."""
    path = Path(name_or_path)  # names have no suffix
    if path.suffix not in (".yaml", ".yml", ".json"):
        path = RIGS_FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ValueError(f"rig {str(name_or_path)!r} is neither a file nor one of {', '.join(available_rigs())}")
    content = read_json(path) if path.suffix == ".json" else read_yaml(path)
    return ViewRig.from_dict(take(content, "rig", dict, str(path), default=content), str(path))


def check_alignment(expected: ViewRig | None = None, allow: str = "", /, **artifacts: ViewRig) -> ViewRig:
    """Refuses artifacts of different rigs: RigMismatchError with both side by side and the command that mends it.
    artifacts: by role, the rig each one carries. expected: the rig the user named. allow: the config key that lets
    training start from weights of another rig. Returns the common rig."""
    # What the user named counts first; without it the first artifact does, and the message names both roles.
    base_role = "requested" if expected is not None else next(iter(artifacts))
    base = expected if expected is not None else artifacts[base_role]
    role, rig = next(((role, rig) for role, rig in artifacts.items() if base.differences(rig)), (base_role, base))
    if not (differences := base.differences(rig)):
        return base
    columns = []
    for name, one in ((base_role, base), (role, rig)):
        lines = [f"{name}: rig {one.name}", f"{one.num_views} views, azimuth 0 = {one.azimuth_zero}"]
        lines.append(f"focal / width {one.focal:.5g}, fingerprint {one.fingerprint()}")
        for index, view in enumerate(one.views):
            place = f"az {view.azimuth_deg:6.1f}  el {view.elevation_deg:5.1f}  d {one.view_distance(view):.3g}"
            lines.append(f"{index} {view.name:<16} {place}")
        columns.append(lines)
    width = max(map(len, columns[0])) + 4  # of the left column
    table = "\n".join(f"  {x:<{width}}{y}".rstrip() for x, y in zip_longest(*columns, fillvalue=""))
    shown = differences[:4] + ([f"and {len(differences) - 4} more"] if len(differences) > 4 else [])
    # What to type for a rig: its name if it ships with the project, else the file of the dataset that measured it.
    ships = (RIGS_FOLDER / f"{base.name}.yaml").is_file() and not load_rig(base.name).differences(base)
    typed = base.name if ships else "<dataset>/dataset.json"
    mend = MENDING[role if role in MENDING else base_role].format(rig=typed)
    raise RigMismatchError(
        f"{base_role} and {role} describe different views, so the 3D result would be garbage:\n{table}\n"
        f"  differs: {'; '.join(shown)}\n  to mend: {mend}"
        + (f"\n  or, to fine-tune these weights to the other rig: {allow}=true" if allow else "")
    )


def check_rig_cameras(rig: ViewRig, cameras: Cameras, source: str) -> None:
    """Refuses cameras [v] that are not the rig's own: other views, or the right places with other axes."""
    measured = replace(
        ViewRig.from_cameras(cameras, f"measured in {source}"),
        azimuth_zero=rig.azimuth_zero,  # a camera file cannot say these two
        reference_view=min(rig.reference_view, len(cameras) - 1),
    )
    check_alignment(rig, cameras=measured)
    _check_axes(rig.cameras(cameras.width), cameras, source, tolerance_deg=0.5)


def check_posed_views(rig: ViewRig, cameras: Cameras, source: str) -> None:
    """For Stage 2 on calibrated cameras [v] of any directions: convention, distance and lens must be the rig's."""
    center, size = cameras.origins.new_zeros(3), (cameras.height, cameras.width)
    upright = Cameras.look_at(cameras.origins, center, cameras.fxfycxcy[0], *size)
    _check_axes(upright, cameras, source, tolerance_deg=15.0)  # a hand-held or tilted camera is no other convention
    lens = cameras.fxfycxcy / cameras.width
    for name, got, expected, tolerance in (
        ("distance from the origin", cameras.distance, rig.distance, 0.15),
        ("focal length over width", lens[:, 0], rig.focal, 0.10), ("cx over width", lens[:, 2], 0.5, 0.05),
        ("cy over height", cameras.fxfycxcy[:, 3] / cameras.height, 0.5, 0.05),
    ):  # fmt: skip
        if ((got - expected).abs() > tolerance * expected).any():
            raise ValueError(
                f"{source}: {name} must be {expected:.4g} within {tolerance:.0%} as this GS-LRM was trained (rig "
                f"{rig.name}), got {[round(x, 4) for x in got.tolist()]}; normalise the sample with "
                "scripts/process_mouse_data.py"
            )


def fits_rig(rig: ViewRig, cameras: Cameras) -> bool:
    """Says whether `check_posed_views` would let calibrated cameras [v] pass."""
    try:
        check_posed_views(rig, cameras, "")
    except ValueError:
        return False
    return True


def _check_axes(expected: Cameras, cameras: Cameras, source: str, tolerance_deg: float) -> None:
    # Axes that differ by a sign are another convention; everything between is a camera that looks elsewhere.
    cosine = (expected.c2w[..., :3, :3] * cameras.c2w[..., :3, :3]).sum(dim=-2)  # per axis x, y, z
    if (cosine >= math.cos(math.radians(tolerance_deg)) - 1e-6).all():
        return
    hint = "cameras must look at the origin, world z up, OpenCV axes (x right, y down, z forward)"
    if (cosine[..., 0] > 0.5).all() and (cosine[..., 1:] < -0.5).all():
        hint = "they look like OpenGL axes (y up, z backward): negate columns 1 and 2 of c2w"
    raise ValueError(f"{source}: the cameras stand in the right places but look elsewhere; {hint}")
