"""Command-line flags that every entry script of the chain shares; nothing heavy is imported here."""

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_chain_flags(parser: argparse.ArgumentParser) -> None:
    """The files beside the two checkpoints, the rig, sampling, seed and device."""
    parser.add_argument("--mvdiff_pretrained", type=Path, help="Stage 1: components; default: the checkpoint's own")
    parser.add_argument("--gslrm_config", type=Path, help="Stage 2: training YAML; default: the checkpoint's own")
    parser.add_argument(
        "--prompt_embeds", type=Path,
        help="clr_embeds.pt; default: those stored beside the UNet, else the tracked six-view embeddings",
    )  # fmt: skip
    parser.add_argument("--rig", help="the view rig, for weights that carry none (facelift6 for FaceLift's)")
    parser.add_argument(
        "--num_steps", type=positive, help="sampling steps of Stage 1; default: the model's own, else 50"
    )
    parser.add_argument(
        "--guidance_scale", type=float, help="classifier-free guidance, 1 = off; default: the model's own, else 3"
    )
    parser.add_argument("--seed", type=int, default=0, help="of each photograph, whatever its place in a folder")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def add_photo_flags(parser: argparse.ArgumentParser) -> None:
    """How the photograph is framed, and the turntable."""
    parser.add_argument("--crop", choices=("auto", "always", "never"), default="auto", help="framing of the photograph")
    parser.add_argument("--turntable_views", type=int, default=120, help="frames of turntable.mp4; 0 writes none")
