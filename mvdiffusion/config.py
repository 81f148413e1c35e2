"""Training options of Stage 1, flat, with FaceLift's names where FaceLift has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from multiview.run import WandbOptions

# Switches of FaceLift's YAML that have no effect here; they are listed when a file sets them.
IGNORED_KEYS = frozenset(
    {
        "enable_xformers_memory_efficient_attention",  # attention is exact whatever is installed
        "allow_tf32",
        "revision",
        "report_to",
        "local_rank",
        "prediction_type",  # read from the scheduler
        "logging_dir",
        "vis_dir",
        "scale_lr",
        "tracker_project_name",
    }
)


@dataclass
class MVDiffusionConfig:
    """Everything `train_diffusion.py` needs; steps are optimiser updates."""

    # What is trained
    pretrained_model_name_or_path: str = "checkpoints/mvdiffusion/pipeckpts"  # components folder
    pretrained_unet_path: str | None = None  # UNet to start from; None: the components folder's own
    unet: dict[str, Any] = field(default_factory=dict)  # constructor arguments: start from a fresh UNet of this shape
    allow_rig_change: bool = False  # the starting UNet may carry another rig than the data set's
    attention: str | None = None  # sparse, full, none; None: what the UNet's config says, sparse for a fresh one
    rig: str | None = None  # None: the data set's
    prompt_embeds: str = "mvdiffusion/data/mouse_prompt_embeds_6view/clr_embeds.pt"

    # Data
    train_data: str = "data_mouse/data_mouse_train.txt"  # split list
    validation_data: str = "data_mouse/data_mouse_val.txt"
    backgrounds: list[str] = field(default_factory=lambda: ["white", "black", "gray"])  # one per sample, at random
    brightness_jitter: float = 0.1  # factor drawn from 1 +- this, the same for all views of a sample
    contrast_jitter: float = 0.1
    reference_view_idx: str = "0"  # "0": the rig's reference view; "random": any view of a cyclic rig, targets rotated
    cache_latents: bool = False  # encode every sample once and keep it in memory; needs one background and no jitter
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
    lr_scheduler: str = "constant"  # after the warm-up: constant or cosine (to 0 at max_train_steps)
    lr_warmup_steps: int = 100
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
    export_dir: str | None = None  # where the finished EMA UNet and its prompt embeddings go, in float16
    export_num_steps: int = 50  # sampling that suits the exported UNet; inference takes it unless told otherwise
    export_guidance_scale: float = 3.0
    device: str = "auto"
    wandb: WandbOptions = field(default_factory=lambda: WandbOptions(project="mouse_mvdiffusion", group="mvdiffusion"))

    def validate(self) -> MVDiffusionConfig:
        """Checks values that depend on each other; returns itself. Raises ValueError naming the key."""
        from multiview.image import BACKGROUNDS

        if self.mixed_precision == "False":
            self.mixed_precision = "no"  # YAML reads a bare `no` as false
        unknown = set(self.backgrounds) - set(BACKGROUNDS)
        if unknown or not self.backgrounds:
            raise ValueError(
                f"backgrounds must be a non-empty list out of {sorted(BACKGROUNDS)}, got {self.backgrounds}"
            )
        for name, value, allowed in (
            ("reference_view_idx", self.reference_view_idx, ("0", "random")),
            ("lr_scheduler", self.lr_scheduler, ("constant", "cosine")),
            ("mixed_precision", self.mixed_precision, ("no", "fp16", "bf16")),
            ("snr_weighting", self.snr_weighting, ("prediction", "upstream")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.cache_latents and (len(self.backgrounds) > 1 or self.brightness_jitter or self.contrast_jitter):
            raise ValueError(
                "cache_latents encodes every sample once, so it needs one background and brightness_jitter = "
                f"contrast_jitter = 0, got {self.backgrounds}, {self.brightness_jitter}, {self.contrast_jitter}"
            )
        if len(self.high_noise_range) != 2 or not 0 <= self.high_noise_range[0] < self.high_noise_range[1] <= 999:
            raise ValueError(f"high_noise_range must be [low, high] within 0..999, got {self.high_noise_range}")
        return self
