"""`emt make-pairs`: clips of the same motions with different content, to train the adapter on."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emt.remote import check_on_disk
from emt_cli.batch.options import (
    Precision,
    TransferOptions,
    UsageError,
    check_device,
    parse_batch_size,
    parse_seeds,
    usage_errors,
)
from emt_cli.batch.shards import Shard
from emt_cli.messages import console as stderr_console
from emt_cli.messages import say
from emt_cli.text import printable

if TYPE_CHECKING:
    from emt.train.data import Rendering
    from emt.train.teacher import Filter, Guidance

_PLAIN_SECONDS = 15.0
_RENDERED, _TAUGHT = "Rendered pairs", "Pairs from real clips"
_OPTIONS = {
    _RENDERED: ("motions", "appearances", "realism", "two_subjects", "camera", "seed", "fps"),
    _TAUGHT: (
        *("from_references", "prompts", "seeds", "model", "steps", "guidance", "motion_guidance"),
        *("min_fidelity", "min_consistency", "no_filter", "precision", "batch_size", "shard"),
    ),
}


def _rendered(help: str, **limits: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=_RENDERED, **limits)


def _taught(help: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_TAUGHT, **limits)


def make_pairs(
    context: typer.Context,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Output folder; an incomplete one is continued.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="Output folder (same as OUT).", show_default=False)
    ] = None,
    motions: Annotated[
        int | None,
        _rendered(
            "Render pairs: total number of motions in OUT, existing ones included.",
            min=1,
            max=1_000_000,
            show_default=False,
        ),
    ] = None,
    appearances: Annotated[
        int, _rendered("Clips rendered of each motion, each with other content.", min=2, max=16)
    ] = 2,
    realism: Annotated[
        float, _rendered("Share of motions whose reference is rendered to look like real footage.", min=0, max=1)
    ] = 0.3,
    two_subjects: Annotated[float, _rendered("Share of motions with two subjects.", min=0, max=1)] = 0.2,
    camera: Annotated[float, _rendered("Share of motions with a moving camera.", min=0, max=1)] = 0.5,
    seed: Annotated[int, _rendered("Random seed of the motions and their content.", min=0, max=2**63 - 1)] = 0,
    fps: Annotated[float, _rendered("Frames per second of the clips.", min=1, max=120)] = 8.0,
    from_references: Annotated[
        list[str] | None,
        _taught(
            "Make pairs of these: a clip, a folder of clips, or a glob in quotes; may be repeated.", metavar="CLIPS"
        ),
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        _taught("File of prompts, one a line: content of the new clips, as for emt transfer.", metavar="FILE"),
    ] = None,
    seeds: Annotated[str, _taught("Seeds for each reference and prompt, such as 0,7,10-15.")] = "0",
    model: Annotated[
        str | None,
        _taught(
            "Model that acts as teacher: model folder or hub id. Default: demo, the small model.", show_default=False
        ),
    ] = None,
    steps: Annotated[int | None, _taught("Number of denoising steps. Default: the model's.", min=1, max=500)] = None,
    guidance: Annotated[
        float | None, _taught("Classifier-free guidance scale, 1 for none. Default: the model's.", min=1, max=50)
    ] = None,
    motion_guidance: Annotated[
        float, _taught("Weight of the motion guidance; 2000 is the published value, 0 disables it.", min=0, max=1e9)
    ] = 2000.0,
    min_fidelity: Annotated[
        float, _taught("Drop clips whose motion fidelity to the reference is lower.", min=-1, max=1)
    ] = 0.8,
    min_consistency: Annotated[float, _taught("Drop clips whose temporal consistency is lower.", min=0, max=1)] = 0.7,
    no_filter: Annotated[bool, _taught("Keep all clips; measure them without dropping any.", "--no-filter")] = False,
    precision: Annotated[
        Precision, _taught("Precision of the network; auto is fp16 on a GPU and fp32 on a CPU.")
    ] = Precision.AUTO,
    batch_size: Annotated[
        str, _taught("Number of clips denoised together, 1 to 64, or auto.", metavar="N|auto")
    ] = "auto",
    shard: Annotated[
        str,
        _taught(
            "Do part i of n of the clips, by a hash of each reference; n such runs share OUT.",
            metavar="i/n",
            show_default=False,
        ),
    ] = "",
    device: Annotated[str, typer.Option(help="Device to compute on: auto, cuda, cuda:N, mps or cpu.")] = "auto",
) -> None:
    """Make pairs of clips for `emt train`: the same motion, played with different content.

    With --motions they are rendered: different subjects over different scenes, in clips of 16 frames of 128×128.

    With --from-references they are made from real clips, as the paper's were: a teacher that needs no training plays
    each reference's motion with every prompt, by motion guidance on the model's own temporal attention; clips that
    follow it badly or flicker are dropped. OUT/pairs.jsonl records what was kept and dropped, and why.

    Writes a folder for each motion, with clips and a metadata.jsonl; prints OUT on stdout if there are pairs. Captions
    never name the motion. An interrupted run goes on when it is started again.
    """
    with usage_errors():
        check_device(device)
    folder = out or output
    if folder is None or (out and output):
        raise UsageError("name one folder to write, as OUT or with --out (and put globs in quotes)")
    if (motions is None) == (not from_references):
        raise UsageError("give either --motions, to render pairs, or --from-references, to make them of clips")
    with usage_errors():
        check_on_disk(folder, "OUT")
    _check_options(context, _RENDERED if from_references else _TAUGHT)
    if motions is not None:
        from emt.train.data import Rendering

        _render(folder, motions, Rendering(appearances, realism, two_subjects, camera, seed, fps), device)
        typer.echo(os.fsencode(folder))
    else:
        if not prompts:
            raise UsageError("--from-references needs --prompts FILE", "What the new clips show, a line each.")
        with usage_errors():
            parse_seeds(seeds)
            parse_batch_size(batch_size)
            Shard.parse(shard)
        from emt.train.teacher import Filter, Guidance

        given = {"steps": steps, "guidance": guidance}
        options = TransferOptions(
            references=from_references,
            prompts=prompts,
            seeds=seeds,
            out=folder,
            model=model,
            device=device,
            precision=precision,
            batch_size=batch_size,
            shard=shard,
            settings={name: value for name, value in given.items() if value is not None},
        )
        wanted = Filter(None, None) if no_filter else Filter(min_fidelity, min_consistency)
        _teach(options, Guidance(weight=motion_guidance), wanted)


def _check_options(context: typer.Context, other: str) -> None:
    """Turn away options of the other kind of pairs, which would be ignored."""
    for name in _OPTIONS[other]:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            needed = "--motions" if other == _RENDERED else "--from-references"
            raise UsageError(f"{option} goes with {needed}")


def _render(out: Path, motions: int, rendering: Rendering, device: str) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from emt.device import Device
    from emt.synthetic.renderer import World
    from emt.train.data import write_pairs

    place = Device.open(device, "fp32").torch_device
    console = stderr_console()
    columns = (TextColumn("motions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    made, printed = 0, time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=motions)

        def make_world() -> World:
            say(f"painting the world on {place}")
            return World(place, seed=rendering.seed)

        for done, fresh in write_pairs(out, motions, rendering, make_world, workers=rendering.appearances):
            made += fresh
            progress.update(task, completed=done)
            if not console.is_terminal and time.monotonic() - printed > _PLAIN_SECONDS:
                printed = time.monotonic()
                say(f"{done} of {motions} motions")
    say(f"{made} motions made, {motions - made} were there")


def _teach(options: TransferOptions, guidance: Guidance, wanted: Filter) -> None:
    from emt.evaluate.tracks import opencv
    from emt.model_folder import find_model
    from emt_cli.batch.inputs import PromptWarnings, expand
    from emt_cli.batch.jobs import numerics
    from emt_cli.batch.journal import Journal
    from emt_cli.batch.session import RunOptions, SessionOptions, open_session
    from emt_cli.batch.teaching import check_motions, complete, method
    from emt_cli.executors.local import LocalExecutor
    from emt_cli.terminal import ProgressReporter

    opencv()
    if "-" in (options.references or []):
        raise UsageError("--from-references takes clips, not jobs on standard input")
    with ProgressReporter() as reporter:
        reporter.phase("looking for the model and clips")
        model = find_model(options.model, download=True)
        listed = check_motions(expand(options, model.defaults, reporter.say)[0])
        reporter.total = len(listed)
        if options.model is None:
            reporter.say(model.introduction())
        PromptWarnings(model.name, model.vocabulary, reporter.say, model.reads_syntax).look(listed)
        session = open_session(SessionOptions.of(options, guidance), options.device, reporter.say, model)
        how = replace(RunOptions.of(options, numerics(options)), method=method(guidance), filter=wanted)
        journal = Journal(options.out, options.part.writer, beside=options.part.is_beside)
        try:
            summary = LocalExecutor(session, journal, reporter, how).run(listed)
            report = complete(options.out, reporter.say)
        finally:
            journal.close()
    _print_summary(report)
    if any(row["state"] == "kept" for row in report):
        typer.echo(os.fsencode(options.out))
    if code := summary.exit_code():
        raise typer.Exit(code)


def _print_summary(report: Sequence[dict[str, Any]]) -> None:
    """A table on standard error: what was kept of each reference."""
    from rich.table import Table
    from rich.text import Text

    from emt_cli.batch.teaching import MEASURES

    table = Table("reference", "kept", "dropped", "failed", "fidelity", "consistency")
    for reference in dict.fromkeys(row["reference"] or "" for row in report):
        rows = [row for row in report if (row["reference"] or "") == reference]
        count = [str(sum(row["state"] == state for row in rows)) for state in ("kept", "dropped", "failed")]
        means = []
        for name in MEASURES:
            values = [row[name] for row in rows if row[name] is not None]
            means.append(f"{sum(values) / len(values):.3f}" if values else "")
        table.add_row(Text(printable(Path(reference).name)), *count, *means)
    stderr_console().print(table)
