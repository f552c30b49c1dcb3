"""Clips in a batch: as many as make a clip cheaper, and as fit in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emt.device import Device
from emt.storage import write_atomically
from emt_cli.batch.jobs import Job

_LARGEST = 8
_MARGIN = 0.85  # of the memory that a larger batch may fill, by the measurement of a smaller one
_CHEAPER = 0.97  # of a clip's time in a smaller batch: what a larger one has to stay below
_FILE = "batches.json"


class BatchSizes:
    """Sizes of batches: as requested, or twice as many clips as long as that makes each of them cheaper by 3%.

    Where one clip fills the GPU, more at once take memory and gain nothing. What has been found out is kept, by model,
    device and shape.

    Args:
        requested: By the user; None to measure.
        folder: Where to keep what was found out; None for this process only. What cannot be read or written there is
            measured again.
    """

    def __init__(self, requested: int | None, folder: Path | None = None) -> None:
        self.requested = requested
        self._file = folder / _FILE if folder else None
        self._limits: dict[tuple[Any, ...], int] = {}
        self._settled: set[tuple[Any, ...]] = set()
        self._paces: dict[tuple[Any, ...], dict[int, float]] = {}  # seconds a step and clip, by the size of a batch
        self._known = self._read()

    def limit(self, job: Job, most: int | None, key: str = "") -> int:
        """Clips of a job's shape in a batch.

        Args:
            job: Of the shape.
            most: What the engine can; None for any number.
            key: Of model, device and shape, under which a size is kept.
        """
        if self.requested is None and job.shape not in self._limits and key in self._known:
            self._limits[job.shape] = self._known[key]
            self._settled.add(job.shape)
        limit = self._limits.get(job.shape, self.requested or 1)
        return limit if most is None else min(limit, most)

    def shrink(self, job: Job, size: int) -> None:
        """More than `size` did not fit."""
        self._limits[job.shape] = size
        self._settled.add(job.shape)

    def learn(
        self, job: Job, clips: int, grown: int, resident: int, device: Device, pace: float | None, key: str = ""
    ) -> None:
        """Let the next batch grow, if this one was cheaper than a smaller one.

        Args:
            job: Of the shape.
            clips: In the batch.
            grown: Bytes that it took beyond those resident.
            resident: Bytes that were in use before.
            device: On which it was.
            pace: Seconds a step and clip, without what is prepared once; None if there was only one step.
            key: As in `limit`.
        """
        shape = job.shape
        if self.requested is not None or not device.is_gpu or shape in self._settled or grown <= 0:
            return
        if clips < self._limits.get(shape, 1):  # the last ones of their shape
            return
        fit = max(1, min(_LARGEST, int((device.memory()[2] - resident) * _MARGIN / (grown / clips))))
        paces = self._paces.setdefault(shape, {})
        smaller = max((size for size in paces if size < clips), default=None)
        if pace is not None:
            paces[clips] = pace
        following = min(2 * clips, fit) if paces else fit
        if pace is not None and smaller is not None and pace > _CHEAPER * paces[smaller]:
            self._settle(shape, smaller, key)
        elif following <= clips:
            self._settle(shape, min(clips, fit), key)
        else:
            self._limits[shape] = following

    def _settle(self, shape: tuple[Any, ...], size: int, key: str) -> None:
        self._limits[shape] = size
        self._settled.add(shape)
        if key and self._file:
            self._known = self._read() | {key: size}
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._file, json.dumps(self._known, indent=1).encode())
            except OSError:
                return  # it is measured again

    def _read(self) -> dict[str, int]:
        try:
            found = json.loads(self._file.read_bytes()) if self._file else {}
            return {str(k): v for k, v in found.items() if type(v) is int and 1 <= v <= _LARGEST}
        except (OSError, ValueError, AttributeError, RecursionError):  # none, or damaged
            return {}
