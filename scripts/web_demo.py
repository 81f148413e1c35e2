"""A web page: drop a photograph of a mouse, correct its mask by a box, look at the 3D model, download it.

For this machine alone unless --host says otherwise; one photograph at a time; what is uploaded and made goes away.
"""

import logging
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, add_fields, checked, from_arguments, server_library
from multiview.run import Stop, leave, main_guard
from pipeline.options import Checkpoints

BOX = {"left": 0, "top": 0, "right": 100, "bottom": 100}  # percent
BEHIND = (0.3, 0.5, 1.0)  # color behind the animal cut out: of no mouse


def cut(path: str, left: float, top: float, right: float, bottom: float):
    """Returns a photograph's part within a box in percent, RGBA [4, h, w] 0..1. Its border is background to the
    segmentation. Raises ValueError for what is no photograph."""
    from multiview.image import read_photo

    rgba = read_photo(path)
    height, width = (side / 100 for side in rgba.shape[-2:])
    return rgba[:, round(top * height) : round(bottom * height), round(left * width) : round(right * width)]


def answered(work, *nothing):
    """Returns `work`, which answers an error with its sentence in the place of "", without paths of this machine."""

    @wraps(work)  # gradio finds a progress bar among the parameters
    def call(*values):
        try:
            return work(*values)
        except (ValueError, OSError) as error:
            told = re.sub(rf"{re.escape(tempfile.gettempdir())}\S*/", "", str(error))
            return [told if value == "" else value for value in nothing]

    return call


def look(path: str | None, *box: float):
    """Returns what the box holds beside the animal cut out of it, and a question."""
    from multiview.image import composite, prepare_photo, to_uint8

    if path is None:
        return None, ""
    part = cut(path, *box)
    animal, step = prepare_photo(part, 256, source="the box")[0], max(1, max(part.shape) // 400)
    pair = composite(part[:, ::step, ::step], 1.0), composite(animal, animal.new_tensor(BEHIND)[:, None, None])
    told = "Is the whole animal cut out, and nothing else? If not, narrow the box to it and a little background."
    return [to_uint8(image) for image in pair], told


def build(gr, model, folder: Path, turntable_views: int):
    """Returns the page, whose jobs queue up for one worker. folder: for the results."""
    from gslrm.model import ply

    def reconstruct(path, left, top, right, bottom, seed, steps, progress=gr.Progress()):  # noqa: B008 (gradio's way)
        if path is None:
            raise ValueError("Drop a photograph first")
        started, model.artifacts = time.perf_counter(), replace(model.artifacts, num_steps=int(steps))
        result = model(
            cut(path, left, top, right, bottom), seed=int(seed), name=Path(path).name,
            progress=partial(progress.tqdm, desc="views"),
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)  # of the photograph before, which gradio has copied
        result.save(folder, turntable_views=turntable_views, export=tuple(ply.FORMATS))
        verdict, seconds = result.record["verdict"], time.perf_counter() - started
        told = [
            verdict["word"],
            *verdict["reasons"],
            f"{result.gaussians.num_gaussians:,} Gaussians in {seconds:.1f} s",
        ]
        files = sorted(map(str, [*folder.glob("gaussians.*"), *folder.glob("turntable.mp4")]))
        return "\n".join(told), str(folder / "multiview.png"), str(folder / "gaussians.splat"), files

    with gr.Blocks(title="Mouse-FaceLift", analytics_enabled=False, delete_cache=(600, 3600)) as page, gr.Row():
        with gr.Column():
            photo = gr.File(label="Photograph of a mouse, at most 20 MB", file_types=["image"], height=120)
            pair = {"columns": 2, "height": 260, "object_fit": "contain"}
            mask = gr.Gallery(label="The box | the animal in it", interactive=False, **pair)
            told = gr.Textbox(label="Mask", elem_id="mask")
            with gr.Row():
                box = [gr.Slider(0, 100, at, step=1, label=f"Box: {side}, %") for side, at in BOX.items()]
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            steps = gr.Slider(1, 100, model.artifacts.num_steps, step=1, label="Steps of Stage 1")
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column():
            result = [gr.Textbox(label="Result", elem_id="result"), gr.Image(label="Views", buttons=[])]
            result += [gr.Model3D(label="3D model: drag, scroll", height=420, interactive=False)]
            result += [gr.File(label="Download", interactive=False, elem_id="files")]
        looking = {"fn": answered(look, None, ""), "inputs": [photo, *box], "outputs": [mask, told]}
        photo.change(lambda: list(BOX.values()), None, box).then(**looking)
        gr.on([slider.release for slider in box], **looking)
        button.click(answered(reconstruct, "", None, None, None), [photo, *box, seed, steps], result)
    return page.queue(default_concurrency_limit=1, max_size=16)


def main() -> None:
    parser = Parser(description=__doc__)
    add_fields(parser, Checkpoints)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--turntable_views", type=checked(int, 0), default=60, help="frames of turntable.mp4 (60)")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=checked(int, 1, 65535), default=7860, help="default: 7860")
    given = parser.parse_args()
    temporary = tempfile.TemporaryDirectory(prefix="mouse_facelift_web_", ignore_cleanup_errors=True)
    with Stop() as stop, temporary as folder, suppress(KeyboardInterrupt):
        tempfile.tempdir = folder  # whatever anybody writes lies here; gradio serves what is in its own part of it
        os.environ |= {"GRADIO_TEMP_DIR": f"{folder}/served", "GRADIO_ANALYTICS_ENABLED": "False"}
        gr = server_library("gradio", given.host, given.port)
        from pipeline import MouseFaceLift, import_stage1

        import_stage1()
        model = MouseFaceLift.load(device=given.device, **vars(from_arguments(Checkpoints, given)))
        page = build(gr, model, Path(folder, "result"), given.turntable_views)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is there
        page.launch(
            server_name=given.host, server_port=given.port, share=False, quiet=True, prevent_thread_lock=True,
            max_file_size="20mb", footer_links=[], run_history=False, ssr_mode=False, enable_monitoring=False,
            theme=gr.themes.Default(font="sans-serif", font_mono="monospace"),  # the default's come from the network
            css="canvas {background: white !important}",
        )  # fmt: skip
        print(f"http://{given.host}:{given.port} (Ctrl-C ends it)", flush=True)
        stop.in_loop = True
        while not stop.is_due():
            time.sleep(0.2)


if __name__ == "__main__":
    main_guard(main)
    leave()
