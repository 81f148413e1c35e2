"""What a reconstruction leaves on disk; `run.json` comes last, so a folder that has one is complete."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from multiview.checkpoint import write_json
from multiview.image import grid, save_video, write_image
from multiview.run import git_hash

if TYPE_CHECKING:
    from chain.stages import PosedViews
    from gslrm.model.gaussians import Gaussians
    from multiview.rig import ViewRig

TURNTABLE_FPS = 30


def start_folder(folder: Path) -> None:
    """Creates an output folder; a result of an earlier run there no longer counts as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)


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


def write_run(folder: Path, rig: ViewRig, content: dict) -> None:
    """run.json: the rig, the artifacts, the settings, what was measured."""
    write_json(folder / "run.json", {"rig": rig.to_dict(), **content, "git": git_hash()})
