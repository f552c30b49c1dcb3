"""Measures by `emt evaluate` of the clips of an output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from emt.evaluate import measures

FILE_NAME = "metrics.jsonl"
"""In an output folder: the lines of `emt evaluate`."""

_FIRST = ("motion_fidelity", "camera")
#: Measures that a report shows, in order; times are among the facts of a job.
SHOWN = (*_FIRST, *(name for name in measures.MEASURES if name not in (*_FIRST, "seconds")))
_LARGEST = 1e300  # of larger whole numbers no float can be made; that of infinity is none
_ESTIMATE = ("value", "low", "high", "clips")


@dataclass(frozen=True)
class Metrics:
    """Measures of clips; what is no finite number is left out.

    Attributes:
        written: When, in nanoseconds.
        rows: Measures by the last two parts of a result's path; what is before them depends on where it ran.
        summary: Means and intervals by measure.
    """

    written: int = 0
    rows: Mapping[tuple[str, ...], Mapping[str, float]] = field(default_factory=dict)
    summary: Mapping[str, Mapping[str, float]] | None = None

    @classmethod
    def read(cls, path: Path) -> Metrics:
        """Those of a file; none if it cannot be read."""
        rows: dict[tuple[str, ...], dict[str, float]] = {}
        summary = None
        try:
            if not path.is_file():  # reading a pipe would wait for ever
                return cls()
            written, content = path.stat().st_mtime_ns, path.read_bytes()
        except OSError:
            return cls()
        for text in content.splitlines():
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if not isinstance(row, dict):
                continue
            if isinstance(row.get("summary"), dict):
                found = {name: _numbers(row["summary"].get(name), _ESTIMATE) for name in SHOWN}
                summary = {name: estimate for name, estimate in found.items() if "value" in estimate}
            elif isinstance(row.get("result"), str):
                rows[PurePath(row["result"]).parts[-2:]] = _numbers(row, SHOWN)
        return cls(written, rows, summary)

    def of(self, line: Mapping[str, Any]) -> Mapping[str, float] | None:
        """The measures of a finished job, unless its clip has been made anew since."""
        if line["state"] != "done" or line.get("mtime_ns", 0) > self.written:
            return None
        return self.rows.get(PurePath(line["output"]).parts[-2:])


def _numbers(values: Any, names: tuple[str, ...]) -> dict[str, float]:
    """The finite numbers among named values."""
    if not isinstance(values, dict):
        return {}
    found = {name: values.get(name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
    }
