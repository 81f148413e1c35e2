"""What scripts/view.py shows: outputs found by their files, read one at a time, drawn by viser."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from gslrm.checkpoints import PATTERN
from gslrm.model.gaussians import C0, Gaussians, rotation_matrices
from gslrm.model.gaussians_renderer import render
from gslrm.model.ply import load_ply
from multiview.cameras import Cameras
from multiview.checkpoint import read_sidecar, step_of
from multiview.files import read_json, take
from multiview.image import read_rgba, to_uint8
from multiview.metrics import psnr
from multiview.sample import CAMERAS_FILE, inside, read_sample, read_split
from pipeline.model import MouseFaceLift
from pipeline.outputs import PosedViews
from pipeline.posed import reduced

FILES = ("gaussians.ply", CAMERAS_FILE, "run.json", "frame.json")  # of an item; it has one of the first two
IMAGE_SIDE, FRAMES_PER_S = 256, 10  # pixels that are kept of larger views; of the film
BEGIN = (1.0, -2.4, 1.1)  # where browsers stand at first, in radii from the animal's middle


class Shown(NamedTuple):
    gaussians: Gaussians | None  # [1, n] on the CPU; None for a sample
    views: PosedViews | None  # true or generated ones
    told: list[str]  # sentences


Items = dict[str, tuple[tuple, Callable[[], Shown]]]  # name -> when its files were written, what reads them


def list_items(path: Path, data: Path | None = None) -> Items:
    """Returns what there is to show in a result, sample or frame, in a folder of such, or in Stage 2's checkpoint
    folder: the validation samples, seen by the newest. Raises ValueError where there is nothing.

    data: the samples with a sequence's true views; a split list for checkpoints.
    """
    if checkpoints := sorted(path.glob(PATTERN), key=step_of):
        where, stamp = f"{checkpoints[-1]}.json", (checkpoints[-1], checkpoints[-1].stat().st_mtime_ns)
        config = take(read_sidecar(checkpoints[-1]) or {}, "config", dict, where)
        validation = take(config, "validation", dict, where)
        frames = read_split(data or take(validation, "dataset_path", str, where))
        frames = frames[: take(validation, "num_samples", int, where, least=1)]
        return {frame.name: (stamp, partial(_predict, stamp, frame)) for frame in frames}
    written = {file: file.stat().st_mtime_ns for name in FILES for file in (*path.glob(name), *path.glob(f"*/{name}"))}
    folders = sorted({file.parent for file in written if file.name in FILES[:2]})
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not folders:
        kinds = f"{FILES[0]} (a result or frame), {CAMERAS_FILE} (a sample), folders of such, or Stage 2's {PATTERN}"
        raise ValueError(f"{path} holds nothing to show: {kinds} are expected there")
    times = {folder: tuple(written.get(folder / name) for name in FILES) for folder in folders}
    return {
        folder.name: (times[folder], partial(_read, folder, data)) for folder in ([path] if path in times else folders)
    }


def _read(folder: Path, data: Path | None) -> Shown:
    gaussians = load_ply(folder / FILES[0]) if (folder / FILES[0]).is_file() else None
    source = folder if data is None or gaussians is None else data / folder.name
    path = source / CAMERAS_FILE
    told = ["true views alone"] if gaussians is None else [f"{gaussians.num_gaussians:,} Gaussians"]
    for file in filter(Path.is_file, (folder / name for name in FILES[2:])):
        if verdict := take(read_json(file), "verdict", dict, str(file), default=None):
            told = [f"verdict: {verdict.get('word')}", *map(str, verdict.get("reasons") or ()), *told]
    if not path.is_file():
        return Shown(gaussians, None, told if data is None else [*told, f"{path} does not exist"])
    frames, images = take(read_json(path), "frames", list, str(path)), []
    cameras = Cameras.from_frames(frames, str(path), padded=True)
    for frame in frames:  # no mask is asked for, unlike in `read_sample`: a result's views are RGB
        image = read_rgba(inside(source, take(frame, "file_path", str, str(path)), str(path)))
        images.append(F.pad(image, (0, cameras.width - image.shape[-1], 0, cameras.height - image.shape[-2])))
    return Shown(gaussians, reduced(PosedViews.of(torch.stack(images), cameras), IMAGE_SIDE), told)


@lru_cache(maxsize=1)  # the newest alone: networks of full size have gigabytes
def _model(stamp: tuple) -> MouseFaceLift:
    return MouseFaceLift.load(device="cpu", stages="2", checkpoint=stamp[0])


def _predict(stamp: tuple, folder: Path) -> Shown:
    sample = read_sample(folder)
    views, inputs = PosedViews.of(sample.rgba, sample.cameras), slice(0, sample.num_inputs)
    given = PosedViews(views.rgb[inputs], views.masks[inputs], views.cameras[inputs])
    gaussians = _model(stamp).predict(given)
    told = [stamp[0].name, f"{gaussians.num_gaussians:,} Gaussians from {len(given.rgb)} views of a validation sample"]
    return Shown(gaussians, reduced(views, IMAGE_SIDE), told)


class Viewer:
    """One scene for all browsers. No callbacks: one thread alone reads what was set, reads files and renders."""

    def __init__(self, server, find: Callable[[], Items], refresh_s: float) -> None:
        self.server, self.find, self.refresh_s = server, find, refresh_s
        self.items, self.looked, self.drawn = find(), time.monotonic(), {}
        self.frusta, gui = [], server.gui
        self.told = gui.add_html("")
        self.frame, self.film = gui.add_slider("frame", 0, 1, 1, 0), gui.add_button_group("", ("Stop", "Play"))
        self.are_shown = gui.add_checkbox("show cameras", True)
        self.opacity = gui.add_slider("their opacity", 0.0, 1.0, 0.05, 1.0)
        self.background = gui.add_rgb("background", (255, 255, 255))
        gui.add_button("Screenshot").on_click(lambda event: self.send_screenshot(event.client))
        self.camera = gui.add_slider("compare camera", 0, 1, 1, 0)
        self.pair = gui.add_image(np.zeros((1, 1, 3), np.uint8), format="png")
        self.update()
        gaussians, start = self.shown.gaussians, server.initial_camera
        points = self.shown.views.cameras.origins if gaussians is None else gaussians.xyz[0]
        middle, radius = points.mean(dim=0), (points - points.mean(dim=0)).norm(dim=-1).quantile(0.98)
        start.position = (middle + radius * middle.new_tensor(BEGIN)).numpy()
        start.look_at, start.fov = middle.numpy(), math.radians(45)

    def send_screenshot(self, client) -> None:
        shown = client.get_render(client.camera.image_height, client.camera.image_width, timeout=60)
        client.send_file_download(
            "view.png", imageio.imwrite("<bytes>", shown, extension=".png"), save_immediately=True
        )

    def step(self) -> None:
        """Takes the film's next frame, looks for newer files if it is time, and draws what has changed."""
        time.sleep(1 / FRAMES_PER_S)
        if self.film.value == "Play":
            self.frame.value = (self.frame.value + 1) % len(self.items)
        try:
            if time.monotonic() - self.looked > self.refresh_s:
                self.looked, self.items = time.monotonic(), self.find()
            self.update()
        except (ValueError, OSError) as error:  # files that are gone or being replaced: what is drawn stays
            self.tell([str(error)])

    def tell(self, sentences: list[str]) -> None:
        lines = [f"<b>{html.escape(self.name)}</b>", *map(html.escape, sentences)]
        self.told.content = f"<div style='padding:0 1em;overflow-wrap:anywhere'>{'<br>'.join(lines)}</div>"

    def update(self) -> None:
        """Reads the chosen item if it or its files are new, then redraws each part whose settings have changed."""
        self.frame.visible = self.film.visible = len(self.items) > 1
        self.frame.max = max(1, len(self.items) - 1)
        self.name, (stamp, load) = list(self.items.items())[min(self.frame.value, len(self.items) - 1)]
        scene = (self.name, stamp)
        if self.drawn.get("scene") != scene:
            self.drawn["scene"] = scene  # also if it cannot be read: it is tried again when it is written again
            self.shown = load()
            self.tell(self.shown.told)
            self.camera.visible = self.pair.visible = None not in self.shown[:2]  # something to compare
            self.camera.max = max(1, len(self.shown.views.rgb) - 1) if self.shown.views else 1
        for draw, *settings in (
            (self.draw_background, self.background.value), (self.draw_gaussians, scene),
            (self.draw_cameras, scene, self.are_shown.value, self.opacity.value),
            (self.compare, scene, self.camera.value),
        ):  # fmt: skip
            if self.drawn.get(draw.__name__) != settings:
                self.drawn[draw.__name__] = settings
                draw()

    def draw_background(self) -> None:
        self.server.scene.set_background_image(np.full((2, 2, 3), self.background.value, np.uint8), format="png")

    def draw_gaussians(self) -> None:
        if (gaussians := self.shown.gaussians) is None:
            self.server.scene.remove_by_name("/animal")
            return
        axes = rotation_matrices(gaussians.get_rotation[0]) * gaussians.get_scaling[0, :, None]
        colors = (C0 * gaussians.features[0, :, 0] + 0.5).clamp(0, 1)
        parts = gaussians.xyz[0], axes @ axes.mT, colors, gaussians.get_opacity[0]
        self.server.scene.add_gaussian_splats("/animal", *(part.float().numpy() for part in parts))

    def draw_cameras(self) -> None:
        for handle in self.frusta:
            handle.remove()
        self.frusta.clear()
        for number, rgb in enumerate(self.shown.views.rgb if self.shown.views and self.are_shown.value else ()):
            camera = self.shown.views.cameras[number]
            image = to_uint8(torch.cat([rgb, torch.full_like(rgb[:1], self.opacity.value)]))
            turned = Rotation.from_matrix(camera.c2w[:3, :3].numpy()).as_quat(scalar_first=True)
            fov, size = 2 * math.atan(camera.height / 2 / float(camera.fxfycxcy[1])), 0.1 * float(camera.distance)
            self.frusta.append(self.server.scene.add_camera_frustum(
                f"/cameras/{number}", fov, camera.width / camera.height, scale=size, thickness=1.5,
                thickness_units="screen", image=image, wxyz=turned, position=camera.origins.numpy(),
            ))  # fmt: skip

    @torch.no_grad()
    def compare(self) -> None:
        """Renders the Gaussians by our own rasterizer from the chosen camera, beside the given view."""
        gaussians, views, _ = self.shown
        if gaussians is None or views is None:
            return
        number = min(self.camera.value, len(views.rgb) - 1)
        rendered = render(gaussians, views.cameras[number : number + 1][None]).rgb[0, 0].clamp(0, 1)
        self.pair.image = to_uint8(torch.cat([views.rgb[number], rendered], dim=-1))
        self.pair.label = f"given view {number} | rendered: PSNR {float(psnr(rendered, views.rgb[number])):.1f} dB"
