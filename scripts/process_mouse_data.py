"""Turns a raw recording (synchronized videos, mask videos, one calibration) into a dataset of posed RGBA samples.

Looked for: video_dir/0.mp4 ... (or Camera1/0.mp4 ..., DANNCE; or folders of images, 0/ ... or Camera1/ ...);
meta_dir/simpleclick_undist/ or masks/ with mask videos of the same names; in meta_dir one of new_cam.pkl (MAMMAL),
label3d_dannce.mat (DANNCE), calibration.toml (Anipose), transforms.json (NeRF, instant-ngp, Blender's exporters),
blender_cameras.json, opencv_cameras.json, or a COLMAP model (its folder, or colmap/ or sparse/0/ there). Video k
belongs to camera k; which view that is follows from where the camera stands.

Framing says how large the animal stands in the images and what the cameras written beside them say:
  facelift  the body fills half the image, cameras say distance 2.7 and a 50-degree lens, which is what the released
            weights and the default rig expect; the perspective error this makes is reported
  fill      the same images, cameras say the longer distance and focal length that are true; for models trained so
  exact     distance 2.7 and a 50-degree lens are true; the animal is small in the image
Poses:
  exact     every camera's measured direction is written; the dataset's rig is the measured one
  nearest   the rig's directions are written; the error this makes is reported; the dataset's rig is the rig itself
The animal's center is that of the visual hull without tail and legs, or (--centre triangulate: farther off) where the
rays through the masks' centers meet. --heading turns every sample so that the animal faces azimuth 0, and needs a rig
that counts from there (--rig facelift6).

Repeating a command continues it, also after a kill. Parts of a dataset can be made side by side, by one command per
--shard i/n; whichever ends last writes the split lists and the report.
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, add_fields, from_arguments
from multiview.run import STOP_SIGNALS, STOPPED, main_guard
from recording.settings import ImportSettings


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, ImportSettings | None]:
    """Returns the parsed flags, and the settings of an import, or None where only the calibration is looked at."""
    parser = Parser(description=__doc__, formatter_class=Formatter)
    add_fields(parser, ImportSettings)
    look = parser.add_argument_group("a look at the calibration (--calibration or --meta_dir) instead of an import")
    look.add_argument("--check", action="store_true", help="draw and tabulate the calibration, reproject points, stop")
    look.add_argument(
        "--check_points", type=Path, default=None,
        help="3D points: .npy [n, 3]; .npz, .json with points_3d (points_2d); label3d_dannce.mat (which finds its own)",
    )  # fmt: skip
    look.add_argument("--check_output", type=Path, default=Path("calibration_check.png"), help="the image")
    parsed = parser.parse_args(arguments)
    if parsed.check and parsed.calibration is None and parsed.meta_dir is None:
        parser.error("--check needs --calibration or --meta_dir")
    if parsed.check and parsed.up in ("floor", "rig"):
        parser.error(f"--check needs an axis for --up, got {parsed.up}")
    try:
        return parsed, None if parsed.check else from_arguments(ImportSettings, parsed)
    except ValueError as error:
        parser.error(str(error))


def stop(number: int, _) -> None:
    """Ends the import in an orderly way: what is complete stays."""
    print(f"stopped by {signal.Signals(number).name}; repeat the command to continue", flush=True)
    raise SystemExit(STOPPED)


def next_commands(folder: Path) -> list[str]:
    """What one types next, from this project's folder: the shipped models fitted to the dataset, then used."""
    from multiview.sample import split_lists

    held_out, name = (split_lists(folder)[1].read_text().split() or ["sample_000000"])[0], folder.resolve().name
    paths = folder, folder / held_out, f"outputs/{name}", f"checkpoints/gslrm/adapted_{name}"
    data, sample, out, stage2 = (shlex.quote(str(path)) for path in paths)
    both = f"--mvdiffusion_checkpoint {shlex.quote(f'checkpoints/mvdiffusion/adapted_{name}')} --checkpoint {stage2}"
    return [
        f"python scripts/check_dataset.py --data {data} --output_dir {shlex.quote(f'{folder}_report')}",
        f"python train_gslrm.py --config configs/adapt_demo.yaml --data {data}",
        f"python train_diffusion.py --config configs/adapt_demo_mvdiffusion.yaml --data {data}",
        f"python inference_mouse.py {sample} --checkpoint {stage2} --output_dir {out}",
        f"python inference_mouse.py {sample}/images/cam_000.png {both} --output_dir {out}",
    ]


def main(arguments: list[str] | None = None) -> None:
    options, settings = parse_arguments(arguments)
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    if settings is None:
        from recording.calibration.formats import find_calibration
        from recording.quality.check import check_calibration

        path, where = options.calibration or find_calibration(options.meta_dir), options.video_dir
        check_calibration(path, options.check_points, options.check_output, up=options.up, video_dir=where, say=print)
        return
    from recording.importer import process_recording

    report = process_recording(settings, say=print)
    if report is None:
        return
    print(f"quality: {report['grade']}; see {settings.output_dir / 'quality_report.html'}")
    for reason in report["reasons"]:
        print(f"  - {reason}")
    told = "next, the shipped models fitted to this recording (docs/guides/your_animals.md):"
    print(told, *next_commands(settings.output_dir), sep="\n  ")
    if report["skipped_frames"] and settings.on_bad_frame == "list":
        raise ValueError(
            f"{report['skipped_frames']} frames were left out for empty masks, {report['num_samples']} are imported; "
            "segment these frames again and import into a new folder, or agree to it with --on_bad_frame skip"
        )


if __name__ == "__main__":
    main_guard(main)
