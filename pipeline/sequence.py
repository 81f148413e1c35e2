"""A recording frame after frame: each fit starts from the frame before, so that a Gaussian stays one surface point."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gslrm.model.gaussians import Gaussians
from gslrm.model.gaussians_renderer import render
from gslrm.model.ply import load_ply, save_ply
from multiview.cameras import Cameras
from multiview.files import read_json, write_json
from multiview.image import composite, resize_rgba, save_video
from multiview.run import stoppable
from multiview.sample import check_names, read_sample
from pipeline.model import MouseFaceLift
from pipeline.outputs import PosedViews
from pipeline.page import write_index
from pipeline.posed import locate

FRAME_FILE, SEQUENCE_FILE = "frame.json", "sequence.json"
# A track breaks where the frame is explained so much worse than the track's first one, and a new start does better.
BREAK_PSNR, BREAK_IOU, BETTER_PSNR = 5.0, 0.04, 1.0
FILM_SIZE, FILM_FPS, TURN_DEG = 256, 20, 3.0

Shot = tuple[Tensor, Gaussians, Cameras, Tensor]  # RGBA [4, s, s], Gaussians [1, n], camera [1], center [3]


def reconstruct_sequence(
    model: MouseFaceLift, folders: Sequence[Path], output_dir: Path, share: tuple[int, int] = (0, 1), *,
    refine: int | str = "auto", **options: Any,
) -> tuple[dict[str, str], list[str]]:  # fmt: skip
    """Reconstructs sample folders in their order into <output_dir>/<sample>/gaussians.ply and frame.json.

    share: (number, count): this process takes the number-th of count contiguous pieces. Frames that are there already
    are kept and continued from: their PLY holds what the next fit starts from, bit for bit. Writes sequence.json and
    index.html of all frames that exist, film.mp4 once all do. Returns the verdict's word of each frame, and why frames
    were left out; the track breaks there.
    refine, options: of `MouseFaceLift.reconstruct`. Raises ValueError for a folder that was begun with others.
    """
    settings = {"refine": refine, "gslrm": str(model.artifacts.describe()["gslrm"]), **options}
    check_names(folders)
    (number, count), before, failed = share, None, []
    own = folders[len(folders) * number // count : len(folders) * (number + 1) // count]
    index = partial(write_index, output_dir, failed, names=[folder.name for folder in folders])
    for folder in stoppable(tqdm(own, desc="frames", unit="frame", disable=None)):
        target = output_dir / folder.name
        if (target / FRAME_FILE).is_file():
            before = load_ply(target / "gaussians.ply"), read_json(target / FRAME_FILE)
            if (told := before[1].get("settings")) != settings:  # half a sequence made otherwise would look like one
                raise ValueError(f"{target} was made with {told}, asked for is {settings}; name a new --output_dir")
            continue
        try:
            before = reconstruct_frame(model, folder, before, refine=refine, **options)
        except ValueError as error:
            failed.append(f"{folder.name}: {error}")
            before = None
            continue
        target.mkdir(parents=True, exist_ok=True)
        save_ply(target / "gaussians.ply", before[0])
        before[1]["settings"] = settings
        write_json(target / FRAME_FILE, before[1])  # last: a frame that has one is complete
        index(finished=False)
    done = [folder for folder in folders if (output_dir / folder.name / FRAME_FILE).is_file()]
    frames = [read_json(output_dir / folder.name / FRAME_FILE) for folder in done]
    tracks = list(dict.fromkeys(frame["track"] for frame in frames))
    write_json(output_dir / SEQUENCE_FILE, {"rig": model.rig.to_dict(), "tracks": tracks, "frames": frames})
    if done and len(done) + len(failed) >= len(folders):
        write_film(output_dir / "film.mp4", (read_shot(folder, output_dir / folder.name) for folder in done), FILM_FPS)
    index()
    return {folder.name: frame["verdict"]["word"] for folder, frame in zip(done, frames) if "verdict" in frame}, failed


def reconstruct_frame(
    model: MouseFaceLift, folder: Path, before: tuple[Gaussians, dict] | None, start: str = "auto", **settings: Any
) -> tuple[Gaussians, dict]:
    """Returns the Gaussians of a sample and its record: continued from the frame before, or begun anew from `start`."""
    started, sample = time.perf_counter(), read_sample(folder, padded=True)
    count = sample.num_inputs
    views = PosedViews.of(sample.rgba[:count], sample.cameras[:count])
    placement = locate(views.masks, views.cameras, str(folder))
    to_sample = sample.extra.get("calibration_to_sample", torch.eye(4).tolist())

    def attempt(begin: str | Gaussians) -> tuple[Gaussians, dict]:
        made = model.reconstruct(
            views.rgb, views.masks, views.cameras, start=begin, placement=placement, name=str(folder), **settings
        )
        return made.gaussians, {**made.record["refinement"], "verdict": made.record["verdict"]}

    track, gaussians = None, None
    if before is not None:
        last, told = before
        # From the last sample's world, which follows the animal, to this one's; then onto the center of its masks.
        step = torch.tensor(to_sample).double() @ torch.linalg.inv(torch.tensor(told["to_sample"]).double())
        step[:3, 3] = placement.centre - step[:3, :3] @ torch.tensor(told["centre"]).double()
        gaussians, fit = attempt(last.moved(step))
        track, first = told["track"], told["track_given"]
        psnr, iou = fit["given_after"]["psnr"], fit["given_after"]["iou"]
        if psnr < first["psnr"] - BREAK_PSNR or iou < first["iou"] - BREAK_IOU:
            anew = attempt(start)
            if anew[1]["given_after"]["psnr"] > psnr + BETTER_PSNR:
                track, (gaussians, fit) = None, anew
    else:
        gaussians, fit = attempt(start)
    given = fit["given_after"]
    return gaussians, {
        "id": sample.id, "source_frame": sample.extra.get("frame"), "track": track or sample.id,
        "track_given": first if track else given, **fit, "gaussians": gaussians.num_gaussians,
        "centre": placement.centre.tolist(), "to_sample": to_sample, "to_rig": placement.to_rig.tolist(),
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip


def read_shot(folder: Path, result: Path) -> Shot:
    """Returns of a frame its first given view, the Gaussians, that view's camera and the animal's center."""
    sample, told = read_sample(folder, views=[0]), read_json(result / FRAME_FILE)
    return sample.rgba[0], load_ply(result / "gaussians.ply"), sample.cameras, torch.tensor(told["centre"])


@torch.no_grad()
def write_film(path: Path, shots: Iterable[Shot], fps: int) -> None:
    """Writes a film: the given image of every frame, the Gaussians from its camera, and from one going round."""

    def draw(index: int, shot: Shot) -> Tensor:
        rgba, gaussians, camera, centre = shot
        camera = camera.resize(FILM_SIZE, FILM_SIZE)
        # Round the animal at the first view's distance and height.
        turning = camera.recentre(centre, 1.0).rotate(index * TURN_DEG).recentre(-centre, 1.0)
        seen = [render(gaussians, one[None]).rgb[0, 0].clamp(0, 1) for one in (camera, turning)]
        return torch.cat([composite(resize_rgba(rgba, FILM_SIZE), 1.0), *seen], dim=-1)

    save_video(path, (draw(index, shot) for index, shot in enumerate(shots)), fps)
