"""Which files the two stages are made of, and whether they describe the same views: asked before weights are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from multiview.cameras import read_cameras
from multiview.checkpoint import read_rig
from multiview.rig import ViewRig, check_alignment, check_rig_cameras, load_rig
from multiview.run import seed_from, shipped
from mvdiffusion.prompts import TRACKED_FOLDER, PromptEmbeds, check_embeds_fit, load_prompt_embeds
from pipeline.options import Checkpoints, Stage1Options

DEMO_STAGE2 = "checkpoints/demo/gslrm"


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

    def draws(self, seed: int) -> list[int]:
        """The seeds of the samples that are averaged, `seed` the first of them."""
        return [seed, *(seed_from("draws", seed, draw) for draw in range(1, self.options.num_draws))]

    def describe(self) -> dict:
        """Returns JSON values for run.json."""
        paths = {
            "components": self.components, "unet": self.unet, "prompt_embeds": self.embeds and self.embeds.source,
            "gslrm": self.gslrm, "gslrm_config": self.gslrm_config, "camera_json": self.camera_json,
        }  # fmt: skip
        used = {name: value for name, value in asdict(self.options).items() if name in asdict(Stage1Options())}
        return {**{name: path and str(path) for name, path in paths.items()}, "stage1_options": paths["unet"] and used}


def resolve(chosen: Checkpoints, options: Stage1Options | None = None, *, stages: str = "full") -> Artifacts:
    """Finds every file that `stages` ("1", "2", "full") need and compares their rigs, before weights are read. Neither
    checkpoint given: the demo models. A UNet with camera conditioning may be asked for another rig than it was trained
    on, by stating it. Raises ValueError for what is missing, RigMismatchError for a mismatch."""
    if stages == "full" and (chosen.mvdiffusion_checkpoint is None) != (chosen.checkpoint is None):
        # A user's model beside a demo model would share no rig, image size or training data with it.
        given, other = ("Stage 2", "Stage 1") if chosen.checkpoint else ("Stage 1", "Stage 2")
        remedy = "name both (--mvdiffusion_checkpoint, --checkpoint), or neither for the demo models"
        raise ValueError(f"a {given} checkpoint without a {other} one: {remedy}")
    requested = load_rig(chosen.rig) if chosen.rig else None
    # Every file is found and every rig compared before weights are read, which takes a minute at full size.
    rigs: dict[str, ViewRig] = {}
    files: dict = {}
    if stages != "2":
        from mvdiffusion.checkpoints import components_folder_of, embeds_of, sampling_of  # diffusers: seconds to import
        from mvdiffusion.components import DEMO_FOLDER, PUBLIC_FOLDER
        from mvdiffusion.models.unet import read_unet_config, resolve_unet_folder

        unet = resolve_unet_folder(chosen.mvdiffusion_checkpoint or shipped(DEMO_FOLDER))
        # Embeddings of the training come first: others of the same rig may be worded or encoded differently.
        embeds = load_prompt_embeds(chosen.prompt_embeds or embeds_of(unet) or shipped(TRACKED_FOLDER), requested)
        check_embeds_fit(embeds, unet)
        rigs = {"unet": _require_rig(read_rig(unet), requested, "UNet", unet), "embeddings": embeds.rig}
        if requested is not None and read_unet_config(unet)["camera_conditioning"] != "none":
            rigs["unet"] = requested  # it is told by its cameras where to look from, not by having seen only one rig
        suits, options = sampling_of(unet), options or Stage1Options()
        files = {
            "components": Path(chosen.mvdiff_pretrained or shipped(components_folder_of(unet) or PUBLIC_FOLDER)),
            "unet": unet, "embeds": embeds,
            "num_steps": suits.num_steps if chosen.num_steps is None else chosen.num_steps,
            "guidance_scale": suits.guidance_scale if chosen.guidance_scale is None else chosen.guidance_scale,
            "options": replace(options, num_draws=options.num_draws or suits.num_draws),
        }  # fmt: skip
    if stages != "1":
        from gslrm.checkpoints import read_checkpoint_rig, resolve_checkpoint

        gslrm = resolve_checkpoint(chosen.checkpoint or shipped(DEMO_STAGE2))
        rigs["gslrm"] = _require_rig(read_checkpoint_rig(gslrm), requested, "GS-LRM", gslrm)
        files |= {"gslrm": gslrm, "gslrm_config": chosen.gslrm_config}
    artifacts = Artifacts(check_alignment(requested, **rigs), **files, camera_json=chosen.camera_json)
    if chosen.camera_json is not None:
        check_rig_cameras(artifacts.rig, read_cameras(chosen.camera_json), str(chosen.camera_json))
    return artifacts


def _require_rig(stored: ViewRig | None, requested: ViewRig | None, role: str, path: Path) -> ViewRig:
    """Returns the rig an artifact carries, or the one the user states for weights that carry none."""
    if stored is None and requested is None:
        raise ValueError(
            f"the {role} {path} carries no view rig (public weights do not): state it with --rig, e.g. --rig "
            f"facelift6, or once and for all: python scripts/stamp_rig.py --rig <rig> --path {path}"
        )
    return stored or requested
