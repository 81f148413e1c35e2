"""The whole chain with every artifact named, and a folder for what each stage made (a command, not a pytest file).

Writes <output_dir>/<stem>/stage1_mvdiffusion/ and <output_dir>/<stem>/stage2_gslrm/.
"""

import argparse
import time
from pathlib import Path

from multiview.run import main_guard
from pipeline.flags import add_chain_flags, add_photo_flags, add_stage1_flags, stage1_options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--input_image", type=Path, required=True, help="one photograph (RGBA: its alpha is the mask)")
    parser.add_argument("--mvdiff_unet", type=Path, help="Stage 1: UNet folder or checkpoint-<step>; default: demo")
    parser.add_argument("--gslrm_checkpoint", type=Path, help="Stage 2: ckpt_*.pt or a folder of them; default: demo")
    parser.add_argument("--camera_json", type=Path, help="cameras of the painted views; must be the rig's")
    add_chain_flags(parser)
    add_stage1_flags(parser)
    add_photo_flags(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/pipeline"))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from gslrm.model.rasterizers import warm_up

    if not arguments.device.startswith("cuda"):
        warm_up.start()  # the first command of an installation compiles kernels, beside the imports that follow
    from tqdm import tqdm

    from gslrm.model.gaussians import filter_gaussians
    from multiview.image import read_photo, write_image
    from multiview.photo import prepare_photo
    from multiview.run import resolve_device
    from pipeline.artifacts import load_stage1, load_stage2, resolve_chain
    from pipeline.outputs import start_folder, write_gaussians, write_run, write_views
    from pipeline.stages import paint_views, reconstruct

    device = resolve_device(arguments.device)
    photo = read_photo(arguments.input_image)
    artifacts = resolve_chain(
        rig=arguments.rig, unet=arguments.mvdiff_unet, gslrm=arguments.gslrm_checkpoint,
        gslrm_config=arguments.gslrm_config, components=arguments.mvdiff_pretrained, embeds=arguments.prompt_embeds,
        num_steps=arguments.num_steps, guidance_scale=arguments.guidance_scale,
        camera_json=arguments.camera_json, options=stage1_options(arguments),
    )  # fmt: skip
    print(f"rig {artifacts.rig.name}: embeddings, UNet, GS-LRM and cameras agree")
    settings = {
        "input": arguments.input_image.name, "artifacts": artifacts.describe(), "seed": arguments.seed,
        "num_steps": artifacts.num_steps, "guidance_scale": artifacts.guidance_scale,
    }  # fmt: skip

    stage1 = arguments.output_dir / arguments.input_image.stem / "stage1_mvdiffusion"
    components = load_stage1(artifacts, device)
    source = str(arguments.input_image)
    prepared, report = prepare_photo(photo, components.image_size, crop=arguments.crop, source=source)
    start_folder(stage1)
    write_image(stage1 / "input.png", prepared)
    started = time.perf_counter()
    views = paint_views(
        components, artifacts, prepared, seed=arguments.seed,
        keep_input_view=False,
        progress=lambda steps: tqdm(steps, desc="stage 1", unit="step"),
    )  # fmt: skip
    write_views(stage1, views, artifacts.rig)
    write_run(stage1, artifacts.rig, {**settings, "photo": vars(report), "seconds": time.perf_counter() - started})
    print(f"{stage1}: {len(views.rgb)} views")

    stage2 = stage1.with_name("stage2_gslrm")
    model = load_stage2(artifacts, device)
    start_folder(stage2)
    started = time.perf_counter()
    gaussians = filter_gaussians(reconstruct(model, views, device))
    with tqdm(total=arguments.turntable_views, desc="stage 2: turntable", unit="frame") as bar:
        write_gaussians(
            stage2, gaussians, turntable_views=arguments.turntable_views, turntable_size=256,
            elevation_deg=float(views.cameras.elevation_deg.mean()), on_frame=lambda done, _: bar.update(1),
        )  # fmt: skip
    content = {**settings, "gaussians": gaussians.num_gaussians, "seconds": time.perf_counter() - started}
    write_run(stage2, artifacts.rig, content)
    print(f"{stage2}: {gaussians.num_gaussians} Gaussians")


if __name__ == "__main__":
    main_guard(main)
