"""Which solver turns the UNet's predictions into pictures: FaceLift's DDIM, or one that needs fewer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, SchedulerMixin

SAMPLERS = ("ddim", "dpm++", "unipc")
DDIM_ETA = 1.0  # FaceLift's: as much fresh noise per step as in DDPM


def make_sampler(scheduler: DDIMScheduler, sampler: str) -> SchedulerMixin:
    """A fresh scheduler of the noise schedule and prediction type that `scheduler` (the components') records.

    ddim: the recorded one as it is. dpm++ (2nd order multistep DPM-Solver++, https://arxiv.org/abs/2211.01095) and
    unipc (https://arxiv.org/abs/2302.04867) spread their steps from the last trained one (`trailing`,
    https://arxiv.org/abs/2305.08891): with `leading` few steps begin at a time step where pure noise was never seen.
    """
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler == "ddim":
        return type(scheduler).from_config(scheduler.config)
    kind = DPMSolverMultistepScheduler if sampler == "dpm++" else UniPCMultistepScheduler
    return kind.from_config(scheduler.config, timestep_spacing="trailing")


def resolve_eta(sampler: str, eta: float | None) -> float:
    """Fresh noise per step, 0..1: FaceLift's 1 for ddim unless given; the other samplers have none."""
    if sampler == "ddim":
        return DDIM_ETA if eta is None else eta
    if eta:
        raise ValueError(f"eta is an option of sampler ddim; sampler {sampler} adds no noise, got eta {eta}")
    return 0.0
