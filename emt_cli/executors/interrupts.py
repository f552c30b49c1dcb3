"""SIGINT, SIGTERM and SIGHUP of a run: the first ends it in order, the second at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

INTERRUPTED = 130
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
#: Those that the system has; Windows sends SIGBREAK for Ctrl-Break.
NUMBERS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_LAST_SECONDS = 0.5  # that the second one leaves to leave in order


def heeded() -> list[int]:
    """Signals that end a run: all but that of a terminal which has gone, where `nohup` has it ignored."""
    gone = getattr(signal, "SIGHUP", None)
    return [number for number in NUMBERS if number != gone or signal.getsignal(number) is not signal.SIG_IGN]


class Interrupts:
    """Context manager of the main thread.

    Python runs signal handlers in the main thread, between two of its instructions; a computation, or a disk that
    does not answer, may keep it from that. A thread that reads the numbers of signals from a socket, which the
    interpreter writes in the signal handler proper, sees the second one whatever the main thread is at.

    Args:
        idle: Whether nothing is lost if the main thread ends at once; then the first signal is a `KeyboardInterrupt`.
        first: Called in another thread at the first signal.
        last: Called in another thread at the second one, with half a second to return.

    Attributes:
        came: A signal has come.
    """

    def __init__(self, idle: Callable[[], bool], first: Callable[[], None], last: Callable[[], None]) -> None:
        self.came = False
        self._idle, self._first, self._last = idle, first, last

    def __enter__(self) -> Interrupts:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous: dict[int, Any] = {number: signal.signal(number, self._handle) for number in heeded()}
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._writer.close()  # ends the thread
        # It holds the run by its callbacks. Were it the last to do so, it would free tensors while the interpreter
        # ends, which ends the process by SIGABRT.
        self._watcher.join()

    def _handle(self, number: int, frame: object) -> None:
        first, self.came = not self.came, True
        if first and self._idle():
            raise KeyboardInterrupt

    def _watch(self) -> None:
        count = 0
        with self._reader:
            while numbers := self._reader.recv(64):
                before, count = count, count + sum(number in self._previous for number in numbers)
                if not before and count:
                    threading.Thread(target=self._first, daemon=True).start()
                if count > 1:
                    last = threading.Thread(target=self._last, daemon=True)
                    last.start()
                    last.join(_LAST_SECONDS)
                    os._exit(INTERRUPTED)
