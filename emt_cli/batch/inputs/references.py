"""References: the clips that paths, folders, globs and URLs name, in natural order."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from emt.errors import EmtError, count
from emt.remote import Downloads, MissingError, child, copy_of, files, is_url, matching, normal, shown, stat, to_path
from emt.storage import open_file
from emt_cli.batch import journal
from emt_cli.batch.inputs.prompt_files import SUFFIXES
from emt_cli.batch.jobs import Rejected
from emt_cli.batch.options import UsageError
from emt_cli.batch.records import parse
from emt_cli.batch.results import sidecar

_NAMED = 8  # notes about folders that are given in full
_MOST = 1 << 20  # bytes of a record


class ReferencePaths:
    """Paths of references as jobs name them; those behind URLs are fetched when they are needed.

    Args:
        downloads: Fetches them.

    Attributes:
        sources: URLs by the paths of their copies, which may be yet to come.
    """

    def __init__(self, downloads: Downloads) -> None:
        self.downloads = downloads
        self.sources: dict[Path, str] = {}
        self._paths: dict[str, Path] = {}

    def path(self, reference: str) -> Path:
        """The absolute path of a reference, or of the copy of one behind a URL; one object for equal ones."""
        if reference not in self._paths:
            here = copy_of(reference) if is_url(reference) else to_path(with_slashes(reference))
            path = Path(os.path.abspath(here))
            self._paths[reference] = path
            if is_url(reference):
                self.sources[path] = normal(reference)
        return self._paths[reference]

    def named(self, path: Path) -> str:
        """A reference as the user named it."""
        return shown(self.sources[path]) if path in self.sources else str(path)

    def fetch(self, path: Path) -> Path:
        """A reference on disk, fetched if it is behind a URL.

        Raises:
            EmtError: it cannot be fetched.
        """
        if path in self.sources:
            self.downloads.fetch(self.sources[path])
        return path


# Folders in which systems and storage devices keep previews, deleted files and what they lost.
_OF_SYSTEMS = ("@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx")


class Finder:
    """Finds the clips that arguments name.

    Args:
        recursive: Search folders of folders.
        out: Folder of the results, which are no references unless named.
        say: Called with a line for each folder of which something is not read, the first few.
        locate: The path of a reference.
    """

    def __init__(
        self, recursive: bool, out: Path, say: Callable[[str], None], locate: Callable[[str], Path] = Path
    ) -> None:
        self.recursive, self._say, self._locate = recursive, say, locate
        self._out = normal(out) if is_url(out) else os.path.realpath(out)
        self._folders: dict[Path, str] = {}
        self._stems: dict[Path, set[str]] = {}  # names of clips without their suffixes, by folder
        self._said = 0

    def find(self, arguments: Iterable[str]) -> list[Path | Rejected]:
        """Absolute paths of the clips, each once, in the order of the arguments and in natural order of names."""

        found: list[Path | Rejected] = []
        named = list(dict.fromkeys(argument for argument in arguments if argument != "-"))
        for argument in named:
            try:
                if is_url(argument):
                    found.extend(self._locate(url) for url in self._in_store(normal(argument)))
                else:
                    paths = self._named(str(to_path(argument)), alone=len(named) == 1)
                    found.extend(Path(os.path.abspath(path)) for path in paths)
            except (EmtError, OSError, ValueError) as error:
                if not isinstance(error, EmtError):
                    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                    error = EmtError(f"cannot read it: {reason}")
                found.append(Rejected(error, "", shown(normal(argument)) if is_url(argument) else argument))
        distinct = list(dict.fromkeys(found))
        taken = sum(isinstance(path, Path) and self._is_result(path, made=True) for path in distinct)
        if taken:  # named by themselves, so wanted; or by a shell's glob that reached too far
            self._note(f"among the references {'is' if taken == 1 else 'are'} {count(taken, 'result')} of earlier runs")
        return distinct

    def clips(self, folders: Iterable[str]) -> list[Path]:
        """Absolute paths of the clips in folders, in natural order; those of a folder that cannot be read are none."""
        found: list[Path] = []
        for folder in folders:
            with suppress(OSError, EmtError):
                found.extend(Path(os.path.abspath(path)) for path in self._inside(Path(folder)))
        return found

    def _named(self, argument: str, alone: bool) -> list[Path]:
        """The clips that an argument names, the only one or one of several."""
        from emt.video import is_clip

        path = Path(argument)
        if not os.path.lexists(argument):
            matches = sorted((Path(match) for match in glob.glob(argument, recursive=True)), key=_by_name)
            clips = [match for match in matches if is_clip(match)] or matches
            if not clips:
                raise EmtError("no such file", "Name a clip, a folder of clips or a glob that matches some.")
            own = [clip for clip in clips if not self._is_result(clip, made=True)]
            if own and len(own) < len(clips):
                self._note(f"left out: {count(len(clips) - len(own), 'result')} of earlier runs in {argument}")
            return own or clips
        if path.is_dir() and not is_clip(path):
            clips = self._inside(path)
            if not clips and not alone and os.path.realpath(path) == self._out:
                self._note(f"left out: {argument}, the output folder")  # as `*` names it, too
                return []
            if not clips:
                hint = "Name another one" + ("." if self.recursive else ", or search its folders with --recursive.")
                raise EmtError("no clips in this folder", hint)
            return clips
        if path.is_dir():
            self._look_for_unread(path)
        if path.suffix == ".txt" and path.stem in self._clips_of(path.parent):
            return []  # the prompts of the clip beside it, as a shell's `clips/*` names them too
        if path.suffix.lower() in SUFFIXES:
            raise EmtError("a file of prompts or jobs, not a clip", f"Give it with --prompts {shlex.quote(argument)}.")
        return [path]

    def _in_store(self, url: str) -> list[str]:
        """URLs of the clips that a URL names: a file, a folder of clips, or a glob."""
        from emt.video import VIDEO_SUFFIXES

        if url.startswith(("http://", "https://")):
            return [url]
        try:
            is_folder = stat(url).is_folder
        except MissingError:
            matches = matching(url) if re.search(r"[*?\[]", url) else []
            if not matches:
                raise
            made = {child(self._out, name) for name in self._results_among(matches)}
            matches = [match for match in matches if match not in made] or matches
            matches = sorted(matches, key=lambda match: _by_name(Path(match)))
            return [match for match in matches if Path(match).suffix.lower() in VIDEO_SUFFIXES] or matches
        if not is_folder:
            return [url]
        names = [name for name in files(url, recursive=self.recursive) if not re.search(r"(^|/)\.", name)]
        listed = set(names)
        names = [name for name in names if not self._is_published(url, name, listed)]
        clips = [name for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES]
        if not clips:
            deeper = "" if self.recursive else "Search its folders with --recursive. "
            raise EmtError("no clips in this folder", f"{deeper}A folder of frames is read from disk alone.")
        left = {Path(name).stem for name in clips}
        unread = [name for name in names if name not in clips and Path(name).stem not in left]
        if unread:
            more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
            self._note(f"not read in {shown(url)}: {unread[0]}{more}")
        return [child(url, name) for name in sorted(clips, key=lambda name: _by_name(Path(name)))]

    def _inside(self, folder: Path, made: bool = False) -> list[Path]:
        """The clips in a folder, with --recursive in its folders too.

        Args:
            folder: The folder.
            made: It is, or is in, another run's output folder that was found on the way.
        """
        from emt.video import is_clip, natural_key

        self._look_for_unread(folder)
        clips, passed, results = [], 0, 0
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: natural_key(entry.name))
        for entry in listed:
            path = Path(entry.path)
            if entry.name.startswith(".") or os.path.join(self._real(folder), entry.name) == self._out:
                continue
            if is_clip(path):
                if self._is_result(path, made):
                    results += 1
                else:
                    clips.append(path)
            elif entry.is_dir(follow_symlinks=False) and entry.name.lower() not in _OF_SYSTEMS:
                if not self.recursive:
                    passed += 1
                    continue
                try:
                    clips.extend(self._inside(path, made or journal.exists(path)))
                except OSError as error:
                    self._note(f"ignored the folder {path}: {error.strerror}")
        if passed and clips:
            self._note(f"not searched: {count(passed, 'folder')} in {folder} (--recursive does)")
        if results:
            self._note(f"left out: {count(results, 'result')} of earlier runs in {folder}")
        return clips

    def _is_result(self, clip: Path, made: bool = False) -> bool:
        """Return whether a clip was made by a run, by the record beside it.

        Args:
            clip: The clip.
            made: Its folder may be any; without it, only clips in the output folder are looked at.
        """
        if not made:
            real = os.path.join(self._real(clip.parent), clip.name)
            if is_url(self._out) or not real.startswith(os.path.join(self._out, "")):
                return False
        if not os.path.exists(f"{clip}.json"):  # of most clips, of which there may be many
            return False
        try:
            with open_file(sidecar(clip)) as file:
                return {"id", "settings"} <= parse(file.read(_MOST)).keys()
        except OSError:
            return False

    def _real(self, folder: Path) -> str:
        """Path of a folder without links: there may be several ways to the output folder."""
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return self._folders[folder]

    def _is_published(self, url: str, name: str, names: set[str]) -> bool:
        """Return whether an object is of the output folder, or a result in it if that is the folder of the clips."""
        place = child(url, name)
        if not place.startswith(f"{self._out}/"):
            return False
        return not f"{url}/".startswith(f"{self._out}/") or f"{name}.json" in names or name.endswith(".json")

    def _results_among(self, urls: list[str]) -> list[str]:
        """Names in the output folder of the results among URLs."""
        inside = [url.removeprefix(f"{self._out}/") for url in urls if url.startswith(f"{self._out}/")]
        names = set(files(self._out)) if inside else set()
        return [name for name in inside if f"{name}.json" in names]

    def _look_for_unread(self, folder: Path) -> None:
        from emt.video import describe_unread

        with suppress(EmtError):  # said where the folder is read
            if unread := describe_unread(folder):
                self._note(unread)

    def _note(self, text: str) -> None:
        self._said += 1
        if self._said <= _NAMED:
            self._say(f"note: {text}")
        elif self._said == _NAMED + 1:
            self._say("note: … and so in other folders")

    def _clips_of(self, folder: Path) -> set[str]:
        from emt.video import is_clip

        if folder not in self._stems:
            with os.scandir(folder) as entries:
                clips = (Path(entry.path) for entry in entries if not entry.name.endswith(".txt"))
                self._stems[folder] = {path.stem for path in clips if is_clip(path)}
        return self._stems[folder]


def _by_name(path: Path) -> list[Any]:
    """Natural order of paths, folder by folder: `clip2` before `clip10`."""
    from emt.video import natural_key

    return [natural_key(part) for part in path.parts]


def check_order(arguments: Sequence[str], say: Callable[[str], None]) -> None:
    """Say so where a shell has put clips in another order than their numbers'."""
    if len(arguments) > 2 and arguments == sorted(arguments):
        natural = sorted(arguments, key=lambda argument: _by_name(Path(argument)))
        if natural != arguments:
            names = ", ".join(Path(argument).name for argument in arguments[:3])
            say(f"note: --pair takes references in the order given: {names}, …; put a glob in quotes for natural order")


def check_folders(arguments: Sequence[str]) -> list[str]:
    """Folders to watch.

    Raises:
        UsageError: one of the arguments is none.
    """
    for argument in arguments:
        if is_url(argument) or not Path(argument).is_dir():
            raise UsageError(f"--watch {argument}: not a folder on this machine", "Name a folder that is there.")
    return list(arguments)


def with_slashes(reference: str) -> str:
    """A path of a job file as this system writes it: one that Windows wrote has backslashes."""
    slashed = reference.replace("\\", "/")
    return slashed if not os.path.lexists(reference) and os.path.lexists(slashed) else reference
