"""Writes the network of a Stage 2 checkpoint alone: to ship it, or in the layout that FaceLift's strict loader accepts.

  python scripts/export_gslrm.py --checkpoint checkpoints/gslrm/mouse_finetune --output shipped --dtype float16
  python scripts/export_gslrm.py --checkpoint checkpoints/gslrm/mouse_finetune --output for_facelift --facelift

Averaged weights are taken if the checkpoint keeps them; adapters are merged.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import main_guard


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a ckpt_*.pt with its sidecar, or its folder")
    parser.add_argument("--output", required=True, type=Path, help="a .pt file, or a folder for ckpt_<step>.pt")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--facelift", action="store_true", help="FaceLift's keys, its frozen VGG-19 among them")
    parser.add_argument("--vgg_folder", type=Path, default=Path("checkpoints/vgg"), help="where the VGG-19 file lies")
    parser.add_argument(
        "--no_vgg", action="store_true",
        help="with --facelift: without VGG-19, for a FaceLift config whose perceptual_loss_weight is 0",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.no_vgg and not arguments.facelift:
        parser.error("--no_vgg needs --facelift")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    import torch

    from gslrm.checkpoints import export_weights

    with_vgg = arguments.facelift and not arguments.no_vgg
    path = export_weights(
        arguments.checkpoint, arguments.output, dtype=getattr(torch, arguments.dtype), facelift=arguments.facelift,
        vgg_folder=arguments.vgg_folder if with_vgg else None,
    )  # fmt: skip
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main_guard(main)
