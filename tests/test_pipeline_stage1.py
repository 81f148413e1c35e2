"""How both stages run Stage 1: mirroring, several seeds, and a UNet that is told its cameras."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from mvdiffusion_tiny import UNET
from pipeline_tiny import prepare_pipeline, write_gslrm

from gslrm.model.gaussians_renderer import render
from multiview.cameras import Cameras
from multiview.files import write_json
from multiview.metrics import view_consistency
from multiview.rig import RigMismatchError, load_rig
from multiview.sample import read_sample, read_split
from mvdiffusion.checkpoints import SAMPLING_FILE, Sampling
from mvdiffusion.models.unet import create_unet, save_unet
from mvdiffusion.prompts import write_prompt_embeds
from pipeline import MouseFaceLift
from pipeline.options import Stage1Options


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    paths = prepare_pipeline(tmp_path_factory.mktemp("pipeline"))
    return {**paths, "photo": read_sample(read_split(paths["data"])[0]).rgba[0]}


def load(tiny, options=None, stages="1", **changes) -> MouseFaceLift:
    files = {"mvdiffusion_checkpoint": "unet", "mvdiff_pretrained": "components", "prompt_embeds": "embeds"}
    files |= {} if stages == "1" else {"checkpoint": "gslrm"}
    chosen = {"num_steps": 2, **{key: tiny[name] for key, name in files.items()}, **changes}
    return MouseFaceLift.load(device="cpu", stages=stages, options=options, **chosen)


def changed(model: MouseFaceLift, **options) -> MouseFaceLift:
    artifacts = replace(model.artifacts, options=Stage1Options(**options))
    return MouseFaceLift(artifacts, model.components, model.network, model.device)


def test_a_mirrored_photograph_gives_the_mirrored_animal(tiny):
    """Views from its mirror image, mirrored back, are those of the mirrored photograph; so are the Gaussians."""
    plain = load(tiny, stages="full")
    assert plain.artifacts.options.mirror == "never"
    own, flipped = (plain.generate(photo, seed=0) for photo in (tiny["photo"], tiny["photo"].flip(-1)))
    mirrored, chosen = (changed(plain, mirror=way).generate(tiny["photo"], seed=0) for way in ("always", "auto"))
    assert mirrored.mirrored and torch.equal(mirrored.rgb, flipped.rgb.flip(-1)[plain.rig.mirror_order()])
    assert torch.equal(mirrored.rgb[0], own.rgb[0]) and not torch.equal(mirrored.rgb[1], own.rgb[1])
    # The views go in in another order, so the Gaussians come out in another one: compare what is seen.
    cameras = Cameras.orbit(torch.tensor([30.0, 200.0]), torch.tensor([20.0, 20.0]), 2.7, 1.07, 32)[None]
    picture = render(plain.predict(mirrored), cameras).rgb
    expected = render(plain.predict(flipped), cameras.mirrored()).rgb.flip(-1)
    torch.testing.assert_close(picture, expected, atol=2e-3, rtol=0)
    scores = tuple(view_consistency(views.rgb, views.masks, views.cameras)["score"] for views in (own, mirrored))
    assert chosen.mirror_scores == pytest.approx(scores) and chosen.mirrored == (scores[1] > scores[0])
    assert torch.equal(chosen.rgb, (mirrored if chosen.mirrored else own).rgb)


def test_a_unet_says_whether_photographs_are_mirrored(tiny, tmp_path):
    shutil.copytree(tiny["unet"], tmp_path / "unet")
    write_json(tmp_path / "unet" / SAMPLING_FILE, Sampling(mirror="auto")._asdict())
    for options, mirror in ((None, "auto"), (Stage1Options(mirror="never"), "never")):
        assert load(tiny, options, mvdiffusion_checkpoint=tmp_path / "unet").artifacts.options.mirror == mirror


def test_options_reach_the_components_and_the_record(tiny):
    options = Stage1Options(sampler="dpm++", vae_slicing=True, channels_last=True, cpu_offload=True)
    model = load(tiny, options)
    components = model.components
    assert components.offload and components.vae.use_slicing
    assert components.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert json.loads(json.dumps(model.artifacts.describe()))["stage1_options"]["sampler"] == "dpm++"
    fast, usual = (one.generate(tiny["photo"], seed=0, keep_input_view=False).rgb for one in (model, load(tiny)))
    assert not torch.equal(fast, usual)


def test_several_seeds_keep_the_most_consistent_set(tiny):
    single, scores = load(tiny), {}
    best = changed(single, num_seeds=2).generate(tiny["photo"], seed=5)
    assert list(best.seed_scores) == [5, 6]
    for seed in best.seed_scores:
        views = single.generate(tiny["photo"], seed=seed)
        scores[seed] = view_consistency(views.rgb, views.masks, views.cameras)["score"]
        assert views.seed_scores is None
        if seed == max(best.seed_scores, key=best.seed_scores.get):
            assert torch.equal(views.rgb, best.rgb) and torch.equal(views.masks, best.masks)
    assert best.seed_scores == pytest.approx(scores)


@pytest.mark.parametrize(("rig", "conditioning"), [("uniform6", "adaln"), ("uniform4", "concat")])
def test_a_unet_that_is_told_its_cameras_generates_another_rig_when_asked(tiny, tmp_path, rig, conditioning):
    """Other directions, or another number of views: what a UNet without camera conditioning is refused for."""
    wanted = load_rig(rig)
    torch.manual_seed(0)
    save_unet(create_unet(UNET, 6, "sparse", conditioning), tmp_path / "unet", load_rig("mouse6"))
    write_prompt_embeds(tmp_path / "embeds", tiny["components"], wanted, "mouse", angles=False)
    others = {"prompt_embeds": tmp_path / "embeds", "checkpoint": write_gslrm(tmp_path / "gslrm", wanted)}
    model = load(tiny, stages="full", rig=rig, mvdiffusion_checkpoint=tmp_path / "unet", **others)
    assert model.rig.name == rig and len(model.generate(tiny["photo"], seed=0).rgb) == wanted.num_views
    with pytest.raises(RigMismatchError):
        load(tiny, stages="full", rig=rig, **others)
    with pytest.raises(RigMismatchError):  # not stated, so not meant
        load(tiny, stages="full", mvdiffusion_checkpoint=tmp_path / "unet", **others)
