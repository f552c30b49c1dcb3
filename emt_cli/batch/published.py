"""Output folders in object stores: a folder on this machine in which runs work, and what they publish of it.

A run works in `outputs/` of the user's cache folder as it does anywhere. As each job ends, its clip is put into the
store, then its sidecar, then the journal: an object cannot be appended to, so that each machine's journals are
published in parts, `journal-<machine>[-<writer>].<number>.jsonl`, of which only the last one grows. A part is full at
`PART` bytes, some hundred lines, so that ten thousand jobs make some dozens of objects. Other machines read the parts
beside their own journal. A copy of the whole in a folder on disk is an output folder like any other.

**What a crash leaves.** Objects appear whole. A line never names a clip that is not in the store; a clip without a line
is fetched, looked at and adopted; a clip that could not be put stays on this machine and is put by the next run; lines
that were not published are, when the next run begins. Which clips are there is asked once, by listing the store: a
finished one is known by its size and by its version (`etag`) as its line has them, and is not fetched.

Machines that share an output folder do not exclude each other. The same clip made twice is one object; a clip of
another job that has come under a name meanwhile is not replaced, and the job fails.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from emt import remote
from emt.errors import EmtError
from emt.remote import MissingError, Stat, child, mirror, normal, put, shown
from emt.storage import exclusive, write_atomically
from emt_cli.batch.jobs import Job
from emt_cli.batch.journal import Journal, file_of
from emt_cli.batch.options import Format
from emt_cli.batch.results import is_anothers, is_whole, read_record, sidecar

PART = 256 << 10
"""Bytes at which a part of a journal is full."""

_SMALL = re.compile(r"journal(-[\w.-]+)?\.jsonl|seeds\.json|metrics\.jsonl")  # what every command reads
_MACHINE = ".machine"


class Published:
    """An output folder in a store, as it was when this was made, and the folder in which runs work on it.

    Args:
        url: Of the folder.
        say: Called with lines about downloads that take a while.

    Attributes:
        folder: The working folder, with the journals of all machines.
        objects: What is in the store, by names relative to it.

    Raises:
        EmtError: the store cannot be read or is for reading alone, or this machine's disk cannot be written to.
    """

    def __init__(self, url: str | Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.url = normal(url)
        remote.check_writable(self.url)
        self.folder = remote.working_folder(self.url)
        self._announce = remote.Announcer(say)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(self.folder / f"{_MACHINE}.lock"):
                if not (self.folder / _MACHINE).exists():
                    write_atomically(self.folder / _MACHINE, secrets.token_hex(4).encode())
            #: Name of this machine in the store.
            self.machine = (self.folder / _MACHINE).read_text()
        except OSError as error:
            raise EmtError(f"cannot write to {self.folder}: {error.strerror}") from None
        self.objects = remote.files(self.url)
        own = re.compile(rf"journal-{re.escape(self.machine)}[-.]")
        small = {n: s for n, s in self.objects.items() if _SMALL.fullmatch(n) and not own.match(n)}
        mirror(self.url, small, self.folder, self._announce, keep=not remote.is_settled(self.folder))

    def __str__(self) -> str:
        return shown(self.url)

    def writer(self, name: str) -> str:
        """Name of a writer's journal, among those of all machines; one that is of this machine already stays."""
        if name == self.machine or name.startswith(f"{self.machine}-"):
            return name
        return f"{self.machine}-{name}" if name else self.machine

    def beside(self, allowed: Callable[[str], bool]) -> Callable[[str], bool]:
        """Takes names of journals for what takes names of writers (`emt_cli.batch.journal.Journal`)."""
        return lambda other: allowed("" if other == self.machine else other.removeprefix(f"{self.machine}-"))

    # ---- reading

    def fetch(self, outputs: Iterable[str]) -> None:
        """Fetch finished clips, as far as they are in the store, into the working folder.

        Raises:
            EmtError: one cannot be read.
        """
        wanted = {name: self.objects[name] for name in outputs if name in self.objects}
        mirror(self.url, wanted, self.folder, self._announce, keep=True)

    def fetch_tree(self, name: str) -> None:
        """Fetch all files of a folder in it.

        Raises:
            EmtError: one cannot be read.
        """
        self.fetch(found for found in self.objects if found.startswith(f"{name}/"))

    def state(
        self, line: Mapping[str, Any] | None, output: str, job: Job, identity: str
    ) -> tuple[str, os.stat_result | None]:
        """State of a job by its clip in the store (see `emt_cli.batch.results.state_on_disk`).

        Returns:
            The state, and the status of a copy of the clip if it had to be looked at.

        Raises:
            EmtError: the job's clip is a folder, or the clip in the store cannot be read.
        """
        if job.settings.format is Format.PNG:
            problem = f"a clip of format png is a folder of files, which is not written at once to {self}"
            raise EmtError(problem, "Choose another --format, or an --out on disk.")
        found, clip = self.objects.get(output), self.folder / output
        if found is None:
            is_left = clip.exists() and is_whole(clip, job, identity)  # by a run that could not publish it
            return ("made", os.stat(clip)) if is_left else ("open", None)
        if self._is_listed(line, found) and line is not None:
            return ("done" if line.get("id") == identity else "open"), None
        self._look(output)
        if not is_whole(clip, job, identity):
            return "open", None
        return ("done" if line is not None and line.get("id") == identity else "made"), os.stat(clip)

    def is_anothers(self, line: Mapping[str, Any] | None, output: str, identity: str) -> bool:
        """Return whether a finished clip of another job is where a job's clip goes.

        Raises:
            EmtError: the clip in the store cannot be read.
        """
        found = self.objects.get(output)
        if found is None:
            return False
        if self._is_listed(line, found) and line is not None:
            return line.get("id") != identity
        self._look(output)
        return is_anothers(None, self.folder / output, identity)

    def look_again(self, output: str) -> None:
        """Find out whether a clip is in the store by now.

        Raises:
            EmtError: the store cannot be read.
        """
        if (found := self._stat(child(self.url, output))) is not None:
            self.objects[output] = found

    @staticmethod
    def _is_listed(line: Mapping[str, Any] | None, found: Stat) -> bool:
        """Return whether a line is about an object as it is."""
        return line is not None and (line.get("bytes"), line.get("etag")) == (found.size, found.version)

    def _look(self, output: str) -> None:
        """Fetch a clip that no line describes."""
        (self.folder / output).unlink(missing_ok=True)  # whatever it is a copy of
        self.fetch([output])

    # ---- writing

    def publish_clip(self, line: dict[str, Any]) -> dict[str, Any]:
        """Put a finished clip into the store, and its sidecar.

        Args:
            line: Its line for the journal.

        Returns:
            The line with what identifies the object.

        Raises:
            EmtError: it cannot be put, or the clip of another job is there.
        """
        output = line["output"]
        clip, target, known = self.folder / output, child(self.url, output), self.objects.get(output)
        try:
            there = self._stat(target)
            if there is not None and not _is_same(there, known):
                self._expect_own(target, line["id"])
            if there is None or (_is_same(there, known) and not line.get("adopted")):
                there = put(clip, target)
            put(sidecar(clip), f"{target}.json")
        except _TakenError:
            raise
        except EmtError as error:
            hint = "The clip is made and stays on this machine: give the same command again to publish it."
            raise EmtError(error.problem, f"{hint} {error.hint}") from None
        self.objects[output] = there
        return {**line, "bytes": there.size, "etag": there.version}

    @staticmethod
    def _stat(url: str) -> Stat | None:
        try:
            return remote.stat(url)
        except MissingError:
            return None

    @staticmethod
    def _expect_own(target: str, identity: str) -> None:
        """Raise EmtError unless a clip that has come into the store meanwhile is that of a job."""
        if read_record(remote.fetch(target)).get("id") != identity:
            raise _TakenError(f"{shown(target)} is the clip of another run meanwhile", "Give the same command again.")

    def publish(self, *names: str) -> None:
        """Put files of the working folder into the store.

        Raises:
            EmtError: one cannot be put.
        """
        for name in names:
            self.objects[name] = put(self.folder / name, child(self.url, name))

    def publish_small(self, name: str) -> None:
        """Put a file that only ever grows, if there is one that the store does not have as it is.

        Raises:
            EmtError: it cannot be put.
        """
        path, known = self.folder / name, self.objects.get(name)
        if path.exists() and (known is None or known.size != path.stat().st_size):
            self.publish(name)

    def publish_tree(self, name: str) -> None:
        """Put the files of a folder that are not in the store; their names say what is in them.

        Raises:
            EmtError: one cannot be put.
        """
        if (self.folder / name).is_dir():
            inside = (path for path in (self.folder / name).iterdir() if path.is_file())
            names = (f"{name}/{path.name}" for path in inside if not path.name.startswith("."))
            self.publish(*(found for found in sorted(names) if found not in self.objects))

    def drop(self, output: str) -> None:
        """Remove a clip from the working folder that is in the store."""
        with suppress(OSError):
            (self.folder / output).unlink(missing_ok=True)
            sidecar(self.folder / output).unlink(missing_ok=True)


class _TakenError(EmtError):
    """The clip of another job is where one was to go."""


def _is_same(one: Stat, other: Stat | None) -> bool:
    return other is not None and (one.size, one.version) == (other.size, other.version)


class PublishedJournal(Journal):
    """The journal of an output folder in a store: a line is published before the next thing happens.

    Args:
        published: The folder.
        say: Called with a line while the journal cannot be published.
        writer: Name of the writer, of `Published.writer`.
        how: Further arguments of `Journal`.

    Raises:
        EmtError: another process is this writer, or the store cannot be written to.
    """

    def __init__(self, published: Published, say: Callable[[str], None], writer: str, **how: Any) -> None:
        self.published, self._say = published, say
        try:
            super().__init__(published.folder, writer, **how)
        except EmtError as error:
            raise EmtError(error.problem.replace(str(published.folder), str(published)), error.hint) from None
        self.known.store = published
        self._parts = _Parts(published, file_of(published.folder, writer))
        self._publishing = threading.Lock()
        self._is_behind = False
        try:
            self._publish()
            if self._reads:
                self._publish_others()
        except EmtError as error:
            self.close()
            raise EmtError(f"cannot write to {published}: {error.problem}", error.hint) from None
        for clip in self._leftovers():
            published.drop(clip)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line and publish it; of a finished job after its clip.

        Raises:
            EmtError: the clip cannot be published; at the end of a run, the journal cannot.
            OSError: it could not be written; the journal is as it was.
        """
        event, output = line.get("event"), line.get("output", "")
        is_done = event == "job" and line.get("state") == "done"
        if is_done:
            line = self.published.publish_clip(line)
        elif event == "file" and output in self.published.objects:
            line = {**line, "etag": self.published.objects[output].version}
        super().append(line)
        try:
            self._publish()
            self._is_behind = False
            if event == "run":
                self._publish_others()
        except EmtError as error:
            if event == "run":
                raise
            if not self._is_behind:
                self._say(f"the journal is behind: {error.problem}; the next job publishes it, or the next run")
            self._is_behind = True
        if is_done or event == "file":
            self.published.drop(output)

    def path_of(self, output: str) -> str:
        """URL of a clip."""
        return shown(child(self.published.url, output))

    def _publish(self) -> None:
        with self._publishing:
            with self._guard:
                content = self._parts.read()
            self._parts.publish(content)

    def _publish_others(self) -> None:
        """Publish the journals of writers on this machine that have ended before they could."""
        own = re.compile(rf"journal-({re.escape(self.published.machine)}(-[\w-]+)?)\.jsonl")
        for path in sorted(self.out.iterdir()):
            match = own.fullmatch(path.name)
            if not match or path == self._parts.path or _Parts(self.published, path).is_published():
                continue
            with suppress(EmtError), closing(Journal(self.out, match[1], read=False)):  # unless it is at work
                parts = _Parts(self.published, path)
                parts.publish(parts.read())

    def _leftovers(self) -> Iterator[str]:
        """Clips in the working folder that a run published and had not removed when it ended."""
        for record in self.out.glob("*/*.json"):
            output = record.relative_to(self.out).as_posix().removesuffix(".json")
            found, line = self.published.objects.get(output), self.known.done.get(output)
            if found is not None and line is not None and line.get("etag") == found.version:
                yield output


class _Parts:
    """A journal of this machine in the store, in parts of whole lines.

    Args:
        published: The output folder.
        path: The journal.
    """

    def __init__(self, published: Published, path: Path) -> None:
        self.published, self.path = published, path
        self._begin, self._number = 0, 0  # of the last part: its first byte, and its number
        self._sent: int | None = None  # bytes of it that are in the store

    def read(self) -> bytes:
        """The content from the last part on; nothing is written meanwhile."""
        with open(self.path, "rb") as file:
            file.seek(self._begin)
            return file.read()

    def is_published(self) -> bool:
        """Return whether the store had all of it, by its size, when the output folder was opened."""
        parts = re.compile(rf"{re.escape(self.path.stem)}\.\d{{5}}\.jsonl")
        there = sum(found.size or 0 for name, found in self.published.objects.items() if parts.fullmatch(name))
        return there == self.path.stat().st_size

    def publish(self, content: bytes) -> None:
        """Put the parts that have grown.

        Raises:
            EmtError: one cannot be put.
        """
        while content or not self._number:  # the first one even if it is empty: so a run learns at once if it can
            part = content[: _end_of_part(content)]
            name = f"{self.path.stem}.{self._number:05}.jsonl"
            known = self.published.objects.get(name)
            if len(part) != (known.size if self._sent is None and known else self._sent):
                self.published.objects[name] = put(part, child(self.published.url, name))
            self._sent = len(part)
            if len(part) < PART:
                return
            content = content[len(part) :]
            self._begin, self._number, self._sent = self._begin + len(part), self._number + 1, None


def open_journal(out: Path, writer: str, say: Callable[[str], None] = lambda text: None) -> Journal:
    """The journal of a worker in an output folder on disk or in a store.

    Args:
        out: The folder.
        writer: Name of the worker's journal. In a store a worker on another machine than its driver's has that of its
            machine before it: parts of a journal are put by the machine alone that has the whole.
        say: Called with lines for people.

    Raises:
        EmtError: another process is this writer, or the folder cannot be written to.
    """
    if remote.is_url(out):
        published = Published(out, say)
        return PublishedJournal(published, say, published.writer(writer), read=False)
    return Journal(out, writer, read=False)


def _end_of_part(content: bytes) -> int:
    """End of the first part of a journal's content: of the line that fills it, or of all."""
    return content.find(b"\n", PART - 1) + 1 or len(content)
