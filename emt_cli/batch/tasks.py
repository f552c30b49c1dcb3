"""Jobs on their way through a run: a task each, and the reference that tasks share."""

from __future__ import annotations

import concurrent.futures
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from emt.cache import ContentIndex
from emt.errors import EmtError
from emt_cli.batch.best_of import BestOf
from emt_cli.batch.generator import describe, read_reference, read_sound
from emt_cli.batch.jobs import Job

if TYPE_CHECKING:
    from emt.evaluate.tracks import Tracklets
    from emt.features import Motion
    from emt.video import Clip, Sound


class Reference:
    """The reference of consecutive tasks: read by a reader, encoded by the device's thread, once.

    Args:
        job: The first of the jobs, whose settings say how it is sampled.
        sha256: Hash of its content.

    Attributes:
        source: What a reader has of it.
        motion: Its motion on the device, or why there is none; None before.
        fps: Its frame rate.
        warnings: What is wrong with it.
        seconds: Times that no job's record has yet.
        peak: Bytes of memory at the peak of encoding it.
    """

    def __init__(self, job: Job, sha256: str) -> None:
        self.job = job
        self.sha256 = sha256
        self.source: concurrent.futures.Future[Source] = concurrent.futures.Future()
        self.motion: Motion | EmtError | None = None
        self.fps = 0.0
        self.warnings: tuple[str, ...] = ()
        self.seconds: dict[str, float] = {}
        self.peak = 0
        self._tracklets: Tracklets | None = None
        self._guard = threading.Lock()

    def read(self, index: ContentIndex) -> Clip:
        """Decode its frames.

        Raises:
            EmtError: they cannot be read, or differ from those that its hash was taken of.
        """
        clip = read_reference(self.job)
        self._check_unchanged(index)
        return clip

    def sound(self, job: Job, index: ContentIndex) -> Sound | None:
        """The part of its sound that goes along with a job's clip; None for none.

        Raises:
            EmtError: as `read`.
        """
        sound = read_sound(job)
        if sound:
            self._check_unchanged(index)
        return sound

    def _check_unchanged(self, index: ContentIndex) -> None:
        if index.sha256(self.job.reference) != self.sha256:
            raise EmtError(f"{self.job.reference.name} changed while it was read", "Run again.")

    def tracklets(self, index: ContentIndex) -> Tracklets:
        """Track its points on first use; threads may share it."""
        from emt.evaluate.tracks import track

        with self._guard:
            if self._tracklets is None:
                self._tracklets = track(self.read(index).frames)
            return self._tracklets


@dataclass(frozen=True)
class Source:
    """Source of a reference, read ahead of the device.

    Attributes:
        content: Its frames, or its motion from the cache.
        fps: Its frame rate.
        warnings: What is wrong with it.
        kept: The motion cache has it.
    """

    content: Clip | Motion
    fps: float
    warnings: tuple[str, ...] = ()
    kept: bool = False


@dataclass
class Task:
    """A job that is to be done, or one of its candidates.

    Attributes:
        job: The job.
        identity: Its identity.
        output: Where in the output folder its clip goes.
        reference: Its reference.
        candidates: All of its candidates, if it is one.
        warnings: What could not be honoured, besides what is said of the reference.
    """

    job: Job
    identity: str
    output: str
    reference: Reference
    candidates: BestOf | None = None
    warnings: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """Key that consecutive tasks have in common for which a reference is read once, by the same weights."""
        job, laid = self.job, str(self.job.addons.of_motion())
        return job.reference, self.reference.sha256, job.settings.method, laid, *job.sampling.values()

    @property
    def line(self) -> dict[str, Any]:
        """The job as journal lines describe it."""
        named = {"id": self.identity, "output": self.output, "reference_sha256": self.reference.sha256}
        return {"event": "job", **named, **describe(self.job)}

    def split(self) -> list[Task]:
        """The clips to make for it: itself, or its candidates."""
        if self.job.settings.best_of == 1:
            return [self]
        candidates = BestOf(self.job)
        return [replace(self, job=job, candidates=candidates) for job in candidates.jobs]
