"""One camera's masks: read from its mask video, or found where there is none.

The animal is what differs from the background that stays. `median`: the background is every pixel's median over frames
spread over the recording, what stands out of its noise is animal. `mog2`: OpenCV's mixture of Gaussians per pixel
(Zivkovic 2004), learnt on the same frames, then held fixed, so that a frame's mask does not depend on the frames before
it. `rembg`: a network for single images, where installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
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
    video = videos[camera]
    masks = read_masks(video, frames) if method == "none" else segment(video, frames, method)
    return record_track(folder, camera, keys[camera], masks)


def read_masks(video: Video, frames: list[int]) -> Iterator[Silhouette]:
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
    with VideoReader(video) as reader:
        if method == "rembg":
            import rembg

            session = rembg.new_session()
            for frame in frames:
                image = np.ascontiguousarray(reader.read_bgr(frame)[..., ::-1])
                yield clean_mask(np.asarray(rembg.remove(image, session=session, only_mask=True)))
            return
        chosen = np.linspace(0, video.num_frames - 1, min(BACKGROUND_FRAMES, video.num_frames))
        with VideoReader(video) as first:
            samples = np.stack([first.read_bgr(int(index)) for index in np.unique(np.round(chosen))])
        find = background_model(samples, method)
        del samples  # gigabytes, of a large video
        for frame in frames:
            yield clean_mask(find(reader.read_bgr(frame)))


def background_model(samples: np.ndarray, method: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from a frame to a mask [h, w] uint8, 0 or 255. samples: frames [n, h, w, 3] uint8 BGR."""
    # Block by block of rows: the median of everything at once would need many times the frames' memory.
    blocks = np.array_split(np.arange(samples.shape[1]), max(1, samples.shape[1] // 64))
    background = smoothed(np.concatenate([np.median(samples[:, rows], axis=0) for rows in blocks]))
    bright = background[::8, ::8] > 16

    def matched(frame: np.ndarray) -> np.ndarray:
        """The smoothed frame as bright as the background: lamps flicker, cameras adjust their gain."""
        frame = smoothed(frame)
        if not bright.any():
            return frame
        # The median ratio, which the animal, on a small part of the image, does not sway.
        return frame * np.float32(np.median(background[::8, ::8][bright] / np.maximum(frame[::8, ::8][bright], 1.0)))

    def finished(mask: np.ndarray, off: np.ndarray) -> np.ndarray:
        """Gaps closed, and no rim that smoothing added: the border lies where `off` is half of that beside it."""
        side = 2 * max(1, round(CLOSING * mask.shape[1])) + 1
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
        box = np.ones((BLUR, BLUR), np.uint8)
        rim = (mask > 0) & (cv2.erode(mask, box, borderValue=255) == 0)
        return np.where(rim & (off < 0.5 * cv2.dilate(off, box)), 0, mask).astype(np.uint8)

    def by_median(frame: np.ndarray) -> np.ndarray:
        off = np.abs(matched(frame) - background).max(axis=-1)
        # Parts of the faint mask that hold something sure.
        _, labels = cv2.connectedComponents((off > threshold).astype(np.uint8), connectivity=8)
        kept = np.zeros(int(labels.max()) + 1, dtype=bool)
        kept[np.unique(labels[off > CORE_FACTOR * threshold])] = True
        kept[0] = False
        return finished(kept[labels].astype(np.uint8) * 255, off)

    def by_mixture(frame: np.ndarray) -> np.ndarray:
        # Single pixels that noise makes stand out go first; a closing would join them to the animal.
        frame = matched(frame)
        mask = cv2.medianBlur(model.apply(rounded(frame), learningRate=0.0), 3)
        return finished(mask, np.abs(frame - background).max(axis=-1))

    if method == "median":
        few = samples[:: max(1, len(samples) // 9)]
        noise = np.median([np.median(np.abs(matched(frame) - background).max(axis=-1)) for frame in few])
        threshold = max(LEAST_DIFFERENCE, NOISE_FACTOR * 1.4826 * float(noise))
        return by_median
    model = cv2.createBackgroundSubtractorMOG2(history=len(samples), varThreshold=MOG2_THRESHOLD, detectShadows=False)
    # What is there in most frames is background, also where it needs several Gaussians.
    model.setBackgroundRatio(MOG2_BACKGROUND)
    model.setVarMin(LEAST_DIFFERENCE**2 / MOG2_THRESHOLD)
    # First the background, whatever the first frame shows.
    model.apply(rounded(background), learningRate=1.0)
    for sample in samples:
        model.apply(rounded(matched(sample)), learningRate=1.0 / len(samples))
    return by_mixture


def smoothed(frame: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(frame.astype(np.float32), (BLUR, BLUR), 0)


def rounded(frame: np.ndarray) -> np.ndarray:
    return frame.clip(0, 255).round().astype(np.uint8)
