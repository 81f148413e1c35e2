"""What both stages are asked for, as flags and key=value settings; imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar

from multiview.config import load_config, option

Chosen = TypeVar("Chosen")


@dataclass(frozen=True, kw_only=True)
class Stage1Checkpoints:
    """Where Stage 1 is read from and how it samples; None: what the checkpoint itself names, else the demo model's."""

    mvdiffusion_checkpoint: Path | None = option(None, "Stage 1: run folder, checkpoint or UNet; default: demo model")
    mvdiff_pretrained: Path | None = option(None, "Stage 1: components; default: the checkpoint's own")
    prompt_embeds: Path | None = option(None, "clr_embeds.pt; default: those beside the UNet, else the tracked ones")
    rig: str | None = option(None, "the view rig, for weights that carry none (facelift6 for FaceLift's)")
    num_steps: int | None = option(None, "sampling steps of Stage 1; default: the model's own, else 50", least=1)
    guidance_scale: float | None = option(None, "guidance, 1 = off; default: the model's own, else 3")


@dataclass(frozen=True, kw_only=True)
class Checkpoints(Stage1Checkpoints):
    """Where both stages are read from. camera_json: cameras of the generated views; must be the rig's."""

    checkpoint: Path | None = option(None, "Stage 2: ckpt_*.pt or a folder of them; default: demo model")
    gslrm_config: Path | None = option(None, "Stage 2: training YAML; default: the checkpoint's own")
    camera_json: Path | None = None


@dataclass(frozen=True)
class Stage1Options:
    """How Stage 1 runs: rarer settings, given as key=value on command lines."""

    sampler: Literal["ddim", "dpm++", "unipc"] = option("ddim", "FaceLift's; dpm++ and unipc need fewer --num_steps")
    num_draws: int | None = option(None, "average so many samples of Stage 1; default: the model's own", least=1)
    vae_slicing: bool = option(False, "encode and decode images one by one: less memory")
    channels_last: bool = option(False, "memory layout of convolutions: faster on a GPU")
    compile: bool = option(False, "torch.compile for the UNet: minutes at first, faster afterwards")
    mask: Literal["auto", "rembg", "network", "color"] = option(
        "auto", "what cuts the animal out where there is no mask: rembg where installed, else the small network "
        "that ships, else the color model"
    )  # fmt: skip
    cpu_offload: bool = option(False, "each part of Stage 1 on the device only while it works: less memory, slower")

    def __post_init__(self) -> None:
        for entry in fields(self):  # argparse holds flags to these limits, OmegaConf does not
            (least, _), value = entry.metadata["limits"], getattr(self, entry.name)
            if None not in (least, value) and value < least:
                raise ValueError(f"{entry.name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Options(Stage1Options):
    """The same, how photographs are taken, and what is written of a result."""

    crop: Literal["auto", "always", "never"] = option("auto", "auto, always or never: framing of the photograph")
    keep_input_view: bool = option(True, "Stage 2 sees the photograph itself, not its generated copy")
    start: Literal["auto", "stage2", "hull"] = option("auto", "of a refinement: auto tries both on the given views")
    refine_size: int = option(256, "pixels; larger images are reduced for the refinement", least=16)
    turntable_size: int = option(256, "pixels, even", least=16)
    maps: bool = option(False, "also depth/ and alpha/ as seen by the views' cameras")
    sheet: bool = option(False, "also sheet.png: input and views above their renderings")
    mask_video: Path | None = option(None, "white where --input_video shows the animal; same size and frames")
    video_stride: int = option(10, "use every n-th frame of --input_video", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turntable_size % 2:
            raise ValueError(f"turntable_size must be even, got {self.turntable_size}")


def add_up(parser: argparse._ActionsContainer) -> None:
    """Adds --up. argparse takes the -y of `--up -y` for a flag, so it is one too; --up alone means the same."""
    told = "the axis that points up in gaussians.ply: z (default; measured and rendered as it is), y, or -y for viewers"
    parser.add_argument("--up", nargs="?", choices=("z", "y", "-y"), default="z", const="-y", help=told)
    parser.add_argument("-y", dest="up", action="store_const", const="-y", default="z", help=argparse.SUPPRESS)


def parse_with_overrides(
    parser: argparse.ArgumentParser, options: type[Chosen], place: Callable[[argparse.Namespace], None] | None = None
) -> tuple[argparse.Namespace, Chosen]:
    """Returns the flags, and a checked dataclass of `option` fields from `key=value` arguments; --help lists them.

    A wrong key or value ends the command as any bad argument does. place: takes what it knows out of the overrides.
    """
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="rarer settings, see below")
    lines = [f"  {entry.name}={str(entry.default).lower()}  {entry.metadata['help']}" for entry in fields(options)]
    parser.epilog = "rarer settings, as key=value:\n" + "\n".join(lines)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # the help of flags does not wrap the list
    arguments = parser.parse_intermixed_args()
    try:
        if place:
            place(arguments)
        # without any, OmegaConf need not be imported
        return arguments, load_config(options, None, arguments.overrides) if arguments.overrides else options()
    except ValueError as error:
        parser.error(str(error))
