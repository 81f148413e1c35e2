"""FaceLift's GS-LRM YAML layout, and the configs that ship for Stage 2. Key names are FaceLift's, values are not."""

import logging
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from gslrm.config import IGNORED_KEYS, GSLRMConfig, check_config, model_config_from_dict
from gslrm.training import check_adaptation
from multiview.config import load_config
from mvdiffusion.demo import DemoComponentsConfig
from mvdiffusion.facelift_yaml import load_training_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# Every key that FaceLift's Stage 2 configurations are known to hold; values that are neither theirs nor our defaults.
LAYOUT = """
profile: true
debug: true
model: {class_name: gslrm.model.gslrm.GSLRM, half_bbx_size: 0.9, transformer: {d: 96, d_head: 32, n_layer: 3},
  image_tokenizer: {image_size: 64, patch_size: 16, in_channels: 12},
  gaussians: {n_gaussians: 5, sh_degree: 2, scaling_modifier: 0.5, upsampler: {upsample_factor: 1}},
  add_refsrc_marker: true, hard_pixelalign: false, use_custom_plucker: false, use_aug_plucker: true, clip_xyz: true,
  depth_preact_bias: 0.25, depth_min: 1.5, depth_max: 4.5, depth_reference_origin: true}
training:
  runtime: {use_tf32: false, use_amp: false, amp_dtype: fp16, torch_compile: true, grad_accum_steps: 2,
    grad_clip_norm: 0.5, allowed_gradnorm_factor: 7, grad_checkpoint_every: 3}
  dataset: {dataset_path: mice/train.txt, maximize_view_overlap: true, num_views: 7, num_input_views: 3,
    target_has_input: false, normalize_distance_to: 2.0, remove_alpha: true, background_color: black}
  dataloader: {batch_size_per_gpu: 3, num_workers: 1, num_threads: 6, prefetch_factor: 5}
  losses: {l2_loss_weight: 0.9, lpips_loss_weight: 0.11, background_loss_weight: 0.12, perceptual_loss_weight: 0.13,
    ssim_loss_weight: 0.14, pixelalign_loss_weight: 0.15, masked_pixelalign_loss: false, pointsdist_loss_weight: 0.16,
    warmup_pointsdist: true, distill_loss_weight: 0.17}
  optimizer: {lr: 3.0e-5, beta1: 0.8, beta2: 0.9, weight_decay: 0.01, reset_lr: true, reset_weight_decay: true,
    reset_training_state: false}
  schedule: {num_epochs: 9, early_stop_after_epochs: 8, max_fwdbwd_passes: 400, warmup: 40, l2_warmup_steps: 20}
  checkpointing: {resume_ckpt: weights/ckpt, checkpoint_every: 30, checkpoint_dir: weights/out}
  logging: {print_every: 3, vis_every: 33, wandb: {project: mice, exp_name: one, group: two, job_type: three,
    log_every: 4, offline: true}}
inference: {enabled: true, output_dir: out/inference}
validation: {enabled: false, val_every: 44, output_dir: out/validation, dataset_path: mice/val.txt}
"""
WITHOUT_EFFECT = {
    "profile", "debug", "model.class_name", "model.half_bbx_size", "training.dataset.normalize_distance_to",
    "training.dataset.remove_alpha", "training.dataloader.num_threads", "training.losses.distill_loss_weight",
    "training.schedule.num_epochs", "training.schedule.early_stop_after_epochs", "training.logging.wandb.job_type",
    "training.logging.wandb.log_every", "inference", "validation.output_dir",
}  # fmt: skip


def load(path: Path, *overrides: str) -> GSLRMConfig:
    return load_config(GSLRMConfig, path, list(overrides), ignored=set(IGNORED_KEYS))


def leaves(content: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in content.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def typed_keys(schema: object, prefix: str = "") -> set[str]:
    keys = set()
    for entry in fields(schema):
        value = getattr(schema, entry.name)
        keys |= typed_keys(value, f"{prefix}{entry.name}.") if is_dataclass(value) else {prefix + entry.name}
    return keys


@pytest.fixture
def facelift(tmp_path):
    path = tmp_path / "gslrm.yaml"
    path.write_text(LAYOUT)
    return path


def test_every_key_arrives_or_is_listed_as_ignored(facelift, caplog):
    with caplog.at_level(logging.INFO):
        config = load(facelift)
    given = leaves(yaml.safe_load(LAYOUT))
    got, default = leaves(asdict(config)), leaves(asdict(GSLRMConfig()))
    ignored = {key for key in given if any(f"{key}.".startswith(f"{name}.") for name in WITHOUT_EFFECT)}
    assert ignored.isdisjoint(got)
    for key in given.keys() - ignored:
        assert got[key] == given[key], key
    assert {key for key in given.keys() - ignored if given[key] == default[key]} == {
        "model.gaussians.upsampler.upsample_factor"  # only one value exists
    }
    for name in WITHOUT_EFFECT:
        assert f"key '{name}' has no effect here and is ignored" in caplog.text
    assert caplog.text.count("has no effect") == len(WITHOUT_EFFECT)


def test_the_ignored_keys_are_just_those_without_effect():
    """A key that gains an effect leaves the list: it must not be dropped before it arrives."""
    assert set(IGNORED_KEYS) == WITHOUT_EFFECT
    assert WITHOUT_EFFECT.isdisjoint(typed_keys(GSLRMConfig()))


def test_the_layout_passes_the_checks_of_training_and_of_a_checkpoints_sidecar(facelift):
    config = load(facelift)
    check_config(config)
    assert model_config_from_dict(asdict(config)["model"], "sidecar") == config.model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training: {optimizer: {learning_rate: 1.0}}",
            "unknown key 'training.optimizer.learning_rate'; the nearest known one is 'training.optimizer.",
        ),
        (
            "training: {losses: {lpips: 1.0}}",
            "unknown key 'training.losses.lpips'; the nearest known one is 'training.losses.",
        ),
        (
            "training: {losses: {masked_l2: true}}",
            "unknown key 'training.losses.masked_l2'; the nearest known one is 'training.losses.masked_l2_loss",
        ),
        (
            "training: {dataset: {num_view: 6}}",
            "unknown key 'training.dataset.num_view'; the nearest known one is 'training.dataset.num_views",
        ),
        (
            "model: {transformers: {d: 64}}",
            "unknown key 'model.transformers'; the nearest known one is 'model.transformer",
        ),
        ("model: {lr: 1.0}", "unknown key 'model.lr'; the nearest known one is 'training.optimizer.lr"),
        ("trainer: {}", "unknown key 'trainer'; the nearest known one is 'training"),
        ("training: {optimizer: {lr: fast}}", "training.optimizer.lr"),
        ("training: {dataset: {num_views: 6.5}}", "training.dataset.num_views"),
        ("training: {losses: {masked_l2_loss: 3.5}}", "training.losses.masked_l2_loss"),
        ("model: [1, 2]", "model"),
    ],
)
def test_unknown_keys_and_values_of_the_wrong_type_name_file_and_key(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"wrong.yaml.*{message}"):
        load(path)


def test_shipped_configs_load_and_can_train():
    tracked = {"checkpoints/demo", "checkpoints/demo/gslrm", "checkpoints/demo/mvdiffusion", "data_mouse"}
    for path in CONFIGS.glob("*mvdiffusion*.yaml"):
        config = load_training_config(path)
        assert tracked.isdisjoint({config.output_dir, config.export_dir, str(config.cache_dir)}), path
    assert load_config(DemoComponentsConfig, CONFIGS / "demo_components.yaml").output_dir not in tracked
    for path in (*CONFIGS.glob("*gslrm*.yaml"), *CONFIGS.glob("mouse_config_*.yaml")):
        check_config(config := load(path))
        keep = config.training.checkpointing
        assert tracked.isdisjoint({keep.checkpoint_dir, keep.export_dir}), (
            path
        )  # a training writes into no shipped file
        if path.stem == "mouse_gslrm_lora":
            assert check_adaptation(config.training.adaptation, config.model.transformer.n_layer) == list(range(24))


SHIPPED = {  # steps, warm-up, learning rate, batch size
    "mouse_config_finetune": (20000, 100, 2e-5, 2), "mouse_gslrm_v2": (30000, 500, 1e-5, 2),
    "mouse_config_debug": (1000, 50, 1e-4, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_hold_the_values_of_the_specification(name):
    steps, warmup, lr, batch = SHIPPED[name]
    training = load(CONFIGS / f"{name}.yaml").training
    assert (training.schedule.max_fwdbwd_passes, training.schedule.warmup) == (steps, warmup)
    assert (training.optimizer.lr, training.dataloader.batch_size_per_gpu) == (lr, batch)
    assert training.checkpointing.checkpoints_total_limit == 3
    assert (training.losses.l2_loss_weight, training.losses.ssim_loss_weight) == (1.0, 0.2)
    heavier = name == "mouse_gslrm_v2"
    assert training.losses.lpips_loss_weight == training.losses.perceptual_loss_weight == (0.8 if heavier else 0.5)
    folder = "mouse_finetune" if heavier else "ckpt_0000000000021125.pt"
    assert training.checkpointing.resume_ckpt == f"checkpoints/gslrm/{folder}"
    assert (training.dataset.num_views, training.dataset.num_input_views) == (6, 6)


def test_defaults_are_the_released_models():
    model = GSLRMConfig().model
    assert (model.transformer.d, model.transformer.d_head, model.transformer.n_layer) == (1024, 64, 24)
    assert (model.image_tokenizer.image_size, model.image_tokenizer.patch_size) == (512, 8)
    assert (model.gaussians.n_gaussians, model.gaussians.sh_degree) == (2, 0)
    assert model.use_custom_plucker and model.hard_pixelalign and not model.prune_background_tokens
