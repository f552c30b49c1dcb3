"""Makes the clips of tasks on one device: reading, the device and writing side by side.

    intake ──▶ readers ──▶ the device's thread ──▶ writers (`emt_cli.batch.finisher`)
    tasks,     decode or    encode references,      clip, sidecar,
    in order   load motion  denoise in batches      journal line

The intake takes tasks from an iterator (`emt_cli.batch.feeder`) and hands each new reference to the readers, at most
`_AHEAD` of them before the device. The thread that calls `Worker.run` alone touches the device. The share of the time
between the first and the last batch for which it waits for the other threads is `Worker.device_wait`: under 0.1% over
60 clips of a third of a second on two CPU cores; a test holds it under 5%.
"""

from __future__ import annotations

import concurrent.futures
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from emt.device import is_out_of_memory
from emt.errors import EmtError
from emt_cli.batch.batch_sizes import BatchSizes
from emt_cli.batch.estimates import clip_bytes
from emt_cli.batch.finisher import Finisher
from emt_cli.batch.generator import heard_warnings
from emt_cli.batch.jobs import Job
from emt_cli.batch.outcomes import Outcomes
from emt_cli.batch.phases import Phases
from emt_cli.batch.session import RunOptions, Session
from emt_cli.batch.tasks import Reference, Source, Task

_READERS = max(2, min(8, (os.cpu_count() or 2) // 2))  # ffmpeg has threads of its own
_AHEAD = _READERS + 2  # references read before the device takes them
_SPARE_BYTES = 1 << 20  # of the disk, for sidecars and the journal
_POLL = 0.2  # seconds between looks at whether to stop

_WAITING = ("waiting for jobs", "reading", "writing")  # phases in which the device does nothing


class Intake:
    """Threads that take tasks and read their references ahead of the device.

    Args:
        session: Its cache has motions of earlier runs.
        outcomes: Says when to end.
    """

    def __init__(self, session: Session, outcomes: Outcomes) -> None:
        self.generator, self.index, self.motions = session.generator, session.index, session.motions
        self.outcomes = outcomes
        self._ahead = threading.Semaphore(_AHEAD)
        self._to_read: queue.Queue[Reference] = queue.Queue()
        self._ready: queue.Queue[Task | BaseException | str] = queue.Queue(maxsize=64)

    def start(self, tasks: Iterator[Task | None]) -> None:
        """Start the threads."""
        threading.Thread(target=self._take, args=(tasks,), daemon=True).start()
        for _ in range(_READERS):
            threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> Task | str:
        """The next task, or `pause`, `end` or `stopped`.

        Raises:
            BaseException: what ended the iterator of tasks.
        """
        while not self.outcomes.stopping:
            with suppress(queue.Empty):
                task = self._ready.get(timeout=_POLL)
                if isinstance(task, BaseException):
                    raise task
                if task == "pause" and not self._ready.empty():
                    continue  # what was to come has come meanwhile
                return task
        return "stopped"

    def source(self, reference: Reference) -> Source | None:
        """Source of a reference, from its reader; None when stopping.

        Raises:
            Exception: it could not be read.
        """
        try:
            while not concurrent.futures.wait([reference.source], timeout=_POLL).done:
                if self.outcomes.stopping:
                    return None
            return reference.source.result()
        finally:
            self._ahead.release()
            del reference.source

    def _take(self, tasks: Iterator[Task | None]) -> None:
        try:
            last: Reference | None = None
            for task in tasks:
                if task is not None and task.reference is not last:
                    while not self._ahead.acquire(timeout=_POLL):
                        if self.outcomes.stopping:
                            return
                    last = task.reference
                    self._to_read.put(last)
                self._ready.put("pause" if task is None else task)
                if self.outcomes.stopping:
                    return
            self._ready.put("end")
        except BaseException as error:
            self._ready.put(error)

    def _read(self) -> None:
        while True:
            self._read_one(self._to_read.get())  # nothing of it stays here while the next one is waited for

    def _read_one(self, reference: Reference) -> None:
        begun = time.monotonic()
        try:
            settings = reference.job.settings
            shape = settings.frames, settings.height, settings.width
            key = self.generator.motion_key(reference.job, reference.sha256)
            kept = self.motions.load(key, shape)
            if kept:
                source = Source(*kept, self.motions.warnings(key), kept=True)
            else:
                clip = reference.read(self.index)
                source = Source(clip, clip.fps, clip.warnings)
            self.outcomes.warn(source.warnings)
            reference.seconds["decode"] = time.monotonic() - begun
            reference.source.set_result(source)
        except BaseException as error:  # it is raised where the reference is used
            reference.source.set_exception(error)


class Worker:
    """The thread that uses the device.

    Args:
        session: The model on it.
        outcomes: Says when to end; its listener is called with steps and phases.
        finisher: Takes frames.
        options: Of the run.

    Attributes:
        phases: Where its time went.
        taken: Tasks that it has begun with so far.
        batch: Clips that it denoises together, as far as it is known yet.
    """

    def __init__(self, session: Session, outcomes: Outcomes, finisher: Finisher, options: RunOptions) -> None:
        self.generator, self.outcomes, self.finisher = session.generator, outcomes, finisher
        self.listener = outcomes.listener
        self.phases = Phases(self.listener.phase)
        self.generator.phase = self.phases
        self.sizes = BatchSizes(options.batch_size, session.motions.folder.parent)
        self._intake = Intake(session, outcomes)
        self.taken, self.batch = 0, options.batch_size or 1
        self._encoded: list[Reference] = []  # whose motions are on the device
        self._busy = False
        self._first_batch = self._last_batch = 0.0  # when
        self._waited = (0.0, 0.0)  # until then

    @property
    def idle(self) -> bool:
        """Nothing is lost if it ends at once."""
        return not self._busy and self.finisher.idle

    @property
    def device_wait(self) -> float | None:
        """Share of the time between the first and the last batch in which the device waited; None for fewer."""
        if self._last_batch <= self._first_batch:
            return None
        return (self._waited[1] - self._waited[0]) / (self._last_batch - self._first_batch)

    def run(self, tasks: Iterator[Task | None]) -> None:
        """Do tasks until they end, or until it is stopped.

        Raises:
            EmtError: nothing can be done at all (no such device, the model cannot be opened).
        """
        self._intake.start(tasks)
        batch: list[Task] = []
        while not self.outcomes.stopping:
            with self.phases("waiting for jobs"):
                task = self._intake.next()
            if batch and not (isinstance(task, Task) and task.job.shape == batch[0].job.shape):
                batch = self._finish(batch)
            if task == "end":
                return
            if not isinstance(task, Task):
                continue
            self.taken += 1
            self._let_go([task, *batch])
            if self._encode(task):
                for candidate in task.split():
                    batch.append(candidate)
                    if len(batch) >= self._limit(task.job):
                        batch = self._finish(batch)
                    if self.outcomes.stopping:
                        break

    def _finish(self, batch: list[Task]) -> list[Task]:
        """Run a batch that an interrupt lets finish; returns the next one, empty."""
        self._busy = True
        self._run_batch(batch)
        self._busy = False
        return []

    def _let_go(self, tasks: list[Task]) -> None:
        """Free the motions of references that none of these tasks has: clips of theirs are written meanwhile."""
        needed = {id(task.reference) for task in tasks}
        for reference in self._encoded:
            if id(reference) not in needed:
                reference.motion = None
        self._encoded = [reference for reference in self._encoded if id(reference) in needed]

    def _encode(self, task: Task) -> bool:
        """Have the motion of a task's reference on the device; if that cannot be, the task has failed."""
        reference = task.reference
        if reference.motion is None:
            with self.phases("importing"):
                self.generator.import_libraries()
            with self.phases("starting the device"):
                self.generator.device  # noqa: B018  (what goes wrong here ends the run, not the job)
            with self.phases("loading"):
                self.generator.load()
            try:
                if not reference.source.done():  # otherwise it is prepared where it is used
                    with self.phases("preparing"):
                        self.generator.prepare(task.job)
                with self.phases("reading"):
                    found = self._intake.source(reference)
                if found is None:
                    return False
                reference.fps, reference.warnings = found.fps, found.warnings
                begun = time.monotonic()
                self.generator.device.start_measuring()
                with self.phases("encoding"), heard_warnings() as heard:
                    reference.motion = self.generator.encode(task.job, found.content)
                self._encoded.append(reference)
                reference.peak = self.generator.device.memory()[1]
                self.outcomes.warn(heard)
                reference.warnings = (*reference.warnings, *heard)
                reference.seconds["reference"] = time.monotonic() - begun
                if not found.kept:
                    with self.phases("writing"):
                        self.finisher.keep_motion(reference)
            except Exception as error:
                reference.motion = self.generator.explain(error, task.job)
        if isinstance(reference.motion, EmtError):
            self.finisher.fail(task, reference.motion)
            return False
        return True

    def _limit(self, job: Job) -> int:
        self.batch = self.sizes.limit(job, self.generator.most_clips(job), self.generator.batch_key(job))
        return self.batch

    def _run_batch(self, tasks: list[Task]) -> None:
        """Make the clips of tasks of one shape; what fails together is tried in smaller batches."""
        if not self._room_on_disk(tasks):
            return
        left, size = self._try_batch(tasks)
        while left:
            size = min(size, self._limit(left[0].job))  # the first part may have taught less
            self._run_batch(left[:size])
            left = left[size:]

    def _try_batch(self, tasks: list[Task]) -> tuple[list[Task], int]:
        """Make the clips of a batch and hand them to the finisher.

        Returns:
            The tasks that neither succeeded nor failed by themselves, and how many of them to try at once.
        """
        from emt.sampling import NonFiniteError

        jobs, device = [task.job for task in tasks], self.generator.device
        motions = [task.reference.motion for task in tasks]
        resident = device.memory()[0]

        begin = ExitStack()  # kernels are compiled and memory is found in the first step

        def on_step(done: int, steps: int) -> None:
            begin.close()
            self.listener.step([job.prompt for job in jobs], done, steps, device.memory()[0])

        first = not self._first_batch
        if first:
            self._first_batch, self._waited = time.monotonic(), (self.phases.total(*_WAITING),) * 2
        try:
            with self.phases("sampling"), heard_warnings() as heard, begin:
                if first:
                    begin.enter_context(self.phases("first step"))
                clips, timings, peak = self.generator.generate(jobs, motions, on_step)  # type: ignore[arg-type]
        except NonFiniteError as error:
            for i in error.clips:
                self.finisher.fail(tasks[i], NonFiniteError([0], [jobs[i].seed], error.half))
            rest = [task for i, task in enumerate(tasks) if i not in error.clips]
            return rest, max(1, len(rest))
        except Exception as error:
            size = len(tasks) // 2 if is_out_of_memory(error) else 1
            if len(tasks) == 1:
                self.finisher.fail(tasks[0], self.generator.explain(error, jobs[0]))
                tasks = []
            elif is_out_of_memory(error):
                self.sizes.shrink(jobs[0], size)
                self.listener.say(f"{len(tasks)} clips at once do not fit in memory; going on with {size}")
        else:
            pace, key = self.generator.pace, self.generator.batch_key(jobs[0])
            self.sizes.learn(jobs[0], len(jobs), peak - resident, resident, device, pace, key)
            self.outcomes.warn(heard)
            for task in tasks:
                task.warnings = _concerning(task.job, heard, jobs)
            self._hand_over(tasks, clips, timings, peak)
            return [], 1
        finally:
            self._last_batch, self._waited = time.monotonic(), (self._waited[0], self.phases.total(*_WAITING))
        device.forget()  # not before the exception and its frames are gone
        return tasks, max(1, size) if tasks else 1

    def _hand_over(self, tasks: list[Task], clips: list[Any], timings: dict[str, float], peak: int) -> None:
        shared = all(task.reference is tasks[0].reference for task in tasks)
        with self.phases("writing"):
            for i, (task, frames) in enumerate(zip(tasks, clips)):
                batch = {"size": len(tasks), "index": i, "shared_reference": shared}
                once = {name: task.reference.seconds.pop(name, 0.0) for name in ("decode", "reference")}
                self.finisher.add(task, frames, batch, {**once, **timings}, max(peak, task.reference.peak))

    def _room_on_disk(self, tasks: list[Task]) -> bool:
        """Return whether the clips of a batch can be written; it would be a pity to find that out afterwards."""
        out = self.outcomes.out
        try:
            free = shutil.disk_usage(out).free
        except FileNotFoundError:
            raise EmtError(
                f"{out} was removed or moved while the run wrote into it", "Give the command again."
            ) from None
        if free >= _SPARE_BYTES + sum(clip_bytes(task.job.settings) for task in tasks):
            return True
        for task in tasks:
            problem = f"no space left on the disk of {out}"
            self.finisher.fail(task, EmtError(problem, "Free some, or name another folder with --out."))
        return False


def _concerning(job: Job, warnings: Sequence[str], jobs: Sequence[Job]) -> tuple[str, ...]:
    """The warnings of a batch that name a job's prompt, or none of its prompts."""

    def names(text: str, job: Job) -> bool:
        return any(prompt and prompt[:60] in text for prompt in (job.prompt, job.settings.negative_prompt))

    return tuple(text for text in warnings if names(text, job) or not any(names(text, other) for other in jobs))
