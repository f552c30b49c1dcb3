"""Shapes of clips that settings leave to the model and the reference: `--size` by name, `--frames all`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from emt.cache import ContentIndex
from emt.errors import EmtError
from emt.model_folder import DEFAULTS, Model
from emt.storage import check_readable
from emt_cli.batch.options import MAX_SIDE, REFERENCE_SIZE

T = TypeVar("T")

#: Width by height of the sizes that have a name.
ASPECTS = {"landscape": 16 / 9, "portrait": 9 / 16}


def size_of(aspect: float, area: int, multiple: int) -> tuple[int, int]:
    """Width and height in pixels of an aspect and about an area, each a multiple of a number."""

    def rounded(side: float) -> int:
        return min(max(round(side / multiple), 1) * multiple, MAX_SIDE // multiple * multiple)

    return rounded(math.sqrt(area * aspect)), rounded(math.sqrt(area / aspect))


class Shapes:
    """Shapes of a model's clips.

    Args:
        model: Whose area and multiple sizes have; None for the published one's.
        index: Remembers what references are.
    """

    def __init__(self, model: Model | None = None, index: ContentIndex | None = None) -> None:
        own = model.defaults if model else DEFAULTS
        self._area = own["height"] * own["width"]
        self._multiple = model.size_multiple if model else 8
        self._facts = model.facts if model else None
        self._index = index

    def size(self, name: str, reference: Path) -> tuple[int, int]:
        """Width and height in pixels of a size, `WIDTHxHEIGHT` or a name.

        Raises:
            EmtError: it is that of the reference, which cannot be read.
        """
        if "x" in name:
            width, height = name.split("x")
            return int(width), int(height)
        aspect = self._aspect(reference) if name == REFERENCE_SIZE else ASPECTS[name]
        return size_of(aspect, self._area, self._multiple)

    def frames(self, reference: Path, start: float, duration: float | None, stride: int | None) -> int:
        """All frames of the part of a reference that settings use; at least 2, so that a shorter one fails as usual.

        A model that takes certain numbers of frames only is given the largest of them that there are.

        Raises:
            EmtError: the reference cannot be read.
        """
        count = self.count(reference, start, duration, stride)
        facts = self._facts
        if facts is None or facts.makes_frames(count):
            return max(count, 2)
        fewer = range(count, max(count - facts.frame_step, 1), -1)
        return next((number for number in fewer if facts.makes_frames(number)), max(count, 2))

    def count(self, reference: Path, start: float, duration: float | None, stride: int | None = None) -> int:
        """Number of frames of a part of a reference.

        Raises:
            EmtError: the reference cannot be read.
        """
        from emt.video import count_frames

        def find() -> int:
            return count_frames(reference, start=start, duration=duration, stride=stride)

        return self._remembered(f"frames from {start} for {duration} by {stride}", reference, find, int)

    def look_at(self, references: Iterable[Path]) -> None:
        """Look at references at the same time, before they are needed one by one."""

        def look(path: Path) -> None:
            with suppress(EmtError):  # it is raised where its job is
                self._aspect(path)

        if self._index:
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(look, references))

    def _aspect(self, reference: Path) -> float:
        from emt.video import probe

        def find() -> float:
            info = probe(reference)
            return info.width / info.height

        return self._remembered("aspect", reference, find, float)

    def _remembered(self, fact: str, reference: Path, find: Callable[[], T], kind: type) -> T:
        status = check_readable(reference)
        if self._index is None or reference.is_dir():  # what is in a folder may change without it
            return find()
        return self._index.remember(fact, reference, status, find, kind)
