"""One offline page that shows references and results side by side, playing in sync.

`OUT/report.html` holds everything but the clips: the jobs of the journal as JSON, first frames as JPEG data
URIs, style and script (the template `report.html` beside this module). Results that browsers play are referred to by
relative path. Of references, and of results in other formats, there are small H.264 copies in `OUT/report/`, with
exactly the frames that the job sampled, so that frame n of the one stands beside frame n of the other. They are
named after the content and the view of what they show, so that they are made once, and still there when a
reference has moved.
"""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from emt.errors import EmtError
from emt.storage import write_atomically
from emt_cli.batch import journal

if TYPE_CHECKING:
    import numpy as np

FILE_NAME = "report.html"
FOLDER = "report"
METRICS = "metrics.jsonl"

_FORMAT = 1  # of the entries in `FOLDER`
_LONGEST = 512  # pixels, of a copy's longer side
_POSTER = 256
_PLAYABLE = (".mp4", ".webm")  # what every browser plays as it is
_VIEW = ("frames", "height", "width", "fit", "start", "duration", "stride")
_MADE = (
    *("best_of", "model", "engine", "device", "precision", "timings", "peak_memory"),
    *("batch", "adopted", "finished", "id"),
)
_MEASURES = ("motion_fidelity", "camera", "temporal_consistency", "text_alignment", "leakage")
_UNREADABLE = (EmtError, OSError, ValueError)


def write_report(out: Path, output: Path | None = None) -> Path:
    """Write the page of an output folder.

    Args:
        out: The folder, with a journal.
        output: The page; `OUT/report.html` if None. It refers to clips by their paths relative to it.

    Returns:
        The page.

    Raises:
        EmtError: the folder has no journal, or the page cannot be written.
    """
    check_folder(out)
    output = output or out / FILE_NAME
    data = _collect(out, output.absolute().parent)
    # In a script element only "<" can end or open anything; inside JSON it stands in strings alone.
    content = journal.dumps(data).replace(b"<", b"\\u003c")
    template = Path(__file__).with_suffix(".html").read_bytes()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, template.replace(b"@DATA@", content))
    except OSError as error:
        raise EmtError(f"{output} cannot be written: {error.strerror}.", "Name another file with -o.") from None
    return output


def check_folder(out: Path) -> None:
    """Raise an `EmtError` if a folder has no journal."""
    if not (out / journal.FILE_NAME).is_file():
        problem = f"{out} has no {journal.FILE_NAME}" if out.is_dir() else f"{out} is not a folder"
        raise EmtError(problem + ".", "Give a folder that `emt transfer --out` has written: emt report OUT")


def _collect(out: Path, page: Path) -> dict[str, Any]:
    """What the page shows, as JSON values."""
    lines = sorted((line for line in journal.current(out) if line["state"] != "dropped"), key=order_of)
    metrics = _Metrics.read(out / METRICS)
    labels = _labels(line["reference"] for line in lines if line.get("reference"))
    gallery = _Gallery(out, page)
    references, shown = gallery.show(lines)
    jobs = []
    for line, (reference, result) in zip(lines, shown):
        job = {key: line.get(key) for key in ("state", "prompt", "seed", "error", "hint", "origin", "output")}
        job |= {"media": reference, "result": result, "settings": line.get("settings"), "reference": None}
        job["made"] = {key: line[key] for key in _MADE if line.get(key) is not None}
        if line.get("reference"):
            job |= {"reference": labels[line["reference"]], "path": line["reference"]}
        job["metrics"] = metrics.of(line)
        jobs.append({key: value for key, value in job.items() if value not in (None, "", {})})
    return {"title": out.absolute().name, "references": references, "jobs": jobs, "summary": metrics.summary}


def order_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """By reference (none comes last), prompt and seed: jobs end in an order that depends on the machine."""
    texts = (str(line.get(key) or "") for key in ("reference", "prompt"))
    return not line.get("reference"), *texts, line.get("seed") or 0, str(line.get("output") or line.get("origin") or "")


def _labels(paths: Iterable[str]) -> dict[str, str]:
    """A short name for each path: the file's, with its folder's where two files share it."""
    distinct = sorted(set(paths))
    count = Counter(PurePath(path).name for path in distinct)
    return {path: "/".join(PurePath(path).parts[-1 if count[PurePath(path).name] == 1 else -2 :]) for path in distinct}


@dataclass(frozen=True)
class _Metrics:
    """What `emt evaluate --output` wrote, if it did.

    Attributes:
        written: When, in nanoseconds.
        rows: Measures by the last two parts of a result's path; what is before them depends on where it ran.
        summary: Means and intervals by measure.
    """

    written: int = 0
    rows: dict[tuple[str, ...], dict[str, float]] = field(default_factory=dict)
    summary: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> _Metrics:
        rows: dict[tuple[str, ...], dict[str, float]] = {}
        summary = None
        try:
            written, content = path.stat().st_mtime_ns, path.read_bytes()
        except OSError:
            return cls()
        for text in content.splitlines():
            with suppress(ValueError):
                row = json.loads(text)
                if isinstance(row, dict) and isinstance(row.get("summary"), dict):
                    summary = row["summary"]
                elif isinstance(row, dict) and isinstance(row.get("result"), str):
                    values = {name: row[name] for name in _MEASURES if isinstance(row.get(name), (int, float))}
                    rows[PurePath(row["result"]).parts[-2:]] = values
        return cls(written, rows, summary)

    def of(self, line: dict[str, Any]) -> dict[str, float] | None:
        """The measures of a finished job, unless its clip has been made anew since."""
        if line["state"] != "done" or line.get("mtime_ns", 0) > self.written:
            return None
        return self.rows.get(PurePath(line["output"]).parts[-2:])


class _Gallery:
    """First frames and playable copies of clips, kept in `OUT/report/`.

    Args:
        out: The output folder.
        page: The page's folder.
    """

    def __init__(self, out: Path, page: Path) -> None:
        from emt.cache import ContentIndex, default_dir

        self.out, self.page, self.folder = out, page, out / FOLDER
        self.index = ContentIndex(default_dir())

    def show(self, lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Iterator[tuple[int | None, Any]]]:
        """The distinct references, and for each line which of them it shows and its result."""
        from concurrent.futures import ThreadPoolExecutor

        from rich.console import Console
        from rich.progress import track

        wanted: dict[str, dict[str, Any]] = {}
        for line in lines:
            if line.get("reference"):
                wanted.setdefault(_reference_key(line), line)
        results = [self.out / line["output"] if line["state"] == "done" else None for line in lines]
        console = Console(stderr=True)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            work = [*(pool.submit(self.reference, line) for line in wanted.values())]
            work += [pool.submit(self.result, path) for path in results if path]
            quiet = not console.is_terminal
            for job in track(work, "looking at clips", console=console, transient=True, disable=quiet):
                job.result()
        references = [job.result() for job in work[: len(wanted)]]
        made = iter(work[len(wanted) :])
        place = {key: number for number, key in enumerate(wanted)}
        return references, (
            (place[_reference_key(line)] if line.get("reference") else None, next(made).result() if path else None)
            for line, path in zip(lines, results)
        )

    def reference(self, line: dict[str, Any]) -> dict[str, Any]:
        """A job's reference as the job saw it, or a note why it cannot be shown."""
        from emt.video import read_clip
        from emt_cli.batch.jobs import digest

        path, view, recorded = self.out / line["reference"], view_of(line), line.get("reference_sha256")
        try:
            found = None if recorded else self.index.sha256(path)
            key = digest("report", _FORMAT, recorded or found, view)
            if known := self._known(key):
                return known
            if recorded and recorded != self.index.sha256(path):
                return {"note": "The reference has changed since."}
            size = _even(view.pop("width"), view.pop("height"))
            clip = read_clip(path, size=size, **view)
            return self._keep(key, clip.frames, min(max(clip.fps, 0.1), 240.0), copy=True)
        except _UNREADABLE as error:
            return {"note": _reason(error)}

    def result(self, path: Path) -> dict[str, Any]:
        """A result, or a note why it cannot be shown."""
        from emt.video import probe, read_clip
        from emt_cli.batch.jobs import digest

        playable = path.suffix.lower() in _PLAYABLE
        link = {"link": self._relative(path)}
        try:
            key = digest("report", _FORMAT, self.index.sha256(path))
            entry = self._known(key)
            if not entry and playable:
                clip = read_clip(path, frames=1)
                entry = self._keep(key, clip.frames, clip.info.fps, copy=False, count=clip.info.frames)
            elif not entry:
                info = probe(path)
                frames = read_clip(path, frames=info.frames, size=_even(info.width, info.height)).frames
                entry = self._keep(key, frames, info.fps, copy=True)
            return {**entry, "src": link["link"]} if playable else {**entry, **link}
        except _UNREADABLE as error:
            return {"note": _reason(error)}

    def _known(self, key: str) -> dict[str, Any] | None:
        try:
            entry = json.loads((self.folder / f"{key}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return self._with_copy(key, entry) if isinstance(entry, dict) else None

    def _with_copy(self, key: str, entry: dict[str, Any]) -> dict[str, Any] | None:
        if not entry.pop("copy"):
            return entry
        copy = self.folder / f"{key}.mp4"
        return {**entry, "src": self._relative(copy)} if copy.is_file() else None

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
        entry["poster"] = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        try:
            if copy:
                write_clip(self.folder / f"{key}.mp4", frames, fps)
            self.folder.mkdir(exist_ok=True)
            write_atomically(self.folder / f"{key}.json", journal.dumps({**entry, "copy": copy}) + b"\n")
        except (EmtError, OSError) as error:
            return {**entry, "note": _reason(error)} if copy else entry
        return self._with_copy(key, {**entry, "copy": copy}) or entry

    def _relative(self, path: Path) -> str:
        """A path as a URL relative to the page."""
        relative = os.path.relpath(path.absolute(), self.page)
        return urllib.parse.quote(os.fsencode(relative.replace(os.sep, "/")))


def view_of(line: dict[str, Any]) -> dict[str, Any]:
    """How a job read its reference; the defaults for one that was rejected before it had settings."""
    from emt_cli.batch.options import Settings

    settings = {**Settings().as_dict(), **(line.get("settings") or {})}
    return {name: settings[name] for name in _VIEW}


def _reference_key(line: dict[str, Any]) -> str:
    return json.dumps([line["reference"], line.get("reference_sha256"), view_of(line)])


def _even(width: int, height: int) -> tuple[int, int]:
    """The size of a copy: not longer than needed, and even, as H.264 wants it."""
    scale = min(1.0, _LONGEST / max(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def _reason(error: Exception) -> str:
    if isinstance(error, EmtError):
        return error.problem
    return (isinstance(error, OSError) and error.strerror) or str(error)
