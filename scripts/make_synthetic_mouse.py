"""Makes a dataset of synthetic mice: posed RGBA views for any rig, extra novel views, depth.

Every sample depends on --seed and its number only. Repeating a command continues it and keeps complete samples.

With --as_recording it writes a raw recording instead, as a laboratory would have it: one mouse walking about, filmed by
the six cameras of the public markerless_mouse_1 rig (videos_undist/, simpleclick_undist/, new_cam.pkl, and the truth in
truth.json and truth.npz: centre, keypoints, points of the surface), ready for scripts/process_mouse_data.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import main_guard

# Written out, so that --help needs no heavy import; a test compares them with the package.
COATS = ("black", "agouti", "brown", "grey", "white", "piebald")
POSES = ("walk", "stand", "crouch", "turn", "rear", "groom", "sniff", "rest")
CALIBRATION_FORMATS = (
    "mammal", "dannce", "anipose", "transforms", "colmap_text", "colmap_binary", "opencv", "blender"
)  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="dataset folder, new or to be continued")
    parser.add_argument("--num_samples", type=int, default=100, help="mice; a larger number extends a dataset")
    parser.add_argument("--rig", default="mouse6", help="a rig's name (configs/rigs) or a YAML/JSON file")
    parser.add_argument("--image_size", type=int, default=128, help="pixels, square pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the series of mice")
    parser.add_argument("--workers", type=int, default=2, help="processes; the result does not depend on it")
    parser.add_argument("--num_novel_views", type=int, default=0, help="random views appended after the rig's")
    parser.add_argument("--depth", action="store_true", help="write depth pictures too")
    parser.add_argument(
        "--heading_deg", nargs=2, type=float, metavar=("CENTRE", "SPREAD"), default=None,
        help="nose towards the rig's azimuth CENTRE +- SPREAD degrees; left out: any heading",
    )  # fmt: skip
    parser.add_argument("--coat", choices=COATS, default=None, help="left out: drawn at random")
    parser.add_argument("--pose", choices=POSES, default=None, help="left out: drawn at random")
    parser.add_argument(
        "--photographic", type=float, default=0.0, metavar="SHARE",
        help="share 0..1 of the mice whose rig views look like cut-out photographs: other light, framing, blur, noise, "
        "imperfect masks; novel views stay clean",
    )  # fmt: skip
    parser.add_argument("--val_fraction", type=float, default=0.2, help="share of the mice kept for validation")
    parser.add_argument("--prefix", default="data_mouse", help="names the split lists: <prefix>_train.txt, _val.txt")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto; draws the pictures")
    parser.add_argument("--body_model", type=Path, default=None, help="an external skinned mesh (.npz) to draw instead")
    parser.add_argument("--body_model_poses", type=Path, default=None, help="its pose library (.npz)")
    parser.add_argument("--as_recording", action="store_true", help="write a raw recording of --num_samples frames")
    add_recording_flags(parser)
    parsed = parser.parse_args(arguments)
    for name, low in (("num_samples", 1), ("image_size", 8), ("seed", 0), ("workers", 1), ("num_novel_views", 0)):
        if getattr(parsed, name) < low:
            parser.error(f"--{name} must be at least {low}, got {getattr(parsed, name)}")
    if parsed.video_width < 64 or parsed.video_width % 2:
        parser.error(f"--video_width must be even and at least 64, got {parsed.video_width}")
    if parsed.fps <= 0:
        parser.error(f"--fps must be positive, got {parsed.fps}")
    if parsed.as_recording and parsed.body_model is not None:
        parser.error("--as_recording films the procedural mouse; leave --body_model out")
    if parsed.noise < 0:
        parser.error(f"--noise must not be negative, got {parsed.noise}")
    filmed = parsed.lens_distortion != "none" or parsed.noise or parsed.uneven_light
    if filmed and not parsed.as_recording:
        parser.error("--lens_distortion, --noise and --uneven_light are a recording's: add --as_recording")
    if not 0.0 <= parsed.val_fraction < 1.0:
        parser.error(f"--val_fraction must be in [0, 1), got {parsed.val_fraction}")
    if not 0.0 <= parsed.photographic <= 1.0:
        parser.error(f"--photographic must be in [0, 1], got {parsed.photographic}")
    if parsed.photographic and parsed.as_recording:
        parser.error("--photographic is a dataset's; a recording has --lens_distortion, --noise and --uneven_light")
    if parsed.body_model_poses is not None and parsed.body_model is None:
        parser.error("--body_model_poses needs --body_model")
    if parsed.body_model is not None and parsed.pose is not None:
        parser.error("--pose names procedural poses; with --body_model poses come from --body_model_poses")
    return parsed


def add_recording_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that only --as_recording uses."""
    parser.add_argument(
        "--lens_distortion", choices=("none", "real"), default="none",
        help="of the recording: undistorted pictures, or photographs through the rig's real lenses (skew included)",
    )  # fmt: skip
    parser.add_argument(
        "--noise", type=float, default=0.0, help="of the recording's sensors: deviation at white, in levels of 255"
    )
    parser.add_argument(
        "--uneven_light", action="store_true",
        help="in the recording: uneven gain, vignetting, an exposure per camera, a textured wall behind the animal",
    )  # fmt: skip
    parser.add_argument(
        "--calibration_formats", type=calibration_formats, default=(), metavar="A,B,...",
        help="of the recording: mammal, dannce, anipose, transforms, colmap (or colmap_text), opencv, blender; the "
        "first lies in the folder, the others in calibrations/; left out: mammal, or dannce with real lens distortion",
    )  # fmt: skip
    parser.add_argument("--video_width", type=int, default=1152, help="pixels, of the recording's videos")
    parser.add_argument("--fps", type=float, default=25.0, help="frames per second of the recording")


def calibration_formats(text: str) -> tuple[str, ...]:
    """Formats of `recording.calibration.FORMATS`, parted by commas; colmap is the binary one."""
    names = tuple("colmap_binary" if name == "colmap" else name for name in text.split(","))
    unknown = [name for name in names if name not in CALIBRATION_FORMATS]
    if unknown or len(set(names)) != len(names):
        known = ", ".join(CALIBRATION_FORMATS)
        raise argparse.ArgumentTypeError(f"different ones of {known}, parted by commas, are expected, got {text!r}")
    return names


def make_renderer(device: str = "cpu"):
    """The project's rasterizer behind `synthetic.dataset.Render`."""
    import torch

    from gslrm.model.gaussians import Gaussians
    from gslrm.model.gaussians_renderer import render
    from multiview.run import resolve_device

    target = resolve_device(device)

    @torch.no_grad()
    def draw(cloud, cameras):
        rgb, opacity = torch.from_numpy(cloud.rgb), torch.from_numpy(cloud.opacity)
        gaussians = Gaussians(
            xyz=torch.from_numpy(cloud.means)[None],
            features=((rgb - 0.5) / 0.28209479177387814)[None, :, None],
            scaling=torch.from_numpy(cloud.log_scales)[None],
            rotation=torch.from_numpy(cloud.quats)[None],
            opacity=torch.logit(opacity)[None, :, None],
        ).to(target)
        output = render(gaussians, cameras[None].to(target), background=0.0)
        alpha = output.alpha[0].cpu()
        return output.rgb[0].cpu(), alpha, output.depth[0].cpu() / alpha.clamp_min(1e-6)

    return draw


_worker: dict = {}


def start_worker(options: argparse.Namespace) -> None:
    """Prepares one process: one thread, its renderer, its rig, its body model."""
    import numba
    import torch

    from multiview.rig import load_rig

    torch.set_num_threads(1)
    numba.set_num_threads(1)
    make_cloud = None
    if options.body_model is not None:
        from synthetic.body_model import BodyModelMice

        make_cloud = BodyModelMice.load(options.body_model, options.body_model_poses)
    _worker.update(options=options, rig=load_rig(options.rig), render=make_renderer(options.device), cloud=make_cloud)


def write_one(index: int) -> None:
    from multiview.sample import is_complete_sample, write_sample
    from synthetic.dataset import make_sample, sample_name

    options = _worker["options"]
    folder = options.output_dir / sample_name(index)
    if is_complete_sample(folder):
        return
    sample = make_sample(
        _worker["rig"], options.image_size, options.seed, index, _worker["render"],
        num_novel_views=options.num_novel_views, depth=options.depth, heading_deg=options.heading_deg,
        coat=options.coat, pose=options.pose, make_cloud=_worker["cloud"],
        photographic=options.photographic,
    )  # fmt: skip
    write_sample(folder, sample)


def write_raw_recording(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from recording.film import FilmConditions
    from recording.write import ARENA_REACH, load_real_rig, stand_in_arena, write_recording
    from synthetic.motion import mouse_sequence

    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        raise ValueError(f"--output_dir {options.output_dir} is not empty; a recording is written into a new folder")
    calibration, arena = load_real_rig(width=options.video_width, lens=options.lens_distortion)
    conditions = FilmConditions(noise=options.noise, uneven_light=options.uneven_light, seed=options.seed)
    poses = {"poses": (options.pose,)} if options.pose else {}
    clouds = mouse_sequence(
        options.seed, options.num_samples, fps=options.fps, arena_radius=ARENA_REACH, coat=options.coat, **poses
    )
    clouds = tqdm(clouds, total=options.num_samples, desc="frames", unit="frame", disable=None)
    write_recording(
        options.output_dir, calibration, (stand_in_arena(cloud, arena) for cloud in clouds),
        make_renderer(options.device), calibration_formats=options.calibration_formats, conditions=conditions,
        frames_per_second=options.fps,
    )  # fmt: skip
    print(f"{options.output_dir}: {options.num_samples} frames from {len(calibration)} cameras; import it with")
    print(
        f"python scripts/process_mouse_data.py --video_dir {options.output_dir}/videos_undist "
        f"--meta_dir {options.output_dir} --output_dir {options.output_dir}_samples --num_samples 2000 --image_size 512"
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.as_recording:
        return write_raw_recording(options)
    import multiprocessing
    import os

    from tqdm import tqdm

    from multiview.rig import load_rig
    from multiview.sample import open_dataset
    from synthetic.dataset import write_splits

    for name in ("body_model", "body_model_poses"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise ValueError(f"--{name} {path} does not exist")
    parameters = {
        "source": "synthetic",
        **{name: getattr(options, name) for name in ("seed", "image_size", "num_novel_views", "depth", "heading_deg")},
        **{name: getattr(options, name) for name in ("coat", "pose", "val_fraction", "prefix")},
        "body_model": options.body_model.name if options.body_model else None,
        "body_model_poses": options.body_model_poses.name if options.body_model_poses else None,
    }
    if options.photographic:  # left out at 0: datasets made before the flag existed can be continued
        parameters["photographic"] = options.photographic
    open_dataset(options.output_dir, load_rig(options.rig), parameters)
    indices = range(options.num_samples)
    progress = {"total": options.num_samples, "desc": "mice", "unit": "mouse", "disable": None}
    if options.workers == 1:
        start_worker(options)
        for index in tqdm(indices, **progress):
            write_one(index)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the workers, before they import torch
        # Spawned, not forked: numba's thread pools do not survive a fork.
        with multiprocessing.get_context("spawn").Pool(options.workers, start_worker, (options,)) as pool:
            for _ in tqdm(pool.imap_unordered(write_one, indices, chunksize=4), **progress):
                pass
    write_splits(options.output_dir, options.prefix, options.num_samples, options.val_fraction)
    print(f"{options.output_dir}: {options.num_samples} mice, rig {options.rig}")


if __name__ == "__main__":
    main_guard(main)
