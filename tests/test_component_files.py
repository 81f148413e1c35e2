"""Stage 1's folders as people bring them: cut, edited, converted, linked; loaded, or refused by file and key."""

import json
import shutil

import pytest
import torch
from mvdiffusion_tiny import SIZE, UNET
from safetensors.torch import load_file, save_file

from multiview.rig import load_rig
from mvdiffusion.components import load_components, load_text
from mvdiffusion.models.unet import create_unet, load_unet, save_unet
from mvdiffusion.pipelines.multiview import generate_views
from mvdiffusion.prompts import check_embeds_fit, load_prompt_embeds

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "components"
    shutil.copytree(tiny["components"], folder)
    torch.manual_seed(0)
    save_unet(create_unet(UNET, 6, "sparse", "adaln"), folder / "unet", load_rig("mouse6"))
    shutil.copytree(tiny["embeds"].parent, folder / "prompt_embeds")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """The components folder in the Hugging Face cache's layout: every file is a link to a blob elsewhere."""
    for path in original.rglob("*"):
        if path.is_file():
            link = tmp_path / "snapshot" / path.relative_to(original)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return tmp_path / "snapshot"


def replace_file(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def edit(path, **changes):
    """Sets keys of a JSON file; `...` takes a key away."""
    content = {**json.loads(path.read_text()), **changes}
    replace_file(path, {key: value for key, value in content.items() if value is not ...})


def load_all(folder):
    embeds = load_prompt_embeds(folder / "prompt_embeds")
    check_embeds_fit(embeds, folder / "unet")
    load_text(folder)
    return load_components(folder), embeds


def weights(folder):
    return next(path for path in folder.iterdir() if path.suffix == ".safetensors")


def generated(folder):
    components, embeds = load_all(folder)
    return generate_views(components, torch.full((1, 3, SIZE, SIZE), 0.5), embeds, num_steps=2)


SCHEDULER = "scheduler/scheduler_config.json"
BROKEN = {  # file: (what it holds, or which keys are changed; what is said)
    "feature_extractor/preprocessor_config.json": [
        (b'{"crop_size": {"hei', "is not valid JSON"), ({"image_mean": "gray"}, "describes no CLIP image processor"),
        (b"\xff\x00\x81", "preprocessor"), ({"image_std": [0, 0, 0]}, "preprocessor"), ({"crop_size": None}, "preproc"),
        ({"size": {"shortest_edge": 10**9}}, "shortest_edge must be a finite number of at most 4096"),
        ({"rescale_factor": [0.5]}, "preprocessor"), ({"do_resize": "no"}, "do_resize must be true or false"),
        ({"crop_size": {"height": 16, "width": 16}}, "must make images of 32 px"),
    ],
    "image_encoder/config.json": [
        (b"[" * 100_000, "config.json"), ([1], "must hold an object"), ({"hidden_size": 32}, "image_encoder"),
        ({"hidden_size": "16"}, "hidden_size must be a whole number"), ({"patch_size": 0}, "patch_size must"),
        ({"num_hidden_layers": 10**9}, "must be .* at most 256"), ({"num_attention_heads": None}, "image_encoder"),
    ],
    "text_encoder/config.json": [({"vocab_size": True, "hidden_act": "loud"}, "text_encoder")],
    "vae/config.json": [
        ({"scaling_factor": float("nan")}, "must be a finite number"), ({"scaling_factor": 0}, "must be .*, at least"),
        ({"block_out_channels": {}}, "makes no AutoencoderKL"), ({"latent_channels": 8}, "wrong shape: decoder"),
        ({"down_block_types": ["UpBlock"]}, "vae.config.json makes no AutoencoderKL"),
    ],
    "image_normalizer/config.json": [({"embedding_dim": "8"}, "embedding_dim must be a whole number")],
    SCHEDULER: [
        ({"prediction_type": ...}, "lacks prediction_type"), ({"num_train_timesteps": 10**12}, "must be a finite"),
        ({"beta_end": "0.012"}, "makes no DDIMScheduler"), ({"beta_end": 1.5}, "betas within 0..1"),
        ({"num_train_timesteps": 10}, "a noise schedule of 1000 steps"),
    ],
    "tokenizer/tokenizer.json": [(b"{", "tokenizer is no CLIP tokenizer")],
    "unet/config.json": [
        ({"num_views": "six"}, "whole number, at least 1, got 'six'"), ({"multiview_attention": 1}, "true or false"),
        ({"camera_conditioning": "adalin"}, "one of none, adaln"), ({"cross_attention_dim": ...}, "json lacks"),
        ({"down_block_types": "CrossAttnDownBlock2D"}, "no UNet2D"), ({"attention_head_dim": None}, "makes no UN"),
        ({"block_out_channels": [2**20, 2**20]}, "e9 weights, at most 4e9"),
    ],
    "prompt_embeds/metadata.json": [(b"[]", "metadata.json must hold an object"), ({"rig": ...}, "metadata.json")],
}  # fmt: skip


@pytest.mark.parametrize(("file", "change", "message"), [(file, *row) for file, rows in BROKEN.items() for row in rows])
def test_broken_configurations_are_refused_by_file_and_key(folder, file, change, message):
    if isinstance(change, dict):
        edit(folder / file, **change)
    else:
        replace_file(folder / file, change)
    with pytest.raises(ValueError, match=message) as refusal:
        load_all(folder)
    assert file.split("/")[0] in str(refusal.value)


@pytest.mark.parametrize("part", ["image_encoder", "vae", "image_normalizer", "unet", "text_encoder"])
@pytest.mark.parametrize("damage", ["cut", "header", "not finite", "one tensor less"])
def test_broken_weights_are_refused_by_name(folder, part, damage):
    """A UNet of NaN generates black views, a cut encoder ends in the library's own exception."""
    path = weights(folder / part)
    content, tensors = path.read_bytes(), load_file(path)
    name = sorted(tensors)[0]
    path.unlink()
    if damage in ("cut", "header"):
        path.write_bytes(content[: len(content) // 2 if damage == "cut" else 5])
    else:
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        if damage == "not finite":
            changed[name].view(-1)[0] = float("nan")
        else:
            del changed[name]
        save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{part}.*{'not finite' if damage == 'not finite' else ''}"):
        load_all(folder)


def test_latents_that_overflow_are_not_shown_as_black_views(folder):
    components, embeds = load_all(folder)
    with torch.no_grad():
        components.unet.conv_out.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="snapshot/unet gives latents that are not finite"):
        generate_views(components, torch.zeros(1, 3, SIZE, SIZE), embeds, num_steps=2)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_links_and_byte_order_marks_change_nothing(original, folder, encoding):
    """Tokenizer files apart, which the library reads itself."""
    for path in sorted(folder.rglob("*.json")):
        if path.parent.name not in ("tokenizer", "text_encoder"):
            replace_file(path, path.read_text().encode(encoding))
    assert torch.equal(generated(folder), generated(original))


@pytest.mark.parametrize("form", ["shards", "fp16 shards", "fp16", "bin", "compiled"])
def test_other_forms_of_the_same_weights_are_read(original, folder, form):
    unet = folder / "unet"
    state, half = load_file(unet / f"{WEIGHTS}.safetensors"), ".fp16" if "fp16" in form else ""
    if half:
        state = {name: tensor.half() for name, tensor in state.items()}
    (unet / f"{WEIGHTS}.safetensors").unlink()
    names = [f"-0000{number}-of-00002" for number in (1, 2)] if "shards" in form else [""]
    prefix = "_orig_mod." if form == "compiled" else ""
    for part, name in enumerate(names):
        path = unet / f"{WEIGHTS}{half}{name}.{'bin' if form == 'bin' else 'safetensors'}"
        content = {prefix + key: state[key] for key in sorted(state)[part :: len(names)]}
        (torch.save if form == "bin" else save_file)(content, path)
    loaded = load_unet(unet).state_dict()
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in loaded.items())
    if len(names) > 1:
        path.unlink()
        with pytest.raises(ValueError, match="unet holds 1 of the 2 shards"):
            load_unet(unet)


def test_half_precision_variants_of_the_frozen_parts_are_read(folder):
    for part in ("image_encoder", "vae"):
        path = weights(folder / part)
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    load_components(folder)
    (folder / SCHEDULER).unlink()
    with pytest.raises(ValueError, match="scheduler_config.json does not exist"):
        load_components(folder)
