"""Training options of Stage 1, flat, with FaceLift's names where FaceLift has one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from multiview.image import BACKGROUNDS
from multiview.run import WandbOptions


def choice(default: Any, *others: Any) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


def within(default: float, low: float, high: float = math.inf) -> Any:
    return field(default=default, metadata={"range": (low, high)})


@dataclass
class MixEntry:
    """One of several data sets that are trained on together."""

    train_data: str = ""  # split list
    ratio: float = 1.0  # share of the samples; train_data gives what all shares leave of 1


@dataclass
class MVDiffusionConfig:
    """Everything `train_diffusion.py` needs; steps are optimizer updates. FaceLift's other keys: facelift_yaml.py."""

    # What is trained
    pretrained_model_name_or_path: str = "checkpoints/mvdiffusion/pipeckpts"  # components folder
    pretrained_unet_path: str | None = None  # UNet to start from; None: the components folder's own
    unet: dict[str, Any] | None = None  # constructor arguments: start from a fresh UNet of this shape
    allow_rig_change: bool = False  # the starting UNet may carry another rig than the data set's
    # Of these two None is what the UNet says, sparse attention for a fresh one
    attention: str | None = choice(None, "sparse", "full", "none")
    camera_conditioning: str | None = choice(None, "none", "adaln", "cross_attention", "concat")
    rig: str | None = None  # None: the data set's
    num_views: int | None = None  # None: the rig's; any other number is refused
    image_size: int | None = None  # pixels; None: the UNet's; any other is refused
    prompt_embeds: str | None = "mvdiffusion/data/mouse_prompt_embeds_6view/clr_embeds.pt"  # None: made for the rig

    # Data
    train_data: str = "data_mouse/data_mouse_train.txt"  # split list
    mix: list[MixEntry] = field(default_factory=list)  # further data sets of the same rig; train_data gives the rest
    validation_data: str = "data_mouse/data_mouse_val.txt"  # split list
    backgrounds: list[str] = field(default_factory=lambda: ["white", "black", "gray"])  # one per sample, at random
    brightness_jitter: float = within(0.1, 0, 1)  # factor drawn from 1 +- this, the same for all views of a sample
    contrast_jitter: float = within(0.1, 0, 1)  # the same
    saturation_jitter: float = within(0.0, 0, 1)  # the same
    hue_jitter_deg: float = within(0.0, 0, 180)  # angle drawn from +- this
    random_crop_ratio: float = within(1.0, 0.1, 1)  # smallest side of a crop; cameras go with it
    mirror_probability: float = within(0.0, 0, 1)  # pixels, cameras, view order and prompts together
    # "0": the rig's input; "random": any view, targets, prompts and cameras follow; "half": so for half of the samples
    reference_view_idx: str = choice("0", "random", "half")
    cache_latents: bool = False  # encode every sample and variant once, on disk
    cache_variants: int = within(1, 1, 1000)  # augmentation draws per sample with cache_latents
    cache_dir: str = "checkpoints/latent_cache"  # keyed by content: may be shared by runs
    dataloader_num_workers: int = within(2, 0, 256)

    # Optimization
    output_dir: str = "checkpoints/mvdiffusion/mouse"  # of this run alone; repeating the command resumes it
    seed: int = 0  # of weights, draws and noise
    max_train_steps: int = within(30000, 0)  # updates
    train_batch_size: int = within(4, 1, 4096)  # objects per process
    gradient_accumulation_steps: int = within(4, 1, 4096)  # passes per update
    gradient_checkpointing: bool = False  # less memory, slower
    torch_compile: bool = False  # compile the UNet; the first step then takes minutes
    mixed_precision: str = choice("no", "fp16", "bf16")  # of the UNet's matrix products
    learning_rate: float = within(5e-5, 0, 1)  # after the warm-up
    # After the warm-up: constant, or linear or cosine to 0 at max_train_steps
    lr_scheduler: str = choice("constant", "constant_with_warmup", "linear", "cosine", "piecewise_constant")
    lr_warmup_steps: int = within(100, 0)  # linear from 0
    step_rules: str = "1"  # of lr_scheduler piecewise_constant (no warm-up): "1:200000,0.5" is factor 1, later 0.5
    lr_multipliers: dict[str, float] = field(default_factory=dict)  # {pattern in a parameter's name: factor}
    camera_embedding_lr_mult: float = within(1.0, 0, 1e6)  # FaceLift's: of class_embedding
    use_8bit_adam: bool = False  # bitsandbytes, CUDA only
    trainable_modules: list[str] | None = None  # only parameters whose names hold one of these; None: all
    freeze_encoder: bool = False  # the UNet's down blocks stand still in the first half of the run
    lora_rank: int = within(0, 0, 4096)  # > 0: train low-rank adapters instead of the UNet's own weights
    lora_alpha: float | None = None  # None: the rank, i.e. factor 1
    lora_targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])  # parts of names
    lora_also_train: list[str] = field(default_factory=list)  # parts of names trained in full beside, e.g. conv_in
    lora_save_merged: bool = True  # checkpoints hold whole UNets with the adapters folded in; false: adapters alone
    adam_beta1: float = within(0.9, 0, 0.999999)  # of AdamW
    adam_beta2: float = within(0.999, 0, 0.999999)  # of AdamW
    adam_weight_decay: float = within(0.01, 0, 1e6)  # of AdamW
    adam_epsilon: float = within(1e-8, 0, 1)  # of AdamW
    max_grad_norm: float = within(1.0, 1e-9)  # longer gradients are shortened to it
    use_ema: bool = True  # average the weights; inference takes the average
    ema_decay: float = within(0.9999, 0, 1)  # per update
    condition_drop_rate: float = within(0.05, 0, 1 / 3)  # labels, latents, or both, each at this rate
    snr_gamma: float | None = 5.0  # None: no weighting
    snr_weighting: str = choice("prediction", "upstream")  # by the prediction type; FaceLift's: epsilon's form always
    high_noise_share: float = within(0.0, 0, 1)  # fraction of time steps drawn from high_noise_range
    high_noise_range: list[int] = field(default_factory=lambda: [850, 999])  # time steps
    foreground_weight: float = within(1.0, 0, 1e6)  # weight of latent cells full of the animal; of others, less
    overfit_steps: int = within(1000, 1)  # max_train_steps under --overfit

    # Saving and looking
    checkpointing_steps: int = within(1000, 1)  # between checkpoints
    checkpoints_total_limit: int = within(3, 1)  # newest that are kept
    validation_steps: int = within(1000, 1)  # between validations
    validation_samples: int = within(8, 1)  # first ones of the list
    validation_guidance_scales: list[float] = field(default_factory=lambda: [1.0, 3.0])  # each is measured
    validation_num_steps: int = within(20, 1, 1000)  # of the sampler
    log_steps: int = within(10, 1)  # between lines of the log
    budget_s: float | None = None  # seconds after which the run saves itself and stops; repeating continues it
    skip_digest: bool = False  # resume without comparing files with their digests
    export_dir: str | None = None  # where the finished EMA UNet and its prompt embeddings go, in float16
    export_num_steps: int = within(50, 1, 1000)  # suits the exported UNet: inference takes it unless told otherwise
    export_guidance_scale: float = 3.0  # the same
    export_num_draws: int = within(1, 1, 64)  # the same: the latents of so many samples are averaged
    device: str = "auto"  # auto, cpu, cuda
    tracker: str = choice("tensorboard", "wandb", "none")  # event files in <output_dir>/tensorboard
    wandb: WandbOptions = field(default_factory=lambda: WandbOptions(project="mouse_mvdiffusion", group="mvdiffusion"))

    def validate(self) -> MVDiffusionConfig:
        """Checks the values; returns itself. Raises ValueError naming the key."""
        if self.mixed_precision == "False":
            self.mixed_precision = "no"  # YAML reads a bare `no` as false
        for entry in fields(self):
            value, allowed = getattr(self, entry.name), entry.metadata.get("choices")
            if allowed is not None and value not in allowed:
                raise ValueError(f"{entry.name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
            low, high = entry.metadata.get("range", (-math.inf, math.inf))
            if "range" in entry.metadata and not low <= value <= high:
                raise ValueError(f"{entry.name} must be within {low:g}..{high:g}, got {value}")
        if self.unet and self.pretrained_unet_path:
            told = f"unet (a fresh UNet's shape) and pretrained_unet_path={self.pretrained_unet_path} are both set"
            raise ValueError(f"{told}, but a run starts from one: set unet=null to start from the pretrained one")
        if not self.backgrounds or set(self.backgrounds) - set(BACKGROUNDS):
            raise ValueError(f"backgrounds must be a list out of {sorted(BACKGROUNDS)}, got {self.backgrounds}")
        if len(self.high_noise_range) != 2 or not 0 <= self.high_noise_range[0] < self.high_noise_range[1] <= 999:
            raise ValueError(f"high_noise_range must be [low, high] within 0..999, got {self.high_noise_range}")
        if self.lora_rank and self.trainable_modules is not None:
            raise ValueError("trainable_modules has no meaning with lora_rank > 0; name them in lora_also_train")
        return self
