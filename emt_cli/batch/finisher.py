"""Finishing of clips: frames are measured, chosen from, filtered, written and recorded, by threads of their own."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from emt.errors import EmtError
from emt_cli.batch.best_of import Candidate
from emt_cli.batch.generator import playback_rate, silence_warnings
from emt_cli.batch.inputs import syntax_warnings
from emt_cli.batch.outcomes import Outcomes
from emt_cli.batch.results import write_result
from emt_cli.batch.session import RunOptions, Session
from emt_cli.batch.tasks import Reference, Task

if TYPE_CHECKING:
    import numpy as np

WRITERS = max(2, min(8, (os.cpu_count() or 2) // 2))  # ffmpeg has threads of its own


class Finisher:
    """Takes frames from the device's thread through a short queue, so that neither side can fill the memory.

    Args:
        session: Its generator writes records, its cache keeps motions.
        outcomes: Takes what ends here.
        options: Of the run.
    """

    def __init__(self, session: Session, outcomes: Outcomes, options: RunOptions) -> None:
        self.generator, self.index, self.motions = session.generator, session.index, session.motions
        self.outcomes, self.filter = outcomes, options.filter
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(maxsize=2 * WRITERS)

    @property
    def idle(self) -> bool:
        """Nothing is waiting or being written."""
        return not self._queue.unfinished_tasks

    def start(self) -> None:
        """Start the threads."""
        for _ in range(WRITERS):
            threading.Thread(target=self._work, daemon=True).start()

    def join(self) -> None:
        """Wait until all is written."""
        self._queue.join()

    def add(self, task: Task, frames: np.ndarray, batch: dict[str, Any], timings: dict[str, float], peak: int) -> None:
        """Finish a clip; waits for room in the queue.

        Args:
            task: Its job, or one of the job's candidates.
            frames: uint8, (frames, height, width, 3), RGB.
            batch: Its place in a batch, for the record.
            timings: Seconds by part.
            peak: Peak memory in bytes.
        """
        work = self._measure if task.candidates else self._save
        self._queue.put(partial(work, task, frames, batch, timings, peak))

    def keep_motion(self, reference: Reference) -> None:
        """Keep the motion of a reference for later runs; waits for room in the queue."""
        self._queue.put(partial(self._keep_motion, reference, reference.motion))

    def fail(self, task: Task, error: EmtError) -> None:
        """A job has failed, or one of its candidates, which leaves the others."""
        if task.candidates is None:
            self.outcomes.failed(task.line, error)
        elif task.candidates.fail(task.job.seed, error):
            self._settle(task)

    def _work(self) -> None:
        while True:
            work = self._queue.get()
            try:
                work()
            except Exception as error:  # a fault of this program's; the thread goes on with other jobs
                self.outcomes.listener.say(f"a job has been lost: {type(error).__name__}: {error}")
                self.outcomes.counts["failed"] += 1
            finally:
                del work  # the frames
                self._queue.task_done()

    def _measure(
        self, task: Task, frames: np.ndarray, batch: dict[str, Any], timings: dict[str, float], peak: int
    ) -> None:
        """Measure a candidate; the last one settles its job."""
        from emt.evaluate.motion import tracklet_fidelity
        from emt.evaluate.tracks import track

        assert task.candidates is not None
        begun = time.monotonic()
        try:
            fidelity = tracklet_fidelity(task.reference.tracklets(self.index), track(frames))
        except Exception as error:
            self.fail(task, self.generator.explain(error, task.job))
            return
        timings["measure"] = time.monotonic() - begun
        if task.candidates.add(Candidate(task.job.seed, frames, batch, fidelity), timings, peak):
            self._settle(task)

    def _settle(self, task: Task) -> None:
        """All candidates of a job have ended: save the best, or fail with the last one's error."""
        candidates = task.candidates
        assert candidates is not None
        if candidates.best is None:
            assert candidates.error is not None
            self.outcomes.failed(replace(task, job=candidates.job).line, candidates.error)
            return
        best = candidates.best
        winner = replace(task, job=replace(task.job, seed=best.seed))  # its prompt, and so its warnings, are the same
        self._save(winner, best.frames, dict(best.batch), dict(candidates.timings), candidates.peak)

    def _save(
        self, task: Task, frames: np.ndarray, batch: dict[str, Any], timings: dict[str, float], peak: int
    ) -> None:
        """Write a clip, its sidecar and its line, in this order (see `emt_cli.batch.journal`); unless it is dropped."""
        try:
            record = self.generator.record(task.job, task.identity, task.reference.sha256, batch)
            record |= task.candidates.record() if task.candidates else {}
            sound = task.reference.sound(task.job, self.index)
            silent = silence_warnings(task.job, sound)
            self.outcomes.warn(silent)
            warnings = [*task.reference.warnings, *task.warnings, *syntax_warnings(task.job), *silent]
            record |= {"warnings": warnings} if warnings else {}
            reason = ""
            if self.filter:
                begun = time.monotonic()
                verdict = self.filter.judge(task.reference.tracklets(self.index), frames)
                timings["measure"] = timings.get("measure", 0.0) + time.monotonic() - begun
                record |= {"motion_fidelity": round(verdict.fidelity, 4)}
                record |= {"temporal_consistency": round(verdict.consistency, 4)}
                reason = verdict.reason
            begun = time.monotonic()
            if not reason:
                clip = self.outcomes.out / task.output
                write_result(clip, frames, playback_rate(task.job, task.reference.fps), record, sound)
                timings["encode"] = time.monotonic() - begun
            rounded = {name: round(seconds, 4) for name, seconds in timings.items()}
            line = {**task.line, **record, "timings": rounded, "peak_memory": peak}
            if reason:
                self.outcomes.dropped(line, reason)
            else:
                self.outcomes.done(line)
        except Exception as error:
            self.outcomes.failed(task.line, self.generator.explain(error, task.job))

    def _keep_motion(self, reference: Reference, motion: Any) -> None:
        try:
            key = self.generator.motion_key(reference.job, reference.sha256)
            with self.generator.device.beside():
                self.motions.save(key, motion, reference.fps, reference.warnings)
        except Exception as error:
            self.motions.limit = 0  # once is enough: the run goes on without
            reason = self.generator.explain(error, reference.job)
            self.outcomes.listener.say(f"encoded references are not kept: {reason}")
