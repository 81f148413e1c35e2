"""What a reconstruction leaves on disk; `run.json` comes last, so a folder that has one is complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multiview.files import atomic_write, write_json
from multiview.image import composite, grid, resize_rgba, save_video, write_image
from multiview.run import git_hash
from multiview.sample import DEPTH_UNIT

if TYPE_CHECKING:
    from gslrm.model.gaussians import Gaussians
    from multiview.rig import ViewRig
    from pipeline.stages import PosedViews

TURNTABLE_FPS = 30
SHEET_COLUMNS = 8
OPTIONAL_FILES = ("gaussians.splat", "gaussians.compressed.ply", "mesh.ply", "mesh.glb", "sheet.png")


def start_folder(folder: Path) -> None:
    """Creates an output folder; a result of an earlier run there no longer counts as complete.

    What only some runs write is removed, so that nothing of an earlier run stands beside this one's result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    maps = [path for kind in ("depth", "alpha") for path in (folder / kind).glob("view_*.png")]
    for path in [folder / "run.json", *(folder / name for name in OPTIONAL_FILES), *maps]:
        path.unlink(missing_ok=True)


def write_views(folder: Path, views: PosedViews, rig: ViewRig | None) -> None:
    """views/view_00.png ..., multiview.png (contact sheet), opencv_cameras.json."""
    stale = set((folder / "views").glob("view_*.png"))
    frames = views.cameras.to_frames()
    for index, (picture, frame) in enumerate(zip(views.rgb, frames)):
        frame["file_path"] = f"views/view_{index:02d}.png"
        if rig is not None:
            frame["view"] = rig.views[index].name
        write_image(folder / frame["file_path"], picture)
        stale.discard(folder / frame["file_path"])
    for path in stale:  # an earlier run with more views
        path.unlink()
    write_image(folder / "multiview.png", grid(views.rgb, columns=min(len(views.rgb), 6)))
    write_json(folder / "opencv_cameras.json", {"id": folder.name, "frames": frames})


def write_gaussians(
    folder: Path,
    gaussians: Gaussians,
    *,
    turntable_views: int,
    turntable_size: int,
    elevation_deg: float,
    on_frame: Callable[[int, int], None] | None = None,
) -> None:
    """gaussians.ply and, with turntable_views > 0, turntable.mp4."""
    from gslrm.model.gaussians_renderer import render_turntable
    from gslrm.model.ply import save_ply

    save_ply(folder / "gaussians.ply", gaussians)
    if turntable_views:
        frames: Tensor = render_turntable(
            gaussians, turntable_views, turntable_size, elevation_deg=elevation_deg, on_frame=on_frame
        )
        save_video(folder / "turntable.mp4", frames.cpu(), TURNTABLE_FPS)


def write_extras(
    folder: Path, gaussians: Gaussians, views: PosedViews, *, exports: Sequence[str], mesh: str | None,
    maps: bool, sheet: bool, photo: Tensor | None = None,
) -> None:  # fmt: skip
    """What is written on request.

    exports: formats of gslrm.model.ply, as gaussians<suffix>. mesh: "ply" or "glb". maps: depth/view_00.png and
    alpha/view_00.png ... from the views' cameras. sheet: sheet.png, the photo [4, s, s] (if there is one) and the views
    above the renderings from the same cameras.
    """
    if exports:
        from gslrm.model.ply import FORMATS, export

        for name in exports:
            export(folder / f"gaussians{FORMATS[name]}", gaussians, name)
    if mesh is not None:
        from gslrm.model.mesh import extract_mesh, save_mesh

        save_mesh(folder / f"mesh.{mesh}", extract_mesh(gaussians))
    if maps or sheet:
        _write_renderings(folder, gaussians, views, maps=maps, sheet=sheet, photo=photo)


@torch.no_grad()
def _write_renderings(folder, gaussians, views: PosedViews, *, maps: bool, sheet: bool, photo: Tensor | None) -> None:
    from gslrm.model.gaussians_renderer import render

    cameras, rendered = views.cameras.to(gaussians.device), []
    for index in range(len(views.rgb)):
        output = render(gaussians, cameras[None, index : index + 1])
        rendered.append(output.rgb[0, 0].clamp(0, 1).cpu())
        if maps:
            write_depth(folder / "depth" / f"view_{index:02d}.png", output.mean_depth()[0, 0].cpu())
            write_alpha(folder / "alpha" / f"view_{index:02d}.png", output.alpha[0, 0].cpu())
    if sheet:
        above, below = views.rgb, torch.stack(rendered)
        if photo is not None:
            own = composite(resize_rgba(photo, above.shape[-1]), 1.0)[None]
            above, below = torch.cat([own, above]), torch.cat([torch.ones_like(own), below])
        write_image(folder / "sheet.png", contact_sheet([above, below]))


def contact_sheet(rows: Sequence[Tensor], columns: int = SHEET_COLUMNS) -> Tensor:
    """Pictures [n, 3, h, w] of the same n things, one row per kind; more than `columns` go on below. [3, ..., ...]."""
    columns = min(columns, len(rows[0]))
    lines = []
    for start in range(0, len(rows[0]), columns):
        for row in rows:
            line = row[start : start + columns]
            lines.append(torch.cat([line, line.new_ones(columns - len(line), *line.shape[1:])]))
    return grid(torch.cat(lines), columns)


def depth_pictures(depth: Tensor) -> Tensor:
    """Depth [n, 1, h, w] (0: no surface) to look at, [n, 3, h, w]: near black, far light grey, no surface white."""
    seen = depth > 0
    if not seen.any():
        return torch.ones_like(depth).expand(-1, 3, -1, -1)
    near, far = depth[seen].min(), depth[seen].max()
    grey = 0.8 * (depth - near) / (far - near).clamp_min(1e-6)
    return torch.where(seen, grey, 1.0).expand(-1, 3, -1, -1)


def write_depth(path: Path, depth: Tensor) -> None:
    """[1, h, w] camera-frame z as a sample's depth: 16-bit PNG in steps of DEPTH_UNIT world units, 0 = no surface.

    Raises ValueError for depths that 16 bits cannot hold.
    """
    steps = (depth[0].double() / DEPTH_UNIT).round()
    if steps.max() > 65535:
        raise ValueError(f"{path}: depth must be at most {65535 * DEPTH_UNIT:.2f} world units, got {depth.max():.2f}")
    _write_png(path, Image.fromarray(steps.numpy().astype(np.uint16)))


def write_alpha(path: Path, alpha: Tensor) -> None:
    """[1, h, w] in 0..1 as an 8-bit grey PNG."""
    _write_png(path, Image.fromarray((alpha[0].clamp(0, 1) * 255).round().byte().numpy()))


def _write_png(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def write_run(folder: Path, rig: ViewRig, content: dict) -> None:
    """run.json: the rig, the artifacts, the settings, what was measured."""
    write_json(folder / "run.json", {"rig": rig.to_dict(), **content, "git": git_hash()})
