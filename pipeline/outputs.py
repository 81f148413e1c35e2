"""What a reconstruction leaves on disk; `run.json` comes last, so a folder that has one is complete."""

from __future__ import annotations

from collections.abc import Sequence
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
    from pipeline import Reconstruction
    from pipeline.stages import PosedViews

TURNTABLE_FPS = 30
SHEET_COLUMNS = 8
OPTIONAL_FILES = ("gaussians.splat", "gaussians.compressed.ply", "mesh.ply", "mesh.glb", "sheet.png", "turntable.mp4")


def start_folder(folder: Path) -> None:
    """Creates an output folder; a result of an earlier run there no longer counts as complete.

    What only some runs write is removed, so that nothing of an earlier run stands beside this one's result. Files that
    are not ours stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # run.json first: a run that is killed from here on leaves a folder that says so.
    maps = [path for kind in ("depth", "alpha") for path in (folder / kind).glob("view_*.png")]
    for path in [folder / "run.json", *(folder / name for name in OPTIONAL_FILES), *maps]:
        path.unlink(missing_ok=True)


def write_stage1(folder: Path, result: Reconstruction) -> None:
    """Writes views/view_00.png ..., multiview.png, opencv_cameras.json; input.png, the photograph as the models saw it.

    Views of a photograph are the rig's and carry its names.
    """
    views, stale = result.views, set((folder / "views").glob("view_*.png"))  # an earlier run may have had more views
    if result.photo is not None:
        write_image(folder / "input.png", result.photo)
    frames = views.cameras.to_frames()
    for index, (image, frame) in enumerate(zip(views.rgb, frames)):
        frame["file_path"] = f"views/view_{index:02d}.png"
        if result.photo is not None:
            frame["view"] = result.rig.view_names[index]
        write_image(folder / frame["file_path"], image)
        stale.discard(folder / frame["file_path"])
    for path in stale:
        path.unlink()
    write_image(folder / "multiview.png", grid(views.rgb, columns=min(len(views.rgb), 6)))
    write_json(folder / "opencv_cameras.json", {"id": folder.name, "frames": frames})


def write_stage2(folder: Path, result: Reconstruction, *, turntable_views: int, turntable_size: int) -> None:
    """Writes gaussians.ply and, with turntable_views > 0, turntable.mp4 from the views' mean elevation."""
    from tqdm import tqdm

    from gslrm.model.gaussians_renderer import render_turntable
    from gslrm.model.ply import save_ply

    save_ply(folder / "gaussians.ply", result.gaussians)  # before the turntable, which takes longer
    if turntable_views:
        elevation_deg = float(result.views.cameras.elevation_deg.mean())
        with tqdm(total=turntable_views, desc=f"{folder.name}: turntable", unit="frame", disable=None) as bar:
            frames = render_turntable(
                result.gaussians, turntable_views, turntable_size, elevation_deg=elevation_deg,
                on_frame=lambda done, _: bar.update(1),
            )  # fmt: skip
        save_video(folder / "turntable.mp4", frames.cpu(), TURNTABLE_FPS)


def write_exports(folder: Path, gaussians: Gaussians, exports: Sequence[str], mesh: str | None) -> None:
    """Writes gaussians<suffix> in formats of gslrm.model.ply, and mesh.ply or mesh.glb."""
    if exports:  # gsplat writes them, and is imported only then
        from gslrm.model.ply import FORMATS, export

        for name in exports:
            export(folder / f"gaussians{FORMATS[name]}", gaussians, name)
    if mesh is not None:
        from gslrm.model.mesh import extract_mesh, save_mesh

        save_mesh(folder / f"mesh.{mesh}", extract_mesh(gaussians))


@torch.no_grad()
def write_renderings(
    folder: Path, gaussians: Gaussians, views: PosedViews, *, maps: bool, sheet: bool, photo: Tensor | None = None
) -> None:
    """Writes what the views' cameras see of the Gaussians.

    maps: depth/view_00.png and alpha/view_00.png ... sheet: sheet.png, the photo [4, s, s] (if there is one) and the
    views above the renderings.
    """
    from gslrm.model.gaussians_renderer import render

    cameras, rendered = views.cameras.to(gaussians.device), []
    for index in range(len(views.rgb)):  # view by view: the memory of one
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


def write_run(folder: Path, rig: ViewRig, content: dict) -> None:
    """Writes run.json: the rig, the artifacts, the settings, what was measured."""
    write_json(folder / "run.json", {"rig": rig.to_dict(), **content, "git": git_hash()})


def contact_sheet(rows: Sequence[Tensor], columns: int = SHEET_COLUMNS) -> Tensor:
    """Returns images [n, 3, h, w] of the same n things, one row per kind; more than `columns` continue below."""
    columns = min(columns, len(rows[0]))
    lines = []
    for start in range(0, len(rows[0]), columns):
        for row in rows:
            line = row[start : start + columns]
            lines.append(torch.cat([line, line.new_ones(columns - len(line), *line.shape[1:])]))
    return grid(torch.cat(lines), columns)


def depth_images(depth: Tensor) -> Tensor:
    """Returns depth [n, 1, h, w] to look at, [n, 3, h, w]: near black, far light gray, no surface (0) white."""
    seen = depth > 0
    if not seen.any():
        return torch.ones_like(depth).expand(-1, 3, -1, -1)
    near, far = depth[seen].min(), depth[seen].max()
    # The farthest surface stays gray, so that it can be told from the white of no surface.
    gray = 0.8 * (depth - near) / (far - near).clamp_min(1e-6)
    return torch.where(seen, gray, 1.0).expand(-1, 3, -1, -1)


def write_depth(path: Path, depth: Tensor) -> None:
    """Writes [1, h, w] camera-frame z as a sample's depth: 16-bit PNG in steps of DEPTH_UNIT, 0 = no surface.

    Raises ValueError for depths that 16 bits cannot hold.
    """
    steps = (depth[0].double() / DEPTH_UNIT).round()  # float32 would be off by a step at 6 world units
    if steps.max() > 65535:
        raise ValueError(f"{path}: depth must be at most {65535 * DEPTH_UNIT:.2f} world units, got {depth.max():.2f}")
    with atomic_write(path) as temporary:
        Image.fromarray(steps.numpy().astype(np.uint16)).save(temporary, format="PNG")


def write_alpha(path: Path, alpha: Tensor) -> None:
    """Writes [1, h, w] in 0..1 as an 8-bit gray PNG."""
    with atomic_write(path) as temporary:
        Image.fromarray((alpha[0].clamp(0, 1) * 255).round().byte().numpy()).save(temporary, format="PNG")
