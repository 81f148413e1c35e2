"""Rendered samples, whole datasets and raw recordings of synthetic mice."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.files import LOCK_FILE, atomic_folder, atomic_write, owned_folder, write_json
from multiview.image import to_uint8
from multiview.rig import ViewRig, load_rig
from multiview.run import REPOSITORY, resolve_device
from multiview.sample import Sample, is_complete_sample, open_dataset, write_sample, write_split
from recording.calibration.checks import validate
from recording.calibration.fields import PIXEL_CENTRE
from recording.calibration.formats import read_calibration, write_calibration
from recording.calibration.model import Calibration
from synthetic.photograph import Camera, RecordingCameras, RecordingConditions, photograph
from synthetic.scene import KEYPOINT_NAMES, SplatCloud, laboratory_light, make_mouse, mouse_sequence
from synthetic.settings import POSES, MouseSettings
from synthetic.skeleton import BODY_LENGTH

# (cloud, cameras [v]) -> rgb [v, 3, h, w] over black, alpha [v, 1, h, w], mean depth z [v, 1, h, w] where alpha > 0
Render = Callable[[SplatCloud, Cameras], tuple[Tensor, Tensor, Tensor]]

NOVEL_ELEVATION_DEG = (-5.0, 60.0)
NOVEL_DISTANCE = (2.4 / 2.7, 3.0 / 2.7)  # over the rig's distance
PHOTOGRAPH_SCALE = (0.88, 1.12)  # a photograph is framed by its mask, not by the animal's true size and center
PHOTOGRAPH_SHIFT = 0.06  # world units, along each axis
OPAQUE = 0.5  # a pixel has a depth where the animal covers more than this

BODY_LENGTH_MM = 73.0  # nose to tail base of an adult mouse, stretched
ARENA_REACH = 0.6  # arena_radius for mouse_sequence (world units; 36 mm): all real cameras see the whole animal
SURFACE_POINTS = 1000  # of each frame's surface kept as truth


def make_renderer(device: str = "cpu") -> Render:
    """Returns the project's rasterizer as a `Render`."""
    from gslrm.model.gaussians import Gaussians
    from gslrm.model.gaussians_renderer import render

    target = resolve_device(device)

    @torch.no_grad()
    def draw(cloud: SplatCloud, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor]:
        gaussians = Gaussians(
            xyz=torch.from_numpy(cloud.means)[None],
            features=((torch.from_numpy(cloud.rgb) - 0.5) / 0.28209479177387814)[None, :, None],
            scaling=torch.from_numpy(cloud.log_scales)[None],
            rotation=torch.from_numpy(cloud.quats)[None],
            opacity=torch.logit(torch.from_numpy(cloud.opacity))[None, :, None],
        ).to(target)
        output = render(gaussians, cameras[None].to(target), background=0.0)
        alpha = output.alpha[0].cpu()
        return output.rgb[0].cpu(), alpha, output.depth[0].cpu() / alpha.clamp_min(1e-6)

    return draw


# ---- samples --------------------------------------------------------------------------------------------------------


def _keyed(*keys: int) -> np.random.Generator:
    """Random numbers of their own for each purpose, so that asking for one thing does not change another."""
    return np.random.default_rng(np.random.SeedSequence(keys))


def sample_cameras(rig: ViewRig, settings: MouseSettings, index: int) -> Cameras:
    """Returns the rig's cameras in order, then `num_novel_views` random ones: any azimuth, NOVEL_... ranges."""
    size, count, rng = settings.image_size, settings.num_novel_views, _keyed(settings.seed, index, 1)
    cameras = rig.cameras(size)
    if settings.elevation:  # of the input view only: the others stay where the rig has them
        view, raised = rig.reference_view, torch.tensor(_keyed(settings.seed, index, 8).uniform(*settings.elevation))
        azimuth = torch.tensor(rig.views[view].azimuth_deg)
        cameras.c2w[view] = Cameras.orbit(azimuth, raised, rig.distance, rig.focal, size).c2w
    if not count:
        return cameras
    azimuth, elevation = rng.uniform(0, 360, count), rng.uniform(*NOVEL_ELEVATION_DEG, count)
    distance = rig.distance * rng.uniform(*NOVEL_DISTANCE, count)
    novel = Cameras.orbit(*(torch.from_numpy(values) for values in (azimuth, elevation, distance)), rig.focal, size)
    return Cameras(torch.cat([cameras.c2w, novel.c2w]), torch.cat([cameras.fxfycxcy, novel.fxfycxcy]), size, size)


def is_photographic(seed: int, index: int, share: float) -> bool:
    """Whether sample `index` is a photograph when this share of them is; a larger share only adds photographs."""
    return _keyed(seed, index, 5).random() < share


def make_sample(
    rig: ViewRig, settings: MouseSettings, index: int, render: Render, make_cloud: Callable = make_mouse
) -> Sample:
    """Sample `index` of the series: the rig's views in order, then random ones. Depends on the arguments only.

    make_cloud: draws the animal (same signature as `scene.make_mouse`). A photographic sample has a laboratory's light
    and exposure, the animal a little off its place and size, the rig's views as cameras and a segmentation would give
    them (`photograph`); novel views stay clean and depth true, of that same animal.
    """
    seed, heading, pose, light, place = settings.seed, None, settings.pose, {}, _keyed(settings.seed, index, 7)
    if settings.heading_deg:
        center, spread = settings.heading_deg
        heading = float(center + _keyed(seed, index, 2).uniform(-1, 1) * spread)
    if settings.poses:
        pose = str(place.choice(settings.poses))
    rng = _keyed(seed, index, 6)
    photographed = is_photographic(seed, index, settings.photographic)
    if photographed:
        light = {"light": laboratory_light(rng)}
    cloud = make_cloud(seed, index, coat=settings.coat, pose=pose, heading_deg=heading, **light)
    if settings.size:
        cloud = cloud.transformed(scale=place.uniform(*settings.size) / cloud.body_length)
    if settings.off_center:
        width = rig.distance / rig.focal  # of the image at the body's distance, world units
        cloud = cloud.transformed(offset=place.uniform(-settings.off_center, settings.off_center, 3) * width)
    if photographed:
        camera = Camera.draw(rng)
        scale, shift = rng.uniform(*PHOTOGRAPH_SCALE), rng.uniform(-PHOTOGRAPH_SHIFT, PHOTOGRAPH_SHIFT, 3)
        cloud = replace(cloud, rgb=camera.toned(cloud.rgb)).transformed(scale=scale, offset=shift)
    cameras = sample_cameras(rig, settings, index)
    rgb, alpha, mean_depth = render(cloud, cameras)
    straight = torch.where(alpha > 1 / 512, rgb / alpha.clamp_min(1 / 512), torch.zeros_like(rgb))
    sample = Sample(
        id=sample_name(index),
        rgba=torch.cat([straight.clamp(0, 1), alpha.clamp(0, 1)], dim=1),
        cameras=cameras,
        view_names=[*rig.view_names, *[None] * settings.num_novel_views],
        depth=torch.where(alpha > OPAQUE, mean_depth, torch.zeros_like(mean_depth)) if settings.depth else None,
        extra={
            "synthetic": cloud.meta,
            "body_length": cloud.body_length,
            "floor": cloud.floor,
            "keypoints": np.round(cloud.keypoints.astype(float), 5).tolist(),
        },
    )
    if photographed:
        sample = photograph(sample, len(rig.view_names), camera, rng)
        sample.extra["photograph"] |= {"scale": round(float(scale), 4), "shift": np.round(shift, 4).tolist()}
    return sample


def sample_name(index: int) -> str:
    return f"sample_{index:06d}"


# ---- datasets -------------------------------------------------------------------------------------------------------


def split_indices(num_samples: int, val_fraction: float) -> tuple[list[int], list[int]]:
    """Training and validation indices, spread evenly; growing the dataset never moves a sample to the other side."""
    steps = [math.floor(i * val_fraction + 1e-9) for i in range(num_samples + 1)]
    is_val = [steps[i + 1] > steps[i] for i in range(num_samples)]
    return [i for i in range(num_samples) if not is_val[i]], [i for i in range(num_samples) if is_val[i]]


@lru_cache(maxsize=1)  # once per process
def _prepared(settings: MouseSettings) -> tuple[ViewRig, Render, Callable[..., SplatCloud]]:
    """Returns rig, renderer and what draws the animal; leaves this process one thread."""
    import numba

    torch.set_num_threads(1)
    numba.set_num_threads(1)
    make_cloud = make_mouse
    if settings.body_model is not None:
        from synthetic.body_model import BodyModelMice

        make_cloud = BodyModelMice(settings.body_model, settings.body_model_poses)
    return load_rig(settings.rig), make_renderer(settings.device), make_cloud


def _write_one(settings: MouseSettings, index: int) -> None:
    folder = settings.output_dir / sample_name(index)
    if not is_complete_sample(folder):
        rig, render, make_cloud = _prepared(settings)
        write_sample(folder, make_sample(rig, settings, index, render, make_cloud))


def write_dataset(settings: MouseSettings) -> None:
    """Writes or continues the dataset folder; complete samples are kept, split lists written last."""
    from tqdm import tqdm

    folder, rig = settings.output_dir, load_rig(settings.rig)
    resolve_device(settings.device)  # as the body model's files: refused before anything is written
    if settings.workers == 1 or settings.body_model:
        _prepared(settings)
    # Opened before it is owned, since a foreign folder must stay untouched; and again, now that nobody else changes it.
    open_dataset(folder, rig, settings.parameters)
    with owned_folder(folder), ExitStack() as stack:
        open_dataset(folder, rig, settings.parameters)
        write, indices = partial(_write_one, settings), range(settings.num_samples)
        if settings.workers == 1:
            done = map(write, indices)
        else:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the workers, before they import torch
            # Spawned, not forked: numba's thread pools do not survive a fork. An interrupt is for this process alone.
            context = multiprocessing.get_context("spawn")
            pool = context.Pool(settings.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))
            done = stack.enter_context(pool).imap_unordered(write, indices, chunksize=4)
        for _ in tqdm(done, total=settings.num_samples, desc="mice", unit="mouse", disable=None):
            pass
        for name, chosen in zip(("train", "val"), split_indices(settings.num_samples, settings.val_fraction)):
            if chosen:
                write_split(folder / f"{settings.prefix}_{name}.txt", [folder / sample_name(i) for i in chosen])


# ---- raw recordings -------------------------------------------------------------------------------------------------


def load_real_rig(*, width: int | None = None, lens: str = "none") -> tuple[Calibration, dict]:
    """Returns the calibration of the real recording that ships with the project, and its arena, {centre [3] mm ...}.

    width: of the images, even; by default as filmed. Heights follow, rounded to even numbers. lens: `none` for the
    undistorted images, `real` for the photographs as filmed (lens distortion, skew).
    """
    path = REPOSITORY / "configs" / "rigs" / "recordings" / "dannce_mouse1.json"
    calibration = read_calibration(path)
    content = json.loads(path.read_text())
    if lens == "real":
        raw = [frame["raw"] for frame in content["frames"]]
        K = np.array([camera["K"] for camera in raw])
        K[:, :2, 2] += PIXEL_CENTRE
        distortion = np.array([camera["distortion"] for camera in raw])
        calibration = validate(replace(calibration, K=K, distortion=distortion))
    if width is not None:
        old_width, old_height = calibration.sizes[0]
        height = 2 * round(old_height * width / old_width / 2)
        K = np.diag([width / old_width, height / old_height, 1.0]) @ calibration.K
        calibration = replace(calibration, K=K, sizes=((width, height),) * len(calibration))
    return calibration, content["arena"]


def stand_in_arena(cloud: SplatCloud, arena: dict) -> SplatCloud:
    """Puts a frame of `mouse_sequence` into a real arena, in mm: an adult mouse on its floor."""
    return cloud.transformed(scale=BODY_LENGTH_MM / BODY_LENGTH, offset=np.asarray(arena["centre"]))


def video_writer(path: Path, size: tuple[int, int], frames_per_second: float, crf: int):
    """A started generator that takes [h, w, 3] uint8 frames; closing it finishes the H.264 file. size: (w, h)."""
    import imageio_ffmpeg

    writer = imageio_ffmpeg.write_frames(
        os.fspath(path), size, fps=frames_per_second, codec="libx264", quality=None, macro_block_size=2,
        pix_fmt_out="yuv444p" if crf == 0 else "yuv420p",
        output_params=["-crf", str(crf), "-preset", "veryfast", "-threads", "1", "-f", "mp4"],
    )  # fmt: skip
    writer.send(None)
    return writer


def _count_frames(path: Path) -> int:
    """Returns the number of frames of a video by its header, 0 for one that was cut off."""
    import av

    try:
        with av.open(os.fspath(path)) as video:
            return video.streams.video[0].frames
    except av.error.FFmpegError:
        return 0


def write_recording(
    folder: Path | str,
    calibration: Calibration,
    clouds: Iterable[SplatCloud],
    render: Callable,
    *,
    calibration_formats: Sequence[str] = (),
    conditions: RecordingConditions | None = None,
    frames_per_second: float = 100.0,
    quality_crf: int = 12,
) -> None:
    """Writes a recording in MAMMAL's layout: videos_undist/k.mp4, simpleclick_undist/k.mp4, new_cam.pkl, and the truth.

    clouds: one per frame, in the calibration's world and unit (mm). calibration_formats: of `calibration.FORMATS`; the
    first lies in the folder, where it is found without being named, every other one in calibrations/<format>/. Left
    out: mammal, or dannce where there is lens distortion, which mammal cannot hold. quality_crf: x264's constant rate
    factor; 0 also keeps full color resolution. The folder appears when it is complete.
    truth.json: unit, keypoint_names, frames of {centre [3], keypoints [n, 3], body_length, pose}. truth.npz: centre
    [t, 3], keypoints [t, n, 3], surface [t, SURFACE_POINTS, 3] (points of the animal's surface, drawn once per frame).
    """
    conditions = conditions or RecordingConditions()
    formats = calibration_formats or (("dannce",) if np.any(calibration.distortion) else ("mammal",))
    cameras, frames, surfaces = RecordingCameras(calibration, render, conditions), [], []
    with atomic_folder(folder) as temporary:
        for index, name in enumerate(formats):
            write_calibration(temporary / "calibrations" / name if index else temporary, calibration, name)
        videos, masks = temporary / "videos_undist", temporary / "simpleclick_undist"
        videos.mkdir()
        masks.mkdir()
        paths = [folder / f"{k}.mp4" for folder in (videos, masks) for k in range(len(calibration))]
        writers = [video_writer(path, cameras.size, frames_per_second, quality_crf) for path in paths]
        for frame, cloud in enumerate(clouds):
            rgb, alpha = cameras.photograph(cloud, frame)
            for writer, image in zip(writers, (*rgb, *alpha.expand(-1, 3, -1, -1)), strict=True):
                writer.send(np.ascontiguousarray(to_uint8(image)))
            chosen = _keyed(conditions.seed, 8, frame).choice(len(cloud), SURFACE_POINTS)
            surfaces.append(cloud.means[chosen].astype(np.float32))
            points = {"centre": cloud.center.tolist(), "keypoints": cloud.keypoints.tolist()}
            frames.append({**points, "body_length": float(cloud.body_length), "pose": cloud.meta})
        for path, writer in zip(paths, writers, strict=True):
            writer.close()
            # ffmpeg ends without a word when the disk fills up: what it wrote must be what it was given.
            if _count_frames(path) != len(frames):
                raise OSError(errno.ENOSPC, f"fewer than {len(frames)} frames could be written", os.fspath(path))
        truth = {"unit": "mm", "keypoint_names": list(KEYPOINT_NAMES), "frames": frames}
        write_json(temporary / "truth.json", truth)
        arrays = {name: np.array([frame[name] for frame in frames]) for name in ("centre", "keypoints")}
        with atomic_write(temporary / "truth.npz") as path, open(path, "wb") as file:
            np.savez_compressed(file, surface=np.stack(surfaces), **arrays)


def record_mouse(settings: MouseSettings) -> int:
    """Writes one mouse walking about, filmed by the real rig, into a new folder; returns the number of cameras."""
    from tqdm import tqdm

    folder = settings.output_dir
    if folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir()):
        raise ValueError(f"--output_dir {folder} is not empty; a recording is written into a new folder")
    calibration, arena = load_real_rig(width=settings.video_width, lens=settings.lens_distortion)
    conditions = RecordingConditions(noise=settings.noise, uneven_light=settings.uneven_light, seed=settings.seed)
    poses = (settings.pose,) if settings.pose else settings.poses or POSES
    clouds = mouse_sequence(
        settings.seed, settings.num_samples, fps=settings.fps, arena_radius=ARENA_REACH, coat=settings.coat, poses=poses
    )
    clouds = tqdm(clouds, total=settings.num_samples, desc="frames", unit="frame", disable=None)
    with owned_folder(folder):
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a killed recording, which had this folder
            shutil.rmtree(leftover)
        write_recording(
            folder, calibration, (stand_in_arena(cloud, arena) for cloud in clouds),
            make_renderer(settings.device), calibration_formats=settings.formats, conditions=conditions,
            frames_per_second=settings.fps,
        )  # fmt: skip
    return len(calibration)
