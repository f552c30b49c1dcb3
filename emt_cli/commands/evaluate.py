"""`emt evaluate`: how well results follow their references and prompts."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emt import demo
from emt.errors import EmtError, count, first_line
from emt.remote import check_on_disk, distinct, is_url
from emt.storage import check_replaceable, unwritable, write_atomically
from emt_cli.batch import journal
from emt_cli.batch.inputs import read_table, read_text
from emt_cli.batch.options import UsageError, check_device, usage_errors
from emt_cli.batch.records import dumps
from emt_cli.batch.results import reference_of
from emt_cli.messages import WARNING, say
from emt_cli.messages import console as stderr_console
from emt_cli.report.metrics import FILE_NAME as METRICS
from emt_cli.text import message, printable, short_names

if TYPE_CHECKING:
    from emt.evaluate.judge import Judge
    from emt.evaluate.pairs import Pair, Row
    from emt.evaluate.statistics import Estimate
    from emt.evaluate.text import ImageTextModel
    from emt_cli.report.published import Folder

_SHOWN = 40
_NAMED = 8  # lines of a file that cannot be read
_COLUMNS = {
    "temporal_consistency": "temporal",
    "text_alignment": "text",
    "motion_fidelity": "fidelity",
    "camera": "camera",
    "leakage": "leakage",
    "seconds": "seconds",
}


def evaluate(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Output folders of `emt transfer`, or their URLs, or .jsonl or .csv files with the fields reference, "
            "result and (optional) prompt; their paths are relative to the file.",
            show_default=False,
        ),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluate one pair, given as REFERENCE=RESULT or REFERENCE=RESULT=PROMPT; may be repeated.",
            show_default=False,
        ),
    ] = None,
    text_model: Annotated[
        str,
        typer.Option(
            help="Model that measures text alignment: folder or hub id of an image-text model (CLIP, SigLIP); judge, "
            "the demo model's own; a judge's .safetensors file; none; or auto: judge for clips of demo and demo-dit "
            "whose prompts it knows."
        ),
    ] = "auto",
    frames: Annotated[
        int | None, typer.Option(help="Number of frames to compare. Default: all of the result's.", min=2, max=512)
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the text model: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines instead of a table.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write the JSON Lines to. Default: metrics.jsonl in each output folder, where the report "
            "looks for them.",
            show_default=False,
        ),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(help="Folder to write plots of the measures and camera curves into.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of threads that read and track clips.", min=1, max=256)] = 4,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download references that output folders name by URL and that are not here.")
    ] = False,
) -> None:
    """Measure motion fidelity, camera motion, gains, consistency, text alignment and likeness of results.

    A row a result and a summary with 95% confidence intervals, as a table or as JSON Lines: the summary is the last
    line. Measures of an output folder are kept in it for `emt report OUT`, which explains each. A pair that cannot be
    read is reported, the others go on, and the exit code is 1.
    """
    from emt_cli.report.published import Folder

    with usage_errors():
        check_device(device)
    sources = distinct(sources or [])
    for given, option in ((output, "--output"), (plots, "--plots")):
        check_on_disk(given, option)
    if output is not None:
        check_replaceable(output, "file of measures", (b'{"reference"', b'{"summary"'))
        if len(distinct([*sources, output])) == len(sources):
            raise EmtError(f"--output {output} is the file that is read", "Name another file.")
    for option, place in (("--output", output.parent if output else None), ("--plots", plots)):
        if place is not None and (reason := unwritable(place)):
            raise EmtError(f"{option} cannot be written: {reason}.", "Name another place.")
    folders = [Folder(source, say, fetch) for source in sources]
    unread: list[EmtError] = []
    found = [(folder, list(_pairs(folder.path, frames, unread))) for folder in folders]
    pairs = [*_given_pairs(pair or [], frames), *(pair for _, own in found for pair in own)]
    if not pairs:
        if unread:
            raise unread[0]
        hint = "Give an output folder of `emt transfer`, a .jsonl or .csv file, or --pair REFERENCE=RESULT."
        if not sources:
            raise UsageError("Nothing to evaluate.", hint)
        named = " and ".join(map(str, sources))
        raise EmtError(f"{named} {'has' if len(sources) == 1 else 'have'} no finished results.", hint)
    for error in unread[:_NAMED]:
        say(message(error.problem, error.hint), WARNING)
    if more := unread[_NAMED:]:
        say(f"and {len(more)} more lines that cannot be read", WARNING)
    from emt.evaluate.pairs import summarise

    rows = _measure(pairs, text_model, device, workers)
    summary = summarise(rows)
    lines = _lines(rows, summary, len(unread))
    failed = unread or any(row.error is not None for row in rows)
    unwritten = _write(output, lines) if output is not None else None
    row_of = {id(row.pair): row for row in rows}
    for folder, own in found:
        if output is None and folder.path.is_dir() and own:
            of_it = [row_of[id(pair)] for pair in own]
            unwritten = _write(folder.path / METRICS, _lines(of_it, summarise(of_it)), folder) or unwritten
    if plots is not None:
        from emt.evaluate.plots import write_plots

        write_plots(rows, plots)
    if as_json:
        sys.stdout.flush()
        sys.stdout.buffer.write(b"".join(line + b"\n" for line in lines))
        sys.stdout.buffer.flush()
    else:
        _print_table(rows, summary)
    if unwritten is not None:
        raise unwritten
    if failed:
        raise typer.Exit(1)


def evaluate_results(out: Path, device: str) -> str:
    """Measure the finished results of an output folder and write `OUT/metrics.jsonl`, as `emt evaluate OUT` does.

    Args:
        out: The folder, with a journal.
        device: auto, cuda, cuda:N, mps or cpu.

    Returns:
        The means in a line for people.

    Raises:
        EmtError: OpenCV is not installed, or the measures cannot be written.
    """
    from emt.evaluate.measures import MEASURES
    from emt.evaluate.pairs import summarise
    from emt_cli.report.published import Folder

    folder = Folder(out, say)
    pairs = list(_from_results(folder.path, None))
    if not pairs:
        return "nothing to evaluate: there are no finished results"
    rows = _measure(pairs, "auto", device, 4)
    summary = summarise(rows)
    if (unwritten := _write(folder.path / METRICS, _lines(rows, summary), folder)) is not None:
        raise unwritten
    means = [
        f"{MEASURES[name].short} {summary[name].value:.3f}"
        for name in _COLUMNS
        if summary[name].clips and name != "seconds"
    ]
    failed = sum(row.error is not None for row in rows)
    text = f"evaluated {count(len(rows) - failed, 'clip')}: {', '.join(means)}"
    return f"{text}; {failed} could not be measured" if failed else text


def _measure(pairs: Sequence[Pair], text_model: str, device: str, workers: int) -> list[Row]:
    """Measure pairs, with a bar on standard error."""
    from emt.evaluate.pairs import evaluate_pairs

    model = _text_model(text_model, device, pairs)
    bar = _Progress(len(pairs))
    try:
        return evaluate_pairs(pairs, text_model=model, workers=min(workers, len(pairs)), progress=bar.step)
    finally:
        bar.stop()


class _Progress:
    """A bar on standard error, where that is a terminal, and a line for each pair that failed."""

    def __init__(self, total: int) -> None:
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        console = stderr_console()
        self._bar = Progress(
            *Progress.get_default_columns()[:2],
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("clips", total=total)
        self._bar.start()

    def step(self, row: Row) -> None:
        self._bar.advance(self._task)
        if row.error is not None:
            say(f"{row.pair.result}: {message(row.error.problem, row.error.hint)}", WARNING)

    def stop(self) -> None:
        self._bar.stop()


def _lines(rows: Sequence[Row], summary: dict[str, Estimate], unread: int = 0) -> list[bytes]:
    """Measures as JSON Lines: a row each, then their summary, with `unread` lines that have no row."""
    failed = sum(row.error is not None for row in rows)
    totals = {name: estimate.as_dict() for name, estimate in summary.items()}
    lines = [dumps(row.as_dict()) for row in rows]
    return [*lines, dumps({"summary": totals, "clips": len(rows) - failed, "failed": failed + unread})]


def _given_pairs(given: Sequence[str], frames: int | None) -> Iterator[Pair]:
    from emt.evaluate.pairs import Pair

    for text in given:
        parts = text.split("=", 2)
        if len(parts) < 2 or not parts[0] or not parts[1]:
            raise typer.BadParameter(f"{text!r} is not REFERENCE=RESULT", param_hint="--pair")
        for part in parts[:2]:
            check_on_disk(part, "--pair")
        yield Pair(Path(parts[0]), Path(parts[1]), parts[2] if len(parts) == 3 else None, frames=frames)


def _pairs(source: Path, frames: int | None, unread: list[EmtError]) -> Iterator[Pair]:
    """Pairs of an output folder or a file; errors of lines that name none are added to `unread`."""
    if source.is_dir():
        yield from _from_results(source, frames)
    elif source.suffix.lower() in (".jsonl", ".csv"):
        for number, fields in _from_file(source):
            try:
                if isinstance(fields, EmtError):
                    raise fields
                yield _pair_of(source, f"{source}, line {number}", fields, frames)
            except EmtError as error:
                unread.append(error)
    else:
        raise EmtError(
            f"{source} is neither a folder nor a .jsonl or .csv file." if source.exists() else f"{source} not found.",
            "Give an output folder of `emt transfer`, or a file with the fields reference, result and prompt.",
        )


def _pair_of(source: Path, where: str, fields: dict[str, Any], frames: int | None) -> Pair:
    """The pair of a line of a file."""
    from emt.evaluate.pairs import Pair

    if not isinstance(fields.get("reference"), str) or not isinstance(fields.get("result"), str):
        raise EmtError(
            f"{where}: no reference or no result.",
            'Each line needs both: {"reference": "walk.mp4", "result": "robot.mp4", "prompt": "a robot"}',
        )
    for name in ("reference", "result"):
        check_on_disk(fields[name], f"{where}: the {name}")
    reference, result = (source.parent / fields[name] for name in ("reference", "result"))
    if not isinstance(prompt := fields.get("prompt") or None, str | None):
        raise EmtError(f"{where}: the prompt {prompt!r:.100} is not a text.")
    record = {name: fields[name] for name in ("seed", "model") if fields.get(name) is not None}
    known = (name for name in ("seconds", "start", "duration", "stride") if fields.get(name) is not None)
    numbers = {name: _number(fields[name], where) for name in known}
    sampling = {**fields, **numbers} | ({"stride": int(numbers["stride"])} if "stride" in numbers else {})
    return Pair(reference, result, prompt, numbers.get("seconds"), sampling, frames, record)


def _from_results(folder: Path, frames: int | None) -> Iterator[Pair]:
    """The finished jobs of an output folder, by its journal; the last word on each output counts."""
    from emt.evaluate.pairs import Pair

    if not journal.exists(folder):
        raise EmtError(
            f"{folder} has no {journal.FILE_NAME}.",
            "Give a folder that `emt transfer --out` has written, or a .jsonl or .csv file of pairs.",
        )
    absent = set()
    for line in journal.current(folder):
        if line["state"] != "done":
            continue
        named = line.get("reference", "the reference that the journal does not name")
        reference = reference_of(folder, named)
        if is_url(named) and not reference.exists():
            absent.add(named)
        timings = line.get("timings") or {}
        record = {key: line[key] for key in ("seed", "model", "engine", "device") if line.get(key) is not None}
        yield Pair(
            reference=reference,
            result=folder / line["output"],
            prompt=_words(line),
            seconds=sum(timings.values()) if timings else None,
            sampling=line.get("settings") or {},
            frames=frames,
            record=record,
        )
    if absent:
        say(f"note: {count(len(absent), 'reference')} behind URLs not on this machine; --fetch downloads")


def _words(line: dict[str, Any]) -> str | None:
    """The prompt of a clip, without its syntax where that was read."""
    from emt.prompt_syntax import words_of

    prompt: str | None = line.get("prompt")
    with suppress(EmtError):  # none that this version reads
        if prompt and line.get("prompt_syntax"):
            return words_of(prompt)
    return prompt


def _from_file(path: Path) -> Iterator[tuple[int, dict[str, Any] | EmtError]]:
    """Lines of a file by their numbers: their fields, or the error of one that has none.

    Raises:
        EmtError: the file cannot be read.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise EmtError(f"{path} cannot be read: {error.strerror}.") from None
    except EmtError as error:
        raise EmtError(f"{path} {error.problem}.", error.hint) from None
    number = 1
    try:
        if path.suffix.lower() == ".csv":
            table = read_table(text, lambda names: {"reference", "result"} <= {*names})
            for number, cells in table.rows:
                yield number, {name: cell for name, cell in zip(table.names, cells) if name and cell}
            return
    except csv.Error as error:  # of what follows nobody knows where lines begin
        yield number, EmtError(f"{path}, line {number}: not CSV ({error}).")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                fields = json.loads(line)
                known = isinstance(fields, dict)
                yield number, fields if known else EmtError(f"{path}, line {number}: not a JSON object.")
            except (ValueError, RecursionError) as error:
                yield number, EmtError(f"{path}, line {number}: not JSON ({first_line(error)}).")


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
        if not math.isfinite(number) or isinstance(value, bool):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        problem = f"{where}: {value!r:.100} is not a number."
        raise EmtError(problem, "seconds, start, duration and stride are numbers.") from None


def _text_model(name: str, device: str, pairs: Sequence[Pair]) -> ImageTextModel | Judge | None:
    if name == "none":
        return None
    from emt.device import Device
    from emt.evaluate import judge

    if name == "auto":
        # It has learnt from rendered clips: what another model draws is strange to it, even where it knows the words.
        if any(pair.record.get("model", demo.NAME) not in demo.NAMES for pair in pairs):
            return None
        shipped = judge.Judge.load(judge.SHIPPED)
        known = [pair.prompt for pair in pairs if pair.prompt is not None]
        if not known or any(judge.read_prompt(text, shipped.vocabulary) is None for text in known):
            return None
    place = Device.open(device, "fp32").torch_device
    if name in ("auto", "judge"):
        return judge.Judge.load(judge.SHIPPED, place)
    if name.endswith(".safetensors"):
        return judge.Judge.load(name, place)
    from emt.evaluate.text import ImageTextModel

    return ImageTextModel(name, place)


def _write(path: Path, lines: Sequence[bytes], folder: Folder | None = None) -> EmtError | None:
    """Write lines to a file, of an output folder if one is given; returns why they could not be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, b"".join(line + b"\n" for line in lines))
        if folder is not None:
            folder.publish(path.name)
    except EmtError as error:
        return error
    except OSError as error:
        return EmtError(f"{path} cannot be written: {error.strerror}.", "Name another file with --output.")
    return None


def _print_table(rows: Sequence[Row], summary: dict[str, Estimate]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from emt.evaluate.measures import MEASURES

    console = Console()
    measured = sorted((row for row in rows if row.error is None), key=lambda row: row.values["motion_fidelity"] or 0.0)
    table = Table(
        title="lowest motion fidelity" if len(measured) > _SHOWN else None, title_justify="left", box=box.SIMPLE_HEAD
    )
    names = short_names(str(row.pair.result) for row in measured)
    references = short_names(str(row.pair.reference) for row in measured)
    table.add_column("result", overflow="fold", min_width=16)
    if several := len(references) > 1:
        table.add_column("reference", overflow="fold", min_width=9)
    wide = console.width >= 100
    if wide:
        table.add_column("prompt", overflow="fold")
    for title in _COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in measured[:_SHOWN]:
        cells = [_cell(row.values[name]) for name in _COLUMNS]
        reference = [Text(printable(references[str(row.pair.reference)]))] if several else []
        prompt = [Text(printable(row.pair.prompt or ""))] if wide else []
        table.add_row(Text(printable(names[str(row.pair.result)])), *reference, *prompt, *cells)
    console.print(table)
    totals = Table(
        title=f"{count(len(measured), 'clip')}, mean and 95% confidence interval",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for title in ("measure", "mean", "95% interval", "clips"):
        totals.add_column(title, justify="left" if title == "measure" else "right", no_wrap=True)
    for name, measure in MEASURES.items():
        estimate = summary[name]
        if estimate.clips:
            interval = f"{estimate.low:.3f} to {estimate.high:.3f}"
            totals.add_row(measure.title, f"{estimate.value:.3f}", interval, str(estimate.clips))
    console.print(totals)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
