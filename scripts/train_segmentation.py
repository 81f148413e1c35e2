"""Trains the small network that cuts the animal out of a photograph: synthetic mice over random backgrounds.

Prints its mean IoU on held-out mice beside that of the color model (GrabCut) on the same pictures.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, add_fields, from_arguments, option
from multiview.run import main_guard


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Path = option(..., "split list of synthetic mice, best of 256 px")
    held_out: Path = option(..., "split list of others, for the IoU")
    output: Path = option(Path("checkpoints/demo/segmentation/model.safetensors"), "weights, float16")
    steps: int = option(3000, "of batch_size pictures", least=1)
    batch_size: int = option(12, "pictures", least=1)
    seed: int = option(0, "of weights and pictures")
    device: str = option("cpu", "cpu, cuda or auto")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_fields(parser, Settings)
    options = vars(from_arguments(Settings, parser.parse_args()))
    from safetensors.torch import save_file

    from multiview.files import atomic_write
    from synthetic.segmentation import train_segmentation

    output = options.pop("output")
    network, scores = train_segmentation(**options)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as temporary:
        save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, temporary)
    print(f"{output}: mean IoU " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))


if __name__ == "__main__":
    main_guard(main)
