"""Makes the prompt embeddings of a rig: clr_embeds.pt, normal_embeds.pt, metadata.json.

Without arguments: rig mouse6 with the demo text encoder, into the tracked folder. For the full-size model name the
folder that holds its text encoder: --model_name checkpoints/mvdiffusion/pipeckpts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STYLES = ("facelift", "mouse", "laboratory")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rig", default="mouse6", help="name in configs/rigs, or a rig file")
    parser.add_argument("--style", default=None, choices=STYLES, help="prompt style; the rig's own if not given")
    parser.add_argument(
        "--model_name", default="checkpoints/demo/mvdiffusion", help="folder with tokenizer/ and text_encoder/"
    )
    parser.add_argument("--output_dir", default="mvdiffusion/data/mouse_prompt_embeds_6view")
    parser.add_argument(
        "--elevation", type=float, default=None, help="degrees; replaces the elevation of the rig's views"
    )
    parser.add_argument("--angles", action="store_true", help="append elevation and azimuth as numbers to every prompt")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from multiview.rig import load_rig
    from mvdiffusion.prompts import rig_at_elevation, write_prompt_embeds

    rig = rig_at_elevation(load_rig(arguments.rig), arguments.elevation)
    style = arguments.style or rig.prompt_style
    metadata = write_prompt_embeds(arguments.output_dir, arguments.model_name, rig, style, angles=arguments.angles)
    print(f"{arguments.output_dir}: rig {rig.name}, style {style}, shape {metadata['shape']}, {metadata['dtype']}")
    for prompt in metadata["prompts"]:
        print(f"  {prompt}")
    if len(set(metadata["prompts"])) < len(metadata["prompts"]):
        print("note: the prompts do not tell the views apart; add --angles")


if __name__ == "__main__":
    from multiview.run import main_guard

    main_guard(main)
