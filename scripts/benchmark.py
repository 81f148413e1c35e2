"""Times of both stages with random weights, and of the import of recordings.

  rasterizer  forward and backward, beside the tests' tiled rasterizer in plain PyTorch
  gslrm       the network, beside the tests' same one of plain torch modules
  tokens      dense against pruned, by the fraction of each view that the animal covers
  training    a whole training step, with and without gradient checkpointing
  rendering   the input views of one reconstruction
  sampling    Stage 1: one photograph to the rig's views in 50 steps with guidance, sparse and full attention
  diffusion_training
              Stage 1: an update of its training, latents at hand (as from the cache) or encoded in each update
  import      a recording to samples beside pure decoding of its videos; some minutes, 1 GB in TMPDIR, only on request

Times: `median (first to third quartile)` in ms. What is compared runs in turn, so that ratios, medians of the ratios of
neighbors, hold on a busy machine too; milliseconds need a quiet one. demo is the demo model's size (runs on a CPU),
full is FaceLift's (d 1024, 24 layers; Stage 1 as SD 2.1 unCLIP; six views of 512 px: for a GPU, in half precision).
"""

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import REPOSITORY, main_guard
from pipeline.flags import positive

MODEL_PARTS = ("rasterizer", "gslrm", "tokens", "training", "rendering", "sampling", "diffusion_training")
PARTS = (*MODEL_PARTS, "import")
# Image size, d and layers of GS-LRM; scenes of the rasterizer: Gaussians, image size.
PRESETS = {"demo": ((128, 256, 6), ((20_000, 128), (100_000, 128), (100_000, 256)))}
PRESETS["full"] = ((512, 1024, 24), (*PRESETS["demo"][1], (400_000, 512)))
CONFIGS = {"demo": "configs/demo_mvdiffusion.yaml", "full": "configs/mouse_mvdiffusion.yaml"}
COVERAGES = (0.05, 0.15, 0.30, 0.60, 1.0)  # fractions of each view that the animal covers
MATRIX_SIDE = {"cpu": 1536, "cuda": 8192}  # large enough to reach the machine's rate, small enough for a second
TOO_LARGE = "out of memory"
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo", help="sizes (default: demo)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--what", type=parts, default=MODEL_PARTS, metavar="PART[,PART...]", help="all but import")
    parser.add_argument("--compile", action="store_true", help="GS-LRM and the UNet of sampling compiled")
    parser.add_argument("--no_memory", action="store_true", help="leave peak memory out")
    for name, (default, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--output", type=Path, help="JSON file to write; the table goes beside it as .md")
    options = parser.parse_args(arguments)
    import psutil
    import torch

    from multiview.files import atomic_write, write_json
    from multiview.report import Table
    from multiview.run import git_hash, resolve_device

    bench = Bench(options, resolve_device(options.device))
    header = {
        "preset": options.preset, "repeats": options.repeats, "compile": options.compile, "git": git_hash(),
        "device": torch.cuda.get_device_name() if bench.on_gpu else "cpu", "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    pages, tables = [", ".join(f"{key} {value}" for key, value in header.items()) + "\n"], []
    print(pages[0])
    for part in options.what:
        title, records, *notes = globals()[f"measure_{part}"](bench)
        notes += [f"Matrix rate, measured in this run: {bench.rate / 1e12:.3g} TFLOP/s."] if bench.rate else []
        pages.append(Table(title, list(records[0]), [list(record.values()) for record in records], notes).markdown())
        tables.append({"title": title, "records": records, "notes": notes})
        print(pages[-1], flush=True)
    if options.output:
        write_json(options.output, {**header, "tables": tables})  # times as lists of seconds
        with atomic_write(options.output.with_suffix(".md")) as temporary:
            temporary.write_text("\n".join(pages))


# ---- the stop watch -------------------------------------------------------------------------------------------------


class Times(tuple):
    """Seconds of the runs that count."""

    def __str__(self) -> str:
        first, _, third = statistics.quantiles([*self, *self], n=4, method="inclusive")
        return f"{1e3 * statistics.median(self):.3g} ({1e3 * first:.3g}-{1e3 * third:.3g})"


class Bench:
    """One device and how things are measured on it; what is too large for it is named so."""

    def __init__(self, options: argparse.Namespace, device) -> None:
        self.options, self.device, self.on_gpu = options, device, device.type == "cuda"
        self.rate: float | None = None  # of a large square matrix product, operations per second
        (self.size, self.d, self.layers), self.scenes = PRESETS[options.preset]

    def time(self, *runs: Callable[[], object]) -> list:
        """Returns the Times of all runs, one after the other in each round; alone where memory is short for all."""
        import torch
        from torch.utils.benchmark import Timer

        try:
            # A Timer runs twice before it counts, which pays for what the neighbor left in caches and heap.
            threads = torch.get_num_threads()
            timers = [Timer("run()", globals={"run": run}, num_threads=threads) for run in runs]
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
        import torch

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
        import ctypes

        import torch

        from multiview.memory import peak_bytes, reset_peak, resident_bytes

        if self.options.no_memory or not (self.on_gpu or reset_peak()):
            return None
        try:
            if self.on_gpu:
                run()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
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
        before = resident_bytes()
        run()
        library.mallopt(-3, 2**25)
        return max(0.0, peak_bytes() - before) / 2**20


def peer(module: str, name: str):
    """Returns a plain version from the tests, which are not part of every installation, or None."""
    try:
        return getattr(importlib.import_module(f"tests.{module}"), name)
    except ImportError:
        return None


# ---- Stage 2 --------------------------------------------------------------------------------------------------------


def random_gaussians(kind: str, count: int, device):
    """trained-like: an ellipsoid shell of mostly opaque splats of about one point spacing. untrained: uniform in +-0.6,
    scale 0.1, opacity 0.12, as a network predicts before training."""
    import torch

    from gslrm.model.gaussians import Gaussians

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


def measure_rasterizer(bench: Bench):
    import torch

    from gslrm.model.gaussians_renderer import render
    from multiview.cameras import Cameras

    records, plain = [], peer("peer_rasterizer", "rasterize")
    for kind in ("trained-like", "untrained"):
        for count, size in bench.scenes:
            leaves = random_gaussians(kind, count, bench.device).map(lambda tensor: tensor.requires_grad_())
            camera = Cameras.turntable(6, size)[:1].to(bench.device)
            draws = [lambda c=camera, g=leaves: render(g, c[None])[:2], lambda c=camera, g=leaves: plain(g, c)[:2]]
            draws = draws if plain else draws[:1]
            wholes = [
                lambda d=draw, g=leaves: torch.autograd.grad(sum(x.sum() for x in d()), [*vars(g).values()])
                for draw in draws
            ]
            record = {"scene": f"{kind}, {count} at {size} px"}
            for name, times in (
                ("forward", bench.time(*map(torch.no_grad(), draws))), ("forward + backward", bench.time(*wholes))
            ):  # fmt: skip
                record[name] = times[0]
                if plain:
                    record |= {f"plain {name}": times[1], f"{name}, times faster": bench.faster(times[1], times[0])}
            records.append(record)
    return "Rasterizer, one view, ms", records


def gslrm_run(bench: Bench, passes: str, *, plain=None, coverage=None, checkpoint=0):
    """Returns a pass of GS-LRM over one scene, its useful operations (a backward pass counts twice) and its tokens.

    passes: forward, forward + backward, or training step (forward, rendering of the input views, L2, backward,
    clipping, AdamW; no VGG losses). coverage: of each view by a disc, whose network prunes; None: dense.
    """
    import torch

    from gslrm.config import ImageTokenizerConfig, ModelConfig, TransformerConfig
    from gslrm.model.gaussians_renderer import render
    from gslrm.model.gslrm import GSLRM, forward_flops
    from gslrm.model.selection import select_foreground
    from multiview.rig import load_rig

    torch.manual_seed(0)
    size, device, rig = bench.size, bench.device, load_rig("mouse6")
    config = ModelConfig(ImageTokenizerConfig(size), TransformerConfig(bench.d, n_layer=bench.layers))
    config.prune_background_tokens = coverage is not None
    model = (plain(config) if plain else GSLRM(config, grad_checkpoint_every=checkpoint)).to(device)
    model.requires_grad_(passes != "forward")
    images, cameras = torch.rand(1, rig.num_views, 3, size, size, device=device), rig.cameras(size)[None].to(device)
    inputs, tokens = {}, config.gaussians.n_gaussians + rig.num_views * (size // config.image_tokenizer.patch_size) ** 2
    if coverage is not None:
        offset, disc = (torch.arange(size) + 0.5 - size / 2).square(), torch.zeros(size * size)
        disc[(offset[:, None] + offset).flatten().argsort(stable=True)[: round(coverage * size**2)]] = 1.0
        masks = inputs["masks"] = disc.view(size, size).to(device).expand(1, rig.num_views, 1, -1, -1).contiguous()
        selection = select_foreground(masks, config.image_tokenizer.patch_size, config.prune_margin_px)
        tokens = config.gaussians.n_gaussians + selection.patches_per_sample[0]
    if bench.options.compile:
        torch.compiler.reset()  # graphs of earlier cases are forgotten
        for module in [model] if plain else model.transformer_layers:
            module.compile()

    def predict():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            output = model(images, cameras, **inputs)
        return output if plain else output.gaussians

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if passes == "training step" else None

    def step() -> None:
        model.zero_grad(set_to_none=True)
        gaussians = predict()
        if optimizer is None:
            return sum(tensor.square().mean() for tensor in vars(gaussians).values()).backward()
        torch.nn.functional.mse_loss(render(gaussians, cameras).rgb, images).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    flops = forward_flops(config, [tokens]) * (1 if passes == "forward" else 3)
    return torch.no_grad()(predict) if passes == "forward" else step, flops, tokens


def measure_gslrm(bench: Bench):
    records, plain = [], peer("peer_gslrm", "PlainGSLRM")
    for passes in ("forward", "forward + backward"):
        run, flops, _ = gslrm_run(bench, passes)
        runs = [run, *([gslrm_run(bench, passes, plain=plain)[0]] if plain else [])]
        times = bench.time(*runs)
        record = {"pass": passes, "ms": times[0], **bench.work(flops, times[0], run)}
        if plain:
            record |= {"plain torch modules, ms": times[1], "times faster": bench.faster(times[1], times[0])}
            record |= {"plain peak memory, MiB": bench.peak(runs[1])}
        records.append(record)
    return f"Network: d {bench.d}, {bench.layers} layers, six views of {bench.size} px", records


def measure_tokens(bench: Bench):
    records = []
    for coverage in COVERAGES:
        record: dict = {"coverage, %": 100 * coverage}
        for passes in ("forward", "forward + backward"):
            dense, work, all_tokens = gslrm_run(bench, passes)
            pruned, less, tokens = gslrm_run(bench, passes, coverage=coverage)
            times = bench.time(dense, pruned)
            record |= {"tokens": tokens, "of": all_tokens, "operations, times fewer": work / less}
            record |= {f"{passes}: dense, ms": times[0], f"{passes}: pruned, ms": times[1]}
            record |= {f"{passes}: times faster": bench.faster(*times)}
            record |= {f"{passes}: dense, MiB": bench.peak(dense), f"{passes}: pruned, MiB": bench.peak(pruned)}
        records.append(record)
    return "Foreground tokens", records, "Masks: a disc in the middle of every view."


def measure_training(bench: Bench):
    records = []
    for every, name in enumerate(("all activations kept", "gradient checkpointing")):
        run, flops, _ = gslrm_run(bench, "training step", checkpoint=every)
        (times,) = bench.time(run)
        records.append({"step": name, "ms": times, **bench.work(flops, times, run)})
    return "Training step of Stage 2", records, "Operations: three forward passes; what is recomputed does not count."


def measure_rendering(bench: Bench):
    import torch

    from gslrm.model.gaussians_renderer import render
    from multiview.rig import load_rig

    cameras = load_rig("mouse6").cameras(bench.size)[None].to(bench.device)
    gaussians = random_gaussians("trained-like", cameras.shape[1] * bench.size**2, bench.device)
    runs = [lambda: render(gaussians, cameras), lambda: render(gaussians, cameras[:, :1])]
    with torch.no_grad():
        times, memory = bench.time(*runs), bench.peak(runs[0])
    record = {"Gaussians": gaussians.num_gaussians, "views": cameras.shape[1], "size, px": bench.size}
    return "Rendering", [{**record, "all views, ms": times[0], "one view, ms": times[1], "peak memory, MiB": memory}]


# ---- Stage 1 --------------------------------------------------------------------------------------------------------


def stage1(bench: Bench, attention: str):
    """Returns config, components with a UNet, prompt embeddings and the rig, all of random weights."""
    import torch

    from multiview.rig import load_rig
    from mvdiffusion.models.unet import create_unet
    from mvdiffusion.prompts import TOKENS, PromptEmbeds
    from mvdiffusion.random_components import SD21_UNCLIP, demo_shape, random_components
    from mvdiffusion.upstream import load_training_config

    config, rig = load_training_config(str(REPOSITORY / CONFIGS[bench.options.preset]), []), load_rig("mouse6")
    shape = SD21_UNCLIP if bench.options.preset == "full" else demo_shape(config.unet)
    dtype = torch.float16 if bench.device.type == "cuda" else torch.float32
    with bench.device:
        unet = create_unet(shape.unet, rig.num_views, attention)
    parts = replace(random_components(shape, device=bench.device, dtype=dtype), unet=unet)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(rig.num_views, TOKENS, shape.unet["cross_attention_dim"], generator=generator)
    return config, parts, PromptEmbeds(prompts, rig, "random prompt embeddings"), rig


def count_flops(run: Callable[[], object]) -> float:
    """Returns the operations of matrix products, convolutions and attention in `run()`."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def measure_sampling(bench: Bench):
    import torch

    from mvdiffusion.components import tune
    from mvdiffusion.pipelines.multiview import GUIDANCE_SCALE, NUM_STEPS, generate_views

    image, runs, flops = torch.rand(1, 3, bench.size, bench.size), {}, {}
    for attention in ("sparse", "full"):
        _, components, embeds, _ = stage1(bench, attention)
        components.unet.to(components.vae.dtype).eval().requires_grad_(False)

        def run(num_steps: int = NUM_STEPS, components=components, embeds=embeds):
            return generate_views(components, image, embeds, num_steps=num_steps, guidance_scale=GUIDANCE_SCALE)

        one, two = (count_flops(lambda n=n, run=run: run(n)) for n in (1, 2))
        flops[attention], runs[attention] = (one + (NUM_STEPS - 1) * (two - one), two - one), run
        tune(components, compiled=bench.options.compile)
    records, times = [], bench.time(*runs.values())
    for (attention, run), whole in zip(runs.items(), times):
        short, long = bench.time(lambda run=run: run(1), lambda run=run: run(3))
        step = TOO_LARGE if TOO_LARGE in (short, long) else Times((b - a) / 2 for a, b in zip(short, long))
        record = {"attention": attention, "whole, ms": whole, "times the first row's": bench.faster(whole, times[0])}
        work = bench.work(flops[attention][0], whole, lambda run=run: run(2))  # more steps need no more memory
        records.append({**record, "one step, ms": step, "of a step, TFLOP": flops[attention][1] / 1e12, **work})
    return "Sampling, 50 steps with guidance", records, "A step: the UNet on both guidance halves, and the sampler."


def measure_diffusion_training(bench: Bench):
    import torch

    from multiview.cameras import Cameras
    from multiview.run import make_generator
    from mvdiffusion.encoding import EncodedBatch, encode
    from mvdiffusion.training import training_loss

    config, components, embeds, rig = stage1(bench, "sparse")
    unet, b, size = components.unet.train(), config.train_batch_size, components.image_size
    average = [parameter.detach().clone() for parameter in unet.parameters()]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.mixed_precision)
    images = torch.rand(b, rig.num_views, 3, size, size, device=bench.device)
    one, prompts = rig.cameras(size).to(bench.device), torch.arange(rig.num_views, device=bench.device)
    cameras = Cameras(one.c2w.expand(b, -1, -1, -1), one.fxfycxcy.expand(b, -1, -1), size, size)

    def batch() -> EncodedBatch:
        encoded = encode(components, images, torch.ones_like(images[:, :, :1]), images[:, :1])
        encoded |= {"condition": encoded["mean"][:, rig.reference_view], "embedding": encoded["embedding"][:, 0]}
        return EncodedBatch(**encoded, prompts=prompts.expand(b, -1), cameras=cameras)

    at_hand = batch()

    def update(cached: bool) -> None:
        generator = make_generator("benchmark", 0)
        for _ in range(config.gradient_accumulation_steps):
            current = at_hand if cached else batch()
            with torch.autocast(bench.device.type, dtype=half, enabled=half is not None):
                loss = training_loss(unet, components, embeds, current, config, generator)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [parameter.detach() for parameter in unet.parameters()], 1e-3)

    records, runs = [], {"from the cache": lambda: update(True), "encoded": lambda: update(False)}
    flops = [count_flops(run) for run in runs.values()]
    for name in ("all activations kept", "gradient checkpointing"):
        if name == "gradient checkpointing":
            unet.enable_gradient_checkpointing()
        times = bench.time(*runs.values())
        for (latents, run), operations, seconds in zip(runs.items(), flops, times):
            count = b * config.gradient_accumulation_steps
            rate = None if seconds == TOO_LARGE else count / statistics.median(seconds)
            record = {"update": name, "latents": latents, "ms": seconds, "samples per second": rate}
            record["times the cache's"] = bench.faster(seconds, times[0])
            records.append({**record, **bench.work(operations, seconds, run)})
    return f"Training of Stage 1: {b} objects of {rig.num_views} views of {size} px", records


# ---- import ---------------------------------------------------------------------------------------------------------


def decode(path: Path) -> int:
    """Decodes a video, each frame turned into colors in the memory of the one before: no import can be faster."""
    import cv2

    capture, count, frame = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]), 0, None
    while (frame := capture.read(frame)[1]) is not None:
        count += 1
    return count


def measure_import(bench: Bench):
    """A short synthetic recording is looped without encoding it again; both commands are the user's own."""
    import shutil
    import subprocess
    from concurrent.futures import ThreadPoolExecutor

    import imageio_ffmpeg

    options = bench.options
    loops = -(-options.frames // options.source_frames)
    frames, script = loops * options.source_frames, REPOSITORY / "scripts" / "make_synthetic_mouse.py"
    with tempfile.TemporaryDirectory(prefix="benchmark_import_") as name:
        short, recording = Path(name, "short"), Path(name, "recording")
        film = {"output_dir": short, "num_samples": options.source_frames, "video_width": options.video_width}
        flags = [str(word) for key, value in film.items() for word in (f"--{key}", value)]
        subprocess.run([sys.executable, script, "--as_recording", *flags], check=True, stdout=subprocess.DEVNULL)
        for path in sorted(short.rglob("*.mp4")):
            copy = recording / path.relative_to(short)
            copy.parent.mkdir(parents=True, exist_ok=True)
            loop = ["-v", "error", "-stream_loop", str(loops - 1), "-i", path, "-c", "copy", copy]
            subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *loop], check=True)
        shutil.copy(short / "new_cam.pkl", recording)

        def pure_decoding() -> tuple[float, float]:
            started, cpu = time.time(), time.process_time()
            with ThreadPoolExecutor(options.workers) as pool:
                counts = set(pool.map(decode, sorted(recording.rglob("*.mp4"))))
            if counts != {frames}:
                raise ValueError(f"the videos were looped to {frames} frames, {sorted(counts)} were decoded")
            return time.time() - started, time.process_time() - cpu

        before = pure_decoding()
        wall, cpu, report, memory = run_import(recording, Path(name, "data"), frames, options.workers)
        after = pure_decoding()
    fastest, least = ((a + b) / 2 for a, b in zip(before, after))
    ratios = {
        "frames/s over decoding's": fastest / wall, "without the report": fastest / (wall - report),
        "by CPU time": least / cpu, "largest memory of all processes, MiB": memory,
    }  # fmt: skip
    records = []
    for what, (seconds, spent) in {"decoding before": before, "import": (wall, cpu), "decoding after": after}.items():
        record = {"what": what, "seconds": seconds, "frames/s": frames / seconds, "CPU ms per frame": 1e3 * spent / frames}
        records.append({**record, **(ratios if what == "import" else dict.fromkeys(ratios))})
    return "Import of a recording", records, f"{frames} frames of 12 videos {options.video_width} px wide to 512 px."


def run_import(recording: Path, output: Path, frames: int, workers: int) -> tuple[float, float, float, float]:
    """Runs process_mouse_data.py: seconds with its start, CPU seconds, seconds of the report, MiB, of all processes."""
    import resource
    import subprocess

    import psutil

    flags = {
        "video_dir": recording / "videos_undist", "meta_dir": recording, "output_dir": output, "num_samples": frames,
        "image_size": 512, "workers": workers,
    }  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "scripts" / "process_mouse_data.py")]
    command += [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    usage, started, memory = resource.getrusage(resource.RUSAGE_CHILDREN), time.time(), 0
    child = psutil.Popen(command)
    while child.poll() is None:
        try:
            family = [child, *child.children(recursive=True)]
            memory = max(memory, sum(process.memory_full_info().pss for process in family))
        except psutil.Error:  # one of them has ended meanwhile
            pass
        time.sleep(0.5)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    ended, spent = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = spent.ru_utime + spent.ru_stime - usage.ru_utime - usage.ru_stime
    report = ended - (output / "data_mouse_val.txt").stat().st_mtime  # the lists are written last before the report
    return ended - started, cpu, report, memory / 2**20


if __name__ == "__main__":
    main_guard(main)
