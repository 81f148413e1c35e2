"""Stage 2's files against FaceLift's: what it wrote loads here, what is written here loads there."""

import argparse
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from gslrm_toys import start, toy_sample

from gslrm.checkpoints import export_weights, load_gslrm, resolve_checkpoint
from gslrm.config import IGNORED_KEYS, GSLRMConfig
from multiview.checkpoint import load_checkpoint, read_sidecar, sidecar_path
from multiview.config import load_config
from multiview.files import write_json
from multiview.rig import load_rig
from multiview.sample import write_dataset_info, write_sample, write_split

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "gslrm_small"
CHECKPOINT = GOLDEN / "ckpt_0000000000000007.pt"
RIG = load_rig("facelift6")


@pytest.fixture(scope="module")
def facelift():
    """FaceLift's own file."""
    return load_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def vgg(facelift):
    """Names and values of the loss network that FaceLift stores among the weights."""
    entries = json.loads((GOLDEN / "state_dict_keys_extra_when_perceptual_on.json").read_text())
    return {entry["name"]: torch.full((1,), 0.5 + i).expand(entry["shape"]) for i, entry in enumerate(entries)}


@pytest.fixture(scope="module")
def vgg_folder(vgg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vgg")
    content = {name.removeprefix("loss_calculator.perceptual_loss_module.net."): tensor for name, tensor in vgg.items()}
    torch.save(content, folder / "imagenet-vgg-verydeep-19.pt")
    return folder


def golden_config(folder) -> GSLRMConfig:
    overrides = [
        f"training.checkpointing.checkpoint_dir={folder}", f"training.checkpointing.resume_ckpt={CHECKPOINT}",
        "training.optimizer.reset_training_state=false", "training.runtime.device=cpu", "validation.enabled=false",
        f"training.dataset.dataset_path={folder}/data/train.txt", "training.losses.lpips_loss_weight=0",
        "training.losses.perceptual_loss_weight=0",
    ]  # fmt: skip
    return load_config(GSLRMConfig, GOLDEN / "config.yaml", overrides, ignored=set(IGNORED_KEYS))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """FaceLift's training state, resumed and saved here."""
    folder = tmp_path_factory.mktemp("resumed")
    write_sample(folder / "data" / "sample", toy_sample(0, RIG))
    write_dataset_info(folder / "data", RIG)
    write_split(folder / "data" / "train.txt", [folder / "data" / "sample"])
    state = start(golden_config(folder))
    state.save(False)
    return state, folder


def test_facelifts_training_state_is_resumed_and_written_back(resumed, facelift):
    state, folder = resumed
    assert (state.passes, state.updates) == (facelift["fwdbwd_pass_step"], facelift["param_update_step"])
    content = load_checkpoint(folder / CHECKPOINT.name)
    assert set(facelift) <= set(content) and set(content["model"]) == set(facelift["model"])
    for index, moments in facelift["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, content["optimizer"]["state"][index][name]), (index, name)


LAYOUTS = {  # prefix of names, whether VGG's tensors are among them, whether a state dict alone
    "facelift": ("", False, False), "with_vgg": ("", True, False), "ddp": ("module.", True, False),
    "compiled": ("_orig_mod.", True, False), "ddp of compiled": ("module._orig_mod.", True, False),
    "compiled ddp": ("_orig_mod.module.", True, False), "blocks": ("blocks", True, False), "bare": ("", False, True),
    "bare_ddp_with_vgg": ("module.", True, True),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_weights_loads_strictly(facelift, vgg, tmp_path, layout):
    prefix, with_vgg, is_bare = LAYOUTS[layout]
    names, path = {name: prefix + name for name in (*facelift["model"], *vgg)}, tmp_path / "ckpt_0000000000000001.pt"
    if layout == "blocks":  # each compiled by itself
        names = {name: re.sub(r"^(transformer_layers\.\d+)", r"\1._orig_mod", name) for name in names}
    tensors = {names[name]: tensor for name, tensor in {**facelift["model"], **(vgg if with_vgg else {})}.items()}

    def write():
        content = tensors if is_bare else {**facelift, "model": tensors, "args": argparse.Namespace(lr=1e-4)}
        torch.save(content, path, _use_new_zipfile_serialization=layout != "ddp")

    write()
    model, rig, found = load_gslrm(tmp_path, config_file=GOLDEN / "config.yaml")
    assert rig is None and found == path
    assert all(torch.equal(tensor, facelift["model"][name]) for name, tensor in model.state_dict().items())
    del tensors[names["input_layer_norm.weight"]]
    write()
    with pytest.raises(ValueError, match="missing: input_layer_norm.weight"):
        load_gslrm(path, config_file=GOLDEN / "config.yaml")


def test_files_that_cannot_be_used_are_refused_by_name(facelift, tmp_path):
    weights = {**facelift["model"], "input_layer_norm.weight": facelift["model"]["input_layer_norm.weight"].clone()}
    weights["input_layer_norm.weight"][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for content, message in (
        ({"epoch": 3, "args": {}}, "other.pt has no key 'model'.*keys: epoch, args"),
        ({"model": {"w": torch.eye(2).to_sparse()}}, "w holds no plain"),
        ({"w": torch.eye(2).int()}, "w holds no plain"),
        ({"model": weights}, "other.pt: 3 weights are not finite.*input_layer_norm.weight"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=message):
            load_gslrm(tmp_path / "other.pt", config_file=GOLDEN / "config.yaml")
    with pytest.raises(ValueError, match="ckpt_0000000000021125.pt does not exist.*FaceLift"):
        resolve_checkpoint(tmp_path / "ckpt_0000000000021125.pt")
    with pytest.raises(ValueError, match="no complete"):
        resolve_checkpoint(tmp_path)
    torch.save({"model": facelift["model"]}, path := tmp_path / CHECKPOINT.name)
    for sidecar in (None, {"config": {}}, {"config": {}, "rig": {}}):
        if sidecar is not None:
            write_json(sidecar_path(path), sidecar)
        with pytest.raises(ValueError, match="lacks its step, or a sidecar ckpt_0000000000000007.pt.json with config"):
            export_weights(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_whose_sidecar_is_a_stamped_rig_alone_loads(facelift, tmp_path, monkeypatch):
    """As `scripts/stamp_rig.py` leaves public weights: without a configuration FaceLift's own counts."""
    path = tmp_path / CHECKPOINT.name
    torch.save(facelift, path)
    write_json(sidecar_path(path), {"rig": RIG.to_dict()})
    monkeypatch.setattr("gslrm.checkpoints.ModelConfig", lambda: golden_config(tmp_path).model)
    _, rig, _ = load_gslrm(path)
    assert rig == RIG


def test_exports_for_facelift_have_exactly_its_names_shapes_and_bytes(resumed, facelift, vgg, vgg_folder, tmp_path):
    _, folder = resumed
    plain = load_checkpoint(export_weights(folder, tmp_path / "plain", facelift=True))
    assert set(plain) == {"model", "fwdbwd_pass_step", "param_update_step"}
    assert set(plain["model"]) == set(facelift["model"])
    path = export_weights(folder, tmp_path / "full.pt", facelift=True, vgg_folder=vgg_folder)
    tensors = load_checkpoint(path)["model"]
    expected = {**facelift["model"], **vgg}
    assert set(tensors) == set(expected) and len(vgg) == 32
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    model, rig, _ = load_gslrm(path)  # and its own sidecar keeps configuration and rig
    assert rig == RIG and torch.equal(model.state_dict()["input_layer_norm.weight"], tensors["input_layer_norm.weight"])
    with pytest.raises(ValueError, match=r"nowhere has no imagenet-vgg-verydeep-19.mat.*--no_vgg"):
        export_weights(folder, tmp_path / "x", facelift=True, vgg_folder=tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()


def test_exported_weights_load_for_inference(resumed, tmp_path):
    state, folder = resumed
    path = export_weights(folder, tmp_path / "shipped", dtype=torch.float16)
    model, rig, _ = load_gslrm(tmp_path / "shipped")
    assert rig == RIG and not model.training and "config" in read_sidecar(path)
    assert path.stat().st_size < 0.3 * (folder / CHECKPOINT.name).stat().st_size
    for name, tensor in state.network.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half().float())


def test_the_export_command(resumed, tmp_path, monkeypatch):
    _, folder = resumed
    command = ["export_gslrm.py", "--checkpoint", str(folder), "--output", str(tmp_path / "o"), "--facelift"]
    main = runpy.run_path(str(ROOT / "scripts" / "export_gslrm.py"))["main"]
    monkeypatch.setattr(sys, "argv", [*command, "--vgg_folder", str(tmp_path)])
    with pytest.raises(ValueError, match="imagenet-vgg-verydeep-19.mat"):
        main()
    monkeypatch.setattr(sys, "argv", [*command, "--no_vgg", "--output", str(folder)])
    with pytest.raises(ValueError, match="would replace .*ckpt_.*which training continues from"):
        main()
    monkeypatch.setattr(sys, "argv", [*command, "--no_vgg", "--dtype", "float16"])
    main()
    path = tmp_path / "o" / CHECKPOINT.name
    assert load_checkpoint(path)["model"]["input_layer_norm.weight"].dtype == torch.float16
    for change, message in (
        ({"config": {}}, "lacks model"), ({"config": {"model": {"x": 1}}}, "unknown keys"), ({"rig": {}}, "rig"),
    ):  # fmt: skip
        write_json(path.with_suffix(".pt.json"), {**read_sidecar(folder / path.name), "sha256": None, **change})
        with pytest.raises(ValueError, match=f"{path.name}.json.*{message}"):
            export_weights(path, tmp_path / "p")
