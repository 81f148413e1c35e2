"""Images in and out, the only compositing function, contact sheets; a photograph framed as both stages were trained.

Float32 tensors [..., c, h, w] 0..1, straight alpha.
"""

from __future__ import annotations

import itertools
import logging
import math
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from multiview.cameras import Cameras
from multiview.files import DAMAGE, atomic_write

log = logging.getLogger(__name__)

BACKGROUNDS = {"white": 1.0, "gray": 0.5, "black": 0.0}
# Luminance and two chroma axes (NTSC YIQ): hue turns, and saturation stretches, the chroma plane about gray.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], dtype=torch.float64)

MOST_PIXELS = 64_000_000  # of an image in a sample: as float32 RGBA it takes 1 GB
PHOTO_PIXELS, PHOTO_SIDE = 256_000_000, 6144  # of a photograph's file; and the longest side that is kept of it
FULL_SCALES = (255, 1023, 4095, 16383, 65535)  # 8, 10, 12, 14 and 16 bits
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")

LEAST_SIDE = 16  # pixels of a photograph
MASK_MOST = 0.8  # of the image's area: what covers more is no animal's mask
# How the body (tail taken off) stands in the training images: share of the image's area, and how far the center of
# mass strays from the image's center. Measured on the synthetic mice (docs/data_format.md, "framing").
BODY_AREA = 0.08
BODY_AREA_RANGE = (0.05, 0.14)
CENTER_OFFSET_LIMIT = 0.06  # of the image's width
MARGIN = 0.02  # free border kept around the whole mask, of the image's width


def read_rgba(path: Path | str) -> Tensor:
    """Reads an image file into [4, h, w], 0..1 (alpha 1 without alpha), as stored whatever EXIF says."""
    return _to_tensor(_decode(path, MOST_PIXELS))


def read_photo(path: Path | str) -> Tensor:
    """Reads a photograph into [4, h, w], 0..1, upright (EXIF), its longest side at most PHOTO_SIDE pixels."""
    return _to_tensor(_decode(path, PHOTO_PIXELS, longest=PHOTO_SIDE))


def check_picture(path: Path | str) -> tuple[int, int]:
    """Returns an image's width and height from its header; ValueError if it is not there, no image or too large."""
    return _decode(path, PHOTO_PIXELS, header_only=True).size


def _decode(path: Path | str, most: int, *, longest: int | None = None, header_only: bool = False) -> Image.Image:
    """Returns the image as RGBA of 8 bits. longest: turn it upright, and reduce it if a side exceeds that."""
    # Pillow's own limits give way to ours, which the header is held against before a pixel is decoded.
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, 64 << 20
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height <= most:
                if header_only:
                    return image
                if image.format != "MPO" and (number := getattr(image, "n_frames", 1)) > 1:  # MPO: a phone's extras
                    log.warning("%s holds %d images: the first is taken; save the others as files", path, number)
                if longest and max(image.size) > longest:
                    image.draft(image.mode, (longest, longest))  # a JPEG is decoded at 1/2, 1/4 or 1/8 at once
                rgba = _eight_bits(image, path)
                if longest:
                    rgba = ImageOps.exif_transpose(rgba.reduce(math.ceil(max(rgba.size) / longest)))
                return rgba
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            start = Path(path).open("rb").read(12)
            if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
                reason = "it is HEIC, which is not read here; convert it: heif-convert photo.heic photo.jpg"
        raise ValueError(f"image {path} cannot be read: {reason}") from error
    told = f"image {path} has {width} x {height} pixels"
    raise ValueError(f"{told}; at most {most / 1e6:.0f} megapixels are read: scale it down")


def _eight_bits(image: Image.Image, path: Path | str) -> Image.Image:
    """Returns the image as RGBA of 8 bits with its EXIF; deeper channels are scaled by the range that is in use."""
    layout = str(image.tile[0][3]) if image.tile else ""
    single = image.mode.startswith(("I", "F"))
    if not single and "16" not in layout:
        return image.convert("RGBA")
    if single:
        array = np.asarray(image)[..., None].repeat(3, axis=-1)
    else:  # Pillow drops the lower byte of 16-bit colors
        import cv2

        array = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if array is None or array.ndim != 3 or array.shape[-1] not in (3, 4):
            raise ValueError(f"its {layout} pixels are not known here; save it with 8 bits per channel")
        array = array[..., [2, 1, 0, 3][: array.shape[-1]]]
    array = array.astype(np.float64)
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > FULL_SCALES[-1]:
        raise ValueError(f"its values reach from {array.min():g} to {array.max():g}; save it with 8 bits per channel")
    scales = (1, *FULL_SCALES) if image.mode == "F" else FULL_SCALES
    color, alpha = ([s for s in scales if part.max(initial=0) <= s][0] for part in (array[..., :3], array[..., 3:]))
    log.info("%s: more than 8 bits per channel, values up to %g read as 0 to %d", path, array[..., :3].max(), color)
    full = np.full((*array.shape[:2], 4), 255, dtype=np.uint8)
    full[..., :3] = (array[..., :3] / color * 255).round()
    if array.shape[-1] == 4:
        full[..., 3] = (array[..., 3] / alpha * 255).round()
    result = Image.fromarray(full)
    result.info["exif"] = image.info.get("exif", b"")
    return result


def _to_tensor(image: Image.Image) -> Tensor:
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w").float() / 255.0


def to_uint8(image: Tensor) -> np.ndarray:
    """[c, h, w] 0..1 -> [h, w, c] uint8, rounded."""
    return (rearrange(image.detach().float().cpu(), "c h w -> h w c").clamp(0, 1) * 255.0).round().byte().numpy()


def write_image(path: Path | str, image: Tensor) -> None:
    """Writes [3|4, h, w] (or [1, h, w], gray) 0..1 as PNG, atomically."""
    array = to_uint8(image)
    with atomic_write(path) as temporary:
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        image.save(temporary, format="PNG", compress_level=4)


def save_video(path: Path | str, frames: Iterable[Tensor], fps: int = 30) -> None:
    """Writes frames [3, h, w] 0..1, one held at a time, as H.264 mp4 that browsers play (even size, yuv420p)."""
    import imageio_ffmpeg

    frames = iter(frames)
    first = next(frames)
    height, width = first.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"video frames must have even height and width, got {height} x {width}")
    with atomic_write(path) as temporary:
        # ffmpeg is called here and not through imageio: its exit status tells that the disk is full.
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "rawvideo", "-s", f"{width}x{height}",
            "-pix_fmt", "rgb24", "-r", str(fps), "-i", "-", "-an", "-vcodec", "libx264", "-pix_fmt", "yuv420p",
            "-qp", "10", "-f", "mp4", "-movflags", "+faststart", str(temporary),
        ]  # fmt: skip
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
            with suppress(BrokenPipeError):  # it ended early, and says why
                for frame in itertools.chain([first], frames):
                    writer.stdin.write(to_uint8(frame).tobytes())
            told = writer.communicate()[1].decode(errors="replace").strip().splitlines()
        if writer.returncode:
            raise ValueError(f"video {path} could not be written: {told[-1] if told else 'ffmpeg failed'}")


def resize_rgba(rgba: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Lanczos resize of [c, h, w] in 8 bits, as FaceLift's data loader does. Its cameras: `Cameras.resize`."""
    height, width = (size, size) if isinstance(size, int) else size
    if rgba.shape[-2:] == (height, width):
        return rgba
    return _to_tensor(Image.fromarray(to_uint8(rgba)).resize((width, height), Image.Resampling.LANCZOS))


def composite(rgba: Tensor, background: Tensor | float) -> Tensor:
    """Straight-alpha RGBA [..., 4, h, w] over a background (scalar, or broadcastable to [..., 3, h, w]) -> RGB."""
    if rgba.shape[-3] != 4:
        raise ValueError(f"rgba must have 4 channels at dimension -3, got shape {list(rgba.shape)}")
    rgb, alpha = rgba[..., :3, :, :], rgba[..., 3:, :, :]
    return torch.lerp(torch.as_tensor(background).to(rgb), rgb, alpha)  # one pass over the pixels


@dataclass(frozen=True)
class Draw:
    """One augmentation of a sample, the same for all its views; the defaults leave it as it is, on white."""

    background: str = "white"  # a name out of BACKGROUNDS
    brightness: float = 1.0  # this and the next two: factors
    contrast: float = 1.0
    saturation: float = 1.0
    hue_deg: float = 0.0  # turn of the chroma plane
    crop: tuple[float, float, float] = (0.0, 0.0, 1.0)  # left, top, side in fractions of the image's width
    mirrored: bool = False  # left and right exchanged

    def to_dict(self) -> dict:
        return asdict(self)

    def recolored(self, rgba: Tensor) -> Tensor:
        """RGBA views [n, 4, h, w] of one animal under other light. Contrast turns about the animal's own mean color,
        saturation and hue about gray. Alpha stays, and so does the background, which is composited afterwards."""
        rgb, alpha = rgba[:, :3], rgba[:, 3:]
        if self.brightness != 1 or self.contrast != 1:
            mean = (rgb * alpha).sum(dim=(0, 2, 3), keepdim=True) / alpha.sum().clamp_min(1e-6)
            rgb = (((rgb - mean) * self.contrast + mean) * self.brightness).clamp(0, 1)
        if self.saturation != 1 or self.hue_deg != 0:
            cosine, sine = math.cos(math.radians(self.hue_deg)), math.sin(math.radians(self.hue_deg))
            turn = torch.eye(3, dtype=torch.float64)
            turn[1:, 1:] = self.saturation * torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
            chroma = torch.linalg.inv(YIQ) @ turn @ YIQ  # for RGB columns: grays stay
            rgb = torch.einsum("ij,njhw->nihw", chroma.to(rgb), rgb).clamp(0, 1)
        return torch.cat([rgb, alpha], dim=1)

    def apply(self, rgba: Tensor, cameras: Cameras, size: int) -> tuple[Tensor, Tensor, Cameras]:
        """Square RGBA views [n, 4, s, s] and their cameras [n] -> images [n, 3, size, size] on the drawn background,
        masks [n, 1, size, size], 0..1, and the cameras of just these pixels, in stored order."""
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


def cut_out(rgba: Tensor, source: str = "image", mask: str = "auto") -> tuple[np.ndarray, str | None]:
    """[4, h, w] 0..1 -> [h, w, 4] with the animal's mask as alpha, and how that was segmented (`segmentation.segment`):
    where the given alpha is no animal's mask, opaque or covering nearly the whole image; else None. ValueError when no
    animal can be told."""
    array = rgba.permute(1, 2, 0).numpy()
    height, width = array.shape[:2]
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"{source}: has {width} x {height} pixels, at least {LEAST_SIDE} each way are expected")
    shown = array[..., 3] > 0.5
    segmented = None
    if shown.mean() > MASK_MOST:
        from multiview.segmentation import segment

        color = array[..., :3]
        if not shown.all():  # hidden pixels hold any color: the border's must not be told from theirs
            color = np.where(shown[..., None], color, np.median(color[shown], axis=0)).astype(np.float32)
        if array[..., 3].min() < 0.99:
            log.warning("%s: its alpha covers %.0f%% and is no animal's mask: segmented", source, 100 * shown.mean())
        found, segmented = segment(color, source, mask)
        array = np.concatenate([color, (found * shown)[..., None]], axis=-1)
    if (opaque := int((array[..., 3] > 0.5).sum())) < 64:
        raise ValueError(f"{source}: the alpha channel shows no animal (only {opaque} opaque pixels)")
    return array, segmented


def prepare_photo(
    rgba: Tensor, size: int, *, crop: str | tuple[float, float, float] = "auto", mask: str = "auto",
    source: str = "image",
) -> tuple[Tensor, dict]:  # fmt: skip
    """[4, h, w] 0..1 -> [4, size, size] RGBA framed like the training data, and a report for run.json: how it was
    segmented (by `mask`, see `multiview.segmentation`; null where it came cut out), whether cropped (moved and scaled),
    output pixels per input pixel, and of the result the body's area and its offset from the center in image widths;
    on_border: pixels of the mask on the photograph's border, over the square root of all.

    crop: `auto` keeps a square image whose animal already stands as in the training data and crops any other; `always`,
    `never` (the image must then be square), or a window (x, y of its center, side) in pixels, which may reach beyond
    the image. Raises ValueError when no animal can be told from the background.
    """
    import cv2

    if isinstance(crop, str) and crop not in ("auto", "always", "never"):
        raise ValueError(f"crop must be auto, always, never or a window, got {crop!r}")
    array, segmented = cut_out(rgba, source, mask)
    height, width = array.shape[:2]
    shown = array[..., 3] > 0.5
    on_border = sum(int(edge.sum()) for edge in (shown[0], shown[-1], shown[:, 0], shown[:, -1])) / shown.sum() ** 0.5
    area, offset, (x, y) = body_placement(shown)
    framed = height == width and BODY_AREA_RANGE[0] <= area <= BODY_AREA_RANGE[1] and offset <= CENTER_OFFSET_LIMIT
    if crop == "never" and height != width:
        raise ValueError(f"{source}: must be square to be used uncropped, got {width} x {height}")
    cropped, side = crop == "always" or (crop == "auto" and not framed), height
    if not isinstance(crop, str):
        cropped, (x, y, side) = True, crop
    elif cropped:
        # The usual body size; larger where the tail would be cut off.
        ys, xs = np.nonzero(shown)
        reach = max(xs.max() + 1 - x, x - xs.min(), ys.max() + 1 - y, y - ys.min())
        side = int(np.ceil(max(float(np.sqrt(area * shown.size / BODY_AREA)), 2 * reach / (1 - 2 * MARGIN))))
    if cropped:
        side = int(side)
        left, top = round(x - side / 2), round(y - side / 2)
        # Padded by one side all around, so that any square lies inside.
        padded = np.pad(array, ((side, side), (side, side), (0, 0)))
        array = padded[top + side : top + 2 * side, left + side : left + 2 * side]
    if side != size:  # premultiplied, so that colors of transparent pixels do not bleed into the outline
        how, alpha = cv2.INTER_AREA if size < side else cv2.INTER_CUBIC, array[..., 3:]
        resized = cv2.resize(np.concatenate([array[..., :3] * alpha, alpha], axis=-1), (size, size), interpolation=how)
        alpha = resized[..., 3:].clip(0, 1)
        array = np.concatenate([(resized[..., :3] / np.maximum(alpha, 1e-4)).clip(0, 1), alpha], axis=-1)
    area, offset, _ = body_placement(array[..., 3] > 0.5)
    result = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).float().clamp(0, 1)
    report = {"segmented": segmented, "cropped": cropped, "scale": size / side, "body_area": round(area, 4)}
    return result, {**report, "centre_offset": round(offset, 4), "on_border": round(float(on_border), 4)}


def body_placement(mask: np.ndarray) -> tuple[float, float, tuple[float, float]]:
    """Returns of a mask [h, w]: body area / image area, center offset / width, center (x, y) in pixels."""
    import cv2

    # The tail, which would pull the center, goes by opening the mask with a disc of a tenth of its own size.
    radius = max(1, round(0.10 * float(np.sqrt(mask.sum()))))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    padded = np.pad(mask.astype(np.uint8), radius + 1)
    body = cv2.morphologyEx(padded, cv2.MORPH_OPEN, disc)[radius + 1 : -radius - 1, radius + 1 : -radius - 1] > 0
    ys, xs = np.nonzero(body if body.any() else mask)
    center = (float(xs.mean()) + 0.5, float(ys.mean()) + 0.5)
    height, width = mask.shape
    offset = float(np.hypot(center[0] - width / 2, center[1] - height / 2)) / width
    return len(xs) / mask.size, offset, center
