"""FaceLift's flat training YAML: its keys are folded into this project's own where the file is read. Switches without a
meaning here are ignored with a line in the log; values without a counterpart are refused."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from multiview.config import load_config
from multiview.sample import split_lists
from mvdiffusion.config import MVDiffusionConfig

# Switches that have no effect here; they are listed when a file sets them. Attention is exact whatever is installed,
# the prediction type is the scheduler's, wandb.mode says where to report, output_dir is joined once.
IGNORED_KEYS = frozenset(
    "enable_xformers_memory_efficient_attention allow_tf32 revision report_to local_rank prediction_type logging_dir "
    "vis_dir val_out_dir checkpoint_prefix scale_lr tracker_project_name dataset_type validation_batch_size "
    "validation_train_batch_size validation_sanity_check validation_grid_nrow wandb_job_type".split()
)
# Of unet_from_pretrained_kwargs: what the UNet's own config says, or what is decided by its weights.
IGNORED_UNET_KEYS = frozenset(
    "unclip zero_init_conv_in zero_init_camera_projection init_mvattn_with_selfattn cd_attention_last cd_attention_mid "
    "selfattn_block addition_downsample addition_channels sample_size".split()
)
# Keys whose only supported value is the one FaceLift ships.
FIXED_KEYS = {
    "drop_type": ("drop_as_a_whole", "conditions are dropped per object, for all its views at once"),
    "scale_input_latents": (True, "the input image's latents are scaled, in training and in sampling"),
    "pipe_validation_kwargs": ({"eta": 1.0}, "validation samples with fresh noise in every step"),
    "resume_from_checkpoint": ("latest", "a repeated command resumes; another run's weights are pretrained_unet_path"),
}


@dataclass
class FaceLiftData:
    """`train_dataset` and `validation_dataset` of FaceLift's file."""

    path: str | None = None  # split list
    bg_color: str | None = None  # three_choices, or the name of one
    augmentation: bool | None = None
    aug_brightness: list[float] | None = None  # range of the factor
    aug_contrast: list[float] | None = None
    aug_hflip: bool | None = None


@dataclass
class FlatConfig(MVDiffusionConfig):
    """A training file: this project's keys and FaceLift's, the latter None where a file does not use them."""

    n_views: int | None = None
    img_wh: Any = None  # 512 or [512, 512]
    prompt_embed_path: str | None = None
    train_dataset: FaceLiftData = field(default_factory=FaceLiftData)
    validation_dataset: FaceLiftData = field(default_factory=FaceLiftData)
    use_classifier_free_guidance: bool | None = None
    drop_type: str | None = None
    scale_input_latents: bool | None = None
    resume_from_checkpoint: str | None = None
    wandb_exp_name: str | None = None
    wandb_group: str | None = None
    pipe_kwargs: dict[str, Any] = field(default_factory=dict)
    pipe_validation_kwargs: dict[str, Any] = field(default_factory=dict)
    unet_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)


def load_training_config(path: Path | str | None, overrides: list[str] = ()) -> MVDiffusionConfig:
    """Typed defaults <- YAML of this project or FaceLift's <- `key=value` overrides, checked. Raises ValueError."""
    flat = load_config(FlatConfig, path, overrides, ignored=IGNORED_KEYS)
    try:
        _fold(flat)
        own = {entry.name: getattr(flat, entry.name) for entry in fields(MVDiffusionConfig)}
        return MVDiffusionConfig(**own).validate()
    except ValueError as error:
        raise ValueError(f"{path or 'command line'}: {error}") from error


def dataset_overrides(config: MVDiffusionConfig, folder: Path) -> list[str]:
    """What `--data` asks of a config: the dataset's lists, prompts of its rig, a run folder named after it."""
    train, val = split_lists(folder)
    return [  # FaceLift's keys, where both are set, are those that count
        f"train_dataset.path={train}", f"validation_dataset.path={val}", "prompt_embeds=null", "prompt_embed_path=null",
        f"output_dir={config.output_dir.rstrip('/')}_{folder.resolve().name}",
    ]  # fmt: skip


def _fold(config: FlatConfig) -> None:
    """Moves the values of FaceLift's keys into this project's."""
    for key, (value, reason) in FIXED_KEYS.items():
        if getattr(config, key) not in (None, {}, value):
            raise ValueError(f"{key} must be {value!r}: {reason}; got {getattr(config, key)!r}")
    train, validation, side = config.train_dataset, config.validation_dataset, config.img_wh
    if validation.bg_color not in (None, "white"):
        raise ValueError(f"validation_dataset.bg_color must be white, got {validation.bg_color!r}")
    side = side[0] if isinstance(side, list) and side else side
    if side is not None and (not isinstance(side, int) or config.img_wh not in (side, [side, side])):
        raise ValueError(f"img_wh must be square, [512, 512] or 512, got {config.img_wh}")
    colors = ["white", "black", "gray"] if train.bg_color == "three_choices" else [train.bg_color]
    for target, key, value in (
        (config, "num_views", config.n_views), (config, "prompt_embeds", config.prompt_embed_path),
        (config, "image_size", side), (config.wandb, "name", config.wandb_exp_name),
        (config.wandb, "group", config.wandb_group), (config, "train_data", train.path or None),
        (config, "validation_data", validation.path or None), (config, "backgrounds", train.bg_color and colors),
        (config, "condition_drop_rate", 0.0 if config.use_classifier_free_guidance is False else None),
        (config, "mirror_probability", 0.5 if train.aug_hflip and train.augmentation is not False else None),
    ):  # fmt: skip
        if value is not None:
            setattr(target, key, value)
    for key, value in (("brightness", train.aug_brightness), ("contrast", train.aug_contrast)):
        if train.augmentation is False:
            value = [1.0, 1.0]
        if value is not None and (len(value) != 2 or abs(value[0] + value[1] - 2.0) > 1e-6):
            raise ValueError(f"train_dataset.aug_{key} must be a range about 1, e.g. [0.9, 1.1], got {value}")
        if value is not None:
            setattr(config, f"{key}_jitter", round(value[1] - 1.0, 9))
    for name in ("unet_from_pretrained_kwargs", "pipe_kwargs"):
        given = {key: value for key, value in getattr(config, name).items() if key not in IGNORED_UNET_KEYS}
        views, multiview = given.pop("num_views", None), given.pop("multiview_attention", None)
        sparse = given.pop("sparse_mv_attention", None)
        if given:
            raise ValueError(f"{name}: unknown keys {sorted(given)}")
        if views is not None and config.num_views not in (None, views):
            raise ValueError(f"{name}.num_views is {views}, num_views {config.num_views}")
        config.num_views = config.num_views if views is None else views
        if multiview is not None:
            config.attention = ("sparse" if sparse else "full") if multiview else "none"
