"""Images as people bring them: turned, deep, huge, damaged; and compositing, contact sheets, films."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from multiview import image as images
from multiview.image import check_picture, composite, grid, read_photo, read_rgba, resize_rgba, save_video, write_image

GRAY = np.arange(48 * 40, dtype=np.int64).reshape(48, 40) % 256  # what deep files hold in their own units


def test_an_rgb_file_gets_alpha_one_and_keeps_its_size(tmp_path):
    write_image(tmp_path / "a.png", torch.rand(3, 4, 5))
    rgba = read_rgba(tmp_path / "a.png")
    assert rgba.shape == (4, 4, 5) and (rgba[3] == 1).all() and resize_rgba(rgba, 8).shape == (4, 8, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_camera_says_and_a_samples_image_is_not(tmp_path, orientation):
    array = np.zeros((20, 32, 3), dtype=np.uint8)
    array[:8, :8, 0] = 255  # red in the corner that is upper left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png"):
        Image.fromarray(array).save(tmp_path / name, exif=exif, **({"quality": 95} if name == "a.jpg" else {}))
        stored, upright = read_rgba(tmp_path / name), read_photo(tmp_path / name)
        assert stored.shape[-2:] == (20, 32) and stored[0, 2, 2] > 0.9
        assert upright.shape[-2:] == ((32, 20) if orientation > 4 else (20, 32))
        corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
        assert upright[0, [2, -3][corner[0]], [2, -3][corner[1]]] > 0.9


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
        (header(2**31 - 1, 2**31 - 1), "megapixels"), (header(0, 5), "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_image_or_too_large_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "b.png").write_bytes(content)
    for read in (read_photo, read_rgba):
        with pytest.raises(ValueError, match=f"b.png.*{message.replace('256', '[0-9]+')}"):
            read(tmp_path / "b.png")
    with pytest.raises(ValueError, match="none.png does not exist"):
        check_picture(tmp_path / "none.png")


def test_negative_and_unbounded_values_are_refused(tmp_path):
    for number, value in enumerate((-1.0, float("nan"), 1e6)):
        Image.fromarray(np.full((20, 20), value, dtype=np.float32)).save(tmp_path / f"{number}.tif")
        with pytest.raises(ValueError, match=f"{number}.tif.*8 bits per channel"):
            read_photo(tmp_path / f"{number}.tif")


def test_large_photographs_are_scaled_down_and_long_texts_are_no_hindrance(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "PHOTO_SIDE", 100)
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.effect_noise((350, 120), 60).convert("RGB").save(tmp_path / "a.png", pnginfo=text)
    Image.effect_noise((350, 120), 60).convert("RGB").save(tmp_path / "a.jpg")
    assert all(read_photo(tmp_path / name).shape == (4, 30, 88) for name in ("a.png", "a.jpg"))
    assert read_rgba(tmp_path / "a.png").shape == (4, 120, 350)


def test_compositing_is_straight_alpha():
    rgba = torch.tensor([0.2, 0.4, 0.6, 0.25]).reshape(4, 1, 1)
    assert torch.allclose(composite(rgba, 1.0).flatten(), torch.tensor([0.8, 0.85, 0.9]))
    with pytest.raises(ValueError, match="4 channels"):
        composite(rgba[:3], 1.0)


def test_grid_fills_row_by_row():
    sheet = grid(torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 2, 2) / 3, columns=2)
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
