"""One image to N views: FaceLift's sampling, as a plain loop over stock diffusers objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multiview.cameras import Cameras
from multiview.image import resize_rgba
from multiview.run import make_generator
from mvdiffusion.latents import class_labels, clip_pixels_exact, condition_latents, decode_latents, image_embeddings
from mvdiffusion.models.unet import run_unet
from mvdiffusion.prompts import PromptEmbeds, check_embeds_fit

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, SchedulerMixin

    from mvdiffusion.components import Components

NUM_STEPS = 50
GUIDANCE_SCALE = 3.0
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


@torch.no_grad()
def generate_views(
    components: Components,
    images: Tensor,
    embeds: PromptEmbeds,
    *,
    seeds: Sequence[int] = (0,),
    num_steps: int = NUM_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    sampler: str = "ddim",
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Tensor:
    """Generates the rig's views of each image.

    images: [b, 3, h, w] 0..1, RGB on white, square; resized to the UNet's image size.
    embeds: prompt embeddings of the rig; row i describes view i, and a UNet with camera conditioning gets camera i.
    seeds: one per image: its result depends on its own seed, not on its place in a batch or folder.
    guidance_scale: 1 turns classifier-free guidance (and its second half of the batch) off.
    sampler: one of SAMPLERS. progress: wraps the iteration over time steps, e.g. tqdm.
    Returns [b, n, 3, s, s], 0..1, float32, on the components' device. Refuses latents that are not finite.
    """
    unet, rig, device = components.unet, embeds.rig, components.device
    check_embeds_fit(embeds, unet, components.unet_folder)
    if images.shape != (len(seeds), 3, images.shape[-1], images.shape[-1]):
        raise ValueError(f"images must be [{len(seeds)} seeds, 3, s, s], square RGB, got {list(images.shape)}")
    generators = [make_generator("generate_views", int(seed)) for seed in seeds]

    def draw(*shape: int) -> Tensor:
        """Noise [b, *shape], each image's from its own generator (on the CPU: the same on every device)."""
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return noise.to(device, unet.dtype)

    scheduler, guided = make_sampler(components.scheduler, sampler), guidance_scale != 1.0
    labels, image_latents, prompts = _conditions(components, images, embeds, draw)
    if guided:  # the unconditional half has no image (zero labels and latents), but the same prompts and cameras
        labels, image_latents = (torch.cat([torch.zeros_like(part), part]) for part in (labels, image_latents))
        prompts = torch.cat([prompts, prompts])
    cameras = None if unet.config.camera_conditioning == "none" else _cameras(components, embeds, len(images))
    scheduler.set_timesteps(num_steps)
    shape = (rig.num_views, unet.config.out_channels, unet.config.sample_size, unet.config.sample_size)
    x = draw(*shape).flatten(0, 1) * scheduler.init_noise_sigma
    steps = scheduler.timesteps.tolist()
    with components.on_device("unet"):
        for step in progress(steps) if progress is not None else steps:
            noisy = torch.cat([x, x]) if guided else x
            inputs = scheduler.scale_model_input(torch.cat([noisy, image_latents], dim=1), step)
            prediction = run_unet(
                unet, inputs, step, prompts=prompts, labels=labels, cameras=cameras, reference_view=rig.reference_view
            )
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            fresh = {"eta": DDIM_ETA, "variance_noise": draw(*shape).flatten(0, 1)} if sampler == "ddim" else {}
            x = scheduler.step(prediction, step, x, **fresh).prev_sample
    if not x.isfinite().all():
        raise ValueError(
            f"the UNet {components.unet_folder} gives latents that are not finite in {unet.dtype}: its weights are "
            "damaged or its training diverged, use another checkpoint; in half precision they may be too large for it"
        )
    with components.on_device("vae"):
        generated = decode_latents(components, x).unflatten(0, (len(images), rig.num_views))
    if not generated.isfinite().all():
        raise ValueError(
            f"the autoencoder in {components.folder} gives images that are not finite: its weights are damaged, copy "
            "them again or name other components"
        )
    return generated


def _conditions(
    components: Components, images: Tensor, embeds: PromptEmbeds, draw: Callable[..., Tensor]
) -> list[Tensor]:
    """Class labels, image latents and prompts of every view; the image is encoded once and shared by its views."""
    dtype, device, views = components.unet.dtype, components.device, embeds.rig.num_views
    resized = torch.stack([resize_rgba(image.cpu(), components.image_size) for image in images]).to(device)
    with components.on_device("image_encoder"):
        embedding = image_embeddings(components, clip_pixels_exact(components, images.to(device)))
    labels = class_labels(components, embedding, draw(embedding.shape[-1]))
    with components.on_device("vae"):
        latents = condition_latents(components, resized)
    per_view = [tensor.to(dtype).repeat_interleave(views, dim=0) for tensor in (labels, latents)]
    return [*per_view, embeds.tensor.to(device, dtype).repeat(len(images), 1, 1)]


def _cameras(components: Components, embeds: PromptEmbeds, count: int) -> Cameras:
    """The rig's cameras [count, n]."""
    own = embeds.rig.cameras(components.image_size)
    c2w, fxfycxcy = own.c2w.expand(count, -1, -1, -1), own.fxfycxcy.expand(count, -1, -1)
    return Cameras(c2w, fxfycxcy, own.height, own.width).to(components.device)
