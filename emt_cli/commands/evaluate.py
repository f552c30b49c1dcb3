"""`emt evaluate`: how well results follow their references and prompts."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emt import demo
from emt.errors import EmtError
from emt.storage import write_atomically
from emt_cli.batch import journal

if TYPE_CHECKING:
    from emt.evaluate.judge import Judge
    from emt.evaluate.pairs import Pair, Row
    from emt.evaluate.statistics import Estimate
    from emt.evaluate.text import ImageTextModel

_SHOWN = 40
_COLUMNS = {
    "temporal_consistency": "temporal",
    "text_alignment": "text",
    "motion_fidelity": "fidelity",
    "camera": "camera",
    "leakage": "leakage",
    "seconds": "seconds",
}


class Tracks(str, Enum):
    """How points are followed through a clip."""

    OPENCV = "opencv"
    COTRACKER = "cotracker"


def evaluate(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="An output folder of `emt transfer`, or a .jsonl or .csv file with the fields reference, result and "
            "(optional) prompt; its paths are relative to the file.",
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
            "the demo model's own; a judge's .safetensors file; none; or auto: judge for clips of the demo model whose "
            "prompts it knows."
        ),
    ] = "auto",
    tracks: Annotated[Tracks, typer.Option(help="Point tracker for motion fidelity.")] = Tracks.OPENCV,
    cotracker_checkpoint: Annotated[
        Path | None, typer.Option(help="File of CoTracker's weights.", show_default=False)
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Number of frames to compare. [default: all of the result's]", min=2, max=512)
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the text model: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines instead of a table.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the JSON Lines to this file.", show_default=False)
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(help="Folder to write plots of the measures and camera curves into.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of threads that read and track clips.", min=1, max=256)] = 4,
) -> None:
    """Measure motion fidelity, camera motion, temporal consistency, text alignment and leakage of results.

    A row a result and a summary with 95% confidence intervals, as a table or as JSON Lines: the summary is the last
    line. A pair that cannot be read is reported, the others go on, and the exit code is 1.
    """
    pairs = list(_pairs(source, pair or [], frames))
    if not pairs:
        raise EmtError(
            f"{source} has no finished results." if source else "Nothing to evaluate.",
            "Give an output folder of `emt transfer`, a .jsonl or .csv file, or --pair REFERENCE=RESULT.",
        )
    from emt.evaluate.pairs import evaluate_pairs, summarise

    model = _text_model(text_model, device, pairs)
    bar = _Progress(len(pairs))
    try:
        rows = evaluate_pairs(
            pairs,
            text_model=model,
            tracks=tracks.value,
            checkpoint=cotracker_checkpoint,
            workers=min(workers, len(pairs)),
            progress=bar.step,
        )
    finally:
        bar.stop()
    summary = summarise(rows)
    lines = [json.dumps(row.as_dict(), ensure_ascii=False) for row in rows]
    failed = [row for row in rows if row.error is not None]
    totals = {name: estimate.as_dict() for name, estimate in summary.items()}
    lines.append(json.dumps({"summary": totals, "clips": len(rows) - len(failed), "failed": len(failed)}))
    if output is not None:
        _write(output, lines)
    if plots is not None:
        from emt.evaluate.plots import write_plots

        write_plots(rows, plots)
    if as_json:
        print("\n".join(lines))
    else:
        _print_table(rows, summary)
    if failed:
        raise typer.Exit(1)


class _Progress:
    """A bar on standard error, where that is a terminal, and a line for each pair that failed."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        console = Console(stderr=True)
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
            print(f"{row.pair.result}: {row.error}", file=sys.stderr)

    def stop(self) -> None:
        self._bar.stop()


def _pairs(source: Path | None, given: Sequence[str], frames: int | None) -> Iterator[Pair]:
    from emt.evaluate.pairs import Pair

    for text in given:
        parts = text.split("=", 2)
        if len(parts) < 2 or not parts[0] or not parts[1]:
            raise typer.BadParameter(f"{text!r} is not REFERENCE=RESULT", param_hint="--pair")
        yield Pair(Path(parts[0]), Path(parts[1]), parts[2] if len(parts) == 3 else None, frames=frames)
    if source is None:
        return
    if source.is_dir():
        yield from _from_results(source, frames)
    elif source.suffix.lower() in (".jsonl", ".csv"):
        for number, fields in _from_file(source):
            if not isinstance(fields.get("reference"), str) or not isinstance(fields.get("result"), str):
                raise EmtError(
                    f"{source}, line {number}: no reference or no result.",
                    'Each line needs both: {"reference": "walk.mp4", "result": "robot.mp4", "prompt": "a robot"}',
                )
            reference, result = (source.parent / fields[name] for name in ("reference", "result"))
            record = {name: fields[name] for name in ("seed", "model") if fields.get(name) is not None}
            seconds = _number(fields.get("seconds"))
            yield Pair(reference, result, fields.get("prompt") or None, seconds, fields, frames, record)
    else:
        raise EmtError(
            f"{source} is neither a folder nor a .jsonl or .csv file." if source.exists() else f"{source} not found.",
            "Give an output folder of `emt transfer`, or a file with the fields reference, result and prompt.",
        )


def _from_results(folder: Path, frames: int | None) -> Iterator[Pair]:
    """The finished jobs of an output folder, by its journal; the last word on each output counts."""
    from emt.evaluate.pairs import Pair

    if not (folder / journal.FILE_NAME).is_file():
        raise EmtError(
            f"{folder} has no {journal.FILE_NAME}.",
            "Give a folder that `emt transfer --out` has written, or a .jsonl or .csv file of pairs.",
        )
    done: dict[str, dict[str, Any]] = {}
    for line in journal.read(folder):
        if line.get("state") == "done" and isinstance(line.get("output"), str):
            done[line["output"]] = line
        elif line.get("state") == "dropped":
            done.pop(line.get("output", ""), None)
    for name, line in done.items():
        timings = line.get("timings") or {}
        record = {key: line[key] for key in ("seed", "model", "engine", "device") if line.get(key) is not None}
        yield Pair(
            reference=folder / line["reference"],
            result=folder / name,
            prompt=line.get("prompt"),
            seconds=sum(timings.values()) if timings else None,
            sampling=line.get("settings") or {},
            frames=frames,
            record=record,
        )


def _from_file(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                for number, row in enumerate(csv.DictReader(file), 2):
                    fields = {name: value for name, value in row.items() if name and value}
                    numbers = {
                        name: _number(fields[name]) for name in ("start", "duration", "stride") if name in fields
                    }
                    if "stride" in numbers:
                        numbers["stride"] = int(numbers["stride"] or 1)
                    yield number, {**fields, **numbers}
                return
            for number, text in enumerate(file, 1):
                if text.strip():
                    fields = json.loads(text)
                    if not isinstance(fields, dict):
                        raise EmtError(f"{path}, line {number}: not a JSON object.")
                    yield number, fields
    except (OSError, UnicodeDecodeError) as error:
        raise EmtError(f"{path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise EmtError(f"{path}, line {number}: not JSON ({error.msg}).") from error


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise EmtError(f"{value!r} is not a number.", "seconds, start, duration and stride are numbers.") from None


def _text_model(name: str, device: str, pairs: Sequence[Pair]) -> ImageTextModel | Judge | None:
    if name == "none":
        return None
    from emt.device import Device
    from emt.evaluate import judge

    if name == "auto":
        # It has learnt from rendered clips: what another model draws is strange to it, even where it knows the words.
        if any(pair.record.get("model", demo.NAME) != demo.NAME for pair in pairs):
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


def _write(path: Path, lines: Sequence[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise EmtError(f"{path} cannot be written: {error.strerror}.") from error


def _print_table(rows: Sequence[Row], summary: dict[str, Estimate]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from emt.evaluate.pairs import MEASURES

    console = Console()
    measured = sorted((row for row in rows if row.error is None), key=lambda row: row.values["motion_fidelity"] or 0.0)
    table = Table(
        title="lowest motion fidelity" if len(measured) > _SHOWN else None, title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("result", overflow="fold", min_width=16)
    wide = console.width >= 100
    if wide:
        table.add_column("prompt", overflow="fold")
    for title in _COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in measured[:_SHOWN]:
        cells = [_cell(row.values[name]) for name in _COLUMNS]
        prompt = [escape(row.pair.prompt or "")] if wide else []
        table.add_row(escape(row.pair.result.name), *prompt, *cells)
    console.print(table)
    totals = Table(
        title=f"{len(measured)} clips, mean and 95% confidence interval", title_justify="left", box=box.SIMPLE_HEAD
    )
    for title in ("measure", "mean", "95% interval", "clips"):
        totals.add_column(title, justify="left" if title == "measure" else "right", no_wrap=True)
    for name, title in MEASURES.items():
        estimate = summary[name]
        if estimate.clips:
            interval = f"{estimate.low:.3f} to {estimate.high:.3f}"
            totals.add_row(title, f"{estimate.value:.3f}", interval, str(estimate.clips))
    console.print(totals)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
