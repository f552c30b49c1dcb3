"""What a run tells the person who watches it, on standard error only.

On a terminal: bars over all jobs (clips a minute, time left, device memory) and over the steps of the running
batch, and a table at the end. Elsewhere: a plain line a job and one at the end.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from emt_cli.batch.best_of import describe_choice
from emt_cli.text import duration, printable

if TYPE_CHECKING:
    from rich.progress import Progress

MARKS = {"done": "done", "skipped": "have", "failed": "FAILED", "dropped": "dropped"}
_TABLE_ROWS = 40


class ProgressReporter:
    """Tells of the progress of a run. Threads may share it.

    Args:
        total: Number of jobs; None where they still arrive.
    """

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.finished: list[dict[str, Any]] = []
        self._guard = threading.RLock()
        self._bars: Progress | None = None
        self._started = time.monotonic()
        self._made = 0
        if sys.stderr.isatty():
            self._bars = self._make_bars()

    def _make_bars(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
            redirect_stdout=False,  # standard output is for results, not for the terminal's bars
            redirect_stderr=False,
        )
        self._jobs = bars.add_task("jobs", total=self.total, note="")
        self._steps = bars.add_task("steps", total=None, note="", visible=False)
        bars.start()
        return bars

    def say(self, text: str) -> None:
        """One line for the person at the terminal."""
        with self._guard:
            if self._bars:
                self._bars.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
            else:
                print(printable(text), file=sys.stderr, flush=True)

    def result(self, text: bytes) -> None:
        """A line of standard output; where that is the bars' terminal, above them."""
        with self._guard:
            if self._bars and sys.stdout.isatty():
                self.say(os.fsdecode(text))
            else:
                sys.stdout.buffer.write(text + b"\n")
                sys.stdout.buffer.flush()

    def job(self, line: dict[str, Any]) -> None:
        """A job has ended: `line` is the journal's, its state done, skipped, dropped or failed."""
        with self._guard:
            self.finished.append(line)
            state, count = line["state"], len(self.finished)
            self._made += state in ("done", "dropped")
            if state == "failed" or not self._bars:
                place = f"[{count}/{self.total}]" if self.total else f"[{count}]"
                note = _note(line)
                self.say(f"{place} {MARKS[state]} {_title(line)}" + (f": {note}" if note else ""))
            if self._bars:
                minutes = (time.monotonic() - self._started) / 60
                note = f"{self._made / minutes:.1f} clips/min" if self._made else ""
                if self._made and self.total:
                    left = (self.total - count) * minutes / self._made * 60
                    note += f", {duration(left)} left"
                self._bars.update(self._jobs, completed=count, total=self.total, note=note)

    def step(self, jobs: list[str], done: int, steps: int, memory: int) -> None:
        """The running batch has done so many of its steps; `memory` in bytes."""
        if self._bars:
            clips = printable(jobs[0]) + (f" and {len(jobs) - 1} more" if len(jobs) > 1 else "")
            note = f"{memory / 2**30:.1f} GiB  {clips[:60]}"
            self._bars.update(self._steps, completed=done, total=steps, note=note, visible=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        with self._guard:
            if self._bars:
                self._bars.stop()
                self._bars = None

    def summary(self, line: dict[str, Any]) -> None:
        """The end of a run: its journal line."""
        on_terminal = self._bars is not None
        self.close()
        if on_terminal and self.finished:
            self._table()
        text = f"{line['done']} done, {line['skipped']} already there, {line['failed']} failed"
        text += f", {line['dropped']} dropped" if "dropped" in line else ""
        text += f" in {duration(line['seconds'])}"
        if line.get("device_wait") is not None:
            text += f"; the device ({line['device']}) waited {line['device_wait']:.1%} of the time"
        self.say(text)

    def _table(self) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("", "clip", "seconds", "")
        order = ("failed", "dropped", "done", "skipped")
        ordered = sorted(self.finished, key=lambda line: order.index(line["state"]))
        for line in ordered[:_TABLE_ROWS]:
            timings = line.get("timings") or {}
            seconds = f"{sum(timings.values()):.1f}" if line["state"] == "done" and timings else ""
            style = {"failed": "red", "done": "green"}.get(line["state"], "")
            table.add_row(Text(MARKS[line["state"]], style), Text(_title(line)), seconds, Text(printable(_note(line))))
        console = Console(stderr=True)
        console.print(table)
        if len(ordered) > _TABLE_ROWS:
            console.print(f"… and {len(ordered) - _TABLE_ROWS} more in journal.jsonl")


def _title(line: dict[str, Any]) -> str:
    if line.get("output"):
        return printable(line["output"])
    prompt = line.get("prompt") or ""
    parts = [line.get("origin"), line.get("reference"), f'"{prompt[:60]}"' if prompt else ""]
    return printable(" ".join(part for part in parts if part))


def _note(line: dict[str, Any]) -> str:
    """What else there is to say of a job: why it failed or was dropped, or which candidate was kept."""
    return _reason(line) if line["state"] in ("failed", "dropped") else describe_choice(line)


def _reason(line: dict[str, Any]) -> str:
    return " ".join(f"{line.get('error', '').rstrip('.')}. {line.get('hint') or ''}".split())
