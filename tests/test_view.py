"""scripts/view.py: what it finds, what a browser then shows, and how it refuses."""

import io
import json
import math
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from browsing import browsing, free_port, pixels, served, until
from gslrm_toys import toy_sample
from PIL import Image
from running import run

from gslrm.model.gaussians import C0, Gaussians
from gslrm.model.ply import save_ply
from multiview.metrics import psnr
from multiview.rig import load_rig
from multiview.sample import write_sample

ROOT = Path(__file__).resolve().parent.parent
COLORS = {"red": (0.9, 0.05, 0.05), "green": (0.05, 0.7, 0.05), "blue": (0.05, 0.05, 0.9)}


def ball(color, tall=1.0):
    """An ellipsoid of one color, `tall` times as high as wide."""
    points = torch.nn.functional.normalize(torch.randn(1, 800, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    points = 0.3 * points * torch.tensor([1.0, 1.0, tall])
    features = ((torch.tensor(color) - 0.5) / C0).expand(1, 800, 1, 3)
    rotation = torch.tensor([1.0, 0, 0, 0]).expand(1, 800, 4)
    return Gaussians(points, features, torch.full((1, 800, 3), math.log(0.04)), rotation, torch.full((1, 800, 1), 6.0))


@pytest.fixture
def sequence(tmp_path):
    """Three frames, tall ellipsoids that are red, green and blue; the first one with cameras and a verdict."""
    write_sample(tmp_path / "frame_0", toy_sample(0, load_rig("mouse6"), 64))
    for number, color in enumerate(COLORS.values()):
        save_ply(tmp_path / f"frame_{number}" / "gaussians.ply", ball(color, tall=2.0))
    verdict = {"word": "doubtful", "reasons": ["<i>blurred</i>"], "scores": {}}
    (tmp_path / "frame_0" / "run.json").write_text(json.dumps({"verdict": verdict}))
    return tmp_path


def dominant(page, name):
    """Rows and columns of the pixels that have clearly the color."""
    shown, channel = pixels(page)[:, :450], list(COLORS).index(name)
    others = [other for other in range(3) if other != channel]
    return torch.from_numpy((shown[..., channel] > 100) & (shown[..., others].max(-1) < 90)).nonzero()


def test_a_browser_shows_a_sequence_upright_plays_it_and_follows_newer_files(sequence):
    options = {"viewport": {"width": 800, "height": 400}}
    with browsing("viser", served("scripts/view.py", sequence, "--refresh", "0.3"), **options) as (page, foreign):
        until(lambda: len(dominant(page, "red")) > 500, "no red ellipsoid")
        page.wait_for_timeout(1000)  # it fades in
        red = dominant(page, "red")
        high, wide = (red.amax(0) - red.amin(0) + 1).tolist()
        assert 1.5 < high / wide < 2.5  # z is up
        text = page.inner_text("body")
        assert "verdict: doubtful" in text and "<i>blurred</i>" in text and "rendered: PSNR" in text
        with page.expect_download() as download:
            page.get_by_role("button", name="Screenshot").click()
        kept = Image.open(io.BytesIO(Path(download.value.path()).read_bytes())).convert("RGB")
        assert len(kept.getcolors(1 << 20)) > 100
        page.get_by_role("slider").first.press("ArrowRight")
        until(lambda: len(dominant(page, "green")) > 500 and not len(dominant(page, "red")), "the slider does nothing")
        assert "frame_1" in page.inner_text("body")
        page.get_by_text("Play", exact=True).click()
        until(lambda: len(dominant(page, "blue")) > 500, "the film does not play")
        page.get_by_text("Stop", exact=True).click()
        for folder in sequence.glob("frame_*"):  # results are replaced, and one is added
            save_ply(folder / "gaussians.ply", ball((0.05, 0.7, 0.05)))
        save_ply(sequence / "frame_3" / "gaussians.ply", ball((0.05, 0.7, 0.05)))
        until(lambda: len(dominant(page, "green")) > 500, "newer files are not seen")
        until(lambda: page.get_by_role("slider").first.get_attribute("aria-valuemax") == "3", "no fourth frame")
        assert not foreign


def test_results_samples_and_checkpoints_are_found(sequence, tmp_path):
    from pipeline.viewer import list_items

    assert list(list_items(sequence)) == ["frame_0", "frame_1", "frame_2"]
    (stamp, load) = list_items(sequence / "frame_0")["frame_0"]
    gaussians, views, told = load()
    assert gaussians.num_gaussians == 800 and views.rgb.shape == (8, 3, 64, 64) and told[0] == "verdict: doubtful"
    assert list_items(sequence / "frame_1")["frame_1"][1]().views is None
    assert list_items(sequence, sequence)["frame_0"][1]().views is not None  # true views from a dataset
    data = list_items(ROOT / "data_mouse")
    gaussians, views, told = data["sample_000004"][1]()
    assert len(data) == 20 and gaussians is None and views.rgb.shape == (8, 3, 128, 128)


def test_the_newest_checkpoint_is_asked_for_the_validation_samples(tmp_path):
    from gslrm.model.gaussians_renderer import render
    from pipeline.viewer import list_items

    source = next((ROOT / "checkpoints/demo/gslrm").glob("*.pt"))
    content = json.loads(Path(f"{source}.json").read_text())
    for step in (1, 2):
        path = tmp_path / f"ckpt_{step:016d}.pt"
        shutil.copy(source, path)
        Path(f"{path}.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="split list .* does not exist"):  # the demo's own list does not ship
            list_items(tmp_path)
        items = list_items(tmp_path, ROOT / "data_mouse" / "data_mouse_val.txt")
        stamp, load = next(iter(items.values()))
        assert stamp[0] == path  # the newest
    gaussians, views, told = load()
    rendered = render(gaussians, views.cameras[None]).rgb[0]
    assert told[0] == path.name and float(psnr(rendered, views.rgb).mean()) > 20


def test_refusals_are_one_sentence(sequence, tmp_path, monkeypatch):
    pytest.importorskip("viser")
    (tmp_path / "empty").mkdir()
    for folder, told in ((tmp_path / "empty", "holds nothing to show"), (tmp_path / "nowhere", "does not exist")):
        code, _, err = run("scripts/view.py", folder, "--port", free_port())
        assert code == 1 and err.count("\n") == 1 and f"{folder} {told}" in err
    (sequence / "frame_1" / "gaussians.ply").write_bytes(b"ply\n")
    code, _, err = run("scripts/view.py", sequence / "frame_1", "--port", free_port())
    assert code == 1 and err.count("\n") == 1 and "cannot be read" in err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("scripts/view.py", sequence, "--port", port)
        assert code == 1 and f"127.0.0.1:{port} cannot be served" in err and "choose another --port" in err
    monkeypatch.setitem(sys.modules, "viser", None)
    code, _, err = run("scripts/view.py", sequence, "--port", free_port())
    assert code == 1 and "viser is not installed" in err and "requirements-extra.txt" in err
