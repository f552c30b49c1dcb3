"""Temporal consistency: how steadily a clip shows the same thing from frame to frame."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from torch import Tensor

from emt.evaluate.tracks import check_frames, opencv, track_scale

_LUMINANCE, _STRUCTURE = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # the constants of SSIM


def embedding_consistency(embeddings: Tensor) -> float:
    """Mean cosine similarity of consecutive frames' embeddings (frames, width), as the paper reports with CLIP."""
    first, second = embeddings[:-1], embeddings[1:]
    cosine = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1)).clamp(min=1e-8)
    return float(cosine.mean())


def temporal_consistency(frames: np.ndarray) -> float:
    """Consistency that needs no model: each frame against the next, warped back along the optical flow.

    Dense inverse search flow is estimated both ways; pixels that do not return to within a pixel (occlusions) are left
    out; the rest are compared by SSIM in 7 × 7 windows. Motion costs nothing as long as it can be followed; flicker,
    boiling texture and cuts do: a step of which less than half can be followed counts in proportion.

    Args:
        frames: uint8 (frames, height, width, 3).

    Returns:
        1 for a clip that only moves, down to about 0 for frames that have nothing to do with each other.

    Raises:
        EmtError: The frames are not a clip, or OpenCV is not installed.
    """
    cv2 = opencv()
    check_frames(frames)
    scale = min(1.0, track_scale(*frames.shape[1:3]))
    width, height = (max(16, round(side * scale)) for side in (frames.shape[2], frames.shape[1]))
    grey = [
        cv2.cvtColor(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
        for frame in frames
    ]
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    scores = []
    for first, second in pairwise(grey):
        forward, backward = search.calc(first, second, None), search.calc(second, first, None)
        to_x, to_y = x + forward[..., 0], y + forward[..., 1]
        returned = forward + cv2.remap(backward, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
        followed = inside & (np.linalg.norm(returned, axis=2) < 1)
        warped = cv2.remap(second, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        similar = _similarity(first.astype(np.float32), warped.astype(np.float32))
        scores.append((similar * followed).sum() / max(followed.sum(), followed.size / 2))
    return float(np.mean(scores))


def _similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """SSIM of each pixel's neighbourhood (Wang et al. 2004), of two grey float32 frames of 0 to 255."""
    cv2 = opencv()

    def average(values: np.ndarray) -> np.ndarray:
        return cv2.blur(values, (7, 7))

    a, b = average(first), average(second)
    variance = average(first * first) - a * a + average(second * second) - b * b
    covariance = average(first * second) - a * b
    return ((2 * a * b + _LUMINANCE) * (2 * covariance + _STRUCTURE)) / (
        (a * a + b * b + _LUMINANCE) * (variance + _STRUCTURE)
    )
