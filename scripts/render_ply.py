"""Renders a PLY of 3D Gaussians: one PNG per camera of an opencv_cameras.json, depth and alpha maps, a turntable."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, checked
from multiview.run import main_guard


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ply", required=True, type=Path, help="3D Gaussians in the INRIA layout")
    parser.add_argument("--cameras", type=Path, help="opencv_cameras.json; its frames give the sizes")
    parser.add_argument("--output_dir", type=Path, help="receives cam_000.png, cam_001.png, ... of --cameras")
    parser.add_argument("--depth", action="store_true", help="also depth/cam_000.png ..., 16 bit, as in a sample")
    parser.add_argument("--alpha", action="store_true", help="also alpha/cam_000.png ..., 8 bit")
    parser.add_argument("--sheet", action="store_true", help="also sheet.png: everything in one image (of one size)")
    parser.add_argument("--turntable", type=Path, help="an .mp4 of a camera going once around")
    parser.add_argument("--turntable_views", type=checked(int, 1), default=120, help="frames of --turntable")
    parser.add_argument("--turntable_size", type=checked(int, 1), default=384, help="pixels, even")
    parser.add_argument("--elevation", type=checked(float, -90, 90), default=0.0, help="of --turntable, degrees")
    parser.add_argument("--background", choices=["white", "gray", "black"], default="white", help="behind the animal")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    given = parser.parse_args()
    if (given.cameras is None) != (given.output_dir is None):
        parser.error("--cameras and --output_dir belong together")
    if given.cameras is None and given.turntable is None:
        parser.error("nothing to render: give --cameras and --output_dir, or --turntable")
    if given.cameras is None and (given.depth or given.alpha or given.sheet):
        parser.error("--depth, --alpha and --sheet are of --cameras, which is missing")
    if given.turntable_size % 2:
        parser.error("--turntable_size must be even")
    return given


def main() -> None:
    given = parse_arguments()
    import torch

    from gslrm.model.gaussians_renderer import render, render_turntable
    from gslrm.model.ply import load_ply
    from multiview.cameras import Cameras
    from multiview.files import read_json
    from multiview.image import BACKGROUNDS, save_video, write_image
    from multiview.run import check_output_folder, resolve_device
    from pipeline.outputs import contact_sheet, depth_images, write_depth

    for place in filter(None, (given.output_dir, given.turntable and given.turntable.parent)):
        check_output_folder(place)
    cameras, folder, rows, background = [], given.output_dir, [], BACKGROUNDS[given.background]
    if given.cameras is not None:  # unlike a sample's, these need not agree in their image size: one Cameras per frame
        frames = read_json(given.cameras).get("frames")
        if not isinstance(frames, list) or not frames:
            raise ValueError(f"camera file {given.cameras} must hold an object with a list 'frames', at least one")
        cameras = [Cameras.from_frames([x], f"{given.cameras}, frame {number}") for number, x in enumerate(frames)]
        if given.sheet and len({(camera.height, camera.width) for camera in cameras}) > 1:
            raise ValueError(f"--sheet needs cameras of one image size, and {given.cameras} has several: leave it out")
    gaussians = load_ply(given.ply).to(resolve_device(given.device))
    if cameras:
        for number, camera in enumerate(cameras):
            output, name = render(gaussians, camera[None].to(gaussians.device), background), f"cam_{number:03d}.png"
            maps = output.rgb.clamp(0, 1), output.mean_depth(), output.alpha
            rgb, depth, alpha = (image[0, 0].cpu() for image in maps)
            write_image(folder / name, rgb)
            if given.depth:
                write_depth(folder / "depth" / name, depth)
            if given.alpha:
                write_image(folder / "alpha" / name, alpha)
            rows += [(rgb, depth, alpha.expand(3, -1, -1))] if given.sheet else []
        if given.sheet:
            rgb, depth, alpha = (torch.stack(row) for row in zip(*rows))
            shown = [rgb, *[depth_images(depth)] * given.depth, *[alpha] * given.alpha]
            write_image(folder / "sheet.png", contact_sheet(shown))
        print(f"{folder}: {len(cameras)} images of {gaussians.num_gaussians} Gaussians")
    if given.turntable is not None:
        views, size = given.turntable_views, given.turntable_size
        film = render_turntable(gaussians, views, size, elevation_deg=given.elevation, background=background)
        save_video(given.turntable, film.cpu())
        print(f"{given.turntable}: {len(film)} frames of {size} px")


if __name__ == "__main__":
    main_guard(main)
