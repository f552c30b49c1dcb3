"""`emt report`: a page or a contact sheet of references and results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from emt.remote import check_on_disk, distinct
from emt_cli.batch import journal
from emt_cli.messages import say
from emt_cli.report.page import check_folder, order_of


def report(
    outs: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT",
            help="An output folder of `emt transfer`, or its URL; or several, which are shown as one.",
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
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download references that OUT names by URL and that are not here.")
    ] = False,
) -> None:
    """Write a page that shows references and results side by side, playing in sync.

    It opens from disk, without a server or a network, as long as it stays where it is written. Where `emt evaluate OUT`
    has measured the results, the page sorts and filters by each measure and explains it. With --compare it shows the
    results of two output folders side by side. The page of an OUT behind a URL is put there, with what it refers to.
    """
    from emt_cli.report.published import Folder, publish_report

    given, *others = distinct(outs)
    check_on_disk(output, "--output")
    check_on_disk(sheet, "--sheet")
    if sheet is None:
        typer.echo(os.fsencode(publish_report([given, *others], say, output, compare, fetch)))
        return
    from emt_cli.report.sheet import check_sheet, write_sheet

    if output is not None or compare is not None:
        raise typer.BadParameter("--sheet is written instead of a page: leave --output and --compare out")
    if others:
        raise typer.BadParameter("--sheet shows one output folder")
    out = Folder(given, say, fetch).path
    check_folder(out)
    check_sheet(sheet)
    write_sheet(sheet, sorted(journal.current(out), key=order_of), out, say)
    typer.echo(os.fsencode(sheet))
