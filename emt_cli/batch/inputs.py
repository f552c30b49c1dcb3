"""Reading of what the user gave: the command line's references and prompts, prompt files, and standard input."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from emt.errors import EmtError
from emt.presets import preset_values
from emt.vocabulary import Vocabulary
from emt_cli.batch.jobs import Item, Job, Rejected
from emt_cli.batch.options import (
    JOB_FIELDS,
    SETTING_NAMES,
    Preset,
    Settings,
    TransferOptions,
    UsageError,
    parse_defaults,
    parse_field,
    parse_seeds,
)

MAX_LINE = 1 << 20  # characters of one line of a job file
_NAMED = 8  # unknown words that a warning names
_LONGEST = 700  # characters of a line of known ones


@dataclass(frozen=True)
class _Line:
    """Some fields of a job; the others come from the command line."""

    fields: Mapping[str, Any]
    origin: str = ""


@dataclass(frozen=True)
class _Base:
    """The settings that jobs start from: the model's own, and what the command line sets."""

    defaults: Mapping[str, Any]
    given: Mapping[str, Any]

    def settings(self, own: Mapping[str, Any]) -> Settings:
        """The settings of a job whose own line sets some: it wins over the command line, and both over presets."""
        given = {**self.given, **own}
        preset = preset_values(given.get("preset", Preset.EXACT).value, self.defaults.get("steps", Settings.steps))
        preset = {name: parse_field(name, value) for name, value in preset.items()}
        return Settings(**{**self.defaults, **preset, **given})


def expand(options: TransferOptions, defaults: Mapping[str, Any]) -> tuple[list[Job | Rejected], Iterator[Item]]:
    """All jobs of a command line.

    Args:
        options: The command line.
        defaults: The model's own defaults, by setting.

    Returns:
        The jobs that are named, those of one shape and one reference next to each other; and those that
        arrive on standard input, if it was asked for, line by line as they do.

    Raises:
        UsageError: the command line makes no sense (no prompts file, unequal `--pair`, nothing to do).
    """
    arguments = list(options.references or [])
    prompts = [_checked({"prompt": text}) for text in options.prompt or []]
    prompts += [row for path in options.prompts or [] for row in _read_file(path)]
    complete = [row for row in prompts if isinstance(row, _Line) and "reference" in row.fields]
    rejected = [row for row in prompts if isinstance(row, Rejected)]
    loose = [row for row in prompts if isinstance(row, _Line) and "reference" not in row.fields]
    if not arguments and not complete:
        raise UsageError("no references: name clips, folders or globs, or - for jobs on standard input")
    streamed = "-" in arguments
    references = _find([argument for argument in arguments if argument != "-"], options.recursive, options.out)
    base = _Base(parse_defaults(defaults), options.settings)
    seeds = parse_seeds(options.seeds)

    pairs: Iterable[tuple[Path | Rejected | None, _Line | Rejected | None]]
    if options.pair:
        if len(references) != len(prompts):
            counts = f"here are {len(references)} and {len(prompts)}"
            raise UsageError(f"--pair needs as many prompts as references; {counts}")
        pairs = zip(references, prompts)
    else:
        each: Sequence[_Line | None] = loose or ([] if rejected or streamed else [None])
        pairs = [(reference, row) for reference in references for row in each]
        pairs = [*pairs, *((None, row) for row in complete), *((None, row) for row in rejected)]
    listed = _together(item for reference, row in pairs for item in _jobs(reference, row, base, seeds))
    return listed, _streamed(references, loose, base, seeds) if streamed else iter(())


def _streamed(
    references: Sequence[Path | Rejected], prompts: Sequence[_Line], base: _Base, seeds: list[int]
) -> Iterator[Item]:
    nothing: Sequence[None] = [None]
    for row in _read_stream():
        if not isinstance(row, _Line):
            yield row
            continue
        for reference in nothing if "reference" in row.fields else references or nothing:
            for prompt in [_Line({})] if "prompt" in row.fields else prompts or [_Line({})]:
                yield from _jobs(reference, replace(row, fields={**prompt.fields, **row.fields}), base, seeds)


def _jobs(
    reference: Path | Rejected | None, row: _Line | Rejected | None, base: _Base, seeds: list[int]
) -> Iterator[Job | Rejected]:
    """The jobs of one reference (or the row's own) and one row (or the prompts beside the clip)."""
    for given in (reference, row):
        if isinstance(given, Rejected):
            yield given
            return
    fields = row.fields if isinstance(row, _Line) else {}
    origin = row.origin if isinstance(row, _Line) else ""
    path = Path(os.path.abspath(fields["reference"])) if "reference" in fields else reference
    if not isinstance(path, Path):
        yield Rejected(EmtError("the job has no reference", 'Give "reference", or name clips before it.'), origin)
        return
    texts: list[_Line | Rejected] = (
        [_Line({"prompt": fields["prompt"]}, origin)] if "prompt" in fields else _beside(path)
    )
    own = tuple(name for name in SETTING_NAMES if name in fields)
    settings = base.settings({name: fields[name] for name in own})
    for text in texts:
        if isinstance(text, Rejected):
            yield replace(text, origin=origin or text.origin)
            continue
        for seed in [fields["seed"]] if "seed" in fields else seeds:
            yield Job(path, text.fields["prompt"], seed, settings, own, text.origin)


def _together(items: Iterable[Job | Rejected]) -> list[Job | Rejected]:
    """Jobs of one shape, and in it of one reference, next to each other; otherwise in the order given."""
    listed = list(items)
    order: dict[Any, int] = {}
    for item in listed:
        if isinstance(item, Job):
            order.setdefault(item.shape, len(order))
            order.setdefault((item.reference, str(item.sampling)), len(order))

    def place(item: Job | Rejected) -> tuple[int, int]:
        if isinstance(item, Rejected):
            return (-1, -1)
        return order[item.shape], order[item.reference, str(item.sampling)]

    return sorted(listed, key=place)


def _checked(fields: Any, origin: str = "") -> _Line | Rejected:
    try:
        if not isinstance(fields, dict):
            raise EmtError("the line is not a JSON object", f"A job has the fields {', '.join(JOB_FIELDS)}.")
        return _Line({name: parse_field(name, value) for name, value in fields.items()}, origin)
    except EmtError as error:
        known = fields if isinstance(fields, dict) else {}
        return Rejected(error, origin, str(known.get("reference", "")), str(known.get("prompt", "")))


def _read_file(path: Path) -> list[_Line | Rejected]:
    try:
        if not path.is_file():
            raise UsageError(f"--prompts {str(path)!r}: no such file")
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UsageError(f"--prompts {str(path)!r}: {error.strerror}") from None
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        lines = enumerate(text.split("\n"), 1)
        return [_parse_line(line, f"{path.name} line {number}") for number, line in lines if line.strip()]
    if path.suffix.lower() == ".csv":
        return _read_csv(path, text)
    return _read_lines(path.name, text)


def _read_lines(name: str, text: str) -> list[_Line | Rejected]:
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    return [_checked({"prompt": line}, f"{name} line {n}") for n, line in lines if line and not line.startswith("#")]


def _read_csv(path: Path, text: str) -> list[_Line | Rejected]:
    csv.field_size_limit(MAX_LINE)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[_Line | Rejected] = []
    try:
        unknown = [name for name in reader.fieldnames or [] if name not in JOB_FIELDS]
        if unknown or not reader.fieldnames:
            allowed = f"the first line names the columns, of {', '.join(JOB_FIELDS)}"
            raise UsageError(f"--prompts {path.name}: unknown columns {unknown}; {allowed}")
        for cells in reader:
            origin = f"{path.name} line {reader.line_num}"
            if None in cells:
                rows.append(Rejected(EmtError("the line has more cells than columns", "Quote commas."), origin))
            else:
                rows.append(_checked({name: cell for name, cell in cells.items() if cell}, origin))
    except csv.Error as error:
        rows.append(Rejected(EmtError(f"not CSV from here on: {error}"), f"{path.name} line {reader.line_num}"))
    return rows


def _parse_line(line: str, origin: str) -> _Line | Rejected:
    try:
        return _checked(json.loads(line), origin)
    except (ValueError, RecursionError) as error:
        return Rejected(EmtError("the line is not JSON", f"{error}."), origin)


def _read_stream() -> Iterator[_Line | Rejected | None]:
    """Lines of standard input as they arrive, and None whenever the next one is yet to come."""
    descriptor = sys.stdin.fileno()
    pending, number, ended = b"", 0, False
    while not ended or pending:
        line, newline, rest = pending.partition(b"\n")
        if not newline and not ended:
            if len(pending) > MAX_LINE:
                yield Rejected(EmtError("the line is too long", f"At most {MAX_LINE:,} bytes."), f"line {number + 1}")
                raise EmtError(f"standard input is no JSON Lines after line {number}", "Write one JSON object a line.")
            if not select.select([descriptor], [], [], 0)[0]:
                yield None
            chunk = os.read(descriptor, 1 << 16)
            ended = not chunk
            pending += chunk
            continue
        pending, number = rest, number + 1
        if line.strip():
            yield _parse_line(line.decode(errors="surrogateescape"), f"line {number}")


def _beside(reference: Path) -> list[_Line | Rejected]:
    """The prompts in `clip.txt` beside `clip.mp4`."""
    companion = reference.with_suffix(".txt")
    rows: list[_Line | Rejected] = []
    if companion != reference and companion.is_file():
        try:
            text = companion.read_text(encoding="utf-8-sig", errors="surrogateescape")
        except OSError as error:
            return [Rejected(EmtError(f"cannot read {companion.name}: {error.strerror}"), "", str(reference))]
        rows = _read_lines(companion.name, text)
    problem = EmtError("no prompt", f"Give --prompt or --prompts, or write {companion.name} beside the clip.")
    return rows or [Rejected(problem, "", str(reference))]


def _find(arguments: Iterable[str], recursive: bool, out: Path) -> list[Path | Rejected]:
    """The clips that arguments name, each once, in order; results in `out` are no references unless named."""
    found: list[Path | Rejected] = []
    for argument in arguments:
        try:
            found.extend(Path(os.path.abspath(path)) for path in _find_one(argument, recursive, out))
        except EmtError as error:
            found.append(Rejected(error, "", argument))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            found.append(Rejected(EmtError(f"cannot read it: {reason}"), "", argument))
    return list(dict.fromkeys(found))


def _find_one(argument: str, recursive: bool, out: Path) -> list[Path]:
    from emt.video import is_clip

    path = Path(argument)
    if not os.path.lexists(argument):
        matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
        clips = [match for match in matches if is_clip(match)] or matches
        if not clips:
            raise EmtError("no such file", "Name a clip, a folder of clips or a glob that matches some.")
        return clips
    if path.is_dir() and not is_clip(path):
        clips = _clips_in(path, recursive, os.path.abspath(out))
        if not clips:
            hint = "Name another one" + ("." if recursive else ", or search its folders with --recursive.")
            raise EmtError("no clips in this folder", hint)
        return clips
    if path.suffix == ".txt" and any(is_clip(other) for other in path.parent.glob(glob.escape(path.stem) + ".*")):
        return []  # the prompts of the clip beside it, as a shell's `clips/*` names them too
    return [path]


def _clips_in(folder: Path, recursive: bool, without: str) -> list[Path]:
    from emt.video import is_clip

    clips = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.name.startswith(".") or os.path.abspath(path) == without:
                continue
            if is_clip(path):
                clips.append(path)
            elif recursive and entry.is_dir(follow_symlinks=False):
                clips.extend(_clips_in(path, recursive, without))
    return clips


# ---- words -----------------------------------------------------------------------------------------------------


class UnknownWords:
    """Warnings of words of prompts that a model does not know, one for each word.

    Args:
        model: Name of the model in warnings.
        vocabulary: Its words; None for a model that reads any.
        say: Called with each line.
    """

    def __init__(self, model: str, vocabulary: Vocabulary | None, say: Callable[[str], None]) -> None:
        self.model, self.vocabulary, self._say = model, vocabulary, say
        self._seen: set[str] = set()

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass items on as they come, after a look at each job."""
        for item in items:
            self.look([item])
            yield item

    def look(self, items: Iterable[Item]) -> None:
        """Warn of all new words of the prompts in one line, and the first time list the known ones."""
        if self.vocabulary is None:
            return
        jobs = (item for item in items if isinstance(item, Job))
        prompts = dict.fromkeys(text for job in jobs for text in (job.prompt, job.settings.negative_prompt))
        found = {word.lower(): None for prompt in prompts for word in self.vocabulary.unknown(prompt)}
        new = [word for word in found if word not in self._seen]
        if not new:
            return
        known = [] if self._seen else [shorten(line, _LONGEST, placeholder=" …") for line in self.vocabulary.lines()]
        self._seen.update(new)
        named = []
        for word in new[:_NAMED]:
            near = self.vocabulary.nearest(word)
            named.append(f"“{word}”" + (f" ({' or '.join(near)}?)" if near else ""))
        more = f" and {len(new) - _NAMED} more words of the prompts" if len(new) > _NAMED else ""
        warning = f"warning: the model {self.model} does not know {', '.join(named)}{more}"
        self._say(f"{warning}. It knows, as emt doctor tells, too:" if known else warning)
        for line in known:
            self._say(f"  {line}")
