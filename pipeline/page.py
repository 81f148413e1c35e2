"""Pages that open by a double click, without a network: result.html of a result, index.html of a folder of them."""

from __future__ import annotations

import base64
import functools
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from gslrm.model.gaussians import C0, Gaussians
from gslrm.model.gaussians_renderer import render
from gslrm.model.ply import load_ply
from multiview.cameras import Cameras
from multiview.files import atomic_write, read_json
from multiview.image import composite, write_image
from multiview.report import COLORS, Figure, cell

RECORDS = ("run.json", "frame.json")  # an item that has one is complete
EVERY_S = 20.0  # a run that goes on writes its index no more often: all items are read for it


def write_result_page(folder: Path, result) -> None:
    """Writes result.html of a `Reconstruction` whose other files are in `folder`; what the page shows is inside it."""
    cameras, views, film = result.views.cameras, result.views.rgb, folder / "turntable.mp4"
    if result.to_rig is not None:
        cameras = cameras.recentre(-result.to_rig[:3, 3] / result.to_rig[0, 0], 1.0)
    if views.shape[-1] > 256:  # enough for an embedded view
        views = torch.nn.functional.interpolate(views, scale_factor=256 / views.shape[-1], mode="area")
    angles = torch.stack([cameras.azimuth_deg, cameras.elevation_deg], dim=-1).tolist()
    names = {path.name for path in folder.iterdir() if path.is_file() and path.name[0] != "."} - {"result.html"}
    _fill(
        folder / "result.html", splats_script(framed(result.gaussians, result.to_rig)), record=result.record,
        verdict=result.record.get("verdict"), start=angles[0], files=sorted(names | {"run.json"}),
        photo=None if result.photo is None else Figure("input", composite(result.photo, 1.0)),
        views=[(*at, Figure(f"view {number}", view)) for number, (at, view) in enumerate(zip(angles, views))],
        film=base64.b64encode(film.read_bytes()).decode() if film.is_file() else None,
        directional=result.gaussians.sh_degree > 0,
    )  # fmt: skip


def write_index(
    output_dir: Path, failed: Iterable[str], *, names: Sequence[str] | None = None, finished: bool = True
) -> None:
    """Writes index.html: the complete items of output_dir (`names` and their order; None: all, by name), and `failed`,
    a sentence each. Items get a splats.js, which the page's slider loads. finished: False for a run that goes on, which
    leaves a page younger than EVERY_S as it is."""
    page, rows, failed = output_dir / "index.html", [], list(failed)
    if not finished and page.is_file() and time.time() - page.stat().st_mtime < EVERY_S:
        return
    for folder in sorted(output_dir.iterdir()) if names is None else [output_dir / name for name in names]:
        record = next((folder / name for name in RECORDS if (folder / name).is_file()), None)
        if record is not None and (folder / "gaussians.ply").is_file():
            try:
                rows.append(_row(folder, read_json(record)))
            except ValueError as error:  # one damaged item does not take the others off the page
                failed.append(str(error))
    _fill(page, "", rows=rows, failed=failed, start=(0, 20), has_film=(output_dir / "film.mp4").is_file())


def _row(folder: Path, told: dict) -> dict:
    """Returns an item of the index; writes its splats.js, and a thumbnail if it has no picture, unless they are new."""
    model, script, thumbnail = folder / "gaussians.ply", folder / "splats.js", folder / "thumbnail.png"
    pictures = [path for path in (folder / "input.png", folder / "views" / "view_00.png") if path.is_file()]
    if not script.is_file() or script.stat().st_mtime < model.stat().st_mtime:
        shown = framed(load_ply(model), told.get("to_rig"))
        if not pictures:
            camera = Cameras.turntable(1, 128, elevation_deg=20.0)
            write_image(thumbnail, render(shown, camera[None]).rgb[0, 0].clamp(0, 1))
        with atomic_write(script) as temporary:
            temporary.write_text(splats_script(shown))
    count, seconds = told.get("gaussians"), told.get("seconds", 0.0)
    return {
        "name": folder.name, "verdict": told.get("verdict"), "has_page": (folder / "result.html").is_file(),
        "picture": (pictures or [thumbnail])[0].relative_to(folder.parent),
        "gaussians": count["kept"] if isinstance(count, dict) else count,
        "seconds": sum(seconds.values()) if isinstance(seconds, dict) else seconds,
    }  # fmt: skip


def framed(gaussians: Gaussians, to_rig: Tensor | Sequence | None) -> Gaussians:
    """Returns Gaussians at the rig's place and size, for which the viewer's camera is made."""
    return gaussians if to_rig is None else gaussians.moved(torch.as_tensor(to_rig))


def splats_script(gaussians: Gaussians) -> str:
    """Returns the JavaScript that shows Gaussians [1, n]: 16 numbers of 16 bits each, colors of degree 0."""
    # viewer.js has the same steps; that of positions, 1/5000 world unit, is a tenth of a pixel.
    xyz, opacity, zero = gaussians.xyz * 5000, gaussians.get_opacity, torch.zeros_like(gaussians.opacity)
    color = (C0 * gaussians.features[:, :, 0] + 0.5).clamp_min(0.0) * 8192
    columns = [xyz, opacity * 32767, gaussians.scaling * 2000, zero, gaussians.get_rotation * 32767, color, zero]
    # Farther than 6.5 units stands nothing but what the filters remove: the camera is at 2.7.
    seen = (xyz.abs().amax(-1) < 32767)[0] & (opacity[0, :, 0] >= 1 / 255)
    table = torch.cat(columns, dim=-1)[0, seen].detach().float().round().clamp(-32767, 32767).cpu().numpy()
    return f'show("{base64.b64encode(table.astype("<i2").tobytes()).decode()}")'


@functools.cache
def _template():
    import jinja2

    environment = jinja2.Environment(autoescape=True, loader=jinja2.FileSystemLoader(Path(__file__).parent))
    environment.filters["link"] = lambda path: quote(os.fsencode(path))
    return environment.get_template("page.html")


def _fill(path: Path, splats: str, **words: object) -> None:
    """Writes a page titled as its folder. splats: JavaScript that is not escaped."""
    colors = {**COLORS, "doubtful": COLORS["usable"]}
    text = _template().render(title=path.absolute().parent.name, splats=splats, colors=colors, cell=cell, **words)
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))  # a file's name may be no UTF-8
