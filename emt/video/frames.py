"""Frames that are in memory, sampled and brought to a size as those of files are (`emt.video.read_clip`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from emt.video.clip import FITS, Fit
from emt.video.pictures import place


def sample_frames(
    pictures: Sequence[Image.Image] | np.ndarray, frames: int, size: tuple[int, int], fit: Fit = "crop"
) -> np.ndarray:
    """Sample pictures evenly, from the first to the last.

    Args:
        pictures: PIL's, or RGB of uint8, (count, height, width, 3).
        frames: How many to take.
        size: (width, height) in pixels.
        fit: How to reach it.

    Returns:
        RGB, uint8, (frames, height, width, 3).

    Raises:
        ValueError: There are fewer pictures, or there is no such fit.
    """
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}, allowed are {', '.join(FITS)}")
    if len(pictures) < frames:
        raise ValueError(f"the video has {len(pictures)} frames, but {frames} are needed: num_frames={len(pictures)}")
    out = np.empty((frames, size[1], size[0], 3), np.uint8)
    for frame, number in zip(out, np.linspace(0, len(pictures) - 1, frames, dtype=int)):
        picture = pictures[number]
        place(picture if isinstance(picture, Image.Image) else Image.fromarray(picture), frame, fit)
    return out
