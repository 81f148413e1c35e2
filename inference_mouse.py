"""One photograph of a mouse (or a folder, a video, posed views) to a 3D Gaussian model: views, PLY and turntable.

Without checkpoint flags the small demo models are used. Each result goes to <output_dir>/<stem>/.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from multiview.config import Parser, add_fields, checked, from_arguments
from multiview.run import leave, main_guard
from pipeline.options import Checkpoints, Options, add_up, parse_with_overrides

SOURCES = ("input_image", "input_dir", "sample_dir", "dataset", "input_video")
KINDS = {"opencv_cameras.json": "sample_dir", "dataset.json": "dataset", ".txt": "dataset"}  # what tells an input
KINDS |= dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg"), "input_video")
EXPORTS = ("splat", "ply_compressed", "spz", "glb")


def parse_arguments() -> tuple[argparse.Namespace, Options]:
    parser = Parser(description=__doc__)
    source = parser.add_argument_group("input: one of these, or its path alone").add_mutually_exclusive_group()
    source.add_argument("--input_image", type=Path, help="one photograph (RGBA: its alpha is the mask)")
    source.add_argument("--input_dir", type=Path, help="every photograph in a folder")
    source.add_argument("--sample_dir", type=Path, help="a sample folder of posed views: Stage 2 only")
    source.add_argument(
        "--dataset", type=Path, metavar="DIR",
        help="a recording's samples in order (a dataset folder, or a split list): refined frame after frame",
    )  # fmt: skip
    source.add_argument("--input_video", type=Path, help="frames of a video, see video_stride")
    add_fields(parser.add_argument_group("models"), Checkpoints)
    work, written = parser.add_argument_group("how it works"), parser.add_argument_group("result")
    work.add_argument("--seed", type=int, default=0, help="of each photograph, wherever it stands in a folder")
    work.add_argument("--device", default="auto", help="auto, cpu or cuda")
    work.add_argument("--crop", choices=("auto", "always", "never"), help="the same as crop=")
    work.add_argument("--mask", choices=("auto", "rembg", "network", "color"), help="the same as mask=")
    work.add_argument(
        "--refine", type=iterations, default="auto", metavar="{auto,N,off}",
        help="fit the Gaussians to the views, N iterations; auto: true posed views alone, as many as are needed",
    )  # fmt: skip
    written.add_argument("--no_filter", action="store_true", help="keep every Gaussian")
    written.add_argument(
        "--turntable_views", type=checked(int, 0), default=120, help="frames of turntable.mp4 (120); 0 writes none"
    )
    written.add_argument(
        "--export", type=export_formats, default=(), metavar="FORMAT[,FORMAT]",
        help=f"also gaussians.splat, .compressed.ply, .spz, .glb, upright in their viewers: {', '.join(EXPORTS)}",
    )  # fmt: skip
    add_up(written)
    written.add_argument("--gaussians", type=checked(int, 1), metavar="N", help="keep the N that add most to the views")
    written.add_argument(
        "--mesh", nargs="?", choices=("ply", "glb"), const="ply",
        help="also mesh.ply (the value may be left out) or mesh.glb; needs requirements-extra.txt",
    )  # fmt: skip
    written.add_argument("--output_dir", type=Path, default=Path("outputs"), help="default: outputs")
    written.add_argument("--overwrite", action="store_true", help="of a folder or video: also make what is there again")
    written.add_argument("--strict", action="store_true", help="exit 1 where a result is doubtful or poor")
    arguments, options = parse_with_overrides(parser, Options, place_input)
    single = arguments.export or arguments.mesh or options.maps or options.sheet or arguments.gaussians
    if arguments.dataset and (single or arguments.refine == "off" or arguments.up != "z"):
        told = "no --refine off, --export, --up, --gaussians, --mesh, maps or sheet"
        parser.error(f"--dataset fits every frame and writes the PLY that the next one starts from: {told}")
    return arguments, replace(options, crop=arguments.crop or options.crop, mask=arguments.mask or options.mask)


def place_input(arguments: argparse.Namespace) -> None:
    """An input named without its flag goes where its kind belongs. Raises ValueError unless there is one input."""
    given = [name for name in SOURCES if getattr(arguments, name) is not None]
    words = [word for word in arguments.overrides if "=" not in word or Path(word).exists()]
    if len(words) == 1 and not given:
        path = Path(words[0])
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        arguments.overrides.remove(words[0])
        kind = KINDS.get(path.suffix.lower(), "input_image")
        if path.is_dir():
            kind = next((kind for name, kind in KINDS.items() if (path / name).is_file()), "input_dir")
        setattr(arguments, kind, path)
    elif not given:
        told = f"{len(words)} inputs ({', '.join(words)})" if words else "no input"
        raise ValueError(f"{told}, expected one: a picture, a video, a folder, or one of --{', --'.join(SOURCES)}")


def iterations(text: str) -> int | str:
    """An argparse type: auto, off or a positive number."""
    if text in ("auto", "off"):
        return text
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be auto, off or a positive number, got {text!r}")
    return int(text)


def export_formats(text: str) -> tuple[str, ...]:
    """An argparse type: comma-separated names in EXPORTS."""
    if not set(text.split(",")) <= set(EXPORTS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(EXPORTS)}, got {text!r}")
    return tuple(text.split(","))


def main() -> None:
    arguments, options = parse_arguments()
    from gslrm.model.rasterizers import warm_up

    if not arguments.device.startswith("cuda"):
        warm_up.start()  # the first command of an installation compiles kernels, beside the imports that follow
    from multiview.run import check_output_folder, process_share
    from pipeline import MouseFaceLift, import_stage1
    from pipeline.batch import list_photos

    check_output_folder(arguments.output_dir)
    if arguments.mesh is not None:
        from gslrm.model.mesh import check_libraries

        check_libraries(f".{arguments.mesh}")
    failed: dict[str, str] = {}
    # Inputs first: a wrong path is told before models are loaded.
    frames = list_frames(arguments.dataset) if arguments.dataset else []
    posed = arguments.sample_dir or arguments.dataset
    photos, rate = ([], 0.0) if posed else list_photos(arguments, options, failed)
    if not posed:
        import_stage1()
    share, device = process_share(arguments.device)
    model = MouseFaceLift.load(
        device=device, stages="2" if posed else "full", options=options, **vars(from_arguments(Checkpoints, arguments))
    )
    save = partial(save_result, arguments, options)
    if arguments.dataset:
        words = reconstruct_recording(arguments, options, model, frames, share)
    elif arguments.sample_dir:
        words = reconstruct_sample(arguments, options, model, save)
    else:
        from pipeline.batch import film_photos, reconstruct_photos

        alone = arguments.input_image is not None
        print(f"rig {model.rig.name}: {model.rig.num_views} views; embeddings, UNet and GS-LRM agree")
        words = reconstruct_photos(
            model, photos, arguments.output_dir, save, failed, index=not alone, share=share, seed=arguments.seed,
            overwrite=arguments.overwrite or alone, refine=arguments.refine, keep_input_view=options.keep_input_view,
            filtered=not arguments.no_filter,
        )  # fmt: skip
        if arguments.input_video:
            film_photos(arguments.output_dir, photos, failed, model.rig, rate)
        if failed:
            counted = f"{len(words)} done, {len(failed)} failed: " if not alone else ""
            raise ValueError(counted + "; ".join(failed.values()))
    doubtful = [f"{name} is {word}" for name, word in words.items() if word != "good"]
    if arguments.strict and doubtful:
        raise ValueError(f"--strict: {len(doubtful)} of {len(words)} results are not good: {'; '.join(doubtful)}")


def save_result(arguments: argparse.Namespace, options: Options, name: str, result) -> None:
    """Writes a result's folder and says how good it is; what is wrong comes last."""
    result.up = arguments.up
    if arguments.gaussians:
        result.prune(arguments.gaussians)
    result.save(
        arguments.output_dir / name, turntable_views=arguments.turntable_views, export=arguments.export,
        turntable_size=options.turntable_size, mesh=arguments.mesh, maps=options.maps, sheet=options.sheet,
    )  # fmt: skip
    kept, seconds = result.record["gaussians"]["kept"], sum(result.record["seconds"].values())
    verdict = result.record["verdict"]
    told = f"{arguments.output_dir / name}/result.html: {kept} Gaussians, {seconds:.1f} s; {verdict['word']}"
    if by := result.record.get("photo", {}).get("segmented"):
        told += f"; mask by {by}"
    print("\n  ".join([told, *verdict["reasons"]]))


def reconstruct_recording(
    arguments: argparse.Namespace, options: Options, model, frames: list[Path], share: tuple[int, int]
) -> dict[str, str]:
    """A recording, frame after frame; returns each frame's verdict in a word. Raises ValueError for frames left out."""
    from pipeline.sequence import reconstruct_sequence
    from pipeline.verdict import WORDS

    words, left_out = reconstruct_sequence(
        model, frames, arguments.output_dir, share, refine=arguments.refine, refine_size=options.refine_size,
        seed=arguments.seed, start=options.start, filtered=not arguments.no_filter,
    )  # fmt: skip
    counts = [f"{list(words.values()).count(word)} {word}" for word in WORDS]
    print(f"{arguments.output_dir}/index.html: {len(words)} frames, {', '.join(counts)}")
    if left_out:
        raise ValueError(f"{len(left_out)} of {len(frames)} frames are left out: " + "; ".join(left_out))
    return words


def reconstruct_sample(arguments: argparse.Namespace, options: Options, model, save) -> dict[str, str]:
    """The posed views of one sample; returns its verdict in a word."""
    from tqdm import tqdm

    from multiview.sample import read_sample
    from pipeline.outputs import PosedViews

    folder = arguments.sample_dir.resolve()
    sample = read_sample(arguments.sample_dir, padded=True)
    views = PosedViews.of(sample.rgba, sample.cameras)
    count = sample.num_inputs
    print(f"{folder.name}: {count} of {len(sample.view_names)} views are the input")
    given = [part[:count] for part in (views.rgb, views.masks, views.cameras)]
    result = model.reconstruct(
        *given, refine=arguments.refine, name=str(folder), progress=partial(tqdm, desc="refining", disable=None),
        start=options.start, refine_size=options.refine_size, seed=arguments.seed, filtered=not arguments.no_filter,
    )  # fmt: skip
    save(folder.name, result)
    return {folder.name: result.record["verdict"]["word"]}


def list_frames(source: Path) -> list[Path]:
    """Returns the sample folders of a split list, or all of a dataset folder by name."""
    from multiview.sample import is_complete_sample, read_split

    if source.is_file():
        return read_split(source)
    frames = sorted(path for path in source.glob("*") if is_complete_sample(path))
    if not frames:
        raise ValueError(f"--dataset {source} is neither a split list nor a folder of samples (opencv_cameras.json)")
    return frames


if __name__ == "__main__":
    main_guard(main)
    leave()
