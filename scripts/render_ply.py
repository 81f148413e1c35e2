"""Renders a PLY of 3D Gaussians: one PNG per camera of an opencv_cameras.json, depth and alpha maps, a turntable."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import checked
from multiview.run import main_guard

POSITIVE = checked(int, 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ply", required=True, type=Path, help="3D Gaussians in the INRIA layout")
    parser.add_argument("--cameras", type=Path, help="opencv_cameras.json; its frames give the sizes")
    parser.add_argument("--output_dir", type=Path, help="receives cam_000.png, cam_001.png, ... of --cameras")
    parser.add_argument("--depth", action="store_true", help="also depth/cam_000.png ..., 16 bit, as in a sample")
    parser.add_argument("--alpha", action="store_true", help="also alpha/cam_000.png ..., 8 bit")
    parser.add_argument("--sheet", action="store_true", help="also sheet.png: everything in one picture")
    parser.add_argument("--turntable", type=Path, help="an .mp4 of a camera going once around")
    parser.add_argument("--turntable_views", type=POSITIVE, default=120, help="frames of --turntable")
    parser.add_argument("--turntable_size", type=POSITIVE, default=384, help="pixels, even")
    parser.add_argument("--elevation", type=float, default=0.0, help="of --turntable, degrees")
    parser.add_argument("--background", choices=["white", "gray", "black"], default="white", help="behind the animal")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    arguments = parser.parse_args()
    if (arguments.cameras is None) != (arguments.output_dir is None):
        parser.error("--cameras and --output_dir belong together")
    if arguments.cameras is None and arguments.turntable is None:
        parser.error("nothing to render: give --cameras and --output_dir, or --turntable")
    if arguments.cameras is None and (arguments.depth or arguments.alpha or arguments.sheet):
        parser.error("--depth, --alpha and --sheet are of --cameras, which is missing")
    if arguments.turntable_size % 2:
        parser.error("--turntable_size must be even")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from gslrm.model.ply import load_ply
    from multiview.run import resolve_device

    gaussians = load_ply(arguments.ply).to(resolve_device(arguments.device))
    if arguments.cameras is not None:
        render_cameras(gaussians, arguments)
    if arguments.turntable is not None:
        render_video(gaussians, arguments)


def render_cameras(gaussians, arguments: argparse.Namespace) -> None:
    """One picture per camera, and the maps and the sheet asked for."""
    import torch

    from gslrm.model.gaussians_renderer import render
    from multiview.cameras import read_cameras
    from multiview.image import BACKGROUNDS, write_image
    from pipeline.outputs import contact_sheet, depth_images, write_alpha, write_depth

    folder, cameras = arguments.output_dir, read_cameras(arguments.cameras).to(gaussians.device)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"rgb": [], "depth": [], "alpha": []}
    for number in range(len(cameras)):
        name = f"cam_{number:03d}.png"
        with torch.no_grad():
            output = render(gaussians, cameras[None, number : number + 1], BACKGROUNDS[arguments.background])
        rgb, depth, alpha = (t[0, 0].cpu() for t in (output.rgb.clamp(0, 1), output.mean_depth(), output.alpha))
        write_image(folder / name, rgb)
        if arguments.depth:
            write_depth(folder / "depth" / name, depth)
        if arguments.alpha:
            write_alpha(folder / "alpha" / name, alpha)
        if arguments.sheet:
            for kind, picture in zip(kept, (rgb, depth, alpha)):
                kept[kind].append(picture)
    if arguments.sheet:
        rows = [torch.stack(kept["rgb"])]
        if arguments.depth:
            rows.append(depth_images(torch.stack(kept["depth"])))
        if arguments.alpha:
            rows.append(torch.stack(kept["alpha"]).expand(-1, 3, -1, -1))
        write_image(folder / "sheet.png", contact_sheet(rows))
    print(f"{folder}: {len(cameras)} pictures of {gaussians.num_gaussians} Gaussians")


def render_video(gaussians, arguments: argparse.Namespace) -> None:
    from gslrm.model.gaussians_renderer import render_turntable
    from multiview.image import BACKGROUNDS, save_video

    frames = render_turntable(
        gaussians, arguments.turntable_views, arguments.turntable_size, elevation_deg=arguments.elevation,
        background=BACKGROUNDS[arguments.background],
    )  # fmt: skip
    arguments.turntable.parent.mkdir(parents=True, exist_ok=True)
    save_video(arguments.turntable, frames.cpu())
    print(f"{arguments.turntable}: {len(frames)} frames of {arguments.turntable_size} px")


if __name__ == "__main__":
    main_guard(main)
