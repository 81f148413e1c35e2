"""Both stages behind one door: one photograph of a mouse, or posed views of it, to 3D Gaussians.

    from pipeline import MouseFaceLift
    model = MouseFaceLift.load()                 # the demo models; name checkpoints for others
    result = model("mouse.png")                  # path, PIL image, array [h, w, 3|4] uint8 or tensor [4, h, w] 0..1
    result.save("outputs/mouse")                 # as inference_mouse.py
    result.gaussians, result.numpy()             # tensors; arrays
    result.render(cameras).rgb                   # cameras: multiview.cameras.Cameras [v]
    model.reconstruct(views, masks, cameras)     # posed views of your own, refined; refine="off": Stage 2 alone
Importing this takes no time: torch and the models come with the first name that is asked for.
"""

import atexit
import gc
import sys


def __getattr__(name: str):
    # The entry scripts import pipeline.options before they parse: --help must not wait for torch.
    if name not in ("MouseFaceLift", "PhotographError", "Reconstruction"):
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from pipeline import model

    return getattr(model, name)


def import_stage1() -> None:
    """Imports Stage 1's libraries, in 4 s instead of 7. For commands alone, whose process nobody else uses."""
    if "diffusers" in sys.modules:
        return
    # diffusers and transformers import these where they are installed, and use them for nothing that runs here.
    hidden = {"peft", "scipy", "torchvision"} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # None: not installed
    gc.disable()  # each collection would look through all modules again
    try:
        import mvdiffusion.checkpoints  # noqa: F401
    finally:
        gc.freeze()  # nor later ones look through them, until the process ends
        atexit.register(gc.unfreeze)
        gc.enable()
        for name in hidden:
            del sys.modules[name]
