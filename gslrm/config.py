"""Stage 2's configuration: FaceLift's YAML layout as typed dataclasses. Experiments in `configs/` are deltas over
it."""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass, replace
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import Literal

from multiview.sample import read_dataset_info, split_lists
from multiview.sampler import mixed_lists

IGNORED_KEYS = (  # of FaceLift's own files; they change nothing here
    "profile", "debug", "model.class_name", "model.half_bbx_size", "training.dataset.normalize_distance_to",
    "training.dataset.remove_alpha", "training.dataloader.num_threads", "training.losses.distill_loss_weight",
    "training.schedule.num_epochs", "training.schedule.early_stop_after_epochs", "training.logging.wandb.job_type",
    "training.logging.wandb.log_every", "inference", "validation.output_dir",
)  # fmt: skip


@dataclass
class ImageTokenizerConfig:
    image_size: int = 512  # pixels; data are resized to it
    patch_size: int = 8  # pixels
    in_channels: int = 9  # rgb + rays: 9 (custom or plain Pluecker) or 12 (augmented)


@dataclass
class TransformerConfig:
    d: int = 1024  # width of a token
    d_head: int = 64  # width of an attention head
    n_layer: int = 24  # blocks


@dataclass
class UpsamplerConfig:
    upsample_factor: Literal[1] = 1  # FaceLift never had another


@dataclass
class GaussiansConfig:
    n_gaussians: int = 2  # learned, not pixel-aligned
    sh_degree: int = 0  # of the colors: 0 = the same from all sides
    scaling_modifier: float | None = None  # multiplies every scale
    upsampler: UpsamplerConfig = field(default_factory=UpsamplerConfig)


@dataclass
class ModelConfig:
    """Defaults are those of FaceLift's released weights."""

    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    gaussians: GaussiansConfig = field(default_factory=GaussiansConfig)
    add_refsrc_marker: bool = False  # a learned token added to view 0, another to the rest
    use_custom_plucker: bool = True  # rays as direction + point nearest the world origin
    use_aug_plucker: bool = False  # rays as moment + direction + nearest point
    hard_pixelalign: bool = True  # image Gaussians lie on their pixel's ray
    depth_preact_bias: float = 0.0  # added before the depth's activation
    depth_min: float = -1.0  # both > 0: depth range of plain Pluecker input
    depth_max: float = -1.0  # the same
    depth_reference_origin: bool = False  # plain Pluecker input: depth counted from the camera's distance to the origin
    clip_xyz: bool = False  # in training only: image Gaussians into [-1, 1]. FaceLift asked for it and never did it
    prune_background_tokens: bool = False  # drop tokens and Gaussians of background pixels; forward then needs masks
    prune_margin_px: int = 2  # pixels around the mask that are kept


@dataclass
class RuntimeConfig:
    device: str = "auto"  # auto, cpu, cuda
    seed: int = 777  # of weights and draws
    use_tf32: bool = True  # on CUDA
    use_amp: bool = True  # autocast, on CUDA only unless amp_on_cpu
    amp_on_cpu: bool = False  # autocast on a CPU too
    amp_dtype: Literal["bf16", "fp16"] = "bf16"
    grad_accum_steps: int = 1  # passes per update
    grad_clip_norm: float = 1.0  # longer gradients are shortened to it
    allowed_gradnorm_factor: float = 20.0  # an update whose norm exceeds clip x this is skipped and counted
    grad_checkpoint_every: int = 1  # blocks recomputed together in the backward pass; 0 = off
    torch_compile: bool = False  # compile the transformer blocks; the first iterations then take minutes
    recompute_rendering: bool = False  # draw again in the backward pass instead of keeping everything: less memory
    raster_backend: str = "auto"  # auto, gsplat or cpu
    ema_decay: float = 0.0  # 0 = off
    budget_s: float | None = None  # seconds after which the run saves itself and stops; repeating continues it


@dataclass
class CameraNoiseConfig:
    """Standard deviations of the error in the cameras that the model is told, drawn for each input view by itself."""

    rotation_deg: float = 0.0  # about the camera center
    translation: float = 0.0  # world units, along each axis
    pixels: float = 0.0  # principal point, at model.image_tokenizer.image_size


@dataclass
class AugmentationConfig:
    enabled: bool = False  # all of it
    brightness_range: list[float] = field(default_factory=lambda: [0.9, 1.1])  # factor, one draw for all views
    contrast_range: list[float] = field(default_factory=lambda: [0.9, 1.1])  # factor
    saturation_range: list[float] = field(default_factory=lambda: [1.0, 1.0])  # factor
    hue_range_deg: list[float] = field(default_factory=lambda: [0.0, 0.0])  # turn in the chroma plane
    camera_noise: CameraNoiseConfig = field(default_factory=CameraNoiseConfig)


@dataclass
class MixConfig:
    dataset_path: str
    ratio: float  # of the training items, rounded to hundredths


@dataclass
class DatasetConfig:
    dataset_path: str = "data_mouse/data_mouse_train.txt"  # split list
    mix: list[MixConfig] = field(default_factory=list)  # further datasets of the same rig; dataset_path gives the rest
    num_views: int = 6  # views used per sample: inputs + others
    num_input_views: int = 6  # of num_views; `--data` sets both to the rig's number
    min_input_views: int | None = None  # each training pass draws a number of inputs, from this one to num_input_views
    random_view_selection: bool = False  # inputs drawn at random instead of the rig's first ones
    maximize_view_overlap: bool = False  # random targets must see what some input sees
    overlap_rule: Literal["normalised", "upstream"] = "normalised"  # upstream: FaceLift's, by unnormalized positions
    target_has_input: bool = True  # inputs are targets too
    background_color: Literal["white", "gray", "black", "random"] = "white"  # put under the animal
    on_bad_sample: Literal["error", "skip"] = "error"  # skip: unreadable ones are left out and logged, at start
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass
class DataloaderConfig:
    batch_size_per_gpu: int = 2  # samples per pass and process
    num_workers: int = 4  # processes that read samples; 0 = none
    prefetch_factor: int = 4  # batches each of them reads ahead


@dataclass
class LossesConfig:
    """Weights of the losses; 0 = never computed (and VGG weights never loaded)."""

    l2_loss_weight: float = 1.0  # MSE of the colors
    lpips_loss_weight: float = 0.5  # LPIPS (VGG)
    perceptual_loss_weight: float = 0.5  # distance of VGG-19 features
    ssim_loss_weight: float = 0.2  # 1 - SSIM
    alpha_loss_weight: float = 0.0  # MSE of the rendered alpha against the mask
    background_loss_weight: float = 0.0  # MSE on background pixels alone
    pixelalign_loss_weight: float = 0.0  # distance of Gaussians from their pixel's ray
    pointsdist_loss_weight: float = 0.0  # spreads the points about the camera's distance to the origin
    masked_l2_loss: bool = False  # masked: over foreground pixels only
    masked_lpips_loss: bool = False  # the same
    masked_perceptual_loss: bool = False  # the same
    masked_ssim_loss: bool = False  # the same
    masked_pixelalign_loss: bool = True  # weighted by alpha
    pixelalign_normalisation: Literal["upstream", "foreground"] = "upstream"  # masked form: over all pixels' number
    masked_pointsdist_loss: bool = False  # over alpha > 0.5; needed with model.prune_background_tokens
    warmup_pointsdist: bool = False  # first 1000 iterations: points distance (0.1) instead of l2 and perceptual
    direct_loss_weight: float = 0.0  # to the true surface points; needs depth maps in the dataset
    direct_loss_weight_after: float = 0.0  # once direct_warmup_steps are over
    direct_warmup_steps: int = 0  # iterations without rendering, direct losses alone
    direct_scale_px: float = 0.7  # target scale of a pixel's Gaussian, in pixel footprints
    vgg_folder: str = "checkpoints/vgg"  # for LPIPS and perceptual loss


@dataclass
class OptimizerConfig:
    lr: float = 1e-4  # after the warm-up; cosine to 0
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    weight_decay: float = 0.05  # of AdamW, matrices only
    reset_training_state: bool = True  # from resume_ckpt take the weights only
    reset_lr: bool = False  # a resumed training state: warm-up and cosine start again, with this config's lr
    reset_weight_decay: bool = False  # a resumed training state: take this config's weight_decay


@dataclass
class AdaptationConfig:
    """Which parameters train. Blocks are numbered from 0; ranges include their ends."""

    trainable_layers: str | None = None  # transformer blocks, e.g. "20-23" or "0,4-7"; null = all, "none" = none
    freeze_embedder: bool = False  # patch embedder, learned tokens, markers, input norm
    freeze_heads: bool = False  # both Gaussian heads
    lora_rank: int = 0  # > 0: in trainable_layers only low-rank adapters of lora_targets train, the rest stays
    lora_alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    lora_dropout: float = 0.0  # of the adapters' input
    # Parts of names that take adapters
    lora_targets: list[str] = field(default_factory=lambda: ["attn.to_qkv", "attn.fc", "mlp.mlp.0", "mlp.mlp.2"])
    save_adapters: bool = False  # also <checkpoint_dir>/adapters: the newest ones alone, small, in peft's layout


@dataclass
class ScheduleConfig:
    max_fwdbwd_passes: int = 20000  # iterations of the run
    warmup: int = 500  # parameter updates
    l2_warmup_steps: int = 0  # iterations without LPIPS and perceptual loss


@dataclass
class CheckpointingConfig:
    resume_ckpt: str | None = None  # file or folder to start from; None = random weights
    allow_rig_change: bool = False  # start weights may carry another rig than the dataset's
    checkpoint_dir: str = "checkpoints/gslrm/run"  # of this run alone; repeating the command resumes it
    checkpoint_every: int = 500  # iterations
    checkpoints_total_limit: int = 3  # newest that are kept
    export_dir: str | None = None  # where the finished network goes in float16, to ship it
    skip_digest: bool = False  # resume without comparing files with their digests


@dataclass
class WandbConfig:
    project: str = "mouse_facelift"  # W&B's
    exp_name: str = "gslrm"  # W&B's
    group: str = "gslrm"  # W&B's
    mode: str = "disabled"  # disabled, offline, online
    offline: bool = False  # FaceLift's key: offline instead of online


@dataclass
class LoggingConfig:
    print_every: int = 20  # iterations
    vis_every: int = 250  # iterations between pictures
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"  # event files in <checkpoint_dir>/tensorboard
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class TrainingConfig:
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    losses: LossesConfig = field(default_factory=LossesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass
class ValidationConfig:
    enabled: bool = True  # figures on held-out samples
    val_every: int = 500  # iterations
    dataset_path: str = "data_mouse/data_mouse_val.txt"  # split list
    num_samples: int = 8  # first ones of the list


@dataclass
class GSLRMConfig:
    rig: str | None = None  # name or file; must be the dataset's and the checkpoint's. None: the dataset's
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


def model_config_from_dict(content: dict, source: str) -> ModelConfig:
    """Returns the model section of a checkpoint's sidecar as ModelConfig. Raises ValueError for unknown keys and for
    values of another type than the default's."""

    def build(default: object, values: object, key: str):
        if not is_dataclass(default):
            whole = type(default) is float and type(values) is int  # JSON writes 1.0 as 1 now and then
            if default is not None and type(values) is not type(default) and not whole:
                raise ValueError(f"{source}: {key} must be a {type(default).__name__}, got {values!r}")
            return values
        known = vars(default)
        if not isinstance(values, dict) or not set(values) <= set(known):
            unknown = sorted(set(values) - set(known)) if isinstance(values, dict) else [repr(values)]
            raise ValueError(f"{source}: unknown keys {', '.join(f'{key}.{name}' for name in unknown)}")
        return replace(default, **{name: build(known[name], value, f"{key}.{name}") for name, value in values.items()})

    return build(ModelConfig(), content, "model")


def dataset_overrides(config: GSLRMConfig, folder: Path) -> list[str]:
    """What `--data` asks of a config: the dataset's lists, all views of its rig, a run folder named after it."""
    (train, val), views = split_lists(folder), read_dataset_info(folder)["rig"].num_views
    run, key = config.training.checkpointing.checkpoint_dir.rstrip("/"), "training.checkpointing.checkpoint_dir"
    asked = [f"training.dataset.{name}={views}" for name in ("num_views", "num_input_views")]
    asked += [f"training.dataset.dataset_path={train}", f"validation.dataset_path={val}"]
    return [*asked, f"{key}={run}_{folder.resolve().name}"]


def size_of(config: GSLRMConfig) -> tuple[float, float, float]:
    """Lower bounds: parameters, parameters that train, and bytes of a batch."""
    transformer, training = config.model.transformer, config.training
    pixels = training.dataset.num_views * config.model.image_tokenizer.image_size**2
    parameters, adaptation = 12.0 * transformer.n_layer * transformer.d**2, training.adaptation
    is_partial = adaptation.lora_rank or adaptation.trainable_layers is not None
    return parameters, 0.0 if is_partial else parameters, 16.0 * pixels * training.dataloader.batch_size_per_gpu


def check_config(config: GSLRMConfig) -> None:
    """Refuses combinations that cannot train. Raises ValueError naming the key, what was expected and why."""
    training, model = config.training, config.model
    dataset, losses, runtime = training.dataset, training.losses, training.runtime
    views, inputs, every = dataset.num_views, dataset.num_input_views, training.checkpointing.checkpoint_every
    limits = {
        (1, 2**16): "model.image_tokenizer.image_size", (1, 10_000): "model.transformer.n_layer",
        (0, 512): "training.dataloader.num_workers", (1, 1024): "training.dataloader.prefetch_factor",
        (1, inf): "training.runtime.grad_accum_steps training.dataloader.batch_size_per_gpu validation.val_every "
        "training.schedule.max_fwdbwd_passes training.checkpointing.checkpoint_every training.logging.print_every "
        "training.checkpointing.checkpoints_total_limit training.logging.vis_every validation.num_samples "
        "model.image_tokenizer.patch_size model.transformer.d model.transformer.d_head",
        (0, 3): "model.gaussians.sh_degree", (0, 1): "training.optimizer.lr training.runtime.ema_decay",
        (0, 0.999999): "training.optimizer.beta1 training.optimizer.beta2",
        (1e-9, inf): "training.runtime.grad_clip_norm",
        (0, 1e6): "training.optimizer.weight_decay training.schedule.warmup training.losses.direct_warmup_steps "
        + " ".join(f"training.losses.{name}" for name in vars(losses) if "loss_weight" in name),
    }  # fmt: skip
    for (low, high), key in [(ends, key) for ends, keys in limits.items() for key in keys.split()]:
        if not low <= (value := attrgetter(key)(config)) <= high:
            raise ValueError(f"{key} must be within {low} to {high}, got {value}")
    uses_pointsdist = losses.pointsdist_loss_weight > 0 or losses.warmup_pointsdist
    for wrong, message in (
        (inputs < 2,
         f"training.dataset.num_input_views must be at least 2, got {inputs}: Stage 2 triangulates between posed views "
         "and learns a flat billboard from one. A single photograph goes through Stage 1 first (python "
         "inference_mouse.py --input_image ...). Set training.dataset.num_input_views=6"),
        (model.image_tokenizer.image_size % model.image_tokenizer.patch_size,
         f"model.image_tokenizer.image_size ({model.image_tokenizer.image_size}) must be a multiple of its patch_size "
         f"({model.image_tokenizer.patch_size})"),
        (dataset.min_input_views is not None and not 2 <= dataset.min_input_views <= inputs,
         f"training.dataset.min_input_views must be 2 to num_input_views ({inputs}), got {dataset.min_input_views}"),
        (views < inputs,
         f"training.dataset.num_views ({views}) counts inputs and targets together and must be at least "
         f"num_input_views ({inputs})"),
        (not dataset.target_has_input and views == inputs,
         "training.dataset: target_has_input false leaves no target view when num_views equals num_input_views "
         f"({views}); raise num_views"),
        (model.prune_background_tokens and uses_pointsdist and not losses.masked_pointsdist_loss,
         "the plain points-distance loss needs every pixel, but model.prune_background_tokens drops most: set "
         "training.losses.masked_pointsdist_loss=true, or model.prune_background_tokens=false"),
        (every % runtime.grad_accum_steps,
         "training.checkpointing.checkpoint_every must be a multiple of training.runtime.grad_accum_steps "
         f"({runtime.grad_accum_steps}), got {every}"),
        (losses.direct_warmup_steps > 0 and losses.direct_loss_weight <= 0,
         "training.losses.direct_warmup_steps needs direct_loss_weight > 0"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    augmentation, prefix = dataset.augmentation, "training.dataset.augmentation"
    for name in ("brightness_range", "contrast_range", "saturation_range", "hue_range_deg"):
        limits, lowest = getattr(augmentation, name), -180.0 if name == "hue_range_deg" else 0.0
        if len(limits) != 2 or not lowest <= limits[0] <= limits[1]:
            raise ValueError(f"{prefix}.{name} must be [low, high] with {lowest:g} <= low <= high, got {limits}")
    for name, value in vars(augmentation.camera_noise).items():
        if value < 0:
            raise ValueError(f"{prefix}.camera_noise.{name} is a standard deviation and must be 0 or more, got {value}")
    mixed_lists(dataset.dataset_path, [(part.dataset_path, part.ratio) for part in dataset.mix])
