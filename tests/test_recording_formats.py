"""What a real rig films comes back, through every calibration format: points, pictures, silhouettes, hull."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from round_trip import cameras_in_the_arena, load_script, shrunk

from multiview.hull import carve
from multiview.image import composite
from multiview.metrics import foreground_psnr, mask_iou
from multiview.recording.calibration import FORMATS, write_calibration
from multiview.recording.film import LENS_OVERSAMPLING, FilmConditions
from multiview.recording.process import process_recording
from multiview.recording.settings import ImportSettings
from multiview.recording.write import ARENA_REACH, load_real_rig, stand_in_arena, write_recording
from multiview.sample import read_sample
from multiview.synthetic.motion import mouse_sequence

WIDTH, SIZE = 576, 192  # half of the real photographs' width: two of their pixels make one of the picture's
BLACK = FilmConditions(background=0.0)
MARKER_MM = 0.8
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
def render():
    return load_script().make_renderer("cpu")


@pytest.fixture(scope="module")
def clouds():
    """A mouse, then one whose keypoints shine and nothing else does."""
    arena = load_real_rig()[1]
    frames = mouse_sequence(0, 2, fps=2, arena_radius=ARENA_REACH)
    mouse, marked = (stand_in_arena(cloud, arena) for cloud in frames)
    return [mouse, replace(marked, meta={"marked": True})]


def markers(cloud):
    """Small opaque balls at the keypoints, in the three pure colours by turns."""
    count = len(cloud.keypoints)
    return replace(
        cloud,
        means=cloud.keypoints.astype(np.float32),
        log_scales=np.full((count, 3), np.log(MARKER_MM), np.float32),
        quats=np.tile(np.float32([1, 0, 0, 0]), (count, 1)),
        opacity=np.full(count, 0.99, np.float32),
        rgb=np.eye(3, dtype=np.float32)[np.arange(count) % 3],
    )


@pytest.fixture(scope="module")
def filmed(tmp_path_factory, clouds, render):
    """lens -> a recording of both frames, filmed once."""
    made: dict[str, Path] = {}

    def shoot(cloud, cameras):
        rgb, alpha, depth = render(cloud, cameras)
        return (render(markers(cloud), cameras)[0] if cloud.meta.get("marked") else rgb), alpha, depth

    def film(lens: str) -> Path:
        if lens not in made:
            made[lens] = tmp_path_factory.mktemp("raw") / "recording"
            write_recording(made[lens], rig_with(lens), clouds, shoot, conditions=BLACK, quality_crf=0)
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


def marker_errors(sample, keypoints: np.ndarray) -> np.ndarray:
    """[n, 2] found minus expected, pixels, of the markers that shine alone and are not cut by the mask's rim."""
    import cv2

    to_sample = np.array(sample.extra["calibration_to_sample"])
    points = keypoints.astype(float) @ to_sample[:3, :3].T + to_sample[:3, 3]
    expected = sample.cameras.project(torch.from_numpy(points).float().expand(6, -1, -1))[0].numpy()
    pictures, errors = composite(sample.rgba, 0.0).numpy(), []
    for view, channel in np.ndindex(6, 3):
        light, own = pictures[view, channel], expected[view, channel::3]
        count, labels = cv2.connectedComponents((light > 0.15).astype(np.uint8))
        for label in range(1, count):
            rows, columns = np.nonzero(labels == label)
            weight = light[rows, columns] - 0.15
            found = np.array([(columns + 0.5) @ weight, (rows + 0.5) @ weight]) / weight.sum()
            order = np.argsort(np.linalg.norm(own - found, axis=1))
            nearest = own[order[0]]
            x, y = nearest.astype(int)
            alone = np.linalg.norm(own[order[1:]] - nearest, axis=1).min() > 9
            if alone and sample.rgba[view, 3, y - 3 : y + 4, x - 3 : x + 4].min() > 0.99:
                errors.append(found - nearest)
    return np.array(errors)


def direct_rendering(cloud, sample, render, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What the processed cameras see, drawn as finely as the photographs were: the renderer blurs by its own pixels."""
    fine = round(SIZE * step)
    rgb, alpha = render(cloud, cameras_in_the_arena(sample).resize(fine, fine))[:2]
    return shrunk(rgb, SIZE), shrunk(alpha, SIZE)


@pytest.mark.parametrize(("lens", "name"), CASES)
def test_import_gives_back_what_was_filmed(filmed, clouds, render, tmp_path, lens, name):
    recording, calibration = filmed(lens), rig_with(lens)
    path = write_calibration(tmp_path / "calibration", calibration, name)
    report, (sample, marked) = imported(recording, tmp_path / "data", calibration=path)
    errors = marker_errors(marked, clouds[1].keypoints)
    assert len(errors) >= 12 and np.sqrt((errors**2).sum(axis=1).mean()) < 0.25  # asked for: 0.5
    assert np.abs(errors.mean(axis=0)).max() < 0.1  # no half pixel anywhere
    step = calibration.K[:, 0, 0].mean() / float(sample.cameras.fxfycxcy[0, 0])
    step *= 1 if lens == "none" else LENS_OVERSAMPLING
    rgb, alpha = direct_rendering(clouds[0], sample, render, step)
    mask = (alpha > 0.5).float()
    assert foreground_psnr(composite(sample.rgba, 0.0), rgb, mask).mean() > 35
    assert mask_iou((sample.rgba[:, 3:] > 0.5).float(), mask).min() > 0.97
    assert report["clipped_views"] == 0 and report["pictures"]["tangency_rms"] < 0.003


def test_visual_hull_holds_the_true_surface(filmed, tmp_path):
    recording = filmed("none")
    _, samples = imported(recording, tmp_path / "data")
    with np.load(recording / "truth.npz") as truth:
        surfaces = truth["surface"]
    for sample, surface in zip(samples, surfaces, strict=True):
        to_sample = np.array(sample.extra["calibration_to_sample"])
        points = torch.from_numpy(surface.astype(float) @ to_sample[:3, :3].T + to_sample[:3, 3]).float()
        hull = carve(sample.rgba[:, 3:], sample.cameras, resolution=128)
        inside = torch.zeros(hull.grid.shape)
        inside.view(-1)[hull.index] = 1
        # A point on the hull's own surface may lie in a voxel whose centre is outside: one voxel is allowed.
        near = torch.nn.functional.max_pool3d(inside[None, None], 3, 1, 1)[0, 0] > 0
        cell = ((points - hull.grid.lower) / hull.grid.voxel).floor().long()
        in_grid = ((cell >= 0) & (cell < torch.tensor(hull.grid.shape))).all(dim=1)
        held = near[tuple(cell[in_grid].T)]
        assert held.float().sum() / len(points) > 0.99
        assert hull.volume < 4 * _volume(surface, to_sample)  # and it is no box around everything


def _volume(surface: np.ndarray, to_sample: np.ndarray) -> float:
    """A lower bound of the animal's size in the sample's world: half of its points' middle box."""
    sides = np.ptp(np.quantile(surface, [0.1, 0.9], axis=0), axis=0) * np.linalg.norm(to_sample[:3, 0])
    return float(sides.prod()) / 2


def test_true_keypoints_and_centre_are_written_beside_the_recording(filmed, clouds):
    import json

    truth = json.loads((filmed("none") / "truth.json").read_text())
    assert truth["unit"] == "mm" and len(truth["keypoint_names"]) == 22
    for frame, cloud in zip(truth["frames"], clouds, strict=True):
        np.testing.assert_allclose(frame["keypoints"], cloud.keypoints, atol=1e-4)
        np.testing.assert_allclose(frame["centre"], cloud.centre, atol=1e-4)
        assert 60 < frame["body_length"] < 90
