"""Makes the prompt embeddings of a rig: clr_embeds.pt, normal_embeds.pt, metadata.json; says which views look alike.

Without arguments: rig mouse6 with the demo text encoder, into the tracked folder. For the full-size model name the
folder that holds its text encoder: --model_name checkpoints/mvdiffusion/pipeckpts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, checked
from multiview.run import main_guard


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    styles = ("facelift", "mouse", "laboratory")
    parser.add_argument("--rig", default="mouse6", help="name in configs/rigs, or a rig file")
    parser.add_argument("--style", choices=styles, help="prompt style; the rig's own if not given")
    model = "folder with tokenizer/ and text_encoder/"
    parser.add_argument("--model_name", default="checkpoints/demo/mvdiffusion", help=model)
    parser.add_argument("--output_dir", default="mvdiffusion/data/mouse_prompt_embeds_6view")
    parser.add_argument(
        "--elevation", type=checked(float, -90, 90), help="degrees; replaces the elevation of the rig's views"
    )
    parser.add_argument("--angles", action="store_true", help="append elevation and azimuth as numbers to every prompt")
    arguments = parser.parse_args()
    import torch

    from multiview.rig import load_rig
    from mvdiffusion.prompts import alike_views, write_prompt_embeds

    rig, elevation = load_rig(arguments.rig), arguments.elevation
    if elevation is not None and any(view.elevation_deg != elevation for view in rig.views):
        views = tuple(replace(view, elevation_deg=elevation) for view in rig.views)
        rig = replace(rig, name=f"{rig.name}_elevation{elevation:g}", views=views)
    style = arguments.style or rig.prompt_style
    metadata = write_prompt_embeds(arguments.output_dir, arguments.model_name, rig, style, angles=arguments.angles)
    print(f"{arguments.output_dir}: rig {rig.name}, style {style}, shape {metadata['shape']}, {metadata['dtype']}")
    print(*(f"  {prompt}" for prompt in metadata["prompts"]), sep="\n")
    names, matrix = metadata["similarity"]["views"], metadata["similarity"]["matrix"]
    print(f"similarity ({metadata['similarity']['measure']}):")
    for name, row in zip(names, matrix):
        print(f"  {name:<{max(map(len, names))}}  " + "  ".join(f"{value:.3f}" for value in row))
    if alike := alike_views(torch.tensor(matrix), names):
        print(
            f"warning: nearly the same to the text encoder: {', '.join(alike)}. The UNet can hardly tell these views "
            "apart by their prompts: add --angles, choose another --style, or train with camera_conditioning=adaln"
        )


if __name__ == "__main__":
    main_guard(main)
