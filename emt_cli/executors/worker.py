"""A worker of a run, in a process of its own: a session on one device that is given jobs and reports how they end."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from emt import __version__
from emt.errors import EmtError
from emt.remote import fetch
from emt_cli.batch.finisher import Finisher
from emt_cli.batch.generator import start_ahead
from emt_cli.batch.jobs import Job
from emt_cli.batch.journal import Journal
from emt_cli.batch.outcomes import Outcomes
from emt_cli.batch.published import open_journal
from emt_cli.batch.session import RunOptions, SessionOptions, open_session
from emt_cli.batch.tasks import Reference, Task
from emt_cli.batch.worker import Worker

_FIRST = 2  # jobs that it has room for before it knows how many are denoised together
_PAUSE = 0.1  # seconds that it waits for more before it denoises fewer than it could
_TRIES = 20  # to take over the journal of a worker that has died


@dataclass(frozen=True)
class WorkerOptions:
    """Options of a worker; plain values, which are sent to its process.

    Attributes:
        session: Of its model.
        device: Of its process: cuda, where it sees one GPU alone, or cpu.
        run: Of the run.
        out: The output folder.
        writer: Name of its journal.
        prompts: All that are known of the run's.
        folder: The working folder of the command line, from which relative paths in the options count.
    """

    session: SessionOptions
    device: str
    run: RunOptions
    out: Path
    writer: str
    prompts: tuple[str, ...] = ()
    folder: Path | None = None


@dataclass(frozen=True)
class Order:
    """A job as it is sent to a worker: the fields of `emt_cli.batch.tasks.Task` that can be."""

    job: Job
    identity: str
    output: str
    reference_sha256: str

    @classmethod
    def of(cls, task: Task) -> Order:
        """That of a task."""
        return cls(task.job, task.identity, task.output, task.reference.sha256)


@dataclass
class Report:
    """News of a worker since its last report.

    Attributes:
        lines: Journal lines of jobs that have ended.
        said: Lines for people.
        phase: What it is at.
        step: Prompts, steps done, steps and memory of the running batch; empty before the first step.
        received: Jobs that it was given so far.
        room: Jobs that it has room for.
        idle: Nothing is lost if it is killed.
        lost: Jobs so far that have ended without a line, by a fault of the program.
        ended: It has come to its end.
        error: Problem and hint of what ended it.
        facts: Once it runs: host, pid, version of emt and the model's hash; in the last one phases and device_wait.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    phase: str = ""
    step: tuple[Any, ...] = ()
    received: int = 0
    room: int = 0
    idle: bool = True
    lost: int = 0
    ended: bool = False
    error: tuple[str, str] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class _Reporter:
    """The listener of a worker (`emt_cli.batch.outcomes.Listener`): gathers what the next report has."""

    gone = False

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.report = Report()

    def phase(self, text: str) -> None:
        with self.changed:
            self.report.phase = text

    def step(self, prompts: list[str], done: int, steps: int, memory: int, worker: str = "") -> None:
        with self.changed:
            self.report.step = (list(prompts), done, steps, memory)
            self.changed.notify_all()

    def say(self, text: str) -> None:
        with self.changed:
            self.report.said.append(text)
            self.changed.notify_all()

    def job(self, line: dict[str, Any]) -> None:
        with self.changed:
            self.report.lines.append(line)
            self.changed.notify_all()

    def result(self, line: dict[str, Any]) -> None: ...

    def ended(self, line: dict[str, Any]) -> None: ...

    def hurry(self) -> None: ...

    def abandon(self) -> None: ...

    def close(self) -> None: ...


class RemoteWorker:
    """Runs in the worker's process; its methods are called from another one, each in a thread of its own.

    Args:
        options: Of the worker.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._listener = _Reporter()
        self._changed = self._listener.changed
        self._orders: deque[Order] = deque()
        self._received = self._said_room = 0
        self._failed = 0  # lines of jobs that did
        self._closed = self._stopping = self._ended = False
        self._error: tuple[str, str] | None = None
        self._facts: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "version": __version__}
        self._outcomes: Outcomes | None = None
        self._worker: Worker | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, orders: list[Order]) -> None:
        """Take jobs."""
        with self._changed:
            self._orders.extend(orders)
            self._received += len(orders)
            self._changed.notify_all()

    def report(self, seconds: float) -> Report:
        """Report what is new, or after a while that nothing is."""
        end = time.monotonic() + seconds
        with self._changed:
            while not self._is_news() and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            made, self._listener.report = self._listener.report, Report()
            self._listener.report.phase = made.phase
            made.received, made.room = self._received, self._room()
            self._said_room = made.room
            made.idle = self._worker is None or self._worker.idle
            self._failed += sum(line["state"] == "failed" for line in made.lines)
            made.lost = self._outcomes.counts["failed"] - self._failed if self._outcomes and not made.lines else 0
            made.ended, made.error = self._ended, self._error
            made.facts, self._facts = self._facts, {}
            return made

    def stop(self) -> None:
        """End after the running batch."""
        with self._changed:
            self._stopping = self._closed = True
            if self._outcomes is not None:
                self._outcomes.stop()
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will come: end once all is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _is_news(self) -> bool:
        """Return whether a report should not wait; steps alone are worth one from time to time."""
        new = self._listener.report
        return bool(new.lines or new.said or self._facts or self._ended or self._room() > self._said_room)

    def _room(self) -> int:
        """Jobs for the batch after the one that the device is at."""
        if self._worker is None:
            return max(0, _FIRST - self._received)
        waiting = self._received - self._worker.taken
        return max(0, max(_FIRST, self._worker.batch) - waiting)

    def _run(self) -> None:
        try:
            self._work()
        except EmtError as error:
            self._error = error.problem, error.hint
        except BaseException as error:
            self._error = f"{type(error).__name__}: {error}", ""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _work(self) -> None:
        options = self._options
        with start_ahead(options.device), closing(take_journal(options.out, options.writer)) as journal:
            session = open_session(options.session, options.device, self._listener.say)
            session.generator.prompts = list(options.prompts)
            outcomes = Outcomes(journal, self._listener)
            finisher = Finisher(session, outcomes, options.run)
            worker = Worker(session, outcomes, finisher, options.run)
            with self._changed:
                self._facts |= {"model_sha256": session.generator.model_sha256}
                self._outcomes, self._worker = outcomes, worker
                if self._stopping:
                    outcomes.stop()
                self._changed.notify_all()
            finisher.start()
            try:
                worker.run(self._tasks())
            finally:
                finisher.join()
            with self._changed:
                self._facts |= {"phases": dict(worker.phases.seconds), "device_wait": worker.device_wait}
                self._facts |= {"device_busy_seconds": session.generator.busy_seconds}

    def _tasks(self) -> Iterator[Task | None]:
        """Tasks of the jobs that come; consecutive ones of the same key share a reference.

        Yields:
            A task; or None where the next one is yet to come.
        """
        group: tuple[Any, ...] = ()
        reference: Reference | None = None
        waited = False
        while True:
            with self._changed:
                if not self._orders and not self._closed:
                    self._changed.wait(None if waited else _PAUSE)
                order = self._orders.popleft() if self._orders else None
                if order is None and self._closed:
                    return
            if order is None:
                if not waited:
                    yield None
                waited = True
                continue
            waited = False
            job = _here(order.job)
            task = Task(job, order.identity, order.output, Reference(job, order.reference_sha256))
            if reference is None or task.key != group:
                group, reference = task.key, task.reference
            task.reference = reference
            yield task


def _here(job: Job) -> Job:
    """A job with its reference on this machine; of a URL, what was fetched may be on another one."""
    if job.source and not job.reference.exists():
        with suppress(EmtError):  # it is raised where the reference is read
            return replace(job, reference=fetch(job.source))
    return job


def take_journal(out: Path, writer: str) -> Journal:
    """The journal of a worker, which one that has just died may still be holding.

    Raises:
        EmtError: another process is this writer, or the folder cannot be written to.
    """
    for tried in range(_TRIES):
        try:
            return open_journal(out, writer)
        except EmtError:
            if tried == _TRIES - 1:
                raise
            time.sleep(0.1)
    raise AssertionError
