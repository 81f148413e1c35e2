"""Photographs one after the other with models loaded once: those of a folder, or a video's frames."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gslrm.model.ply import load_ply
from multiview.files import read_json
from multiview.image import BODY_AREA, MARGIN, body_placement, check_picture, cut_out, read_rgba
from multiview.rig import ViewRig
from multiview.run import stoppable
from pipeline.model import MouseFaceLift, PhotographError
from pipeline.options import Options
from pipeline.page import write_index
from pipeline.sequence import write_film
from pipeline.verdict import WORDS

# Images that no library here can read: named as failed, where a text file in the folder is only mentioned.
FOREIGN_SUFFIXES = {".heic", ".heif", ".jxl", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw"}
SMOOTH_FRAMES = 2.0  # deviation of the smoothing of the crop's path, in used frames
SIDE_QUANTILE = 0.95  # of the frames keep their whole tail in the crop: one wrong mask must not shrink all others


@dataclass(frozen=True)
class Photo:
    """One item of a batch. image: a file, or RGBA [h, w, 4] uint8. crop: of `prepare_photo`. told: for run.json."""

    name: str
    image: Path | np.ndarray
    crop: str | tuple[float, float, float]
    told: dict[str, Any] = field(default_factory=dict)


def reconstruct_photos(
    model: MouseFaceLift, photos: Sequence[Photo], output_dir: Path, save: Callable, failed: dict[str, str], *,
    overwrite: bool = False, index: bool = True, share: tuple[int, int] = (0, 1), **options: Any,
) -> dict[str, str]:  # fmt: skip
    """Reconstructs every photograph into <output_dir>/<name>, goes on after a failure and skips what is done already.

    save: (name, result), writes the folder. index: also write index.html, of all there is. share: (number, count): this
    process takes every count-th photograph. options: of the model's call. Returns each verdict's word by name;
    failures, with their reasons, come to `failed`. Raises ValueError for a result made with other options or weights.
    """
    words, (number, count), artifacts = {}, share, model.artifacts
    own, steps = photos[number::count], {"steps": artifacts.num_steps, "guidance": artifacts.guidance_scale}
    for place, photo in enumerate(stoppable(own), 1):
        asked = {
            "crop": photo.crop,
            "mask": artifacts.options.mask,
            **options,
            **steps,
            "artifacts": artifacts.describe(),
        }
        asked = json.loads(json.dumps(asked))  # as run.json gives it back
        done = finished(output_dir / photo.name / "run.json", photo, {} if overwrite else asked)
        if done:
            words[photo.name] = done["verdict"]["word"]
            print(f"{place} of {len(own)}: {photo.name} is there already ({words[photo.name]})")
            continue
        bar = partial(tqdm, desc=f"{photo.name}: generating {model.rig.num_views} views", unit="step", disable=None)
        try:
            result = model(photo.image, crop=photo.crop, name=photo.name, progress=bar, **options)
        except PhotographError as error:  # one bad photograph does not end the others
            leave_out(photo.name, str(error), failed)
            print(f"{place} of {len(own)} failed")
            continue
        result.record |= {"asked": asked, **photo.told}
        save(photo.name, result)
        words[photo.name] = result.record["verdict"]["word"]
        print(f"{place} of {len(own)} done")
        if index:
            write_index(output_dir, failed.values(), finished=False)
    counts = [f"{list(words.values()).count(word)} {word}" for word in WORDS]
    if index:
        write_index(output_dir, failed.values())
        print(f"{output_dir}/index.html: {len(words)} results, {', '.join(counts)}; {len(failed)} failed")
    return words


def finished(path: Path, photo: Photo, asked: dict) -> dict | None:
    """Returns the run.json of a result that need not be made again; None where there is none, or an older one."""
    if not asked or not path.is_file():
        return None
    if isinstance(photo.image, Path) and photo.image.stat().st_mtime > path.stat().st_mtime:
        return None
    told = read_json(path)
    before = told.get("asked", {})
    if differing := sorted(key for key in asked if before.get(key) != asked[key]):
        key = differing[0]
        raise ValueError(
            f"{path.parent} was made with {key} {before.get(key)}, asked for is {asked[key]}; name a new --output_dir, "
            "or make it again with --overwrite"
        )
    return told


def leave_out(name: str, reason: str, failed: dict[str, str]) -> None:
    """Names a photograph that cannot be used at once, and again at the end."""
    failed[name] = reason
    print(f"{name} is left out: {reason}", file=sys.stderr)


def list_photos(inputs: Any, options: Options, failed: dict[str, str]) -> tuple[list[Photo], float]:
    """Returns what inputs.input_image, .input_dir or .input_video names, each file looked at, and a video's frames per
    second."""
    if inputs.input_video:
        return video_photos(inputs.input_video, options.mask_video, options.video_stride, options, failed)
    if inputs.input_dir:
        return folder_photos(inputs.input_dir, options.crop, failed), 0.0
    check_picture(inputs.input_image)
    return [Photo(inputs.input_image.stem, inputs.input_image, options.crop)], 0.0


def folder_photos(folder: Path, crop: str, failed: dict[str, str]) -> list[Photo]:
    """Returns the photographs of a folder, by name; each file is looked at. What cannot be read is in `failed`."""
    from PIL import Image

    if not folder.is_dir():
        raise ValueError(f"--input_dir {folder} is not a folder")
    photos: dict[str, Photo] = {}
    for path in sorted(path for path in folder.iterdir() if not path.is_fifo() and not path.name.startswith(".")):
        try:
            check_picture(path)
        except ValueError as error:
            if path.suffix.lower() in FOREIGN_SUFFIXES | Image.registered_extensions().keys():
                leave_out(path.name, str(error), failed)
            else:
                print(f"{path.name} is left out: not an image", file=sys.stderr)
            continue
        if path.stem in photos:  # the second would overwrite the first
            raise ValueError(f"--input_dir {folder}: several images would write to the folder {path.stem}/")
        photos[path.stem] = Photo(path.stem, path, crop)
    if not photos:
        hint = "a video is named itself; a recording is imported with scripts/process_mouse_data.py"
        told = f"folder {folder} holds no image that can be read ({hint})"
        raise ValueError("; ".join([told, *failed.values()]))
    return list(photos.values())


def video_photos(
    path: Path, masks: Path | None, stride: int, options: Options, failed: dict[str, str]
) -> tuple[list[Photo], float]:
    """Returns every stride-th frame of a video that shows an animal, cut out, and the frames per second of them.

    masks: a video whose white pixels are the animal; else the video's own alpha, else found as options.mask says. With
    options.crop `auto` all frames are cropped by windows of one size along a smoothed path: (x, y, side) in the frame's
    pixels, which run.json keeps. Frames without an animal are told and skipped; a video that ends early is in `failed`.
    """
    photos, places, rate, crop = [], [], 0.0, options.crop
    white = decode(masks, stride, failed, "mask_video") if masks else None
    for number, seconds, rgba in decode(path, stride, failed):
        rate = number / seconds if seconds else rate
        if white is not None:
            if (mask := next(white, None)) is None or mask[2].shape != rgba.shape:
                raise ValueError(f"mask_video {masks} must have the size and frames of {path}; frame {number} has none")
            rgba[..., 3] = mask[2][..., :3].mean(-1)
        name, told = f"{path.stem}_{number:06d}", {"number": number, "seconds": round(seconds, 4)}
        try:
            array, told["segmented"] = cut_out(torch.from_numpy(rgba).permute(2, 0, 1) / 255, name, options.mask)
        except ValueError as error:
            print(f"frame {number} is skipped: {error}", file=sys.stderr)
            continue
        array = (array * 255).round().astype(np.uint8)  # all frames are held in memory
        shown = array[..., 3] > 127
        area, _, (x, y) = body_placement(shown)
        rows, columns = (np.nonzero(shown.any(axis))[0] for axis in (1, 0))
        # Some room around the animal, as far as the frame reaches: without it it would seem cut by a border.
        top, left = (max(int(ends[0] - np.ptp(ends) // 8 - 1), 0) for ends in (rows, columns))
        bottom, right = (int(ends[-1] + np.ptp(ends) // 8 + 2) for ends in (rows, columns))
        if crop != "never":
            array = array[top:bottom, left:right].copy()
            told["corner"] = [left, top]
        places.append([x, y, np.sqrt(area * shown.size / BODY_AREA), *columns[[0, -1]], *rows[[0, -1]]])
        photos.append(Photo(name, array, crop, {"frame": told}))
    if not photos:
        raise ValueError(f"--input_video {path} shows no animal in any frame that was looked at")
    if crop == "auto":
        for index, (x, y, side) in enumerate(steady_windows(np.array(places)).round(2).tolist()):
            frame = photos[index].told["frame"]
            frame["window"], (left, top) = [x, y, side], frame["corner"]
            photos[index] = replace(photos[index], crop=(x - left, y - top, side))
    return photos, rate / stride


def steady_windows(places: np.ndarray) -> np.ndarray:
    """Returns crop windows (x, y, side) [n, 3] of [n, 7]: body center, side by the body's area, the mask's columns and
    rows, all in pixels. The centers follow a smoothed path; all sides are the same."""
    from scipy.ndimage import gaussian_filter1d  # a third of a second, for videos alone

    x, y = gaussian_filter1d(places[:, :2], SMOOTH_FRAMES, axis=0, mode="nearest").T
    reach = np.max([places[:, 4] + 1 - x, x - places[:, 3], places[:, 6] + 1 - y, y - places[:, 5]], axis=0)
    side = max(np.median(places[:, 2]), np.quantile(2 * reach, SIDE_QUANTILE) / (1 - 2 * MARGIN))
    return np.stack([x, y, np.full_like(x, np.ceil(side))], axis=-1)


def decode(
    path: Path, stride: int, failed: dict[str, str], named: str = "--input_video"
) -> Iterator[tuple[int, float, np.ndarray]]:
    """Yields (number, seconds, RGBA [h, w, 4] uint8) of every stride-th frame; an early end is in `failed` then."""
    import av

    if not path.is_file():
        raise ValueError(f"{named} {path} does not exist")
    number = announced = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            # Decoders end a cut file as they end a whole one; only the header knows how many frames there were.
            announced = stream.frames
            for frame in container.decode(stream):
                if number % stride == 0:
                    yield number, float(frame.time or 0), frame.to_ndarray(format="rgba")
                number += 1
    except (av.FFmpegError, IndexError) as error:  # IndexError: sound alone
        if not number:
            raise ValueError(f"{named} {path} holds no frame that can be decoded ({error})") from error
    if not number:
        raise ValueError(f"{named} {path} holds no frame that can be decoded")
    if number < 0.99 * announced - 1:  # headers of variable frame rates count a frame more or less
        reason = f"{path} is cut: {number} of {announced} frames can be decoded; copy it again from its source"
        leave_out(f"the rest of {path.name}", reason, failed)


def film_photos(output_dir: Path, photos: Sequence[Photo], failed: dict[str, str], rig: ViewRig, rate: float) -> None:
    """Writes film.mp4: input, the Gaussians from its camera, and from one going round; once all results are there."""
    folders = [output_dir / photo.name for photo in photos if photo.name not in failed]
    if not folders or not all((folder / "run.json").is_file() for folder in folders):
        return
    camera = rig.cameras(256)[[rig.reference_view]]
    shots = ((read_rgba(f / "input.png"), load_ply(f / "gaussians.ply"), camera, torch.zeros(3)) for f in folders)
    write_film(output_dir / "film.mp4", shots, max(1, round(rate)))
    write_index(output_dir, failed.values())  # which links to it
