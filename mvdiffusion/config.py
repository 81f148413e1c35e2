"""Training options of Stage 1, flat, with FaceLift's names where FaceLift has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

from multiview.run import WandbOptions

# Switches of FaceLift's YAML that have no effect here; they are listed when a file sets them.
IGNORED_KEYS = frozenset(
    {
        "enable_xformers_memory_efficient_attention",  # attention is exact whatever is installed
        "allow_tf32",
        "revision",
        "report_to",  # wandb.mode says so
        "local_rank",
        "prediction_type",  # read from the scheduler
        "logging_dir",
        "vis_dir",
        "val_out_dir",
        "checkpoint_prefix",  # output_dir is joined once
        "scale_lr",
        "tracker_project_name",
        "dataset_type",
        "validation_batch_size",
        "validation_train_batch_size",
        "validation_sanity_check",
        "validation_grid_nrow",
        "wandb_job_type",
    }
)


@dataclass
class MixEntry:
    """One of several data sets that are trained on together."""

    train_data: str = ""  # split list
    ratio: float = 1.0  # share of the samples; train_data gives what all shares leave of 1


@dataclass
class MVDiffusionConfig:
    """Everything `train_diffusion.py` needs; steps are optimiser updates. FaceLift's other keys: upstream.py."""

    # What is trained
    pretrained_model_name_or_path: str = "checkpoints/mvdiffusion/pipeckpts"  # components folder
    pretrained_unet_path: str | None = None  # UNet to start from; None: the components folder's own
    unet: dict[str, Any] | None = None  # constructor arguments: start from a fresh UNet of this shape
    allow_rig_change: bool = False  # the starting UNet may carry another rig than the data set's
    attention: str | None = None  # sparse, full, none; None: what the UNet's config says, sparse for a fresh one
    camera_conditioning: str | None = None  # none, adaln, cross_attention, concat; None: what the UNet's config says
    rig: str | None = None  # None: the data set's
    num_views: int | None = None  # None: the rig's; any other number is refused
    image_size: int | None = None  # pixels; None: the UNet's; any other is refused
    prompt_embeds: str = "mvdiffusion/data/mouse_prompt_embeds_6view/clr_embeds.pt"

    # Data
    train_data: str = "data_mouse/data_mouse_train.txt"  # split list
    mix: list[MixEntry] = field(default_factory=list)  # further data sets of the same rig; train_data gives the rest
    validation_data: str = "data_mouse/data_mouse_val.txt"
    backgrounds: list[str] = field(default_factory=lambda: ["white", "black", "gray"])  # one per sample, at random
    brightness_jitter: float = 0.1  # factor drawn from 1 +- this, the same for all views of a sample
    contrast_jitter: float = 0.1
    saturation_jitter: float = 0.0
    hue_jitter_deg: float = 0.0  # angle drawn from +- this
    random_crop_ratio: float = 1.0  # smallest share of the picture's side that a crop keeps; cameras go with it
    mirror_probability: float = 0.0  # pixels, cameras, view order and prompts together
    reference_view_idx: str = "0"  # "0": the rig's reference view; "random": any; targets, prompts, cameras follow
    cache_latents: bool = False  # encode every sample and variant once, on disk
    cache_variants: int = 1  # augmentation draws per sample with cache_latents
    cache_dir: str = "checkpoints/latent_cache"  # keyed by content: may be shared by runs
    dataloader_num_workers: int = 2

    # Optimisation
    output_dir: str = "checkpoints/mvdiffusion/mouse"
    seed: int = 0
    max_train_steps: int = 30000
    train_batch_size: int = 4  # objects per process
    gradient_accumulation_steps: int = 4
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"  # no, fp16, bf16
    learning_rate: float = 5e-5
    lr_scheduler: str = "constant"  # after the warm-up: constant, or linear or cosine to 0 at max_train_steps
    lr_warmup_steps: int = 100
    step_rules: str = "1"  # of lr_scheduler piecewise_constant (no warm-up): "1:200000,0.5" is factor 1, later 0.5
    lr_multipliers: dict[str, float] = field(default_factory=dict)  # {pattern in a parameter's name: factor}
    camera_embedding_lr_mult: float = 1.0  # FaceLift's: of class_embedding
    use_8bit_adam: bool = False  # bitsandbytes, CUDA only
    trainable_modules: list[str] | None = None  # only parameters whose names hold one of these; None: all
    freeze_encoder: bool = False  # the UNet's down blocks stand still in the first half of the run
    lora_rank: int = 0  # > 0: train low-rank adapters instead of the UNet's own weights
    lora_alpha: float | None = None  # None: the rank, i.e. factor 1
    lora_targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    lora_also_train: list[str] = field(default_factory=list)  # parts of names trained in full beside, e.g. conv_in
    lora_save_merged: bool = True  # checkpoints hold whole UNets with the adapters folded in; false: adapters alone
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    use_ema: bool = True
    ema_decay: float = 0.9999
    condition_drop_rate: float = 0.05  # labels dropped, latents dropped, or both, each at this rate, per object
    snr_gamma: float | None = 5.0  # None: no weighting
    snr_weighting: str = "prediction"  # form by the scheduler's prediction type; "upstream": FaceLift's epsilon form
    high_noise_share: float = 0.0  # share of time steps drawn from high_noise_range instead of from all
    high_noise_range: list[int] = field(default_factory=lambda: [850, 999])
    foreground_weight: float = 1.0  # weight of latent cells that hold the animal
    overfit_steps: int = 1000  # max_train_steps under --overfit

    # Saving and looking
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int = 3
    validation_steps: int = 1000
    validation_samples: int = 8
    validation_guidance_scales: list[float] = field(default_factory=lambda: [1.0, 3.0])
    validation_num_steps: int = 20
    log_steps: int = 10
    budget_s: float | None = None  # seconds after which the run saves itself and stops; repeating continues it
    skip_digest: bool = False  # resume without comparing files with their digests
    export_dir: str | None = None  # where the finished EMA UNet and its prompt embeddings go, in float16
    export_num_steps: int = 50  # sampling that suits the exported UNet; inference takes it unless told otherwise
    export_guidance_scale: float = 3.0
    export_mirror: str = "never"  # auto: the animals face one way in training, so inference may mirror a photograph
    device: str = "auto"
    wandb: WandbOptions = field(default_factory=lambda: WandbOptions(project="mouse_mvdiffusion", group="mvdiffusion"))

    def validate(self) -> MVDiffusionConfig:
        """Checks values that depend on each other; returns itself. Raises ValueError naming the key."""
        from multiview.image import BACKGROUNDS

        if self.mixed_precision == "False":
            self.mixed_precision = "no"  # YAML reads a bare `no` as false
        if self.unet and self.pretrained_unet_path:
            raise ValueError(
                f"unet (a fresh UNet's shape) and pretrained_unet_path={self.pretrained_unet_path} are both set, but a "
                "run starts from one of them: set unet=null to start from the pretrained one"
            )
        unknown = set(self.backgrounds) - set(BACKGROUNDS)
        if unknown or not self.backgrounds:
            raise ValueError(
                f"backgrounds must be a non-empty list out of {sorted(BACKGROUNDS)}, got {self.backgrounds}"
            )
        schedules = ("constant", "constant_with_warmup", "linear", "cosine", "piecewise_constant")
        cameras = (None, "none", "adaln", "cross_attention", "concat")
        for name, value, allowed in (
            ("reference_view_idx", self.reference_view_idx, ("0", "random")),
            ("lr_scheduler", self.lr_scheduler, schedules),
            ("export_mirror", self.export_mirror, ("never", "always", "auto")),
            ("mixed_precision", self.mixed_precision, ("no", "fp16", "bf16")),
            ("snr_weighting", self.snr_weighting, ("prediction", "upstream")),
            ("camera_conditioning", self.camera_conditioning, cameras),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        for name, low, high in (
            ("random_crop_ratio", 0.1, 1.0), ("mirror_probability", 0.0, 1.0), ("brightness_jitter", 0.0, 1.0),
            ("contrast_jitter", 0.0, 1.0), ("saturation_jitter", 0.0, 1.0), ("hue_jitter_deg", 0.0, 180.0),
            ("condition_drop_rate", 0.0, 1 / 3), ("cache_variants", 1, 1000), ("lora_rank", 0, 4096),
            ("max_train_steps", 1, inf), ("train_batch_size", 1, inf), ("gradient_accumulation_steps", 1, inf),
            ("dataloader_num_workers", 0, 512), ("checkpointing_steps", 1, inf), ("validation_steps", 1, inf),
            ("validation_samples", 1, inf), ("log_steps", 1, inf), ("checkpoints_total_limit", 1, inf),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be within {low:g}..{high:g}, got {getattr(self, name)}")
        if len(self.high_noise_range) != 2 or not 0 <= self.high_noise_range[0] < self.high_noise_range[1] <= 999:
            raise ValueError(f"high_noise_range must be [low, high] within 0..999, got {self.high_noise_range}")
        if self.lora_rank and self.trainable_modules is not None:
            raise ValueError("trainable_modules has no meaning with lora_rank > 0; name them in lora_also_train")
        return self
