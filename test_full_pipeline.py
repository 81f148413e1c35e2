"""Both stages with every artifact named, and a folder for what each made (a command, not a pytest file).

Writes <output_dir>/<stem>/stage1_mvdiffusion/ and <output_dir>/<stem>/stage2_gslrm/: the model of inference_mouse.py.
"""

import argparse
from dataclasses import fields
from functools import partial
from pathlib import Path

from multiview.config import Parser, checked
from multiview.run import leave, main_guard
from pipeline.options import Checkpoints, Options, add_up, parse_with_overrides

RENAMED = {"mvdiff_unet": "mvdiffusion_checkpoint", "gslrm_checkpoint": "checkpoint"}  # flag -> field of Checkpoints


def parse_arguments() -> tuple[argparse.Namespace, Options]:
    parser, told = Parser(description=__doc__), {entry.name: entry for entry in fields(Checkpoints)}
    parser.add_argument("--input_image", type=Path, required=True, help="one photograph (RGBA: its alpha is the mask)")
    for flag in ("mvdiff_unet", "mvdiff_pretrained", "prompt_embeds", "gslrm_checkpoint", "gslrm_config"):
        field = RENAMED.get(flag, flag)
        parser.add_argument(f"--{flag}", dest=field, type=Path, help=told[field].metadata["help"])
    parser.add_argument("--camera_json", type=Path, help="cameras of the generated views; must be the rig's")
    parser.add_argument("--rig", help=told["rig"].metadata["help"])
    parser.add_argument("--num_steps", type=checked(int, 1), help=told["num_steps"].metadata["help"])
    parser.add_argument("--guidance_scale", type=float, help=told["guidance_scale"].metadata["help"])
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--turntable_views", type=checked(int, 0), default=120, help="frames of turntable.mp4")
    add_up(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/pipeline"), help="default: outputs/pipeline")
    return parse_with_overrides(parser, Options)


def main() -> None:
    arguments, options = parse_arguments()
    from tqdm import tqdm

    from multiview.files import full_disk_explained
    from multiview.image import check_picture
    from multiview.run import check_output_folder
    from pipeline import MouseFaceLift, import_stage1
    from pipeline.outputs import start_folder

    check_output_folder(arguments.output_dir)
    check_picture(arguments.input_image)
    chosen = {entry.name: getattr(arguments, entry.name) for entry in fields(Checkpoints)}
    import_stage1()
    model = MouseFaceLift.load(device=arguments.device, options=options, **chosen)
    print(f"rig {model.rig.name}: embeddings, UNet, GS-LRM and cameras agree")
    result = model(
        arguments.input_image, seed=arguments.seed, crop=options.crop, keep_input_view=options.keep_input_view,
        name=arguments.input_image.name, progress=partial(tqdm, desc="stage 1", unit="step", disable=None),
    )  # fmt: skip
    stage1 = arguments.output_dir / arguments.input_image.stem / "stage1_mvdiffusion"
    stage2 = stage1.with_name("stage2_gslrm")
    result.up = arguments.up
    with full_disk_explained(stage2 / "gaussians.ply"):
        for folder in (stage1, stage2):  # both lose their run.json before either is written anew
            start_folder(folder)
        result.write_views(stage1)
        result.write_run(stage1)
        print(f"{stage1}: {len(result.views.rgb)} views")
        result.write_model(
            stage2, turntable_views=arguments.turntable_views, turntable_size=options.turntable_size
        )  # fmt: skip
        result.write_run(stage2)
    print(f"{stage2}: {result.gaussians.num_gaussians} Gaussians")


if __name__ == "__main__":
    main_guard(main)
    leave()
