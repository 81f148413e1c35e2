"""Films a synthetic mouse with the real rig, imports the recording, and measures how well the two agree.

Prints, per measure, what the import gives back (keypoints, pictures, silhouettes, hull, centre), and draws one view in
all its stages: photograph, without its lens, processed, rendered directly, difference. The pictures of
docs/guides/recording_geometry.md are made by this script.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import main_guard

AMPLIFIED = 8  # the difference is shown so many times as large


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="recording, dataset and pictures; new or empty")
    parser.add_argument("--num_frames", type=int, default=10, help="filmed, half of them with shining keypoints")
    parser.add_argument("--video_width", type=int, default=1152, help="pixels, even")
    parser.add_argument("--image_size", type=int, default=512, help="of the samples, pixels")
    parser.add_argument("--lens_distortion", choices=("none", "real"), default="real", help="of the photographs")
    parser.add_argument("--view", type=int, default=1, help="view that is drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the mouse")
    parser.add_argument("--workers", type=int, default=2, help="of the import")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto; draws the pictures")
    parsed = parser.parse_args(arguments)
    for name, least in (("num_frames", 2), ("image_size", 64), ("view", 0), ("workers", 1), ("seed", 0)):
        if getattr(parsed, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(parsed, name)}")
    if parsed.video_width < 128 or parsed.video_width % 2:
        parser.error(f"--video_width must be even and at least 128, got {parsed.video_width}")
    return parsed


def film(options: argparse.Namespace, render):
    """Writes the recording; returns its calibration and clouds, plain ones before those with shining keypoints."""
    from dataclasses import replace

    from recording.round_trip import marked
    from synthetic.dataset import ARENA_REACH, load_real_rig, stand_in_arena, write_recording
    from synthetic.photograph import RecordingConditions
    from synthetic.scene import mouse_sequence

    calibration, arena = load_real_rig(width=options.video_width, lens=options.lens_distortion)
    clouds = [
        stand_in_arena(cloud, arena)
        for cloud in mouse_sequence(options.seed, options.num_frames, fps=2, arena_radius=ARENA_REACH)
    ]
    plain = (options.num_frames + 1) // 2
    clouds[plain:] = [replace(cloud, meta={"marked": True}) for cloud in clouds[plain:]]

    def shoot(cloud, cameras):
        rgb, alpha, depth = render(cloud, cameras)
        return (render(marked(cloud), cameras)[0] if cloud.meta.get("marked") else rgb), alpha, depth

    write_recording(
        options.output_dir / "recording", calibration, clouds, shoot, conditions=RecordingConditions(background=0.0),
        quality_crf=0,
    )  # fmt: skip
    return calibration, clouds, plain


def measure(options: argparse.Namespace, render, calibration, clouds: list, plain: int) -> dict[str, str]:
    """What came back, by name."""
    import numpy as np
    import torch

    from multiview.image import composite
    from multiview.metrics import foreground_psnr, mask_iou
    from multiview.sample import read_sample
    from recording.round_trip import direct_rendering, marker_errors, share_in_hull, to_sample

    with np.load(options.output_dir / "recording" / "truth.npz") as truth:
        surfaces = truth["surface"]
    psnr, overlap, errors, held, off = [], [], [], [], []
    for index, cloud in enumerate(clouds):
        sample = read_sample(options.output_dir / "data" / f"sample_{index:06d}")
        held.append(share_in_hull(sample, surfaces[index]))
        off.append(float(np.linalg.norm(np.linalg.inv(to_sample(sample))[:3, 3] - cloud.center)))
        if index >= plain:
            errors.append(marker_errors(sample, cloud.keypoints))
            continue
        rgb, alpha = direct_rendering(cloud, sample, render, calibration)
        mask = (alpha > 0.5).float()
        psnr.append(foreground_psnr(composite(sample.rgba, 0.0), rgb, mask).flatten())
        overlap.append(mask_iou((sample.rgba[:, 3:] > 0.5).float(), mask).flatten())
        if index == 0:
            draw(options, calibration, sample, rgb)
    errors = np.concatenate(errors)
    psnr, overlap = torch.cat(psnr), torch.cat(overlap)
    return {
        "keypoints, px rms": f"{np.sqrt((errors**2).sum(1).mean()):.3f} of {options.image_size} ({len(errors)} seen)",
        "keypoints, px mean": " ".join(f"{value:+.3f}" for value in errors.mean(axis=0)),
        "foreground PSNR, dB": f"{psnr.mean():.2f}, lowest view {psnr.min():.2f}",
        "silhouette IoU": f"{overlap.mean():.4f}, lowest view {overlap.min():.4f}",
        "surface in the hull": f"{100 * np.mean(held):.2f} %, lowest frame {100 * min(held):.2f} %",
        "centre off, mm": f"{np.mean(off):.2f}, largest {max(off):.2f}",
    }


def draw(options: argparse.Namespace, calibration, sample, direct) -> None:
    """stages.png: one view of the first frame, from the photograph to the difference."""
    import numpy as np
    import torch

    from multiview.image import composite, write_image
    from multiview.sample import read_dataset_info
    from recording.video import VideoReader, find_videos

    camera = read_dataset_info(options.output_dir / "data")["view_cameras"][options.view]
    with VideoReader(
        find_videos(options.output_dir / "recording" / "videos_undist", len(calibration), "")[camera]
    ) as r:
        photograph = r.read(0)
    straight = without_lens(calibration, camera, photograph)
    processed = composite(sample.rgba, 0.0)[options.view]
    difference = (AMPLIFIED * (processed - direct[options.view]).abs()).clamp(0, 1)
    size = options.image_size // 2
    whole = [torch.from_numpy(np.ascontiguousarray(p)).permute(2, 0, 1).float() / 255 for p in (photograph, straight)]
    panels = [resized(panel, size) for panel in (*whole, processed, direct[options.view].clamp(0, 1), difference)]
    gap = torch.ones(3, size, 6)
    row = [part for panel in panels for part in (panel, gap)][:-1]
    write_image(options.output_dir / "stages.png", torch.cat(row, dim=-1))


def without_lens(calibration, camera: int, photograph):
    """The photograph [h, w, 3] as a pinhole of the same K would have taken it."""
    import cv2
    import numpy as np

    height, width = photograph.shape[:2]
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    K = calibration.K[camera]
    plain = np.stack([(columns - K[0, 2]) / K[0, 0], (rows - K[1, 2]) / K[1, 1]], axis=-1)
    table = (calibration.to_pixels(camera, plain) - 0.5).astype(np.float32)
    return cv2.remap(photograph, table[..., 0], table[..., 1], cv2.INTER_LINEAR)


def resized(picture, height: int):
    """[3, h, w] to the given height, keeping its proportions."""
    import torch.nn.functional as F

    width = round(picture.shape[-1] * height / picture.shape[-2])
    return F.interpolate(picture[None], size=(height, width), mode="area")[0]


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        raise ValueError(f"--output_dir {options.output_dir} is not empty; name a new folder")
    from recording.process import process_recording
    from recording.settings import ImportSettings
    from synthetic.dataset import make_renderer

    render = make_renderer(options.device)
    calibration, clouds, plain = film(options, render)
    recording = options.output_dir / "recording"
    settings = ImportSettings(
        recording / "videos_undist", recording, options.output_dir / "data", num_samples=options.num_frames,
        image_size=options.image_size, framing="fill", workers=options.workers,
    )  # fmt: skip
    process_recording(settings)
    for name, value in measure(options, render, calibration, clouds, plain).items():
        print(f"{name:<22} {value}")
    print(f"pictures: {options.output_dir / 'stages.png'}")


if __name__ == "__main__":
    main_guard(main)
