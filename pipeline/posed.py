"""Posed views from any calibrated cameras: checked, brought to the rig's world for Stage 2, a start chosen, refined."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gslrm import refinement
from gslrm.model.gaussians import Gaussians
from multiview.cameras import Cameras, nearest_point
from multiview.hull import VisualHull, carve, silhouettes, surface
from multiview.metrics import mask_iou
from multiview.rig import ViewRig
from pipeline.outputs import PosedViews

log = logging.getLogger(__name__)

FARTHEST = 100.0  # world units; a rig's cameras stand 2.7 away, a calibration in millimeters has them at 200 and more
# Mean IoU of the hull's silhouettes with the masks: 0.92 to 0.97 for true views of mice, 0.5 to 0.8 for mirrored ones.
REFUSED, DOUBTFUL, MIRRORED_GAIN = 0.65, 0.88, 0.05
LOCATING_SIZE = 256  # pixels: larger masks are reduced to find the animal
BOX_MARGIN = 1.1
TRAINED_SIZE = 0.62  # world units: cube root of the volume of a training mouse's hull (0.55 to 0.67)


@dataclass(frozen=True)
class Placement:
    """Where the animal is in the world. agreement: mean IoU of the hull's silhouettes with the masks, 0..1."""

    hull: VisualHull
    agreement: float

    @property
    def centre(self) -> Tensor:  # [3]
        return self.hull.centre

    @property
    def scale(self) -> float:  # from the sample's world to that of the training data
        return TRAINED_SIZE / self.hull.volume ** (1 / 3)

    @property
    def to_rig(self) -> Tensor:  # [4, 4] from the sample's world to that of the training data
        matrix = torch.diag(self.centre.new_tensor([self.scale] * 3 + [1.0]))
        matrix[:3, 3] = -self.scale * self.centre
        return matrix


@dataclass(frozen=True)
class FitOptions:
    """How posed views are reconstructed.

    start: of the fit: "stage2", "hull", "auto" for the one that explains the views better after a short fit, or the
        Gaussians [1, n] of a frame before, whose number and order are kept.
    refine_size: larger images are reduced to this many pixels for the fit. filtered: leave out faint Gaussians.
    placement: of `locate`, where it is known.
    """

    start: str | Gaussians = "auto"
    refine_size: int = 256
    filtered: bool = True
    seed: int = 0
    placement: Placement | None = None


def locate(masks: Tensor, cameras: Cameras, source: str) -> Placement:
    """Finds the animal in the world. masks: [v, 1, h, w] 0..1, cameras: [v], v >= 2.

    Raises ValueError, naming the convention, where masks and cameras cannot be of one animal.
    """
    if len(cameras) < 2:
        raise ValueError(f"{source}: at least 2 posed views are needed, got {len(cameras)}; one is --input_image")
    small = reduced(PosedViews(masks, masks, cameras), LOCATING_SIZE)
    masks, cameras = small.masks, small.cameras
    weight = (masks[:, 0] > 0.5).double()
    if empty := (weight.sum((1, 2)) == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"{source}: views {empty} show no animal (alpha over 0.5); leave them out")
    origins, rays = cameras.origins.double(), cameras.to(torch.float64).rays()[1]
    ahead = F.normalize((rays * weight[..., None]).sum((1, 2)), dim=-1)
    centre = nearest_point(origins, ahead)
    away = ((centre - origins) * ahead).sum(-1)
    if (away <= 0).any():
        views = (away <= 0).nonzero()[:, 0].tolist()
        hint = f"the cameras of views {views} look away from where the others see the animal"
        if len(views) == len(cameras):
            hint = (
                "all cameras look away from the animal; they look like OpenGL axes (y up, z backward): negate columns "
                "1 and 2 of c2w"
            )
        raise ValueError(f"{source}: {hint}")
    if away.mean() > FARTHEST:
        raise ValueError(
            f"{source}: the cameras stand {float(away.mean()):.4g} world units from the animal, at most {FARTHEST:g} "
            "are expected; is w2c in millimeters? Divide its translations by about 100"
        )
    # Half the box: the farthest that any mask reaches from the center, at the center's distance.
    cosine = (rays * ahead[:, None, None]).sum(-1).clamp(-1, 1)
    reach = (away * torch.where(weight > 0, cosine.acos(), 0.0).amax((1, 2)).tan()).max() * BOX_MARGIN
    box = ((centre - reach).float(), (centre + reach).float())
    placement = _carve(masks, cameras, box)
    if placement.agreement < DOUBTFUL:
        mirrored = _carve(masks.flip(-1), cameras, box).agreement
        wrong = "the images are mirrored: flip them, or the cameras' x axes"
        if mirrored < placement.agreement + MIRRORED_GAIN:
            wrong = "" if placement.agreement >= REFUSED else (
                "the cameras are in another order than the images, of another frame, or in another convention"
            )  # fmt: skip
        if wrong:
            raise ValueError(
                f"{source}: masks and cameras are not of one animal: the space that all masks share covers "
                f"{placement.agreement:.0%} of them ({DOUBTFUL:.0%} and more is usual); {wrong}"
            )
        log.warning("%s: what all masks share covers only %.0f %% of them", source, 100 * placement.agreement)
    return placement


def _carve(masks: Tensor, cameras: Cameras, box: tuple[Tensor, Tensor]) -> Placement:
    hull = carve(masks, cameras, bounds=box)
    covered = float(mask_iou(silhouettes(surface(hull), cameras).float(), masks).mean()) if len(hull.index) else 0.0
    return Placement(hull, covered)


def reduced(views: PosedViews, size: int) -> PosedViews:
    """Returns the views with at most `size` pixels on their longer side."""
    height, width = views.cameras.height, views.cameras.width
    if (factor := max(height, width) / size) <= 1:
        return views
    height, width = round(height / factor), round(width / factor)
    rgb, masks = (F.interpolate(images, (height, width), mode="area") for images in (views.rgb, views.masks))
    return PosedViews(rgb, masks, views.cameras.resize(height, width))


def rectify(views: PosedViews, targets: Cameras) -> PosedViews:
    """Warps views to cameras `targets` [v] that stand at the same places.

    Exact: turning a camera about its center moves pixels by a homography, whatever their depth.
    """
    cameras = views.cameras
    images = torch.cat([views.rgb - (1 - views.masks), views.masks], dim=1)  # premultiplied
    # A larger image is averaged down first, so that no pixel of it is passed over.
    if (coarser := int((cameras.fxfycxcy[:, 0] / targets.fxfycxcy[:, 0]).mean())) > 1:
        height, width = cameras.height // coarser, cameras.width // coarser
        images = F.avg_pool2d(images, coarser)
        cameras = cameras.crop(0, 0, width * coarser, height * coarser)  # the rest has no whole block
        cameras = replace(cameras, width=width * coarser, height=height * coarser).resize(height, width)
    seen = torch.einsum("vij,vhwi->vhwj", cameras.c2w[:, :3, :3], targets.rays()[1])  # world -> camera
    focal, middle = cameras.fxfycxcy[:, None, None, :2], cameras.fxfycxcy[:, None, None, 2:]
    place = seen[..., :2] / seen[..., 2:].clamp_min(1e-6) * focal + middle
    place = place / place.new_tensor([cameras.width, cameras.height]) * 2 - 1
    place = torch.where(seen[..., 2:] > 0, place, 2.0)  # behind the camera: outside of its image
    color, masks = F.grid_sample(images, place, align_corners=False).split([3, 1], dim=1)
    return PosedViews((color + 1 - masks).clamp(0, 1), masks.clamp(0, 1), targets)


def to_rig(views: PosedViews, rig: ViewRig, placement: Placement, size: int) -> PosedViews:
    """Returns the views at [size, size] as Stage 2 knows them.

    The importer's `facelift` framing: the animal's center becomes the origin, each camera is turned to look at it,
    upright, and zooms until the animal has the size of the training data; the cameras' labels say the rig's distance
    and focal length. Perspective is a few percent off at the animal's ends.
    """
    moved = views.cameras.recentre(placement.centre, 1.0)
    focal = rig.focal * size * placement.scale / rig.distance * moved.distance
    middle = torch.full_like(focal, size / 2)
    aimed = Cameras.look_at(moved.origins, torch.zeros(3), moved.fxfycxcy[0], size, size)
    aimed = replace(aimed, fxfycxcy=torch.stack([focal, focal, middle, middle], dim=-1))
    warped = rectify(replace(views, cameras=moved), aimed)
    c2w = aimed.c2w.clone()
    c2w[:, :3, 3] *= (rig.distance / moved.distance)[:, None]
    label = middle.new_tensor([rig.focal * size] * 2 + [size / 2] * 2).repeat(len(middle), 1)
    return replace(warped, cameras=replace(aimed, c2w=c2w, fxfycxcy=label))


def fit(
    starts: dict[str, Callable[[], Gaussians]], rgb: Tensor, masks: Tensor, cameras: Cameras, *,
    iterations: int | None, seed: int, progress: Callable[[Iterable], Iterable] | None,
) -> tuple[Gaussians, dict[str, Any]]:  # fmt: skip
    """Chooses the better of the starts and refines it; returns Gaussians [1, n] and what run.json says of it.

    iterations: None for what the chosen start needs. A fit that explains the given views less than its start is
    dropped: the start is returned.
    """
    made, tried = {}, {}
    for name, start in starts.items():
        made[name] = refinement.limit(start().to(rgb.device))
        if name == "stage2" and len(starts) > 1 and made[name].num_gaussians:
            unfitted = refinement.agreement(made[name], rgb, masks, cameras)
            if unfitted["iou"] >= refinement.SURE_IOU:  # the hull need not even be made
                tried = {name: unfitted}
                break
    made = {name: gaussians for name, gaussians in made.items() if gaussians.num_gaussians}
    if not made:
        raise ValueError("nothing to refine: the start has no Gaussian; try start=hull")
    name = next(iter(made))
    if len(made) > 1:
        name, tried = refinement.choose_start(made, rgb, masks, cameras, seed=seed)
    count = refinement.ITERATIONS[name] if iterations is None else iterations
    before = refinement.agreement(made[name], rgb, masks, cameras)
    fitted, count = refinement.refine(
        made[name], rgb, masks, cameras, count, refinement.SETTINGS[name], seed=seed, progress=progress
    )
    after = refinement.agreement(fitted, rgb, masks, cameras)
    if after["psnr"] < before["psnr"]:
        fitted, after, count = made[name], before, 0
    told = {"start": name, "starts_tried": tried, "iterations": count, "given_before": before, "given_after": after}
    return fitted, {**told, "anisotropy_p95": refinement.anisotropy_p95(fitted)}
