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
