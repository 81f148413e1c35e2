"""result.html and index.html: what they hold, what is escaped, and what a browser shows of them without a network."""

import base64
import copy
import json
import math
import os
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import torch
from browsing import PATIENCE_S

from gslrm.model.gaussians_renderer import render
from gslrm.model.ply import save_ply
from multiview.cameras import Cameras
from multiview.files import write_json
from multiview.image import read_rgba
from multiview.sample import read_sample
from pipeline.model import MouseFaceLift
from pipeline.outputs import PosedViews
from pipeline.page import splats_script, write_index
from tests.test_mesh import sphere

ROOT = Path(__file__).parent.parent
HOSTILE = "<img src=x onerror=alert(1)> 100% #1?"
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")


@pytest.fixture(scope="module")
def animal():
    """A mouse by the demo model's Stage 2, as a result that says everything a page can show."""
    sample = read_sample(ROOT / "data_mouse" / "sample_000004")
    views = PosedViews.of(sample.rgba[: sample.num_inputs], sample.cameras[: sample.num_inputs])
    model = MouseFaceLift.load(device="cpu", stages="2")
    result = model.reconstruct(views.rgb, views.masks, views.cameras, refine="off")
    verdict = {"word": "doubtful", "reasons": [f"The body of {HOSTILE} is cut."], "scores": {"consistency": 0.91}}
    return replace(result, photo=sample.rgba[0], record={**result.record, "input": HOSTILE, "verdict": verdict})


@pytest.fixture(scope="module")
def saved(animal, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / HOSTILE
    copy.deepcopy(animal).save(folder, turntable_views=6, turntable_size=64)
    return folder


@pytest.fixture(scope="module")
def page():
    """A page of headless Chromium; what it complains about, and what it asks of a network, is in `page.told`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no {CHROMIUM}")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.set_default_timeout(1000 * PATIENCE_S)
        page.told = []
        page.on("console", lambda message: page.told.append(message.text))
        page.on("pageerror", lambda error: page.told.append(str(error)))
        page.on("dialog", lambda dialog: (page.told.append(dialog.message), dialog.dismiss()))
        page.on("requestfailed", lambda request: page.told.append(request.url))
        page.on("request", lambda it: it.url.startswith(("file:", "data:")) or page.told.append(it.url))
        yield page
        browser.close()


def look(page, path, fragment):
    page.goto("about:blank")
    page.goto(f"{path.absolute().as_uri()}#{fragment}")
    page.wait_for_function("order.length > 0 && !asked && canvas.width === canvas.clientWidth")


def shot(page, path):
    page.locator("canvas").screenshot(path=path)
    return read_rgba(path)[:3]


def agreement(picture, gaussians, azimuth, elevation):
    """PSNR of the animal's pixels, decibels, against our own renderer."""
    lens = 0.5 / math.tan(math.radians(25))
    angles = torch.tensor([float(azimuth)]), torch.tensor([float(elevation)])
    seen = render(gaussians, Cameras.orbit(*angles, 2.7, lens, picture.shape[-1])[None])
    animal = seen.alpha[0, 0, 0] > 0.05
    return -10 * math.log10(((picture - seen.rgb[0, 0].clamp(0, 1)) ** 2)[:, animal].mean())


def test_a_browser_shows_what_our_renderer_shows(page, saved, animal, tmp_path):
    for azimuth, elevation in ((20, 20), (140, -10), (275, 60)):
        look(page, saved / "result.html", f"azimuth={azimuth}&elevation={elevation}")
        picture = shot(page, tmp_path / "canvas.png")
        psnr = agreement(picture, animal.gaussians, azimuth, elevation)
        print(f"azimuth {azimuth}, elevation {elevation}, {picture.shape[-1]} px: {psnr:.1f} dB")
        assert psnr > 40  # measured: 50; 8 bits a layer are what differs
    assert agreement(picture, animal.gaussians, 280, 60) < 30  # that is no accident
    page.wait_for_function("document.querySelector('video').readyState > 1")
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    text = page.inner_text("body")
    assert f"The body of {HOSTILE} is cut." in text and "doubtful" in text and "stage2" in text
    assert page.inner_text("h1") == f"{HOSTILE} doubtful" and page.title() == HOSTILE
    assert page.told == []


def test_hands_move_the_camera_and_the_address_keeps_it(page, saved):
    def view():
        return page.evaluate("({...view})")

    look(page, saved / "result.html", "azimuth=20&elevation=20&distance=nonsense")
    assert view() == {"azimuth": 20, "elevation": 20, "distance": 2.7}
    box = page.locator("canvas").bounding_box()
    x, y = box["x"] + 200, box["y"] + 200
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 50, y + 25)
    page.mouse.up()
    assert view() == {"azimuth": 40, "elevation": 30, "distance": 2.7}
    assert page.url.endswith("#azimuth=40&elevation=30&distance=2.7")
    # Dispatched: a wheel of the mouse is lost where the browser is busy.
    page.evaluate("canvas.dispatchEvent(new WheelEvent('wheel', {deltaY: 200, cancelable: true}))")
    page.locator("canvas").press("ArrowLeft")
    page.locator("canvas").press("ArrowDown")
    page.wait_for_function("view.azimuth === 45 && view.elevation === 25 && view.distance > 3.2")
    assert "azimuth=45&elevation=25&distance=3.3" in page.url
    page.evaluate("""const event = (type, id, x) => canvas.dispatchEvent(new PointerEvent(type,
        {pointerId: id, clientX: x, clientY: 99, pointerType: "touch"}));
        canvas.setPointerCapture = () => {};
        event("pointerdown", 7, 100); event("pointerdown", 8, 200); event("pointermove", 8, 300);
        event("pointerup", 7, 0); event("pointerup", 8, 0)""")
    assert view()["distance"] == pytest.approx(2.7 * math.exp(0.2) / 2, abs=0.01)  # fingers twice as far apart
    page.locator("canvas").dblclick()
    first = page.locator("a[href^='#azimuth']").first.get_attribute("href")
    assert view() == page.evaluate("START") and f"azimuth={view()['azimuth']:.1f}" in first
    page.locator("a[href^='#azimuth']").nth(2).click()
    page.wait_for_function("Math.abs(view.azimuth - START.azimuth) > 90")
    page.locator("#turn").check()
    before = view()["azimuth"]
    page.wait_for_function(f"view.azimuth !== {before}")
    assert page.told == []


def items(folder, count=3):
    """Frames of a sequence: a sphere of another size each, far from the origin and in other units."""
    for number in range(count):
        gaussians = sphere(n=300 * (number + 1))
        matrix = torch.diag(torch.tensor([100.0, 100.0, 100.0, 1.0]))
        matrix[:3, 3] = torch.tensor([500.0, -70.0, 20.0])
        item = folder / f"{HOSTILE} {number}"
        item.mkdir(parents=True)
        save_ply(item / "gaussians.ply", gaussians.moved(matrix))
        told = {"to_rig": torch.linalg.inv(matrix).tolist(), "gaussians": gaussians.num_gaussians, "seconds": 1.25}
        write_json(item / "frame.json", told)


def test_the_slider_steps_through_frames(page, tmp_path):
    items(tmp_path / "out")
    write_index(tmp_path / "out", [f"{HOSTILE} shows no animal"])
    look(page, tmp_path / "out" / "index.html", "azimuth=30&elevation=10")
    assert page.evaluate("order.length") == 300 and page.inner_text("#shown") == f"{HOSTILE} 0"
    assert agreement(shot(page, tmp_path / "a.png"), sphere(n=300), 30, 10) > 40  # the frame is brought to the camera
    page.evaluate("slider.value = 2; slider.oninput()")
    page.wait_for_function("order.length === 900 && !asked")
    assert agreement(shot(page, tmp_path / "a.png"), sphere(n=900), 30, 10) > 40
    page.locator("td a").nth(1).click()
    page.wait_for_function("order.length === 600")
    page.locator("#play").check()
    for length in (900, 300, 600):
        page.wait_for_function(f"order.length === {length}")
    assert f"{HOSTILE} shows no animal" in page.inner_text("body")
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)") and page.told == []


# ---- without a browser ----------------------------------------------------------------------------------------------


def links(text):
    return [unquote_to_bytes(link) for link in re.findall(r"(?:href|src|data-script)=\"([^\"#:]+)\"", text)]


def test_the_page_needs_no_other_file_and_its_links_lead_somewhere(saved):
    text = (saved / "result.html").read_text()
    assert {os.fsdecode(link) for link in links(text)} == {
        "gaussians.ply", "input.png", "multiview.png", "opencv_cameras.json", "run.json", "turntable.mp4"
    }  # fmt: skip
    assert all((saved / os.fsdecode(link)).is_file() for link in links(text))
    assert "<img src=x" not in text and "alert(1)" in text and not re.search(r"https?://", text)
    assert (saved / "run.json").stat().st_mtime_ns >= (saved / "result.html").stat().st_mtime_ns


def test_16_bits_hold_gaussians_closely(animal):
    gaussians = animal.gaussians
    content = re.fullmatch(r'show\("(.*)"\)', splats_script(gaussians))[1]
    table = torch.from_numpy(np.frombuffer(base64.b64decode(content), "<i2").reshape(-1, 16).astype(np.float32))
    assert len(table) == gaussians.num_gaussians
    assert (table[:, :3] / 5000 - gaussians.xyz[0]).abs().max() <= 1.01e-4
    assert (table[:, 3:4] / 32767 - gaussians.get_opacity[0]).abs().max() < 2e-5
    assert (table[:, 4:7] / 2000 - gaussians.scaling[0]).abs().max() < 3e-4
    assert (table[:, 8:12] / 32767 - gaussians.get_rotation[0]).abs().max() < 2e-5
    far = replace(gaussians, xyz=gaussians.xyz + torch.tensor([0.0, 0.0, 9.0]))
    assert splats_script(far) == 'show("")'


def test_an_index_grows_with_its_folder_and_names_what_is_damaged(saved, tmp_path):
    out = tmp_path / "out"
    items(out, 2)
    (out / HOSTILE).symlink_to(saved)
    write_json(out / "no_result" / "run.json", {})
    os.mkdir(os.fsencode(out) + b"/caf\xe9")  # a name that is no UTF-8
    for name in ("gaussians.ply", "frame.json"):
        (out / "caf\udce9" / name).write_bytes((out / f"{HOSTILE} 0" / name).read_bytes())
    write_index(out, ["clip_1 is cut"])
    text = (out / "index.html").read_text()
    assert text.count("<tr data-script") == 4 and "<img src=x" not in text and "no_result" not in text
    assert all(Path(os.fsdecode(os.fsencode(out) + b"/" + link)).is_file() for link in links(text))
    assert "doubtful</b>" in text and "result.html" in text
    items(tmp_path / "more")
    (tmp_path / "more" / f"{HOSTILE} 2").rename(out / "late")
    write_index(out, ["second"], finished=False)
    assert (out / "index.html").read_text() == text  # a moment ago
    (out / f"{HOSTILE} 1" / "gaussians.ply").write_bytes(b"ply\n")
    write_index(out, ["second"])
    text = (out / "index.html").read_text()
    assert text.count("<tr data-script") == 4 and "late/splats.js" in text and "clip_1" not in text
    assert "second" in text and "cannot be read" in text and not list(out.rglob("*.tmp"))
    write_index(out, [], names=["late", f"{HOSTILE} 0"])
    assert re.findall(r'data-name="(\w*)', (out / "index.html").read_text()) == ["late", ""]


def test_an_interrupted_run_leaves_no_page_of_an_earlier_one(saved, animal, tmp_path, monkeypatch):
    result = copy.deepcopy(animal)
    result.save(tmp_path, turntable_views=0)
    assert json.loads((tmp_path / "run.json").read_text())["verdict"]["word"] == "doubtful"
    assert "<video" not in (tmp_path / "result.html").read_text()
    monkeypatch.setattr("gslrm.model.ply.save_ply", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result.save(tmp_path, turntable_views=0)
    assert not (tmp_path / "result.html").exists()


def test_an_installation_has_the_templates():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setup["package-data"]["*"]
    for name in ("page.html", "viewer.js"):
        assert any(Path(name).match(pattern) for pattern in patterns) and (ROOT / "pipeline" / name).is_file()
