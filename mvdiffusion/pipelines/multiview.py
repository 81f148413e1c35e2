"""One image to N views: FaceLift's sampling, as a plain loop over stock diffusers objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from torch import Tensor

from multiview.cameras import Cameras
from multiview.image import resize_rgba
from multiview.run import make_generator
from mvdiffusion.components import Components
from mvdiffusion.latents import class_labels, condition_latents, decode_latents, image_embeddings
from mvdiffusion.models.unet import run_unet
from mvdiffusion.prompts import PromptEmbeds, check_embeds_fit

NUM_STEPS, GUIDANCE_SCALE = 50, 3.0
DDIM_ETA = 1.0  # FaceLift's: as much fresh noise per step as in DDPM
SAMPLERS = {
    "ddim": DDIMScheduler,  # as recorded
    "dpm++": DPMSolverMultistepScheduler,  # 2nd order, https://arxiv.org/abs/2211.01095
    "unipc": UniPCMultistepScheduler,  # https://arxiv.org/abs/2302.04867
}


def make_sampler(scheduler: DDIMScheduler, sampler: str) -> SchedulerMixin:
    """A fresh scheduler of the noise schedule and prediction type that `scheduler` (the components') records."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    # From the last trained step: with `leading`, few steps begin where pure noise was never seen (arxiv 2305.08891).
    spacing = {} if sampler == "ddim" else {"timestep_spacing": "trailing"}
    return SAMPLERS[sampler].from_config(scheduler.config, **spacing)


@torch.no_grad()
def generate_views(
    components: Components, images: Tensor, embeds: PromptEmbeds, *, seeds: Sequence[int | Sequence[int]] = (0,),
    num_steps: int = NUM_STEPS, guidance_scale: float = GUIDANCE_SCALE, sampler: str = "ddim",
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Tensor:  # fmt: skip
    """Generates the rig's views of each image: [b, n, 3, s, s], 0..1, float32, on the components' device.

    images: [b, 3, h, w] 0..1, RGB on white, square; resized to the UNet's image size.
    embeds: prompt embeddings of the rig; row i describes view i, and a UNet with camera conditioning gets camera i.
    seeds: one per image: its result depends on its own seed, not on its place in a batch or folder. Or as many to each
    image: the latents drawn with them are averaged, for smoother views that fit each other better.
    guidance_scale: 1 turns classifier-free guidance off. sampler: one of SAMPLERS. progress: wraps the time steps.
    """
    unet, rig, device = components.unet, embeds.rig, components.device
    check_embeds_fit(embeds, unet, components.unet_folder)
    if images.shape != (len(seeds), 3, images.shape[-1], images.shape[-1]):
        raise ValueError(f"images must be [{len(seeds)} seeds, 3, s, s], square RGB, got {list(images.shape)}")
    draws = [own if isinstance(own, Sequence) else (own,) for own in seeds]
    generators = [make_generator("generate_views", int(seed)) for own in draws for seed in own]

    def draw(*shape: int) -> Tensor:
        """Noise [b * draws, *shape], each from its own generator (on the CPU: the same on every device)."""
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return noise.to(device, unet.dtype)

    scheduler, guided = make_sampler(components.scheduler, sampler), guidance_scale != 1.0
    image_latents, conditions = _conditions(components, images.to(device), embeds, len(draws[0]), draw, guided)
    scheduler.set_timesteps(num_steps)
    shape = (rig.num_views, unet.config.out_channels, unet.config.sample_size, unet.config.sample_size)
    x = draw(*shape).flatten(0, 1) * scheduler.init_noise_sigma
    steps = scheduler.timesteps.tolist()
    with components.on_device("unet"):
        for step in progress(steps) if progress is not None else steps:
            noisy = torch.cat([x, x]) if guided else x
            inputs = scheduler.scale_model_input(torch.cat([noisy, image_latents], dim=1), step)
            prediction = run_unet(unet, inputs, step, **conditions)
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            fresh = {"eta": DDIM_ETA, "variance_noise": draw(*shape).flatten(0, 1)} if sampler == "ddim" else {}
            x = scheduler.step(prediction, step, x, **fresh).prev_sample
    if not x.isfinite().all():
        told = f"the UNet {components.unet_folder} gives latents that are not finite in {unet.dtype}"
        raise ValueError(f"{told}: it is damaged, diverged or too large for half precision; use another checkpoint")
    x = x.unflatten(0, (len(draws), len(draws[0]), rig.num_views)).mean(1)
    with components.on_device("vae"):
        generated = decode_latents(components, x.flatten(0, 1)).unflatten(0, x.shape[:2])
    if not generated.isfinite().all():
        remedy = "its weights are damaged, copy them again or name other components"
        raise ValueError(f"the autoencoder in {components.folder} gives images that are not finite: {remedy}")
    return generated


def _conditions(
    components: Components, images: Tensor, embeds: PromptEmbeds, draws: int, draw: Callable[..., Tensor], guided: bool
) -> tuple[Tensor, dict]:
    """Image latents of every view, and the conditions `run_unet` takes; with guidance the unconditional half first."""
    unet, rig = components.unet, embeds.rig
    with components.on_device("image_encoder"):
        embedding = image_embeddings(components, images, exact=True).repeat_interleave(draws, dim=0)
    labels = class_labels(components, embedding, draw(embedding.shape[-1]))
    resized = torch.stack([resize_rgba(image, components.image_size) for image in images.cpu()]).to(images.device)
    with components.on_device("vae"):
        latents = condition_latents(components, resized).repeat_interleave(draws, dim=0)
    # Each image is encoded once and shared by its draws and views.
    labels, latents = (x.to(unet.dtype).repeat_interleave(rig.num_views, dim=0) for x in (labels, latents))
    prompts = embeds.tensor.to(images.device, unet.dtype).repeat(len(embedding), 1, 1)
    if guided:  # the unconditional half has no image (zero labels and latents), but the same prompts and cameras
        labels, latents = (torch.cat([torch.zeros_like(part), part]) for part in (labels, latents))
        prompts = torch.cat([prompts, prompts])
    cameras = None
    if unet.config.camera_conditioning != "none":
        own = rig.cameras(components.image_size).to(images.device)
        c2w, fxfycxcy = own.c2w.expand(len(embedding), -1, -1, -1), own.fxfycxcy.expand(len(embedding), -1, -1)
        cameras = Cameras(c2w, fxfycxcy, own.height, own.width)
    return latents, {"prompts": prompts, "labels": labels, "cameras": cameras, "reference_view": rig.reference_view}
