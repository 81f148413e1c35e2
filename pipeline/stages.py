"""The two stages as functions: photograph -> posed views -> Gaussians."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.image import composite, resize_rgba
from multiview.metrics import mask_from_white

if TYPE_CHECKING:
    from gslrm.model.gaussians import Gaussians
    from gslrm.model.gslrm import GSLRM
    from mvdiffusion.components import Components
    from pipeline.artifacts import Artifacts

MIRRORINGS = {None: (False,), "never": (False,), "always": (True,), "auto": (False, True)}  # by Stage1Options.mirror


@dataclass(frozen=True)
class PosedViews:
    """What passes between the stages. rgb: [v, 3, h, w] on white. masks: [v, 1, h, w]. cameras: [v].

    seed_scores: consistency by seed, where several were painted; these views are the best one's.
    mirrored: painted from the photograph's mirror image and mirrored back; Stage 2 sees them as they were painted.
    mirror_scores: consistency as it is and mirrored, where both were painted; these views are the better one's.
    """

    rgb: Tensor
    masks: Tensor
    cameras: Cameras
    seed_scores: dict[int, float] | None = None
    mirrored: bool = False
    mirror_scores: tuple[float, float] | None = None


def paint_views(
    components: Components,
    artifacts: Artifacts,
    photo: Tensor,
    *,
    seed: int,
    keep_input_view: bool,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> PosedViews:
    """Stage 1. photo: [4, s, s] RGBA framed as the training data (`multiview.photo`). CPU tensors come back.

    artifacts.options.num_seeds: so many sets are painted, from `seed` on, and the geometrically most consistent one
    (`multiview.consistency`) is kept; the reference view counts as the photograph where that stands for it.
    artifacts.options.mirror: `always` paints the photograph's mirror image and mirrors the views back; `auto` paints
    both ways and keeps the more consistent one. A model whose training animals all face one way needs it.
    keep_input_view: the photograph itself stands for the reference view instead of its painted copy.
    """
    ways = MIRRORINGS[artifacts.options.mirror]
    sets = [
        _paint(components, artifacts, photo, mirrored, seed=seed, keep_input_view=keep_input_view, progress=progress)
        for mirrored in ways
    ]
    if len(sets) == 1:
        return sets[0]
    scores = tuple(consistency_score(views) for views in sets)
    return replace(sets[scores.index(max(scores))], mirror_scores=scores)


def _paint(
    components: Components, artifacts: Artifacts, photo: Tensor, mirrored: bool, *, seed: int, keep_input_view: bool,
    progress: Callable[[Iterable], Iterable] | None,
) -> PosedViews:  # fmt: skip
    """The views painted from the photograph or its mirror image, in the photograph's own world either way."""
    from mvdiffusion.pipelines.multiview import generate_views

    size, reference = components.image_size, artifacts.rig.reference_view
    cameras, own = artifacts.stage2_cameras(size), resize_rgba(photo, size)
    order = artifacts.rig.mirror_order() if mirrored else None

    def posed(rgb: Tensor) -> PosedViews:
        rgb = (rgb.cpu() * 255).round() / 255  # the pictures that are written are the pictures that are used
        rgb = rgb if order is None else rgb.flip(-1)[order]
        masks = mask_from_white(rgb)
        if keep_input_view:
            rgb[reference], masks[reference] = composite(own, 1.0), own[3:]
        return PosedViews(rgb, masks, cameras, mirrored=mirrored)

    options = {
        "num_steps": artifacts.num_steps, "guidance_scale": artifacts.guidance_scale,
        "sampler": artifacts.options.sampler, "progress": progress,
    }  # fmt: skip
    picture = composite(photo.flip(-1) if mirrored else photo, 1.0)
    best, scores = None, {}
    for number in range(seed, seed + artifacts.options.num_seeds):  # one set after the other: the memory of one
        views = posed(generate_views(components, picture[None], artifacts.embeds, seeds=[number], **options)[0])
        if artifacts.options.num_seeds == 1:  # nothing to choose, and nothing to measure
            return views
        scores[number] = consistency_score(views)
        if best is None or scores[number] > scores[best[0]]:
            best = (number, views)
    return replace(best[1], seed_scores=scores)


def consistency_score(views: PosedViews) -> float:
    """How well the views agree in space (`multiview.consistency`), 0..1."""
    from multiview.consistency import view_consistency

    return view_consistency(views.rgb, views.masks, views.cameras)["score"]


def mirror_views(views: PosedViews) -> PosedViews:
    """The same views of the world mirrored in x."""
    return replace(views, rgb=views.rgb.flip(-1), masks=views.masks.flip(-1), cameras=views.cameras.mirrored())


def views_of_sample(rgba: Tensor, cameras: Cameras) -> PosedViews:
    """Posed RGBA views [v, 4, h, w] as Stage 2's input."""
    return PosedViews(composite(rgba, 1.0), rgba[:, 3:], cameras)


@torch.no_grad()
def reconstruct(model: GSLRM, views: PosedViews, device: torch.device) -> Gaussians:
    """Stage 2: posed views of any number and size -> Gaussians [1, n] on `device`, unfiltered."""
    size = model.config.image_tokenizer.image_size
    mirrored = views.mirrored
    views = mirror_views(views) if mirrored else views
    rgba = torch.stack([resize_rgba(torch.cat([rgb, mask]), size) for rgb, mask in zip(views.rgb, views.masks)])
    cameras = views.cameras.resize(size, size)[None].to(device)
    masks = rgba[None, :, 3:].to(device) if model.config.prune_background_tokens else None
    with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
        output = model(rgba[None, :, :3].to(device), cameras, masks=masks)
    return output.gaussians.mirrored() if mirrored else output.gaussians
