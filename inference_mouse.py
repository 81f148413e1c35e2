"""One photograph of a mouse (or a folder, a video, posed views) to a 3D Gaussian model: views, PLY and turntable.

Without checkpoint flags the small demo models are used. Each result goes to <output_dir>/<stem>/.
"""

import argparse
import time
from pathlib import Path

from multiview.run import main_guard
from pipeline.flags import add_chain_flags, add_photo_flags, add_stage1_flags, positive, stage1_options

EXPORTS = ("splat", "ply_compressed")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input_image", type=Path, help="one photograph (RGBA: its alpha is the mask)")
    source.add_argument("--input_dir", type=Path, help="every photograph in a folder")
    source.add_argument("--sample_dir", type=Path, help="a sample folder of posed views: Stage 2 only")
    source.add_argument("--input_video", type=Path, help="frames of a video, see --video_stride")
    parser.add_argument("--mvdiffusion_checkpoint", type=Path, help="Stage 1: UNet folder or checkpoint-<step>")
    parser.add_argument("--checkpoint", type=Path, help="Stage 2: ckpt_*.pt or a folder of them")
    add_chain_flags(parser)
    add_stage1_flags(parser)
    add_photo_flags(parser)
    parser.add_argument(
        "--keep_input_view", action=argparse.BooleanOptionalAction, default=True,
        help="Stage 2 sees the photograph itself as the reference view instead of its painted copy",
    )  # fmt: skip
    parser.add_argument("--no_filter", action="store_true", help="keep every Gaussian")
    parser.add_argument("--turntable_size", type=int, default=256, help="pixels")
    parser.add_argument(
        "--export", type=export_formats, default=(), metavar="FORMAT[,FORMAT]",
        help=f"also gaussians.splat or gaussians.compressed.ply: {', '.join(EXPORTS)}",
    )  # fmt: skip
    parser.add_argument("--maps", action="store_true", help="also depth/ and alpha/ as seen by the views' cameras")
    parser.add_argument("--sheet", action="store_true", help="also sheet.png: input and views above their renderings")
    parser.add_argument(
        "--mesh", nargs="?", choices=("ply", "glb"), const="ply",
        help="also mesh.ply (the value may be left out) or mesh.glb; needs requirements-extra.txt",
    )  # fmt: skip
    parser.add_argument("--video_stride", type=positive, default=10, help="use every so many-th frame of --input_video")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    if arguments.turntable_views < 0:
        parser.error("--turntable_views must be at least 0")
    if arguments.turntable_size % 2 or arguments.turntable_size < 16:
        parser.error("--turntable_size must be even and at least 16")
    return arguments


def export_formats(text: str) -> tuple[str, ...]:
    """An argparse type: comma-separated names in EXPORTS."""
    names = tuple(text.split(","))
    if not set(names) <= set(EXPORTS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(EXPORTS)}, got {text!r}")
    return names


def main() -> None:
    arguments = parse_arguments()
    from gslrm.model.rasterizers import warm_up

    if not arguments.device.startswith("cuda"):
        warm_up.start()  # the first command of an installation compiles kernels, beside the imports that follow
    from multiview.run import resolve_device
    from pipeline.artifacts import load_stage1, load_stage2, resolve_chain, resolve_stage2

    if arguments.mesh is not None:
        from gslrm.model.mesh import check_libraries

        check_libraries(f".{arguments.mesh}")
    device = resolve_device(arguments.device)
    if arguments.sample_dir is not None:
        artifacts = resolve_stage2(rig=arguments.rig, gslrm=arguments.checkpoint, gslrm_config=arguments.gslrm_config)
        reconstruct_sample(arguments, artifacts, load_stage2(artifacts, device), device)
        return
    jobs = list_jobs(arguments)
    artifacts = resolve_chain(
        rig=arguments.rig, unet=arguments.mvdiffusion_checkpoint, gslrm=arguments.checkpoint,
        gslrm_config=arguments.gslrm_config, components=arguments.mvdiff_pretrained, embeds=arguments.prompt_embeds,
        num_steps=arguments.num_steps, guidance_scale=arguments.guidance_scale, options=stage1_options(arguments),
    )  # fmt: skip
    print(f"rig {artifacts.rig.name}: {artifacts.rig.num_views} views; embeddings, UNet and GS-LRM agree")
    components, model = load_stage1(artifacts, device), load_stage2(artifacts, device)
    for name, photo in jobs:
        reconstruct_photo(name, photo, arguments, artifacts, components, model, device)


def list_jobs(arguments: argparse.Namespace):
    """(output name, RGBA picture) pairs, read as they come; that every file is there is checked at once."""
    from multiview.image import check_picture, read_photo

    if arguments.input_video is not None:
        if not arguments.input_video.is_file():
            raise ValueError(f"--input_video {arguments.input_video} does not exist")
        return video_frames(arguments.input_video, arguments.video_stride)
    if arguments.input_image is not None:
        return [(arguments.input_image.stem, read_photo(arguments.input_image))]
    if not arguments.input_dir.is_dir():
        raise ValueError(f"--input_dir {arguments.input_dir} is not a folder")
    paths = sorted(p for p in arguments.input_dir.iterdir() if p.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"--input_dir {arguments.input_dir} holds no picture ({', '.join(PICTURES)})")
    stems = [path.stem for path in paths]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(f"--input_dir {arguments.input_dir}: several pictures would write to the folder {twice[0]}/")
    for path in paths:
        check_picture(path)
    return ((path.stem, read_photo(path)) for path in paths)


def video_frames(path: Path, stride: int):
    """(name, RGBA) of every stride-th frame, decoded in order."""
    import cv2
    import torch

    capture, number = cv2.VideoCapture(str(path)), 0
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


def reconstruct_photo(name, photo, arguments, artifacts, components, model, device) -> None:
    """One photograph: frame it, paint the views, reconstruct, write."""
    from dataclasses import asdict

    from tqdm import tqdm

    from multiview.image import write_image
    from multiview.photo import prepare_photo
    from pipeline.outputs import start_folder, write_run, write_views
    from pipeline.stages import paint_views, reconstruct

    folder = arguments.output_dir / name
    prepared, report = prepare_photo(photo, components.image_size, crop=arguments.crop, source=name)
    start_folder(folder)
    write_image(folder / "input.png", prepared)
    started = time.perf_counter()
    views = paint_views(
        components, artifacts, prepared, seed=arguments.seed,
        keep_input_view=arguments.keep_input_view,
        progress=lambda steps: tqdm(steps, desc=f"{name}: painting {artifacts.rig.num_views} views", unit="step"),
    )  # fmt: skip
    painted = time.perf_counter()
    write_views(folder, views, artifacts.rig)
    gaussians = reconstruct(model, views, device)
    reconstructed = time.perf_counter()
    kept, total = write_result(folder, gaussians, views, arguments, prepared)
    write_run(
        folder, artifacts.rig,
        {
            "input": name, "photo": asdict(report), "artifacts": artifacts.describe(), "seed": arguments.seed,
            "num_steps": artifacts.num_steps, "guidance_scale": artifacts.guidance_scale,
            "keep_input_view": arguments.keep_input_view, "filtered": not arguments.no_filter,
            "seed_scores": views.seed_scores, "mirrored": views.mirrored, "mirror_scores": views.mirror_scores,
            "gaussians": {"predicted": total, "kept": kept},
            "seconds": {
                "stage1": round(painted - started, 2), "stage2": round(reconstructed - painted, 2),
                "output": round(time.perf_counter() - reconstructed, 2),
            },
        },
    )  # fmt: skip
    print(f"{folder}: {kept} Gaussians in gaussians.ply, {time.perf_counter() - started:.1f} s")


def reconstruct_sample(arguments, artifacts, model, device) -> None:
    """Posed views of a sample folder through Stage 2."""
    from multiview.rig import check_posed_views
    from multiview.sample import read_sample
    from pipeline.outputs import start_folder, write_run, write_views
    from pipeline.stages import reconstruct, views_of_sample

    sample = read_sample(arguments.sample_dir)
    count = min(len(sample.rgba), artifacts.rig.num_views)  # novel views come after the rig's
    cameras = sample.cameras[:count]
    check_posed_views(artifacts.rig, cameras, str(arguments.sample_dir))
    views = views_of_sample(sample.rgba[:count], cameras)
    folder = arguments.output_dir / arguments.sample_dir.resolve().name
    start_folder(folder)
    started = time.perf_counter()
    gaussians = reconstruct(model, views, device)
    seconds = time.perf_counter() - started
    write_views(folder, views, None)
    kept, total = write_result(folder, gaussians, views, arguments)
    content = {
        "input": arguments.sample_dir.resolve().name, "artifacts": artifacts.describe(), "input_views": count,
        "filtered": not arguments.no_filter, "gaussians": {"predicted": total, "kept": kept},
        "seconds": {"stage2": round(seconds, 2)},
    }  # fmt: skip
    write_run(folder, artifacts.rig, content)
    print(f"{folder}: {kept} Gaussians in gaussians.ply from {count} views, {seconds:.1f} s")


def write_result(folder, gaussians, views, arguments, photo=None) -> tuple[int, int]:
    """Filters, writes PLY, turntable and what was asked for; returns how many Gaussians were kept and predicted."""
    from tqdm import tqdm

    from gslrm.model.gaussians import filter_gaussians
    from pipeline.outputs import write_extras, write_gaussians

    total = gaussians.num_gaussians
    if not arguments.no_filter:
        gaussians = filter_gaussians(gaussians)
    with tqdm(total=arguments.turntable_views, desc=f"{folder.name}: turntable", unit="frame") as bar:
        write_gaussians(
            folder, gaussians, turntable_views=arguments.turntable_views, turntable_size=arguments.turntable_size,
            elevation_deg=float(views.cameras.elevation_deg.mean()), on_frame=lambda done, _: bar.update(1),
        )  # fmt: skip
    write_extras(
        folder, gaussians, views, exports=arguments.export, mesh=arguments.mesh, maps=arguments.maps,
        sheet=arguments.sheet, photo=photo,
    )  # fmt: skip
    return gaussians.num_gaussians, total


if __name__ == "__main__":
    main_guard(main)
