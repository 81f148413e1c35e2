"""Which files the two stages are made of, whether they describe the same views, and loading them (in that order)."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from multiview.checkpoint import read_rig
from multiview.config import load_config, option
from multiview.run import shipped

if TYPE_CHECKING:
    import torch

    from gslrm.model.gslrm import GSLRM
    from multiview.cameras import Cameras
    from multiview.rig import ViewRig
    from mvdiffusion.components import Components
    from mvdiffusion.prompts import PromptEmbeds

Chosen = TypeVar("Chosen")
DEMO_STAGE2 = "checkpoints/demo/gslrm"
STAMP = "python scripts/stamp_rig.py --rig <rig> --path {path}"


@dataclass(frozen=True, kw_only=True)
class Stage1Checkpoints:
    """Where Stage 1 is read from and how it samples; None: what the checkpoint itself names, else the demo model's."""

    mvdiffusion_checkpoint: Path | None = option(None, "Stage 1: UNet folder or checkpoint-<step>; default: demo model")
    mvdiff_pretrained: Path | None = option(None, "Stage 1: components; default: the checkpoint's own")
    prompt_embeds: Path | None = option(
        None, "clr_embeds.pt; default: those stored beside the UNet, else the tracked six-view embeddings"
    )
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
    num_seeds: int = option(1, "generate this many sets of views, keep the most consistent one", least=1)
    mirror: Literal["never", "always", "auto"] | None = option(
        None,
        "never, always or auto: generate from the mirrored photograph and mirror the result; auto keeps the more "
        "consistent of both; default: the model's own (a model of animals that face one way needs it)",
    )
    vae_slicing: bool = option(False, "encode and decode images one by one: less memory")
    channels_last: bool = option(False, "memory layout of convolutions: faster on a GPU")
    compile: bool = option(False, "torch.compile for the UNet: minutes at first, faster afterwards")
    cpu_offload: bool = option(False, "each part of Stage 1 on the device only while it works: less memory, slower")

    def __post_init__(self) -> None:
        for entry in fields(self):
            (least, _), value = entry.metadata["limits"], getattr(self, entry.name)
            if least is not None and value < least:
                raise ValueError(f"{entry.name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Options(Stage1Options):
    """The same, how photographs are taken, and what is written of a result."""

    crop: Literal["auto", "always", "never"] = option("auto", "auto, always or never: framing of the photograph")
    keep_input_view: bool = option(True, "Stage 2 sees the photograph itself, not its generated copy")
    turntable_size: int = option(256, "pixels, even", least=16)
    maps: bool = option(False, "also depth/ and alpha/ as seen by the views' cameras")
    sheet: bool = option(False, "also sheet.png: input and views above their renderings")
    video_stride: int = option(10, "use every n-th frame of --input_video", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turntable_size % 2:
            raise ValueError(f"turntable_size must be even, got {self.turntable_size}")


def parse_with_overrides(parser: argparse.ArgumentParser, options: type[Chosen]) -> tuple[argparse.Namespace, Chosen]:
    """Returns the flags, and a checked dataclass of `option` fields from `key=value` arguments; --help lists them.

    A wrong key or value ends the command as any bad argument does.
    """
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="rarer settings, see below")
    lines = [f"  {entry.name}={str(entry.default).lower()}  {entry.metadata['help']}" for entry in fields(options)]
    parser.epilog = "rarer settings, as key=value:\n" + "\n".join(lines)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # the help of flags does not wrap the list
    arguments = parser.parse_intermixed_args()
    try:  # without any, OmegaConf need not be imported
        return arguments, load_config(options, None, arguments.overrides) if arguments.overrides else options()
    except ValueError as error:
        parser.error(str(error))


@dataclass(frozen=True)
class Artifacts:
    """Resolved files that describe one rig. A stage's entries are None when only the other runs."""

    rig: ViewRig
    gslrm: Path | None = None
    gslrm_config: Path | None = None
    components: Path | None = None
    unet: Path | None = None
    embeds: PromptEmbeds | None = None
    camera_json: Path | None = None
    num_steps: int = 0  # Stage 1 sampling: as asked for, else what suits the UNet
    guidance_scale: float = 0.0
    options: Stage1Options = Stage1Options()

    def describe(self) -> dict:
        """Returns JSON values for run.json."""
        options = {entry.name: getattr(self.options, entry.name) for entry in fields(Stage1Options)}
        return {
            "components": self.components and str(self.components),
            "unet": self.unet and str(self.unet),
            "prompt_embeds": self.embeds and self.embeds.source,
            "gslrm": self.gslrm and str(self.gslrm),
            "gslrm_config": self.gslrm_config and str(self.gslrm_config),
            "camera_json": self.camera_json and str(self.camera_json),
            "stage1_options": self.components and options,
        }

    def stage2_cameras(self, size: int) -> Cameras:
        """Returns the cameras [v] of the generated views: the rig's, or the checked camera file's."""
        if self.camera_json is None:
            return self.rig.cameras(size)
        from multiview.cameras import read_cameras

        return read_cameras(self.camera_json).resize(size, size)


def resolve(chosen: Checkpoints, options: Stage1Options | None = None, *, stages: str = "full") -> Artifacts:
    """Finds every file that `stages` ("1", "2" or "full") need and compares their rigs, before weights are loaded.

    Neither checkpoint given: the demo models. A UNet with camera conditioning may be asked for another rig than it was
    trained on, by stating it. Raises ValueError for what is missing, RigMismatchError for a mismatch.
    """
    from multiview.cameras import read_cameras
    from multiview.rig import check_alignment, check_rig_cameras, load_rig

    if stages == "full" and (chosen.mvdiffusion_checkpoint is None) != (chosen.checkpoint is None):
        # A user's model beside a demo model would share no rig, image size or training data with it.
        given, other = ("Stage 2", "Stage 1") if chosen.checkpoint else ("Stage 1", "Stage 2")
        raise ValueError(f"a {given} checkpoint without a {other} one: name both, or neither for the demo models")
    requested = load_rig(chosen.rig) if chosen.rig else None
    # Every file is found and every rig compared before weights are read, which takes a minute at full size.
    rigs: dict[str, ViewRig] = {}
    files: dict = {}
    if stages != "2":
        files, rigs = _resolve_stage1(chosen, requested, options or Stage1Options())
    if stages != "1":
        from gslrm.checkpoints import read_checkpoint_rig, resolve_checkpoint

        gslrm = resolve_checkpoint(chosen.checkpoint or shipped(DEMO_STAGE2))
        rigs["gslrm"] = require_rig(read_checkpoint_rig(gslrm), requested, f"the GS-LRM {gslrm}", gslrm)
        files |= {"gslrm": gslrm, "gslrm_config": chosen.gslrm_config}
    artifacts = Artifacts(check_alignment(requested, **rigs), **files)
    if stages != "2" and artifacts.options.mirror != "never":
        artifacts.rig.mirror_order()  # refuses a rig that has no mirror image
    if chosen.camera_json is not None:
        check_rig_cameras(artifacts.rig, read_cameras(chosen.camera_json), str(chosen.camera_json))
        artifacts = replace(artifacts, camera_json=chosen.camera_json)
    return artifacts


def _resolve_stage1(
    chosen: Stage1Checkpoints, requested: ViewRig | None, options: Stage1Options
) -> tuple[dict, dict[str, ViewRig]]:
    """Returns Stage 1's entries of Artifacts, and the rigs that its artifacts carry by role."""
    from mvdiffusion.checkpoints import components_folder_of, embeds_of, sampling_of
    from mvdiffusion.components import DEMO_FOLDER, PUBLIC_FOLDER
    from mvdiffusion.models.unet import read_unet_config, resolve_unet_folder
    from mvdiffusion.prompts import TRACKED_FOLDER, check_embeds_fit, load_prompt_embeds

    folder = resolve_unet_folder(chosen.mvdiffusion_checkpoint or shipped(DEMO_FOLDER))
    # Embeddings of the training come first: others of the same rig may be worded or encoded differently.
    embeds = load_prompt_embeds(chosen.prompt_embeds or embeds_of(folder) or shipped(TRACKED_FOLDER), requested)
    check_embeds_fit(embeds, folder)
    own = require_rig(read_rig(folder), requested, f"the UNet {folder}", folder)
    if requested is not None and read_unet_config(folder)["camera_conditioning"] != "none":
        own = requested  # it is told by its cameras where to look from, not by having seen only one rig
    suits = sampling_of(folder)
    files = {
        "components": Path(chosen.mvdiff_pretrained or shipped(components_folder_of(folder) or PUBLIC_FOLDER)),
        "unet": folder, "embeds": embeds,
        "num_steps": suits.num_steps if chosen.num_steps is None else chosen.num_steps,
        "guidance_scale": suits.guidance_scale if chosen.guidance_scale is None else chosen.guidance_scale,
        "options": replace(options, mirror=options.mirror or suits.mirror),
    }  # fmt: skip
    return files, {"unet": own, "embeddings": embeds.rig}


def require_rig(stored: ViewRig | None, requested: ViewRig | None, what: str, path: Path) -> ViewRig:
    """Returns the rig an artifact carries, or the one the user states for weights that carry none."""
    if stored is None and requested is None:
        raise ValueError(
            f"{what} carries no view rig (public weights do not): state it with --rig, e.g. --rig facelift6, or once "
            f"and for all: {STAMP.format(path=path)}"
        )
    return stored or requested


def load_stage1(artifacts: Artifacts, device: torch.device) -> Components:
    """Returns components with the UNet; float16 on a GPU as FaceLift's inference, float32 on the CPU."""
    import torch

    from mvdiffusion.components import load_components

    # Half precision is slower than single on most CPUs.
    dtype, options = torch.float16 if device.type == "cuda" else torch.float32, artifacts.options
    components = load_components(
        artifacts.components, unet=artifacts.unet, device=device, dtype=dtype, offload=options.cpu_offload
    )
    if options.vae_slicing:  # memory of one image
        components.vae.enable_slicing()
    for part in (components.unet, components.vae) if options.channels_last else ():
        part.to(memory_format=torch.channels_last)  # convolutions in half precision are faster so on a GPU
    if options.compile:
        components.unet.compile()
    return components


def load_stage2(artifacts: Artifacts, device: torch.device) -> GSLRM:
    from gslrm.checkpoints import load_gslrm

    model, _, _ = load_gslrm(artifacts.gslrm, config_file=artifacts.gslrm_config, device=device)
    return model
