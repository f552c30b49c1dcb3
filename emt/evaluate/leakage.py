"""Leakage: how much a result looks like its reference, beyond what any two clips have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BINS = 8  # per colour channel


def appearance(frames: np.ndarray) -> np.ndarray:
    """Appearance of a clip, without position: the square roots of its smoothed colour histogram, unit length.

    Args:
        frames: uint8 (frames, height, width, 3).

    Returns:
        (512,) float32. The product of two of them is the Bhattacharyya coefficient, 1 for the same colours, 0 for
        none in common.
    """
    step = max(1, int(max(frames.shape[1:3]) / 64))
    pixels = frames[:, ::step, ::step].reshape(-1, 3).astype(np.float32) / 255 * (_BINS - 1)
    # Each pixel is shared among the eight bins around it, so that a shift of tone by a hair changes little.
    low = np.minimum(pixels.astype(int), _BINS - 2)
    part = pixels - low
    histogram = np.zeros(_BINS**3, np.float32)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, part, 1 - part), axis=1)
        index = (low + np.array(corner)) @ np.array([_BINS * _BINS, _BINS, 1])
        histogram += np.bincount(index, weights=weight, minlength=_BINS**3).astype(np.float32)
    return np.sqrt(histogram / histogram.sum())


def appearance_leakage(
    references: Sequence[np.ndarray], results: Sequence[np.ndarray], motions: Sequence[str]
) -> list[float | None]:
    """Leakage of each pair, from descriptors of unit length (histograms by `appearance`, or mean frame embeddings).

    A result's similarity to its own reference is set against the mean similarity of results to references that
    they were not made from: `(own - unrelated) / (1 - unrelated)`. 0 means that a result resembles its
    reference no more than any other; 1 that it looks the same. Negative values are kept: they average out to
    0 where nothing leaks.

    Args:
        references, results: One descriptor each for every pair.
        motions: Which reference each pair has; pairs with the same one are not unrelated.

    Returns:
        One value a pair; `None` for a pair whose result has no unrelated reference to be compared with.
    """
    if not references:
        return []
    similarity = np.stack(results) @ np.stack(references).T  # result i against reference j
    names = np.array(motions)
    values: list[float | None] = []
    for i, name in enumerate(names):
        others = similarity[i, names != name]
        if not len(others):
            values.append(None)
            continue
        unrelated = float(others.mean())
        values.append(float((similarity[i, i] - unrelated) / max(1 - unrelated, 1e-3)))
    return values
