"""The two stages, loaded once: photograph -> posed views -> Gaussians."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gslrm.model.gaussians import FilterSettings, Gaussians, filter_gaussians
from gslrm.refinement import hull_start
from multiview.cameras import Cameras, read_cameras
from multiview.image import composite, prepare_photo, read_photo, resize_rgba
from multiview.metrics import mask_from_white
from multiview.rig import ViewRig, fits_rig
from multiview.run import choose_numba_cache, resolve_device
from pipeline.artifacts import Artifacts, resolve
from pipeline.options import Checkpoints, Stage1Options
from pipeline.outputs import PARTS, PosedViews, Reconstruction
from pipeline.posed import FitOptions, Placement, fit, locate, reduced, to_rig
from pipeline.verdict import judge


class PhotographError(ValueError):
    """The photograph is at fault, not a model: other photographs may go on."""


class MouseFaceLift:
    """Both stages, loaded once. components is None without Stage 1, network without Stage 2."""

    def __init__(self, artifacts: Artifacts, components, network, device: torch.device) -> None:
        self.artifacts, self.components, self.network, self.device = artifacts, components, network, device

    @classmethod
    def load(
        cls, *, device: str = "auto", stages: str = "full", options: Stage1Options | None = None, **checkpoints: Any
    ) -> MouseFaceLift:
        """Finds the files, compares their rigs, then loads them. stages: "full", "1" or "2". checkpoints: fields of
        `pipeline.options.Checkpoints`. Raises ValueError for what is missing, RigMismatchError for a mismatch."""
        choose_numba_cache()  # here too: a notebook has no main_guard
        where, artifacts = resolve_device(device), resolve(Checkpoints(**checkpoints), options, stages=stages)
        components, network, options = None, None, artifacts.options
        if stages != "2":
            from mvdiffusion.components import load_components

            # float16 as FaceLift's inference; on most CPUs half precision is slower than single.
            dtype = torch.float16 if where.type == "cuda" else torch.float32
            components = load_components(
                artifacts.components, unet=artifacts.unet, device=where, dtype=dtype, offload=options.cpu_offload
            )
            if options.vae_slicing:  # memory of one image
                components.vae.enable_slicing()
            for part in (components.unet, components.vae) if options.channels_last else ():
                part.to(memory_format=torch.channels_last)  # convolutions in half precision are faster so on a GPU
            if options.compile:
                components.unet.compile()
        if stages != "1":
            from gslrm.checkpoints import load_gslrm

            network, _, _ = load_gslrm(artifacts.gslrm, config_file=artifacts.gslrm_config, device=where)
        return cls(artifacts, components, network, where)

    @property
    def rig(self) -> ViewRig:
        return self.artifacts.rig

    @property
    def image_size(self) -> int:
        """Side of the images that the first loaded stage works on, pixels."""
        return self.components.image_size if self.components else self.network.config.image_tokenizer.image_size

    def __call__(
        self, image: Any, *, seed: int = 0, crop: str = "auto", keep_input_view: bool = True, filtered: bool = True,
        refine: int | str = "auto", name: str = "image", progress: Callable[[Iterable], Iterable] | None = None,
    ) -> Reconstruction:  # fmt: skip
        """Reconstructs one photograph (see the package). Its result depends on its own seed alone.

        crop: framing, see `multiview.image.prepare_photo`. keep_input_view: Stage 2 sees the photograph itself as the
        reference view instead of its generated copy. filtered: leave out Gaussians that are faint or far away.
        refine: iterations of a fit to the generated views; "auto" and "off" are none, since they contradict each other.
        Raises PhotographError where the photograph cannot be read or shows no animal.
        """
        try:
            mask = self.artifacts.options.mask
            photo, report = prepare_photo(_read(image), self.image_size, crop=crop, mask=mask, source=name)
        except ValueError as error:
            raise PhotographError(str(error)) from error
        started = time.perf_counter()
        views = self.generate(photo, seed=seed, keep_input_view=keep_input_view, progress=progress)
        artifacts = self.artifacts
        record = {
            "input": name, "photo": report, "artifacts": artifacts.describe(), "seed": seed,
            "num_steps": artifacts.num_steps, "guidance_scale": artifacts.guidance_scale,
            "keep_input_view": keep_input_view, "seconds": {"stage1": round(time.perf_counter() - started, 2)},
        }  # fmt: skip
        result = self._finish(views, lambda: self.predict(views), filtered, record, photo)
        if not isinstance(refine, str):
            given = [part.to(self.device) for part in (views.rgb, views.masks, views.cameras)]
            result.gaussians, result.record["refinement"] = fit(
                {"stage2": lambda: result.gaussians}, *given, iterations=refine, seed=seed, progress=progress
            )
            result.record["gaussians"]["kept"] = result.gaussians.num_gaussians
        return self._judged(result)

    def reconstruct(
        self, views: Any, masks: Any, cameras: Cameras, *, refine: int | str = "auto", name: str = "views",
        progress: Callable[[Iterable], Iterable] | None = None, **options: Any,
    ) -> Reconstruction:  # fmt: skip
        """Reconstructs posed views: rgb [v, 3, h, w] 0..1 on white, masks [v, 1, h, w], cameras [v] that may stand
        anywhere, v >= 2. The Gaussians come back in the cameras' world.

        refine: iterations of the fit to the views; "auto" for as many as its start needs, "off" for Stage 2 alone.
        options: fields of `pipeline.posed.FitOptions`.
        Raises ValueError where masks and cameras cannot be of one animal (axes, mirrored, units, order).
        """
        wanted = FitOptions(**options)
        posed = PosedViews(torch.as_tensor(views).float(), torch.as_tensor(masks).float(), cameras)
        record = {"input": Path(name).name, "artifacts": self.artifacts.describe(), "input_views": len(cameras)}
        at_home = fits_rig(self.rig, cameras)
        if at_home and refine == "off":  # as Stage 2 was trained: nothing to find or to bring
            record["seconds"] = {}
            return self._judged(self._finish(posed, lambda: self.predict(posed), wanted.filtered, record, None))
        # Wrong axes give a plausible, wrong animal.
        placement = wanted.placement or locate(posed.masks, cameras, name)
        record |= {"agreement_of_masks": round(placement.agreement, 4), "seconds": {}}
        moved = None if at_home else placement.to_rig
        if refine == "off":
            result = self._finish(posed, lambda: self.predict_anywhere(posed, placement), wanted.filtered, record, None)
            return self._judged(replace(result, to_rig=moved))
        started, small = time.perf_counter(), reduced(posed, wanted.refine_size)
        starts = {
            "stage2": lambda: self.predict_anywhere(posed, placement, FilterSettings()),
            "hull": lambda: hull_start(placement.hull, small.rgb, small.masks, small.cameras),
        }
        if isinstance(wanted.start, Gaussians):
            starts = {"previous": lambda: wanted.start}
        elif wanted.start != "auto":
            starts = {wanted.start: starts[wanted.start]}
        given = [part.to(self.device) for part in (small.rgb, small.masks, small.cameras)]
        count = None if refine == "auto" else int(refine)
        gaussians, told = fit(starts, *given, iterations=count, seed=wanted.seed, progress=progress)
        counts = {"predicted": gaussians.num_gaussians}
        if wanted.filtered and "previous" not in starts:
            gaussians = filter_gaussians(gaussians, FilterSettings(crop_box=None))  # the views have shaped the rest
        counts["kept"] = gaussians.num_gaussians
        record["seconds"]["refinement"] = round(time.perf_counter() - started, 2)
        record |= {"refinement": told, "filtered": wanted.filtered, "gaussians": counts}
        return self._judged(Reconstruction(gaussians, posed, self.rig, record, to_rig=moved))

    def predict_anywhere(
        self, views: PosedViews, placement: Placement, keep: FilterSettings | None = None
    ) -> Gaussians:
        """Stage 2 on views whose cameras stand anywhere: Gaussians [1, n] in the cameras' world.

        keep: filters in the rig's world, for which its lengths are made.
        """
        at_home = fits_rig(self.rig, views.cameras)
        size = self.network.config.image_tokenizer.image_size
        gaussians = self.predict(views if at_home else to_rig(views, self.rig, placement, size))
        gaussians = gaussians if keep is None else filter_gaussians(gaussians, keep)
        return gaussians if at_home else gaussians.moved(torch.linalg.inv(placement.to_rig))

    def _judged(self, result: Reconstruction) -> Reconstruction:
        parts = result.gaussians, result.views, result.record, result.photo, self.rig.reference_view
        result.record["verdict"] = judge(*parts)
        return result

    def _finish(
        self, views: PosedViews, predict: Callable[[], Gaussians], filtered: bool, record: dict, photo: Tensor | None
    ) -> Reconstruction:
        started = time.perf_counter()
        predicted = predict()
        record["seconds"]["stage2"] = round(time.perf_counter() - started, 2)
        gaussians = filter_gaussians(predicted) if filtered else predicted
        counts = {"predicted": predicted.num_gaussians, "kept": gaussians.num_gaussians}
        return Reconstruction(gaussians, views, self.rig, {**record, "filtered": filtered, "gaussians": counts}, photo)

    def generate(
        self, photo: Tensor, *, seed: int, keep_input_view: bool = True,
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> PosedViews:  # fmt: skip
        """Stage 1. photo: [4, s, s] RGBA framed as the training data (`multiview.image`). Returns CPU tensors.

        keep_input_view: the photograph itself stands for the reference view instead of its generated copy.
        """
        from mvdiffusion.pipelines.multiview import generate_views

        artifacts, rig, size = self.artifacts, self.rig, self.components.image_size
        own, cameras = resize_rgba(photo, size), rig.cameras(size)
        if artifacts.camera_json is not None:
            cameras = read_cameras(artifacts.camera_json).resize(size, size)

        rgb = generate_views(
            self.components, composite(photo, 1.0)[None], artifacts.embeds, seeds=[artifacts.draws(seed)],
            num_steps=artifacts.num_steps, guidance_scale=artifacts.guidance_scale,
            sampler=artifacts.options.sampler, progress=progress,
        )[0].cpu()  # fmt: skip
        rgb = (rgb * 255).round() / 255  # the images that are written are the images that are used
        masks = mask_from_white(rgb)
        if keep_input_view:
            rgb[rig.reference_view], masks[rig.reference_view] = composite(own, 1.0), own[3:]
        return PosedViews(rgb, masks, cameras)

    @torch.no_grad()
    def predict(self, views: PosedViews) -> Gaussians:
        """Stage 2: posed views of any number and size -> Gaussians [1, n] on the device, unfiltered."""
        config, device = self.network.config, self.device
        size, cameras, rgb, masks = config.image_tokenizer.image_size, views.cameras, views.rgb, views.masks
        # Resized in 8 bits, as the training data was.
        rgba = torch.stack([resize_rgba(torch.cat(pair), size) for pair in zip(rgb, masks)])[None]
        with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
            gaussians = self.network(
                rgba[:, :, :3].to(device), cameras.resize(size, size)[None].to(device),
                masks=rgba[:, :, 3:].to(device) if config.prune_background_tokens else None,
            ).gaussians  # fmt: skip
        for name in PARTS:
            # A filter would drop such Gaussians without a word, and "nothing there" would look like a result.
            if not torch.isfinite(getattr(gaussians, name)).all():
                raise ValueError(
                    f"Stage 2 predicted Gaussians whose {name} is not finite: the weights of --checkpoint are damaged "
                    "or its training diverged; name an earlier ckpt_*.pt, or copy it again"
                )
        return gaussians


def _read(image: Any) -> Tensor:
    """Returns any kind of image as RGBA [4, h, w] 0..1."""
    if isinstance(image, (str, Path)):
        return read_photo(image)  # upright, and large ones reduced
    if not isinstance(image, torch.Tensor):
        array = np.asarray(image.convert("RGBA") if hasattr(image, "convert") else image)  # a PIL image, or an array
        if array.dtype != np.uint8 or array.ndim != 3:
            raise ValueError(f"an array must be [h, w, 3 or 4] uint8, got {list(array.shape)} {array.dtype}")
        image = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
    if image.ndim != 3 or image.shape[0] not in (3, 4):
        raise ValueError(f"an image must be [3 or 4, h, w] in 0..1, got {list(image.shape)}")
    return image if len(image) == 4 else torch.cat([image, torch.ones_like(image[:1])])
