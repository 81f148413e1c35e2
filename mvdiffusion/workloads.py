"""Stage 1 at work with random weights: what scripts/benchmark.py times, made of the functions that users run.

A workload is plain values, so that it can be handed to a fresh process; `build` gives the function to time, `flops`
what it computes (matrix products and convolutions alone, a multiply-add counts 2, counted on shapes without running).
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from multiview.checkpoint import Ema
from multiview.rig import ViewRig, load_rig
from multiview.run import PRECISIONS, autocast, make_generator, start_processes
from multiview.sample import Sample, write_dataset_info, write_sample, write_split
from multiview.sampler import StepSampler
from multiview.training import Training
from mvdiffusion.components import tune
from mvdiffusion.config import MVDiffusionConfig
from mvdiffusion.demo import SD21_UNCLIP, Stage1Shape, demo_shape, random_components
from mvdiffusion.facelift_yaml import load_training_config
from mvdiffusion.latents import (
    LatentCache,
    clip_pixels_fast,
    condition_latents,
    decode_latents,
    image_embeddings,
)
from mvdiffusion.models.unet import create_unet, run_unet
from mvdiffusion.pipelines.multiview import GUIDANCE_SCALE, NUM_STEPS, generate_views
from mvdiffusion.prompts import TOKENS, PromptEmbeds
from mvdiffusion.training import (
    MVDiffusionTraining,
    build_datasets,
    loop_options,
    make_optimizer,
    starting_unet,
    trained_parameters,
)

CONFIGS = {"demo": "configs/demo_mvdiffusion.yaml", "full": "configs/mouse_mvdiffusion.yaml"}
META = torch.device("meta")


@dataclass(frozen=True)
class SamplingWorkload:
    """One picture to the rig's views: CLIP, VAE, `num_steps` of the UNet, VAE decode. guidance_scale 1: one half."""

    shape: Stage1Shape
    rig: str = "mouse6"
    attention: str = "sparse"
    num_steps: int = NUM_STEPS
    guidance_scale: float = GUIDANCE_SCALE
    compile: bool = False

    def __str__(self) -> str:
        views = load_rig(self.rig).num_views
        guided = f"guidance {self.guidance_scale:g}" if self.guidance_scale != 1 else "no guidance"
        return f"{views} views of {self.shape.image_size} px, {self.num_steps} steps, {guided}"

    @staticmethod
    def dtype(device: torch.device) -> torch.dtype:
        """What inference computes in: float16 on a GPU, as FaceLift, float32 on the CPU."""
        return torch.float16 if device.type == "cuda" else torch.float32

    def build(self, device: torch.device) -> SamplingRun:
        return SamplingRun(self, device)

    def step_flops(self) -> float:
        """Operations of the UNet in one step, both guidance halves."""
        halves, views = 2 if self.guidance_scale != 1 else 1, load_rig(self.rig).num_views
        return unet_flops(self.shape, views, self.attention, halves * views)

    def flops(self) -> float:
        around = encoding_flops(self.shape, 1, 1) + decoding_flops(self.shape, load_rig(self.rig).num_views)
        return self.num_steps * self.step_flops() + around

    def held_bytes(self, device: torch.device) -> float:
        """Weights of UNet, VAE and CLIP."""
        return self.dtype(device).itemsize * (unet_size(self.shape) + encoders_size(self.shape))


class SamplingRun:
    """The function to time. step_seconds: of each call so far, seconds per step of the UNet: (wall, process)."""

    def __init__(self, workload: SamplingWorkload, device: torch.device) -> None:
        rig, shape, dtype = load_rig(workload.rig), workload.shape, workload.dtype(device)
        self.workload, self.device, self.step_seconds = workload, device, []
        self.embeds = random_embeds(shape, rig)
        self.components = random_components(shape, device=device, dtype=dtype)
        with device:
            unet = create_unet(shape.unet, rig.num_views, workload.attention)
        unet = unet if dtype == torch.float32 else unet.to(dtype)
        self.components = replace(self.components, unet=unet.eval().requires_grad_(False))
        tune(self.components, compiled=workload.compile)
        self.picture = disc_views(rig, shape.image_size, 0)[:1, :3]

    def __call__(self) -> Tensor:
        """[1, n, 3, s, s], 0..1."""
        return generate_views(
            self.components, self.picture, self.embeds, num_steps=self.workload.num_steps,
            guidance_scale=self.workload.guidance_scale, progress=self._watched,
        )  # fmt: skip

    def _watched(self, steps: Iterable) -> Iterator:
        self._synchronize()
        started = time.perf_counter(), time.process_time()
        yield from steps
        self._synchronize()
        ended = time.perf_counter(), time.process_time()
        self.step_seconds.append(tuple((end - start) / self.workload.num_steps for start, end in zip(started, ended)))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class TrainingWorkload:
    """One update as `train_diffusion.py` makes it: batch, UNet forward and backward, clipping, AdamW, average.

    config: whose batch, accumulation, precision, optimiser and number of data-loading processes are taken.
    cached: latents from the cache on disk (the UNet only), else pictures read and encoded.
    samples: objects per forward pass, None for the config's.
    """

    shape: Stage1Shape
    config: str
    rig: str = "mouse6"
    cached: bool = True
    gradient_checkpointing: bool = False
    samples: int | None = None

    def __str__(self) -> str:
        config, views = self.resolved("cpu"), load_rig(self.rig).num_views
        accumulated = f" x {config.gradient_accumulation_steps}" if config.gradient_accumulation_steps > 1 else ""
        batch = f"{config.train_batch_size}{accumulated} objects of {views} views of {self.shape.image_size} px"
        return f"{batch}, mixed precision {config.mixed_precision}"

    def resolved(self, device: torch.device | str) -> MVDiffusionConfig:
        """The run's config, without folders and lists of its own."""
        config = load_training_config(self.config, [f"device={device}"])
        config.unet, config.rig = dict(self.shape.unet), self.rig
        config.cache_latents, config.gradient_checkpointing = self.cached, self.gradient_checkpointing
        config.train_batch_size = self.samples or config.train_batch_size
        return config.validate()

    def dtype(self, device: torch.device) -> torch.dtype:
        """What autocast lets the UNet's products compute in."""
        return getattr(torch, PRECISIONS[self.resolved(device).mixed_precision])

    def samples_per_update(self) -> int:
        config = self.resolved("cpu")
        return config.train_batch_size * config.gradient_accumulation_steps

    def flops(self) -> float:
        """Useful operations: what gradient checkpointing computes again does not count."""
        config, views = self.resolved("cpu"), load_rig(self.rig).num_views
        objects = config.train_batch_size
        total = unet_flops(self.shape, views, config.attention or "sparse", objects * views, backward=True)
        if not self.cached:
            total += encoding_flops(self.shape, objects * views, objects)
        return total * config.gradient_accumulation_steps

    def frozen_dtype(self, device: torch.device) -> torch.dtype:
        """Of VAE and CLIP: the run's own precision on a GPU, float32 on the CPU."""
        return self.dtype(device) if device.type == "cuda" else torch.float32

    def held_bytes(self, device: torch.device) -> float:
        """Between updates: the UNet's weights, AdamW's two moments and the average in float32; VAE and CLIP."""
        copies = 4 if self.resolved(device).use_ema else 3
        return 4.0 * copies * unet_size(self.shape) + self.frozen_dtype(device).itemsize * encoders_size(self.shape)

    def build(self, device: torch.device) -> Callable[[], object]:
        """One optimiser update. Its data set and cache lie in a temporary folder as long as the function lives."""
        folder = Path(tempfile.mkdtemp(prefix="benchmark_stage1_"))
        update = make_update(self, device, folder)
        weakref.finalize(update, shutil.rmtree, folder, ignore_errors=True)
        return update


def make_update(workload: TrainingWorkload, device: torch.device, folder: Path) -> Callable[[], object]:
    """A run's update with random weights, on as many samples as a batch holds; the cache is filled."""
    config, rig, shape = workload.resolved(device), load_rig(workload.rig), workload.shape
    config.train_data = str(write_random_dataset(folder / "data", rig, config.train_batch_size, shape.image_size))
    config.validation_data = config.train_data
    config.cache_dir, config.output_dir = str(folder / "cache"), str(folder / "run")
    run = MVDiffusionTraining.__new__(MVDiffusionTraining)
    Training.__init__(run, start_processes(config.device), loop_options(config))
    run.settings, run.rig, run.embeds = config, rig, random_embeds(shape, rig)
    run.components = random_components(shape, device=device, dtype=workload.frozen_dtype(device))
    with device:
        run.network = starting_unet(config, rig).train()
    if config.gradient_checkpointing:
        run.network.enable_gradient_checkpointing()
    run.parameters = trained_parameters(run.network)
    run.optimizer = make_optimizer(run.parameters, config, device)
    run.ema = Ema(run.parameters, config.ema_decay) if config.use_ema else None
    run.dataset, _ = build_datasets(config, rig, shape.image_size, 0, with_cameras=False)
    if config.cache_latents:
        cache = LatentCache(run.components, run.dataset, device, config.cache_dir)
        cache.batch([(epoch, index) for epoch in range(config.cache_variants) for index in range(len(run.dataset))])
    batches = run.batches(StepSampler(run.dataset.lengths, config.train_batch_size, seed=config.seed))

    def update() -> None:
        run.set_rates()
        for _ in range(config.gradient_accumulation_steps):
            with autocast(device, config.mixed_precision):
                loss, _ = run.loss(run.network, next(batches), make_generator("benchmark", run.passes))
            run.scaler.scale(loss / config.gradient_accumulation_steps).backward()
            run.passes += 1
        run.update(spoiled=False)

    return update


def workloads(preset: str) -> tuple[SamplingWorkload, TrainingWorkload]:
    """demo: the model that ships, as configs/demo_mvdiffusion.yaml says. full: SD 2.1 unCLIP at 512 px."""
    if preset not in CONFIGS:
        raise ValueError(f"preset must be one of {', '.join(CONFIGS)}, got {preset!r}")
    config = str(Path(__file__).resolve().parent.parent / CONFIGS[preset])
    shape = SD21_UNCLIP if preset == "full" else demo_shape(load_training_config(config, []).unet)
    return SamplingWorkload(shape), TrainingWorkload(shape, config)


# ---- random inputs --------------------------------------------------------------------------------------------------


def random_embeds(shape: Stage1Shape, rig: ViewRig) -> PromptEmbeds:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(rig.num_views, TOKENS, shape.unet["cross_attention_dim"], generator=generator)
    return PromptEmbeds(tensor, rig, "random prompt embeddings")


def disc_views(rig: ViewRig, size: int, seed: int) -> Tensor:
    """[n, 4, size, size] 0..1 with alpha: a coloured disc per view."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    inside = ((rows - size / 2).square() + (columns - size / 2).square() < (0.3 * size) ** 2).float()
    colours = torch.rand(rig.num_views, 3, 1, 1, generator=generator).expand(-1, -1, size, size)
    return torch.cat([colours, inside.expand(rig.num_views, 1, -1, -1)], dim=1)


def write_random_dataset(folder: Path, rig: ViewRig, count: int, size: int) -> Path:
    """`count` samples of discs; returns the split list."""
    folders = [folder / f"sample_{index:06d}" for index in range(count)]
    for index, path in enumerate(folders):
        write_sample(path, Sample(path.name, disc_views(rig, size, index), rig.cameras(size), rig.view_names))
    write_split(folder / "data_mouse_train.txt", folders)
    write_dataset_info(folder, rig, source="discs")
    return folder / "data_mouse_train.txt"


# ---- sizes and operations -------------------------------------------------------------------------------------------


def unet_size(shape: Stage1Shape) -> int:
    """Number of weights."""
    with META:
        return sum(parameter.numel() for parameter in create_unet(shape.unet, 1, "none").parameters())


def encoders_size(shape: Stage1Shape) -> int:
    """Number of weights of VAE and CLIP together."""
    components = random_components(shape, device=META)
    return sum(weight.numel() for part in (components.vae, components.image_encoder) for weight in part.parameters())


def count_flops(run: Callable[[], object]) -> float:
    """Operations of matrix products, convolutions and attention in `run()`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@lru_cache(16)
def unet_flops(shape: Stage1Shape, views: int, attention: str, batch: int, backward: bool = False) -> float:
    """Operations of one UNet pass over `batch` latents, the multi-view attention included."""
    with META:
        unet = create_unet(shape.unet, views, attention).requires_grad_(backward)
        side, labels = shape.unet["sample_size"], shape.unet["projection_class_embeddings_input_dim"]
        inputs = torch.empty(batch, shape.unet["in_channels"], side, side)
        conditions = {
            "prompts": torch.empty(batch, TOKENS, shape.unet["cross_attention_dim"]),
            "labels": torch.empty(batch, labels),
        }

    def run() -> None:
        steps = torch.zeros(batch, device=META)
        predicted = run_unet(unet, inputs, steps, cameras=None, reference_view=0, **conditions)
        if backward:
            predicted.sum().backward()

    return count_flops(run)


@lru_cache(16)
def encoding_flops(shape: Stage1Shape, pictures: int, inputs: int) -> float:
    """Operations of the VAE's encoder over `pictures` and of CLIP over `inputs`."""
    components, size = random_components(shape, device=META), shape.image_size
    through_vae, through_clip = (torch.empty(count, 3, size, size, device=META) for count in (pictures, inputs))
    return count_flops(
        lambda: (
            condition_latents(components, through_vae),
            image_embeddings(components, clip_pixels_fast(components, through_clip)),
        )
    )


@lru_cache(16)
def decoding_flops(shape: Stage1Shape, pictures: int) -> float:
    """Operations of the VAE's decoder."""
    side = shape.unet["sample_size"]
    latents = torch.empty(pictures, shape.unet["out_channels"], side, side, device=META)
    return count_flops(lambda: decode_latents(random_components(shape, device=META), latents))
