"""Refined samples of any calibrated rig, filmed again by a rig's exact cameras: training data of both stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gslrm.model.gaussians_renderer import render
from gslrm.refinement import agreement
from multiview.files import write_json
from multiview.rig import ViewRig, fits_rig, load_rig
from multiview.run import seed_from, stoppable
from multiview.sample import (
    Sample,
    check_names,
    is_complete_sample,
    open_dataset,
    read_sample,
    read_split,
    write_complete,
    write_sample,
)
from pipeline.model import MouseFaceLift
from pipeline.outputs import PosedViews
from pipeline.posed import locate


def reshoot(
    model: MouseFaceLift, folder: Path, rig: ViewRig, *, num_novel_views: int, image_size: int, least_psnr: float,
    seed: int = 0, **settings,
) -> tuple[Sample | None, float]:  # fmt: skip
    """Returns the sample filmed by the rig, None below the threshold, and the PSNR of a view that was left out, dB.

    The left-out view (another one from sample to sample) is asked of a fit to all others: what this cannot show, new
    cameras would not see either. settings: of `MouseFaceLift.reconstruct`.
    Alpha is the Gaussians' own, so that masks are soft; depth is the mean depth where alpha is at least a half.
    """
    source = read_sample(folder, padded=True)
    views = PosedViews.of(source.rgba[: source.num_inputs], source.cameras[: source.num_inputs])
    parts = views.rgb, views.masks, views.cameras
    rng = np.random.default_rng(seed_from("reshoot", seed, folder.name))
    left = int(rng.integers(len(views.rgb)))
    others = [view for view in range(len(views.rgb)) if view != left]
    placement = locate(views.masks, views.cameras, str(folder))
    fitted = model.reconstruct(*(part[others] for part in parts), name=str(folder), seed=seed, **settings)
    asked = [part[[left]].to(model.device) for part in parts]
    psnr = agreement(fitted.gaussians, *asked)["psnr"]
    if psnr < least_psnr:
        return None, psnr
    gaussians = model.reconstruct(*parts, name=str(folder), seed=seed, placement=placement, **settings).gaussians
    if not fits_rig(rig, views.cameras):  # a world of another size or place becomes the training data's
        gaussians = gaussians.moved(placement.to_rig)
    cameras = rig.cameras(image_size)
    if num_novel_views:
        cameras = cameras.joined(rig.novel_cameras(num_novel_views, image_size, rng))
    rgba, depth = [], []
    for view in range(len(cameras)):
        seen = render(gaussians, cameras[view : view + 1][None].to(model.device), background=0.0)
        color = seen.rgb / seen.alpha.clamp_min(1 / 512)
        rgba.append(torch.cat([color, seen.alpha], dim=2)[0].clamp(0, 1).cpu())
        depth.append(seen.mean_depth()[0].cpu())
    names = [*rig.view_names, *[None] * num_novel_views]
    told = {"reshot": {"source": source.id, "left_out": {"view": left, "psnr": round(psnr, 2)}}}
    kept = {key: source.extra[key] for key in ("frame", "heading_deg") if key in source.extra}
    return Sample(folder.name, torch.cat(rgba), cameras, names, torch.cat(depth), None, {**kept, **told}), psnr


def reshoot_lists(settings: Any, model: MouseFaceLift, share: tuple[int, int]) -> Iterator[str]:
    """Films every sample of the split lists anew into settings.output_dir; yields a line per list.

    settings: of scripts/reshoot.py. share: (number, count): this process takes every count-th sample from its number.
    left_out/<sample>.json says what was left out, and why.
    """
    folder, rig, (number, count) = settings.output_dir, load_rig(settings.rig), share
    if len({path.parent.resolve() for path in settings.data}) != 1:
        raise ValueError(f"--data must be split lists of one dataset, got {', '.join(map(str, settings.data))}")
    lists = {path: read_split(path) for path in settings.data}
    check_names([source for sources in lists.values() for source in sources])
    if rig.azimuth_zero != "reference":
        raise ValueError(f"--rig {rig.name} counts azimuths from the animal's heading, which a fit does not know")
    asked = {name: getattr(settings, name) for name in ("num_novel_views", "image_size", "least_psnr", "seed")}
    told = {"source": "reshot", "source_data": settings.data[0].parent.as_posix(), **asked}
    open_dataset(folder, rig, told | {"gslrm": str(model.artifacts.describe()["gslrm"])})
    for path, sources in lists.items():
        for source in stoppable(tqdm(sources[number::count], desc=path.name, unit="sample", disable=None)):
            refusal = folder / "left_out" / f"{source.name}.json"
            if is_complete_sample(folder / source.name) or refusal.is_file():
                continue
            try:
                sample, psnr = reshoot(model, source, rig, **asked)
                reason = f"a view that was left out is shown with {psnr:.1f} dB, at least {settings.least_psnr:g} asked"
            except ValueError as error:
                sample, reason = None, str(error)
            if sample is None:
                write_json(refusal, {"sample": str(source), "reason": reason})
            else:
                write_sample(folder / source.name, sample)
        listed = write_complete(folder / path.name, [folder / source.name for source in sources])
        refused = sum((folder / "left_out" / f"{source.name}.json").is_file() for source in sources)
        yield f"{folder / path.name}: {listed} of {len(sources)} samples, {refused} left out ({folder / 'left_out'})"
