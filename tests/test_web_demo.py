"""scripts/web_demo.py, as a browser sees it: a photograph in, files out, mistakes answered by a sentence."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import browsing, free_port, served, until
from PIL import Image
from running import run

from gslrm.model.ply import load_ply
from multiview.image import read_photo
from pipeline.verdict import WORDS
from scripts.web_demo import answered, cut, look

PHOTO = Path(__file__).resolve().parent.parent / "examples" / "mouse.png"


@pytest.fixture
def green(tmp_path):
    """A photograph without alpha whose largest thing is a green board beside the mouse."""
    mouse, photo = Image.open(PHOTO).resize((190, 190)), Image.new("RGB", (300, 200), (196, 190, 180))
    photo.paste(mouse, (100, 5), mouse)
    photo.paste((30, 90, 40), (5, 10, 75, 165))
    photo.save(tmp_path / "green.png")
    return str(tmp_path / "green.png")


def test_what_is_outside_of_the_box_counts_as_background(green, monkeypatch, tmp_path):
    monkeypatch.setattr("multiview.segmentation.WEIGHTS", tmp_path / "none")  # the network knows a board from a mouse
    assert torch.equal(cut(green, 0, 0, 100, 100), read_photo(green))
    assert torch.equal(cut(green, 30, 10, 90, 95), read_photo(green)[:, 20:190, 90:270])
    whole, inside = (look(green, left, 0, 100, 100)[0][1].astype(int) for left in (0, 28))
    boards = [((picture[..., 1] - picture[..., 0]) > 40) & (picture[..., 2] < 100) for picture in (whole, inside)]
    assert boards[0].mean() > 0.03 and not boards[1].any()  # the board is taken for the animal; in the box it is gone
    brown = (inside[..., 0] > inside[..., 2] + 10).mean()
    assert 0.03 < brown < 0.2
    assert look(None, 0, 0, 100, 100) == (None, "")


def test_errors_name_the_file_and_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.png").write_text("no picture")
    picture, told = answered(look, None, "")(str(tmp_path / "a" / "bad.png"), 0, 0, 100, 100)
    assert picture is None and told.startswith("image bad.png cannot be read") and str(tmp_path) not in told
    picture, told = answered(look, None, "")(str(PHOTO), 60, 0, 40, 100)
    assert picture is None and "at least 16 each way" in told
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "black.png")
    assert "no animal could be told" in answered(look, None, "")(str(tmp_path / "black.png"), 0, 0, 100, 100)[1]


def test_a_photograph_goes_through_the_page(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "bad.png").write_text("no picture")
    command = ("scripts/web_demo.py", "--num_steps", "1", "--turntable_views", "2", "--device", "cpu")
    with browsing(
        "gradio", served(*command, TMPDIR=str(tmp_path / "here")), viewport={"width": 1100, "height": 1000}
    ) as (page, foreign):
        mask, result = (
            lambda name=name: page.locator(f"#{name} textarea").input_value() for name in ("mask", "result")
        )
        page.get_by_role("button", name="Reconstruct").click()
        assert until(result, "no answer without a photograph") == "Drop a photograph first"
        page.set_input_files("input[type=file]", tmp_path / "bad.png")
        assert "image bad.png cannot be read" in until(mask, "no answer to a bad file")
        page.get_by_label("Clear").or_(page.get_by_label("Remove this file")).first.click()
        page.set_input_files("input[type=file]", PHOTO)
        until(lambda: mask().startswith("Is the whole animal"), "no mask")
        left = page.get_by_label("number input for Box: left")
        left.fill("99")
        left.blur()
        until(lambda: "at least 16 each way" in mask() or "no animal" in mask(), "the box does nothing")
        left.fill("3")
        left.blur()
        until(lambda: mask().startswith("Is the whole animal"), "no mask in the box")
        page.get_by_role("button", name="Reconstruct").click()
        until(lambda: "Gaussians in" in result(), "no result")
        word, count = result().splitlines()[0], result().splitlines()[-1].split(" ")[0].replace(",", "")
        assert word in WORDS
        links = until(lambda: page.locator("#files a").all(), "no downloads")
        names = {Path(link.get_attribute("href")).name: link for link in links}
        assert {"gaussians.ply", "gaussians.splat", "gaussians.spz", "turntable.mp4"} <= names.keys()
        with page.expect_download() as download:
            names["gaussians.ply"].click()
        download.value.save_as(tmp_path / "kept.ply")
        assert load_ply(tmp_path / "kept.ply").num_gaussians == int(count)
        until(lambda: page.locator("canvas").count(), "no 3D model")
        assert str(tmp_path) not in page.inner_text("body") and not foreign
        # What is not handed out cannot be fetched; what is too large is refused.
        record = next((tmp_path / "here").glob("*/result/run.json"))
        assert page.request.get(f"{page.url}gradio_api/file={record}").status == 403
        large = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(21 << 20)}
        assert page.request.post(f"{page.url}gradio_api/upload", multipart={"files": large}).status == 413
    assert not list((tmp_path / "here").iterdir())


def test_refusals_are_one_sentence(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", None)  # the script changes it
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = run("scripts/web_demo.py", "--port", free_port())
    assert code == 1 and err.count("\n") == 1 and "gradio is not installed" in err and "requirements-extra.txt" in err
