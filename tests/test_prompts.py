"""Prompt embeddings: made by the script, regenerable bit for bit, carrying their rig."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from multiview.rig import RigMismatchError, available_rigs, load_rig
from mvdiffusion.components import load_text
from mvdiffusion.demo import DemoComponentsConfig, make_tokenizer, write_untrained_parts
from mvdiffusion.prompts import alike_views, encode_prompts, load_prompt_embeds, view_similarity, write_prompt_embeds

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_untrained_parts(folder, DemoComponentsConfig(seed=1, text_width=16))
    return folder


def test_tokenizer_knows_the_prompts_and_any_other_text():
    tokenizer = make_tokenizer()
    for name in available_rigs():
        for prompt in load_rig(name).prompts(angles=True):
            assert tokenizer.unk_token_id not in tokenizer(prompt).input_ids[1:-1]
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()  # the trainer's own order changes from run to run
    foreign = "Zebrafish, größer: 老鼠 <3"
    assert tokenizer.unk_token_id not in tokenizer(foreign).input_ids[1:-1]
    assert len(tokenizer(foreign, padding="max_length", max_length=77, truncation=True).input_ids) == 77


def test_views_told_nearly_the_same_are_refused(tmp_path):
    with pytest.raises(ValueError, match="hardly tells views of rig mouse6 apart: .* 0.99"):
        write_untrained_parts(tmp_path, DemoComponentsConfig(seed=0, text_width=16))


def test_embeddings_are_regenerated_bit_for_bit(tmp_path, text_folder):
    rig = load_rig("mouse6")
    for name in ("a", "b"):
        write_prompt_embeds(tmp_path / name, text_folder, rig, "mouse", angles=False)
    for file in ("clr_embeds.pt", "normal_embeds.pt", "metadata.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    metadata = json.loads((tmp_path / "a" / "metadata.json").read_text())
    assert metadata["shape"] == [6, 77, 16] and metadata["dtype"] == "float16"
    assert metadata["prompts"] == rig.prompts("mouse") and metadata["text_encoder"]["fingerprint"]
    loaded = load_prompt_embeds(tmp_path / "a")
    assert loaded.rig == rig and loaded.tensor.shape == (6, 77, 16)
    assert not torch.equal(loaded.tensor, load_prompt_embeds(tmp_path / "a" / "normal_embeds.pt").tensor)


def test_stated_rig_is_compared_with_the_stored_one(tmp_path, text_folder):
    """Mistake 3: FaceLift's horizontal views where a rig 20 degrees above is meant."""
    write_prompt_embeds(tmp_path, text_folder, load_rig("facelift6"), "facelift", angles=False)
    with pytest.raises(RigMismatchError, match="facelift6") as refusal:
        load_prompt_embeds(tmp_path, load_rig("mouse6"))
    assert "mouse6" in str(refusal.value) and "generate_mouse_prompt_embeds.py --rig mouse6" in str(refusal.value)


def test_facelifts_own_file_needs_its_rig_stated(tmp_path):
    with pytest.raises(ValueError, match="do not exist; make them: python scripts/generate_mouse_prompt_embeds.py"):
        load_prompt_embeds(tmp_path / "clr_embeds.pt")
    torch.save(torch.zeros(6, 77, 1024, dtype=torch.float16), tmp_path / "clr_embeds.pt")
    with pytest.raises(ValueError, match="must be stated: --rig facelift6"):
        load_prompt_embeds(tmp_path / "clr_embeds.pt")
    assert load_prompt_embeds(tmp_path / "clr_embeds.pt", load_rig("facelift6")).tensor.shape[-1] == 1024
    with pytest.raises(RigMismatchError, match="6 views, rig uniform8 has 8"):
        load_prompt_embeds(tmp_path / "clr_embeds.pt", load_rig("uniform8"))
    torch.save(torch.zeros(6, 16), tmp_path / "clr_embeds.pt")
    with pytest.raises(ValueError, match=r"\[num_views, 77, width\], got \[6, 16\]"):
        load_prompt_embeds(tmp_path, load_rig("mouse6"))


def test_similar_views_are_reported(tmp_path, text_folder, monkeypatch, capsys):
    """FaceLift's own front and back are 0.98 alike; prompts that do not name the view are 1."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(77, 16, generator=generator)
    tensor = torch.stack([common, 3 * common, common + 0.02 * torch.randn(77, 16, generator=generator), -common])
    similarity = view_similarity(tensor)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(4))
    torch.testing.assert_close(similarity[0], torch.tensor([1.0, 1.0, float(similarity[0, 2]), -1.0]))
    assert alike_views(similarity, ["a", "b", "c", "d"], 0.9999) == ["a and b 1.000"]
    assert len(alike_views(similarity, ["a", "b", "c", "d"])) == 3
    stored = write_prompt_embeds(tmp_path, text_folder, load_rig("uniform4"), "laboratory", angles=False)["similarity"]
    assert stored["matrix"] == [[1.0] * 4] * 4 and stored["views"] == load_rig("uniform4").view_names
    run_script(monkeypatch, text_folder, tmp_path / "script", "--style", "laboratory")
    names, told = load_rig("uniform4").view_names, capsys.readouterr().out
    assert "warning: nearly the same" in told and f"{names[0]} and {names[1]} 1.000" in told


def run_script(monkeypatch, text_folder, output, *options):
    """The script as its users call it, in this process: another one would import torch again."""
    path = str(ROOT / "scripts" / "generate_mouse_prompt_embeds.py")
    arguments = ["--rig", "uniform4", "--model_name", str(text_folder), "--output_dir", str(output), *options]
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(path)["main"]()


def test_script_writes_what_the_library_does(tmp_path, text_folder, monkeypatch):
    run_script(monkeypatch, text_folder, tmp_path / "script", "--style", "facelift", "--angles")
    write_prompt_embeds(tmp_path / "library", text_folder, load_rig("uniform4"), "facelift", angles=True)
    loaded = [load_prompt_embeds(tmp_path / name).tensor for name in ("script", "library")]
    assert torch.equal(*loaded)
    run_script(monkeypatch, text_folder, tmp_path / "low", "--elevation", "5")
    lower = load_prompt_embeds(tmp_path / "low").rig
    assert {view.elevation_deg for view in lower.views} == {5} and lower.name == "uniform4_elevation5"
    assert encode_prompts(["a mouse"], *load_text(text_folder)).shape == (1, 77, 16)


def test_tracked_embeddings_are_the_demo_text_encoders(tmp_path):
    """What ships is what the script makes without arguments."""
    tracked = ROOT / "mvdiffusion" / "data" / "mouse_prompt_embeds_6view"
    demo = ROOT / "checkpoints" / "demo" / "mvdiffusion"
    write_prompt_embeds(tmp_path, demo, load_rig("mouse6"), "mouse", angles=False)
    made, stored = (json.loads((folder / "metadata.json").read_text()) for folder in (tmp_path, tracked))
    made["text_encoder"]["folder"] = stored["text_encoder"]["folder"]
    matrices = [torch.tensor(metadata.pop("similarity")["matrix"]) for metadata in (made, stored)]
    torch.testing.assert_close(*matrices, atol=2e-3, rtol=0)
    assert made == stored
    for name in ("clr_embeds.pt", "normal_embeds.pt"):
        # On one machine the bytes are equal; another CPU may round the last bit of a float16 otherwise.
        pair = [load_prompt_embeds(folder / name).tensor for folder in (tmp_path, tracked)]
        torch.testing.assert_close(*pair, atol=4e-3, rtol=2e-3)
