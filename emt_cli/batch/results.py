"""Finished clips on disk: what they carry, and whether a job is done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emt.errors import EmtError
from emt.storage import write_atomically
from emt_cli.batch.jobs import Job
from emt_cli.batch.records import dumps, parse

if TYPE_CHECKING:
    import numpy as np

_KEY = "emt"


def sidecar(clip: Path) -> Path:
    """Where the record of a clip lies beside it: `<clip>.json`."""
    return clip.with_name(clip.name + ".json")


def write_result(clip: Path, frames: np.ndarray, fps: float, record: dict[str, Any]) -> None:
    """Write a clip that carries its record, and then the record beside it; each is whole or not there at all.

    Raises:
        EmtError: the clip cannot be written (a full disk, a folder without permission).
        OSError: its sidecar cannot.
    """
    from emt.video import write_clip

    write_clip(clip, frames, fps, metadata={_KEY: dumps(record).decode()})
    write_atomically(sidecar(clip), dumps(record) + b"\n")


def read_record(clip: Path) -> dict[str, Any]:
    """The record that a clip carries, its fields checked; empty if it has none.

    Raises:
        EmtError: the clip cannot be read.
    """
    from emt.video import read_metadata

    return parse(read_metadata(clip).get(_KEY, ""))


def is_whole(clip: Path, job: Job, identity: str) -> bool:
    """Whether a clip is this job's, and has all of its frames."""
    from emt.video import probe

    try:
        return read_record(clip).get("id") == identity and probe(clip).frames == job.settings.frames
    except EmtError:
        return False


def state_on_disk(line: dict[str, Any] | None, clip: Path, job: Job, identity: str) -> str:
    """Whether a job is done: `done`, `made` (a clip that the journal does not know of), or `open`.

    Args:
        line: The last line of the journal that calls this clip done, if there is one.
        clip: Where the job's clip goes.
        job: The job.
        identity: Its identity.
    """
    try:
        status = os.stat(clip)
    except (OSError, ValueError):
        return "open"
    listed = line is not None and line.get("id") == identity
    if listed and line and line.get("bytes") == status.st_size and line.get("mtime_ns") == status.st_mtime_ns:
        return "done"  # as the journal left it
    if not is_whole(clip, job, identity):
        return "open"
    return "done" if listed else "made"
