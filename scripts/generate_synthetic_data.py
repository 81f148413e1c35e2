"""Paints the rig's views of every sample of a dataset with Stage 1, as a dataset to train Stage 2 on.

The new samples carry the rig's cameras, never the recording's: that is what the painted views show. Photographs are
painted as they are, never mirrored, whatever suits the UNet at inference. Repeating the command continues it; a sample
depends on --seed and its own name only. Several processes share the work:
  python scripts/generate_synthetic_data.py --data data_mouse/data_mouse_train.txt --output_dir data_mouse_painted
  torchrun --nproc_per_node 4 scripts/generate_synthetic_data.py --data ... --output_dir ...
  python scripts/generate_synthetic_data.py --shard 0/2 --data ... & python ... --shard 1/2 --data ...
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import main_guard
from pipeline.flags import positive


def shard(text: str) -> tuple[int, int]:
    """An argparse type: i/n, i from 0."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"must be i/n with 0 <= i < n, e.g. 0/4, got {text!r}")
    return int(number), int(count)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[Path("data_mouse/data_mouse_train.txt")],
        help="split lists of one dataset, each gives one of the same name (default: data_mouse/data_mouse_train.txt)",
    )  # fmt: skip
    parser.add_argument("--output_dir", type=Path, required=True, help="dataset folder, new or to be continued")
    parser.add_argument("--num_samples", type=positive, help="the first so many of each list (default: all)")
    parser.add_argument("--mvdiffusion_checkpoint", type=Path, help="Stage 1 (default: the demo model)")
    parser.add_argument("--mvdiff_pretrained", type=Path, help="components (default: the checkpoint's own)")
    parser.add_argument("--prompt_embeds", type=Path, help="clr_embeds.pt (default: those stored beside the UNet)")
    parser.add_argument("--rig", help="the view rig, for weights that carry none")
    parser.add_argument("--num_steps", type=positive, help="sampling steps (default: the model's own, else 50)")
    parser.add_argument("--guidance_scale", type=float, help="guidance, 1 = off (default: the model's own, else 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the dataset (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--references", choices=("reference", "all"), default="reference",
        help="paint from the reference view, or from each rig view in turn (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--repaint_input", action="store_true", help="paint the reference view too, not the photograph")
    parser.add_argument(
        "--keep_true_views", choices=("none", "novel", "all"), default="none",
        help="append the source's own pictures, where its reference camera is the rig's, as targets for Stage 2: those "
        "in no rig view, or all but the photograph (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=positive, default=1, help="samples painted at once (default: %(default)s)")
    parser.add_argument("--shard", type=shard, help="i/n: every n-th batch from i (default: torchrun's rank, else all)")
    return parser.parse_args()


def own_shard(asked: tuple[int, int] | None) -> tuple[int, int]:
    """This process's share: as asked, else torchrun's."""
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if asked is not None and under_torchrun:
        raise ValueError("--shard and torchrun both share out the work; use one of them")
    return asked or ((int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if under_torchrun else (0, 1))


def own_device(name: str):
    """The device of this process: torchrun's local rank picks the GPU."""
    import torch

    from multiview.run import resolve_device

    device = resolve_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def main() -> None:
    arguments = parse_arguments()
    from tqdm import tqdm

    from pipeline.artifacts import load_stage1, resolve_stage1
    from pipeline.dataset import (
        Painting,
        fingerprint,
        make_jobs,
        pending_batches,
        start_dataset,
        write_batch,
        write_list,
    )

    artifacts = resolve_stage1(
        rig=arguments.rig, unet=arguments.mvdiffusion_checkpoint, components=arguments.mvdiff_pretrained,
        embeds=arguments.prompt_embeds, num_steps=arguments.num_steps, guidance_scale=arguments.guidance_scale,
    )  # fmt: skip
    number, count = own_shard(arguments.shard)
    jobs = make_jobs(arguments.data, artifacts.rig, arguments.references, arguments.num_samples)
    painting = Painting(arguments.seed, not arguments.repaint_input, arguments.keep_true_views)
    components = load_stage1(artifacts, own_device(arguments.device))
    parameters = {
        "source": "stage1", "source_data": arguments.data[0].parent.as_posix(),
        "unet": str(artifacts.unet), "components": str(artifacts.components),
        "unet_sha256": fingerprint(artifacts.unet.glob("*.safetensors")),
        "vae_sha256": fingerprint((artifacts.components / "vae").glob("*.safetensors")),
        "prompt_embeds_sha256": fingerprint([Path(artifacts.embeds.source)]),
        "num_steps": artifacts.num_steps, "guidance_scale": artifacts.guidance_scale, "seed": arguments.seed,
        "image_size": components.image_size, "references": arguments.references, "batch_size": arguments.batch_size,
        "keep_input_view": painting.keep_input_view, "true_views": painting.true_views,
    }  # fmt: skip
    start_dataset(arguments.output_dir, artifacts.rig, parameters)
    for path, own in jobs.items():
        batches = list(pending_batches(own, arguments.output_dir, arguments.batch_size, (number, count)))
        total, true = sum(len(missing) for _, missing in batches), 0
        with tqdm(total=total, desc=f"{path.name} {number}/{count}", unit="sample", disable=None) as bar:
            for batch, missing in batches:
                true += write_batch(arguments.output_dir, components, artifacts, batch, missing, painting)
                bar.update(len(missing))
        listed = write_list(arguments.output_dir / path.name, own)
        print(
            f"{arguments.output_dir / path.name}: {listed} of {len(own)} samples; painted now: {total}, with {true} "
            "true views"
        )


if __name__ == "__main__":
    main_guard(main)
