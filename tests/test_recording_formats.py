"""What a real rig films comes back, through every calibration format: points, pictures, silhouettes, hull."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from round_trip import direct_rendering, marked, marker_errors, share_in_hull

from multiview.image import composite
from multiview.metrics import foreground_psnr, mask_iou
from multiview.sample import read_sample
from recording.calibration.formats import FORMATS, write_calibration
from recording.importer import process_recording
from recording.settings import ImportSettings
from synthetic.dataset import ARENA_REACH, load_real_rig, stand_in_arena, write_recording
from synthetic.scene import mouse_sequence

WIDTH, SIZE = 576, 192  # half of the real photographs' width: two of their pixels make one of the picture's
HOLDS = {  # which formats can hold which lenses
    "none": tuple(FORMATS),
    "distorted": ("transforms", "colmap_text", "colmap_binary"),
    "distorted and skewed": ("dannce", "anipose"),
}
CASES = [(lens, name) for lens, names in HOLDS.items() for name in names]


def rig_with(lens: str):
    calibration = load_real_rig(width=WIDTH, lens="none" if lens == "none" else "real")[0]
    if lens == "distorted":  # the real lenses on sensors without skew
        K = calibration.K.copy()
        K[:, 0, 1] = 0.0
        calibration = replace(calibration, K=K)
    return calibration


@pytest.fixture(scope="module")
def clouds():
    """A mouse, then one whose keypoints shine and nothing else does."""
    arena = load_real_rig()[1]
    frames = mouse_sequence(0, 2, fps=2, arena_radius=ARENA_REACH)
    mouse, other = (stand_in_arena(cloud, arena) for cloud in frames)
    return [mouse, replace(other, meta={"marked": True})]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, clouds, render):
    """lens -> a recording of both frames, filmed once."""
    made: dict[str, Path] = {}

    def shoot(cloud, cameras):
        rgb, alpha, depth = render(cloud, cameras)
        return (render(marked(cloud), cameras)[0] if cloud.meta.get("marked") else rgb), alpha, depth

    def film(lens: str) -> Path:
        if lens not in made:
            made[lens] = tmp_path_factory.mktemp("raw") / "recording"
            write_recording(made[lens], rig_with(lens), clouds, shoot, background=0.0, quality_crf=0)
        return made[lens]

    return film


def imported(recording: Path, output: Path, **options):
    report = process_recording(
        ImportSettings(
            recording / "videos_undist", recording, output, num_samples=2, image_size=SIZE, framing="fill", workers=1,
            **options,
        )
    )  # fmt: skip
    return report, [read_sample(output / f"sample_{index:06d}") for index in range(2)]


@pytest.mark.parametrize(("lens", "name"), CASES)
def test_import_gives_back_what_was_filmed(recordings, clouds, render, tmp_path, lens, name):
    recording, calibration = recordings(lens), rig_with(lens)
    path = write_calibration(tmp_path / "calibration", calibration, name)
    report, (sample, lit) = imported(recording, tmp_path / "data", calibration=path)
    errors = marker_errors(lit, clouds[1].keypoints)
    assert len(errors) >= 12 and np.sqrt((errors**2).sum(axis=1).mean()) < 0.1  # pixels; asked for: 0.5
    assert np.abs(errors.mean(axis=0)).max() < 0.03  # no half pixel anywhere
    rgb, alpha = direct_rendering(clouds[0], sample, render, calibration)
    mask = (alpha > 0.5).float()
    assert foreground_psnr(composite(sample.rgba, 0.0), rgb, mask).mean() > 35
    assert mask_iou((sample.rgba[:, 3:] > 0.5).float(), mask).min() > 0.97
    assert report["clipped_views"] == 0 and report["pictures"]["tangency_rms"] < 0.003


def test_visual_hull_holds_the_true_surface(recordings, tmp_path):
    recording = recordings("none")
    _, samples = imported(recording, tmp_path / "data")
    with np.load(recording / "truth.npz") as truth:
        surfaces = truth["surface"]
    for sample, surface in zip(samples, surfaces, strict=True):
        assert share_in_hull(sample, surface) > 0.99
        aside = np.array([0.0, 0.0, 8.0]) if surface[:, 2].max() < 40 else np.array([8.0, 0.0, 0.0])
        assert share_in_hull(sample, surface + aside) < 0.95  # 8 mm off are noticed


def test_true_keypoints_and_centre_are_written_beside_the_recording(recordings, clouds):
    import json

    truth = json.loads((recordings("none") / "truth.json").read_text())
    assert truth["unit"] == "mm" and len(truth["keypoint_names"]) == 22
    for frame, cloud in zip(truth["frames"], clouds, strict=True):
        np.testing.assert_allclose(frame["keypoints"], cloud.keypoints, atol=1e-4)
        np.testing.assert_allclose(frame["centre"], cloud.center, atol=1e-4)
        assert 60 < frame["body_length"] < 90
