"""Pictures in and out, the only compositing function, and contact sheets.

Pictures are float32 tensors 0..1, RGB(A) straight alpha, [..., c, h, w].
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from multiview.cameras import Cameras
from multiview.files import atomic_write

BACKGROUNDS = {"white": 1.0, "gray": 0.5, "black": 0.0}
# Luminance and two chroma axes (NTSC YIQ): hue turns, and saturation stretches, the chroma plane about grey.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], dtype=torch.float64)


def read_rgba(path: Path | str) -> Tensor:
    """Reads a picture file into [4, h, w], 0..1. A file without alpha gets alpha 1."""
    with _opened(path) as picture:
        array = np.asarray(picture.convert("RGBA"))
    return rearrange(torch.from_numpy(array.copy()), "h w c -> c h w").float() / 255.0


def check_picture(path: Path | str) -> None:
    """Raises ValueError if a file is not there or not an image; reads its header only."""
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError:
        raise ValueError(f"picture {path} does not exist") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"picture {path} cannot be read as an image: {error}") from error


def to_uint8(picture: Tensor) -> np.ndarray:
    """[c, h, w] 0..1 -> [h, w, c] uint8, rounded."""
    return (rearrange(picture.detach().float().cpu(), "c h w -> h w c").clamp(0, 1) * 255.0).round().byte().numpy()


def write_image(path: Path | str, picture: Tensor) -> None:
    """Writes [3|4, h, w] (or [1, h, w], grey) 0..1 as PNG, atomically."""
    array = to_uint8(picture)
    if array.shape[-1] == 1:
        array = array[..., 0]
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", compress_level=4)


def resize_rgba(rgba: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Lanczos resize of [c, h, w] in 8 bits, as FaceLift's data loader does; size: int or (height, width).

    Cameras do not change here: call `Cameras.resize` with the same size.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if rgba.shape[-2:] == (height, width):
        return rgba
    resized = np.asarray(Image.fromarray(to_uint8(rgba)).resize((width, height), Image.Resampling.LANCZOS))
    return rearrange(torch.from_numpy(resized.copy()), "h w c -> c h w").float() / 255.0


def composite(rgba: Tensor, background: Tensor | float) -> Tensor:
    """Straight-alpha RGBA [..., 4, h, w] over a background (scalar, or broadcastable to [..., 3, h, w]) -> RGB."""
    if rgba.shape[-3] != 4:
        raise ValueError(f"rgba must have 4 channels at dimension -3, got shape {list(rgba.shape)}")
    rgb, alpha = rgba[..., :3, :, :], rgba[..., 3:, :, :]
    return torch.lerp(torch.as_tensor(background).to(rgb), rgb, alpha)  # one pass over the pixels


def adjust_colours(
    rgba: Tensor, *, brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue_deg: float = 0.0
) -> Tensor:
    """RGBA views [n, 4, h, w] of one animal under other light: the same factors and hue turn for all of them.

    Contrast turns about the animal's own mean colour, saturation and hue about grey. Alpha stays, and so does the
    background, which is composited afterwards.
    """
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    if brightness != 1 or contrast != 1:
        mean = (rgb * alpha).sum(dim=(0, 2, 3), keepdim=True) / alpha.sum().clamp_min(1e-6)
        rgb = (((rgb - mean) * contrast + mean) * brightness).clamp(0, 1)
    if saturation != 1 or hue_deg != 0:
        rgb = torch.einsum("ij,njhw->nihw", chroma_matrix(saturation, hue_deg).to(rgb), rgb).clamp(0, 1)
    return torch.cat([rgb, alpha], dim=1)


def chroma_matrix(saturation: float, hue_deg: float) -> Tensor:
    """[3, 3] for RGB columns: greys stay, chroma is scaled and turned. float64."""
    angle = math.radians(hue_deg)
    turn = torch.eye(3, dtype=torch.float64)
    turn[1:, 1:] = saturation * torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    return torch.linalg.inv(YIQ) @ turn @ YIQ


@dataclass(frozen=True)
class Draw:
    """One augmentation of a sample, the same for all its views; the defaults leave it as it is, on white.

    background: a name out of BACKGROUNDS. brightness, contrast, saturation: factors. hue_deg: turn of the chroma plane.
    crop: (left, top, side) in fractions of the image's width. mirrored: left and right exchanged.
    """

    background: str = "white"
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue_deg: float = 0.0
    crop: tuple[float, float, float] = (0.0, 0.0, 1.0)
    mirrored: bool = False

    def to_dict(self) -> dict:
        return asdict(self)

    def recolored(self, rgba: Tensor) -> Tensor:
        return adjust_colours(
            rgba, brightness=self.brightness, contrast=self.contrast, saturation=self.saturation, hue_deg=self.hue_deg
        )

    def apply(self, rgba: Tensor, cameras: Cameras, size: int) -> tuple[Tensor, Tensor, Cameras]:
        """Square RGBA views [n, 4, s, s] and their cameras [n] -> images on the drawn background, masks, cameras.

        Returns [n, 3, size, size] and [n, 1, size, size], 0..1, and the cameras of just these pixels, in stored order.
        """
        if self.crop[2] != 1.0:  # to the nearest whole pixels, and the cameras of just these
            width = rgba.shape[-1]
            side = max(1, round(self.crop[2] * width))
            left, top = (min(round(fraction * width), width - side) for fraction in self.crop[:2])
            rgba = rgba[..., top : top + side, left : left + side]
            cameras = cameras.crop(left, top, side, side)
        rgba, cameras = torch.stack([resize_rgba(view, size) for view in rgba]), cameras.resize(size, size)
        if self.mirrored:
            rgba, cameras = rgba.flip(-1), cameras.mirrored()
        rgba = self.recolored(rgba)
        return composite(rgba, BACKGROUNDS[self.background]), rgba[:, 3:], cameras


def grid(pictures: Tensor, columns: int) -> Tensor:
    """Contact sheet: [n, 3, h, w] -> [3, rows * h, columns * w]; empty cells white."""
    missing = -len(pictures) % columns
    if missing:
        pictures = torch.cat([pictures, pictures.new_ones(missing, *pictures.shape[1:])])
    return rearrange(pictures, "(r k) c h w -> c (r h) (k w)", k=columns)


def save_video(path: Path | str, frames: Tensor, fps: int = 30) -> None:
    """Writes [n, 3, h, w] 0..1 as H.264 mp4 that browsers play (even size, yuv420p), atomically."""
    import imageio_ffmpeg

    height, width = frames.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"video frames must have even height and width, got {height} x {width}")
    with atomic_write(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            os.fspath(temporary), (width, height), fps=fps, codec="libx264", quality=8, macro_block_size=2,
            output_params=["-f", "mp4", "-movflags", "+faststart"],
        )  # fmt: skip
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(to_uint8(frame)))
        writer.close()
