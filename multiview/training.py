"""The training loop of both stages, once, to be read from top to bottom. Repeating a command resumes it.

A pass is one forward and backward; an update of the weights ends every `accumulate` passes. The batch of a pass depends
on (seed, pass) only and losses are means over samples, so n processes with batch b take the same steps as one process
with batch n * b, and a run that was killed takes the steps that it would have taken.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

from multiview.checkpoint import SKIP_DIGEST, Ema, rotate_checkpoints
from multiview.files import full_disk_explained, owned_folder, write_json
from multiview.rig import ViewRig
from multiview.run import PRECISIONS, LoopOptions, Stop, make_generator, resolve_device, start_processes
from multiview.sampler import MixedDataset, StepSampler
from multiview.tracking import Progress, RunFolder, as_text

log = logging.getLogger(__name__)

SKIP_WINDOW, MAX_SKIPPED = 200, 100  # a run stops when more than this many of its last updates were skipped
REASONS = {  # why an update is skipped -> what the log says
    "skipped_nan_loss": "the loss was not finite",
    "skipped_gradient": "the gradient exploded or was nothing but NaN",
    "skipped_overflow": "float16 gradients overflowed",
}
SANITIZED = "mended_gradient"  # counts updates whose gradient had entries that were not finite
PRINTED = ("loss", "psnr", "fg_psnr", "iou", "gradient_norm", "lr", "seconds_per_pass", "seconds_per_step", *REASONS)


class TrainingDivergedError(ValueError):
    """Most of the recent updates had to be skipped."""


class Training:
    """What a stage gives the loop. A stage's __init__ loads all of it and resumes. network: the bare module.
    parameters: the ones that train, by name. Counters start at 0 or at a checkpoint's values."""

    pattern: str  # of checkpoint names
    randomness: str  # first key of every pass's generator
    first_average_counts = False  # the weights that a run starts from are the first of those that are averaged
    shown: tuple[str, ...] = ()  # the validation figures that are printed; none: all
    advice: str  # what to do about a run that diverges
    is_compiled = False
    network: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    dataset: MixedDataset
    rig: ViewRig
    config: dict[str, Any]

    def __init__(self, accelerator: Accelerator, options: LoopOptions) -> None:
        self.accelerator, self.options = accelerator, options
        self.device = accelerator.device if accelerator.num_processes > 1 else resolve_device(options.device)
        scaled = options.precision == "fp16" and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.ema: Ema | None = None  # on the main process
        self.passes, self.updates = 0, 0  # passes done, updates taken
        self.tried = 0  # updates taken or skipped since the schedule began: the place in it
        self.counts = dict.fromkeys([*REASONS, SANITIZED], 0)
        self.recent: deque[bool] = deque(maxlen=SKIP_WINDOW)  # True: that update was skipped

    # The stage writes these five, and whatever else it does differently.

    batches: Callable[[StepSampler], Iterator[Any]]
    loss: Callable[[nn.Module, Any, torch.Generator], tuple[Tensor, Any]]  # [], and what `numbers` and `image` need
    validate: Callable[[], tuple[dict[str, float], Tensor] | None]  # figures of the averaged weights, contact sheet
    save: Callable[[bool], None]  # whether it is the last checkpoint
    export: Callable[[], None]  # writes the finished network where the configuration asks for it

    def numbers(self, details: Any) -> dict[str, float]:
        return {}

    def image(self, details: Any) -> Tensor | None:
        return None

    def adjust_gradients(self) -> None:
        """Called before gradients are clipped."""

    def averaged(self) -> dict[str, Tensor]:  # the tensors that are averaged
        return self.parameters

    def schedule_length(self) -> int:  # updates from the schedule's beginning to the end of training
        return self.options.steps

    def set_rates(self) -> float:
        """Sets every group's rate for the next update; returns the rate before the groups' own factors."""
        options = self.options
        factor = rate_factor(options.schedule, self.tried, options.warmup, self.schedule_length(), options.step_rules)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("initial_lr", options.lr) * factor * group.get("multiplier", 1.0)
        return self.optimizer.param_groups[0].get("initial_lr", options.lr) * factor

    def update(self, *, spoiled: bool) -> float | None:
        """One optimizer update, or its skipping, counted: a loss that was not finite, or an exploding gradient. Returns
        the gradient norm before clipping. The schedule advances and gradients are cleared either way. Every process
        sees the same mean loss and the same summed gradients, so all of them skip the same updates."""
        norm, skipped, limit = None, "skipped_nan_loss" if spoiled else None, self.options.max_norm
        if not spoiled:
            self.scaler.unscale_(self.optimizer)
            self.adjust_gradients()
            norm, sanitized = clip_gradients(self.parameters, limit)
            self.counts[SANITIZED], scale = self.counts[SANITIZED] + sanitized, self.scaler.get_scale()
            if norm > limit * self.options.skip_factor or not math.isfinite(norm) or (sanitized and norm == 0):
                skipped = "skipped_gradient"
            else:
                self.scaler.step(self.optimizer)
            self.scaler.update()  # also after a skipped step: unscale_ must not be called twice without it
            if skipped is None and self.scaler.get_scale() < scale:  # the scaler found an infinity and took no step
                skipped = "skipped_overflow"
        self.recent.append(skipped is not None)
        self.tried += 1
        if skipped is None:
            self.updates += 1
            if self.ema is not None:
                self.ema.update(self.averaged(), self.updates + self.first_average_counts)
        else:
            self.counts[skipped] += 1
            told = "" if norm is None else f" (norm {norm:.3g} before clipping)"
            log.warning("update skipped: %s%s", REASONS[skipped], told)
        self.optimizer.zero_grad(set_to_none=True)
        if sum(self.recent) > MAX_SKIPPED:
            counts = ", ".join(f"{name} {number}" for name, number in self.counts.items())
            raise TrainingDivergedError(
                f"training has diverged: {sum(self.recent)} of the last {len(self.recent)} updates were skipped (pass "
                f"{self.passes}, {self.updates} updates done; in all {counts}). {self.advice}. The checkpoints in "
                f"{self.options.folder} are untouched"
            )
        return norm


def run_training(build: Callable[[Accelerator], Training], options: LoopOptions) -> Path:
    """Trains to `options.steps`, continuing what the folder holds. Returns the folder. build: loads everything and
    resumes; raises ValueError before any work. Signals, Ctrl-C among them, end the run with a checkpoint and SystemExit
    (143, 130)."""
    folder = Path(options.folder)
    new = not folder.exists()
    if options.skip_digest:
        os.environ[SKIP_DIGEST] = "1"
    redirected = logging_redirect_tqdm() if sys.stderr.isatty() else nullcontext()  # lines above the bar, not in it
    with Stop(options.budget_s, interrupt=True) as stop, full_disk_explained(folder), redirected:
        accelerator = start_processes(options.device)
        if accelerator.is_main_process:
            goal = f"{options.unit} {options.steps} by {accelerator.num_processes} process(es) on {accelerator.device}"
            log.info("training %s up to %s; saved in %s", options.title, goal, folder)
        try:
            with owned_folder(folder) if accelerator.is_main_process else nullcontext():
                training = build(accelerator)
                passes = gather_object([training.passes])
                if len(set(passes)) > 1:
                    told = f"the processes found checkpoints of different passes, {passes}"
                    raise ValueError(f"{told}: {folder} must lie on a file system that all nodes share")
                training_loop(training, stop)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            if new and accelerator.is_main_process and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()  # a run that was refused leaves nothing behind
    return folder


def training_loop(training: Training, stop: Stop) -> None:
    options, accelerator, network = training.options, training.accelerator, training.network
    is_main, alone = accelerator.is_main_process, accelerator.num_processes == 1
    per_step = options.accumulate if options.unit == "step" else 1  # passes per step
    first = step = training.passes // per_step
    model = network if alone else accelerator.prepare(network)  # what is frozen takes no part in DDP
    run = RunFolder(
        options.folder, training.config, training.rig, first, options.wandb, options.tracker, is_main=is_main
    )
    progress = Progress(options, first, accelerator.num_processes, is_main=is_main)
    sampler = StepSampler(
        training.dataset.lengths, options.batch_size, seed=options.seed, percents=training.dataset.percents,
        start=training.passes, stop=options.steps * per_step,
        rank=accelerator.process_index, world_size=accelerator.num_processes,
    )  # fmt: skip
    told = f"parameters train on {len(training.dataset)} samples, {options.unit} {first} to {options.steps}"
    log.info("%s: %.2f M %s", options.folder, count(training.parameters.values()) / 1e6, told)
    network.train()
    values, losses, spoiled, batch = {}, [], False, None
    began = lap = time.perf_counter()
    busy, logged_busy, logged_step = 0.0, 0.0, first  # seconds of passes, without logs, checkpoints and validation
    stop.in_loop = True
    for batch in training.batches(sampler):
        # 1. Forward and backward. All processes see the same mean loss, so they skip a bad one together.
        is_update, rate = (training.passes + 1) % options.accumulate == 0, training.set_rates()
        # Gradients of all but the last pass of an update stay in their process.
        with nullcontext() if is_update or alone else model.no_sync():
            mean_loss, is_due, details = one_pass(training, model, batch, stop)
        spoiled = spoiled or not mean_loss.isfinite()
        losses.append(mean_loss)
        training.passes += 1

        # 2. Update.
        gradient_norm = None
        if is_update:
            gradient_norm, spoiled = training.update(spoiled=spoiled), False
        busy += time.perf_counter() - lap
        lap = time.perf_counter()
        if training.passes % per_step:
            continue
        step = training.passes // per_step
        is_last = step == options.steps
        is_end = is_last or (is_update and is_due)  # a checkpoint knows nothing of half an update

        # 3. Numbers and images.
        if (is_logged := step % options.log_every == 0 or is_last) or step == first + 1:
            numbers = {
                **training.numbers(details), "loss": float(torch.stack(losses).mean()), "lr": rate,
                f"seconds_per_{options.unit}": (busy - logged_busy) / (step - logged_step),
                **({} if gradient_norm is None else {"gradient_norm": gradient_norm}),
                "updates": training.updates, **training.counts,
            }  # fmt: skip
            logged_busy, logged_step = busy, step
            progress.show(step, numbers, values, PRINTED)
            if is_logged:
                run.log(step, numbers)
        progress.advance(mean_loss)
        if step % options.image_every == 0 or is_last:
            run.image("train", step, training.image(details))
        losses = []

        # 4. Checkpoint and validation.
        if step % options.save_every == 0 or is_end:
            if is_main:
                training.save(is_last)
                rotate_checkpoints(options.folder, training.pattern, options.keep)
            accelerator.wait_for_everyone()
        if (step % options.validate_every == 0 and not is_end) or is_last:
            values = measure(training, run, step)
        lap = time.perf_counter()
        if is_end:
            break
    progress.bar.close()

    # 5. The end: exported if it is finished, and what it cost.
    if step >= options.steps:
        values = values if step > first else measure(training, run, step)  # a finished run answers with its figures
        if is_main:
            training.export()
    if is_main:
        reached = {options.unit: step, "of": options.steps, "metrics": values, "seconds": time.perf_counter() - began}
        closing_block(training, reached, training.passes - first * per_step, busy, batch)
    run.close()
    accelerator.wait_for_everyone()  # nobody leaves the group while another still talks
    stop.end(f"{options.unit} {step} of {options.steps}" if step < options.steps else None)


def one_pass(training: Training, model: nn.Module, batch: Any, stop: Stop) -> tuple[Tensor, bool, Any]:
    """Forward, and backward where the loss is finite: (mean loss, whether any process wants to stop, details)."""
    options, accelerator = training.options, training.accelerator
    generator = make_generator(training.randomness, options.seed, accelerator.process_index, training.passes)
    loss, details = training.loss(model, batch, generator)
    told = torch.stack([loss.detach().float(), loss.new_tensor(stop.is_due(), dtype=torch.float32)])
    mean_loss, is_due = accelerator.reduce(told, reduction="mean")
    if mean_loss.isfinite():
        training.scaler.scale(loss / options.accumulate).backward()
    return mean_loss, bool(is_due > 0), details


def measure(training: Training, run: RunFolder, step: int) -> dict[str, float]:
    """Validates on the main process; logs figures and a contact sheet."""
    result = training.validate() if training.accelerator.is_main_process else None
    values, sheet = result or ({}, None)
    if result is not None:
        run.log(step, values, split="val")
        run.image("validation" if training.options.unit == "step" else "val", step, sheet)
        log.info("validation at %s %d  %s", training.options.unit, step, as_text(values, training.shown))
    training.accelerator.wait_for_everyone()
    return values


def rate_factor(schedule: str, done: int, warmup: int, total: int, rules: str = "1") -> float:
    """Learning rate over its base value at update `done` (from 0): linear warm-up, then constant, linear or cosine to 0
    at update `total`; or piecewise_constant by diffusers' `rules`: "1:200000,0.5" is 0.5 from 200,000 on."""
    if schedule == "piecewise_constant":
        *pieces, last = rules.split(",")
        try:
            return next((float(f) for f, end in (p.split(":") for p in pieces) if done < int(end)), float(last))
        except ValueError:
            raise ValueError(f'step_rules must look like "1:20000,0.5", got {rules!r}') from None
    if done < warmup:
        return (done + 1) / warmup
    if schedule.startswith("constant"):
        return 1.0
    fraction = min(1.0, (done - warmup) / max(1, total - warmup))
    return 1 - fraction if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * fraction))


def clip_gradients(parameters: dict[str, nn.Parameter], max_norm: float) -> tuple[float, bool]:
    """Scales all gradients to at most `max_norm`, in place: (norm before, whether entries had to be replaced first).
    Those that are not finite become 0 (NaN) or +-0.001 (infinite), as in FaceLift's trainer."""
    with_gradient = [parameter for parameter in parameters.values() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient]
    norm, sanitized = nn.utils.get_total_norm(gradients), False
    if not math.isfinite(norm.item()):
        for gradient in gradients:
            gradient.nan_to_num_(nan=0.0, posinf=1e-3, neginf=-1e-3)
        norm = nn.utils.get_total_norm(gradients)
        sanitized = math.isfinite(norm.item())  # else all were finite and merely too large to be squared
    nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm.item(), sanitized


def closing_block(training: Training, content: dict[str, Any], passes: int, busy: float, batch: Any) -> None:
    """Prints what the run reached and cost (`passes` done now in `busy` seconds), and writes it to summary.json."""
    from torch.utils.flop_counter import FlopCounterMode

    options, alone, on_gpu = training.options, training.accelerator.num_processes == 1, training.device.type == "cuda"
    # The machine's operations per second: the best of five large matrix products.
    size, best, fraction = 8192 if on_gpu else 512, math.inf, None
    matrix = torch.randn(size, size, device=training.device, dtype=getattr(torch, PRECISIONS[options.precision]))
    for _ in range(5):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    machine = 2.0 * size**3 / best
    if batch is not None and alone and not training.is_compiled:
        # One more pass, of which nothing is kept: counting takes compound operations apart, which moves last digits.
        with FlopCounterMode(display=False) as counter:
            loss, _ = training.loss(training.network, batch, make_generator("operations"))
            loss.backward()
        training.optimizer.zero_grad(set_to_none=True)
        fraction = counter.get_total_flops() * passes / busy / machine
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content |= {
        "training_seconds": busy,
        "samples_per_second": passes * options.batch_size * training.accelerator.num_processes / max(busy, 1e-9),
        "peak_memory_gb": (torch.cuda.max_memory_allocated(training.device) if on_gpu else 1024 * kib) / 1e9,
        "matrix_rate_fraction": fraction, "machine_gflops": machine / 1e9,
        "parameters": count(training.network.parameters()), "trained_parameters": count(training.parameters.values()),
    }  # fmt: skip
    write_json(Path(options.folder) / "summary.json", content)
    print(f"{options.folder}: {options.unit} {content[options.unit]} of {options.steps}")
    print(f"  {as_text(content.pop('metrics'), training.shown) or 'not validated'}")
    for name, value in content.items():
        print(f"  {name:<22} {'not counted' if value is None else f'{value:.4g}'}", flush=True)


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
