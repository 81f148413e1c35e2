"""What a real rig films comes back, through every kind of lens: points, pictures, silhouettes, hull."""

import json
from dataclasses import replace

import numpy as np
import pytest
from round_trip import direct_rendering, marked, marker_errors, share_in_hull

from multiview.image import composite
from multiview.metrics import foreground_psnr, mask_iou
from multiview.sample import read_sample
from recording.calibration.formats import FORMATS, read_calibration, write_calibration
from recording.importer import process_recording
from recording.settings import ImportSettings
from synthetic.dataset import ARENA_REACH, load_real_rig, stand_in_arena, write_recording
from synthetic.scene import mouse_sequence

WIDTH, SIZE = 576, 192  # half of the real photographs' width: two of their pixels make one of the picture's
HOLDS = {  # which formats can hold which lenses; the first is imported, the others say the same
    "none": tuple(FORMATS),
    "distorted": ("transforms", "colmap_text", "colmap_binary"),
    "distorted and skewed": ("dannce", "anipose"),
}


def rig_with(lens: str):
    calibration = load_real_rig(width=WIDTH, lens="none" if lens == "none" else "real")[0]
    if lens == "distorted":  # the real lenses on sensors without skew
        calibration = replace(calibration, K=calibration.K * [[1, 0, 1], [1, 1, 1], [1, 1, 1]])
    return calibration


@pytest.fixture(scope="module")
def clouds():
    """A mouse, then one whose keypoints shine and nothing else does."""
    arena = load_real_rig()[1]
    mouse, other = (stand_in_arena(c, arena) for c in mouse_sequence(0, 2, fps=2, arena_radius=ARENA_REACH))
    return [mouse, replace(other, meta={"marked": True})]


@pytest.fixture(scope="module", params=HOLDS)
def imported(request, tmp_path_factory, clouds, render):
    """Lens, recording of both frames, report and samples of its import."""
    lens, folder, calibration = request.param, tmp_path_factory.mktemp("raw"), rig_with(request.param)

    def shoot(cloud, cameras):
        rgb, alpha, depth = render(cloud, cameras)
        return (render(marked(cloud), cameras)[0] if cloud.meta.get("marked") else rgb), alpha, depth

    write_recording(folder / "recording", calibration, clouds, shoot, background=0.0, quality_crf=0)
    path, *others = (write_calibration(folder / name, calibration, name) for name in HOLDS[lens])
    assert all(read_calibration(other).close_to(read_calibration(path)) for other in others)
    settings = ImportSettings(
        folder / "recording" / "videos_undist", folder / "recording", folder / "data", num_samples=2, image_size=SIZE,
        framing="fill", workers=1, calibration=path,
    )  # fmt: skip
    report = process_recording(settings)
    return lens, folder / "recording", report, [read_sample(folder / "data" / f"sample_00000{k}") for k in range(2)]


def test_import_gives_back_what_was_filmed(imported, clouds, render):
    lens, _, report, (sample, lit) = imported
    errors = marker_errors(lit, clouds[1].keypoints)
    assert len(errors) >= 12 and np.sqrt((errors**2).sum(axis=1).mean()) < 0.1  # pixels; asked for: 0.5
    assert np.abs(errors.mean(axis=0)).max() < 0.03  # no half pixel anywhere
    rgb, alpha = direct_rendering(clouds[0], sample, render, rig_with(lens))
    mask = (alpha > 0.5).float()
    assert foreground_psnr(composite(sample.rgba, 0.0), rgb, mask).mean() > 35
    assert mask_iou((sample.rgba[:, 3:] > 0.5).float(), mask).min() > 0.97
    assert report["clipped_views"] == 0 and report["pictures"]["tangency_rms"] < 0.003


def test_visual_hull_holds_the_true_surface(imported):
    _, recording, _, samples = imported
    with np.load(recording / "truth.npz") as truth:
        surfaces = truth["surface"]
    for sample, surface in zip(samples, surfaces, strict=True):
        assert share_in_hull(sample, surface) > 0.99
        aside = np.array([0.0, 0.0, 8.0]) if surface[:, 2].max() < 40 else np.array([8.0, 0.0, 0.0])
        assert share_in_hull(sample, surface + aside) < 0.95  # 8 mm off are noticed


def test_true_keypoints_and_centre_are_written_beside_the_recording(imported, clouds):
    truth = json.loads((imported[1] / "truth.json").read_text())
    assert truth["unit"] == "mm" and len(truth["keypoint_names"]) == 22
    for frame, cloud in zip(truth["frames"], clouds, strict=True):
        np.testing.assert_allclose(frame["keypoints"], cloud.keypoints, atol=1e-4)
        np.testing.assert_allclose(frame["centre"], cloud.center, atol=1e-4)
        assert 60 < frame["body_length"] < 90
