"""Turns a raw recording (synchronised videos, mask videos, one calibration) into a dataset of posed RGBA samples.

Looked for: video_dir/0.mp4 ... (or Camera1/0.mp4 ..., DANNCE; or folders of pictures, 0/ ... or Camera1/ ...);
meta_dir/simpleclick_undist/ or masks/ with mask videos of the same names; in meta_dir one of new_cam.pkl (MAMMAL),
label3d_dannce.mat (DANNCE), calibration.toml (Anipose), transforms.json (NeRF, instant-ngp, Blender's exporters),
blender_cameras.json, opencv_cameras.json, or a COLMAP model (its folder, or colmap/ or sparse/0/ there). Video k
belongs to camera k; which view that is follows from where the camera stands.

Framing says how large the animal stands in the pictures and what the cameras written beside them say:
  facelift  the body fills half the picture, cameras say distance 2.7 and a 50-degree lens, which is what the released
            weights and the default rig expect; the perspective error this makes is reported
  fill      the same pictures, cameras say the longer distance and focal length that are true; for models trained so
  exact     distance 2.7 and a 50-degree lens are true; the animal is small in the picture
Poses:
  exact     every camera's measured direction is written; the dataset's rig is the measured one
  nearest   the rig's directions are written; the error this makes is reported; the dataset's rig is the rig itself
The animal's centre is that of the visual hull without tail and legs, or (--centre triangulate: farther off) where the
rays through the masks' centres meet. --heading turns every sample so that the animal faces azimuth 0, and needs a rig
that counts from there (--rig facelift6).

Repeating a command continues it, also after a kill. Parts of a dataset can be made side by side, by one command per
--shard i/n; whichever ends last writes the split lists and the report.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import main_guard


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--video_dir", type=Path, help="folder of the videos (required)")
    parser.add_argument("--meta_dir", type=Path, help="folder of the calibration and the mask videos (required)")
    parser.add_argument("--output_dir", type=Path, help="dataset folder, new or to be continued (required)")
    parser.add_argument("--num_samples", type=int, default=2000, help="frames, evenly spaced over the recording")
    parser.add_argument("--image_size", type=int, default=512, help="pixels, square pictures")
    parser.add_argument("--rig", default="mouse6", help="whose view names to use: a rig, its file, or 'calibrated'")
    parser.add_argument("--framing", choices=("exact", "fill", "facelift"), default="facelift", help="see above")
    parser.add_argument("--poses", choices=("exact", "nearest"), default="exact", help="see above")
    add_masks_and_geometry(parser)
    parser.add_argument(
        "--split", choices=("blocks", "random"), default="blocks", help="80/20 by blocks of time, or at random"
    )
    parser.add_argument("--split_seed", type=int, default=0, help="of --split random")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="i/n", help="part i of n, from 0")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes, at most one per camera; the result does not depend on it"
    )
    look = parser.add_argument_group("a look at the calibration (--calibration or --meta_dir) instead of an import")
    look.add_argument("--check", action="store_true", help="draw and tabulate the calibration, reproject points, stop")
    look.add_argument(
        "--check_points", type=Path, default=None,
        help="3D points: .npy [n, 3]; .npz, .json with points_3d (points_2d); label3d_dannce.mat (which finds its own)",
    )  # fmt: skip
    look.add_argument("--check_output", type=Path, default=Path("calibration_check.png"), help="the picture")
    parsed = parser.parse_args(arguments)
    if parsed.check and parsed.calibration is None and parsed.meta_dir is None:
        parser.error("--check needs --calibration or --meta_dir")
    if parsed.check and parsed.up in ("floor", "rig"):
        parser.error(f"--check needs an axis for --up, got {parsed.up}")
    missing = [f"--{name}" for name in ("video_dir", "meta_dir", "output_dir") if getattr(parsed, name) is None]
    if missing and not parsed.check:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    least_values = {"num_samples": 1, "image_size": 16, "workers": 1, "smooth_frames": 0, "split_seed": 0}
    for name, least in least_values.items():
        if getattr(parsed, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(parsed, name)}")
    if parsed.body_length is not None and parsed.body_length <= 0:
        parser.error(f"--body_length must be positive, got {parsed.body_length}")
    parsed.time_jumps = tuple(parsed.time_jumps)
    return parsed


def add_masks_and_geometry(parser: argparse.ArgumentParser) -> None:
    """Where the masks come from, and what is done about the animal's place."""
    parser.add_argument(
        "--scale", choices=("dataset", "sample"), default="dataset",
        help="one world scale, or one per sample at which its own mean camera distance is the rig's",
    )  # fmt: skip
    parser.add_argument(
        "--segment", choices=("none", "median", "mog2", "rembg"), default="none",
        help="find the masks: by a background that stays (median, mog2) or a network (rembg)",
    )  # fmt: skip
    parser.add_argument("--mask_dir", type=Path, default=None, help="folder of the mask videos, if not in meta_dir")
    parser.add_argument("--calibration", type=Path, default=None, help="calibration file, if not the one in meta_dir")
    parser.add_argument(
        "--up", choices=("z", "-z", "y", "-y", "x", "-x", "floor", "rig"), default="z",
        help="the axis that is up, or found: from the floor the animal walks on, or from the cameras' mean",
    )  # fmt: skip
    parser.add_argument("--centre", choices=("hull", "triangulate"), default="hull", help="see above")
    parser.add_argument("--smooth_frames", type=int, default=0, help="frames of video over which centres are averaged")
    parser.add_argument(
        "--time_jumps", type=int, nargs="*", default=(), metavar="FRAME",
        help="first frames after a gap in time; nothing is smoothed across",
    )  # fmt: skip
    parser.add_argument(
        "--heading", choices=("none", "motion", "pca"), default="none",
        help="turn samples by the animal's front: its way of walking, or the end without a tail",
    )  # fmt: skip
    parser.add_argument(
        "--reference_camera",
        type=int,
        default=None,
        help="camera that is the rig's reference view; left out: the best fit",
    )
    parser.add_argument(
        "--body_length",
        type=float,
        default=None,
        help="nose to tail base, in the calibration's unit; left out: measured",
    )
    parser.add_argument("--on_bad_frame", choices=("error", "skip"), default="error", help="when a mask is empty")


def shard(text: str) -> tuple[int, int]:
    """i/n as two numbers."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"i/n with 0 <= i < n is expected, got {text!r}")
    return int(index), int(count)


def look_at_calibration(options: argparse.Namespace) -> None:
    from recording.calibration import find_calibration
    from recording.quality.check import check_calibration

    path = options.calibration or find_calibration(options.meta_dir)
    video_dir = options.video_dir
    check_calibration(path, options.check_points, options.check_output, up=options.up, video_dir=video_dir, say=print)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.check:
        return look_at_calibration(options)
    for name in ("check", "check_points", "check_output"):
        delattr(options, name)
    from recording.process import process_recording
    from recording.settings import ImportSettings

    report = process_recording(ImportSettings(**vars(options)), say=print)
    if report is None:
        return
    print(f"quality: {report['grade']}; see {options.output_dir / 'quality_report.html'}")
    for reason in report["reasons"]:
        print(f"  - {reason}")


if __name__ == "__main__":
    main_guard(main)
