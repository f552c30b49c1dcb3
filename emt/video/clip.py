"""A clip as data: its facts, the frames sampled from it, and the limits of all that is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[Fit, ...] = ("crop", "pad", "stretch")

FOLDER_FPS = 24.0
"""Frame rate of a folder of images that does not say its own (`write_clip` records one in the PNG files)."""
MAX_PIXELS = 1 << 26
"""Largest frame that is decoded, twice 8K; a damaged or hostile header can claim any size."""
MAX_FRAMES = 65_536
"""Most frames that one `read_clip` samples."""
SPARSE_SECONDS = 1.0
"""Average time between two sampled frames from which on movement is lost between them, and a warning says so."""


@dataclass(frozen=True)
class ClipInfo:
    """Facts of a clip, found without decoding it.

    Attributes:
        path: The file or folder.
        width: Pixels, after the rotation flag and with non-square pixels made square.
        height: Pixels, likewise.
        fps: Frames a second, averaged over the clip.
        frames: Counted, not taken from the header.
        duration: Seconds from the first frame's appearance to the last one's end.
        sound: Whether there is sound in the file.
        warnings: A line for each thing that is wrong with the file itself, such as a missing end.
    """

    path: Path
    width: int
    height: int
    fps: float
    frames: int
    duration: float
    sound: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sound:
    """A part of a clip's sound, for `write_clip`.

    Attributes:
        path: The file.
        start: Seconds on the file's own clock at which it starts.
        duration: Seconds that it lasts.
    """

    path: Path
    start: float
    duration: float


@dataclass(frozen=True)
class Clip:
    """Frames sampled from a clip.

    Attributes:
        frames: uint8, (frames, height, width, 3), RGB.
        fps: The rate at which the sampled frames span the sampled time, `(n - 1) / (times[-1] - times[0])`: played
            at it, they move as fast as the source. The source's own rate if there is one frame only.
        info: The clip they come from.
        times: When each frame is presented, in seconds after the clip's first frame. Not decreasing.
        warnings: A line for each thing that makes the frames worth less than they seem: a clip that is cut short or
            damaged, frames so far apart that movement is lost. Those of `info` are among them.
        sound: The sound of the sampled time, None if there is none.
    """

    frames: np.ndarray
    fps: float
    info: ClipInfo
    times: tuple[float, ...]
    warnings: tuple[str, ...] = ()
    sound: Sound | None = None


class FramesMissing(Exception):
    """Fewer frames came out of a decoder than its container lists."""


class Source(Protocol):
    """An opened clip, of which frames can be read by their numbers."""

    @property
    def info(self) -> ClipInfo:
        """Facts of the clip."""

    @property
    def times(self) -> np.ndarray:
        """Presentation times of the frames, seconds on the clip's own clock, increasing, one for each frame."""

    def read(self, picked: np.ndarray, out: np.ndarray, fit: Fit) -> tuple[str, ...]:
        """Read frames into `out` (frames, height, width, 3), uint8; returns warnings.

        Args:
            picked: Numbers of the frames, not decreasing.
            out: Where to; its height and width are those to bring frames to.
            fit: How to.

        Raises:
            FramesMissing: `times` are those of a container that lists frames which nothing decodes to.
            EmtError: Frames cannot be read.
        """

    def counted(self) -> Source:
        """Same source with the times of the frames that really come out when all of it is decoded."""


def half_gap(times: np.ndarray) -> float:
    """Half of the shortest time between two frames."""
    return float(np.diff(times).min()) / 2 if len(times) > 1 else 1e-3


def fitted(
    width: int, height: int, target: tuple[int, int], fit: Fit
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """Part of a picture to take, (left, top, right, bottom), and the size to bring it to, for a fit.

    Args:
        width: Of the picture.
        height: Of the picture.
        target: (width, height) to fill; with "pad" the size may be smaller, the rest is for bars.
        fit: How to reach it.
    """
    wide, high = target
    if fit == "crop":
        cut_w, cut_h = min(width, height * wide / high), min(height, width * high / wide)
        box = ((width - cut_w) / 2, (height - cut_h) / 2, (width + cut_w) / 2, (height + cut_h) / 2)
        return box, target
    if fit == "pad":
        target = (max(1, min(wide, round(high * width / height))), max(1, min(high, round(wide * height / width))))
    return (0.0, 0.0, float(width), float(height)), target
