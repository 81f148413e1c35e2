"""Stage 1 over a dataset: what is painted, whose cameras it carries, resuming, shards, refusals."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mvdiffusion_tiny import SIZE, prepare
from pipeline_tiny import run, write_unet

from multiview.cameras import Cameras, read_cameras
from multiview.files import read_json
from multiview.image import read_rgba
from multiview.rig import View, load_rig
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

RIG = load_rig("mouse6")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return prepare(folder) | {"unet": write_unet(folder / "unet", RIG)}


@pytest.fixture(scope="module")
def checkpoints(tiny):
    components = {"mvdiff_pretrained": tiny["components"], "prompt_embeds": tiny["embeds"]}
    return components | {"mvdiffusion_checkpoint": tiny["unet"]}


@pytest.fixture(scope="module")
def model(checkpoints):
    return MouseFaceLift.load(device="cpu", stages="1", num_steps=2, **checkpoints)


@pytest.fixture
def generate(tiny, checkpoints, monkeypatch):
    """Runs the script in this process: (exit code, stdout, stderr)."""

    def call(output: Path, *more, **environment) -> tuple[int, str, str]:
        flags = [word for name, path in checkpoints.items() for word in (f"--{name}", path)]
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        flags += ["--data", tiny["data"], "--output_dir", output, "--num_steps", 2, "--device", "cpu", *more]
        return run("scripts/generate_synthetic_data.py", *flags)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_script_writes_painted_views_with_the_rigs_cameras_and_continues(tiny, generate, model, tmp_path):
    assert generate(tmp_path / "out", "--num_samples", 2)[0] == 0
    info = read_dataset_info(tmp_path / "out")
    assert info["rig"].name == "mouse6" and info["num_steps"] == 2 and info["source"] == "stage1"
    assert "num_draws" not in info  # so datasets begun before there were several go on
    assert all(len(info[f"{name}_sha256"]) == 16 for name in ("unet", "vae", "prompt_embeds"))
    folders, sources = read_split(tmp_path / "out" / "data_mouse_train.txt"), read_split(tiny["data"])
    assert [folder.name for folder in folders] == [folder.name for folder in sources[:2]]
    source, content = read_sample(sources[1]), read_json(folders[1] / "opencv_cameras.json")
    # Image by image: what random weights generate covers the frame, which `read_sample` refuses as no mask.
    rgba = torch.stack([read_rgba(folders[1] / frame["file_path"]) for frame in content["frames"]])
    generated = model.generate(source.rgba[0], seed=content["painted"]["seed"])
    assert torch.equal(rgba[1:, :3], (generated.rgb[1:] * 255).round() / 255)
    assert torch.equal(rgba[:, 3:], generated.masks) and torch.equal(rgba[0], source.rgba[0])
    assert (read_cameras(folders[1] / "opencv_cameras.json").c2w - RIG.cameras(SIZE).c2w).abs().max() < 1e-5
    assert [frame["view"] for frame in content["frames"]] == RIG.view_names
    assert content["painted"]["source"] == source.id and 0 <= content["painted"]["consistency"] <= 1
    before = contents(tmp_path / "out")
    # Continued: the first two stay as they are, two more come.
    assert "4 of 4 samples; generated now: 2" in generate(tmp_path / "out", "--num_samples", 4)[1]
    after = contents(tmp_path / "out")
    assert all(after[name] == content for name, content in before.items() if name.startswith("sample_"))
    code, _, err = generate(tmp_path / "out", "--num_samples", 4, "--seed", 1)
    assert code == 1 and "seed: 0 there, 1 asked for" in err


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


def test_torchrun_ranks_are_shards(tiny, generate, tmp_path):
    generate(tmp_path / "out", "--num_samples", 2, RANK="1", WORLD_SIZE="2")
    names = [folder.name for folder in read_split(tiny["data"])]
    assert not is_complete_sample(tmp_path / "out" / names[0]) and is_complete_sample(tmp_path / "out" / names[1])
    code, _, err = generate(tmp_path / "out", "--shard", "0/2", RANK="1", WORLD_SIZE="2")
    assert code == 1 and "use one of them" in err
    assert generate(tmp_path / "out", "--shard", "2/2")[0] == 2


# ---- references and novel views -------------------------------------------------------------------------------------


def source_with_novel_views(turn_deg: float = 0.0) -> Sample:
    """A sample of the rig's six views and two others, its whole world turned."""
    places = [torch.tensor(values) for values in ([25.0, 200.0], [40.0, 5.0])]
    own, extra = RIG.cameras(SIZE), Cameras.orbit(*places, 2.6, RIG.focal, SIZE)
    cameras = Cameras(torch.cat([own.c2w, extra.c2w]), torch.cat([own.fxfycxcy, extra.fxfycxcy]), SIZE, SIZE)
    rgba = torch.rand(8, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    rgba[:, 3:] = (rgba[:, 3:] > 0.5).float()
    return Sample("s", (rgba * 255).round() / 255, cameras.rotate(turn_deg), [*RIG.view_names, None, None])


@pytest.fixture(scope="module")
def straight():
    return source_with_novel_views()


@pytest.fixture(scope="module")
def painted(straight):
    return Sample("p", straight.rgba[:6], RIG.cameras(SIZE), RIG.view_names)


def test_novel_views_come_along_in_the_rigs_own_world(straight, painted):
    """From view k as the input, the animal stands turned by k steps: the extra cameras turn with it, exactly."""
    for source in (straight, source_with_novel_views(turn_deg=77.0)):
        kept = with_true_views(painted, RIG, source, 0, "novel")
        assert len(kept.rgba) == 8 and kept.view_names[6:] == [None, None]
        assert torch.equal(kept.rgba[6:], source.rgba[6:])
        assert (kept.cameras.c2w[6:] - straight.cameras.c2w[6:]).abs().max() < 1e-4
    # Of all true views, view 2 is the photograph.
    for which, views in (("novel", [6, 7]), ("all", [0, 1, 3, 4, 5, 6, 7])):
        kept = with_true_views(painted, RIG, straight, 2, which)
        assert torch.equal(kept.rgba[6:], straight.rgba[views])
        gap = kept.cameras.azimuth_deg[6:] - straight.cameras.azimuth_deg[views]
        assert torch.allclose(gap % 360, torch.full((len(views),), 240.0), atol=1e-2)
        assert (kept.cameras.c2w[:6] - RIG.cameras(SIZE).c2w).abs().max() == 0
    farther = replace(straight, cameras=straight.cameras.recentre(torch.zeros(3), 1.05))  # another world
    assert len(with_true_views(painted, RIG, farther, 0, "novel").rgba) == 6


def test_depth_of_the_true_animal_comes_along(painted):
    source = source_with_novel_views(turn_deg=77.0)
    source = replace(source, depth=torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, SIZE, SIZE))
    for reference, expected in (
        (0, [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7]), (2, [2, 3, 4, 5, 0, 1, 0, 1, 3, 4, 5, 6, 7]),
    ):  # fmt: skip
        found = with_true_views(painted, RIG, source, reference, "all")
        assert found.depth[:, 0, 0, 0].tolist() == expected and len(found.rgba) == len(expected)
    kept = [0, 1, 2, 3, 4, 6, 7]
    unseen = replace(
        source, cameras=source.cameras[kept], rgba=source.rgba[kept], depth=source.depth[kept],
        view_names=[*RIG.view_names[:5], None, None],
    )  # fmt: skip
    assert with_true_views(painted, RIG, unseen, 0, "all").depth is None  # nobody knows view 5's


def test_every_view_can_be_the_input(model, straight, tmp_path):
    write_sample(tmp_path / "sample_000000", straight)
    write_split(tmp_path / "list.txt", [tmp_path / "sample_000000"])
    write_dataset_info(tmp_path, RIG)
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
    facelift6, path = load_rig("facelift6"), tmp_path / "a.txt"
    write_split(path, [tmp_path / "s"])
    measured = replace(RIG, views=tuple(View(f"v{k}", 57.0 * k, 22.0, 2.8) for k in range(5)))
    write_dataset_info(tmp_path, measured)
    assert len(make_jobs([path], RIG, "all", None, 0)[path]) == 5  # a real recording's views differ a little
    for rig, source, references, message in (
        (RIG, facelift6, "reference", "elevation, degrees differs by 20"),
        (RIG, RIG.with_framing("fill"), "reference", "distance, relative differs by 1"),
        (facelift6, facelift6, "all", "counts from the animal's heading"),
    ):
        write_dataset_info(tmp_path, source)
        with pytest.raises(ValueError, match=message):
            make_jobs([path], rig, references, None, 0)
    with pytest.raises(ValueError, match="different ones of one dataset"):
        make_jobs([path, path], RIG, "reference", None, 0)
    write_dataset_info(tmp_path, RIG)
    path.write_text("black/sample_000001\nwhite/sample_000001\n")
    with pytest.raises(ValueError, match="have one name"):  # of two folders: one would be left out without a word
        make_jobs([path], RIG, "reference", None, 0)


def test_seed_of_a_sample_is_its_own(tiny):
    lists = [tiny["data"]]
    few, many, other = (make_jobs(lists, RIG, "reference", n, seed)[lists[0]] for n, seed in ((2, 0), (4, 0), (4, 1)))
    assert many[:2] == few and len({job.seed for job in many + other}) == 8
