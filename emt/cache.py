"""Caches between runs in the user's cache folder: content hashes of files, and motion features.

Both are only ever a saving of time: a hash is keyed by everything that changes when a file's content does, and a
motion entry by the content it was made from, so deleting the folder at any moment is harmless. A cache that cannot be
read or written costs time and one message, never a job.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from emt.errors import EmtError, first_line
from emt.storage import check_readable, partial_beside, sha256_of, sync, write_atomically

if TYPE_CHECKING:
    from emt.features import Motion

# A file changed within the clock tick in which it was hashed looks unchanged; so young ones are not remembered.
_SETTLED_NS = 2_000_000_000

T = TypeVar("T")


def default_dir() -> Path:
    """`emt` in the user's cache folder; for a user who has no home, a path that cannot be written to."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "emt"
    except RuntimeError:
        return Path(os.devnull) / "emt"


class ContentIndex:
    """Facts that follow from a file's content (its hash, its length), remembered by its path and status.

    Args:
        folder: Where to keep them; if it cannot be read or written, they are kept for this process only.
        say: Called with a line that says so.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self._guard = threading.Lock()
        self._recent: dict[str, str] = {}
        self._folder, self._say = folder, say
        self._database: sqlite3.Connection | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = self._open(folder / "index.sqlite")
        except (OSError, ValueError, sqlite3.Error) as error:
            self._go_without(error)

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        for attempt in range(2):
            database = sqlite3.connect(path, timeout=10, check_same_thread=False, isolation_level=None)
            try:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=NORMAL")
                database.execute("CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT)")
                return database
            except sqlite3.DatabaseError as error:
                database.close()
                if attempt or isinstance(error, sqlite3.OperationalError):
                    raise
                path.unlink(missing_ok=True)  # not a database any more; it can be made again
        raise AssertionError

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file's content, or of the names and contents of the files in a folder of images.

        Raises:
            EmtError: it cannot be read.
        """
        status = check_readable(path)
        try:
            if not os.path.isdir(path):
                return self.remember("sha256", path, status, lambda: sha256_of(path), str)
            with os.scandir(path) as entries:
                found = sorted((e.name, e.stat()) for e in entries if not e.name.startswith(".") and e.is_file())

            def of_all() -> str:
                listing = [(name, self.sha256(path / name)) for name, _ in found]
                return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

            # One look-up for all files: one for each takes ten times as long as listing them.
            stamps = json.dumps([(name, *_stamp(own)) for name, own in found])
            key = ["folder", str(path), hashlib.sha256(stamps.encode()).hexdigest()]
            return self._remembered(key, max((_changed(own) for _, own in found), default=0), of_all, str)
        except OSError as error:
            raise EmtError(f"cannot read {path.name}: {error.strerror}", f"The whole path is {path}.") from None

    def remember(self, fact: str, path: Path, status: os.stat_result, find: Callable[[], T], kind: type = object) -> T:
        """A JSON value that follows from a file's content; `find` is called only if the file is not known as it is.

        The key has the time of the last change of the status too, which no program can set back.

        Args:
            fact: Name of the value.
            path: The file.
            status: Its status.
            find: Finds the value.
            kind: Type of the value; a remembered one of another type is found anew.
        """
        return self._remembered([fact, str(path), *_stamp(status)], _changed(status), find, kind)

    def _remembered(self, key: list[Any], changed: int, find: Callable[[], T], kind: type) -> T:
        name = json.dumps(key)
        with self._guard:
            known = self._recent.get(name) or self._read(name)
        with suppress(ValueError, RecursionError, TypeError):  # damaged: it can be found again
            if known is not None and isinstance(value := json.loads(known), kind):
                return value  # type: ignore[return-value]
        text = json.dumps(find())
        if time.time_ns() - changed > _SETTLED_NS:
            with self._guard:
                self._recent[name] = text
                self._write(name, text)
        return json.loads(text)

    def _read(self, key: str) -> str | None:
        if self._database is None:
            return None
        try:
            row = self._database.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
            return row[0] if row else None
        except sqlite3.Error as error:
            self._go_without(error)
            return None

    def _write(self, key: str, value: str) -> None:
        if self._database is None:
            return
        try:
            self._database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))
        except sqlite3.Error as error:
            self._go_without(error)

    def _go_without(self, error: Exception) -> None:
        self._database = None
        self._say(f"hashes of files are not kept in {self._folder}: {first_line(error)}")


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Fields of a file's status that change whenever its content does."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def _changed(status: os.stat_result) -> int:
    """Time of the last change of a file, in nanoseconds."""
    return max(status.st_mtime_ns, status.st_ctime_ns)


class MotionCache:
    """Motion features on disk, by the hash of what they were made from, the least recently used dropped first.

    An entry is `<key>.safetensors` and, written after it, `<key>.json` with its hash and its key; without both, or
    where either does not match, there is no entry.

    Args:
        folder: Where the entries are.
        limit: Most bytes that all entries together may hold; 0 turns the cache off.
        say: Called with a line if the folder cannot be read.
    """

    def __init__(self, folder: Path, limit: float, say: Callable[[str], None] = lambda text: None) -> None:
        self.folder = folder
        self.limit = limit
        self._say = say
        self._guard = threading.Lock()

    def load(self, key: str, shape: tuple[int, int, int]) -> tuple[Motion, float] | None:
        """The motion of a key and the frame rate of its reference, or None. A damaged entry is deleted.

        Args:
            key: What it was saved under.
            shape: Frames, height and width of the clip that it must be of.
        """
        from emt.features import Motion

        tensors, facts = self._paths(key)
        try:
            if not self.limit or not facts.exists():
                return None
        except OSError as error:
            self._say(f"encoded references in {self.folder} cannot be read: {first_line(error)}")
            self.limit = 0
            return None
        try:
            known = json.loads(facts.read_bytes())
            if sha256_of(tensors) != known["sha256"]:
                raise ValueError("content and hash differ")
            motion, fps = Motion.load(tensors), float(known["fps"])
            if known.get("key", key) != key or (motion.frames, motion.height, motion.width) != shape:
                raise ValueError("it is the motion of another reference")
            if not (math.isfinite(fps) and fps > 0):
                raise ValueError("it has no frame rate")
        except Exception:  # whatever is wrong with it, the entry can be made again
            with suppress(OSError):
                tensors.unlink(missing_ok=True)
                facts.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            if "key" in known:
                os.utime(facts)  # its time of use; access times are not kept on many file systems
            else:  # version 0.1.0 wrote none
                write_atomically(facts, json.dumps({**known, "key": key}).encode())
        return motion, fps

    def warnings(self, key: str) -> tuple[str, ...]:
        """Warnings about the clip that an entry's motion was read from; none without an entry."""
        with suppress(OSError, ValueError, RecursionError, AttributeError):
            known = json.loads(self._paths(key)[1].read_bytes()).get("warnings", [])
            if isinstance(known, list) and all(isinstance(text, str) for text in known):
                return tuple(known)
        return ()

    def save(self, key: str, motion: Motion, fps: float, warnings: Sequence[str] = ()) -> None:
        """Keep a motion, and drop old ones beyond the limit.

        Args:
            key: Hash of what it was made from.
            motion: The motion.
            fps: Frame rate of its reference.
            warnings: What is said of its reference.

        Raises:
            OSError: it could not be written (no entry is left).
        """
        if motion.bytes > self.limit:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors, facts = self._paths(key)
        temporary = partial_beside(tensors)
        try:
            motion.save(temporary)
            size = temporary.stat().st_size
            if size > self.limit:
                return
            sync(temporary)
            known: dict[str, Any] = {"sha256": sha256_of(temporary), "key": key, "fps": fps, "bytes": size}
            known |= {"warnings": list(warnings)} if warnings else {}
            facts.unlink(missing_ok=True)
            os.replace(temporary, tensors)
            write_atomically(facts, json.dumps(known).encode())
        finally:
            temporary.unlink(missing_ok=True)
        self._drop_old()

    def size(self) -> int:
        """Bytes in the cache."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.safetensors", self.folder / f"{key}.json"

    def _drop_old(self) -> None:
        with self._guard:
            entries = []
            for tensors in self.folder.glob("*.safetensors"):
                facts = tensors.with_suffix(".json")
                try:
                    used = facts.stat().st_mtime_ns if facts.exists() else tensors.stat().st_mtime_ns
                    entries.append((used, tensors.stat().st_size, tensors, facts))
                except FileNotFoundError:
                    continue  # another run dropped it
            total = sum(size for _, size, _, _ in entries)
            for _, size, tensors, facts in sorted(entries):
                if total <= self.limit:
                    return
                facts.unlink(missing_ok=True)
                tensors.unlink(missing_ok=True)
                total -= size
