"""The chain of both stages: what it writes, and the mismatches it refuses before any model runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipeline_tiny import prepare_chain, write_gslrm, write_unet

from gslrm.model.ply import load_ply
from multiview.image import read_rgba, write_image
from multiview.rig import RigMismatchError, load_rig
from multiview.sample import read_sample, read_split
from mvdiffusion.prompts import write_prompt_embeds
from pipeline.artifacts import resolve_chain

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    paths = prepare_chain(folder)
    paths["photo"] = folder / "photo.png"
    write_image(paths["photo"], read_sample(read_split(paths["data"])[0]).rgba[0])
    return paths


def run(script: str, *arguments, check: bool = True) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def photo_flags(tiny, **changes) -> list:
    flags = {
        "--input_image": tiny["photo"], "--mvdiffusion_checkpoint": tiny["unet"],
        "--mvdiff_pretrained": tiny["components"], "--prompt_embeds": tiny["embeds"], "--checkpoint": tiny["gslrm"],
        "--num_steps": 2, "--turntable_views": 4, "--turntable_size": 32, "--crop": "never", **changes,
    }  # fmt: skip
    return [part for flag, value in flags.items() for part in (flag, value)]


def resolve(tiny, **changes):
    arguments = {
        "rig": None, "unet": tiny["unet"], "gslrm": tiny["gslrm"], "components": tiny["components"],
        "embeds": tiny["embeds"],
    }  # fmt: skip
    return resolve_chain(**{**arguments, **changes})


# ---- what is written ------------------------------------------------------------------------------------------------


def test_a_photograph_becomes_views_gaussians_and_a_turntable(tiny, tmp_path):
    done = run("inference_mouse.py", *photo_flags(tiny), "--output_dir", tmp_path)
    assert "embeddings, UNet and GS-LRM agree" in done.stdout
    folder = tmp_path / "photo"
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    views = {f"views/view_{k:02d}.png" for k in range(6)}
    assert written == views | {
        "input.png", "multiview.png", "opencv_cameras.json", "gaussians.ply", "turntable.mp4", "run.json",
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


def test_painted_views_carry_the_rigs_cameras(tiny):
    """Whatever cameras a photograph was taken with, the painted views are the rig's."""
    own, rig = resolve(tiny).stage2_cameras(64), load_rig("mouse6").cameras(64)
    assert torch.equal(own.c2w, rig.c2w) and torch.equal(own.fxfycxcy, rig.fxfycxcy)


def test_a_photographs_result_depends_on_its_seed_not_on_its_place(tiny, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(tiny["photo"], tmp_path / "in" / name)
    flags = photo_flags(tiny)[2:]
    run("inference_mouse.py", "--input_dir", tmp_path / "in", *flags, "--output_dir", tmp_path / "out")
    a, b = (read_rgba(tmp_path / "out" / name / "views" / "view_03.png") for name in "ab")
    assert torch.equal(a, b)
    run("inference_mouse.py", *photo_flags(tiny), "--seed", 1, "--output_dir", tmp_path / "other")
    assert not torch.equal(a, read_rgba(tmp_path / "other" / "photo" / "views" / "view_03.png"))


def test_posed_views_go_through_stage_2_alone(tiny, tmp_path):
    sample = read_split(tiny["data"])[0]
    flags = ["--checkpoint", tiny["gslrm"], "--turntable_views", 0, "--no_filter", "--output_dir", tmp_path]
    run("inference_mouse.py", "--sample_dir", sample, *flags)
    record = json.loads((tmp_path / sample.name / "run.json").read_text())
    assert record["input_views"] == 6
    assert record["gaussians"]["kept"] == record["gaussians"]["predicted"] == 6 * 32 * 32 + 2
    assert not (tmp_path / sample.name / "turntable.mp4").exists()


def test_a_video_is_reconstructed_frame_by_frame(tiny, tmp_path):
    from multiview.image import save_video

    photo = read_rgba(tiny["photo"])
    frame = torch.nn.functional.interpolate((photo[:3] * photo[3:] + 0.9 * (1 - photo[3:]))[None], scale_factor=4)
    save_video(tmp_path / "clip.mp4", frame.expand(4, -1, -1, -1), fps=10)
    flags = photo_flags(tiny)[2:]
    flags[flags.index("--crop") + 1] = "auto"
    flags += ["--input_video", tmp_path / "clip.mp4", "--video_stride", 2, "--turntable_views", 0]
    run("inference_mouse.py", *flags, "--output_dir", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip_000000", "clip_000002"]
    assert json.loads((tmp_path / "out" / "clip_000002" / "run.json").read_text())["photo"]["segmented"]


def test_full_pipeline_leaves_a_folder_per_stage(tiny, tmp_path):
    cameras = tmp_path / "cameras.json"
    cameras.write_text(json.dumps({"frames": load_rig("mouse6").cameras(512).to_frames()}))
    run(
        "test_full_pipeline.py", "--input_image", tiny["photo"], "--mvdiff_pretrained", tiny["components"],
        "--mvdiff_unet", tiny["unet"], "--prompt_embeds", tiny["embeds"], "--gslrm_checkpoint", tiny["gslrm"],
        "--camera_json", cameras, "--num_steps", 2, "--guidance_scale", 1, "--turntable_views", 4, "--crop", "never",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    folder = tmp_path / "out" / "photo"
    assert (folder / "stage1_mvdiffusion" / "views" / "view_05.png").is_file()
    for name in ("gaussians.ply", "turntable.mp4", "run.json"):
        assert (folder / "stage2_gslrm" / name).is_file()


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
    ("change", "role"),
    [("embeds", "embeddings"), ("unet", "unet"), ("gslrm", "gslrm"), ("camera_json", "cameras")],
)
def test_an_artifact_of_another_rig_is_refused(tiny, foreign, change, role):
    with pytest.raises(RigMismatchError) as error:
        resolve(tiny, **{change: foreign[change]})
    text = str(error.value)
    assert "mouse6" in text and ("facelift6" in text or "facelift_cameras.json" in text)
    assert role in text and "to mend: " in text


def test_a_wrong_number_of_views_is_refused(tiny, foreign):
    with pytest.raises(RigMismatchError, match="views"):
        resolve(tiny, embeds=foreign["embeds4"])
    with pytest.raises(RigMismatchError, match="views"):
        resolve(tiny, unet=foreign["unet4"])


def test_embeddings_of_the_wrong_width_are_refused_with_the_command(tiny, foreign):
    with pytest.raises(ValueError, match="16 wide.*expects 24.*generate_mouse_prompt_embeds.py"):
        resolve(tiny, unet=foreign["wide_unet"])


def test_a_stated_rig_is_held_against_all(tiny):
    assert resolve(tiny, rig="mouse6").rig.name == "mouse6"
    with pytest.raises(RigMismatchError, match="facelift6"):
        resolve(tiny, rig="facelift6")


def test_weights_without_a_rig_need_it_stated(tiny, tmp_path):
    shutil.copytree(tiny["unet"], tmp_path / "unet")
    (tmp_path / "unet" / "rig.json").unlink()
    with pytest.raises(ValueError, match="carries no view rig.*--rig.*stamp_rig.py"):
        resolve(tiny, unet=tmp_path / "unet")
    assert resolve(tiny, unet=tmp_path / "unet", rig="mouse6").rig.name == "mouse6"
    done = run("scripts/stamp_rig.py", "--rig", "mouse6", "--path", tmp_path / "unet")
    assert "mouse6" in done.stdout
    assert resolve(tiny, unet=tmp_path / "unet").rig.name == "mouse6"
    done = run("scripts/stamp_rig.py", "--rig", "facelift6", "--path", tmp_path / "unet", check=False)
    assert done.returncode == 1 and "already carries rig mouse6" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": Path("checkpoints/nowhere/checkpoint-6000")}, "nowhere/checkpoint-6000"),
        ({"gslrm": Path("checkpoints/nowhere/ckpt_1.pt")}, "nowhere/ckpt_1.pt"),
        ({"embeds": Path("nowhere/clr_embeds.pt")}, "nowhere/clr_embeds.pt"),
        ({"camera_json": Path("nowhere/cameras.json")}, "nowhere/cameras.json"),
        ({"gslrm": None}, "Stage 1 checkpoint without a Stage 2 one"),
    ],
)
def test_what_does_not_exist_is_an_error_and_nothing_takes_its_place(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        resolve(tiny, **change)


def test_a_mismatch_ends_the_command_with_exit_code_1_and_both_rigs(tiny, foreign, tmp_path):
    flags = photo_flags(tiny, **{"--checkpoint": foreign["gslrm"]})
    done = run("inference_mouse.py", *flags, "--output_dir", tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    line = next(line for line in done.stderr.splitlines() if "rig mouse6" in line)
    assert "rig mouse6" in line and "rig facelift6" in line  # side by side


def test_missing_and_unexpected_weights_are_refused_by_name(tiny, tmp_path):
    path = tmp_path / tiny["gslrm"].name
    shutil.copy(tiny["gslrm"].with_suffix(".pt.json"), path.with_suffix(".pt.json"))
    state = torch.load(tiny["gslrm"], weights_only=True)["model"]
    state["surprise.weight"] = state.pop("input_layer_norm.weight")
    torch.save({"model": state}, path)
    flags = photo_flags(tiny, **{"--checkpoint": path})
    done = run("inference_mouse.py", *flags, "--output_dir", tmp_path / "out", check=False)
    assert done.returncode == 1
    assert "missing: input_layer_norm.weight" in done.stderr and "unexpected: surprise.weight" in done.stderr


def test_opengl_cameras_in_a_sample_are_refused(tiny, tmp_path):
    shutil.copytree(read_split(tiny["data"])[0], tmp_path / "sample")
    path = tmp_path / "sample" / "opencv_cameras.json"
    content = json.loads(path.read_text())
    for frame in content["frames"]:
        frame["w2c"] = [frame["w2c"][0], *[[-x for x in row] for row in frame["w2c"][1:3]], frame["w2c"][3]]
    path.write_text(json.dumps(content))
    flags = ["--checkpoint", tiny["gslrm"], "--output_dir", tmp_path / "out"]
    done = run("inference_mouse.py", "--sample_dir", tmp_path / "sample", *flags, check=False)
    assert done.returncode == 1 and "OpenGL" in done.stderr


# ---- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "splits"),
    [
        ("1", {"rig views but the input"}), ("2", {"novel views"}),
        ("full", {"novel views", "rig views but the input"}),
    ],
)  # fmt: skip
def test_evaluation_names_its_splits_and_writes_a_table(tiny, tmp_path, stage, splits):
    from dataclasses import replace

    from multiview.cameras import Cameras
    from multiview.sample import write_dataset_info, write_sample, write_split

    sample = read_sample(read_split(tiny["data"])[0])
    extra = Cameras.orbit(torch.tensor([33.0]), torch.tensor([10.0]), 2.7, 1.0722534656524658, 32)
    cameras = replace(
        sample.cameras, c2w=torch.cat([sample.cameras.c2w, extra.c2w]),
        fxfycxcy=torch.cat([sample.cameras.fxfycxcy, extra.fxfycxcy]),
    )  # fmt: skip
    rgba = torch.cat([sample.rgba, sample.rgba[:1]])
    write_sample(tmp_path / "s", replace(sample, rgba=rgba, cameras=cameras, view_names=[*sample.view_names, None]))
    write_split(tmp_path / "val.txt", [tmp_path / "s"])
    write_dataset_info(tmp_path, load_rig("mouse6"))
    run(
        "scripts/evaluate.py", "--data", tmp_path / "val.txt", "--stage", stage, "--checkpoint", tiny["gslrm"],
        "--mvdiffusion_checkpoint", tiny["unet"], "--mvdiff_pretrained", tiny["components"],
        "--prompt_embeds", tiny["embeds"], "--num_steps", 1, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {record["split"] for record in content["views"]} == splits
    assert (tmp_path / "out" / "sheet.png").is_file()
    assert "foreground_psnr" in (tmp_path / "out" / "table.md").read_text()
