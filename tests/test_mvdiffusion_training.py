"""Stage 1's trainer: samples, losses, resume, checkpoints, refusals."""

import json
import shutil
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import file_limit
from mvdiffusion_tiny import SIZE, UNET, augmentation, config_for, figures, losses, prepare

from multiview.checkpoint import read_rig
from multiview.image import composite
from multiview.rig import RigMismatchError, load_rig
from multiview.run import make_generator
from multiview.sample import read_sample, read_split
from mvdiffusion import losses as losses_module
from mvdiffusion.checkpoints import Sampling, components_folder_of, embeds_of, newest_training, sampling_of
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.data.mouse_dataset import MouseMVDiffusionDataset
from mvdiffusion.facelift_yaml import load_training_config
from mvdiffusion.losses import diffusion_loss, draw_timesteps, noise_and_target, snr_weights
from mvdiffusion.models.unet import MultiViewUNet, load_unet, resolve_unet_folder
from mvdiffusion.prompts import load_prompt_embeds
from mvdiffusion.training import train

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a finished run, and a function that gives its configuration in another folder."""
    folder = tmp_path_factory.mktemp("whole")

    def configuration(output: Path, **changes) -> MVDiffusionConfig:
        saving = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "export_dir": str(folder / "export")}
        cache = {"cache_latents": True, "cache_variants": 2, "cache_dir": str(folder / "cache")}
        return config_for(tiny, output, **{**saving, **cache, **changes})

    return train(configuration(folder / "checkpoints" / "run")), configuration


def test_rotated_reference_rotates_the_targets(tiny):
    """Mistake 6: with targets that stay, the model learns to copy its input."""
    config = augmentation(reference_view_idx="random", seed=3)
    dataset = MouseMVDiffusionDataset(tiny["data"], load_rig("mouse6"), SIZE, config)
    stored = read_sample(read_split(tiny["data"])[0]).rgba
    seen = set()
    for epoch in range(12):
        item = dataset[epoch, 0]
        rotation = int(item["rotation"])
        seen.add(rotation)
        assert torch.equal(item["masks"], stored[:, 3:].roll(-rotation, 0))
        assert torch.equal(item["reference"], item["targets"][0])
    assert len(seen) > 3
    half = MouseMVDiffusionDataset(tiny["data"], load_rig("mouse6"), SIZE, augmentation(reference_view_idx="half"))
    stays = [half.draw_rotation(epoch, 0) == 0 for epoch in range(300)]
    assert 0.5 < sum(stays) / 300 < 0.67  # 7 of 12, as any view is the rig's at times


def test_background_and_jitter_are_one_for_all_views(tiny):
    config = MVDiffusionConfig(saturation_jitter=0.2, hue_jitter_deg=10.0)
    dataset = MouseMVDiffusionDataset(tiny["data"], load_rig("mouse6"), SIZE, config)
    backgrounds = set()
    for index in range(len(dataset)):
        item = dataset[index]
        value = float(item["background"][0, 0, 0])
        backgrounds.add(value)
        assert (item["targets"][:, :, 0, 0] == value).all()  # the corner is background, not brightened
        assert torch.equal(item["targets"], dataset[index]["targets"])  # (seed, epoch, index) decides
    assert len(backgrounds) > 1


def test_standardised_latents_change_nothing_else():
    from diffusers import AutoencoderKL

    from mvdiffusion.demo import standardize_latents

    torch.manual_seed(0)
    before = AutoencoderKL(block_out_channels=[8], latent_channels=3, norm_num_groups=4).eval()
    after = deepcopy(before)
    generator = torch.Generator().manual_seed(0)
    rgba = torch.randint(0, 256, (3, 2, 4, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    standardize_latents(after, rgba)
    image = torch.rand(2, 3, SIZE, SIZE, generator=generator) * 2 - 1
    with torch.no_grad():
        old, new = before.encode(image).latent_dist, after.encode(image).latent_dist
        torch.testing.assert_close(before.decode(old.mean).sample, after.decode(new.mean).sample, atol=1e-4, rtol=1e-4)
        images = composite(rgba.flatten(0, 1).float() / 255, 1.0) * 2 - 1
        latents = after.encode(images).latent_dist.mean
        spread = before.encode(images).latent_dist.mean.std((0, 2, 3)).view(1, -1, 1, 1)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(new.std * spread, old.std, atol=1e-4, rtol=1e-3)


def test_losses_follow_the_prediction_type():
    from diffusers import DDIMScheduler

    alphas = torch.tensor([0.99, 0.5, 0.01])
    steps, snr = torch.arange(3), torch.tensor([99.0, 1.0, 0.01 / 0.99])
    epsilon, velocity = snr.clamp(max=5) / snr, snr.clamp(max=5) / (snr + 1)
    for gamma, kind, form, expected in (
        (5.0, "epsilon", "prediction", epsilon), (5.0, "v_prediction", "prediction", velocity),
        (5.0, "v_prediction", "upstream", epsilon), (None, "v_prediction", "prediction", torch.ones(3)),
    ):  # fmt: skip
        torch.testing.assert_close(snr_weights(alphas, steps, gamma, kind, form), expected)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    clean, noise, steps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    noisy, target = noise_and_target(clean, noise, scheduler.alphas_cumprod, steps, "v_prediction")
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, steps))
    torch.testing.assert_close(target, scheduler.get_velocity(clean, noise, steps))


def test_timesteps_lean_to_high_noise_and_an_even_error_keeps_its_scale():
    steps = draw_timesteps(4000, make_generator("t"), 0.5, [850, 999])
    assert 0.5 < (steps >= 850).float().mean() < 0.65 and steps.min() < 50 and steps.max() <= 999
    target, mask = torch.zeros(2, 4, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[..., 0] = 1
    even = diffusion_loss(target + 1, target, torch.ones(2), 1 + 3 * mask)
    torch.testing.assert_close(even, torch.tensor(1.0))


def test_killed_run_continues_with_the_same_losses(whole, tmp_path, caplog):
    """The checkpoint before takes over from a damaged one, with word of it."""
    folder, configuration = whole
    values, expected = figures(folder), losses(folder)
    assert {"vae/foreground_psnr", "guidance_1/foreground_psnr", "guidance_1/unseen_mask_iou"} <= set(values)
    assert sorted(expected) == [1, 2, 3, 4]
    for damage in ("missing", "flipped bit", "cut UNet without digests", "cut optimizer"):
        output = tmp_path / damage
        shutil.copytree(folder, output)
        unet, sidecar = (output / "checkpoint-4" / name for name in (f"unet/{WEIGHTS}", "checkpoint.json"))
        content = bytearray(unet.read_bytes())
        if damage == "missing":
            unet.unlink()
        elif damage == "flipped bit":
            content[-50] ^= 1
            unet.write_bytes(content)
        elif damage == "cut optimizer":
            sidecar.with_name("optimizer.pt").write_bytes(b"cut")
        else:  # a checkpoint of the time before digests
            sidecar.write_text(json.dumps({k: v for k, v in json.loads(sidecar.read_text()).items() if k != "sha256"}))
            unet.write_bytes(content[:-100])
        caplog.clear()
        found = newest_training(output, load_rig("mouse6"), asdict(configuration(output)))
        assert found.folder.name == "checkpoint-3" and "looking at the one before it" in caplog.text, damage
    (output / ".checkpoint-4.0123abcd.tmp").mkdir()  # as after SIGKILL while it was written
    for _ in range(2):  # the second finds nothing left to do: answered with figures, not trained again
        train(configuration(output))
        assert losses(output) == expected and figures(output) == values
    assert not [path for path in output.glob(".*") if path.is_dir()]


def test_checkpoint_holds_all_that_inference_needs(tiny, whole):
    output, export = whole[0], whole[0].parent.parent / "export"
    # Mistake 1: the path is joined once; mistake 16: the newest stay.
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    newest = output / "checkpoint-4"
    assert read_rig(newest / "unet").name == "mouse6" and read_rig(newest / "unet_ema").name == "mouse6"
    assert components_folder_of(newest / "unet_ema") == tiny["components"]
    # The run's own folder has a config.json too, which is no UNet's.
    assert resolve_unet_folder(output) == newest / "unet_ema" and (output / "config.json").is_file()
    assert sampling_of(newest / "unet_ema") == Sampling(50, 3.0)
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


def test_latent_cells_weigh_by_how_much_of_them_is_animal(tiny, tmp_path, monkeypatch):
    """A tail runs through many cells and fills none: it must not outweigh the body."""
    seen = []
    monkeypatch.setattr(losses_module, "diffusion_loss", lambda *a: seen.append(a[3]) or diffusion_loss(*a))
    train(config_for(tiny, tmp_path / "run", max_train_steps=1, foreground_weight=3.0))
    weights = torch.cat(seen)
    alphas = [read_sample(path, num_views=6).rgba[:, 3] for path in read_split(tiny["data"])]
    covered = torch.stack(alphas).mean((1, 2, 3))
    assert weights.min() == 1 and weights.max() <= 3 and ((weights > 1.1) & (weights < 2.9)).any()
    assert covered.min() < (weights.mean() - 1) / 2 < covered.max()


def test_a_compiled_unet_keeps_names_and_losses(whole, tmp_path, monkeypatch):
    """Traced by torch.compile; the code generator is left out, which would take a C++ compiler and minutes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(MultiViewUNet, "compile", lambda self, **_: torch.nn.Module.compile(self, backend=backend))
    folder = train(whole[1](tmp_path / "run", torch_compile=True))
    assert graphs and losses(folder) == pytest.approx(losses(whole[0]), rel=1e-3)
    assert load_unet(folder / "checkpoint-4" / "unet_ema").conv_in.weight.isfinite().all()


def test_other_models_and_rigs_are_refused_unless_allowed(tiny, whole, tmp_path):
    """One change of rig changes the number of views everywhere."""
    output, configuration = whole
    with pytest.raises(ValueError, match="run of another model .attention: None there, 'full' now.*output_dir"):
        train(configuration(output, attention="full"))
    other = prepare(tmp_path / "other", "uniform4")
    with pytest.raises(RigMismatchError, match="requested and unet|requested and"):
        train(config_for(other, output))
    with pytest.raises(RigMismatchError, match="dataset and embeddings|embeddings"):
        train(config_for({**tiny, "embeds": other["embeds"]}, tmp_path / "new"))
    start = str(output / "checkpoint-4" / "unet")
    config = config_for(other, tmp_path / "four", unet={}, pretrained_unet_path=start, max_train_steps=1)
    with pytest.raises(RigMismatchError, match="4 against 6(.|\n)*allow_rig_change=true"):
        train(config)
    config.allow_rig_change, config.prompt_embeds = True, None  # embeddings of the rig are made on the way
    train(config)
    assert load_prompt_embeds(tmp_path / "four" / "prompt_embeds").rig.name == "uniform4"
    unet = load_unet(tmp_path / "four" / "checkpoint-1" / "unet")
    assert unet.config.num_views == 4 and read_rig(tmp_path / "four" / "checkpoint-1" / "unet").name == "uniform4"


def test_a_full_disk_is_one_message_and_no_half_checkpoint(tiny, whole, tmp_path):
    checkpoint = whole[0] / "checkpoint-4"
    weights, optimizer = ((checkpoint / name).stat().st_size for name in (f"unet/{WEIGHTS}", "optimizer.pt"))
    assert optimizer > weights + 2000  # so that the second limit stops the optimizer's state alone
    for limit in (weights // 2, (weights + optimizer) // 2):
        told = r"full/checkpoint-1: File too large(.|\n)*repeat the command"
        with file_limit(limit), pytest.raises(ValueError, match=told):
            train(config_for(tiny, tmp_path / "full", max_train_steps=1))
        assert not list((tmp_path / "full").glob("*checkpoint*"))


def test_shipped_configs_load():
    expected = {"mouse_mvdiffusion": (30000, 5e-5, "0"), "mouse_mvdiffusion_6x_aug": (30000, 1e-5, "random")}
    for name, values in expected.items():
        config = load_training_config(ROOT / "configs" / f"{name}.yaml")
        assert (config.max_train_steps, config.learning_rate, config.reference_view_idx) == values
        assert (config.train_batch_size, config.gradient_accumulation_steps, config.lr_warmup_steps) == (4, 4, 100)
    demo, overrides = ROOT / "configs" / "demo_mvdiffusion.yaml", ["unet=null", "pretrained_unet_path=somewhere"]
    assert load_training_config(demo).unet and load_training_config(demo, overrides).unet is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_unet_path": "somewhere"}, "pretrained_unet_path=somewhere are both set.*unet=null"),
        ({"pretrained_model_name_or_path": "models/nothing"}, "models/nothing does not exist: put FaceLift's released"),
        *[({key: value}, f"{key} must be within") for key, value in (
            ("cache_variants", 0), ("max_grad_norm", -1.0), ("ema_decay", 2.0), ("validation_samples", 0),
            ("adam_beta1", 1.0), ("adam_weight_decay", float("nan")), ("lr_warmup_steps", -1))],
        ({"unet": {**UNET, "block_out_channels": None}}, "unet config"),
        ({"unet": {**UNET, "block_out_channels": ["a", 32]}}, "unet: block_out_channels must be a finite number"),
        ({"unet": {**UNET, "sample_size": "abc"}}, "unet: sample_size must be a whole number, got 'abc'"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(config_for(tiny, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
