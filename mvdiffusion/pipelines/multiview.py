"""One image to N views: FaceLift's sampling, as a plain loop over stock diffusers objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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
    eta: float | None = None,
    cameras: Cameras | None = None,
    keep_input_view: bool = False,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Tensor:
    """Generates the rig's views of each image.

    images: [b, 3, h, w] 0..1, RGB on white, square; resized to the UNet's image size.
    embeds: prompt embeddings of the rig; row i describes view i.
    seeds: one per image: its result depends on its own seed, not on its place in a batch or folder.
    guidance_scale: 1 turns classifier-free guidance (and its second half of the batch) off.
    sampler: ddim, dpm++ or unipc (`samplers`). eta: ddim's fresh noise per step, None for FaceLift's 1.
    cameras: [n], where the views are seen from, in any world frame; None for the rig's own. For UNets with camera
    conditioning; row i of embeds and camera i are one view, and the rig's reference view is the input's.
    keep_input_view: put the input image itself in place of the generated reference view.
    progress: wraps the iteration over time steps, e.g. tqdm.
    Returns [b, n, 3, s, s], 0..1, float32, on the components' device.
    """
    unet, batch, views = components.unet, len(images), embeds.rig.num_views
    check_embeds_fit(embeds, unet, components.unet_folder)
    if eta and sampler != "ddim":
        raise ValueError(f"eta is an option of sampler ddim; sampler {sampler} adds no noise, got eta {eta}")
    eta = DDIM_ETA if eta is None else eta
    if images.shape[1] != 3 or images.shape[-2] != images.shape[-1]:
        raise ValueError(f"images must be [b, 3, s, s] (RGB on white, square), got {list(images.shape)}")
    if len(seeds) != batch:
        raise ValueError(f"one seed per image is needed: {batch} images, {len(seeds)} seeds")
    generators = [make_generator("generate_views", int(seed)) for seed in seeds]
    size, latent, device = components.image_size, unet.config.sample_size, components.device
    cameras = _batch_cameras(components, embeds, cameras, batch)

    def draw(*shape: int) -> Tensor:
        """Noise [b, *shape], each image's from its own generator (on the CPU: the same on every device)."""
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return noise.to(device, unet.dtype)

    # The image is encoded once per object and shared by its views.
    resized = torch.stack([resize_rgba(image.cpu(), size) for image in images]).to(device)
    with components.on_device("image_encoder"):
        embedding = image_embeddings(components, clip_pixels_exact(components, images.to(device)))
    labels = class_labels(components, embedding, draw(embedding.shape[-1]))
    labels = labels.to(unet.dtype).repeat_interleave(views, dim=0)
    with components.on_device("vae"):
        image_latents = condition_latents(components, resized).to(unet.dtype).repeat_interleave(views, dim=0)
    prompts = embeds.tensor.to(device, unet.dtype).repeat(batch, 1, 1)
    guided = guidance_scale != 1.0
    if guided:
        # Unconditional half: no image (zero labels and latents), the same prompts and cameras.
        labels = torch.cat([torch.zeros_like(labels), labels])
        image_latents = torch.cat([torch.zeros_like(image_latents), image_latents])
        prompts = torch.cat([prompts, prompts])

    scheduler = make_sampler(components.scheduler, sampler)
    scheduler.set_timesteps(num_steps)
    shape = (views, unet.config.out_channels, latent, latent)
    x = draw(*shape).flatten(0, 1) * scheduler.init_noise_sigma
    steps = scheduler.timesteps.tolist()
    with components.on_device("unet"):
        for step in progress(steps) if progress is not None else steps:
            noisy = torch.cat([x, x]) if guided else x
            inputs = scheduler.scale_model_input(torch.cat([noisy, image_latents], dim=1), step)
            prediction = run_unet(
                unet, inputs, step, prompts=prompts, labels=labels, cameras=cameras,
                reference_view=embeds.rig.reference_view,
            )  # fmt: skip
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            options = {}
            if sampler == "ddim":
                options = {"eta": eta, "variance_noise": draw(*shape).flatten(0, 1) if eta > 0 else None}
            x = scheduler.step(prediction, step, x, **options).prev_sample

    if not x.isfinite().all():
        raise ValueError(
            f"the UNet {components.unet_folder} gives latents that are not finite in {unet.dtype}: its weights are "
            "damaged or its training diverged, use another checkpoint; in half precision they may be too large for it"
        )
    with components.on_device("vae"):
        generated = decode_latents(components, x).unflatten(0, (batch, views))
    if keep_input_view:
        generated[:, embeds.rig.reference_view] = resized
    return generated


def _batch_cameras(components: Components, embeds: PromptEmbeds, cameras: Cameras | None, batch: int) -> Cameras | None:
    """Cameras [batch, n] for `run_unet`; None for a UNet that takes none."""
    if components.unet.config.camera_conditioning == "none":
        if cameras is not None:
            raise ValueError(
                "cameras are for a UNet with camera conditioning; this one generates the views its prompts name: train "
                "with camera_conditioning=adaln, or leave the cameras out"
            )
        return None
    own = embeds.rig.cameras(components.image_size) if cameras is None else cameras
    if own.shape != (embeds.rig.num_views,):
        raise ValueError(
            f"cameras must have shape [{embeds.rig.num_views}], one per prompt of {embeds.source}, got "
            f"{list(own.shape)}"
        )
    expanded = Cameras(own.c2w.expand(batch, -1, -1, -1), own.fxfycxcy.expand(batch, -1, -1), own.height, own.width)
    return expanded.to(components.device)


class BestViews(NamedTuple):
    """views: [n, 3, s, s] of the best seed. seed: sampling once with it gives them again. scores: by seed tried."""

    views: Tensor
    seed: int
    scores: dict[int, float]


def generate_best_views(
    components: Components,
    image: Tensor,
    embeds: PromptEmbeds,
    *,
    seed: int,
    num_seeds: int,
    score: Callable[[Tensor], float],
    **options: Any,
) -> BestViews:
    """Generates views with the seeds seed, seed + 1, ... and keeps the set that scores highest (ties: the first).

    image: [3, h, w], as for `generate_views`, which takes the `options`.
    score: views [n, 3, s, s] -> a number, larger is better, e.g. `multiview.metrics.view_consistency`.
    One set after the other: the memory of one.
    """
    if num_seeds < 1:
        raise ValueError(f"num_seeds must be at least 1, got {num_seeds}")
    best, scores = None, {}
    for number in range(seed, seed + num_seeds):
        views = generate_views(components, image[None], embeds, seeds=[number], **options)[0]
        scores[number] = float(score(views))
        if best is None or scores[number] > scores[best[0]]:
            best = (number, views)
    return BestViews(best[1], best[0], scores)
