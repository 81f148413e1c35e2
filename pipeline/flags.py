"""Command-line flags that every entry script of the chain shares; nothing heavy is imported here."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.artifacts import Stage1Options


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


def add_stage1_flags(parser: argparse.ArgumentParser) -> None:
    """How Stage 1 samples, and what it trades for memory; read by `stage1_options`."""
    parser.add_argument(
        "--sampler", choices=("ddim", "dpm++", "unipc"), default="ddim",
        help="ddim: FaceLift's; dpm++ and unipc need fewer --num_steps",
    )  # fmt: skip
    parser.add_argument(
        "--num_seeds", type=positive, default=1, help="paint so many sets of views, keep the most consistent one"
    )
    parser.add_argument(
        "--mirror", choices=("never", "always", "auto"),
        help="paint the photograph's mirror image and mirror what comes out; auto: whichever of the two gives the more "
        "consistent views; default: the model's own (a model of animals that face one way needs it), else never",
    )  # fmt: skip
    for flag, text in (
        ("--vae_slicing", "encode and decode pictures one by one: less memory"),
        ("--channels_last", "memory layout of convolutions: faster on a GPU"),
        ("--compile", "torch.compile for the UNet: minutes at first, faster afterwards"),
        ("--cpu_offload", "each part of Stage 1 on the device only while it works: less memory, slower"),
    ):
        parser.add_argument(flag, action="store_true", help=text)


def stage1_options(arguments: argparse.Namespace) -> "Stage1Options":
    """What `add_stage1_flags` asked for."""
    from pipeline.artifacts import Stage1Options

    return Stage1Options(
        sampler=arguments.sampler, num_seeds=arguments.num_seeds, mirror=arguments.mirror,
        vae_slicing=arguments.vae_slicing, channels_last=arguments.channels_last, compiled=arguments.compile,
        offload=arguments.cpu_offload,
    )  # fmt: skip


def add_photo_flags(parser: argparse.ArgumentParser) -> None:
    """How the photograph is framed, and the turntable."""
    parser.add_argument("--crop", choices=("auto", "always", "never"), default="auto", help="framing of the photograph")
    parser.add_argument("--turntable_views", type=int, default=120, help="frames of turntable.mp4; 0 writes none")
