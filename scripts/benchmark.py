"""Times of the rasterizer and of the GS-LRM with random weights: medians, as a Markdown table.

Wall times; run it on a quiet machine. Scenes: `trained-like` is an ellipsoid shell of mostly opaque splats of about one
point spacing, `untrained` is uniform in +-0.6 with scale 0.1 and opacity logit -2.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import main_guard

SCENES = {"demo": ((20_000, 128), (100_000, 128), (100_000, 256)), "full": ((100_000, 256), (400_000, 512))}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("demo", "full"), default="demo", help="sizes (default: demo)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs after one that warms up (default: 9)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import torch

    from multiview.run import resolve_device

    device = resolve_device(arguments.device)
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, median of {arguments.repeats}\n")
    print("| what | forward, ms | forward + backward, ms |\n|---|---|---|")
    for name, make in (("trained-like", trained_like), ("untrained", untrained)):
        for count, size in SCENES[arguments.preset]:
            forward, both = time_rasterizer(make(count).to(device), size, arguments.repeats)
            print(f"| rasterizer, {name}, {count // 1000}k at {size} px | {forward:.0f} | {both:.0f} |")
    name, forward, both = time_gslrm(arguments.preset, device, arguments.repeats)
    print(f"| {name} | {forward:.0f} | {both:.0f} |")


def median_ms(run, device, repeats: int) -> float:
    import torch

    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[1:])


def trained_like(count: int):
    import torch

    from gslrm.model.gaussians import Gaussians

    g = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(1, count, 3, generator=g), dim=-1)
    return Gaussians(
        xyz=direction * torch.tensor([0.3, 0.6, 0.3]) + 0.005 * torch.randn(1, count, 3, generator=g),
        features=torch.randn(1, count, 1, 3, generator=g),
        scaling=torch.full((1, count, 3), (1.8 / count) ** 0.5).log() + 0.4 * torch.randn(1, count, 3, generator=g),
        rotation=torch.randn(1, count, 4, generator=g),
        opacity=1.5 + 1.5 * torch.randn(1, count, 1, generator=g),
    )


def untrained(count: int):
    import torch

    from gslrm.model.gaussians import Gaussians

    g = torch.Generator().manual_seed(0)
    return Gaussians(
        xyz=torch.rand(1, count, 3, generator=g) * 1.2 - 0.6,
        features=torch.randn(1, count, 1, 3, generator=g),
        scaling=torch.full((1, count, 3), 0.1).log(),
        rotation=torch.randn(1, count, 4, generator=g),
        opacity=torch.full((1, count, 1), -2.0),
    )


def time_rasterizer(gaussians, size: int, repeats: int) -> tuple[float, float]:
    import torch

    from gslrm.model.gaussians_renderer import render
    from multiview.cameras import Cameras

    cameras = Cameras.turntable(6, size)[None, :1].to(gaussians.device)
    leaves = gaussians.map(lambda tensor: tensor.clone().requires_grad_())

    def backward() -> None:
        output = render(leaves, cameras)
        (output.rgb.sum() + output.alpha.sum()).backward()

    with torch.no_grad():
        forward = median_ms(lambda: render(gaussians, cameras), gaussians.device, repeats)
    return forward, median_ms(backward, gaussians.device, repeats)


def time_gslrm(preset: str, device, repeats: int) -> tuple[str, float, float]:
    """The demo's network, or FaceLift's, on six views of one scene, nothing pruned."""
    import torch

    from gslrm.config import ImageTokenizerConfig, ModelConfig, TransformerConfig
    from gslrm.model.gslrm import GSLRM
    from multiview.rig import load_rig

    size, d, layers = (128, 256, 6) if preset == "demo" else (512, 1024, 24)
    config = ModelConfig(
        image_tokenizer=ImageTokenizerConfig(image_size=size), transformer=TransformerConfig(d=d, n_layer=layers)
    )
    model = GSLRM(config, grad_checkpoint_every=1 if preset == "full" else 0).to(device)
    images, cameras = torch.rand(1, 6, 3, size, size, device=device), load_rig("mouse6").cameras(size)[None].to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def run() -> torch.Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=device.type == "cuda"):
            return model(images, cameras).gaussians.xyz.square().mean()

    with torch.no_grad():
        forward = median_ms(run, device, repeats)
    name = f"GS-LRM d {d}, {layers} layers, six views of {size} px"
    return name, forward, median_ms(lambda: run().backward(), device, repeats)


if __name__ == "__main__":
    main_guard(main)
