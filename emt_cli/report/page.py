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
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from emt.errors import EmtError
from emt.storage import write_atomically
from emt_cli.batch import journal
from emt_cli.batch.records import dumps
from emt_cli.report.gallery import SAMPLING, Gallery
from emt_cli.report.metrics import FILE_NAME as METRICS
from emt_cli.report.metrics import Metrics

FILE_NAME = "report.html"

_MADE = (
    *("best_of", "model", "engine", "device", "precision", "timings", "peak_memory"),
    *("batch", "adopted", "finished", "id"),
)


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
    content = dumps(data).replace(b"<", b"\\u003c")
    template = Path(__file__).with_suffix(".html").read_bytes()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, template.replace(b"@DATA@", content))
    except OSError as error:
        raise EmtError(f"{output} cannot be written: {error.strerror}.", "Name another file with -o.") from None
    return output


def check_folder(out: Path) -> None:
    """Raise an `EmtError` if a folder has no journal."""
    if not journal.exists(out):
        problem = f"{out} has no {journal.FILE_NAME}" if out.is_dir() else f"{out} is not a folder"
        raise EmtError(problem + ".", "Give a folder that `emt transfer --out` has written: emt report OUT")


def _collect(out: Path, page: Path) -> dict[str, Any]:
    """Content of the page, as JSON values."""
    lines = sorted((line for line in journal.current(out) if line["state"] != "dropped"), key=order_of)
    metrics = Metrics.read(out / METRICS)
    labels = _labels(line["reference"] for line in lines if line.get("reference"))
    wanted: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        if line.get("reference"):
            wanted.setdefault(_reference_key(line), line)
    place = {key: number for number, key in enumerate(wanted)}
    references, results = Gallery(out, page).show(wanted.values(), (line for line in lines if line["state"] == "done"))
    made = iter(results)
    jobs = []
    for line in lines:
        job = {key: line.get(key) for key in ("state", "prompt", "seed", "error", "hint", "origin", "output")}
        job |= {"settings": line.get("settings"), "result": next(made) if line["state"] == "done" else None}
        job["made"] = {key: line[key] for key in _MADE if line.get(key) is not None}
        if line.get("reference"):
            job |= {"reference": labels[line["reference"]], "path": line["reference"]}
            job["media"] = place[_reference_key(line)]
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


def _reference_key(line: Mapping[str, Any]) -> str:
    """Key shared by lines with the same sampling of the same reference."""
    settings = line.get("settings") or {}
    return json.dumps([line["reference"], line.get("reference_sha256"), [settings.get(name) for name in SAMPLING]])
