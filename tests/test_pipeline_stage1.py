"""How both stages run Stage 1: its options, and a UNet that is told its cameras."""

import json
import shutil

import pytest
import torch
from mvdiffusion_tiny import UNET
from pipeline_tiny import prepare_pipeline, write_gslrm

from multiview.files import write_json
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


def test_a_unet_says_how_it_is_sampled(tiny, tmp_path, caplog):
    shutil.copytree(tiny["unet"], tmp_path / "unet")
    write_json(tmp_path / "unet" / SAMPLING_FILE, {**Sampling(7, num_draws=2)._asdict(), "mirror": "auto"})
    for options, draws in ((None, 2), (Stage1Options(num_draws=1), 1)):
        artifacts = load(tiny, options, mvdiffusion_checkpoint=tmp_path / "unet", num_steps=None).artifacts
        assert (artifacts.num_steps, artifacts.options.num_draws) == (7, draws)
    assert "mirrored photographs, which are no longer tried" in caplog.text


def test_options_reach_the_components_and_the_record(tiny):
    options = Stage1Options(sampler="dpm++", vae_slicing=True, channels_last=True, cpu_offload=True)
    model = load(tiny, options)
    components = model.components
    assert components.offload and components.vae.use_slicing
    assert components.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert json.loads(json.dumps(model.artifacts.describe()))["stage1_options"]["sampler"] == "dpm++"
    fast, usual = (one.generate(tiny["photo"], seed=0, keep_input_view=False).rgb for one in (model, load(tiny)))
    assert not torch.equal(fast, usual)


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
