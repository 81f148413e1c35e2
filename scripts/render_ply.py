"""Renders a PLY of 3D Gaussians: one PNG per camera of an opencv_cameras.json, depth and alpha maps, a turntable."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import checked
from multiview.run import main_guard


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ply", required=True, type=Path, help="3D Gaussians in the INRIA layout")
    parser.add_argument("--cameras", type=Path, help="opencv_cameras.json; its frames give the sizes")
    parser.add_argument("--output_dir", type=Path, help="receives cam_000.png, cam_001.png, ... of --cameras")
    parser.add_argument("--depth", action="store_true", help="also depth/cam_000.png ..., 16 bit, as in a sample")
    parser.add_argument("--alpha", action="store_true", help="also alpha/cam_000.png ..., 8 bit")
    parser.add_argument("--sheet", action="store_true", help="also sheet.png: everything in one image (of one size)")
    parser.add_argument("--turntable", type=Path, help="an .mp4 of a camera going once around")
    parser.add_argument("--turntable_views", type=checked(int, 1), default=120, help="frames of --turntable")
    parser.add_argument("--turntable_size", type=checked(int, 1), default=384, help="pixels, even")
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
    from gslrm.model.gaussians_renderer import render_turntable
    from gslrm.model.ply import load_ply
    from multiview.files import full_disk_explained
    from multiview.image import BACKGROUNDS, save_video
    from multiview.run import resolve_device

    cameras = read_cameras_of_any_size(arguments.cameras) if arguments.cameras else []
    if arguments.sheet and len({(camera.height, camera.width) for camera in cameras}) > 1:
        raise ValueError(f"--sheet needs cameras of one image size, and {arguments.cameras} has several: leave it out")
    gaussians = load_ply(arguments.ply).to(resolve_device(arguments.device))
    if cameras:
        with full_disk_explained(arguments.output_dir):
            render_cameras(gaussians, cameras, arguments)
        print(f"{arguments.output_dir}: {len(cameras)} images of {gaussians.num_gaussians} Gaussians")
    if arguments.turntable is not None:
        frames = render_turntable(
            gaussians, arguments.turntable_views, arguments.turntable_size, elevation_deg=arguments.elevation,
            background=BACKGROUNDS[arguments.background],
        )  # fmt: skip
        with full_disk_explained(arguments.turntable):
            save_video(arguments.turntable, frames.cpu())
        print(f"{arguments.turntable}: {len(frames)} frames of {arguments.turntable_size} px")


def read_cameras_of_any_size(path: Path) -> list:
    """Returns one Cameras of shape [1] per frame: unlike a sample's, these need not agree in their image size."""
    from multiview.cameras import Cameras
    from multiview.files import read_json

    frames = read_json(path).get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"camera file {path} must hold an object with a list 'frames', at least one")
    return [Cameras.from_frames([frame], f"{path}, frame {number}") for number, frame in enumerate(frames)]


def render_cameras(gaussians, cameras: list, arguments: argparse.Namespace) -> None:
    """Writes one image per camera, and the maps and the sheet asked for."""
    import torch

    from gslrm.model.gaussians_renderer import render
    from multiview.image import BACKGROUNDS, write_image
    from pipeline.outputs import contact_sheet, depth_images, write_alpha, write_depth

    folder, rows = arguments.output_dir, {"rgb": [], "depth": [], "alpha": []}
    for number, camera in enumerate(cameras):
        name = f"cam_{number:03d}.png"
        with torch.no_grad():
            output = render(gaussians, camera[None].to(gaussians.device), BACKGROUNDS[arguments.background])
        rgb, depth, alpha = (t[0, 0].cpu() for t in (output.rgb.clamp(0, 1), output.mean_depth(), output.alpha))
        write_image(folder / name, rgb)
        if arguments.depth:
            write_depth(folder / "depth" / name, depth)
        if arguments.alpha:
            write_alpha(folder / "alpha" / name, alpha)
        if arguments.sheet:
            rows["rgb"].append(rgb)
            rows["depth"] += [depth] if arguments.depth else []
            rows["alpha"] += [alpha.expand(3, -1, -1)] if arguments.alpha else []
    if arguments.sheet:
        shown = {kind: torch.stack(images) for kind, images in rows.items() if images}
        if arguments.depth:
            shown["depth"] = depth_images(shown["depth"])
        write_image(folder / "sheet.png", contact_sheet(list(shown.values())))


if __name__ == "__main__":
    main_guard(main)
