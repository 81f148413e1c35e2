"""Camera conditioning: no effect until trained, then it tells views apart that nothing else does, and in between."""

import json

import pytest
import torch
from mvdiffusion_tiny import UNET, unet_inputs
from safetensors.torch import load_file

from multiview.cameras import Cameras, axis_rotation
from multiview.rig import load_rig
from mvdiffusion.models.camera_conditioning import FEATURES, camera_features, camera_rays, is_camera_weight
from mvdiffusion.models.unet import create_unet, load_unet, run_unet, save_unet

MODES = ("adaln", "cross_attention", "concat")
SMALL = {
    **UNET, "sample_size": 4, "block_out_channels": [16], "attention_head_dim": [2],
    "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"],
}  # fmt: skip


def orbit(azimuths, elevation=20.0):
    azimuths = torch.as_tensor(azimuths, dtype=torch.float64)
    return Cameras.orbit(azimuths, torch.full_like(azimuths, elevation), torch.tensor(2.7), 1.072, 32)


@torch.no_grad()
def predict(unet, cameras, batch=6, reference_view=0, **changes):
    return run_unet(unet, step=500, cameras=cameras, reference_view=reference_view, **{**unet_inputs(batch), **changes})


def disturb(unet):
    """Gives the zero-initialised camera layers weights, so that they have an effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in unet.named_parameters():
            if is_camera_weight(name) and not tensor.any():
                tensor.normal_(std=0.1, generator=generator)
    return unet


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    save_unet(create_unet(UNET, 6, "sparse"), folder, load_rig("mouse6"))
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_a_pretrained_unet_is_unchanged_until_trained(plain, mode, tmp_path):
    rig = load_rig("mouse6")
    cameras, stock = rig.cameras(32)[None], load_unet(plain)
    unet = load_unet(plain, camera_conditioning=mode)
    assert torch.equal(predict(unet, cameras), predict(stock, None))
    changed = predict(disturb(unet), cameras)
    assert (changed - predict(stock, None)).flatten(1).abs().amax(1).min() > 1e-3

    save_unet(unet, tmp_path / "unet", rig)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert config["camera_conditioning"] == mode and config["_class_name"] == "CameraUNet"
    assert torch.equal(predict(load_unet(tmp_path / "unet"), cameras), changed)
    stored = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    own = load_file(plain / "diffusion_pytorch_model.safetensors")
    assert {name for name in stored if not is_camera_weight(name)} == set(own)
    with pytest.raises(ValueError, match=f"was trained with camera_conditioning {mode}"):
        load_unet(tmp_path / "unet", camera_conditioning="adaln" if mode != "adaln" else "concat")
    with pytest.raises(ValueError, match=r"needs cameras \[b, n\]"):
        predict(unet, None)


@pytest.mark.parametrize("mode", MODES)
def test_every_new_weight_learns_also_with_recomputed_blocks(mode):
    torch.manual_seed(0)
    unet = disturb(create_unet(UNET, 3, "sparse", mode)).train()
    cameras = orbit([[0, 60, 120], [10, 90, 270]])
    gradients = []
    for prepare in (unet.zero_grad, unet.enable_gradient_checkpointing):
        prepare()
        unet.zero_grad()
        prediction = run_unet(unet, step=torch.full((6,), 500), cameras=cameras, reference_view=0, **unet_inputs(6))
        prediction.square().mean().backward()
        found = {name: p.grad.clone() for name, p in unet.named_parameters() if is_camera_weight(name)}
        assert found and all(gradient.abs().max() > 0 for gradient in found.values())
        gradients.append(found)
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


@pytest.mark.parametrize("mode", MODES)
def test_any_views_any_reference_any_world_frame(mode):
    torch.manual_seed(0)
    unet = disturb(create_unet(UNET, 6, "sparse", mode)).eval()
    azimuths = [0, 40, 95, 180]
    four = predict(unet, orbit([azimuths]), batch=4)
    assert torch.allclose(predict(unet, orbit([azimuths]).rotate(77.0), batch=4), four, atol=1e-5)
    # The guidance halves share the cameras.
    twice = {name: torch.cat([value, value]) for name, value in unet_inputs(4).items()}
    assert torch.allclose(predict(unet, orbit([azimuths]), **twice), torch.cat([four, four]), atol=1e-5)
    # The reference moved to the end of the list: the same views, in another order.
    order = [1, 2, 3, 0]
    moved = {name: value[order] for name, value in unet_inputs(4).items()}
    last = predict(unet, orbit([[azimuths[i] for i in order]]), reference_view=3, **moved)
    assert torch.allclose(last, four[order], atol=1e-5)
    assert (predict(unet, orbit([azimuths]), batch=4, reference_view=2) - four).abs().max() > 1e-3
    with pytest.raises(ValueError, match="multiple of the cameras' objects x views = 4, got 6"):
        predict(unet, orbit([azimuths]))
    with pytest.raises(ValueError, match="6 views it was trained with, got 4 cameras"):
        predict(create_unet(UNET, 6, "sparse"), orbit([azimuths]))


def test_features_say_where_a_camera_stands_and_looks():
    rig = load_rig("mouse6")
    cameras = rig.cameras(64)
    features = camera_features(cameras, 0)
    assert features.shape == (6, FEATURES) and features.abs().max() < 2
    assert torch.allclose(features, camera_features(cameras.rotate(123.0), 0), atol=1e-5)
    distances = torch.cdist(features, features) + 10 * torch.eye(6)
    assert distances.min() > 0.5
    # Each of these changes what the image shows, so each must change the description.
    turned = cameras.c2w.clone()
    turned[:, :3, :3] = turned[:, :3, :3] @ axis_rotation(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(0.1))
    for other in (
        rig.with_framing("fill").cameras(64),  # distance and focal length
        cameras.crop(8, 0, 64, 64),  # principal point
        cameras.recentre(torch.tensor([0.0, 0.0, 0.3]), 1.0),  # looks past the origin
        Cameras(turned, cameras.fxfycxcy, 64, 64),  # tilted
        orbit([0, 60, 120, 180, 240, 300], elevation=15.0),
    ):
        assert (camera_features(other, 0) - features).abs().amax(1).min() > 0.02
    assert torch.allclose(camera_features(cameras.resize(512, 512), 0), features, atol=1e-5)


def test_rays_are_the_cameras_own_in_the_reference_frame():
    cameras = orbit([[30.0, 75.0, 200.0], [0.0, 10.0, 20.0]])
    rays = camera_rays(cameras, 1, 4)
    at_zero = Cameras(cameras.rotate(-75.0).c2w[:1], cameras.fxfycxcy[:1], 32, 32)  # the reference stood at 75 degrees
    assert torch.allclose(rays[:1], camera_rays(at_zero, 1, 4), atol=1e-5)
    origins, directions = at_zero.resize(4, 4).rays()
    assert torch.allclose(rays[0, :, :3], directions[0].movedim(-1, -3), atol=1e-5)
    assert rays.shape == (2, 3, 6, 4, 4)
    direction, moment = rays[:, :, :3], rays[:, :, 3:]
    assert torch.allclose(direction.norm(dim=2), torch.ones(2, 3, 4, 4))
    assert (direction * moment).sum(2).abs().max() < 1e-6
    # Distance of each ray from the origin: the sine of its angle to the optical axis times 2.7, in units of 2.7.
    offset = (torch.arange(4) + 0.5 - 2) / (1.072 * 4)
    squared = offset[:, None] ** 2 + offset[None] ** 2
    assert torch.allclose(moment.norm(dim=2), (squared / (1 + squared)).sqrt().expand(2, 3, 4, 4), atol=1e-4)


def colors(azimuths_deg):
    """[...] -> constant latents [..., 4, 4, 4] whose value depends on the azimuth alone."""
    azimuth = torch.deg2rad(azimuths_deg)
    values = torch.stack([azimuth.cos(), azimuth.sin(), (azimuth + 0.8).cos() / 2, (azimuth - 0.8).sin() / 2], dim=-1)
    return values[..., None, None].expand(*values.shape, 4, 4).float()


def generate(unet, azimuths, generator):
    """Predictions [objects, views, 4, 4, 4] from pure noise; prompts, labels and image are the same everywhere."""
    objects, views = azimuths.shape
    noise = torch.randn(objects * views, 4, 4, 4, generator=generator)
    prediction = run_unet(
        unet, torch.cat([noise, torch.zeros_like(noise)], 1), 999, prompts=torch.ones(objects * views, 7, 16),
        labels=torch.ones(objects * views, 16), cameras=orbit(azimuths), reference_view=0,
    )  # fmt: skip
    return prediction.unflatten(0, (objects, views))


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_only_cameras_tell_these_views_apart(mode, one_thread):
    """Error of the generated colors over their variance: about 1 where the views look alike to the model.

    Trained on azimuths of multiples of 30 degrees, but for 90 and 240.
    """
    torch.manual_seed(0)
    steps = 30 if mode == "none" else 120
    unet = create_unet(SMALL, 4, "sparse", mode).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    allowed = 30.0 * torch.tensor([1, 2, 4, 5, 6, 7, 9, 10, 11])
    for _ in range(steps):
        drawn = allowed[torch.randint(len(allowed), (4, 3), generator=generator)]
        azimuths = torch.cat([torch.zeros(4, 1), drawn], dim=1)
        loss = (generate(unet, azimuths, generator) - colors(azimuths)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    errors, generator = [], torch.Generator().manual_seed(1)
    for azimuths in ([0.0, 60.0, 150.0, 330.0], [0.0, 90.0, 240.0, 75.0]):  # trained; never trained
        azimuths = torch.tensor([azimuths]).expand(16, 4)
        wanted = colors(azimuths)[:, 1:]
        with torch.no_grad():
            errors.append(float((generate(unet.eval(), azimuths, generator)[:, 1:] - wanted).square().mean()))
        errors[-1] /= float(wanted.square().mean())
    assert errors[0] > 0.8 if mode == "none" else errors[0] < 0.15 and errors[1] < 0.3, errors
