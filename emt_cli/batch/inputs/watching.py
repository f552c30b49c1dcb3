"""Folders as queues: each clip that is dropped in becomes jobs once it is there whole.

Folders are looked at every second instead of by notifications of the system (inotify and its like, which `watchdog` and
`watchfiles` bring): those do not come from network mounts, nor from the other side of a container's or a virtual
machine's shared folder, where queues are; and looking at a thousand files takes milliseconds.

A clip is taken when it, and the file of its prompts, have stayed as they are for `SETTLED` seconds, and its own
structure does not say that more of it is to come. A copy that rests for longer in a container that does not give its
length (MPEG-TS, fragmented MP4, folders of pictures) is beyond that: who fills the folder renames files into it, or
writes the prompts last, which are the sign that the clip is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emt_cli.batch.jobs import Item, Job, Rejected

INTERVAL = 1.0  # seconds between looks
SETTLED = 2.0  # seconds for which a file that is complete has not changed
_PATIENCE = 60.0  # seconds after which a clip that ends early is taken for what it is: damaged


@dataclass
class _Seen:
    """A clip in a watched folder.

    Attributes:
        state: Sizes and times of its files.
        since: When it was first seen so.
        taken: Its jobs have been made.
        noted: The user knows what it waits for.
        jobs: Jobs that were made of it, with whatever prompts beside it.
    """

    state: Any
    since: float
    taken: bool = False
    noted: bool = False
    jobs: set[Job] = field(default_factory=set)


class Watcher:
    """Makes jobs of what is dropped into folders.

    Args:
        find: The clips in the folders, now.
        make: The jobs of a clip.
        beside: Clips need a file of prompts beside them.
        say: Called with lines for people.
    """

    def __init__(
        self,
        find: Callable[[], Iterable[Path]],
        make: Callable[[Path], Iterable[Job | Rejected]],
        beside: bool,
        say: Callable[[str], None],
    ) -> None:
        self._find, self._make, self._beside, self._say = find, make, beside, say
        self._seen: dict[Path, _Seen] = {}

    def items(self) -> Iterator[Item]:
        """Jobs as their clips come, without end; None where nothing more is at hand."""
        at_hand = True
        while True:
            began = time.monotonic()
            for item in self.look(began):
                at_hand = True
                yield item
            if at_hand:
                at_hand = False
                yield None
            time.sleep(max(0.0, began + INTERVAL - time.monotonic()))

    def look(self, now: float) -> Iterator[Job | Rejected]:
        """Jobs of the clips that have become complete since the last look.

        Args:
            now: Seconds of a clock that never goes back.
        """
        clips = list(self._find())
        for gone in self._seen.keys() - set(clips):
            del self._seen[gone]
        for path in clips:
            try:
                yield from self._look_at(path, now)
            except OSError:
                self._seen.pop(path, None)  # it went while it was looked at

    def _look_at(self, path: Path, now: float) -> Iterator[Job | Rejected]:
        prompts = path.with_suffix(".txt")
        state = _state(path), _state(prompts) if self._beside else None
        seen = self._seen.setdefault(path, _Seen(state, now))
        if seen.state != state:
            seen.jobs = set() if seen.state[0] != state[0] else seen.jobs  # of another clip of that name
            seen.state, seen.since, seen.taken, seen.noted = state, now, False, False
        if seen.taken or now - seen.since < SETTLED:
            return
        if self._beside and state[1] is None:
            self._note(seen, f"{path.name} waits for its prompts, in {prompts.name} beside it")
            return
        if _ends_early(path) and now - seen.since < _PATIENCE:
            self._note(seen, f"{path.name} waits for the rest of its file")
            return
        seen.taken = True
        for item in self._make(path):
            if isinstance(item, Job):
                if item in seen.jobs:
                    continue
                seen.jobs.add(item)
            yield item

    def _note(self, seen: _Seen, text: str) -> None:
        if not seen.noted:
            seen.noted = True
            self._say(f"note: {text}")


def _state(path: Path) -> Any:
    """Sizes and times of a file, or of the files in a folder; None if there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not path.is_dir():
        return status.st_size, status.st_mtime_ns, status.st_ino
    with os.scandir(path) as entries:
        return sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)


def _ends_early(path: Path) -> bool:
    """Return whether more of a clip is to come, by its own structure."""
    from emt.video.damage import ends_early

    size = 0 if path.is_dir() else path.stat().st_size
    return not path.is_dir() and (size == 0 or ends_early(path, size) is True)
