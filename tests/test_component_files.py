"""Stage 1's folders as people bring them: cut, edited, converted, linked; loaded, or refused by file and key."""

import json
import random
import shutil

import pytest
import torch
from mvdiffusion_tiny import SIZE, UNET, prepare
from safetensors.torch import load_file, save_file

from multiview.rig import load_rig
from mvdiffusion.components import load_components, load_text
from mvdiffusion.models.unet import create_unet, load_unet, save_unet
from mvdiffusion.pipelines.multiview import generate_views
from mvdiffusion.prompts import check_embeds_fit, load_prompt_embeds

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    paths = prepare(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    save_unet(create_unet(UNET, 6, "sparse", "adaln"), paths["components"] / "unet", load_rig("mouse6"))
    shutil.copytree(paths["embeds"].parent, paths["components"] / "prompt_embeds")
    return paths["components"]


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


DEEP = b"[" * 100_000
PROCESSOR, SCHEDULER = "feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json"
METADATA = "prompt_embeds/metadata.json"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (PROCESSOR, b'{"crop_size": {"hei', "preprocessor_config.json is not valid JSON"),
        (PROCESSOR, b"\xff\x00\x81", "preprocessor_config.json"),
        (PROCESSOR, {"image_mean": "grey"}, "preprocessor_config.json describes no CLIP image processor"),
        (PROCESSOR, {"image_std": [0, 0, 0]}, "preprocessor_config.json"),
        (PROCESSOR, {"size": {"shortest_edge": 10**9}}, "shortest_edge must be a finite number of at most 4096"),
        (PROCESSOR, {"crop_size": None}, "preprocessor_config.json"),
        (PROCESSOR, {"crop_size": {"height": 16, "width": 16}}, "must make images of 32 px"),
        (PROCESSOR, {"do_resize": "no"}, "do_resize must be true or false"),
        (PROCESSOR, {"rescale_factor": [0.5]}, "preprocessor_config.json"),
        ("image_encoder/config.json", DEEP, "config.json"),
        ("image_encoder/config.json", [1], "config.json must hold an object"),
        ("image_encoder/config.json", {"hidden_size": "16"}, "hidden_size must be a whole number, at least 1"),
        ("image_encoder/config.json", {"hidden_size": 32}, "image_encoder"),
        ("image_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers must be .* at most 256"),
        ("image_encoder/config.json", {"patch_size": 0}, "patch_size must be a whole number, at least 1"),
        ("image_encoder/config.json", {"num_attention_heads": None}, "image_encoder"),
        ("text_encoder/config.json", {"vocab_size": True, "hidden_act": "loud"}, "text_encoder"),
        ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor must be a finite number"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor must be a finite number, at least"),
        ("vae/config.json", {"block_out_channels": {}}, "vae.config.json makes no AutoencoderKL"),
        ("vae/config.json", {"down_block_types": ["UpBlock"]}, "vae.config.json makes no AutoencoderKL"),
        ("vae/config.json", {"latent_channels": 8}, "wrong shape: decoder"),
        ("image_normalizer/config.json", {"embedding_dim": "8"}, "embedding_dim must be a whole number"),
        (SCHEDULER, {"prediction_type": ...}, "scheduler_config.json lacks prediction_type"),
        (SCHEDULER, {"beta_end": "0.012"}, "scheduler_config.json makes no DDIMScheduler"),
        (SCHEDULER, {"beta_end": 1.5}, "betas within 0..1"),
        (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps must be a finite number"),
        (SCHEDULER, {"num_train_timesteps": 10}, "a noise schedule of 1000 steps"),
        ("tokenizer/tokenizer.json", b"{", "tokenizer is no CLIP tokenizer"),
        ("unet/config.json", {"num_views": "six"}, "num_views must be a whole number, at least 1, got 'six'"),
        ("unet/config.json", {"multiview_attention": 1}, "multiview_attention must be true or false"),
        ("unet/config.json", {"camera_conditioning": "adalin"}, "camera_conditioning must be one of none, adaln"),
        ("unet/config.json", {"cross_attention_dim": ...}, "unet/config.json lacks cross_attention_dim"),
        ("unet/config.json", {"down_block_types": "CrossAttnDownBlock2D"}, "config.json makes no UNet2D"),
        ("unet/config.json", {"block_out_channels": [2**20, 2**20]}, "e9 weights, at most 4e9"),
        ("unet/config.json", {"attention_head_dim": None}, "unet.config.json makes no UNet2D"),
        (METADATA, b"[]", "metadata.json must hold an object"),
        (METADATA, {"rig": ...}, "metadata.json"),
    ],
)  # fmt: skip
def test_broken_configurations_are_refused_by_file_and_key(folder, file, change, message):
    if isinstance(change, dict):
        edit(folder / file, **change)
    else:
        replace_file(folder / file, change)
    with pytest.raises(ValueError, match=message):
        load_all(folder)


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


@pytest.mark.parametrize("part", ["feature_extractor", "image_encoder", "scheduler", "unet", "vae", "prompt_embeds"])
def test_mutated_configurations_load_or_are_refused(folder, part):
    """Six random edits of each file: no other exception, no hang; what is refused names the folder."""
    draw = random.Random(part)
    path = next(path for path in (folder / part).glob("*.json") if path.name != "rig.json")
    original = json.loads(path.read_text())
    for _ in range(6):
        key = draw.choice(sorted(original))
        edit(path, **{key: draw.choice([None, "x", -1, 10**30, 1e300, [], {}, [None], [[]], True, ...])})
        try:
            load_all(folder)
        except ValueError as error:
            assert part in str(error), error
        replace_file(path, original)
