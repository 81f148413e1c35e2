"""Any rig: 4, 6 or 8 views, any reference view, moved references, mirrored animals, cameras: trained and sampled."""

import json
from dataclasses import replace

import pytest
import torch
from mvdiffusion_tiny import SIZE, UNET, figures, write_dataset

from multiview.checkpoint import read_rig
from multiview.rig import load_rig
from mvdiffusion.components import load_components
from mvdiffusion.config import MixEntry, MVDiffusionConfig
from mvdiffusion.models.unet import load_unet
from mvdiffusion.pipelines.multiview import generate_views
from mvdiffusion.prompts import load_prompt_embeds, write_prompt_embeds
from mvdiffusion.training import train


@pytest.fixture
def components(tiny):
    return tiny["components"]


def config_for(folder, components, rig, **changes) -> MVDiffusionConfig:
    """A run of the rig `rig` (a name or a rig); nothing else says how many views there are."""
    rig = load_rig(rig) if isinstance(rig, str) else rig
    data = write_dataset(folder / "data", rig, count=5)
    write_prompt_embeds(folder / "embeds", components, rig, "mouse", angles=False)
    values = {
        "pretrained_model_name_or_path": str(components), "prompt_embeds": str(folder / "embeds"),
        "train_data": str(data), "validation_data": str(data.with_name("data_mouse_val.txt")), "unet": dict(UNET),
        "output_dir": str(folder / "run"), "max_train_steps": 3, "train_batch_size": 2,
        "gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "checkpointing_steps": 3, "validation_steps": 3,
        "validation_samples": 1, "validation_num_steps": 1, "validation_guidance_scales": [1.0], "device": "cpu",
    }  # fmt: skip
    return MVDiffusionConfig(**{**values, **changes})


def test_the_rig_alone_sets_the_number_of_views(tmp_path, components):
    rig = load_rig("uniform8")
    train(config_for(tmp_path, components, rig, reference_view_idx="random", mirror_probability=0.5))
    assert figures(tmp_path / "run")["guidance_1/foreground_psnr"] > 0
    unet = tmp_path / "run" / "checkpoint-3" / "unet_ema"
    assert read_rig(unet) == rig and json.loads((unet / "config.json").read_text())["num_views"] == 8
    loaded, embeds = load_components(components, unet=unet), load_prompt_embeds(tmp_path / "embeds")
    views = generate_views(loaded, torch.rand(1, 3, SIZE, SIZE), embeds, num_steps=2, guidance_scale=3.0)
    assert views.shape == (1, 8, 3, SIZE, SIZE) and torch.isfinite(views).all()


def test_any_view_may_be_the_reference_of_two_data_sets(tmp_path, components):
    rig = replace(load_rig("uniform4"), name="back_first", reference_view=2)
    cached = {"cache_latents": True, "cache_dir": str(tmp_path / "cache")}
    config = config_for(tmp_path, components, rig, reference_view_idx="random", **cached)
    second = write_dataset(tmp_path / "second", rig, count=4)
    config.mix = [MixEntry(config.train_data, 0.5), MixEntry(str(second), 0.5)]
    train(config)
    assert figures(tmp_path / "run")["guidance_1/unseen_foreground_psnr"] > 0
    other = write_dataset(tmp_path / "other", load_rig("mouse6"), count=4)
    config.mix[1], config.output_dir = MixEntry(str(other), 0.5), str(tmp_path / "run2")
    with pytest.raises(ValueError, match="describe different views"):
        train(config)
    config.num_views = 6
    with pytest.raises(ValueError, match="num_views is 6, but rig back_first has 4 views"):
        train(config)


def test_cameras_let_an_irregular_rig_move_its_reference(tmp_path, components):
    views = [replace(view, azimuth_deg=azimuth) for view, azimuth in zip(load_rig("uniform4").views, (0, 80, 170, 290))]
    rig = replace(load_rig("uniform4"), name="irregular", views=tuple(views))
    augmented = {"reference_view_idx": "random", "mirror_probability": 0.5, "random_crop_ratio": 0.8}
    train(config_for(tmp_path, components, rig, camera_conditioning="adaln", **augmented))
    assert load_unet(tmp_path / "run" / "checkpoint-3" / "unet").config.camera_conditioning == "adaln"
