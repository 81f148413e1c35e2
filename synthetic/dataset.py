"""Rendered samples, whole datasets and raw recordings of synthetic mice."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gslrm.model.gaussians import Gaussians
from gslrm.model.gaussians_renderer import render as render_gaussians
from multiview.cameras import Cameras
from multiview.files import LOCK_FILE, atomic_folder, atomic_write, owned_folder, write_json
from multiview.image import to_uint8
from multiview.rig import ViewRig, load_rig
from multiview.run import REPOSITORY, resolve_device, stoppable
from multiview.sample import Sample, is_complete_sample, open_dataset, write_sample, write_split
from recording.calibration.checks import validate
from recording.calibration.formats import read_calibration, write_calibration
from recording.calibration.model import PIXEL_CENTRE, Calibration
from recording.video import probe
from recording.workers import run_lanes
from synthetic.body_model import BodyModelMice
from synthetic.photograph import Camera, photograph, recording_cameras
from synthetic.scene import KEYPOINT_NAMES, SplatCloud, laboratory_light, make_mouse, mouse_sequence
from synthetic.settings import POSES, MouseSettings
from synthetic.skeleton import BODY_LENGTH

# (cloud, cameras [v]) -> rgb [v, 3, h, w] over black, alpha [v, 1, h, w], mean depth z [v, 1, h, w] where alpha > 0
Render = Callable[[SplatCloud, Cameras], tuple[Tensor, Tensor, Tensor]]

BODY_LENGTH_MM = 73.0  # nose to tail base of an adult mouse, stretched
ARENA_REACH = 0.6  # arena_radius for mouse_sequence (world units; 36 mm): all real cameras see the whole animal
SURFACE_POINTS = 1000  # of each frame's surface kept as truth


def make_renderer(device: str = "cpu") -> Render:
    """Returns the project's rasterizer as a `Render`."""
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
        output = render_gaussians(gaussians, cameras[None].to(target), background=0.0)
        alpha = output.alpha[0].cpu()
        return output.rgb[0].cpu(), alpha, output.depth[0].cpu() / alpha.clamp_min(1e-6)

    return draw


def _keyed(*keys: int) -> np.random.Generator:
    """Random numbers of their own for each purpose, so that asking for one thing does not change another."""
    return np.random.default_rng(np.random.SeedSequence(keys))


def sample_cameras(rig: ViewRig, settings: MouseSettings, index: int) -> Cameras:
    """Returns the rig's cameras in order, then `num_novel_views` random ones."""
    size, count, rng = settings.image_size, settings.num_novel_views, _keyed(settings.seed, index, 1)
    cameras = rig.cameras(size)
    if not count:
        return cameras
    return cameras.joined(rig.novel_cameras(count, size, rng, varied=settings.varied_cameras))


def make_sample(
    rig: ViewRig, settings: MouseSettings, index: int, render: Render, make_cloud: Callable = make_mouse
) -> Sample:
    """Sample `index` of the series: the rig's views in order, then random ones. Depends on the arguments only.

    make_cloud: draws the animal, called like `scene.make_mouse`. A photographic sample has a laboratory's light, the
    animal a little off its place and size, the rig's views as `photograph` gives them; novel views and depth stay true.
    """
    seed, heading = settings.seed, settings.heading_deg  # center and spread
    if heading:
        heading = float(heading[0] + _keyed(seed, index, 2).uniform(-1, 1) * heading[1])
    # A larger share of photographs only adds some.
    photographed, rng = _keyed(seed, index, 5).random() < settings.photographic, _keyed(seed, index, 6)
    light, place = laboratory_light(rng) if photographed else None, _keyed(seed, index, 7)
    pose = str(place.choice(settings.poses)) if settings.poses else settings.pose
    cloud = make_cloud(seed, index, coat=settings.coat, pose=pose, heading_deg=heading, light=light)
    if settings.size:
        cloud = cloud.transformed(scale=place.uniform(*settings.size) / cloud.body_length)
    if settings.off_center:
        width = rig.distance / rig.focal  # of the image at the body's distance, world units
        cloud = cloud.transformed(offset=place.uniform(-settings.off_center, settings.off_center, 3) * width)
    if settings.elevation:  # nobody knows a photograph's elevation: the animal leans towards the camera instead
        view, raised = rig.views[rig.reference_view], _keyed(seed, index, 8).uniform(*settings.elevation)
        cloud.meta["input_elevation_deg"] = round(float(raised), 2)
        cloud = cloud.transformed(rotate_z_deg=view.azimuth_deg, tilt_deg=raised - view.elevation_deg)
        cloud = cloud.transformed(rotate_z_deg=-view.azimuth_deg)
    if photographed:
        camera = Camera.draw(rng)
        # A photograph is framed by its mask, not by the animal's true size and center.
        scale, shift = rng.uniform(0.88, 1.12), rng.uniform(-0.06, 0.06, 3)
        cloud = replace(cloud, rgb=camera.toned(cloud.rgb)).transformed(scale=scale, offset=shift)
    cameras = sample_cameras(rig, settings, index)
    rgb, alpha, mean_depth = render(cloud, cameras)
    straight = torch.where(alpha > 1 / 512, rgb / alpha.clamp_min(1 / 512), torch.zeros_like(rgb))
    keypoints = np.round(cloud.keypoints.astype(float), 5).tolist()
    sample = Sample(
        id=f"sample_{index:06d}",
        rgba=torch.cat([straight.clamp(0, 1), alpha.clamp(0, 1)], dim=1),
        cameras=cameras,
        view_names=[*rig.view_names, *[None] * settings.num_novel_views],
        depth=torch.where(alpha > 0.5, mean_depth, torch.zeros_like(mean_depth)) if settings.depth else None,
        extra={"synthetic": cloud.meta, "body_length": cloud.body_length, "floor": cloud.floor, "keypoints": keypoints},
    )
    if photographed:
        sample = photograph(sample, len(rig.view_names), camera, rng)
        sample.extra["photograph"] |= {"scale": round(float(scale), 4), "shift": np.round(shift, 4).tolist()}
    return sample


def _write_lane(settings: MouseSettings, lane: int) -> Iterator[None]:
    """Writes every workers-th sample from `lane` on, where it is not there yet; yields after each."""
    torch.set_num_threads(1)
    rig, render, make_cloud = load_rig(settings.rig), make_renderer(settings.device), make_mouse
    if settings.body_model:
        make_cloud = BodyModelMice(settings.body_model, settings.body_model_poses)
    for index in range(lane, settings.num_samples + settings.workers, settings.workers):  # lanes are equally long
        folder = settings.output_dir / f"sample_{index:06d}"
        if index < settings.num_samples and not is_complete_sample(folder):
            write_sample(folder, make_sample(rig, settings, index, render, make_cloud))
        yield


def write_dataset(settings: MouseSettings) -> None:
    """Writes or continues the dataset folder; complete samples are kept, split lists written last."""
    folder, rig, count = settings.output_dir, load_rig(settings.rig), settings.num_samples
    resolve_device(settings.device)  # as the body model's files: refused before anything is written
    if settings.body_model:
        BodyModelMice(settings.body_model, settings.body_model_poses)
    # Opened before it is owned, since a foreign folder must stay untouched; and again, now that nobody else changes it.
    open_dataset(folder, rig, settings.parameters)
    steps = math.ceil(count / settings.workers)
    done = run_lanes(partial(_write_lane, settings), range(settings.workers), steps, workers=settings.workers)
    with owned_folder(folder), closing(done):
        open_dataset(folder, rig, settings.parameters)
        for _ in stoppable(tqdm(done, total=steps * settings.workers, desc="mice", unit="mouse", disable=None)):
            pass
        # Spread evenly; a dataset that grows never moves a sample to the other side.
        quota = [math.floor(index * settings.val_fraction + 1e-9) for index in range(count + 1)]
        for name, added in (("train", 0), ("val", 1)):
            chosen = [folder / f"sample_{i:06d}" for i in range(count) if quota[i + 1] - quota[i] == added]
            if chosen:
                write_split(folder / f"{settings.prefix}_{name}.txt", chosen)


def load_real_rig(*, width: int | None = None, lens: str = "none") -> tuple[Calibration, dict]:
    """Returns the calibration of the real recording that ships with the project, and its arena, {centre [3] mm ...}.
    width: of the images, even; by default as filmed. lens: `none`, or `real` with its distortion and skew."""
    path = REPOSITORY / "configs" / "rigs" / "recordings" / "dannce_mouse1.json"
    calibration, content = read_calibration(path), json.loads(path.read_text())
    if lens == "real":
        raw = [frame["raw"] for frame in content["frames"]]
        K, distortion = (np.array([camera[name] for camera in raw]) for name in ("K", "distortion"))
        K[:, :2, 2] += PIXEL_CENTRE
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
    writer = imageio_ffmpeg.write_frames(
        os.fspath(path), size, fps=frames_per_second, codec="libx264", quality=None, macro_block_size=2,
        pix_fmt_out="yuv444p" if crf == 0 else "yuv420p",
        output_params=["-crf", str(crf), "-preset", "veryfast", "-threads", "1", "-f", "mp4"],
    )  # fmt: skip
    writer.send(None)
    return writer


def write_recording(
    folder: Path | str, calibration: Calibration, clouds: Iterable[SplatCloud], render: Callable, *,
    calibration_formats: Sequence[str] = (), frames_per_second: float = 100.0, quality_crf: int = 12, seed: int = 0,
    **conditions,
) -> None:  # fmt: skip
    """Writes a recording in MAMMAL's layout: videos_undist/k.mp4, simpleclick_undist/k.mp4, new_cam.pkl, and the truth.

    clouds: one per frame, in the calibration's world and unit (mm). calibration_formats: of `calibration.FORMATS`; the
    first lies in the folder, where it is found without being named, every other one in calibrations/<format>/. Left
    out: mammal, or dannce where there is lens distortion, which mammal cannot hold. quality_crf: x264's constant rate
    factor; 0 also keeps full color resolution. conditions: of `recording_cameras`. The folder appears when complete.
    truth.json: unit, keypoint_names, frames of {centre [3], keypoints [n, 3], body_length, pose}. truth.npz: centre
    [t, 3], keypoints [t, n, 3], surface [t, SURFACE_POINTS, 3] (points of the animal's surface, drawn once per frame).
    """
    formats = calibration_formats or (("dannce",) if np.any(calibration.distortion) else ("mammal",))
    shoot, frames, surfaces = recording_cameras(calibration, render, seed=seed, **conditions), [], []
    with atomic_folder(folder) as temporary:
        for index, name in enumerate(formats):
            write_calibration(temporary / "calibrations" / name if index else temporary, calibration, name)
        paths = []
        for part in ("videos_undist", "simpleclick_undist"):
            (temporary / part).mkdir()
            paths += [temporary / part / f"{camera}.mp4" for camera in range(len(calibration))]
        writers = [video_writer(path, calibration.sizes[0], frames_per_second, quality_crf) for path in paths]
        for frame, cloud in enumerate(clouds):
            rgb, alpha = shoot(cloud, frame)
            for writer, image in zip(writers, (*rgb, *alpha.expand(-1, 3, -1, -1)), strict=True):
                writer.send(np.ascontiguousarray(to_uint8(image)))
            chosen = _keyed(seed, 8, frame).choice(len(cloud.means), SURFACE_POINTS)
            surfaces.append(cloud.means[chosen].astype(np.float32))
            points = {"centre": cloud.center.tolist(), "keypoints": cloud.keypoints.tolist()}
            frames.append({**points, "body_length": float(cloud.body_length), "pose": cloud.meta})
        for path, writer in zip(paths, writers, strict=True):
            writer.close()
            try:  # ffmpeg ends without a word when the disk fills up: what it wrote must be what it was given
                written = probe([path]).num_frames
            except ValueError:
                written = 0
            if written != len(frames):
                raise OSError(errno.ENOSPC, f"fewer than {len(frames)} frames could be written", os.fspath(path))
        truth = {"unit": "mm", "keypoint_names": list(KEYPOINT_NAMES), "frames": frames}
        write_json(temporary / "truth.json", truth)
        arrays = {name: np.array([frame[name] for frame in frames]) for name in ("centre", "keypoints")}
        with atomic_write(temporary / "truth.npz") as path, open(path, "wb") as file:
            np.savez_compressed(file, surface=np.stack(surfaces), **arrays)


def record_mouse(settings: MouseSettings) -> int:
    """Writes one mouse walking about, filmed by the real rig, into a new folder; returns the number of cameras."""
    folder, count = settings.output_dir, settings.num_samples
    if folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir()):
        raise ValueError(f"--output_dir {folder} is not empty; a recording is written into a new folder")
    calibration, arena = load_real_rig(width=settings.video_width, lens=settings.lens_distortion)
    clouds = mouse_sequence(
        settings.seed, count, fps=settings.fps, arena_radius=ARENA_REACH, coat=settings.coat,
        poses=(settings.pose,) if settings.pose else settings.poses or POSES,
    )  # fmt: skip
    clouds = stoppable(tqdm(clouds, total=count, desc="frames", unit="frame", disable=None))
    with owned_folder(folder):
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a killed recording, which had this folder
            shutil.rmtree(leftover)
        write_recording(
            folder, calibration, (stand_in_arena(cloud, arena) for cloud in clouds), make_renderer(settings.device),
            calibration_formats=settings.formats, frames_per_second=settings.fps, seed=settings.seed,
            noise=settings.noise, uneven_light=settings.uneven_light,
        )  # fmt: skip
    return len(calibration)
