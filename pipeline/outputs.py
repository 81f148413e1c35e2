"""A reconstruction and what it leaves on disk; `run.json` comes last, so a folder that has one is complete."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gslrm.model import ply
from gslrm.model.gaussians import Gaussians
from gslrm.model.gaussians_renderer import RenderOutput, prune, render, render_turntable
from multiview.cameras import Cameras
from multiview.files import atomic_write, full_disk_explained, write_json
from multiview.image import composite, grid, resize_rgba, save_video, write_image
from multiview.metrics import view_consistency
from multiview.rig import ViewRig
from multiview.run import git_hash
from multiview.sample import DEPTH_UNIT
from pipeline.page import write_result_page

PARTS = ("xyz", "features", "scaling", "rotation", "opacity")  # of Gaussians
TURNTABLE_FPS = 30
SHEET_COLUMNS = 8
EXPORTED = tuple(f"gaussians{suffix}" for suffix in ply.FORMATS.values())
OPTIONAL_FILES = (*EXPORTED, "mesh.ply", "mesh.glb", "sheet.png", "turntable.mp4")


@dataclass(frozen=True)
class PosedViews:
    """What passes between the stages. rgb: [v, 3, h, w] on white. masks: [v, 1, h, w]. cameras: [v]."""

    rgb: Tensor
    masks: Tensor
    cameras: Cameras

    @staticmethod
    def of(rgba: Tensor, cameras: Cameras) -> PosedViews:
        """Returns posed RGBA views [v, 4, h, w] as Stage 2's input."""
        return PosedViews(composite(rgba, 1.0), rgba[:, 3:], cameras)

    def consistency(self) -> float:
        """Returns how well the views agree in space (`view_consistency`), 0..1."""
        return view_consistency(self.rgb, self.masks, self.cameras)["score"]


@dataclass
class Reconstruction:
    """Gaussians [1, n] and what they were made from. record: for run.json. photo: [4, s, s], None for posed views.

    to_rig: [4, 4], brings the animal of posed views to the place and size of the training data, for the turntable. up:
    the axis that points up in the written gaussians.ply (`gslrm.model.ply.UP`); here it is z.
    """

    gaussians: Gaussians
    views: PosedViews
    rig: ViewRig
    record: dict
    photo: Tensor | None = None
    to_rig: Tensor | None = None
    up: str = "z"

    def numpy(self) -> dict[str, np.ndarray]:
        """Returns xyz [n, 3], features [n, k, 3], log scaling [n, 3], rotation wxyz [n, 4], opacity logits [n, 1]."""
        return {name: getattr(self.gaussians, name)[0].detach().float().cpu().numpy() for name in PARTS}

    def prune(self, count: int) -> None:
        """Keeps the `count` Gaussians that add most to the views; run.json says how many there were."""
        before, cameras = self.gaussians.num_gaussians, self.views.cameras.to(self.gaussians.device)
        self.gaussians = prune(self.gaussians, cameras, count)
        self.record["gaussians"] |= {"before_pruning": before, "kept": self.gaussians.num_gaussians}

    @torch.no_grad()  # gradients would keep every Gaussian's projection in memory
    def render(self, cameras: Cameras, background: Tensor | float = 1.0) -> RenderOutput:
        """Renders from cameras [v]: rgb [1, v, 3, h, w], alpha and depth [1, v, 1, h, w]."""
        return render(self.gaussians, cameras.to(self.gaussians.device)[None], background=background)

    def save(
        self, folder: Path | str, *, turntable_views: int = 120, turntable_size: int = 256,
        export: Sequence[str] = (), mesh: str | None = None, maps: bool = False, sheet: bool = False,
    ) -> None:  # fmt: skip
        """Writes everything into `folder`; run.json comes last. export: names of `ply.FORMATS`. mesh: "ply" or
        "glb". maps: depth/ and alpha/ as the views' cameras see the Gaussians. sheet: sheet.png, the photograph (if
        there is one) and the views above their renderings."""
        folder, started = Path(folder), time.perf_counter()
        with full_disk_explained(folder / "gaussians.ply"):
            start_folder(folder)
            self.write_views(folder)
            self.write_model(folder, turntable_views=turntable_views, turntable_size=turntable_size)
            for name in export:
                ply.export(folder / f"gaussians{ply.FORMATS[name]}", self.gaussians, name)
            if mesh is not None:
                from gslrm.model.mesh import extract_mesh, save_mesh

                save_mesh(folder / f"mesh.{mesh}", extract_mesh(self.gaussians))
            rendered = []
            for index in range(len(self.views.rgb) if maps or sheet else 0):  # view by view: the memory of one
                seen = self.render(self.views.cameras[index : index + 1])
                rendered.append(seen.rgb[0, 0].clamp(0, 1).cpu())
                if maps:
                    write_depth(folder / "depth" / f"view_{index:02d}.png", seen.mean_depth()[0, 0].cpu())
                    write_image(folder / "alpha" / f"view_{index:02d}.png", seen.alpha[0, 0].cpu())
            if sheet:
                above, below = self.views.rgb, torch.stack(rendered)
                if self.photo is not None:
                    own = composite(resize_rgba(self.photo, above.shape[-1]), 1.0)[None]
                    above, below = torch.cat([own, above]), torch.cat([torch.ones_like(own), below])
                write_image(folder / "sheet.png", contact_sheet([above, below]))
            self.record["seconds"]["output"] = round(time.perf_counter() - started, 2)
            write_result_page(folder, self)
            self.write_run(folder)

    def write_views(self, folder: Path) -> None:
        """Writes views/view_00.png ..., multiview.png, opencv_cameras.json; input.png, the photograph as models saw it,
        whose views are the rig's and carry its names."""
        views, frames = self.views.rgb, self.views.cameras.to_frames()
        stale = set((folder / "views").glob("view_*.png"))  # an earlier run may have had more views
        if self.photo is not None:
            write_image(folder / "input.png", self.photo)
        for index, (image, frame) in enumerate(zip(views, frames)):
            frame["file_path"] = f"views/view_{index:02d}.png"
            if self.photo is not None:
                frame["view"] = self.rig.view_names[index]
            write_image(folder / frame["file_path"], image)
        for path in stale - {folder / frame["file_path"] for frame in frames}:
            path.unlink()
        write_image(folder / "multiview.png", grid(views, columns=min(len(views), 6)))
        write_json(folder / "opencv_cameras.json", {"id": folder.name, "frames": frames})

    def write_model(self, folder: Path, *, turntable_views: int, turntable_size: int) -> None:
        """Writes gaussians.ply and, with turntable_views > 0, turntable.mp4 from the views' mean elevation."""
        ply.save_ply(folder / "gaussians.ply", self.gaussians, self.up)  # before the turntable, which takes longer
        if turntable_views:
            shown, cameras = self.gaussians, self.views.cameras
            if self.to_rig is not None:
                shown = shown.moved(self.to_rig)
                cameras = cameras.recentre(-self.to_rig[:3, 3] / self.to_rig[0, 0], 1.0)
            elevation_deg = float(cameras.elevation_deg.mean())
            with tqdm(total=turntable_views, desc=f"{folder.name}: turntable", unit="frame", disable=None) as bar:
                frames = render_turntable(
                    shown, turntable_views, turntable_size, elevation_deg=elevation_deg,
                    on_frame=lambda done, _: bar.update(1),
                )  # fmt: skip
            save_video(folder / "turntable.mp4", frames.cpu(), TURNTABLE_FPS)

    def write_run(self, folder: Path) -> None:
        """Writes run.json: the rig, the artifacts, the settings, what was measured."""
        place = {} if self.to_rig is None else {"to_rig": self.to_rig.tolist()}
        told = {"rig": self.rig.to_dict(), "up": self.up, **place, **self.record, "git": git_hash()}
        write_json(folder / "run.json", told)


def start_folder(folder: Path) -> None:
    """Creates an output folder, or removes what an earlier run left there and this one may not write; no other file."""
    folder.mkdir(parents=True, exist_ok=True)
    # run.json first: a run that is killed from here on leaves a folder that says so.
    maps = [path for kind in ("depth", "alpha") for path in (folder / kind).glob("view_*.png")]
    for path in [folder / "run.json", folder / "result.html", *(folder / name for name in OPTIONAL_FILES), *maps]:
        path.unlink(missing_ok=True)


def contact_sheet(rows: Sequence[Tensor], columns: int = SHEET_COLUMNS) -> Tensor:
    """Returns images [n, 3, h, w] of the same n things, one row per kind; more than `columns` continue below."""
    columns = min(columns, len(rows[0]))
    lines = [grid(row[start : start + columns], columns) for start in range(0, len(rows[0]), columns) for row in rows]
    return torch.cat(lines, dim=1)


def depth_images(depth: Tensor) -> Tensor:
    """Returns depth [n, 1, h, w] to look at, [n, 3, h, w]: near black, far light gray, no surface (0) white."""
    near, far = torch.where(depth > 0, depth, torch.inf).min(), depth.max()
    # The farthest surface stays gray, so that it can be told from the white of no surface.
    gray = 0.8 * (depth - near) / (far - near).clamp_min(1e-6)
    return torch.where(depth > 0, gray, 1.0).expand(-1, 3, -1, -1)


def write_depth(path: Path, depth: Tensor) -> None:
    """Writes [1, h, w] camera-frame z as a sample's depth: 16-bit PNG in steps of DEPTH_UNIT, 0 = no surface. Raises
    ValueError for depths that 16 bits cannot hold."""
    steps = (depth[0].double() / DEPTH_UNIT).round()  # float32 would be off by a step at 6 world units
    if steps.max() > 65535:
        raise ValueError(f"{path}: depth must be at most {65535 * DEPTH_UNIT:.2f} world units, got {depth.max():.2f}")
    with atomic_write(path) as temporary:
        Image.fromarray(steps.numpy().astype(np.uint16)).save(temporary, format="PNG")
