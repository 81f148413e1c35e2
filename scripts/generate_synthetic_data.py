"""Generates the rig's views of every sample of a dataset with Stage 1, as a dataset to train Stage 2 on.

The new samples carry the rig's cameras, never the recording's: that is what the generated views show. Photographs are
used as they are. Repeating the command continues it; a sample depends on --seed and its own name only. Several
processes share the work:
  python scripts/generate_synthetic_data.py --data data_mouse/data_mouse_train.txt --output_dir data_mouse_painted
  torchrun --nproc_per_node 4 scripts/generate_synthetic_data.py --data ... --output_dir ...
  python scripts/generate_synthetic_data.py --shard 0/2 --data ... & python ... --shard 1/2 --data ...
"""

import argparse
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, add_fields, from_arguments, option
from multiview.run import main_guard
from pipeline.options import Stage1Checkpoints


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: tuple[Path, ...] = option(
        (Path("data_mouse/data_mouse_train.txt"),),
        "split lists of one dataset, each gives one of the same name; default: data_mouse/data_mouse_train.txt",
    )
    output_dir: Path = option(..., "dataset folder, new or to be continued")
    num_samples: int | None = option(None, "the first n of each list; default: all", least=1)
    seed: int = option(0, "of the dataset")
    device: str = option("auto", "auto, cpu or cuda")
    references: str = option("reference", "photograph: that view, or each in turn", choices=("reference", "all"))
    repaint_input: bool = option(False, "generate the reference view too instead of keeping the photograph")
    keep_true_views: str = option(
        "none", "append the source's own images, where its reference camera is the rig's, as targets for Stage 2: "
        "those in no rig view, or all but the photograph", choices=("none", "novel", "all"),
    )  # fmt: skip
    batch_size: int = option(1, "samples generated at once", least=1)


def shard(text: str) -> tuple[int, int]:
    """An argparse type: i/n, i from 0."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"must be i/n with 0 <= i < n, e.g. 0/4, got {text!r}")
    return int(number), int(count)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_fields(parser, Settings)
    add_fields(parser, Stage1Checkpoints)
    parser.add_argument("--shard", type=shard, help="i/n: every n-th batch from i; default: torchrun's rank, else all")
    arguments = parser.parse_args()
    settings, checkpoints = from_arguments(Settings, arguments), from_arguments(Stage1Checkpoints, arguments)

    from multiview.checkpoint import digest_of
    from multiview.run import check_output_folder, process_share
    from multiview.sample import open_dataset
    from pipeline import MouseFaceLift
    from pipeline.dataset import generate_list, make_jobs

    folder = settings.output_dir
    check_output_folder(folder)
    share, device = process_share(settings.device)
    if arguments.shard is not None:
        if "RANK" in os.environ:
            raise ValueError("--shard and torchrun both share out the work; use one of them")
        share = arguments.shard
    model = MouseFaceLift.load(device=device, stages="1", **vars(checkpoints))
    artifacts = model.artifacts
    jobs = make_jobs(settings.data, artifacts.rig, settings.references, settings.num_samples, settings.seed)

    def fingerprint(*paths: Path) -> str:  # of contents in a fixed order: a renamed folder is still the same weights
        return hashlib.sha256(b"".join(bytes.fromhex(digest_of(path)) for path in sorted(paths))).hexdigest()[:16]

    kept = {"keep_input_view": not settings.repaint_input, "true_views": settings.keep_true_views}
    # Whatever decides a sample: the command refuses to continue a dataset made with anything else.
    parameters = {
        "source": "stage1", "source_data": settings.data[0].parent.as_posix(),
        "unet": str(artifacts.unet), "components": str(artifacts.components),
        "unet_sha256": fingerprint(*artifacts.unet.glob("*.safetensors")),
        "vae_sha256": fingerprint(*(artifacts.components / "vae").glob("*.safetensors")),
        "prompt_embeds_sha256": fingerprint(Path(artifacts.embeds.source)),
        "num_steps": artifacts.num_steps, "guidance_scale": artifacts.guidance_scale, "seed": settings.seed,
        **({"num_draws": draws} if (draws := artifacts.options.num_draws) > 1 else {}),  # datasets from before go on
        "image_size": model.image_size, "references": settings.references, "batch_size": settings.batch_size, **kept,
    }  # fmt: skip
    open_dataset(folder, artifacts.rig, parameters)
    for path, own in jobs.items():
        listed, made, true = generate_list(folder / path.name, own, model, settings.batch_size, share, **kept)
        told = f"{listed} of {len(own)} samples; generated now: {made}, with {true} true views"
        print(f"{folder / path.name}: {told}")


if __name__ == "__main__":
    main_guard(main)
