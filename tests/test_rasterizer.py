"""The rasterizer backends against the float64 oracle, and the renderer around them."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gslrm.model.gaussians import Gaussians
from gslrm.model.gaussians_renderer import RenderOutput, render, render_turntable
from multiview.cameras import Cameras
from tests import oracle_rasterizer as oracle
from tests.gaussian_scenes import concatenate

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("xyz", "features", "scaling", "rotation", "opacity")
# Of images in proportion to their largest value, if that is above 1; relative L2 for gradients.
IMAGE_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5


def scene(b=1, n=100, degree=0, log_scale=-3.0, logit=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=g)

    return Gaussians(
        xyz=normal(b, n, 3) * 0.5, features=normal(b, n, (degree + 1) ** 2, 3) * 0.5,
        scaling=normal(b, n, 3) * 0.6 + log_scale, rotation=normal(b, n, 4), opacity=normal(b, n, 1) * 2 + logit,
    )  # fmt: skip


def cameras_for(b=1, v=2, height=40, width=56, shift=(3.3, -2.2), elevation_deg=20.0, distance=2.7, hfov_deg=50.0):
    """Cameras [b, v] with a picture that is not square and a principal point off its centre."""
    azimuth_deg = -torch.arange(b * v, dtype=torch.float64) * 360.0 / (b * v)
    focal = 0.5 / math.tan(math.radians(hfov_deg) / 2)
    ring = Cameras.orbit(azimuth_deg, torch.full_like(azimuth_deg, elevation_deg), distance, focal, 48)
    fxfycxcy = ring.fxfycxcy + torch.tensor([0.0, 2.0, 4.0 + shift[0], -4.0 + shift[1]])
    return Cameras(ring.c2w.view(b, v, 4, 4), fxfycxcy.view(b, v, 4), height, width)


def one_camera(size=32, distance=2.0):
    """At z = -distance, looking along +z, axes those of the world; focal = size."""
    c2w = torch.eye(4)
    c2w[2, 3] = -distance
    return Cameras(c2w[None, None], torch.tensor([[[size, size, size / 2, size / 2]]]).float(), size, size)


def single(xyz=(0.0, 0.0, 0.0), sigma=0.1, opacity=0.8, color=(1.0, 0.5, 0.0)):
    """One round Gaussian of a given colour."""
    features = (torch.tensor(color) - 0.5) / 0.28209479177387814
    return Gaussians(
        xyz=torch.tensor(xyz).view(1, 1, 3), features=features.view(1, 1, 1, 3),
        scaling=torch.full((1, 1, 3), math.log(sigma)), rotation=torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 4),
        opacity=torch.full((1, 1, 1), math.log(opacity / (1 - opacity))),
    )  # fmt: skip


def both_with_gradients(gaussians, cameras, background, seed=1):
    """(outputs, gradients) of the CPU backend and of the oracle, for one random linear loss on all three outputs."""
    g = torch.Generator().manual_seed(seed)
    shape = (*cameras.shape, 5, cameras.height, cameras.width)
    weights = torch.randn(shape, generator=g).double()
    results = []
    for function in (lambda *a: render(*a, backend="cpu"), oracle.rasterize):
        leaves = [getattr(gaussians, name).clone().requires_grad_() for name in NAMES]
        tensors = [*leaves, background.clone().requires_grad_()]
        outputs = function(Gaussians(*leaves), cameras, tensors[-1])
        loss = (torch.cat([output.double() for output in outputs], dim=2) * weights).sum()
        results.append((outputs, torch.autograd.grad(loss, tensors)))
    return results


def assert_agree(gaussians, cameras, background, slack=1):
    (ours, our_gradients), (exact, exact_gradients) = both_with_gradients(gaussians, cameras, background)
    for name, a, e in zip(RenderOutput._fields, ours, exact):
        assert a.shape == e.shape and a.dtype == torch.float32
        error = ((a - e).abs().max() / e.abs().max().clamp_min(1.0)).item()
        assert error < slack * IMAGE_TOLERANCE, f"{name}: {error:.2g}"
    for name, a, e in zip((*NAMES, "background"), our_gradients, exact_gradients):
        error = ((a - e).norm() / e.norm().clamp_min(1e-12)).item()
        assert error < GRADIENT_TOLERANCE, f"gradient of {name}: {error:.2g}"


def border_scene(degree):
    """Centers on and outside all four sides, beyond the clamp of the Jacobian, some large enough to reach inside."""
    gaussians = scene(n=160, degree=degree, log_scale=-2.0, logit=1.0, seed=4)
    cameras = cameras_for(v=1, shift=(21, -17))
    angle, distance = torch.linspace(0, 2 * torch.pi, 160), torch.linspace(0.8, 2.0, 160).roll(40)
    right, down = cameras.c2w[0, 0, :3, :2].T
    ring = angle.cos()[:, None] * right + 0.8 * angle.sin()[:, None] * down
    gaussians.xyz[0] = 0.8 * distance[:, None] * ring + 0.1 * gaussians.xyz[0]
    uv = cameras[0].project(gaussians.xyz)[0][0] / torch.tensor([56.0, 40.0])
    assert 30 < ((uv < 0) | (uv > 1)).any(dim=-1).sum() < 130 and uv.min() < -0.15 and uv.max() > 1.15
    return gaussians, cameras


def inside_scene():
    """Cameras among the Gaussians: some behind, some before the near plane, some far outside the image."""
    gaussians, cameras = scene(n=200, log_scale=-3.5, seed=3), cameras_for(v=3, distance=0.5, hfov_deg=70)
    _, z = cameras[0].project(gaussians.xyz.expand(3, -1, -1))
    assert (z < 0.01).any() and (z > 0.01).any()
    return gaussians, cameras


def needles():
    gaussians = scene(n=80, seed=11)
    gaussians.scaling[..., 0], gaussians.scaling[..., 1:] = -0.7, -6.0
    return gaussians, cameras_for(v=2)


def other_scene(log_scale, logit):
    return scene(n=350, log_scale=log_scale, logit=logit, seed=7), cameras_for(v=2)


SCENES = {
    **{f"degree {k}": lambda k=k: (scene(b=2, n=120, degree=k, seed=k), cameras_for(b=2, v=2)) for k in range(4)},
    "opaque, compositing stops early": lambda: other_scene(-2.0, 2.0),
    "large and faint": lambda: other_scene(-1.5, -1.0), "smaller than a pixel": lambda: other_scene(-4.5, 4.0),
    "inside": inside_scene, "border": lambda: border_scene(0), "border, degree 3": lambda: border_scene(3),
    "needles": needles,
}  # fmt: skip


@pytest.mark.parametrize("name", SCENES)
def test_cpu_agrees_with_the_oracle(name):
    gaussians, cameras = SCENES[name]()
    background = torch.rand((*cameras.shape, 3), generator=torch.Generator().manual_seed(5))
    # float32 conics of needles 100 times longer than wide lose a digit
    assert_agree(gaussians, cameras, background, slack=10 if name == "needles" else 1)


def test_gradients_match_finite_differences_of_the_picture_itself():
    """Not by way of the oracle: the loss as rendered, stepped along the gradient of every tensor."""
    gaussians, cameras = scene(n=30, log_scale=-1.5, logit=-1.0, degree=1, seed=2), cameras_for(v=1)
    target = torch.rand(1, 1, 3, 40, 56, generator=torch.Generator().manual_seed(1))

    def loss(g):
        output = render(g, cameras, 0.3)
        return ((output.rgb - target).double().square().sum() + output.depth.double().sum()).item()

    leaves = gaussians.map(lambda t: t.clone().requires_grad_())
    output = render(leaves, cameras, 0.3)
    ((output.rgb - target).square().sum() + output.depth.sum()).backward()
    for name in NAMES:
        direction = getattr(leaves, name).grad
        step = 1e-3 / direction.norm() * getattr(gaussians, name).norm()
        moved = [
            loss(Gaussians(**{n: getattr(gaussians, n) + (s * step * direction if n == name else 0) for n in NAMES}))
            for s in (-1, 1)
        ]
        slope = (moved[1] - moved[0]) / (2 * step.item())
        assert slope == pytest.approx(direction.double().square().sum().item(), rel=0.02), name


def test_one_gaussian_has_the_colour_alpha_and_depth_of_the_formulas():
    # sigma 0.1 at z = 2, focal 32: 1.6 px, so variance 1.6^2 + 0.3; the centre falls on the corner of four pixels.
    output = render(single(), one_camera(), background=1.0)
    alpha = 0.8 * math.exp(-0.25 / (1.6**2 + 0.3))
    centre = output.rgb[0, 0, :, 15:17, 15:17]
    expected = alpha * torch.tensor([1.0, 0.5, 0.0]) + (1 - alpha)
    torch.testing.assert_close(centre, expected[:, None, None].expand(3, 2, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(output.alpha[0, 0, 0, 15, 15].item(), alpha, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.depth[0, 0, 0, 15, 15].item(), alpha * 2.0, atol=1e-6, rtol=0)
    assert output.alpha[0, 0, 0, 0, 0] == 0 and (output.rgb[0, 0, :, 0, 0] == 1).all()


def test_axes_are_opencv():
    """+x is to the right, +y down, and the nearer Gaussian hides the farther one whatever their order."""
    camera = one_camera()
    right = render(single(xyz=(0.5, 0.25, 0.0)), camera).alpha[0, 0, 0]
    row, column = divmod(right.argmax().item(), 32)
    assert row in (19, 20) and column in (23, 24)
    near, far = single(xyz=(0, 0, -0.5), opacity=0.999), single(xyz=(0, 0, 0.5), opacity=0.999, color=(0, 0, 1))
    for first, second in ((near, far), (far, near)):
        together = Gaussians(*[torch.cat([getattr(first, n), getattr(second, n)], dim=1) for n in NAMES])
        centre = render(together, camera, 0.0).rgb[0, 0, :, 16, 16]
        assert centre[0] > 0.9 and centre[2] < 0.1


def test_equal_depths_are_drawn_in_the_order_of_the_index():
    a, b = single(color=(1, 0, 0), opacity=0.9), single(color=(0, 0, 1), opacity=0.9)
    for first, second, channel in ((a, b, 0), (b, a, 2)):
        together = Gaussians(*[torch.cat([getattr(first, n), getattr(second, n)], dim=1) for n in NAMES])
        centre = render(together, one_camera(), 0.0).rgb[0, 0, :, 16, 16]
        assert centre[channel] > 0.5 > centre[2 - channel]


def test_alpha_is_clamped_and_faint_gaussians_are_skipped():
    opaque = single()
    opaque.opacity[:] = 20.0
    opaque.scaling[:] = 2.0
    assert render(opaque, one_camera()).alpha.max().item() == pytest.approx(0.999, abs=1e-6)
    assert render(single(opacity=0.0039), one_camera()).alpha.max() == 0
    assert render(single(opacity=0.0041, sigma=3.0), one_camera()).alpha.max() > 0


def test_backgrounds_of_every_shape_fill_an_empty_scene():
    for background in (0.25, torch.full((3,), 0.25), torch.full((2, 3), 0.25)):
        output = render(scene(b=2, n=0), cameras_for(b=2, v=3), background)
        assert output.rgb.shape == (2, 3, 3, 40, 56) and (output.rgb == 0.25).all()
        assert (output.alpha == 0).all() and (output.depth == 0).all()
    background = torch.zeros(3, requires_grad=True)
    render(scene(n=0), cameras_for(v=2), background).rgb.sum().backward()
    assert (background.grad == 2 * 40 * 56).all()


def picture_and_gradients(gaussians, cameras):
    leaves = gaussians.map(lambda t: t.clone().requires_grad_())
    output = render(leaves, cameras, 0.5)
    (output.rgb.square().sum() + output.depth.sum()).backward()
    return [*(t.detach() for t in output), *(getattr(leaves, name).grad for name in NAMES)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("views", [1, 3], ids=["tiles in parallel", "pictures in parallel"])
def test_results_do_not_depend_on_the_number_of_threads(threads, views):
    gaussians, cameras = scene(n=2000, log_scale=-2.5), cameras_for(v=views)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(picture_and_gradients(gaussians, cameras))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return render(scene(n=50, seed=index), cameras_for(v=1)).rgb


def test_rendering_works_in_forked_data_loader_workers(threads):
    """The parent has rendered with threads, which do not exist in a forked child."""
    threads(2)
    expected = [Pictures()[index] for index in range(2)]
    loader = torch.utils.data.DataLoader(
        Pictures(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    assert all(torch.equal(a, b) for a, b in zip(loader, expected))


def test_padding_is_left_out_before_anything_is_sorted(monkeypatch):
    from gslrm.model.rasterizers import cpu

    real, cameras = scene(n=200, log_scale=-2.5, logit=2.0), cameras_for(v=1)
    padding = scene(n=300, seed=9)
    padding.opacity[:] = -30.0
    draw, orders = cpu._draw, []

    def recorded(*arguments):
        kept = draw(*arguments)
        orders.append(kept[5])
        return kept

    monkeypatch.setattr(cpu, "_draw", recorded)
    alone, padded = (picture_and_gradients(g, cameras) for g in (real, concatenate(padding, real)))
    assert len(orders[0]) > 150 and (orders[1] == orders[0] + 300).all()
    assert all(torch.equal(a, e) for a, e in zip(padded[:3], alone[:3]))
    for a, e in zip(padded[3:], alone[3:]):
        assert torch.equal(a[:, 300:], e) and (a[:, :300] == 0).all()


def test_values_that_are_not_finite_make_the_whole_picture_nan():
    gaussians = scene(b=2, n=20)
    gaussians.scaling[0, 3, 1] = torch.nan
    output = render(gaussians, cameras_for(b=2, v=1))
    assert output.rgb[0].isnan().all() and output.rgb[1].isfinite().all()


def test_extreme_values_neither_crash_nor_spread():
    gaussians = scene(n=6)
    gaussians.xyz[0, 0] = 1e8
    gaussians.scaling[0, 1] = 30.0
    gaussians.scaling[0, 2] = -60.0
    gaussians.rotation[0, 3] = 0.0
    gaussians.opacity[0, 4] = -100.0
    gaussians.opacity[0, 5] = 100.0
    assert all(t.isfinite().all() for t in picture_and_gradients(gaussians, cameras_for(v=2)))


def test_half_precision_inputs_and_autocast_render_in_float32():
    gaussians, cameras = scene(n=50, degree=1), cameras_for(v=1)
    plain = render(gaussians, cameras).rgb
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(render(gaussians, cameras).rgb, plain)
    rounded = gaussians.to(torch.bfloat16)
    assert torch.equal(render(rounded, cameras).rgb, render(rounded.to(torch.float32), cameras).rgb)


def test_wrong_arguments_are_refused_by_name():
    gaussians, cameras = scene(n=5), cameras_for(v=2)
    moving = Cameras(cameras.c2w.clone().requires_grad_(), cameras.fxfycxcy, 40, 56)
    for seen, options, message in (
        (cameras[0], {}, r"cameras must have shape \[b, v\] with b = 1"),
        (cameras, {"backend": "inria"}, "backend must be one of auto, gsplat, cpu"),
        (cameras, {"background": torch.ones(4)}, "background"), (moving, {}, "no gradients for cameras"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            render(gaussians, seen, **options)


FIRST_IMAGE = """
import sys, gslrm.model.gaussians_renderer
assert not {"numba", "gsplat"} & set(sys.modules)  # importing the renderer loads neither
from gslrm.model.rasterizers import compositing, projection, warm_up
kernels = compositing.composite, compositing.bin_tiles, compositing.depth_order, projection.project
warm_up.compile_kernels()
compiled = [list(kernel.signatures) for kernel in kernels]
from tests.test_rasterizer import cameras_for, render, scene, torch
with torch.no_grad(): render(scene(n=5), cameras_for(v=1))
assert compiled == [list(kernel.signatures) for kernel in kernels] and all(compiled), compiled
"""


def test_kernels_are_compiled_beforehand_for_the_types_that_are_drawn():
    done = subprocess.run([sys.executable, "-c", FIRST_IMAGE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_work_where_no_cache_can_be_written(monkeypatch):
    from numba.core.dispatcher import Dispatcher

    from gslrm.model.rasterizers.projection import kernel

    def enable_caching(self):
        raise RuntimeError("cannot cache function: no locator available for file")

    monkeypatch.setattr(Dispatcher, "enable_caching", enable_caching)
    assert kernel()(lambda x: x + 1)(2) == 3


def test_turntable_cameras_are_facelifts():
    golden = load_file(ROOT / "tests" / "golden" / "cameras" / "turntable.safetensors")
    for name, views, size, elevation_deg, every in (
        ("render_turntable_8_at_384", 8, 384, 0.0, 1), ("render_turntable_150", 150, 512, 0.0, 30),
        ("defaults_8", 8, 384, 20.0, 1),
    ):  # fmt: skip
        cameras = Cameras.turntable(views, size, elevation_deg=elevation_deg)
        torch.testing.assert_close(cameras.c2w[::every].double(), golden[f"{name}.c2w"], atol=1e-6, rtol=0)
        torch.testing.assert_close(cameras.fxfycxcy[::every].double(), golden[f"{name}.fxfycxcy"], atol=1e-4, rtol=0)


def test_render_turntable_gives_the_frames_of_its_cameras():
    gaussians, seen = scene(n=40), []
    frames = render_turntable(
        gaussians, 5, 32, elevation_deg=20.0, background=0.0, on_frame=lambda done, total: seen.append((done, total))
    )
    assert frames.shape == (5, 3, 32, 32) and frames.min() >= 0 and frames.max() <= 1 and not frames.requires_grad
    expected = render(gaussians, Cameras.turntable(5, 32, elevation_deg=20.0)[None], 0.0).rgb[0].clamp(0, 1)
    assert torch.equal(frames, expected)
    assert seen == [(i, 5) for i in range(1, 6)]
    with pytest.raises(ValueError, match="b = 2"):
        render_turntable(scene(b=2, n=5), 3, 16)
