"""Runs jobs: reading, the device and writing side by side, each failure kept to its own job.

    feeder ──▶ readers ──▶ the device (main thread) ──▶ writers
    hashes,    decode or    encode references,           clip, sidecar,
    skips      load motion  denoise in batches           journal line

One feeder walks through the jobs in order, skips those that are done and hands each reference to the readers, at
most `_AHEAD` references before the device. The main thread alone touches the device; signals arrive there too.
Writers take finished frames from a short queue, so neither side can fill the memory. The time for which the main
thread waits at either queue, between its first and its last batch, is the run's `device_wait`: under 0.1% over 60
clips of a third of a second on two CPU cores; a test holds it under 5%.
"""

from __future__ import annotations

import concurrent.futures
import os
import queue
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from emt.cache import ContentIndex, MotionCache
from emt.device import is_out_of_memory
from emt.errors import EmtError
from emt.storage import write_atomically
from emt_cli.batch.best_of import BestOf, Candidate, check_tracking
from emt_cli.batch.estimates import clip_bytes
from emt_cli.batch.generator import Generator, describe, playback_rate, read_reference
from emt_cli.batch.jobs import Item, Job, Rejected, identify, output_name
from emt_cli.batch.journal import Journal, dumps
from emt_cli.batch.results import read_record, sidecar, state_on_disk, write_result
from emt_cli.terminal import ProgressReporter

if TYPE_CHECKING:
    import numpy as np

    from emt.evaluate.tracks import Tracklets
    from emt.pipeline import Motion
    from emt.train.teacher import Filter
    from emt.video import Clip

_READERS = _WRITERS = max(2, min(8, (os.cpu_count() or 2) // 2))  # ffmpeg has threads of its own
_AHEAD = _READERS + 2  # references read before the device asks for them
_LARGEST_AUTO_BATCH = 8
_MARGIN = 0.85  # of the memory that a larger batch may fill, by the measurement of a smaller one
_SPARE_BYTES = 1 << 20  # of the disk, for sidecars and the journal
_POLL = 0.2  # seconds between looks at whether to stop


class _Reference:
    """One reference as a group of jobs sees it: read by a reader, encoded by the main thread, once."""

    def __init__(self, job: Job, sha256: str, release: Callable[[], None]) -> None:
        self.job = job
        self.sha256 = sha256
        self.source: concurrent.futures.Future[tuple[Clip | Motion, float, bool]] = concurrent.futures.Future()
        self.motion: Motion | EmtError | None = None
        self.fps = 0.0
        self.seconds: dict[str, float] = {}  # not yet in a job's timings
        self._release: Callable[[], None] | None = release
        self._tracklets: Tracklets | None = None
        self._guard = threading.Lock()

    def release(self) -> None:
        """Let the feeder have another reference read ahead."""
        if self._release:
            self._release()
            self._release = None

    def read(self, index: ContentIndex) -> Clip:
        """Its frames.

        Raises:
            EmtError: they cannot be read, or are no longer those that its hash was taken of.
        """
        clip = read_reference(self.job)
        if index.sha256(self.job.reference) != self.sha256:
            raise EmtError(f"{self.job.reference.name} changed while it was read", "Run again.")
        return clip

    def tracklets(self, index: ContentIndex) -> Tracklets:
        """How its points move, tracked when it is first asked for; threads may ask."""
        from emt.evaluate.tracks import track

        with self._guard:
            if self._tracklets is None:
                self._tracklets = track(self.read(index).frames)
            return self._tracklets


@dataclass
class _Task:
    """A job that is to be done, or one of its candidates."""

    job: Job
    identity: str
    output: PurePosixPath
    reference: _Reference
    candidates: BestOf | None = None

    @property
    def line(self) -> dict[str, Any]:
        """The job as the journal tells of it."""
        return {"event": "job", "id": self.identity, "output": str(self.output), **describe(self.job)}


@dataclass
class Summary:
    """How a run ended: jobs by state; whether it was interrupted, or standard output closed."""

    counts: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False
    pipe_closed: bool = False


class Runner:
    """One run over an output folder.

    Args:
        journal: The folder's journal, locked for this process.
        generator: The model on its device.
        index: Content hashes.
        motions: Motion features of earlier runs.
        listener: Is told of the progress.
        precision: The arithmetic asked for, part of each job's identity.
        batch_size: Clips in a batch; None to measure what fits.
        overwrite: Do finished jobs again.
        json: Write a JSON line for each job to standard output, not the path of its clip.
        filter: Drops clips that do not pass; None keeps all.
        method: How clips are made if not as usual; part of each job's identity.
        quiet: Write nothing to standard output.
    """

    def __init__(
        self,
        journal: Journal,
        generator: Generator,
        index: ContentIndex,
        motions: MotionCache,
        listener: ProgressReporter,
        *,
        precision: str = "auto",
        batch_size: int | None = None,
        overwrite: bool = False,
        json: bool = False,
        filter: Filter | None = None,
        method: str = "",
        quiet: bool = False,
    ) -> None:
        self.filter, self.method, self.quiet = filter, method, quiet
        self.journal, self.generator, self.index = journal, generator, index
        self.motions, self.listener = motions, listener
        self.precision, self.batch_size, self.overwrite, self.json = precision, batch_size, overwrite, json
        self.summary = Summary()
        self._stopping = False
        self._busy = False
        self._output_guard = threading.Lock()
        self._seen: dict[PurePosixPath, str] = {}  # identity by output
        self._ended: dict[str, dict[str, Any]] = {}  # how it ended, by output
        self._twins: dict[str, list[dict[str, Any]]] = {}  # the same jobs again, waiting for that
        self._limits: dict[tuple[Any, ...], int] = {}
        self._ahead = threading.Semaphore(_AHEAD)
        self._to_read: queue.Queue[_Reference] = queue.Queue()
        self._ready: queue.Queue[_Task | BaseException | str] = queue.Queue(maxsize=64)
        self._to_write: queue.Queue[Callable[[], None]] = queue.Queue(maxsize=2 * _WRITERS)
        self._first_batch = self._last_batch = self._waited = 0.0

    def run(self, items: Iterable[Item]) -> Summary:
        """Do all jobs. SIGINT and SIGTERM finish the running batch; a second one ends the process at once.

        Raises:
            EmtError: nothing can be done at all (no such device, the model cannot be opened).
        """
        begun = time.monotonic()
        _remove_leftovers(self.journal.out)
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            threading.Thread(target=self._feed, args=(items,), daemon=True).start()
            for target in [self._read_references] * _READERS + [self._write_results] * _WRITERS:
                threading.Thread(target=target, daemon=True).start()
            try:
                self._drive()
            except KeyboardInterrupt:
                self.summary.interrupted = True
            finally:
                self._stopping = True
                self._to_write.join()
            self._end(time.monotonic() - begun)
        finally:
            self.listener.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.summary

    def _end(self, seconds: float) -> None:
        states = {state: self.summary.counts[state] for state in ("done", "skipped", "failed")}
        if self.filter:
            states["dropped"] = self.summary.counts["dropped"]
        line = {"event": "run", **states, "seconds": round(seconds, 3), "interrupted": self.summary.interrupted}
        if self._last_batch > self._first_batch:
            line["device"] = self.generator.device.name
            line["device_wait"] = round(self._waited / (self._last_batch - self._first_batch), 4)
        with suppress(OSError):  # a full disk, of which each job has told
            self.journal.append(line)
        if not self.summary.pipe_closed:
            self.listener.summary(line)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.summary.interrupted:
            self.listener.close()
            self.journal.close()  # after a line that is being written
            os._exit(130)
        self.summary.interrupted = self._stopping = True
        if not self._busy and not self._to_write.unfinished_tasks:
            raise KeyboardInterrupt  # nothing to finish
        with suppress(RuntimeError):  # the interrupt came amidst another line on standard error
            self.listener.say("finishing the running batch; interrupt again to stop at once")

    # ---- feeder: which jobs are to be done ---------------------------------------------------------------------

    def _feed(self, items: Iterable[Item]) -> None:
        try:
            group: tuple[Any, ...] = ()
            reference: _Reference | None = None
            for item in items:
                if self._stopping:
                    return
                if item is None:
                    self._ready.put("pause")
                elif isinstance(item, Rejected):
                    known = {"reference": item.reference, "prompt": item.prompt, "origin": item.origin}
                    self._fail({"event": "job", **{key: value for key, value in known.items() if value}}, item.error)
                elif task := self._task(item):
                    key = (item.reference, task.reference.sha256, *item.sampling.values())
                    if reference is None or key != group:
                        while not self._ahead.acquire(timeout=_POLL):
                            if self._stopping:
                                return
                        group, reference = key, task.reference
                        self._to_read.put(reference)
                    task.reference = reference
                    self._ready.put(task)
            self._ready.put("end")
        except BaseException as error:  # the main thread raises it
            self._ready.put(error)

    def _task(self, job: Job) -> _Task | None:
        """What is to be done for a job; None if nothing is, or nothing can be."""
        line = {"event": "job", **describe(job)}
        try:
            self.generator.check(job)
            sha256 = self.index.sha256(job.reference)
            how = {"model": self.generator.model_sha256, "precision": self.precision, "method": self.method}
            identity = identify(job, reference=sha256, **how)
            output = output_name(job, sha256)
            twin = self._seen.get(output)
            if twin not in (None, identity):
                raise EmtError(f"another job of this run makes {output} too", "Give one of them another seed.")
            line |= {"id": identity, "output": str(output)}
            if twin:
                self._report_as_twin(line)
                return None
            self._seen[output] = identity
            check_tracking(job)
            clip = self.journal.out / output
            known = self.journal.finished.get(str(output))
            state = "open" if self.overwrite else state_on_disk(known, clip, job, identity)
            if state == "made":
                self._adopt(line, clip)
            if self.filter and not self.overwrite and (reason := self._drop_again(line, clip, state)):
                self._report({**line, "state": "dropped", "error": reason})
            elif state == "open":
                return _Task(job, identity, output, _Reference(job, sha256, self._ahead.release))
            else:
                known = self.journal.finished[str(output)]
                chosen = {key: known[key] for key in ("seed", "best_of") if "best_of" in known}
                self._report({**line, **chosen, "state": "skipped"})
        except (EmtError, OSError) as error:
            self._fail(line, self.generator.explain(error, job))
        return None

    def _adopt(self, line: dict[str, Any], clip: Path) -> None:
        """Write down what an earlier run had made when it was killed."""
        record = read_record(clip)
        write_atomically(sidecar(clip), dumps(record) + b"\n")
        self._log_done({**line, **record, "adopted": True}, clip)

    def _drop_again(self, line: dict[str, Any], clip: Path, state: str) -> str:
        """Why a job of an earlier run does not pass this run's filter, by what was measured then; empty if it may."""
        assert self.filter is not None
        known = (self.journal.dropped if state == "open" else self.journal.finished).get(line["output"], {})
        if known.get("id") != line["id"] or "motion_fidelity" not in known:
            return ""
        reason = self.filter.reason(known["motion_fidelity"], known["temporal_consistency"])
        if reason and state != "open":
            self.journal.append({**known, "state": "dropped", "error": reason})
            _remove_result(clip)
        return reason

    # ---- readers ------------------------------------------------------------------------------------------------

    def _read_references(self) -> None:
        while True:
            reference = self._to_read.get()
            begun = time.monotonic()
            try:
                settings = reference.job.settings
                shape = settings.frames, settings.height, settings.width
                kept = self.motions.load(self.generator.motion_key(reference.job, reference.sha256), shape)
                if kept:
                    source: tuple[Clip | Motion, float, bool] = (*kept, True)
                else:
                    clip = reference.read(self.index)
                    source = clip, clip.fps, False
                reference.seconds["decode"] = time.monotonic() - begun
                reference.source.set_result(source)
            except BaseException as error:  # it is raised where the reference is used
                reference.source.set_exception(error)

    # ---- the device ---------------------------------------------------------------------------------------------

    def _drive(self) -> None:
        batch: list[_Task] = []
        while not self._stopping:
            task = self._next_task()
            if isinstance(task, BaseException):
                raise task
            if batch and not (isinstance(task, _Task) and task.job.shape == batch[0].job.shape):
                batch = self._finish(batch)
            if task == "end":
                return
            if isinstance(task, _Task) and self._encode(task):
                for candidate in _candidates(task):
                    batch.append(candidate)
                    if len(batch) >= self._limit(task.job):
                        batch = self._finish(batch)
                    if self._stopping:
                        break

    def _finish(self, batch: list[_Task]) -> list[_Task]:
        """Run a batch that an interrupt lets finish; returns the next one, empty."""
        self._busy = True
        self._run_batch(batch)
        self._busy = False
        return []

    def _next_task(self) -> _Task | BaseException | str:
        begun = time.monotonic()
        try:
            while not self._stopping:
                with suppress(queue.Empty):
                    return self._ready.get(timeout=_POLL)
            return "stopped"
        finally:
            self._count_waiting(begun)

    def _count_waiting(self, begun: float) -> None:
        if self._first_batch:
            self._waited += time.monotonic() - begun

    def _encode(self, task: _Task) -> bool:
        """Have the motion of a task's reference on the device; if that cannot be, the task has failed."""
        reference = task.reference
        if reference.motion is None:
            self.generator.load()  # what goes wrong here ends the run, not the job
            begun = time.monotonic()
            while not concurrent.futures.wait([reference.source], timeout=_POLL).done:
                if self._stopping:
                    return False
            self._count_waiting(begun)
            try:
                source, reference.fps, kept = reference.source.result()
                begun = time.monotonic()
                reference.motion = self.generator.encode(task.job, source)
                reference.seconds["reference"] = time.monotonic() - begun
                if not kept:
                    self._hand_over(partial(self._keep_motion, reference))
            except Exception as error:
                reference.motion = self.generator.explain(error, task.job)
            finally:
                reference.release()
                del reference.source
        if isinstance(reference.motion, EmtError):
            self._fail_task(task, reference.motion)
            return False
        return True

    def _limit(self, job: Job) -> int:
        """Clips of this shape in a batch, by what was asked for and what did not fit so far."""
        limit = self._limits.get(job.shape, self.batch_size or 1)
        most = self.generator.most_clips(job)
        return limit if most is None else min(limit, most)

    def _run_batch(self, tasks: list[_Task]) -> None:
        """Make the clips of tasks of one shape; what fails together is tried in smaller batches."""
        if not self._room_on_disk(tasks):
            return
        left, size = self._try_batch(tasks)
        while left:
            size = min(size, self._limit(left[0].job))  # the first part may have taught less
            self._run_batch(left[:size])
            left = left[size:]

    def _try_batch(self, tasks: list[_Task]) -> tuple[list[_Task], int]:
        """Make the clips of a batch and hand them to the writers.

        Returns:
            The tasks that neither succeeded nor failed by themselves, and how many of them to try at once.
        """
        from emt.pipeline import NonFiniteError

        jobs, device = [task.job for task in tasks], self.generator.device
        motions = [task.reference.motion for task in tasks]
        resident = device.memory()[0]

        def on_step(done: int, steps: int) -> None:
            self.listener.step([job.prompt for job in jobs], done, steps, device.memory()[0])

        self._first_batch = self._first_batch or time.monotonic()
        try:
            clips, timings, peak = self.generator.generate(jobs, motions, on_step)  # type: ignore[arg-type]
        except NonFiniteError as error:
            for place in error.clips:
                self._fail_task(tasks[place], NonFiniteError([0], [jobs[place].seed]))
            rest = [task for place, task in enumerate(tasks) if place not in error.clips]
            return rest, max(1, len(rest))
        except Exception as error:
            size = len(tasks) // 2 if is_out_of_memory(error) else 1
            if len(tasks) == 1:
                self._fail_task(tasks[0], self.generator.explain(error, jobs[0]))
                tasks = []
            elif is_out_of_memory(error):
                self._limits[jobs[0].shape] = size
                self.listener.say(f"{len(tasks)} clips at once do not fit in memory; going on with {size}")
        else:
            self._learn(jobs[0], len(jobs), peak - resident, resident)
            shared = all(motion is motions[0] for motion in motions)
            for place, (task, frames) in enumerate(zip(tasks, clips)):
                batch = {"size": len(tasks), "index": place, "shared_reference": shared}
                once = {name: task.reference.seconds.pop(name, 0.0) for name in ("decode", "reference")}
                work = self._enter if task.candidates else self._save
                self._hand_over(partial(work, task, frames, batch, {**once, **timings}, peak))
            return [], 1
        finally:
            self._last_batch = time.monotonic()
        device.forget()  # not before the exception and its frames are gone
        return tasks, max(1, size) if tasks else 1

    def _learn(self, job: Job, clips: int, grown: int, resident: int) -> None:
        """Let batches grow to what fits by the memory that this one took."""
        device = self.generator.device
        if self.batch_size is None and device.is_gpu and job.shape not in self._limits and grown > 0:
            room = (device.memory()[2] - resident) * _MARGIN
            self._limits[job.shape] = max(1, min(_LARGEST_AUTO_BATCH, int(room / (grown / clips))))

    def _room_on_disk(self, tasks: list[_Task]) -> bool:
        """Whether the clips of a batch can be written; it would be a pity to find that out afterwards."""
        free = shutil.disk_usage(self.journal.out).free
        if free >= _SPARE_BYTES + sum(clip_bytes(task.job.settings) for task in tasks):
            return True
        for task in tasks:
            problem = f"no space left on the disk of {self.journal.out}"
            self._fail_task(task, EmtError(problem, "Free some, or name another folder with --out."))
        return False

    def _hand_over(self, work: Callable[[], None]) -> None:
        begun = time.monotonic()
        self._to_write.put(work)
        self._count_waiting(begun)

    # ---- writers ------------------------------------------------------------------------------------------------

    def _write_results(self) -> None:
        while True:
            work = self._to_write.get()
            try:
                work()
            finally:
                del work  # the frames
                self._to_write.task_done()

    def _enter(
        self, task: _Task, frames: np.ndarray, batch: dict[str, Any], timings: dict[str, float], peak: int
    ) -> None:
        """Measure a candidate; the last one settles its job."""
        from emt.evaluate.motion import tracklet_fidelity
        from emt.evaluate.tracks import track

        assert task.candidates is not None
        begun = time.monotonic()
        try:
            fidelity = tracklet_fidelity(task.reference.tracklets(self.index), track(frames))
        except Exception as error:
            self._fail_task(task, self.generator.explain(error, task.job))
            return
        timings["measure"] = time.monotonic() - begun
        if task.candidates.add(Candidate(task.job.seed, frames, batch, fidelity), timings, peak):
            self._settle(task)

    def _settle(self, task: _Task) -> None:
        """All candidates of a job have ended: save the best, or fail with the last one's error."""
        candidates = task.candidates
        assert candidates is not None
        if candidates.best is None:
            assert candidates.error is not None
            self._fail(replace(task, job=candidates.job).line, candidates.error)
            return
        best = candidates.best
        winner = replace(task, job=replace(task.job, seed=best.seed))
        self._save(winner, best.frames, dict(best.batch), dict(candidates.timings), candidates.peak)

    def _save(
        self, task: _Task, frames: np.ndarray, batch: dict[str, Any], timings: dict[str, float], peak: int
    ) -> None:
        """Write a clip, its sidecar and its line, in this order (see `emt_cli.batch.journal`); unless it is dropped."""
        clip = self.journal.out / task.output
        record = self.generator.record(task.job, task.identity, task.reference.sha256, batch)
        record |= task.candidates.record() if task.candidates else {}
        reason = ""
        try:
            if self.filter:
                begun = time.monotonic()
                verdict = self.filter.judge(task.reference.tracklets(self.index), frames)
                timings["measure"] = timings.get("measure", 0.0) + time.monotonic() - begun
                record |= {"motion_fidelity": round(verdict.fidelity, 4)}
                record |= {"temporal_consistency": round(verdict.consistency, 4)}
                reason = verdict.reason
            begun = time.monotonic()
            if not reason:
                write_result(clip, frames, playback_rate(task.job, task.reference.fps), record)
                timings["encode"] = time.monotonic() - begun
            rounded = {name: round(seconds, 4) for name, seconds in timings.items()}
            line = {**task.line, **record, "timings": rounded, "peak_memory": peak}
            if reason:
                line |= {"state": "dropped", "error": reason}
                self.journal.append(line)
                _remove_result(clip)  # of an earlier run
            else:
                line = self._log_done(line, clip)
        except Exception as error:
            self._fail(task.line, self.generator.explain(error, task.job))
        else:
            self._report(line)

    def _log_done(self, line: dict[str, Any], clip: Path) -> dict[str, Any]:
        status = os.stat(clip)
        line = {**line, "state": "done", "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        self.journal.append(line)
        return line

    def _keep_motion(self, reference: _Reference) -> None:
        try:
            key = self.generator.motion_key(reference.job, reference.sha256)
            self.motions.save(key, reference.motion, reference.fps)  # type: ignore[arg-type]
        except Exception as error:
            self.motions.limit = 0  # once is enough: the run goes on without
            self.listener.say(f"encoded references are not kept: {self.generator.explain(error, reference.job)}")

    def _fail_task(self, task: _Task, error: EmtError) -> None:
        """A job has failed, or a candidate, which leaves the others."""
        if task.candidates is None:
            self._fail(task.line, error)
        elif task.candidates.fail(task.job.seed, error):
            self._settle(task)

    def _fail(self, line: dict[str, Any], error: EmtError) -> None:
        line = {**line, "state": "failed", "error": error.problem, "hint": error.hint}
        with suppress(OSError):  # a full disk: the person and the exit code are told all the same
            self.journal.append(line)
        self._report(line)

    def _report(self, line: dict[str, Any]) -> None:
        """Tell of a job that has ended: to the person on standard error, to programs on standard output."""
        with self._output_guard:
            self._tell(line)
            if "output" in line:
                self._ended[line["output"]] = line
                for twin in self._twins.pop(line["output"], []):
                    self._tell(_twin(twin, line))

    def _report_as_twin(self, line: dict[str, Any]) -> None:
        """A job that this run has already: it ends as the first one does."""
        with self._output_guard:
            if line["output"] in self._ended:
                self._tell(_twin(line, self._ended[line["output"]]))
            else:
                self._twins.setdefault(line["output"], []).append(line)

    def _tell(self, line: dict[str, Any]) -> None:
        path = self.journal.out / line["output"] if line["state"] in ("done", "skipped") else None
        self.summary.counts[line["state"]] += 1
        self.listener.job(line)
        if self.summary.pipe_closed or self.quiet:
            return
        if self.json:
            text = dumps({**line, "path": os.fspath(path)} if path else line)
        elif path is not None:
            text = os.fsencode(path)
        else:
            return
        try:
            self.listener.result(text)
        except BrokenPipeError:
            self.summary.pipe_closed = self._stopping = True


def _twin(line: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """How a job ends that is the same as another one."""
    if first["state"] in ("failed", "dropped"):
        return {**line, **{key: first[key] for key in ("state", "error", "hint") if key in first}}
    return {**line, "state": "skipped", "duplicate": True}


def _candidates(task: _Task) -> list[_Task]:
    """What is to be made for a task: itself, or its candidates."""
    if task.job.settings.best_of == 1:
        return [task]
    candidates = BestOf(task.job)
    return [replace(task, job=job, candidates=candidates) for job in candidates.jobs]


def _remove_result(clip: Path) -> None:
    """Remove a clip and its sidecar, if they are there."""
    sidecar(clip).unlink(missing_ok=True)
    if clip.is_dir():
        shutil.rmtree(clip)
    else:
        clip.unlink(missing_ok=True)


def _remove_leftovers(out: Path) -> None:
    """Remove what killed runs left half-written; the folder is locked, so nobody is writing there."""
    from emt.video import remove_partials

    for folder in [out, *(Path(entry.path) for entry in os.scandir(out) if entry.is_dir(follow_symlinks=False))]:
        remove_partials(folder, older_than=0)
