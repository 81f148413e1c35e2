"""One picture to N views: FaceLift's sampling, restated in plain formulas, and the refusals before it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mvdiffusion_tiny import SIZE, UNET, prepare
from PIL import Image

from multiview.rig import RigMismatchError, load_rig
from multiview.run import make_generator
from multiview.sample import read_sample, read_split
from mvdiffusion.checkpoints import components_folder_of, embeds_of
from mvdiffusion.components import load_components
from mvdiffusion.conditioning import class_labels, clip_pixels_exact, clip_pixels_fast, condition_latents
from mvdiffusion.models.unet import create_unet, save_unet
from mvdiffusion.pipelines.multiview import generate_views
from mvdiffusion.prompts import check_embeds_fit, load_prompt_embeds


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    paths = prepare(folder)
    torch.manual_seed(0)
    save_unet(create_unet(UNET, 6, "sparse"), paths["components"] / "unet", load_rig("mouse6"))
    embeds = load_prompt_embeds(paths["embeds"])
    picture = read_sample(read_split(paths["data"])[0]).rgba[0, :3]
    return {**paths, "loaded": load_components(paths["components"]), "prompts": embeds, "picture": picture}


def by_formula(components, picture, prompts, *, seed, steps, guidance, eta):
    """UPSTREAM section 5, steps 2 to 7, without diffusers' scheduler."""
    generator = make_generator("generate_views", seed)
    noise = torch.randn(8, generator=generator)
    pixels = clip_pixels_exact(components, picture[None])
    embedding = components.image_encoder(pixels).image_embeds[0]
    normalizer = components.image_normalizer
    z = (embedding - normalizer.mean[0]) / normalizer.std[0]
    level_zero = 0.99995869
    noised = (level_zero**0.5 * z + (1 - level_zero) ** 0.5 * noise) * normalizer.std[0] + normalizer.mean[0]
    labels = torch.cat([noised, torch.ones(4), torch.zeros(4)]).expand(6, -1)
    image = condition_latents(components, picture[None]).expand(6, -1, -1, -1)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    x = torch.randn(6, 4, 8, 8, generator=generator)
    stride = 1000 // steps
    for t in range((steps - 1) * stride + 1, 0, -stride):
        conditional = components.unet(torch.cat([x, image], 1), t, prompts, class_labels=labels).sample
        plain = components.unet(
            torch.cat([x, torch.zeros_like(image)], 1), t, prompts, class_labels=torch.zeros_like(labels)
        ).sample
        v = plain + guidance * (conditional - plain)
        a = float(alphas[t])
        before = float(alphas[t - stride]) if t >= stride else float(alphas[0])
        clean, epsilon = a**0.5 * x - (1 - a) ** 0.5 * v, a**0.5 * v + (1 - a) ** 0.5 * x
        sigma = eta * ((1 - before) / (1 - a) * (1 - a / before)) ** 0.5
        x = before**0.5 * clean + (1 - before - sigma**2) ** 0.5 * epsilon
        x = x + sigma * torch.randn(6, 4, 8, 8, generator=generator)
    decoded = components.vae.decode(x / components.vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_views_follow_the_formulas(tiny, guidance):
    options = {"guidance": guidance, "eta": 1.0, "steps": 5}
    expected = by_formula(tiny["loaded"], tiny["picture"], tiny["prompts"].tensor, seed=4, **options)
    found = generate_views(
        tiny["loaded"], tiny["picture"][None], tiny["prompts"], seeds=[4], num_steps=5, guidance_scale=guidance
    )
    assert found.shape == (1, 6, 3, SIZE, SIZE)
    assert (found[0] - expected).abs().max() < 1e-4
    assert (found[0, 1:] - found[0, :-1]).abs().max() > 1e-3  # the prompts make the views differ


def test_a_picture_depends_on_its_own_seed_only(tiny):
    """Mistake 20: one generator for a whole folder makes a result depend on its place in it."""
    picture = tiny["picture"]
    batch = torch.stack([1 - picture, picture])
    together = generate_views(tiny["loaded"], batch, tiny["prompts"], seeds=[7, 4], num_steps=2)
    alone = generate_views(tiny["loaded"], picture[None], tiny["prompts"], seeds=[4], num_steps=2)
    assert (together[1] - alone[0]).abs().max() < 1e-4
    other = generate_views(tiny["loaded"], picture[None], tiny["prompts"], seeds=[5], num_steps=2)
    assert (other - alone).abs().max() > 1e-3


def test_input_view_is_kept_on_request(tiny):
    kept = generate_views(tiny["loaded"], tiny["picture"][None], tiny["prompts"], num_steps=2, keep_input_view=True)
    assert torch.equal(kept[0, 0], tiny["picture"])
    assert not torch.equal(kept[0, 1], tiny["picture"])


def test_class_labels_end_with_the_noise_level(tiny):
    labels = class_labels(tiny["loaded"], torch.randn(2, 8), torch.randn(2, 8))
    assert torch.equal(labels[:, 8:], torch.tensor([1.0] * 4 + [0.0] * 4).expand(2, -1))


def test_clip_pixels_are_pillows(tiny):
    array = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    picture = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    resized = np.asarray(Image.fromarray(array).resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    extractor = tiny["loaded"].feature_extractor
    expected = (resized - np.array(extractor.image_mean)) / np.array(extractor.image_std)
    exact = clip_pixels_exact(tiny["loaded"], picture)[0].permute(1, 2, 0)
    assert np.abs(exact.numpy() - expected).max() < 1e-5
    assert (clip_pixels_fast(tiny["loaded"], picture)[0].permute(1, 2, 0) - exact).abs().mean() < 0.02


def test_embeddings_of_another_width_are_refused(tiny):
    """Mistake 17."""
    wide = replace(tiny["prompts"], tensor=torch.zeros(6, 77, 768))
    with pytest.raises(ValueError, match="768 wide.*expects 16.*generate_mouse_prompt_embeds.py --rig mouse6"):
        generate_views(tiny["loaded"], tiny["picture"][None], wide)


def test_embeddings_of_another_number_of_views_are_refused(tiny):
    four = replace(tiny["prompts"], tensor=torch.zeros(4, 77, 16), rig=load_rig("uniform4"))
    with pytest.raises(RigMismatchError, match="4 views.*trained with 6"):
        check_embeds_fit(four, tiny["loaded"].unet)
    with pytest.raises(RigMismatchError, match="4 views.*trained with 6"):
        check_embeds_fit(four, tiny["components"] / "unet")


def test_missing_components_are_named(tmp_path, tiny):
    with pytest.raises(ValueError, match="does not exist: put FaceLift's released folder"):
        load_components(tmp_path / "pipeckpts")
    with pytest.raises(ValueError, match="no UNet at .*the folder does not exist"):
        load_components(tiny["components"], unet=tmp_path / "checkpoint-6000")


def test_a_components_folder_knows_itself(tiny):
    assert components_folder_of(tiny["components"] / "unet") == tiny["components"]
    assert components_folder_of(tiny["components"]) == tiny["components"]
    assert embeds_of(tiny["components"]) is None
