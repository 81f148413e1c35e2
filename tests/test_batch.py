"""Folders and videos of photographs: what is skipped, done again, refused; and the verdict on each result."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from pipeline_tiny import prepare_pipeline

from multiview.image import prepare_photo, save_video, write_image
from multiview.metrics import mask_iou
from multiview.sample import read_sample, read_split
from pipeline import MouseFaceLift
from pipeline.batch import FOREIGN_SUFFIXES, film_photos, folder_photos, reconstruct_photos, video_photos
from pipeline.options import Options
from pipeline.outputs import PosedViews
from pipeline.verdict import PHOTO_LIMITS, POSED_LIMITS, WORDS, judge, photo_scores


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    paths = prepare_pipeline(tmp_path_factory.mktemp("batch"))
    files = {"mvdiffusion_checkpoint": paths["unet"], "checkpoint": paths["gslrm"], "prompt_embeds": paths["embeds"]}
    model = MouseFaceLift.load(device="cpu", num_steps=1, mvdiff_pretrained=paths["components"], **files)
    model.mouse = read_sample(read_split(paths["data"])[0]).rgba[0]
    return model


def saver(folder):
    return lambda name, result: result.save(folder / name, turntable_views=0)


def test_a_batch_goes_on_after_a_failure_and_skips_what_is_done(model, tmp_path, capsys):
    source, out, failed = tmp_path / "in", tmp_path / "out", {}
    source.mkdir()
    for name in "abc":
        write_image(source / f"{name}.png", model.mouse)
    write_image(source / "empty.png", torch.zeros(4, 32, 32))
    (source / f"phone{min(FOREIGN_SUFFIXES)}").write_bytes(b"0")
    photos = folder_photos(source, "auto", failed)
    assert list(failed) == ["phone.arw"] and [photo.name for photo in photos] == ["a", "b", "c", "empty"]
    for rank in (0, 1):  # as torchrun shares them
        words = reconstruct_photos(model, photos, out, saver(out), failed, share=(rank, 2), seed=3)
        assert len(words) == 2 - rank and set(words.values()) <= set(WORDS)
    assert "shows no animal" in failed["empty"] and "2 of 2 done" in capsys.readouterr().out
    times = {name: (out / name / "run.json").stat().st_mtime_ns for name in "abc"}
    os.utime(source / "b.png", ns=(2 * times["b"], 2 * times["b"]))  # another photograph of the same name
    shutil.rmtree(out / "c")
    words = reconstruct_photos(model, photos, out, saver(out), {}, seed=3)
    told = capsys.readouterr().out
    assert "1 of 4: a is there already" in told and "3 results" in told and "4 of 4 failed" in told and len(words) == 3
    assert [(out / name / "run.json").stat().st_mtime_ns == times[name] for name in "abc"] == [True, False, False]
    with pytest.raises(
        ValueError, match="a was made with seed 3, asked for is 4; name a new --output_dir, or.*overwri"
    ):
        reconstruct_photos(model, photos, out, saver(out), {}, seed=4)
    reconstruct_photos(model, photos[:1], out, saver(out), {}, seed=4, overwrite=True)
    assert json.loads((out / "a" / "run.json").read_text())["seed"] == 4


@pytest.fixture(scope="module")
def clip(model, tmp_path_factory):
    """A mouse of 40 pixels that walks right and shakes by 3 pixels, gone in the fourth frame; and its masks."""
    folder, rng, frames, masks = tmp_path_factory.mktemp("clip"), np.random.default_rng(0), [], []
    small = torch.nn.functional.interpolate(model.mouse[None], (80, 80), mode="area")[0]
    for number in range(8):
        whole = torch.zeros(4, 96, 160)
        top, left = 8 + int(rng.integers(-3, 4)), 8 + 9 * number + int(rng.integers(-3, 4))
        if number != 3:
            whole[:, top : top + 80, left : left + 80] = small
        frames.append(whole[:3] * whole[3:] + 0.8 * (1 - whole[3:]))
        masks.append((whole[3:] > 0.5).float().expand(3, -1, -1))
    for name, images in (("clip", frames), ("mask", masks), ("short", masks[:2]), ("none", [masks[3]] * 8)):
        save_video(folder / f"{name}.mp4", torch.stack(images), fps=10)
    return folder


def test_a_video_is_cropped_steadily_and_its_frames_are_found_again(model, clip, tmp_path, capsys):
    failed = {}
    photos, rate = video_photos(clip / "clip.mp4", clip / "mask.mp4", 1, Options(), failed)
    assert [photo.told["frame"]["number"] for photo in photos] == [0, 1, 2, 4, 5, 6, 7] and not failed
    assert "frame 3 is skipped" in capsys.readouterr().err and rate == pytest.approx(10)
    x, y, side = np.array([photo.told["frame"]["window"] for photo in photos]).T
    assert len(set(side)) == 1 and (np.diff(x) > 0).all() and np.abs(np.diff(y)).max() < 3
    assert photos[4].told["frame"]["seconds"] == pytest.approx(0.5, abs=0.01)
    for photo in photos[1:4]:  # the window, cut from the whole frame, is what the model sees
        corner, box = photo.told["frame"]["corner"], photo.told["frame"]["window"]
        whole = np.zeros((96, 160, 4), np.uint8)
        height, width = photo.image.shape[:2]
        whole[corner[1] : corner[1] + height, corner[0] : corner[0] + width] = photo.image
        seen, again = (
            prepare_photo(torch.from_numpy(image).permute(2, 0, 1) / 255, 64, crop=crop)[0]
            for image, crop in ((photo.image, photo.crop), (whole, tuple(box)))
        )
        assert mask_iou(seen[3:], again[3:]) > 0.97
    out = tmp_path / "out"
    words = reconstruct_photos(model, photos[:3], out, saver(out), failed)
    record = json.loads((out / photos[1].name / "run.json").read_text())
    assert record["frame"]["window"] == photos[1].told["frame"]["window"] and record["asked"]["crop"] != "auto"
    assert words == reconstruct_photos(model, photos[:3], out, saver(out), failed)  # all there already
    film_photos(out, photos, failed, model.rig, rate)
    assert not (out / "film.mp4").exists()  # not all results are there
    film_photos(out, photos[:3], failed, model.rig, rate)
    assert (out / "film.mp4").stat().st_size > 1000


def test_a_mask_video_must_go_with_the_video(clip):
    with pytest.raises(ValueError, match="short.mp4 must have the size and frames of .*clip.mp4; frame 2 has none"):
        video_photos(clip / "clip.mp4", clip / "short.mp4", 1, Options(), {})
    with pytest.raises(ValueError, match="shows no animal in any frame"):
        video_photos(clip / "clip.mp4", clip / "none.mp4", 1, Options(), {})


# ---- the verdict ----------------------------------------------------------------------------------------------------


def blob(rows, columns, value=None):
    image = torch.rand(4, 128, 128, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    image[3] = 0
    image[3, rows[0] : rows[1], columns[0] : columns[1]] = 1
    if value is not None:
        image[:3] = value
    return image


@pytest.mark.parametrize(
    ("photo", "report", "wrong"),
    [
        (blob((40, 80), (30, 90)), {}, None),
        (blob((60, 64), (10, 120)), {}, "thickness"),
        (torch.maximum(blob((20, 50), (20, 50)), blob((70, 100), (70, 100))), {}, "single"),
        (blob((40, 80), (30, 90)), {"on_border": 0.9}, "inside"),
        (blob((40, 80), (30, 90)), {"scale": 4.0}, "detail"),
        (torch.cat([torch.linspace(0.3, 0.7, 128).expand(3, 128, 128), blob((40, 80), (30, 90))[3:]]), {}, "sharpness"),
        (blob((40, 80), (30, 90)) * torch.tensor([0.1, 0.1, 0.1, 1]).view(4, 1, 1), {}, "brightness"),
        (1 - 0.05 * blob((40, 80), (30, 90)).flip(1) * torch.tensor([1, 1, 1, 0]).view(4, 1, 1), {}, "shade"),
    ],
)
def test_what_a_photograph_says_of_itself(photo, report, wrong):
    photo[3] = torch.where(photo[3] > 0.5, 1.0, 0.0)
    if wrong == "shade":
        photo[3] = blob((40, 80), (30, 90))[3]
    scores = photo_scores(photo, {"on_border": 0.0, "scale": 1.0, **report})
    assert set(scores) <= set(PHOTO_LIMITS)
    low = {name for name, value in scores.items() if not value >= PHOTO_LIMITS[name][0]}
    assert low == ({wrong} if wrong else set())


def test_the_word_is_the_worst_scores_and_each_reason_is_told(model):
    result = model(model.mouse)
    verdict = result.record["verdict"]
    assert verdict["word"] == "poor" and any("Gaussians look unlike" in reason for reason in verdict["reasons"])
    assert set(verdict["scores"]) <= {*PHOTO_LIMITS, "anisotropy_p95"}
    for psnr, iou, word in (
        (27, 0.97, "good"),
        (18, 0.97, "doubtful"),
        (27, 0.7, "poor"),
        (math.nan, 0.97, "poor"),
    ):
        record = {"refinement": {"given_after": {"psnr": psnr, "iou": iou}}, "agreement_of_masks": 0.95}
        told = judge(result.gaussians, result.views, record, None, 0)
        assert told["word"] == word and len(told["reasons"]) == (word != "good"), told
        assert set(told["scores"]) == {*POSED_LIMITS, "anisotropy_p95"}
        pair = PosedViews(result.views.rgb[:2], result.views.masks[:2], result.views.cameras[:2])
        assert judge(result.gaussians, pair, record, None, 0)["word"] == "poor"


@pytest.mark.parametrize(("name", "word"), [("mouse", "good"), ("chair", "poor")])
def test_the_shipped_models_know_a_mouse_from_a_chair(name, word, demo, tmp_path):
    path = "examples/mouse.png"
    if name == "chair":
        image = torch.full((3, 400, 400), 0.94)
        seat, back, legs = (180, 210, 120, 280), (60, 180, 120, 140), ((210, 330, 120, 138), (210, 330, 260, 278))
        for top, bottom, left, right in (seat, back, *legs):
            image[:, top:bottom, left:right] = torch.tensor([0.47, 0.27, 0.12]).view(3, 1, 1)
        path = tmp_path / "chair.png"
        write_image(path, image)
    assert demo(str(path)).record["verdict"]["word"] == word


@pytest.fixture(scope="module")
def demo():
    return MouseFaceLift.load(device="cpu")
