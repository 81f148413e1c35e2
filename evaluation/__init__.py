"""What scripts/evaluate.py is asked for. Nothing heavy is imported here, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from multiview.config import option

BASELINES = ("copy", "nearest", "hull", "six_views", "autoencoder")  # refined is asked for: it takes seconds a mouse
SWEEPS = {  # factor -> the stages that it applies to, what its values are
    "camera_noise_deg": (("2",), "camera rotation error, standard deviation in degrees"),
    "camera_noise_mm": (("2",), "camera position error per axis, standard deviation in mm"),
    "camera_noise_px": (("2",), "principal point error per axis, standard deviation in px"),
    "num_input_views": (("2",), "input views"),
    "min_opacity": (("2", "full"), "filter: least opacity kept, the rest as in the preset 'animal'"),
    "max_scaling": (
        ("2", "full"), "filter: largest standard deviation kept in world units, the rest as in the preset 'animal'",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Which stage is measured on which samples, beside which baselines; or which factors are swept."""

    stage: str = option(..., "1, 2 or full: both", choices=("1", "2", "full"))
    data: Path = option(
        Path("data_mouse/data_mouse_val.txt"), "held-out samples; default: data_mouse/data_mouse_val.txt"
    )
    num_samples: int | None = option(None, "the first n of the list; default: all", least=1)
    baselines: tuple[str, ...] = option(
        BASELINES, f"of {', '.join(BASELINES)}, refined, none; default: all that apply but refined",
        choices=(*BASELINES, "refined", "none"),
        metavar="NAME",
    )  # fmt: skip
    leave_one_out: bool = option(False, "stage 2: each view of a calibrated sample is asked of a fit to all others")
    train_data: Path | None = option(None, "split list of training samples, for the baseline 'nearest'")
    seed: int = option(0, "of generated views and noise; default: 0")
    device: str = option("auto", "auto, cpu or cuda")
    output_dir: Path = option(Path("outputs/evaluation"), "default: outputs/evaluation")
    camera_noise_deg: tuple[float, ...] = option((), "sweep: camera rotation error, std, degrees", least=0, metavar="X")
    camera_noise_mm: tuple[float, ...] = option((), "sweep: camera position error, std, mm", least=0, metavar="X")
    camera_noise_px: tuple[float, ...] = option((), "sweep: principal point error, std, input px", least=0, metavar="X")
    num_input_views: tuple[int, ...] = option((), "sweep: how many views go in", least=1, metavar="N")
    min_opacity: tuple[float, ...] = option((), "sweep: fainter Gaussians are left out", least=0, metavar="X")
    max_scaling: tuple[float, ...] = option((), "sweep: Gaussians of larger std are left out", least=0, metavar="X")
    world_units_per_mm: float | None = option(None, "scale of the data; default: from dataset.json, if it says so")

    def __post_init__(self) -> None:
        for factor, (stages, _) in SWEEPS.items():
            if getattr(self, factor) and self.stage not in stages:
                raise ValueError(f"--{factor} is a sweep of --stage {' or '.join(stages)}, got --stage {self.stage}")
        if self.leave_one_out and self.stage != "2":
            raise ValueError(f"--leave_one_out is a test of --stage 2, got --stage {self.stage}")
        if self.world_units_per_mm is not None and self.world_units_per_mm <= 0:
            raise ValueError(f"--world_units_per_mm must be above 0, got {self.world_units_per_mm}")
        if "none" in self.baselines and len(self.baselines) > 1:
            raise ValueError(f"--baselines none stands alone, got {' '.join(self.baselines)}")
