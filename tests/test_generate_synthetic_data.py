"""Stage 1 over a dataset: what is painted, whose cameras it carries, resuming, shards, refusals."""

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mvdiffusion_tiny import SIZE, prepare
from pipeline_tiny import write_unet

from multiview.cameras import Cameras, read_cameras
from multiview.files import read_json
from multiview.image import read_rgba
from multiview.rig import RigMismatchError, View, load_rig
from multiview.sample import (
    Sample,
    is_complete_sample,
    read_dataset_info,
    read_sample,
    read_split,
    write_dataset_info,
    write_sample,
    write_split,
)
from pipeline import MouseFaceLift
from pipeline.dataset import generate_list, generate_samples, make_jobs, with_true_views

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    paths = prepare(folder)
    paths["unet"] = write_unet(folder / "unet", load_rig("mouse6"))
    return paths


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("generate_synthetic_data")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def model(tiny):
    return MouseFaceLift.load(
        device="cpu", stages="1", mvdiffusion_checkpoint=tiny["unet"], mvdiff_pretrained=tiny["components"],
        prompt_embeds=tiny["embeds"], num_steps=2,
    )  # fmt: skip


@pytest.fixture
def generate(tiny, script, monkeypatch, capsys):
    """Runs the script in this process; returns what it printed."""

    def run(output: Path, *more, **environment) -> str:
        arguments = [
            "--data", tiny["data"], "--output_dir", output, "--mvdiffusion_checkpoint", tiny["unet"],
            "--mvdiff_pretrained", tiny["components"], "--prompt_embeds", tiny["embeds"], "--num_steps", 2,
            "--device", "cpu", *more,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["generate_synthetic_data.py", *map(str, arguments)])
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        script.main()
        return capsys.readouterr().out

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_script_writes_painted_views_with_the_rigs_cameras_and_continues(
    tiny, generate, model, tmp_path
):
    generate(tmp_path / "out", "--num_samples", 2)
    info = read_dataset_info(tmp_path / "out")
    assert info["rig"].name == "mouse6" and info["num_steps"] == 2 and info["source"] == "stage1"
    assert all(len(info[f"{name}_sha256"]) == 16 for name in ("unet", "vae", "prompt_embeds"))
    folders, sources = read_split(tmp_path / "out" / "data_mouse_train.txt"), read_split(tiny["data"])
    assert [folder.name for folder in folders] == [folder.name for folder in sources[:2]]
    source, content = read_sample(sources[1]), read_json(folders[1] / "opencv_cameras.json")
    # Image by image: what random weights generate covers the frame, which `read_sample` refuses as no mask.
    rgba = torch.stack([read_rgba(folders[1] / frame["file_path"]) for frame in content["frames"]])
    generated = model.generate(source.rgba[0], seed=content["painted"]["seed"])
    assert torch.equal(rgba[1:, :3], (generated.rgb[1:] * 255).round() / 255)
    assert torch.equal(rgba[:, 3:], generated.masks) and torch.equal(rgba[0], source.rgba[0])
    rig, cameras = load_rig("mouse6"), read_cameras(folders[1] / "opencv_cameras.json")
    assert (cameras.c2w - rig.cameras(SIZE).c2w).abs().max() < 1e-5
    assert [frame["view"] for frame in content["frames"]] == rig.view_names
    assert content["painted"]["source"] == source.id and 0 <= content["painted"]["consistency"] <= 1
    before = contents(tmp_path / "out")
    # Continued: the first two stay as they are, two more come.
    assert "4 of 4 samples; generated now: 2" in generate(tmp_path / "out", "--num_samples", 4)
    after = contents(tmp_path / "out")
    assert all(after[name] == content for name, content in before.items() if name.startswith("sample_"))
    with pytest.raises(ValueError, match="seed: 0 there, 1 asked for"):
        generate(tmp_path / "out", "--num_samples", 4, "--seed", 1)


def test_two_shards_and_a_killed_run_give_what_one_run_gives(tiny, model, tmp_path):
    jobs = make_jobs([tiny["data"]], model.rig, "reference", 5, 3)[tiny["data"]]

    def run(name: str, shard=(0, 1)) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        generate_list(tmp_path / name / "data_mouse_train.txt", jobs, model, 2, shard)
        return tmp_path / name

    run("whole")
    assert len(read_split(run("shards", (1, 2)) / "data_mouse_train.txt")) == 2
    run("shards", (0, 2))
    # Killed in the middle of the second batch of two: one sample of it there, one half written, the list not.
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for job in jobs[3:]:
        shutil.rmtree(killed / job.name)
    (killed / f".{jobs[3].name}.0a0a0a0a.tmp").mkdir()
    (killed / "data_mouse_train.txt").unlink()
    run("killed")
    whole = contents(tmp_path / "whole")
    assert len([name for name in whole if name.endswith("opencv_cameras.json")]) == 5
    assert contents(tmp_path / "shards") == whole and contents(tmp_path / "killed") == whole
    assert [folder.name for folder in read_split(tmp_path / "whole" / "data_mouse_train.txt")] == [j.name for j in jobs]


def test_torchrun_ranks_are_shards(tiny, script, generate, tmp_path):
    generate(tmp_path / "out", "--num_samples", 2, RANK="1", WORLD_SIZE="2")
    names = [folder.name for folder in read_split(tiny["data"])]
    assert not is_complete_sample(tmp_path / "out" / names[0]) and is_complete_sample(tmp_path / "out" / names[1])
    with pytest.raises(ValueError, match="use one of them"):
        generate(tmp_path / "out", "--shard", "0/2", RANK="1", WORLD_SIZE="2")
    with pytest.raises(SystemExit):
        generate(tmp_path / "out", "--shard", "2/2")


# ---- references and novel views -------------------------------------------------------------------------------------


def source_with_novel_views(folder: Path, turn_deg: float = 0.0) -> Sample:
    """A sample of the rig's six views and two others, its whole world turned."""
    rig = load_rig("mouse6")
    own, extra = (
        rig.cameras(SIZE),
        Cameras.orbit(torch.tensor([25.0, 200.0]), torch.tensor([40.0, 5.0]), 2.6, rig.focal, SIZE),
    )
    cameras = Cameras(torch.cat([own.c2w, extra.c2w]), torch.cat([own.fxfycxcy, extra.fxfycxcy]), SIZE, SIZE)
    rgba = torch.rand(8, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    rgba[:, 3:] = (rgba[:, 3:] > 0.5).float()
    sample = Sample("s", (rgba * 255).round() / 255, cameras.rotate(turn_deg), [*rig.view_names, None, None])
    write_sample(folder, sample)
    return sample


def test_novel_views_come_along_in_the_rigs_own_world(tmp_path):
    """From view k as the input, the animal stands turned by k steps: the extra cameras turn with it, exactly."""
    rig = load_rig("mouse6")
    straight = source_with_novel_views(tmp_path / "a")
    turned = source_with_novel_views(tmp_path / "b", turn_deg=77.0)
    painted = Sample("p", straight.rgba[:6], rig.cameras(SIZE), rig.view_names)
    for source in (straight, turned):
        kept = with_true_views(painted, rig, source, 0, "novel")
        assert len(kept.rgba) == 8 and kept.view_names[6:] == [None, None]
        assert torch.equal(kept.rgba[6:], source.rgba[6:])
        assert (kept.cameras.c2w[6:] - straight.cameras.c2w[6:]).abs().max() < 1e-4
    from_third = with_true_views(painted, rig, straight, 2, "novel")
    gap = from_third.cameras.azimuth_deg[6:] - straight.cameras.azimuth_deg[6:]
    assert torch.allclose(gap % 360, torch.full((2,), 240.0), atol=1e-2)
    assert (from_third.cameras.c2w[:6] - rig.cameras(SIZE).c2w).abs().max() == 0
    everything = with_true_views(painted, rig, straight, 2, "all")  # view 2 is the photograph
    assert torch.equal(everything.rgba[6:], straight.rgba[[0, 1, 3, 4, 5, 6, 7]])
    gap = everything.cameras.azimuth_deg[6:11] - straight.cameras.azimuth_deg[[0, 1, 3, 4, 5]]
    assert torch.allclose(gap % 360, torch.full((5,), 240.0), atol=1e-2)


def test_depth_of_the_true_animal_comes_along(tmp_path):
    rig = load_rig("mouse6")
    source = source_with_novel_views(tmp_path / "a", turn_deg=77.0)
    source = replace(source, depth=torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, SIZE, SIZE))
    painted = Sample("p", source.rgba[:6], rig.cameras(SIZE), rig.view_names)
    for reference, expected in (
        (0, [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7]), (2, [2, 3, 4, 5, 0, 1, 0, 1, 3, 4, 5, 6, 7]),
    ):  # fmt: skip
        found = with_true_views(painted, rig, source, reference, "all")
        assert found.depth[:, 0, 0, 0].tolist() == expected and len(found.rgba) == len(expected)
    kept = [0, 1, 2, 3, 4, 6, 7]
    unseen = replace(
        source, cameras=source.cameras[kept], rgba=source.rgba[kept], depth=source.depth[kept],
        view_names=[*rig.view_names[:5], None, None],
    )  # fmt: skip
    assert with_true_views(painted, rig, unseen, 0, "all").depth is None  # nobody knows view 5's


def test_novel_views_of_another_world_are_left_out(tmp_path):
    rig = load_rig("mouse6")
    source = source_with_novel_views(tmp_path / "a")
    farther = replace(source, cameras=source.cameras.recentre(torch.zeros(3), 1.05))
    painted = Sample("p", source.rgba[:6], rig.cameras(SIZE), rig.view_names)
    assert len(with_true_views(painted, rig, farther, 0, "novel").rgba) == 6


def test_every_view_can_be_the_input(model, tmp_path):
    source_with_novel_views(tmp_path / "sample_000000")
    write_split(tmp_path / "list.txt", [tmp_path / "sample_000000"])
    write_dataset_info(tmp_path, load_rig("mouse6"))
    jobs = make_jobs([tmp_path / "list.txt"], model.rig, "all", None, 0)[tmp_path / "list.txt"]
    assert [job.name for job in jobs] == [f"sample_000000_ref{k}" for k in range(6)]
    (sample,) = generate_samples(model, [jobs[4]], true_views="novel")
    source = read_sample(tmp_path / "sample_000000")
    assert torch.equal(sample.rgba[0], source.rgba[4]) and len(sample.rgba) == 8
    (repainted,) = generate_samples(model, [jobs[4]], keep_input_view=False, true_views="novel")
    assert not torch.equal(repainted.rgba[0], source.rgba[4])
    assert torch.equal(repainted.rgba[1:], sample.rgba[1:])


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_pictures_not_taken_as_the_reference_view_are_refused(tmp_path):
    mouse6, facelift6, path = load_rig("mouse6"), load_rig("facelift6"), tmp_path / "a.txt"
    write_split(path, [tmp_path / "s"])
    measured = replace(mouse6, views=tuple(View(f"v{k}", 57.0 * k, 22.0, 2.8) for k in range(5)))
    write_dataset_info(tmp_path, measured)
    assert len(make_jobs([path], mouse6, "all", None, 0)[path]) == 5  # a real recording's views differ a little
    for rig, source, references, message in (
        (mouse6, facelift6, "reference", "elevation, degrees differs by 20"),
        (mouse6, mouse6.with_framing("fill"), "reference", "distance, relative differs by 1"),
        (facelift6, facelift6, "all", "counts from the animal's heading"),
    ):
        write_dataset_info(tmp_path, source)
        with pytest.raises(ValueError, match=message):
            make_jobs([path], rig, references, None, 0)
    with pytest.raises(ValueError, match="different ones of one dataset"):
        make_jobs([path, path], mouse6, "reference", None, 0)


def test_artifacts_of_different_rigs_are_refused(tiny, tmp_path):
    other = write_unet(tmp_path / "unet", load_rig("uniform6"))
    with pytest.raises(RigMismatchError):
        MouseFaceLift.load(
            stages="1", mvdiffusion_checkpoint=other, mvdiff_pretrained=tiny["components"],
            prompt_embeds=tiny["embeds"],
        )  # fmt: skip


def test_seed_of_a_sample_is_its_own(tiny):
    rig, lists = load_rig("mouse6"), [tiny["data"]]
    few, many, other = (make_jobs(lists, rig, "reference", n, seed)[lists[0]] for n, seed in ((2, 0), (4, 0), (4, 1)))
    assert many[:2] == few and len({job.seed for job in many + other}) == 8
