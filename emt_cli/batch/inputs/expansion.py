"""Expansion of references, prompts and seeds into jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from emt.errors import EmtError
from emt.remote import Downloads, MissingError
from emt_cli.batch.inputs.layers import SettingLayers
from emt_cli.batch.inputs.prompt_files import (
    Line,
    check_line,
    check_stream,
    read_file,
    read_lines,
    read_stream,
    read_text,
)
from emt_cli.batch.inputs.references import Finder, ReferencePaths, check_folders, check_order
from emt_cli.batch.inputs.seeds import draw_seeds
from emt_cli.batch.inputs.shapes import Shapes
from emt_cli.batch.inputs.watching import Watcher
from emt_cli.batch.jobs import Item, Job, Rejected
from emt_cli.batch.options import (
    ALL_FRAMES,
    REFERENCE_SIZE,
    SETTING_NAMES,
    Settings,
    TransferOptions,
    UsageError,
    parse_defaults,
    parse_seeds,
)


def expand(
    options: TransferOptions,
    defaults: Mapping[str, Any],
    say: Callable[[str], None] = lambda text: None,
    shapes: Shapes | None = None,
    keep_seeds: bool = True,
    folder: Path | None = None,
) -> tuple[list[Job | Rejected], Iterator[Item]]:
    """All jobs of a command line.

    Args:
        options: The command line.
        defaults: The model's own defaults, by setting.
        say: Called with a line for each folder of which files are not read.
        shapes: Of the model's clips; None for the published one's.
        keep_seeds: Keep the seeds that are drawn in the output folder.
        folder: Where they are kept on this machine for an output folder in a store; None for the output folder.

    Returns:
        The jobs that are named, those of one shape and one reference next to each other; and those that
        arrive, on standard input, if it was named, line by line, or in watched folders. Both of the shard alone.

    Raises:
        UsageError: the command line makes no sense (no prompts file, unequal `--pair`, nothing to do).
    """
    arguments = list(options.references or [])
    prompts = [check_line({"prompt": text}) for text in options.prompt or []]
    prompts += [row for path in options.prompts or [] for row in read_file(path)]
    complete = [row for row in prompts if isinstance(row, Line) and "reference" in row.fields]
    rejected = [row for row in prompts if isinstance(row, Rejected)]
    loose = [row for row in prompts if isinstance(row, Line) and "reference" not in row.fields]
    if not arguments and not complete and not rejected:
        raise UsageError("no references: name clips, folders or globs, or - for jobs on standard input")
    streamed = "-" in arguments
    if streamed:
        check_stream()
    base = _layers(options, defaults, shapes, say)
    watched = check_folders(arguments) if options.watch else []
    finder = Finder(options.recursive, options.out, say, base.references.path)
    references = [] if options.watch else finder.find(arguments)
    base.check_layers()
    seeds = parse_seeds(options.seeds, partial(draw_seeds, folder or options.out, keep=keep_seeds, say=say))

    pairs: list[tuple[Path | Rejected | None, Line | Rejected | None]]
    if options.pair:
        if len(references) != len(prompts):
            counts = f"here are {len(references)} and {len(prompts)}"
            raise UsageError(f"--pair needs as many prompts as references; {counts}")
        check_order([argument for argument in arguments if argument != "-"], say)
        pairs = [*zip(references, prompts)]
    else:
        each: Sequence[Line | None] = loose or ([] if rejected or streamed else [None])
        pairs = [(reference, row) for reference in references for row in each]
        lost = [] if references or streamed or options.watch else loose  # prompts that go with no reference
        without: list[Line | Rejected] = [*complete, *lost, *rejected]
        pairs += [(None, row) for row in without]
    base.shapes.look_at(_looked_at(pairs, base))
    shard = options.part
    listed = _together(shard.of(item for reference, row in pairs for item in _jobs(reference, row, base, seeds)))
    if options.watch:
        rows: Sequence[Line | None] = loose or [None]

        def make(path: Path) -> Iterator[Job | Rejected]:
            base.forget()  # the size of a clip of that name may be another
            return (item for row in rows for item in _jobs(path, row, base, seeds))

        quiet = Finder(options.recursive, options.out, lambda text: None)
        return listed, Watcher(lambda: quiet.clips(watched), make, not loose, say).items()
    return listed, shard.of(_streamed(references, loose, base, seeds)) if streamed else iter(())


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
    return _layers(known, defaults).settings({}, Path())


def preset_of(options: TransferOptions, name: str, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """Values that a preset sets.

    Raises:
        EmtError: there is no such preset.
    """
    return _layers(options, defaults).preset(name)


def _layers(
    options: TransferOptions,
    defaults: Mapping[str, Any],
    shapes: Shapes | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> SettingLayers:
    return SettingLayers(
        parse_defaults(defaults),
        options.settings,
        shapes or Shapes(),
        ReferencePaths(Downloads(say)),
        options.background,
        options.presets,
        say,
    )


def _looked_at(pairs: Iterable[tuple[Any, Any]], base: SettingLayers) -> dict[Path, None]:
    """The references on which settings of jobs depend."""
    found: dict[Path, None] = {}
    for reference, row in pairs:
        fields = row.fields if isinstance(row, Line) else {}
        if base.look_at_references(fields):
            path = base.references.path(fields["reference"]) if "reference" in fields else reference
            with suppress(EmtError):  # it is raised where its job is
                found |= {base.references.fetch(path): None} if isinstance(path, Path) else {}
    return found


def _streamed(
    references: Sequence[Path | Rejected], prompts: Sequence[Line], base: SettingLayers, seeds: list[int]
) -> Iterator[Item]:
    nothing: Sequence[None] = [None]
    for row in read_stream():
        if not isinstance(row, Line):
            yield row
            continue
        for reference in nothing if "reference" in row.fields else references or nothing:
            for prompt in [Line({})] if "prompt" in row.fields else prompts or [Line({})]:
                yield from _jobs(reference, replace(row, fields={**prompt.fields, **row.fields}), base, seeds)


def _jobs(
    reference: Path | Rejected | None, row: Line | Rejected | None, base: SettingLayers, seeds: list[int]
) -> Iterator[Job | Rejected]:
    """The jobs of one reference (or the row's own) and one row (or the prompts beside the clip)."""
    fields = row.fields if isinstance(row, Line) else {}
    if isinstance(reference, Rejected):
        yield replace(reference, prompt=fields.get("prompt", ""))
        return
    if isinstance(row, Rejected):
        yield row
        return
    origin = row.origin if isinstance(row, Line) else ""
    path = base.references.path(fields["reference"]) if "reference" in fields else reference
    if not isinstance(path, Path):
        problem = EmtError("the job has no reference", 'Give "reference", or name clips before it.')
        yield Rejected(problem, origin, "", fields.get("prompt", ""))
        return
    texts: list[Line | Rejected] = (
        [Line({"prompt": fields["prompt"]}, origin)] if "prompt" in fields else _beside(path, base)
    )
    own = tuple(name for name in SETTING_NAMES if name in fields)
    try:
        settings = base.settings({name: fields[name] for name in own}, path)
    except EmtError as error:
        yield Rejected(error, origin, base.references.named(path), fields.get("prompt", ""))
        return
    for text in texts:
        if isinstance(text, Rejected):
            yield replace(text, origin=origin or text.origin)
            continue
        for seed in [fields["seed"]] if "seed" in fields else seeds:
            yield Job(
                path,
                text.fields["prompt"],
                seed,
                settings,
                own,
                text.origin,
                source=base.references.sources.get(path, ""),
            )


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


def _beside(reference: Path, base: SettingLayers) -> list[Line | Rejected]:
    """The prompts in `clip.txt` beside `clip.mp4`."""
    companion = reference.with_suffix(".txt")
    rows: list[Line | Rejected] = []
    named = base.references.named(reference)
    if reference in base.references.sources:
        url = base.references.sources[reference]
        place, dot, suffix = url.rpartition(".")
        beside = f"{place}.txt" if dot and "/" not in suffix else f"{url}.txt"
        try:
            companion = base.references.downloads.fetch(beside)
        except MissingError:
            pass
        except EmtError as error:
            return [Rejected(error, "", named)]
    if companion != reference and companion.is_file():
        try:
            rows = read_lines(companion.name, read_text(companion))
        except OSError as error:
            return [Rejected(EmtError(f"cannot read {companion.name}: {error.strerror}"), "", named)]
        except EmtError as error:
            return [Rejected(EmtError(f"{companion.name} {error.problem}", error.hint), "", named)]
    problem = EmtError("no prompt", f"Give --prompt or --prompts, or write {companion.name} beside the clip.")
    return rows or [Rejected(problem, "", named)]
