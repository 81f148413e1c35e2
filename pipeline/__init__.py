"""Both stages behind one door: one photograph of a mouse, or posed views of it, to 3D Gaussians.

    from pipeline import MouseFaceLift
    model = MouseFaceLift.load()                 # the demo models; name checkpoints for others
    result = model("mouse.png")                  # path, PIL image, array [h, w, 3|4] uint8 or tensor [4, h, w] 0..1
    result.save("outputs/mouse")                 # as inference_mouse.py
    result.gaussians, result.numpy()             # tensors; arrays
    result.render(cameras).rgb                   # cameras: multiview.cameras.Cameras [v]
    model.reconstruct(views, masks, cameras)     # Stage 2 alone, on posed views of your own
Importing this takes no time: torch and the models come with `load`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from gslrm.model.gaussians import Gaussians
    from gslrm.model.gaussians_renderer import RenderOutput
    from gslrm.model.gslrm import GSLRM
    from multiview.cameras import Cameras
    from multiview.rig import ViewRig
    from mvdiffusion.components import Components
    from pipeline.artifacts import Artifacts, Stage1Options
    from pipeline.stages import PosedViews


class PhotographError(ValueError):
    """The photograph is at fault, not a model: other photographs may go on."""


class MouseFaceLift:
    """Both stages, loaded once. components is None without Stage 1, network without Stage 2."""

    def __init__(
        self, artifacts: Artifacts, components: Components | None, network: GSLRM | None, device: torch.device
    ) -> None:
        self.artifacts, self.components, self.network, self.device = artifacts, components, network, device

    @classmethod
    def load(
        cls, *, device: str = "auto", stages: str = "full", options: Stage1Options | None = None, **checkpoints: Any
    ) -> MouseFaceLift:
        """Finds the files, compares their rigs, then loads them.

        stages: "full", or "1" or "2" alone. checkpoints: fields of `pipeline.artifacts.Checkpoints`, by name.
        Raises ValueError for what is missing, RigMismatchError for what does not belong together.
        """
        from multiview.run import choose_numba_cache, resolve_device
        from pipeline.artifacts import Checkpoints, load_stage1, load_stage2, resolve

        choose_numba_cache()  # here too: a notebook has no main_guard
        where = resolve_device(device)
        artifacts = resolve(Checkpoints(**checkpoints), options, stages=stages)
        components = load_stage1(artifacts, where) if stages != "2" else None
        return cls(artifacts, components, load_stage2(artifacts, where) if stages != "1" else None, where)

    @property
    def rig(self) -> ViewRig:
        return self.artifacts.rig

    @property
    def image_size(self) -> int:
        """Side of the images that the first loaded stage works on, pixels."""
        return self.components.image_size if self.components else self.network.config.image_tokenizer.image_size

    def __call__(
        self, image: Any, *, seed: int = 0, crop: str = "auto", keep_input_view: bool = True, filtered: bool = True,
        name: str = "image", progress: Callable[[Iterable], Iterable] | None = None,
    ) -> Reconstruction:  # fmt: skip
        """Reconstructs one photograph (see the module). Its result depends on its own seed alone.

        crop: framing, see `multiview.image.prepare_photo`. keep_input_view: Stage 2 sees the photograph itself as the
        reference view instead of its generated copy. filtered: leave out Gaussians that are faint or far away.
        Raises PhotographError where the photograph cannot be read or shows no animal.
        """
        from multiview.image import prepare_photo

        try:
            photo, report = prepare_photo(_read(image), self.image_size, crop=crop, source=name)
        except ValueError as error:
            raise PhotographError(str(error)) from error
        started = time.perf_counter()
        views = self.generate(photo, seed=seed, keep_input_view=keep_input_view, progress=progress)
        artifacts = self.artifacts
        record = {
            "input": name, "photo": asdict(report), "artifacts": artifacts.describe(), "seed": seed,
            "num_steps": artifacts.num_steps, "guidance_scale": artifacts.guidance_scale,
            "keep_input_view": keep_input_view, "seed_scores": views.seed_scores, "mirrored": views.mirrored,
            "mirror_scores": views.mirror_scores, "seconds": {"stage1": round(time.perf_counter() - started, 2)},
        }  # fmt: skip
        return self._reconstruct(views, filtered, record, photo)

    def reconstruct(
        self, views: Any, masks: Any, cameras: Cameras, *, filtered: bool = True, name: str = "views"
    ) -> Reconstruction:
        """Reconstructs posed views by Stage 2 alone: views [v, 3, h, w] 0..1 on white, masks [v, 1, h, w], cameras [v].

        Raises ValueError where the cameras are none that Stage 2 can take (axes, mirrored, units).
        """
        import torch

        from multiview.rig import check_posed_views
        from pipeline.stages import PosedViews

        check_posed_views(self.rig, cameras, name)  # wrong axes give a plausible, wrong animal
        posed = PosedViews(torch.as_tensor(views).float(), torch.as_tensor(masks).float(), cameras)
        record = {"input": Path(name).name, "artifacts": self.artifacts.describe(), "input_views": len(cameras)}
        return self._reconstruct(posed, filtered, {**record, "seconds": {}})

    def _reconstruct(
        self, views: PosedViews, filtered: bool, record: dict, photo: Tensor | None = None
    ) -> Reconstruction:
        from gslrm.model.gaussians import filter_gaussians

        started = time.perf_counter()
        predicted = self.predict(views)
        record["seconds"]["stage2"] = round(time.perf_counter() - started, 2)
        gaussians = filter_gaussians(predicted) if filtered else predicted
        counts = {"predicted": predicted.num_gaussians, "kept": gaussians.num_gaussians}
        return Reconstruction(gaussians, views, self.rig, {**record, "filtered": filtered, "gaussians": counts}, photo)

    def generate(
        self, photo: Tensor, *, seed: int, keep_input_view: bool = True,
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> PosedViews:  # fmt: skip
        """Stage 1 on a photograph [4, s, s] framed as the training data: see `pipeline.stages.generate`."""
        from pipeline.stages import generate

        return generate(
            self.components, self.artifacts, photo, seed=seed, keep_input_view=keep_input_view, progress=progress
        )

    def predict(self, views: PosedViews) -> Gaussians:
        """Stage 2 on posed views, unfiltered: see `pipeline.stages.reconstruct`."""
        from pipeline.stages import reconstruct

        return reconstruct(self.network, views, self.device)


@dataclass
class Reconstruction:
    """Gaussians [1, n] and what they were made from. record: for run.json. photo: [4, s, s], None for posed views."""

    gaussians: Gaussians
    views: PosedViews
    rig: ViewRig
    record: dict
    photo: Tensor | None = None

    def numpy(self) -> dict[str, np.ndarray]:
        """Returns xyz [n, 3], features [n, k, 3], log scaling [n, 3], rotation wxyz [n, 4], opacity logits [n, 1]."""
        names = ("xyz", "features", "scaling", "rotation", "opacity")
        return {name: getattr(self.gaussians, name)[0].detach().float().cpu().numpy() for name in names}

    def render(self, cameras: Cameras, background: Tensor | float = 1.0) -> RenderOutput:
        """Renders from cameras [v]: rgb [1, v, 3, h, w], alpha and depth [1, v, 1, h, w]."""
        import torch

        from gslrm.model.gaussians_renderer import render

        with torch.no_grad():  # gradients would keep every Gaussian's projection in memory
            return render(self.gaussians, cameras.to(self.gaussians.device)[None], background=background)

    def save(
        self, folder: Path | str, *, turntable_views: int = 120, turntable_size: int = 256,
        export: Sequence[str] = (), mesh: str | None = None, maps: bool = False, sheet: bool = False,
    ) -> None:  # fmt: skip
        """Writes everything into `folder`; run.json comes last.

        export: of "splat", "ply_compressed". mesh: "ply" or "glb". maps, sheet: see `outputs.write_renderings`.
        """
        from multiview.files import full_disk_explained
        from pipeline import outputs

        folder, started = Path(folder), time.perf_counter()
        with full_disk_explained(folder / "gaussians.ply"):
            outputs.start_folder(folder)
            outputs.write_stage1(folder, self)
            outputs.write_stage2(folder, self, turntable_views=turntable_views, turntable_size=turntable_size)
            outputs.write_exports(folder, self.gaussians, export, mesh)
            if maps or sheet:
                outputs.write_renderings(
                    folder, self.gaussians, self.views, maps=maps, sheet=sheet, photo=self.photo
                )  # fmt: skip
            seconds = {**self.record["seconds"], "output": round(time.perf_counter() - started, 2)}
            outputs.write_run(folder, self.rig, {**self.record, "seconds": seconds})


def _read(image: Any) -> Tensor:
    """Returns any kind of image as RGBA [4, h, w] 0..1."""
    import numpy as np
    import torch

    from multiview.image import read_photo

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
