"""`emt make-pairs`: rendered clips of the same motions with different content, to train the adapter on."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from emt_cli.options import check_device

_PLAIN_SECONDS = 15.0


def make_pairs(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; goes on with one that is not complete.")],
    motions: Annotated[int, typer.Option(help="Motions, with those that are there.", min=1, max=1_000_000)],
    appearances: Annotated[int, typer.Option(help="Clips of each motion.", min=2, max=16)] = 2,
    realism: Annotated[
        float, typer.Option(help="Share of motions whose reference looks like real footage.", min=0, max=1)
    ] = 0.3,
    two_subjects: Annotated[float, typer.Option(help="Share of motions with two subjects.", min=0, max=1)] = 0.2,
    camera: Annotated[float, typer.Option(help="Share of motions with a moving camera.", min=0, max=1)] = 0.5,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0, max=2**63 - 1)] = 0,
    device: Annotated[str, typer.Option(help="Where clips are drawn: auto, cuda, cuda:N, mps or cpu.")] = "auto",
    fps: Annotated[float, typer.Option(help="Frames a second of the clips.", min=1, max=120)] = 8.0,
) -> None:
    """Render pairs of clips for `emt train`: the same motion, played by different subjects over different scenes.

    Writes a folder for each motion, with clips of 16 frames of 128×128 named <caption>.mp4 and a metadata.jsonl; prints
    OUT on stdout. Captions never name the motion. An interrupted run goes on when it is started again.
    """
    check_device(device)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from emt.train.data import Rendering, write_pairs
    from emt.train.world import World
    from emt_cli.device import Device

    place = Device.open(device, "fp32").place
    rendering = Rendering(appearances, realism, two_subjects, camera, seed, fps)
    console = Console(stderr=True)
    columns = (TextColumn("motions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    made, told = 0, time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=motions)

        def make_world() -> World:
            print(f"painting the world on {place}", file=sys.stderr)
            return World(place, seed=seed)

        for done, fresh in write_pairs(out, motions, rendering, make_world, workers=appearances):
            made += fresh
            progress.update(task, completed=done)
            if not console.is_terminal and time.monotonic() - told > _PLAIN_SECONDS:
                told = time.monotonic()
                print(f"{done} of {motions} motions", file=sys.stderr, flush=True)
    print(f"{made} motions made, {motions - made} were there", file=sys.stderr)
    typer.echo(out)
