"""The commands users are promised, word for word, in a folder prepared with tiny weights in FaceLift's own layout.

Only configuration values are appended (sizes, steps), never a flag changed. A second test runs the training and
inference commands in a folder without those weights: each answers with one sentence that says what is missing.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, code_blocks, run
from mvdiffusion_tiny import SIZE, UNET, write_components, write_dataset

from gslrm.config import GaussiansConfig, ImageTokenizerConfig, ModelConfig, TransformerConfig
from gslrm.model.gslrm import GSLRM
from multiview.rig import load_rig
from multiview.sample import open_dataset, read_dataset_info, read_split
from mvdiffusion.checkpoints import save_training
from mvdiffusion.models.unet import create_unet, save_unet
from mvdiffusion.prompts import load_prompt_embeds

LINKED = (
    "scripts", "configs", "examples", "train_diffusion.py", "train_gslrm.py", "inference_mouse.py",
    "test_full_pipeline.py", "setup_mouse_env.sh", "requirements.txt",
)  # fmt: skip

SETUP = "bash setup_mouse_env.sh"
EMBEDS = "python scripts/generate_mouse_prompt_embeds.py"
PROCESS = (
    "python scripts/process_mouse_data.py --video_dir V --meta_dir M --output_dir data_mouse --num_samples 2000 "
    "--image_size 512"
)
TRAIN_DIFFUSION = "python train_diffusion.py --config configs/mouse_mvdiffusion.yaml"
LAUNCH_DIFFUSION = "accelerate launch --num_processes 4 train_diffusion.py --config configs/mouse_mvdiffusion.yaml"
OVERFIT_GSLRM = "python train_gslrm.py --config configs/mouse_config_finetune.yaml --overfit 10"
TORCHRUN_GSLRM = (
    "torchrun --nproc_per_node 4 --nnodes 1 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint localhost:29500 "
    "train_gslrm.py --config configs/mouse_config_finetune.yaml"
)
GSLRM_V2 = "torchrun --nproc_per_node=1 train_gslrm.py --config configs/mouse_gslrm_v2.yaml"
INFERENCE = (
    "python inference_mouse.py --input_image examples/mouse.png "
    "--mvdiffusion_checkpoint checkpoints/mvdiffusion/mouse/checkpoint-6000 "
    "--checkpoint checkpoints/gslrm/mouse_finetune/ --output_dir outputs/"
)
FULL_PIPELINE = (
    "python test_full_pipeline.py --input_image data_mouse/sample_000000/images/cam_000.png "
    "--mvdiff_unet checkpoints/mvdiffusion/mouse/original_facelift_embeds/checkpoint-6000/unet "
    "--prompt_embeds mvdiffusion/data/mouse_prompt_embeds_6view/clr_embeds.pt "
    "--gslrm_checkpoint checkpoints/gslrm/mouse_finetune --output_dir outputs/pipeline_v1"
)

# What is appended: the sizes of the tiny weights, and a few steps instead of thousands.
SMALL_DIFFUSION = (
    " max_train_steps=1 train_batch_size=1 gradient_accumulation_steps=1 validation_samples=1 validation_num_steps=1"
    " mixed_precision=no dataloader_num_workers=0 output_dir=checkpoints/mvdiffusion/tried"
)
SMALL_GSLRM = (
    f" model.image_tokenizer.image_size={SIZE} model.transformer.d=32 model.transformer.d_head=16"
    " model.transformer.n_layer=1"
    " training.losses.lpips_loss_weight=0 training.losses.perceptual_loss_weight=0 training.dataloader.num_workers=0"
    " training.dataloader.batch_size_per_gpu=1 validation.num_samples=1 training.schedule.max_fwdbwd_passes=2"
)
SHORT = " --num_steps 2 --turntable_views 4"


def link_code(folder: Path) -> Path:
    """The commands of the repository in a folder of its own."""
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    return folder


def must(folder: Path, command: str, product: str = "*") -> subprocess.CompletedProcess:
    done = run(command, folder)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert list(folder.glob(product)), f"{command} did not write {product}"
    return done


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Code, a raw recording in V and M, tiny weights where FaceLift's and the user's own would lie."""
    folder, rig = link_code(tmp_path_factory.mktemp("workspace")), load_rig("mouse6")
    record = "python scripts/make_synthetic_mouse.py --output_dir R --num_samples 12 --as_recording --video_width 160"
    must(folder, record, "R/new_cam.pkl")
    (folder / "R" / "videos_undist").rename(folder / "V")
    (folder / "R").rename(folder / "M")
    # The text encoder's width is the demo's, which `generate_mouse_prompt_embeds.py` without arguments uses.
    pipeckpts = write_components(folder / "checkpoints/mvdiffusion/pipeckpts", write_dataset(folder / "D", rig))
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(pipeckpts / part, folder / "checkpoints/demo/mvdiffusion" / part)
    torch.manual_seed(0)
    unet = create_unet(UNET, rig.num_views, "sparse")
    save_unet(unet, pipeckpts / "unet", rig)
    (pipeckpts / "unet" / "rig.json").unlink()  # public weights carry no rig
    must(folder, EMBEDS, "mvdiffusion/data/mouse_prompt_embeds_6view/clr_embeds.pt")
    embeds = load_prompt_embeds(folder / "mvdiffusion/data/mouse_prompt_embeds_6view")
    config = {"pretrained_model_name_or_path": "checkpoints/mvdiffusion/pipeckpts"}
    for name in ("mouse", "mouse/original_facelift_embeds"):
        sidecar = {"step": 6000, "rig": embeds.rig.to_dict(), "config": config}
        with save_training(folder / "checkpoints/mvdiffusion" / name, sidecar, embeds, {}) as checkpoint:
            save_unet(unet, checkpoint / "unet", embeds.rig)
    model = ModelConfig(
        image_tokenizer=ImageTokenizerConfig(image_size=SIZE),
        transformer=TransformerConfig(d=32, d_head=16, n_layer=1), gaussians=GaussiansConfig(),
    )  # fmt: skip
    (folder / "checkpoints/gslrm").mkdir()
    content = {"model": GSLRM(model).state_dict(), "fwdbwd_pass_step": 21125, "param_update_step": 21125}
    torch.save(content, folder / "checkpoints/gslrm/ckpt_0000000000021125.pt")
    return folder


def test_the_set_up_finds_what_is_installed(tmp_path):
    """With this environment as its .venv."""
    (link_code(tmp_path) / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith(".installed"):
            (tmp_path / ".venv" / entry.name).symlink_to(entry)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv/.installed-requirements.txt")
    done = subprocess.run(SETUP.split(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "already installed" in done.stdout, done.stderr


def test_every_promised_command_works_as_written(workspace):
    """In the order a user would run them; each leaves what the next one needs."""
    done = must(workspace, PROCESS, "data_mouse/quality_report.html")
    assert "12 samples instead of 2000" in done.stdout
    imported = read_dataset_info(workspace / "data_mouse")
    assert imported["rig"].name == "mouse6-measured" and len(read_split(workspace / "data_mouse/data_mouse_train.txt"))

    # The measured rig is not mouse6: training with mouse6's embeddings is refused, and the way out is named.
    done = run(TRAIN_DIFFUSION + SMALL_DIFFUSION, workspace)
    assert done.returncode == 1 and "mouse6-measured" in done.stderr and "to mend:" in done.stderr
    must(workspace, EMBEDS + " --rig data_mouse/dataset.json --output_dir E", "E/clr_embeds.pt")
    small, tried = SMALL_DIFFUSION + " prompt_embeds=E/clr_embeds.pt", workspace / "checkpoints/mvdiffusion/tried"
    must(workspace, TRAIN_DIFFUSION + small, "checkpoints/mvdiffusion/tried/checkpoint-1")
    must(workspace, OVERFIT_GSLRM + SMALL_GSLRM, "checkpoints/gslrm/mouse_finetune_overfit10/ckpt_*.pt")

    # From here on with the samples that ship with the project.
    shutil.rmtree(workspace / "data_mouse")
    shutil.copytree(ROOT / "data_mouse", workspace / "data_mouse")
    shutil.rmtree(workspace / "checkpoints/gslrm/mouse_finetune_overfit10")
    for command in (TRAIN_DIFFUSION, LAUNCH_DIFFUSION):
        shutil.rmtree(tried)
        must(workspace, command + SMALL_DIFFUSION, "checkpoints/mvdiffusion/tried/checkpoint-1/unet/rig.json")
    must(workspace, TORCHRUN_GSLRM + SMALL_GSLRM, "checkpoints/gslrm/mouse_finetune/ckpt_0000000000000002.pt")
    must(workspace, GSLRM_V2 + SMALL_GSLRM, "checkpoints/gslrm/mouse_gslrm_v2/ckpt_0000000000000002.pt")
    must(workspace, INFERENCE + SHORT, "outputs/mouse/gaussians.ply")
    result = "outputs/pipeline_v1/cam_000/stage2_gslrm"
    must(workspace, FULL_PIPELINE + SHORT, f"{result}/gaussians.ply")
    assert json.loads((workspace / result / "run.json").read_text())["rig"]["name"] == "mouse6"


def test_the_guides_commands_for_facelifts_weights_work_as_written(workspace):
    """docs/guides/your_animals.md, section 5, on the weights in FaceLift's layout: any measured rig, no failed try."""
    must(workspace, PROCESS.replace("data_mouse", "data_mine").replace("512", "64"), "data_mine/data_mouse_val.txt")
    (block,) = code_blocks((ROOT / "docs/guides/your_animals.md").read_text().split("\n## 5.")[1], "bash")
    small = {"train_gslrm": SMALL_GSLRM, "train_diffusion": SMALL_DIFFUSION.rpartition(" ")[0], "inference": SHORT}
    for command in block.splitlines():
        (added,) = [text for name, text in small.items() if name in command]
        must(workspace, command + added)
    record = json.loads((workspace / "outputs/mine/mouse/run.json").read_text())
    assert record["rig"]["name"] == "mouse6-measured" and "mouse_data_mine" in record["artifacts"]["unet"]


def test_without_the_weights_each_command_says_what_is_missing_and_where_it_goes(tmp_path):
    link_code(tmp_path)
    for tracked in ("data_mouse", "mvdiffusion/data/mouse_prompt_embeds_6view"):
        shutil.copytree(ROOT / tracked, tmp_path / tracked)
    wanted = {
        TRAIN_DIFFUSION: "checkpoints/mvdiffusion/pipeckpts",
        OVERFIT_GSLRM: "checkpoints/gslrm/ckpt_0000000000021125.pt",
        GSLRM_V2: "checkpoints/gslrm/mouse_finetune",
        INFERENCE: "checkpoints/mvdiffusion/mouse/checkpoint-6000",
        FULL_PIPELINE: "checkpoints/mvdiffusion/mouse/original_facelift_embeds/checkpoint-6000/unet",
        EMBEDS: "checkpoints/demo/mvdiffusion",
        PROCESS: "--meta_dir M",
    }
    for command, name in wanted.items():
        done = run(command, tmp_path)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode != 0 and len(lines) == 1 and name in lines[0], f"{command}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr or command.startswith("torchrun")


def test_importing_into_the_example_dataset_moves_it_aside(tmp_path):
    shutil.copytree(ROOT / "data_mouse", tmp_path / "data_mouse")
    open_dataset(tmp_path / "data_mouse", load_rig("mouse6"), {"seed": 1})
    assert read_split(tmp_path / "data_mouse_example" / "data_mouse_train.txt")[0].is_dir()
    assert [path.name for path in (tmp_path / "data_mouse").iterdir()] == ["dataset.json"]
    with pytest.raises(ValueError, match="seed: 1 there, 2 asked for"):
        open_dataset(tmp_path / "data_mouse", load_rig("mouse6"), {"seed": 2})
