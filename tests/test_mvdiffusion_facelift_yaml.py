"""FaceLift's flat YAML: keys with their meaning, keys without one listed, values without a counterpart refused."""

from pathlib import Path

import pytest

from mvdiffusion.facelift_yaml import load_training_config

FLAT = Path(__file__).resolve().parent / "facelift_flat.yaml"


def test_flat_layout_loads_with_its_meaning(caplog):
    with caplog.at_level("INFO"):
        config = load_training_config(FLAT)
    assert (config.num_views, config.image_size, config.reference_view_idx) == (6, 512, "random")
    assert config.prompt_embeds == "mvdiffusion/data/mouse_prompt_embeds_6view/clr_embeds.pt"
    assert config.train_data == "data_mouse/data_mouse_train.txt"
    assert config.validation_data == "data_mouse/data_mouse_val.txt"
    assert config.backgrounds == ["white", "black", "gray"]
    assert (config.brightness_jitter, config.contrast_jitter, config.mirror_probability) == (0.2, 0.05, 0.5)
    assert (config.lr_scheduler, config.step_rules) == ("piecewise_constant", "1:5000,0.5")
    assert (config.seed, config.train_batch_size, config.max_train_steps) == (7, 3, 9000)
    assert (config.learning_rate, config.snr_gamma, config.condition_drop_rate) == (2e-5, 4.0, 0.1)
    assert (config.attention, config.camera_embedding_lr_mult, config.max_grad_norm) == ("sparse", 3.0, 0.5)
    assert (config.wandb.name, config.wandb.group, config.wandb.mode) == ("flat_layout", "layouts", "disabled")
    assert config.validation_guidance_scales == [1.0, 2.0] and config.mixed_precision == "fp16"
    for key in ("enable_xformers_memory_efficient_attention", "report_to", "validation_grid_nrow", "val_out_dir"):
        assert f"'{key}' has no effect here" in caplog.text
    assert not hasattr(config, "train_dataset")  # nothing behind this door knows FaceLift's names


REFUSED = {
    "drop_type=drop_independent": "drop_type must be 'drop_as_a_whole'", "img_wh=[512,256]": "must be square",
    "scale_input_latents=false": "scale_input_latents must be True", "step_rule=1": "nearest known one is 'step_rules'",
    "resume_from_checkpoint=checkpoint-500": "pretrained_unet_path", "pipe_validation_kwargs.eta=0.0": "eta.: 1.0",
    "validation_dataset.bg_color=black": "must be white", "cache_variants=0": "cache_variants must be within",
    "unet_from_pretrained_kwargs.num_views=4": "num_views is 4, num_views 6",
    "unet_from_pretrained_kwargs.mvcd_attention=true": "unknown keys .'mvcd_attention'",
    "train_dataset.root_dir=x": "unknown key 'train_dataset.root_dir'",
    "train_dataset.aug_brightness=[0.5,1.1]": "a range about 1",
}  # fmt: skip


@pytest.mark.parametrize("override", REFUSED)
def test_what_has_no_counterpart_is_refused(override):
    with pytest.raises(ValueError, match=REFUSED[override]):
        load_training_config(FLAT, [override])


def test_no_guidance_means_no_dropping():
    assert load_training_config(FLAT, ["use_classifier_free_guidance=false"]).condition_drop_rate == 0.0
    assert load_training_config(FLAT, ["train_dataset.augmentation=false"]).brightness_jitter == 0.0
    dense = ["unet_from_pretrained_kwargs.sparse_mv_attention=false"]
    assert load_training_config(FLAT, dense).attention == "full"


def test_mix_reads_its_entries(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text("mix:\n- {train_data: a/list.txt, ratio: 0.7}\n- {train_data: b/list.txt, ratio: 0.3}\n")
    entries = load_training_config(path).mix
    assert [(entry.train_data, entry.ratio) for entry in entries] == [("a/list.txt", 0.7), ("b/list.txt", 0.3)]
    path.write_text("mix:\n- {train_dat: a/list.txt}\n")
    with pytest.raises(ValueError, match="train_dat"):
        load_training_config(path)
