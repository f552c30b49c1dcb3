"""Outcomes of jobs: journal lines, counts, and the listener that receives them."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from emt.errors import EmtError
from emt.remote import is_url
from emt_cli.batch.journal import Journal
from emt_cli.batch.phases import Phases, process_age
from emt_cli.batch.results import sidecar


class Listener(Protocol):
    """Follows a run: on a terminal, in a file, or at the other end of a queue. Threads share it; no call may raise."""

    @property
    def gone(self) -> bool:
        """Nobody takes results any more: the run ends."""

    def phase(self, text: str) -> None:
        """The run has come to something that takes a while."""

    def step(self, prompts: list[str], done: int, steps: int, memory: int, worker: str = "") -> None:
        """The running batch, of a worker where there are several, has done so many of its steps; `memory` in bytes."""

    def say(self, text: str) -> None:
        """A line for people."""

    def job(self, line: dict[str, Any]) -> None:
        """A job has ended: `line` is the journal's, its state done, skipped, dropped or failed."""

    def result(self, line: dict[str, Any]) -> None:
        """The same for programs, after `job`; with the `path` of a clip that is there."""

    def ended(self, line: dict[str, Any]) -> None:
        """The run has ended: its journal line. Returns when all results are delivered."""

    def hurry(self) -> None:
        """The run is being stopped: wait for no reader from here on."""

    def abandon(self) -> None:
        """The process ends at once."""

    def close(self) -> None:
        """Nothing more will come."""


class Outcomes:
    """Writes down how jobs end, and notifies a listener. Threads may share it.

    A line is in the journal before anybody hears of it.

    Args:
        journal: Of the output folder.
        listener: Called with each outcome.

    Attributes:
        counts: Jobs by state: done, skipped, dropped, failed.
        first_clip: Seconds from the start of the process to the first clip that was finished; None before.
    """

    def __init__(self, journal: Journal, listener: Listener) -> None:
        self.journal, self.listener = journal, listener
        self.out = journal.out
        self.counts: Counter[str] = Counter()
        self.first_clip: float | None = None
        self._stop = threading.Event()
        self._said: set[str] = set()
        self._guard = threading.Lock()
        self._open: set[str] = set()  # outputs of jobs that are being done
        self._unmade: dict[str, dict[str, Any]] = {}  # by output: how jobs ended that made no clip
        self._duplicates: dict[str, list[dict[str, Any]]] = {}  # the same jobs again, waiting for that

    @property
    def stopping(self) -> bool:
        """The running batch is the last: the run was stopped, or nobody takes results any more."""
        return self._stop.is_set() or self.listener.gone

    def stop(self) -> None:
        """End the run after the running batch."""
        self._stop.set()

    def warn(self, warnings: Iterable[str]) -> None:
        """Report once in a run what could not be honoured; the records of all clips that it concerns have it."""
        with self._guard:
            new = [text for text in warnings if text not in self._said]
            self._said.update(new)
        for text in new:
            self.listener.say(f"warning: {text}")

    def done(self, line: dict[str, Any], *, report: bool = True) -> None:
        """A clip is finished.

        Args:
            line: All of its record.
            report: Tell the listener.

        Raises:
            OSError: it could not be written down.
        """
        status = os.stat(self.out / line["output"])
        line = {**line, "state": "done", "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        self.journal.append(line)
        if report:
            self._report(line)

    def relay(self, line: dict[str, Any]) -> None:
        """A job has ended in another process, whose journal has it: `line` is that journal's."""
        self._report(line)

    def seen(self, line: dict[str, Any], status: os.stat_result) -> None:
        """Note in the journal the time of a clip that was looked at and found whole: the next run need not look."""
        stamps = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        with suppress(OSError):  # then it looks
            self.journal.append({"event": "file", "id": line["id"], "output": line["output"], **stamps})

    def moved(self, line: dict[str, Any], before: str | None) -> None:
        """Note in the journal where the reference of a finished clip is now, if its readers would not find it there.

        Args:
            line: The job as it is now.
            before: Path or URL of its reference by the journal; None if that has none.
        """
        if before is None or before == line["reference"] or is_url(before) or os.path.exists(self.out / before):
            return
        with suppress(OSError):
            names = ("id", "output", "reference")
            self.journal.append({"event": "file", **{name: line[name] for name in names}})

    def dropped(self, line: dict[str, Any], reason: str) -> None:
        """Report a clip that has not passed a filter; one of that name from an earlier run goes, too.

        Raises:
            OSError: it could not be written down.
        """
        line = {**line, "state": "dropped", "error": reason}
        self.journal.append(line)
        _remove_result(self.out / line["output"])
        self._report(line)

    def failed(self, line: dict[str, Any], error: EmtError) -> None:
        """A job has failed."""
        line = {**line, "state": "failed", "error": error.problem, "hint": error.hint}
        with suppress(OSError):  # a full disk: the listener and the exit code say so all the same
            self.journal.append(line)
        self._report(line)

    def unchanged(self, line: dict[str, Any], state: str, reason: str = "") -> None:
        """A job has ended in an earlier run: the journal has it as `skipped` or `dropped`."""
        self._report({**line, "state": state, **({"error": reason} if reason else {})})

    def expect(self, output: str) -> None:
        """A job is to be done, whose end is reported later."""
        with self._guard:
            self._open.add(output)

    def duplicate(self, line: dict[str, Any]) -> None:
        """A job that this run has already: it ends as the first one does."""
        with self._guard:
            if line["output"] in self._open:
                self._duplicates.setdefault(line["output"], []).append(line)
            else:
                self._tell(_like(line, self._unmade.get(line["output"], {"state": "done"})))

    def _report(self, line: dict[str, Any]) -> None:
        with self._guard:
            self._tell(line)
            if "output" in line:
                self._open.discard(line["output"])
                if line["state"] in ("failed", "dropped"):
                    known: dict[str, Any] = {key: line[key] for key in ("state", "error", "hint") if key in line}
                    self._unmade[line["output"]] = known
                for other in self._duplicates.pop(line["output"], []):
                    self._tell(_like(other, line))

    def end(
        self, phases: Phases, seconds: float, facts: Mapping[str, Any], *, interrupted: bool, filters: bool
    ) -> None:
        """Write the line with which the journal ends a run, and hand it to the listener if somebody still takes it.

        Args:
            phases: Of the run; what they leave of its seconds is its start.
            seconds: Since the process was started.
            facts: What else there is to say, such as of the device.
            interrupted: A signal ended the run.
            filters: Clips can be dropped.
        """
        line: dict[str, Any] = {
            "event": "run",
            **{state: self.counts[state] for state in ("done", "skipped", "failed")},
        }
        line |= {"dropped": self.counts["dropped"]} if filters else {}
        known = {phase: round(spent, 3) for phase, spent in phases.seconds.items()}
        line |= {"seconds": round(seconds, 3), "interrupted": interrupted}
        line |= {"phases": {"starting": round(max(0.0, seconds - sum(known.values())), 3), **known}}
        line |= {"first_clip": round(self.first_clip, 3)} if self.first_clip is not None else {}
        line |= facts
        with suppress(OSError):  # a full disk, which each job has reported
            self.journal.append(line)
        if not self.listener.gone:
            self.listener.ended(line)

    def _tell(self, line: dict[str, Any]) -> None:
        self.counts[line["state"]] += 1
        if line["state"] == "done" and self.first_clip is None:
            self.first_clip = process_age()
        there = line["state"] in ("done", "skipped")
        try:
            self.listener.job(line)
            self.listener.result({**line, "path": self.journal.path_of(line["output"])} if there else line)
        except Exception as error:  # a fault of the listener's: the journal has how the job ended, and keeps it
            self.listener.say(f"a result was not delivered: {type(error).__name__}: {error}")


def _like(line: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Outcome of a job that is the same as another one."""
    if first["state"] in ("failed", "dropped"):
        return {**line, **{key: first[key] for key in ("state", "error", "hint") if key in first}}
    return {**line, "state": "skipped", "duplicate": True}


def _remove_result(clip: Path) -> None:
    """Remove a clip and its sidecar, if they are there."""
    sidecar(clip).unlink(missing_ok=True)
    if clip.is_dir():
        shutil.rmtree(clip)
    else:
        clip.unlink(missing_ok=True)
