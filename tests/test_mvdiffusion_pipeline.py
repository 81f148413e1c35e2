"""One picture to N views: FaceLift's sampling, restated in plain formulas, and the refusals before it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from mvdiffusion_tiny import SIZE, UNET
from PIL import Image

from multiview.rig import RigMismatchError, load_rig
from multiview.run import make_generator
from multiview.sample import read_sample, read_split
from mvdiffusion.checkpoints import components_folder_of, embeds_of
from mvdiffusion.components import load_components, load_text, local_folder
from mvdiffusion.latents import clip_pixels, condition_latents
from mvdiffusion.models.camera_conditioning import is_camera_weight
from mvdiffusion.models.unet import create_unet, save_unet
from mvdiffusion.pipelines import multiview as sampling
from mvdiffusion.pipelines.multiview import SAMPLERS, generate_views, make_sampler
from mvdiffusion.prompts import check_embeds_fit, load_prompt_embeds


@pytest.fixture(scope="module")
def own(tiny, tmp_path_factory):
    """Components with a UNet, loaded too, prompt embeddings and an input image."""
    folder = tmp_path_factory.mktemp("own") / "components"
    shutil.copytree(tiny["components"], folder)
    torch.manual_seed(0)
    save_unet(create_unet(UNET, 6, "sparse"), folder / "unet", load_rig("mouse6"))
    image = read_sample(read_split(tiny["data"])[0]).rgba[0, :3]
    prompts = load_prompt_embeds(tiny["embeds"])
    return {"components": folder, "loaded": load_components(folder), "prompts": prompts, "image": image}


def by_formula(components, image, prompts, *, seed, steps, guidance, eta, spacing):
    """UPSTREAM section 5, steps 2 to 7, without diffusers' scheduler. spacing: FaceLift's is `leading`."""
    generator = make_generator("generate_views", seed)
    noise = torch.randn(8, generator=generator)
    pixels = clip_pixels(components, image[None], exact=True)
    embedding = components.image_encoder(pixels).image_embeds[0]
    normalizer = components.image_normalizer
    z = (embedding - normalizer.mean[0]) / normalizer.std[0]
    level_zero = 0.99995869
    noised = (level_zero**0.5 * z + (1 - level_zero) ** 0.5 * noise) * normalizer.std[0] + normalizer.mean[0]
    labels = torch.cat([noised, torch.ones(4), torch.zeros(4)]).expand(6, -1)
    image = condition_latents(components, image[None]).expand(6, -1, -1, -1)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    x = torch.randn(6, 4, 8, 8, generator=generator)
    stride = 1000 // steps
    first = {"leading": (steps - 1) * stride + 1, "trailing": steps * stride - 1}[spacing]
    for t in range(first, 0, -stride):
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


@pytest.mark.parametrize(("guidance", "spacing"), [(1.0, "leading"), (3.0, "leading"), (3.0, "trailing")])
@torch.no_grad()
def test_views_follow_the_formulas(own, guidance, spacing):
    recorded = own["loaded"].scheduler
    components = replace(own["loaded"], scheduler=type(recorded).from_config(recorded.config, timestep_spacing=spacing))
    options = {"guidance": guidance, "eta": 1.0, "steps": 5, "spacing": spacing}
    expected = by_formula(components, own["image"], own["prompts"].tensor, seed=4, **options)
    found = generate_views(
        components, own["image"][None], own["prompts"], seeds=[4], num_steps=5, guidance_scale=guidance
    )
    assert found.shape == (1, 6, 3, SIZE, SIZE)
    assert (found[0] - expected).abs().max() < 1e-4
    assert (found[0, 1:] - found[0, :-1]).abs().max() > 1e-3  # the prompts make the views differ


def test_an_image_depends_on_its_own_seed_only(own):
    """Mistake 20: one generator for a whole folder makes a result depend on its place in it."""
    image = own["image"]
    batch = torch.stack([1 - image, image])
    together = generate_views(own["loaded"], batch, own["prompts"], seeds=[7, 4], num_steps=2)
    alone = generate_views(own["loaded"], image[None], own["prompts"], seeds=[4], num_steps=2)
    assert (together[1] - alone[0]).abs().max() < 1e-4
    other = generate_views(own["loaded"], image[None], own["prompts"], seeds=[5], num_steps=2)
    assert (other - alone).abs().max() > 1e-3


def test_several_seeds_give_the_mean_of_their_latents(own, monkeypatch):
    images = torch.stack([1 - own["image"], own["image"]])
    monkeypatch.setattr(sampling, "decode_latents", lambda components, x: x)
    averaged, *each = (
        generate_views(own["loaded"], images, own["prompts"], seeds=seeds, num_steps=2)
        for seeds in ([[7, 1, 5], [4, 8, 2]], [7, 4], [1, 8], [5, 2])
    )
    assert (torch.stack(each).mean(0) - averaged).abs().max() < 1e-4
    assert all((each[k] - each[k - 1]).abs().max() > 1e-2 for k in range(3))


def test_clip_pixels_are_pillows(own):
    array = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    image = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    resized = np.asarray(Image.fromarray(array).resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    extractor = own["loaded"].feature_extractor
    expected = (resized - np.array(extractor.image_mean)) / np.array(extractor.image_std)
    exact = clip_pixels(own["loaded"], image, exact=True)[0].permute(1, 2, 0)
    assert np.abs(exact.numpy() - expected).max() < 1e-5
    assert (clip_pixels(own["loaded"], image, exact=False)[0].permute(1, 2, 0) - exact).abs().mean() < 0.02


def test_embeddings_of_another_encoder_or_number_of_views_are_refused(own):
    """Mistake 17."""
    wide = replace(own["prompts"], tensor=torch.zeros(6, 77, 768))
    with pytest.raises(ValueError, match="768 wide.*expects 16.*generate_mouse_prompt_embeds.py --rig mouse6"):
        generate_views(own["loaded"], own["image"][None], wide)
    four = replace(own["prompts"], tensor=torch.zeros(4, 77, 16), rig=load_rig("uniform4"))
    for unet in (own["loaded"].unet, own["components"] / "unet"):
        with pytest.raises(RigMismatchError, match="4 views.*trained with 6"):
            check_embeds_fit(four, unet)


def test_a_components_folder_knows_itself(own, tmp_path):
    with pytest.raises(ValueError, match="does not exist: put FaceLift's released folder"):
        load_components(tmp_path / "pipeckpts")
    with pytest.raises(ValueError, match="no UNet at .*the folder does not exist"):
        load_components(own["components"], unet=tmp_path / "checkpoint-6000")
    assert components_folder_of(own["components"] / "unet") == own["components"]
    assert components_folder_of(own["components"]) == own["components"]
    assert embeds_of(own["components"]) is None


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_prediction_leads_every_sampler_to_the_image(own, sampler, kind):
    """Whatever the scheduler's prediction type: a misread one ends far away."""
    recorded = type(own["loaded"].scheduler).from_config(own["loaded"].scheduler.config, prediction_type=kind)
    scheduler = make_sampler(recorded, sampler)
    assert scheduler.config.prediction_type == kind
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    clean, x = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    for step in scheduler.timesteps.tolist():
        a = recorded.alphas_cumprod[step]
        noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
        prediction = noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean
        x = scheduler.step(prediction, step, x).prev_sample
    assert (x - clean).square().mean().sqrt() < 0.05  # ddim ends at the first trained noise level, 0.03


def test_fast_samplers_paint_and_have_no_eta(own):
    arguments = (own["loaded"], own["image"][None], own["prompts"])
    painted = {name: generate_views(*arguments, num_steps=3, sampler=name) for name in SAMPLERS}
    for name in SAMPLERS:
        assert torch.equal(painted[name], generate_views(*arguments, num_steps=3, sampler=name))
        assert 0 <= painted[name].min() and painted[name].max() <= 1
    assert (painted["dpm++"] - painted["ddim"]).abs().max() > 1e-3
    assert (painted["dpm++"] - painted["unipc"]).abs().max() > 1e-5
    with pytest.raises(ValueError, match="sampler must be one of ddim, dpm\\+\\+, unipc, got 'euler'"):
        make_sampler(own["loaded"].scheduler, "euler")


def test_views_are_seen_from_the_rigs_cameras(own):
    torch.manual_seed(0)
    unet = create_unet(UNET, 6, "sparse", "adaln").eval()
    with torch.no_grad():
        for name, tensor in unet.named_parameters():
            if is_camera_weight(name):
                tensor.normal_(std=0.5)
    loaded, rig = replace(own["loaded"], unet=unet), own["prompts"].rig

    def generate(rig):
        embeds = replace(own["prompts"], rig=rig)
        return generate_views(loaded, own["image"][None], embeds, num_steps=2)[0]

    def turned(azimuths):
        return replace(rig, views=tuple(replace(v, azimuth_deg=a) for v, a in zip(rig.views, azimuths)))

    first, azimuths = generate(rig), [view.azimuth_deg for view in rig.views]
    same = generate(turned([azimuth + 33.0 for azimuth in azimuths]))
    assert (same - first).abs().max() < 1e-3  # only relative to the input view
    moved = generate(turned([*azimuths[:5], azimuths[5] + 10.0]))
    changed = (moved - first).flatten(1).abs().amax(1)
    assert changed[5] > 1e-3 and changed[5] > 10 * changed[1:5].max()


def test_offloading_changes_nothing(own, monkeypatch):
    arguments = {"embeds": own["prompts"], "num_steps": 2}
    expected = generate_views(own["loaded"], own["image"][None], **arguments)
    loaded = load_components(own["components"], offload=True)
    moves = []
    for name in ("unet", "vae", "image_encoder"):
        part = getattr(loaded, name)
        monkeypatch.setattr(part, "to", lambda target, name=name: moves.append((name, str(target))))
    target = replace(loaded, device=torch.device("cpu", 0))
    assert torch.equal(generate_views(target, own["image"][None], **arguments), expected)
    visits = [name for name, where in moves if where == "cpu:0"]
    assert visits == ["image_encoder", "vae", "unet", "vae"]
    assert [name for name, where in moves if where == "cpu"] == visits
    # One part at a time: whoever came has left before the next one comes.
    assert all(moves[k][0] == moves[k + 1][0] for k in range(0, len(moves), 2))


def test_only_a_hub_name_downloads(own, tmp_path, monkeypatch):
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(own["components"].parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for load in (load_components, load_text):
        with pytest.raises(ValueError, match="stabilityai/sd2 does not exist.*Nothing is downloaded unless .* hub:"):
            load("stabilityai/sd2")
    with pytest.raises(ValueError, match="must have the form hub:<owner>/<repository>"):
        load_components("hub:nobody")
    assert local_folder(tmp_path) == tmp_path and not asked
    name = f"hub:owner/name/{own['components'].name}"
    assert load_components(name, with_unet=False).folder == own["components"]
    assert asked == [("owner/name", [f"{own['components'].name}/*"])]

    def refuse(repository, allow_patterns):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"hub:owner/name cannot be downloaded \(no route to host\)"):
        local_folder("hub:owner/name")
