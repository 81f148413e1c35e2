"""Renders a PLY of 3D Gaussians from the cameras of an opencv_cameras.json: one PNG per camera."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import main_guard


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ply", required=True, type=Path, help="3D Gaussians in the INRIA layout")
    parser.add_argument("--cameras", required=True, type=Path, help="opencv_cameras.json; its frames give the sizes")
    parser.add_argument("--output_dir", required=True, type=Path, help="receives cam_000.png, cam_001.png, ...")
    parser.add_argument("--background", choices=["white", "gray", "black"], default="white", help="behind the animal")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import torch

    from gslrm.model.gaussians_renderer import render
    from gslrm.model.ply import load_ply
    from multiview.cameras import read_cameras
    from multiview.image import BACKGROUNDS, write_image
    from multiview.run import resolve_device

    device = resolve_device(arguments.device)
    cameras = read_cameras(arguments.cameras).to(device)
    gaussians = load_ply(arguments.ply).to(device)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for number in range(len(cameras)):
            picture = render(gaussians, cameras[None, number : number + 1], BACKGROUNDS[arguments.background]).rgb[0, 0]
            write_image(arguments.output_dir / f"cam_{number:03d}.png", picture.clamp(0, 1).cpu())
    print(f"{arguments.output_dir}: {len(cameras)} pictures of {gaussians.num_gaussians} Gaussians")


if __name__ == "__main__":
    main_guard(main)
