"""Assignment of jobs to workers: those of a reference stay with one, and who runs out takes from what is left.

The scheduler holds a bounded number of jobs that wait, so that its memory does not depend on how long the list is. It
knows neither processes nor clocks: `emt_cli.executors.fleet` drives it, and so does a simulation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from emt_cli.batch.tasks import Task

AHEAD = 32  # jobs that wait for each worker: so many references are known to choose from
_MANY, _FEWEST = 8192, 8  # jobs that wait for all of them, of which each has this many at the least
MOST_DEATHS = 3  # of workers that held a job: after the first one, it goes to two others


@dataclass(eq=False)
class Parcel:
    """A job on its way to a worker.

    Attributes:
        task: The job.
        deaths: Workers that died while they held it.
    """

    task: Task
    deaths: int = 0

    @property
    def key(self) -> Hashable:
        """Key that jobs share whose reference is read once for them (`Task.key`)."""
        return self.task.key


class Scheduler:
    """Jobs that wait, and those that workers hold.

    Args:
        workers: Number of workers.

    Attributes:
        workers: The same.
        waiting: Number of jobs that no worker holds.
    """

    def __init__(self, workers: int) -> None:
        self.waiting = 0
        self.workers = workers
        self._queues: dict[Hashable, deque[Parcel]] = {}  # by key, in the order of their first jobs
        self._free: dict[Hashable, None] = {}  # keys that no worker has begun
        self._key_of: dict[int, Hashable] = {}  # that a worker had last
        self._held: dict[int, dict[str, Parcel]] = {}  # by worker and output
        self._suspects: deque[Parcel] = deque()

    @property
    def room(self) -> int:
        """Jobs that may be added."""
        most = max(min(AHEAD * self.workers, _MANY), _FEWEST * self.workers)
        return max(0, most - self.waiting)

    @property
    def held(self) -> int:
        """Number of jobs that workers hold."""
        return sum(map(len, self._held.values()))

    def count(self, worker: int) -> int:
        """Number of jobs that a worker holds."""
        return len(self._held.get(worker, ()))

    def add(self, parcel: Parcel) -> None:
        """A job waits; one whose worker has died waits for a worker that holds no other, so that it is known by it."""
        self.waiting += 1
        if parcel.deaths:
            self._suspects.append(parcel)
            return
        if parcel.key not in self._queues:
            self._queues[parcel.key] = deque()
            self._free[parcel.key] = None
        self._queues[parcel.key].append(parcel)

    def take(self, worker: int, room: int) -> list[Parcel]:
        """Jobs for a worker, which holds them from here on.

        Args:
            worker: Its number.
            room: Jobs that it has room for.

        Returns:
            At most so many, and no more than its share of those that wait: the end of a list is spread over all.
        """
        held = self._held.setdefault(worker, {})
        taken: list[Parcel] = []
        if any(parcel.deaths for parcel in held.values()) or (self._suspects and held):
            return taken
        if self._suspects:
            taken.append(self._suspects.popleft())
        else:
            room = min(room, -(-self.waiting // self.workers))
            while len(taken) < room and self._queues:
                taken.append(self._next(worker))
        self.waiting -= len(taken)
        held.update((parcel.task.output, parcel) for parcel in taken)
        return taken

    def ended(self, worker: int, output: str) -> Parcel | None:
        """A worker has ended a job; returns it, or None if it holds no such job."""
        return self._held.get(worker, {}).pop(output, None)

    def lose(self, worker: int) -> list[Parcel]:
        """A worker is no more; returns the jobs that it held."""
        key = self._key_of.pop(worker, None)
        if key in self._queues and key not in self._key_of.values():
            self._free = {key: None, **self._free}
        return list(self._held.pop(worker, {}).values())

    def _next(self, worker: int) -> Parcel:
        """The next job of the reference that a worker has; else of one that none has; else where most are left."""
        key = self._key_of.get(worker)
        if key is None or key not in self._queues:
            key = next(iter(self._free), None)
            if key is None:
                key = max(self._queues, key=lambda one: len(self._queues[one]))
            self._key_of[worker] = key
        self._free.pop(key, None)  # also where a worker goes on with a reference whose other worker is no more
        parcel = self._queues[key].popleft()
        if not self._queues[key]:
            del self._queues[key]
        return parcel
