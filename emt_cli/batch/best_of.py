"""`--best-of N`: the candidates of a job, of which the clip that follows its reference's motion best is kept.

Candidates have the job's seed and the N − 1 that come after it (0 comes after the largest). They are denoised together
as any jobs of one shape are, and measured by `emt.evaluate.motion.tracklet_fidelity` on OpenCV's tracks. The measure is
defined for any two clips: where nothing can be seen to move in the reference, a candidate at rest scores 1 and one that
moves less, so that rest is followed too. Of candidates whose scores agree to four decimals the first seed is kept. A
candidate that fails (not finite, out of memory) is left out; the job fails when all of them do.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from emt.errors import EmtError
from emt_cli.batch.jobs import Job
from emt_cli.batch.options import MAX_SEED

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Candidate:
    """A clip that was made for a job: its seed, its index in a batch, and its score, 1 for the same motion."""

    seed: int
    frames: np.ndarray
    batch: Mapping[str, Any]
    fidelity: float


class BestOf:
    """The candidates of one job. Threads may share it; the frames of the best so far alone are held.

    Args:
        job: The job, whose settings say how many candidates there are.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.jobs = [replace(job, seed=(job.seed + i) % (MAX_SEED + 1)) for i in range(job.settings.best_of)]
        self.best: Candidate | None = None
        self.timings: Counter[str] = Counter()  # seconds, of all candidates
        self.peak = 0  # bytes
        self.error: EmtError | None = None  # of the last candidate that failed
        self._results: dict[int, dict[str, Any]] = {}
        self._guard = threading.Lock()

    def add(self, candidate: Candidate, timings: Mapping[str, float], peak: int) -> bool:
        """A candidate was made and measured; returns whether it was the last that was missing."""
        candidate = replace(candidate, fidelity=round(candidate.fidelity, 4))
        with self._guard:
            self.timings.update(timings)
            self.peak = max(self.peak, peak)
            self._results[candidate.seed] = {"seed": candidate.seed, "motion_fidelity": candidate.fidelity}
            if self.best is None or self._rank(candidate) > self._rank(self.best):
                self.best = candidate
            return len(self._results) == len(self.jobs)

    def fail(self, seed: int, error: EmtError) -> bool:
        """A candidate failed; returns whether it was the last that was missing."""
        with self._guard:
            self.error = error
            self._results[seed] = {"seed": seed, "error": error.problem}
            return len(self._results) == len(self.jobs)

    def _rank(self, candidate: Candidate) -> tuple[float, int]:
        return candidate.fidelity, -self._order.index(candidate.seed)

    @property
    def _order(self) -> list[int]:
        return [job.seed for job in self.jobs]

    def record(self) -> dict[str, Any]:
        """Fields of a record: `first_seed`, the job's own, and all candidates in the order of their seeds."""
        results = [self._results[seed] for seed in self._order if seed in self._results]
        return {"best_of": {"first_seed": self.job.seed, "candidates": results}}


def check_tracking(job: Job) -> None:
    """Raise an `EmtError` if candidates are to be compared and what motion is measured with is not installed."""
    if job.settings.best_of > 1:
        check_measuring()


def check_measuring() -> None:
    """Raise an `EmtError` if what motion is measured with is not installed."""
    from emt.evaluate.tracks import opencv

    opencv()


def describe_choice(line: Mapping[str, Any]) -> str:
    """The choice that a journal line records, in words; empty if there was none."""
    choice = line.get("best_of")
    if not choice:
        return ""
    scores = {candidate["seed"]: candidate.get("motion_fidelity") for candidate in choice["candidates"]}
    return f"best of {len(scores)}: seed {line['seed']}, motion fidelity {scores[line['seed']]:.3f}"
