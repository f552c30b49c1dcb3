"""First frames and playable copies of an output folder's clips, kept in `OUT/report/`.

An output folder may be somebody else's. So nothing outside of it is shown on the word of its journal: results are in
the folder, links out of it are not followed, and a reference, which is elsewhere, is shown only if its content has the
hash that was recorded.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emt.cache import ContentIndex, default_dir
from emt.errors import EmtError, first_line
from emt.remote import is_url
from emt.storage import write_atomically
from emt_cli.batch.jobs import digest
from emt_cli.batch.options import Settings, parse_field
from emt_cli.batch.records import dumps
from emt_cli.batch.results import reference_of
from emt_cli.messages import console as stderr_console

if TYPE_CHECKING:
    import numpy as np

    from emt.video import Clip

FOLDER = "report"

_FORMAT = 1  # of the entries in `FOLDER`
_LONGEST = 512  # pixels, of a copy's longer side
_POSTER = 256
_EMBEDDED = 8 << 20  # bytes of first frames that a page holds itself; of more, it refers to files
_JPEG = "data:image/jpeg;base64,"
_PLAYABLE = (".mp4", ".webm")  # what every browser plays as it is
SAMPLING = ("frames", "height", "width", "fit", "start", "duration", "stride")


def sampling_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling of a job's reference; the defaults for one that was rejected before it had settings.

    Raises:
        EmtError: the settings are damaged.
    """
    given = line.get("settings") or {}
    values = {name: parse_field(name, given[name]) for name in SAMPLING if name in given}
    settings = Settings(**values).as_dict()
    return {name: settings[name] for name in SAMPLING}


def is_inside(out: Path, path: Path) -> bool:
    """Return whether a file, or a folder with all that is in it, is in an output folder and no link out of it."""
    root = os.path.realpath(out)
    names = [path, *(path.iterdir() if path.is_dir() else ())]
    return all(os.path.realpath(name).startswith(os.path.join(root, "")) for name in names)


def read_shown(
    out: Path, line: Mapping[str, Any], index: ContentIndex, size: Callable[[int, int], tuple[int, int]]
) -> Clip:
    """The frames of a job's reference as the job sampled them.

    Args:
        out: The output folder.
        line: The job's line of the journal.
        index: Content hashes.
        size: Width and height to read them in, from those of the clip.

    Raises:
        EmtError: the reference cannot be read, or is not the one that was recorded.
    """
    from emt.video import read_clip

    path, sampling = reference_of(out, line["reference"]), sampling_of(line)
    if not line.get("reference_sha256"):
        raise EmtError("The job has ended before its reference was read.")
    if is_url(line["reference"]) and not path.exists():
        raise EmtError("The reference is not on this machine.", "Fetch what the journal names with --fetch.")
    if index.sha256(path) != line["reference_sha256"]:
        raise EmtError("The reference has changed since.")
    return read_clip(path, size=size(sampling.pop("width"), sampling.pop("height")), **sampling)


class Gallery:
    """Entries of clips for a page: fps, frames, width, height, poster, and `src` or `link`; or a `note` why not.

    Args:
        out: The output folder.
        page: The page's folder, which paths are relative to.
        kept: The output folder whose `report` keeps the first frames and copies; `out` if None.
    """

    def __init__(self, out: Path, page: Path, kept: Path | None = None) -> None:
        self.out, self.page, self.kept = out, page, kept or out
        self.folder = self.kept / FOLDER
        self.index = ContentIndex(default_dir())
        self._embedded = 0

    def show(
        self, references: Iterable[Mapping[str, Any]], results: Iterable[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Entries of the references and of the results of jobs, by their lines in the journal."""
        from concurrent.futures import ThreadPoolExecutor

        from rich.progress import track

        console = stderr_console()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            shown = [pool.submit(_noted, self.reference, line) for line in references]
            made = [pool.submit(_noted, self.result, self.out / line["output"]) for line in results]
            quiet = not console.is_terminal
            for work in track([*shown, *made], "looking at clips", console=console, transient=True, disable=quiet):
                work.result()
        return [self._light(work.result()) for work in shown], [self._light(work.result()) for work in made]

    def reference(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """A job's reference as the job saw it.

        Raises:
            EmtError: it cannot be shown.
        """
        key = digest("report", _FORMAT, line.get("reference_sha256"), sampling_of(line))
        if line.get("reference_sha256") and (known := self._known(key)):
            return known
        clip = read_shown(self.out, line, self.index, _even)
        return self._keep(key, clip.frames, min(max(clip.fps, 0.1), 240.0), copy=True)

    def result(self, path: Path) -> dict[str, Any]:
        """A result.

        Raises:
            EmtError: it cannot be shown.
        """
        from emt.video import probe, read_clip

        if not is_inside(self.out, path):
            raise EmtError("The result is a link out of the folder.")
        playable, link = path.suffix.lower() in _PLAYABLE, self._relative(path)
        key = digest("report", _FORMAT, self.index.sha256(path))
        entry = self._known(key)
        if not entry and playable:
            clip = read_clip(path, frames=1)
            entry = self._keep(key, clip.frames, clip.info.fps, copy=False, count=clip.info.frames)
        elif not entry:
            info = probe(path)
            frames = read_clip(path, frames=info.frames, size=_even(info.width, info.height)).frames
            entry = self._keep(key, frames, info.fps, copy=True)
        return {**entry, "src": link} if playable else {**entry, "link": link}

    def _known(self, key: str) -> dict[str, Any] | None:
        path = self.folder / f"{key}.json"
        try:
            kept = json.loads(path.read_bytes()) if path.is_file() and is_inside(self.kept, path) else None
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(kept, dict) or not _is_entry(kept):
            return None
        entry = {name: kept[name] for name in ("fps", "frames", "width", "height", "poster")}
        return self._with_copy(key, entry, kept["copy"])

    def _with_copy(self, key: str, entry: dict[str, Any], copy: bool) -> dict[str, Any] | None:
        entry = {**entry, "key": key}
        if not copy:
            return entry
        path = self.folder / f"{key}.mp4"
        return {**entry, "src": self._relative(path)} if path.is_file() and is_inside(self.kept, path) else None

    def _keep(self, key: str, frames: np.ndarray, fps: float, *, copy: bool, count: int = 0) -> dict[str, Any]:
        """Make an entry and remember it, if the folder can be written to."""
        from PIL import Image

        from emt.video import write_clip

        poster, data = Image.fromarray(frames[0]), io.BytesIO()
        entry: dict[str, Any] = {
            "fps": fps,
            "frames": count or len(frames),
            "width": poster.width,
            "height": poster.height,
        }
        poster.thumbnail((_POSTER, _POSTER))
        poster.save(data, "JPEG", quality=75, optimize=True)
        entry["poster"] = _JPEG + base64.b64encode(data.getvalue()).decode()
        try:
            self.folder.mkdir(exist_ok=True)
            if not is_inside(self.kept, self.folder):
                raise EmtError(f"{self.folder} is a link out of the folder.")
            if copy:
                write_clip(self.folder / f"{key}.mp4", frames, fps)
            write_atomically(self.folder / f"{key}.json", dumps({**entry, "copy": copy}) + b"\n")
        except (EmtError, OSError) as error:
            return {**entry, "note": reason(error)} if copy else entry
        return self._with_copy(key, entry, copy) or entry

    def _light(self, entry: dict[str, Any]) -> dict[str, Any]:
        """An entry whose first frame is a file of its own if the page holds enough of them."""
        key, poster = entry.pop("key", ""), entry.get("poster", "")
        self._embedded += len(poster)
        if key and self._embedded > _EMBEDDED:
            path = self.folder / f"{key}.jpg"
            with suppress(OSError, ValueError):
                if not path.is_file():
                    write_atomically(path, base64.b64decode(poster.removeprefix(_JPEG)))
                if is_inside(self.kept, path):
                    entry["poster"] = self._relative(path)
        return entry

    def _relative(self, path: Path) -> str:
        """A path as a URL relative to the page."""
        relative = os.path.relpath(path.absolute(), self.page)
        return urllib.parse.quote(os.fsencode(relative.replace(os.sep, "/")))


def _noted(show: Callable[[Any], dict[str, Any]], what: Any) -> dict[str, Any]:
    """An entry, or a note why there is none: whatever is wrong with one clip, the others are shown."""
    try:
        return show(what)
    except Exception as error:
        return {"note": reason(error)}


def _is_entry(kept: dict[str, Any]) -> bool:
    """Return whether a kept entry is as `Gallery` writes them; a page must not request what another one names."""
    sizes = (kept.get(name) for name in ("frames", "width", "height"))
    if not all(type(number) is int and number > 0 for number in sizes):
        return False
    fps, poster = kept.get("fps"), kept.get("poster")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not (math.isfinite(fps) and fps > 0):
        return False
    return isinstance(poster, str) and poster.startswith(_JPEG) and isinstance(kept.get("copy"), bool)


def _even(width: int, height: int) -> tuple[int, int]:
    """The size of a copy: not longer than needed, and even, as H.264 wants it."""
    scale = min(1.0, _LONGEST / max(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def reason(error: Exception) -> str:
    """Reason why a clip cannot be shown, in a line."""
    if isinstance(error, EmtError):
        return error.problem
    return (isinstance(error, OSError) and error.strerror) or first_line(error)
