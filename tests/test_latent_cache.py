"""The latent cache: the live batches' content, computed once, safe to share, checked when read."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import pytest
import torch
from mvdiffusion_tiny import SIZE, UNET, augmentation

from multiview.rig import load_rig
from multiview.run import make_generator
from multiview.sampler import MixedDataset, StepSampler
from mvdiffusion.components import load_components
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset
from mvdiffusion.latents import LatentCache, live_batches
from mvdiffusion.losses import training_loss
from mvdiffusion.models.unet import create_unet
from mvdiffusion.prompts import load_prompt_embeds

CPU = torch.device("cpu")
EVERYTHING = {
    "backgrounds": ["white", "gray", "black"], "brightness_jitter": 0.1, "contrast_jitter": 0.1, "hue_jitter_deg": 10,
    "saturation_jitter": 0.2, "random_crop_ratio": 0.7, "mirror_probability": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def own(tiny):
    return {**tiny, "loaded": load_components(tiny["components"], with_unet=False)}


@pytest.fixture
def calls(own):
    """How many images pass the VAE's encoder and CLIP."""
    counts = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda _, images, name=name: counts.update({name: len(images[0])}))
        for name, module in (("vae", own["loaded"].vae.encoder), ("clip", own["loaded"].image_encoder))
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def dataset_of(own, changes: dict = EVERYTHING, **options) -> MixedDataset:
    defaults = {"reference_view_idx": "random", "cache_latents": True, "cache_variants": 2}
    config = augmentation(**{**defaults, **changes, **options})
    return MixedDataset([MouseMVDiffusionDataset(own["data"], load_rig("mouse6"), SIZE, config, with_cameras=True)])


def tensors(batch) -> dict[str, torch.Tensor]:
    found = {entry.name: getattr(batch, entry.name) for entry in fields(batch) if entry.name != "cameras"}
    return {**found, "c2w": batch.cameras.c2w, "fxfycxcy": batch.cameras.fxfycxcy}


def test_cached_batches_are_the_live_ones(own, tmp_path):
    """All augmentations at once, moved references included; and so are the losses of the same draws."""
    dataset, components = dataset_of(own), own["loaded"]
    sampler = StepSampler([len(dataset)], 3, seed=0)
    live = live_batches(components, dataset, sampler, 0, CPU)
    cached = map(LatentCache(components, dataset, CPU, tmp_path).batch, sampler)
    torch.manual_seed(0)
    unet = create_unet(dict(UNET), 6, "sparse", "adaln")
    embeds, config = load_prompt_embeds(own["embeds"]), MVDiffusionConfig()
    for step in range(5):
        pair = next(live), next(cached)
        for name, value in tensors(pair[0]).items():
            torch.testing.assert_close(value, tensors(pair[1])[name], atol=2e-3, rtol=2e-3, msg=name)
        losses = [
            training_loss(unet, components, embeds, batch, config, make_generator("t", step)).item() for batch in pair
        ]
        assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_conditions_are_encoded_once_per_object(own, tmp_path, calls):
    """Each view passes the VAE once, the input CLIP once; with the cache, once ever."""
    dataset = dataset_of(own, reference_view_idx="0")
    sampler = StepSampler([len(dataset)], 3, seed=0)
    next(live_batches(own["loaded"], dataset, sampler, 0, CPU))
    assert calls == {"vae": 3 * 6, "clip": 3}
    calls.clear()
    for _ in range(2):  # a second cache on the same folder: another run, another rank
        cache = LatentCache(own["loaded"], dataset, CPU, tmp_path)
        for number in range(4):  # two epochs of six samples
            cache.batch(sampler.batch(number))
    assert calls == {"vae": 6 * 6 * 2, "clip": 6 * 2}  # six samples, two variants
    # Every view may become the input; two variants that turn out equal are one entry.
    rotating = LatentCache(own["loaded"], dataset_of(own, {}), CPU, tmp_path / "rotating")
    calls.clear()
    for number in range(12):
        rotating.batch(sampler.batch(number))
    assert calls == {"vae": 6 * 6, "clip": 6 * 6}


def test_a_damaged_entry_is_encoded_anew_and_told(own, tmp_path, caplog):
    dataset = dataset_of(own, {}, cache_variants=1)
    cache = LatentCache(own["loaded"], dataset, CPU, tmp_path)
    keys = [(0, index) for index in range(4)]
    before = tensors(cache.batch(keys))
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 4 and not list(tmp_path.rglob("*.tmp"))
    files[0].write_bytes(files[0].read_bytes()[:-20])  # cut off
    content = bytearray(files[1].read_bytes())
    content[-3] ^= 0xFF  # one value another
    files[1].write_bytes(content)
    files[2].write_bytes(b"")
    again = LatentCache(own["loaded"], dataset, CPU, tmp_path)
    for name, value in tensors(again.batch(keys)).items():
        assert torch.equal(value, before[name])
    assert caplog.text.count("encoded anew") == 3
    assert LatentCache(own["loaded"], dataset, CPU, tmp_path).batch(keys) is not None


def test_a_changed_picture_or_encoder_is_another_entry(own, tmp_path):
    dataset = dataset_of(own, {}, cache_variants=1)
    cache = LatentCache(own["loaded"], dataset, CPU, tmp_path)
    cache.batch([(0, 0)])
    picture = dataset.parts[0].folders[0] / "images" / "cam_003.png"
    content = picture.read_bytes()
    try:
        other = (dataset.parts[0].folders[1] / "images" / "cam_003.png").read_bytes()
        picture.write_bytes(other)
        changed = LatentCache(own["loaded"], dataset, CPU, tmp_path)
        changed.batch([(0, 0)])
        assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    finally:
        picture.write_bytes(content)
    with torch.no_grad():
        weight = own["loaded"].vae.encoder.conv_in.weight
        weight[0, 0, 0, 0] += 1e-3
        assert LatentCache(own["loaded"], dataset, CPU, tmp_path).encoders != cache.encoders
        weight[0, 0, 0, 0] -= 1e-3


def test_ranks_may_fill_one_folder_at_once(own, tmp_path, caplog):
    dataset = dataset_of(own)
    caches = [LatentCache(own["loaded"], dataset, CPU, tmp_path) for _ in range(3)]

    def fill(rank: int) -> list:
        return [tensors(caches[rank].batch([(epoch, index)])) for epoch in (0, 1) for index in range(4)]

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(fill, range(3)))
    for rank in (1, 2):
        for a, b in zip(found[0], found[rank], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 8 and not list(tmp_path.rglob("*.tmp"))
    assert "encoded anew" not in caplog.text
