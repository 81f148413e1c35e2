"""A tiny data set and tiny Stage 1 components for the tests: real classes and files, a few thousand weights."""

import json
from pathlib import Path

import torch

from multiview.rig import ViewRig, load_rig
from multiview.sample import Sample, write_dataset_info, write_sample, write_split
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.demo import DemoComponentsConfig, VaeConfig, VisionConfig, make_demo_components
from mvdiffusion.prompts import write_prompt_embeds

SIZE = 32
UNET = {
    "sample_size": 8, "in_channels": 8, "out_channels": 4, "block_out_channels": [16, 32], "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": [2, 4], "norm_num_groups": 8,
    "cross_attention_dim": 16, "use_linear_projection": True, "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 16,
}  # fmt: skip


def write_dataset(folder: Path, rig: ViewRig, count: int = 8, size: int = SIZE) -> Path:
    """Coloured discs whose place and colour depend on the view; returns the training split list."""
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    folders = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        colour, radius = (
            torch.rand(3, generator=generator),
            size * (0.2 + 0.1 * float(torch.rand((), generator=generator))),
        )
        pictures = []
        for view in range(rig.num_views):
            angle = torch.tensor(view / rig.num_views * 6.2832)
            centre = size / 2 + size / 6 * angle.cos(), size / 2 + size / 6 * angle.sin()
            inside = ((rows - centre[1]).square() + (columns - centre[0]).square() < radius**2).float()
            shade = (colour * (0.6 + 0.4 * view / rig.num_views)).view(3, 1, 1).expand(3, size, size)
            pictures.append(torch.cat([shade, inside[None]]))
        sample = Sample(f"s{index}", torch.stack(pictures), rig.cameras(size), rig.view_names)
        folders.append(folder / f"sample_{index:06d}")
        write_sample(folders[-1], sample)
    write_split(folder / "data_mouse_train.txt", folders[: max(1, count - 2)])
    write_split(folder / "data_mouse_val.txt", folders[max(1, count - 2) :])
    write_dataset_info(folder, rig, source="discs")
    return folder / "data_mouse_train.txt"


def write_components(folder: Path, data: Path) -> Path:
    """A components folder (no UNet) made by the project's own code, hardly trained."""
    config = DemoComponentsConfig(
        data=str(data), output_dir=str(folder), image_size=SIZE, holdout_samples=2, seed=1,
        text_width=16,
        vision=VisionConfig(image_size=32, hidden_size=16, layers=1, heads=2, projection=8, steps=2, batch=2),
        vae=VaeConfig(
            block_out_channels=[8, 8, 16], latent_channels=4, norm_groups=4, steps=2, batch=2, crop_size=16, bf16=False
        ),
    )  # fmt: skip
    assert make_demo_components(config) is not None
    return folder


def prepare(folder: Path, rig_name: str = "mouse6") -> dict[str, Path]:
    """Data, components and prompt embeddings under one folder."""
    rig = load_rig(rig_name)
    data = write_dataset(folder / "data", rig)
    components = write_components(folder / "components", data)
    write_prompt_embeds(folder / "embeds", components, rig, "mouse", angles=False)
    return {"data": data, "components": components, "embeds": folder / "embeds" / "clr_embeds.pt"}


def unet_inputs(batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Noise in the shapes that `run_unet` takes for a UNet of UNET."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"inputs": (batch, 8, 8, 8), "prompts": (batch, 77, 16), "labels": (batch, 16)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def config_for(tiny: dict, output: Path, **changes) -> MVDiffusionConfig:
    """The smallest training of what `prepare` wrote: four updates, a checkpoint every two."""
    values = {
        "pretrained_model_name_or_path": str(tiny["components"]), "prompt_embeds": str(tiny["embeds"]),
        "train_data": str(tiny["data"]), "validation_data": str(tiny["data"].with_name("data_mouse_val.txt")),
        "unet": dict(UNET), "output_dir": str(output), "max_train_steps": 4, "train_batch_size": 2,
        "gradient_accumulation_steps": 2, "dataloader_num_workers": 0, "learning_rate": 1e-3, "lr_warmup_steps": 2,
        "checkpointing_steps": 2, "validation_steps": 100, "validation_samples": 1, "validation_num_steps": 2,
        "validation_guidance_scales": [1.0], "device": "cpu",
    }  # fmt: skip
    return MVDiffusionConfig(**{**values, **changes})


def augmentation(**options) -> MVDiffusionConfig:
    """A configuration whose samples stay as they are, on white, but for these options."""
    return MVDiffusionConfig(**{"backgrounds": ["white"], "brightness_jitter": 0.0, "contrast_jitter": 0.0, **options})


def figures(output: Path) -> dict[str, float]:
    """The last validation's figures, out of the closing block."""
    return json.loads((output / "summary.json").read_text())["metrics"]


def losses(output: Path) -> dict[int, float]:
    """Training losses of a run, by step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}
