"""Makes a triangle mesh with vertex colors from a PLY of 3D Gaussians: a .ply or .glb that any 3D program reads.

Needs scikit-image (and trimesh for .glb): pip install -r requirements-extra.txt
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import checked
from multiview.run import main_guard


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ply", required=True, type=Path, help="3D Gaussians in the INRIA layout")
    parser.add_argument("--output", required=True, type=Path, help="mesh.ply (z up) or mesh.glb (y up, as glTF wants)")
    parser.add_argument("--resolution", type=checked(int, 1), default=128, help="voxels along the longest side")
    parser.add_argument("--views", type=checked(int, 1), default=48, help="depth maps from all around")
    parser.add_argument("--view_size", type=checked(int, 1), default=384, help="pixels of a depth map's side")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    arguments = parser.parse_args()
    if arguments.output.suffix not in (".ply", ".glb"):
        parser.error(f"--output must end in .ply or .glb, got {arguments.output}")
    if arguments.output.resolve() == arguments.ply.resolve():
        parser.error("--output would replace the Gaussians of --ply")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from gslrm.model.mesh import check_libraries, extract_mesh, save_mesh
    from gslrm.model.ply import load_ply
    from multiview.run import resolve_device

    check_libraries(arguments.output.suffix)
    gaussians = load_ply(arguments.ply).to(resolve_device(arguments.device))
    mesh = extract_mesh(gaussians, resolution=arguments.resolution, num_views=arguments.views, size=arguments.view_size)
    save_mesh(arguments.output, mesh)
    print(f"{arguments.output}: {len(mesh.vertices)} vertices, {len(mesh.faces)} triangles")


if __name__ == "__main__":
    main_guard(main)
