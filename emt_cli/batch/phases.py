"""Phases of a run and their seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_IMPORTED = time.monotonic()


class Phases:
    """Wall-clock time of one thread by phase: each second belongs to exactly one, so they add up to the whole.

    Args:
        say: Called with the name of a phase that begins.

    Attributes:
        seconds: Of each phase so far, in the order in which they began.
    """

    def __init__(self, say: Callable[[str], None] = lambda phase: None) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say
        self._inner: list[float] = [0.0]  # of each open phase, the time of those in it

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Context manager: the time in here is this phase's, but for that of phases in it."""
        self.seconds.setdefault(phase, 0.0)
        self._say(phase)
        begun = time.monotonic()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.monotonic() - begun
            self.seconds[phase] += spent - self._inner.pop()
            self._inner[-1] += spent

    def total(self, *phases: str) -> float:
        """Seconds of some phases together."""
        return sum(self.seconds.get(phase, 0.0) for phase in phases)


class Pace:
    """Seconds a step in the second half of a batch's steps, when most is prepared.

    What is still prepared there, such as a graph, is left out: it is done once for all batches of a size.

    Args:
        now: Clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._prepared = 0.0  # seconds, since the half
        self._half: tuple[int, float] | None = None
        self.seconds: float | None = None

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Context manager: the time in here does not count."""
        begun = self._now()
        try:
            yield
        finally:
            self._prepared += self._now() - begun

    def is_due(self, done: int, steps: int) -> bool:
        """Return whether `step` is to be called after so many steps, with the device having done all of them."""
        return done in (max(1, steps // 2), steps)

    def step(self, done: int, steps: int) -> None:
        """So many steps are done."""
        if self._half is None:
            self._half, self._prepared = (done, self._now()), 0.0
        elif done == steps:
            half, since = self._half
            self.seconds = (self._now() - since - self._prepared) / (steps - half)


def process_age() -> float:
    """Seconds since the system started this process, imports included; where that is not known, since this import."""
    try:
        stat = Path("/proc/self/stat").read_bytes()
        ticks = int(stat.rpartition(b")")[2].split()[19])  # starttime: the 22nd field; the 2nd may have spaces
        uptime = float(Path("/proc/uptime").read_bytes().split()[0])
        return uptime - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # there is neither on other systems than Linux
        try:
            import psutil

            return time.time() - psutil.Process().create_time()
        except Exception:  # psutil has no common error
            return time.monotonic() - _IMPORTED
