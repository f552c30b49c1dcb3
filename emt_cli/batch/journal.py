"""The journal of an output folder: what was done, by whom, and what is left to do after a crash.

`OUT/journal.jsonl` has one JSON object a line, only ever appended. Lines with `"event": "job"` tell of a job:

    state       done | failed | dropped (made, but below the thresholds of `emt make-pairs`)
    output      the clip, relative to OUT (done, and failed where it is known)
    id          the job's identity (see `emt_cli.batch.jobs.identify`)
    reference, reference_sha256, prompt, seed, settings, model, model_sha256, precision, device, engine, batch
                what made it: the record that the clip and its sidecar carry too
    best_of     where several were made: the job's own seed, `first_seed`, and the seed and motion_fidelity (or
                error) of all `candidates`; `seed` is that of the clip that was kept
    motion_fidelity, temporal_consistency   of a clip that `emt make-pairs` has measured
    timings     seconds: decode, reference (once for a reference), steps, vae (a batch's share), encode, and measure
                where the motion was; of all candidates together
    peak_memory bytes: of the device on a GPU, of the process on a CPU
    bytes, mtime_ns   of the clip when it was finished
    adopted     true if a run before this one had made the clip and ended before it could say so
    error, hint, origin   of a failed job: what is wrong, what to do, where the job was read; of a dropped one why
    finished    UTC time, ISO 8601

Lines with `"event": "run"` end a run: done, skipped, failed, dropped (of `emt make-pairs`), seconds, device,
device_wait (the share of the time between the first and the last batch in which the device waited for data).

**What a crash leaves.** For each job the order is: clip (written beside, synced, renamed), sidecar `<clip>.json` (the
same way), journal line (one write, synced). So a line never tells of a clip that is not whole; a clip without a
line carries its job's identity in its metadata and is adopted by the next run; and a torn last line is cut off
when the journal is next opened for writing. One process at a time may write: it holds a lock on `OUT/.lock`,
which the system drops when the process ends in whatever way.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emt.errors import EmtError

FILE_NAME = "journal.jsonl"
LOCK_NAME = ".lock"


def dumps(value: Any) -> bytes:
    """One line of JSON in UTF-8; what is not valid Unicode (bytes of odd file names) stays as JSON escapes."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def read(out: Path) -> list[dict[str, Any]]:
    """The lines of a folder's journal, oldest first; lines that are not whole are left out.

    Raises:
        EmtError: the journal is there but may not be read.
    """
    try:
        with open(out / FILE_NAME, "rb") as file:
            return list(_parsed(file.read()))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise EmtError(f"cannot read {out / FILE_NAME}: {error.strerror}") from None


def current(out: Path) -> list[dict[str, Any]]:
    """The last word on each job of a folder's journal.

    A job that failed before it had an output gives way to a later one that fits it.

    Raises:
        EmtError: the journal is there but may not be read.
    """
    named: dict[str, dict[str, Any]] = {}
    nameless: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in read(out):
        if line.get("event") != "job" or line.get("state") not in ("done", "failed", "dropped"):
            continue
        known = tuple(line.get(key) for key in ("origin", "reference", "prompt", "seed"))
        if not isinstance(line.get("output"), str):
            nameless[known] = line
            continue
        named[line["output"]] = line
        for other in [key for key in nameless if all(a is None or a == b for a, b in zip(key, known))]:
            del nameless[other]
    return [*named.values(), *nameless.values()]


def _parsed(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


class Journal:
    """The journal of one output folder, locked for this process. Threads may share it.

    Args:
        out: The output folder; made if it is missing.

    Raises:
        EmtError: another process is writing to the folder, or it cannot be written to.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._guard = threading.RLock()
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(out / LOCK_NAME)
            self._file = os.open(out / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._repair()
        except OSError as error:
            raise EmtError(f"cannot write to {out}: {error.strerror}", "Name another folder with --out.") from None
        lines = [line for line in read(out) if isinstance(line.get("output"), str)]
        #: The last `done` line of each output.
        self.finished = {line["output"]: line for line in lines if line.get("state") == "done"}
        #: The last `dropped` line of each output.
        self.dropped = {line["output"]: line for line in lines if line.get("state") == "dropped"}

    def _repair(self) -> None:
        """Cut off a last line that a crash left half-written, or end it if only its line break is missing."""
        size = os.fstat(self._file).st_size
        tail, start = b"", size
        while start and b"\n" not in tail:
            step = min(start, 1 << 16)
            start -= step
            tail = os.pread(self._file, step, start) + tail
        torn = tail.rpartition(b"\n")[2]
        if torn and any(_parsed(torn)):
            os.write(self._file, b"\n")
        elif torn:
            os.ftruncate(self._file, size - len(torn))
        os.fsync(self._file)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, on disk when this returns.

        Raises:
            OSError: it could not be written; the journal is as it was.
        """
        line = {**line, "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")}
        content = dumps(line) + b"\n"
        with self._guard:
            size = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, content)
                if written != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, size)
                raise
            if line.get("state") == "done":
                self.finished[line["output"]] = line

    def close(self) -> None:
        """Let the folder go; waits for a line that another thread is writing."""
        if self._guard.acquire(timeout=5):
            os.close(self._file)
            os.close(self._lock)


def _lock(path: Path) -> int:
    import fcntl  # not on Windows, where the rest of this module is read too

    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise EmtError(
            f"another run (process {holder or 'unknown'}) is writing to {path.parent}",
            "Wait for it to end, or name another folder with --out.",
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock
