"""Both stages with every artifact named, and a folder for what each made (a command, not a pytest file).

Writes <output_dir>/<stem>/stage1_mvdiffusion/ and <output_dir>/<stem>/stage2_gslrm/: the model of inference_mouse.py.
"""

import argparse
from functools import partial
from pathlib import Path

from multiview.config import checked
from multiview.run import main_guard
from pipeline.artifacts import Options, parse_with_overrides

FILES = {  # flag -> field of pipeline.artifacts.Checkpoints, help
    "--mvdiff_unet": ("mvdiffusion_checkpoint", "Stage 1: UNet folder or checkpoint-<step>; default: demo model"),
    "--mvdiff_pretrained": ("mvdiff_pretrained", "Stage 1: components; default: the checkpoint's own"),
    "--prompt_embeds": ("prompt_embeds", "clr_embeds.pt; default: those stored beside the UNet, else the tracked ones"),
    "--gslrm_checkpoint": ("checkpoint", "Stage 2: ckpt_*.pt or a folder of them; default: demo model"),
    "--gslrm_config": ("gslrm_config", "Stage 2: training YAML; default: the checkpoint's own"),
    "--camera_json": ("camera_json", "cameras of the generated views; must be the rig's"),
}


def parse_arguments() -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input_image", type=Path, required=True, help="one photograph (RGBA: its alpha is the mask)")
    for flag, (field, text) in FILES.items():
        parser.add_argument(flag, dest=field, type=Path, help=text)
    parser.add_argument("--rig", help="the view rig, for weights that carry none (facelift6 for FaceLift's)")
    parser.add_argument("--num_steps", type=checked(int, 1), help="sampling steps; default: the model's own, else 50")
    parser.add_argument("--guidance_scale", type=float, help="1 = off; default: the model's own, else 3")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--turntable_views", type=int, default=120, help="frames of turntable.mp4 (120); 0 writes none")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/pipeline"), help="default: outputs/pipeline")
    return parse_with_overrides(parser, Options)


def main() -> None:
    arguments, options = parse_arguments()
    from tqdm import tqdm

    from multiview.files import full_disk_explained
    from multiview.image import check_picture
    from multiview.run import check_output_folder
    from pipeline import MouseFaceLift
    from pipeline.outputs import start_folder, write_run, write_stage1, write_stage2

    check_output_folder(arguments.output_dir)
    check_picture(arguments.input_image)
    chosen = {field: getattr(arguments, field) for field, _ in FILES.values()}
    model = MouseFaceLift.load(
        device=arguments.device, options=options, rig=arguments.rig, num_steps=arguments.num_steps,
        guidance_scale=arguments.guidance_scale, **chosen,
    )  # fmt: skip
    print(f"rig {model.rig.name}: embeddings, UNet, GS-LRM and cameras agree")
    result = model(
        arguments.input_image, seed=arguments.seed, crop=options.crop, keep_input_view=options.keep_input_view,
        name=arguments.input_image.name, progress=partial(tqdm, desc="stage 1", unit="step", disable=None),
    )  # fmt: skip
    stage1 = arguments.output_dir / arguments.input_image.stem / "stage1_mvdiffusion"
    stage2 = stage1.with_name("stage2_gslrm")
    with full_disk_explained(stage2 / "gaussians.ply"):
        for folder in (stage1, stage2):  # both lose their run.json before either is written anew
            start_folder(folder)
        write_stage1(stage1, result)
        write_run(stage1, model.rig, result.record)
        print(f"{stage1}: {len(result.views.rgb)} views")
        size = options.turntable_size
        write_stage2(stage2, result, turntable_views=arguments.turntable_views, turntable_size=size)
        write_run(stage2, model.rig, result.record)
    print(f"{stage2}: {result.gaussians.num_gaussians} Gaussians")


if __name__ == "__main__":
    main_guard(main)
