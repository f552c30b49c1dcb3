"""Shards of a job list: `--shard i/n` lets n runs, on any machines, share one list and one output folder.

A job belongs to a shard by a hash of its reference's name, kind and size in bytes, so that all jobs of a reference are
in one shard, no clip is made by two, no file has to be read to find that out, and where a file lies does not matter.
Adding jobs moves none to another shard. Each shard writes a journal file of its own (`emt_cli.batch.journal`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emt.errors import EmtError
from emt_cli.text import slug

MAX_SHARDS = 100_000


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, from 0; the whole list is the only part of one.

    Attributes:
        index: Which part it is.
        count: Number of parts.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard of `--shard`; the whole for an empty text.

        Raises:
            EmtError: it is not i/n.
        """
        if not text:
            return cls()
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        index, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= count <= MAX_SHARDS or index >= count:
            hint = (
                f"Allowed is i/n with i from 0 to n-1 and n up to {MAX_SHARDS:,}: 0/4, 1/4, 2/4 and 3/4 are the four."
            )
            raise EmtError(f"--shard is {text!r:.100}", hint)
        return cls(index, count)

    @property
    def writer(self) -> str:
        """Name of the journal's writer; empty, the first writer's, for the whole."""
        return f"shard-{self.index}-of-{self.count}" if self.count > 1 else ""

    def is_beside(self, writer: str) -> bool:
        """Return whether another writer's jobs are others than this shard's: it has another part of the same n."""
        found = re.match(r"shard-(\d+)-of-(\d+)(?=-|$)", writer)
        return found is not None and int(found[2]) == self.count > 1 and int(found[1]) != self.index

    def has(self, item: Any) -> bool:
        """Return whether an item of a job list is in this shard; pauses are in all, what names no clip in the first."""
        if self.count == 1 or item is None:
            return True
        if not item.reference:
            return self.index == 0
        source = getattr(item, "source", "")  # its copy may be on one machine and not yet on another
        return place(Path(source or item.reference)) % self.count == self.index

    def of(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items that are in this shard, in their order."""
        return (item for item in items if self.has(item))


@functools.lru_cache(maxsize=1 << 14)
def place(reference: Path) -> int:
    """A number of 64 bits by a reference's name, kind and size; of the names and sizes in a folder of frames.

    Of one behind a URL, whose size is not looked at, it is by name and kind.

    References of one content and name, which lead to the same clips, have the same number wherever they are.
    """
    try:
        if os.path.isdir(reference):
            with os.scandir(reference) as entries:
                size: Any = sorted(
                    (e.name, e.stat().st_size) for e in entries if not e.name.startswith(".") and e.is_file()
                )
        else:
            size = os.stat(reference).st_size
    except (OSError, ValueError):
        size = None  # it will fail, and is reported by one shard
    key = slug(reference.stem) or "clip", reference.suffix.lower(), size
    return int.from_bytes(hashlib.sha256(repr(key).encode("utf-8", "backslashreplace")).digest()[:8], "big")
