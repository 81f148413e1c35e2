"""Makes the small Stage 1 components: tokenizer, text and vision encoders, autoencoder, schedulers.

Repeating the command resumes where the time limit of the last call ended.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser
from multiview.run import main_guard


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", default="configs/demo_components.yaml", help="sizes and training options")
    parser.add_argument("--data", help="split list of samples (default: the config's)")
    parser.add_argument("--output_dir", help="components folder (default: the config's)")
    parser.add_argument("--max_minutes", type=float, help="stop after so many minutes; no limit if not given")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, e.g. vae.steps=2000")
    arguments = parser.parse_args()
    from multiview.config import load_config
    from multiview.files import full_disk_explained
    from mvdiffusion.demo import DemoComponentsConfig, make_demo_components

    given = {name: getattr(arguments, name) for name in ("data", "output_dir")}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    config = load_config(DemoComponentsConfig, arguments.config, [*arguments.overrides, *overrides])
    with full_disk_explained(config.output_dir):  # libraries write these files, and do not say which one failed
        figures = make_demo_components(config, arguments.max_minutes)
    if figures is None:
        print(f"not finished yet: repeat the command to continue; what there is lies in {config.output_dir}")
    else:
        print(f"{config.output_dir}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    main_guard(main)
