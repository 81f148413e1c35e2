"""Makes a triangle mesh with vertex colors from a PLY of 3D Gaussians: a .ply or .glb that any 3D program reads.

Needs scikit-image (and trimesh for .glb): pip install -r requirements-extra.txt
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, checked
from multiview.run import main_guard


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ply", required=True, type=Path, help="3D Gaussians in the INRIA layout")
    parser.add_argument("--output", required=True, type=Path, help="mesh.ply (z up) or mesh.glb (y up, as glTF wants)")
    parser.add_argument("--resolution", type=checked(int, 1), default=128, help="voxels along the longest side")
    parser.add_argument("--views", type=checked(int, 1), default=48, help="depth maps from all around")
    parser.add_argument("--view_size", type=checked(int, 1), default=384, help="pixels of a depth map's side")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    given = parser.parse_args()
    if given.output.suffix not in (".ply", ".glb") or given.output.resolve() == given.ply.resolve():
        parser.error(f"--output must end in .ply or .glb and not replace the Gaussians of --ply, got {given.output}")
    from gslrm.model.mesh import check_libraries, extract_mesh, save_mesh
    from gslrm.model.ply import load_ply
    from multiview.run import check_output_folder, resolve_device

    check_output_folder(given.output.parent)  # before minutes of work
    check_libraries(given.output.suffix)
    gaussians = load_ply(given.ply).to(resolve_device(given.device))
    mesh = extract_mesh(gaussians, resolution=given.resolution, num_views=given.views, size=given.view_size)
    save_mesh(given.output, mesh)
    print(f"{given.output}: {len(mesh.vertices)} vertices, {len(mesh.faces)} triangles")


if __name__ == "__main__":
    main_guard(main)
