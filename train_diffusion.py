"""Trains Stage 1: one picture of an animal to N views. Repeating the command resumes it.

python train_diffusion.py --config configs/mouse_mvdiffusion.yaml
accelerate launch --num_processes 4 train_diffusion.py --config configs/mouse_mvdiffusion.yaml learning_rate=1e-5
"""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="experiment YAML, a delta over the defaults")
    parser.add_argument(
        "--overfit",
        type=int,
        default=None,
        metavar="N",
        help="train and validate on the first N samples (default: all)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the resolved config and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, e.g. max_train_steps=100")
    arguments = parser.parse_args()
    if arguments.overfit is not None and arguments.overfit < 1:
        parser.error("--overfit needs at least 1 sample")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from multiview.config import config_to_yaml
    from mvdiffusion.facelift_yaml import load_training_config

    config = load_training_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(config_to_yaml(config))
        return
    from mvdiffusion.training import train

    for name, value in train(config, arguments.overfit).items():
        print(f"{name:<40} {value:8.3f}")


if __name__ == "__main__":
    from multiview.run import main_guard

    main_guard(main)
