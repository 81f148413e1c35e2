"""Times of both stages with random weights, and of the import of recordings.

  rasterizer, gslrm   forward and backward, beside the tests' same ones in plain PyTorch
  tokens              dense against pruned, by the fraction of each view that the animal covers
  training            a whole training step, with and without gradient checkpointing
  rendering           the input views of one reconstruction
  sampling            Stage 1: a photograph to the rig's views in 50 steps with guidance, sparse and full attention
  diffusion_training  Stage 1: an update, latents at hand (as from the cache) or encoded in each update
  import              a recording to samples beside decoding its videos; minutes, 1 GB in TMPDIR, only on request

Times: `median (first to third quartile)` in ms. What is compared runs in turn: ratios hold on a busy machine too.
demo is the demo model's size (runs on a CPU), full is FaceLift's (d 1024, 24 layers; Stage 1 as SD 2.1 unCLIP; six
views of 512 px: for a GPU, in half precision).
"""

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.throughput import measure_import
from multiview.config import Parser, checked
from multiview.run import REPOSITORY, git_hash, main_guard, make_generator, resolve_device

# Image size, d and layers of GS-LRM; scenes of the rasterizer: Gaussians, image size.
PRESETS = {"demo": ((128, 256, 6), ((20_000, 128), (100_000, 128), (100_000, 256)))}
PRESETS["full"] = ((512, 1024, 24), (*PRESETS["demo"][1], (400_000, 512)))
MODEL_PARTS = ("rasterizer", "gslrm", "tokens", "training", "rendering", "sampling", "diffusion_training")
PARTS = (*MODEL_PARTS, "import")
COVERAGES = (0.05, 0.15, 0.30, 0.60, 1.0)  # fractions of each view that the animal covers
MATRIX_SIDE = {"cpu": 1536, "cuda": 8192}  # large enough to reach the machine's rate, small enough for a second
TOO_LARGE, STORAGE = "out of memory", ("all activations kept", "gradient checkpointing")
NUMBERS = {
    "repeats": (9, "timed runs, each after two more"), "frames": (2000, "import: of the recording, at the least"),
    "source_frames": (24, "import: filmed, then looped"), "video_width": (1152, "import: even, pixels"),
    "workers": (2, "import: processes, and threads that decode"),
}  # fmt: skip


def parts(text: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    if not chosen or not set(chosen) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"must be one or more of {', '.join(PARTS)}, got {text!r}")
    return chosen


def import_libraries() -> None:
    """Imports what takes seconds only when something is measured, so that --help answers at once."""
    global psutil, torch, Timer, FlopCounterMode, Cameras, load_rig, Gaussians, render, GSLRM, select_patches
    global ImageTokenizerConfig, ModelConfig, TransformerConfig, peer_rasterizer, PlainGSLRM
    import psutil
    import torch
    from torch.utils.benchmark import Timer
    from torch.utils.flop_counter import FlopCounterMode

    from gslrm.config import ImageTokenizerConfig, ModelConfig, TransformerConfig
    from gslrm.model.gaussians import Gaussians
    from gslrm.model.gaussians_renderer import render
    from gslrm.model.gslrm import GSLRM
    from gslrm.model.selection import select_patches
    from multiview.cameras import Cameras
    from multiview.rig import load_rig
    from tests import peer_rasterizer
    from tests.peer_gslrm import PlainGSLRM


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo", help="sizes (default: demo)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--what", type=parts, default=MODEL_PARTS, metavar="PART[,PART...]", help="all but import")
    parser.add_argument("--compile", action="store_true", help="GS-LRM and the UNet of sampling compiled")
    parser.add_argument("--no_memory", action="store_true", help="leave peak memory out")
    for name, (default, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=checked(int, 1), default=default, help=f"{text} (default: {default})")
    parser.add_argument("--output", type=Path, help="JSON file to write; the table goes beside it as .md")
    options = parser.parse_args(arguments)
    import_libraries()
    from multiview.files import atomic_write, write_json
    from multiview.report import Table

    bench = Bench(options, resolve_device(options.device))
    header = {
        "preset": options.preset, "repeats": options.repeats, "compile": options.compile, "git": git_hash(),
        "device": torch.cuda.get_device_name() if bench.on_gpu else "cpu", "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    pages, tables = [", ".join(f"{key} {value}" for key, value in header.items()) + "\n"], []
    print(pages[0])
    for part in options.what:
        title, records, *notes = getattr(bench, f"measure_{part}")()
        notes += [f"Matrix rate, measured in this run: {bench.rate / 1e12:.3g} TFLOP/s."] if bench.rate else []
        pages.append(Table(title, list(records[0]), [list(record.values()) for record in records], notes).markdown())
        tables.append({"title": title, "records": records, "notes": notes})
        print(pages[-1], flush=True)
    if options.output:
        write_json(options.output, {**header, "tables": tables})  # times as lists of seconds
        with atomic_write(options.output.with_suffix(".md")) as temporary:
            temporary.write_text("\n".join(pages))


class Times(tuple):
    """Seconds of the runs that count."""

    def __str__(self) -> str:
        first, _, third = statistics.quantiles([*self, *self], n=4, method="inclusive")
        return f"{1e3 * statistics.median(self):.3g} ({1e3 * first:.3g}-{1e3 * third:.3g})"


def count_flops(run: Callable[[], object]) -> float:
    """Returns the operations of matrix products, convolutions and attention in `run()`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def random_gaussians(kind: str, count: int, device):
    """trained-like: a shell of mostly opaque splats of about one point spacing. untrained: as before any training."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(1, count, 3, generator=generator) for _ in range(4))
    rotation, opacity = torch.randn(1, count, 5, generator=generator).split([4, 1], dim=-1)
    if kind == "trained-like":
        xyz = torch.nn.functional.normalize(a, dim=-1) * torch.tensor([0.3, 0.6, 0.3]) + 0.005 * b
        scaling, opacity = 0.4 * c + torch.tensor((1.8 / count) ** 0.5).log(), 1.5 + 1.5 * opacity
    else:
        xyz = torch.rand(1, count, 3, generator=generator) * 1.2 - 0.6
        scaling, opacity = torch.full_like(c, 0.1).log(), torch.full_like(opacity, -2.0)
    return Gaussians(xyz, d[:, :, None], scaling, rotation, opacity).to(device)


class Bench:
    """One device, how things are measured on it (what is too large for it is named so), and what is measured."""

    def __init__(self, options: argparse.Namespace, device) -> None:
        self.options, self.device, self.on_gpu = options, device, device.type == "cuda"
        self.rate: float | None = None  # of a large square matrix product, operations per second
        (self.size, self.d, self.layers), self.scenes = PRESETS[options.preset]

    def time(self, *runs: Callable[[], object]) -> list:
        """Returns the Times of all runs, one after the other in each round; alone where memory is short for all."""
        try:
            # A Timer runs twice before it counts, which pays for what the neighbor left in caches and heap.
            timers = [Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()) for run in runs]
            rounds = [[timer.timeit(1).median for timer in timers] for _ in range(self.options.repeats)]
            return [Times(times) for times in zip(*rounds)]
        except torch.OutOfMemoryError:
            pass  # what the failed runs held is free only outside this block
        torch.cuda.empty_cache()
        return [TOO_LARGE] if len(runs) == 1 else [self.time(run)[0] for run in runs]

    def faster(self, slow: Times | str, fast: Times | str) -> float | None:
        """Returns the median over the rounds of slow / fast."""
        return None if TOO_LARGE in (slow, fast) else statistics.median(a / b for a, b in zip(slow, fast))

    def work(self, flops: float, times: Times | str, run: Callable[[], object]) -> dict:
        """Returns useful operations, their rate, its fraction of the machine's rate for matrices, and peak memory."""
        if self.rate is None:
            side, dtype = MATRIX_SIDE[self.device.type], torch.bfloat16 if self.on_gpu else torch.float32
            a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
            self.rate = 2 * side**3 / statistics.median(self.time(lambda: a @ b)[0])
        reached = None if times == TOO_LARGE else flops / statistics.median(times)
        return {
            "operations, TFLOP": flops / 1e12, "TFLOP/s": reached and reached / 1e12,
            "fraction of the matrix rate": reached and reached / self.rate, "peak memory, MiB": self.peak(run),
        }  # fmt: skip

    def peak(self, run: Callable[[], object]) -> float | str | None:
        """Returns the MiB that `run` needs at most beside what is there before it; None where not measured."""
        from multiview.run import peak_bytes, reset_peak

        if self.options.no_memory or not (self.on_gpu or reset_peak()):
            return None
        if self.on_gpu:
            try:
                run()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                run()
                return (torch.cuda.max_memory_allocated() - before) / 2**20
            except torch.OutOfMemoryError:
                return TOO_LARGE
        # By the kernel's high-water mark. Large blocks come straight from the kernel meanwhile, so that what is freed
        # does not stay with the process: malloc's M_MMAP_THRESHOLD, then back to the largest that glibc chooses.
        library = ctypes.CDLL(None)
        library.mallopt(-3, 2**16)
        run()
        library.malloc_trim(0), reset_peak()
        before = psutil.Process().memory_info().rss
        run()
        library.mallopt(-3, 2**25)
        return max(0.0, peak_bytes() - before) / 2**20

    def measure_rasterizer(self):
        records, names = [], ("forward", "forward + backward")
        for kind, (count, size) in [(kind, scene) for kind in ("trained-like", "untrained") for scene in self.scenes]:
            leaves = random_gaussians(kind, count, self.device).map(lambda tensor: tensor.requires_grad_())
            camera = Cameras.turntable(6, size)[:1].to(self.device)
            draws = [partial(render, leaves, camera[None]), partial(peer_rasterizer.rasterize, leaves, camera)]

            def both(draw, leaves=leaves):
                return torch.autograd.grad(sum(x.sum() for x in draw()[:2]), [*vars(leaves).values()])

            record = {"scene": f"{kind}, {count} at {size} px"}
            runs = [map(torch.no_grad(), draws), (partial(both, draw) for draw in draws)]
            for name, (own, plain) in zip(names, (self.time(*pair) for pair in runs)):
                record |= {name: own, f"plain {name}": plain, f"{name}, times faster": self.faster(plain, own)}
            records.append(record)
        return "Rasterizer, one view, ms", records

    def gslrm_run(self, passes: str, *, plain=None, coverage=None, checkpoint=0):
        """Returns a pass of GS-LRM over one scene, its useful operations (a backward pass counts twice) and its tokens.

        passes: forward, forward + backward, or training step (forward, rendering of the input views, L2, backward,
        clipping, AdamW; no VGG losses). coverage: of each view by a disc, whose network prunes; None: dense.
        """
        torch.manual_seed(0)
        size, device, rig = self.size, self.device, load_rig("mouse6")
        config = ModelConfig(ImageTokenizerConfig(size), TransformerConfig(self.d, n_layer=self.layers))
        config.prune_background_tokens = coverage is not None
        model = (plain(config) if plain else GSLRM(config, grad_checkpoint_every=checkpoint)).to(device)
        model.requires_grad_(passes != "forward")
        images, cameras = torch.rand(1, rig.num_views, 3, size, size, device=device), rig.cameras(size)[None].to(device)
        patch, free, inputs = config.image_tokenizer.patch_size, config.gaussians.n_gaussians, {}
        tokens = free + rig.num_views * (size // patch) ** 2
        if coverage is not None:
            offset, disc = (torch.arange(size) + 0.5 - size / 2).square(), torch.zeros(size * size)
            disc[(offset[:, None] + offset).flatten().argsort(stable=True)[: round(coverage * size**2)]] = 1.0
            masks = inputs["masks"] = disc.view(size, size).to(device).expand(1, rig.num_views, 1, -1, -1).contiguous()
            selection = select_patches(images, patch, masks, config.prune_margin_px)
            tokens = free + selection.patches_per_sample[0]

        def predict():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                output = model(images, cameras, **inputs)
            return output if plain else output.gaussians

        with torch.set_grad_enabled(not self.on_gpu):  # on a CPU what inference does in oneDNN's layout is not counted
            flops = 0.0 if plain else count_flops(predict) * (1 if passes == "forward" else 3)
        if self.options.compile:
            torch.compiler.reset()  # graphs of earlier cases are forgotten
            for module in [model] if plain else model.transformer_layers:
                module.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if passes == "training step" else None

        def step() -> None:
            model.zero_grad(set_to_none=True)
            gaussians = predict()
            if optimizer is None:
                return sum(tensor.square().mean() for tensor in vars(gaussians).values()).backward()
            torch.nn.functional.mse_loss(render(gaussians, cameras).rgb, images).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return torch.no_grad()(predict) if passes == "forward" else step, flops, tokens

    def measure_gslrm(self):
        records = []
        for passes in ("forward", "forward + backward"):
            run, flops, _ = self.gslrm_run(passes)
            peer, _, _ = self.gslrm_run(passes, plain=PlainGSLRM)
            own, plain = self.time(run, peer)
            record = {"pass": passes, "ms": own, **self.work(flops, own, run), "plain torch modules, ms": plain}
            record |= {"times faster": self.faster(plain, own), "plain peak memory, MiB": self.peak(peer)}
            records.append(record)
        return f"Network: d {self.d}, {self.layers} layers, six views of {self.size} px", records

    def measure_tokens(self):
        records = []
        for coverage in COVERAGES:
            record: dict = {"coverage, %": 100 * coverage}
            for passes in ("forward", "forward + backward"):
                dense, work, all_tokens = self.gslrm_run(passes)
                pruned, less, tokens = self.gslrm_run(passes, coverage=coverage)
                times = self.time(dense, pruned)
                record |= {"tokens": tokens, "of": all_tokens, "operations, times fewer": work / less}
                record |= {f"{passes}: dense, ms": times[0], f"{passes}: pruned, ms": times[1]}
                record |= {f"{passes}: times faster": self.faster(*times)}
                record |= {f"{passes}: dense, MiB": self.peak(dense), f"{passes}: pruned, MiB": self.peak(pruned)}
            records.append(record)
        return "Foreground tokens", records, "Masks: a disc in the middle of every view."

    def measure_training(self):
        records = []
        for every, name in enumerate(STORAGE):
            run, flops, _ = self.gslrm_run("training step", checkpoint=every)
            records.append({"step": name, "ms": (times := self.time(run)[0]), **self.work(flops, times, run)})
        note = "Operations: three forward passes; what is recomputed does not count."
        return "Training step of Stage 2", records, note

    def measure_rendering(self):
        cameras = load_rig("mouse6").cameras(self.size)[None].to(self.device)
        gaussians = random_gaussians("trained-like", cameras.shape[1] * self.size**2, self.device)
        runs = [partial(render, gaussians, cameras), partial(render, gaussians, cameras[:, :1])]
        whole, one = self.time(*runs)
        record = {"Gaussians": gaussians.num_gaussians, "all views, ms": whole, "one view, ms": one}
        return f"Rendering, six views of {self.size} px", [{**record, "peak memory, MiB": self.peak(runs[0])}]

    def stage1(self, attention: str):
        """Returns the training config, components with a UNet, and prompt embeddings, all of random weights."""
        from mvdiffusion.facelift_yaml import load_training_config
        from mvdiffusion.models.unet import create_unet
        from mvdiffusion.prompts import TOKENS, PromptEmbeds
        from tests.random_components import SD21_UNCLIP, demo_shape, random_components

        name = {"demo": "demo", "full": "mouse"}[self.options.preset]
        config = load_training_config(str(REPOSITORY / "configs" / f"{name}_mvdiffusion.yaml"), [])
        rig = load_rig("mouse6")
        shape = SD21_UNCLIP if self.options.preset == "full" else demo_shape(config.unet)
        with self.device:
            unet, dtype = create_unet(shape["unet"], rig.num_views, attention), torch.float16 if self.on_gpu else None
        components = random_components(shape, device=self.device, dtype=dtype or torch.float32)
        prompts = torch.randn(rig.num_views, TOKENS, shape["unet"]["cross_attention_dim"])
        return config, replace(components, unet=unet), PromptEmbeds(prompts, rig, "random prompt embeddings")

    def measure_sampling(self):
        from mvdiffusion.pipelines.multiview import GUIDANCE_SCALE, NUM_STEPS, generate_views

        image, runs, flops = torch.rand(1, 3, self.size, self.size), {}, {}
        for attention in ("sparse", "full"):
            _, components, embeds = self.stage1(attention)
            components.unet.to(components.vae.dtype).eval().requires_grad_(False)

            def run(num_steps: int = NUM_STEPS, components=components, embeds=embeds):
                return generate_views(components, image, embeds, num_steps=num_steps, guidance_scale=GUIDANCE_SCALE)

            one, two = (count_flops(lambda n=n, run=run: run(n)) for n in (1, 2))
            flops[attention], runs[attention] = (one + (NUM_STEPS - 1) * (two - one), two - one), run
            if self.options.compile:
                components.unet.compile()
        records, times = [], self.time(*runs.values())
        for (attention, run), whole in zip(runs.items(), times):
            short, long = self.time(lambda run=run: run(1), lambda run=run: run(3))
            step = TOO_LARGE if TOO_LARGE in (short, long) else Times((b - a) / 2 for a, b in zip(short, long))
            record = {"attention": attention, "whole, ms": whole, "times the first row's": self.faster(whole, times[0])}
            work = self.work(flops[attention][0], whole, lambda run=run: run(2))  # more steps need no more memory
            records.append({**record, "one step, ms": step, "of a step, TFLOP": flops[attention][1] / 1e12, **work})
        return "Sampling, 50 steps with guidance", records, "A step: the UNet on both guidance halves, and the sampler."

    def measure_diffusion_training(self):
        from mvdiffusion.latents import EncodedBatch, encode
        from mvdiffusion.losses import training_loss

        (config, components, embeds), rig = self.stage1("sparse"), load_rig("mouse6")
        unet, b, size = components.unet.train(), config.train_batch_size, components.image_size
        average = [parameter.detach().clone() for parameter in unet.parameters()]
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.mixed_precision)
        images = torch.rand(b, rig.num_views, 3, size, size, device=self.device)
        one, prompts = rig.cameras(size).to(self.device), torch.arange(rig.num_views, device=self.device)
        cameras = Cameras(one.c2w.expand(b, -1, -1, -1), one.fxfycxcy.expand(b, -1, -1), size, size)

        def batch() -> EncodedBatch:
            encoded = encode(components, images, torch.ones_like(images[:, :, :1]), images[:, :1])
            encoded["embedding"] = encoded["embedding"][:, 0]
            return EncodedBatch(**encoded, prompts=prompts.expand(b, -1), cameras=cameras)

        def update(cached: EncodedBatch | None) -> None:
            for part in range(config.gradient_accumulation_steps):
                current = cached or batch()
                with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
                    loss = training_loss(unet, components, embeds, current, config, make_generator("benchmark", part))
                loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(average, [parameter.detach() for parameter in unet.parameters()], 1e-3)

        records, runs = [], {"from the cache": partial(update, batch()), "encoded": partial(update, None)}
        flops, count = [count_flops(run) for run in runs.values()], b * config.gradient_accumulation_steps
        for name in STORAGE:
            if name == STORAGE[1]:
                unet.enable_gradient_checkpointing()
            times = self.time(*runs.values())
            for (latents, run), operations, seconds in zip(runs.items(), flops, times):
                rate = None if seconds == TOO_LARGE else count / statistics.median(seconds)
                record = {"update": name, "latents": latents, "ms": seconds, "samples per second": rate}
                record["times the cache's"] = self.faster(seconds, times[0])
                records.append({**record, **self.work(operations, seconds, run)})
        return f"Training of Stage 1: {b} objects of {rig.num_views} views of {size} px", records

    def measure_import(self):
        return measure_import(self.options)


if __name__ == "__main__":
    main_guard(main)
