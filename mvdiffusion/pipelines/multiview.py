"""One picture to N views: FaceLift's sampling, as a plain loop over stock diffusers objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multiview.image import resize_rgba
from multiview.run import make_generator
from mvdiffusion.conditioning import (
    class_labels,
    clip_pixels_exact,
    condition_latents,
    decode_latents,
    image_embeddings,
)
from mvdiffusion.prompts import PromptEmbeds, check_embeds_fit

if TYPE_CHECKING:
    from mvdiffusion.components import Components

NUM_STEPS = 50
GUIDANCE_SCALE = 3.0
ETA = 1.0


@torch.no_grad()
def generate_views(
    components: Components,
    pictures: Tensor,
    embeds: PromptEmbeds,
    *,
    seeds: Sequence[int] = (0,),
    num_steps: int = NUM_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    eta: float = ETA,
    keep_input_view: bool = False,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Tensor:
    """Paints the rig's views of each picture.

    pictures: [b, 3, h, w] 0..1, RGB on white, square; resized to the UNet's picture size.
    embeds: prompt embeddings of the rig; row i describes view i.
    seeds: one per picture: a picture's result depends on its own seed, not on its place in a batch or folder.
    guidance_scale: 1 turns classifier-free guidance (and its second half of the batch) off.
    keep_input_view: put the input picture itself in place of the generated reference view.
    progress: wraps the iteration over time steps, e.g. tqdm.
    Returns [b, n, 3, s, s], 0..1, float32, on the components' device.
    """
    unet, batch, views = components.unet, len(pictures), embeds.rig.num_views
    check_embeds_fit(embeds, unet, components.unet_folder)
    if pictures.shape[1] != 3 or pictures.shape[-2] != pictures.shape[-1]:
        raise ValueError(f"pictures must be [b, 3, s, s] (RGB on white, square), got {list(pictures.shape)}")
    if len(seeds) != batch:
        raise ValueError(f"one seed per picture is needed: {batch} pictures, {len(seeds)} seeds")
    generators = [make_generator("generate_views", int(seed)) for seed in seeds]
    size, latent = components.image_size, unet.config.sample_size

    def draw(*shape: int) -> Tensor:
        """Noise [b, *shape], each picture's from its own generator (on the CPU: the same on every device)."""
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return noise.to(unet.device, unet.dtype)

    # The picture is encoded once per object and shared by its views.
    resized = torch.stack([resize_rgba(picture.cpu(), size) for picture in pictures]).to(unet.device)
    embedding = image_embeddings(components, clip_pixels_exact(components, pictures.to(unet.device)))
    labels = class_labels(components, embedding, draw(embedding.shape[-1]))
    labels = labels.to(unet.dtype).repeat_interleave(views, dim=0)
    image_latents = condition_latents(components, resized).to(unet.dtype).repeat_interleave(views, dim=0)
    prompts = embeds.tensor.to(unet.device, unet.dtype).repeat(batch, 1, 1)
    guided = guidance_scale != 1.0
    if guided:
        # Unconditional half: no picture (zero labels and latents), the same prompts.
        labels = torch.cat([torch.zeros_like(labels), labels])
        image_latents = torch.cat([torch.zeros_like(image_latents), image_latents])
        prompts = torch.cat([prompts, prompts])

    scheduler = type(components.scheduler).from_config(components.scheduler.config)
    scheduler.set_timesteps(num_steps)
    shape = (views, unet.config.out_channels, latent, latent)
    x = draw(*shape).flatten(0, 1) * scheduler.init_noise_sigma
    steps = scheduler.timesteps.tolist()
    for step in progress(steps) if progress is not None else steps:
        noisy = torch.cat([x, x]) if guided else x
        inputs = scheduler.scale_model_input(torch.cat([noisy, image_latents], dim=1), step)
        prediction = unet(inputs, step, encoder_hidden_states=prompts, class_labels=labels).sample
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        noise = draw(*shape).flatten(0, 1) if eta > 0 else None
        x = scheduler.step(prediction, step, x, eta=eta, variance_noise=noise).prev_sample

    generated = decode_latents(components, x).unflatten(0, (batch, views))
    if keep_input_view:
        generated[:, embeds.rig.reference_view] = resized
    return generated
