"""Disks that are read-only or full: every command that writes ends with one sentence and exit code 1, nothing half."""

import json
import os
import subprocess

import pytest
import torch
from conftest import file_limit
from gslrm_toys import settings
from pipeline_tiny import prepare_pipeline, run

from gslrm.model.gaussians import Gaussians
from gslrm.model.gaussians_renderer import render
from gslrm.model.ply import load_ply, save_ply
from multiview.image import write_image
from multiview.rig import load_rig
from multiview.sample import read_sample, read_split

COMMANDS = {  # what each is called: its words; {o} is the disk, the others are what `inputs` makes
    "stage 1, first folder": "train_diffusion.py --config configs/demo_mvdiffusion.yaml output_dir={o}/a/run",
    "stage 2, first folder": "train_gslrm.py --config {yaml} {stage2} training.checkpointing.checkpoint_dir={o}/a/run",
    "inference": "inference_mouse.py --input_image {photo} {weights} --output_dir {o}/a",
    "posed views": "inference_mouse.py --sample_dir {sample} --checkpoint {gslrm} --output_dir {o}/a",
    "sequence": "inference_mouse.py --dataset {val} --checkpoint {gslrm} --refine 2 --output_dir {o}/a",
    "another rig": "scripts/reshoot.py --data {val} --checkpoint {gslrm} --image_size 32 --output_dir {o}/a",
    "both stages": "test_full_pipeline.py --input_image {photo} {both} --output_dir {o}/a",
    "import": "scripts/process_mouse_data.py {recording} --image_size 32 --workers 1 --output_dir {o}/a",
    "check": "scripts/process_mouse_data.py {recording} --check --check_output {o}/a.png",
    "evaluation": "scripts/evaluate.py --stage 2 --data {val} --checkpoint {gslrm} --baselines copy --output_dir {o}/a",
    "synthetic mice": "scripts/make_synthetic_mouse.py --num_samples 1 --image_size 64 --workers 1 --output_dir {o}/a",
    "recording": "scripts/make_synthetic_mouse.py --num_samples 1 --as_recording --video_width 128 --output_dir {o}/a",
    "check_dataset": "scripts/check_dataset.py --data {val} --workers 1 --output_dir {o}/a",
    "images": "scripts/render_ply.py --ply {ply} --cameras {cameras} --device cpu --output_dir {o}/a",
    "turntable": "scripts/render_ply.py --ply {ply} --device cpu --turntable_views 8 --turntable {o}/a.mp4",
    "export": "scripts/export_gslrm.py --checkpoint {gslrm} --output {o}/a",
    "embeddings": "scripts/generate_mouse_prompt_embeds.py --model_name {components} --output_dir {o}/a",
    "generated data": "scripts/generate_synthetic_data.py --data {data} {stage1} --num_samples 1 --output_dir {o}/a",
    "components": "scripts/make_demo_components.py --data {data} --output_dir {o}/a holdout_samples=1",
    "ablation": "scripts/ablate.py --spec {spec}",
}
# What a disk with room for texts takes whole: files that are smaller than LIMIT, or written later than the test waits.
SMALL, LIMIT = {"stage 1, first folder", "ablation", "check", "images"}, 2500


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, toys, filmed):
    """Words for COMMANDS, of tiny weights and data."""
    folder = tmp_path_factory.mktemp("inputs")
    made = prepare_pipeline(folder)
    write_image(folder / "photo.png", read_sample(read_split(made["data"])[0]).rgba[0])
    shapes = {"xyz": (90, 3), "features": (90, 1, 3), "scaling": (90, 3), "rotation": (90, 4), "opacity": (90, 1)}
    save_ply(folder / "a.ply", Gaussians(**{name: torch.rand(1, *shape) for name, shape in shapes.items()}))
    render(load_ply(folder / "a.ply"), load_rig("mouse6").cameras(32)[None])  # kernels are compiled and stored before
    (folder / "cameras.json").write_text(json.dumps({"frames": load_rig("mouse6").cameras(64).to_frames()}))
    (folder / "a.yaml").write_text("rig: mouse6\n")
    words = f"--mvdiff_pretrained {made['components']} --prompt_embeds {made['embeds']} --num_steps 1 --device cpu"
    stage2 = [word for word in settings(toys, "x") if "checkpoint_dir" not in word]
    return {
        **{name: made[name] for name in ("data", "components", "gslrm")}, "photo": folder / "photo.png",
        "sample": toys / "sample_0", "val": toys / "val.txt", "cameras": folder / "cameras.json",
        "stage1": f"--mvdiffusion_checkpoint {made['unet']} {words}", "ply": folder / "a.ply",
        "weights": f"--mvdiffusion_checkpoint {made['unet']} --checkpoint {made['gslrm']} {words} --turntable_views 0",
        "both": f"--mvdiff_unet {made['unet']} --gslrm_checkpoint {made['gslrm']} {words} --turntable_views 0",
        "yaml": folder / "a.yaml",
        "recording": f"--video_dir {filmed}/videos_undist --meta_dir {filmed}", "stage2": " ".join(stage2),
    }  # fmt: skip


@pytest.fixture(scope="module")
def read_only(tmp_path_factory):
    """A folder on a disk that cannot be written: mounted so where that is allowed, else by its permissions."""
    folder = tmp_path_factory.mktemp("disk")
    for command in (("mount", "--bind", folder, folder), ("mount", "-o", "remount,ro,bind", folder)):
        subprocess.run(command, capture_output=True)
    if os.access(folder, os.W_OK):
        folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("neither a mount nor permissions keep root from writing here")
    yield folder
    subprocess.run(("umount", "--lazy", folder), capture_output=True)


def ends_well(name: str, inputs: dict, disk, tmp_path) -> str:
    """Runs a command that cannot write: its one sentence."""
    spec = {"base": "configs/demo_mvdiffusion.yaml", "output_dir": f"{disk}/a", "metrics": ["x"]}
    (tmp_path / "spec.yaml").write_text(json.dumps({**spec, "factors": {"seed_": {"a": {}, "b": {}}}}))
    code, _, err = run(*COMMANDS[name].format(o=disk, spec=tmp_path / "spec.yaml", **inputs).split())
    (told,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and "Traceback" not in err and str(disk) in told, err
    return told


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_disk_is_one_sentence(name, inputs, read_only, tmp_path):
    told = ends_well(name, inputs, read_only, tmp_path)
    assert "Read-only" in told or "read-only" in told or "Permission denied" in told
    assert "another" in told or "name a place" in told


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in SMALL])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_that_looks_whole(name, inputs, tmp_path):
    (tmp_path / "disk").mkdir()
    with file_limit(LIMIT):
        told = ends_well(name, inputs, tmp_path / "disk", tmp_path)
    left = {path.name for path in (tmp_path / "disk").rglob("*")}
    assert "File too large" in told or "could not be written" in told or "fewer than" in told
    finished = {"run.json", "data_mouse_train.txt", "report.html", "quality_report.html", "a.mp4", "clr_embeds.pt"}
    assert not left & finished
    assert not any(name.endswith(".tmp") for name in left if "data.masks" not in name), left
