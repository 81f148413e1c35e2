"""One camera's masks: read from its mask video, or found where there is none.

The animal is what differs from the background that stays. `median`: the background is every pixel's median over frames
spread over the recording, what stands out of its noise is animal. `mog2`: OpenCV's mixture of Gaussians per pixel
(Zivkovic 2004), learnt on the same frames, then held fixed, so that a frame's mask does not depend on the frames before
it. `rembg`: a network for single images, where installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from recording.masks import Silhouette, clean_mask, record_track
from recording.video import Video, VideoReader

LOOKED_AT = 8  # frames of a mask video that are asked which brightness means animal, at the most
MOST_COVERED = 0.9  # of a photograph: an animal never covers more
BACKGROUND_FRAMES = 41  # over the whole recording; odd, so that the median is one of the values seen
NOISE_FACTOR = 6.0  # how many standard deviations of the background's own noise count as animal
LEAST_DIFFERENCE = 12.0  # of 255: what video compression and flicker do
CORE_FACTOR = 2.0  # what is so much clearer still is certainly animal; fainter parts count where they touch it
CLOSING = 0.004  # of the image's width: gaps of this width between parts are closed
MOG2_THRESHOLD = 36.0  # squared Mahalanobis distance: as NOISE_FACTOR
MOG2_BACKGROUND = 0.6  # of all frames
BLUR = 5  # pixels, side of the smoothing that takes the noise of single pixels away


def record_camera(
    videos: list[Video], frames: list[int], method: str, folder: Path, keys: dict[int, dict], camera: int
) -> Iterator[None]:
    """Writes one camera's track of cleaned masks. videos: of masks where method is `none`, else to be segmented."""
    masks = read_masks if method == "none" else segment
    return record_track(folder, camera, keys[camera], masks(videos[camera], frames, method))


def read_masks(video: Video, frames: list[int], _method: str = "none") -> Iterator[Silhouette]:
    """Yields the cleaned mask of each of the frames (rising) of one camera's mask video."""
    level, is_dim = mask_level(video, frames)
    with VideoReader(video) as reader:
        for frame in frames:
            image, (black, white) = reader.read_mask(frame)
            if is_dim and image.max() > (black + white) // 2:
                raise ValueError(
                    f"{video.name}: frame {frame} is white where the animal is, the first frames are at most {level}; "
                    "write all masks white on black (255 on 0)"
                )
            yield clean_mask(image, level)


def mask_level(video: Video, frames: list[int]) -> tuple[int, bool]:
    """Returns the brightness above which a mask video shows the animal, and whether that is less than half of white.

    Masks are white on black, lossy, and cut at half. Masks of 0 and 1, or of one dark color of a palette, are cut at
    half of what they have. Raises ValueError for masks of several levels, and where nearly everything is bright.
    """
    dim, half = -1, 127
    with VideoReader(video) as reader:
        for frame in frames[:LOOKED_AT]:
            image, (black, white) = reader.read_mask(frame)
            half, top = (black + white) // 2, int(image.max())
            if top <= black:
                continue
            level = half if top > half else (black + top) // 2
            if np.count_nonzero(image > level) > MOST_COVERED * image.size:
                raise ValueError(
                    f"{video.name}: the mask of frame {frame} covers nearly the whole image; the animal must be white "
                    "on black: invert the masks (ffmpeg -i 0.mp4 -vf negate -crf 0 inverted.mp4)"
                )
            low, high = (np.count_nonzero(image > black + part * (top - black)) for part in (0.25, 0.75))
            if low - high > high:
                raise ValueError(
                    f"{video.name}: the mask of frame {frame} has several levels or colors (brightest {top} of "
                    f"{white}); write the animal white and everything else black"
                )
            if top > half:  # as it should be; a dim frame may show nothing but noise, so others are asked
                return half, False
            dim = max(dim, level)
    return (dim, True) if dim >= 0 else (half, False)


def segment(video: Video, frames: list[int], method: str) -> Iterator[Silhouette]:
    """Yields the cleaned mask of each of the frames (rising) of one camera's video, found by `method`."""
    if method == "rembg":
        find = _rembg()
    else:
        count = min(BACKGROUND_FRAMES, video.num_frames)
        chosen = np.unique(np.round(np.linspace(0, video.num_frames - 1, count)).astype(int))
        with VideoReader(video) as reader:
            samples = np.stack([reader.read_bgr(int(index)) for index in chosen])
        find = _median(samples) if method == "median" else _mog2(samples)
    with VideoReader(video) as reader:
        for frame in frames:
            yield clean_mask(find(reader.read_bgr(frame)))


def check_method(method: str) -> None:
    """Raises ValueError where what the method needs is not installed."""
    import importlib.util

    if method == "rembg" and importlib.util.find_spec("rembg") is None:
        raise ValueError(
            "--segment rembg needs the package rembg, which is not installed: pip install rembg onnxruntime (it "
            "fetches its network when first used), or use --segment median"
        )


def _median(samples: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from a frame [h, w, 3] uint8 BGR to a mask [h, w] uint8, 0 or 255."""
    import cv2

    background = _background(samples)
    # The noise of a frame about the background; the animal, on a small part of the image, does not count in a median.
    noise = np.median([np.median(_difference(frame, background)) for frame in samples[:: max(1, len(samples) // 9)]])
    threshold = max(LEAST_DIFFERENCE, NOISE_FACTOR * 1.4826 * float(noise))

    def find(frame: np.ndarray) -> np.ndarray:
        difference = _difference(frame, background)
        # Parts of the faint mask that hold something sure.
        _, labels = cv2.connectedComponents((difference > threshold).astype(np.uint8), connectivity=8)
        kept = np.zeros(int(labels.max()) + 1, dtype=bool)
        kept[np.unique(labels[difference > CORE_FACTOR * threshold])] = True
        kept[0] = False
        return _sharpened(_closed(kept[labels].astype(np.uint8) * 255), difference)

    return find


def _background(samples: np.ndarray) -> np.ndarray:
    """[h, w, 3] float32: every pixel's median, smoothed as the frames are that it is compared with."""
    # Block by block of rows: the median of everything at once would need many times the frames' memory.
    blocks = np.array_split(np.arange(samples.shape[1]), max(1, samples.shape[1] // 64))
    return _smooth(np.concatenate([np.median(samples[:, rows], axis=0) for rows in blocks]))


def _smooth(frame: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.GaussianBlur(frame.astype(np.float32), (BLUR, BLUR), 0)


def _difference(frame: np.ndarray, background: np.ndarray) -> np.ndarray:
    """[h, w] the largest difference over the channels."""
    return np.abs(_matched(_smooth(frame), background) - background).max(axis=-1)


def _matched(frame: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The frame as bright as the background: one factor, since lamps flicker and cameras adjust their gain.

    It is the median ratio, which the animal does not sway.
    """
    sparse = (slice(None, None, 8), slice(None, None, 8))
    bright = background[sparse] > 16
    if not bright.any():
        return frame
    return frame * np.float32(np.median(background[sparse][bright] / np.maximum(frame[sparse][bright], 1.0)))


def _sharpened(mask: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """The mask without the rim that smoothing added: its border lies where the difference is half of that beside it."""
    import cv2

    box = np.ones((BLUR, BLUR), np.uint8)
    rim = (mask > 0) & (cv2.erode(mask, box, borderValue=255) == 0)
    beside = cv2.dilate(difference, box)
    return np.where(rim & (difference < 0.5 * beside), 0, mask).astype(np.uint8)


def _closed(mask: np.ndarray) -> np.ndarray:
    import cv2

    side = 2 * max(1, round(CLOSING * mask.shape[1])) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    return cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc)


def _mog2(samples: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """As `_median`, by a mixture of Gaussians."""
    import cv2

    background = _background(samples)
    model = cv2.createBackgroundSubtractorMOG2(history=len(samples), varThreshold=MOG2_THRESHOLD, detectShadows=False)
    # What is there in most frames is background, also where it needs several Gaussians.
    model.setBackgroundRatio(MOG2_BACKGROUND)
    model.setVarMin(LEAST_DIFFERENCE**2 / MOG2_THRESHOLD)

    def prepared(frame: np.ndarray) -> np.ndarray:
        return _matched(_smooth(frame), background).clip(0, 255).round().astype(np.uint8)

    # First the background, whatever the first frame shows.
    model.apply(background.clip(0, 255).round().astype(np.uint8), learningRate=1.0)
    for sample in samples:
        model.apply(prepared(sample), learningRate=1.0 / len(samples))

    def find(frame: np.ndarray) -> np.ndarray:
        # Single pixels that noise makes stand out go first; a closing would join them to the animal.
        mask = _closed(cv2.medianBlur(model.apply(prepared(frame), learningRate=0.0), 3))
        return _sharpened(mask, _difference(frame, background))

    return find


def _rembg() -> Callable[[np.ndarray], np.ndarray]:
    """As `_median`, by a network."""
    import rembg

    session = rembg.new_session()

    def find(frame: np.ndarray) -> np.ndarray:
        return np.asarray(rembg.remove(np.ascontiguousarray(frame[..., ::-1]), session=session, only_mask=True))

    return find
