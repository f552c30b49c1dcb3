"""Reading of what the user gave: the command line's references and prompts, prompt files, and standard input."""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import os
import re
import select
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from emt.backbone import PUBLISHED, module_of
from emt.errors import EmtError
from emt.hub import parse_hub, split_scale
from emt.presets import PRESETS, SCHEDULER_DEFAULTS, preset_values
from emt.prompt_syntax import WEBUI, has_weighted_break, words_of
from emt.remote import (
    Downloads,
    MissingError,
    child,
    copy_of,
    fetch,
    files,
    is_url,
    matching,
    normal,
    shown,
    stat,
    to_path,
)
from emt.vocabulary import Vocabulary, without
from emt_cli.batch.jobs import Item, Job, Rejected
from emt_cli.batch.options import (
    ALL_FRAMES,
    JOB_FIELDS,
    REFERENCE_SIZE,
    SETTING_NAMES,
    Settings,
    TransferOptions,
    UsageError,
    check_sound,
    check_together,
    field_name,
    parse_defaults,
    parse_field,
    parse_seeds,
    unknown_field,
    usage_errors,
)
from emt_cli.batch.seeds import draw_seeds
from emt_cli.batch.shapes import Shapes
from emt_cli.batch.watching import Watcher
from emt_cli.text import nearest

MAX_LINE = 1 << 20  # characters of one line of a job file
_MAX_PROMPTS = 1 << 28  # bytes of a prompts file; /dev/zero has no end
_LINES, _JOB_LINES, _CELLS = ("", ".txt", ".text"), (".jsonl", ".ndjson"), (".csv",)
_PROMPT_FILES = "A prompts file is .txt (a prompt a line), .csv or .jsonl (a job a line)."
#: The first bytes of a text file say how it is written; PowerShell writes UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NAMED = 8  # unknown words that a warning names, and folders that notes name
_LONGEST = 700  # characters of a line of known ones


@dataclass(frozen=True)
class _Line:
    """Some fields of a job; the others come from the command line."""

    fields: Mapping[str, Any]
    origin: str = ""


@dataclass(frozen=True)
class _Base:
    """Base settings of jobs: the model's own settings, and those that the command line sets."""

    defaults: Mapping[str, Any]
    given: Mapping[str, Any]
    shapes: Shapes
    background: Sequence[Mapping[str, Any]] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None
    _said: set[tuple[str, str]] = field(default_factory=set)
    _made: dict[tuple[Any, ...], Settings] = field(default_factory=dict)
    downloads: Downloads = field(default_factory=lambda: Downloads(lambda text: None))
    sources: dict[Path, str] = field(default_factory=dict)
    _paths: dict[str, Path] = field(default_factory=dict)

    def path(self, reference: str) -> Path:
        """The absolute path of a reference; of one behind a URL that of its copy. Jobs with the same share one object.

        Attributes:
            sources: URLs by the paths of their copies, which may be yet to come.
        """
        if reference not in self._paths:
            here = copy_of(reference) if is_url(reference) else to_path(_with_slashes(reference))
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

    def settings(self, own: Mapping[str, Any], reference: Path) -> Settings:
        """The settings of a job whose own line sets some: it wins over the command line, and both over presets.

        Jobs with the same share one object.

        Raises:
            EmtError: they exclude each other, or depend on the reference, which cannot be read.
        """
        key = (*own.items(), reference if self.look_at_references(own) else None)
        if key not in self._made:
            self._made[key] = self._make(own, reference)
        return self._made[key]

    def look_at_references(self, own: Mapping[str, Any]) -> bool:
        """Return whether settings of a job whose own line sets some may depend on its reference."""
        layers = (own, self.given, *self.background, *self.presets.values())
        return any(layer.get("size") == REFERENCE_SIZE or layer.get("frames") == ALL_FRAMES for layer in layers)

    def _make(self, own: Mapping[str, Any], reference: Path) -> Settings:
        values: Mapping[str, Any] = {}
        for layer in (*self.background, self._over(self.given, own, reference)):
            if "preset" in layer:  # it wins over what a weaker source sets
                values = self._over(values, self.preset(layer["preset"]), reference)
            values = self._over(values, layer, reference)
        if values.get("frames") == ALL_FRAMES:
            part = {name: values.get(name, getattr(Settings, name)) for name in ("start", "duration", "stride")}
            values = {**values, "frames": self.shapes.frames(self.fetch(reference), **part)}
        check_sound(values)
        models = self.defaults.get("scheduler", Settings.scheduler)
        made_for = self._few_steps(values)
        chosen = values.get("scheduler", made_for.get("scheduler", models))
        own = {} if chosen is models else SCHEDULER_DEFAULTS.get(chosen.value, {})
        own = {name: parse_field(name, value) for name, value in own.items()}
        return Settings(**{**self.defaults, **own, **made_for, **values})

    def _few_steps(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The sampling that the first distilled LoRA of a clip is made for, which is said once."""
        sources = [split_scale(text)[0] for text in values.get("lora", ())]
        names = [source if parse_hub(source) else re.split(r"[/\\]", source)[-1] for source in sources]
        few = module_of(PUBLISHED, "few_steps").find_few_steps(names) if names else None
        if few is None:
            return {}
        made_for = {"scheduler": few.sampler, "steps": few.steps, "guidance": few.guidance}
        made_for = {name: parse_field(name, value) for name, value in made_for.items() if name not in values}
        words = " ".join(f"--{name} {getattr(value, 'value', value)}" for name, value in made_for.items())
        if words and (few.title, words) not in self._said:
            self._said.add((few.title, words))
            self.say(f"note: a LoRA of {few.title}: {words} (options of the clip change them)")
        return made_for

    def _over(self, weaker: Mapping[str, Any], layer: Mapping[str, Any], reference: Path) -> dict[str, Any]:
        """Settings of a layer over those of a weaker one; a size and a width or height take each other's place."""
        weaker, layer = self._sized(weaker, reference), self._sized(layer, reference)
        replaced = {"size"} if "size" not in layer and {"width", "height"} & layer.keys() else set()
        return {**{name: value for name, value in weaker.items() if name not in replaced}, **layer}

    def _sized(self, given: Mapping[str, Any], reference: Path) -> Mapping[str, Any]:
        """Settings with the width and height that their size stands for."""
        if not given.get("size"):
            return given
        width, height = self.shapes.size(given["size"], self._looked_at(given["size"], reference))
        return {**given, "width": width, "height": height}

    def _looked_at(self, size: str, reference: Path) -> Path:
        return self.fetch(reference) if size == REFERENCE_SIZE else reference

    def check_layers(self) -> None:
        """Check what the command line, the environment and config files set.

        Raises:
            UsageError: there is no such preset, or settings of one of them exclude each other.
        """
        with usage_errors():
            for layer in (*self.background, self.given, *self.presets.values()):
                check_together(layer)
                if "preset" in layer:
                    self.preset(layer["preset"])

    def preset(self, name: str) -> Mapping[str, Any]:
        """Values of a preset, of emt or the user's own."""
        if name in self.presets:
            return self.presets[name]
        if name not in PRESETS:
            known = (*PRESETS, *self.presets)
            near = f"Did you mean {close}? " if (close := nearest(name, known)) else ""
            allowed = f"{near}Allowed are {', '.join(known)}, and what a config file defines."
            raise EmtError(f"there is no preset {name!r:.100}", allowed)
        values = preset_values(name, self.defaults.get("steps", Settings.steps))
        return {name: parse_field(name, value) for name, value in values.items()}


def settings_of(options: TransferOptions, defaults: Mapping[str, Any]) -> Settings:
    """The settings of a clip whose own line sets none, but for the size and the frames of its reference.

    Args:
        options: The command line.
        defaults: The model's own defaults, by setting.
    """
    given = [*options.background, options.settings]
    left_to_it = (("size", REFERENCE_SIZE), ("frames", ALL_FRAMES))
    layers = [dict(item for item in layer.items() if item not in left_to_it) for layer in given]
    known = replace(options, background=layers[:-1], settings=layers[-1])  # there is no reference to look at
    return _base(known, defaults).settings({}, Path())


def preset_of(options: TransferOptions, name: str, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """Values that a preset sets.

    Raises:
        EmtError: there is no such preset.
    """
    return _base(options, defaults).preset(name)


def _base(
    options: TransferOptions,
    defaults: Mapping[str, Any],
    shapes: Shapes | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> _Base:
    layers = options.settings, shapes or Shapes(), options.background, options.presets
    return _Base(parse_defaults(defaults), *layers, say)


def expand(
    options: TransferOptions,
    defaults: Mapping[str, Any],
    say: Callable[[str], None] = lambda text: None,
    shapes: Shapes | None = None,
    keep_seeds: bool = True,
) -> tuple[list[Job | Rejected], Iterator[Item]]:
    """All jobs of a command line.

    Args:
        options: The command line.
        defaults: The model's own defaults, by setting.
        say: Called with a line for each folder of which files are not read.
        shapes: Of the model's clips; None for the published one's.
        keep_seeds: Keep the seeds that are drawn in the output folder.

    Returns:
        The jobs that are named, those of one shape and one reference next to each other; and those that
        arrive, on standard input, if it was named, line by line, or in watched folders. Both of the shard alone.

    Raises:
        UsageError: the command line makes no sense (no prompts file, unequal `--pair`, nothing to do).
    """
    arguments = list(options.references or [])
    prompts = [_checked({"prompt": text}) for text in options.prompt or []]
    prompts += [row for path in options.prompts or [] for row in _read_file(path)]
    complete = [row for row in prompts if isinstance(row, _Line) and "reference" in row.fields]
    rejected = [row for row in prompts if isinstance(row, Rejected)]
    loose = [row for row in prompts if isinstance(row, _Line) and "reference" not in row.fields]
    if not arguments and not complete and not rejected:
        raise UsageError("no references: name clips, folders or globs, or - for jobs on standard input")
    streamed = "-" in arguments
    base = replace(_base(options, defaults, shapes, say), downloads=Downloads(say))
    watched = _check_folders(arguments) if options.watch else []
    finder = _Finder(options.recursive, options.out, say, base.path)
    references = [] if options.watch else finder.find(arguments)
    base.check_layers()
    seeds = parse_seeds(options.seeds, partial(draw_seeds, options.out, keep=keep_seeds, say=say))

    pairs: list[tuple[Path | Rejected | None, _Line | Rejected | None]]
    if options.pair:
        if len(references) != len(prompts):
            counts = f"here are {len(references)} and {len(prompts)}"
            raise UsageError(f"--pair needs as many prompts as references; {counts}")
        _check_order([argument for argument in arguments if argument != "-"], say)
        pairs = [*zip(references, prompts)]
    else:
        each: Sequence[_Line | None] = loose or ([] if rejected or streamed else [None])
        pairs = [(reference, row) for reference in references for row in each]
        pairs = [*pairs, *((None, row) for row in complete), *((None, row) for row in rejected)]
    base.shapes.look_at(_looked_at(pairs, base))
    shard = options.part
    listed = _together(shard.of(item for reference, row in pairs for item in _jobs(reference, row, base, seeds)))
    if options.watch:
        rows: Sequence[_Line | None] = loose or [None]

        def make(path: Path) -> Iterator[Job | Rejected]:
            base._made.clear()  # the size of a clip of that name may be another
            return (item for row in rows for item in _jobs(path, row, base, seeds))

        quiet = _Finder(options.recursive, options.out, lambda text: None)
        return listed, Watcher(lambda: quiet.clips(watched), make, not loose, say).items()
    return listed, shard.of(_streamed(references, loose, base, seeds)) if streamed else iter(())


def _check_folders(arguments: Sequence[str]) -> list[str]:
    """Folders to watch.

    Raises:
        UsageError: one of the arguments is none.
    """
    for argument in arguments:
        if is_url(argument) or not Path(argument).is_dir():
            raise UsageError(f"--watch {argument}: not a folder on this machine", "Name a folder that is there.")
    return list(arguments)


def _looked_at(pairs: Iterable[tuple[Any, Any]], base: _Base) -> dict[Path, None]:
    """The references on which settings of jobs depend."""
    found: dict[Path, None] = {}
    for reference, row in pairs:
        fields = row.fields if isinstance(row, _Line) else {}
        if base.look_at_references(fields):
            path = base.path(fields["reference"]) if "reference" in fields else reference
            with suppress(EmtError):  # it is raised where its job is
                found |= {base.fetch(path): None} if isinstance(path, Path) else {}
    return found


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
    path = base.path(fields["reference"]) if "reference" in fields else reference
    if not isinstance(path, Path):
        yield Rejected(EmtError("the job has no reference", 'Give "reference", or name clips before it.'), origin)
        return
    texts: list[_Line | Rejected] = (
        [_Line({"prompt": fields["prompt"]}, origin)] if "prompt" in fields else _beside(path, base)
    )
    own = tuple(name for name in SETTING_NAMES if name in fields)
    try:
        settings = base.settings({name: fields[name] for name in own}, path)
    except EmtError as error:
        yield Rejected(error, origin, base.named(path), fields.get("prompt", ""))
        return
    for text in texts:
        if isinstance(text, Rejected):
            yield replace(text, origin=origin or text.origin)
            continue
        for seed in [fields["seed"]] if "seed" in fields else seeds:
            yield Job(path, text.fields["prompt"], seed, settings, own, text.origin, source=base.sources.get(path, ""))


def _together(items: Iterable[Job | Rejected]) -> list[Job | Rejected]:
    """Jobs of one shape, and in it of one reference, next to each other; otherwise in the order given."""
    listed = list(items)
    order: dict[Any, int] = {}
    places: dict[tuple[int, Path], tuple[int, int]] = {}  # by the identity of the settings, which jobs share

    def place(item: Job | Rejected) -> tuple[int, int]:
        if isinstance(item, Rejected):
            return (-1, -1)
        key = id(item.settings), item.reference
        if key not in places:
            shape = order.setdefault(item.shape, len(order))
            places[key] = shape, order.setdefault((item.reference, str(item.sampling)), len(order))
        return places[key]

    return sorted(listed, key=place)


def _checked(fields: Any, origin: str = "") -> _Line | Rejected:
    try:
        if not isinstance(fields, dict):
            raise EmtError("the line is not a JSON object", f"A job has the fields {', '.join(JOB_FIELDS)}.")
        named = [(field_name(name), value) for name, value in fields.items()]
        if len(dict(named)) < len(named):
            raise EmtError("a field is given twice, by two of its names", "Give it once.")
        line = _Line({name: parse_field(name, value) for name, value in named}, origin)
        check_together(line.fields)
        return line
    except EmtError as error:
        known = fields if isinstance(fields, dict) else {}
        return Rejected(error, origin, str(known.get("reference", "")), str(known.get("prompt", "")))


def _read_file(given: Path) -> list[_Line | Rejected]:
    """The lines of a prompts file, or of a pipe."""
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
    rows: list[_Line | Rejected]
    if kind in _JOB_LINES:
        lines = enumerate(text.split("\n"), 1)
        rows = [_parse_line(line, f"{path.name} line {number}") for number, line in lines if line.strip()]
    elif kind in _CELLS:
        rows = _read_csv(path, text)
    else:
        if _is_json(text):
            raise UsageError(f"{named} holds JSON, not a prompt a line", _PROMPT_FILES)
        rows = _read_lines(path.name, text)
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
    start = data[:4096]
    try:
        if encoding == "utf-8" and start.count(0) > len(start) / 8:
            raise ValueError
        text = data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except ValueError:
        raise EmtError("is no text in UTF-8", "Save it as text in UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


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


def _read_lines(name: str, text: str) -> list[_Line | Rejected]:
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    return [_checked({"prompt": line}, f"{name} line {n}") for n, line in lines if line and not line.startswith("#")]


def _read_csv(path: Path, text: str) -> list[_Line | Rejected]:
    csv.field_size_limit(MAX_LINE)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[_Line | Rejected] = []
    try:
        names = [field_name(name) for name in reader.fieldnames or []]
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise UsageError(f"--prompts {path.name}: the column {twice[0]} is there twice", "Keep one of them.")
        unknown = [name for name in reader.fieldnames or [] if field_name(name) not in JOB_FIELDS]
        if unknown or not reader.fieldnames:
            allowed = f"the first line names the columns, of {', '.join(JOB_FIELDS)}"
            hint = unknown_field(unknown[0]).hint if unknown else ""
            raise UsageError(f"--prompts {path.name}: unknown columns {unknown}; {allowed}", hint)
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
        return _checked(json.loads(line, object_pairs_hook=_once), origin)
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


def _read_stream() -> Iterator[_Line | Rejected | None]:
    """Lines of standard input as they arrive, and None whenever the next one is yet to come."""
    if sys.stdin is None:
        raise UsageError("- reads jobs from standard input, which is closed")
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


def _with_slashes(reference: str) -> str:
    """A path of a job file as this system writes it: one that Windows wrote has backslashes."""
    slashed = reference.replace("\\", "/")
    return slashed if not os.path.lexists(reference) and os.path.lexists(slashed) else reference


def _beside(reference: Path, base: _Base) -> list[_Line | Rejected]:
    """The prompts in `clip.txt` beside `clip.mp4`."""
    companion = reference.with_suffix(".txt")
    rows: list[_Line | Rejected] = []
    named = base.named(reference)
    if reference in base.sources:
        url = base.sources[reference]
        place, dot, suffix = url.rpartition(".")
        beside = f"{place}.txt" if dot and "/" not in suffix else f"{url}.txt"
        try:
            companion = base.downloads.fetch(beside)
        except MissingError:
            pass
        except EmtError as error:
            return [Rejected(error, "", named)]
    if companion != reference and companion.is_file():
        try:
            rows = _read_lines(companion.name, read_text(companion))
        except OSError as error:
            return [Rejected(EmtError(f"cannot read {companion.name}: {error.strerror}"), "", named)]
        except EmtError as error:
            return [Rejected(EmtError(f"{companion.name} {error.problem}", error.hint), "", named)]
    problem = EmtError("no prompt", f"Give --prompt or --prompts, or write {companion.name} beside the clip.")
    return rows or [Rejected(problem, "", named)]


# ---- references ----------------------------------------------------------------------------------------------------


def _by_name(path: Path) -> list[Any]:
    """Natural order of paths, folder by folder: `clip2` before `clip10`."""
    from emt.video import natural_key

    return [natural_key(part) for part in path.parts]


def _check_order(arguments: Sequence[str], say: Callable[[str], None]) -> None:
    """Say so where a shell has put clips in another order than their numbers'."""
    if len(arguments) > 2 and arguments == sorted(arguments):
        natural = sorted(arguments, key=lambda argument: _by_name(Path(argument)))
        if natural != arguments:
            names = ", ".join(Path(argument).name for argument in arguments[:3])
            say(f"note: --pair takes references in the order given: {names}, …; put a glob in quotes for natural order")


class _Finder:
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
        self._out = normal(out) if is_url(out) else os.path.abspath(out)
        self._stems: dict[Path, set[str]] = {}  # names of clips without their suffixes, by folder
        self._said = 0

    def find(self, arguments: Iterable[str]) -> list[Path | Rejected]:
        """Absolute paths of the clips, each once, in the order of the arguments and in natural order of names."""
        found: list[Path | Rejected] = []
        for argument in arguments:
            if argument == "-":
                continue
            try:
                if is_url(argument):
                    found.extend(self._locate(url) for url in self._in_store(normal(argument)))
                else:
                    found.extend(Path(os.path.abspath(path)) for path in self._named(str(to_path(argument))))
            except EmtError as error:
                found.append(Rejected(error, "", shown(normal(argument)) if is_url(argument) else argument))
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                found.append(Rejected(EmtError(f"cannot read it: {reason}"), "", argument))
        return list(dict.fromkeys(found))

    def clips(self, folders: Iterable[str]) -> list[Path]:
        """Absolute paths of the clips in folders, in natural order; those of a folder that cannot be read are none."""
        found: list[Path] = []
        for folder in folders:
            with suppress(OSError, EmtError):
                found.extend(Path(os.path.abspath(path)) for path in self._inside(Path(folder)))
        return found

    def _named(self, argument: str) -> list[Path]:
        from emt.video import is_clip

        path = Path(argument)
        if not os.path.lexists(argument):
            matches = sorted((Path(match) for match in glob.glob(argument, recursive=True)), key=_by_name)
            clips = [match for match in matches if is_clip(match)] or matches
            if not clips:
                raise EmtError("no such file", "Name a clip, a folder of clips or a glob that matches some.")
            return clips
        if path.is_dir() and not is_clip(path):
            clips = self._inside(path)
            if not clips:
                hint = "Name another one" + ("." if self.recursive else ", or search its folders with --recursive.")
                raise EmtError("no clips in this folder", hint)
            return clips
        if path.is_dir():
            self._look_for_unread(path)
        if path.suffix == ".txt" and path.stem in self._clips_of(path.parent):
            return []  # the prompts of the clip beside it, as a shell's `clips/*` names them too
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
            matches = sorted(matches, key=lambda match: _by_name(Path(match)))
            return [match for match in matches if Path(match).suffix.lower() in VIDEO_SUFFIXES] or matches
        if not is_folder:
            return [url]
        names = [name for name in files(url, recursive=self.recursive) if not re.search(r"(^|/)\.", name)]
        names = [name for name in names if not child(url, name).startswith(f"{self._out}/")]
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

    def _inside(self, folder: Path) -> list[Path]:
        """The clips in a folder, with --recursive in its folders too."""
        from emt.video import is_clip, natural_key
        from emt.video.names import count

        self._look_for_unread(folder)
        clips, passed = [], 0
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: natural_key(entry.name))
        for entry in listed:
            path = Path(entry.path)
            if entry.name.startswith(".") or os.path.abspath(path) == self._out:
                continue
            if is_clip(path):
                clips.append(path)
            elif entry.is_dir(follow_symlinks=False):
                if not self.recursive:
                    passed += 1
                    continue
                try:
                    clips.extend(self._inside(path))
                except OSError as error:
                    self._note(f"ignored the folder {path}: {error.strerror}")
        if passed and clips:
            self._note(f"not searched: {count(passed, 'folder')} in {folder} (--recursive does)")
        return clips

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


# ---- prompts -------------------------------------------------------------------------------------------------------


class PromptWarnings:
    """Warnings about prompts: words that a model does not know, and syntax of other programs that it reads as text.

    Each word, and each kind of syntax, is named once.

    Args:
        model: Name of the model in warnings.
        vocabulary: Its words; None for a model that reads any.
        say: Called with each line.
        reads_syntax: The model reads weights, breaks and chunks, unless a job says `plain`.
    """

    def __init__(
        self, model: str, vocabulary: Vocabulary | None, say: Callable[[str], None], reads_syntax: bool = False
    ) -> None:
        self.model, self.vocabulary, self._say, self._reads = model, vocabulary, say, reads_syntax
        self._seen: set[str] = set()
        self._syntax: set[str] = set()

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass items on as they come, after a look at each job."""
        for item in items:
            self.look([item])
            yield item

    def look(self, items: Iterable[Item]) -> None:
        """Warn of all that is new in the prompts, in one line each."""
        texts: dict[tuple[str, bool], None] = {}
        for job in (item for item in items if isinstance(item, Job)):
            read = self._reads and job.settings.prompt_syntax.value == WEBUI
            texts |= dict.fromkeys((text, read) for text in _texts(job))
        self._look_at_syntax(texts)
        if self.vocabulary is not None:
            self._look_at_words([_words(text) if read else text for text, read in texts], self.vocabulary)

    def _look_at_syntax(self, texts: Iterable[tuple[str, bool]]) -> None:
        found = {
            part: kind for text, read in texts for kind, part in unread_syntax(text, read) if kind not in self._syntax
        }
        self._syntax |= set(found.values())
        if found:
            self._say(f"warning: {_read_as_text(found)}")

    def _look_at_words(self, prompts: Iterable[str], vocabulary: Vocabulary) -> None:
        """Warn of unknown words; the first time with the known ones."""
        found = {word.lower(): None for prompt in prompts for word in vocabulary.unknown(prompt)}
        new = [word for word in found if word not in self._seen]
        if not new:
            return
        known = [] if self._seen else [shorten(line, _LONGEST, placeholder=" …") for line in vocabulary.lines()]
        self._seen.update(new)
        named = []
        for word in new[:_NAMED]:
            near = vocabulary.nearest(word)
            named.append(f"“{word}”" + (f" ({' or '.join(near)}?)" if near else ""))
        more = f" and {len(new) - _NAMED} more words of the prompts" if len(new) > _NAMED else ""
        warning = f"warning: the model {self.model} does not know {', '.join(named)}{more}"
        self._say(f"{warning}. Words that it knows (emt doctor lists all):" if known else warning)
        for line in known:
            self._say(f"  {line}")


def _texts(job: Job) -> Iterator[str]:
    """The prompts of a job, without the words of its embeddings."""
    words = [text.partition("=")[0] for text in job.settings.embedding]
    for text in (job.prompt, job.settings.negative_prompt):
        yield without(text, words)


def _words(prompt: str) -> str:
    """The words of a prompt without its syntax; all of it where that makes no sense, which is an error later on."""
    try:
        return words_of(prompt)
    except EmtError:
        return prompt


#: Syntax that other programs read in prompts, by what it means there.
_SYNTAX = {
    "weight": re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)|\(\([^()]+\)\)"),
    "network": re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:[^<>]*>", re.IGNORECASE),
    "break": re.compile(r"\bBREAK\b"),
    "bracket": re.compile(r"\[[^\[\]]+\]"),
    "choice": re.compile(r"\{[^{}]*\|[^{}]*\}"),
    "embedding": re.compile(r"\bembedding:\S+"),
}


#: What of it is read as text where weights and breaks are read: networks, choices, and editing from step to step.
_UNREAD = {kind: _SYNTAX[kind] for kind in ("network", "choice", "embedding")} | {
    "editing": re.compile(r"\[[^\[\]]*:\s*\d*\.?\d+\s*\]|\[[^\[\]]*\|[^\[\]]*\]"),
    "composition": re.compile(r"\bAND\b"),
}


def unread_syntax(prompt: str, read: bool = False) -> Iterator[tuple[str, str]]:
    """Parts of a prompt that mean something else in other programs: the kind of syntax, and the part.

    Args:
        prompt: The prompt.
        read: Weights, breaks and chunks are read.
    """
    for kind, pattern in (_UNREAD if read else _SYNTAX).items():
        for match in pattern.finditer(prompt):
            yield kind, match[0]
    if read and has_weighted_break(prompt):
        yield "break", "BREAK in brackets"


def syntax_warnings(job: Job) -> list[str]:
    """One line for a job's record if its prompts have syntax of other programs, else none."""
    texts, read = (job.prompt, job.settings.negative_prompt), bool(job.reading)
    parts = {part for text in texts for _, part in unread_syntax(text, read)}
    return [_read_as_text(sorted(parts))] if parts else []


def _read_as_text(parts: Collection[str]) -> str:
    more = f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
    named = ", ".join(shorten(part, 60, placeholder=" …") for part in list(parts)[:_NAMED])
    return f"read as plain text, not as weights, LoRAs, breaks or choices: {named}{more}"
