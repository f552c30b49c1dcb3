"""The journal of an output folder: what was done, by whom, and what is left to do after a crash.

`OUT/journal.jsonl` has one JSON object a line, only ever appended. Where several processes write to a folder, each of
the others has a file of its own, `OUT/journal-<writer>.jsonl`; read together, lines are in the order of their times.
Lines with `"event": "job"` are about a job:

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
    etag        what an object store calls the version of the clip, where it is in one
    adopted     true if a run before this one had made the clip and ended before it could say so
    error, hint, origin   of a failed job: what is wrong, what to do, where the job was read; of a dropped one why
    finished    UTC time, ISO 8601

    warnings    what could not be honoured, a line each

Lines with `"event": "file"` say that a clip was found whole with another time (a copied folder): output, id, bytes,
mtime_ns, etag; or that its reference is elsewhere than it was: output, id, reference.

Lines with `"event": "run"` end a run: done, skipped, failed, dropped (of `emt make-pairs`), seconds
since the process was started, first_clip (the seconds until the first one was finished), phases (where they went;
they add up to the whole), device, device_wait (the share of the time between the first and the last batch in which the
device waited for data), device_busy (the share of all seconds in which it computed; of several workers, of theirs
together), workers (by name their jobs by state, host, pid, phases, device_wait and device_busy_seconds).

**What a crash leaves.** For each job the order is: clip (written beside, synced, renamed), sidecar `<clip>.json` (the
same way), journal line (one write, synced). So a line never names a clip that is not whole; a clip without a
line carries its job's identity in its metadata and is adopted by the next run; and a torn last line is cut off
when the journal is next opened for writing. One process at a time may be a writer: it holds a lock on `OUT/.lock`
(others on `OUT/.lock-<writer>`), which the system drops when the process ends in whatever way. Two runs that might make
the same clips exclude each other: a run looks whether others hold locks that it must be alone with (`Journal.beside`).
"""

from __future__ import annotations

import datetime
import errno
import heapq
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from emt.errors import EmtError
from emt.storage import open_file, try_lock, write_atomically
from emt_cli.batch.records import dumps, parse

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from emt_cli.batch.jobs import Job

FILE_NAME = "journal.jsonl"
LOCK_NAME = ".lock"
#: End of the names of writers that are workers of a run, by their number.
WORKER = re.compile(r"(?:^|-)worker-(\d+)$")
_HOLDER_NAME = ".holder"  # of the file beside a lock with the process that has it; Windows lets nobody read the lock
# Windows writes \r\n into text files; a link in a folder of somebody else's may lead anywhere.
_APPENDING = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_BLOCK = 1 << 16  # bytes
_MOMENT = 0.5  # seconds for which another process may hold a lock that it only looks at
_AHEAD = 300.0  # seconds by which clocks of machines may differ
_DYING = 5.0  # seconds that workers may live on after their run was killed
_GONE = "the output folder was removed or replaced while a run wrote into it"
_PART = re.compile(r"\.\d{5}(?=\.jsonl$)")  # in the name of a part of a journal (`emt_cli.batch.published`)


def exists(out: Path) -> bool:
    """Return whether a folder has a journal."""
    return bool(_files(out))


def lines(out: Path, only: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a folder's journal, of all writers, oldest first, their fields checked (`emt_cli.batch.records`).

    Lines that are not whole, and those of clips outside of the folder, are left out.

    Args:
        out: The folder.
        only: Names of the fields that are needed; None for all.

    Raises:
        EmtError: the journal is there but may not be read.
    """
    parts: dict[str, list[Path]] = {}  # of a journal that was published in parts, one after the other
    for path in _files(out):
        parts.setdefault(_PART.sub("", path.name), []).append(path)
    files = [_timed(paths, only and {*only, "state", "output", "finished"}) for paths in parts.values()]
    return (line for _, line in (heapq.merge(*files, key=lambda pair: pair[0]) if len(files) > 1 else chain(*files)))


def read(out: Path) -> list[dict[str, Any]]:
    """All of `lines` at once."""
    return list(lines(out))


def current(out: Path) -> list[dict[str, Any]]:
    """The last word on each job of a folder's journal.

    A job that failed before it had an output gives way to a later one that fits it.

    Raises:
        EmtError: the journal is there but may not be read.
    """
    named: dict[str, dict[str, Any]] = {}
    # Jobs that failed before they had an output, by which of their facts are known, and by these.
    nameless: dict[tuple[bool, ...], dict[tuple[Any, ...], dict[str, Any]]] = {}
    for line in lines(out):
        if line.get("event") == "file" and "reference" in line:
            made = named.get(line.get("output", ""), {})
            if made and made.get("id") == line.get("id"):
                made["reference"] = line["reference"]
        if line.get("event") != "job" or line.get("state") not in ("done", "failed", "dropped"):
            continue
        facts = tuple(line.get(key) for key in ("origin", "reference", "prompt", "seed"))
        if "output" in line:
            named[line["output"]] = line
            for known, others in nameless.items():
                others.pop(tuple(fact if given else None for fact, given in zip(facts, known)), None)
        else:
            others = nameless.setdefault(tuple(fact is not None for fact in facts), {})
            others.pop(facts, None)  # the last word takes the last place
            others[facts] = line
    return [*named.values(), *(line for others in nameless.values() for line in others.values())]


def file_of(out: Path, writer: str = "") -> Path:
    """Path of a writer's journal in an output folder."""
    name = Path(FILE_NAME)
    return out / f"{name.stem}-{writer}{name.suffix}" if writer else out / name


def _files(out: Path) -> list[Path]:
    """The journals of all writers, the first writer's first."""
    try:
        found = sorted(path for path in out.iterdir() if re.fullmatch(r"journal(-.+)?\.jsonl", path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise EmtError(f"cannot read {out}: {error.strerror}") from None
    return sorted(found, key=lambda path: path.name != FILE_NAME)


def _timed(paths: Sequence[Path], only: Collection[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a writer's files with the time of each; in the order of the files, whatever its clock did.

    A time that is yet to come is no time: one line of a clock that was ahead would make the writer's later ones the
    last words on jobs that other writers have done since.
    """
    now = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=_AHEAD)
    latest, end = "", now.isoformat(timespec="milliseconds")
    for path in paths:
        try:
            with open_file(path) as file:
                for content in file:
                    line = parse(content, only)
                    if line.get("state") in ("done", "dropped") and "output" not in line:
                        continue
                    if line:
                        finished = line.get("finished", "")
                        latest = max(latest, finished if finished <= end else "")
                        yield latest, line
        except FileNotFoundError:
            continue
        except OSError as error:
            raise EmtError(f"cannot read {path}: {error.strerror}") from None


class Store(Protocol):
    """Finished clips that are elsewhere than in a folder on disk (`emt_cli.batch.published`)."""

    def state(
        self, line: Mapping[str, Any] | None, output: str, job: Job, identity: str
    ) -> tuple[str, os.stat_result | None]:
        """State of a job by its clip, and the status of a copy of the clip if it had to be looked at."""

    def is_anothers(self, line: Mapping[str, Any] | None, output: str, identity: str) -> bool:
        """Return whether a finished clip of another job is where a job's clip goes."""

    def look_again(self, output: str) -> None:
        """Find out whether a clip is there by now."""


class Known:
    """Index of the clips of earlier runs: the latest line on each, in little memory.

    Attributes:
        done: By output: id, reference, bytes and mtime_ns of a finished clip; its seed and best_of where one was
            chosen; its measures.
        dropped: By output: id and measures of a clip that was dropped.
        failed: By output: id and error of a job whose last word is that it failed.
        store: Where the clips are, if not in a folder on disk.
    """

    _KEPT = ("id", "bytes", "mtime_ns", "etag", "motion_fidelity", "temporal_consistency")
    FIELDS = (*_KEPT, "event", "state", "output", "reference", "best_of", "seed", "error")

    def __init__(self) -> None:
        self.done: dict[str, dict[str, Any]] = {}
        self.dropped: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, dict[str, Any]] = {}
        self.store: Store | None = None

    def add(self, line: dict[str, Any]) -> None:
        """Take a line of the journal."""
        output, state = line.get("output"), line.get("state")
        if output is None:
            return
        if line.get("event") == "file":
            known = self.done.get(output, {})
            if known and known.get("id") == line.get("id"):
                known |= {name: line[name] for name in ("bytes", "mtime_ns", "etag", "reference") if name in line}
            return
        kept = {name: line[name] for name in self._KEPT if name in line}
        if "reference" in line:
            kept["reference"] = sys.intern(line["reference"])  # many clips have one
        if "best_of" in line and "seed" in line:
            kept |= {"best_of": line["best_of"], "seed": line["seed"]}
        if state == "failed":
            self.failed[output] = kept | {"error": line.get("error", "")}
            return
        self.failed.pop(output, None)
        if state == "done":
            self.done[output] = kept
        elif state == "dropped":
            self.dropped[output] = kept


class Journal:
    """The journal of one output folder, locked for this writer. Threads may share it.

    Args:
        out: The output folder; made if it is missing.
        writer: Name of the writer, where there are several; empty for the first.
        beside: Whether another writer, by its name, may write at the same time; None for any.
        read: Read what all writers have done; a worker that is given its jobs need not know.

    Attributes:
        known: What all writers have done; with `read`.

    Raises:
        EmtError: another process is this writer, or one that may not be beside it, or the folder cannot be written to.
        ValueError: `writer` is no name.
    """

    def __init__(
        self, out: Path, writer: str = "", *, beside: Callable[[str], bool] | None = None, read: bool = True
    ) -> None:
        if not re.fullmatch(r"[\w.-]*", writer):
            raise ValueError(f"writer is {writer!r}: letters, digits, ., _ and - are allowed")
        self.out, self.writer = out, writer
        self._guard = threading.RLock()
        self._open = True
        suffix = f"-{writer}" if writer else ""
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(out / f"{LOCK_NAME}{suffix}")
            try:
                if beside is not None:
                    _expect_none(out, lambda other: other != writer and not beside(other))
                _unlink_from_others(file_of(out, writer))
                self._file = os.open(file_of(out, writer), _APPENDING, 0o644)
            except (EmtError, OSError):
                self._lock.release()
                raise
            with suppress(OSError):
                holder = _holder_of(out / f"{LOCK_NAME}{suffix}")
                holder.unlink(missing_ok=True)  # a link in a folder of somebody else's may lead anywhere
                holder.write_text(str(os.getpid()), encoding="ascii")
            self._repair()
        except OSError as error:
            reason = error.strerror
            if error.errno == errno.ELOOP:
                reason = f"{Path(error.filename).name} is a link"
            elif error.errno == errno.EISDIR and error.filename:
                reason = f"{Path(error.filename).name} is a folder"
            elif isinstance(error, FileExistsError):
                reason = "it is a file" if out.exists() else "it is a link that leads nowhere"
            raise EmtError(f"cannot write to {out}: {reason}", "Name another folder with --out.") from None
        self.known = Known()
        self._reads = read
        for line in lines(out, Known.FIELDS) if read else ():
            self.known.add(line)

    def _repair(self) -> None:
        """Cut off a last line that a crash left half-written, or end it if only its line break is missing."""
        size = start = os.fstat(self._file).st_size
        blocks: list[bytes] = []
        while start and not (blocks and b"\n" in blocks[-1]):
            step = min(start, _BLOCK)
            start -= step
            os.lseek(self._file, start, os.SEEK_SET)
            blocks.append(os.read(self._file, step))
        torn = b"".join(reversed(blocks)).rpartition(b"\n")[2]
        if torn and parse(torn):
            os.write(self._file, b"\n")
        elif torn:
            os.ftruncate(self._file, size - len(torn))
        os.fsync(self._file)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, on disk when this returns.

        Raises:
            OSError: it cannot be written, or its folder has no such file; the journal keeps the lines it has.
        """
        line = {**line, "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")}
        content = dumps(line) + b"\n"
        with self._guard:
            status = os.fstat(self._file)
            if not self._is_at_its_path(status):
                raise FileNotFoundError(errno.ENOENT, _GONE, str(self.out))
            size = status.st_size
            try:
                written = os.write(self._file, content)
                if written != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, size)
                raise
            if self._reads:
                self.known.add(line)

    def _is_at_its_path(self, status: os.stat_result) -> bool:
        """Return whether the open file is still the one of its name: what is written into another is lost."""
        try:
            return os.path.samestat(status, os.stat(file_of(self.out, self.writer)))
        except FileNotFoundError:
            return False

    def path_of(self, output: str) -> str:
        """Path of a clip, for who reads results."""
        return os.path.join(self.out, output)

    def close(self) -> None:
        """Let the folder go; waits for a line that another thread is writing."""
        if self._guard.acquire(timeout=5):
            if self._open:
                self._open = False
                os.close(self._file)
                self._lock.release()
            self._guard.release()


def _unlink_from_others(path: Path) -> None:
    """Make a journal a file of its own: a copy of its folder by hard links (a backup) would get the lines, too.

    Raises:
        OSError: it cannot be read or written.
    """
    with suppress(FileNotFoundError):
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            write_atomically(path, path.read_bytes())


def _expect_none(out: Path, unwanted: Callable[[str], bool]) -> None:
    """Raise EmtError if other processes are writers that are not wanted; those of a run that was killed end soon."""
    for path in sorted(out.glob(f"{LOCK_NAME}*")):
        if path.name != LOCK_NAME and not path.name.startswith(f"{LOCK_NAME}-"):
            continue
        writer = path.name[len(LOCK_NAME) + 1 :]
        if unwanted(writer):
            _lock(path, _DYING if WORKER.search(writer) else _MOMENT).release()


def _holder_of(lock: Path) -> Path:
    """File with the process that holds a lock."""
    return lock.with_name(lock.name.replace(LOCK_NAME, _HOLDER_NAME, 1))


def _lock(path: Path, seconds: float = _MOMENT) -> BaseFileLock:
    end = time.monotonic() + seconds
    while (lock := try_lock(path)) is None:
        if time.monotonic() < end:
            time.sleep(0.02)
            continue
        process = "unknown"
        with suppress(OSError), open_file(_holder_of(path)) as file:
            process = file.read(32).decode("ascii", "replace").strip()
        raise EmtError(
            f"another run (process {process}) is writing to {path.parent}",
            "Wait for it to end, or name another folder with --out.",
        )
    return lock
