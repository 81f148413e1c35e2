"""Both stages together: what the commands write, what the Python door gives, and what is refused before any work."""

import gc
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gslrm_toys import run_script
from PIL import Image
from pipeline_tiny import prepare_pipeline, write_gslrm, write_unet
from running import must, run

from gslrm.model.ply import load_ply
from multiview.checkpoint import read_sidecar, save_checkpoint
from multiview.image import read_rgba, save_video, to_uint8, write_image
from multiview.rig import RigMismatchError, load_rig
from multiview.run import shipped
from multiview.sample import read_sample, read_split
from mvdiffusion.prompts import write_prompt_embeds
from pipeline import MouseFaceLift, PhotographError, import_stage1
from pipeline.artifacts import resolve
from pipeline.options import Checkpoints
from pipeline.outputs import PosedViews

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    paths = prepare_pipeline(folder)
    paths["photo"] = folder / "photo.png"
    write_image(paths["photo"], read_sample(read_split(paths["data"])[0]).rgba[0])
    return paths


def chosen(tiny, **changes) -> dict:
    files = {
        "mvdiffusion_checkpoint": tiny["unet"], "checkpoint": tiny["gslrm"], "mvdiff_pretrained": tiny["components"],
        "prompt_embeds": tiny["embeds"],
    }  # fmt: skip
    return {**files, **changes}


def flags(tiny, **changes) -> list:
    """inference_mouse.py's, but for the input."""
    given = {**chosen(tiny), "num_steps": 2, "turntable_views": 0, "device": "cpu", **changes}
    return [part for flag, value in given.items() for part in (f"--{flag}", value)]


@pytest.fixture(scope="module")
def model(tiny):
    return MouseFaceLift.load(device="cpu", num_steps=2, **chosen(tiny))


# ---- what is written ------------------------------------------------------------------------------------------------


def test_a_photograph_becomes_views_gaussians_and_a_turntable(tiny, tmp_path):
    out = must(
        "inference_mouse.py", "--input_image", tiny["photo"], *flags(tiny, turntable_views=4), "--output_dir", tmp_path,
        "--crop", "never", "turntable_size=32",
    )  # fmt: skip
    assert "embeddings, UNet and GS-LRM agree" in out
    folder = tmp_path / "photo"
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    views = {f"views/view_{k:02d}.png" for k in range(6)}
    assert written == views | {
        "input.png", "multiview.png", "opencv_cameras.json", "gaussians.ply", "turntable.mp4", "run.json",
        "result.html",
    }  # fmt: skip
    record = json.loads((folder / "run.json").read_text())
    assert record["rig"]["name"] == "mouse6" and record["num_steps"] == 2 and record["artifacts"]["gslrm"]
    assert load_ply(folder / "gaussians.ply").num_gaussians == record["gaussians"]["kept"]
    # The photograph itself stands for the reference view.
    photo = read_rgba(tiny["photo"])
    on_white = photo[:3] * photo[3:] + 1 - photo[3:]
    assert (read_rgba(folder / "views" / "view_00.png")[:3] - on_white).abs().max() < 1.5 / 255
    # The folder is itself a set of posed views in the sample layout's camera file.
    frames = json.loads((folder / "opencv_cameras.json").read_text())["frames"]
    assert [frame["view"] for frame in frames] == load_rig("mouse6").view_names
    # test_full_pipeline.py makes the very same model, in a folder per stage.
    cameras = tmp_path / "cameras.json"
    cameras.write_text(json.dumps({"frames": load_rig("mouse6").cameras(512).to_frames()}))
    must(
        "test_full_pipeline.py", "--input_image", tiny["photo"], "--mvdiff_pretrained", tiny["components"],
        "--mvdiff_unet", tiny["unet"], "--prompt_embeds", tiny["embeds"], "--gslrm_checkpoint", tiny["gslrm"],
        "--camera_json", cameras, "--num_steps", 2, "--turntable_views", 4, "--device", "cpu",
        "--output_dir", tmp_path / "full", "crop=never", "turntable_size=32",
    )  # fmt: skip
    full = tmp_path / "full" / "photo"
    assert (full / "stage2_gslrm" / "gaussians.ply").read_bytes() == (folder / "gaussians.ply").read_bytes()
    for name in ("stage1_mvdiffusion/views/view_05.png", "stage1_mvdiffusion/run.json", "stage2_gslrm/turntable.mp4"):
        assert (full / name).is_file()


def test_painted_views_carry_the_rigs_cameras(tiny, model):
    """Whatever cameras a photograph was taken with, the generated views are the rig's."""
    own, rig = model.generate(read_rgba(tiny["photo"]), seed=0).cameras, load_rig("mouse6").cameras(32)
    assert torch.equal(own.c2w, rig.c2w) and torch.equal(own.fxfycxcy, rig.fxfycxcy)


def test_a_photographs_result_depends_on_its_seed_not_on_its_place(tiny, tmp_path):
    """And a folder's photographs are done, or named: none is passed over in silence."""
    source = tmp_path / "in"
    source.mkdir()
    rgba = to_uint8(read_rgba(tiny["photo"]))
    for name in ("a.png", "b.webp"):
        Image.fromarray(rgba).save(source / name, lossless=True)
    Image.fromarray(rgba).save(source / "c.avif")
    photo = np.where(rgba[..., 3:] > 127, rgba[..., :3], 200).repeat(4, 0).repeat(4, 1)
    Image.fromarray(photo.astype(np.uint8)).save(source / "d.jfif", format="JPEG")
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(source / "empty.png")
    (source / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    (source / "notes.txt").write_text("no image")
    code, out, err = run("inference_mouse.py", "--input_dir", source, *flags(tiny), "--output_dir", tmp_path / "out")
    assert code == 1 and "Traceback" not in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b", "c", "d", "index.html"]
    index = (tmp_path / "out" / "index.html").read_text()
    assert all(f'href="{name}/result.html"' in index for name in "abcd") and "phone.heic" in index
    last = err.strip().splitlines()[-1]
    assert "4 done, 2 failed" in last and "phone.heic" in last and "empty" in last and "notes.txt" in err
    a, b = (read_rgba(tmp_path / "out" / name / "views" / "view_03.png") for name in "ab")
    assert torch.equal(a, b)
    must("inference_mouse.py", "--input_image", tiny["photo"], *flags(tiny), "--seed", 1, "--output_dir", tmp_path)
    assert not torch.equal(a, read_rgba(tmp_path / "photo" / "views" / "view_03.png"))


def test_posed_views_go_through_stage_2_alone(tiny, tmp_path):
    sample = read_split(tiny["data"])[0]
    given = [
        "--checkpoint",
        tiny["gslrm"],
        "--turntable_views",
        0,
        "--no_filter",
        "--refine",
        "off",
        "--output_dir",
        tmp_path,
    ]
    must("inference_mouse.py", "--sample_dir", sample, *given)
    record = json.loads((tmp_path / sample.name / "run.json").read_text())
    assert record["input_views"] == 6
    assert record["gaussians"]["kept"] == record["gaussians"]["predicted"] == 6 * 32 * 32 + 2
    assert not (tmp_path / sample.name / "turntable.mp4").exists()


def test_a_video_is_reconstructed_frame_by_frame_and_a_cut_one_is_named(tiny, tmp_path):
    photo = read_rgba(tiny["photo"])
    frame = torch.nn.functional.interpolate((photo[:3] * photo[3:] + 0.9 * (1 - photo[3:]))[None], scale_factor=4)
    noise = 0.05 * torch.rand(60, *frame.shape[1:], generator=torch.Generator().manual_seed(0))
    save_video(tmp_path / "clip.mp4", (frame + noise).clamp(0, 1), fps=10)
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(whole[: len(whole) // 2])
    given = [*flags(tiny), "--input_video", tmp_path / "clip.mp4", "video_stride=20"]
    code, _, err = run("inference_mouse.py", *given, "--output_dir", tmp_path / "out")
    assert code == 1 and "clip.mp4 is cut" in err and "of 60 frames can be decoded" in err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[0] == "clip_000000" and names[2:] == ["film.mp4", "index.html"]
    assert json.loads((tmp_path / "out" / names[1] / "run.json").read_text())["frame"]["segmented"]


def test_sigterm_between_two_photographs_keeps_what_is_finished(tiny, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(40):
        shutil.copy(tiny["photo"], source / f"{number:02d}.png")
    words = ["--input_dir", source, *flags(tiny), "--output_dir", out]
    process = run_script(*map(str, words), script="inference_mouse.py")
    while process.poll() is None and not (out / "01" / "run.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "stopped by SIGTERM: what was finished is whole; repeat the command" in told
    results = sorted(path for path in out.iterdir() if path.is_dir())
    assert 2 <= len(results) < 40 and "Traceback" not in told and not list(out.rglob("*.tmp"))
    for folder in results:
        assert (folder / "run.json").is_file() and load_ply(folder / "gaussians.ply").num_gaussians


# ---- the Python door ------------------------------------------------------------------------------------------------


def test_the_door_takes_any_image_and_gives_arrays_renderings_and_files(tiny, model, tmp_path):
    rgba = read_rgba(tiny["photo"])
    results = [model(image, crop="never") for image in (tiny["photo"], rgba, to_uint8(rgba), Image.open(tiny["photo"]))]
    arrays = [result.numpy() for result in results]
    for other in arrays[1:]:
        assert all(np.array_equal(arrays[0][name], other[name]) for name in arrays[0])
    count = results[0].gaussians.num_gaussians
    assert arrays[0]["xyz"].shape == (count, 3) and arrays[0]["rotation"].shape == (count, 4)
    assert results[0].render(load_rig("mouse6").cameras(16)).rgb.shape == (1, 6, 3, 16, 16)
    results[0].save(tmp_path / "out", turntable_views=0)
    assert load_ply(tmp_path / "out" / "gaussians.ply").num_gaussians == count
    sample = read_sample(read_split(tiny["data"])[0], num_views=6)
    views = PosedViews.of(sample.rgba, sample.cameras)
    posed = model.reconstruct(views.rgb.numpy(), views.masks.numpy(), views.cameras, refine="off", filtered=False)
    assert torch.equal(posed.gaussians.xyz, model.predict(views).xyz)
    with pytest.raises(PhotographError, match=r"uint8, got \[4, 4\] float64"):
        model(np.zeros((4, 4)))


def test_opengl_cameras_in_a_sample_are_refused(tiny, tmp_path):
    shutil.copytree(read_split(tiny["data"])[0], tmp_path / "sample")
    path = tmp_path / "sample" / "opencv_cameras.json"
    content = json.loads(path.read_text())
    for frame in content["frames"]:
        frame["w2c"] = [frame["w2c"][0], *[[-x for x in row] for row in frame["w2c"][1:3]], frame["w2c"][3]]
    path.write_text(json.dumps(content))
    given = ["--checkpoint", tiny["gslrm"], "--output_dir", tmp_path / "out"]
    code, _, err = run("inference_mouse.py", "--sample_dir", tmp_path / "sample", *given)
    assert code == 1 and "OpenGL" in err


def test_shipped_models_are_found_from_any_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    artifacts = resolve(Checkpoints())
    assert artifacts.gslrm.is_file() and artifacts.components.is_dir() and artifacts.unet.is_dir()
    assert shipped("nowhere/at/all") == Path("nowhere/at/all")
    monkeypatch.chdir(ROOT)
    assert shipped("checkpoints/demo") == Path("checkpoints/demo")  # records stay free of machine paths


def test_quick_imports_leave_every_library_importable(monkeypatch):
    for name in ("diffusers", "peft", "torchvision"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import_stage1()
    assert None not in sys.modules.values() and gc.isenabled()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tiny, tmp_path_factory):
    """The same artifacts of other rigs, one each."""
    folder = tmp_path_factory.mktemp("foreign")
    facelift, four = load_rig("facelift6"), load_rig("uniform4")
    for name, rig in (("facelift6", facelift), ("uniform4", four)):
        write_prompt_embeds(folder / f"embeds_{name}", tiny["components"], rig, "facelift", angles=False)
    cameras = folder / "facelift_cameras.json"
    cameras.write_text(json.dumps({"frames": facelift.cameras(512).to_frames()}))
    return {
        "embeds": folder / "embeds_facelift6" / "clr_embeds.pt",
        "embeds4": folder / "embeds_uniform4" / "clr_embeds.pt",
        "unet": write_unet(folder / "unet", facelift),
        "unet4": write_unet(folder / "unet4", four),
        "wide_unet": write_unet(folder / "wide", load_rig("mouse6"), cross_attention_dim=24),
        "gslrm": write_gslrm(folder / "gslrm", facelift),
        "camera_json": cameras,
    }


@pytest.mark.parametrize(
    ("change", "file", "role"),
    [
        ("prompt_embeds", "embeds", "embeddings"), ("mvdiffusion_checkpoint", "unet", "unet"),
        ("checkpoint", "gslrm", "gslrm"), ("camera_json", "camera_json", "cameras"),
    ],
)  # fmt: skip
def test_an_artifact_of_another_rig_is_refused(tiny, foreign, change, file, role):
    with pytest.raises(RigMismatchError) as error:
        resolve(Checkpoints(**chosen(tiny, **{change: foreign[file]})))
    text = str(error.value)
    assert "mouse6" in text and ("facelift6" in text or "facelift_cameras.json" in text)
    assert role in text and "to mend: " in text


@pytest.mark.parametrize(("change", "file"), [("prompt_embeds", "embeds4"), ("mvdiffusion_checkpoint", "unet4")])
def test_a_wrong_number_of_views_is_refused(tiny, foreign, change, file):
    with pytest.raises(RigMismatchError, match="views"):
        resolve(Checkpoints(**chosen(tiny, **{change: foreign[file]})))


def test_embeddings_of_the_wrong_width_are_refused_with_the_command(tiny, foreign):
    with pytest.raises(ValueError, match="16 wide.*expects 24.*generate_mouse_prompt_embeds.py"):
        resolve(Checkpoints(**chosen(tiny, mvdiffusion_checkpoint=foreign["wide_unet"])))


def test_weights_without_a_rig_need_it_stated(tiny, tmp_path):
    unet = shutil.copytree(tiny["unet"], tmp_path / "unet")
    (unet / "rig.json").unlink()
    given = chosen(tiny, mvdiffusion_checkpoint=unet)
    with pytest.raises(ValueError, match="carries no view rig.*--rig.*stamp_rig.py"):
        resolve(Checkpoints(**given))
    assert resolve(Checkpoints(**given, rig="mouse6")).rig.name == "mouse6"
    with pytest.raises(RigMismatchError, match="facelift6"):  # a stated rig is held against all
        resolve(Checkpoints(**given, rig="facelift6"))
    assert "mouse6" in must("scripts/stamp_rig.py", "--rig", "mouse6", "--path", unet)
    assert resolve(Checkpoints(**given)).rig.name == "mouse6"
    code, _, err = run("scripts/stamp_rig.py", "--rig", "facelift6", "--path", unet)
    assert code == 1 and "already carries rig mouse6" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mvdiffusion_checkpoint", "nowhere/checkpoint-6000"), ("checkpoint", "nowhere/ckpt_1.pt"),
        ("prompt_embeds", "nowhere/clr_embeds.pt"), ("camera_json", "nowhere/cameras.json"),
        ("checkpoint", "Stage 1 checkpoint without a Stage 2 one"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_an_error_and_nothing_takes_its_place(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        resolve(Checkpoints(**chosen(tiny, **{change: Path(message) if message.startswith("nowhere") else None})))


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(tiny, model, tmp_path):
    state, path = torch.load(tiny["gslrm"], weights_only=True)["model"], tmp_path / "a.pt"
    name = "input_layer_norm.weight"
    tensor, given = state.pop(name), ["--input_image", tiny["photo"], "--output_dir", tmp_path / "out", "crop=never"]
    for added, messages in (
        ({"surprise.weight": tensor}, (f"missing: {name}", "unexpected: surprise.weight")),
        ({name: tensor * float("nan")}, ("not finite", path.name)),
    ):
        save_checkpoint(path, {"model": {**state, **added}}, read_sidecar(tiny["gslrm"]))
        code, _, err = run("inference_mouse.py", *flags(tiny, checkpoint=path), *given)
        assert code == 1 and all(message in err for message in messages) and not (tmp_path / "out").exists()
    given = [*flags(tiny, rig="facelift6"), *given]  # a mismatch is told with both rigs side by side
    code, _, err = run("inference_mouse.py", *given)
    assert code == 1 and any("rig mouse6" in line and "rig facelift6" in line for line in err.splitlines())
    # Weights that are finite may still overflow on the way: no result is better than an empty one.
    for message, weight in (
        ("UNet", model.components.unet.conv_in.weight), ("Gaussians", next(model.network.parameters())),
        ("autoencoder", model.components.vae.decoder.conv_in.weight),
    ):  # fmt: skip
        kept = weight.data.clone()
        weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match=f"{message}.* not finite"):
            model(tiny["photo"], crop="never")
        weight.data.copy_(kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--turntable_views", "-1"], "--turntable_views: must be at least 0"),
        (["samplr=ddim"], "unknown key 'samplr'; the nearest known one is 'sampler'"),
        (["sampler=euler"], "expected one of"), (["mirror=auto"], "unknown key 'mirror'"),
        (["turntable_size=33"], "turntable_size must be even"), (["video_stride=x"], "video_stride"),
        (["crop"], "must look like key=value"), (["--num_steps", "0"], "must be at least 1"),
        (["--export", "obj"], "must be of splat, ply_compressed, spz, glb, got 'obj'"),
    ],
)  # fmt: skip
def test_bad_arguments_end_with_code_2_before_anything_is_loaded(arguments, message):
    code, _, err = run("inference_mouse.py", "--input_image", "a.png", *arguments)
    assert code == 2 and message in err


def test_inference_keeps_to_few_flags_and_lists_its_overrides():
    code, out, _ = run("inference_mouse.py", "--help")
    flags_told = {line.split()[0].rstrip(",") for line in out.splitlines() if line.strip().startswith("--")}
    assert code == 0 and 15 <= len(flags_told) <= 28 and "  sampler=ddim  " in out and "  maps=false  " in out


def test_an_output_folder_that_cannot_be_is_refused_before_the_work(tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = run("inference_mouse.py", "--input_image", tiny["photo"], "--output_dir", folder)
        assert code == 1 and "is a file; name another folder" in err
