"""The two stages as functions: photograph -> posed views -> Gaussians."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.image import composite, resize_rgba
from multiview.metrics import mask_from_white, view_consistency

if TYPE_CHECKING:
    from gslrm.model.gaussians import Gaussians
    from gslrm.model.gslrm import GSLRM
    from mvdiffusion.components import Components
    from pipeline.artifacts import Artifacts

MIRRORINGS = {None: (False,), "never": (False,), "always": (True,), "auto": (False, True)}  # by Stage1Options.mirror


@dataclass(frozen=True)
class PosedViews:
    """What passes between the stages. rgb: [v, 3, h, w] on white. masks: [v, 1, h, w]. cameras: [v].

    seed_scores: consistency by seed, where several were generated; these views are the best one's.
    mirrored: generated from the photograph's mirror image and mirrored back; Stage 2 sees them as they were generated.
    mirror_scores: consistency as it is and mirrored, where both were generated; these views are the better one's.
    """

    rgb: Tensor
    masks: Tensor
    cameras: Cameras
    seed_scores: dict[int, float] | None = None
    mirrored: bool = False
    mirror_scores: tuple[float, float] | None = None

    def consistency(self) -> float:
        """Returns how well the views agree in space (`view_consistency`), 0..1."""
        return view_consistency(self.rgb, self.masks, self.cameras)["score"]


def posed_views(rgba: Tensor, cameras: Cameras) -> PosedViews:
    """Returns posed RGBA views [v, 4, h, w] as Stage 2's input."""
    return PosedViews(composite(rgba, 1.0), rgba[:, 3:], cameras)


def generate(
    components: Components, artifacts: Artifacts, photo: Tensor, *, seed: int, keep_input_view: bool = True,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> PosedViews:  # fmt: skip
    """Stage 1. photo: [4, s, s] RGBA framed as the training data (`multiview.image`). Returns CPU tensors.

    artifacts.options.num_seeds sets are generated, from `seed` on, and the geometrically most consistent one is kept;
    options.mirror: `always` starts from the photograph's mirror image and mirrors the views back; `auto` does both and
    keeps the more consistent set. A model whose training animals all face one way needs it.
    keep_input_view: the photograph itself stands for the reference view instead of its generated copy.
    """
    from mvdiffusion.pipelines.multiview import generate_views

    size, rig, options = components.image_size, artifacts.rig, artifacts.options
    cameras, own = artifacts.stage2_cameras(size), resize_rgba(photo, size)

    def posed(rgb: Tensor, mirrored: bool) -> PosedViews:
        rgb = (rgb.cpu() * 255).round() / 255  # the images that are written are the images that are used
        rgb = rgb.flip(-1)[rig.mirror_order()] if mirrored else rgb
        masks = mask_from_white(rgb)
        if keep_input_view:
            rgb[rig.reference_view], masks[rig.reference_view] = composite(own, 1.0), own[3:]
        return PosedViews(rgb, masks, cameras, mirrored=mirrored)

    def best_of_seeds(mirrored: bool) -> PosedViews:
        image = composite(photo.flip(-1) if mirrored else photo, 1.0)
        sets = {}
        for number in range(seed, seed + options.num_seeds):  # one after the other: the memory of one
            rgb = generate_views(
                components, image[None], artifacts.embeds, seeds=[number], num_steps=artifacts.num_steps,
                guidance_scale=artifacts.guidance_scale, sampler=options.sampler, progress=progress,
            )[0]  # fmt: skip
            sets[number] = posed(rgb, mirrored)
        if len(sets) == 1:  # nothing to choose, so nothing to measure
            return sets[seed]
        scores = {number: views.consistency() for number, views in sets.items()}
        return replace(sets[max(scores, key=scores.get)], seed_scores=scores)

    ways = [best_of_seeds(mirrored) for mirrored in MIRRORINGS[options.mirror]]
    if len(ways) == 1:
        return ways[0]
    plain, mirrored = (views.consistency() for views in ways)
    return replace(ways[int(mirrored > plain)], mirror_scores=(plain, mirrored))


@torch.no_grad()
def reconstruct(model: GSLRM, views: PosedViews, device: torch.device) -> Gaussians:
    """Stage 2: posed views of any number and size -> Gaussians [1, n] on `device`, unfiltered."""
    size = model.config.image_tokenizer.image_size
    mirrored, cameras, rgb, masks = views.mirrored, views.cameras, views.rgb, views.masks
    if mirrored:  # the network sees the animal as Stage 1 drew it; its answer is mirrored back
        cameras, rgb, masks = cameras.mirrored(), rgb.flip(-1), masks.flip(-1)
    # Resized in 8 bits, as the training data was.
    rgba = torch.stack([resize_rgba(torch.cat(pair), size) for pair in zip(rgb, masks)])[None]
    with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
        output = model(
            rgba[:, :, :3].to(device), cameras.resize(size, size)[None].to(device),
            masks=rgba[:, :, 3:].to(device) if model.config.prune_background_tokens else None,
        )  # fmt: skip
    gaussians = output.gaussians
    for name in ("xyz", "features", "scaling", "rotation", "opacity"):
        # A filter would drop such Gaussians without a word, and "nothing there" would look like a result.
        if not torch.isfinite(getattr(gaussians, name)).all():
            raise ValueError(
                f"Stage 2 predicted Gaussians whose {name} is not finite: the weights of --checkpoint are damaged or "
                "its training diverged; name an earlier ckpt_*.pt, or copy it again"
            )
    return gaussians.mirrored() if mirrored else gaussians
