"""docs/guides/your_animals.md from its first command to its last: its own words, with small sizes appended."""

import json
import shutil
from functools import partial

import pytest
from commands import ROOT, code_blocks, run
from mvdiffusion_tiny import write_dataset
from test_commands import link_code

import gslrm.config
from multiview.config import load_config
from multiview.rig import load_rig
from mvdiffusion import facelift_yaml

GUIDE = ROOT / "docs" / "guides" / "your_animals.md"
SMALLER = {  # command -> what is appended; of a flag that comes twice the last one counts
    "python scripts/make_synthetic_mouse.py": " --num_samples 8 --video_width 160",
    "python scripts/process_mouse_data.py": " --num_samples 8 --image_size 64 --workers 1",
    "python scripts/check_dataset.py": " --workers 1",
    "python train_gslrm.py": " training.schedule.max_fwdbwd_passes=2 training.dataloader.num_workers=0"
    " training.dataloader.batch_size_per_gpu=1 validation.num_samples=1",
    "python train_diffusion.py": " max_train_steps=1 train_batch_size=1 validation_samples=1 validation_num_steps=1",
    "python inference_mouse.py data_mine": " --refine 2 --turntable_views 2 start=stage2",
    "python inference_mouse.py examples": " --num_steps 1 --turntable_views 2",
}


def test_the_guide_runs_from_the_recording_to_the_photograph(tmp_path):
    link_code(tmp_path)
    shutil.copytree(ROOT / "checkpoints" / "demo", tmp_path / "checkpoints" / "demo")
    shipped = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    own_models, printed = GUIDE.read_text().split("## 5.")[0], ""
    commands = [line for block in code_blocks(own_models, "bash") for line in block.splitlines()]
    assert len(commands) == 7
    for command in commands:
        (added,) = [small for start, small in SMALLER.items() if command.startswith(start)]
        done = run(command + added, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        printed += done.stdout
    # What the import prints as next commands is what the guide says, with this recording's names.
    assert all(f"  {command}\n" in printed for command in commands[2:5]), printed
    for stem in ("sample_000004", "mouse"):
        assert (tmp_path / "outputs" / "mine" / stem / "gaussians.ply").is_file()
    record = json.loads((tmp_path / "outputs/mine/mouse/run.json").read_text())
    assert record["rig"]["name"] == "mouse6-measured"
    assert shipped == {path: path.stat().st_mtime_ns for path in shipped}  # the shipped models stay as they are


def test_a_dataset_brings_its_lists_its_views_its_prompts_and_a_folder_of_its_own(tmp_path):
    data = tmp_path / "my data"
    train = write_dataset(data, load_rig("uniform4"), count=3)
    load = partial(load_config, gslrm.config.GSLRMConfig, ROOT / "configs" / "adapt_demo.yaml")
    asked = gslrm.config.dataset_overrides(load(), data)
    config = load([*asked, "training.dataset.num_input_views=3"])  # what is typed wins
    dataset = config.training.dataset
    assert (dataset.num_views, dataset.num_input_views, dataset.dataset_path) == (4, 3, str(train))
    assert config.training.checkpointing.checkpoint_dir == "checkpoints/gslrm/adapted_my data"
    assert config.training.losses.direct_loss_weight == 0  # recordings have no depth
    for name in (ROOT / "configs/adapt_demo_mvdiffusion.yaml", ROOT / "tests/facelift_flat.yaml"):
        before = facelift_yaml.load_training_config(name)
        after = facelift_yaml.load_training_config(name, facelift_yaml.dataset_overrides(before, data))
        assert after.train_data == str(train) and after.validation_data == str(data / "data_mouse_val.txt")
        assert after.prompt_embeds is None and after.output_dir == f"{before.output_dir}_my data"
    with pytest.raises(ValueError, match="nowhere does not exist; make a dataset"):
        gslrm.config.dataset_overrides(load(), tmp_path / "nowhere")
