"""Images as people bring them: turned, deep, huge, damaged; compositing, sheets, films; photographs cut out, framed."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from multiview import image as images
from multiview.image import BODY_AREA, composite, prepare_photo, read_photo, read_rgba, save_video
from multiview.segmentation import segment

GRAY = np.arange(48 * 40, dtype=np.int64).reshape(48, 40) % 256  # what deep files hold in their own units
UPRIGHT = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}  # EXIF -> corner


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_camera_says_and_a_samples_image_is_not(tmp_path, orientation):
    array = np.zeros((20, 32, 3), dtype=np.uint8)
    array[:8, :8, 0] = 255  # red in the corner that is upper left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png"):
        Image.fromarray(array).save(tmp_path / name, exif=exif, **({"quality": 95} if name == "a.jpg" else {}))
        stored, upright = read_rgba(tmp_path / name), read_photo(tmp_path / name)
        assert stored.shape == (4, 20, 32) and stored[0, 2, 2] > 0.9 and (stored[3] == 1).all()
        assert upright.shape[-2:] == ((32, 20) if orientation > 4 else (20, 32))
        row, column = UPRIGHT[orientation]
        assert upright[0, [2, -3][row], [2, -3][column]] > 0.9
    assert images.resize_rgba(stored, 8).shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("gray16.png", (GRAY * 257).astype(np.uint16)), ("ten_in_sixteen.png", (GRAY * 1023 / 255).astype(np.uint16)),
        ("twelve_in_sixteen.tif", (GRAY * 4095 / 255).astype(np.uint16)), ("unit.tif", (GRAY / 255).astype(np.float32)),
        ("float.tif", GRAY.astype(np.float32)), ("int32.tif", (GRAY * 257).astype(np.int32)),
    ],
)  # fmt: skip
def test_deep_gray_is_read_by_the_range_in_use(tmp_path, name, array):
    Image.fromarray(array).save(tmp_path / name)
    assert (read_photo(tmp_path / name)[0] * 255 - torch.from_numpy(GRAY)).abs().max() < 1.01


@pytest.mark.parametrize(("channels", "scale"), [(3, 257), (4, 257), (3, 1023 / 255)])
def test_deep_color_is_read_by_the_range_in_use(tmp_path, channels, scale):
    import cv2

    color = np.stack([GRAY, 255 - GRAY, GRAY // 2, np.where(GRAY > 99, 255, 0)][:channels], axis=-1)
    stored = (color * scale).astype(np.uint16)[..., [2, 1, 0, 3][:channels]]
    cv2.imwrite(str(tmp_path / "a.png"), stored)
    rgba = read_rgba(tmp_path / "a.png").permute(1, 2, 0).numpy() * 255
    assert np.abs(rgba[..., :channels] - color).max() < 1.01 and (channels == 4 or (rgba[..., 3] == 255).all())


def header(width: int, height: int) -> bytes:
    """A PNG that is nothing but its header."""
    part = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    end = struct.pack(">I", zlib.crc32(part)) + struct.pack(">I", 100) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + part + end


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "cannot be read"), (b"", "cannot be read"), (header(20, 20), "cannot be read"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "it is HEIC.*heif-convert"),
        (header(40_000, 40_000), "40000 x 40000 pixels; at most 256 megapixels"),
        (header(2**31 - 1, 2**31 - 1), "megapixels"), (header(0, 5), "cannot be read"), (None, "does not exist"),
    ],
)  # fmt: skip
def test_what_is_no_image_or_too_large_is_refused_by_name(tmp_path, content, message):
    if content is not None:
        (tmp_path / "b.png").write_bytes(content)
    for read in (read_photo, read_rgba) if content is not None else (read_photo, images.check_picture):
        with pytest.raises(ValueError, match=f"b.png.*{message.replace('256', '[0-9]+')}"):
            read(tmp_path / "b.png")


@pytest.mark.parametrize("value", [-1.0, float("nan"), 1e6])
def test_negative_and_unbounded_values_are_refused(tmp_path, value):
    Image.fromarray(np.full((20, 20), value, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif.*8 bits per channel"):
        read_photo(tmp_path / "a.tif")


def test_large_photographs_are_scaled_down_and_long_texts_are_no_hindrance(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "PHOTO_SIDE", 100)
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    noise = Image.effect_noise((350, 120), 60).convert("RGB")
    noise.save(tmp_path / "a.png", pnginfo=text)
    noise.save(tmp_path / "a.jpg")
    assert all(read_photo(tmp_path / name).shape == (4, 30, 88) for name in ("a.png", "a.jpg"))
    assert read_rgba(tmp_path / "a.png").shape == (4, 120, 350)


def test_compositing_is_straight_alpha_and_sheets_fill_row_by_row():
    rgba = torch.tensor([0.2, 0.4, 0.6, 0.25]).reshape(4, 1, 1)
    assert torch.allclose(composite(rgba, 1.0).flatten(), torch.tensor([0.8, 0.85, 0.9]))
    with pytest.raises(ValueError, match="4 channels"):
        composite(rgba[:3], 1.0)
    sheet = images.grid(torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 2, 2) / 3, columns=2)
    assert sheet.shape == (3, 4, 4) and sheet[0, 0, 2] == pytest.approx(1 / 3) and sheet[0, 3, 3] == 1


def test_a_film_holds_its_frames_and_one_that_cannot_be_written_leaves_nothing(tmp_path):
    import cv2

    frames = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 32, 48)
    save_video(tmp_path / "a.mp4", frames)
    film = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    means = [film.read()[1].mean() / 255 for _ in range(5)]
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) == 5 and np.allclose(means, frames[:, 0, 0, 0], atol=0.03)
    with pytest.raises(ValueError, match="even"):
        save_video(tmp_path / "b.mp4", frames[..., :31])
    with pytest.raises(ValueError, match="/dev/full|b.mp4 could not be written"):
        save_video(tmp_path / "b.mp4", frames, fps=-1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]


# ---- photographs ----------------------------------------------------------------------------------------------------


def blob(height, width, cx, cy, radius, *, tail=0):
    """RGBA of a dark disc, with a thin tail to the right; transparent elsewhere."""
    y, x = np.mgrid[:height, :width] + 0.5
    mask = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
    mask |= (np.abs(y - cy) < 0.08 * radius) & (x > cx) & (x < cx + radius + tail)
    rgba = np.zeros((4, height, width), dtype=np.float32)
    rgba[:3], rgba[3] = 0.3, mask
    return torch.from_numpy(rgba)


@pytest.mark.parametrize("radius", [10, 30])
def test_any_photograph_ends_centred_and_at_the_usual_size(radius):
    result, report = prepare_photo(blob(200, 300, 220, 60, radius), 128)
    assert result.shape == (4, 128, 128) and report["cropped"] and not report["segmented"]
    assert report["body_area"] == pytest.approx(BODY_AREA, rel=0.1) and report["centre_offset"] < 0.02


def test_a_long_tail_is_never_cut_off_and_does_not_pull_the_centre():
    rgba = blob(300, 600, 150, 150, 50, tail=300)
    _, _, centre = images.body_placement(rgba[3].numpy() > 0.5)
    assert abs(centre[0] - 150) < 5 and abs(centre[1] - 150) < 1
    result, report = prepare_photo(rgba, 128)
    alpha = result[3]
    assert report["cropped"] and alpha[:, 0].max() == 0 and alpha[:, -1].max() == 0
    assert alpha.sum() / (report["scale"] ** 2) == pytest.approx(rgba[3].sum().item(), rel=0.05)


def test_a_picture_framed_like_the_training_data_is_left_alone():
    rgba = blob(128, 128, 64, 64, 128 * (BODY_AREA / np.pi) ** 0.5)
    result, report = prepare_photo(rgba, 128)
    assert not report["cropped"] and torch.equal(result, rgba)
    # Nor do colors of transparent pixels bleed into the outline where it is scaled.
    result, _ = prepare_photo(blob(512, 512, 256, 256, 100), 128, crop="always")
    assert (result[:3, result[3] > 0.2] - 0.3).abs().max() < 0.02


Y, X = torch.meshgrid(torch.arange(240.0) - 119.5, torch.arange(320.0) - 159.5, indexing="ij")
ALPHAS = {  # none of them is a mask of the animal
    "opaque": torch.ones(240, 320), "a scan at 250 of 255": torch.full((240, 320), 250 / 255),
    "half transparent": torch.full((240, 320), 0.6), "one hole": 1 - ((X - 100).square() + Y.square() < 200).float(),
    "rounded corners": ((X.abs() - 120).clamp_min(0).square() + (Y.abs() - 80).clamp_min(0).square() < 1600).float(),
    "a frame": ((X.abs() < 152) & (Y.abs() < 112)).float(),
}  # fmt: skip


@pytest.mark.parametrize("name", ALPHAS)
def test_a_photograph_whose_alpha_is_no_mask_is_segmented(name, caplog):
    """A dark disc before a pale noisy background."""
    alpha, truth = ALPHAS[name], blob(240, 320, 160, 120, 50)[3] > 0.5
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.01, (3, 240, 320)).astype(np.float32))
    rgb = (torch.where(truth, 0.25, 0.85).expand(3, -1, -1) + noise).clamp(0, 1)
    rgba = torch.cat([rgb * (alpha > 0), alpha[None]])
    result, report = prepare_photo(rgba, 128, source="mouse.png", mask="color")  # a disc is no mouse
    assert report["segmented"] == "color" and 0.5 < result[3].sum() / 128**2 / BODY_AREA < 1.5
    assert (name == "opaque") != ("mouse.png: its alpha covers" in caplog.text)
    if name == "opaque":
        mask, truth = segment(rgba[:3].permute(1, 2, 0).numpy(), method="color")[0] > 0.5, truth.numpy()
        assert (mask & truth).sum() / (mask | truth).sum() > 0.95


@pytest.mark.parametrize(
    ("rgba", "crop", "message"),
    [
        (torch.full((4, 64, 64), 1.0), "auto", "a.png: no animal"), (torch.zeros(4, 64, 64), "auto", "no animal"),
        (torch.full((4, 64, 64), 0.3), "auto", "shows no animal"), (torch.rand(4, 64, 64), "x", "crop"),
        (blob(64, 80, 40, 32, 15), "never", "must be square"),
        (torch.rand(4, 2, 3000), "auto", "a.png: has 3000 x 2 pixels, at least 16"),
        (torch.ones(4, 16, 6000), "auto", "a.png: no animal"),  # a strip does not crash
    ],
)  # fmt: skip
def test_pictures_without_an_animal_are_refused(rgba, crop, message):
    with pytest.raises(ValueError, match=message):
        prepare_photo(rgba, 64, crop=crop, source="a.png")
