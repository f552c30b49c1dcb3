"""Networks that cannot be made, for compilers in processes of their own: those import this alone, and at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from emt.errors import EmtError


class KillsItself:
    """In the place of networks to make, in another process."""

    def make(self, device: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class FailsOnce:
    """In place of networks: raises in one process, and is not there to be made in the next.

    `seen` holds the name of a lock that the first process made, by which it would be left behind.
    """

    def __init__(self, seen: Path, error: Exception) -> None:
        self.seen, self.error = seen, error

    def make(self, device: str) -> None:
        if not self.seen.exists():
            self.seen.write_text(str(multiprocessing.RLock()._semlock.name))  # type: ignore[attr-defined]
            print("noise of a compiler", flush=True)
            raise self.error
        raise EmtError("the second attempt was made", "As it should be.")
