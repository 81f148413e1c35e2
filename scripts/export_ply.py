"""Writes a PLY of 3D Gaussians for a viewer: .splat, .compressed.ply, .spz, .glb, or .ply with another axis up.

Every format stands upright in its viewers; a .ply does so by --up. --gaussians needs the cameras of the views.
  python scripts/export_ply.py --ply outputs/mouse/gaussians.ply --output mouse.spz
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, checked
from multiview.run import main_guard
from pipeline.options import add_up


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ply", required=True, type=Path, help="3D Gaussians in the INRIA layout")
    parser.add_argument("--output", required=True, type=Path, help="its suffix is the format")
    add_up(parser)
    parser.add_argument("--gaussians", type=checked(int, 1), metavar="N", help="keep the N that add most to --cameras")
    parser.add_argument("--cameras", type=Path, help="opencv_cameras.json of the views")
    given = parser.parse_args()
    from gslrm.model import ply
    from gslrm.model.gaussians_renderer import prune
    from multiview.cameras import read_cameras
    from multiview.run import check_output_folder

    name, suffixes = given.output.name, (*ply.FORMATS.values(), ".ply")
    format = next((format for format, suffix in ply.FORMATS.items() if name.endswith(suffix)), None)
    if not name.endswith(suffixes) or given.output.resolve() == given.ply.resolve():
        parser.error(f"--output must end in {', '.join(suffixes)} and not replace --ply, got {given.output}")
    if (given.gaussians is None) != (given.cameras is None) or (format and given.up != "z"):
        parser.error("--gaussians and --cameras belong together, and --up is of .ply: the others have their own axis")
    check_output_folder(given.output.parent)
    gaussians = ply.load_ply(given.ply)
    if given.cameras is not None:
        gaussians = prune(gaussians, read_cameras(given.cameras), given.gaussians)
    ply.export(given.output, gaussians, format) if format else ply.save_ply(given.output, gaussians, given.up)
    print(f"{given.output}: {gaussians.num_gaussians} Gaussians, {ply.VIEWER_UP.get(format, given.up)} up")


if __name__ == "__main__":
    main_guard(main)
