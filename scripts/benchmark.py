"""Times of both stages with random weights; rasterizer and GS-LRM beside plain PyTorch versions in the same run.

The import of recordings (--what import) beside pure decoding of the same videos, on the CPU, whatever the preset.

  rasterizer  forward and backward beside a tiled rasterizer in plain PyTorch (benchmarks/peer_rasterizer.py)
  gslrm       the network beside the same one written with plain torch modules (benchmarks/peer_gslrm.py)
  tokens      dense against pruned, by the share of each view that the animal covers
  training    a whole training step, with and without gradient checkpointing
  rendering   the input views of one reconstruction
  sampling    Stage 1: one picture to the rig's views in 50 steps with guidance, sparse and full attention
  diffusion_training
              Stage 1: an update of train_diffusion.py, latents from the cache or encoded in each update
  import      a recording to samples; not among the parts by default. Needs some minutes and 1 GB in TMPDIR

Wall times: `median (first to third quartile)`, each after a run that warms up. Ratios are of runs that took turns, so
they hold on a busy machine too; milliseconds need a quiet one. demo is the demo model's size (runs on a CPU), full is
FaceLift's (d 1024, 24 layers; Stage 1 as SD 2.1 unCLIP; six views of 512 px: for a GPU, in half precision).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import checked
from multiview.run import main_guard

POSITIVE = checked(int, 1)

DIFFUSION_PARTS = ("sampling", "diffusion_training")
MODEL_PARTS = ("rasterizer", "gslrm", "tokens", "training", "rendering", *DIFFUSION_PARTS)
PARTS = (*MODEL_PARTS, "import")


def parts(text: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"must be one or more of {', '.join(PARTS)}, got {text!r}")
    return chosen


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("demo", "full"), default="demo", help="sizes (default: demo)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--what", type=parts, default=MODEL_PARTS, metavar="PART[,PART...]", help=f"(default: {','.join(MODEL_PARTS)})"
    )
    parser.add_argument("--repeats", type=POSITIVE, default=9, help="timed runs after one that warms up (default: 9)")
    parser.add_argument("--compile", action="store_true", help="gslrm, training and sampling also compiled")
    parser.add_argument("--no_memory", action="store_true", help="leave peak memory out (CPU: a process per figure)")
    group = parser.add_argument_group("import")
    group.add_argument("--frames", type=POSITIVE, default=2000, help="of the recording, at the least (default: 2000)")
    group.add_argument("--source_frames", type=POSITIVE, default=24, help="filmed, then looped (default: 24)")
    group.add_argument("--video_width", type=POSITIVE, default=1152, help="even, px of the videos (default: 1152)")
    group.add_argument("--workers", type=POSITIVE, default=2, help="processes, of the decoding too (default: 2)")
    parser.add_argument("--output", type=Path, help="JSON file to write; the table goes beside it as .md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from benchmarks.report import describe_machine
    from multiview.run import git_hash, resolve_device

    device = resolve_device(options.device)
    header = {
        "preset": options.preset, "repeats": options.repeats, "git": git_hash(), **describe_machine(device)
    }  # fmt: skip
    text = ", ".join(f"{key} {value}" for key, value in header.items()) + "\n"
    print(text)
    tables = []
    for what in options.what:
        table = measure(what, options, device)
        print(table.markdown(), flush=True)
        tables.append(table)
    if options.output:
        write_results(options.output, header, text, tables)


def measure(what: str, options: argparse.Namespace, device):
    if what == "import":
        return measure_recording(options)
    return (measure_stage1 if what in DIFFUSION_PARTS else measure_stage2)(what, options, device)


def measure_recording(options: argparse.Namespace):
    from benchmarks.recording import measure_import
    from scripts.make_synthetic_mouse import make_renderer

    return measure_import(
        make_renderer(), frames=options.frames, source_frames=options.source_frames, video_width=options.video_width,
        workers=options.workers,
    )  # fmt: skip


def measure_stage1(what: str, options: argparse.Namespace, device):
    from benchmarks.diffusion import measure_diffusion_training, measure_sampling
    from mvdiffusion.workloads import workloads

    sampling, training = workloads(options.preset)
    memory = not options.no_memory
    if what == "sampling":
        return measure_sampling(sampling, device, options.repeats, compile=options.compile, memory=memory)
    return measure_diffusion_training(training, device, options.repeats, memory=memory)


def measure_stage2(what: str, options: argparse.Namespace, device):
    from benchmarks.presets import PRESETS, measure

    return measure(
        what, PRESETS[options.preset], device, options.repeats, compile=options.compile, memory=not options.no_memory
    )


def write_results(path: Path, header: dict, text: str, tables: list) -> None:
    """The same tables as JSON and as Markdown."""
    from multiview.files import atomic_write, write_json

    write_json(path, {**header, "tables": [table.to_dict() for table in tables]})
    with atomic_write(path.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join([text, *(table.markdown() for table in tables)]))
    print(f"{path}, {path.with_suffix('.md')}")


if __name__ == "__main__":
    main_guard(main)
