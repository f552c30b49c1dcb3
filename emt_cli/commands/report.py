"""`emt report`: a page or a contact sheet of references and results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from emt_cli.batch import journal
from emt_cli.messages import say
from emt_cli.report.page import check_folder, order_of, write_report


def report(
    outs: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT...",
            help="An output folder of `emt transfer`; or several, which are shown as one.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page. Default: report.html in the first OUT.", show_default=False),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Another output folder: its results are shown beside those of the same reference, prompt and seed.",
            metavar="OUT",
            show_default=False,
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            help="Write this instead: the first dozen results below their references, in a .gif or .mp4 that plays or "
            "in a .png or .jpg of some frames.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a page that shows references and results side by side, playing in sync.

    It opens from disk, without a server or a network, as long as it stays where it is written. Where `emt evaluate OUT`
    has measured the results, the page sorts and filters by each measure and explains it. With --compare it shows the
    results of two output folders side by side.
    """
    out, *others = dict.fromkeys(outs)
    if sheet is None:
        typer.echo(os.fsencode(write_report(out, output, compare, others)))
        return
    from emt_cli.report.sheet import check_sheet, write_sheet

    if output is not None or compare is not None:
        raise typer.BadParameter("--sheet is written instead of a page: leave --output and --compare out")
    if others:
        raise typer.BadParameter("--sheet shows one output folder")
    check_folder(out)
    check_sheet(sheet)
    write_sheet(sheet, sorted(journal.current(out), key=order_of), out, say)
    typer.echo(os.fsencode(sheet))
