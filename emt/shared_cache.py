"""A cache of motion features that machines share through an object store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emt import remote
from emt.cache import MotionCache
from emt.errors import EmtError
from emt.remote import MissingError, child, normal, put, shown

if TYPE_CHECKING:
    from emt.features import Motion


class SharedMotionCache(MotionCache):
    """Motion features in a folder of this machine, behind which is one of a store that other machines read and write.

    What is not here is looked for there, and what is made is put there, its hash last. Nothing is ever removed there. A
    store that fails costs time and one message, never a job: the run goes on with this machine's folder.

    Args:
        url: Folder of the store.
        folder: Of this machine.
        limit: Most bytes in this machine's folder; 0 turns the cache off.
        say: Called with a line if a folder cannot be read or written.
    """

    def __init__(self, url: str, folder: Path, limit: float, say: Callable[[str], None] = lambda text: None) -> None:
        super().__init__(folder, limit, say)
        self.url = child(normal(url), "motion")
        self._is_there = True

    def load(self, key: str, shape: tuple[int, int, int]) -> tuple[Motion, float] | None:
        """The motion of a key and the frame rate of its reference, or None; arguments as for `MotionCache.load`."""
        found = super().load(key, shape)
        if found is None and self.limit and self._is_there and self._fetch(key):
            found = super().load(key, shape)
        return found

    def save(self, key: str, motion: Motion, fps: float, warnings: Sequence[str] = ()) -> None:
        """Keep a motion, here and in the store; arguments as for `MotionCache.save`.

        Raises:
            OSError: it could not be written here.
        """
        super().save(key, motion, fps, warnings)
        tensors, facts = self._paths(key)
        if not (self._is_there and facts.exists()):
            return
        try:
            put(tensors, child(self.url, tensors.name))
            put(facts, child(self.url, facts.name))
        except (EmtError, OSError) as error:  # OSError: another run has dropped the entry
            self._go_without(error)

    def _fetch(self, key: str) -> bool:
        """Copy an entry of the store to this machine, its tensors first."""
        try:
            if not remote.exists(child(self.url, self._paths(key)[1].name)):
                return False
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self._paths(key):
                remote.copy(child(self.url, path.name), path)
        except MissingError:
            return False
        except (EmtError, OSError) as error:
            self._go_without(error)
            return False
        return True

    def _go_without(self, error: EmtError | OSError) -> None:
        if self._is_there:
            self._is_there = False
            reason = error.problem if isinstance(error, EmtError) else error.strerror
            self._say(f"encoded references are not shared in {shown(self.url)}: {reason}")
