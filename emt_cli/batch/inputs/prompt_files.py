"""Files of prompts and jobs, and jobs on standard input, read line by line."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import select
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from emt.errors import EmtError
from emt.remote import copy_of, fetch, is_url, normal, shown, to_path
from emt.signatures import LENGTH, kind_of
from emt_cli.batch.jobs import Rejected
from emt_cli.batch.options import (
    JOB_FIELDS,
    TEXT_FIELDS,
    UsageError,
    check_together,
    field_name,
    parse_field,
    unknown_field,
    usage_errors,
)

MAX_LINE = 1 << 20  # characters of one line of a job file
_MAX_PROMPTS = 1 << 28  # bytes of a prompts file; /dev/zero has no end
_LINES, _JOB_LINES, _CELLS = ("", ".txt", ".text"), (".jsonl", ".ndjson"), (".csv",)
SUFFIXES = frozenset((*_LINES, *_JOB_LINES, *_CELLS)) - {""}
"""Endings of the names of prompts files; those without an ending may be anything."""
_PROMPT_FILES = "A prompts file is .txt (a prompt a line), .csv or .jsonl (a job a line)."
#: The first bytes of a text file say how it is written; PowerShell writes UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Line:
    """Some fields of a job; the others come from the command line."""

    fields: Mapping[str, Any]
    origin: str = ""


def check_line(fields: Any, origin: str = "") -> Line | Rejected:
    """A line of a job file whose fields are checked and converted, or the reason why it is none."""
    try:
        if not isinstance(fields, dict):
            raise EmtError("the line is not a JSON object", f"A job has the fields {', '.join(JOB_FIELDS)}.")
        named = [(field_name(name), value) for name, value in fields.items()]
        if len(dict(named)) < len(named):
            raise EmtError("a field is given twice, by two of its names", "Give it once.")
        line = Line({name: parse_field(name, value) for name, value in named}, origin)
        check_together(line.fields)
        return line
    except EmtError as error:
        known = fields if isinstance(fields, dict) else {}
        return Rejected(error, origin, str(known.get("reference", "")), str(known.get("prompt", "")))


def read_file(given: Path) -> list[Line | Rejected]:
    """The lines of a prompts file, or of a pipe.

    Args:
        given: Its path or URL.

    Raises:
        UsageError: it cannot be read, is of another kind or has no prompts.
    """
    path = copy_of(str(given)) if is_url(given) else to_path(given)
    kind, named = path.suffix.lower(), f"--prompts {shown(normal(given)) if is_url(given) else str(path)!r}"
    if kind not in (*_LINES, *_JOB_LINES, *_CELLS) and os.path.lexists(path):
        raise UsageError(f"{named} is a {kind} file, which is not read", _PROMPT_FILES)
    if is_url(given):
        with usage_errors():
            fetch(normal(given))
    try:
        text = read_text(path)
    except OSError as error:
        raise UsageError(f"{named}: {(error.strerror or str(error)).lower()}") from None
    except EmtError as error:
        raise UsageError(f"{named} {error.problem}", error.hint) from None
    rows: list[Line | Rejected]
    if kind in _JOB_LINES:
        if (hint := _as_lines(text, path.name)) is not None:
            raise UsageError(f"{named} holds one JSON value over several lines, not a job a line", hint)
        lines = enumerate(text.split("\n"), 1)
        rows = [_parse_line(line, f"{path.name} line {number}") for number, line in lines if line.strip()]
    elif kind in _CELLS:
        rows = _read_csv(path, text)
    else:
        if _is_json(text):
            raise UsageError(f"{named} holds JSON, not a prompt a line", _PROMPT_FILES)
        rows = read_lines(path.name, text)
    if not rows:
        raise UsageError(f"{named} has no prompts", _PROMPT_FILES)
    return rows


def read_text(path: Path) -> str:
    """The text of a file or a pipe, its lines ended by `\\n`; bytes that are not UTF-8 become surrogates.

    Raises:
        OSError: it cannot be read.
        EmtError: it is no text, or has no end.
    """
    with open(path, "rb") as file:
        data = file.read(_MAX_PROMPTS + 1)
    if len(data) > _MAX_PROMPTS:
        raise EmtError(f"is larger than {_MAX_PROMPTS >> 20} MiB", "Split it.")
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8")
    if kind := kind_of(data[:LENGTH]):
        raise EmtError(f"is {kind}, no plain text", "Save it as text in UTF-8.")
    try:
        start = data[:4096]
        if encoding == "utf-8" and start.count(0) > len(start) / 8:
            raise ValueError
        text = data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except ValueError:
        raise EmtError("is no text in UTF-8", "Save it as text in UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _as_lines(text: str, name: str) -> str | None:
    """A hint how to make a job a line of JSON that is spread over several; None for a text that is not."""
    first, _, others = text.strip().partition("\n")
    try:
        json.loads(first)
        return None
    except (ValueError, RecursionError):
        pass
    try:
        value = json.loads(text) if others else None
    except (ValueError, RecursionError):
        return None
    return None if value is None else f"jq -c {'.[]' if isinstance(value, list) else '.'} {shlex.quote(name)}"


def _is_json(text: str) -> bool:
    """Return whether a text is a JSON object or list, or its first line is an object."""
    text = text.strip()
    if text[:1] not in ("{", "["):
        return False
    for part in (text, text.split("\n", 1)[0]):
        try:
            value = json.loads(part)
        except RecursionError:
            return True
        except ValueError:
            continue
        return isinstance(value, dict) or part is text
    return False


def read_lines(name: str, text: str) -> list[Line | Rejected]:
    """The prompts of a text, one a line; `#` begins a comment."""
    # A mark of UTF-8 is within a text, too, where files were put together.
    lines = [(n, line.strip().lstrip("\ufeff").strip()) for n, line in enumerate(text.split("\n"), 1)]
    return [check_line({"prompt": line}, f"{name} line {n}") for n, line in lines if line and not line.startswith("#")]


def _read_csv(path: Path, text: str) -> list[Line | Rejected]:
    rows: list[Line | Rejected] = []
    number = 1
    table = read_table(text, _are_fields)
    try:
        for number, cells in table.rows:
            origin = f"{path.name} line {number}"
            if not rows:
                _check_columns(path, table.names)
            if any(not name and cell.strip() for name, cell in zip_longest(table.names, cells, fillvalue="")):
                rows.append(Rejected(EmtError("the line has more cells than columns", "Quote commas."), origin))
                continue
            fields = {name: cell for name, cell in zip(table.names, cells) if name and cell}
            if table.delimiter == ";":  # of languages whose decimal point is a comma
                fields = {name: _with_point(name, cell) for name, cell in fields.items()}
            rows.append(check_line(fields, origin))
    except csv.Error as error:
        rows.append(Rejected(EmtError(f"not CSV from here on: {error}"), f"{path.name} line {number}"))
    if not rows:
        _check_columns(path, table.names)
    return rows


def _check_columns(path: Path, given: Sequence[str]) -> None:
    """Raise a UsageError unless the columns of a table are fields of a job, each once."""
    names = [field_name(name) for name in given if name]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise UsageError(f"--prompts {path.name}: the column {twice[0]} is there twice", "Keep one of them.")
    unknown = [name for name in given if name and field_name(name) not in JOB_FIELDS]
    if unknown or not names:
        hint = unknown_field(unknown[0]).hint if unknown else f"They are of {', '.join(JOB_FIELDS)}."
        problem = f"unknown columns {unknown}" if unknown else "it names no columns"
        raise UsageError(
            f"--prompts {path.name}: {problem}; the first line names the columns, between commas, semicolons or tabs",
            hint,
        )


def _with_point(name: str, cell: str) -> str:
    """A number with a point for its comma; another cell as it is."""
    return (
        cell.replace(",", ".") if field_name(name) not in TEXT_FIELDS and re.fullmatch(r"\s*\d+,\d+\s*", cell) else cell
    )


def _are_fields(names: Sequence[str]) -> bool:
    return all(field_name(name) in JOB_FIELDS for name in names)


@dataclass(frozen=True)
class Table:
    """A table of a text file.

    Attributes:
        names: Of its columns, by its first line; empty ones have none.
        delimiter: Between cells.
        rows: The other lines that have any cell, each with the number of its last line.
    """

    names: Sequence[str]
    delimiter: str
    rows: Iterator[tuple[int, Sequence[str]]]


def read_table(text: str, are_columns: Callable[[Sequence[str]], bool]) -> Table:
    """Read a table with commas, semicolons or tabs between its cells.

    Empty lines count nowhere, nor does the line `sep=;` that spreadsheets write before all others, nor do comments:
    lines that begin with `#` outside of quotes, as in a file of prompts; before the names of the columns, with `# `.

    Args:
        text: The table.
        are_columns: Whether names are those of such a table's columns.

    Raises:
        csv.Error: while rows are read: from there on it is no table.
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a cell that is too long is for its own line to fail
    body = re.sub(r"\A(?:\s*\n|# .*\n)+", "", text)
    mark = re.match(r"sep=([,;\t])\n", body)
    body = body[mark.end() :] if mark else body
    before = text[: len(text) - len(body)].count("\n")
    delimiter = mark[1] if mark else delimiter_of(body, are_columns)
    head = csv.reader(io.StringIO(body.split("\n", 1)[0], newline=""), delimiter=delimiter, skipinitialspace=True)
    names = [name.strip() for name in next(head, [])]

    def rows() -> Iterator[tuple[int, Sequence[str]]]:
        number, is_begun = before, True  # lines read so far; whether a row goes on: a cell may have several

        def lines() -> Iterator[str]:
            nonlocal number, is_begun
            for line in io.StringIO(body, newline=""):
                number += 1
                if is_begun or not line.lstrip().startswith("#"):
                    is_begun = True
                    yield line

        reader = csv.reader(lines(), delimiter=delimiter, skipinitialspace=True, strict=True)
        for place, cells in enumerate(reader):
            is_begun = False
            if place and any(cell.strip() for cell in cells):
                yield number, cells

    return Table(names, delimiter, rows())


def delimiter_of(text: str, are_columns: Callable[[Sequence[str]], bool]) -> str:
    """Delimiter of a table's cells, by its first line; spreadsheets write semicolons in many languages.

    Args:
        text: The table.
        are_columns: Whether names are those of such a table's columns.
    """
    head = text.split("\n", 1)[0]

    def fits(delimiter: str) -> bool:
        with suppress(csv.Error):
            names = [name for name in map(str.strip, next(csv.reader([head], delimiter=delimiter), [])) if name]
            return len(names) > 1 and are_columns(names)
        return False

    return next((delimiter for delimiter in ",;\t" if fits(delimiter)), ",")


def _parse_line(line: str, origin: str) -> Line | Rejected:
    try:
        return check_line(json.loads(line, object_pairs_hook=_once), origin)
    except (ValueError, RecursionError) as error:
        return Rejected(EmtError("the line is not JSON", f"{error}. A job is one line, as `jq -c` writes it."), origin)
    except EmtError as error:
        return Rejected(error, origin)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different; which of two values holds is nobody's guess."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for place, (name, _) in enumerate(pairs) if name in dict(pairs[:place]))
        raise EmtError(f"the field {twice!r:.100} is given twice", "Give it once.")
    return fields


def check_stream() -> None:
    """Raise a UsageError if standard input is closed."""
    if sys.stdin is None:
        raise UsageError("- reads jobs from standard input, which is closed")


def read_stream() -> Iterator[Line | Rejected | None]:
    """Lines of standard input as they arrive, and None whenever the next one is yet to come."""
    descriptor = sys.stdin.fileno()
    pending, number, ended, skipping = b"", 0, False, False
    decoder: codecs.IncrementalDecoder | None = None  # of what is not UTF-8, by its first bytes
    begins = True
    while not ended or pending:
        line, newline, rest = pending.partition(b"\n")
        if len(line) > MAX_LINE and not skipping:
            skipping = True
            yield Rejected(EmtError("the line is too long", f"At most {MAX_LINE:,} bytes."), f"line {number + 1}")
        if not newline and not ended:
            if not _has_more(descriptor):
                yield None
            try:
                chunk = os.read(descriptor, 1 << 16)
            except OSError as error:
                yield Rejected(EmtError(f"standard input cannot be read: {error.strerror}"), f"line {number + 1}")
                return
            ended = not chunk
            if begins:
                encoding = next((name for mark, name in _MARKS.items() if chunk.startswith(mark)), "utf-8")
                decoder = None if encoding.startswith("utf-8") else codecs.getincrementaldecoder(encoding)("replace")
            begins = False
            chunk = decoder.decode(chunk, ended).encode() if decoder else chunk
            pending = chunk if skipping else pending + chunk
            continue
        pending, number = rest, number + 1
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip() and not skipping:
            yield _parse_line(line.decode(errors="surrogateescape"), f"line {number}")
        skipping = False


def _has_more(descriptor: int) -> bool:
    """Return whether reading does not wait; where that cannot be seen, as on pipes of Windows, it may."""
    try:
        return bool(select.select([descriptor], [], [], 0)[0])
    except OSError:
        return False
