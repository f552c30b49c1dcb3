"""`emt plan`: what `emt transfer` would do."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from emt.errors import EmtError
from emt_cli.batch.estimates import guidance_factor
from emt_cli.batch.options import Method, Settings, TransferOptions
from emt_cli.commands.arguments import takes_options_and_folders
from emt_cli.text import duration, message, printable, size

if TYPE_CHECKING:
    from emt_cli.batch.planning import Plan

_TABLE_ROWS = 60


@takes_options_and_folders
def plan(options: TransferOptions) -> None:
    """Show what `emt transfer` with the same arguments would do, without loading anything.

    Lists the jobs and what is done already, what failed the last time, which finished clips --overwrite replaces, and
    estimated time and memory; finds missing weights, words that the model does not know, clips that are too short,
    impossible sizes and full disks. Exit code 1 if something in it cannot be done.
    """
    show(options)


def show(options: TransferOptions) -> None:
    """Print a plan on standard output; ends with exit code 1 if something in it cannot be done."""
    from emt_cli.batch.planning import make_plan
    from emt_cli.batch.records import dumps
    from emt_cli.executors.choice import count_workers

    made = make_plan(options)
    try:
        made.workers = count_workers(options) or made.workers
    except EmtError as error:
        made.problems.append(message(error.problem, error.hint))
    if options.json:
        for job in made.jobs:
            sys.stdout.buffer.write(dumps(job.as_dict()) + b"\n")
        sys.stdout.buffer.write(dumps(made.as_dict()) + b"\n")
        sys.stdout.buffer.flush()
    else:
        _print_table(made)
    if made.counts["problem"] or made.problems:
        raise typer.Exit(1)


def _describe(settings: Settings, gpu: bool) -> str:
    """Note on a job that takes longer than others: its candidates, its method and what that costs."""
    notes = [f"the best of {settings.best_of}"] if settings.best_of > 1 else []
    if settings.method is Method.GUIDANCE:
        factor = guidance_factor(settings.as_dict(), gpu)
        notes.append(f"by motion guidance, about {factor:.1f} times as long as by an adapter")
    return ", ".join(notes)


def _print_table(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from emt_cli.batch.jobs import Job
    from emt_cli.batch.planning import TO_DO

    console = Console(soft_wrap=not sys.stdout.isatty())
    table = Table("", "clip", "time", "")
    order = ("problem", "failed", "replaces", "open", "done")
    for job in sorted(plan.jobs, key=lambda job: order.index(job.state))[:_TABLE_ROWS]:
        item = job.item
        named = item.named if isinstance(item, Job) else item.reference
        title = job.output or " ".join(part for part in (item.origin, named, item.prompt[:60]) if part)
        style = {"problem": "red", "failed": "red", "replaces": "yellow", "done": "green"}.get(job.state, "")
        note = message(job.error.problem, job.error.hint) if job.error else ""
        if not note and isinstance(item, Job):
            note = _describe(item.settings, plan.device != "cpu")
        seconds = duration(job.seconds) if job.state in TO_DO else ""
        table.add_row(Text(job.state, style), Text(printable(title)), seconds, Text(printable(note)))
    console.print(table)
    counts = plan.counts
    if len(plan.jobs) > _TABLE_ROWS:
        console.print(f"… and {len(plan.jobs) - _TABLE_ROWS} more (all of them with --json)")
    to_do = sum(counts[state] for state in TO_DO)
    parts = {"replaces": "to replace a finished clip", "failed": "that failed the last time"}
    among = " and ".join(f"{counts[state]} {text}" for state, text in parts.items() if counts[state])
    text = f"{to_do} to do" + (f" ({among})" if among else "")
    text += f", {counts['done']} done, {counts['problem']} with problems"
    if to_do:
        text += f"; about {duration(plan.seconds)}, {size(plan.memory)} of memory and {size(plan.disk)} of disk"
        workers = f", {plan.workers} workers" if plan.workers > 1 else ""
        text += f" on {plan.device}{workers} (by {plan.source})"
    console.print(Text(printable(text)))
    for problem in plan.problems:
        console.print(Text(f"problem: {printable(problem)}", "red"))
