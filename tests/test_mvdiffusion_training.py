"""Stage 1's trainer: data order, losses, resume, checkpoints, refusals."""

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mvdiffusion_tiny import SIZE, augmentation, config_for, figures, losses, prepare, write_dataset

from multiview.checkpoint import read_rig
from multiview.image import Draw, composite
from multiview.rig import RigMismatchError, load_rig
from multiview.run import make_generator
from multiview.sample import read_sample, read_split
from mvdiffusion.checkpoints import components_folder_of, embeds_of
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset
from mvdiffusion.facelift_yaml import load_training_config
from mvdiffusion.losses import diffusion_loss, draw_timesteps, drop_masks, noise_and_target, snr_weights
from mvdiffusion.models.unet import load_unet
from mvdiffusion.prompts import load_prompt_embeds
from mvdiffusion.training import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


def test_rotated_reference_rotates_the_targets(tiny):
    """Mistake 6: with targets that stay, the model learns to copy its input."""
    dataset = MouseMVDiffusionDataset(
        tiny["data"], load_rig("mouse6"), SIZE, augmentation(reference_view_idx="random", seed=3)
    )
    stored = read_sample(read_split(tiny["data"])[0]).rgba
    seen = set()
    for epoch in range(12):
        item = dataset[epoch, 0]
        rotation = int(item["rotation"])
        seen.add(rotation)
        assert torch.equal(item["masks"], stored[:, 3:].roll(-rotation, 0))
        assert torch.equal(item["reference"], item["targets"][0])
    assert len(seen) > 3


def test_fixed_rigs_cannot_rotate(tmp_path):
    data = write_dataset(tmp_path, load_rig("facelift6"), count=2)
    with pytest.raises(ValueError, match="facelift6 does not; use reference_view_idx: 0"):
        MouseMVDiffusionDataset(data, load_rig("facelift6"), SIZE, augmentation(reference_view_idx="random"))
    with pytest.raises(RigMismatchError, match="requested and dataset"):
        MouseMVDiffusionDataset(data, load_rig("mouse6"), SIZE)


def test_background_and_jitter_are_one_for_all_views(tiny):
    config = MVDiffusionConfig(saturation_jitter=0.2, hue_jitter_deg=10.0)
    dataset = MouseMVDiffusionDataset(tiny["data"], load_rig("mouse6"), SIZE, config)
    backgrounds = set()
    for index in range(len(dataset)):
        item = dataset[index]
        value = float(item["background"][0, 0, 0])
        backgrounds.add(value)
        assert (item["targets"][:, :, 0, 0] == value).all()  # the corner is background, not brightened
        again = dataset[index]
        assert torch.equal(item["targets"], again["targets"])  # (seed, epoch, index) decides
    assert len(backgrounds) > 1
    grey = torch.cat([torch.full((3, 3, 4, 4), 0.5), torch.ones(3, 1, 4, 4)], 1)
    found = Draw(brightness=1.1, contrast=0.9).recolored(grey)[:, :3]
    assert found.unique().numel() == 1 and found[0, 0, 0, 0] != 0.5


def test_standardised_latents_change_nothing_else():
    from diffusers import AutoencoderKL

    from mvdiffusion.demo import standardize_latents

    torch.manual_seed(0)
    before = AutoencoderKL(block_out_channels=[8], latent_channels=3, norm_num_groups=4).eval()
    after = deepcopy(before)
    generator = torch.Generator().manual_seed(0)
    rgba = torch.randint(0, 256, (3, 2, 4, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    standardize_latents(after, rgba)
    picture = torch.rand(2, 3, SIZE, SIZE, generator=generator) * 2 - 1
    with torch.no_grad():
        old, new = before.encode(picture).latent_dist, after.encode(picture).latent_dist
        torch.testing.assert_close(before.decode(old.mean).sample, after.decode(new.mean).sample, atol=1e-4, rtol=1e-4)
        pictures = composite(rgba.flatten(0, 1).float() / 255, 1.0) * 2 - 1
        latents = after.encode(pictures).latent_dist.mean
        spread = before.encode(pictures).latent_dist.mean.std((0, 2, 3)).view(1, -1, 1, 1)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(new.std * spread, old.std, atol=1e-4, rtol=1e-3)


def test_snr_weights_follow_the_prediction_type():
    alphas = torch.tensor([0.99, 0.5, 0.01])
    steps, snr = torch.arange(3), torch.tensor([99.0, 1.0, 0.01 / 0.99])
    epsilon = snr.clamp(max=5) / snr
    torch.testing.assert_close(snr_weights(alphas, steps, 5.0, "epsilon", "prediction"), epsilon)
    velocity = snr.clamp(max=5) / (snr + 1)
    torch.testing.assert_close(snr_weights(alphas, steps, 5.0, "v_prediction", "prediction"), velocity)
    torch.testing.assert_close(snr_weights(alphas, steps, 5.0, "v_prediction", "upstream"), epsilon)
    assert (snr_weights(alphas, steps, None, "v_prediction", "prediction") == 1).all()


def test_velocity_is_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    clean, noise, steps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    noisy, target = noise_and_target(clean, noise, scheduler.alphas_cumprod, steps, "v_prediction")
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, steps))
    torch.testing.assert_close(target, scheduler.get_velocity(clean, noise, steps))


def test_conditions_drop_alone_and_together():
    labels, latents = drop_masks(torch.tensor([0.01, 0.07, 0.12, 0.5]), 0.05)
    assert labels.tolist() == [True, True, False, False]
    assert latents.tolist() == [False, True, True, False]


def test_timesteps_lean_to_high_noise():
    steps = draw_timesteps(4000, make_generator("t"), 0.5, [850, 999])
    assert 0.5 < (steps >= 850).float().mean() < 0.65 and steps.min() < 50 and steps.max() <= 999


def test_foreground_weight_keeps_the_scale_of_an_even_error():
    target = torch.zeros(2, 4, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., 0] = 1
    even = diffusion_loss(target + 1, target, torch.ones(2), 1 + 3 * mask)
    torch.testing.assert_close(even, torch.tensor(1.0))


@pytest.mark.parametrize("damage", ["cut optimizer", "flipped bit", "cut UNet without digests", "missing"])
def test_killed_run_continues_with_the_same_losses(tiny, tmp_path, caplog, damage):
    """The checkpoint before takes over from a damaged one, with word of it."""
    output = tmp_path / "run"
    train(config_for(tiny, output))
    values = figures(output)
    assert {"vae/foreground_psnr", "guidance_1/foreground_psnr", "guidance_1/unseen_mask_iou"} <= set(values)
    whole = losses(output)
    assert sorted(whole) == [1, 2, 3, 4]
    newest = output / "checkpoint-4"
    unet, sidecar = newest / "unet" / "diffusion_pytorch_model.safetensors", newest / "checkpoint.json"
    if damage == "cut optimizer":
        (newest / "optimizer.pt").write_bytes(b"cut")
        (output / ".checkpoint-4.0123abcd.tmp").mkdir()  # as after SIGKILL while it was written
    elif damage == "flipped bit":
        content = bytearray(unet.read_bytes())
        content[-50] ^= 1
        unet.write_bytes(content)
    elif damage == "missing":
        unet.unlink()
    else:  # a checkpoint of the time before digests
        sidecar.write_text(json.dumps({k: v for k, v in json.loads(sidecar.read_text()).items() if k != "sha256"}))
        unet.write_bytes(unet.read_bytes()[:-100])
    train(config_for(tiny, output))
    assert "looking at the one before it" in caplog.text and losses(output) == whole
    assert not [path for path in output.glob(".*") if path.is_dir()]
    # Nothing left to do: answered with figures, not trained again.
    train(config_for(tiny, output))
    assert figures(output) == values and losses(output) == whole


def test_checkpoint_holds_all_that_inference_needs(tiny, tmp_path):
    output = tmp_path / "checkpoints" / "run"
    export = tmp_path / "export"
    changes = {"max_train_steps": 4, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "export_dir": str(export)}
    train(config_for(tiny, output, cache_latents=True, cache_variants=2, cache_dir=str(tmp_path / "cache"), **changes))
    # Mistake 1: the path is joined once; mistake 16: the newest stay.
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    newest = output / "checkpoint-4"
    assert read_rig(newest / "unet").name == "mouse6" and read_rig(newest / "unet_ema").name == "mouse6"
    assert components_folder_of(newest / "unet_ema") == tiny["components"]
    stored = load_prompt_embeds(embeds_of(newest / "unet"))
    torch.testing.assert_close(stored.tensor, load_prompt_embeds(tiny["embeds"]).tensor)
    own, average = (load_unet(newest / name).conv_in.weight for name in ("unet", "unet_ema"))
    assert not torch.equal(own, average)
    shipped = load_unet(export / "unet").conv_in.weight
    assert (shipped - average).abs().max() < 1e-3 and load_prompt_embeds(export / "prompt_embeds").rig.name == "mouse6"


def test_overfitting_lowers_the_loss(tiny, tmp_path):
    config = config_for(
        tiny, tmp_path / "run", overfit_steps=40, checkpointing_steps=40, gradient_accumulation_steps=1,
        learning_rate=3e-3, condition_drop_rate=0.0, backgrounds=["white"],
    )  # fmt: skip
    folder = train(config, 1)
    found, values = losses(folder), figures(folder)
    assert folder == tmp_path / "run_overfit1"
    assert sum(found[k] for k in range(36, 41)) < 0.6 * sum(found[k] for k in range(1, 6))
    assert values["vae/foreground_psnr"] > 0


def test_resuming_under_another_rig_is_refused(tiny, tmp_path):
    output = tmp_path / "run"
    train(config_for(tiny, output, max_train_steps=1, checkpointing_steps=1))
    other = prepare(tmp_path / "other", "uniform6")
    with pytest.raises(RigMismatchError, match="requested and unet|requested and"):
        train(config_for(other, output))
    with pytest.raises(RigMismatchError, match="dataset and embeddings|embeddings"):
        train(config_for({**tiny, "embeds": other["embeds"]}, tmp_path / "new"))


def test_resuming_another_model_is_refused(tiny, tmp_path):
    output = tmp_path / "run"
    train(config_for(tiny, output, max_train_steps=1))
    with pytest.raises(ValueError, match="run of another model .attention: None there, 'full' now.*output_dir"):
        train(config_for(tiny, output, attention="full"))


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
from mvdiffusion_tiny import config_for
from mvdiffusion.training import train
paths = {name: Path(path) for name, path in zip(("data", "components", "embeds"), sys.argv[2:])}
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
try:
    train(config_for(paths, paths["data"].parent.parent / "full", max_train_steps=1))
except ValueError as error:
    print(f"error: {error}")
"""


def test_a_full_disk_is_one_message_and_no_half_checkpoint(tiny, tmp_path):
    train(config_for(tiny, tmp_path / "whole", max_train_steps=1))
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    weights = (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    optimizer = (checkpoint / "optimizer.pt").stat().st_size
    assert optimizer > weights + 2000  # so that the second limit stops the optimiser's state alone
    paths = [str(tiny[name]) for name in ("data", "components", "embeds")]
    for limit in (weights // 2, (weights + optimizer) // 2):
        command = [sys.executable, "-c", FULL_DISK, str(limit), *paths]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
        assert done.returncode == 0 and len(errors) == 1, done.stderr
        assert "full/checkpoint-1: File too large" in errors[0] and "repeat the command" in errors[0]
        assert not list((tiny["data"].parent.parent / "full").glob("*checkpoint*"))


def test_pretrained_unet_takes_the_rigs_number_of_views(tiny, tmp_path):
    """One change of rig changes the number of views everywhere."""
    train(config_for(tiny, tmp_path / "six", max_train_steps=1))
    other = prepare(tmp_path / "other", "uniform4")
    start = tmp_path / "six" / "checkpoint-1" / "unet"
    config = config_for(other, tmp_path / "four", unet={}, pretrained_unet_path=str(start), max_train_steps=1)
    with pytest.raises(RigMismatchError, match="4 against 6(.|\n)*allow_rig_change=true"):
        train(config)
    config.allow_rig_change = True
    train(config)
    unet = load_unet(tmp_path / "four" / "checkpoint-1" / "unet")
    assert unet.config.num_views == 4 and read_rig(tmp_path / "four" / "checkpoint-1" / "unet").name == "uniform4"


@pytest.mark.parametrize("name", ["mouse_mvdiffusion", "mouse_mvdiffusion_6x_aug", "demo_mvdiffusion"])
def test_shipped_configs_load(name):
    config = load_training_config(ROOT / "configs" / f"{name}.yaml")
    expected = {"mouse_mvdiffusion": (30000, 5e-5, "0"), "mouse_mvdiffusion_6x_aug": (30000, 1e-5, "random")}
    if name in expected:
        found = config.max_train_steps, config.learning_rate, config.reference_view_idx
        assert found == expected[name]
        assert (config.train_batch_size, config.gradient_accumulation_steps, config.lr_warmup_steps) == (4, 4, 100)


def test_a_fresh_unet_and_a_pretrained_one_are_not_both_taken(tiny, tmp_path):
    config = config_for(tiny, tmp_path / "run", pretrained_unet_path="somewhere")
    with pytest.raises(ValueError, match="pretrained_unet_path=somewhere are both set.*unet=null"):
        train(config)
    overrides = ["unet=null", "pretrained_unet_path=somewhere"]
    assert load_training_config(ROOT / "configs" / "demo_mvdiffusion.yaml", overrides).validate().unet is None


def test_missing_pretrained_components_are_one_sentence(tiny, tmp_path):
    config = config_for(tiny, tmp_path / "run", pretrained_model_name_or_path="checkpoints/mvdiffusion/nothing")
    with pytest.raises(
        ValueError, match="checkpoints/mvdiffusion/nothing does not exist: put FaceLift's released folder"
    ):
        train(config)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(ValueError, match="cache_variants must be within 1..1000, got 0"):
        config_for(tiny, tmp_path, cache_variants=0).validate()
