"""Means and correlations over clips, with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value over clips, with a 95% confidence interval.

    Attributes:
        value: The estimate; NaN where no clip had one.
        low, high: Ends of the interval: percentiles of the estimate over resampled sets of clips.
        clips: How many clips it rests on.
    """

    value: float
    low: float
    high: float
    clips: int

    def __str__(self) -> str:
        if not self.clips:
            return "–"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_dict(self) -> dict[str, float | int | None]:
        """The four numbers, `None` for NaN, as JSON has no NaN."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


NOTHING = Estimate(float("nan"), float("nan"), float("nan"), 0)


def _resampled(clips: int, seed: int) -> np.ndarray:
    """Counts of each clip in each bootstrap resample: (RESAMPLES, clips)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clips, np.full(clips, 1 / clips), size=RESAMPLES)


def _interval(value: float, resampled: np.ndarray, clips: int) -> Estimate:
    resampled = resampled[np.isfinite(resampled)]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (value, value)
    return Estimate(float(value), float(low), float(high), clips)


def mean(values: Sequence[float | None] | np.ndarray, seed: int = 0) -> Estimate:
    """Mean of one value a clip; clips without one (`None` or NaN) are left out."""
    kept = np.array([value for value in values if value is not None and np.isfinite(value)], float)
    if not len(kept):
        return NOTHING
    return _interval(kept.mean(), _resampled(len(kept), seed) @ kept / len(kept), len(kept))


def pooled_pearson(pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> Estimate:
    """Pearson correlation over the values of all clips together, resampled by whole clips.

    Args:
        pairs: For each clip two equally long arrays; clips with empty arrays are left out.
        seed: Seed of the resampling.
    """
    sums = np.array(
        [
            (x.size, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum())
            for x, y in ((np.asarray(x, float), np.asarray(y, float)) for x, y in pairs)
            if x.size
        ]
    )
    if not len(sums):
        return NOTHING

    def correlation(total: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy = np.moveaxis(total, -1, 0)
        scale = np.sqrt(np.maximum((xx - x * x / n) * (yy - y * y / n), 0))
        # A resample in which nothing varies has no correlation; the interval leaves it out.
        return np.where(scale > 1e-9, (xy - x * y / n) / np.maximum(scale, 1e-9), np.nan)

    value = float(np.nan_to_num(correlation(sums.sum(0))))
    return _interval(value, correlation(_resampled(len(sums), seed) @ sums), len(sums))
