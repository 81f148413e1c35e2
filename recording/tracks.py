"""The cleaned masks of one camera, kept on disk between the two passes of an import, and what was measured on them.

The first pass finds the animal, the second cuts it out: both need the same masks, and decoding or segmenting them twice
would cost more than everything else. Pixels are packed, eight to a byte, and mapped, not read: memory stays flat.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multiview.files import atomic_write
from recording.masks import MaskStatistics, Silhouette, Trunk, measure_mask


@dataclass(frozen=True)
class MaskTrack:
    """statistics: per frame, None where the mask is empty. boxes: [t, 4] x, y, width, height. bits: packed pixels."""

    statistics: list[MaskStatistics | None]
    boxes: np.ndarray
    starts: np.ndarray
    bits: np.ndarray
    size: tuple[int, int]

    def silhouette(self, index: int) -> Silhouette:
        """The mask of the index-th frame kept here."""
        x, y, width, height = self.boxes[index].tolist()
        packed = self.bits[self.starts[index] : self.starts[index + 1]]
        window = np.unpackbits(packed, count=width * height).reshape(height, width).view(bool)
        return Silhouette(window, x, y, self.size)


def track_paths(folder: Path, camera: int) -> tuple[Path, Path]:
    """The files of packed pixels and of statistics; the second is written last."""
    return folder / f"{camera}.bits", folder / f"{camera}.npz"


def record_track(folder: Path, camera: int, key: dict, masks: Iterable[Silhouette]) -> Iterator[None]:
    """Writes a track, yielding after every mask and once more when its files are complete.

    key: JSON values that say what the masks were made from; see `is_recorded`.
    """
    bits_path, path = track_paths(folder, camera)
    boxes, lengths, statistics, size = [], [0], [], (0, 0)
    with atomic_write(bits_path) as temporary:
        with open(temporary, "wb") as handle:
            for mask in masks:
                packed = np.packbits(mask.window)
                handle.write(packed.tobytes())
                boxes.append((mask.x, mask.y, mask.window.shape[1], mask.window.shape[0]))
                lengths.append(len(packed))
                statistics.append(measure_mask(mask))
                size = mask.size
                yield
    hulls = [np.zeros((0, 2)) if one is None else one.hull for one in statistics]
    trunks = [Trunk(np.zeros(0, np.uint8), 0, 0, 0, 0, 1) if one is None else one.trunk for one in statistics]
    scalars = [
        (0.0,) * 6 if one is None else (one.area, one.body_area, *one.centre, one.axis_length, one.touches_border)
        for one in statistics
    ]
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as handle:
            np.savez(
                handle,
                key=json.dumps(key, sort_keys=True),
                size=size,
                boxes=np.array(boxes, dtype=np.int64).reshape(-1, 4),
                starts=np.cumsum(lengths),
                scalars=np.array(scalars, dtype=np.float64).reshape(-1, 6),
                hulls=np.concatenate(hulls),
                hull_lengths=[len(hull) for hull in hulls],
                trunks=np.array([(t.x, t.y, t.width, t.height, t.step) for t in trunks], np.int64).reshape(-1, 5),
                trunk_bits=np.concatenate([one.bits for one in trunks]),
                trunk_lengths=[len(one.bits) for one in trunks],
            )
    yield


def is_recorded(folder: Path, camera: int, key: dict) -> bool:
    """Whether a complete track made from the same things is there."""
    bits_path, path = track_paths(folder, camera)
    if not (path.is_file() and bits_path.is_file()):
        return False
    with np.load(path) as content:
        return str(content["key"]) == json.dumps(key, sort_keys=True)


def read_track(folder: Path, camera: int) -> MaskTrack:
    """Reads a complete track."""
    bits_path, path = track_paths(folder, camera)
    with np.load(path) as content:
        boxes, starts, scalars = content["boxes"], content["starts"], content["scalars"]
        hulls = np.split(content["hulls"], np.cumsum(content["hull_lengths"])[:-1])
        bits = np.split(content["trunk_bits"], np.cumsum(content["trunk_lengths"])[:-1])
        trunks = [Trunk(one, *map(int, where)) for one, where in zip(bits, content["trunks"], strict=True)]
        size = tuple(int(value) for value in content["size"])
    statistics = [
        MaskStatistics(row[0], row[1], row[2:4], row[4], hull, bool(row[5]), trunk) if row[0] else None
        for row, hull, trunk in zip(scalars, hulls, trunks, strict=True)
    ]
    empty = bits_path.stat().st_size == 0
    bits = np.zeros(0, np.uint8) if empty else np.memmap(bits_path, dtype=np.uint8, mode="r")
    return MaskTrack(statistics, boxes, starts, bits, size)
