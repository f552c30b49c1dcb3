"""Drive the scheduler of distributed runs with simulated workers: memory and time a job as the list grows.

    python benchmarks/simulate.py --workers 1000 --jobs 10000,100000,1000000

The driver is the real one (`emt_cli.executors.fleet.FleetExecutor`, its scheduler and its outcomes); workers are
simulated, each a number in a queue of events: they take jobs, sleep in simulated time, now and then die, and report.
Jobs come from a generator, eight a reference. A list has a process of its own. Prints, for each: seconds of processor
time a job, the memory of the driver at its peak, and the jobs that workers held at most; ends with exit code 1 if a job
is lost or done twice. With --names the driver remembers the names of all jobs as well, as a run that looks for
duplicates does; without it, what remains is the scheduler's own.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from emt import __version__
from emt_cli.batch.jobs import Job
from emt_cli.batch.journal import Journal
from emt_cli.batch.options import Settings
from emt_cli.batch.session import RunOptions
from emt_cli.batch.tasks import Reference, Task
from emt_cli.executors.fleet import Death, FleetExecutor
from emt_cli.executors.worker import Order, Report

_EACH = 8  # jobs of a reference
_ROOM = 4  # jobs that a worker has room for
_START, _CLIP = 20.0, 2.65  # simulated seconds: of a worker's start, of a clip
_DEATHS = 1e-4  # of a worker, a clip


def main(command_line: list[str] | None = None) -> None:
    """Simulate lists of several lengths."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--workers", type=int, default=1000)
    arguments.add_argument("--jobs", default="10000,100000,1000000")
    arguments.add_argument("--names", action="store_true", help="remember the names of all jobs")
    arguments.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args(command_line)
    if given.one:
        print(json.dumps(simulate(given.workers, int(given.jobs), given.names)))
        return
    print(f"{given.workers} simulated workers{', all names remembered' if given.names else ''}")
    for jobs in given.jobs.split(","):
        words = [sys.executable, __file__, "--one", "--workers", str(given.workers), "--jobs", jobs]
        done = subprocess.run(words + ["--names"] * given.names, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{jobs} jobs: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout)
        print(
            f"{int(jobs):>9,} jobs: {found['seconds'] / int(jobs) * 1e6:5.0f} µs a job, {found['memory'] / 1e6:6.1f} MB"
            f" at the peak ({found['grown'] / 1e6:.1f} MB more than before the run), {found['held']} jobs held at most,"
            f" {found['deaths']} deaths, {found['simulated'] / 3600:.1f} simulated hours"
        )


def simulate(workers: int, jobs: int, names: bool) -> dict[str, float]:
    """Run one list; returns its figures."""
    with tempfile.TemporaryDirectory(prefix="emt-simulate-") as folder:
        out = Path(folder) / "out"
        journal = Journal(out)
        listener = _Counting()
        fleet = _Simulated(workers, out)
        generator = SimpleNamespace(model_sha256="", check=lambda job: None)
        session: Any = SimpleNamespace(generator=generator, index=None)
        executor = FleetExecutor(session, journal, listener, RunOptions(), fleet)
        executor._feeder = _Feeder(jobs, set() if names else None)  # type: ignore[assignment]
        before, begun = _memory(), time.process_time()
        executor.run(())
        seconds = time.process_time() - begun
        journal.close()
    if listener.counts != Counter(done=jobs):
        sys.exit(f"of {jobs} jobs: {dict(listener.counts)}")
    figures = {"seconds": seconds, "memory": _memory(), "grown": _memory() - before}
    return {**figures, "held": fleet.most, "deaths": fleet.deaths, "simulated": fleet.now}


def _memory() -> int:
    """Memory of this process at its peak so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Feeder:
    """Makes tasks instead of looking for what is to be done."""

    def __init__(self, jobs: int, names: set[str] | None) -> None:
        self._jobs, self._names = jobs, names

    def tasks(self, items: Iterable[Any]) -> Iterator[Task]:
        """All of them."""
        settings = Settings()
        for number in range(self._jobs):
            if number % _EACH == 0:
                path = Path(f"/clips/{number // _EACH}.mp4")
                reference = Reference(Job(path, "", 0, settings), str(number))
            output = f"{number // _EACH}/a-fox-{number % _EACH}.mp4"
            if self._names is not None:
                self._names.add(output)
            yield Task(Job(path, "a fox", number % _EACH, settings), str(number), output, reference)

    def recover(self, task: Task) -> bool:
        """No clip is written here."""
        return False


class _Counting:
    """A listener that counts."""

    gone = False

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def job(self, line: dict[str, Any]) -> None:
        """A job has ended."""
        self.counts[line["state"]] += 1

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **named: None


class _Simulated:
    """Workers that sleep in simulated time (a `emt_cli.executors.fleet.Fleet`)."""

    def __init__(self, size: int, out: Path) -> None:
        self.size = size
        self.now, self.most, self.deaths = 0.0, 0, 0
        self._out = out
        self._chance = random.Random(0)
        self._order = itertools.count()
        self._events: list[tuple[float, int, int, int]] = []  # when, in order, of whom, of which of its lives
        self._queues: dict[int, list[Order]] = {}
        self._lives: Counter[int] = Counter()
        self._received: Counter[int] = Counter()
        self._busy: set[int] = set()
        self._held = 0
        self._closed: list[int] = []

    def open(self) -> None:
        """Nothing."""

    def start(self, number: int) -> None:
        """It comes up after a while."""
        self._queues[number], self._received[number] = [], 0
        self._lives[number] += 1
        self._busy.discard(number)
        self._later(number, _START * self._chance.uniform(0.8, 1.5))

    def _later(self, number: int, seconds: float) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), number, self._lives[number]))

    def add(self, number: int, orders: list[Order]) -> None:
        """It begins with the first when it has nothing else."""
        self._queues[number].extend(orders)
        self._received[number] += len(orders)
        self._held += len(orders)
        self.most = max(self.most, self._held)
        if number not in self._busy and self._queues[number]:
            self._busy.add(number)
            self._later(number, _CLIP * self._chance.uniform(0.9, 1.2))

    def wait(self, seconds: float) -> list[tuple[int, Report | Death]]:
        """The events of the next moment."""
        found: list[tuple[int, Report | Death]] = [(number, Report(ended=True)) for number in self._closed]
        self._closed.clear()
        moment = None
        while self._events and (moment is None or self._events[0][0] <= moment):
            self.now, _, number, life = heapq.heappop(self._events)
            moment = self.now + 0.05 if moment is None else moment
            if life != self._lives[number]:
                continue
            queue = self._queues[number]
            report = Report(received=self._received[number])
            if number not in self._busy:
                report.facts = {"version": __version__, "model_sha256": "", "host": "", "pid": 0}
            elif self._chance.random() < _DEATHS:
                self.deaths += 1
                self._held -= len(queue)
                (self._out / f"journal-worker-{number}.jsonl").touch()
                found.append((number, Death("simulated")))
                continue
            else:
                order = queue.pop(0)
                self._held -= 1
                report.lines = [{"event": "job", "state": "done", "output": order.output, "id": order.identity}]
                if queue:
                    self._later(number, _CLIP * self._chance.uniform(0.9, 1.2))
                else:
                    self._busy.discard(number)
            report.room = _ROOM - len(queue)
            found.append((number, report))
        return found

    def close(self, number: int) -> None:
        """It ends at once: it has nothing."""
        self._closed.append(number)

    stop = close

    def remove(self, number: int) -> None:
        """Nothing."""

    def shutdown(self) -> None:
        """Nothing."""

    abandon = shutdown


if __name__ == "__main__":
    main()
