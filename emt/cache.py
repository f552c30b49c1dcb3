"""What is kept between runs in the user's cache folder: content hashes of files, and motion features.

Both are only ever a saving of time: a hash is keyed by everything that changes when a file's content does, and a
motion entry by the content it was made from, so deleting the folder at any moment is harmless.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emt.errors import EmtError
from emt.storage import check_readable, partial_beside, sha256_of, sync, write_atomically

if TYPE_CHECKING:
    from emt.pipeline import Motion

# A file changed within the clock tick in which it was hashed looks unchanged; so young ones are not remembered.
_SETTLED_NS = 2_000_000_000


def default_dir() -> Path:
    """`emt` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emt"


class ContentIndex:
    """Facts that follow from a file's content (its hash, its length), remembered by its path and status.

    Args:
        folder: Where to keep them; if it cannot be written, they are kept for this process only.
    """

    def __init__(self, folder: Path) -> None:
        self._guard = threading.Lock()
        self._recent: dict[str, str] = {}
        self._database = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = self._open(folder / "index.sqlite")
        except (OSError, sqlite3.Error):
            return

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
            if os.path.isdir(path):
                names = sorted(e.name for e in os.scandir(path) if not e.name.startswith(".") and e.is_file())
                listing = [(name, self.sha256(path / name)) for name in names]
                return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
            return self.remember("sha256", path, status, lambda: sha256_of(path))
        except OSError as error:
            raise EmtError(f"cannot read {path.name}: {error.strerror}", f"The whole path is {path}.") from None

    def remember(self, fact: str, path: Path, status: os.stat_result, find: Callable[[], Any]) -> Any:
        """A JSON value that follows from a file's content; `find` is asked only if the file is not known as it is.

        The key has the time of the last change of the status too, which no program can set back.
        """
        stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
        key = json.dumps([fact, str(path), *stamp])
        with self._guard:
            known = self._recent.get(key) or self._read(key)
        if known is not None:
            return json.loads(known)
        value = json.dumps(find())
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
            with self._guard:
                self._recent[key] = value
                self._write(key, value)
        return json.loads(value)

    def _read(self, key: str) -> str | None:
        try:
            row = self._database and self._database.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error:
            return None
        return row[0] if row else None

    def _write(self, key: str, value: str) -> None:
        try:
            if self._database:
                self._database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))
        except sqlite3.Error:
            self._database = None  # full or read-only: this process goes on without


class MotionCache:
    """Motion features on disk, by the hash of what they were made from, the least recently used dropped first.

    An entry is `<key>.safetensors` and, written after it, `<key>.json` with its hash; without both, or where the
    hash does not match, there is no entry.

    Args:
        folder: Where the entries are.
        limit: Most bytes that all entries together may hold; 0 turns the cache off.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder = folder
        self.limit = limit
        self._guard = threading.Lock()

    def load(self, key: str) -> tuple[Motion, float] | None:
        """The motion of a key and the frame rate of its reference, or None. A damaged entry is deleted."""
        from emt.pipeline import Motion

        tensors, facts = self._paths(key)
        if not self.limit or not facts.exists():
            return None
        try:
            known = json.loads(facts.read_bytes())
            if sha256_of(tensors) != known["sha256"]:
                raise ValueError("content and hash differ")
            motion = Motion.load(tensors)
            os.utime(facts)  # its time of use; access times are not kept on many file systems
            return motion, float(known["fps"])
        except Exception:  # whatever is wrong with it, the entry can be made again
            tensors.unlink(missing_ok=True)
            facts.unlink(missing_ok=True)
            return None

    def save(self, key: str, motion: Motion, fps: float) -> None:
        """Keep a motion, and drop old ones beyond the limit.

        Raises:
            OSError: it could not be written (no entry is left).
        """
        if not self.limit:
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
            known = {"sha256": sha256_of(temporary), "fps": fps, "bytes": size}
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
                    break
                facts.unlink(missing_ok=True)
                tensors.unlink(missing_ok=True)
                total -= size
