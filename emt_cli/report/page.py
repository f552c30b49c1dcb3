"""One offline page that shows references and results side by side, playing in sync.

`OUT/report.html` holds the jobs of the journal as JSON, style and script (the template `page.html` beside this module),
and the first frames of the clips, as far as they are not too many. Results that browsers play are referred to by
relative path. Of references, and of results in other formats, there are small H.264 copies in `OUT/report/`, with
exactly the frames that the job sampled, so that frame n of the one stands beside frame n of the other. They are
named after the content and the sampling of what they show, so that they are made once, and still there when a
reference has moved.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emt.errors import EmtError
from emt.evaluate.measures import MEASURES
from emt.storage import check_replaceable, write_atomically
from emt_cli.batch import journal
from emt_cli.batch.records import dumps
from emt_cli.report.gallery import SAMPLING, Gallery
from emt_cli.report.metrics import FILE_NAME as METRICS
from emt_cli.report.metrics import SHOWN, Metrics
from emt_cli.text import short_names

FILE_NAME = "report.html"

_MADE = (
    *("best_of", "model", "engine", "device", "precision", "timings", "peak_memory"),
    *("batch", "adopted", "finished", "id"),
)


def write_report(
    out: Path, output: Path | None = None, compare: Path | None = None, others: Sequence[Path] = ()
) -> Path:
    """Write the page of an output folder, or of several.

    Args:
        out: The folder, with a journal.
        output: The page; `OUT/report.html` if None. It refers to clips by their paths relative to it.
        compare: Another output folder, whose results are beside those of the same reference, prompt and seed.
        others: Further output folders, whose jobs are shown among those of the first.

    Returns:
        The page.

    Raises:
        EmtError: a folder has no journal, or the page cannot be written.
    """
    sides = [[out, *others]] if compare is None else [[out, *others], [compare]]
    for side in sides:
        for folder in side:
            check_folder(folder)
    output = output or out / FILE_NAME
    check_replaceable(output, "page", (b"<!doctype html",))
    content = render(_collect(sides, output.absolute().parent))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, content)
    except OSError as error:
        raise EmtError(f"{output} cannot be written: {error.strerror}.", "Name another file with -o.") from None
    return output


def render(data: Mapping[str, Any]) -> bytes:
    """The page of its content."""
    # In a script element only "<" can end or open anything; inside JSON it stands in strings alone.
    content = dumps(data).replace(b"<", b"\\u003c")
    return Path(__file__).with_suffix(".html").read_bytes().replace(b"@DATA@", content)


def check_folder(out: Path) -> None:
    """Raise an `EmtError` if a folder has no journal."""
    if not journal.exists(out):
        problem = f"{out} has no {journal.FILE_NAME}" if out.is_dir() else f"{out} is not a folder"
        raise EmtError(problem + ".", "Give a folder that `emt transfer --out` has written: emt report OUT")


class _Folder:
    """An output folder on the page.

    Args:
        out: The folder.
        page: The page's folder.
        kept: The output folder that keeps first frames and copies.

    Attributes:
        lines: The last words on its jobs.
        results: Entries of their results by output, once `show` has been called.
    """

    def __init__(self, out: Path, page: Path, kept: Path) -> None:
        self.lines = sorted((line for line in journal.current(out) if line["state"] != "dropped"), key=order_of)
        self.metrics = Metrics.read(out / METRICS)
        self.gallery = Gallery(out, page, kept)
        self.results: dict[str, dict[str, Any]] = {}

    def show(self, references: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Entries of references, by lines of jobs that have them."""
        done = [line for line in self.lines if line["state"] == "done"]
        shown, made = self.gallery.show(references, done)
        self.results = {line["output"]: entry for line, entry in zip(done, made)}
        return shown

    def job(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """State of a job, its result and all that a reader may want to know about them."""
        job = {key: line.get(key) for key in ("state", "error", "hint", "origin", "output", "settings")}
        job["result"] = self.results[line["output"]] if line["state"] == "done" else None
        job["made"] = {key: line[key] for key in _MADE if line.get(key) is not None}
        job["metrics"] = self.metrics.of(line)
        return _short(job)


class _Side:
    """One column of the page: an output folder, or several as one.

    Args:
        outs: The folders.
        page: The page's folder.
        kept: The output folder that keeps first frames and copies.

    Attributes:
        lines: The last words on the jobs of all, in order.
    """

    def __init__(self, outs: Sequence[Path], page: Path, kept: Path) -> None:
        self._folders = [_Folder(out, page, kept) for out in outs]
        self.lines = sorted((line for folder in self._folders for line in folder.lines), key=order_of)
        self._of = {id(line): folder for folder in self._folders for line in folder.lines}

    def show(self, references: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Entries of references, by lines of jobs that have them."""
        wanted = list(references)
        entries: dict[int, dict[str, Any]] = {}
        for folder in self._folders:
            own = [line for line in wanted if self._of[id(line)] is folder]
            entries.update(zip(map(id, own), folder.show(own)))
        return [entries[id(line)] for line in wanted]

    def job(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """State of a job, as its folder has it."""
        return self._of[id(line)].job(line)

    @property
    def summary(self) -> Mapping[str, Any] | None:
        """Means of the measures; None where several folders have their own."""
        return self._folders[0].metrics.summary if len(self._folders) == 1 else None


def _collect(outs: Sequence[Sequence[Path]], page: Path) -> dict[str, Any]:
    """Content of the page, as JSON values."""
    folders = [_Side(side, page, outs[0][0]) for side in outs]
    rows = _side_by_side([folder.lines for folder in folders])
    labels = short_names(line["reference"] for folder in folders for line in folder.lines if line.get("reference"))
    wanted: list[dict[str, Mapping[str, Any]]] = [{} for _ in folders]
    keys: list[str] = []
    for row in rows:
        side, line = next((side, line) for side, line in enumerate(row) if line is not None)
        keys.append(_reference_key(line) if line.get("reference") else "")
        if keys[-1] and not any(keys[-1] in others for others in wanted):
            wanted[side][keys[-1]] = line
    references = [entry for side, folder in enumerate(folders) for entry in folder.show(wanted[side].values())]
    place = {key: number for number, key in enumerate(key for others in wanted for key in others)}
    jobs, settings = [], _Distinct()
    for key, row in zip(keys, rows):
        beside: list[dict[str, Any]] = []
        for folder, own in zip(folders, row):
            shown: dict[str, Any] = folder.job(own) if own is not None else {"state": "absent"}
            if "settings" in shown:
                shown["settings"] = settings.place(shown["settings"])
            beside.append(shown)
        known = next(line for line in row if line is not None)
        job = {**beside[0], "other": beside[1] if len(beside) > 1 else None}
        job |= {"prompt": known.get("prompt"), "seed": known.get("seed")}
        if known.get("reference"):
            job |= {"reference": labels[known["reference"]], "path": known["reference"], "media": place[key]}
        jobs.append(_short(job))
    names = short_names(str(out.absolute()) for side in outs for out in side)
    return {
        "folders": [", ".join(names[str(out.absolute())] for out in side) for side in outs],
        "measures": [{"name": name, **asdict(MEASURES[name])} for name in SHOWN],
        "references": references,
        "settings": settings.values,
        "jobs": jobs,
        "summaries": [folder.summary for folder in folders],
    }


class _Distinct:
    """Distinct JSON values, so that a page holds each once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        """Index of a value in `values`."""
        key = json.dumps(value, sort_keys=True)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that say something."""
    return {key: value for key, value in values.items() if value is not None and value not in ("", {})}


def _side_by_side(folders: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[Mapping[str, Any] | None, ...]]:
    """Rows of the lines of one or several folders that are about the same reference, prompt and seed, in order."""
    rows: dict[tuple[Any, ...], list[Mapping[str, Any] | None]] = {}
    for side, lines in enumerate(folders):
        seen: Counter[tuple[Any, ...]] = Counter()
        for line in lines:
            reference = line.get("reference_sha256") or line.get("reference")
            key = (reference, line.get("prompt"), line.get("seed"))
            if line.get("prompt") is None or reference is None:
                key = (side, line.get("origin"), line.get("error"))
            seen[key] += 1
            rows.setdefault((*key, seen[key]), [None] * len(folders))[side] = line
    return sorted(map(tuple, rows.values()), key=lambda row: order_of(next(line for line in row if line is not None)))


def order_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """By reference (none comes last), prompt and seed: jobs end in an order that depends on the machine."""
    texts = (str(line.get(key) or "") for key in ("reference", "prompt"))
    return not line.get("reference"), *texts, line.get("seed") or 0, str(line.get("output") or line.get("origin") or "")


def _reference_key(line: Mapping[str, Any]) -> str:
    """Key shared by lines with the same sampling of the same reference."""
    settings = line.get("settings") or {}
    return json.dumps([line["reference"], line.get("reference_sha256"), [settings.get(name) for name in SAMPLING]])
