"""Which files a chain is made of, whether they describe the same views, and loading them (in that order)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from multiview.cameras import read_cameras
from multiview.rig import ViewRig, check_alignment, check_rig_cameras, load_rig

if TYPE_CHECKING:
    import torch

    from gslrm.model.gslrm import GSLRM
    from multiview.cameras import Cameras
    from mvdiffusion.components import Components
    from mvdiffusion.prompts import PromptEmbeds

DEMO_STAGE2 = Path("checkpoints/demo/gslrm")
STAMP = "python scripts/stamp_rig.py --rig <rig> --path {path}"


@dataclass(frozen=True)
class Stage1Options:
    """How Stage 1 runs. sampler: ddim, dpm++, unipc. num_seeds: sets of views painted, of which the most consistent is
    kept. mirror: never, always, auto; None: what suits the UNet (`stages.paint_views`). The rest is speed and memory
    (mvdiffusion.components: `tune`, `load_components`)."""

    sampler: str = "ddim"
    num_seeds: int = 1
    mirror: str | None = None
    vae_slicing: bool = False
    channels_last: bool = False
    compiled: bool = False
    offload: bool = False


@dataclass(frozen=True)
class Artifacts:
    """Resolved files of a chain that describe one rig. A stage's entries are None when only the other runs."""

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
        """For run.json."""
        return {
            "components": self.components and str(self.components),
            "unet": self.unet and str(self.unet),
            "prompt_embeds": self.embeds and self.embeds.source,
            "gslrm": self.gslrm and str(self.gslrm),
            "gslrm_config": self.gslrm_config and str(self.gslrm_config),
            "camera_json": self.camera_json and str(self.camera_json),
            "stage1_options": self.components and asdict(self.options),
        }

    def stage2_cameras(self, size: int) -> Cameras:
        """The cameras [v] that belong to the painted views: the rig's, or the checked camera file's."""
        if self.camera_json is None:
            return self.rig.cameras(size)
        return read_cameras(self.camera_json).resize(size, size)


def resolve_chain(
    *,
    rig: str | None,
    unet: Path | None,
    gslrm: Path | None,
    gslrm_config: Path | None = None,
    camera_json: Path | None = None,
    **stage1,
) -> Artifacts:
    """Finds every file of the chain and compares their rigs, before any weights are loaded.

    Neither checkpoint given: the demo models. stage1: what `resolve_stage1` takes besides.
    Raises ValueError for what is missing, RigMismatchError for a mismatch.
    """
    from gslrm.checkpoints import read_checkpoint_rig, resolve_checkpoint

    if (unet is None) != (gslrm is None):
        given, other = ("Stage 2", "Stage 1") if unet is None else ("Stage 1", "Stage 2")
        raise ValueError(f"a {given} checkpoint without a {other} one: name both, or neither for the demo models")
    painter = resolve_stage1(rig=rig, unet=unet, **stage1)
    gslrm_file, requested = resolve_checkpoint(gslrm or DEMO_STAGE2), load_rig(rig) if rig else None
    own = require_rig(read_checkpoint_rig(gslrm_file), requested, f"the GS-LRM {gslrm_file}", gslrm_file)
    check_alignment(unet=painter.rig, embeddings=painter.embeds.rig, gslrm=own)
    if camera_json is not None:
        check_rig_cameras(painter.rig, read_cameras(camera_json), str(camera_json))
    return replace(painter, gslrm=gslrm_file, gslrm_config=gslrm_config, camera_json=camera_json)


def resolve_stage1(
    *,
    rig: str | None,
    unet: Path | None,
    components: Path | None = None,
    embeds: Path | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    options: Stage1Options | None = None,
) -> Artifacts:
    """The same for Stage 1 alone; no UNet given: the demo model.

    A UNet with camera conditioning may be asked for another rig than it was trained on, by stating it (`rig`).
    """
    from mvdiffusion.checkpoints import components_folder_of, embeds_of, sampling_of
    from mvdiffusion.components import DEMO_FOLDER, PUBLIC_FOLDER
    from mvdiffusion.models.unet import camera_conditioning_of, resolve_unet_folder, unet_rig
    from mvdiffusion.prompts import TRACKED_FOLDER, check_embeds_fit, load_prompt_embeds

    folder = resolve_unet_folder(unet or DEMO_FOLDER)
    requested = load_rig(rig) if rig else None
    prompt_embeds = load_prompt_embeds(embeds or embeds_of(folder) or TRACKED_FOLDER, requested)
    check_embeds_fit(prompt_embeds, folder)
    own = require_rig(unet_rig(folder), requested, f"the UNet {folder}", folder)
    if requested is not None and camera_conditioning_of(folder) != "none":
        own = requested  # it is told by its cameras where to look from, not by having seen only one rig
    suits, options = sampling_of(folder), options or Stage1Options()
    found = check_alignment(requested, unet=own, embeddings=prompt_embeds.rig)
    options = replace(options, mirror=options.mirror or suits.mirror)
    if options.mirror != "never":
        found.mirror_order()  # refuses a rig that has no mirror image
    return Artifacts(
        found,
        components=Path(components or components_folder_of(folder) or PUBLIC_FOLDER),
        unet=folder,
        embeds=prompt_embeds,
        num_steps=suits.num_steps if num_steps is None else num_steps,
        guidance_scale=suits.guidance_scale if guidance_scale is None else guidance_scale,
        options=options,
    )


def resolve_stage2(*, rig: str | None, gslrm: Path | None, gslrm_config: Path | None = None) -> Artifacts:
    """The same for Stage 2 alone (posed views as input)."""
    from gslrm.checkpoints import read_checkpoint_rig, resolve_checkpoint

    gslrm_file = resolve_checkpoint(gslrm or DEMO_STAGE2)
    requested = load_rig(rig) if rig else None
    own = require_rig(read_checkpoint_rig(gslrm_file), requested, f"the GS-LRM {gslrm_file}", gslrm_file)
    return Artifacts(check_alignment(requested, gslrm=own), gslrm_file, gslrm_config)


def require_rig(stored: ViewRig | None, requested: ViewRig | None, what: str, path: Path) -> ViewRig:
    """The rig an artifact carries, or the one the user states for weights that carry none."""
    if stored is None and requested is None:
        raise ValueError(
            f"{what} carries no view rig (public weights do not): state it with --rig, e.g. --rig facelift6, or once "
            f"and for all: {STAMP.format(path=path)}"
        )
    return stored or requested


def load_stage1(artifacts: Artifacts, device: torch.device) -> Components:
    """Components with the UNet; float16 on a GPU as FaceLift's inference, float32 on the CPU."""
    import torch

    from mvdiffusion.components import load_components, tune

    dtype, options = torch.float16 if device.type == "cuda" else torch.float32, artifacts.options
    components = load_components(
        artifacts.components, unet=artifacts.unet, device=device, dtype=dtype, offload=options.offload
    )
    tune(
        components,
        vae_slicing=options.vae_slicing,
        channels_last=options.channels_last,
        compiled=options.compiled,
    )
    return components


def load_stage2(artifacts: Artifacts, device: torch.device) -> GSLRM:
    from gslrm.checkpoints import load_gslrm

    model, _, _ = load_gslrm(artifacts.gslrm, config_file=artifacts.gslrm_config, device=device)
    return model
