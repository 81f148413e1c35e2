"""Train Stage 1 (UNet: one image of an animal to N views). Repeating the command resumes it.

  python train_diffusion.py --config configs/mouse_mvdiffusion.yaml --overfit 1
  torchrun --nproc_per_node 4 train_diffusion.py --config configs/mouse_mvdiffusion.yaml
"""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="F", help="YAML over the defaults of mvdiffusion/config.py")
    parser.add_argument(
        "--overfit", type=int, default=0, metavar="N",
        help="train and validate on the first N samples: the first test of any set-up (default: 0, off)",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print the resolved config and stop (default: off)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. learning_rate=1e-5")
    arguments = parser.parse_intermixed_args()
    if arguments.overfit < 0:
        parser.error(f"--overfit must be 0 or more, got {arguments.overfit}")
    for override in arguments.overrides:
        if "=" not in override:
            parser.error(f"expected key=value, got {override!r}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from multiview.config import config_to_yaml
    from mvdiffusion.facelift_yaml import load_training_config

    config = load_training_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
        return
    from mvdiffusion.training import train

    folder = train(config, arguments.overfit)
    print(f"checkpoints, metrics.jsonl, summary.json and images: {folder}")


if __name__ == "__main__":
    from multiview.run import main_guard

    main_guard(main)
