"""Finished clips on disk: what they carry, and whether a job is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emt.errors import EmtError
from emt.remote import copy_of, is_url
from emt.storage import write_atomically
from emt_cli.batch.jobs import Job, own_name
from emt_cli.batch.journal import Known
from emt_cli.batch.records import dumps, parse

if TYPE_CHECKING:
    import numpy as np

    from emt.video import Sound

_KEY = "emt"


def sidecar(clip: Path) -> Path:
    """Path of the record beside a clip: `<clip>.json`."""
    return clip.with_name(clip.name + ".json")


def write_result(
    clip: Path, frames: np.ndarray, fps: float, record: dict[str, Any], sound: Sound | None = None
) -> None:
    """Write a clip that carries its record, and then the record beside it; each is whole or not there at all.

    Args:
        clip: Its path.
        frames: uint8, (frames, height, width, 3), RGB.
        fps: Frames per second.
        record: All that it takes to make it again.
        sound: Part of the reference's that goes along.

    Raises:
        EmtError: the clip cannot be written (a full disk, a folder without permission).
        OSError: its sidecar cannot.
    """
    from emt.video import write_clip

    write_clip(clip, frames, fps, metadata={_KEY: dumps(record).decode()}, sound=sound)
    write_atomically(sidecar(clip), dumps(record) + b"\n")


def reference_of(folder: Path, recorded: str) -> Path:
    """Path of the reference that a record names, relative to a folder; of one behind a URL that of its copy.

    Anybody may have written the record: nothing is fetched on its word, and the copy may be missing.
    """
    return copy_of(recorded) if is_url(recorded) else folder / recorded


def read_record(clip: Path) -> dict[str, Any]:
    """The record that a clip carries, its fields checked; empty if it has none.

    Raises:
        EmtError: the clip cannot be read.
    """
    from emt.video import read_metadata

    return parse(read_metadata(clip).get(_KEY, ""))


def is_whole(clip: Path, job: Job, identity: str) -> bool:
    """Return whether a clip is this job's, and has all of its frames."""
    return _found(clip) == (identity, job.settings.frames)


def _found(clip: Path) -> tuple[str, int]:
    """Identity of the job whose clip it is, empty if it is none's or damaged, and its number of frames."""
    from emt.video import probe

    try:
        record = read_record(clip)
        return (record.get("id", ""), probe(clip).frames) if record else ("", 0)
    except EmtError:
        return "", 0


def state_on_disk(line: Mapping[str, Any] | None, clip: Path | str, job: Job, identity: str) -> str:
    """State of a job by its clip: `done`, `made` (a clip that the journal does not know of), or `open`.

    Args:
        line: The last line of the journal that calls this clip done, if there is one.
        clip: Where the job's clip goes.
        job: The job.
        identity: Its identity.
    """
    return _state_on_disk(line, clip, job, identity)[0]


def _state_on_disk(
    line: Mapping[str, Any] | None, clip: Path | str, job: Job, identity: str
) -> tuple[str, os.stat_result | None]:
    """The state, and the status of a clip that is whole but not as the journal left it."""
    try:
        status = os.stat(clip)
    except (OSError, ValueError):
        return "open", None
    listed = line is not None and line.get("id") == identity
    if listed and line and is_untouched(line, status):
        return "done", None
    if not is_whole(Path(clip), job, identity):
        return "open", None
    return ("done" if listed else "made"), status


def is_untouched(line: Mapping[str, Any], status: os.stat_result) -> bool:
    """Return whether a clip is as the journal left it."""
    return line.get("bytes") == status.st_size and line.get("mtime_ns") == status.st_mtime_ns


def is_anothers(line: Mapping[str, Any] | None, clip: Path, identity: str) -> bool:
    """Return whether a finished clip of another job is where a job's clip goes; arguments as for `state_on_disk`.

    A whole clip without a record is somebody's own: one of this program's that was edited in its place.
    """
    try:
        status = os.stat(clip)
    except (OSError, ValueError):
        return False
    if line is not None and is_untouched(line, status):
        return line.get("id") != identity
    try:
        record = read_record(clip)
    except EmtError:
        return False
    if not record:
        return _is_whole_clip(clip)
    settings = record.get("settings", {})
    return record.get("id", identity) != identity and _found(clip)[1] == settings.get("frames")


def _is_whole_clip(clip: Path) -> bool:
    """Return whether there is a clip that can be read and does not end before its own structure says."""
    from emt.video import probe
    from emt.video.damage import ends_early

    try:
        return probe(clip).frames > 1 and (clip.is_dir() or ends_early(clip, clip.stat().st_size) is not True)
    except (EmtError, OSError):
        return False


@dataclass(frozen=True)
class Place:
    """Path of a job's clip.

    Attributes:
        output: Path in the output folder.
        state: `done`, `made` (not yet in the journal), `replaces` (a finished clip is there, which is made again or
            gives way, as the user said), or `open`.
        looked: Status of a clip that had to be read to see whether it is whole; None where its journal line did.
    """

    output: str
    state: str
    looked: os.stat_result | None = None


def find_place(out: Path, known: Known, job: Job, output: str, identity: str, overwrite: bool) -> Place:
    """Find where a job's clip is or goes. No finished clip is ever replaced unless the user says so.

    Args:
        out: The output folder.
        known: What its journal knows.
        job: The job.
        output: Its `output_name`.
        identity: Its identity.
        overwrite: Whether finished clips are to be made again.

    Raises:
        EmtError: the clips are in a store, which cannot be read.
    """
    folder, store = os.fspath(out), known.store

    def state_of(output: str) -> tuple[str, os.stat_result | None]:
        line = known.done.get(output)
        if store is not None:
            return store.state(line, output, job, identity)
        return _state_on_disk(line, os.path.join(folder, output), job, identity)

    state, looked = state_of(output)
    if state != "open":
        return Place(output, "replaces" if overwrite else state, looked)
    own = own_name(output, identity)
    state, looked = state_of(own)
    if state != "open":
        return Place(own, "replaces" if overwrite else state, looked)
    line = known.done.get(output)
    if not (store.is_anothers(line, output, identity) if store else is_anothers(line, out / output, identity)):
        return Place(output, "open")
    return Place(output, "replaces") if overwrite else Place(own, "open")
