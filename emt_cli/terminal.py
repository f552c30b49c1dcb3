"""Output of a run: progress on standard error for people, results on standard output for programs.

On a terminal: bars over all jobs (clips a minute, time left, device memory) and over the steps of the running
batch, and a table at the end. Elsewhere: a plain line a job, one for each phase that takes a while, and one at the end.
Both streams may close, fill or stop being read at any time (`emt_cli.streams`): the run does not wait for them.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Any

from emt_cli import messages
from emt_cli.batch.best_of import describe_choice
from emt_cli.batch.records import dumps
from emt_cli.streams import Stream, TextOf
from emt_cli.text import duration, message, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

MARKS = {"done": "done", "skipped": "have", "failed": "FAILED", "dropped": "dropped"}
_TABLE_ROWS = 40
_PHASES = {
    "importing": "importing PyTorch",
    "loading": "loading the model",
    "reading": "reading the reference",
    "encoding": "encoding the reference's motion",
    "first step": "the first denoising step",
    "sampling": "denoising",
    "finishing": "writing clips",
}
_WORKER_BARS = 16  # workers that have bars of their own
_EACH = 20  # jobs in a row that are done already, up to which each has its line
_WHILE = 1.0  # seconds after which a phase is worth a line
_MESSAGES, _RESULTS = 1 << 20, 1 << 25  # bytes that may wait for who reads standard error, and standard output
_LAST_MESSAGES = 2.0  # seconds that messages wait at the end


class Results(Enum):
    """Format of a job's line on standard output."""

    NONE = "nothing"
    PATHS = "the path of its clip"
    JSON = "its journal line, with the path of its clip"


class ProgressReporter:
    """Shows the progress of a run; a `emt_cli.batch.outcomes.Listener`. Threads may share it.

    Context manager: at its end the terminal is as it was, and what can be delivered is.

    Args:
        results: What standard output gets.

    Attributes:
        total: Number of jobs; None where they still arrive.
    """

    def __init__(self, results: Results = Results.NONE) -> None:
        self.total: int | None = None
        self._results = results
        self._out = Stream(sys.stdout, backlog=_RESULTS)
        self._err = Stream(sys.stderr, backlog=_MESSAGES, lossy=True)
        self._on_terminal = sys.stderr is not None and sys.stderr.isatty() and messages.shows(messages.NOTE)
        self._detailed = messages.shows(messages.DETAIL)
        self._guard = threading.RLock()
        self._bars: Progress | None = None
        self._bars_of: dict[str, TaskID] = {}  # by worker
        self._started = time.monotonic()
        self._counts: Counter[str] = Counter()
        self._skipped = 0  # in a row, so far
        self._rows: dict[str, list[dict[str, Any]]] = {}  # the first jobs of each state
        self._phase = ("", 0.0)
        self._phases_begun: set[str] = set()
        self._phases_said: set[str] = set()
        self._closed = threading.Event()
        self._warned = False
        if not self._on_terminal and messages.shows(messages.NOTE):
            threading.Thread(target=self._say_phases, daemon=True).start()

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def gone(self) -> bool:
        """The reader of standard output has closed it."""
        return self._results is not Results.NONE and self._out.error is not None and not self._failed

    @property
    def failed(self) -> bool:
        """Results could not be written to standard output (a full disk)."""
        return self._results is not Results.NONE and self._failed

    @property
    def _failed(self) -> bool:
        return self._out.error is not None and self._out.error.errno != errno.EPIPE

    def phase(self, text: str) -> None:
        """The run has come to something that may take a while."""
        self._phase = (text, time.monotonic())
        if text not in self._phases_begun:
            self._phases_begun.add(text)
            if self._detailed:
                self._phases_said.add(text)
                self.say(f"{_PHASES.get(text, text)} …", messages.DETAIL)
            else:
                messages.keep(_PHASES.get(text, text), messages.DETAIL)
        if self._on_terminal and text not in self._phases_said:
            with self._guard:
                self._phases_said.add(text)
                self._draw()

    def _say_phases(self) -> None:
        """Name each phase that has lasted a while, once."""
        while not self._closed.wait(_WHILE / 4):
            text, begun = self._phase
            if text and text not in self._phases_said and time.monotonic() - begun >= _WHILE:
                self._phases_said.add(text)
                self._show(f"{_PHASES.get(text, text)} …")

    def say(self, text: str, level: int = 0) -> None:
        """A line for people.

        Args:
            text: The line.
            level: How much it matters (`emt_cli.messages`); by its first word if 0.
        """
        level = level or messages.level_of(text)
        messages.keep(text, level)
        if messages.shows(level):
            self._show(text)

    def _show(self, text: str) -> None:
        with self._guard:
            if self._bars:
                self._bars.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
            else:
                self._err.write(printable(text).encode() + b"\n")

    def result(self, line: dict[str, Any]) -> None:
        """A line of standard output; where that is the bars' terminal, above them."""
        if self._results is Results.JSON:
            text = dumps(line)
        elif self._results is Results.PATHS and "path" in line:
            text = os.fsencode(line["path"])
        else:
            return
        if self._bars and sys.stdout.isatty():
            self._show(os.fsdecode(text))
        else:
            self._out.write(text + b"\n")
        self._warn_of_failure()

    def _warn_of_failure(self) -> None:
        """Say once that standard output takes nothing more."""
        if self.failed and not self._warned:
            self._warned = True
            reason = self._out.error.strerror if self._out.error else ""
            self.say(f"warning: cannot write to standard output: {reason}; the journal has what became of each job")

    def job(self, line: dict[str, Any]) -> None:
        """A job has ended: `line` is the journal's, its state done, skipped, dropped or failed."""
        with self._guard:
            state = line["state"]
            self._counts[state] += 1
            count = self._counts.total()
            if len(self._rows.setdefault(state, [])) < _TABLE_ROWS:
                self._rows[state].append(line)
            self._draw()
            if state == "skipped" and not self._bars:
                self._skipped += 1
            place, note = f"[{count}/{self.total}]" if self.total else f"[{count}]", _note(line)
            by = f" ({line['worker']})" if "worker" in line else ""
            text = f"{place} {MARKS[state]} {_title(line)}{by}" + (f": {note}" if note else "")
            level = messages.WARNING if state == "failed" else messages.NOTE
            messages.keep(text, level)
            each = state != "skipped" or self._skipped <= _EACH or self._detailed
            if state == "failed" or (not self._bars and each and messages.shows(level)):
                self._say_skipped()
                self._show(text)
                self._skipped = self._skipped if state == "skipped" else 0
            if self._bars:
                made = self._counts["done"] + self._counts["dropped"]
                minutes = (time.monotonic() - self._started) / 60
                note = f"{made / minutes:.1f} clips/min" if made else ""
                if made and self.total:
                    note += f", {duration((self.total - count) * minutes / made * 60)} left"
                self._bars.update(self._jobs, completed=count, total=self.total, note=note)

    def _say_skipped(self) -> None:
        """One line for the many jobs in a row that are done already."""
        if self._skipped > _EACH and not self._detailed and messages.shows(messages.NOTE):
            self._show(f"… and {self._skipped - _EACH:,} more that are there")

    def step(self, prompts: list[str], done: int, steps: int, memory: int, worker: str = "") -> None:
        """The running batch, of a worker where there are several, has done so many of its steps; `memory` in bytes."""
        with self._guard:
            if self._bars:
                clips = printable(prompts[0]) + (f" and {len(prompts) - 1} more" if len(prompts) > 1 else "")
                note = f"{memory / 2**30:.1f} GiB  {clips[:60]}"
                bar = self._bar_of(self._bars, worker)
                self._bars.update(bar, completed=done, total=steps, note=note, description=worker or "steps")

    def _bar_of(self, bars: Progress, worker: str) -> TaskID:
        """The bar of a worker: its own for the first ones, one for all others."""
        if not worker:
            return self._steps
        if worker not in self._bars_of and len(self._bars_of) < _WORKER_BARS:
            bars.update(self._steps, visible=False)
            self._bars_of[worker] = bars.add_task(worker, total=None, note="")
        elif worker not in self._bars_of:
            bars.update(self._steps, visible=True)
        return self._bars_of.get(worker, self._steps)

    def ended(self, line: dict[str, Any]) -> None:
        """The end of a run: its journal line. Waits until who reads standard output has all results."""
        self._say_skipped()
        self._phase = ("", 0.0)
        bars = self._bars is not None
        self._stop_bars()
        if bars and self._rows:
            self._table()
        text = f"{line['done']} done, {line['skipped']} already there, {line['failed']} failed"
        text += f", {line['dropped']} dropped" if "dropped" in line else ""
        text += f" in {duration(line['seconds'])}"
        parts = sorted(line.get("phases", {}).items(), key=lambda part: -part[1])
        spent = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in parts if seconds >= 0.05)
        text = f"{text}: {spent}" if spent else text
        text += f"; first clip after {duration(line['first_clip'])}" if "first_clip" in line else ""
        self.say(f"{text}; device busy {line['device_busy']:.0%}" if "device_busy" in line else text)
        self._out.drain()

    def hurry(self) -> None:
        """The run is being stopped: wait for no reader from here on."""
        self._out.hurry()

    def close(self) -> None:
        """Leave the terminal as it was, and deliver what can be."""
        self._closed.set()
        self._stop_bars()
        self._out.drain()
        self._warn_of_failure()  # what was written last may be what failed
        self._err.drain(_LAST_MESSAGES)

    def abandon(self) -> None:
        """Leave the terminal as it was, at once: the process ends."""
        if self._bars:
            self._err.hurry()
            self._err.write(b"\x1b[?25h\n")  # show the cursor
            self._err.drain(0.2)

    def _draw(self) -> None:
        """Have the bars on the terminal, from the first phase or job on; `_guard` is held."""
        if self._on_terminal and not self._closed.is_set():
            if self._bars is None:
                self._bars = self._make_bars()
            if self._phase[0]:
                self._bars.update(self._steps, description=_PHASES.get(self._phase[0], self._phase[0]))

    def _make_bars(self) -> Progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console(),
            redirect_stdout=False,  # standard output is for results, not for the terminal's bars
            redirect_stderr=False,
        )
        self._jobs = bars.add_task("jobs", total=self.total, note="")
        self._steps = bars.add_task("", total=None, note="")
        bars.start()
        return bars

    def _stop_bars(self) -> None:
        with self._guard:
            if self._bars:
                self._bars.stop()
                self._bars = None

    def _console(self) -> Console:
        from rich.console import Console

        return Console(file=TextOf(self._err), force_terminal=True)  # type: ignore[arg-type]

    def _table(self) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table("", "clip", "seconds", "")
        rows = [line for state in ("failed", "dropped", "done", "skipped") for line in self._rows.get(state, [])]
        for line in rows[:_TABLE_ROWS]:
            timings = line.get("timings") or {}
            seconds = f"{sum(timings.values()):.1f}" if line["state"] == "done" and timings else ""
            style = {"failed": "red", "done": "green"}.get(line["state"], "")
            table.add_row(Text(MARKS[line["state"]], style), Text(_title(line)), seconds, Text(printable(_note(line))))
        console = self._console()
        console.print(table)
        if self._counts.total() > _TABLE_ROWS:
            console.print(f"… and {self._counts.total() - _TABLE_ROWS} more in the journal")


def _title(line: dict[str, Any]) -> str:
    if line.get("output"):
        return printable(line["output"])
    prompt = line.get("prompt") or ""
    parts = [line.get("origin"), line.get("reference"), f'"{prompt[:60]}"' if prompt else ""]
    return printable(" ".join(part for part in parts if part) or "a job")


def _note(line: dict[str, Any]) -> str:
    """Remark on a job: why it failed or was dropped, or which candidate was kept."""
    return _reason(line) if line["state"] in ("failed", "dropped") else describe_choice(line)


def _reason(line: dict[str, Any]) -> str:
    return message(line.get("error", ""), line.get("hint", ""))
