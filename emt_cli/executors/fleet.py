"""Runs jobs on many workers: feeds them, writes down what they report, and replaces those that die.

    feeder ──▶ scheduler ──▶ workers, each in a process of its own on a device of its own
    done?      which worker?     │ clips, sidecars, journal files: the truth
    twice?                       ▼
                              reports ──▶ outcomes ──▶ listener

This process has no model: it looks for what is done, hands out what is not, a few jobs a worker, and hears how they
end. A worker that dies is replaced. What its journal says of the jobs that it held counts; a clip that it had finished
is adopted; the others go to a worker that holds nothing else, so that a job by which workers die is known by it, and
the jobs beside it are not blamed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from emt import __version__
from emt.errors import EmtError
from emt_cli.batch import journal as journals
from emt_cli.batch.feeder import Feeder
from emt_cli.batch.jobs import Item
from emt_cli.batch.journal import Journal
from emt_cli.batch.outcomes import Listener, Outcomes
from emt_cli.batch.phases import Phases, process_age
from emt_cli.batch.records import parse
from emt_cli.batch.session import RunOptions, Session
from emt_cli.batch.tasks import Task
from emt_cli.executors.base import Summary, remove_leftovers
from emt_cli.executors.interrupts import Interrupts
from emt_cli.executors.scheduler import MOST_DEATHS, Parcel, Scheduler
from emt_cli.executors.worker import Order, Report, take_journal

_WAIT = 0.1  # seconds for reports, between looks at new jobs
_SILENCE = 60.0  # seconds without a report after which people hear of it: a worker that runs reports twice a second
_MOST_STARTS, _MOST_DEATHS = 3, 9  # in a row of a worker that ends no job: without jobs in its hands, and with some
_FACTS = ("host", "pid", "device_wait", "device_busy_seconds", "phases")  # of a worker, for the line of the run
_FEED = 1024  # tasks that the feeder is ahead


@dataclass(frozen=True)
class Death:
    """The end of a worker's process that nobody wanted, and why it ended as far as is known."""

    reason: str


class Fleet(Protocol):
    """Processes of workers, by number; each is started anew under its number where one has died."""

    @property
    def size(self) -> int:
        """Number of workers, once it is open."""

    def open(self) -> None:
        """Start the machinery.

        Raises:
            EmtError: it cannot be started, or has not as many devices.
        """

    def start(self, number: int) -> None:
        """Start a worker; its first report says that it runs."""

    def add(self, number: int, orders: list[Order]) -> None:
        """Give it jobs."""

    def wait(self, seconds: float) -> list[tuple[int, Report | Death]]:
        """Reports and deaths since the last call; waits for one for so long.

        Raises:
            EmtError: the machinery itself is gone.
        """

    def stop(self, number: int) -> None:
        """Let it end after its running batch."""

    def close(self, number: int) -> None:
        """Let it end after what it has."""

    def remove(self, number: int) -> None:
        """Its process is not needed any more, whether it lives or not."""

    def shutdown(self) -> None:
        """End the machinery, and all workers that have not ended."""

    def abandon(self) -> None:
        """Kill all at once; called by any thread."""


@dataclass
class _Slot:
    """A worker as its driver sees it."""

    writer: str
    journal_size: int = 0  # bytes of its journal when it was started
    alive: bool = True
    closed: bool = False
    ran: bool = False  # it has a session
    sent: int = 0
    room: int = 0
    idle: bool = True
    lost: int = 0
    silent: int = 0  # of its last report
    starts: int = 0  # that ended in its death, since it has last ended a job
    counts: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)


class FleetExecutor:
    """One run over an output folder by the workers of a fleet; this process is their driver.

    Args:
        session: The model, which stays unopened here.
        journal: The folder's journal, locked for this process.
        listener: Called with the progress.
        options: Of the run.
        fleet: The workers.
        writer: Name of the driver's journal, with which those of the workers' begin.
    """

    def __init__(
        self,
        session: Session,
        journal: Journal,
        listener: Listener,
        options: RunOptions,
        fleet: Fleet,
        writer: str = "",
    ) -> None:
        self.journal, self.listener, self.fleet = journal, listener, fleet
        self.outcomes = Outcomes(journal, listener)
        self.phases = Phases(listener.phase)
        self._filters = options.filter is not None
        self._model_sha256 = session.generator.model_sha256
        self._feeder = Feeder(session, self.outcomes, options)
        self._writer = writer
        self._scheduler = Scheduler(1)
        self._slots: list[_Slot] = []
        self._fed: queue.Queue[Task | BaseException | str | None] = queue.Queue(maxsize=_FEED)
        self._feeding = True
        self._handed = False
        self._deaths = 0
        self._heard = time.monotonic()

    def run(self, items: Iterable[Item]) -> Summary:
        """Do all jobs. SIGINT and SIGTERM finish the running batches; a second one ends the process at once.

        Raises:
            EmtError: nothing can be done at all (no worker comes up), or the workers' machinery has ended.
        """
        summary = Summary(self.outcomes.counts)
        remove_leftovers(self.journal.out)
        with Interrupts(lambda: not self._handed, self._stop, self._abandon) as interrupts:
            try:
                self._do(items)
            except (KeyboardInterrupt, Exception):
                if not interrupts.came:
                    raise
            finally:
                self.outcomes.stop()
                with self.phases("finishing"):
                    self.fleet.shutdown()
                if self._deaths:
                    remove_leftovers(self.journal.out)
            summary.interrupted = interrupts.came
            self._end(interrupts.came)
        return summary

    def _do(self, items: Iterable[Item]) -> None:
        threading.Thread(target=self._feed, args=(self._feeder.tasks(items),), daemon=True).start()
        with self.phases("waiting for jobs"):
            while self._feeding and not self._scheduler.waiting and not self.outcomes.stopping:
                self._take_fed(_WAIT)
        if not self._scheduler.waiting or self.outcomes.stopping:
            return  # nothing is to be done: no worker is started for that
        with self.phases("starting workers"):
            self.fleet.open()
            self._scheduler.workers = self.fleet.size
            self._slots = [_Slot(worker_name(self._writer, number)) for number in range(self.fleet.size)]
            self._heard = time.monotonic()
            for number in range(self.fleet.size):
                self._start(number)
            self._work_until(lambda: any(slot.counts for slot in self._slots))
        with self.phases("working"):
            self._work_until(self._is_done)
        with self.phases("finishing"):
            self._finish()

    # ---- feeding ----

    def _feed(self, tasks: Iterator[Task | None]) -> None:
        try:
            for task in tasks:
                self._fed.put(task)
                if self.outcomes.stopping:
                    break
            self._fed.put("end")
        except BaseException as error:
            self._fed.put(error)

    def _take_fed(self, seconds: float = 0.0) -> None:
        """Take from the feeder what the scheduler has room for; wait for so long for the first."""
        while self._feeding and self._scheduler.room:
            try:
                fed = self._fed.get(timeout=seconds) if seconds else self._fed.get_nowait()
                seconds = 0.0
            except queue.Empty:
                return
            if isinstance(fed, BaseException):
                raise fed
            if fed == "end":
                self._feeding = False
            elif isinstance(fed, Task):
                self._scheduler.add(Parcel(fed))

    # ---- working ----

    def _work_until(self, done: Any) -> None:
        """Hand out jobs and hear how they end, until something holds or the run is stopped."""
        while not done() and not self._is_done() and not self.outcomes.stopping:
            self._take_fed()
            self._hand_out()
            found = self.fleet.wait(_WAIT)
            if found:
                self._heard = time.monotonic()
            elif time.monotonic() - self._heard > _SILENCE:
                self._heard = float("inf")  # once
                self.listener.say("no worker runs: jobs wait for one (`ray status` says what a cluster has room for)")
            for number, news in found:
                self._hear(number, news)

    def _is_done(self) -> bool:
        lost = sum(slot.lost for slot in self._slots)
        return not self._feeding and not self._scheduler.waiting and self._scheduler.held <= lost

    def _hand_out(self) -> None:
        for number, slot in enumerate(self._slots):
            if slot.alive and slot.room and self._scheduler.waiting:
                self._give(number, slot)

    def _give(self, number: int, slot: _Slot) -> None:
        parcels = self._scheduler.take(number, slot.room)
        if parcels:
            self._handed = True
            slot.room -= len(parcels)
            slot.sent += len(parcels)
            slot.idle = False
            self.fleet.add(number, [Order.of(parcel.task) for parcel in parcels])

    def _start(self, number: int) -> None:
        slot = self._slots[number]
        path = journals.file_of(self.journal.out, slot.writer)
        slot.journal_size = path.stat().st_size if path.exists() else 0
        slot.ran, slot.sent, slot.room, slot.idle, slot.lost = False, 0, 0, True, 0
        self.fleet.start(number)

    def _hear(self, number: int, news: Report | Death) -> None:
        slot = self._slots[number]
        if isinstance(news, Death):
            if slot.alive and not slot.closed:
                self._bury(number, news.reason)
            return
        slot.idle = news.idle
        if news.facts:
            slot.facts |= news.facts
            if "model_sha256" in news.facts:
                slot.ran = True
                self._check_same(slot)
        for text in news.said:
            self.listener.say(text)
        if news.step:
            prompts, done, steps, memory = news.step
            self.listener.step(prompts, done, steps, memory, slot.writer)
        elif news.phase and not slot.counts:
            self.listener.phase(news.phase)
        for line in news.lines:
            if self._scheduler.ended(number, line["output"]):
                self._relay(slot, line)
        slot.lost = news.lost if news.lost == slot.silent else 0  # twice: a line may be about to come
        slot.silent = news.lost
        if news.received == slot.sent:  # what is on its way counts as well
            slot.room = news.room
        if news.ended:
            slot.closed = True
            if news.error:
                self._give_up(number, EmtError(*news.error))

    def _relay(self, slot: _Slot, line: dict[str, Any]) -> None:
        slot.starts = 0
        slot.counts[line["state"]] += 1
        self.outcomes.relay({**line, "worker": slot.writer})

    def _check_same(self, slot: _Slot) -> None:
        """Raise EmtError unless a worker has this process's program and model."""
        if slot.facts["version"] != __version__:
            problem = f"a worker on {slot.facts['host']} has emt {slot.facts['version']}, this is {__version__}"
            raise EmtError(problem, "Install one version on all nodes.")
        if slot.facts["model_sha256"] != self._model_sha256:
            problem = f"the model on {slot.facts['host']} is another one: its files differ from those here"
            raise EmtError(problem, "Name a model that all nodes see alike.")

    # ---- deaths ----

    def _bury(self, number: int, reason: str) -> None:
        """A worker has died: its jobs count as its journal and its clips say, or wait for others."""
        slot = self._slots[number]
        self._deaths += 1
        parcels = self._scheduler.lose(number)
        self.fleet.remove(number)  # one that cannot be reached may live
        held: EmtError | None = None
        try:
            lines = self._last_words(slot, {parcel.task.identity for parcel in parcels})
        except EmtError as error:  # its node cannot be reached, but may live, or its file system keeps its lock
            lines, held = {}, error
        for parcel in parcels:
            line = lines.get(parcel.task.output)
            if line:
                self._relay(slot, line)
            elif not self._feeder.recover(parcel.task):
                self._retry(parcel, reason)
            else:
                slot.starts, slot.counts["done"] = 0, slot.counts["done"] + 1
        slot.starts += 1
        self.listener.say(f"{slot.writer} has died ({reason}); jobs in its hands: {len(parcels)}")
        if held:
            self._give_up(number, held)
        elif slot.starts < (_MOST_DEATHS if parcels else _MOST_STARTS):
            self._start(number)
        else:
            problem = f"{slot.writer} has died {slot.starts} times in a row: {reason}"
            self._give_up(number, EmtError(problem, "See what emt doctor says of the machine."))

    def _last_words(self, slot: _Slot, identities: set[str]) -> dict[str, dict[str, Any]]:
        """Lines of a dead worker's journal about jobs since it was started, by their outputs."""
        take_journal(self.journal.out, slot.writer).close()  # it is dead indeed, and its last line whole
        lines = {}
        with open(journals.file_of(self.journal.out, slot.writer), "rb") as file:
            file.seek(slot.journal_size)
            for content in file:
                line = parse(content)
                if line.get("event") == "job" and line.get("id") in identities and "output" in line:
                    lines[line["output"]] = line
        return lines

    def _retry(self, parcel: Parcel, reason: str) -> None:
        parcel.deaths += 1
        if parcel.deaths < MOST_DEATHS:
            self._scheduler.add(parcel)
            return
        problem = f"{parcel.deaths} workers have died while they made this clip ({reason})"
        self.outcomes.failed(parcel.task.line, EmtError(problem, "Try it alone: emt transfer without --gpus."))

    def _give_up(self, number: int, error: EmtError) -> None:
        """A worker cannot be had; raises its error once there is none left."""
        slot = self._slots[number]
        slot.alive, slot.closed = False, True
        for parcel in self._scheduler.lose(number):
            self._scheduler.add(parcel)
        self.fleet.remove(number)
        if not any(other.alive for other in self._slots):
            raise error
        self.listener.say(f"going on without {slot.writer}: {error.problem}")

    # ---- the end ----

    def _finish(self) -> None:
        """Let the workers come to their ends, and hear the rest."""
        for number, slot in enumerate(self._slots):
            if not slot.alive or slot.closed:
                continue
            if slot.idle and (self.outcomes.stopping or not slot.ran):  # a cluster may never have had room for it
                slot.closed = True
                self.fleet.remove(number)
            else:
                (self.fleet.stop if self.outcomes.stopping else self.fleet.close)(number)
        while any(slot.alive and not slot.closed for slot in self._slots):
            for number, news in self.fleet.wait(_WAIT):
                if isinstance(news, Death):
                    self._slots[number].closed = True
                    self._deaths += 1
                else:
                    self._hear(number, news)
        if not self.outcomes.stopping:
            for number in range(len(self._slots)):
                for parcel in self._scheduler.lose(number):
                    problem = "the worker that made this clip has lost it"
                    self.outcomes.failed(parcel.task.line, EmtError(problem, "Run again."))

    def _end(self, interrupted: bool) -> None:
        seconds, facts = process_age(), dict[str, Any]()
        busy = [slot.facts["device_busy_seconds"] for slot in self._slots if "device_busy_seconds" in slot.facts]
        if busy:  # of a worker that has died nobody knows
            facts |= {"device_busy": round(min(1.0, sum(busy) / (len(self._slots) * seconds)), 4)}
        facts |= {"workers": {slot.writer: _facts(slot) for slot in self._slots}}
        self.outcomes.end(self.phases, seconds, facts, interrupted=interrupted, filters=self._filters)

    def _stop(self) -> None:
        self.outcomes.stop()
        self.listener.hurry()
        if self._scheduler.held:
            self.listener.say("finishing the running batches; interrupt again to stop at once")

    def _abandon(self) -> None:
        self.fleet.abandon()
        self.listener.abandon()
        self.journal.close()  # after a line that is being written


def worker_name(writer: str, number: int) -> str:
    """Name of a worker, which its journal has too."""
    return f"{writer}-worker-{number}" if writer else f"worker-{number}"


def _facts(slot: _Slot) -> dict[str, Any]:
    """A worker in the journal line of a run."""
    facts: dict[str, Any] = {name: slot.facts[name] for name in _FACTS if name in slot.facts}
    return {**slot.counts, **facts}
