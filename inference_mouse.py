"""One photograph of a mouse (or a folder, a video, posed views) to a 3D Gaussian model: views, PLY and turntable.

Without checkpoint flags the small demo models are used. Each result goes to <output_dir>/<stem>/.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from multiview.config import add_fields, from_arguments
from multiview.run import main_guard
from pipeline.artifacts import Checkpoints, Options, parse_with_overrides

EXPORTS = ("splat", "ply_compressed")
# Images that no library here can read: named as failed, where a text file in the folder is only mentioned.
FOREIGN_SUFFIXES = {".heic", ".heif", ".jxl", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw"}


def parse_arguments() -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input_image", type=Path, help="one photograph (RGBA: its alpha is the mask)")
    source.add_argument("--input_dir", type=Path, help="every photograph in a folder")
    source.add_argument("--sample_dir", type=Path, help="a sample folder of posed views: Stage 2 only")
    source.add_argument("--input_video", type=Path, help="frames of a video, see video_stride")
    add_fields(parser, Checkpoints)
    parser.add_argument("--seed", type=int, default=0, help="of each photograph, wherever it stands in a folder")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--no_filter", action="store_true", help="keep every Gaussian")
    parser.add_argument("--turntable_views", type=int, default=120, help="frames of turntable.mp4 (120); 0 writes none")
    parser.add_argument(
        "--export", type=export_formats, default=(), metavar="FORMAT[,FORMAT]",
        help=f"also gaussians.splat or gaussians.compressed.ply: {', '.join(EXPORTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--mesh", nargs="?", choices=("ply", "glb"), const="ply",
        help="also mesh.ply (the value may be left out) or mesh.glb; needs requirements-extra.txt",
    )  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="default: outputs")
    arguments, options = parse_with_overrides(parser, Options)
    if arguments.turntable_views < 0:
        parser.error("--turntable_views must be at least 0")
    return arguments, options


def export_formats(text: str) -> tuple[str, ...]:
    """An argparse type: comma-separated names in EXPORTS."""
    names = tuple(text.split(","))
    if not set(names) <= set(EXPORTS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(EXPORTS)}, got {text!r}")
    return names


def main() -> None:
    arguments, options = parse_arguments()
    from gslrm.model.rasterizers import warm_up

    if not arguments.device.startswith("cuda"):
        warm_up.start()  # the first command of an installation compiles kernels, beside the imports that follow
    from tqdm import tqdm

    from multiview.run import check_output_folder, stoppable
    from pipeline import MouseFaceLift, PhotographError

    check_output_folder(arguments.output_dir)
    if arguments.mesh is not None:
        from gslrm.model.mesh import check_libraries

        check_libraries(f".{arguments.mesh}")
    posed, failed = arguments.sample_dir is not None, {}
    # Inputs first: a wrong path is told before models are loaded.
    jobs = [] if posed else list_jobs(arguments, options.video_stride, failed)
    model = MouseFaceLift.load(
        device=arguments.device, stages="2" if posed else "full", options=options,
        **vars(from_arguments(Checkpoints, arguments)),
    )  # fmt: skip
    save = {
        "turntable_views": arguments.turntable_views, "turntable_size": options.turntable_size,
        "export": arguments.export, "mesh": arguments.mesh, "maps": options.maps, "sheet": options.sheet,
    }  # fmt: skip
    if posed:
        reconstruct_sample(model, arguments, save)
        return
    print(f"rig {model.rig.name}: {model.rig.num_views} views; embeddings, UNet and GS-LRM agree")
    done = 0
    for name, image in stoppable(jobs):
        bar = partial(tqdm, desc=f"{name}: generating {model.rig.num_views} views", unit="step", disable=None)
        try:
            result = model(
                image, seed=arguments.seed, crop=options.crop, keep_input_view=options.keep_input_view,
                filtered=not arguments.no_filter, name=name, progress=bar,
            )  # fmt: skip
        except PhotographError as error:  # one bad photograph does not end the others
            if arguments.input_image is not None:
                raise
            leave_out(name, str(error), failed)
            continue
        result.save(arguments.output_dir / name, **save)
        report(arguments.output_dir / name, result)
        done += 1
    if failed:
        raise ValueError(f"{done} done, {len(failed)} failed: " + "; ".join(failed.values()))


def leave_out(name: str, reason: str, failed: dict[str, str]) -> None:
    """Names a photograph that cannot be used at once, and again at the end."""
    failed[name] = reason
    print(f"{name} is left out: {reason}", file=sys.stderr)


def report(folder: Path, result) -> None:
    seconds = sum(result.record["seconds"].values())
    print(f"{folder}: {result.record['gaussians']['kept']} Gaussians in gaussians.ply, {seconds:.1f} s")


def reconstruct_sample(model, arguments: argparse.Namespace, save: dict) -> None:
    """Posed views of a sample folder through Stage 2."""
    from multiview.image import composite
    from multiview.sample import read_sample

    sample = read_sample(arguments.sample_dir)
    count = min(len(sample.rgba), model.rig.num_views)  # novel views come after the rig's
    rgba, folder = sample.rgba[:count], arguments.output_dir / arguments.sample_dir.resolve().name
    result = model.reconstruct(
        composite(rgba, 1.0), rgba[:, 3:], sample.cameras[:count], filtered=not arguments.no_filter,
        name=str(arguments.sample_dir.resolve()),
    )  # fmt: skip
    result.save(folder, **save)
    report(folder, result)


def list_jobs(arguments: argparse.Namespace, stride: int, failed: dict[str, str]) -> Iterable:
    """Returns (name of the result, path or image) of what is to be reconstructed; what cannot be read is in `failed`.

    Every file is looked at here, before the models are loaded.
    """
    from PIL import Image

    from multiview.image import check_picture

    if arguments.input_video is not None:
        if not arguments.input_video.is_file():
            raise ValueError(f"--input_video {arguments.input_video} does not exist")
        return video_frames(arguments.input_video, stride, failed)
    if arguments.input_image is not None:
        check_picture(arguments.input_image)
        return [(arguments.input_image.stem, arguments.input_image)]
    folder, jobs = arguments.input_dir, {}
    if not folder.is_dir():
        raise ValueError(f"--input_dir {folder} is not a folder")
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        try:
            check_picture(path)
        except ValueError as error:
            if path.suffix.lower() in FOREIGN_SUFFIXES | Image.registered_extensions().keys():
                leave_out(path.name, str(error), failed)
            else:
                print(f"{path.name} is left out: not an image", file=sys.stderr)
            continue
        if path.stem in jobs:  # the second would overwrite the first
            raise ValueError(f"--input_dir {folder}: several images would write to the folder {path.stem}/")
        jobs[path.stem] = path
    if not jobs:
        raise ValueError("; ".join([f"--input_dir {folder} holds no image that can be read", *failed.values()]))
    return list(jobs.items())


def video_frames(path: Path, stride: int, failed: dict[str, str]) -> Iterator:
    """Yields (name, RGBA [4, h, w]) of every stride-th frame; a video that ends too early is in `failed` afterwards."""
    import cv2
    import torch

    capture, number = cv2.VideoCapture(str(path)), 0
    # Decoders end a cut file as they end a whole one; only the header knows how many frames there were.
    announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    try:
        while True:
            ok, frame = capture.read()
            if not ok:
                break
            if number % stride == 0:
                rgb = torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).float() / 255
                yield f"{path.stem}_{number:06d}", torch.cat([rgb, torch.ones_like(rgb[:1])])
            number += 1
    finally:
        capture.release()
    if number == 0:
        raise ValueError(f"--input_video {path} holds no frame that can be decoded")
    if number < 0.99 * announced - 1:  # headers of variable frame rates count a frame more or less
        reason = f"{path} is cut: {number} of {announced} frames can be decoded; copy it again from its source"
        leave_out(f"the rest of {path.name}", reason, failed)


if __name__ == "__main__":
    main_guard(main)
