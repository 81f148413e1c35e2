"""Writes the network of a Stage 2 checkpoint alone: to ship it, or in the layout that FaceLift's strict loader accepts.

Averaged weights are taken if the checkpoint keeps them; adapters are merged.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser
from multiview.run import main_guard


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a ckpt_*.pt with its sidecar, or its folder")
    parser.add_argument("--output", required=True, type=Path, help="a .pt file, or a folder for ckpt_<step>.pt")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--facelift", action="store_true", help="FaceLift's keys, its frozen VGG-19 among them")
    parser.add_argument("--vgg_folder", type=Path, default=Path("checkpoints/vgg"), help="where the VGG-19 file lies")
    text = "with --facelift: without VGG-19, for a FaceLift config whose perceptual_loss_weight is 0"
    parser.add_argument("--no_vgg", action="store_true", help=text)
    given = parser.parse_args()
    if given.no_vgg and not given.facelift:
        parser.error("--no_vgg needs --facelift")
    import torch

    from gslrm.checkpoints import export_weights

    options = {"dtype": getattr(torch, given.dtype), "facelift": given.facelift}
    options["vgg_folder"] = given.vgg_folder if given.facelift and not given.no_vgg else None
    path = export_weights(given.checkpoint, given.output, **options)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main_guard(main)
