"""Standard streams that may close, fill or stop being read at any time: who writes to them neither waits nor fails."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import IO, Any

OUTPUT = "standard output"
"""File name of errors that writing there raises."""

_CHUNK = 4096  # PIPE_BUF of Linux: a pipe that can be written to takes so many bytes without waiting
_GATHERING = 0.002  # seconds
_POLL = 0.2  # seconds between looks at whether to give up
_ESCAPES = "emt.escapes"  # name of the handler of characters that standard output's encoding does not have
_LAST_WORDS = 2.0  # seconds that a line at the end of the program waits for its reader


class Stream:
    """Bytes on their way to a file descriptor, written by a thread of its own.

    Args:
        file: Standard output or standard error; None, as where it was closed before the start, takes all.
        backlog: Bytes that may wait for the reader; writing waits beyond, or drops what it is given.
        lossy: Drop, do not wait.

    Attributes:
        error: Why it takes nothing more; None while it does.
    """

    def __init__(self, file: IO[str] | None, *, backlog: int, lossy: bool = False) -> None:
        self.error: OSError | None = None
        self._backlog, self._lossy = backlog, lossy
        self._hurried = False
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._changed = threading.Condition()
        self._descriptor = _descriptor(file)
        if self._descriptor is not None:
            threading.Thread(target=self._work, args=(self._descriptor,), daemon=True).start()

    def write(self, content: bytes) -> None:
        """Have bytes written; they are dropped once the stream has failed."""
        with self._changed:
            while self._size > self._backlog and not self._lossy and not self._hurried and self.error is None:
                self._changed.wait(_POLL)
            if self._descriptor is None or self.error is not None or (self._lossy and self._size > self._backlog):
                return
            self._waiting.append(content)
            self._size += len(content)
            if len(self._waiting) == 1:
                self._changed.notify_all()

    def hurry(self) -> None:
        """Let nobody wait from here on."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until all is written or the stream has failed.

        Args:
            seconds: At most; None for as long as it takes, but for `_LAST_WORDS` seconds once it is hurried.

        Returns:
            Whether nothing is left to write.
        """
        begun = time.monotonic()
        with self._changed:
            while self._size and self.error is None:
                limit = _LAST_WORDS if seconds is None and self._hurried else seconds
                if limit is not None and time.monotonic() - begun >= limit:
                    return False
                self._changed.wait(_POLL)
        return True

    def _work(self, descriptor: int) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
            time.sleep(_GATHERING)  # with each line written as it comes, the threads would do little but take turns
            with self._changed:
                content = b"".join(self._waiting)
                self._waiting.clear()
            try:
                _write(descriptor, content)
            except OSError as error:
                with self._changed:
                    self.error = error
                    self._waiting.clear()
                    self._size = 0
                    self._changed.notify_all()
                return
            with self._changed:
                self._size -= len(content)
                self._changed.notify_all()


class TextOf(io.TextIOBase):
    """A stream as a text file for libraries that draw on a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Have a text written."""
        self._stream.write(text.encode("utf-8", "backslashreplace"))
        return len(text)

    def isatty(self) -> bool:
        """It stands for a terminal."""
        return True


def print_last(text: str) -> None:
    """A line on standard error where one can still be written, and nothing where not."""
    descriptor = _descriptor(sys.stderr)
    with suppress(OSError):
        if descriptor is None:
            print(text, file=sys.stderr)
            return
        _write(descriptor, text.encode("utf-8", "backslashreplace") + b"\n", time.monotonic() + _LAST_WORDS)


def open_standard_streams() -> None:
    """Make standard streams safe to use, for this process.

    The places of those that were closed before the start are filled, lest other files take them. Errors of standard
    output name it (`OUTPUT`), and characters that its encoding does not have become escapes, as in the locales of some
    terminals and in files that Windows redirects to. What is written to standard error never fails: it is for people,
    and a run does not end because they have stopped listening. A stream that the caller has replaced, as a notebook or
    a test does, stays.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stdout is None or _descriptor(sys.stdout) == 1:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        buffer = io.BufferedWriter(_Output(1, "w", closefd=False))
        codecs.register_error(_ESCAPES, _escaped)
        sys.stdout = io.TextIOWrapper(buffer, encoding, _ESCAPES, line_buffering=os.isatty(1))
    if sys.stderr is None or _descriptor(sys.stderr) == 2:
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        raw = _Unfailing(2)
        sys.stderr = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True, write_through=True)  # type: ignore[arg-type]


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a name that is no text as they are, and what an encoding does not have as an escape."""
    assert isinstance(error, UnicodeEncodeError)
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF:  # as `surrogateescape`
        return bytes([code - 0xDC00]), error.start + 1
    one = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    return codecs.backslashreplace_errors(one)


class _Output(io.FileIO):
    """Standard output, whose errors name it; the last one is remembered."""

    error: OSError | None = None

    def write(self, content: Any) -> int:
        """Write some of it."""
        try:
            return super().write(content)
        except OSError as error:
            _Output.error = OSError(error.errno, error.strerror, OUTPUT)
            raise _Output.error from None


class _Unfailing(io.RawIOBase):
    """A file descriptor that takes what it is given, and loses what cannot be written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """True for a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, content: Any) -> int:
        """Write all of it, if that is possible."""
        with suppress(OSError):
            _write(self._descriptor, bytes(content))
        return len(content)


def flush_standard_output() -> OSError | None:
    """Write what Python still holds of standard output.

    Returns:
        Why this or an earlier write failed, if one did; the interpreter does not try again.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        _Output.error = error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    return _Output.error


def _descriptor(file: IO[str] | None) -> int | None:
    try:
        return None if file is None else file.fileno()
    except (OSError, ValueError):
        return None


def _write(descriptor: int, content: bytes, end: float = float("inf")) -> None:
    """Write all of some bytes, waiting only where that can be given up.

    Raises:
        OSError: the stream has failed, or nobody has read until `end`.
    """
    rest = memoryview(content)  # slices of it are no copies: many lines may have gathered
    poll = getattr(select, "poll", None)
    if poll is None:  # Windows can wait for sockets alone
        while rest:
            rest = rest[os.write(descriptor, rest[:_CHUNK]) :]
        return
    ready = poll()
    ready.register(descriptor, select.POLLOUT)
    while rest:
        if not ready.poll(1000 * _POLL):
            if time.monotonic() > end:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            continue
        try:
            rest = rest[os.write(descriptor, rest[:_CHUNK]) :]
        except BlockingIOError:  # somebody else made it non-blocking, and filled it first
            time.sleep(0.01)
